"""The estimate of a plan's cost, held against sessions and a study that were run."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from coordinator import admin as centre_admin
from secagg.events import Adverts, Confirmations, Headers, Settle, SiloEvent
from silo.config import Resources
from silo.estimate import computing_seconds, estimate, messages
from silo.orders import Measured
from study.plan import load_plan
from tests.secagg.world import make_world
from tests.silo.centre import AgentProcess, Centre, enrol, make_site, stop_all
from tests.silo.proxy import ConnectProxy
from tests.silo.studies import FEDAVG, make_plan


@pytest.mark.parametrize("silos", [3, 7, 12])
def test_messages_have_the_size_of_those_of_a_session(silos: int) -> None:
    world = make_world(silos, length=10)
    site, up, down = world.silos[1], 0, 0
    handle = site.deliver

    def deliver(event: SiloEvent) -> list:  # type: ignore[type-arg]
        nonlocal up, down
        if isinstance(event, Adverts | Headers | Confirmations):
            down += sum(len(message.encode()) for message in event.messages)
        if isinstance(event, Headers):
            down += sum(len(p.mailbox) + len(p.seed) for p in event.parcels.values())
        if isinstance(event, Settle):
            down += len(event.certificate.encode())
        sent = handle(event)
        for send in sent:
            up += len(send.message.encode())
            up += sum(len(p.mailbox) + len(p.seed) for p in send.parcels.values())
        return sent

    site.deliver = deliver  # type: ignore[method-assign]
    world.pump()
    world.settle()
    expected = messages(silos)
    assert up == pytest.approx(expected.up, rel=0.02)
    assert down == pytest.approx(expected.down, rel=0.02)


def test_hours_are_those_of_every_step_and_days_those_of_the_night() -> None:
    plan = make_plan()
    steps = 3 + 3 * 2
    samples = 24 / 4 * 1.125 * 2 / 3 / 8
    assert computing_seconds(plan, 4, 1.0) == pytest.approx(steps + samples)
    slow = Measured("cpu", "", seconds_per_step=3600.0, tensors=50)
    always = estimate(plan, 4, slow, Resources())
    nights = estimate(plan, 4, slow, Resources(hours="20:00-04:00"))
    assert always.hours == nights.hours
    assert nights.days == pytest.approx(3 * always.days)


@pytest.mark.slow
async def test_a_study_costs_the_bytes_that_were_estimated(tmp_path: Path) -> None:
    """Three sites, one of them through a proxy that counts; a tenth off at most."""
    text = FEDAVG.replace("[8]", "[64]").replace("local_steps = 2", "local_steps = 4")
    (tmp_path / "plan.toml").write_text(text)
    plan, centre, proxy = load_plan(tmp_path / "plan.toml"), Centre(tmp_path / "c"), ConnectProxy()
    await centre.start()
    await proxy.start()
    homes = [make_site(tmp_path, name) for name in ("east", "north", "south")]
    for home in homes:
        await enrol(centre, home, home.name)
    with (homes[0] / "site.toml").open("a") as file:
        file.write(f'\n[coordinator]\nproxy = "{proxy.url()}"\n')
    centre_admin.start_study(centre.home, tmp_path / "plan.toml")
    agents = [AgentProcess(home) for home in homes]
    try:
        async with asyncio.timeout(280):
            while not list(homes[0].glob("studies/*/ended.json")):
                await asyncio.sleep(0.5)
    finally:
        stop_all(agents)
        await proxy.stop()
        await centre.stop()
    expected = estimate(plan, 3, Measured("cpu", "", 0.1, 50), Resources()).traffic
    assert proxy.up == pytest.approx(expected.up, rel=0.1)
    assert proxy.down == pytest.approx(expected.down, rel=0.1)
