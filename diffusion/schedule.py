"""Noise schedules: alpha_bar as a pure function of its spec, and diffusers' schedulers built on it.

    x_t = sqrt(alpha_bar_t)·x_0 + sqrt(1 − alpha_bar_t)·eps,   alpha_bar_t = Π_{s ≤ t} (1 − beta_s)

`alpha_bar` is computed in float64 and rounded once. diffusers accumulates the same product in
float32; tests hold the two together.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
from numpy.typing import NDArray

from diffusion.spec import ObjectiveSpec, SamplerSpec, ScheduleSpec

Curve = NDArray[np.float64]

_MAX_BETA = 0.999  # arXiv 2102.09672 §3.2: no singularity at t = T
_PREDICTION_TYPE = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}


def betas(schedule: ScheduleSpec) -> Curve:
    """beta_t of the schedule, float64, shape (T,).

    linear    beta_start + (beta_end − beta_start)·t/(T − 1)              arXiv 2006.11239 §4
    cosine    f(u) = cos²((u + 0.008)/1.008 · π/2)                        arXiv 2102.09672 (17)
    sigmoid   f(u) = (σ(e/τ) − σ((s + u(e − s))/τ)) / (σ(e/τ) − σ(s/τ))   arXiv 2301.10972 alg. 1

    where for the last two beta_t = min(1 − f((t + 1)/T) / f(t/T), 0.999).
    """
    steps = schedule.num_train_timesteps
    if schedule.kind == "linear":
        line: Curve = np.linspace(schedule.beta_start, schedule.beta_end, steps, dtype=np.float64)
        return line
    u: Curve = np.arange(steps + 1, dtype=np.float64) / steps
    if schedule.kind == "cosine":
        curve = np.cos((u + 0.008) / 1.008 * np.pi / 2) ** 2
    else:
        start, end = schedule.sigmoid_start, schedule.sigmoid_end
        low, high = _sigmoid(np.array([start, end]) / schedule.sigmoid_tau)
        curve = (high - _sigmoid((start + u * (end - start)) / schedule.sigmoid_tau)) / (high - low)
    steepest: Curve = np.minimum(1.0 - curve[1:] / curve[:-1], _MAX_BETA)
    return steepest


def alpha_bar(schedule: ScheduleSpec) -> torch.Tensor:
    """alpha_bar_t = Π_{s ≤ t} (1 − beta_s): float32 of shape (T,), falling within (0, 1)."""
    return torch.from_numpy(np.cumprod(1.0 - betas(schedule)).astype(np.float32))


def scheduler_config(schedule: ScheduleSpec, objective: ObjectiveSpec) -> dict[str, Any]:
    """What every diffusers scheduler must be told about this schedule and objective.

    `timestep_spacing="trailing"` starts every sampler at t = T − 1, the pure noise it is given
    (arXiv 2305.08891 §3.3). The sigmoid schedule travels as `trained_betas`.
    """
    config: dict[str, Any] = {
        "num_train_timesteps": schedule.num_train_timesteps,
        "prediction_type": _PREDICTION_TYPE[objective.prediction],
        "timestep_spacing": "trailing",
    }
    if schedule.kind == "linear":
        ends = {"beta_start": schedule.beta_start, "beta_end": schedule.beta_end}
        return {**config, "beta_schedule": "linear", **ends}
    if schedule.kind == "cosine":
        return {**config, "beta_schedule": "squaredcos_cap_v2"}
    return {**config, "trained_betas": betas(schedule).tolist()}


def training_scheduler(schedule: ScheduleSpec, objective: ObjectiveSpec) -> DDPMScheduler:
    """The scheduler stored beside a published model, so that DDPMPipeline samples it right.

    So do the schedulers made from its config: some know `clip_sample`, and those of DPM-Solver only
    `thresholding`, which is the same where diffusers' `sample_max_value` has its default of 1.
    """
    config = scheduler_config(schedule, objective)
    scheduler: DDPMScheduler = DDPMScheduler(**config, clip_sample=True, thresholding=True)
    return scheduler


def sampling_scheduler(
    schedule: ScheduleSpec, objective: ObjectiveSpec, sampler: SamplerSpec
) -> DDIMScheduler | DPMSolverMultistepScheduler:
    """The diffusers scheduler that takes `sampler.steps` steps, timesteps already set.

    kind "ddpm" is DDIM with eta = 1 and eps re-derived from the clipped x_0: exactly the ancestral
    posterior of arXiv 2006.11239 (7) (see arXiv 2010.02502 §4.1), in a scheduler that accepts its
    noise from outside.

    All clip x_0 to [−1, 1]: at t = T − 1 of the cosine schedule 1/√alpha_bar is 20,000, and an
    error of eps as many times as large in x_0. DPM-Solver++ has it by `thresholding` (see above).

    Raises ValueError when the steps do not fit the schedule (`SamplerSpec.check_against`).
    """
    sampler.check_against(schedule)
    config = scheduler_config(schedule, objective)
    scheduler: DDIMScheduler | DPMSolverMultistepScheduler
    if sampler.kind == "dpmsolver++":
        scheduler = DPMSolverMultistepScheduler(
            **config, algorithm_type="dpmsolver++", thresholding=True
        )
    else:
        scheduler = DDIMScheduler(**config, clip_sample=True)
    scheduler.set_timesteps(sampler.steps)
    return scheduler


def _sigmoid(x: Curve) -> Curve:
    result: Curve = 1.0 / (1.0 + np.exp(-x))
    return result
