"""The CPU path of :mod:`kernels.group_norm_silu`, and the reference of its Triton kernels.

All in float32 by torch's own kernels: float32 tensors whole, half-precision ones converted in
chunks that stay in cache, because torch's half-precision GroupNorm for channels_last is slower than
that, several times so in the backward pass. Its channels_last variance is E[x^2] - E[x]^2, which
loses every digit where the mean is large: such samples are centred first.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from kernels._arguments import as_layout_of, is_channels_last, is_dense

_CHUNK = 1 << 17  # elements at a time
_FAR = 16.0  # standard deviations between a group's mean and zero

_native = torch.ops.aten.native_group_norm
_native_backward = torch.ops.aten.native_group_norm_backward
_silu_backward = torch.ops.aten.silu_backward.grad_input


def _dense(x: Tensor) -> Tensor:
    """``x``, copied if need be, with the strides that torch's kernels expect: where a dimension has
    size 1 its stride says nothing, but they ask for it.
    """
    x = x if is_dense(x) else x.contiguous()
    if not is_channels_last(x):
        return x.reshape(-1).view(x.shape)
    last = x.movedim(1, -1)
    return last.reshape(-1).view(last.shape).movedim(-1, 1)


def _chunks(x: Tensor) -> list[slice]:
    if x.dtype == torch.float32:
        return [slice(None)] if x.numel() else []
    rows = max(1, _CHUNK // max(1, x[:1].numel()))
    return [slice(start, start + rows) for start in range(0, x.shape[0] if x.numel() else 0, rows)]


def _buffer(x: Tensor, parts: list[slice]) -> Tensor | None:
    """For one chunk in float32; None where x is float32 and taken whole."""
    if x.dtype == torch.float32 or not parts:
        return None
    return torch.empty_like(x[parts[0]], dtype=torch.float32)


def _load(x: Tensor, buffer: Tensor | None) -> Tensor:
    return x if buffer is None else buffer[: x.shape[0]].copy_(x)


def _store(out: Tensor, part: slice, value: Tensor) -> Tensor:
    """``out`` with ``value`` in its place; the value itself where it is all of it."""
    if value.shape == out.shape and value.dtype == out.dtype and value.stride() == out.stride():
        return value
    out[part].copy_(value)
    return out


def _per_channel(values: Tensor, x: Tensor) -> Tensor:
    return values.view(*values.shape, *[1] * (x.dim() - 2))


def _spread(per_group: Tensor, channels: int) -> Tensor:
    return per_group.repeat_interleave(channels // per_group.shape[1], 1)


def _affine(x: Tensor, slope: Tensor, intercept: Tensor) -> Tensor:
    """slope x + intercept per sample and channel, by the calls that torch vectorises."""
    slope, intercept = _per_channel(slope, x), _per_channel(intercept, x)
    if is_channels_last(x):
        return torch.addcmul(intercept, x, slope)
    return (x * slope).add_(intercept)


def _far_from_zero(mean: Tensor, rstd: Tensor) -> Tensor:
    """The samples, by index, whose mean is so large (or NaN) that E[x^2] - E[x]^2 loses digits."""
    far = ~((mean * rstd).abs() < _FAR).all(1)
    return far.nonzero().squeeze(1)


def _forward_chunk(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Float32 and dense, with the cancelling variance of torch."""
    sizes = (x.shape[0], x.shape[1], math.prod(x.shape[2:]), groups)
    if weight.shape[0] == 1:
        z, mean, rstd = _native(x, weight[0], bias[0], *sizes, eps)
    else:
        z, mean, rstd = _native(x, None, None, *sizes, eps)
        z.mul_(_per_channel(weight, z)).add_(_per_channel(bias, z))
    return nn.functional.silu(z, inplace=True) if silu else z, mean, rstd


def group_norm_silu_reference(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """``weight``, ``bias``: (1, C), or (B, C) where they differ by sample."""
    dense = _dense(x)
    weight, bias = weight.float(), bias.float()
    y = torch.empty_like(x)
    mean = x.new_empty((x.shape[0], groups), dtype=torch.float32)
    rstd = torch.empty_like(mean)
    shared = weight.shape[0] == 1
    parts = _chunks(dense)
    buffer = _buffer(dense, parts)
    for part in parts:
        rows = slice(None) if shared else part
        piece = _load(dense[part], buffer)
        z, mean[part], rstd[part] = _forward_chunk(
            piece, weight[rows], bias[rows], groups, eps, silu
        )
        y = _store(y, part, z)
    for n in _far_from_zero(mean, rstd).tolist() if parts else []:
        row = slice(n, n + 1)
        rows = slice(None) if shared else row
        centred = dense[row].float() - _per_channel(_spread(mean[row], x.shape[1]), x)
        z, correction, rstd[row] = _forward_chunk(
            centred, weight[rows], bias[rows], groups, eps, silu
        )
        mean[row] += correction
        y[row].copy_(z)
    return y, mean, rstd


def _backward_chunk(
    dz: Tensor, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor, groups: int
) -> tuple[Tensor, Tensor, Tensor]:
    """All float32 and dense; gradients of weight and bias have the shape of weight."""
    sizes = (x.shape[0], x.shape[1], math.prod(x.shape[2:]), groups)
    if weight.shape[0] == 1:
        dx, dw, db = _native_backward(dz, x, mean, rstd, weight[0], *sizes, [True] * 3)
        return dx, dw[None], db[None]
    scale = _spread(rstd, x.shape[1])
    db = dz.flatten(2).sum(2)
    dw = (dz * x).flatten(2).sum(2).sub_(_spread(mean, x.shape[1]) * db).mul_(scale)
    dz = dz * _per_channel(weight, x)
    dx, _, _ = _native_backward(dz, x, mean, rstd, None, *sizes, [True, False, False])
    return dx, dw, db


def group_norm_silu_backward_reference(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor,
    groups: int, silu: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    dense = _dense(x)
    grad = _dense(as_layout_of(grad, dense))
    weight, bias = weight.float(), bias.float()
    grad_x = torch.empty_like(x)
    grad_weight, grad_bias = torch.zeros_like(weight), torch.zeros_like(weight)
    if not x.numel():
        return grad_x, grad_weight, grad_bias
    if far := _far_from_zero(mean, rstd).tolist():
        dense, mean = dense.to(torch.float32, copy=True), mean.clone()
        dense[far] -= _per_channel(_spread(mean[far], x.shape[1]), x)
        mean[far] = 0.0
        grad = grad.float()
    parts = _chunks(dense)
    slope = _spread(rstd, x.shape[1]) * weight
    intercept = bias - _spread(mean, x.shape[1]) * slope
    x_buffer, grad_buffer = _buffer(dense, parts), _buffer(dense, parts)
    for part in parts:
        rows = part if weight.shape[0] > 1 else slice(None)
        piece, dz = _load(dense[part], x_buffer), _load(grad[part], grad_buffer)
        if silu:
            z = _affine(piece, slope[part], intercept[part])
            dz = _silu_backward(dz, z, grad_input=z)
        dx, dw, db = _backward_chunk(dz, piece, weight[rows], mean[part], rstd[part], groups)
        grad_x = _store(grad_x, part, dx)
        grad_weight[rows] += dw
        grad_bias[rows] += db
    return grad_x, grad_weight, grad_bias
