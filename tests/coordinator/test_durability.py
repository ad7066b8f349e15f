"""What a session survives: silos that go, a coordinator that restarts at each of its steps."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from coordinator import admin
from tests.coordinator.federation import Federation, TestSilo, Vanish, nothing

STEPS = ("ADVERTISE", "SHARE", "MASKED_INPUT", "CONFIRM", "UNMASK")


async def test_two_silos_gone_is_an_abort_that_says_who_and_what_to_do_and_then_it_goes_on(
    tmp_path: Path,
) -> None:
    async with Federation(tmp_path) as federation:
        silos = await federation.join_four()

        async def vanish(_silo: TestSilo, where: str) -> None:
            if where == "after SHARE":
                raise Vanish

        silos[0].hook = silos[3].hook = vanish
        for silo in silos:
            silo.start()
        study = admin.start_study(federation.home, federation.plan(deadline=1.5))
        status = await federation.until(
            lambda: (found := federation.study(study)).phase == "aborting" and found.error and found
        )
        for words in (
            "2 of 4 silos delivered their masked input",
            "the threshold is 3",
            "missing: site-1, site-4",
            "Bring a missing silo's agent back",
        ):
            assert words in status.error

        for silo in (silos[0], silos[3]):
            await silo.kill()
            silo.hook = nothing
            silo.start()
        await federation.until(lambda: federation.result(study, "census"))
        assert federation.exact(study, "census", "census 1") == [silo.name for silo in silos]
        assert federation.result(study, "census")["session"]["number"] == 2
        assert federation.study(study).error is None


async def test_too_few_adverts_abandon_the_session_and_it_waits_for_silos_to_return(
    tmp_path: Path,
) -> None:
    async with Federation(tmp_path) as federation:
        silos = await federation.join_four()

        async def vanish(_silo: TestSilo, where: str) -> None:
            if where == "open":
                raise Vanish

        silos[1].hook = silos[2].hook = vanish
        for silo in silos:
            silo.start()
        study = admin.start_study(federation.home, federation.plan(deadline=1.5))
        status = await federation.until(lambda: (s := federation.study(study)).error and s)
        assert "2 of 4 silos advertised" in status.error
        assert "missing: site-2, site-3" in status.error
        for silo in (silos[1], silos[2]):
            await silo.kill()
            silo.hook = nothing
            silo.start()
        await federation.until(lambda: federation.result(study, "census"))
        assert len(federation.exact(study, "census", "census 1")) == 4


@pytest.mark.parametrize("place", ["before", "after"])
async def test_a_coordinator_restarted_in_each_step_ends_with_the_same_survivors_and_the_exact_sum(
    tmp_path: Path, place: str
) -> None:
    """Stopped when the second silo is about to send, or has just sent, each step's message."""
    async with Federation(tmp_path) as federation:
        silos = await federation.join_four()
        seen: dict[str, int] = {}
        restarted: list[str] = []
        lock = asyncio.Lock()

        async def restart(_silo: TestSilo, where: str) -> None:
            seen[where] = seen.get(where, 0) + 1
            if where.startswith(f"{place} ") and where[len(place) + 1 :] in STEPS:
                async with lock:
                    if seen[where] == 2 and where not in restarted:
                        restarted.append(where)
                        await federation.restart()

        for silo in silos:
            silo.hook = restart
            silo.start()
        study = admin.start_study(federation.home, federation.plan())
        await federation.until(lambda: federation.result(study, "census"), 60)
        assert len(federation.exact(study, "census", "census 1")) == 4
        assert federation.result(study, "census")["session"]["number"] == 1
        assert restarted == [f"{place} {step}" for step in STEPS]


async def test_a_silo_that_dropped_before_its_upload_stays_out_after_a_restart(
    tmp_path: Path,
) -> None:
    async with Federation(tmp_path) as federation:
        silos = await federation.join_four()

        async def vanish(_silo: TestSilo, where: str) -> None:
            if where == "before upload":
                raise Vanish

        async def restart(silo: TestSilo, where: str) -> None:
            if where == "before CONFIRM":
                silo.hook = nothing
                await federation.restart()

        silos[2].hook, silos[0].hook = vanish, restart
        for silo in silos:
            silo.start()
        study = admin.start_study(federation.home, federation.plan(deadline=2.0))
        await federation.until(lambda: federation.result(study, "census"), 60)
        assert federation.exact(study, "census", "census 1") == ["site-1", "site-2", "site-4"]
