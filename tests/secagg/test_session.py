"""What a session promises when everybody follows the protocol and some of them die."""

from __future__ import annotations

import numpy as np
import pytest

from secagg import coordinator, silo
from secagg.context import Quantity
from secagg.events import Cancel, Deadline, Received
from secagg.ledger import History
from tests.secagg.world import World, make_world

Phase = type[coordinator.CoordinatorState]


def run_until(world: World, phase: Phase) -> None:
    world.pump(lambda _: not isinstance(world.session, phase))
    assert isinstance(world.session, phase)


def assert_exact(world: World, survivors: list[int]) -> None:
    assert isinstance(world.session, coordinator.Summed)
    assert world.session.certificate.survivors == tuple(survivors)
    assert world.sum is not None
    np.testing.assert_array_equal(world.sum, world.expected(survivors))


@pytest.mark.parametrize("ring", [8, 16, 32])
@pytest.mark.parametrize("silos", [3, 4, 7, 12])
def test_the_sum_is_exact_when_all_stay(ring: int, silos: int) -> None:
    world = make_world(silos, seed=ring * silos, ring=ring, length=300_001)
    world.pump()
    assert_exact(world, list(range(1, silos + 1)))


def test_a_silo_that_dies_before_advertising_is_left_out() -> None:
    world = make_world(4)
    world.kill(3)
    world.pump()
    world.deadline()
    world.pump()
    assert_exact(world, [1, 2, 4])


@pytest.mark.parametrize("dead", [1, 2, 5, 7])
def test_a_silo_that_dies_after_sharing_is_left_out_and_its_masks_are_removed(dead: int) -> None:
    world = make_world(7)
    run_until(world, coordinator.Collecting)
    world.kill(dead)
    world.pump()
    world.deadline()
    world.pump()
    assert_exact(world, [i for i in range(1, 8) if i != dead])


@pytest.mark.parametrize("phase", [coordinator.Confirming, coordinator.Unmasking])
def test_a_silo_that_dies_after_its_input_was_committed_is_in_the_sum(phase: Phase) -> None:
    world = make_world(4)
    run_until(world, phase)
    world.kill(2)
    world.pump()
    if isinstance(world.session, coordinator.Confirming):
        world.deadline()
        world.pump()
    assert_exact(world, [1, 2, 3, 4])


@pytest.mark.parametrize(
    "phase", [coordinator.Sharing, coordinator.Collecting, coordinator.Confirming]
)
def test_too_few_silos_abort_with_names_threshold_and_what_to_do(phase: Phase) -> None:
    world = make_world(4)
    run_until(world, phase)
    world.kill(2, 4)
    world.pump()
    world.deadline()
    world.pump()
    why = getattr(world.session, "why", "")
    assert "site-002, site-004" in why
    assert "the threshold is 3" in why
    assert "Bring a missing silo's agent back" in why
    assert world.sum is None


def test_an_abort_after_masking_needs_proof_and_then_the_quantity_is_free_again() -> None:
    world = make_world(4)
    run_until(world, coordinator.Collecting)
    world.kill(2, 4)
    world.pump()
    world.deadline()
    world.pump()
    assert isinstance(world.session, coordinator.Aborting)
    world.silos[2].restart()
    world.pump()
    assert isinstance(world.session, coordinator.Aborted)
    world.silos[4].restart()
    world.settle()
    world.reopen(session=2)
    world.pump()
    assert_exact(world, [1, 2, 3, 4])


def test_before_any_mask_a_session_is_abandoned_without_proof() -> None:
    world = make_world(4)
    run_until(world, coordinator.Sharing)
    world.feed(Cancel("the study was paused"))
    assert isinstance(world.session, coordinator.Abandoned)
    world.reopen(session=2)
    world.pump()
    assert_exact(world, [1, 2, 3, 4])


def test_unmasking_waits_for_silos_to_come_back_and_cannot_be_cancelled() -> None:
    world = make_world(4)
    run_until(world, coordinator.Unmasking)
    world.kill(1, 2)
    world.pump()
    world.feed(Deadline())
    assert isinstance(world.session, coordinator.Unmasking)
    world.silos[1].restart()
    world.pump()
    assert_exact(world, [1, 2, 3, 4])


@pytest.mark.parametrize(
    ("phase", "summed"),
    [
        (coordinator.Sharing, False),
        (coordinator.Collecting, False),
        (coordinator.Confirming, True),
        (coordinator.Unmasking, True),
    ],
)
def test_a_silo_restarted_at_any_step_rejoins_or_counts_as_dropped(
    phase: Phase, summed: bool
) -> None:
    world = make_world(7)
    run_until(world, phase)
    world.silos[3].restart()

    def alive(index: int) -> bool:
        return not isinstance(world.silos[index].state, silo.Lost)

    for _ in range(4):
        world.pump(alive)
        if not world.session.over:
            world.deadline()
    assert_exact(world, [i for i in range(1, 8) if summed or i != 3])
    world.settle()
    record = next(iter(world.silos[3].state.history.sessions.values()))
    assert record.settled is None or record.settled.included is summed


def test_every_message_may_be_delivered_twice() -> None:
    world = make_world(4)
    seen = []
    while not world.session.over:
        for index, site in world.silos.items():
            request = world.session.request_for(index)
            if request is None:
                continue
            first = site.deliver(request)
            seen += first
            if not isinstance(site.state, silo.Lost):
                assert [s.message for s in site.deliver(request)][-1:] == [
                    s.message for s in first
                ][-1:]
            for sent in first:
                world.feed(Received(sent.message, sent.parcels))
                if not world.session.over:
                    world.feed(Received(sent.message, sent.parcels))
    assert_exact(world, [1, 2, 3, 4])


def test_the_ledger_survives_every_crash_point() -> None:
    """Cut the ledger after each entry: what is left never lets the silo speak twice."""
    world = make_world(4)
    world.pump()
    world.settle()
    site = world.silos[1]
    for kept in range(len(site.disk) + 1):
        state = silo.resume(site.party, History.of(site.disk[:kept]))
        assert state.history.last_session == (1 if kept else 0)


def test_secrets_never_show_in_a_repr() -> None:
    world = make_world(4)
    run_until(world, coordinator.Collecting)
    state = world.silos[1].state
    raw = state.r.reveal()  # type: ignore[attr-defined]
    text = repr(world.silos) + repr(world.session)
    assert raw.hex() not in text
    assert repr(raw) not in text
    assert str(raw)[2:-1] not in text


def test_wiped_secrets_are_zeros() -> None:
    world = make_world(4)
    run_until(world, coordinator.Collecting)
    shared = world.silos[1].state
    world.pump()
    assert shared.r.reveal() == bytes(32)  # type: ignore[attr-defined]
    assert shared.b.reveal() == bytes(32)  # type: ignore[attr-defined]


def test_no_mask_key_is_ever_used_twice() -> None:
    world = make_world(4)
    for session in range(1, 4):
        world.reopen(
            session=session, quantity=Quantity("round", session), model=bytes([session]) * 32
        )
        world.pump()
        assert_exact(world, [1, 2, 3, 4])
        world.settle()
    keys = [key for site in world.silos.values() for key in site.mask_keys]
    # Four self masks, and each of the six pairs once at either end, in three sessions.
    assert len(keys) == 3 * (4 + 2 * 6)
    assert len(set(keys)) == 3 * (4 + 6)
