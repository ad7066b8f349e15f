"""GroupNorm and SiLU as one operation, forward and backward, with an optional scale and shift.

    x_hat = (x - mean_g) / sqrt(var_g + eps)             per sample and group of channels
    z     = (weight x_hat + bias) (1 + scale) + shift    scale, shift: per sample and channel
    y     = z sigmoid(z)                                 or z without SiLU

    dz = dy sigmoid(z) (1 + z (1 - sigmoid(z)))
    dx = rstd (W dz - sum_g(W dz) / M - x_hat sum_g(W dz x_hat) / M)

with W = weight (1 + scale), rstd = 1 / sqrt(var_g + eps) and M elements a group.

Only x and the statistics are kept for the backward pass; x_hat and z are made again.

Sources: Wu & He, *Group normalization* (arXiv 1803.08494); scale and shift as in Dhariwal & Nichol
(arXiv 2105.05233, "adaptive group normalization"). Means and variances of tiles are merged as in
Chan, Golub & LeVeque (1983), which does not cancel where E[x^2] - E[x]^2 would.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels._arguments import (
    FLOATS,
    as_layout_of,
    check_device,
    check_dtype,
    check_no_tangent,
    is_channels_last,
    is_dense,
    on_device_of,
)
from kernels._group_norm_silu_cpu import (
    group_norm_silu_backward_reference,
    group_norm_silu_reference,
)

_TILE = 4096  # elements at a time in a Triton program
_MAX_ELEMENTS = (1 << 31) - _TILE  # a sample; the 32-bit counter of pixels goes one tile beyond

# --- Triton ---------------------------------------------------------------------------------------


@triton.jit
def _group_sum(per_channel, group, GROUP_SIZE: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """For every channel the sum over the channels of its group; lanes beyond the groups hold 0."""
    if BLOCK < 2 * GROUP_SIZE:  # one group, whose square might not fit in registers
        return tl.sum(per_channel, axis=0) + tl.zeros((BLOCK,), tl.float32)
    elif GROUP_SIZE & (GROUP_SIZE - 1) == 0:  # groups that a tensor's shape can hold
        GROUPS: tl.constexpr = BLOCK // GROUP_SIZE
        sums = tl.sum(tl.reshape(per_channel, (GROUPS, GROUP_SIZE)), axis=1)
        return tl.reshape(tl.broadcast_to(sums[:, None], (GROUPS, GROUP_SIZE)), (BLOCK,))
    else:
        same = group[:, None] == group[None, :]
        return tl.sum(tl.where(same, per_channel[None, :], 0.0), axis=1)


@triton.jit
def _tile(start, channel, valid, channels, pixels, CHANNELS_LAST: tl.constexpr, ROWS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Offsets and mask of ROWS pixels by the program's channels, within one sample."""
    pixel = start + tl.arange(0, ROWS)
    inside = (pixel < pixels)[:, None] & valid[None, :]
    if CHANNELS_LAST:
        return pixel[:, None] * channels + channel[None, :], inside
    else:
        return channel[None, :] * pixels + pixel[:, None], inside


