"""The local DDPM of FedDDPM: trained from the study's first model, sampled, audited, kept here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffusion.audit import audit
from diffusion.execution import choose_execution
from diffusion.model import build_model, load_vector
from diffusion.sampling import sample
from diffusion.training import train
from silo.files import move, sync_file
from silo.jobs.training import SAVE_EVERY, first_model, read_images, resume_from, save_to
from silo.orders import LocalTrained, Sampled, SampleLocal, TrainLocal
from silo.worker import ProgressFile
from study.plan import load_plan


def train_local(order: TrainLocal, progress: ProgressFile) -> LocalTrained:
    """Leaves the moving average of the weights; samples of the average are the better ones."""
    plan = load_plan(order.plan)
    if plan.warm_up is None:
        raise TypeError("the plan has no [warm_up]")
    steps = plan.warm_up.steps
    result = train(
        first_model(plan),
        read_images(order.images),
        steps=steps,
        schedule=plan.schedule,
        objective=plan.objective,
        optimizer=plan.optimizer,
        seed=order.seed,
        execution=choose_execution(order.machine.device, order.machine.threads),
        progress=lambda done, _: progress("training the local model", done, steps),
        save=lambda checkpoint: save_to(order.checkpoint, checkpoint),
        save_every=SAVE_EVERY,
        resume=resume_from(order.checkpoint),
    )
    _save(order.weights, result.ema)
    order.checkpoint.unlink(missing_ok=True)
    return LocalTrained(result.loss_sum / max(result.steps, 1), result.first_non_finite_step)


def sample_local(order: SampleLocal, progress: ProgressFile) -> Sampled:
    """Leaves the samples that are no copies of a training image."""
    plan = load_plan(order.plan)
    if plan.auxiliary is None:
        raise TypeError("the plan has no [auxiliary]")
    model = build_model(plan.model)
    load_vector(model, np.load(order.weights))
    # How many is this site's share of the counts: it is for nobody outside to see.
    progress("sampling", 0, 1)
    samples = sample(
        model,
        order.samples,
        schedule=plan.schedule,
        objective=plan.objective,
        sampler=plan.sampler,
        seed=order.seed,
        execution=choose_execution(order.machine.device, order.machine.threads),
        first_index=order.first,
    )
    progress("auditing samples", 0, 1)
    quantile = plan.auxiliary.audit_quantile
    keep, report = audit(samples, read_images(order.images), quantile=quantile)
    _save(order.kept, samples[keep])
    return Sampled(report.samples, report.kept, report.threshold)


def _save(path: Path, array: NDArray[Any]) -> None:
    partial = path.with_name(path.name + ".partial")
    with open(partial, "wb") as file:
        np.save(file, array)
    sync_file(partial)
    move(partial, path)
