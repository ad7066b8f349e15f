"""The local DDPM of FedDDPM: trained from the study's first model, sampled, audited, kept here."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffusion.audit import audit
from diffusion.checkpoint import resume_from
from diffusion.execution import Execution, choose_execution
from diffusion.labels import drawn_labels
from diffusion.model import build_model, load_vector
from diffusion.sampling import sample
from silo.data.cache import Labels
from silo.errors import DataError
from silo.files import move, sync_file
from silo.jobs.audit import write_audit
from silo.jobs.together import leads
from silo.jobs.training import (
    execution_of,
    pause_if_wanted,
    read_images,
    read_labels,
    reporting,
    saving,
)
from silo.jobs.warm_up import warm_up
from silo.orders import LocalTrained, Sampled, SampleLocal, TrainLocal
from silo.worker import ProgressFile
from study.integers import coarse_count
from study.plan import Plan, load_plan
from study.reservation import with_labels

FEWEST_OF_A_CLASS = 5
Vector = NDArray[np.float32]
_ACTIVITY = "training the local model"


def train_local(order: TrainLocal, progress: ProgressFile) -> LocalTrained:
    """Leaves the moving average of the weights; samples of the average are the better ones."""
    plan = load_plan(order.plan)
    if plan.warm_up is None:
        raise TypeError("the plan has no [warm_up]")
    steps, began = plan.warm_up.steps, time.monotonic()
    resumed = resume_from(order.checkpoint)
    done = warm_up(
        plan,
        read_images(order.images),
        labels=read_labels(plan, order.images),
        seed=order.seed,
        execution=execution_of(order.machine),
        checks=order.checkpoint.with_suffix(".checks.npz"),
        progress=reporting(progress, _ACTIVITY, steps),
        save=saving(order.checkpoint),
        resume=resumed,
    )
    trained = LocalTrained(done.loss, done.first_bad_step)
    if not leads():
        return trained
    _save(order.weights, done.weights)
    taken = done.steps - (resumed.steps if resumed else 0)
    _wait_out(done.steps, steps, (time.monotonic() - began) / max(1, taken), progress)
    order.checkpoint.unlink(missing_ok=True)
    order.checkpoint.with_suffix(".checks.npz").unlink(missing_ok=True)
    return trained


def _wait_out(done: int, steps: int, seconds_each: float, progress: ProgressFile) -> None:
    """Let the time pass that the steps not taken would have taken, and say what they would have
    said: when a local model has converged tells how many and how varied its images are."""
    for step in range(done + 1, steps + 1):
        time.sleep(seconds_each)
        pause_if_wanted()
        progress(_ACTIVITY, step, steps)


def sample_local(order: SampleLocal, progress: ProgressFile) -> Sampled:
    """Leaves the samples that are no copies of a training image, and what the audit found.

    In a conditional study labels are drawn as often as this site has them. Raises DataError where
    it has too few images of every class.
    """
    plan = load_plan(order.plan)
    if plan.auxiliary is None:
        raise TypeError("the plan has no [auxiliary]")
    weights: Vector = np.load(order.weights)
    known = read_labels(plan, order.images)
    labels = None
    if known is not None:
        shares = label_weights(known)
        labels = drawn_labels(shares, order.samples, seed=order.seed, first_index=order.first)
    # How many is this site's share of the counts: it is for nobody outside to see.
    progress("sampling", 0, 1)
    execution = choose_execution(order.machine.device, order.machine.threads)
    samples = draw(plan, weights, order.samples, order.first, order.seed, execution, labels)
    progress("auditing samples", 0, 1)
    quantile = plan.auxiliary.audit_quantile
    training = read_images(order.images)
    keep, report = audit(samples, training, quantile=quantile)
    write_audit(order.kept.parent, order.first, report, samples, training, keep)
    kept = samples[keep] if labels is None else with_labels(samples[keep], labels[keep])
    _save(order.kept, kept)
    return Sampled(report.samples, report.kept, report.threshold)


def draw(
    plan: Plan,
    weights: Vector,
    n: int,
    first: int,
    seed: int,
    execution: Execution,
    labels: Labels | None = None,
) -> NDArray[np.uint8]:
    """Samples number `first` … `first + n − 1` of a local model: uint8 (n, c, h, w)."""
    model = build_model(plan.model)
    load_vector(model, weights)
    return sample(
        model,
        n,
        schedule=plan.schedule,
        objective=plan.objective,
        sampler=plan.sampler,
        seed=seed,
        execution=execution,
        labels=labels,
        first_index=first,
    )


def label_weights(labels: Labels) -> NDArray[np.int64]:
    """How often each class is sampled here: in proportion to its coarse count, and not at all where
    it has so few images that its samples could only be copies and its presence tells of a person.

    Raises DataError where no class has enough images.
    """
    counts = [coarse_count(int(count)) for count in np.bincount(labels)]
    weights = np.array([count if count >= FEWEST_OF_A_CLASS else 0 for count in counts])
    if not weights.any():
        raise DataError(
            f"no class has {FEWEST_OF_A_CLASS} images here: too few to sample synthetic images from"
        )
    return weights


def _save(path: Path, array: NDArray[Any]) -> None:
    partial = path.with_name(path.name + ".partial")
    with open(partial, "wb") as file:
        np.save(file, array)
    sync_file(partial)
    move(partial, path)
