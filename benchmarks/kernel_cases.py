"""What `benchmarks.kernels` measures: every fused operation at the sizes of a training step, beside
what torch does without it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
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
_CACHED = 1 << 27  # bytes: what moves less may stay in an H200's 50 MB from one call to the next


@dataclass(frozen=True)
class Case:
    """One operation by several means. `moved`: bytes it cannot avoid reading and writing, None
    where they stay in a cache; `keystream`: bytes it makes instead, of which none are moved.
    `noise`: as much noise as the operation makes and nothing else, which bounds it by arithmetic.
    `others`: further rows, by what they are called.
    `aim`: that of `AIMS` which this case is held to.
    """

    name: str
    moved: int | None
    ours: Job
    eager: Job | None = None
    aim: str | None = None
    noise: Job | None = None
    keystream: int | None = None
    others: Mapping[str, Job] = field(default_factory=dict)

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
        images = _Elementwise(device, batch)
        yield from images.noising()
        yield from images.losses()
        yield from images.sampling()


class _Elementwise:
    """Ops over one batch of images; aims and rates are of the largest batch."""

    def __init__(self, device: str, batch: int) -> None:
        self.batch, self.large = batch, batch == BATCHES[device][-1]
        self.x_0, self.t, self.alpha_bar, self.stream = _images(device, batch)
        self.n = self.x_0.numel()
        # What a network predicts in.
        self.half = torch.float32 if device == "cpu" else torch.bfloat16
        self.pred = torch.randn(self.x_0.shape, device=device, dtype=self.half).requires_grad_()
        self.eps = torch.randn(self.x_0.shape, device=device)

    def case(
        self, name: str, moved: int, ours: Job, eager: Job, aim: str | None = None,
        noise: Job | None = None,
    ) -> Case:  # fmt: skip
        return Case(f"{name}, batch {self.batch}", moved if self.large else None, ours, eager,
                    aim if self.large else None, noise)  # fmt: skip

    def noise(self) -> Tensor:
        return kernels.normal(self.x_0.shape, **self.stream, dtype=self.half)

    def noising(self) -> Iterator[Case]:
        x_0, t, alpha_bar, stream, n = self.x_0, self.t, self.alpha_bar, self.stream, self.n

        def eager(eps: Tensor) -> Tensor:
            a, x = alpha_bar[t].view(-1, 1, 1, 1), x_0.float() * (2 / 255) - 1
            return a.sqrt() * x + (1 - a).sqrt() * eps

        yield self.case(
            "q_sample", 5 * n, lambda: kernels.q_sample(x_0, t, alpha_bar, **stream),
            lambda: eager(torch.randn_like(self.eps)), "q_sample", self.noise,
        )  # fmt: skip
        yield self.case(
            "add_noise", 9 * n, lambda: kernels.add_noise(x_0, self.eps, t, alpha_bar),
            lambda: eager(self.eps),
        )  # fmt: skip

    def losses(self) -> Iterator[Case]:
        pred, moved = self.pred, self.half.itemsize * self.n

        def grad(loss: Tensor) -> Tensor:
            return torch.autograd.grad(loss.mean(), pred)[0]

        def ours() -> Tensor:
            return kernels.ddpm_loss(pred, self.x_0, self.t, self.alpha_bar, **self.stream)

        def eager() -> Tensor:
            return (pred.float() - self.eps).square().flatten(1).mean(1)

        yield self.case(
            "ddpm_loss (its one pass: loss and residual)", 2 * moved, ours, eager, "ddpm_loss",
            self.noise,
        )  # fmt: skip
        yield self.case(
            "ddpm_loss, with gradient (eager: noise stored)", 2 * moved,
            lambda: grad(ours()), lambda: grad(eager()),
        )  # fmt: skip

    def sampling(self) -> Iterator[Case]:
        t, s, alpha_bar, stream = self.t, self.t - 1, self.alpha_bar, self.stream
        x_t, given = torch.randn_like(self.eps), self.pred.detach()
        moved = (8 + self.half.itemsize) * self.n

        def eager_estimate() -> tuple[Tensor, Tensor, Tensor]:
            a = alpha_bar[t].view(-1, 1, 1, 1)
            b = torch.where(s < 0, 1.0, alpha_bar[s.clamp(min=0)]).view(-1, 1, 1, 1)
            return a, b, ((x_t - (1 - a).sqrt() * given) / a.sqrt()).clamp(-1, 1)

        def eager_ddim() -> Tensor:
            _, b, clean = eager_estimate()
            return b.sqrt() * clean + (1 - b).sqrt() * given

        def eager_ddpm() -> Tensor:
            a, b, clean = eager_estimate()
            beta, rest = 1 - a / b, (1 - b) / (1 - a)
            mean = b.sqrt() * beta / (1 - a) * clean + (a / b).sqrt() * rest * x_t
            return mean + (rest * beta).sqrt() * torch.randn_like(x_t)

        yield self.case(
            "sampler_step, DDIM", moved,
            lambda: kernels.sampler_step(x_t, given, t, s, alpha_bar, eta=0.0, **stream),
            eager_ddim, "sampler_step",
        )  # fmt: skip
        yield self.case(
            "sampler_step, DDPM with noise", moved,
            lambda: kernels.sampler_step(x_t, given, t, s, alpha_bar, **stream), eager_ddpm,
            "sampler_step_ddpm", self.noise,
        )  # fmt: skip


def optimiser(device: str) -> Iterator[Case]:
    yield _optimiser(device, federated=False)
    yield _optimiser(device, federated=True)


def _optimiser(device: str, *, federated: bool) -> Case:
    """`federated`: with the terms of FedProx and SCAFFOLD, for which torch passes over them all."""
    size = PARAMETERS[device]
    param, grad, anchor, control = torch.randn(4, size, device=device)
    ema, m, v = param.clone(), torch.zeros_like(param), torch.zeros_like(param)
    theirs = nn.Parameter(param.clone())
    theirs.grad = grad.clone()
    # A graph of its step can be captured only so; the kernel is the same.
    adamw = torch.optim.AdamW([theirs], lr=1e-4, fused=True, capturable=device == "cuda")
    numbers: dict[str, Any] = {
        "lr": torch.tensor(1e-4),
        "step": torch.tensor(10),
        "ema_decay": torch.tensor(0.999),
    }
    numbers = {name: value.to(device) for name, value in numbers.items()}

    if federated:
        numbers |= {"anchor": anchor, "mu": 0.1, "control": control}

    def with_torch() -> None:
        if federated:
            drift = theirs.detach() - anchor
            torch.add(grad, drift, alpha=0.1, out=theirs.grad).add_(control)
        adamw.step()
        ema.lerp_(theirs.detach(), 1e-3)

    def ours() -> None:
        kernels.adamw_ema_(param, grad, m, v, ema=ema, **numbers)

    if federated:
        return Case("adamw_ema, proximal term and control variate", 44 * size, ours, with_torch)
    name = "adamw_ema (eager: fused AdamW, lerp)"
    return Case(name, 36 * size, ours, with_torch, "adamw_ema")


NORMS = {  # channels and pixels a side; on CUDA three of the CIFAR-10 network
    "cpu": ((64, 64, 32),),
    "cuda": ((128, 256, 32), (128, 128, 32), (128, 256, 16)),
}


def norms(device: str) -> Iterator[Case]:
    for i, (batch, channels, pixels) in enumerate(NORMS[device]):
        yield _norm(device, (batch, channels, pixels, pixels), aim=i == 0)


def _norm(device: str, shape: tuple[int, ...], *, aim: bool) -> Case:
    """Eager in channels_last, as the network is, where torch's norm on CUDA makes copies in NCHW;
    and beside it of tensors that are in NCHW already."""
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    x = torch.randn(shape, device=device, dtype=dtype).contiguous(memory_format=torch.channels_last)
    x.requires_grad_()
    given, upstream = torch.randn(2, shape[1], device=device), torch.randn_like(x)
    weight, bias = (value.detach().clone().requires_grad_() for value in given)
    # Leaves of their own in eager's dtype. Converted parameters would keep a graph alive from the
    # stream that made them, and a capture on another one would fail.
    own = tuple(value.detach().to(dtype, copy=True).requires_grad_() for value in given)
    nchw, upstream_nchw = x.detach().contiguous().requires_grad_(), upstream.contiguous()

    def eager(x: Tensor, upstream: Tensor) -> Any:
        y = functional.silu(functional.group_norm(x, 32, *own))
        return torch.autograd.grad(y, (x, *own), upstream)

    def ours() -> Any:
        y = kernels.group_norm_silu(x, 32, weight, bias)
        return torch.autograd.grad(y, (x, weight, bias), upstream)

    moved = 5 * x.element_size() * x.numel()
    return Case(
        f"group_norm_silu, forward + backward, {shape[1]} channels of {shape[2]}x{shape[3]}",
        moved if device == "cpu" or moved > _CACHED else None, ours, lambda: eager(x, upstream),
        "group_norm_silu" if aim else None,
        others={"eager, NCHW": lambda: eager(nchw, upstream_nchw)},
    )  # fmt: skip


def masks(device: str) -> Iterator[Case]:
    """A delta in the tensors that it has, and in one, where no element has to look for its own."""
    sizes, peers = (cifar_sizes()[:8], 2) if device == "cpu" else (cifar_sizes(), 32)
    yield _masks(device, sizes, peers, aim="mask_add")
    yield _masks(device, [sum(sizes)], peers, aim=None)


def _masks(device: str, sizes: list[int], peers: int, aim: str | None) -> Case:
    n = sum(sizes)
    delta, residual = torch.randn(2, n, device=device) * 1e-3
    quantiser = kernels.Quantiser.of(
        ring=16, sizes=sizes, clips=[2.0**-8] * len(sizes), count=1, total_count=4, scale=32_000,
        device=device,
    )  # fmt: skip
    keys = torch.randint(0, 256, (peers, 32), dtype=torch.uint8, device=device)
    signs = torch.ones(peers, dtype=torch.int64, device=device)
    tensors = "1 tensor" if len(sizes) == 1 else f"{len(sizes)} tensors"
    return Case(
        f"mask_add, {n} in {tensors} x {peers} peers", None,
        lambda: kernels.mask_add(
            delta, residual, quantiser, rounding_key=keys[0], keys=keys, signs=signs
        ), aim=aim, keystream=2 * n * (peers + 1),
    )  # fmt: skip


def cifar_sizes() -> list[int]:
    """Elements of each tensor of the CIFAR-10 network of arXiv 2006.11239, in the order in which
    `diffusion.model` makes one vector of them: by name."""

    def conv(i: int, o: int, taps: int = 9) -> list[int]:
        return [o, taps * i * o]  # bias, weight

    def attention(c: int) -> list[int]:
        return [c, c, *4 * conv(c, c, 1)]  # norm, k, out, q, v

    def resnet(i: int, o: int) -> list[int]:
        shortcut = conv(i, o, 1) if i != o else []
        return [*conv(i, o), *conv(o, o), *shortcut, i, i, o, o, *conv(512, o, 1)]

    def up(o: int, *inputs: int) -> list[int]:
        return [size for i in inputs for size in resnet(i, o)]

    deep = [*resnet(256, 256), *resnet(256, 256)]
    return [
        *conv(3, 128), 128, 128, *conv(128, 3),
        *conv(128, 128), *resnet(128, 128), *resnet(128, 128),
        *2 * attention(256), *conv(256, 256), *resnet(128, 256), *resnet(256, 256),
        *conv(256, 256), *deep, *deep,
        *attention(256), *deep,
        *conv(128, 512, 1), *conv(512, 512, 1),
        *up(256, 512, 512, 512), *conv(256, 256), *up(256, 512, 512, 512), *conv(256, 256),
        *3 * attention(256), *up(256, 512, 512, 384), *conv(256, 256), *up(128, 384, 256, 256),
    ]  # fmt: skip


GROUPS = {"masks": masks, "norms": norms, "optimiser": optimiser, "elementwise": elementwise}
