"""Fused operations of diffusion training: a Triton kernel, a torch reference and the dispatch, one
file each.
"""

from kernels.adamw_ema import adamw_ema_
from kernels.ddpm_loss import ddpm_loss
from kernels.noise import derive_key, normal, timesteps, uniform
from kernels.q_sample import add_noise, q_sample
from kernels.sampler_step import sampler_step

__all__ = [
    "adamw_ema_",
    "add_noise",
    "ddpm_loss",
    "derive_key",
    "normal",
    "q_sample",
    "sampler_step",
    "timesteps",
    "uniform",
]
