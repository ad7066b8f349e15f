"""The CPU path of :mod:`kernels.group_norm_silu`, and the reference of its Triton kernels.

All in float32 by torch's own kernels: float32 tensors whole, half-precision ones converted in
chunks that stay in cache, because torch's half-precision GroupNorm for channels_last is slower than
that, several times so in the backward pass. Its channels_last variance is E[x^2] - E[x]^2, which
loses every digit where the mean is large: such samples are centred first. Where its channels_last
kernels go one number at a time, the same is done here by elementwise calls and sums.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import repeat

import torch
from torch import Tensor, nn

from kernels._arguments import as_layout_of, is_channels_last, is_dense

_CHUNK = 1 << 16  # elements at a time: four such buffers of float32 stay in a cache of 1 MiB
_FAR = 16.0  # standard deviations between a group's mean and zero
# Before torch 2.13 its channels_last kernels vectorise where eight channels fit into a group: for
# four, the backward pass took 465 us for 64 Ki elements, this file's 104 (torch 2.13: 55 and 87).
_VECTORISED = torch.__version__ >= "2.13"  # compared as versions
_LANES, _SMALL_MAP = 8, 1024

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


def _rows(x: Tensor) -> int:
    """Samples to a chunk."""
    return max(1, _CHUNK // x[:1].numel())


def _pieces(rows: int, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The tensors cut alike; those with one row for all samples come whole every time. Cut at once:
    chunks are so small that taking slices one by one would show in the time of a step.
    """
    batch = max(t.shape[0] for t in tensors)
    whole = batch > 1
    return zip(
        *(repeat(t) if whole and t.shape[0] == 1 else t.split(rows) for t in tensors), strict=False
    )


