"""The local DDPM trained until it has converged, by a criterion that the plan states.

Every `check_every` steps the loss of the moving average E of the weights is measured on images of
the silo that training does not see, with timesteps and noise that are the same each time. Let L_1,
L_2, … be these losses, and let b be the last check that improved on the one before it that counted:

    b_1 = 1,   b_k = k  if L_k < (1 − x) L_{b_{k−1}}  else b_{k−1}       stop when k − b_k ≥ w

The model is E at the lowest of the losses. With w (`patience`) absent all steps are taken, all
images are trained on, and the model is E at the end.

The same number of images is measured at every silo (its held-out images over and over, where it has
fewer), so that a check takes the same time everywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from diffusion.batches import Images
from diffusion.checkpoint import Checkpoint
from diffusion.execution import Execution
from diffusion.loss import fixed_loss
from diffusion.model import build_model, load_vector
from diffusion.training import train
from silo.data.cache import Labels
from silo.jobs.together import leads
from silo.jobs.training import SAVE_EVERY, first_model
from silo.process import pause_requested
from study.plan import Plan
from study.sections import WarmUp

Vector = NDArray[np.float32]
Indices = NDArray[np.int64]
_WATCHED = 64


@dataclass(frozen=True)
class WarmedUp:
    """A local model."""

    weights: Vector
    steps: int
    """Steps taken."""
    loss: float
    """Mean training loss."""
    checks: tuple[float, ...]
    """L_1, L_2, …"""
    first_bad_step: int | None


def warm_up(
    plan: Plan,
    images: Images,
    *,
    labels: Labels | None = None,
    seed: int,
    execution: Execution,
    checks: Path | None = None,
    progress: Callable[[int], None] | None = None,
    save: Callable[[Checkpoint], None] | None = None,
    resume: Checkpoint | None = None,
) -> WarmedUp:
    """Train from the study's first model on `images` (uint8 (n, c, h, w)) and, where it is
    conditional, their `labels` (int64 (n,)).

    `checks` is a file for what the criterion remembers, needed to `resume`.
    """
    rules = plan.warm_up
    if rules is None:
        raise TypeError("the plan has no [warm_up]")
    watch = None
    if rules.patience is not None:
        training, watched = hold_out(len(images), rules.held_out, seed)
        held_out = np.resize(watched, _WATCHED)
        seen = None if labels is None else labels[held_out]
        watch = _Watch(plan, rules, images[held_out], seen, seed, execution, checks, resume)
        images, labels = images[training], None if labels is None else labels[training]

    def after(checkpoint: Checkpoint) -> bool:
        due = watch is not None and checkpoint.steps % rules.check_every == 0
        enough = watch is not None and due and watch.check(checkpoint)
        if save:
            save(checkpoint)
        return enough

    result = train(
        first_model(plan),
        images,
        labels=labels,
        steps=rules.steps,
        schedule=plan.schedule,
        objective=plan.objective,
        optimizer=plan.optimizer,
        seed=seed,
        execution=execution,
        progress=progress,
        save=after,
        save_now=pause_requested,
        save_every=SAVE_EVERY if watch is None else rules.check_every,
        resume=resume,
    )
    weights = result.ema if watch is None else watch.best(result.ema, result.steps)
    mean = result.loss_sum / max(result.steps, 1)
    losses = () if watch is None else watch.losses
    return WarmedUp(weights, result.steps, mean, losses, result.first_non_finite_step)


def converged(losses: Sequence[float], patience: int, improvement: float) -> bool:
    """Whether the last `patience` of the checks brought no improvement that counts."""
    best = 0
    for k, loss in enumerate(losses):
        if loss < (1.0 - improvement) * losses[best]:
            best = k
    return len(losses) - 1 - best >= patience


def hold_out(images: int, share: float, seed: int) -> tuple[Indices, Indices]:
    """(images to train on, images to watch), ascending numbers drawn by `seed`."""
    order = np.random.default_rng(seed).permutation(images)
    held = min(max(1, round(share * images)), images - 1)
    if held < 1:
        raise ValueError(f"{images} images: at least two are needed to hold one out")
    return np.sort(order[held:]), np.sort(order[:held])


class _Watch:
    """What the criterion remembers: every loss, and the weights of the lowest."""

    def __init__(
        self,
        plan: Plan,
        rules: WarmUp,
        images: Images,
        labels: Labels | None,
        seed: int,
        execution: Execution,
        file: Path | None,
        resume: Checkpoint | None,
    ) -> None:
        self._plan, self._rules, self._seed, self._execution = plan, rules, seed, execution
        self._images, self._labels = images, labels
        self._model, self._file = build_model(plan.model), file
        self._losses: dict[int, float] = {}
        self._weights: Vector | None = None
        if resume is not None and file is not None and file.exists():
            with np.load(file) as stored:
                pairs = zip(stored["steps"].tolist(), stored["losses"].tolist(), strict=True)
                self._losses, self._weights = dict(pairs), stored["weights"]

    @property
    def losses(self) -> tuple[float, ...]:
        return tuple(self._losses.values())

    def check(self, checkpoint: Checkpoint) -> bool:
        """Measure, remember, and say whether this is enough."""
        self._measure(checkpoint.ema, checkpoint.steps)
        assert self._rules.patience is not None  # noqa: S101 - made only where there is patience
        return converged(self.losses, self._rules.patience, self._rules.improvement)

    def best(self, weights: Vector, steps: int) -> Vector:
        """The weights of the lowest loss, those of the end among them."""
        if steps not in self._losses:
            self._measure(weights, steps)
        return weights if self._weights is None else self._weights

    def _measure(self, weights: Vector, steps: int) -> None:
        load_vector(self._model, weights)
        loss = fixed_loss(
            self._model,
            self._images,
            schedule=self._plan.schedule,
            objective=self._plan.objective,
            seed=self._seed,
            execution=self._execution,
            labels=self._labels,
        )
        # A check that was repeated after a crash takes its own place again.
        others = [known for step, known in self._losses.items() if step != steps]
        if self._weights is None or all(loss < known for known in others):
            self._weights = weights
        self._losses[steps] = loss
        if self._file is not None and leads():
            steps_taken, losses = np.array([*self._losses]), np.array([*self._losses.values()])
            partial = self._file.with_name(self._file.name + ".partial")
            with open(partial, "wb") as file:
                np.savez(file, weights=self._weights, steps=steps_taken, losses=losses)
            partial.replace(self._file)
