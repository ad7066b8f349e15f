"""The fuzz targets with hypothesis: no seed breaks them, nor does what becomes of a seed."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.journal import decode_event, encode_event
from secagg.codec import u32
from secagg.errors import MalformedMessage
from secagg.events import Received
from secagg.messages import Parcel, Signed, Step
from tests.fuzz.parsers import TARGETS, seeds


@pytest.mark.parametrize("target", TARGETS)
def test_every_target_has_seeds_that_parse(target: str) -> None:
    assert seeds(target)
    for seed in seeds(target):
        TARGETS[target](seed)


@pytest.mark.parametrize("target", TARGETS)
@given(data=st.data())
def test_a_damaged_seed_parses_canonically_or_raises_the_one_error(
    target: str, data: st.DataObject
) -> None:
    raw = bytearray(data.draw(st.sampled_from(seeds(target))))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, max(len(raw) - 1, 0)))
        match data.draw(st.sampled_from(["set", "cut", "add"])):
            case "set" if raw:
                raw[at] = data.draw(st.integers(0, 255))
            case "cut":
                del raw[at : at + data.draw(st.integers(1, 8))]
            case _:
                raw[at:at] = data.draw(st.binary(min_size=1, max_size=8))
    TARGETS[target](bytes(raw))


@pytest.mark.parametrize("target", TARGETS)
@given(raw=st.binary(max_size=300))
def test_garbage_raises_the_one_error(target: str, raw: bytes) -> None:
    TARGETS[target](raw)


def test_an_event_of_the_store_has_one_parcel_for_each_receiver_in_order() -> None:
    """Found by `make fuzz`: of two parcels for one receiver the second was taken."""
    sent = Received(Signed(Step.SHARE, 1, b"", bytes(64)), {2: Parcel(b"m", b"s")})
    parcel = encode_event(sent)[-12:]
    head = encode_event(sent)[:-16]
    with pytest.raises(MalformedMessage, match="not in order"):
        decode_event(head + u32(2) + parcel + parcel)