@triton.jit
def _place(channels, n_blocks, WIDTH: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """(sample, this program's channels, which are whole groups, and which of the lanes they
    fill)
    """
    program = tl.program_id(0)
    lane = tl.arange(0, BLOCK)
    channel = program % n_blocks * WIDTH + lane
    return (program // n_blocks).to(tl.int64), channel, (lane < WIDTH) & (channel < channels)


@triton.jit
def _forward_kernel(  # type: ignore[no-untyped-def]
    x,
    y,
    weight,
    bias,
    mean,
    rstd,
    eps,
    channels,
    pixels,
    weight_stride,
    n_blocks,
    SILU: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    n, channel, valid = _place(channels, n_blocks, WIDTH, BLOCK)
    group = channel // GROUP_SIZE
    x += n * channels * pixels
    y += n * channels * pixels
    average = tl.zeros((BLOCK,), tl.float32)
    squares = tl.zeros((BLOCK,), tl.float32)
    seen = 0.0
    for start in range(0, pixels, ROWS):
        offset, inside = _tile(start, channel, valid, channels, pixels, CHANNELS_LAST, ROWS)
        value = tl.load(x + offset, mask=inside, other=0.0).to(tl.float32)
        count = tl.minimum(pixels - start, ROWS) * 1.0
        here = tl.sum(value, axis=0) / count
        centred = tl.where(inside, value - here[None, :], 0.0)
        delta = here - average
        share = count / (seen + count)
        average += delta * share
        squares += tl.sum(centred * centred, axis=0) + delta * delta * seen * share
        seen += count
    group_mean = _group_sum(tl.where(valid, average, 0.0), group, GROUP_SIZE, BLOCK) / GROUP_SIZE
    delta = tl.where(valid, average - group_mean, 0.0)
    squares = tl.where(valid, squares, 0.0) + seen * delta * delta
    total = _group_sum(squares, group, GROUP_SIZE, BLOCK)
    group_rstd = tl.sqrt_rn(tl.div_rn(1.0, total / (seen * GROUP_SIZE) + eps))
    first = valid & (channel % GROUP_SIZE == 0)
    at = n * (channels // GROUP_SIZE) + group
    tl.store(mean + at, group_mean, mask=first)
    tl.store(rstd + at, group_rstd, mask=first)

    w = tl.load(weight + n * weight_stride + channel, mask=valid, other=0.0).to(tl.float32)
    b = tl.load(bias + n * weight_stride + channel, mask=valid, other=0.0).to(tl.float32)
    for start in range(0, pixels, ROWS):
        offset, inside = _tile(start, channel, valid, channels, pixels, CHANNELS_LAST, ROWS)
        value = tl.load(x + offset, mask=inside, other=0.0).to(tl.float32)
        z = (value - group_mean[None, :]) * (group_rstd * w)[None, :] + b[None, :]
        if SILU:
            z = z * tl.sigmoid(z)
        tl.store(y + offset, z.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _grad_z(grad, centred, scale, b, SILU: tl.constexpr):  # type: ignore[no-untyped-def]
    if SILU:
        z = centred * scale[None, :] + b[None, :]
        s = tl.sigmoid(z)
        grad = grad * s * (1.0 + z * (1.0 - s))
    return grad


@triton.jit
def _backward_kernel(  # type: ignore[no-untyped-def]
    grad,
    x,
    grad_x,
    weight,
    bias,
    mean,
    rstd,
    grad_weight,
    grad_bias,
    channels,
    pixels,
    weight_stride,
    n_blocks,
    SILU: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    n, channel, valid = _place(channels, n_blocks, WIDTH, BLOCK)
    group = channel // GROUP_SIZE
    grad += n * channels * pixels
    x += n * channels * pixels
    grad_x += n * channels * pixels
    at = n * (channels // GROUP_SIZE) + group
    mu = tl.load(mean + at, mask=valid, other=0.0)
    r = tl.load(rstd + at, mask=valid, other=0.0)
    w = tl.load(weight + n * weight_stride + channel, mask=valid, other=0.0).to(tl.float32)
    b = tl.load(bias + n * weight_stride + channel, mask=valid, other=0.0).to(tl.float32)
    scale = r * w
    total = tl.zeros((BLOCK,), tl.float32)
    product = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, pixels, ROWS):
        offset, inside = _tile(start, channel, valid, channels, pixels, CHANNELS_LAST, ROWS)
        centred = tl.load(x + offset, mask=inside, other=0.0).to(tl.float32) - mu[None, :]
        dy = tl.load(grad + offset, mask=inside, other=0.0).to(tl.float32)
        dz = _grad_z(dy, centred, scale, b, SILU)
        total += tl.sum(dz, axis=0)
        product += tl.sum(dz * centred, axis=0)
    product = product * r
    tl.store(grad_weight + n * channels + channel, product, mask=valid)
    tl.store(grad_bias + n * channels + channel, total, mask=valid)
    share = r / (pixels * GROUP_SIZE * 1.0)
    constant = _group_sum(w * total, group, GROUP_SIZE, BLOCK) * share
    slope = _group_sum(w * product, group, GROUP_SIZE, BLOCK) * share * r
    for start in range(0, pixels, ROWS):
        offset, inside = _tile(start, channel, valid, channels, pixels, CHANNELS_LAST, ROWS)
        centred = tl.load(x + offset, mask=inside, other=0.0).to(tl.float32) - mu[None, :]
        dy = tl.load(grad + offset, mask=inside, other=0.0).to(tl.float32)
        dz = _grad_z(dy, centred, scale, b, SILU)
        dx = scale[None, :] * dz - constant[None, :] - centred * slope[None, :]
        tl.store(grad_x + offset, dx.to(grad_x.dtype.element_ty), mask=inside)


def _tiling(x: Tensor, groups: int) -> tuple[dict[str, int], dict[str, int | bool]]:
    """Whole groups to a program: enough of them for wide rows where channels are innermost, and
    where possible so many that every program's rows start on a 128-bit boundary.
    """
    channels, pixels = x.shape[1], math.prod(x.shape[2:])
    group_size = channels // groups
    last = is_channels_last(x)
    block = triton.next_power_of_2(min(channels, max(group_size, 64)) if last else group_size)
    together = block // group_size
    aligned = 8 // math.gcd(8, group_size)  # groups that end on 128 bits of half precision
    if aligned <= together < groups:
        together -= together % aligned
    width = together * group_size
    sizes = {"channels": channels, "pixels": pixels, "n_blocks": triton.cdiv(groups, together)}
    rows = max(1, min(_TILE // block, triton.next_power_of_2(pixels)))
    tiles: dict[str, int | bool] = {"CHANNELS_LAST": last, "GROUP_SIZE": group_size, "WIDTH": width}
    warps = min(4, max(1, rows * block // 512))  # 16 elements a thread, or what there is
    return sizes, tiles | {
        "ROWS": rows,
        "BLOCK": block,
        "num_warps": warps,
        "enable_fp_fusion": True,
    }


def _launch_forward(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool, y: Tensor,
    mean: Tensor, rstd: Tensor,
) -> None:  # fmt: skip
    """Write y, in the dense layout of x, and the statistics (B, groups)."""
    if x.numel() == 0:
        return
    sizes, tiles = _tiling(x, groups)
    stride = sizes["channels"] if weight.shape[0] > 1 else 0
    with on_device_of(x):
        _forward_kernel[(x.shape[0] * sizes["n_blocks"],)](
            x, y, weight.contiguous(), bias.contiguous(), mean, rstd, eps,
            **sizes, weight_stride=stride, SILU=silu, **tiles,
        )  # fmt: skip


def _launch_backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor,
    groups: int, silu: bool, grad_x: Tensor, grad_weight: Tensor, grad_bias: Tensor,
) -> None:  # fmt: skip
    """Write grad_x, in the dense layout of x, and the gradients (B, C) of weight and bias."""
    if x.numel() == 0:
        return
    sizes, tiles = _tiling(x, groups)
    stride = sizes["channels"] if weight.shape[0] > 1 else 0
    with on_device_of(x):
        _backward_kernel[(x.shape[0] * sizes["n_blocks"],)](
            as_layout_of(grad, x), x, grad_x, weight.contiguous(), bias.contiguous(), mean, rstd,
            grad_weight, grad_bias, **sizes, weight_stride=stride, SILU=silu, **tiles,
        )  # fmt: skip


# --- the ops --------------------------------------------------------------------------------------


@torch.library.custom_op("concilium::group_norm_silu", mutates_args=(), device_types="cpu")
def _group_norm_silu(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return group_norm_silu_reference(x, weight, bias, groups, eps, silu)


@_group_norm_silu.register_kernel("cuda")
def _group_norm_silu_cuda(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    dense = x if is_dense(x) else x.contiguous()
    y = torch.empty_like(dense)
    mean = torch.empty((x.shape[0], groups), dtype=torch.float32, device=x.device)
    rstd = torch.empty_like(mean)
    _launch_forward(dense, weight, bias, groups, eps, silu, y, mean, rstd)
    return y if dense is x else torch.empty_like(x).copy_(y), mean, rstd


@_group_norm_silu.register_fake
def _group_norm_silu_fake(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    mean = x.new_empty((x.shape[0], groups), dtype=torch.float32)
    return torch.empty_like(x), mean, torch.empty_like(mean)


@torch.library.custom_op("concilium::group_norm_silu_backward", mutates_args=(), device_types="cpu")
def _group_norm_silu_backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor,
    groups: int, silu: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The gradients of x, and of weight and bias in one (2, 1 or B, C)."""
    dx, dw, db = group_norm_silu_backward_reference(grad, x, weight, bias, mean, rstd, groups, silu)
    return dx, torch.stack([dw, db])


@_group_norm_silu_backward.register_kernel("cuda")
def _group_norm_silu_backward_cuda(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor,
    groups: int, silu: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    dense = x if is_dense(x) else x.contiguous()
    dx = torch.empty_like(dense)
    of_affine = weight.new_empty((2, *x.shape[:2]), dtype=torch.float32)
    if not x.numel():
        of_affine.zero_()  # where the kernel writes nothing
    _launch_backward(grad, dense, weight, bias, mean, rstd, groups, silu, dx, *of_affine)
    if weight.shape[0] == 1:
        of_affine = of_affine.sum(1, keepdim=True)
    return dx if dense is x else torch.empty_like(x).copy_(dx), of_affine


@_group_norm_silu_backward.register_fake
def _group_norm_silu_backward_fake(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor,
    groups: int, silu: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return torch.empty_like(x), weight.new_empty((2, *weight.shape), dtype=torch.float32)


def _setup(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    x, weight, bias, ctx.groups, _, ctx.silu = inputs
    _, mean, rstd = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(mean, rstd)
    ctx.save_for_backward(x, weight, bias, mean, rstd)


def _backward(ctx, grad, _grad_mean, _grad_rstd):  # type: ignore[no-untyped-def]
    nothing = (None,) * 3
    if grad is None:
        return None, None, None, *nothing
    x, weight, bias, mean, rstd = ctx.saved_tensors
    dx, (dw, db) = _group_norm_silu_backward(
        grad, x, weight, bias, mean, rstd, ctx.groups, ctx.silu
    )
    return dx, dw.to(weight.dtype), db.to(bias.dtype), *nothing


def _no_double_backward(ctx, *grads):  # type: ignore[no-untyped-def]
    raise RuntimeError(
        "group_norm_silu: double backward is not supported; for second derivatives use "
        "torch.nn.functional.group_norm and silu"
    )


_group_norm_silu.register_autograd(_backward, setup_context=_setup)
_group_norm_silu_backward.register_autograd(_no_double_backward)


def group_norm_silu(
    x: Tensor,
    groups: int,
    weight: Tensor,
    bias: Tensor,
    *,
    eps: float = 1e-5,
    silu: bool = True,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
) -> Tensor:
    """silu((weight x_hat + bias) (1 + scale) + shift), x_hat normalised per sample and group.

    ``x``: ``(B, C, ...)`` float32, bfloat16 or float16; contiguous and channels_last are used as
    they are, other layouts are copied. The result has the dtype and layout of ``x``, computed in
    float32. ``weight``, ``bias``: ``(C,)`` float. ``scale``, ``shift``: ``(B, C)`` float, both or
    neither. Differentiable in all of them, backward and once: forward mode and double backward
    raise ``RuntimeError``.

    Raises ``TypeError`` for a wrong dtype, ``ValueError`` for a wrong shape or device.
    arXiv 1803.08494, 2105.05233.
    """
    op = "group_norm_silu"
    given = {"weight": weight, "bias": bias}
    check_dtype(op, "x", x, FLOATS)
    if x.dim() < 2 or groups < 1 or x.shape[1] % groups:
        raise ValueError(
            f"{op}: x must be (B, C, ...) with C divisible by groups, got {tuple(x.shape)} "
            f"and {groups} groups"
        )
    if math.prod(x.shape[1:]) > _MAX_ELEMENTS:
        raise ValueError(
            f"{op}: x has {math.prod(x.shape[1:])} elements a sample, the kernel counts to "
            f"2^31 - {_TILE}; use fewer channels or pixels"
        )
    if (scale is None) != (shift is None):
        raise ValueError(f"{op}: scale and shift belong together, one of them is missing")
    if scale is not None and shift is not None:
        given |= {"scale": scale, "shift": shift}
    for name, value in given.items():
        check_dtype(op, name, value, FLOATS)
        expected = x.shape[1:2] if name in ("weight", "bias") else x.shape[:2]
        if value.shape != expected:
            raise ValueError(
                f"{op}: {name} must have shape {tuple(expected)}, got {tuple(value.shape)}"
            )
    check_device(op, x.device, **given)
    check_no_tangent(op, x=x, **given)
    w, b = weight[None], bias[None]
    if scale is not None and shift is not None:
        gain = 1.0 + scale.float()
        w, b = w * gain, b * gain + shift
    # (B, N, C) seen as (B, C, N), as attention has it, is channels_last with one more dimension.
    image = x.unsqueeze(2) if x.dim() == 3 else x
    y: Tensor
    y, _, _ = _group_norm_silu(image, w, b, groups, eps, silu)
    return y.squeeze(2) if x.dim() == 3 else y
