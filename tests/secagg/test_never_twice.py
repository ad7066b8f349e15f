"""The ledger's rules where they are easy to get wrong: purposes, reservations, rosters, ends."""

from __future__ import annotations

from dataclasses import replace

import pytest

from secagg import coordinator, silo
from secagg.certificate import Certificate
from secagg.context import NO_HASH, Quantity
from secagg.errors import MalformedMessage, Reason, Refused, UnexpectedEvent
from secagg.events import Confirmations, GiveUp, Open, Send, Settle
from secagg.ledger import (
    MAX_FOREIGN_ABORTS,
    Aborted,
    Confirmed,
    History,
    Opened,
    Overruled,
    Settled,
    decode_entry,
    encode_entry,
)
from secagg.messages import Abort, Confirm, Step
from secagg.roster import Roster
from tests.secagg.refusal import refused, request
from tests.secagg.world import World, make_context, make_roster, make_world


def summed(**changes: object) -> World:
    world = make_world(4, **changes)
    world.pump()
    world.settle()
    return world


# --- what a quantity is


@pytest.mark.parametrize("purpose", ["round ", "Round", "round2", "evaluation2", "census/2"])
def test_the_same_thing_under_a_purpose_of_another_name_is_refused(purpose: str) -> None:
    world = summed()
    again = make_context(world.roster, session=2, quantity=Quantity(purpose, 1), model=b"m" * 32)
    assert refused(world, 1, Open(again)) is Reason.UNKNOWN_PURPOSE


@pytest.mark.parametrize(
    "change",
    [
        {"model": NO_HASH},
        {"reservation": b"r" * 32},
        {"survivors": (1, 2, 3, 4)},
        {"quantity": Quantity("census", 1), "model": b"m" * 32},
        {"quantity": Quantity("evaluation", 1)},
        {"quantity": Quantity("evaluation", 1), "model": b"m" * 32, "reservation": b"r" * 32},
        {"quantity": Quantity("tags", 1), "reservation": b"r" * 32},
        {"quantity": Quantity("images", 1)},
        {"quantity": Quantity("images", 1), "survivors": (1, 2, 3)},
        {"quantity": Quantity("images", 1), "reservation": b"r" * 32},
    ],
)
def test_a_purpose_is_bound_to_what_it_is_made_from_and_to_nothing_else(
    change: dict[str, object],
) -> None:
    world = make_world(4)
    assert refused(world, 1, Open(make_context(world.roster, **change))) is Reason.WRONG_BINDING


def test_a_model_is_evaluated_once_whatever_the_round_is_called_and_whoever_is_in_the_roster() -> (
    None
):
    evaluation = dict(quantity=Quantity("evaluation", 3), model=b"m" * 32, ring=32)
    world = summed(**evaluation)
    again = {**evaluation, "session": 2}
    assert refused(world, 1, Open(make_context(world.roster, **again))) is Reason.QUANTITY_CLOSED
    renamed = {**again, "quantity": Quantity("evaluation", 4)}
    assert refused(world, 1, Open(make_context(world.roster, **renamed))) is Reason.MODEL_REUSED
    earlier = {**again, "quantity": Quantity("evaluation", 2), "model": b"n" * 32}
    assert refused(world, 1, Open(make_context(world.roster, **earlier))) is Reason.ROUND_NOT_NEW
    # Three of the four in a new epoch: the difference of the two sums would be the fourth's.
    smaller = replace(world.roster, epoch=2, members=world.roster.members[:3])
    site = world.silos[1]
    site.party = replace(site.party, roster=smaller)
    site.restart()
    context = make_context(smaller, **again)
    assert refused(world, 1, Open(context)) is Reason.QUANTITY_CLOSED
    # The next round trains from the model that was evaluated: another purpose, another quantity.


