"""Encodings are canonical: parse then encode gives the same bytes, and nothing else parses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from secagg import coordinator
from secagg.certificate import Certificate
from secagg.context import SessionContext
from secagg.errors import InvalidParameters, MalformedMessage
from secagg.ledger import decode_entry, encode_entry
from secagg.messages import Advert, Complaint, Confirm, Header, MaskedInput, Signed, Unmask
from secagg.roster import Roster
from tests.secagg.world import World, make_world

Decode = Callable[[bytes], Any]


def session_with_dropout() -> World:
    world = make_world(4)
    world.pump(lambda _: not isinstance(world.session, coordinator.Collecting))
    world.kill(4)
    world.pump()
    world.deadline()
    world.pump()
    world.settle()
    return world


def samples() -> list[tuple[Decode, bytes]]:
    world = session_with_dropout()
    session = world.session
    assert isinstance(session, coordinator.Summed)
    site = world.silos[1]
    found: list[tuple[Decode, bytes]] = [
        (Roster.decode, world.roster.encode()),
        (SessionContext.decode, session.context.encode()),
        (Certificate.decode, session.certificate.encode()),
        (Confirm.decode, session.certificate.messages[0].body),
        (Complaint.decode, Complaint(3).encode()),
        (MaskedInput.decode, MaskedInput(bytes(32), bytes(32), 7).encode()),
    ]
    found += [(decode_entry, encode_entry(entry)) for entry in site.disk]
    world = make_world(4)
    parsers: dict[int, Decode] = {0: Advert.decode, 1: Header.decode, 4: Unmask.decode}
    while not world.session.over:
        for index, other in world.silos.items():
            request = world.session.request_for(index)
            for sent in other.deliver(request) if request else ():
                from secagg.events import Received

                world.feed(Received(sent.message, sent.parcels))
                found.append((Signed.decode, sent.message.encode()))
                if sent.message.step in parsers:
                    found.append((parsers[sent.message.step], sent.message.body))
    return found


SAMPLES = samples()


def encode(value: Any) -> bytes:
    return value.encode() if hasattr(value, "encode") else encode_entry(value)


@pytest.mark.parametrize("number", range(len(SAMPLES)))
def test_parse_then_encode_gives_the_same_bytes(number: int) -> None:
    decode, data = SAMPLES[number]
    assert encode(decode(data)) == data


@pytest.mark.parametrize("number", range(len(SAMPLES)))
def test_trailing_bytes_and_truncations_are_refused(number: int) -> None:
    decode, data = SAMPLES[number]
    for bad in (data + b"\0", data[:-1], data[: len(data) // 2], b""):
        with pytest.raises(MalformedMessage):
            decode(bad)


@given(st.data())
def test_any_bytes_parse_canonically_or_raise_the_one_error(data: st.DataObject) -> None:
    decode, good = data.draw(st.sampled_from(SAMPLES))
    raw = bytearray(good)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(raw) - 1))
        if data.draw(st.booleans()):
            raw[at] = data.draw(st.integers(0, 255))
        else:
            del raw[at : at + data.draw(st.integers(1, 8))]
        if not raw:
            break
    try:
        value = decode(bytes(raw))
    except (MalformedMessage, InvalidParameters):
        return
    assert encode(value) == bytes(raw)


@given(st.binary(max_size=200), st.sampled_from([decode for decode, _ in SAMPLES]))
def test_garbage_raises_the_one_error(raw: bytes, decode: Decode) -> None:
    try:
        value = decode(raw)
    except (MalformedMessage, InvalidParameters):
        return
    assert encode(value) == raw
