"""What [resources] promises: hours, memory, niceness, several processes, and nothing lost by a
pause or a kill."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from silo.config import Resources
from silo.data.cache import cache_dataset
from silo.data.dataset import open_dataset
from silo.errors import WorkFailed
from silo.hours import Hours
from silo.orders import Machine, TrainLocal
from silo.worker import Progress, ProgressFile, Worker, _execute
from study.plan import load_plan
from tests.silo.studies import PLAN
from tests.silo.test_worker import cache_order, child_of

STEPS = 300
NIGHT, NOON = datetime(2026, 1, 5, 23, 0, tzinfo=UTC), datetime(2026, 1, 5, 12, 0, tzinfo=UTC)
ON_ONE_THREAD = Resources(device="cpu", threads=1, niceness=0)


# --- hours


@pytest.mark.parametrize(
    ("hours", "open_at", "closed_at"),
    [
        ("19:00-06:00", ["19:00", "23:59", "00:00", "05:59"], ["06:00", "12:00", "18:59"]),
        ("08:30-17:00", ["08:30", "16:59"], ["08:29", "17:00", "00:00"]),
        ("00:00-00:00", ["00:00", "12:00"], []),
    ],
)
def test_hours_hold_on_the_clock_of_the_wall_and_over_midnight(
    hours: str, open_at: list[str], closed_at: list[str]
) -> None:
    def at(text: str) -> bool:
        return Hours.parse(hours).open_at(datetime.fromisoformat(f"2026-01-05T{text}:00"))

    assert [at(text) for text in open_at] == [True] * len(open_at)
    assert [at(text) for text in closed_at] == [False] * len(closed_at)


def test_hours_follow_the_site_s_clock_through_the_changes_of_the_year() -> None:
    berlin = Resources(hours="19:00-06:00", time_zone="Europe/Berlin")

    def at(text: str) -> bool:
        return berlin.open_at(datetime.fromisoformat(text).replace(tzinfo=UTC))

    assert not at("2026-01-05T17:59:00")
    assert at("2026-01-05T18:00:00"), "winter: 19:00 is 18:00 UTC"
    assert at("2026-07-05T17:00:00"), "summer: 19:00 is 17:00 UTC"
    # 29 March 2026: from 02:00 to 03:00. An hour less, and it ends at 06:00 all the same.
    assert at("2026-03-29T03:59:00")
    assert not at("2026-03-29T04:00:00")
    # 25 October 2026: from 03:00 back to 02:00.
    assert at("2026-10-25T04:59:00")
    assert not at("2026-10-25T05:00:00")


@pytest.mark.parametrize(
    "wrong", [{"hours": "7pm-6am"}, {"hours": "24:00-06:00"}, {"time_zone": "CEST"}]
)
def test_hours_and_zones_that_mean_nothing_are_refused(wrong: dict[str, str]) -> None:
    with pytest.raises(ValidationError):
        Resources(**wrong)  # type: ignore[arg-type]


# --- what happens to an order


def training(folder: Path, steps: int = STEPS, **machine: Any) -> TrainLocal:
    """An order to train a tiny local model, and everything that it needs."""
    folder.mkdir(exist_ok=True)
    images = np.random.default_rng(1).integers(0, 256, (40, 8, 8), dtype=np.uint8)
    np.savez(folder / "x.npz", images=images)
    (folder / "cache").mkdir(exist_ok=True)
    cached = cache_dataset(open_dataset(folder / "x.npz", "npz", 8, 1), folder / "cache")
    plan = PLAN.replace("steps = 3", f"steps = {steps}").replace("{sha256}", "ab" * 32)
    return TrainLocal(
        machine=Machine("cpu", 1, **machine),
        plan=plan,
        images=cached.file,
        seed=5,
        weights=folder / "weights.npy",
        checkpoint=folder / "checkpoint",
    )


def here(order: TrainLocal, folder: Path) -> np.ndarray:
    """The weights that an order leaves when nothing comes in between."""
    from silo.jobs import execute

    execute(order, ProgressFile(folder / "progress-here"))
    return np.load(order.weights)


async def test_a_night_that_ends_and_a_kill_change_no_bit_of_what_is_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("silo.worker._LOOK_SECONDS", 0.02)
    monkeypatch.setattr("silo.worker._REST_SECONDS", 0.02)
    expected = here(training(tmp_path / "expected"), tmp_path)
    order, now, said = training(tmp_path / "broken"), NIGHT, []
    worker = Worker(
        ON_ONE_THREAD.model_copy(update={"hours": "19:00-06:00", "time_zone": "UTC"}), lambda: now
    )
    progress = tmp_path / "progress"
    running = asyncio.create_task(worker.run(order, progress, said.append))
    await until(progress.exists)
    now = NOON
    await until(lambda: Progress("resting until 19:00", 0, 0) in said)
    assert order.checkpoint.exists()
    assert not running.done()
    now = NIGHT
    await until(progress.exists)
    os.kill(child_of(worker), signal.SIGKILL)
    await running
    assert np.array_equal(np.load(order.weights), expected)
    assert not order.checkpoint.exists()
    worker.kill()


async def until(ready: Callable[[], bool], seconds: float = 240.0) -> None:
    async with asyncio.timeout(seconds):
        while not ready():
            await asyncio.sleep(0.01)


async def test_outside_the_hours_no_process_is_even_started(tmp_path: Path) -> None:
    said: list[Progress] = []
    worker = Worker(Resources(hours="19:00-06:00", time_zone="UTC"), lambda: NOON)
    running = asyncio.create_task(worker.run(cache_order(tmp_path), tmp_path / "p", said.append))
    await until(lambda: bool(said))
    assert not worker.alive
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)


async def test_the_worker_gives_way_and_keeps_to_its_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for library in ("OMP", "OPENBLAS"):  # which reserve memory for every thread
        monkeypatch.setenv(f"{library}_NUM_THREADS", "1")
    worker = Worker(Resources(device="cpu", threads=1, niceness=7, memory_mib=256))
    await worker.run(cache_order(tmp_path), tmp_path / "progress", lambda _: None)
    ours = os.getpriority(os.PRIO_PROCESS, os.getpid())
    assert os.getpriority(os.PRIO_PROCESS, child_of(worker)) == min(ours + 7, 19)
    order = training(tmp_path / "large", steps=1)
    order = replace(
        order, plan=order.plan.replace("[8]", "[512]").replace("size = 8\n", "size = 4096\n")
    )
    with pytest.raises(WorkFailed, match="memory_mib"):
        await worker.run(order, tmp_path / "progress", lambda _: None)
    worker.kill()


def test_under_a_limit_any_failure_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Libraries swallow a MemoryError and fail later with an error that names something else."""

    def fail(order: object, progress: object) -> None:
        raise ValueError("@jit functions should be defined in a Python file")

    monkeypatch.setattr("silo.jobs.execute", fail)
    monkeypatch.setattr("resource.getrlimit", lambda _: (256 << 20, 256 << 20))
    with pytest.raises(WorkFailed, match=r"Python file; it may allocate 256 MiB \(memory_mib"):
        _execute(cache_order(tmp_path), tmp_path / "progress")


