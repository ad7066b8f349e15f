"""A model round at a silo.

θ_i = train(θ, local_steps)       δ_i = θ_i − θ       vector = encode(δ_i + residual)
"""

from __future__ import annotations

import hashlib
import os

import numpy as np
from numpy.typing import NDArray
from torch import nn

from diffusion.execution import choose_execution
from diffusion.model import build_model, load_vector, parameter_layout, to_vector
from diffusion.training import TrainResult, train
from silo.errors import ProposalRefused
from silo.files import sync_file, write_file
from silo.jobs.training import (
    SAVE_EVERY,
    first_model,
    model_sha256,
    read_images,
    read_labels,
    resume_from,
    save_to,
)
from silo.orders import RoundTrained, TrainRound
from silo.worker import ProgressFile
from study.encoding import Encoded
from study.plan import Plan, load_plan
from study.quantity import RoundWork, decode_work, delta_encoding

Vector = NDArray[np.float32]


def train_round(order: TrainRound, progress: ProgressFile) -> RoundTrained:
    """Leaves vector and new residual on disk. Raises ProposalRefused for a first model that is not
    the one the plan's seed gives, or for tensor sizes that are not the model's."""
    plan, work = load_plan(order.plan), decode_work(order.work)
    if not isinstance(work, RoundWork):
        raise TypeError(f"{work.purpose} is no model round")
    start = np.fromfile(order.model, dtype="<f4").astype(np.float32, copy=False)
    model = _input_model(plan, work, order, start)
    result = _train(model, plan, order, start, progress)
    delta = to_vector(model) - start
    loss = result.loss_sum / max(result.steps, 1)
    encoded = _encode(order, work, plan, delta, loss)
    with open(order.new_residual, "wb") as file:
        np.save(file, encoded.residual)
    sync_file(order.new_residual)
    write_file(order.vector, encoded.vector.tobytes())
    order.checkpoint.unlink(missing_ok=True)
    return RoundTrained(loss, encoded.saturated, encoded.fault, result.first_non_finite_step)


def _input_model(plan: Plan, work: RoundWork, order: TrainRound, start: Vector) -> nn.Module:
    model = first_model(plan) if order.round == 1 else build_model(plan.model)
    sizes = tuple(int(np.prod(shape, dtype=np.int64)) for _, shape, _ in parameter_layout(model))
    if work.sizes != sizes:
        raise ProposalRefused(f"round {order.round}: the tensor sizes are not those of the model")
    if order.round == 1 and hashlib.sha256(start.astype("<f4").tobytes()).digest() != (
        model_sha256(model)
    ):
        raise ProposalRefused(
            "round 1: the first model is not the one that the plan's seed gives; a model made to "
            "remember images could look like this"
        )
    load_vector(model, start)
    return model


def _train(
    model: nn.Module, plan: Plan, order: TrainRound, start: Vector, progress: ProgressFile
) -> TrainResult:
    mu = plan.strategy.local_rules().proximal_mu
    steps = plan.rounds.local_steps
    return train(
        model,
        read_images(order.images),
        labels=read_labels(plan, order.images),
        steps=steps,
        schedule=plan.schedule,
        objective=plan.objective,
        optimizer=plan.optimizer_of(order.round),
        seed=order.seed,
        execution=choose_execution(order.machine.device, order.machine.threads),
        first_step=(order.round - 1) * steps,
        proximal=(start, mu) if mu else None,
        progress=lambda done, _: progress(f"training round {order.round}", done, steps),
        save=lambda checkpoint: save_to(order.checkpoint, checkpoint),
        save_every=SAVE_EVERY,
        resume=resume_from(order.checkpoint),
    )


def _encode(order: TrainRound, work: RoundWork, plan: Plan, delta: Vector, loss: float) -> Encoded:
    encoding = delta_encoding(work, order.silos, plan.secure_sum.ring)
    residual = np.load(order.residual) if order.residual.exists() else np.zeros_like(delta)
    key = os.urandom(32)
    return encoding.encode(delta, residual, count=order.count, loss=loss, key=key, consume=True)
