"""Training and sampling see one and the same noise schedule."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler

from diffusion.schedule import (
    alpha_bar,
    betas,
    sampling_scheduler,
    scheduler_config,
    training_scheduler,
)
from diffusion.spec import ObjectiveSpec, SamplerSpec, ScheduleSpec

KINDS = ["linear", "cosine", "sigmoid"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("steps", [50, 1000])
def test_alpha_bar_is_what_diffusers_accumulates(kind: str, steps: int) -> None:
    schedule = ScheduleSpec(kind=kind, num_train_timesteps=steps)  # type: ignore[arg-type]
    theirs = DDPMScheduler(**scheduler_config(schedule, ObjectiveSpec()))
    torch.testing.assert_close(alpha_bar(schedule), theirs.alphas_cumprod, rtol=2e-4, atol=1e-7)
    np.testing.assert_allclose(betas(schedule), theirs.betas.numpy(), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("kind", KINDS)
def test_alpha_bar_falls_strictly_within_zero_and_one(kind: str) -> None:
    bars = alpha_bar(ScheduleSpec(kind=kind))  # type: ignore[arg-type]
    assert bars.dtype == torch.float32
    assert bars[0] < 1
    assert bars[-1] > 0
    assert (bars.diff() < 0).all()


def test_sigmoid_follows_the_published_curve() -> None:
    """arXiv 2301.10972, algorithm 1, evaluated at (t + 1)/T."""
    bars = alpha_bar(ScheduleSpec(kind="sigmoid", num_train_timesteps=200)).double()
    u = (torch.arange(200) + 1) / 200
    start, end = torch.sigmoid(torch.tensor(-3.0)), torch.sigmoid(torch.tensor(3.0))
    curve = (end - torch.sigmoid(-3 + 6 * u)) / (end - start)
    torch.testing.assert_close(bars[:-1], curve[:-1].double(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
def test_ancestral_steps_equal_those_of_diffusers_ddpm(prediction: str) -> None:
    """Our "ddpm" goes through DDIM with eta = 1; the posterior must be Ho et al.'s."""
    schedule = ScheduleSpec(num_train_timesteps=40)
    objective = ObjectiveSpec(prediction=prediction)  # type: ignore[arg-type]
    ours = sampling_scheduler(schedule, objective, SamplerSpec(kind="ddpm", steps=40))
    theirs = training_scheduler(schedule, objective)
    theirs.set_timesteps(40)
    assert ours.timesteps.tolist() == theirs.timesteps.tolist()
    x_t = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    for t in ours.timesteps[:-1]:
        prediction_t = 0.9 * x_t
        noise = torch.randn(x_t.shape, generator=torch.Generator().manual_seed(int(t)))
        ancestral = theirs.step(
            prediction_t, t, x_t, generator=torch.Generator().manual_seed(int(t))
        ).prev_sample
        x_t = ours.step(
            prediction_t, t, x_t, eta=1.0, use_clipped_model_output=True, variance_noise=noise
        ).prev_sample
        torch.testing.assert_close(x_t, ancestral, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["ddpm", "ddim", "dpmsolver++"])
def test_samplers_start_at_pure_noise(kind: str) -> None:
    sampler = SamplerSpec(kind=kind, steps=20)  # type: ignore[arg-type]
    scheduler = sampling_scheduler(ScheduleSpec(), ObjectiveSpec(), sampler)
    assert int(scheduler.timesteps[0]) == 999
    assert len(scheduler.timesteps) == 20


@pytest.mark.parametrize("objective", ["eps", "x0", "v"])
@pytest.mark.parametrize(
    ("kind", "theirs"), [("ddim", DDIMScheduler), ("dpmsolver++", DPMSolverMultistepScheduler)]
)
def test_a_published_scheduler_turns_into_the_samplers_of_a_study(
    kind: str, theirs: Any, objective: str
) -> None:
    """`from_config` of what lies beside a published model steps as we do, whatever the network
    answers: here x_0 lies far outside [−1, 1]."""
    schedule, spec = ScheduleSpec(), ObjectiveSpec(prediction=objective)  # type: ignore[arg-type]
    sampler = SamplerSpec(kind=kind, steps=20)  # type: ignore[arg-type]
    ours: Any = sampling_scheduler(schedule, spec, sampler)
    published = theirs.from_config(training_scheduler(schedule, spec).config)
    published.set_timesteps(20)
    assert ours.timesteps.tolist() == published.timesteps.tolist()
    x_t = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    for t in ours.timesteps:
        prediction = torch.full_like(x_t, 3.0)
        by_hand = published.step(prediction, t, x_t).prev_sample
        x_t = ours.step(prediction, t, x_t).prev_sample
        assert torch.equal(x_t, by_hand)
        assert x_t.abs().max() < 10
