"""What every benchmark shares: timing side by side, the machine in words, tables, JSON.

    report = Report("mask 10 M parameters")
    for name, times in side_by_side({"ours": ours, "peer": peer}, rounds=9).items():
        report.row(what=name, **times.milliseconds())
    report.target("mask_vs_peer", peer_p50 / ours_p50, "x", at_least=5)
    report.finish(arguments.json)

A value of None was not measured, prints as such, and never meets or misses a target. The JSON file
is {machine, title, rows, targets}, targets a list of {name, value, unit, target, sense, met}; where
its name does not say how it was made, `commands` does.
"""

from __future__ import annotations

import itertools
import json
import os
import pathlib
import platform
import shlex
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from importlib import metadata
from typing import Any, TypeVar

import numpy as np

T = TypeVar("T")
NOT_MEASURED = "not measured"
_PACKAGES = ("numpy", "torch", "triton", "diffusers", "cryptography", "grpcio")
_FEATURES = ("avx2", "avx512f", "avx512_bf16", "amx_tile", "amx_bf16")


@dataclass(frozen=True)
class Times:
    """Durations of one job in seconds, in the order they were taken."""

    samples: tuple[float, ...]

    def quantile(self, q: float) -> float:
        return float(np.quantile(self.samples, q))

    @property
    def p50(self) -> float:
        return self.quantile(0.5)

    def milliseconds(self) -> dict[str, float]:
        """p20, p50 and p80, ready for a row."""
        return {f"p{q}_ms": round(1e3 * self.quantile(q / 100), 4) for q in (20, 50, 80)}


def side_by_side(
    jobs: Mapping[str, Callable[[], Any]],
    *,
    rounds: int,
    warmup: int = 1,
    wait: Callable[[], object] = lambda: None,
    time_job: Callable[[Callable[[], Any]], float] | None = None,
) -> dict[str, Times]:
    """Time the jobs in turns, so that what else the machine does meets them all alike.

    Every round runs each job once and starts with another one. `wait` is called before and after
    each job, inside the clock (a GPU's synchronize). `time_job`, if given, runs one job and says
    how many seconds it took, for jobs that are timed elsewhere.
    """

    def clock(job: Callable[[], Any]) -> float:
        wait()
        start = time.perf_counter()
        job()
        wait()
        return time.perf_counter() - start

    taken: dict[str, list[float]] = {name: [] for name in jobs}
    names = list(jobs)
    for done in range(warmup + rounds):
        first = done % len(names)
        for name in names[first:] + names[:first]:
            seconds = (time_job or clock)(jobs[name])
            if done >= warmup:
                taken[name].append(seconds)
    return {name: Times(tuple(samples)) for name, samples in taken.items()}


@dataclass(frozen=True)
class Target:
    """A figure that was aimed at; `value` None where it could not be measured."""

    name: str
    value: float | None
    unit: str
    target: float
    sense: str

    @property
    def met(self) -> bool | None:
        if self.value is None:
            return None
        return self.value >= self.target if self.sense == ">=" else self.value <= self.target


@dataclass
class Report:
    """Rows and targets of one benchmark, printed as they come and written at the end."""

    title: str
    rows: list[dict[str, Any]] = field(default_factory=list)
    targets: list[Target] = field(default_factory=list)
    commands: list[str] = field(default_factory=list)

    def row(self, **columns: Any) -> None:
        self.rows.append(columns)

    def target(
        self,
        name: str,
        value: float | None,
        unit: str,
        *,
        at_least: float | None = None,
        at_most: float | None = None,
    ) -> None:
        limit = at_least if at_least is not None else at_most
        if limit is None or (at_least is not None and at_most is not None):
            raise ValueError(f"target {name}: give at_least or at_most")
        sense = ">=" if at_least is not None else "<="
        self.targets.append(Target(name, value, unit, limit, sense))

    def as_dict(self) -> dict[str, Any]:
        targets = [asdict(t) | {"met": t.met} for t in self.targets]
        made: dict[str, Any] = {"commands": self.commands} if self.commands else {}
        made |= {"machine": machine(), "title": self.title}
        return made | {"rows": self.rows, "targets": targets}

    def finish(self, path: str | os.PathLike[str] | None = None) -> None:
        """Print everything; write it as JSON where a path is given."""
        result = self.as_dict()
        print(f"\n{self.title}")
        print("  " + ", ".join(f"{k} {v}" for k, v in result["machine"].items() if v is not None))
        for _, rows in itertools.groupby(self.rows, key=lambda row: next(iter(row), "")):
            print_table(list(rows))
        for t in self.targets:
            verdict = {True: "met", False: "MISSED", None: NOT_MEASURED}[t.met]
            value = NOT_MEASURED if t.value is None else f"{t.value:.4g} {t.unit}"
            print(f"  {t.name}: {value} (target {t.sense} {t.target}): {verdict}")
        if path is not None:
            self.write(path)

    def write(self, path: str | os.PathLike[str]) -> None:
        """What there is so far, as JSON; whole, whenever the process is ended."""
        pathlib.Path(path).parent.mkdir(parents=True, exist_ok=True)
        partial = pathlib.Path(f"{path}.part")
        partial.write_text(json.dumps(self.as_dict(), indent=1) + "\n")
        partial.replace(path)


