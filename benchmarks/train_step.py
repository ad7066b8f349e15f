"""One training step, three ways: diffusers' example, denoising-diffusion-pytorch, ours.

    python -m benchmarks.train_step [--device cuda] [--forms] [--no-compile] [--json FILE]

Batch and data are the same for all, the UNet for diffusers and ours; every contender has a process
of its own and they take turns. CPU: a UNet of 1.1 M parameters at 32×32×1, batch 64, one thread.
CUDA: the 35.7 M parameters of DDPM's CIFAR-10 network, batch 128. The first run makes an
environment for denoising-diffusion-pytorch (`--without-lucidrains` leaves it out). On CUDA
diffusers' step is also taken with bfloat16 autocast, and with torch.compile of its network besides,
and ours replayed from a CUDA graph, as it is and with `cudnn.benchmark`; `launch_p50_ms` is the
time until the host had enqueued a step. The aim is against diffusers' example as it is, in float32.
Ratios are those of CPU time where one thread computes, since on a shared machine the wall clock
tells of the neighbours, and of wall clock elsewhere.

Results are written after every round. A contender that fails or hangs costs no other its figures:
its row says why. On CUDA a group of them (`ON_CUDA`) starts when the one before has its figures:
diffusers' example and ours, of which the aim is, first, and last what waits for a compiler. There
none may take longer than 120 s to start.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import torch

from benchmarks import lucidrains
from benchmarks.measure import Report, Times
from benchmarks.worker import STARTING_SECONDS, Unavailable, Worker

_COLUMNS = ("step", "p20_ms", "p50_ms", "p80_ms", "cpu_p50_ms", "peak_mib", "parameters", "how")
STEP_TARGETS = {"cpu": {"diffusers": 2.5, "lucidrains": 5.0}, "cuda": {"diffusers": 1.5}}
# Each group takes turns and has its figures before the next one starts: a start that is slow costs
# those before it nothing.
ON_CUDA = (
    ("diffusers", "ours"),
    ("ours, CUDA graph", "diffusers, bf16"),
    ("ours, CUDA graph, cudnn.benchmark",),
    ("diffusers, bf16, compiled",),
)
_STARTING_SECONDS = {"cpu": STARTING_SECONDS, "cuda": 120}  # a session there has 300 for them all
_WARMUP = 2


@dataclass
class Contender:
    """One row: a worker's, or why there is none."""

    name: str
    start: Callable[[], Worker]
    worker: Worker | None = None
    why: str = "not started"

    def attempt(self, job: Callable[[], Any]) -> None:
        """What fails ends this contender and no other."""
        try:
            job()
        except Unavailable as reason:
            self.worker, self.why = None, str(reason)

    def begin(self) -> None:
        self.worker = self.start()

    def seconds(self, of: str) -> list[float]:
        """Those of the rounds that count: wall, cpu or launch."""
        kept: list[float] = getattr(self.worker, f"{of}_seconds", [])
        return kept[_WARMUP:]

    def p50(self, of: str) -> float | None:
        taken = self.seconds(of)
        return float(np.median(taken)) if taken else None

    def row(self, device: str) -> dict[str, object]:
        made: dict[str, object] = dict.fromkeys(_COLUMNS) | {"step": self.name}
        made |= {"launch_p50_ms": None} if device == "cuda" else {}
        if self.worker is None:
            return made | {"how": self.why}
        if taken := self.seconds("wall"):
            made |= Times(tuple(taken)).milliseconds()
            made |= {"cpu_p50_ms": _milliseconds(self.p50("cpu"), 1)}
            if device == "cuda":
                made |= {"launch_p50_ms": _milliseconds(self.p50("launch"), 3)}
        return made | self.worker.about


def _milliseconds(seconds: float | None, digits: int) -> float | None:
    return None if seconds is None else round(1e3 * seconds, digits)


def _contenders(
    device: str, threads: int, peer: bool, forms: tuple[str, ...]
) -> dict[str, Contender]:
    def own(name: str) -> Callable[[], Worker]:
        arguments = ["benchmarks.contenders", name, device]
        return lambda: Worker(sys.executable, arguments, threads, _STARTING_SECONDS[device])

    def other() -> Worker:
        if not peer:
            raise Unavailable("left out")
        return Worker(lucidrains.environment(), ["benchmarks.lucidrains", device], threads)

    names = dict.fromkeys(("diffusers", "lucidrains", "ours", *forms))
    starts = {name: own(name) for name in names} | {"lucidrains": other}
    return {name: Contender(name, starts[name]) for name in names}


def measure(
    report: Report,
    device: str,
    *,
    threads: int,
    rounds: int,
    peer: bool = True,
    forms: tuple[str, ...] = (),
    save: Callable[[], object] = lambda: None,
) -> None:
    """The rows and targets of one device; those of a device that is not there say so. `forms`:
    these contenders as well, of whom nothing is aimed at. `save` is called after every round."""
    contenders = _contenders(device, threads, peer, forms)
    by = "cpu" if device == "cpu" and threads == 1 else "wall"

    def keep() -> None:
        _fill(report, contenders, device, by)
        save()

    if device == "cuda" and not torch.cuda.is_available():
        list_aims(report, forms)
        save()
        return
    keep()  # whoever is not reached has a row that says so
    for together in _groups(device, contenders):
        _take_turns([contenders[name] for name in together], rounds, keep)


def list_aims(report: Report, forms: Iterable[str]) -> None:
    """Rows and aims as they are without a GPU: not measured."""
    contenders = _contenders("cuda", 1, False, tuple(forms))
    for contender in contenders.values():
        contender.why = "no cuda device"
    _fill(report, contenders, "cuda", "wall")


def _groups(device: str, names: Collection[str]) -> list[list[str]]:
    """On a CPU all take turns: what else it does must meet them alike."""
    known = ON_CUDA if device == "cuda" else ()
    groups = [[name for name in group if name in names] for group in known]
    return [*groups, [name for name in names if name not in chain(*known)]]


def _take_turns(contenders: list[Contender], rounds: int, keep: Callable[[], None]) -> None:
    for contender in contenders:
        contender.attempt(contender.begin)
    for done in range(_WARMUP + rounds):
        running = [c for c in contenders if c.worker]
        first = done % len(running) if running else 0
        for contender in running[first:] + running[:first]:
            if contender.worker:
                contender.attempt(contender.worker.step)
        keep()
    for contender in contenders:
        if contender.worker:
            contender.attempt(contender.worker.finish)
    keep()


def _fill(report: Report, contenders: dict[str, Contender], device: str, by: str) -> None:
    """All rows and targets, as far as they have come."""
    report.rows[:] = [contender.row(device) for contender in contenders.values()]
    report.targets.clear()
    ours, suffix = contenders["ours"].p50(by), "" if device == "cpu" else "_cuda"
    for name, least in STEP_TARGETS[device].items():
        theirs = contenders[name].p50(by)
        ratio = None if ours is None or theirs is None else round(theirs / ours, 2)
        report.target(f"step_vs_{name}{suffix}", ratio, "x", at_least=least)


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
    forms: tuple[str, ...] = ()
    if given.device == "cuda":
        forms = tuple(n for n in chain(*ON_CUDA) if not (given.no_compile and "compiled" in n))
    elif given.forms:
        from benchmarks.contenders import FORMS

        forms = tuple(FORMS)
    save = functools.partial(report.write, given.json) if given.json else lambda: None
    measure(report, given.device, threads=given.threads, rounds=given.rounds,
            peer=not given.without_lucidrains, forms=forms, save=save)  # fmt: skip
    report.finish(given.json)


if __name__ == "__main__":
    main()
