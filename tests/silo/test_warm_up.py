"""A local model is trained until its own held-out images say so; the time does not tell when."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest

from diffusion.checkpoint import Checkpoint
from diffusion.execution import choose_execution
from diffusion.loss import fixed_loss
from diffusion.model import build_model, load_vector
from silo.jobs.local import train_local
from silo.jobs.warm_up import converged, hold_out, warm_up
from silo.orders import Machine, TrainLocal
from tests.silo.studies import make_plan

RULES = "steps = 40\npatience = 2\nimprovement = {x}\ncheck_every = 2"
IMAGES = np.random.default_rng(3).integers(0, 256, (30, 1, 8, 8), dtype=np.uint8)
CPU = choose_execution("cpu")


def plan_of(improvement: float, more: str = ""):  # type: ignore[no-untyped-def]
    return make_plan("[warm_up]\nsteps = 3", "[warm_up]\n" + RULES.format(x=improvement) + more)


def test_a_model_has_converged_when_so_many_checks_brought_no_improvement_that_counts() -> None:
    assert not converged([1.0, 0.9, 0.8], patience=1, improvement=0.05)
    assert converged([1.0, 0.9, 0.89], patience=1, improvement=0.05)
    assert not converged([1.0, 0.9, 0.89, 0.88], patience=3, improvement=0.05)
    assert not converged([1.0, 0.97, 0.94], patience=2, improvement=0.05), "small ones add up"
    assert converged([1.0, 1.2, 1.1], patience=2, improvement=0.0)
    assert not converged([], patience=1, improvement=0.05)


def test_training_stops_by_the_criterion_and_at_the_cap_at_the_latest() -> None:
    soon = warm_up(plan_of(0.9), IMAGES, seed=1, execution=CPU)
    assert soon.steps == 6, "checks after 2, 4 and 6 steps: the first is never beaten by 90 %"
    assert len(soon.checks) == 3
    never = warm_up(plan_of(0.0), IMAGES, seed=1, execution=CPU)
    assert soon.steps < never.steps <= 40


def test_the_model_is_the_one_with_the_lowest_loss_of_images_it_was_not_trained_on() -> None:
    plan = plan_of(0.9)
    done = warm_up(plan, IMAGES, seed=1, execution=CPU)
    training, watched = hold_out(len(IMAGES), plan.warm_up.held_out, 1)
    assert not set(training) & set(watched)
    assert len(watched) == 3
    model = build_model(plan.model)
    load_vector(model, done.weights)
    loss = fixed_loss(
        model,
        IMAGES[np.resize(watched, 64)],
        schedule=plan.schedule,
        objective=plan.objective,
        seed=1,
        execution=CPU,
    )
    assert loss == pytest.approx(min(done.checks))
    changed = IMAGES.copy()
    changed[watched] = 255 - changed[watched]
    other = warm_up(plan, changed, seed=1, execution=CPU)
    assert other.checks != done.checks
    assert other.loss == done.loss, "they are watched, not trained on"


def test_a_warm_up_that_was_interrupted_decides_as_one_that_was_not(tmp_path: Path) -> None:
    plan, checks = plan_of(0.05), tmp_path / "checks.npz"
    whole = warm_up(plan, IMAGES, seed=1, execution=CPU)
    assert len(whole.checks) > 3
    kept: list[Checkpoint] = []

    def die(checkpoint: Checkpoint) -> None:
        kept.append(checkpoint)
        if len(kept) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        warm_up(plan, IMAGES, seed=1, execution=CPU, checks=checks, save=die)
    # The third check was noted, its checkpoint was not: it is made again, and takes its own place.
    resumed = warm_up(plan, IMAGES, seed=1, execution=CPU, checks=checks, resume=kept[1])
    assert resumed.checks == whole.checks
    assert resumed.steps == whole.steps
    assert np.array_equal(resumed.weights, whole.weights)


def test_the_time_of_the_steps_that_were_not_taken_passes_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    np.save(tmp_path / "images.npy", IMAGES)
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)
    told: list[int] = []
    order = TrainLocal(
        Machine("cpu", None),
        plan_of(0.9).toml(),
        tmp_path / "images.npy",
        5,
        tmp_path / "weights.npy",
        tmp_path / "local.checkpoint",
    )
    train_local(order, lambda activity, step, steps: told.append(step))  # type: ignore[arg-type]
    assert told == list(range(1, 41)), "progress counts to the cap"
    assert len(slept) == 40 - 6
    assert len(set(slept)) == 1
    assert slept[0] > 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["images.npy", "weights.npy"]
