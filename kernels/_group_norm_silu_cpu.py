"""The CPU path of :mod:`kernels.group_norm_silu`, and the reference of its Triton kernels.

The work is done in float32 on chunks that stay in cache. torch's own half-precision kernels for
channels_last are several times slower than the conversion, and its channels_last variance is
E[x^2] - E[x]^2, which loses every digit where the mean is large: such samples are centred first.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from kernels._arguments import as_layout_of, is_dense

_CHUNK = 1 << 16  # elements at a time
_FAR = 16.0  # standard deviations between a group's mean and zero

_native = torch.ops.aten.native_group_norm
_native_backward = torch.ops.aten.native_group_norm_backward
_silu_backward = torch.ops.aten.silu_backward.grad_input


def _chunks(x: Tensor) -> tuple[list[slice], Tensor]:
    """Slices of the batch that fit the cache, and a float32 buffer for one of them."""
    rows = max(1, _CHUNK // max(1, x[:1].numel()))
    parts = [slice(start, start + rows) for start in range(0, x.shape[0], rows)]
    return parts, torch.empty_like(x[:rows], dtype=torch.float32)


def _as_float32(x: Tensor, buffer: Tensor) -> Tensor:
    return x if x.dtype == torch.float32 else buffer[: x.shape[0]].copy_(x)


def _per_channel(values: Tensor, x: Tensor) -> Tensor:
    return values.view(*values.shape, *[1] * (x.dim() - 2))


def _far_from_zero(mean: Tensor, rstd: Tensor) -> Tensor:
    """The samples, by index, whose mean is so large (or NaN) that E[x^2] - E[x]^2 loses digits."""
    far = ~((mean * rstd).abs() < _FAR).all(1)
    return far.nonzero().squeeze(1)


def _normalise(
    x: Tensor,
    affine: tuple[Tensor | None, Tensor | None],
    sizes: tuple[int, int, int, int],
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """torch's float32 GroupNorm, whose channels_last variance cancels, repeated on centred data
    for the samples that need it."""
    z, mean, rstd = _native(x, *affine, *sizes, eps)
    for n in _far_from_zero(mean, rstd).tolist():
        row = slice(n, n + 1)
        centre = mean[row].repeat_interleave(sizes[1] // sizes[3], 1)
        centred = x[row] - _per_channel(centre, x)
        z[row], correction, rstd[row] = _native(centred, *affine, 1, *sizes[1:], eps)
        mean[row] += correction
    return z, mean, rstd


def group_norm_silu_reference(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """``weight``, ``bias``: (1, C), or (B, C) where they differ by sample."""
    dense = x if is_dense(x) else x.contiguous()
    weight, bias = weight.float(), bias.float()
    y = torch.empty_like(x)
    mean, rstd = x.new_empty((2, x.shape[0], groups), dtype=torch.float32)
    channels, pixels = x.shape[1], math.prod(x.shape[2:])
    shared = weight.shape[0] == 1
    affine = (weight[0], bias[0]) if shared else (None, None)
    parts, buffer = _chunks(dense)
    for part in parts if x.numel() else []:
        piece = _as_float32(dense[part], buffer)
        sizes = (piece.shape[0], channels, pixels, groups)
        z, mean[part], rstd[part] = _normalise(piece, affine, sizes, eps)
        if not shared:
            z.mul_(_per_channel(weight[part], z)).add_(_per_channel(bias[part], z))
        y[part].copy_(nn.functional.silu(z, inplace=True) if silu else z)
    return y, mean.clone(), rstd.clone()


def _backward_chunk(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor,
    groups: int, silu: bool, buffer: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """All float32 and dense; gradients of weight and bias have the shape of weight."""
    rows, channels, pixels = x.shape[0], x.shape[1], math.prod(x.shape[2:])
    sizes = (rows, channels, pixels, groups)
    size = channels // groups
    far = _far_from_zero(mean, rstd)
    if far.numel():  # as in the forward pass
        x, mean = x.clone(), mean.clone()
        x[far] -= _per_channel(mean[far].repeat_interleave(size, 1), x)
        mean[far] = 0.0
    scale = rstd.repeat_interleave(size, 1)
    offset = -mean.repeat_interleave(size, 1) * scale
    if silu:
        z = buffer[:rows]
        slope, intercept = scale * weight, offset * weight + bias
        torch.addcmul(_per_channel(intercept, x), x, _per_channel(slope, x), out=z)
        grad = _silu_backward(grad, z, grad_input=z)
    if weight.shape[0] == 1:
        dx, dw, db = _native_backward(grad, x, mean, rstd, weight[0], *sizes, [True] * 3)
        return dx, dw[None], db[None]
    db = grad.flatten(2).sum(2)
    dw = (grad * x).flatten(2).sum(2).mul_(scale).add_(offset * db)
    grad = grad * _per_channel(weight, x)
    dx, _, _ = _native_backward(grad, x, mean, rstd, None, *sizes, [True, False, False])
    return dx, dw, db


def group_norm_silu_backward_reference(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor,
    groups: int, silu: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    dense = x if is_dense(x) else x.contiguous()
    grad = as_layout_of(grad, dense)
    weight, bias = weight.float(), bias.float()
    grad_x = torch.empty_like(x)
    grad_weight = torch.zeros_like(weight)
    grad_bias = torch.zeros_like(weight)
    parts, buffer = _chunks(dense)
    x_buffer, grad_buffer = torch.empty_like(buffer), torch.empty_like(buffer)
    for part in parts if x.numel() else []:
        rows = part if weight.shape[0] > 1 else slice(None)
        dx, dw, db = _backward_chunk(
            _as_float32(grad[part], grad_buffer), _as_float32(dense[part], x_buffer),
            weight[rows], bias[rows], mean[part], rstd[part], groups, silu, buffer,
        )  # fmt: skip
        grad_x[part].copy_(dx)
        grad_weight[rows] += dw
        grad_bias[rows] += db
    return grad_x, grad_weight, grad_bias
