"""What `benchmarks.kernels` measures: every fused operation at the sizes of a training step, beside
what torch does without it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

import kernels

Job = Callable[[], Any]
BATCHES = {"cpu": (64,), "cuda": (128, 32_768)}  # a training step's, and one that no cache holds
PARAMETERS = {"cpu": 1_100_000, "cuda": 35_746_307}  # the networks of `benchmarks.contenders`
ARITHMETIC = "arithmetic"  # in place of a share of the copy bandwidth
NOISE = "noise alone"


@dataclass(frozen=True)
class Case:
    """One operation by several means. `moved`: bytes it cannot avoid reading and writing, None
    where they stay in a cache; `keystream`: bytes it makes instead, of which none are moved.
    `noise`: as much noise as the operation makes and nothing else, which bounds it by arithmetic.
    `aim`: that of `AIMS` which this case is held to.
    """

    name: str
    moved: int | None
    ours: Job
    eager: Job | None = None
    aim: str | None = None
    noise: Job | None = None
    keystream: int | None = None

    def rates(self, by: str, seconds: float, copy: float) -> dict[str, Any]:
        """GB/s, and its share of `copy` where memory is what bounds."""
        if self.keystream is not None:
            return {"gb_s": round(self.keystream / seconds / 1e9, 2), "of_copy": ARITHMETIC}
        if by == NOISE:
            return {"gb_s": ARITHMETIC, "of_copy": ARITHMETIC}
        if self.moved is None:
            return {"gb_s": "in cache", "of_copy": "in cache"}
        rate = self.moved / seconds
        return {"gb_s": round(rate / 1e9, 2), "of_copy": round(rate / copy, 3)}


def _images(device: str, batch: int) -> tuple[Tensor, Tensor, Tensor, dict[str, Any]]:
    alpha_bar = torch.cumprod(1.0 - torch.linspace(1e-4, 0.02, 1000), 0).to(device)
    x_0 = torch.randint(0, 256, (batch, 3, 32, 32), dtype=torch.uint8, device=device)
    key = torch.tensor(kernels.derive_key(0, "benchmark"), device=device)
    stream: dict[str, Any] = {"key": key, "sample_id": torch.arange(batch, device=device)}
    stream["step"] = torch.tensor(1, device=device)
    return x_0, torch.randint(0, 1000, (batch,), device=device), alpha_bar, stream


def elementwise(device: str) -> Iterator[Case]:
    for batch in BATCHES[device]:
        yield from _elementwise(device, batch)


def _elementwise(device: str, batch: int) -> Iterator[Case]:
    x_0, t, alpha_bar, stream = _images(device, batch)
    n, large = x_0.numel(), batch == BATCHES[device][-1]
    half = torch.float32 if device == "cpu" else torch.bfloat16  # what a network predicts in
    size = half.itemsize

    def case(
        name: str, moved: int, ours: Job, eager: Job, aim: str | None = None,
        noise: Job | None = None,
    ) -> Case:  # fmt: skip
        return Case(f"{name}, batch {batch}", moved if large else None, ours, eager,
                    aim if large else None, noise)  # fmt: skip

    def noise() -> Tensor:
        return kernels.normal(x_0.shape, **stream, dtype=half)

    def eager_q_sample() -> Tensor:
        a, x = alpha_bar[t].view(-1, 1, 1, 1), x_0.float() * (2 / 255) - 1
        return a.sqrt() * x + (1 - a).sqrt() * torch.randn_like(x)

    yield case(
        "q_sample", 5 * n, lambda: kernels.q_sample(x_0, t, alpha_bar, **stream),
        eager_q_sample, "q_sample", noise,
    )  # fmt: skip
    pred = torch.randn(x_0.shape, device=device, dtype=half).requires_grad_()
    eps = torch.randn(x_0.shape, device=device)

    def grad(loss: Tensor) -> Tensor:
        return torch.autograd.grad(loss.mean(), pred)[0]

    def eager_loss() -> Tensor:
        return (pred.float() - eps).square().flatten(1).mean(1)

    yield case(
        "ddpm_loss (its one pass: loss and residual)", 2 * size * n,
        lambda: kernels.ddpm_loss(pred, x_0, t, alpha_bar, **stream), eager_loss, "ddpm_loss",
        noise,
    )  # fmt: skip
    yield case(
        "ddpm_loss, with gradient (eager: noise stored)", 4 * size * n,
        lambda: grad(kernels.ddpm_loss(pred, x_0, t, alpha_bar, **stream)),
        lambda: grad(eager_loss()),
    )  # fmt: skip
    x_t, given = torch.randn(x_0.shape, device=device), pred.detach()
    s = t - 1

    def eager_ddim() -> Tensor:
        a = alpha_bar[t].view(-1, 1, 1, 1)
        b = torch.where(s < 0, 1.0, alpha_bar[s.clamp(min=0)]).view(-1, 1, 1, 1)
        clean = ((x_t - (1 - a).sqrt() * given) / a.sqrt()).clamp(-1, 1)
        return b.sqrt() * clean + (1 - b).sqrt() * given

    yield case(
        "sampler_step, DDIM", (8 + size) * n,
        lambda: kernels.sampler_step(x_t, given, t, s, alpha_bar, eta=0.0, **stream),
        eager_ddim, "sampler_step",
    )  # fmt: skip


def optimiser(device: str) -> Iterator[Case]:
    size = PARAMETERS[device]
    param, grad = torch.randn(2, size, device=device)
    ema, m, v = param.clone(), torch.zeros_like(param), torch.zeros_like(param)
    theirs = nn.Parameter(param.clone())
    theirs.grad = grad
    # A graph of its step can be captured only so; the kernel is the same.
    adamw = torch.optim.AdamW([theirs], lr=1e-4, fused=True, capturable=device == "cuda")
    numbers: dict[str, Any] = {
        "lr": torch.tensor(1e-4),
        "step": torch.tensor(10),
        "ema_decay": torch.tensor(0.999),
    }
    numbers = {name: value.to(device) for name, value in numbers.items()}

    def with_torch() -> None:
        adamw.step()
        ema.lerp_(theirs.detach(), 1e-3)

    yield Case(
        "adamw_ema (eager: fused AdamW, lerp)", 36 * size,
        lambda: kernels.adamw_ema_(param, grad, m, v, ema=ema, **numbers), with_torch,
        "adamw_ema",
    )  # fmt: skip


def norms(device: str) -> Iterator[Case]:
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    shape = (64, 64, 32, 32) if device == "cpu" else (128, 256, 32, 32)
    x = torch.randn(shape, device=device, dtype=dtype).contiguous(memory_format=torch.channels_last)
    x.requires_grad_()
    given, upstream = torch.randn(2, shape[1], device=device), torch.randn_like(x)
    weight, bias = (value.detach().clone().requires_grad_() for value in given)
    # Leaves of their own in eager's dtype. Converted parameters would keep a graph alive from the
    # stream that made them, and a capture on another one would fail.
    own = tuple(value.detach().to(dtype, copy=True).requires_grad_() for value in given)

    def grads(y: Tensor, *leaves: Tensor) -> Any:
        return torch.autograd.grad(y, (x, *leaves), upstream)

    yield Case(
        "group_norm_silu, forward + backward", 5 * x.element_size() * x.numel(),
        lambda: grads(kernels.group_norm_silu(x, 32, weight, bias), weight, bias),
        lambda: grads(functional.silu(functional.group_norm(x, 32, *own)), *own),
        "group_norm_silu",
    )  # fmt: skip


def masks(device: str) -> Iterator[Case]:
    n, peers = (100_000, 2) if device == "cpu" else (PARAMETERS[device], 32)
    delta, residual = torch.randn(2, n, device=device) * 1e-3
    quantiser = kernels.Quantiser.of(
        ring=16, sizes=[n], clips=[2.0**-8], count=1, total_count=4, scale=32_000, device=device
    )
    keys = torch.randint(0, 256, (peers, 32), dtype=torch.uint8, device=device)
    signs = torch.ones(peers, dtype=torch.int64, device=device)
    yield Case(
        f"mask_add, {n} x {peers} peers", None,
        lambda: kernels.mask_add(
            delta, residual, quantiser, rounding_key=keys[0], keys=keys, signs=signs
        ), aim="mask_add", keystream=2 * n * (peers + 1),
    )  # fmt: skip


GROUPS = {"masks": masks, "norms": norms, "optimiser": optimiser, "elementwise": elementwise}
