"""Fused operations of diffusion training: a Triton kernel, a torch reference and the dispatch.

One file each. Where the CPU has a path of its own there is a second one (``_*_cpu.py``); masks have
their keystream and their quantiser in two more.
"""

from kernels.adamw_ema import adamw_ema_
from kernels.ddpm_loss import ddpm_loss
from kernels.group_norm_silu import group_norm_silu
from kernels.mask_add import add_masks_, mask_add
from kernels.noise import derive_key, normal, timesteps, uniform
from kernels.q_sample import add_noise, q_sample
from kernels.quantiser import Quantiser
from kernels.sampler_step import sampler_step
from kernels.unet import apply_to_unet, remove_from_unet

__all__ = [
    "Quantiser",
    "adamw_ema_",
    "add_masks_",
    "add_noise",
    "apply_to_unet",
    "ddpm_loss",
    "derive_key",
    "group_norm_silu",
    "mask_add",
    "normal",
    "q_sample",
    "remove_from_unet",
    "sampler_step",
    "timesteps",
    "uniform",
]
