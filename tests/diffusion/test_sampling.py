"""An image is a function of the model, the seed and its number, and a grid can be looked at."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from diffusion.execution import Execution
from diffusion.loss import fixed_loss, loss_curve, loss_table
from diffusion.model import build_model, initialise
from diffusion.sampling import grid_png, sample
from diffusion.schedule import alpha_bar
from diffusion.spec import ModelSpec, ObjectiveSpec, OptimizerSpec, SamplerSpec, ScheduleSpec
from diffusion.training import train

SCHEDULE = ScheduleSpec(num_train_timesteps=20)
OBJECTIVE = ObjectiveSpec(prediction="v")
SAMPLERS = [
    SamplerSpec(kind="ddpm", steps=20),
    SamplerSpec(kind="ddim", steps=10),
    SamplerSpec(kind="ddim", steps=5, eta=0.5),
    SamplerSpec(kind="dpmsolver++", steps=6),
]


@pytest.fixture
def model(tiny: ModelSpec) -> nn.Module:
    model = build_model(tiny)
    initialise(model, seed=1)
    return model


@pytest.mark.parametrize("sampler", SAMPLERS, ids=str)
def test_an_image_does_not_depend_on_its_batch(
    model: nn.Module, execution: Execution, sampler: SamplerSpec
) -> None:
    common: dict[str, Any] = {"schedule": SCHEDULE, "objective": OBJECTIVE, "sampler": sampler}
    common |= {"seed": 5, "execution": execution}
    together = sample(model, 7, batch_size=7, **common)
    apart = sample(model, 7, batch_size=3, **common)
    later = sample(model, 2, first_index=5, **common)
    assert together.shape == (7, 1, 8, 8)
    assert together.dtype == np.uint8
    difference = np.abs(together.astype(int) - apart)
    assert difference.max() <= 1  # the network may round differently
    assert np.abs(together[5:].astype(int) - later).max() <= 1
    assert np.abs(together[0].astype(int) - together[1]).max() > 20
    assert np.abs(together - sample(model, 7, **{**common, "seed": 6}).astype(int)).max() > 20


def test_samples_look_like_the_training_images(tiny: ModelSpec, execution: Execution) -> None:
    """Images that are all black left of the middle and all white right of it, by every sampler."""
    half = np.zeros((4, 1, 8, 8), np.uint8)
    half[..., 4:] = 255
    model = build_model(tiny)
    initialise(model, seed=1)
    common: dict[str, Any] = {"schedule": SCHEDULE, "objective": OBJECTIVE, "execution": execution}
    optimizer = OptimizerSpec(batch_size=16, learning_rate=5e-3)
    train(model, half, steps=100, optimizer=optimizer, seed=2, **common)
    for sampler in SAMPLERS:
        images = sample(model, 16, sampler=sampler, seed=3, **common)
        assert images[..., :4].mean() < 40, sampler
        assert images[..., 4:].mean() > 215, sampler


def test_the_loss_table_is_the_same_every_time_and_for_every_batch_size(
    model: nn.Module, execution: Execution, images: np.ndarray
) -> None:
    common: dict[str, Any] = {"schedule": SCHEDULE, "objective": OBJECTIVE, "execution": execution}
    table = loss_table(model, images, seed=4, bins=5, **common)
    again = loss_table(model, images, seed=4, bins=5, batch_size=7, **common)
    assert table.shape == (20, 5)
    np.testing.assert_allclose(table, again, rtol=1e-4)
    assert fixed_loss(model, images, seed=4, bins=5, **common) == pytest.approx(
        table.mean(), rel=1e-5
    )
    assert loss_curve(table).shape == (5,)
    assert not np.allclose(table, loss_table(model, images, seed=5, bins=5, **common), rtol=1e-2)
    with pytest.raises(
        ValueError, match="bins = 21 must be between 1 and num_train_timesteps = 20"
    ):
        loss_table(model, images, seed=4, bins=21, **common)


def test_the_fixed_loss_falls_when_the_model_learns(
    model: nn.Module, execution: Execution, images: np.ndarray
) -> None:
    common: dict[str, Any] = {"schedule": SCHEDULE, "objective": OBJECTIVE, "execution": execution}
    before = fixed_loss(model, images, seed=4, **common)
    train(model, images, steps=20, optimizer=OptimizerSpec(batch_size=16), seed=1, **common)
    assert fixed_loss(model, images, seed=4, **common) < before


def test_a_grid_shows_every_image_enlarged_in_its_place(tmp_path: Path) -> None:
    images = np.zeros((3, 1, 8, 8), np.uint8)
    images[2] = 200
    grid_png(images, tmp_path / "grid.png", columns=2, tile=64)
    sheet = np.asarray(Image.open(tmp_path / "grid.png"))
    assert sheet.shape == (2 + 2 * 66, 2 + 2 * 66)
    assert (sheet[68:132, 2:66] == 200).all()
    assert (sheet[2:66, 2:66] == 0).all()
    assert (sheet[68:132, 68:132] == 255).all()


def test_a_grid_keeps_the_colours(tmp_path: Path) -> None:
    images = np.zeros((1, 3, 16, 16), np.uint8)
    images[:, 1] = 90
    grid_png(images, tmp_path / "grid.png", columns=1)
    assert Image.open(tmp_path / "grid.png").convert("RGB").getpixel((20, 20)) == (0, 90, 0)


class _NearlyIdeal(nn.Module):
    """The best network for independent pixels from N(0, 0.4²), and an error of 0.01 beside it.

    E[eps | x_t] = x_t·sqrt(1 − alpha_bar)/(0.16·alpha_bar + 1 − alpha_bar), and x_0 and v from it.
    """

    def __init__(self, schedule: ScheduleSpec, objective: ObjectiveSpec) -> None:
        super().__init__()
        self.config = SimpleNamespace(in_channels=1, sample_size=8, num_class_embeds=None)
        self._alpha_bar, self._prediction = alpha_bar(schedule), objective.prediction
        self._generator = torch.Generator().manual_seed(1)

    def forward(self, x_t: torch.Tensor, t: torch.Tensor, *_: object, **__: object) -> Any:
        bar = self._alpha_bar[t][:, None, None, None]
        variance = 0.16 * bar + 1 - bar
        best = {"eps": (1 - bar).sqrt(), "x0": 0.16 * bar.sqrt(), "v": 0.84 * bar.sqrt()}
        best["v"] = best["v"] * best["eps"]
        error = torch.randn(x_t.shape, generator=self._generator)
        return (x_t * best[self._prediction] / variance + 0.01 * error,)


@pytest.mark.parametrize("kind", ["linear", "cosine", "sigmoid"])
@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
@pytest.mark.parametrize("sampler", ["ddim", "dpmsolver++"])
def test_what_is_drawn_from_pure_noise_survives_a_network_that_errs(
    execution: Execution, sampler: str, prediction: str, kind: str
) -> None:
    schedule = ScheduleSpec(kind=kind)  # type: ignore[arg-type]
    objective = ObjectiveSpec(prediction=prediction)  # type: ignore[arg-type]
    drawn = sample(
        _NearlyIdeal(schedule, objective),
        256,
        schedule=schedule,
        objective=objective,
        sampler=SamplerSpec(kind=sampler, steps=20),  # type: ignore[arg-type]
        seed=3,
        execution=execution,
    )
    assert (drawn / 127.5 - 1).std() == pytest.approx(0.4, abs=0.07)
    assert (drawn / 127.5 - 1).mean() == pytest.approx(0.0, abs=0.02)
