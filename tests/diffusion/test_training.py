"""Training learns, resumes in the same bits, and says so when a loss is not finite."""

from __future__ import annotations

import contextlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from diffusion.batches import Batches, BatchOrder, Shared
from diffusion.calibration import calibrate
from diffusion.checkpoint import (
    Checkpoint,
    CheckpointError,
    read_checkpoint,
    write_checkpoint,
)
from diffusion.execution import Execution, choose_execution
from diffusion.model import build_model, initialise, load_vector, to_vector
from diffusion.spec import ModelSpec, ObjectiveSpec, OptimizerSpec, ScheduleSpec
from diffusion.training import TrainResult, ema_decay, learning_rate, train
from tests.kernels.aot import NothingWaits

OPTIMIZER = OptimizerSpec(batch_size=8, learning_rate=1e-3, warmup_steps=2, weight_decay=0.01)


@pytest.fixture
def model(tiny: ModelSpec) -> nn.Module:
    model = build_model(tiny)
    initialise(model, seed=1)
    return model


@pytest.fixture
def arguments(execution: Execution) -> dict[str, Any]:
    return {
        "schedule": ScheduleSpec(num_train_timesteps=100),
        "objective": ObjectiveSpec(prediction="v", snr_gamma=5.0),
        "optimizer": OPTIMIZER,
        "seed": 7,
        "execution": execution,
    }


def _equal(a: TrainResult, b: TrainResult) -> bool:
    same = np.array_equal(a.loss_per_step, b.loss_per_step) and np.array_equal(a.ema, b.ema)
    if a.mean_gradient is None or b.mean_gradient is None:
        return same and a.mean_gradient is b.mean_gradient
    return same and np.array_equal(a.mean_gradient, b.mean_gradient)


@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
def test_the_loss_falls_on_a_simple_data_set(
    model: nn.Module, arguments: dict[str, Any], prediction: str
) -> None:
    flat = np.random.default_rng(0).integers(0, 256, (64, 1, 1, 1), dtype=np.uint8)
    images = np.broadcast_to(flat, (64, 1, 8, 8))
    arguments["objective"] = ObjectiveSpec(prediction=prediction)  # type: ignore[arg-type]
    arguments["optimizer"] = OptimizerSpec(batch_size=16, learning_rate=5e-3)
    result = train(model, images, steps=40, **arguments)
    assert result.loss_per_step[-10:].mean() < 0.6 * result.loss_per_step[:3].mean()


@pytest.mark.parametrize("corrected", [False, True])
def test_an_interrupted_run_ends_in_the_same_bits(
    tiny: ModelSpec,
    model: nn.Module,
    images: np.ndarray,
    arguments: dict[str, Any],
    tmp_path: Path,
    corrected: bool,
) -> None:
    start = to_vector(model)
    if corrected:
        arguments["proximal"] = (start * np.float32(0.9), 0.1)
        arguments["control"] = np.full_like(start, 1e-3)
    arguments |= {"steps": 7, "first_step": 11, "ema": start * np.float32(0.5)}
    whole = train(model, images, **arguments)

    path = tmp_path / "checkpoint"
    interrupted = build_model(tiny)
    load_vector(interrupted, start)
    with pytest.raises(KeyboardInterrupt):
        train(
            interrupted,
            images,
            **arguments,
            save=lambda checkpoint: write_checkpoint(path, checkpoint),
            save_every=2,
            progress=_interrupt_after(5),
        )
    checkpoint = read_checkpoint(path)
    assert checkpoint.steps == 4
    resumed_model = build_model(tiny)
    resumed = train(resumed_model, images, **arguments, resume=checkpoint)
    assert _equal(resumed, whole)
    assert np.array_equal(to_vector(resumed_model), to_vector(model))


def _interrupt_after(steps: int) -> Any:
    def progress(done: int) -> None:
        if done == steps:
            raise KeyboardInterrupt

    return progress


