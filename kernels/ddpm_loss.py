"""The training objective of a DDPM, per sample, with the noise made again instead of stored.

    L_b = w(t_b) / D  sum_i (pred_i - target_i)^2                      D = elements a sample

    objective 'eps'    target = eps                              w = min(SNR, gamma) / SNR
              'x0'     target = x_0                              w = min(SNR, gamma)
              'v'      target = sqrt(a) eps - sqrt(1 - a) x_0    w = min(SNR, gamma) / (SNR + 1)

with a = alpha_bar[t], SNR = a / (1 - a); w = 1 without ``snr_gamma``.

Sources: Ho et al. (arXiv 2006.11239, equation 14) for eps; Salimans & Ho (arXiv 2202.00512) for v;
Hang et al. (arXiv 2303.09556, equations 5 to 7 and section 3.4) for min-SNR-gamma.

One pass reads ``pred`` and ``x_0`` and leaves the loss and the residual pred - target, of which the
gradient 2 w g / D (pred - target) is a multiple per sample; eps never exists in memory. Residual
and gradient are rounded to the dtype of ``pred``: in bfloat16 the gradient is within 2^-7. The sum
is taken in a fixed order that depends on the size of a sample alone: no atomics, and a sample's
loss is the same in any batch.
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
    check_no_tangent,
    check_objective,
    check_same_shape,
    check_schedule,
    check_stream,
    contiguous_like,
    on_device_of,
)
from kernels._ddpm_loss_cpu import ddpm_loss_reference
from kernels.noise import block_size, needs_wide_index, normal_block, warps_for
from kernels.q_sample import per_sample, signal_and_noise, to_unit_range

_BLOCKS_PER_CHUNK = 4  # what one program sums at most

# --- Triton ---------------------------------------------------------------------------------------


@triton.jit
def _residual_kernel(  # type: ignore[no-untyped-def]
    pred,
    x_0,
    residual,
    partial,
    t,
    alpha_bar,
    key,
    sample_id,
    step,
    elements,
    n_steps,
    n_chunks,
    OBJECTIVE: tl.constexpr,
    FROM_UINT8: tl.constexpr,
    WITH_RESIDUAL: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDE: tl.constexpr,
):
    program = tl.program_id(0)
    n = program // n_chunks
    chunk = program % n_chunks
    if WIDE:
        chunk = chunk.to(tl.int64)
    base = n.to(tl.int64) * elements
    _, signal, noise = signal_and_noise(alpha_bar, tl.load(t + n), n_steps)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for i in range(BLOCKS):
        block = chunk * BLOCKS + i
        index = block * BLOCK + tl.arange(0, BLOCK)
        inside = index < elements
        offset = base + index
        target = tl.zeros((BLOCK,), dtype=tl.float32)
        if OBJECTIVE != "x0":
            target = normal_block(tl.load(key), tl.load(sample_id + n), tl.load(step), block, BLOCK)
        if OBJECTIVE != "eps":
            x = to_unit_range(tl.load(x_0 + offset, mask=inside, other=0), FROM_UINT8)
            if OBJECTIVE == "v":
                target = signal * target - noise * x
            else:
                target = x
        difference = tl.load(pred + offset, mask=inside, other=0.0).to(tl.float32) - target
        if WITH_RESIDUAL:
            stored = difference.to(residual.dtype.element_ty)
            tl.store(residual + offset, stored, mask=inside)
        total += tl.where(inside, difference * difference, 0.0)
    tl.store(partial + program, tl.sum(total))


@triton.jit
def _finish_kernel(  # type: ignore[no-untyped-def]
    partial,
    loss,
    scale,
    t,
    alpha_bar,
    elements,
    gamma,
    n_steps,
    n_chunks,
    OBJECTIVE: tl.constexpr,
    WEIGHTED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    n = tl.program_id(0)
    base = n.to(tl.int64) * n_chunks
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in range(0, n_chunks, BLOCK):
        chunk = start + tl.arange(0, BLOCK)
        total += tl.load(partial + base + chunk, mask=chunk < n_chunks, other=0.0)
    at = tl.load(t + n)
    a, _, _ = signal_and_noise(alpha_bar, at, n_steps)
    # NaN outside the table, even where neither the target nor the weight depends on t.
    weight = tl.where((at >= 0) & (at < n_steps), 1.0, float("nan"))
    if WEIGHTED:
        snr = tl.div_rn(a, 1.0 - a)
        if OBJECTIVE == "eps":
            weight = tl.div_rn(gamma, tl.maximum(snr, gamma, tl.PropagateNan.ALL))
        elif OBJECTIVE == "x0":
            weight = tl.minimum(snr, gamma, tl.PropagateNan.ALL)
        else:
            weight = tl.div_rn(tl.minimum(snr, gamma, tl.PropagateNan.ALL), snr + 1.0)
    share = tl.div_rn(weight, elements)
    tl.store(loss + n, tl.sum(total) * share)
    tl.store(scale + n, 2.0 * share)


def _launch_ddpm_loss(
    pred: Tensor,
    x_0: Tensor,
    t: Tensor,
    alpha_bar: Tensor,
    stream: tuple[Tensor, Tensor, Tensor],
    objective: str,
    snr_gamma: float | None,
    residual: Tensor | None,
    loss: Tensor,
    scale: Tensor,
) -> None:
    """Fill ``loss`` and ``scale`` (B,) and, where given, the residual."""
    if pred.numel() == 0:
        loss.fill_(float("nan"))  # the mean of nothing, as in torch
        scale.fill_(0.0)
        return
    t, alpha_bar = t.contiguous(), alpha_bar.contiguous()
    with on_device_of(pred):
        partial = _launch_residual(pred, x_0, t, alpha_bar, stream, objective, residual)
        n_chunks = partial.numel() // pred.shape[0]
        _finish_kernel[(pred.shape[0],)](
            partial, loss, scale, t, alpha_bar, float(pred[0].numel()),
            0.0 if snr_gamma is None else snr_gamma, alpha_bar.shape[0], n_chunks,
            OBJECTIVE=objective, WEIGHTED=snr_gamma is not None,
            BLOCK=min(256, triton.next_power_of_2(n_chunks)), num_warps=1, enable_fp_fusion=False,
        )  # fmt: skip


def _launch_residual(
    pred: Tensor, x_0: Tensor, t: Tensor, alpha_bar: Tensor,
    stream: tuple[Tensor, Tensor, Tensor], objective: str, residual: Tensor | None,
) -> Tensor:  # fmt: skip
    """Sums of squares, (B chunks,); where it is given, the residual is filled."""
    key, sample_id, step = stream
    elements = pred[0].numel()
    block = block_size(elements)
    blocks = triton.cdiv(elements, block)
    n_chunks = triton.cdiv(blocks, _BLOCKS_PER_CHUNK)
    partial = torch.empty(pred.shape[0] * n_chunks, dtype=torch.float32, device=pred.device)
    made = None if residual is None else contiguous_like(residual)
    x_0 = x_0 if objective == "eps" else x_0.contiguous()  # which eps does not read
    _residual_kernel[(partial.numel(),)](
        pred.contiguous(), x_0, made, partial, t, alpha_bar, key,
        sample_id.contiguous(), step, elements, alpha_bar.shape[0], n_chunks,
        OBJECTIVE=objective, FROM_UINT8=x_0.dtype == torch.uint8,
        WITH_RESIDUAL=residual is not None,
        BLOCKS=triton.cdiv(blocks, n_chunks), BLOCK=block,  # chunks alike: few blocks of padding
        WIDE=needs_wide_index(elements), num_warps=warps_for(block), enable_fp_fusion=False,
    )  # fmt: skip
    if residual is not None and made is not None and made is not residual:
        residual.copy_(made)
    return partial


# --- the ops --------------------------------------------------------------------------------------


@torch.library.custom_op("concilium::ddpm_loss", mutates_args=(), device_types="cpu")
def _ddpm_loss(
    pred: Tensor,
    x_0: Tensor,
    t: Tensor,
    alpha_bar: Tensor,
    key: Tensor,
    sample_id: Tensor,
    step: Tensor,
    objective: str,
    snr_gamma: float | None,
    with_residual: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    stream = (key, sample_id, step)
    return ddpm_loss_reference(pred, x_0, t, alpha_bar, stream, objective, snr_gamma, with_residual)


@_ddpm_loss.register_kernel("cuda")
def _ddpm_loss_cuda(
    pred: Tensor,
    x_0: Tensor,
    t: Tensor,
    alpha_bar: Tensor,
    key: Tensor,
    sample_id: Tensor,
    step: Tensor,
    objective: str,
    snr_gamma: float | None,
    with_residual: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    residual = torch.empty_like(pred) if with_residual else None
    loss = torch.empty(pred.shape[0], dtype=torch.float32, device=pred.device)
    scale = torch.empty_like(loss)
    stream = (key, sample_id, step)
    _launch_ddpm_loss(pred, x_0, t, alpha_bar, stream, objective, snr_gamma, residual, loss, scale)
    return loss, scale, pred.new_empty(0) if residual is None else residual


@_ddpm_loss.register_fake
def _ddpm_loss_fake(
    pred: Tensor,
    x_0: Tensor,
    t: Tensor,
    alpha_bar: Tensor,
    key: Tensor,
    sample_id: Tensor,
    step: Tensor,
    objective: str,
    snr_gamma: float | None,
    with_residual: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    loss = pred.new_empty(pred.shape[0], dtype=torch.float32)
    residual = torch.empty_like(pred) if with_residual else pred.new_empty(0)
    return loss, torch.empty_like(loss), residual


@torch.library.custom_op("concilium::ddpm_loss_backward", mutates_args=())
def _ddpm_loss_backward(residual: Tensor, factor: Tensor) -> Tensor:
    out = torch.empty_like(residual)
    return torch.mul(residual, per_sample(factor, residual), out=out)


@_ddpm_loss_backward.register_fake
def _ddpm_loss_backward_fake(residual: Tensor, factor: Tensor) -> Tensor:
    return torch.empty_like(residual)


def _setup(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    _, scale, residual = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(scale)
    ctx.save_for_backward(scale, residual)
    ctx.with_residual = inputs[-1]


def _backward(ctx, grad_loss, _grad_scale, _grad_residual):  # type: ignore[no-untyped-def]
    nothing = (None,) * 9
    if grad_loss is None:
        return None, *nothing
    if not ctx.with_residual:
        raise RuntimeError(
            "ddpm_loss: the residual was not kept; call it with grad enabled to differentiate it"
        )
    scale, residual = ctx.saved_tensors
    return _ddpm_loss_backward(residual, grad_loss * scale), *nothing


def _no_double_backward(ctx, grad):  # type: ignore[no-untyped-def]
    raise RuntimeError(
        "ddpm_loss: double backward is not supported, because the gradient is made in the forward "
        "pass; for second derivatives write the loss with torch operations"
    )


_ddpm_loss.register_autograd(_backward, setup_context=_setup)
_ddpm_loss_backward.register_autograd(_no_double_backward)


def ddpm_loss(
    pred: Tensor,
    x_0: Tensor,
    t: Tensor,
    alpha_bar: Tensor,
    *,
    key: Tensor,
    sample_id: Tensor,
    step: Tensor,
    objective: str = "eps",
    snr_gamma: float | None = None,
) -> Tensor:
    """L_b = w(t_b) mean_i (pred_i - target_i)^2, float32 ``(B,)``; take its mean over the batch
    yourself.

    ``pred``: ``(B, C, H, W)`` (or any ``(B, ...)``) float32, bfloat16 or float16, in any layout.
    ``x_0``: the same shape, uint8 or float in [-1, 1]. ``t``: int64 ``(B,)``. ``alpha_bar``:
    float32 ``(T,)``. ``key``, ``sample_id``, ``step``: those given to :func:`kernels.q_sample`,
    which regenerate its eps. ``objective``: what ``pred`` predicts, 'eps', 'x0' or 'v'.
    ``snr_gamma``: min-SNR-gamma weights (5 in the paper), None for w = 1.

    Computed in float32; the gradient with respect to ``pred``, in the dtype of ``pred``, is the
    only one there is. Deterministic, and independent of the batch a sample is in. Of samples
    without elements it is NaN, the mean of nothing.

    Raises ``TypeError`` for a wrong dtype, ``ValueError`` for a wrong shape, device or option and,
    on the CPU, for a timestep outside the table (NaN on CUDA); ``RuntimeError`` for a derivative
    that it does not have (double backward; forward mode; by ``alpha_bar``). arXiv 2006.11239,
    2202.00512, 2303.09556.
    """
    check_dtype("ddpm_loss", "pred", pred, FLOATS)
    check_batched("ddpm_loss", "pred", pred.shape)
    check_dtype("ddpm_loss", "x_0", x_0, IMAGES)
    check_same_shape("ddpm_loss", "x_0", x_0, "pred", pred)
    check_schedule("ddpm_loss", t, alpha_bar, pred.shape[0], pred.device)
    check_stream("ddpm_loss", key, sample_id, step, pred.shape[0], pred.device)
    check_device("ddpm_loss", pred.device, x_0=x_0)
    check_no_tangent("ddpm_loss", pred=pred, x_0=x_0, alpha_bar=alpha_bar)
    check_objective("ddpm_loss", objective)
    if snr_gamma is not None and not 0.0 < snr_gamma < math.inf:
        raise ValueError(
            f"ddpm_loss: snr_gamma must be positive and finite, or None for w = 1, got {snr_gamma}"
        )
    if x_0.requires_grad and torch.is_grad_enabled():
        raise ValueError("ddpm_loss: differentiable in pred only; pass x_0.detach()")
    keep = pred.requires_grad and torch.is_grad_enabled()
    loss: Tensor
    loss, _, _ = _ddpm_loss(
        pred, x_0, t, alpha_bar, key, sample_id, step, objective, snr_gamma, keep
    )
    return loss
