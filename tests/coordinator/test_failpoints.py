"""The coordinator killed at steps of a whole study; `make failpoints` goes through all of them."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

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


@pytest.mark.parametrize("database", ["postgresql"], indirect=True)
async def test_a_study_whose_coordinator_is_killed_again_and_again_sums_everybody_once(
    tmp_path: Path, database: str
) -> None:
    outcome = await study(tmp_path, POINTS, None, database, "")
    assert outcome.left == []
    assert outcome.deaths == [-signal.SIGKILL] * len(POINTS)
    assert outcome.sums == {"census 1": (1, NAMES), "round 1": (2, NAMES), "round 2": (3, NAMES)}
