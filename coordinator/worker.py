"""The child process of a study that computes with torch, so that the event loop never does."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from multiprocessing.connection import wait
from typing import ParamSpec, TypeVar

import structlog

from coordinator import failpoints

P = ParamSpec("P")
T = TypeVar("T")
log = structlog.get_logger()

_ATTEMPTS = 2


class WorkerDied(Exception):
    """The child process died twice over one job; the text says what to look for."""


class Worker:
    """Runs functions of `coordinator.jobs`, one at a time. The child starts with the first job."""

    def __init__(self) -> None:
        self._pool: ProcessPoolExecutor | None = None

    async def run(self, job: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """The job's result, or what it raised. A child that died is replaced and the job done
        again: jobs write to files of their own and are free of side effects."""
        call = partial(job, *args, **kwargs)
        for attempt in range(1, _ATTEMPTS + 1):
            pool = self._pool = self._pool or _start()
            try:
                result = await asyncio.get_running_loop().run_in_executor(pool, call)
                failpoints.reach(f"job done: {call.func.__name__}")
                return result
            except BrokenProcessPool:
                log.warning("worker.died", job=call.func.__name__, attempt=attempt)
                if self._pool is pool:
                    self._pool = None
                pool.shutdown(wait=False)
        raise WorkerDied(
            f"the worker process died {_ATTEMPTS} times over '{call.func.__name__}': most likely "
            "the system ended it for lack of memory (see `dmesg`); free some, or set worker_threads"
        )

    def close(self) -> None:
        """End the child at once; the job it was at is done again after a restart."""
        if self._pool is not None:
            for process in list(getattr(self._pool, "_processes", {}).values()):
                process.terminate()
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._pool = None


def _start() -> ProcessPoolExecutor:
    # spawn: a fork of a process with threads and gRPC in it may hang.
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(1, mp_context=context, initializer=_prepare)


def _prepare() -> None:
    """In the child: leave Ctrl-C to the service, and end when the service is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)
