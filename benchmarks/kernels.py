"""Every fused operation against torch eager and torch.compile, at the sizes of a training step.

    python -m benchmarks.kernels [--device cuda] [--no-compile] [--json FILE]

GB/s counts the bytes an operation cannot avoid moving; `of_copy` is their share of the copy
bandwidth measured in the same run. `launch_us` is the time the host needs to enqueue a call and
`graph_ms` a call's share of a replayed CUDA graph; both exist on CUDA only. p20, p50 and p80 are of
the wall clock and include the launch; GB/s, shares and aims are those of the replay where there is
one, a ratio where there is one of both. Masks are bound by arithmetic, not by memory: their GB/s is
keystream made.

On CUDA the elementwise operations are measured twice. A training step's batch of 128 images stays
in the second-level cache from one replay to the next, so that its rates would say nothing of the
memory: none are printed. Shares of the copy bandwidth, and the aims, are those of 32,768 images,
where the least that an operation moves is 0.5 GB (`q_sample`); no second-level cache is as large,
nor is a last-level one (256 MB on an MI300X). The optimiser's buffers hold 0.7 GB.

Without a GPU the rows and aims for it say 'not measured'.
"""

from __future__ import annotations

import argparse
import functools
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

import kernels
from benchmarks.measure import Report, side_by_side

Job = Callable[[], Any]
BATCHES = {"cpu": (64,), "cuda": (128, 32_768)}  # a training step's, and one that no cache holds
PARAMETERS = {"cpu": 1_100_000, "cuda": 35_746_307}  # the networks of `benchmarks.contenders`
# On a GPU: the least share of the copy bandwidth, the least ratio to eager, the most milliseconds.
AIMS = {
    "q_sample": ("of_copy", 0.85),
    "ddpm_loss": ("of_copy", 0.85),
    "sampler_step": ("of_copy", 0.85),
    "adamw_ema": ("of_copy", 0.85),
    "group_norm_silu": ("eager", 3.0),
    "mask_add": ("ms", 5.0),
}
LEAST_VS_COMPILE = 1.2


