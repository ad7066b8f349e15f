"""The CPU path of :mod:`kernels.group_norm_silu`, and the reference of its Triton kernels.

All in float32: float32 tensors whole, half-precision ones converted in chunks that stay in cache,
because torch's half-precision GroupNorm for channels_last is slower than that, several times so in
the backward pass. By torch's own kernels, but where their channels_last ones go one number at a
time: there by its elementwise calls and sums. In channels_last the variance is E[x^2] - E[x]^2
(torch's as well), which loses every digit where the mean is large: such samples are centred first.
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
# us for 64 Ki elements with two and four channels a group, torch 2.13, one core of an AMD EPYC: 298
# and 142 forward, 174 and 104 backward; this file's 54 and 48, 77 and 72. From eight channels on
# torch's are as fast. Before 2.13 they are slow for whatever is no multiple of eight.
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


def _rows(x: Tensor, groups: int, backward: bool) -> int:
    """Samples to a chunk: twice as many by hand, whose dozen calls a chunk would show."""
    chunk = 2 * _CHUNK if _by_hand(x, groups, backward) else _CHUNK
    return max(1, chunk // x[:1].numel())


def _pieces(rows: int, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The tensors cut alike; those with one row for all samples come whole every time. Cut at once:
    chunks are so small that taking slices one by one would show in the time of a step.
    """
    batch = max(t.shape[0] for t in tensors)
    if batch <= rows:
        return iter((tensors,))
    whole = batch > 1
    return zip(
        *(repeat(t) if whole and t.shape[0] == 1 else t.split(rows) for t in tensors), strict=False
    )


