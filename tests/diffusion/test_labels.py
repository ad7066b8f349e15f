"""A conditional model learns its classes, and guidance is the published extrapolation."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from diffusion.calibration import calibrate
from diffusion.checkpoint import read_checkpoint, write_checkpoint
from diffusion.execution import Execution
from diffusion.labels import classes_of, drawn_labels, drop_labels, even_labels
from diffusion.loss import fixed_loss, loss_table
from diffusion.model import (
    build_model,
    initialise,
    load_pipeline,
    parameter_layout,
    save_pipeline,
    to_vector,
)
from diffusion.sampling import Guided, sample, sample_published
from diffusion.spec import ModelSpec, ObjectiveSpec, OptimizerSpec, SamplerSpec, ScheduleSpec
from diffusion.training import train

SCHEDULE = ScheduleSpec(num_train_timesteps=20)
SAMPLER = SamplerSpec(steps=10)


@pytest.fixture
def spec(tiny: ModelSpec) -> ModelSpec:
    return tiny.model_copy(update={"classes": 2})


@pytest.fixture
def model(spec: ModelSpec) -> nn.Module:
    return _model(spec)


@pytest.fixture
def common(execution: Execution) -> dict[str, Any]:
    return {"schedule": SCHEDULE, "objective": ObjectiveSpec(), "execution": execution}


def _model(spec: ModelSpec) -> nn.Module:
    model = build_model(spec)
    initialise(model, seed=1)
    return model


def _halves(n: int) -> tuple[np.ndarray, np.ndarray]:
    """Label 0: the left half is white; label 1: the right half."""
    labels = np.arange(n, dtype=np.int64) % 2
    images = np.zeros((n, 1, 8, 8), np.uint8)
    images[labels == 0, :, :, :4] = 255
    images[labels == 1, :, :, 4:] = 255
    return images, labels


@pytest.fixture(scope="module")
def trained(execution: Execution, tiny: ModelSpec) -> nn.Module:
    small = {"classes": 2, "block_out_channels": (8,), "attention": (False,)}
    model = _model(ModelSpec.model_validate({**tiny.model_dump(), **small}))
    images, labels = _halves(16)
    train(
        model,
        images,
        labels=labels,
        steps=200,
        schedule=SCHEDULE,
        objective=ObjectiveSpec(label_dropout=0.2),
        optimizer=OptimizerSpec(batch_size=16, learning_rate=5e-3),
        seed=2,
        execution=execution,
    )
    return model


def test_samples_are_of_the_class_that_was_asked_for(
    trained: nn.Module, common: dict[str, Any]
) -> None:
    labels = even_labels(12, 2)
    for sampler in (
        SAMPLER,
        SamplerSpec(steps=10, guidance=2.0),
        SamplerSpec(kind="ddpm", steps=20, guidance=1.5),
        SamplerSpec(kind="dpmsolver++", steps=8),
    ):
        images = sample(trained, 12, labels=labels, sampler=sampler, seed=3, **common)
        bright_left = images[..., :4].mean(axis=(1, 2, 3)) > images[..., 4:].mean(axis=(1, 2, 3))
        assert (bright_left == (labels == 0)).all(), sampler


def test_the_null_class_and_guidance_zero_are_the_unconditional_model(
    trained: nn.Module, common: dict[str, Any]
) -> None:
    null = np.full(40, 2)
    anything = sample(trained, 40, labels=null, sampler=SAMPLER, seed=5, **common)
    left = anything[..., :4].mean(axis=(1, 2, 3)) > 128
    assert 5 < left.sum() < 35  # both kinds come
    ones = np.ones(40, dtype=np.int64)
    free = SamplerSpec(steps=10, guidance=0.0)
    unguided = sample(trained, 40, labels=ones, sampler=free, seed=5, **common)
    assert np.abs(unguided.astype(int) - anything).max() <= 1


def test_guidance_is_the_published_extrapolation(model: nn.Module, execution: Execution) -> None:
    exact = Execution(execution.device, torch.float32, torch.contiguous_format)
    labels, s = np.array([0, 1, 1]), 2.5
    x_t = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    t = torch.full((3,), 7)
    with torch.no_grad():
        null = model(x_t, t, torch.full((3,), 2)).sample
        conditional = model(x_t, t, torch.tensor(labels)).sample
        got = Guided(model, exact, labels, 3, s).part(0, 3)(x_t, t)
    torch.testing.assert_close(got, (1 - s) * null + s * conditional, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_an_image_does_not_depend_on_its_batch(
    model: nn.Module, common: dict[str, Any], guidance: float
) -> None:
    common |= {"sampler": SamplerSpec(steps=10, guidance=guidance), "seed": 5}
    labels = np.array([0, 1, 2, 1, 0])
    together = sample(model, 5, labels=labels, **common)
    apart = sample(model, 5, labels=labels, batch_size=2, **common)
    later = sample(model, 2, labels=labels[3:], first_index=3, **common)
    assert np.abs(together.astype(int) - apart).max() <= 1
    assert np.abs(together[3:].astype(int) - later).max() <= 1


def test_dropped_labels_are_a_function_of_key_row_and_step() -> None:
    labels, key = torch.arange(4000) % 10, torch.tensor(77)
    rows, step = torch.arange(4000), torch.tensor([3])
    dropped = drop_labels(labels, 0.1, 10, key=key, sample_id=rows, step=step)
    assert ((dropped == labels) | (dropped == 10)).all()
    assert (dropped == 10).float().mean().item() == pytest.approx(0.1, abs=0.02)
    half = drop_labels(labels[1::2], 0.1, 10, key=key, sample_id=rows[1::2], step=step)
    assert torch.equal(half, dropped[1::2])
    other = drop_labels(labels, 0.1, 10, key=key, sample_id=rows, step=torch.tensor([4]))
    assert not torch.equal(other, dropped)


def test_an_interrupted_conditional_run_ends_in_the_same_bits(
    spec: ModelSpec, common: dict[str, Any], tmp_path: Path
) -> None:
    images, labels = _halves(20)
    common |= {"optimizer": OptimizerSpec(batch_size=8), "seed": 7, "labels": labels, "steps": 5}
    path, whole = tmp_path / "checkpoint", _model(spec)
    train(whole, images, **common, save=lambda found: write_checkpoint(path, found), save_every=3)
    resumed = build_model(spec)
    train(resumed, images, **common, resume=read_checkpoint(path))
    assert np.array_equal(to_vector(resumed), to_vector(whole))
    shuffled = _model(spec)
    train(shuffled, images, **{**common, "labels": labels[::-1].copy()})
    assert not np.array_equal(to_vector(shuffled), to_vector(whole))


def test_calibration_and_the_fixed_loss_use_the_labels(
    trained: nn.Module, spec: ModelSpec, common: dict[str, Any]
) -> None:
    images, labels = _halves(16)
    right = fixed_loss(trained, images, labels=labels, seed=4, **common)
    wrong = fixed_loss(trained, images, labels=1 - labels, seed=4, **common)
    unknown = fixed_loss(trained, images, labels=np.full(16, 2), seed=4, **common)
    assert right < unknown < wrong
    table = loss_table(trained, images, labels=labels, seed=4, batch_size=5, **common)
    assert table.mean() == pytest.approx(right, rel=1e-3)
    model = _model(spec)
    calibrate(
        model,
        images,
        labels=labels,
        steps=40,
        learning_rate=5e-3,
        optimizer=OptimizerSpec(batch_size=16),
        seed=1,
        **common,
    )
    assert fixed_loss(model, images, labels=labels, seed=4, **common) < fixed_loss(
        _model(spec), images, labels=labels, seed=4, **common
    )


def test_a_published_conditional_model_carries_its_classes(
    trained: nn.Module, common: dict[str, Any], execution: Execution, tmp_path: Path
) -> None:
    save_pipeline(tmp_path / "model", trained, SCHEDULE, common["objective"])
    pipeline = load_pipeline(tmp_path / "model")
    assert classes_of(pipeline.unet) == 2
    labels = even_labels(6, 2)
    drawn = sample_published(
        pipeline, 6, steps=10, seed=3, execution=execution, labels=labels, guidance=2.0
    )
    sampler = SamplerSpec(steps=10, guidance=2.0)
    ours = sample(trained, 6, labels=labels, sampler=sampler, seed=3, **common)
    assert np.abs(drawn.astype(int) - ours).max() <= 1


def test_the_class_embedding_is_one_more_tensor(spec: ModelSpec, tiny: ModelSpec) -> None:
    model, plain = _model(spec), _model(tiny)
    names = {name for name, _, _ in parameter_layout(model)}
    assert names - {name for name, _, _ in parameter_layout(plain)} == {"class_embedding.weight"}
    weight = model.get_parameter("class_embedding.weight")
    assert weight.shape == (3, 32)
    assert weight.abs().max() <= 3**0.5
    assert weight.std().item() == pytest.approx(1.0, abs=0.2)


def test_labels_that_do_not_fit_are_refused(
    model: nn.Module, tiny: ModelSpec, common: dict[str, Any]
) -> None:
    images, labels = _halves(4)
    common |= {"optimizer": OptimizerSpec(batch_size=2), "seed": 1, "steps": 1}
    with pytest.raises(ValueError, match="has 2 classes: give one label for each image"):
        train(model, images, **common)
    with pytest.raises(ValueError, match=r"labels run from 0 to 2, the model's 2 classes"):
        train(model, images, labels=np.array([0, 1, 2, 0]), **common)
    with pytest.raises(ValueError, match=r"give int64 \(4,\)"):
        train(model, images, labels=labels[:3], **common)
    with pytest.raises(ValueError, match="no classes: leave labels out"):
        train(_model(tiny), images, labels=labels, **common)
    del common["optimizer"], common["steps"]
    with pytest.raises(ValueError, match="guidance = 2.0 needs a model with classes"):
        sample(_model(tiny), 2, sampler=SamplerSpec(steps=10, guidance=2.0), **common)


def test_drawn_labels_follow_the_weights_and_their_number_alone() -> None:
    weights = np.array([1, 0, 3])
    labels = drawn_labels(weights, 4000, seed=1)
    np.testing.assert_allclose(
        np.bincount(labels, minlength=3) / 4000, [0.25, 0.0, 0.75], atol=0.03
    )
    assert np.array_equal(drawn_labels(weights, 10, seed=1, first_index=90), labels[90:100])
    assert even_labels(7, 3).tolist() == [0, 0, 0, 1, 1, 2, 2]


def test_the_documented_snippet_draws_every_class_with_diffusers_alone(
    trained: nn.Module, common: dict[str, Any], tmp_path: Path
) -> None:
    page = (Path(__file__).parents[2] / "docs" / "conditional.md").read_text("utf-8")
    (snippet,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    save_pipeline(tmp_path / "model", trained, SCHEDULE, common["objective"])
    snippet = snippet.replace('"model"', repr(str(tmp_path / "model")))
    right = 0
    for seed in range(10):  # of so small a model now and then an image is of the other class
        torch.manual_seed(seed)
        found: dict[str, Any] = {}
        exec(snippet.replace("set_timesteps(50)", "set_timesteps(20)"), found)
        images = found["images"].float()
        assert images.shape == (2, 1, 8, 8)
        left = images[..., :4].mean((1, 2, 3)) - images[..., 4:].mean((1, 2, 3))
        right += int(left[0] > 30) + int(left[1] < -30)
    assert right >= 15, f"{right} of 20 images are of their class; chance would be 10"
