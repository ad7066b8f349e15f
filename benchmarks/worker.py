"""A contender in a process of its own, so that peak memory is its own and environments may differ.

The parent writes a line for every step it wants and reads back `wall-seconds CPU-seconds
seconds-until-it-was-enqueued`; at the end of its input the worker prints one JSON object about
itself. Only the standard library here: a
contender's environment may hold nothing of ours.
"""

from __future__ import annotations

import json
import os
import pathlib
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import IO, Any

ROOT = pathlib.Path(__file__).resolve().parents[1]


class Unavailable(Exception):
    """The contender does not run here; the message says why."""


def serve(
    make: Callable[[], tuple[Callable[[], object], dict[str, Any]]],
    wait: Callable[[], object] = lambda: None,
    peak_bytes: Callable[[], int] | None = None,
) -> None:
    """`make` builds the job and says something about it; then step for step on demand."""
    before = _resident_bytes()
    job, about = make()
    print("ready", flush=True)
    for _ in sys.stdin:
        wait()
        wall, cpu = time.perf_counter(), time.process_time()
        job()
        enqueued = time.perf_counter() - wall
        wait()
        print(time.perf_counter() - wall, time.process_time() - cpu, enqueued, flush=True)
    top = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    about["peak_mib"] = round((peak_bytes() if peak_bytes else top) / 2**20)
    print(json.dumps(about), flush=True)


def _resident_bytes() -> int:
    pages = pathlib.Path("/proc/self/statm").read_text().split()[1]
    return int(pages) * resource.getpagesize()


class Worker:
    """The parent's end of one contender."""

    def __init__(self, python: str, arguments: Sequence[str], threads: int) -> None:
        environment = os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONWARNINGS": "ignore"}
        environment.pop("TRITON_INTERPRET", None)
        self._process = subprocess.Popen(
            [python, "-m", *arguments], cwd=ROOT, env=environment, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        self.cpu_seconds: list[float] = []
        self.launch_seconds: list[float] = []
        if self._read() != "ready":
            raise Unavailable(self._last_words())

    def step(self) -> float:
        """Take one step; its wall-clock seconds."""
        print(file=self._pipe(self._process.stdin), flush=True)
        line = self._read()
        if not line:
            raise Unavailable(self._last_words())
        wall, cpu, launch = map(float, line.split())
        self.cpu_seconds.append(cpu)
        self.launch_seconds.append(launch)
        return wall

    def finish(self) -> dict[str, Any]:
        self._pipe(self._process.stdin).close()
        about: dict[str, Any] = json.loads(self._read())
        self._process.wait()
        return about

    def _read(self) -> str:
        return self._pipe(self._process.stdout).readline().strip()

    def _last_words(self) -> str:
        lines = self._pipe(self._process.stderr).read().strip().splitlines()
        return lines[-1] if lines else "it ended without a word"

    @staticmethod
    def _pipe(pipe: IO[str] | None) -> IO[str]:
        assert pipe is not None
        return pipe
