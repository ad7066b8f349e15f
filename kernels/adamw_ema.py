"""AdamW with the terms of federated training and the moving average, in one pass over flat buffers.

    g  <- grad + mu (param - anchor) + control
    m  <- beta_1 m + (1 - beta_1) g                       v <- beta_2 v + (1 - beta_2) g^2
    param <- (1 - lr weight_decay) param - lr / (1 - beta_1^step) m
                                           / (sqrt(v) / sqrt(1 - beta_2^step) + eps)
    ema <- ema_decay ema + (1 - ema_decay) param

Sources: Loshchilov & Hutter (arXiv 1711.05101, algorithm 2) for the decoupled decay; Li et al.
(arXiv 1812.06127, equation 2) for the proximal term of FedProx, with ``anchor`` the global model;
Karimireddy et al. (arXiv 1910.06378, algorithm 1) for SCAFFOLD, whose ``control`` is c - c_i.

What changes from step to step (``lr``, ``step``, ``ema_decay``) lives in tensors, so that a
captured CUDA graph stays right.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.optim.adamw import adamw

from kernels._arguments import (
    FLOATS,
    check_device,
    check_dtype,
    check_same_shape,
    check_scalar,
    on_device_of,
)

_BLOCK = 1024
_ALIGNED = 16  # Triton proves that accesses are wide only where this divides the length
_CHUNK = 1 << 16  # elements at a time on the CPU, so that the temporaries stay in cache

# --- Triton ---------------------------------------------------------------------------------------


@triton.jit
def _bias_correction(rate, step):  # type: ignore[no-untyped-def]
    """1 - (1 - rate)^step in float64, by squaring: float32 would lose it in the first steps."""
    base = 1.0 - (tl.full((), 0.0, tl.float64) + rate)
    power = base * 0.0 + 1.0
    for bit in range(40):
        power = tl.where(((step >> bit) & 1) != 0, power * base, power)
        base = base * base
    return (1.0 - power).to(tl.float32)


@triton.jit
def _adamw_ema_kernel(  # type: ignore[no-untyped-def]
    param,
    grad,
    exp_avg,
    exp_avg_sq,
    ema,
    anchor,
    control,
    lr,
    step,
    ema_decay,
    rate_1,
    rate_2,
    eps,
    weight_decay,
    mu,
    elements,
    HAS_EMA: tl.constexpr,
    HAS_ANCHOR: tl.constexpr,
    HAS_CONTROL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = index < elements
    p = tl.load(param + index, mask=inside, other=0.0)
    g = tl.load(grad + index, mask=inside, other=0.0).to(tl.float32)
    m = tl.load(exp_avg + index, mask=inside, other=0.0)
    v = tl.load(exp_avg_sq + index, mask=inside, other=0.0)
    if HAS_ANCHOR:
        g += mu * (p - tl.load(anchor + index, mask=inside, other=0.0))
    if HAS_CONTROL:
        g += tl.load(control + index, mask=inside, other=0.0)
    m += rate_1 * (g - m)
    v += rate_2 * (g * g - v)
    now = tl.load(step)
    rate = tl.load(lr, mask=now > 0, other=float("nan"))  # there is no step before the first
    step_size = tl.div_rn(rate, _bias_correction(rate_1, now))
    root = tl.sqrt_rn(_bias_correction(rate_2, now))
    p = p * (1.0 - rate * weight_decay)
    p = p - step_size * tl.div_rn(m, tl.div_rn(tl.sqrt_rn(v), root) + eps)
    tl.store(param + index, p, mask=inside)
    tl.store(exp_avg + index, m, mask=inside)
    tl.store(exp_avg_sq + index, v, mask=inside)
    if HAS_EMA:
        e = tl.load(ema + index, mask=inside, other=0.0)
        tl.store(ema + index, e + (1.0 - tl.load(ema_decay)) * (p - e), mask=inside)


def _launch_adamw_ema(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    ema: Tensor | None,
    anchor: Tensor | None,
    control: Tensor | None,
    lr: Tensor,
    step: Tensor,
    ema_decay: Tensor | None,
    beta_1: float,
    beta_2: float,
    eps: float,
    weight_decay: float,
    mu: float,
) -> None:
    read = [None if x is None else x.contiguous() for x in (grad, anchor, control)]
    buffers = [param, read[0], exp_avg, exp_avg_sq, ema, *read[1:]]
    numbers = (lr, step, ema_decay, 1.0 - beta_1, 1.0 - beta_2, eps, weight_decay, mu)
    whole = param.numel() - param.numel() % _ALIGNED
    for part in (slice(0, whole), slice(whole, param.numel())):
        elements = part.stop - part.start
        if elements == 0:
            continue
        with on_device_of(param):
            _adamw_ema_kernel[(triton.cdiv(elements, _BLOCK),)](
                *(None if x is None else x[part] for x in buffers), *numbers, elements,
                HAS_EMA=ema is not None, HAS_ANCHOR=anchor is not None,
                HAS_CONTROL=control is not None, BLOCK=_BLOCK, enable_fp_fusion=True,
            )  # fmt: skip


# --- torch ----------------------------------------------------------------------------------------


def adamw_ema_reference(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    ema: Tensor | None,
    anchor: Tensor | None,
    control: Tensor | None,
    lr: Tensor,
    step: Tensor,
    ema_decay: Tensor | None,
    beta_1: float,
    beta_2: float,
    eps: float,
    weight_decay: float,
    mu: float,
) -> None:
    if not step.item() >= 1:
        raise ValueError(f"adamw_ema_: step is {step.item()}; the first step is 1")
    rate, before = lr.item(), torch.tensor(step.item() - 1.0)
    for start in range(0, param.numel(), _CHUNK):
        part = slice(start, start + _CHUNK)
        p, m, v = param[part], exp_avg[part], exp_avg_sq[part]
        g = grad[part].to(torch.float32).contiguous()
        if anchor is not None:
            g = g.add(p - anchor[part], alpha=mu)
        if control is not None:
            g = g + control[part]
        adamw(
            [p], [g], [m], [v], [], [before.clone()], fused=True, amsgrad=False, maximize=False,
            lr=rate, beta1=beta_1, beta2=beta_2, eps=eps, weight_decay=weight_decay,
        )  # fmt: skip
        if ema is not None and ema_decay is not None:
            ema[part].lerp_(p, 1.0 - ema_decay.item())


# --- the op ---------------------------------------------------------------------------------------


@torch.library.custom_op(
    "concilium::adamw_ema_",
    mutates_args=("param", "exp_avg", "exp_avg_sq", "ema"),
    device_types="cpu",
)
def _adamw_ema(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    ema: Tensor | None,
    anchor: Tensor | None,
    control: Tensor | None,
    lr: Tensor,
    step: Tensor,
    ema_decay: Tensor | None,
    beta_1: float,
    beta_2: float,
    eps: float,
    weight_decay: float,
    mu: float,
) -> None:
    adamw_ema_reference(
        param, grad, exp_avg, exp_avg_sq, ema, anchor, control, lr, step, ema_decay,
        beta_1, beta_2, eps, weight_decay, mu,
    )  # fmt: skip


_adamw_ema.register_kernel("cuda")(_launch_adamw_ema)


@_adamw_ema.register_fake
def _adamw_ema_fake(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    ema: Tensor | None,
    anchor: Tensor | None,
    control: Tensor | None,
    lr: Tensor,
    step: Tensor,
    ema_decay: Tensor | None,
    beta_1: float,
    beta_2: float,
    eps: float,
    weight_decay: float,
    mu: float,
) -> None:
    return None


def _check_buffer(name: str, value: Tensor, param: Tensor) -> None:
    check_dtype("adamw_ema_", name, value, (torch.float32,))
    check_same_shape("adamw_ema_", name, value, "param", param)
    check_device("adamw_ema_", param.device, **{name: value})


def _check_updated(updated: dict[str, Tensor], read: dict[str, Tensor]) -> None:
    """What is updated is contiguous and no other buffer; views of one memory are not looked for."""
    for name, value in updated.items():
        if not value.is_contiguous():
            raise ValueError(f"adamw_ema_: {name} is updated in place and must be contiguous")
        for other_name, other in (updated | read).items():
            if other is value and other_name != name:
                raise ValueError(
                    f"adamw_ema_: {other_name} and {name} are the same tensor, which is updated; "
                    f"pass {other_name}.clone(), kept from step to step"
                )


def _check_options(betas: tuple[float, float], eps: float, weight_decay: float, mu: float) -> None:
    if not (0.0 <= betas[0] < 1.0 and 0.0 <= betas[1] < 1.0 and eps >= 0.0):
        raise ValueError(
            f"adamw_ema_: betas must be in [0, 1) and eps not negative, got {betas}, {eps}"
        )
    for name, value in {"weight_decay": weight_decay, "mu": mu}.items():
        if not 0.0 <= value < math.inf:
            raise ValueError(f"adamw_ema_: {name} must be finite and not negative, got {value}")


def adamw_ema_(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    lr: Tensor,
    step: Tensor,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    ema: Tensor | None = None,
    ema_decay: Tensor | None = None,
    anchor: Tensor | None = None,
    mu: float = 0.0,
    control: Tensor | None = None,
) -> None:
    """One step of AdamW on flat buffers, in place, with an optional average and correction terms.

    ``param``, ``exp_avg``, ``exp_avg_sq`` and, if given, ``ema``: float32 ``(P,)``, contiguous,
    updated. ``grad``: ``(P,)`` float32, bfloat16 or float16. ``lr``, ``ema_decay``: float32, one
    element. ``step``: int64, one element, the number of this step, 1 first. ``anchor``: float32
    ``(P,)``, the model that the proximal term mu/2 |param - anchor|^2 pulls to. ``control``:
    float32 ``(P,)``, added to the gradient (SCAFFOLD: c - c_i). What is only read may be strided.

    Raises ``TypeError`` for a wrong dtype, ``ValueError`` for a wrong shape, device or option, for
    one tensor in two places and, on the CPU, for a step before the first (on CUDA, where looking
    would stall the queue, the parameters become NaN). arXiv 1711.05101, 1812.06127, 1910.06378.
    """
    op = "adamw_ema_"
    check_dtype(op, "param", param, (torch.float32,))
    check_dtype(op, "grad", grad, FLOATS)
    if param.dim() != 1:
        raise ValueError(f"{op}: param must be one flat buffer, got shape {tuple(param.shape)}")
    check_same_shape(op, "grad", grad, "param", param)
    check_scalar(op, "lr", lr, torch.float32)
    check_scalar(op, "step", step)
    check_device(op, param.device, grad=grad, lr=lr, step=step)
    updated = {"param": param, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}
    updated |= {} if ema is None else {"ema": ema}
    terms = {k: v for k, v in (("anchor", anchor), ("control", control)) if v is not None}
    for name, value in (updated | terms).items():
        _check_buffer(name, value, param)
    _check_updated(updated, {"grad": grad} | terms)
    if (ema is None) != (ema_decay is None):
        raise ValueError(f"{op}: ema and ema_decay belong together, one of them is missing")
    if ema_decay is not None:
        check_scalar(op, "ema_decay", ema_decay, torch.float32)
        check_device(op, param.device, ema_decay=ema_decay)
    if (anchor is None) != (mu == 0.0):
        raise ValueError(f"{op}: anchor and mu belong together, got mu = {mu}")
    _check_options(betas, eps, weight_decay, mu)
    _adamw_ema(
        param.detach(), grad.detach(), exp_avg, exp_avg_sq, ema, anchor, control, lr, step,
        ema_decay, *betas, eps, weight_decay, mu,
    )  # fmt: skip