def test_no_step_waits_for_the_device_it_runs_on(
    model: nn.Module, images: np.ndarray, arguments: dict[str, Any]
) -> None:
    """From the end of the first step to that of the last, reports of progress among them."""
    told: list[int] = []
    with contextlib.ExitStack() as between:

        def progress(done: int) -> None:
            told.append(done)
            if done == 1:
                between.enter_context(NothingWaits("lift_fresh"))  # of a batch, on the host
            if done == 4:
                between.close()

        train(model, images, steps=4, progress=progress, **arguments)
    assert told == [1, 2, 3, 4]


def test_the_seed_decides_everything(
    tiny: ModelSpec, images: np.ndarray, arguments: dict[str, Any]
) -> None:
    def run(seed: int) -> TrainResult:
        model = build_model(tiny)
        initialise(model, seed=1)
        torch.manual_seed(seed)  # torch's own generator must not matter
        return train(model, images, steps=3, **{**arguments, "seed": seed // 10})

    assert _equal(run(10), run(11))
    assert not _equal(run(10), run(20))


def test_training_from_a_memory_mapped_file_is_the_same(
    tiny: ModelSpec, images: np.ndarray, arguments: dict[str, Any], tmp_path: Path
) -> None:
    np.save(tmp_path / "images.npy", images)
    results = []
    for source in (images, np.load(tmp_path / "images.npy", mmap_mode="r")):
        model = build_model(tiny)
        initialise(model, seed=1)
        results.append(train(model, source, steps=2, **arguments))
    assert _equal(*results)


def test_a_loss_that_is_not_finite_is_reported(
    model: nn.Module, images: np.ndarray, arguments: dict[str, Any]
) -> None:
    finite = train(model, images, steps=2, **arguments)
    assert finite.first_non_finite_step is None
    assert finite.loss_sum == pytest.approx(float(finite.loss_per_step.sum()))
    load_vector(model, np.full_like(to_vector(model), np.nan))
    broken = train(model, images, steps=3, **arguments)
    assert broken.first_non_finite_step == 0
    assert broken.steps == 3
    assert np.isnan(broken.loss_sum)


def test_the_proximal_term_holds_the_model_at_its_anchor(
    tiny: ModelSpec, images: np.ndarray, arguments: dict[str, Any]
) -> None:
    distances = []
    for mu in (0.0, 100.0):
        model = build_model(tiny)
        initialise(model, seed=1)
        anchor = to_vector(model)
        train(model, images, steps=10, proximal=(anchor, mu), **arguments)
        distances.append(np.linalg.norm(to_vector(model) - anchor))
    assert distances[1] < 0.7 * distances[0]


def test_scaffold_adds_its_control_and_returns_the_mean_gradient(
    tiny: ModelSpec, images: np.ndarray, arguments: dict[str, Any]
) -> None:
    """With a huge constant control every AdamW step moves each weight by −lr·sign(control)."""
    model = build_model(tiny)
    initialise(model, seed=1)
    before = to_vector(model)
    sign = np.where(np.arange(len(before)) % 2, 1, -1).astype(np.float32)
    arguments["optimizer"] = OptimizerSpec(batch_size=8, learning_rate=1e-3)
    result = train(model, images, steps=1, control=sign * np.float32(1e6), **arguments)
    np.testing.assert_allclose(to_vector(model) - before, -1e-3 * sign, rtol=0.01)
    assert result.mean_gradient is not None
    assert 0 < np.linalg.norm(result.mean_gradient) <= 1 + 1e-5


def test_the_mean_gradient_of_a_round_is_the_mean_of_those_of_its_steps(
    tiny: ModelSpec, images: np.ndarray, arguments: dict[str, Any]
) -> None:
    """At a rate that moves no weight, so that every step's gradient can be had by itself."""
    arguments["optimizer"] = OptimizerSpec(batch_size=8, learning_rate=1e-12)

    def gradient(steps: int, first_step: int) -> np.ndarray:
        model = build_model(tiny)
        initialise(model, seed=1)
        control = np.zeros_like(to_vector(model))
        result = train(
            model, images, steps=steps, first_step=first_step, control=control, **arguments
        )
        assert result.mean_gradient is not None
        return result.mean_gradient

    alone = [gradient(1, k) for k in range(3)]
    assert np.linalg.norm(alone[0] - alone[1]) > 1e-3
    np.testing.assert_allclose(gradient(3, 0), np.mean(alone, axis=0), atol=1e-5)


def test_a_zero_control_changes_nothing(
    tiny: ModelSpec, images: np.ndarray, arguments: dict[str, Any]
) -> None:
    vectors = []
    for control in (None, np.zeros(1)):
        model = build_model(tiny)
        initialise(model, seed=1)
        if control is not None:
            control = np.zeros_like(to_vector(model))
        train(model, images, steps=3, control=control, **arguments)
        vectors.append(to_vector(model))
    assert np.array_equal(*vectors)


def test_every_image_comes_once_before_any_comes_twice() -> None:
    order = BatchOrder(n=10, batch_size=4, seed=3)
    drawn = np.concatenate([order.indices(k) for k in range(10)]).reshape(4, 10)
    assert all(sorted(epoch) == list(range(10)) for epoch in drawn)
    assert len({tuple(epoch) for epoch in drawn}) == 4


def test_a_batch_is_a_function_of_its_step() -> None:
    forwards, backwards = BatchOrder(7, 16, seed=3), BatchOrder(7, 16, seed=3)
    batches = [forwards.indices(k) for k in range(5)]
    for k in reversed(range(5)):
        assert np.array_equal(backwards.indices(k), batches[k])


def test_the_ema_ramps_up_and_follows_its_recurrence(
    model: nn.Module, images: np.ndarray, arguments: dict[str, Any]
) -> None:
    optimizer = OptimizerSpec(ema_decay=0.9, ema_ramp=10.0)
    assert [ema_decay(k, optimizer) for k in (0, 8, 10_000)] == [0.1, 0.5, 0.9]
    start = to_vector(model)
    result = train(model, images, steps=1, **arguments)
    np.testing.assert_allclose(
        result.ema, 0.1 * start + 0.9 * to_vector(model), rtol=1e-4, atol=1e-7
    )


def test_the_learning_rate_warms_up_once() -> None:
    optimizer = OptimizerSpec(learning_rate=0.4, warmup_steps=3)
    assert [learning_rate(k, optimizer) for k in range(5)] == pytest.approx(
        [0.1, 0.2, 0.3, 0.4, 0.4]
    )


def test_images_in_another_form_are_refused(model: nn.Module, arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="give uint8 of shape"):
        train(model, np.zeros((4, 8, 8), np.uint8), steps=1, **arguments)
    with pytest.raises(ValueError, match="no image to train on"):
        train(model, np.zeros((0, 1, 8, 8), np.uint8), steps=1, **arguments)


def test_a_broken_checkpoint_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint"
    part = np.zeros(2, np.float32)
    write_checkpoint(path, Checkpoint(part, part, part, part, part, part))
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(CheckpointError, match="not a readable checkpoint"):
        read_checkpoint(path)


def test_calibration_is_training_at_its_own_rate_without_warm_up(
    tiny: ModelSpec, images: np.ndarray, arguments: dict[str, Any]
) -> None:
    corrected, trained = build_model(tiny), build_model(tiny)
    initialise(corrected, seed=1)
    initialise(trained, seed=1)
    calibrate(corrected, images, steps=2, learning_rate=1e-4, **arguments)
    arguments["optimizer"] = OptimizerSpec(batch_size=8, learning_rate=1e-4, weight_decay=0.01)
    train(trained, images, steps=2, **arguments)
    assert np.array_equal(to_vector(corrected), to_vector(trained))


def test_a_device_that_is_not_there_is_refused() -> None:
    with pytest.raises(ValueError, match='device = "tpu" is not supported'):
        choose_execution("tpu")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match='"cuda:7" is not present on this machine'):
            choose_execution("cuda:7")


@pytest.mark.parametrize(
    ("has", "dtype"),
    [
        ("avx512_f", torch.float32),
        ("avx512_bf16", torch.bfloat16),
        ("amx_tile", torch.bfloat16),
    ],
)
def test_a_cpu_computes_in_bfloat16_where_it_has_instructions_for_it(
    has: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_f": True, has: True})
    execution = choose_execution("cpu")
    assert execution.dtype == dtype
    assert execution.fused_norms == (dtype == torch.bfloat16)


def test_of_two_gpus_the_one_that_was_chosen_is_asked_for_bfloat16(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    majors, current = (9, 7), [0]

    def exchange(device: int) -> int:
        before, current[0] = current[0], max(device, 0)
        return before

    gpus = {
        "is_available": lambda: True,
        "device_count": lambda: 2,
        "current_device": lambda: current[0],
        "get_device_properties": lambda device: SimpleNamespace(major=majors[device]),
        "_exchange_device": exchange,
        "_maybe_exchange_device": exchange,
    }
    for name, of_two in gpus.items():
        monkeypatch.setattr(torch.cuda, name, of_two)
    assert choose_execution("cuda:1").dtype == torch.float32
    assert choose_execution("cuda:0").dtype == torch.bfloat16
    current[0] = 1
    assert choose_execution("cuda:0").dtype == torch.bfloat16
    assert choose_execution("cuda").dtype == torch.float32


def test_bfloat16_training_stays_close_to_float32(
    tiny: ModelSpec, images: np.ndarray, arguments: dict[str, Any]
) -> None:
    losses = []
    for dtype in (torch.float32, torch.bfloat16):
        model = build_model(tiny)
        initialise(model, seed=1)
        arguments["execution"] = Execution(torch.device("cpu"), dtype, torch.channels_last)
        losses.append(train(model, images, steps=5, **arguments).loss_per_step)
    np.testing.assert_allclose(losses[0], losses[1], rtol=0.05)


@pytest.mark.parametrize("batch", [3, 64])  # from 64 on diffusers' upsampling leaves channels_last
def test_placing_a_model_changes_its_speed_and_not_its_output(batch: int) -> None:
    spec = ModelSpec(
        image_size=8, block_out_channels=(8, 16), attention=(False, True), attention_head_dim=8
    )
    plain, placed = build_model(spec), build_model(spec)
    initialise(plain, seed=1)
    initialise(placed, seed=1)
    execution = choose_execution("cpu", threads=1)
    execution.place(placed)
    execution.place(placed)  # twice is harmless
    x_t = torch.randn(batch, 1, 8, 8, generator=torch.Generator().manual_seed(3))
    t = torch.arange(batch)
    want = plain(x_t, t).sample
    torch.testing.assert_close(
        execution.predict(placed, x_t, t).float(), want, rtol=2e-2, atol=2e-2
    )
    torch.testing.assert_close(placed(x_t, t).sample, want)
    assert dict(placed.named_parameters()).keys() == dict(plain.named_parameters()).keys()


def test_shared_images_take_their_part_of_every_batch_and_leave_the_order_of_one_s_own():
    own = np.arange(10, dtype=np.uint8).reshape(10, 1, 1, 1)
    given = np.arange(100, 107, dtype=np.uint8).reshape(7, 1, 1, 1)
    shared = Shared(given, np.arange(7), 0.3)
    batches = Batches(own, np.full(10, 9), shared, 8, seed=5)
    alone = BatchOrder(10, 6, seed=5)
    seen = []
    for step in range(7):
        images, labels = batches.batch(step, slice(None))
        assert images.shape == (8, 1, 1, 1)
        assert np.array_equal(images[:6].ravel(), alone.indices(step))
        assert labels is not None
        assert np.array_equal(labels[:6], np.full(6, 9))
        assert np.array_equal(labels[6:], images[6:].ravel() - 100)
        seen += images[6:].ravel().tolist()
        half, _ = batches.batch(step, slice(1, None, 2))
        assert np.array_equal(half, images[1::2])
    assert sorted(seen[:7]) == list(range(100, 107)), "each once before any twice"
    most, _ = Batches(own, None, Shared(given, None, 0.9), 2, seed=5).batch(0, slice(None))
    assert most[0, 0, 0, 0] < 10 <= most[1, 0, 0, 0], "one image is one's own"
