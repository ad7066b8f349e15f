"""A model round at a silo.

θ_i = train(θ, local_steps)       δ_i = θ_i − θ       vector = encode(δ_i + residual)

With a control variate (study/strategies/scaffold.py) the input is [θ; c], and what is encoded is
[δ_i; Δc_i].
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from diffusion.batches import Images, Shared
from diffusion.checkpoint import Checkpoint, resume_from
from diffusion.execution import Execution
from diffusion.model import build_model, load_vector, parameter_layout, to_vector
from diffusion.training import train
from silo.data.cache import Labels
from silo.data.sheet import write_sheet
from silo.errors import ProposalRefused
from silo.files import move, sync_file, write_file
from silo.jobs.together import go_on_alone, leads
from silo.jobs.training import (
    SAVE_EVERY,
    execution_of,
    first_model,
    model_sha256,
    read_images,
    read_labels,
    reporting,
    saving,
)
from silo.orders import RoundTrained, TrainRound
from silo.process import pause_requested
from silo.worker import ProgressFile
from study.plan import Plan, load_plan
from study.quantity import RoundWork, decode_work, delta_encoding
from study.reservation import split_labels

Vector = NDArray[np.float32]


def train_round(order: TrainRound, progress: ProgressFile) -> RoundTrained:
    """Leaves vector and new residual on disk. Raises ProposalRefused for a first model that is not
    the one the plan's seed gives, or for tensor sizes that are not the model's."""
    plan, work = load_plan(order.plan), decode_work(order.work)
    if not isinstance(work, RoundWork):
        raise TypeError(f"{work.purpose} is no model round")
    given = np.fromfile(order.model, dtype="<f4").astype(np.float32, copy=False)
    model = _input_model(plan, work, order, given)
    own = np.load(order.control) if order.control.exists() else None
    steps = plan.rounds.local_steps
    shared = shared_images(plan, order.auxiliary)
    if shared is not None and leads() and not order.auxiliary_sheet.exists():
        _show(shared, order.auxiliary_sheet)
    trained = train_from(
        model,
        plan,
        given,
        read_images(order.images),
        labels=read_labels(plan, order.images),
        shared=shared,
        round=order.round,
        seed=order.seed,
        execution=execution_of(order.machine),
        own_control=own,
        progress=reporting(progress, f"training round {order.round}", steps),
        save=saving(order.checkpoint),
        resume=resume_from(order.checkpoint),
    )
    if not leads():
        return RoundTrained(trained.loss, 0, False, False, trained.first_bad_step)
    kept = order.residual
    residual = np.load(kept) if kept.exists() else np.zeros_like(trained.change)
    encoding = delta_encoding(work, order.silos, plan.secure_sum.ring)
    # In the first round the model follows from the plan. Later it is the study centre's choice, and
    # one that breaks training at all sites but one would show that one's delta, were zeros sent.
    fails = order.round > 1 and _fails_at_once(trained, plan.rounds.local_steps)
    if fails and _is_broken(order, plan, given):
        _save(order.new_residual, residual)
        write_file(order.vector, encoding.void(os.urandom).data.cast("B"))
        order.checkpoint.unlink(missing_ok=True)
        return RoundTrained(trained.loss, 0, True, True, trained.first_bad_step)
    encoded = encoding.encode(
        trained.change,
        residual,
        count=order.count,
        loss=trained.loss,
        key=rounding_key(order.work, order.model.name),
        silo=order.silo,
        consume=True,
    )
    _save(order.new_residual, encoded.residual)
    if trained.control is not None and not encoded.fault:
        _save(order.new_control, trained.control)
    write_file(order.vector, encoded.vector.data.cast("B"))
    order.checkpoint.unlink(missing_ok=True)
    return RoundTrained(
        trained.loss, encoded.saturated, encoded.fault, False, trained.first_bad_step
    )


@dataclass(frozen=True)
class Trained:
    """What the local steps of a round gave."""

    change: Vector
    """[parts · n] δ_i, or [δ_i; Δc_i]."""
    loss: float
    """Mean over the steps."""
    control: Vector | None
    """[n] c_i⁺ of strategies with a control variate."""
    first_bad_step: int | None
    """The first step whose loss was not finite."""


def train_from(
    model: nn.Module,
    plan: Plan,
    given: Vector,
    images: Images,
    *,
    labels: Labels | None = None,
    shared: Shared | None = None,
    round: int,
    seed: int,
    execution: Execution,
    own_control: Vector | None = None,
    progress: Callable[[int], None] | None = None,
    save: Callable[[Checkpoint], None] | None = None,
    resume: Checkpoint | None = None,
) -> Trained:
    """The silo's half of a round: `local_steps` steps from `given` (θ, or [θ; c]) on its images,
    and on the `shared` ones where the strategy wants that.

    `own_control` is c_i, None before the first round that this silo worked in.
    """
    n, rules, steps = len(given) // plan.strategy.parts, plan.strategy.local_rules(), plan.rounds
    start, control = given[:n], None
    own = np.zeros(n, np.float32) if own_control is None else own_control
    if rules.control:
        control = given[n:] - own
    load_vector(model, start)
    result = train(
        model,
        images,
        labels=labels,
        shared=shared,
        steps=steps.local_steps,
        schedule=plan.schedule,
        objective=plan.objective,
        optimizer=plan.optimizer_of(round),
        seed=seed,
        execution=execution,
        first_step=(round - 1) * steps.local_steps,
        proximal=(start, rules.proximal_mu) if rules.proximal_mu else None,
        control=control,
        progress=progress,
        save=save,
        save_every=SAVE_EVERY,
        save_now=pause_requested,
        resume=resume,
    )
    change, new_own = to_vector(model) - start, result.mean_gradient
    if new_own is not None:
        change = np.concatenate([change, new_own - own])
    loss = result.loss_sum / max(result.steps, 1)
    return Trained(change, loss, new_own, result.first_non_finite_step)


def shared_images(plan: Plan, path: Path | None) -> Shared | None:
    """The auxiliary images of a round's work. A label that is no class is a silo's mistake or
    malice: its image is left out, here as at the coordinator."""
    if path is None:
        return None
    # Mapped, as one's own images are: a set as large as memory would do, and each of the processes
    # that train together reads the same pages.
    records = np.memmap(path, np.uint8, "r").reshape(-1, plan.record_size - 1)
    part = plan.strategy.local_rules().auxiliary_share
    if plan.model.classes is None:
        return Shared(records.reshape(-1, *plan.data.shape), None, part)
    images, labels = split_labels(records, plan.data.shape)
    known = labels < plan.model.classes
    if not known.any():
        raise ProposalRefused("no auxiliary image has a label of the plan's classes")
    if not known.all():
        images, labels = images[known], labels[known]
    return Shared(images, labels, part)


def _show(shared: Shared, path: Path) -> None:
    """A sheet whole or not at all, since it is made once."""
    unfinished = path.with_name(f"{path.name}.part")
    write_sheet(shared.images, unfinished)
    move(unfinished, path)


def _input_model(plan: Plan, work: RoundWork, order: TrainRound, given: Vector) -> nn.Module:
    model = first_model(plan) if order.round == 1 else build_model(plan.model)
    sizes = tuple(int(np.prod(shape, dtype=np.int64)) for _, shape, _ in parameter_layout(model))
    if work.sizes != sizes * plan.strategy.parts:
        raise ProposalRefused(f"round {order.round}: the tensor sizes are not those of the model")
    start, rest = given[: sum(sizes)], given[sum(sizes) :]
    if order.round == 1 and rest.any():
        raise ProposalRefused("round 1: the control variate is not zero")
    if order.round == 1 and hashlib.sha256(start.astype("<f4").tobytes()).digest() != (
        model_sha256(model)
    ):
        raise ProposalRefused(
            "round 1: the first model is not the one that the plan's seed gives; a model made to "
            "remember images could look like this"
        )
    return model


def _save(path: Path, array: Vector) -> None:
    with open(path, "wb") as file:
        np.save(file, array)
    sync_file(path)


def _fails_at_once(trained: Trained, steps: int) -> bool:
    """A gradient that is not finite shows in the loss of the step after it, or in the change."""
    first = steps if trained.first_bad_step is None else trained.first_bad_step
    finite = np.isfinite(trained.change).all() and math.isfinite(trained.loss)
    return not finite and first <= 1


def _is_broken(order: TrainRound, plan: Plan, given: Vector) -> bool:
    """Whether it is the model, and not this machine: two steps in float32 on the CPU fail too."""
    go_on_alone()
    rounds = plan.rounds.model_copy(update={"local_steps": 2})
    again = train_from(
        build_model(plan.model),
        plan.model_copy(update={"rounds": rounds}),
        given,
        read_images(order.images),
        labels=read_labels(plan, order.images),
        shared=shared_images(plan, order.auxiliary),
        round=order.round,
        seed=order.seed,
        execution=Execution(torch.device("cpu"), torch.float32, torch.contiguous_format),
        own_control=np.load(order.control) if order.control.exists() else None,
    )
    return not (np.isfinite(again.change).all() and math.isfinite(again.loss))


def rounding_key(work: bytes, model: str) -> bytes:
    """The same at all silos of a round: by its work and the SHA-256 of its input model, in
    hexadecimal, which is its file's name."""
    parts = b"concilium/rounding", work, model.encode()
    return hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in parts)).digest()
