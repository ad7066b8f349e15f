"""The coordinator killed at steps of a whole study; `make failpoints` goes through all of them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from sqlalchemy import select

from coordinator import admin, failpoints, registry, schema
from coordinator.audit import verified
from coordinator.config import Home
from coordinator.store import Store
from tests.coordinator.walk import study

NAMES = ["site-1", "site-2", "site-3", "site-4"]
POINTS = [
    "after server.pem",
    "before _join",
    "after _join",
    "after open_session census 1",
    "before append_event session 1 collecting",
    "upload whole, session 1",
    "folded, session 1",
    "after end_session session 1",
    "before put_result census",
    "after append_event session 2 unmasking",
    "before put_result round 00001 model",
    "before forget_artifacts",
]


@pytest.mark.timeout(900)
@pytest.mark.parametrize("database", ["postgresql"], indirect=True)
async def test_a_study_whose_coordinator_is_killed_again_and_again_sums_everybody_once(
    tmp_path: Path, database: str
) -> None:
    outcome = await study(tmp_path, POINTS, None, database, "")
    assert outcome.error is None
    assert outcome.deaths.statuses == [-signal.SIGKILL] * len(POINTS)
    assert outcome.sums == {"census 1": (1, NAMES), "round 1": (2, NAMES), "round 2": (3, NAMES)}


@pytest.mark.slow
@pytest.mark.parametrize("place", ["before", "after"])
def test_a_command_that_is_killed_at_its_commit_can_be_given_again(
    tmp_path: Path, place: str
) -> None:
    home = tmp_path / "coordinator"
    admin.init(home, "127.0.0.1:7443")
    store = Store(Home(home).database(Home(home).config()))
    for point, wanted in (("invite", "invited"), ("approve", "approved"), ("revoke", "revoked")):
        command = ["coordinator", point, "st-marys"]
        if point == "approve":
            store.run(registry.join, "st-marys", _token(store), b"request", b"identity", "1")
        killed = _concilium(home, command, {failpoints.VARIABLE: f"{place} {point}"})
        assert killed == -signal.SIGKILL
        assert _concilium(home, command, {}) == 0
        assert store.run(registry.site, "st-marys").status == wanted
        assert store.run(verified).entries > 0
    store.close()


def _token(store: Store) -> str:
    return store.run(lambda c: str(c.execute(select(schema.sites.c.token)).scalar_one()))


def _concilium(home: Path, command: list[str], environment: dict[str, str]) -> int:
    return subprocess.run(
        [sys.executable, "-m", "concilium", *command, "--home", str(home)],
        env={**os.environ, **environment},
        capture_output=True,
        check=False,
    ).returncode
