"""What is dealt: ciphertexts and shares that are not what, or for whom, they should be."""

from __future__ import annotations

from dataclasses import replace

import pytest

from secagg import coordinator, keys
from secagg.errors import Reason
from secagg.events import Adverts, Headers
from secagg.messages import Advert, Complaint, Dealt, Header, Parcel, Step
from secagg.primitives import Secret, digest, seal
from secagg.shamir import PRIME, SHARE_BYTES
from study.quantity import CensusWork
from tests.attacks.stage import ME, Stage

SHARE = bytes(32) + b"\x07"


async def at_headers(stage: Stage) -> Headers:
    stage.open(CensusWork())
    await stage.until(coordinator.Collecting)
    return stage.request(Headers)


async def test_a_parcel_that_its_dealer_did_not_sign_for_is_refused(fresh: Stage) -> None:
    """Only the coordinator can have done it, so no dealer is accused."""
    event = await at_headers(fresh)
    p = event.parcels
    assert isinstance(fresh.session, coordinator.Collecting)
    to_four = fresh.session.parcels[1][4]
    cases = {
        "east": {**p, 1: p[2], 2: p[1]},
        "north": {**p, 2: replace(p[2], mailbox=p[4].mailbox)},
        "west": {**p, 4: Parcel(b"", b"")},
        "zenith": {i: parcel for i, parcel in p.items() if i != 5},
    }
    for name, parcels in cases.items():
        reason = f"{Reason.BAD_CIPHERTEXT.value}: relayed from {name}"
        await fresh.refuses(replace(event, parcels=parcels), reason)
    for parcel in (to_four, replace(p[1], seed=p[2].seed)):
        changed = replace(event, parcels={**p, 1: parcel})
        await fresh.refuses(changed, Reason.BAD_CIPHERTEXT, again=True)
    await fresh.harmless(event)


def redealt(stage: Stage, event: Headers, dealer: int, dealt: Dealt, parcel: Parcel) -> Headers:
    """The same request, but that a dealer in league with the coordinator signed another deal."""
    at = [m.sender for m in event.messages].index(dealer)
    header = Header.decode(event.messages[at].body)
    entries = tuple(dealt if entry.receiver == ME else entry for entry in header.dealt)
    signed = stage.sign(dealer, Step.SHARE, replace(header, dealt=entries).encode())
    messages = (*event.messages[:at], signed, *event.messages[at + 1 :])
    return Headers(messages, {**event.parcels, dealer: parcel})


def deal(stage: Stage, event: Headers, dealer: int, plain: bytes, to: int = ME) -> Headers:
    """`plain` sealed by a colluding dealer, with commitments to exactly its two halves."""
    header = next(Header.decode(m.body) for m in event.messages if m.sender == dealer)
    assert isinstance(stage.session, coordinator.Collecting)
    mailbox = Advert.decode(stage.session.adverts[ME].body).mailbox
    info = keys.sealing_info("mailbox", stage.ctx, header.t1, dealer, to)
    sealed = seal(Secret(plain), mailbox, info)
    halves = {"share b": Secret(plain[:SHARE_BYTES]), "share r": Secret(plain[SHARE_BYTES:])}
    share_b, share_r = (
        keys.commit(kind, stage.ctx, header.t1, dealer, ME, half) for kind, half in halves.items()
    )
    parcel = replace(event.parcels[dealer], mailbox=sealed)
    dealt = header.to(ME)._replace(share_b=share_b, share_r=share_r)
    dealt = dealt._replace(mailbox_parcel=digest("parcel", sealed))
    return redealt(stage, event, dealer, dealt, parcel)


async def complains(stage: Stage, event: Headers, dealer: int, reason: Reason) -> None:
    """No mask is made, nothing is promised; the dealer is named to the log and the coordinator."""
    ledger = stage.victim.ledger()
    said = await stage.ask(event)
    assert said.steps == [Step.COMPLAIN]
    assert Complaint.decode(said.messages[0].body).accused == dealer
    assert not said.uploaded
    assert stage.victim.ledger() == ledger
    log = [line["reason"] for line in stage.victim.log() if line["event"] == "complained"]
    name = stage.roster.member(dealer).name
    assert log[-1] == f"{reason.value}: dealt by {name}"


