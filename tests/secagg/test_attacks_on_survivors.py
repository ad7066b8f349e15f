"""A coordinator that lies about survivors, confirmations and ends: steps 3 and 4, certificates."""

from __future__ import annotations

from dataclasses import replace

import pytest

from secagg import coordinator, silo
from secagg.errors import Reason, SecAggError, UnexpectedEvent
from secagg.events import (
    Confirmations,
    GiveUp,
    Open,
    Settle,
    Survivors,
)
from secagg.messages import Confirm, Step
from tests.secagg.refusal import forged, refused, request, run_until
from tests.secagg.world import make_world


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
