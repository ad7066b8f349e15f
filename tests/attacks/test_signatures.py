"""Who says it: forged, swapped, stale, doubled and missing messages, and strangers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from secagg import coordinator
from secagg.errors import Reason
from secagg.events import Adverts, Confirmations, Headers
from secagg.messages import Signed, Step
from study.quantity import CensusWork
from tests.attacks.stage import ME, OTHERS, Stage

Case = tuple[str, tuple[Signed, ...], Reason]


def cases(stage: Stage, m: tuple[Signed, ...]) -> Iterator[Case]:
    """What a coordinator in league with silo 5 can do to a step; the agent is silo 3."""
    stranger = Ed25519PrivateKey.generate()
    forged = Signed.by(stranger, m[0].step, 1, stage.ctx, m[0].body)
    stale = stage.sign(5, m[4].step, m[4].body, ctx=bytes(32))
    other_step = stage.sign(5, Step.COMPLAIN, m[4].body)
    outsider = stage.sign(5, m[4].step, m[4].body)
    yield "forged by a stranger", (forged, *m[1:]), Reason.BAD_SIGNATURE
    yield "no signature", (m[0], replace(m[1], signature=bytes(64)), *m[2:]), Reason.BAD_SIGNATURE
    yield "swapped", (*m[:3], replace(m[4], sender=4), m[4]), Reason.BAD_SIGNATURE
    yield "of another session", (*m[:4], stale), Reason.BAD_SIGNATURE
    yield "of another step", (*m[:4], other_step), Reason.WRONG_STEP
    yield "of a sixth silo", (*m[:4], replace(outsider, sender=6)), Reason.NOT_IN_ROSTER
    yield "of silo 0", (replace(outsider, sender=0), *m[1:]), Reason.NOT_IN_ROSTER
    yield "twice", (*m[:4], m[3]), Reason.DUPLICATE_SENDER
    yield "out of order", (m[1], m[0], *m[2:]), Reason.NOT_ASCENDING
    yield "below the threshold", m[1:4], Reason.BELOW_THRESHOLD


async def test_adverts_that_are_not_genuine_are_refused(fresh: Stage) -> None:
    fresh.open(CensusWork())
    await fresh.until(coordinator.Sharing)
    event = fresh.request(Adverts)
    for _, messages, reason in cases(fresh, event.messages):
        await fresh.refuses(Adverts(messages), reason)
    without_us = tuple(m for m in event.messages if m.sender != ME)
    await fresh.refuses(Adverts(without_us), Reason.OWN_MESSAGE_CHANGED)
    await fresh.harmless(event)


async def test_headers_that_are_not_genuine_are_refused(fresh: Stage) -> None:
    fresh.open(CensusWork())
    await fresh.until(coordinator.Collecting)
    event = fresh.request(Headers)
    for _, messages, reason in cases(fresh, event.messages):
        await fresh.refuses(replace(event, messages=messages), reason)
    without_us = tuple(m for m in event.messages if m.sender != ME)
    await fresh.refuses(replace(event, messages=without_us), Reason.OWN_MESSAGE_CHANGED)
    await fresh.harmless(event)


async def test_confirmations_that_are_not_genuine_are_refused(fresh: Stage) -> None:
    fresh.open(CensusWork())
    await fresh.until(coordinator.Unmasking)
    event = fresh.request(Confirmations)
    for _, messages, reason in cases(fresh, event.messages):
        await fresh.refuses(Confirmations(messages), reason)
    said = await fresh.ask(event)
    assert said.steps == [Step.UNMASK]


async def test_messages_of_an_older_session_are_refused(fresh: Stage) -> None:
    fresh.open(CensusWork())
    await fresh.until(coordinator.Sharing)
    old = fresh.request(Adverts)
    fresh.open(CensusWork())
    await fresh.until(coordinator.Sharing)
    new = fresh.request(Adverts)
    await fresh.refuses(old, Reason.BAD_SIGNATURE)
    mixed = Adverts((*new.messages[:4], old.messages[4]))
    await fresh.refuses(mixed, f"{Reason.BAD_SIGNATURE.value}: ADVERTISE of zenith")
    await fresh.harmless(new)


async def test_our_own_message_from_another_session_does_not_pass_for_ours(fresh: Stage) -> None:
    fresh.open(CensusWork())
    await fresh.until(coordinator.Sharing)
    old = fresh.request(Adverts)
    fresh.open(CensusWork())
    await fresh.until(coordinator.Sharing)
    new = fresh.request(Adverts)
    mixed = (*new.messages[:2], old.messages[2], *new.messages[3:])
    await fresh.refuses(Adverts(mixed), Reason.BAD_SIGNATURE)


async def test_whoever_dials_in_cannot_be_told_the_messages_of_two_keys(fresh: Stage) -> None:
    """A key of the coordinator's in the place of every other silo's is worth nothing: what counts
    is the roster that was pinned, not who has a certificate."""
    fresh.open(CensusWork())
    await fresh.until(coordinator.Sharing)
    event = fresh.request(Adverts)
    moles = {i: Ed25519PrivateKey.generate() for i in OTHERS}
    forged = tuple(
        m if m.sender == ME else Signed.by(moles[m.sender], m.step, m.sender, fresh.ctx, m.body)
        for m in event.messages
    )
    await fresh.refuses(Adverts(forged), Reason.BAD_SIGNATURE)
