"""One-shot correction of the aggregate on the auxiliary set (arXiv 2503.06426)."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from diffusion.batches import Images
from diffusion.checkpoint import Checkpoint
from diffusion.execution import Execution
from diffusion.labels import Labels
from diffusion.spec import ObjectiveSpec, OptimizerSpec, ScheduleSpec
from diffusion.training import TrainResult, train


def calibrate(
    model: nn.Module,
    auxiliary: Images,
    *,
    steps: int,
    learning_rate: float,
    schedule: ScheduleSpec,
    objective: ObjectiveSpec,
    optimizer: OptimizerSpec,
    seed: int,
    execution: Execution,
    labels: Labels | None = None,
    save: Callable[[Checkpoint], bool | None] | None = None,
    save_now: Callable[[], bool] = lambda: False,
    resume: Checkpoint | None = None,
) -> TrainResult:
    """Take `steps` steps at `learning_rate` on `auxiliary` (uint8 (n, c, h, w)), in place; with
    their `labels` (int64 (n,)) where the model is conditional.

    Everything else is the optimiser the silos use; its warm-up is skipped, since the model is
    trained already. Give each correction its own seed. `save`, `save_now` and `resume` are those of
    `train`, whose errors it raises.
    """
    corrector = optimizer.model_copy(update={"learning_rate": learning_rate, "warmup_steps": 0})
    return train(
        model,
        auxiliary,
        steps=steps,
        schedule=schedule,
        objective=objective,
        optimizer=corrector,
        seed=seed,
        execution=execution,
        labels=labels,
        save=save,
        save_every=steps,
        save_now=save_now,
        resume=resume,
    )
