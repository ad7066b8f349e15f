"""One training step, three ways: diffusers' example, denoising-diffusion-pytorch, ours.

    python -m benchmarks.train_step [--device cuda] [--forms] [--no-compile] [--json FILE]

Batch and data are the same for all, the UNet for diffusers and ours; every contender has a process
of its own and they take turns. CPU: a UNet of 1.1 M parameters at 32×32×1, batch 64, one thread.
CUDA: the 35.7 M parameters of DDPM's CIFAR-10 network, batch 128. The first run makes an
environment for denoising-diffusion-pytorch (`--without-lucidrains` leaves it out). On CUDA
diffusers' step is also taken with bfloat16 autocast, and with torch.compile of its network besides,
and ours replayed from a CUDA graph; `launch_p50_ms` is the time until the host had enqueued a step.
The aim is against diffusers' example as it is, in float32. Ratios are those
of CPU time where one thread computes, since on a shared machine the wall clock tells of the
neighbours, and of wall clock elsewhere.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

import numpy as np
import torch

from benchmarks import lucidrains
from benchmarks.contenders import FORMS, ON_CUDA
from benchmarks.measure import Report, side_by_side
from benchmarks.worker import Unavailable, Worker

_COLUMNS = ("step", "p20_ms", "p50_ms", "p80_ms", "cpu_p50_ms", "peak_mib", "parameters", "how")
STEP_TARGETS = {"cpu": (2.5, 5.0), "cuda": (1.5, None)}


def _starters(
    device: str, threads: int, peer: bool, forms: tuple[str, ...]
) -> dict[str, Callable[[], Worker]]:
    def own(name: str) -> Callable[[], Worker]:
        arguments = ["benchmarks.contenders", name, device]
        return lambda: Worker(sys.executable, arguments, threads)

    def other() -> Worker:
        if not peer:
            raise Unavailable("left out")
        return Worker(lucidrains.environment(), ["benchmarks.lucidrains", device], threads)

    own_ones = {name: own(name) for name in ("diffusers", "ours", *forms)}
    return own_ones | {"lucidrains": other}


def measure(
    report: Report,
    device: str,
    *,
    threads: int,
    rounds: int,
    peer: bool = True,
    forms: tuple[str, ...] = (),
) -> None:
    """Add the rows and targets of one device; those of a device that is not there say so. `forms`:
    these contenders as well, of whom nothing is aimed at."""
    names = ("diffusers", "lucidrains", "ours", *forms)
    workers: dict[str, Worker] = {}
    why: dict[str, str] = dict.fromkeys(names, f"no {device} device")
    if device == "cpu" or torch.cuda.is_available():
        for name, start in _starters(device, threads, peer, forms).items():
            try:
                workers[name] = start()
            except Unavailable as reason:
                why[name] = str(reason)
    jobs = {name: worker.step for name, worker in workers.items()}
    taken = {}
    if jobs:
        taken = side_by_side(jobs, rounds=rounds, warmup=2, time_job=lambda step: step())
    for name in names:
        row: dict[str, object] = dict.fromkeys(_COLUMNS) | {"step": name}
        row |= {"launch_p50_ms": None} if device == "cuda" else {}
        if name in taken:
            cpu = round(1e3 * _p50(workers[name].cpu_seconds, rounds), 1)
            row |= taken[name].milliseconds() | {"cpu_p50_ms": cpu}
            if device == "cuda":
                row["launch_p50_ms"] = round(1e3 * _p50(workers[name].launch_seconds, rounds), 3)
            row |= workers[name].finish()
        else:
            row["how"] = why[name]
        report.row(**row)
    seconds = {name: times.p50 for name, times in taken.items()}
    if device == "cpu" and threads == 1:
        seconds = {name: _p50(workers[name].cpu_seconds, rounds) for name in taken}
    for name, least in zip(names, STEP_TARGETS[device], strict=False):
        if least is not None:
            ratio = _ratio(seconds, name)
            suffix = "" if device == "cpu" else "_cuda"
            report.target(f"step_vs_{name}{suffix}", ratio, "x", at_least=least)


def _p50(seconds: list[float], rounds: int) -> float:
    return float(np.median(seconds[-rounds:]))


def _ratio(seconds: dict[str, float], name: str) -> float | None:
    if name not in seconds or "ours" not in seconds:
        return None
    return round(seconds[name] / seconds["ours"], 2)


def main() -> None:
    parser = argparse.ArgumentParser(description="time one training step against two peers")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=1, help="threads of each contender's torch")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--without-lucidrains", action="store_true")
    parser.add_argument("--forms", action="store_true",
                        help="CPU: every form that choose_execution chooses from")  # fmt: skip
    parser.add_argument("--no-compile", action="store_true", help="CUDA: no torch.compile")
    parser.add_argument("--json", metavar="FILE")
    given = parser.parse_args()
    report = Report(f"training step on {given.device}, {given.threads} thread(s)")
    forms = tuple(FORMS) if given.forms else ()
    if given.device == "cuda":
        forms = tuple(name for name in ON_CUDA if not (given.no_compile and "compiled" in name))
    measure(report, given.device, threads=given.threads, rounds=given.rounds,
            peer=not given.without_lucidrains, forms=forms)  # fmt: skip
    report.finish(given.json)


if __name__ == "__main__":
    main()
