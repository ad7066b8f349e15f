"""The worker: one child process that computes with torch, and ends when it has nothing to do.

It is spawned, not forked, so that it shares neither locks nor sockets with the agent. It watches
its parent: an agent that is killed takes its worker with it. A worker that dies (out of memory,
say) is started anew and its order is tried once more; checkpoints keep what was done.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import resource
import signal
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeVar

import structlog

from silo.config import Resources
from silo.errors import Paused, SiloError, WorkFailed
from silo.orders import Machine, Order
from silo.process import begin, forget_pause

R = TypeVar("R")
log = structlog.get_logger(__name__)

_PROGRESS_SECONDS = 2.0
_LOOK_SECONDS = 1.0
_REST_SECONDS = 10.0
_GRACE_SECONDS = 120.0  # to the end of a training step; then without a checkpoint
_NO_MEMORY = ("can't allocate memory", "not enough memory", "out of memory", "bad_alloc")


@dataclass(frozen=True)
class Progress:
    """How far an order is, in steps that the plan fixes: the study centre sees it, so it must not
    depend on how many images this site has."""

    activity: str
    step: int
    steps: int


def _now() -> datetime:
    return datetime.now(UTC)


class Worker:
    """At most one child process, at most one order at a time, and none outside working hours."""

    def __init__(self, resources: Resources, now: Callable[[], datetime] = _now) -> None:
        self.machine = Machine(resources.device, resources.threads, resources.processes)
        self._resources, self._now = resources, now
        self._turn = asyncio.Lock()
        self._pool: ProcessPoolExecutor | None = None
        self._timer: asyncio.TimerHandle | None = None

    @property
    def alive(self) -> bool:
        """Whether there is a child process now."""
        return self._pool is not None

    @property
    def open(self) -> bool:
        """Whether the site's working hours let it compute now."""
        return self._resources.open_at(self._now())

    async def run(
        self, order: Order[R], progress: Path, on_progress: Callable[[Progress], None]
    ) -> R:
        """The answer to `order`. `progress` is a file that the worker may use to report with.

        Outside working hours it waits for them; when they end, an order under way leaves a
        checkpoint and waits for the next. Cancelling ends the child: a later order starts another.

        Raises DataError for images that cannot be used, ProposalRefused for work that is not what
        the plan says, and WorkFailed for everything else.
        """
        while True:
            await self._rest(on_progress)
            async with self._turn:
                try:
                    return await self._run_in_turn(order, progress, on_progress)
                except Paused as pause:
                    log.info("order pauses", order=type(order).__name__, why=str(pause))

    async def _rest(self, on_progress: Callable[[Progress], None]) -> None:
        while not self.open:
            until = (self._resources.hours or "").partition("-")[0]
            on_progress(Progress(f"resting until {until}", 0, 0))
            await asyncio.sleep(_REST_SECONDS)

    async def _run_in_turn(
        self, order: Order[R], progress: Path, on_progress: Callable[[Progress], None]
    ) -> R:
        if self._timer is not None:
            self._timer.cancel()
        beside = [_watch(progress, on_progress), self._pause_when_closed()]
        tasks = [asyncio.create_task(task) for task in beside]
        try:
            return await self._run_twice(order, progress)
        except WorkFailed:
            log.exception("order failed", order=type(order).__name__)
            raise
        except asyncio.CancelledError:
            self.kill()  # the order is not wanted any more; its checkpoint stays
            raise
        finally:
            for task in tasks:
                task.cancel()
            progress.unlink(missing_ok=True)
            delay = self._resources.idle_seconds
            self._timer = asyncio.get_running_loop().call_later(delay, self._stop)

    async def _pause_when_closed(self) -> None:
        """At the end of the hours: ask for a checkpoint; what has none is started over later."""
        while self.open:
            await asyncio.sleep(_LOOK_SECONDS)
        self._signal(signal.SIGUSR1)
        await asyncio.sleep(_GRACE_SECONDS)
        self._signal(signal.SIGKILL)

    async def _run_twice(self, order: Order[R], progress: Path) -> R:
        try:
            return await self._run_once(order, progress)
        except BrokenProcessPool as error:
            self._stop()
            if not self.open:
                raise Paused("the working hours are over") from error
            log.warning("worker died; its order is tried once more", order=type(order).__name__)
        try:
            return await self._run_once(order, progress)
        except BrokenProcessPool as error:
            self._stop()
            # Not every library raises MemoryError; some end the process.
            limit = self._resources.memory_mib
            least = "this machine has" if limit is None else f"memory_mib = {limit} in site.toml is"
            raise WorkFailed(
                f"the worker died twice over {type(order).__name__}: most often {least} too little "
                "memory for the study's model and batch size"
            ) from error

    async def _run_once(self, order: Order[R], progress: Path) -> R:
        if self._pool is None:
            context = multiprocessing.get_context("spawn")
            arguments = (self._resources.niceness, self._resources.memory_mib)
            self._pool = ProcessPoolExecutor(1, context, begin, arguments)
        future = asyncio.get_running_loop().run_in_executor(self._pool, _execute, order, progress)
        return await future

    def _stop(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)
            self._pool = None

    def kill(self) -> None:
        """End the child now, in the middle of what it does."""
        if self._timer is not None:
            self._timer.cancel()
        self._signal(signal.SIGKILL)
        self._stop()

    def _signal(self, number: int) -> None:
        if self._pool is not None:
            for process in list(self._pool._processes):
                with suppress(ProcessLookupError):
                    os.kill(process, number)


