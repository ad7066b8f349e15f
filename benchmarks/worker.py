"""A contender in a process of its own, so that peak memory is its own and environments may differ.

The worker says in one JSON object what it is once it is ready; the parent writes a line for every
step it wants and reads back `wall-seconds CPU-seconds seconds-until-it-was-enqueued`; at the end of
its input the worker prints its peak memory as another object. The parent waits for no line without
a limit. Only the standard library here: a contender's environment may hold nothing of ours.
"""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import resource
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[1]
STARTING_SECONDS, STEP_SECONDS = 300, 120  # imports and a compiler; a step on a busy machine


def environment() -> dict[str, str]:
    """That of a process which starts in ROOT, wherever this one did, and compiles its kernels.

    Packages that were carried to a machine without a network lie in a folder or are wheels of pure
    Python; PYTHONPATH names them, perhaps relative to where this process was started.
    """
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    carried = [entry for entry in kept.get("PYTHONPATH", "").split(os.pathsep) if entry]
    return kept | {"PYTHONPATH": os.pathsep.join(map(os.path.abspath, carried))}


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
    print(json.dumps(about), flush=True)
    for _ in sys.stdin:
        wait()
        wall, cpu = time.perf_counter(), time.process_time()
        job()
        enqueued = time.perf_counter() - wall
        wait()
        print(time.perf_counter() - wall, time.process_time() - cpu, enqueued, flush=True)
    top = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    print(json.dumps({"peak_mib": round((peak_bytes() if peak_bytes else top) / 2**20)}))


def _resident_bytes() -> int:
    pages = pathlib.Path("/proc/self/statm").read_text().split()[1]
    return int(pages) * resource.getpagesize()


class Child:
    """A process that is read line by line, each with a time limit.

    What it says on stderr goes to a file, since a pipe that nobody reads stops who writes to it. A
    `leader` has a process group of its own, with which it is ended.
    """

    def __init__(
        self, command: Sequence[str], environment: Mapping[str, str], *, leader: bool = False
    ) -> None:
        self._leader, self._unread = leader, b""
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115  as long as the process
        self._process = subprocess.Popen(
            command, cwd=ROOT, env=environment, start_new_session=leader,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._stderr,
        )  # fmt: skip
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._in, self._out = self._process.stdin, self._process.stdout

    def ask(self) -> None:
        with contextlib.suppress(BrokenPipeError):  # its output ends, too, and its stderr says why
            self._in.write(b"\n")
            self._in.flush()

    def line(self, seconds: float) -> str | None:
        """What it says next, None at its end. One that is late is ended: `TimeoutError`."""
        deadline = time.monotonic() + seconds
        while b"\n" not in self._unread:
            left = max(0.0, deadline - time.monotonic())
            if not select.select([self._out], [], [], left)[0]:
                self.end(patience=0)
                raise TimeoutError(f"no answer within {seconds:.0f} s")
            more = os.read(self._out.fileno(), 1 << 16)
            if not more:
                return None
            self._unread += more
        line, _, self._unread = self._unread.partition(b"\n")
        return line.decode(errors="replace").strip()

    def no_more(self) -> None:
        """Its input ends, and with it its work."""
        with contextlib.suppress(BrokenPipeError):
            self._in.close()

    def end(self, patience: float = 20) -> int:
        """Its exit status; killed where it has not come to an end within `patience` seconds."""
        self.no_more()
        try:
            return self._process.wait(timeout=patience)
        except subprocess.TimeoutExpired:
            if self._leader:
                os.killpg(self._process.pid, signal.SIGKILL)
            else:
                self._process.kill()
            return self._process.wait()

    def last_words(self) -> str:
        """The end of its stderr."""
        self._stderr.seek(0)
        lines = self._stderr.read().decode(errors="replace").strip().splitlines()
        return lines[-1][:500] if lines else "it ended without a word"


class Worker:
    """The parent's end of one contender."""

    def __init__(
        self, python: str, arguments: Sequence[str], threads: int,
        starting_seconds: float = STARTING_SECONDS,
    ) -> None:  # fmt: skip
        settings = {"OMP_NUM_THREADS": str(threads), "PYTHONWARNINGS": "ignore"}
        self._child = Child([python, "-m", *arguments], environment() | settings)
        self.wall_seconds: list[float] = []
        self.cpu_seconds: list[float] = []
        self.launch_seconds: list[float] = []
        self.about: dict[str, Any] = json.loads(self._line(starting_seconds))

    def step(self) -> None:
        """Take one step and keep its times."""
        self._child.ask()
        wall, cpu, launch = map(float, self._line(STEP_SECONDS).split())
        self.wall_seconds.append(wall)
        self.cpu_seconds.append(cpu)
        self.launch_seconds.append(launch)

    def finish(self) -> None:
        self._child.no_more()
        self.about |= json.loads(self._line(STEP_SECONDS))
        self._child.end()

    def _line(self, seconds: float) -> str:
        try:
            line = self._child.line(seconds)
        except TimeoutError as late:
            raise Unavailable(f"{late}; {self._child.last_words()}") from None
        if line is None:
            self._child.end()
            raise Unavailable(self._child.last_words())
        return line
