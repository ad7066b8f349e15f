"""Exponential moving average of the weights, with a decay that ramps up.

    ema_{k+1} = d_k·ema_k + (1 − d_k)·theta_{k+1},   d_k = min(decay, (1 + k)/(ramp + k))

Without the ramp the average keeps the random first weights for 1/(1 − decay) steps, and early
samples are noise.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch


def ema_decay(step: int, decay: float, ramp: float) -> float:
    """d_k for k = `step`, counted over the whole training."""
    return min(decay, (1.0 + step) / (ramp + step))


@torch.no_grad()
def update_ema(
    average: Sequence[torch.Tensor], parameters: Sequence[torch.Tensor], decay: float
) -> None:
    """average ← decay·average + (1 − decay)·parameters, in place."""
    torch._foreach_lerp_(list(average), list(parameters), 1.0 - decay)
