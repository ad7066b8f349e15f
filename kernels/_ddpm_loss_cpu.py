"""The CPU path of :mod:`kernels.ddpm_loss`, and the reference of its Triton kernels."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kernels._arguments import check_timestep_range
from kernels.noise import normal_reference
from kernels.q_sample import per_sample, sqrt_rn, unit_range_reference


def min_snr_weight(a: Tensor, objective: str, gamma: float) -> Tensor:
    """min-SNR-gamma for the loss on the given target; finite at both ends of the schedule (a = 0
    and a = 1).
    """
    snr = a / (1.0 - a)
    if objective == "eps":
        return gamma / snr.clamp(min=gamma)
    if objective == "x0":
        return snr.clamp(max=gamma)
    return snr.clamp(max=gamma) / (snr + 1.0)


def _target(
    pred: Tensor, x_0: Tensor, a: Tensor, stream: tuple[Tensor, Tensor, Tensor], objective: str
) -> Tensor:
    if objective == "x0":
        return unit_range_reference(x_0)
    eps = normal_reference(pred.shape, *stream, torch.float32)
    if objective == "eps":
        return eps
    x = unit_range_reference(x_0) * per_sample(sqrt_rn(1.0 - a), x_0)
    return eps.mul_(per_sample(sqrt_rn(a), eps)).sub_(x)


def ddpm_loss_reference(
    pred: Tensor,
    x_0: Tensor,
    t: Tensor,
    alpha_bar: Tensor,
    stream: tuple[Tensor, Tensor, Tensor],
    objective: str,
    snr_gamma: float | None,
    with_residual: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, 2 w / D, pred - target in pred's dtype and layout)."""
    check_timestep_range("ddpm_loss", t, alpha_bar.shape[0])
    a = alpha_bar[t]
    difference = pred.to(torch.float32) - _target(pred, x_0, a, stream, objective)
    residual = torch.empty_like(pred) if with_residual else pred.new_empty(0)
    elements = math.prod(pred.shape[1:])
    if elements == 0:  # the mean of nothing, as in torch
        return torch.full_like(a, math.nan), torch.zeros_like(a), residual
    share = torch.ones_like(a) if snr_gamma is None else min_snr_weight(a, objective, snr_gamma)
    share = share / elements
    if with_residual:
        residual.copy_(difference)
    square = (difference * difference).flatten(1).sum(1, dtype=torch.float64)
    return (square * share).to(torch.float32), 2.0 * share, residual
