"""A coordinator that lies: one test per attack, refused before anything secret leaves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from secagg import coordinator
from secagg.certificate import Certificate
from secagg.context import Quantity
from secagg.errors import InvalidParameters, Reason, Refused
from secagg.events import (
    Adverts,
    Headers,
    Open,
    Settle,
    SiloEvent,
)
from secagg.messages import Parcel, Signed, Step
from secagg.roster import Member, Roster
from tests.secagg.refusal import forged, headers_of, refused, request, run_until
from tests.secagg.world import World, make_context, make_roster, make_world

Tamper = Callable[[World, SiloEvent], SiloEvent]


# --- step 0


@pytest.mark.parametrize(
    "change",
    [
        {"epoch": 2},
        {"threshold": 4},
        {"colluders": 0},
        {"silos": 5},
        {"study": "another"},
        {"roster": bytes(32)},
    ],
)
def test_a_session_for_another_roster_is_refused(change: dict[str, object]) -> None:
    world = make_world(4)
    event = Open(make_context(world.roster, **change))
    assert refused(world, 1, event) is Reason.ROSTER_MISMATCH


def test_a_finished_round_asked_again_is_refused_under_every_number() -> None:
    world = make_world(4)
    world.pump()
    world.settle()
    again = make_context(world.roster, session=2)
    assert refused(world, 1, Open(again)) is Reason.QUANTITY_CLOSED
    renamed = make_context(world.roster, session=2, quantity=Quantity("round", 2))
    assert refused(world, 1, Open(renamed)) is Reason.MODEL_REUSED
    earlier = make_context(world.roster, session=2, quantity=Quantity("round", 0), model=b"n" * 32)
    assert refused(world, 1, Open(earlier)) is Reason.ROUND_NOT_NEW
    stale = make_context(world.roster, session=1)
    assert refused(world, 1, Open(stale)) is Reason.SESSION_NOT_NEW


def test_a_finished_round_asked_again_without_one_silo_is_refused() -> None:
    """The subtraction attack: sum over all, claim a failure, sum over all but one."""
    world = make_world(5)
    world.pump()
    # No certificate is shown: the coordinator claims that the session failed.
    again = make_context(world.roster, session=2)
    assert refused(world, 1, Open(again)) is Reason.IN_DOUBT
    forged_abort = Certificate(
        Step.ABORT,
        world.session.context.digest,
        tuple(
            Signed.by(Ed25519PrivateKey.generate(), Step.ABORT, i, b"", b"") for i in range(1, 6)
        ),
    )
    assert refused(world, 1, Settle(forged_abort)) is Reason.BAD_CERTIFICATE


def test_static_sums_are_summed_once_per_roster_epoch() -> None:
    world = make_world(4, quantity=Quantity("census", 1), ring=32)
    world.pump()
    world.settle()
    for number in (1, 2):
        again = make_context(world.roster, session=2, quantity=Quantity("census", number))
        assert refused(world, 1, Open(again)) is Reason.QUANTITY_CLOSED


def test_a_session_is_not_opened_twice_with_different_contexts() -> None:
    world = make_world(4)
    world.silos[1].deliver(request(world, 1))
    other = make_context(world.roster, model=b"m" * 32)
    assert refused(world, 1, Open(other)) is Reason.SESSION_NOT_NEW


@pytest.mark.parametrize(("n", "t", "c"), [(4, 2, 0), (4, 3, 2), (5, 4, 3), (6, 4, 2), (3, 4, 1)])
def test_parameters_that_break_the_bounds_are_refused(n: int, t: int, c: int) -> None:
    with pytest.raises(InvalidParameters, match="break 2t > N"):
        make_roster(n, t, c)


def test_a_roster_of_two_or_with_doubles_is_refused() -> None:
    roster, _ = make_roster(4)
    a, b, *_ = roster.members
    for members in ((a, b), (a, a, b), (b, a, roster.members[2])):
        with pytest.raises(InvalidParameters):
            Roster("trial", 1, 3, 1, members)
    twin = Member("site-009", a.identity)
    with pytest.raises(InvalidParameters, match="share one identity"):
        Roster("trial", 1, 3, 1, (a, b, twin))


# --- step 1


def test_adverts_must_be_signed_complete_ordered_and_include_our_own() -> None:
    world = make_world(5)
    run_until(world, coordinator.Sharing)
    event = request(world, 1)
    assert isinstance(event, Adverts)
    m = event.messages
    stranger = Signed.by(
        Ed25519PrivateKey.generate(), Step.ADVERTISE, 3, world.session.context.digest, m[2].body
    )
    outsider = replace(m[4], sender=9)
    own_again = world.silos[1].party.sign(Step.ADVERTISE, world.session.context.digest, m[1].body)
    cases = [
        ((*m[:2], forged(m[2]), *m[3:]), Reason.BAD_SIGNATURE),
        ((*m[:2], stranger, *m[3:]), Reason.BAD_SIGNATURE),
        ((*m[:2], replace(m[2], sender=4), m[4]), Reason.BAD_SIGNATURE),
        ((*m[:4], outsider), Reason.NOT_IN_ROSTER),
        ((*m[:3], m[2], m[4]), Reason.DUPLICATE_SENDER),
        ((m[1], m[0], *m[2:]), Reason.NOT_ASCENDING),
        (m[:3], Reason.BELOW_THRESHOLD),
        (m[1:], Reason.OWN_MESSAGE_CHANGED),
        ((own_again, *m[1:]), Reason.OWN_MESSAGE_CHANGED),
        ((*m[:2], replace(m[2], step=Step.SHARE), *m[3:]), Reason.WRONG_STEP),
    ]
    for messages, reason in cases:
        assert refused(world, 1, Adverts(messages)) is reason


def test_a_second_set_of_adverts_is_refused() -> None:
    world = make_world(5)
    run_until(world, coordinator.Sharing)
    event = request(world, 1)
    assert isinstance(event, Adverts)
    world.silos[1].deliver(event)
    assert refused(world, 1, Adverts(event.messages[:4])) is Reason.SECOND_VIEW


def test_an_advert_of_an_older_session_is_refused() -> None:
    world = make_world(4)
    run_until(world, coordinator.Sharing)
    old = request(world, 1)
    assert isinstance(old, Adverts)
    world.reopen(session=2)
    run_until(world, coordinator.Sharing)
    new = request(world, 1)
    assert isinstance(new, Adverts)
    stale = (*new.messages[:3], old.messages[3])
    assert refused(world, 1, Adverts(stale)) is Reason.BAD_SIGNATURE


# --- step 2


def test_headers_must_be_signed_above_threshold_and_of_silos_that_advertised() -> None:
    world = make_world(5)
    event = headers_of(world, 2)
    m = event.messages
    cases = [
        ((*m[:2], forged(m[2]), *m[3:]), Reason.BAD_SIGNATURE),
        (m[:3], Reason.BELOW_THRESHOLD),
        ((m[0], *m[2:]), Reason.OWN_MESSAGE_CHANGED),
    ]
    for messages, reason in cases:
        assert refused(world, 2, replace(event, messages=messages)) is reason


def test_a_silo_that_did_not_advertise_to_us_cannot_share() -> None:
    world = make_world(5)
    world.kill(5)
    world.pump()
    world.deadline()
    event = headers_of(world, 2)
    extra = world.silos[5].party.sign(
        Step.SHARE, world.session.context.digest, event.messages[0].body
    )
    tampered = replace(event, messages=(*event.messages, extra))
    assert refused(world, 2, tampered) is Reason.NOT_A_SUBSET


def test_a_ciphertext_of_one_silo_passed_on_as_anothers_is_refused_and_accuses_nobody() -> None:
    """The dealers signed other digests, so it was the coordinator that swapped them."""
    world = make_world(4)
    event = headers_of(world, 4)
    swapped = {**event.parcels, 1: event.parcels[2], 2: event.parcels[1]}
    with pytest.raises(Refused) as caught:
        world.silos[4].deliver(replace(event, parcels=swapped))
    assert caught.value.reason is Reason.BAD_CIPHERTEXT
    assert caught.value.accused is None
    missing = {i: p for i, p in event.parcels.items() if i != 3}
    assert refused(world, 4, replace(event, parcels=missing)) is Reason.BAD_CIPHERTEXT
    no_seed = {**event.parcels, 3: Parcel(event.parcels[3].mailbox, b"")}
    assert refused(world, 4, replace(event, parcels=no_seed)) is Reason.BAD_CIPHERTEXT


def test_a_second_set_of_headers_is_refused() -> None:
    world = make_world(5)
    event = headers_of(world, 2)
    world.silos[2].deliver(event)
    fewer = replace(event, messages=event.messages[:4])
    assert refused(world, 2, fewer) is Reason.SECOND_VIEW


@pytest.mark.parametrize(
    "change",
    [
        {"model": b"m" * 32},
        {"plan": b"p" * 32},
        {"encoding": b"e" * 32},
        {"previous": b"c" * 32},
        {"ring": 32},
        {"length": 999},
        {"quantity": Quantity("round", 2)},
    ],
)
def test_silos_that_are_shown_different_worlds_refuse_each_others_adverts(
    change: dict[str, object],
) -> None:
    world = make_world(4)
    other = make_context(world.roster, **change)
    world.silos[1].deliver(Open(other))
    adverts = [world.silos[1].deliver(Open(other))[0].message]
    adverts += [world.silos[i].deliver(Open(world.session.context))[0].message for i in (2, 3, 4)]
    for index in (1, 2):
        assert refused(world, index, Adverts(tuple(adverts))) is Reason.BAD_SIGNATURE


def test_split_views_at_sharing_are_noticed_before_any_mask() -> None:
    """Silo 1 sees adverts of {1, 2, 3, 4}, the others of all five: their T1 differ."""
    world = make_world(5)
    run_until(world, coordinator.Sharing)
    event = request(world, 1)
    assert isinstance(event, Adverts)
    narrow = world.silos[1].deliver(Adverts(event.messages[:4]))[0]
    wide = [world.silos[i].deliver(event)[0] for i in (2, 3, 4, 5)]
    headers = tuple(sent.message for sent in (narrow, *wide))
    parcels = {i: sent.parcels[2] for i, sent in ((1, narrow), (3, wide[1]), (4, wide[2]))}
    parcels[5] = wide[3].parcels[2]
    assert refused(world, 2, Headers(headers, parcels)) is Reason.TRANSCRIPT_MISMATCH
