"""What a session survives: silos that go, a coordinator that restarts at each of its steps."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from coordinator import admin
from protos.v1 import coordination_pb2 as pb
from protos.v1.coordination_pb2_grpc import CoordinationStub
from secagg import silo as secagg_silo
from tests.coordinator.agent import TestSilo, Vanish, nothing
from tests.coordinator.federation import Federation, shortened

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
        plan = shortened(federation.plan(), "input", 6)
        study = admin.start_study(federation.home, plan)
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
        plan = shortened(federation.plan(), "advertise", 6)
        study = admin.start_study(federation.home, plan)
        status = await federation.until(lambda: (s := federation.study(study)).error and s)
        assert "2 of 4 silos advertised" in status.error
        assert "missing: site-2, site-3" in status.error
        for silo in (silos[1], silos[2]):
            await silo.kill()
        for silo in (silos[1], silos[2]):
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
        plan = shortened(federation.plan(), "input", 4)
        study = admin.start_study(federation.home, plan)
        await federation.until(lambda: federation.result(study, "census"), 60)
        assert federation.exact(study, "census", "census 1") == ["site-1", "site-2", "site-4"]


async def test_a_dealer_that_is_complained_about_sits_out_the_next_session(tmp_path: Path) -> None:
    async with Federation(tmp_path) as federation:
        silos = await federation.join_four()

        async def complain(silo: TestSilo, where: str) -> None:
            if where == "headers" and silo.hook is complain:
                silo.hook = nothing
                study, taking = next(iter(silo.studies.items()))
                assert taking.context is not None
                sent = secagg_silo.complain(taking.party, taking.context.digest, accused=3)
                request = pb.SubmitRequest(study=study, session=1, signed=sent.message.encode())
                async with silo.credentials.channel(federation.address) as channel:
                    await CoordinationStub(channel).Submit(request)

        silos[1].hook = complain
        for silo in silos:
            silo.start()
        study = admin.start_study(federation.home, federation.plan())
        await federation.until(lambda: federation.result(study, "census"))
        assert federation.exact(study, "census", "census 1") == ["site-1", "site-2", "site-4"]
        assert federation.result(study, "census")["session"]["number"] == 2


async def test_a_paused_study_opens_no_session_until_it_goes_on(tmp_path: Path) -> None:
    async with Federation(tmp_path) as federation:
        silos = await federation.join_four()
        study = admin.start_study(federation.home, federation.plan())
        admin.pause_study(federation.home, study)
        for silo in silos:
            silo.start()
        await federation.until(
            lambda: {s.answer for s in federation.study(study).silos} == {"accepted"}
        )
        await asyncio.sleep(1.0)
        assert federation.study(study).quantity == ""
        admin.resume_study(federation.home, study)
        await federation.until(lambda: federation.result(study, "census"))