@pytest.mark.parametrize("dealer", [1, 5])
@pytest.mark.parametrize(
    "plain",
    [
        PRIME.to_bytes(33, "big") + SHARE,
        SHARE + b"\xff" * 33,
        SHARE + SHARE[1:],
        SHARE + SHARE + b"\0",
        b"",
    ],
    ids=["b beyond the field", "r beyond the field", "short", "long", "empty"],
)
async def test_a_share_that_is_no_field_element_is_complained_about(
    fresh: Stage, plain: bytes, dealer: int
) -> None:
    event = await at_headers(fresh)
    await complains(fresh, deal(fresh, event, dealer, plain), dealer, Reason.BAD_COMMITMENT)
    await fresh.harmless(event)


async def test_a_share_of_another_silo_is_complained_about(fresh: Stage) -> None:
    """The dealer gives us the share that it owes to somebody else, under our commitment."""
    event = await at_headers(fresh)
    swapped = deal(fresh, event, 2, SHARE + SHARE)
    header = next(Header.decode(m.body) for m in swapped.messages if m.sender == 2)
    theirs = header.to(4)
    dealt = header.to(ME)._replace(share_b=theirs.share_b, share_r=theirs.share_r)
    lie = redealt(fresh, event, 2, dealt, swapped.parcels[2])
    await complains(fresh, lie, 2, Reason.BAD_COMMITMENT)


async def test_a_ciphertext_for_another_silo_is_complained_about_where_its_dealer_signed_it(
    fresh: Stage,
) -> None:
    event = await at_headers(fresh)
    await complains(fresh, deal(fresh, event, 2, SHARE * 2, to=4), 2, Reason.BAD_CIPHERTEXT)


async def test_a_ciphertext_copied_from_an_honest_dealer_opens_nothing(fresh: Stage) -> None:
    """Else a colluder could use us to open what was sealed to us by others."""
    event = await at_headers(fresh)
    header = next(Header.decode(m.body) for m in event.messages if m.sender == 2)
    copied = event.parcels[1]
    dealt = header.to(ME)._replace(
        mailbox_parcel=digest("parcel", copied.mailbox),
        seed_parcel=digest("parcel", copied.seed),
    )
    await complains(fresh, redealt(fresh, event, 2, dealt, copied), 2, Reason.BAD_CIPHERTEXT)


async def test_a_seed_that_is_not_the_committed_one_is_complained_about(fresh: Stage) -> None:
    event = await at_headers(fresh)
    header = next(Header.decode(m.body) for m in event.messages if m.sender == 1)
    dealt = header.to(ME)._replace(seed=bytes(32))
    lie = redealt(fresh, event, 1, dealt, event.parcels[1])
    await complains(fresh, lie, 1, Reason.BAD_COMMITMENT)


async def test_a_header_that_deals_to_others_is_complained_about(fresh: Stage) -> None:
    event = await at_headers(fresh)
    header = Header.decode(event.messages[0].body)
    short = fresh.sign(1, Step.SHARE, replace(header, dealt=header.dealt[:4]).encode())
    lie = replace(event, messages=(short, *event.messages[1:]))
    ledger = fresh.victim.ledger()
    said = await fresh.ask(lie)
    assert said.steps == [Step.COMPLAIN]
    assert fresh.victim.ledger() == ledger


async def test_a_key_that_nobody_can_seal_to_names_its_silo(fresh: Stage) -> None:
    fresh.open(CensusWork())
    await fresh.until(coordinator.Sharing)
    event = fresh.request(Adverts)
    advert = Advert.decode(event.messages[4].body)
    low = replace(advert, mailbox=advert.mailbox[:-32] + bytes(32))
    lie = Adverts((*event.messages[:4], fresh.sign(5, Step.ADVERTISE, low.encode())))
    await fresh.refuses(lie, f"{Reason.BAD_KEY.value}: advert of zenith")
    await fresh.harmless(event)
