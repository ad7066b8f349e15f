"""A coordinator that lies: one test per attack, refused before anything secret leaves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from secagg import coordinator, silo
from secagg.certificate import Certificate
from secagg.context import Quantity
from secagg.errors import InvalidParameters, Reason, Refused, SecAggError, UnexpectedEvent
from secagg.events import (
    Adverts,
    Confirmations,
    GiveUp,
    Headers,
    Open,
    Received,
    Settle,
    SiloEvent,
    Survivors,
)
from secagg.messages import Confirm, Header, Parcel, Signed, Step
from secagg.primitives import digest
from secagg.roster import Member, Roster
from tests.secagg.world import World, make_context, make_roster, make_world

Tamper = Callable[[World, SiloEvent], SiloEvent]


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


def headers_of(world: World, index: int) -> Headers:
    run_until(world, coordinator.Collecting)
    event = request(world, index)
    assert isinstance(event, Headers)
    return event


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


# --- steps 3 and 4


def test_survivors_must_be_ours_include_us_and_reach_the_threshold() -> None:
    world = make_world(5)
    world.kill(5)
    world.pump()
    world.deadline()
    run_until(world, coordinator.Confirming)
    cases = [
        ((1, 2, 3, 5), Reason.NOT_A_SUBSET),
        ((1, 2, 3, 4, 9), Reason.NOT_A_SUBSET),
        ((1, 3, 4), Reason.SELF_NOT_INCLUDED),
        ((2, 3, 4), Reason.BELOW_THRESHOLD),
        ((2, 1, 3, 4), Reason.NOT_ASCENDING),
        ((1, 1, 2, 3, 4), Reason.NOT_ASCENDING),
    ]
    for survivors, reason in cases:
        assert refused(world, 2, Survivors(survivors)) is reason


def test_a_second_survivor_set_is_refused_also_after_a_restart() -> None:
    world = make_world(5)
    run_until(world, coordinator.Confirming)
    world.silos[2].deliver(Survivors((1, 2, 3, 4, 5)))
    assert refused(world, 2, Survivors((1, 2, 3, 4))) is Reason.SECOND_VIEW
    world.silos[2].restart()
    assert refused(world, 2, Survivors((1, 2, 3, 4))) is Reason.SECOND_VIEW


def test_a_reservation_is_summed_over_its_own_silos_only() -> None:
    world = make_world(5, ring=32)
    world.reserve((1, 2, 3, 4))
    assert refused(world, 5, Open(world.session.context)) is Reason.SELF_NOT_INCLUDED
    run_until(world, coordinator.Confirming)
    assert world.session.request_for(5) is None
    assert refused(world, 1, Survivors((1, 2, 3))) is Reason.BELOW_THRESHOLD
    world = make_world(6, ring=32)
    world.reserve((1, 2, 3, 4, 5, 6))
    run_until(world, coordinator.Confirming)
    assert refused(world, 1, Survivors((1, 2, 3, 4, 5))) is Reason.WRONG_SURVIVORS


def test_unmask_before_confirm_is_refused() -> None:
    world = make_world(4)
    run_until(world, coordinator.Confirming)
    confirmations = tuple(
        world.silos[i].deliver(Survivors((1, 2, 3, 4)))[0].message for i in (2, 3, 4)
    )
    with pytest.raises(UnexpectedEvent):
        world.silos[1].deliver(Confirmations(confirmations))


def test_confirmations_must_be_enough_genuine_and_of_exactly_our_set() -> None:
    world = make_world(5)
    run_until(world, coordinator.Unmasking)
    event = request(world, 1)
    assert isinstance(event, Confirmations)
    m = event.messages
    ctx = world.session.context.digest
    theirs = Confirm.decode(m[4].body)
    other_set = world.silos[5].party.sign(
        Step.CONFIRM, ctx, replace(theirs, survivors=(1, 2, 3, 5)).encode()
    )
    other_t2 = world.silos[5].party.sign(Step.CONFIRM, ctx, replace(theirs, t2=bytes(32)).encode())
    cases = [
        (m[:3], Reason.BELOW_THRESHOLD),
        ((*m[:4], forged(m[4])), Reason.BAD_SIGNATURE),
        ((*m[:4], m[3]), Reason.DUPLICATE_SENDER),
        ((*m[:4], other_set), Reason.TRANSCRIPT_MISMATCH),
        ((*m[:4], other_t2), Reason.TRANSCRIPT_MISMATCH),
        ((*m[:4], replace(m[4], sender=7)), Reason.NOT_IN_ROSTER),
    ]
    for messages, reason in cases:
        assert refused(world, 1, Confirmations(messages)) is reason


def test_overlapping_alive_and_dropped_sets_cannot_be_expressed() -> None:
    """Flower's SecAgg+ flaw: there the server names both sets. Here a silo derives them from the
    one set that it confirmed, so no silo gives both shares of anybody."""
    from secagg.messages import Unmask

    world = make_world(5)
    run_until(world, coordinator.Collecting)
    world.kill(5)
    run_until(world, coordinator.Collecting)
    world.pump()
    world.deadline()
    run_until(world, coordinator.Unmasking)
    sent = world.silos[1].deliver(request(world, 1))
    unmask = Unmask.decode(sent[0].message.body)
    owners_b = {owner for owner, _ in unmask.shares_b}
    owners_r = {owner for owner, _ in unmask.shares_r}
    assert owners_b == {1, 2, 3, 4}
    assert owners_r == {5}


def test_unmask_and_abort_exclude_each_other_also_across_restarts() -> None:
    world = make_world(4)
    run_until(world, coordinator.Unmasking)
    ctx = world.session.context.digest
    event = request(world, 1)
    world.silos[1].deliver(event)
    assert refused(world, 1, GiveUp(ctx)) is Reason.ALREADY_UNMASKED
    world.silos[1].restart()
    assert refused(world, 1, GiveUp(ctx)) is Reason.ALREADY_UNMASKED

    world.silos[2].deliver(GiveUp(ctx))
    with pytest.raises(SecAggError):
        world.silos[2].deliver(event)
    world.silos[2].restart()
    with pytest.raises(SecAggError):
        world.silos[2].deliver(event)


def test_an_abort_signed_beforehand_keeps_the_session_from_ever_opening() -> None:
    world = make_world(4)
    world.silos[1].deliver(GiveUp(world.session.context.digest))
    assert refused(world, 1, Open(world.session.context)) is Reason.ALREADY_ABORTED


def test_a_restarted_silo_without_keys_answers_nothing_but_abort() -> None:
    world = make_world(4)
    run_until(world, coordinator.Confirming)
    event = request(world, 1)
    world.silos[1].restart()
    assert isinstance(world.silos[1].state, silo.Lost)
    assert refused(world, 1, event) is Reason.KEYS_LOST
    sent = world.silos[1].deliver(GiveUp(world.session.context.digest))
    assert sent[0].message.step is Step.ABORT


@pytest.mark.parametrize("tamper", ["few", "forged", "mixed", "outside", "other"])
def test_certificates_are_checked(tamper: str) -> None:
    world = make_world(5)
    world.pump()
    assert isinstance(world.session, coordinator.Summed)
    good = world.session.certificate
    m = good.messages
    theirs = Confirm.decode(m[4].body)
    other = world.silos[5].party.sign(
        Step.CONFIRM, good.context, replace(theirs, survivors=(1, 2, 3, 5)).encode()
    )
    bad = {
        "few": replace(good, messages=m[:3]),
        "forged": replace(good, messages=(*m[:4], forged(m[4]))),
        "mixed": replace(good, messages=(*m[:4], other)),
        "outside": replace(good, kind=Step.ABORT),
        "other": replace(good, context=bytes(32)),
    }[tamper]
    assert refused(world, 1, Settle(bad)) is Reason.BAD_CERTIFICATE


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
