"""Every fused operation against torch eager and torch.compile, at the sizes of a training step.

    python -m benchmarks.kernels [--device cuda] [--only GROUP] [--no-compile] [--json FILE]

GB/s counts the bytes an operation cannot avoid moving; `of_copy` is their share of the copy
bandwidth measured in the same run by the same clock. `launch_us` is the time the host needs to
enqueue a call and `graph_ms` a call's share of a replayed CUDA graph; both exist on CUDA only. p20,
p50 and p80 are of the wall clock and include the launch. `rates_of` says of which clock GB/s and
shares are: of the replay, or of the wall clock and why nothing was captured. Aims are of replays
alone, so that the aim of what cannot be captured is not measured. Masks are bound by arithmetic,
not by memory: their GB/s is keystream made, of which none is moved.

What makes noise is bound by the memory or by the noise's arithmetic. `kernels.normal` of as many
elements, stored in two bytes each, is measured beside it ("noise alone"), and the aim is a share of
the longer of that and of copying as many bytes as the operation moves.

On CUDA the elementwise operations are measured twice. A training step's batch of 128 images stays
in the second-level cache from one replay to the next, so that its rates would say nothing of the
memory: none are printed. Shares of the copy bandwidth, and the aims, are those of 32,768 images,
where the least that an operation moves is 0.4 GB (`ddpm_loss`); no second-level cache is as large,
nor is a last-level one (256 MB on an MI300X). The optimiser's buffers hold 0.7 GB.

Without a GPU the rows and aims for it say 'not measured'.
"""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.kernel_cases import GROUPS, NOISE, Case, Job
from benchmarks.measure import NOT_MEASURED, Report, side_by_side

# On a GPU: the least share of the bound, the least ratio to eager, the most milliseconds.
AIMS = {
    "q_sample": ("of_bound", 0.85),
    "ddpm_loss": ("of_bound", 0.85),
    "sampler_step": ("of_bound", 0.85),  # DDIM without noise
    "sampler_step_ddpm": ("of_bound", 0.85),
    "adamw_ema": ("of_bound", 0.85),
    "group_norm_silu": ("eager", 3.0),
    "mask_add": ("ms", 5.0),
}
LEAST_VS_COMPILE = 1.2
AIMED_AT = {
    "masks": ("mask_add",),
    "norms": ("group_norm_silu",),
    "optimiser": ("adamw_ema",),
    "elementwise": ("q_sample", "ddpm_loss", "sampler_step", "sampler_step_ddpm"),
}
_COLUMNS = (
    "p20_ms", "p50_ms", "p80_ms", "gb_s", "of_copy", "launch_us", "graph_ms", "rates_of",
)  # fmt: skip


def copy_bandwidth(device: str) -> tuple[float, str]:
    """Bytes read and written a second by a copy too large for the caches, and by which clock: that
    of what is judged by it."""
    source = torch.empty(1 << 25 if device == "cpu" else 1 << 28, device=device)
    target = torch.empty_like(source)

    def copy() -> Tensor:
        return target.copy_(source)

    taken = side_by_side({"copy": copy}, rounds=7, wait=_wait(device))
    found = _clocked(copy, taken["copy"].p50, device)
    return 8 * source.numel() / found.seconds, found.clock


def _wait(device: str) -> Callable[[], object]:
    return torch.cuda.synchronize if device == "cuda" else lambda: None


@dataclass(frozen=True)
class Measured:
    """Seconds of a job by the wall clock, launch included, and in a replayed graph; `uncaptured`
    says why there is none.
    """

    wall: float
    replay: float | None = None
    uncaptured: str | None = None

    @property
    def seconds(self) -> float:
        return self.wall if self.replay is None else self.replay

    @property
    def clock(self) -> str:
        if self.replay is not None:
            return "replay"
        return f"wall clock; not captured: {self.uncaptured}" if self.uncaptured else "wall clock"


def _launch_seconds(job: Job) -> float:
    """Of the host, to enqueue one call."""
    for _ in range(3):
        job()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(20):
        job()
    taken = (time.perf_counter() - start) / 20
    torch.cuda.synchronize()
    return taken


def _clocked(job: Job, wall: float, device: str) -> Measured:
    return _replayed(job, wall) if device == "cuda" else Measured(wall)


def _replayed(job: Job, wall: float) -> Measured:
    """A call within a replayed graph of ten, captured on the stream on which everything runs."""
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
            for _ in range(10):
                job()
    except RuntimeError as failure:
        _renew_generator()
        return Measured(wall, uncaptured=_first_cause(failure))
    replay = side_by_side({"replay": graph.replay}, rounds=9, wait=torch.cuda.synchronize)
    return Measured(wall, replay["replay"].p50 / 10)


def _renew_generator() -> None:
    """torch 2.11 leaves its generator in a capture that failed, where every draw would raise."""
    device = torch.cuda.current_device()
    fresh = torch.Generator(f"cuda:{device}")
    torch.cuda.default_generators[device].graphsafe_set_state(fresh)


def _first_cause(failure: BaseException) -> str:
    """Of what was raised while a failure was handled, the first; its first line."""
    while failure.__context__ is not None:
        failure = failure.__context__
    return (str(failure).strip() or type(failure).__name__).splitlines()[0][:200]


