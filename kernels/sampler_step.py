"""One step of sampling, from x_t to x_s with s < t: ancestral DDPM, or DDIM with any eta.

    x0_hat  = (x_t - sqrt(1 - a) pred) / sqrt(a)  |  pred  |  sqrt(a) x_t - sqrt(1 - a) pred
    eps_hat = pred  |  (x_t - sqrt(a) pred) / sqrt(1 - a)  |  sqrt(1 - a) x_t + sqrt(a) pred
              for the objectives 'eps' | 'x0' | 'v'; x0_hat is then clipped to [-clip, clip]
    var     = (1 - b) / (1 - a) beta          a = alpha_bar[t], b = alpha_bar[s], beta = 1 - a / b

    DDPM:  x_s = sqrt(b) beta / (1 - a) x0_hat + sqrt(a / b) (1 - b) / (1 - a) x_t + sqrt(var) z
    DDIM:  x_s = sqrt(b) x0_hat + sqrt(1 - b - eta^2 var) eps_hat + eta sqrt(var) z

``s = -1`` is the clean end, b = 1. beta is computed as (b - a) / b, whose difference is exact.
Where b is 1, (1 - b) / (1 - a) is 0 and beta / (1 - a) is 1, also for a = 1 (x_t without noise):
x_s is then x0_hat.

Sources: Ho et al. (arXiv 2006.11239, equations 6, 7 and algorithm 2); Song, Meng, Ermon (arXiv
2010.02502, equations 12 and 16); Salimans & Ho (arXiv 2202.00512) for v. z is the noise of
:mod:`kernels.noise`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels._arguments import (
    FLOATS,
    check_batched,
    check_device,
    check_dtype,
    check_no_tangent,
    check_objective,
    check_per_sample,
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
from kernels.q_sample import per_sample, sqrt_rn

# --- Triton ---------------------------------------------------------------------------------------


@triton.jit
def _schedule_at(alpha_bar, t, s, n_steps):  # type: ignore[no-untyped-def]
    """(alpha_bar[t], alpha_bar[s]), the latter 1 for s = -1; NaN where t or s is outside the table
    or s is not before t.
    """
    nan = float("nan")
    a = tl.load(alpha_bar + t, mask=(t >= 0) & (t < n_steps), other=nan)
    b = tl.load(alpha_bar + s, mask=(s >= 0) & (s < t) & (s < n_steps), other=nan)
    return a, tl.where((s == -1) & (t >= 0), 1.0, b)


@triton.jit
def _estimates(x_t, pred, a, OBJECTIVE: tl.constexpr):  # type: ignore[no-untyped-def]
    """(x0_hat, eps_hat)"""
    signal = tl.sqrt_rn(a)
    noise = tl.sqrt_rn(1.0 - a)
    # eps_hat of an image without noise counts for nothing, so it may be anything finite.
    if OBJECTIVE == "eps":
        return (x_t - noise * pred) * tl.div_rn(1.0, signal), pred
    elif OBJECTIVE == "x0":
        scale = tl.where(noise == 0.0, 0.0, tl.div_rn(1.0, noise))
        return pred, (x_t - signal * pred) * scale
    else:
        return signal * x_t - noise * pred, noise * x_t + signal * pred


@triton.jit
def _sampler_step_kernel(  # type: ignore[no-untyped-def]
    x_t,
    pred,
    x_s,
    t,
    s,
    alpha_bar,
    key,
    sample_id,
    step,
    eta,
    clip,
    elements,
    n_steps,
    n_blocks,
    DDIM: tl.constexpr,
    NOISY: tl.constexpr,
    CLIPPED: tl.constexpr,
    OBJECTIVE: tl.constexpr,
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
    a, b = _schedule_at(alpha_bar, tl.load(t + n), tl.load(s + n), n_steps)
    beta = tl.div_rn(b - a, b)
    rest = tl.where(b == 1.0, 0.0, tl.div_rn(1.0 - b, 1.0 - a))
    x = tl.load(x_t + offset, mask=inside, other=0.0).to(tl.float32)
    y = tl.load(pred + offset, mask=inside, other=0.0).to(tl.float32)
    x_0, eps = _estimates(x, y, a, OBJECTIVE)
    if CLIPPED:
        x_0 = tl.minimum(tl.maximum(x_0, -clip, tl.PropagateNan.ALL), clip, tl.PropagateNan.ALL)
    sigma = tl.sqrt_rn(rest * beta)
    if DDIM:
        sigma = eta * sigma
        left = tl.maximum(1.0 - b - sigma * sigma, 0.0, tl.PropagateNan.ALL)
        value = tl.sqrt_rn(b) * x_0 + tl.sqrt_rn(left) * eps
    else:
        share = tl.where(b == 1.0, 1.0, tl.div_rn(beta, 1.0 - a))
        value = tl.sqrt_rn(b) * share * x_0
        value = value + tl.sqrt_rn(tl.div_rn(a, b)) * rest * x
    if NOISY:
        z = normal_block(tl.load(key), tl.load(sample_id + n), tl.load(step), block, BLOCK)
        value = value + sigma * z
    tl.store(x_s + offset, value.to(x_s.dtype.element_ty), mask=inside)


def _launch_sampler_step(
    x_t: Tensor,
    pred: Tensor,
    t: Tensor,
    s: Tensor,
    alpha_bar: Tensor,
    stream: tuple[Tensor, Tensor, Tensor],
    objective: str,
    eta: float | None,
    clip: float | None,
    out: Tensor,
) -> None:
    """Write x_s into ``out``; ``eta`` None is DDPM."""
    if out.numel() == 0:
        return
    made = contiguous_like(out)
    key, sample_id, step = stream
    elements = out[0].numel()
    block = block_size(elements)
    n_blocks = triton.cdiv(elements, block)
    with on_device_of(out):
        _sampler_step_kernel[(out.shape[0] * n_blocks,)](
            x_t.contiguous(),
            pred.contiguous(),
            made,
            t.contiguous(),
            s.contiguous(),
            alpha_bar.contiguous(),
            key,
            sample_id.contiguous(),
            step,
            0.0 if eta is None else eta,
            0.0 if clip is None else clip,
            elements,
            alpha_bar.shape[0],
            n_blocks,
            DDIM=eta is not None,
            NOISY=eta is None or eta > 0.0,
            CLIPPED=clip is not None,
            OBJECTIVE=objective,
            BLOCK=block,
            WIDE=needs_wide_index(elements),
            num_warps=warps_for(block),
            enable_fp_fusion=False,
        )
    if made is not out:
        out.copy_(made)


# --- torch ----------------------------------------------------------------------------------------


def _estimates_reference(
    x: Tensor, pred: Tensor, a: Tensor, objective: str
) -> tuple[Tensor, Tensor]:
    signal, noise = sqrt_rn(a), sqrt_rn(1.0 - a)
    if objective == "eps":
        return (x - noise * pred).mul_(1.0 / signal), pred
    if objective == "x0":
        return pred, (x - signal * pred).mul_(torch.where(noise == 0.0, 0.0, 1.0 / noise))
    return (signal * x).sub_(noise * pred), (noise * x).add_(signal * pred)


def _check_steps(t: Tensor, s: Tensor, n_steps: int) -> None:
    check_timestep_range("sampler_step", t, n_steps)
    wrong = ((s < -1) | (s >= t)).nonzero().flatten().tolist()
    if wrong:
        n = wrong[0]
        raise ValueError(
            f"sampler_step: s is {int(s[n])} where t is {int(t[n])} (sample {n}); "
            "s must be before t, or -1 for the clean image"
        )


def sampler_step_reference(
    x_t: Tensor,
    pred: Tensor,
    t: Tensor,
    s: Tensor,
    alpha_bar: Tensor,
    stream: tuple[Tensor, Tensor, Tensor],
    objective: str,
    eta: float | None,
    clip: float | None,
) -> Tensor:
    _check_steps(t, s, alpha_bar.shape[0])
    x, y = x_t.to(torch.float32), pred.to(torch.float32)
    a = per_sample(alpha_bar[t], x)
    b = per_sample(torch.where(s < 0, 1.0, alpha_bar[s.clamp(min=0)]), x)
    beta, rest = (b - a) / b, torch.where(b == 1.0, 0.0, (1.0 - b) / (1.0 - a))
    x_0, eps = _estimates_reference(x, y, a, objective)
    if clip is not None:
        x_0 = x_0.clamp(-clip, clip)
    sigma = sqrt_rn(rest * beta)
    if eta is not None:
        sigma = eta * sigma
        value = sqrt_rn(b) * x_0 + sqrt_rn((1.0 - b - sigma * sigma).clamp(min=0.0)) * eps
    else:
        share = torch.where(b == 1.0, 1.0, beta / (1.0 - a))
        value = sqrt_rn(b) * share * x_0 + sqrt_rn(a / b) * rest * x
    if eta is None or eta > 0.0:
        value += normal_reference(x.shape, *stream, torch.float32).mul_(sigma)
    return torch.empty_like(x_t).copy_(value)


# --- the op ---------------------------------------------------------------------------------------


@torch.library.custom_op("concilium::sampler_step", mutates_args=(), device_types="cpu")
def _sampler_step(
    x_t: Tensor,
    pred: Tensor,
    t: Tensor,
    s: Tensor,
    alpha_bar: Tensor,
    key: Tensor,
    sample_id: Tensor,
    step: Tensor,
    objective: str,
    eta: float | None,
    clip: float | None,
) -> Tensor:
    stream = (key, sample_id, step)
    return sampler_step_reference(x_t, pred, t, s, alpha_bar, stream, objective, eta, clip)


@_sampler_step.register_kernel("cuda")
def _sampler_step_cuda(
    x_t: Tensor,
    pred: Tensor,
    t: Tensor,
    s: Tensor,
    alpha_bar: Tensor,
    key: Tensor,
    sample_id: Tensor,
    step: Tensor,
    objective: str,
    eta: float | None,
    clip: float | None,
) -> Tensor:
    out = torch.empty_like(x_t)
    stream = (key, sample_id, step)
    _launch_sampler_step(x_t, pred, t, s, alpha_bar, stream, objective, eta, clip, out)
    return out


@_sampler_step.register_fake
def _sampler_step_fake(
    x_t: Tensor,
    pred: Tensor,
    t: Tensor,
    s: Tensor,
    alpha_bar: Tensor,
    key: Tensor,
    sample_id: Tensor,
    step: Tensor,
    objective: str,
    eta: float | None,
    clip: float | None,
) -> Tensor:
    return torch.empty_like(x_t)


def _no_backward(ctx, grad):  # type: ignore[no-untyped-def]
    raise RuntimeError("sampler_step is not differentiable; sample under torch.no_grad()")


_sampler_step.register_autograd(_no_backward)


def sampler_step(
    x_t: Tensor,
    pred: Tensor,
    t: Tensor,
    s: Tensor,
    alpha_bar: Tensor,
    *,
    key: Tensor,
    sample_id: Tensor,
    step: Tensor,
    objective: str = "eps",
    eta: float | None = None,
    clip: float | None = 1.0,
) -> Tensor:
    """x_s from x_t and the model's prediction: ancestral DDPM, or DDIM where ``eta`` is given.

    ``x_t``, ``pred``: ``(B, C, H, W)`` (or any ``(B, ...)``) float32, bfloat16 or float16, in any
    layout; the result has the dtype and layout of ``x_t`` and is computed in float32. ``t``, ``s``:
    int64 ``(B,)``, where x_t is and where x_s will be, s < t, s = -1 for the clean image.
    ``alpha_bar``: float32 ``(T,)``. ``key``, ``sample_id``, ``step``: the stream of z, as for
    :func:`kernels.normal`; ``step`` must differ from one step of a trajectory to the next.
    ``objective``: what ``pred`` predicts, 'eps', 'x0' or 'v'. ``eta``: 0 is deterministic, 1 as
    noisy as DDPM. ``clip``: bound on the estimate of x_0, None for none.

    Not differentiable. Raises ``TypeError`` for a wrong dtype, ``ValueError`` for a wrong shape,
    device or option and, on the CPU, for a timestep outside the table or s >= t (on CUDA, where
    looking would stall the queue, that sample becomes NaN).
    arXiv 2006.11239, algorithm 2; arXiv 2010.02502, equation 12.
    """
    check_dtype("sampler_step", "x_t", x_t, FLOATS)
    check_batched("sampler_step", "x_t", x_t.shape)
    check_dtype("sampler_step", "pred", pred, FLOATS)
    check_same_shape("sampler_step", "pred", pred, "x_t", x_t)
    check_schedule("sampler_step", t, alpha_bar, x_t.shape[0], x_t.device)
    check_per_sample("sampler_step", "s", s, x_t.shape[0])
    check_stream("sampler_step", key, sample_id, step, x_t.shape[0], x_t.device)
    check_device("sampler_step", x_t.device, pred=pred, s=s)
    check_no_tangent("sampler_step", x_t=x_t, pred=pred, alpha_bar=alpha_bar)
    check_objective("sampler_step", objective)
    if eta is not None and not 0.0 <= eta <= 1.0:
        raise ValueError(f"sampler_step: eta must be 0 to 1, or None for DDPM, got {eta}")
    if clip is not None and not clip > 0.0:
        raise ValueError(f"sampler_step: clip must be positive or None, got {clip}")
    out: Tensor = _sampler_step(
        x_t, pred, t, s, alpha_bar, key, sample_id, step, objective, eta, clip
    )
    return out
