"""The forward process of a DDPM with the noise made in the kernel.

    x_t = sqrt(alpha_bar[t]) x_0 + sqrt(1 - alpha_bar[t]) eps

Source: Ho, Jain, Abbeel, *Denoising diffusion probabilistic models* (arXiv 2006.11239), equation 4.
The noise is that of :mod:`kernels.noise`: it never exists in memory, and the loss makes it again.

Images may come as uint8: v becomes (2 v - 255) / 255, which maps 0, 255 to -1, 1 and mirrors
exactly.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels._arguments import (
    FLOATS,
    IMAGES,
    check_batched,
    check_device,
    check_dtype,
    check_float_dtype,
    check_no_tangent,
    check_same_shape,
    check_schedule,
    check_stream,
    check_timestep_range,
    contiguous_like,
    on_device_of,
)
from kernels.noise import (
    block_size,
    needs_wide_index,
    normal_block,
    normal_reference,
    warps_for,
)

# --- Triton ---------------------------------------------------------------------------------------


@triton.jit
def to_unit_range(v, FROM_UINT8: tl.constexpr):  # type: ignore[no-untyped-def]
    if FROM_UINT8:
        return (v.to(tl.float32) * 2.0 - 255.0) * 0.00392156862745098
    else:
        return v.to(tl.float32)


@triton.jit
def signal_and_noise(alpha_bar, t, n_steps):  # type: ignore[no-untyped-def]
    """(alpha_bar_t, its root, the root of the rest); NaN where t is outside the table."""
    a = tl.load(alpha_bar + t, mask=(t >= 0) & (t < n_steps), other=float("nan"))
    return a, tl.sqrt_rn(a), tl.sqrt_rn(1.0 - a)


@triton.jit
def _q_sample_kernel(  # type: ignore[no-untyped-def]
    x_0,
    x_t,
    given_eps,
    t,
    alpha_bar,
    key,
    sample_id,
    step,
    elements,
    n_steps,
    n_blocks,
    GIVEN_NOISE: tl.constexpr,
    FROM_UINT8: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDE: tl.constexpr,
):
    program = tl.program_id(0)
    n = program // n_blocks
    block = program % n_blocks
    if WIDE:
        block = block.to(tl.int64)
    index = block * BLOCK + tl.arange(0, BLOCK)
    inside = index < elements
    offset = n.to(tl.int64) * elements + index
    _, signal, noise = signal_and_noise(alpha_bar, tl.load(t + n), n_steps)
    x = to_unit_range(tl.load(x_0 + offset, mask=inside, other=0), FROM_UINT8)
    if GIVEN_NOISE:
        eps = tl.load(given_eps + offset, mask=inside, other=0.0).to(tl.float32)
    else:
        eps = normal_block(tl.load(key), tl.load(sample_id + n), tl.load(step), block, BLOCK)
    value = signal * x + noise * eps
    tl.store(x_t + offset, value.to(x_t.dtype.element_ty), mask=inside)


def _launch_q_sample(
    x_0: Tensor,
    t: Tensor,
    alpha_bar: Tensor,
    out: Tensor,
    *,
    eps: Tensor | None = None,
    stream: tuple[Tensor, Tensor, Tensor] | None = None,
) -> None:
    """Write x_t into ``out``; noise from ``eps`` or from the stream (key, sample_id, step)."""
    if out.numel() == 0:
        return
    x_0, made = x_0.contiguous(), contiguous_like(out)
    given = None if eps is None else eps.contiguous()
    key, sample_id, step = stream if stream is not None else (None, None, None)
    elements = out[0].numel()
    block = block_size(elements)
    n_blocks = triton.cdiv(elements, block)
    with on_device_of(out):
        _q_sample_kernel[(out.shape[0] * n_blocks,)](
            x_0,
            made,
            given,
            t.contiguous(),
            alpha_bar.contiguous(),
            key,
            None if sample_id is None else sample_id.contiguous(),
            step,
            elements,
            alpha_bar.shape[0],
            n_blocks,
            GIVEN_NOISE=given is not None,
            FROM_UINT8=x_0.dtype == torch.uint8,
            BLOCK=block,
            WIDE=needs_wide_index(elements),
            num_warps=warps_for(block),
            enable_fp_fusion=False,
        )
    if made is not out:
        out.copy_(made)


# --- torch ----------------------------------------------------------------------------------------


def per_sample(values: Tensor, like: Tensor) -> Tensor:
    return values.view(-1, *[1] * (like.dim() - 1))


def unit_range_reference(x_0: Tensor) -> Tensor:
    if x_0.dtype != torch.uint8:
        return x_0.to(torch.float32)
    return x_0.to(torch.float32).mul_(2.0).sub_(255.0).mul_(1.0 / 255.0)


def sqrt_rn(x: Tensor) -> Tensor:
    """The correctly rounded float32 root (torch's own is not, on the CPU)."""
    return x.double().sqrt_().to(torch.float32)


def q_sample_reference(
    x_0: Tensor, eps: Tensor, t: Tensor, alpha_bar: Tensor, dtype: torch.dtype
) -> Tensor:
    check_timestep_range("q_sample", t, alpha_bar.shape[0])
    a = alpha_bar[t]
    out = torch.empty_like(x_0, dtype=dtype)
    x = unit_range_reference(x_0) * per_sample(sqrt_rn(a), x_0)
    return out.copy_(x.add_(eps.to(torch.float32) * per_sample(sqrt_rn(1.0 - a), x_0)))


def _signal_level(alpha_bar: Tensor, t: Tensor, like: Tensor) -> Tensor:
    """alpha_bar[t] for gradients, NaN outside the table, as the kernel has it. On a GPU an index
    that is outside would stop the whole process, and -1 would be taken for the last entry."""
    inside = (t >= 0) & (t < alpha_bar.shape[0])
    level = alpha_bar[t.clamp(0, alpha_bar.shape[0] - 1)].masked_fill(~inside, math.nan)
    return per_sample(level, like)


# --- the ops --------------------------------------------------------------------------------------


@torch.library.custom_op("concilium::q_sample", mutates_args=(), device_types="cpu")
def _q_sample(
    x_0: Tensor,
    t: Tensor,
    alpha_bar: Tensor,
    key: Tensor,
    sample_id: Tensor,
    step: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    eps = normal_reference(x_0.shape, key, sample_id, step, torch.float32)
    return q_sample_reference(x_0, eps, t, alpha_bar, dtype)


@_q_sample.register_kernel("cuda")
def _q_sample_cuda(
    x_0: Tensor,
    t: Tensor,
    alpha_bar: Tensor,
    key: Tensor,
    sample_id: Tensor,
    step: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    out = torch.empty_like(x_0, dtype=dtype)
    _launch_q_sample(x_0, t, alpha_bar, out, stream=(key, sample_id, step))
    return out


@_q_sample.register_fake
def _q_sample_fake(
    x_0: Tensor,
    t: Tensor,
    alpha_bar: Tensor,
    key: Tensor,
    sample_id: Tensor,
    step: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    return torch.empty_like(x_0, dtype=dtype)


@torch.library.custom_op("concilium::add_noise", mutates_args=(), device_types="cpu")
def _add_noise(
    x_0: Tensor, eps: Tensor, t: Tensor, alpha_bar: Tensor, dtype: torch.dtype
) -> Tensor:
    return q_sample_reference(x_0, eps, t, alpha_bar, dtype)


@_add_noise.register_kernel("cuda")
def _add_noise_cuda(
    x_0: Tensor, eps: Tensor, t: Tensor, alpha_bar: Tensor, dtype: torch.dtype
) -> Tensor:
    out = torch.empty_like(x_0, dtype=dtype)
    _launch_q_sample(x_0, t, alpha_bar, out, eps=eps)
    return out


@_add_noise.register_fake
def _add_noise_fake(
    x_0: Tensor, eps: Tensor, t: Tensor, alpha_bar: Tensor, dtype: torch.dtype
) -> Tensor:
    return torch.empty_like(x_0, dtype=dtype)


def _q_sample_setup(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    x_0, t, alpha_bar, *_ = inputs
    ctx.save_for_backward(t, alpha_bar)
    ctx.x_0_dtype = x_0.dtype


def _add_noise_setup(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    x_0, eps, t, alpha_bar, _ = inputs
    ctx.save_for_backward(t, alpha_bar)
    ctx.x_0_dtype, ctx.eps_dtype = x_0.dtype, eps.dtype


def _q_sample_backward(ctx, grad):  # type: ignore[no-untyped-def]
    t, alpha_bar = ctx.saved_tensors
    signal = sqrt_rn(_signal_level(alpha_bar, t, grad))
    return (grad * signal).to(ctx.x_0_dtype), None, None, None, None, None, None


def _add_noise_backward(ctx, grad):  # type: ignore[no-untyped-def]
    t, alpha_bar = ctx.saved_tensors
    a = _signal_level(alpha_bar, t, grad)
    grad_x_0 = (grad * sqrt_rn(a)).to(ctx.x_0_dtype) if ctx.needs_input_grad[0] else None
    grad_eps = (grad * sqrt_rn(1.0 - a)).to(ctx.eps_dtype) if ctx.needs_input_grad[1] else None
    return grad_x_0, grad_eps, None, None, None


_q_sample.register_autograd(_q_sample_backward, setup_context=_q_sample_setup)
_add_noise.register_autograd(_add_noise_backward, setup_context=_add_noise_setup)


def q_sample(
    x_0: Tensor,
    t: Tensor,
    alpha_bar: Tensor,
    *,
    key: Tensor,
    sample_id: Tensor,
    step: Tensor,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """x_t = sqrt(alpha_bar[t]) x_0 + sqrt(1 - alpha_bar[t]) eps, eps = ``normal(x_0.shape, ...)``.

    ``x_0``: ``(B, C, H, W)`` (or any ``(B, ...)``), uint8 images or float32, bfloat16, float16
    already in [-1, 1], in any layout; the result has its layout and ``dtype``, computed in float32.
    ``t``: int64 ``(B,)``. ``alpha_bar``: float32 ``(T,)``. ``key``, ``sample_id``, ``step``: as for
    :func:`kernels.normal`. Differentiable in a float ``x_0``, as often as one likes: it is linear.

    Raises ``TypeError`` for a wrong dtype, ``ValueError`` for a wrong shape or device and, on the
    CPU, for a timestep outside the table (on CUDA, where looking would stall the queue, that sample
    becomes NaN); ``RuntimeError`` for a derivative that it does not have
    (forward mode; by ``alpha_bar``). arXiv 2006.11239, eq. 4.
    """
    check_dtype("q_sample", "x_0", x_0, IMAGES)
    check_batched("q_sample", "x_0", x_0.shape)
    check_float_dtype("q_sample", dtype)
    check_schedule("q_sample", t, alpha_bar, x_0.shape[0], x_0.device)
    check_stream("q_sample", key, sample_id, step, x_0.shape[0], x_0.device)
    check_no_tangent("q_sample", x_0=x_0, alpha_bar=alpha_bar)
    out: Tensor = _q_sample(x_0, t, alpha_bar, key, sample_id, step, dtype)
    return out


def add_noise(
    x_0: Tensor,
    eps: Tensor,
    t: Tensor,
    alpha_bar: Tensor,
    *,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """x_t = sqrt(alpha_bar[t]) x_0 + sqrt(1 - alpha_bar[t]) eps with given noise, of the shape of
    ``x_0``.

    Otherwise as :func:`q_sample`; differentiable in ``x_0`` and ``eps``.
    """
    check_dtype("add_noise", "x_0", x_0, IMAGES)
    check_batched("add_noise", "x_0", x_0.shape)
    check_dtype("add_noise", "eps", eps, FLOATS)
    check_same_shape("add_noise", "eps", eps, "x_0", x_0)
    check_float_dtype("add_noise", dtype)
    check_schedule("add_noise", t, alpha_bar, x_0.shape[0], x_0.device)
    check_device("add_noise", x_0.device, eps=eps)
    check_no_tangent("add_noise", x_0=x_0, eps=eps, alpha_bar=alpha_bar)
    out: Tensor = _add_noise(x_0, eps, t, alpha_bar, dtype)
    return out