async def _watch(progress: Path, on_progress: Callable[[Progress], None]) -> None:
    last = None
    while True:
        await asyncio.sleep(_PROGRESS_SECONDS)
        found = await asyncio.to_thread(_read_progress, progress)
        # The same figures again say that the worker lives: a reader knows the agent by them.
        last = found or last
        on_progress(last or Progress("starting", 0, 0))


def _read_progress(path: Path) -> Progress | None:
    try:
        activity, step, steps = path.read_text("utf-8").split("\n")
        return Progress(activity, int(step), int(steps))
    except (OSError, ValueError):
        return None


def _execute(order: Order[R], progress: Path) -> R:
    """In the child, for each order. Only here is torch imported.

    Exceptions travel by pickle, which not all of them survive; ours do.
    """
    from silo.jobs import execute

    forget_pause()
    try:
        return execute(order, ProgressFile(progress))
    except SiloError:
        raise
    except Exception as error:
        if _lacks_memory(error):
            raise WorkFailed(
                f"{type(order).__name__} needs more memory than it gets: raise [resources] "
                "memory_mib in site.toml, or leave studies with such a model and batch size alone"
            ) from error
        name = type(order).__name__
        why = f"{type(error).__name__}: {error}"
        raise WorkFailed(f"{name} failed: {why}{_memory_hint()}") from error


def _lacks_memory(error: Exception) -> bool:
    """torch reports it as a RuntimeError of its own words; an extension that did not get what it
    asked for may return nothing at all, which Python makes a SystemError."""
    limited = resource.getrlimit(resource.RLIMIT_DATA)[0] != resource.RLIM_INFINITY
    if isinstance(error, MemoryError) or (limited and isinstance(error, SystemError)):
        return True
    return any(part in str(error) for part in _NO_MEMORY)


def _memory_hint() -> str:
    """For every other failure under a limit: a library may swallow the MemoryError and fail later
    (linecache then has no source, and triton refuses a kernel that is "not in a file")."""
    limit = resource.getrlimit(resource.RLIMIT_DATA)[0]
    if limit == resource.RLIM_INFINITY:
        return ""
    return f"; it may allocate {limit >> 20} MiB (memory_mib in site.toml): is that enough?"


class ProgressFile:
    """The child's end: replaces the file at most twice a second."""

    def __init__(self, path: Path) -> None:
        self._path, self._next = path, 0.0

    def __call__(self, activity: str, step: int, steps: int) -> None:
        if time.monotonic() < self._next and step < steps:
            return
        self._next = time.monotonic() + 0.5
        partial = self._path.with_name(self._path.name + ".new")
        partial.write_text(f"{activity}\n{step}\n{steps}", "utf-8")
        os.replace(partial, self._path)
