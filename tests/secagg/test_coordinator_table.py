"""Every event in every state of the coordinator (docs/secure-sum.md, "State tables")."""

from __future__ import annotations

from dataclasses import replace

import pytest

from secagg import coordinator, silo
from secagg.errors import MalformedMessage, Reason, Refused, SecAggError, UnexpectedEvent
from secagg.events import Cancel, CoordinatorEvent, Ended, Received, Settle, Survivors
from secagg.messages import Abort, Complaint, Confirm, Header, Parcel, Step, Unmask
from secagg.primitives import Secret
from tests.secagg.world import World, make_context, make_roster, make_world

STATES = (
    coordinator.Advertising,
    coordinator.Sharing,
    coordinator.Collecting,
    coordinator.Confirming,
    coordinator.Unmasking,
    coordinator.Aborting,
    coordinator.Aborted,
    coordinator.Summed,
    coordinator.Abandoned,
)
State = type[coordinator.CoordinatorState]
# The step whose messages a state takes; COMPLAIN and a late CONFIRM have tests of their own.
TAKES = {
    coordinator.Advertising: Step.ADVERTISE,
    coordinator.Sharing: Step.SHARE,
    coordinator.Collecting: Step.MASKED_INPUT,
    coordinator.Confirming: Step.CONFIRM,
    coordinator.Unmasking: Step.UNMASK,
    coordinator.Aborting: Step.ABORT,
}
GATHERING = (coordinator.Advertising, coordinator.Sharing, coordinator.Collecting)
OVER = (coordinator.Aborted, coordinator.Summed, coordinator.Abandoned)


def bring_to(state: State, silos: int = 4) -> World:
    world = make_world(silos)
    match state:
        case coordinator.Aborting | coordinator.Aborted:
            world.run_until(coordinator.Collecting)
            world.feed(Cancel("a person said so"))
            world.pump(lambda _: not isinstance(world.session, state))
        case coordinator.Abandoned:
            world.feed(Cancel("a person said so"))
        case coordinator.Summed:
            world.pump()
        case _:
            world.run_until(state)
    assert isinstance(world.session, state)
    return world


def answer(world: World, index: int) -> Received:
    request = world.session.request_for(index)
    assert request is not None
    sent = world.silos[index].deliver(request)[-1]
    return Received(sent.message, sent.parcels)


def signed(world: World, index: int, step: Step, body: bytes = b"") -> Received:
    party = world.silos[index].party
    return Received(party.sign(step, world.session.context.digest, body))


def refused(world: World, event: CoordinatorEvent) -> SecAggError:
    before = world.session
    with pytest.raises(SecAggError) as caught:
        world.feed(event)
    assert world.session is before
    return caught.value


def reason(world: World, event: CoordinatorEvent) -> Reason:
    error = refused(world, event)
    assert isinstance(error, Refused)
    return error.reason


@pytest.mark.parametrize("step", list(Step))
@pytest.mark.parametrize("state", STATES)
def test_a_state_takes_the_messages_of_its_own_step_and_no_others(state: State, step: Step) -> None:
    world = bring_to(state)
    complaint = step is Step.COMPLAIN and state is coordinator.Collecting
    late = step is Step.CONFIRM and state is coordinator.Unmasking
    if complaint or late:
        return
    if TAKES.get(state) is step:
        event = answer(world, 1)
        before = world.session
        world.feed(event)
        assert world.session is not before
        assert 1 not in world.session.awaited
        after = world.session
        world.feed(event)  # the acknowledgement was lost: taken again, nothing changes
        assert world.session is after
    else:
        assert reason(world, signed(world, 1, step, b"new")) is Reason.WRONG_STEP


@pytest.mark.parametrize("state", [coordinator.Summed, coordinator.Aborted])
def test_the_messages_that_ended_a_session_are_acknowledged_again(state: State) -> None:
    world = bring_to(state)
    before = world.session
    for message in before.certificate.messages:  # type: ignore[attr-defined]
        world.feed(Received(message))
    assert world.session is before


