"""Two studies on one coordinator: neither stops the other."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest

from coordinator import admin
from tests.coordinator.agent import TestSilo
from tests.coordinator.federation import Federation

FIRST, SECOND = ["site-1", "site-2", "site-3"], ["site-4", "site-5", "site-6"]
LONG_CORRECTION = """
[warm_up]
steps = 1

[auxiliary]
images = 40

[strategy]
kind = "fedddpm"
correction_steps = 1000000
"""


async def second_runs_to_its_end(federation: Federation, first: str) -> None:
    """Start the second study now that the first is stuck; its sums are exact, and it finishes."""
    stage = federation.study(first).stage
    second = admin.start_study(federation.home, federation.plan(rounds=2), SECOND)
    await federation.until(lambda: federation.study(second).state == "finished", 90)
    for key, quantity in (("census", "census 1"), ("round 00002 sum", "round 2")):
        assert federation.exact(second, key, quantity) == SECOND
    report = json.loads((federation.study(second).folder / "report.json").read_text())
    assert [r["survivors"] for r in report["rounds"]] == [SECOND, SECOND]
    assert federation.study(first).state == "running"
    assert federation.study(first).stage == stage


async def test_a_study_that_waits_for_its_silos_holds_up_no_other(tmp_path: Path) -> None:
    async with Federation(tmp_path, absent_after=60.0) as federation:
        await federation.join(*FIRST, *SECOND)

        async def stall(_silo: TestSilo, where: str) -> None:
            if where == "open":
                await asyncio.Event().wait()

        federation.silos["site-3"].hook = stall
        for silo in federation.silos.values():
            silo.start()
        first = admin.start_study(federation.home, federation.plan(deadline=600.0), FIRST)
        await federation.until(lambda: federation.study(first).awaited == ("site-3",))
        await second_runs_to_its_end(federation, first)


@pytest.mark.slow
async def test_a_study_in_a_long_correction_holds_up_no_other(tmp_path: Path) -> None:
    async with Federation(tmp_path, absent_after=60.0) as federation:
        await federation.join(*FIRST, *SECOND)
        for silo in federation.silos.values():
            silo.start()
        plan = federation.plan(deadline=600.0, more=LONG_CORRECTION)
        first = admin.start_study(federation.home, plan, FIRST)
        await federation.until(lambda: "correction" in federation.study(first).stage, 90)
        await second_runs_to_its_end(federation, first)
