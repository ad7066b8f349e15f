"""What a dealer or the coordinator may put before a silo: who is named, and who is not."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from secagg import coordinator
from secagg.certificate import Certificate
from secagg.errors import (
    Reason,
    Refused,
)
from secagg.events import (
    Adverts,
    Confirmations,
    Headers,
    Received,
    Settle,
)
from secagg.messages import Confirm, Header, Step
from secagg.primitives import digest
from secagg.roster import Member, Roster
from tests.secagg.refusal import forged, headers_of, refused, request, run_until
from tests.secagg.world import make_world


def test_a_dealer_whose_seed_does_not_follow_from_its_root_is_found_when_it_drops() -> None:
    """Its receivers mask with the bad seed and agree; restoring r gives another one."""
    from secagg import keys
    from secagg.primitives import Secret

    world = make_world(4)
    run_until(world, coordinator.Sharing)
    cheat = world.silos[1]
    original = keys.pair_seed
    keys.pair_seed = lambda *_: Secret(b"z" * 32)
    try:
        for sent in cheat.deliver(request(world, 1)):
            world.feed(Received(sent.message, sent.parcels))
    finally:
        keys.pair_seed = original
    run_until(world, coordinator.Collecting)
    world.kill(1)
    world.pump()
    world.deadline()
    world.pump()
    assert world.sum is None
    assert world.ended is not None
    assert world.ended.accused == 1


def test_a_tampered_upload_list_never_yields_a_wrong_sum_in_silence() -> None:
    world = make_world(4)
    run_until(world, coordinator.Collecting)
    sent = world.silos[1].deliver(request(world, 1))
    message = sent[-1].message
    with pytest.raises(Refused):
        world.feed(Received(forged(message)))
    world.feed(Received(message))
    world.pump()
    assert world.sum is not None
    np.testing.assert_array_equal(world.sum, world.expected([1, 2, 3, 4]))


def test_a_ciphertext_that_its_dealer_signed_for_but_nobody_can_open_names_the_dealer() -> None:
    world = make_world(4)
    event = headers_of(world, 4)
    theirs = event.parcels[2]
    header = Header.decode(event.messages[0].body)
    entry = header.to(4)._replace(
        mailbox_parcel=digest("parcel", theirs.mailbox),
        seed_parcel=digest("parcel", theirs.seed),
    )
    lie = replace(header, dealt=(*header.dealt[:3], entry))
    signed = world.silos[1].party.sign(Step.SHARE, world.session.context.digest, lie.encode())
    with pytest.raises(Refused) as caught:
        world.silos[4].deliver(Headers((signed, *event.messages[1:]), {**event.parcels, 1: theirs}))
    assert (caught.value.reason, caught.value.accused) == (Reason.BAD_CIPHERTEXT, 1)


def test_an_advert_that_cannot_be_read_or_sealed_to_names_its_silo() -> None:
    world = make_world(4)
    world.run_until(coordinator.Sharing)
    event = request(world, 1)
    assert isinstance(event, Adverts)
    ctx = world.session.context.digest
    keys = event.messages[2].body
    for body in (b"short", keys[:-32] + bytes(32)):
        bad = world.silos[3].party.sign(Step.ADVERTISE, ctx, body)
        with pytest.raises(Refused) as caught:
            world.silos[1].deliver(Adverts((*event.messages[:2], bad, event.messages[3])))
        assert (caught.value.reason, caught.value.accused) == (Reason.BAD_KEY, 3)


def test_a_header_that_cannot_be_read_or_deals_to_others_names_its_silo() -> None:
    world = make_world(4)
    world.run_until(coordinator.Collecting)
    event = request(world, 1)
    assert isinstance(event, Headers)
    header = Header.decode(event.messages[2].body)
    ctx = world.session.context.digest
    for body in (b"short", replace(header, dealt=header.dealt[:3]).encode()):
        bad = world.silos[3].party.sign(Step.SHARE, ctx, body)
        messages = (*event.messages[:2], bad, event.messages[3])
        with pytest.raises(Refused) as caught:
            world.silos[1].deliver(replace(event, messages=messages))
        assert (caught.value.reason, caught.value.accused) == (Reason.BAD_COMMITMENT, 3)


@pytest.mark.parametrize("field", ["share_b", "share_r", "seed"])
def test_what_opens_but_is_not_what_was_committed_names_the_dealer(field: str) -> None:
    world = make_world(4)
    world.run_until(coordinator.Collecting)
    event = request(world, 4)
    assert isinstance(event, Headers)
    header = Header.decode(event.messages[0].body)
    dealt = (*header.dealt[:3], header.dealt[3]._replace(**{field: bytes(32)}))
    ctx = world.session.context.digest
    bad = world.silos[1].party.sign(Step.SHARE, ctx, replace(header, dealt=dealt).encode())
    with pytest.raises(Refused) as caught:
        world.silos[4].deliver(replace(event, messages=(bad, *event.messages[1:])))
    assert (caught.value.reason, caught.value.accused) == (Reason.BAD_COMMITMENT, 1)


def test_a_confirmation_that_cannot_be_read_or_is_no_survivors_is_refused() -> None:
    world = make_world(5)
    world.run_until(coordinator.Collecting)
    world.kill(5)
    world.pump()
    world.deadline()
    world.run_until(coordinator.Unmasking)
    event = request(world, 1)
    assert isinstance(event, Confirmations)
    ctx = world.session.context.digest
    garbled = world.silos[4].party.sign(Step.CONFIRM, ctx, b"?")
    outsider = world.silos[5].party.sign(Step.CONFIRM, ctx, event.messages[0].body)
    ours = event.messages
    assert refused(world, 1, Confirmations((*ours[:3], garbled))) is Reason.TRANSCRIPT_MISMATCH
    assert refused(world, 1, Confirmations((*ours, outsider))) is Reason.NOT_A_SUBSET


@pytest.mark.parametrize("survivors", [(1, 2, 9), (1, 2), (2, 3, 4)])
def test_a_sum_certificate_is_signed_by_its_own_survivors(survivors: tuple[int, ...]) -> None:
    world = make_world(4)
    ctx = world.session.context.digest
    body = Confirm(bytes(32), survivors, bytes(32)).encode()
    signed = tuple(world.silos[i].party.sign(Step.CONFIRM, ctx, body) for i in (1, 2, 3))
    bad = Settle(Certificate(Step.CONFIRM, ctx, signed))
    assert refused(world, 1, bad) is Reason.BAD_CERTIFICATE


def test_few_survivors_are_no_sum_even_if_all_of_them_signed() -> None:
    world = make_world(5)
    ctx = world.session.context.digest
    body = Confirm(bytes(32), (1, 2, 3), bytes(32)).encode()
    signed = tuple(world.silos[i].party.sign(Step.CONFIRM, ctx, body) for i in (1, 2, 3))
    bad = Settle(Certificate(Step.CONFIRM, ctx, signed))
    assert refused(world, 1, bad) is Reason.BAD_CERTIFICATE


@pytest.mark.parametrize(
    "names", [("a", "b\x1b[2K", "c"), ("a\n", "b", "c"), ("", "b", "c"), ("a", "b\u202e", "c")]
)
def test_a_name_cannot_hide_a_line_of_the_roster_that_is_read_aloud(names: tuple[str, ...]) -> None:
    members = tuple(Member(name, bytes([i]) * 32) for i, name in enumerate(sorted(names)))
    with pytest.raises(Exception, match="printable"):
        Roster("trial", 1, 3, 1, members)
    good = tuple(Member(name, bytes([i]) * 32) for i, name in enumerate("abc"))
    with pytest.raises(Exception, match="printable"):
        Roster("tri\ral", 1, 3, 1, good)