def test_messages_of_earlier_steps_are_acknowledged_again() -> None:
    world = make_world(4)
    event = answer(world, 1)
    world.feed(event)
    world.run_until(coordinator.Unmasking)
    before = world.session
    world.feed(event)
    assert world.session is before


@pytest.mark.parametrize("state", STATES)
def test_a_deadline_closes_a_step_with_enough_gives_up_with_too_few_or_changes_nothing(
    state: State,
) -> None:
    closes = {
        coordinator.Advertising: (coordinator.Sharing, coordinator.Abandoned),
        coordinator.Sharing: (coordinator.Collecting, coordinator.Abandoned),
        coordinator.Collecting: (coordinator.Confirming, coordinator.Aborting),
        coordinator.Confirming: (coordinator.Unmasking, coordinator.Aborting),
    }
    for present in (3, 2):
        world = bring_to(state)
        before = world.session
        if state in closes:
            for index in range(1, present + 1):
                world.feed(answer(world, index))
            world.deadline()
            assert type(world.session) is closes[state][0 if present == 3 else 1]
        else:
            world.deadline()
            assert world.session is before


@pytest.mark.parametrize("state", STATES)
def test_a_person_can_end_a_session_until_shares_may_be_out(state: State) -> None:
    world = bring_to(state)
    if state in (coordinator.Advertising, coordinator.Sharing):
        world.feed(Cancel("enough"))
        assert isinstance(world.session, coordinator.Abandoned)
        assert world.ended == Ended("enough", None)
    elif state in (coordinator.Collecting, coordinator.Confirming):
        world.feed(Cancel("enough"))
        assert isinstance(world.session, coordinator.Aborting)
    else:
        assert isinstance(refused(world, Cancel("enough")), UnexpectedEvent)


@pytest.mark.parametrize("state", STATES)
def test_every_state_says_whom_it_awaits_and_asks_nobody_else(state: State) -> None:
    world = bring_to(state)
    session = world.session
    assert session.over == (state in OVER)
    assert session.phase == state.__name__.lower()
    assert bool(session.awaited) != session.over
    if not session.over:
        world.feed(answer(world, 2))
    asked = [i for i in (1, 2, 3, 4) if world.session.request_for(i) is not None]
    if session.over:
        assert asked == ([] if state is coordinator.Abandoned else [1, 2, 3, 4])
        assert all(isinstance(session.request_for(i), Settle) for i in asked)
    else:
        assert asked == [1, 3, 4]


# --- what silos may send that no honest silo would


def test_a_session_for_another_roster_is_not_begun() -> None:
    roster, _ = make_roster(4)
    with pytest.raises(SecAggError, match="another roster"):
        coordinator.open_session(roster, make_context(make_roster(4)[0]))


@pytest.mark.parametrize("step", [Step.ADVERTISE, Step.SHARE, Step.MASKED_INPUT, Step.CONFIRM])
def test_a_second_message_of_one_silo_is_refused(step: Step) -> None:
    states = {step: state for state, step in TAKES.items()}
    world = bring_to(states[step])
    world.feed(answer(world, 1))
    assert reason(world, signed(world, 1, step, b"another")) is Reason.DUPLICATE_SENDER


@pytest.mark.parametrize("spoilt", ["mailbox", "mask"])
def test_a_key_that_nobody_can_seal_to_is_refused_at_the_door(spoilt: str) -> None:
    """Passed on, it would have stopped every silo at step 1."""
    from secagg.messages import Advert

    world = bring_to(coordinator.Advertising)
    advert = Advert.decode(answer(world, 1).message.body)
    low_order = getattr(advert, spoilt)[:-32] + bytes(32)
    bad = replace(advert, **{spoilt: low_order})
    assert reason(world, signed(world, 1, Step.ADVERTISE, bad.encode())) is Reason.BAD_KEY