def test_images_go_only_where_our_own_tags_are() -> None:
    world = make_world(5, ring=32)
    images = dict(quantity=Quantity("images", 1), reservation=b"r" * 32)
    early = make_context(world.roster, survivors=(1, 2, 3, 4), **images)
    assert refused(world, 1, Open(early)) is Reason.WRONG_BINDING
    world.reserve((1, 2, 3, 4))
    other = make_context(world.roster, session=2, survivors=(1, 2, 3, 5), **images)
    assert refused(world, 1, Open(other)) is Reason.WRONG_SURVIVORS
    late = make_context(world.roster, session=2, survivors=(2, 3, 4, 5), **images)
    assert refused(world, 5, Open(late)) is Reason.WRONG_BINDING
    attempt = make_context(
        world.roster,
        session=2,
        survivors=(1, 2, 3, 4),
        quantity=Quantity("images", 2),
        reservation=b"r" * 32,
    )
    assert refused(world, 1, Open(attempt)) is Reason.WRONG_BINDING
    world.pump()
    assert isinstance(world.session, coordinator.Summed)


def test_a_silo_that_lost_its_keys_after_its_tags_were_committed_still_brings_its_images() -> None:
    world = make_world(4, quantity=Quantity("tags", 1), ring=32)
    world.run_until(coordinator.Confirming)
    world.silos[4].restart()
    world.pump(lambda i: i != 4)
    world.deadline()
    world.pump(lambda i: i != 4)
    world.settle()
    context = make_context(
        world.roster,
        session=2,
        quantity=Quantity("images", 1),
        survivors=(1, 2, 3, 4),
        reservation=b"r" * 32,
    )
    assert world.silos[4].deliver(Open(context))


# --- rosters change between sessions


def shrunk(world: World) -> Roster:
    """The next epoch: two of six are gone, and three signatures suffice."""
    return Roster("trial", 2, 3, 1, world.roster.members[:4])


def test_a_smaller_roster_cannot_end_a_session_of_a_larger_one() -> None:
    """Five of six had to confirm or to abort. If three of the four that are left could speak for
    them, two outcomes were possible, and the quantity would be open to a second sum."""
    world = make_world(6)
    world.pump()  # the sum is known; nobody is shown the certificate
    site, ctx = world.silos[1], world.session.context.digest
    party = replace(site.party, roster=shrunk(world))
    site.state = silo.resume(party, History.of(site.disk))
    body = Abort(party.roster.digest).encode()
    aborts = tuple(world.silos[i].party.sign(Step.ABORT, ctx, body) for i in (2, 3, 4))
    forged = Settle(Certificate(Step.ABORT, ctx, aborts))
    assert refused(world, 1, forged) is Reason.ROSTER_MISMATCH
    again = make_context(party.roster, session=2, epoch=2)
    assert refused(world, 1, Open(again)) is Reason.IN_DOUBT


def test_a_smaller_roster_cannot_open_the_shares_of_a_larger_one() -> None:
    world = make_world(6)
    world.run_until(coordinator.Unmasking)
    event = request(world, 1)
    assert isinstance(event, Confirmations)
    site = world.silos[1]
    party = replace(site.party, roster=shrunk(world))
    site.state = silo.resume(party, History.of(site.disk))
    assert isinstance(site.state, silo.Waiting)
    with pytest.raises(Exception, match="Confirmations in state Waiting"):
        site.deliver(Confirmations(event.messages[:3]))


def test_a_certificate_of_a_session_that_we_never_opened_changes_nothing() -> None:
    world = make_world(4)
    world.kill(4)
    world.pump()
    world.deadline()
    world.pump()
    world.silos[4].alive = True
    event = world.session.request_for(4)
    assert event is not None
    before = world.silos[4].state
    assert world.silos[4].deliver(event) == []
    assert world.silos[4].state is before


@pytest.mark.parametrize(("purpose", "again"), [("census", True), ("moments", False)])
def test_after_a_join_counts_are_summed_again_and_moments_are_not(
    purpose: str, again: bool
) -> None:
    world = make_world(4, quantity=Quantity(purpose, 1), ring=32)
    world.pump()
    world.settle()
    site = world.silos[1]
    site.party = replace(site.party, roster=replace(world.roster, epoch=2))
    site.restart()
    context = make_context(site.party.roster, session=2, quantity=Quantity(purpose, 2))
    if again:
        assert site.deliver(Open(context))
    else:
        assert refused(world, 1, Open(context)) is Reason.QUANTITY_CLOSED


# --- how a session ends


