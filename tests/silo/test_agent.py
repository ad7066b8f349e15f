"""The agent as a process: small, deaf to nothing but signals, back after SIGKILL at any step."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from coordinator import admin as centre_admin
from coordinator import results
from coordinator.admin import StudyStatus
from coordinator.config import Home
from coordinator.store import Store
from secagg.ledger import Masked
from silo import admin
from silo.ledger import LedgerFile
from tests.silo.centre import AgentProcess, Centre, enrol, make_site, stop_all, study_of, until_exit
from tests.silo.studies import FEDAVG

Sites = dict[str, AgentProcess]
NAMES = ("east", "north", "south", "west")

_IDLE = """
import asyncio, sys
from pathlib import Path
from silo.admin import status
from silo.agent import Agent, run
async def main():
    running = asyncio.create_task(run(Path(sys.argv[1])))
    while not status(Path(sys.argv[1])).get("last_contact"):
        assert not running.done()
        await asyncio.sleep(0.1)
    await asyncio.sleep(1.0)
    heavy = [m for m in ("torch", "diffusers", "triton", "scipy") if m in sys.modules]
    print(heavy, running.done(), flush=True)
    running.cancel()
asyncio.run(main())
"""


@pytest.fixture
async def centre(tmp_path: Path) -> AsyncIterator[Centre]:
    made = Centre(tmp_path / "centre")
    await made.start()
    yield made
    await made.stop()


async def test_a_waiting_agent_holds_no_torch(centre: Centre, tmp_path: Path) -> None:
    home = make_site(tmp_path, "north")
    await enrol(centre, home, "north")
    done = await asyncio.to_thread(
        subprocess.run,
        [sys.executable, "-c", _IDLE, str(home)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path.cwd())},
        check=False,
    )
    assert "[] False" in done.stdout.splitlines(), done.stderr
    shown = admin.status(home)
    assert shown["trouble"] is None
    assert shown["last_contact"] is not None


async def until(centre: Centre, ready: Any, seconds: float = 120.0) -> StudyStatus:
    """The study's status once `ready(status)` holds."""
    end = time.monotonic() + seconds
    while True:
        (study,) = (await asyncio.to_thread(centre_admin.status, centre.home)).studies
        if ready(study):
            return study
        assert time.monotonic() < end, study
        assert study.state not in ("failed", "stopped"), study.error
        await asyncio.sleep(0.1)


async def start_sites(centre: Centre, tmp_path: Path, points: dict[str, str]) -> Sites:
    homes = {name: make_site(tmp_path, name, 20 + i) for i, name in enumerate(NAMES)}
    for name, home in homes.items():
        await enrol(centre, home, name)
    (tmp_path / "plan.toml").write_text(FEDAVG)
    centre_admin.start_study(centre.home, tmp_path / "plan.toml")
    return {name: AgentProcess(home, points.get(name, "")) for name, home in homes.items()}


async def killed_and_started_again(sites: Sites, name: str) -> None:
    assert await until_exit(sites[name], 120) == -signal.SIGKILL
    sites[name] = AgentProcess(sites[name].home)


@pytest.mark.parametrize(
    ("point", "count"),
    [
        pytest.param("after-advertise", 3, marks=pytest.mark.slow),
        ("after-share", 3),
        pytest.param("before-mask", 3, marks=pytest.mark.slow),
        ("after-upload", 4),
    ],
)
async def test_a_silo_killed_in_a_sum_is_dropped_or_summed(
    centre: Centre, tmp_path: Path, point: str, count: int
) -> None:
    sites = await start_sites(centre, tmp_path, {"north": f"{point}:census=1"})
    try:
        await killed_and_started_again(sites, "north")
        await until(centre, lambda s: s.stage == "first model")
        results = centre_admin_results(centre)
        assert len(results["census"]["silos"]) == count
        assert ("north" in results["census"]["silos"]) == (count == 4)
        await until(centre, lambda _: settled_sum(sites["north"].home))
        assert [agent.stop() for agent in sites.values()] == [0, 0, 0, 0]
    finally:
        stop_all(sites.values())
    check_ledger(sites["north"].home, masked=count == 4)


def settled_sum(home: Path) -> bool:
    return any(study_of(home).outcomes(1).iterdir())


def centre_admin_results(centre: Centre) -> Any:
    """What the runner of the only study has stored."""
    (study,) = centre_admin.list_studies(centre.home)
    place = Home(centre.home)
    store = Store(place.database(place.config()))
    try:
        return store.run(results.all_of, study.id)
    finally:
        store.close()


@pytest.mark.slow
async def test_a_study_goes_on_when_silos_and_coordinator_are_killed(
    centre: Centre, tmp_path: Path
) -> None:
    """Round 1: one dies after it shared its keys. Round 2: another dies after its upload. Then
    the coordinator restarts. All come back, and each fetches the final model."""
    points = {"north": "after-share:round=1", "south": "after-upload:round=2"}
    sites = await start_sites(centre, tmp_path, points)
    try:
        await killed_and_started_again(sites, "north")
        first = await until(centre, lambda s: s.round >= 1)
        assert first.survivors == ("east", "south", "west")
        await killed_and_started_again(sites, "south")
        second = await until(centre, lambda s: s.round >= 2)
        assert "south" in second.survivors, "its upload was committed"
        await centre.stop()
        await asyncio.sleep(1.0)
        await centre.start()
        last = await until(centre, lambda s: s.state == "finished")
        assert last.round == 3
        await all_published({name: site.home for name, site in sites.items()})
        assert [agent.stop() for agent in sites.values()] == [0, 0, 0, 0]
    finally:
        stop_all(sites.values())
    for site in sites.values():
        check_ledger(site.home, masked=True)
        assert np.isfinite(np.load(study_of(site.home).residual)).all()


async def all_published(homes: dict[str, Path]) -> None:
    async with asyncio.timeout(60):
        while not all(study_of(home).ended.exists() for home in homes.values()):
            await asyncio.sleep(0.2)
    for home in homes.values():
        assert (study_of(home).model / "model_index.json").exists()
        assert "fingerprint" in admin.roster(home)


def check_ledger(home: Path, *, masked: bool) -> None:
    """At most one masked vector per session, and none left over."""
    study = study_of(home)
    entries = LedgerFile(study.ledger, study.name).entries()
    found = [e.ctx for e in entries if isinstance(e, Masked)]
    assert len(found) == len(set(found))
    assert bool(found) == masked
    assert not list(study.masked.iterdir())