def header_and_parcels(world: World) -> tuple[Header, dict[int, Parcel]]:
    event = answer(world, 1)
    return Header.decode(event.message.body), dict(event.parcels)


def share(world: World, header: Header, parcels: dict[int, Parcel]) -> Received:
    event = signed(world, 1, Step.SHARE, header.encode())
    return Received(event.message, parcels)


def test_headers_must_be_of_this_transcript_and_match_their_parcels() -> None:
    world = bring_to(coordinator.Sharing)
    header, parcels = header_and_parcels(world)
    other = replace(header, t1=bytes(32))
    assert reason(world, share(world, other, parcels)) is Reason.TRANSCRIPT_MISMATCH
    swapped = {**parcels, 2: parcels[3], 3: parcels[2]}
    assert reason(world, share(world, header, swapped)) is Reason.BAD_CIPHERTEXT
    for wrong in (
        (header, {2: parcels[2]}),
        (replace(header, dealt=header.dealt[:3]), parcels),
        (header, {**parcels, 2: Parcel(parcels[2].mailbox, b"")}),
        (header, {**parcels, 2: Parcel(parcels[2].mailbox + b"\0", parcels[2].seed)}),
    ):
        assert isinstance(refused(world, share(world, *wrong)), MalformedMessage)


def test_a_masked_input_must_be_of_this_transcript_and_length() -> None:
    world = bring_to(coordinator.Collecting)
    good = answer(world, 1)
    from secagg.messages import MaskedInput

    masked = MaskedInput.decode(good.message.body)
    other = replace(masked, t2=bytes(32)).encode()
    event = signed(world, 1, Step.MASKED_INPUT, other)
    assert reason(world, event) is Reason.TRANSCRIPT_MISMATCH
    long = signed(world, 1, Step.MASKED_INPUT, replace(masked, size=2001).encode())
    assert "2001 bytes" in str(refused(world, long))


def test_a_complaint_gives_the_session_up_and_names_the_dealer() -> None:
    world = bring_to(coordinator.Collecting)
    outside = signed(world, 1, Step.COMPLAIN, Complaint(9).encode())
    assert reason(world, outside) is Reason.NOT_A_SUBSET
    said = silo.complain(world.silos[1].party, world.session.context.digest, accused=3)
    assert said.message.body == Complaint(3).encode()
    world.feed(Received(said.message))
    world.pump()
    assert isinstance(world.session, coordinator.Aborted)
    assert world.ended is not None
    assert world.ended.accused == 3
    assert "site-001 cannot use what site-003 dealt" in world.ended.why


def test_confirmations_must_be_of_this_set_transcript_and_input() -> None:
    world = bring_to(coordinator.Confirming)
    confirm = Confirm.decode(answer(world, 1).message.body)
    for wrong in (
        replace(confirm, t2=bytes(32)),
        replace(confirm, survivors=(1, 2, 3)),
        replace(confirm, vector=bytes(32)),
    ):
        event = signed(world, 1, Step.CONFIRM, wrong.encode())
        assert reason(world, event) is Reason.TRANSCRIPT_MISMATCH


def test_an_abort_names_the_roster_of_the_session_and_nothing_else() -> None:
    world = bring_to(coordinator.Aborting)
    other = Abort(replace(world.roster, study="second").digest)
    assert reason(world, signed(world, 1, Step.ABORT, other.encode())) is Reason.ROSTER_MISMATCH
    for body in (b"", Abort(world.roster.digest).encode() + b"!"):
        assert isinstance(refused(world, signed(world, 1, Step.ABORT, body)), MalformedMessage)


