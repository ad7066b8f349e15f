"""Checks at the door: what an op refuses, with what was wrong and how to mend it.

A wrong dtype is a ``TypeError``, a wrong shape, device or value a ``ValueError``, a derivative that
an op does not have a ``RuntimeError``. None of the checks reads device memory, so none of them
waits for a GPU, and all of them trace under ``torch.compile``.
"""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor
from torch.autograd import forward_ad

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
IMAGES = (torch.uint8, *FLOATS)
OBJECTIVES = ("eps", "x0", "v")
MAX_ELEMENTS = 1 << 34  # per sample: element // 4 is one 32-bit word of the Philox counter


def check_dtype(op: str, name: str, value: Tensor, allowed: tuple[torch.dtype, ...]) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(
            f"{op}: {name} must be a tensor (so that CUDA graphs can change it), got "
            f"{type(value).__name__}; pass torch.tensor(..., dtype={allowed[0]})"
        )
    if value.dtype not in allowed:
        names = ", ".join(str(dtype) for dtype in allowed)
        raise TypeError(
            f"{op}: {name} must be {names}, got {value.dtype}; convert it with .to({allowed[0]})"
        )


def check_device(op: str, device: torch.device, **tensors: Tensor) -> None:
    for name, value in tensors.items():
        if value.device != device:
            raise ValueError(
                f"{op}: {name} is on {value.device}, the data on {device}; "
                f"move it with .to('{device}')"
            )


def check_no_tangent(op: str, **tensors: Tensor) -> None:
    """A custom op without a forward-mode rule drops tangents: the derivative would be zero."""
    for name, value in tensors.items():
        if forward_ad.unpack_dual(value).tangent is not None:
            raise RuntimeError(
                f"{op}: {name} has a tangent, and no forward-mode derivative (jvp, jacfwd) exists; "
                "use backward, or write it with torch operations"
            )


def check_float_dtype(op: str, dtype: torch.dtype) -> None:
    if dtype not in FLOATS:
        names = ", ".join(str(allowed) for allowed in FLOATS)
        raise TypeError(f"{op}: dtype must be one of {names}, got {dtype}")


def check_per_sample(op: str, name: str, value: Tensor, batch: int) -> None:
    check_dtype(op, name, value, (torch.int64,))
    if value.dim() != 1 or value.shape[0] != batch:
        raise ValueError(
            f"{op}: {name} must hold one number per sample, shape ({batch},), "
            f"got {tuple(value.shape)}"
        )


def check_scalar(op: str, name: str, value: Tensor, dtype: torch.dtype = torch.int64) -> None:
    check_dtype(op, name, value, (dtype,))
    if value.numel() != 1:
        raise ValueError(
            f"{op}: {name} must hold a single number, got shape {tuple(value.shape)}; "
            f"one launch uses one {name}"
        )


def check_batched(op: str, name: str, shape: torch.Size | list[int]) -> None:
    if len(shape) < 1:
        raise ValueError(f"{op}: {name} must have a batch dimension first, got a 0-dim shape")
    elements = 1
    for size in shape[1:]:
        elements *= size
    if elements > MAX_ELEMENTS:
        raise ValueError(
            f"{op}: {name} has {elements} elements a sample, the noise counter ends at "
            f"{MAX_ELEMENTS}; split the sample and give the parts their own ids"
        )


def check_stream(
    op: str, key: Tensor, sample_id: Tensor, step: Tensor, batch: int, device: torch.device
) -> None:
    check_scalar(op, "key", key)
    check_scalar(op, "step", step)
    check_per_sample(op, "sample_id", sample_id, batch)
    check_device(op, device, key=key, sample_id=sample_id, step=step)


def check_schedule(op: str, t: Tensor, alpha_bar: Tensor, batch: int, device: torch.device) -> None:
    check_per_sample(op, "t", t, batch)
    check_dtype(op, "alpha_bar", alpha_bar, (torch.float32,))
    if alpha_bar.dim() != 1 or alpha_bar.numel() == 0:
        raise ValueError(
            f"{op}: alpha_bar must be the table of a schedule, shape (T,), "
            f"got {tuple(alpha_bar.shape)}"
        )
    check_device(op, device, t=t, alpha_bar=alpha_bar)
    if alpha_bar.requires_grad and torch.is_grad_enabled():
        raise RuntimeError(
            f"{op}: alpha_bar requires a gradient, which this op does not compute: pass "
            "alpha_bar.detach(), or write it with torch operations"
        )


def check_same_shape(op: str, name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    if value.shape != other.shape:
        raise ValueError(
            f"{op}: {name} has shape {tuple(value.shape)}, {other_name} {tuple(other.shape)}; "
            "they must be the same"
        )


def check_objective(op: str, objective: str) -> None:
    if objective not in OBJECTIVES:
        raise ValueError(f"{op}: objective must be one of {OBJECTIVES}, got {objective!r}")


def check_timestep_range(op: str, t: Tensor, n_steps: int) -> None:
    """On the CPU only, where looking costs nothing; the CUDA kernels answer with NaN instead."""
    if t.numel() and not (int(t.min()) >= 0 and int(t.max()) < n_steps):
        raise ValueError(
            f"{op}: t runs from {int(t.min())} to {int(t.max())}, "
            f"alpha_bar has the timesteps 0 to {n_steps - 1}"
        )


def is_channels_last(x: Tensor) -> bool:
    """Channels innermost in memory; a tensor that is also contiguous counts as contiguous."""
    if x.is_contiguous():
        return False
    return (x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)) or (
        x.dim() == 5 and x.is_contiguous(memory_format=torch.channels_last_3d)
    )


def is_dense(x: Tensor) -> bool:
    """One of the two layouts that the Triton kernels address directly."""
    return x.is_contiguous() or is_channels_last(x)


def contiguous_like(out: Tensor) -> Tensor:
    """``out`` itself where it is contiguous, else room of the same shape to compute it in."""
    if out.is_contiguous():
        return out
    return torch.empty(out.shape, dtype=out.dtype, device=out.device)


def as_layout_of(x: Tensor, like: Tensor) -> Tensor:
    """``x`` itself where its memory layout is that of the dense tensor ``like``, else a copy."""
    if not is_channels_last(like):
        return x.contiguous()
    if is_channels_last(x):
        return x
    out = torch.empty_like(like, dtype=x.dtype)
    return out.copy_(x)


def on_device_of(x: Tensor) -> contextlib.AbstractContextManager[object]:
    """Triton launches on the current device: make it the one that holds the data."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()
