"""Joining and renewing with a real coordinator; what a person reads when it does not work."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from concilium.demo.federation import free_port
from coordinator import admin as centre_admin
from coordinator.authority import Authority
from silo import admin
from silo.client import Client
from silo.enrolment import renew, way_of
from silo.errors import EnrolmentError, RefusedByCoordinator
from silo.home import SiloHome
from silo.identity import load_enrolment, load_or_make_identity
from tests.silo.centre import Centre, enrol, make_site


@pytest.fixture
async def centre(tmp_path: Path) -> AsyncIterator[Centre]:
    made = Centre(tmp_path / "centre")
    await made.start()
    yield made
    await made.stop()


async def refused(home: Path, token: str) -> str:
    with pytest.raises(EnrolmentError) as error:
        await admin.join(home, token, lambda _: None)
    return str(error.value)


async def test_both_sides_read_the_same_fingerprint_and_the_certificate_works(
    centre: Centre, tmp_path: Path
) -> None:
    home = make_site(tmp_path, "north")
    shown: list[str] = []
    token = centre_admin.invite(centre.home, "north")
    joining = asyncio.create_task(admin.join(home, token, shown.append))
    seen = await centre.approve("north")
    enrolment = await joining
    assert shown == [seen]
    identity = load_or_make_identity(SiloHome(home))
    client = Client(way_of(enrolment, identity), lambda _: None)
    assert (await client.next_task("", 0, 0)).WhichOneof("task") == "idle"
    # A fresh certificate: new calls use it while the old channel drains.
    waiting = asyncio.create_task(client.next_task("", 0, 1))
    await asyncio.sleep(0.2)
    fresh = await renew(SiloHome(home), identity, client)
    assert fresh.certificate_pem != enrolment.certificate_pem
    assert load_enrolment(SiloHome(home)) == fresh
    assert (await client.next_task("", 0, 0)).WhichOneof("task") == "idle"
    assert (await waiting).WhichOneof("task") == "idle"
    centre_admin.revoke(centre.home, "north")

    async def go_on() -> None:
        while True:  # the service looks twice a second
            await client.next_task("", 0, 0)
            await asyncio.sleep(0.1)

    with pytest.raises(RefusedByCoordinator, match="revoked"):
        await asyncio.wait_for(go_on(), 20)
    await client.close()


async def test_join_goes_on_after_it_was_interrupted(centre: Centre, tmp_path: Path) -> None:
    home = make_site(tmp_path, "north")
    token = centre_admin.invite(centre.home, "north")
    shown: list[str] = []
    first = asyncio.create_task(admin.join(home, token, shown.append))
    while not shown:
        await asyncio.sleep(0.05)
    first.cancel()
    await asyncio.gather(first, return_exceptions=True)
    again = asyncio.create_task(admin.join(home, token, shown.append))
    await centre.approve("north")
    await again
    assert len(set(shown)) == 1


async def test_tokens_that_cannot_be_used_say_why(centre: Centre, tmp_path: Path) -> None:
    home = make_site(tmp_path, "north")
    token = centre_admin.invite(centre.home, "north")
    assert "a token starts with" in await refused(home, "hello")
    assert "damaged" in await refused(home, token[:-9])
    other = centre_admin.invite(centre.home, "south")
    assert "is for 'south', this site is 'north'" in await refused(home, other)
    expired = centre_admin.invite(centre.home, "north", valid_hours=1e-7)
    await asyncio.sleep(1.0)
    assert "expired" in await refused(home, expired)
    newer = centre_admin.invite(centre.home, "north")
    assert "replaced by a later one" in await refused(home, token)
    await enrol_with(centre, home, newer)
    thief = make_site(tmp_path / "thief", "north")
    assert "does not take this invitation" in await refused(thief, newer)


async def enrol_with(centre: Centre, home: Path, token: str) -> None:
    joining = asyncio.create_task(admin.join(home, token, lambda _: None))
    await centre.approve("north")
    await joining


async def test_an_address_that_does_not_answer_is_told_from_one_that_is_not_trusted(
    centre: Centre, tmp_path: Path
) -> None:
    home = make_site(tmp_path, "north")
    Authority.create(tmp_path / "other")
    other = Authority.load(tmp_path / "other")
    forged = other.invitation("north", "ab" * 16, centre.address, 1.0).encode()
    assert "another authority" in await refused(home, forged)
    nowhere = f"127.0.0.1:{free_port()}"
    lost = other.invitation("north", "ab" * 16, nowhere, 1.0).encode()
    assert f"{nowhere} cannot be reached" in await refused(home, lost)


async def test_an_agent_that_has_not_joined_says_what_to_do(tmp_path: Path) -> None:
    from silo.agent import run

    home = make_site(tmp_path, "north")
    with pytest.raises(EnrolmentError, match="concilium silo join"):
        await run(home)


async def test_a_second_agent_on_the_same_home_is_refused(centre: Centre, tmp_path: Path) -> None:
    from silo.agent import run
    from silo.files import InUse

    home = make_site(tmp_path, "north")
    await enrol(centre, home, "north")
    running = asyncio.create_task(run(home))
    await asyncio.sleep(0.3)
    with pytest.raises(InUse, match="held by another agent"):
        await run(home)
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)


async def test_a_running_agent_renews_at_two_thirds_and_no_call_is_dropped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from silo import agent

    monkeypatch.setattr(agent, "_WAIT_SECONDS", 1)
    made = Centre(tmp_path / "centre")
    config = made.home / "coordinator.toml"
    days = 15 / 86_400
    text = config.read_text().replace("certificate_days = 30.0", f"certificate_days = {days}")
    config.write_text(text)
    await made.start()
    home = make_site(tmp_path, "north")
    await enrol(made, home, "north")
    first = load_enrolment(SiloHome(home))
    life = (first.expires - first.renewal_due()).total_seconds() * 3
    assert 15 <= life <= 18
    running, troubles = asyncio.create_task(agent.run(home)), set()
    async with asyncio.timeout(25):
        # Beyond the end of the first certificate: the second is in use by then.
        while datetime.now(UTC) < first.expires + timedelta(seconds=1):
            await asyncio.sleep(0.2)
            troubles.add(admin.status(home).get("trouble"))
    second = load_enrolment(SiloHome(home))
    assert second.certificate_pem != first.certificate_pem
    renewed = second.expires - timedelta(days=days)
    assert first.renewal_due() - timedelta(seconds=1) <= renewed < first.expires
    assert troubles == {None}
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    await made.stop()
    assert "call.refused" not in capsys.readouterr().out


async def test_a_certificate_is_renewed_by_hand(centre: Centre, tmp_path: Path) -> None:
    home = make_site(tmp_path, "north")
    await enrol(centre, home, "north")
    before = load_enrolment(SiloHome(home))
    fresh = await admin.renew(home)
    assert fresh.certificate_pem != before.certificate_pem
    assert load_enrolment(SiloHome(home)) == fresh