class Cells:
    """Parts of a long benchmark, kept in a JSON file as they are finished: a run that was cut off
    goes on behind the last of them. A file that another machine, other versions or another
    `setting` filled is begun anew."""

    def __init__(self, path: pathlib.Path | None, **setting: Any) -> None:
        self._path = path
        about = {k: v for k, v in machine().items() if k not in ("load", "gpu", "torch_threads")}
        self._kept: dict[str, Any] = {"about": about | setting, "cells": {}}
        if path is not None and path.exists():
            kept = json.loads(path.read_text())
            if kept["about"] == json.loads(json.dumps(self._kept["about"])):
                self._kept = kept

    def __contains__(self, key: str) -> bool:
        return key in self._kept["cells"]

    def get(self, key: str, measure: Callable[[], T]) -> T:
        """The kept value of `key` (anything that JSON holds), or that of measuring it now."""
        cells = self._kept["cells"]
        if key not in cells:
            cells[key] = measure()
            if self._path is not None:
                partial = self._path.with_suffix(".part")
                partial.write_text(json.dumps(self._kept))
                partial.replace(self._path)
        found: T = cells[key]
        return found


def command() -> str:
    """How this module was started, without where its result goes."""
    words, module = sys.argv[1:], pathlib.Path(sys.argv[0]).stem
    if "--json" in words:
        at = words.index("--json")
        words = words[:at] + words[at + 2 :]
    return shlex.join(["python", "-m", f"benchmarks.{module}", *words])


def print_table(rows: list[dict[str, Any]]) -> None:
    """Columns in the order they first appear; numbers to the right."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    cells = [[_shown(row.get(name, "")) for name in columns] for row in rows]
    widths = [max(map(len, column)) for column in zip(columns, *cells, strict=True)]
    for line in [columns, *cells]:
        print("  " + "  ".join(c.rjust(w) if _numeric(c) else c.ljust(w)
              for c, w in zip(line, widths, strict=True)).rstrip())  # fmt: skip


def _numeric(cell: str) -> bool:
    return cell[:1].isdigit() or cell[:1] == "-"


def _shown(value: object) -> str:
    if value is None:
        return NOT_MEASURED
    if not isinstance(value, float):
        return str(value)
    return f"{value:.1f}" if abs(value) >= 1000 else f"{value:.4g}"


def machine() -> dict[str, Any]:
    """What a reader needs to place the figures: hardware, versions and load, no names or paths."""
    cpu, flags, memory = platform.machine(), set(), None
    if sys.platform == "linux":
        info = _colon_table("/proc/cpuinfo")
        cpu, flags = info.get("model name", cpu), set(info.get("flags", "").split())
        memory = round(int(_colon_table("/proc/meminfo")["MemTotal"].split()[0]) / 2**20)
    found: dict[str, Any] = {"cpu": cpu, "cores": len(os.sched_getaffinity(0))}
    found |= {"features": " ".join(f for f in _FEATURES if f in flags), "memory_gib": memory}
    found |= {"gpu": _gpu(), "load": round(os.getloadavg()[0], 1)}
    found["python"] = platform.python_version()
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    if "torch" in sys.modules:
        found["torch_threads"] = sys.modules["torch"].get_num_threads()
    return found


def _gpu() -> str | None:
    """The GPU's name; only where torch is loaded already, since loading it takes memory."""
    torch = sys.modules.get("torch")
    return torch.cuda.get_device_name() if torch and torch.cuda.is_available() else None


def _colon_table(path: str) -> dict[str, str]:
    """The first block of a `name: value` file under /proc."""
    block = pathlib.Path(path).read_text().split("\n\n")[0]
    pairs = (line.partition(":") for line in block.splitlines())
    return {name.strip(): value.strip() for name, _, value in pairs}