def _jobs(
    case: Case, device: str, compiled: bool, cannot: Callable[[str, RuntimeError], None]
) -> dict[str, Job]:
    """Those that run; `cannot` is told where the compiler, or the C compiler under it, fails."""
    jobs: dict[str, Job] = {"ours": case.ours}
    if case.eager:
        jobs["eager"] = case.eager
    if case.eager and compiled:
        # For these very sizes: those of the batch before would make it compile for any.
        jobs["compile"] = torch.compile(case.eager, dynamic=False)
        try:
            jobs["compile"]()
        except RuntimeError as failure:
            cannot("compile", failure)
            del jobs["compile"]
    jobs |= case.others
    if case.noise and device == "cuda":
        jobs[NOISE] = case.noise
    return jobs


def _rows(
    report: Report, case: Case, device: str, copy: float, rounds: int, compiled: bool
) -> None:
    def cannot(by: str, failure: RuntimeError) -> None:
        _unmeasured(report, case.name, by, device, _first_cause(failure))

    jobs = _jobs(case, device, compiled, cannot)
    taken = side_by_side(jobs, rounds=rounds, warmup=3, wait=_wait(device))
    measured: dict[str, Measured] = {}
    for by, times in taken.items():
        columns: dict[str, Any] = dict.fromkeys(_COLUMNS)
        if device == "cuda":
            columns["launch_us"] = round(1e6 * _launch_seconds(jobs[by]), 1)
        measured[by] = found = _clocked(jobs[by], times.p50, device)
        if found.replay is not None:
            columns["graph_ms"] = round(1e3 * found.replay, 4)
        columns |= times.milliseconds() | case.rates(by, found.seconds, copy)
        report.row(op=case.name, device=device, by=by, **columns | {"rates_of": found.clock})
    if device == "cuda" and case.aim:
        _target(report, case.aim, measured, (case.moved or 0) / copy)


def _unmeasured(report: Report, op: str, by: str, device: str, why: str | None) -> None:
    reason = {"rates_of": None if why is None else f"{NOT_MEASURED}: {why}"}
    report.row(op=op, device=device, by=by, **dict.fromkeys(_COLUMNS) | reason)


def _target(report: Report, op: str, measured: dict[str, Measured], copied: float = 0.0) -> None:
    """`copied`: seconds in which a copy moves as many bytes. A replay is compared with replays."""
    replays = {by: found.replay for by, found in measured.items() if found.replay is not None}
    (kind, aim), ours = AIMS[op], replays.get("ours")
    if kind == "of_bound":
        noise = replays.get(NOISE, 0.0)
        share = None if ours is None else round(max(copied, noise) / ours, 3)
        unit = "of the noise's arithmetic" if noise > copied else "of copy bandwidth"
        report.target(f"{op}_of_bound", share, unit, at_least=aim)
    elif kind == "ms":
        taken = None if ours is None else round(1e3 * ours, 3)
        report.target(f"{op}_ms", taken, "ms", at_most=aim)
    else:
        for by, least in (("eager", aim), ("compile", LEAST_VS_COMPILE)):
            theirs = replays.get(by)
            ratio = None if ours is None or theirs is None else round(theirs / ours, 3)
            report.target(f"{op}_vs_{by}", ratio, "x", at_least=least)


def list_aims(report: Report, group: str) -> None:
    """As they are without a GPU: not measured."""
    for op in AIMED_AT[group]:
        _unmeasured(report, op, "ours", "cuda", None)
        _target(report, op, {})


def measure(
    report: Report,
    device: str,
    *,
    rounds: int,
    compiled: bool,
    only: Iterable[str] = (),
    save: Callable[[], object] = lambda: None,
) -> None:
    """The rows of one device, of these groups or of all; `save` is called after each operation."""
    groups = [name for name in GROUPS if name in only or not only]
    if device == "cuda" and not torch.cuda.is_available():
        for group in groups:
            list_aims(report, group)
        return
    # All on one stream that is not the default one: a capture that meets what was made there fails.
    side = torch.cuda.Stream() if device == "cuda" else None  # type: ignore[no-untyped-call]
    with torch.cuda.stream(side):
        copy, clock = copy_bandwidth(device)
        rate = {"gb_s": round(copy / 1e9, 2), "of_copy": 1.0, "rates_of": clock}
        report.row(op="copy", device=device, by="torch", **rate)
        for group in groups:
            cases = list(GROUPS[group](device))  # what they are given is drawn before any capture
            for case in cases:
                try:
                    _rows(report, case, device, copy, rounds, compiled)
                except RuntimeError as failure:
                    _unmeasured(report, case.name, "ours", device, _first_cause(failure))
                    if device == "cuda" and case.aim:
                        _target(report, case.aim, {})
                save()


def main() -> None:
    parser = argparse.ArgumentParser(description="time every fused operation")
    parser.add_argument("--device", choices=("cpu", "cuda"), default=None)
    parser.add_argument("--only", choices=tuple(GROUPS), action="append", default=[],
                        help="this group; may be given several times")  # fmt: skip
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--json", metavar="FILE")
    given = parser.parse_args()
    report = Report("fused operations")
    for device in (given.device,) if given.device else ("cpu", "cuda"):
        if device == "cpu":
            torch.set_num_threads(1)
        save = functools.partial(report.write, given.json) if given.json else lambda: None
        measure(report, device, rounds=given.rounds, compiled=not given.no_compile,
                only=given.only, save=save)  # fmt: skip
    report.finish(given.json)


if __name__ == "__main__":
    main()
