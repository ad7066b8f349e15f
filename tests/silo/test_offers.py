"""A person at the institution: reads what is offered, compares, decides; the agent acts on it."""

from __future__ import annotations

import asyncio
import io
import re
from collections.abc import AsyncIterator, Callable
from datetime import datetime, timedelta
from pathlib import Path

import pytest
from rich.console import Console

from concilium.status import coordinator_page
from coordinator import admin as centre_admin
from coordinator import records
from coordinator.config import Home
from coordinator.store import Store
from silo import admin
from silo.agent import run
from silo.errors import LedgerError, SiloError
from silo.home import SiloHome
from silo.ledger import LedgerFile
from silo.offers import pinned_terms
from tests.silo.centre import Centre, enrol, make_site, study_of
from tests.silo.studies import FEDAVG


@pytest.fixture
async def centre(tmp_path: Path) -> AsyncIterator[Centre]:
    made = Centre(tmp_path / "centre")
    await made.start()
    yield made
    await made.stop()


def edit(home: Path, old: str, new: str) -> None:
    config = home / "site.toml"
    text = config.read_text()
    assert old in text
    config.write_text(text.replace(old, new))


async def until(ready: Callable[[], bool]) -> None:
    async with asyncio.timeout(120):
        while not ready():
            await asyncio.sleep(0.1)


def answers(centre: Centre) -> dict[str, str]:
    (study,) = centre_admin.status(centre.home).studies
    return {silo.name: silo.answer for silo in study.silos}


def rules(centre: Centre) -> dict[str, str]:
    """Why sites declined, as the study centre has it."""
    (study,) = centre_admin.list_studies(centre.home)
    place = Home(centre.home)
    store = Store(place.database(place.config()))
    try:
        said = store.run(records.answers_of, study.id, 1)
    finally:
        store.close()
    return {site: answer.rule for site, answer in said.items()}


def shown(centre: Centre) -> str:
    """What `concilium coordinator status` prints."""
    console = Console(width=400, file=io.StringIO(), record=True)
    console.print(coordinator_page(centre_admin.status(centre.home), 0.0))
    return console.export_text()


def state(home: Path) -> str:
    studies = admin.status(home)["studies"].values()
    return next((str(study.get("state")) for study in studies), "")


async def test_an_offer_waits_for_a_person_and_the_policy_declines_by_itself(
    centre: Centre, tmp_path: Path
) -> None:
    homes = {name: make_site(tmp_path, name) for name in ("east", "north", "south")}
    for name, home in homes.items():
        await enrol(centre, home, name)
        edit(home, "automatic = true", "automatic = false")
    edit(homes["south"], "largest_rounds = 1000", "largest_rounds = 2")
    (tmp_path / "plan.toml").write_text(FEDAVG)
    study = centre_admin.start_study(centre.home, tmp_path / "plan.toml")
    agents = [asyncio.create_task(run(home)) for home in homes.values()]
    try:
        await until(lambda: state(homes["north"]) == state(homes["east"]) == "waits for approval")
        await until(lambda: answers(centre)["south"] == "declined by site policy")
        said = "declined by site policy: largest_rounds: 3 rounds, at most 2"
        await until(lambda: state(homes["south"]) == said)
        assert rules(centre)["south"] == said, "and the study centre reads it"
        page = shown(centre)
        assert re.search(r"south +declined by site policy .*largest_rounds: 3 rounds, at", page)
        text = admin.roster(homes["north"])
        assert "waits for approval" in text
        assert admin.approve(homes["north"], study).roster.fingerprint in text
        assert "other studies" not in text
        admin.decline(homes["east"], study, "the ethics committee meets in May")
        expected = {"east": "declined", "north": "accepted", "south": "declined by site policy"}
        await until(lambda: answers(centre) == expected)
        said = "east: declined by a person: the ethics committee meets in May"
        await until(lambda: said in shown(centre))  # the study fails after the answers are kept
        assert "(accepted)" in admin.roster(homes["north"])
        assert pinned_terms(study_of(homes["south"])) is None
    finally:
        for agent in agents:
            agent.cancel()
        await asyncio.gather(*agents, return_exceptions=True)
    assert admin.status(homes["north"])["running"] is False


async def test_a_site_outside_its_hours_says_that_it_rests(centre: Centre, tmp_path: Path) -> None:
    homes = {name: make_site(tmp_path, name) for name in ("east", "north", "south")}
    for name, home in homes.items():
        await enrol(centre, home, name)
    later = datetime.now() + timedelta(hours=2)
    hours = f"{later:%H:%M}-{later + timedelta(hours=1):%H:%M}"
    edit(homes["north"], "[resources]\n", f'[resources]\nhours = "{hours}"\n')
    (tmp_path / "plan.toml").write_text(FEDAVG)
    centre_admin.start_study(centre.home, tmp_path / "plan.toml")
    agents = [asyncio.create_task(run(home)) for home in homes.values()]

    def activity() -> str:
        (study,) = centre_admin.status(centre.home).studies
        return next(silo.activity for silo in study.silos if silo.name == "north")

    try:
        await until(lambda: activity() == f"resting until {later:%H:%M}")
        assert admin.status(homes["north"])["running"], "it rests, and is not gone"
    finally:
        for agent in agents:
            agent.cancel()
        await asyncio.gather(*agents, return_exceptions=True)


def test_deciding_about_what_was_not_offered_says_so(tmp_path: Path) -> None:
    home = make_site(tmp_path, "north")
    with pytest.raises(SiloError, match="no study 'x' was offered to this site"):
        admin.approve(home, "x")
    assert "no study was offered" in admin.roster(home)
    SiloHome(home).study("x")
    with pytest.raises(SiloError, match="has not been offered yet"):
        admin.approve(home, "x")


def test_a_session_in_doubt_is_closed_by_hand(tmp_path: Path) -> None:
    from secagg.ledger import History, Masked, Opened
    from tests.secagg.world import make_context, make_roster

    home = make_site(tmp_path, "north")
    study = SiloHome(home).study("trial")
    context = make_context(make_roster(4)[0])
    ledger = LedgerFile(study.ledger, "trial")
    ledger.append(Opened(context))
    ledger.append(Masked(context.digest, bytes(32)))
    with pytest.raises(LedgerError, match="held by another agent"):
        admin.settle_doubt(home, "trial")
    ledger.close()
    assert admin.settle_doubt(home, "trial") == ["session 1 (round 1)"]
    assert admin.settle_doubt(home, "trial") == []
    again = LedgerFile(study.ledger, "trial")
    assert History.of(again.entries()).in_doubt == ()


def test_check_reads_everything_and_leaves_a_contact_sheet(tmp_path: Path) -> None:
    home = make_site(tmp_path, "north", images=30)
    found = admin.check(home, image_size=8)
    assert (found.data.count, found.shape) == (30, (1, 8, 8))
    assert found.sheet.read_bytes().startswith(b"\x89PNG")
    assert admin.check(home).shape == (1, 32, 32)
