"""Rosters change while a study runs: leaving, joining, and a coordinator that dies in between."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest

from coordinator import admin
from coordinator.admin import AdminError
from protos.v1 import coordination_pb2 as pb
from protos.v1.coordination_pb2_grpc import CoordinationStub
from tests.coordinator.agent import COUNTS, TestSilo, Vanish
from tests.coordinator.federation import Federation


async def leave(federation: Federation, silo: TestSilo, study: str) -> None:
    """What the agent of a site does last."""
    await silo.kill()
    async with silo.credentials.channel(federation.address) as channel:
        request = pb.LeaveStudyRequest(study=study, reason="the ward is being rebuilt")
        await CoordinationStub(channel).LeaveStudy(request)


def hold_at(quantity: str, gate: asyncio.Event):  # type: ignore[no-untyped-def]
    """A hook that waits at the opening of a quantity."""

    async def hook(silo: TestSilo, where: str) -> None:
        taking = next(iter(silo.studies.values()), None)
        now = str(taking.context.quantity) if taking and taking.context else ""
        if (where, now) == ("before ADVERTISE", quantity):
            await gate.wait()

    return hook


async def test_a_site_leaves_another_joins_and_the_rounds_go_on_from_the_model_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(COUNTS, "site-5", 70)
    async with Federation(tmp_path) as federation:
        silos = await federation.join_four()
        gate = asyncio.Event()
        for silo in silos:
            silo.looks_for_offers = True
            silo.hook = hold_at("round 3", gate)
            silo.start()
        study = admin.start_study(federation.home, federation.plan(rounds=4))
        await federation.until(lambda: federation.study(study).quantity == "round 3", 150)

        # Leaving needs nobody's consent, and the session under way goes on without the leaver.
        await leave(federation, silos[1], study)
        answers = {silo.name: silo.answer for silo in federation.study(study).silos}
        assert answers["site-2"] == "left"
        await federation.join("site-5")
        newcomer = federation.silos["site-5"]
        newcomer.looks_for_offers = True
        made = admin.change_roster(federation.home, study, add=["site-5"])
        assert [m.name for m in made.members] == ["site-1", "site-3", "site-4", "site-5"]
        assert (made.epoch, made.threshold) == (2, 3)
        gate.set()
        names = ["site-1", "site-3", "site-4"]
        await federation.until(lambda: federation.result(study, "round 00003 sum"), 150)
        assert federation.exact(study, "round 00003 sum", "round 3") == names

        # The coordinator dies after the epoch was entered, before the newcomer has answered.
        await federation.until(lambda: federation.study(study).state == "offered", 150)
        await federation.until(lambda: federation.study(study).awaited == ("site-5",), 30)
        await federation.restart()
        newcomer.start()
        await federation.until(lambda: federation.study(study).state == "finished", 150)

        names = ["site-1", "site-3", "site-4", "site-5"]
        assert federation.exact(study, "census of epoch 2", "census 2") == names
        assert federation.result(study, "census")["count"] == 100 + 40 + 250 + 10
        assert federation.result(study, "census of epoch 2")["count"] == 100 + 250 + 10 + 70
        assert federation.exact(study, "round 00004 sum", "round 4") == names
        third = federation.result(study, "round 00003 model")["model"]
        taking = newcomer.studies[study]
        assert taking.context is not None
        assert taking.context.model.hex() == third
        assert (taking.context.epoch, taking.party.roster.epoch) == (2, 2)
        folder = federation.study(study).folder
        report = json.loads((folder / "report.json").read_text())
        assert [r["epoch"] for r in report["rounds"]] == [1, 1, 1, 2]
        assert [silo.errors for silo in federation.silos.values()] == [[]] * 5


@pytest.mark.slow
async def test_who_was_taken_out_is_told_once_its_sessions_are_settled(tmp_path: Path) -> None:
    async with Federation(tmp_path) as federation:
        silos = await federation.join_four()
        taken_out, gate = silos[3], asyncio.Event()

        async def vanish(silo: TestSilo, where: str) -> None:
            taking = next(iter(silo.studies.values()), None)
            quantity = str(taking.context.quantity) if taking and taking.context else ""
            if (where, quantity) == ("after CONFIRM", "round 1"):
                raise Vanish

        for silo in silos[:3]:
            silo.hook = hold_at("round 2", gate)
        taken_out.hook = vanish
        for silo in silos:
            silo.looks_for_offers = True
            silo.start()
        study = admin.start_study(federation.home, federation.plan(rounds=3))
        await federation.until(lambda: federation.study(study).quantity == "round 2", 150)
        assert not taken_out.alive
        admin.change_roster(federation.home, study, remove=["site-4"])
        gate.set()
        await federation.until(lambda: federation.study(study).state == "finished", 150)
        # The one in doubt comes back under its old roster: first the certificate, then the end.
        assert taken_out.studies[study].state.history.in_doubt
        taken_out.start()
        await federation.until(lambda: study in taken_out.ended)
        assert not taken_out.studies[study].state.history.in_doubt
        assert taken_out.ended[study].reason == pb.StudyEnded.REMOVED
        assert taken_out.ended[study].model == b""
        assert taken_out.errors == []


@pytest.mark.slow
async def test_an_epoch_that_too_few_accept_waits_says_for_whom_and_another_can_follow(
    tmp_path: Path,
) -> None:
    async with Federation(tmp_path) as federation:
        silos = await federation.join_four()
        for silo in silos:
            silo.start()  # takes no notice of offers while the study runs
        plan = federation.plan(rounds=400)
        study = admin.start_study(federation.home, plan)
        await federation.until(lambda: federation.result(study, "round 00001 model"), 150)
        with pytest.raises(AdminError, match="that is the roster"):
            admin.change_roster(federation.home, study)
        with pytest.raises(AdminError, match="'site-9' is not in the roster"):
            admin.change_roster(federation.home, study, remove=["site-9"])
        admin.change_roster(federation.home, study, remove=["site-4"])
        await federation.until(lambda: federation.study(study).state == "offered", 150)
        assert federation.study(study).awaited == ("site-1", "site-2", "site-3")
        assert admin.close_offer(federation.home, study) == ["site-1", "site-2", "site-3"]
        error = await federation.until(lambda: federation.study(study).error, 30)
        assert "0 of 3 sites accepted roster 2, the threshold is 3" in error
        made = admin.change_roster(federation.home, study, add=["site-4"])
        assert made.epoch == 3
        for silo in silos:
            silo.looks_for_offers = True
        await federation.until(lambda: federation.study(study).state == "running", 150)
        await federation.until(lambda: federation.result(study, "census of epoch 3"), 150)
        admin.stop_study(federation.home, study)
        await federation.until(lambda: federation.study(study).state == "stopped", 150)
        folder = federation.study(study).folder
        assert (folder / "model" / "unet" / "config.json").exists()


async def test_an_offer_that_nobody_answers_in_time_ends_with_who_did_not(tmp_path: Path) -> None:
    async with Federation(tmp_path) as federation:
        silos = await federation.join_four()
        silos[0].start()
        plan = federation.plan()
        text = plan.read_text().replace("[deadlines]\n", "[deadlines]\noffer = 10.0\n")
        plan.write_text(text)
        study = admin.start_study(federation.home, plan)
        await federation.until(lambda: federation.study(study).state == "failed")
        error = federation.study(study).error or ""
        assert "1 of 4 sites accepted roster 1, the threshold is 3" in error
        assert "no answer from site-2, site-3, site-4" in error
