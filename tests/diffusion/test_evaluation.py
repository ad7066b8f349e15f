"""The measures of a silo are those of its parts, on images that do not tell how many there are."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import diffusion.evaluation
from diffusion.audit import copy_share
from diffusion.coverage import coverage
from diffusion.evaluation import compare, evenly_spaced
from diffusion.execution import Execution
from diffusion.features.network import load_feature_network
from diffusion.frechet import kid
from diffusion.loss import loss_curve, loss_table
from diffusion.model import build_model, initialise
from diffusion.spec import ModelSpec, ObjectiveSpec, ScheduleSpec


def test_a_comparison_is_the_four_measures_together(
    tiny: ModelSpec, execution: Execution, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = np.random.default_rng(0)
    images, samples = (draw.integers(0, 256, (n, 1, 8, 8), dtype=np.uint8) for n in (90, 40))
    labels = np.arange(90) % 3
    model = build_model(tiny.model_copy(update={"classes": 3}))
    initialise(model, seed=1)
    network = load_feature_network("digits")
    common: dict[str, Any] = {
        "schedule": ScheduleSpec(num_train_timesteps=20),
        "objective": ObjectiveSpec(),
        "seed": 4,
        "execution": execution,
        "bins": 4,
    }
    monkeypatch.setattr(diffusion.evaluation, "COMPARED_IMAGES", 50)
    monkeypatch.setattr(diffusion.evaluation, "LOSS_IMAGES", 30)
    found = compare(model, samples, images, network, labels=labels, **common)
    real, drawn = network.extract(images[::2]), network.extract(samples)
    assert found.kid == pytest.approx(kid(real, drawn))
    assert found.coverage == coverage(real, drawn)
    assert found.copies == copy_share(samples, images)
    table = loss_table(model, images[::3], labels=labels[::3], **common)
    assert found.losses == pytest.approx(tuple(loss_curve(table)))


def test_too_few_images_give_no_number_instead_of_a_wrong_one(
    tiny: ModelSpec, execution: Execution
) -> None:
    images = np.random.default_rng(0).integers(0, 256, (3, 1, 8, 8), dtype=np.uint8)
    model = build_model(tiny)
    initialise(model, seed=1)
    found = compare(
        model,
        images,
        images,
        load_feature_network("digits"),
        schedule=ScheduleSpec(num_train_timesteps=20),
        objective=ObjectiveSpec(),
        seed=4,
        execution=execution,
    )
    assert np.isnan(found.coverage)
    assert found.copies == 1.0
    assert len(found.losses) == 10


def test_evenly_spaced_leaves_at_most_so_many() -> None:
    assert evenly_spaced(np.arange(10), 10).tolist() == list(range(10))
    assert evenly_spaced(np.arange(11), 10).tolist() == [0, 2, 4, 6, 8, 10]
    assert len(evenly_spaced(np.arange(100_000), 4096)) <= 4096
