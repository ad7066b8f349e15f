"""The worker process: no torch where it is not needed, one retry, and no orphans."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from silo.config import Resources
from silo.errors import DataError, WorkFailed
from silo.orders import CacheImages
from silo.worker import Progress, Worker, _read_progress


def cache_order(tmp_path: Path, source: Path | None = None) -> CacheImages:
    if source is None:
        source = tmp_path / "x.npz"
        np.savez(source, images=np.zeros((3, 8, 8), dtype=np.uint8))
    (tmp_path / "cache").mkdir(exist_ok=True)
    return CacheImages(source, "auto", 8, 1, tmp_path / "cache")


def child_of(worker: Worker) -> int:
    assert worker._pool is not None
    (process,) = worker._pool._processes.values()
    assert process.pid is not None
    return process.pid


async def test_errors_keep_their_kind_and_a_dead_worker_is_replaced_once(tmp_path: Path) -> None:
    worker = Worker(Resources(idle_seconds=0.2, niceness=0))
    progress = tmp_path / "progress"
    folder = await worker.run(cache_order(tmp_path), progress, lambda _: None)
    assert (folder / "images.npy").exists()
    with pytest.raises(DataError, match="does not exist"):
        await worker.run(cache_order(tmp_path, tmp_path / "no"), progress, lambda _: None)
    first = child_of(worker)
    os.kill(first, signal.SIGKILL)
    await worker.run(cache_order(tmp_path), progress, lambda _: None)
    assert child_of(worker) != first
    order = replace(cache_order(tmp_path), caches=tmp_path / "x.npz")
    with pytest.raises(WorkFailed, match="CacheImages failed: NotADirectoryError"):
        await worker.run(order, progress, lambda _: None)
    await asyncio.sleep(0.5)
    assert not worker.alive, "it ends when it has nothing to do"


def test_progress_that_is_being_written_or_missing_is_none(tmp_path: Path) -> None:
    assert _read_progress(tmp_path / "none") is None
    (tmp_path / "p").write_text("training\n3\n10")
    assert _read_progress(tmp_path / "p") == Progress("training", 3, 10)
    (tmp_path / "p").write_text("")
    assert _read_progress(tmp_path / "p") is None


def test_a_worker_ends_with_an_agent_that_is_killed(tmp_path: Path) -> None:
    script = tmp_path / "agent.py"
    script.write_text(
        textwrap.dedent("""
            import asyncio, sys, time
            from pathlib import Path
            from silo.config import Resources
            from silo.orders import CacheImages
            from silo.worker import Worker

            async def main():
                worker = Worker(Resources(niceness=0))
                here = Path(sys.argv[1])
                order = CacheImages(here / "x.npz", "auto", 8, 1, here / "cache")
                await worker.run(order, here / "progress", lambda _: None)
                print(*worker._pool._processes, flush=True)
                time.sleep(60)

            if __name__ == "__main__":
                asyncio.run(main())
        """)
    )
    cache_order(tmp_path)
    agent = subprocess.Popen(
        [sys.executable, script, tmp_path],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path.cwd())},
    )
    assert agent.stdout is not None
    child = int(agent.stdout.readline())
    agent.kill()
    agent.wait()
    for _ in range(600):
        if not _alive(child):
            return
        time.sleep(0.1)
    pytest.fail("the worker outlived its agent")


def _alive(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"