@dataclass(frozen=True)
class Case:
    """One operation by several means. `moved`: bytes it cannot avoid reading and writing, None
    where they stay in a cache.
    """

    name: str
    moved: int | None
    ours: Job
    eager: Job | None = None
    aim: str | None = None
    """That of `AIMS` which this case is held to."""


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

    def case(name: str, moved: int, ours: Job, eager: Job, aim: str | None = None) -> Case:
        return Case(f"{name}, batch {batch}", moved if large else None, ours, eager,
                    aim if large else None)  # fmt: skip

    def eager_q_sample() -> Tensor:
        a, x = alpha_bar[t].view(-1, 1, 1, 1), x_0.float() * (2 / 255) - 1
        return a.sqrt() * x + (1 - a).sqrt() * torch.randn_like(x)

    yield case(
        "q_sample", 5 * n, lambda: kernels.q_sample(x_0, t, alpha_bar, **stream),
        eager_q_sample, "q_sample",
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
    weight, bias = (nn.Parameter(torch.randn(shape[1], device=device)) for _ in range(2))
    own, upstream = (weight.to(dtype), bias.to(dtype)), torch.randn_like(x)

    def grads(y: Tensor) -> Any:
        return torch.autograd.grad(y, (x, weight, bias), upstream)

    yield Case(
        "group_norm_silu, forward + backward", 5 * x.element_size() * x.numel(),
        lambda: grads(kernels.group_norm_silu(x, 32, weight, bias)),
        lambda: grads(functional.silu(functional.group_norm(x, 32, *own))), "group_norm_silu",
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
        f"mask_add, {n} x {peers} peers", 2 * n * (peers + 1),
        lambda: kernels.mask_add(
            delta, residual, quantiser, rounding_key=keys[0], keys=keys, signs=signs
        ), None, "mask_add",
    )  # fmt: skip


GROUPS = (elementwise, optimiser, norms, masks)


def copy_bandwidth(device: str) -> float:
    """Bytes read and written a second by a copy too large for the caches: the best of several."""
    source = torch.empty(1 << 25 if device == "cpu" else 1 << 28, device=device)
    target = torch.empty_like(source)
    taken = side_by_side({"copy": lambda: target.copy_(source)}, rounds=7, wait=_wait(device))
    return 8 * source.numel() / min(taken["copy"].samples)


def _wait(device: str) -> Callable[[], object]:
    return torch.cuda.synchronize if device == "cuda" else lambda: None


def _on_cuda(job: Job) -> dict[str, float | None]:
    """Launch overhead apart, and a call's time within a replayed graph of ten."""
    for _ in range(3):
        job()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(20):
        job()
    launch = (time.perf_counter() - start) / 20
    torch.cuda.synchronize()
    found: dict[str, float | None] = {"launch_us": round(1e6 * launch, 1), "graph_ms": None}
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            for _ in range(10):
                job()
    except RuntimeError:  # something in this job cannot be captured
        return found
    replay = side_by_side({"replay": graph.replay}, rounds=9, wait=torch.cuda.synchronize)
    return found | {"graph_ms": round(100 * replay["replay"].p50, 4)}


def _compiled(eager: Job) -> Job | None:
    """None where the compiler or the C compiler under it fails. For these very sizes: those of the
    batch before would make it compile for any.
    """
    job = torch.compile(eager, dynamic=False)
    try:
        job()
    except RuntimeError as failure:
        print(f"torch.compile: {failure}", file=sys.stderr)
        return None
    return job


def _rows(
    report: Report, case: Case, device: str, copy: float, rounds: int, compiled: bool
) -> None:
    jobs: dict[str, Job] = {"ours": case.ours}
    if case.eager:
        jobs["eager"] = case.eager
        if compiled and (job := _compiled(case.eager)):
            jobs["compile"] = job
    taken = side_by_side(jobs, rounds=rounds, warmup=3, wait=_wait(device))
    nothing: dict[str, float | None] = {"launch_us": None, "graph_ms": None}
    measured: dict[str, Measured] = {}
    for by, times in taken.items():
        extra = _on_cuda(jobs[by]) if device == "cuda" else nothing
        replay = extra["graph_ms"]
        measured[by] = Measured(times.p50, None if replay is None else replay / 1e3)
        rates: dict[str, Any] = {"gb_s": "in cache", "of_copy": "in cache"}
        if case.moved is not None:
            rate = case.moved / measured[by].seconds
            rates = {"gb_s": round(rate / 1e9, 2), "of_copy": round(rate / copy, 3)}
        report.row(op=case.name, device=device, by=by, **times.milliseconds(), **rates, **extra)
    if device == "cuda" and case.aim:
        _target(report, case.aim, measured, (case.moved or 0) / copy)


@dataclass(frozen=True)
class Measured:
    """Seconds of a job by the wall clock, launch included, and in a replayed graph where it can."""

    wall: float
    replay: float | None = None

    @property
    def seconds(self) -> float:
        return self.wall if self.replay is None else self.replay

    def times_faster_than(self, other: Measured) -> float:
        """Like is compared with like."""
        if self.replay is None or other.replay is None:
            return other.wall / self.wall
        return other.replay / self.replay


def _target(report: Report, op: str, measured: dict[str, Measured], copied: float = 0.0) -> None:
    """`copied`: seconds in which a copy moves as many bytes."""
    (kind, aim), ours = AIMS[op], measured.get("ours")
    if kind == "of_copy":
        share = None if ours is None else round(copied / ours.seconds, 3)
        report.target(f"{op}_of_copy", share, "of copy bandwidth", at_least=aim)
    elif kind == "ms":
        taken = None if ours is None else round(1e3 * ours.seconds, 3)
        report.target(f"{op}_ms", taken, "ms", at_most=aim)
    else:
        for by, least in (("eager", aim), ("compile", LEAST_VS_COMPILE)):
            theirs = measured.get(by)
            ratio = None if ours is None or theirs is None else ours.times_faster_than(theirs)
            report.target(f"{op}_vs_{by}", ratio, "x", at_least=least)


def measure(
    report: Report,
    device: str,
    *,
    rounds: int,
    compiled: bool,
    save: Callable[[], object] = lambda: None,
) -> None:
    """The rows of one device; `save` is called after each operation."""
    if device == "cuda" and not torch.cuda.is_available():
        for op in AIMS:
            report.row(op=op, device=device, by="ours", p20_ms=None, p50_ms=None, p80_ms=None,
                       gb_s=None, of_copy=None, launch_us=None, graph_ms=None)  # fmt: skip
            _target(report, op, {})
        return
    copy = copy_bandwidth(device)
    report.row(op="copy", device=device, by="torch", gb_s=round(copy / 1e9, 2), of_copy=1.0)
    for group in GROUPS:
        for case in group(device):
            _rows(report, case, device, copy, rounds, compiled)
            save()


def main() -> None:
    parser = argparse.ArgumentParser(description="time every fused operation")
    parser.add_argument("--device", choices=("cpu", "cuda"), default=None)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--json", metavar="FILE")
    given = parser.parse_args()
    report = Report("fused operations")
    for device in (given.device,) if given.device else ("cpu", "cuda"):
        if device == "cpu":
            torch.set_num_threads(1)
        save = functools.partial(report.write, given.json) if given.json else lambda: None
        measure(report, device, rounds=given.rounds, compiled=not given.no_compile, save=save)
    report.finish(given.json)


if __name__ == "__main__":
    main()