@pytest.mark.slow
def test_two_processes_take_the_step_of_one(tmp_path: Path) -> None:
    """One step: rounding differs with the split of a batch, and AdamW amplifies it from then on."""
    one, two = training(tmp_path / "one", steps=1), training(tmp_path / "two", 1, processes=2)
    alone, together = here(one, tmp_path), here(two, tmp_path)
    moved = np.linalg.norm(alone - first_weights(one))
    assert moved > 0
    assert np.linalg.norm(together - alone) < 0.05 * moved
    left = {path.name for path in (tmp_path / "two").iterdir()}
    assert left == {"x.npz", "cache", "weights.npy"}, "nothing stays behind"


def first_weights(order: TrainLocal) -> np.ndarray:
    from diffusion.model import to_vector
    from silo.jobs.training import first_model

    return to_vector(first_model(load_plan(order.plan)))


@pytest.mark.slow
async def test_a_dead_training_process_fails_the_order_and_leaves_no_other(tmp_path: Path) -> None:
    """The batch of 8 cannot be shared by 3: the first sentence of what they raise is lost in
    standard error, the order's own error says where to look."""
    worker = Worker(ON_ONE_THREAD)
    order = training(tmp_path / "three", processes=3)
    with pytest.raises(WorkFailed, match="one of 3 training processes died"):
        await worker.run(order, tmp_path / "progress", lambda _: None)
    children = Path(f"/proc/{child_of(worker)}/task/{child_of(worker)}/children").read_text()
    assert children == ""
    worker.kill()
