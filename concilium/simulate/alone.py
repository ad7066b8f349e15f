"""Training without federation: one model on all images, on the auxiliary set, or one per silo."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from concilium.simulate.memo import Arrays, Memo, digest_array
from concilium.simulate.silos import Pool, execution_of, secret_of
from concilium.simulate.spec import Point
from diffusion.checkpoint import Checkpoint
from diffusion.labels import Labels
from diffusion.model import build_model, initialise
from diffusion.training import train
from silo.auxiliary import derived_seed

Images = NDArray[np.uint8]


@dataclass(frozen=True)
class _Task:
    point: Point
    images: Images
    labels: Labels | None
    index: int
    rounds: tuple[int, ...]


def train_alone(
    point: Point,
    common: Mapping[str, Any],
    sets: Sequence[tuple[Images, Labels | None]],
    rounds: Sequence[int],
    memo: Memo,
    pool: Pool,
) -> list[NDArray[np.float32]]:
    """For each set of images, with labels where the model is conditional, the moving averages
    [len(rounds), n] of a model's weights after as many steps as a silo has taken in those rounds;
    the optimiser is never restarted."""
    plan = point.plan
    inputs = {
        **common,
        "what": "alone",
        "images": digest_array(*(images for images, _ in sets)),
        "optimizer": plan.optimizer.model_dump(mode="json"),
        "rounds": list(rounds),
        "steps": plan.rounds.local_steps,
        "seed": point.seed,
    }
    if point.simulation.falling_rate:
        inputs["rates"] = [plan.optimizer_of(k).learning_rate for k in range(1, rounds[-1] + 1)]
    known = [labels for _, labels in sets if labels is not None]
    if known:
        inputs["labels"] = digest_array(*known)
    tasks = [_Task(point, *given, index, tuple(rounds)) for index, given in enumerate(sets, 1)]

    def compute() -> Arrays:
        return {f"silo-{k:03}": weights for k, weights in enumerate(pool.map(_train, tasks), 1)}

    found = memo.get(inputs, compute)
    return [found[name] for name in sorted(found)]


def _train(task: _Task) -> NDArray[np.float32]:
    plan, steps = task.point.plan, task.point.plan.rounds.local_steps
    model = build_model(plan.model)
    initialise(model, plan.study.seed)
    found: dict[int, NDArray[np.float32]] = {}
    last: Checkpoint | None = None
    falls = task.point.simulation.falling_rate

    def keep(checkpoint: Checkpoint) -> bool:
        nonlocal last
        last = checkpoint
        if (number := checkpoint.steps // steps) in task.rounds:
            found[number] = checkpoint.ema
        return falls  # and goes on from there with the next round's rate

    for number in range(1, task.rounds[-1] + 1) if falls else (1,):
        result = train(
            model,
            task.images,
            labels=task.labels,
            steps=steps * task.rounds[-1],
            schedule=plan.schedule,
            objective=plan.objective,
            optimizer=plan.optimizer_of(number) if falls else plan.optimizer,
            seed=derived_seed(secret_of(task.point.seed, task.index), "alone"),
            execution=execution_of(task.point.simulation.precision),
            save=keep,
            save_every=steps,
            resume=last,
        )
    found[task.rounds[-1]] = result.ema
    return np.stack([found[number] for number in task.rounds])