def test_an_abort_signed_in_another_study_ends_no_session_of_this_one() -> None:
    """One key, two ledgers: the other study's does not know that this session was unmasked. Would
    its ABORTs count, the round could be summed again without one silo, and subtracted."""
    world = make_world(4)
    world.pump()
    ctx = world.session.context.digest
    elsewhere = replace(world.roster, study="second")
    aborts = []
    for i in (1, 2, 3):
        twin = silo.start(replace(world.silos[i].party, roster=elsewhere))
        _, (_, sent) = twin.handle(GiveUp(ctx))
        assert isinstance(sent, Send)
        aborts.append(sent.message)
    foreign = Settle(Certificate(Step.ABORT, ctx, tuple(aborts)))
    for i in world.silos:
        assert refused(world, i, foreign) is Reason.BAD_CERTIFICATE
        assert world.silos[i].state.history.in_doubt
    again = make_context(world.roster, session=2)
    assert refused(world, 4, Open(again)) is Reason.IN_DOUBT


def test_an_abort_of_ours_that_our_ledger_does_not_hold_settles_nothing() -> None:
    """The ledger was set back to before it, so what it says of UNMASK may be missing too."""
    world = make_world(4)
    world.run_until(coordinator.Unmasking)
    site, ctx = world.silos[1], world.session.context.digest
    before = list(site.disk)
    aborts = tuple(world.silos[i].deliver(GiveUp(ctx))[0].message for i in (1, 2, 3))
    site.disk[:] = before
    site.restart()
    proof = Settle(Certificate(Step.ABORT, ctx, aborts))
    assert refused(world, 1, proof) is Reason.BAD_CERTIFICATE
    assert site.state.history.in_doubt
    world.silos[4].deliver(proof)
    assert not world.silos[4].state.history.in_doubt


def test_a_second_outcome_of_one_session_is_refused() -> None:
    """t CONFIRMs and t ABORTs of one session can both be signed: only one of them is taken."""
    world = make_world(4)
    world.run_until(coordinator.Unmasking)
    assert isinstance(world.session, coordinator.Unmasking)
    ctx = world.session.context.digest
    confirms = tuple(world.session.confirmed.confirmations.values())
    aborts = tuple(world.silos[i].deliver(GiveUp(ctx))[0].message for i in (1, 2, 3))
    by_abort = Settle(Certificate(Step.ABORT, ctx, aborts))
    by_sum = Settle(Certificate(Step.CONFIRM, ctx, confirms))
    world.silos[4].deliver(by_abort)
    assert refused(world, 4, by_sum) is Reason.BAD_CERTIFICATE
    assert world.silos[4].deliver(by_abort) == []
    world.silos[3].deliver(by_sum)
    assert refused(world, 3, by_abort) is Reason.BAD_CERTIFICATE


def test_a_silo_whose_view_was_split_stays_in_doubt_for_a_person_to_look() -> None:
    world = make_world(5)
    world.run_until(coordinator.Confirming)
    from secagg.events import Survivors

    world.silos[5].deliver(Survivors((1, 2, 3, 5)))
    world.pump(lambda i: i != 5)
    world.deadline()
    world.pump(lambda i: i != 5)
    assert isinstance(world.session, coordinator.Summed)
    assert refused(world, 5, Settle(world.session.certificate)) is Reason.BAD_CERTIFICATE
    assert world.silos[5].state.history.in_doubt
    retry = make_context(world.roster, session=2, quantity=Quantity("round", 2), model=b"2" * 32)
    assert refused(world, 5, Open(retry)) is Reason.IN_DOUBT


def test_a_sum_that_claims_an_input_we_never_made_does_not_count_us_in() -> None:
    world = make_world(4)
    ctx = world.session.context.digest
    world.silos[1].deliver(request(world, 1))
    body = Confirm(bytes(32), (1, 2, 3, 4), bytes(32)).encode()
    confirms = tuple(world.silos[i].party.sign(Step.CONFIRM, ctx, body) for i in (2, 3, 4))
    world.silos[1].deliver(Settle(Certificate(Step.CONFIRM, ctx, confirms)))
    (settled,) = (e for e in world.silos[1].disk if isinstance(e, Settled))
    assert settled.summed
    assert not settled.included