def test_shares_must_be_the_committed_ones_of_exactly_the_survivors_and_the_dropped() -> None:
    world = bring_to(coordinator.Collecting, 5)
    world.kill(5)
    world.pump()
    world.deadline()
    world.run_until(coordinator.Unmasking)
    unmask = Unmask.decode(answer(world, 1).message.body)
    other = (unmask.shares_b[0][0], Secret(bytes(33)))
    no_element = (unmask.shares_b[0][0], Secret(b"\xff" * 33))

    def event(body: Unmask) -> Received:
        return signed(world, 1, Step.UNMASK, body.encode())

    forged = replace(unmask, shares_b=(other, *unmask.shares_b[1:]))
    assert reason(world, event(forged)) is Reason.BAD_COMMITMENT
    for wrong in (
        replace(unmask, shares_b=unmask.shares_b[1:]),
        replace(unmask, shares_r=()),
        replace(unmask, shares_b=(no_element, *unmask.shares_b[1:])),
    ):
        assert isinstance(refused(world, event(wrong)), MalformedMessage)


# --- late confirmations


def test_a_silo_that_confirms_late_can_stand_in_for_one_that_is_lost_for_good() -> None:
    world = bring_to(coordinator.Confirming)
    for index in (1, 2, 3):
        world.feed(answer(world, index))
    world.deadline()
    assert isinstance(world.session, coordinator.Unmasking)
    world.kill(3)
    assert isinstance(world.session.request_for(4), Survivors)
    late = answer(world, 4)
    world.feed(late)
    after = world.session
    world.feed(late)
    assert world.session is after
    world.pump()
    assert isinstance(world.session, coordinator.Summed)
    assert world.session.certificate.survivors == (1, 2, 3, 4)
    assert [m.sender for m in world.session.certificate.messages] == [1, 2, 3, 4]


def test_a_late_confirmation_of_another_set_is_refused() -> None:
    world = bring_to(coordinator.Confirming)
    for index in (1, 2, 3):
        world.feed(answer(world, index))
    world.deadline()
    t2 = world.session.confirmed.collected.t2  # type: ignore[attr-defined]
    wrong = Confirm(t2, (1, 2, 4), bytes(32)).encode()
    assert reason(world, signed(world, 4, Step.CONFIRM, wrong)) is Reason.TRANSCRIPT_MISMATCH
    again = signed(world, 1, Step.CONFIRM, wrong)
    assert reason(world, again) is Reason.DUPLICATE_SENDER


# --- dealers that cheat within what they sign, found only when their secrets are restored


def cheated(world: World, cheat: int, dropped: int) -> Ended:
    """Silo `cheat` deals, `dropped` drops before its input; what the coordinator ends with."""
    world.run_until(coordinator.Collecting)
    world.kill(dropped)
    world.pump()
    world.deadline()
    world.pump()
    assert world.sum is None
    assert world.ended is not None
    assert world.ended.certificate is not None
    assert world.ended.accused == cheat
    return world.ended


@pytest.mark.parametrize("constant", [0, 2**256])
def test_shares_that_are_not_of_one_secret_name_the_dealer(
    constant: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """2^256 is a field element but no 32-byte secret, 0 is another secret than the committed."""
    from secagg import shamir

    world = bring_to(coordinator.Sharing)
    with monkeypatch.context() as patched:
        share = constant.to_bytes(33, "big")
        patched.setattr(shamir, "split", lambda _s, _t, at, _e: {x: Secret(share) for x in at})
        world.feed(answer(world, 2))
    cheated(world, cheat=2, dropped=4)


def test_a_seed_that_does_not_open_for_a_dropped_silo_names_the_dealer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Silo 4 would have complained, but dies before it looks."""
    from secagg.messages import Advert
    from secagg.silo import advertised

    world = bring_to(coordinator.Sharing)
    assert isinstance(world.session, coordinator.Sharing)
    of_4 = Advert.decode(world.session.adverts[4].body).mask
    honest = advertised.seal
    with monkeypatch.context() as patched:
        patched.setattr(
            advertised, "seal", lambda s, k, info: honest(s, k, info + b"x" * (k == of_4))
        )
        world.feed(answer(world, 1))
    cheated(world, cheat=1, dropped=4)