def _alike(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.stride() == b.stride()


def _per_channel(values: Tensor, x: Tensor) -> Tensor:
    return values.view(*values.shape, *[1] * (x.dim() - 2))


def _spread(per_group: Tensor, channels: int) -> Tensor:
    batch, groups = per_group.shape
    width = channels // groups
    return per_group[:, :, None].expand(batch, groups, width).reshape(batch, channels)


def _affine(x: Tensor, slope: Tensor, intercept: Tensor, out: Tensor) -> Tensor:
    """slope x + intercept per sample and channel, by the calls that torch vectorises."""
    if is_channels_last(x):
        return torch.addcmul(intercept, x, slope, out=out)
    return torch.mul(x, slope, out=out).add_(intercept)


def _by_hand(x: Tensor, groups: int, backward: bool) -> bool:
    """Whether torch's kernel for ``x`` is slower than elementwise calls."""
    if not is_channels_last(x):
        return False
    channels = x.shape[1] // groups
    slow = channels < _LANES or (not _VECTORISED and channels % _LANES != 0)
    return slow and (backward or math.prod(x.shape[2:]) < _SMALL_MAP)


def _pixels(x: Tensor) -> Tensor:
    """(B, pixels, C) of a channels_last tensor, as a view."""
    return x.movedim(1, -1).flatten(1, -2)


def _grouped(values: Tensor, groups: int) -> Tensor:
    """(..., C) as (..., groups, channels a group)."""
    return values.view(*values.shape[:-1], groups, -1)


def _norm_by_hand(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, z: Tensor
) -> tuple[Tensor, Tensor]:
    """``native_group_norm`` of a channels_last tensor into ``z``, as slope x + intercept."""
    x_, z_ = _pixels(x), _pixels(z)
    batch, pixels, channels = x_.shape
    sums = x_.new_empty((2, batch, channels))
    torch.sum(x_, 1, out=sums[0])
    torch.sum(torch.mul(x_, x_, out=z_), 1, out=sums[1])
    mean, square = _grouped(sums, groups).sum(3).div_(pixels * (channels // groups)).unbind()
    variance = torch.addcmul(square, mean, mean, value=-1.0).clamp_(min=0.0)
    rstd = variance.add_(eps).rsqrt_()
    slope = rstd[:, :, None] * _grouped(weight, groups)
    intercept = torch.addcmul(_grouped(bias, groups), mean[:, :, None], slope, value=-1.0)
    torch.addcmul(intercept.view(batch, 1, -1), x_, slope.view(batch, 1, -1), out=z_)
    return mean, rstd


def _backward_by_hand(
    dz: Tensor, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor, groups: int, dx: Tensor
) -> tuple[Tensor, Tensor]:
    """``native_group_norm_backward`` of channels_last tensors into ``dx``, n elements to a group:

    db = sum dz    dw = sum dz x^    dx = rstd (w dz - (sum_group w dz + x^ sum_group w dz x^) / n)
    """
    x_, dz_, dx_ = _pixels(x), _pixels(dz), _pixels(dx)
    batch, pixels, channels = x_.shape
    width = channels // groups
    sums = x_.new_empty((2, batch, channels))
    torch.sum(dz_, 1, out=sums[0])
    torch.sum(torch.mul(dz_, x_, out=dx_), 1, out=sums[1])
    db, dw = _grouped(sums, groups)
    dw.addcmul_(mean[:, :, None], db, value=-1.0).mul_(rstd[:, :, None])
    w = _grouped(weight, groups)
    terms = (_grouped(sums, groups) * w).sum(3).mul_(rstd / (-pixels * width))
    intercept, slope = terms
    slope.mul_(rstd)
    intercept.addcmul_(slope, mean, value=-1.0)
    both = terms[..., None].expand(2, batch, groups, width).reshape(2, batch, 1, channels)
    torch.addcmul(both[0], x_, both[1], out=dx_)
    dx_.addcmul_(dz_, (rstd[:, :, None] * w).view(batch, 1, channels))
    if weight.shape[0] == 1:
        return sums[1].sum(0, keepdim=True), sums[0].sum(0, keepdim=True)
    return sums[1], sums[0]


def _far_from_zero(mean: Tensor, rstd: Tensor) -> list[int]:
    """The samples, by index, whose mean is so large (or NaN) that E[x^2] - E[x]^2 loses digits."""
    distance = torch.linalg.vector_norm(mean * rstd, math.inf, 1)
    if bool(distance.max() < _FAR):  # not where one is NaN
        return []
    far: list[int] = (~(distance < _FAR)).nonzero().squeeze(1).tolist()
    return far


def _forward_chunk(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool, buffer: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Float32 and dense, with the cancelling variance of torch; the result may be in `buffer`."""
    if _by_hand(x, groups, backward=False):
        z = buffer
        mean, rstd = _norm_by_hand(x, weight, bias, groups, eps, z)
    else:
        same = weight.shape[0] == 1
        w, b = (weight[0], bias[0]) if same else (None, None)
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
        buffer = y if _alike(y, dense) else torch.empty_like(dense)
        z, mean, rstd = _forward_chunk(dense, weight, bias, groups, eps, silu, buffer)
        y = z if _alike(z, y) else y.copy_(z)
    else:
        rows = _rows(dense, groups, backward=False)
        buffer, x_buffer = (torch.empty_like(dense[:rows], dtype=torch.float32) for _ in range(2))
        for piece, out, m, r, w, b in _pieces(rows, dense, y, mean, rstd, weight, bias):
            n = len(piece)
            loaded = x_buffer[:n].copy_(piece)
            z, m[:], r[:] = _forward_chunk(loaded, w, b, groups, eps, silu, buffer[:n])
            out.copy_(z)
    for n in _far_from_zero(mean, rstd):
        row = slice(n, n + 1)
        rows_of_weight = slice(None) if weight.shape[0] == 1 else row
        centred = dense[row].float() - _per_channel(_spread(mean[row], x.shape[1]), x)
        z, correction, rstd[row] = _forward_chunk(
            centred, weight[rows_of_weight], bias[rows_of_weight], groups, eps, silu,
            torch.empty_like(centred),
        )  # fmt: skip
        mean[row] += correction
        y[row].copy_(z)
    return y, mean, rstd


def _backward_chunk(
    dz: Tensor, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor, groups: int, buffer: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """All float32 and dense; gradients of weight and bias have the shape of weight, and that of x
    may be in `buffer`.
    """
    if _by_hand(x, groups, backward=True):
        return buffer, *_backward_by_hand(dz, x, weight, mean, rstd, groups, buffer)
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
    if far := _far_from_zero(mean, rstd):
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
        buffer = grad_x if _alike(grad_x, dense) else torch.empty_like(dense)
        dx, dw, db = _backward_chunk(dz, dense, weight, mean, rstd, groups, buffer)
        grad_x = dx if _alike(dx, grad_x) else grad_x.copy_(dx)
        return grad_x, dw, db
    rows = _rows(dense, groups, backward=True)
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
        dx, dw, db = _backward_chunk(dz, loaded, w, m, r, groups, z_buffer[:n])
        out.copy_(dx)
        gw += dw
        gb += db
    return grad_x, grad_weight, grad_bias