def test_operators_settle_by_hand_and_the_quantity_stays_closed() -> None:
    world = make_world(4)
    world.pump()
    site = world.silos[1]
    site.disk.append(Overruled(world.session.context.digest))
    site.restart()
    assert isinstance(site.state, silo.Waiting)
    again = make_context(world.roster, session=2)
    assert refused(world, 1, Open(again)) is Reason.QUANTITY_CLOSED
    next_round = make_context(
        world.roster, session=2, quantity=Quantity("round", 2), model=b"2" * 32
    )
    assert site.deliver(Open(next_round))


@pytest.mark.parametrize("length", [0, 31, 33, 4096])
def test_a_digest_of_another_length_cannot_spoil_the_ledger(length: int) -> None:
    """Written, it would have been an entry that no restart can read."""
    world = make_world(4)
    with pytest.raises(MalformedMessage, match=f"{length} bytes"):
        world.silos[1].deliver(GiveUp(bytes(length)))
    assert world.silos[1].disk == []


def test_aborts_of_sessions_that_we_never_opened_are_bounded() -> None:
    world = make_world(4)
    site = world.silos[1]
    known = [Aborted(i.to_bytes(32, "big")) for i in range(MAX_FOREIGN_ABORTS)]
    site.disk += known
    site.state = replace(
        site.state, history=History(aborted=frozenset(entry.ctx for entry in known))
    )
    assert refused(world, 1, GiveUp(b"n" * 32)) is Reason.TOO_MANY_ABORTS
    assert site.deliver(GiveUp(known[7].ctx))  # the same again is the same bytes
    site.deliver(request(world, 1))
    assert site.deliver(GiveUp(world.session.context.digest))  # and ours may be given up


def test_an_aborted_session_is_not_unmasked_whatever_state_asks() -> None:
    history = History.of([Aborted(b"c" * 32)])
    with pytest.raises(Refused) as caught:
        history.check_unmask(b"c" * 32)
    assert caught.value.reason is Reason.ALREADY_ABORTED


# --- every crash point: the ledger up to any entry, and then everything the coordinator can ask


def test_a_crash_after_any_entry_never_lets_a_silo_mask_or_confirm_a_second_time() -> None:
    world = make_world(4)
    asked = []
    while not world.session.over:
        for index, other in world.silos.items():
            event = world.session.request_for(index)
            if event is None:
                continue
            if index == 1:
                asked.append(event)
            for sent in other.deliver(event):
                from secagg.events import Received

                world.feed(Received(sent.message, sent.parcels))
    site = world.silos[1]
    said = {Step.CONFIRM: set(), Step.UNMASK: set(), Step.MASKED_INPUT: set()}
    for kept in range(1, len(site.disk) + 1):
        for event in asked:
            state = silo.resume(site.party, History.of(site.disk[:kept]))
            try:
                _, effects = state.handle(event)
            except (Refused, UnexpectedEvent):
                continue
            for effect in effects:
                message = getattr(effect, "message", None)
                if message is not None:
                    said[message.step].add(message.encode())
    assert len(said[Step.CONFIRM]) == 1
    assert len(said[Step.UNMASK]) == 1
    assert not said[Step.MASKED_INPUT]


# --- entries


ENTRIES = [
    Confirmed(b"c" * 32, b"t" * 32, (1, 2, 3), (1, 2), b"v" * 32, b"locked"),
    Settled(b"c" * 32, b"d" * 32, False, False),
    Overruled(b"c" * 32),
    Aborted(b"c" * 32),
    Opened(make_context(make_roster(4)[0])),
]


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: type(entry).__name__)
def test_an_entry_is_read_as_it_was_written(entry: Confirmed) -> None:
    assert decode_entry(encode_entry(entry)) == entry


@pytest.mark.parametrize(
    "raw",
    [
        b"\x00",
        b"\x08" + encode_entry(Overruled(bytes(32)))[1:],
        encode_entry(Settled(bytes(32), bytes(32), True, True))[:-1] + b"\x02",
        encode_entry(Settled(bytes(32), bytes(32), True, True))[:-2] + b"\x02\x00",
    ],
)
def test_an_entry_of_no_kind_or_with_a_flag_that_is_none_is_refused(raw: bytes) -> None:
    with pytest.raises(MalformedMessage):
        decode_entry(raw)
