"""What the attacks on the states share: a world at some step, and a silo that has to refuse."""

from __future__ import annotations

from dataclasses import replace

import pytest

from secagg import coordinator
from secagg.errors import Reason, Refused
from secagg.events import (
    Headers,
    SiloEvent,
)
from secagg.messages import Signed
from tests.secagg.world import World


def run_until(world: World, phase: type[coordinator.CoordinatorState]) -> None:
    world.pump(lambda _: not isinstance(world.session, phase))
    assert isinstance(world.session, phase)


def refused(world: World, index: int, event: SiloEvent) -> Reason:
    """The silo must refuse and stay exactly as it was, with nothing written and nothing sent."""
    site = world.silos[index]
    before, entries = site.state, len(site.disk)
    with pytest.raises(Refused) as caught:
        site.deliver(event)
    assert site.state is before
    assert len(site.disk) == entries
    return caught.value.reason


def forged(message: Signed) -> Signed:
    return replace(message, signature=bytes(64))


def request(world: World, index: int) -> SiloEvent:
    event = world.session.request_for(index)
    assert event is not None
    return event


def headers_of(world: World, index: int) -> Headers:
    run_until(world, coordinator.Collecting)
    event = request(world, index)
    assert isinstance(event, Headers)
    return event