def _alike(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.stride() == b.stride()


def _per_channel(values: Tensor, x: Tensor) -> Tensor:
    return values.view(*values.shape, *[1] * (x.dim() - 2))


def _spread(per_group: Tensor, channels: int) -> Tensor:
    return per_group.repeat_interleave(channels // per_group.shape[1], 1)


def _affine(x: Tensor, slope: Tensor, intercept: Tensor, out: Tensor) -> Tensor:
    """slope x + intercept per sample and channel, by the calls that torch vectorises."""
    if is_channels_last(x):
        return torch.addcmul(intercept, x, slope, out=out)
    return torch.mul(x, slope, out=out).add_(intercept)


def _by_hand(x: Tensor, groups: int, backward: bool) -> bool:
    """Whether torch's kernel for ``x`` is slower than elementwise calls."""
    if _VECTORISED or not is_channels_last(x):
        return False
    channels = x.shape[1] // groups
    return channels % _LANES != 0 and (backward or math.prod(x.shape[2:]) < _SMALL_MAP)


def _pixels(x: Tensor) -> Tensor:
    """(B, pixels, C) of a channels_last tensor, as a view."""
    return x.movedim(1, -1).flatten(1, -2)


def _like_pixels(x: Tensor, of: Tensor) -> Tensor:
    """The inverse of `_pixels`."""
    return x.view(of.movedim(1, -1).shape).movedim(-1, 1)


def _norm_by_hand(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, groups: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """``native_group_norm`` of a channels_last tensor: z = slope x + intercept."""
    x_ = _pixels(x)
    batch, pixels, channels = x_.shape
    sums, squares = x_.sum(1), (x_ * x_).sum(1)
    n = pixels * (channels // groups)
    mean = sums.view(batch, groups, -1).sum(2) / n
    variance = (squares.view(batch, groups, -1).sum(2) / n - mean * mean).clamp_(min=0.0)
    rstd = (variance + eps).rsqrt_()
    slope = _spread(rstd, channels)
    slope = slope if weight is None else slope * weight
    intercept = -_spread(mean, channels) * slope
    intercept = intercept if bias is None else intercept + bias
    z = torch.addcmul(intercept[:, None], x_, slope[:, None])
    return _like_pixels(z, x), mean, rstd


def _backward_by_hand(
    dz: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None, groups: int
) -> tuple[Tensor, Tensor, Tensor]:
    """``native_group_norm_backward`` of channels_last tensors, n elements to a group:

    db = sum dz    dw = sum dz x^    dx = rstd (w dz - (sum_group w dz + x^ sum_group w dz x^) / n)
    """
    x_, dz_ = _pixels(x), _pixels(dz)
    batch, pixels, channels = x_.shape
    n = pixels * (channels // groups)
    scale = _spread(rstd, channels)
    db = dz_.sum(1)
    dw = (dz_ * x_).sum(1).sub_(_spread(mean, channels) * db).mul_(scale)
    of_dz, of_xhat = (
        (d if weight is None else d * weight).view(batch, groups, -1).sum(2) / n for d in (db, dw)
    )
    slope = -rstd * rstd * of_xhat
    intercept = -rstd * of_dz - slope * mean
    dx = torch.addcmul(_spread(intercept, channels)[:, None], x_, _spread(slope, channels)[:, None])
    dx.addcmul_(dz_, (scale if weight is None else scale * weight)[:, None])
    return _like_pixels(dx, x), dw.sum(0), db.sum(0)


def _far_from_zero(mean: Tensor, rstd: Tensor) -> Tensor:
    """The samples, by index, whose mean is so large (or NaN) that E[x^2] - E[x]^2 loses digits."""
    far = ~((mean * rstd).abs() < _FAR).all(1)
    return far.nonzero().squeeze(1)


def _forward_chunk(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Float32 and dense, with the cancelling variance of torch."""
    same = weight.shape[0] == 1
    w, b = (weight[0], bias[0]) if same else (None, None)
    if _by_hand(x, groups, backward=False):
        z, mean, rstd = _norm_by_hand(x, w, b, groups, eps)
    else:
        sizes = (x.shape[0], x.shape[1], math.prod(x.shape[2:]), groups)
        z, mean, rstd = _native(x, w, b, *sizes, eps)
    if not same:
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
    if not x.numel():
        return y, mean, rstd
    if x.dtype == torch.float32:
        z, mean, rstd = _forward_chunk(dense, weight, bias, groups, eps, silu)
        y = z if _alike(z, y) else y.copy_(z)
    else:
        rows = _rows(dense)
        buffer = torch.empty_like(dense[:rows], dtype=torch.float32)
        for piece, out, m, r, w, b in _pieces(rows, dense, y, mean, rstd, weight, bias):
            loaded = buffer[: len(piece)].copy_(piece)
            z, m[:], r[:] = _forward_chunk(loaded, w, b, groups, eps, silu)
            out.copy_(z)
    for n in _far_from_zero(mean, rstd).tolist():
        row = slice(n, n + 1)
        rows_of_weight = slice(None) if weight.shape[0] == 1 else row
        centred = dense[row].float() - _per_channel(_spread(mean[row], x.shape[1]), x)
        z, correction, rstd[row] = _forward_chunk(
            centred, weight[rows_of_weight], bias[rows_of_weight], groups, eps, silu
        )
        mean[row] += correction
        y[row].copy_(z)
    return y, mean, rstd


def _backward_chunk(
    dz: Tensor, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor, groups: int
) -> tuple[Tensor, Tensor, Tensor]:
    """All float32 and dense; gradients of weight and bias have the shape of weight."""
    sizes = (x.shape[0], x.shape[1], math.prod(x.shape[2:]), groups)
    by_hand = _by_hand(x, groups, backward=True)
    if weight.shape[0] == 1:
        if by_hand:
            dx, dw, db = _backward_by_hand(dz, x, mean, rstd, weight[0], groups)
        else:
            dx, dw, db = _native_backward(dz, x, mean, rstd, weight[0], *sizes, [True] * 3)
        return dx, dw[None], db[None]
    scale = _spread(rstd, x.shape[1])
    db = dz.flatten(2).sum(2)
    dw = (dz * x).flatten(2).sum(2).sub_(_spread(mean, x.shape[1]) * db).mul_(scale)
    dz = dz * _per_channel(weight, x)
    if by_hand:
        dx, _, _ = _backward_by_hand(dz, x, mean, rstd, None, groups)
    else:
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
    slope = _spread(rstd, x.shape[1]) * weight
    intercept = bias - _spread(mean, x.shape[1]) * slope
    slope, intercept = _per_channel(slope, x), _per_channel(intercept, x)
    if dense.dtype == torch.float32:
        z = _affine(dense, slope, intercept, torch.empty_like(dense)) if silu else dense
        dz = _silu_backward(grad, z, grad_input=z) if silu else grad
        dx, dw, db = _backward_chunk(dz, dense, weight, mean, rstd, groups)
        grad_x = dx if _alike(dx, grad_x) else grad_x.copy_(dx)
        return grad_x, dw, db
    rows = _rows(dense)
    x_buffer, dz_buffer, z_buffer = (
        torch.empty_like(dense[:rows], dtype=torch.float32) for _ in range(3)
    )
    for piece, upstream, out, a, b, m, r, w, gw, gb in _pieces(
        rows, dense, grad, grad_x, slope, intercept, mean, rstd, weight, grad_weight, grad_bias
    ):
        n = len(piece)
        loaded, dz = x_buffer[:n].copy_(piece), dz_buffer[:n].copy_(upstream)
        if silu:
            _silu_backward(dz, _affine(loaded, a, b, z_buffer[:n]), grad_input=dz)
        dx, dw, db = _backward_chunk(dz, loaded, w, m, r, groups)
        out.copy_(dx)
        gw += dw
        gb += db
    return grad_x, grad_weight, grad_bias
