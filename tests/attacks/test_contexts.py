"""What is asked: other terms than were agreed, and other terms than the other silos were given."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from protos.v1 import coordination_pb2 as pb
from secagg import coordinator
from secagg.codec import blob, items, text, u16, u32
from secagg.context import NO_HASH, Quantity
from secagg.errors import Reason
from secagg.events import Adverts, Confirmations, Headers, Open, Survivors
from secagg.messages import Header, Step
from secagg.roster import Member, Roster
from silo import admin, agent
from silo.files import write_file
from study.quantity import CensusWork, RoundWork, decode_work
from tests.attacks.conftest import Template
from tests.attacks.stage import ME, OTHERS, STUDY, Stage, sha256

# --- rosters and parameters


def unsafe(roster: Roster, t: int, c: int, members: int = 5) -> bytes:
    """The encoding of a roster that cannot be made here."""
    body = items(text(m.name) + blob(m.identity) for m in roster.members[:members])
    return text(roster.study) + u32(roster.epoch + 1) + u16(t) + u16(c) + body


@pytest.mark.parametrize(("t", "c"), [(3, 1), (3, 2), (4, 3), (2, 0), (6, 1)])
async def test_parameters_that_break_the_bounds_are_no_offer(fresh: Stage, t: int, c: int) -> None:
    pinned = fresh.victim.study.roster.read_bytes()
    task = fresh.federation.offer()
    task.offer.roster = unsafe(fresh.roster, t, c)
    answer = await fresh.liar.offer(task)
    assert answer is not None
    assert not answer.accepted
    assert "break 2t > N + c, t − c ≥ 2" in answer.rule
    logged = [line["reason"] for line in fresh.victim.log() if line["level"] == "error"]
    assert any(f"N = 5, t = {t}, c = {c} break" in reason for reason in logged)
    assert fresh.victim.study.roster.read_bytes() == pinned


async def test_a_roster_below_the_bounds_of_a_session_is_refused(fresh: Stage) -> None:
    context = fresh.open(CensusWork())
    for change in ({"threshold": 3}, {"colluders": 3}, {"silos": 6}):
        await fresh.refuses(Open(replace(context, **change)), f"{next(iter(change))} is")


async def test_a_roster_rolled_back_is_declined(fresh: Stage) -> None:
    pinned = fresh.victim.study.roster.read_bytes()
    answer = await fresh.liar.offer(fresh.federation.offer(replace(fresh.roster, epoch=0)))
    assert answer is not None
    assert not answer.accepted
    assert "it is older than the one" in answer.rule
    # Nor is it another roster of the same epoch, with a key of the coordinator's in one place.
    mole = Member("east", bytes(31) + b"\x01")
    swapped = replace(fresh.roster, members=(mole, *fresh.roster.members[1:]))
    answer = await fresh.liar.offer(fresh.federation.offer(swapped))
    assert answer is not None
    assert not answer.accepted
    assert fresh.victim.study.roster.read_bytes() == pinned
    assert any("declined" in str(line.get("answer")) for line in fresh.victim.log())
    context = fresh.open(CensusWork())
    await fresh.refuses(Open(replace(context, epoch=0)), "epoch is 0, this site has 1")


async def test_a_new_roster_waits_for_a_person_and_no_session_of_it_opens_before(
    fresh: Stage,
) -> None:
    grown = replace(fresh.roster, epoch=2)
    assert await fresh.liar.offer(fresh.federation.offer(grown)) is None
    context = replace(fresh.open(CensusWork(), round=2), epoch=2, roster=grown.digest)
    await fresh.refuses(Open(context), "when a person has accepted the new one")


async def test_a_second_study_is_never_accepted_without_a_person(fresh: Stage) -> None:
    """Its sums over another set, subtracted from this study's, would leave one silo's."""
    task = fresh.federation.offer(replace(fresh.roster, study="again"))
    task.study = "again"
    assert await fresh.liar.offer(task) is None
    assert not (fresh.victim.home / "studies" / "again" / "roster").exists()
    assert "other studies (trial)" in admin.roster(fresh.victim.home, "again")


async def test_offers_without_number_do_not_fill_the_disk(
    fresh: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(agent, "_MOST_OFFERS", 3)
    for number in range(5):
        task = fresh.federation.offer(replace(fresh.roster, study=f"study-{number}"))
        task.study = f"study-{number}"
        answer = await fresh.liar.offer(task)
        assert (answer is None) == (number < 3)
    assert answer is not None
    assert "that nobody here has accepted" in answer.rule
    assert len(list((fresh.victim.home / "studies").iterdir())) == 1 + 3
    grown = fresh.federation.offer(replace(fresh.roster, epoch=2))
    assert await fresh.liar.offer(grown) is None  # what was accepted can still be changed


# --- one silo is shown another session than it agreed to


@pytest.mark.parametrize(
    "change",
    [
        {"study": "other"},
        {"roster": bytes(32)},
        {"plan": bytes(32)},
        {"model": b"m" * 32},
        {"ring": 16},
        {"length": 3},
        {"encoding": bytes(32)},
        {"reservation": b"r" * 32},
        {"survivors": (1, 2, 3, 4)},
        {"previous": b"p" * 32},
        {"session": 9},
        {"quantity": Quantity("tags", 1)},
    ],
    ids=lambda change: next(iter(change)),
)
async def test_a_session_that_is_not_as_agreed_is_refused(
    fresh: Stage, change: dict[str, Any]
) -> None:
    context = fresh.open(CensusWork())
    await fresh.refuses(Open(replace(context, **change)), f"{next(iter(change))} is")
    await fresh.harmless(Open(context))


# --- the silos are shown different sessions


@pytest.mark.parametrize(
    "change",
    [
        {"model": b"m" * 32},
        {"plan": bytes(32)},
        {"roster": b"r" * 32},
        {"encoding": bytes(32)},
        {"previous": b"p" * 32},
        {"session": 9},
    ],
    ids=lambda change: next(iter(change)),
)
async def test_silos_that_were_shown_different_sessions_do_not_talk_to_one_another(
    fresh: Stage, change: dict[str, Any]
) -> None:
    """The others advertised for a session that differs in one thing; their adverts mean nothing
    here, so no share is dealt and no mask is made that could fail to cancel."""
    context = fresh.open(CensusWork())
    said = await fresh.ask(Open(context))
    other = replace(context, **change).digest
    adverts = []
    for i in OTHERS:
        (sent,) = fresh.peers[i].deliver(Open(context))
        adverts.append(fresh.sign(i, Step.ADVERTISE, sent.message.body, other))
    mixed = Adverts((*adverts[:2], said.messages[0], *adverts[2:]))
    await fresh.refuses(mixed, Reason.BAD_SIGNATURE)


async def test_what_was_computed_since_for_another_proposal_is_not_masked(fresh: Stage) -> None:
    """Another proposal for the same quantity, from another model for example, leaves its vector
    under the name of ours; the coordinator lets it be, and goes on with the session."""
    fresh.open(CensusWork())
    await fresh.until(coordinator.Sharing)
    vector = fresh.victim.study.vector("census", 1) / "vector"
    promised = vector.read_bytes()
    write_file(vector, bytes(len(promised)))
    await fresh.until(coordinator.Summed)
    others = sum(np.frombuffer(peer.vector.tobytes(), "<u4") for peer in fresh.peers.values())
    assert np.any(np.frombuffer(promised, "<u4"))
    assert fresh.sum == (others + np.frombuffer(promised, "<u4")).astype("<u4").tobytes()


async def test_silos_that_were_shown_different_sets_of_adverts_mask_nothing(fresh: Stage) -> None:
    fresh.open(CensusWork())
    await fresh.until(coordinator.Sharing)
    event = fresh.request(Adverts)
    said = await fresh.ask(Adverts(event.messages[:4]))  # we see four silos, the others five
    assert said.steps == [Step.SHARE]
    dealt = [fresh.peers[i].deliver(event)[0] for i in OTHERS]
    headers = (dealt[0].message, dealt[1].message, said.messages[0], dealt[2].message)
    parcels = {i: sent.parcels[ME] for i, sent in zip((1, 2, 4), dealt, strict=False)}
    await fresh.refuses(Headers(headers, parcels), Reason.TRANSCRIPT_MISMATCH)


async def test_silos_that_were_shown_different_sets_of_headers_unmask_nothing(
    fresh: Stage,
) -> None:
    fresh.open(CensusWork())
    await fresh.until(coordinator.Collecting)
    event = fresh.request(Headers)
    ours = Headers(event.messages[:4], {i: p for i, p in event.parcels.items() if i < 5})
    said = await fresh.ask(ours)
    assert said.steps == [Step.MASKED_INPUT]
    survivors = (1, 2, 3, 4)
    confirmations = []
    for i in OTHERS[:3]:
        fresh.peers[i].deliver(fresh.request(Headers, i))  # all five
        confirmations += [s.message for s in fresh.peers[i].deliver(Survivors(survivors))]
    mine = (await fresh.ask(Survivors(survivors))).messages
    relayed = Confirmations((*confirmations[:2], *mine, confirmations[2]))
    await fresh.refuses(relayed, Reason.TRANSCRIPT_MISMATCH)


async def test_a_header_of_another_world_is_refused_also_when_its_dealer_signs_it(
    fresh: Stage,
) -> None:
    """A colluder signs whatever transcript the coordinator likes; ours is the one we saw."""
    fresh.open(CensusWork())
    await fresh.until(coordinator.Collecting)
    event = fresh.request(Headers)
    header = replace(Header.decode(event.messages[0].body), t1=NO_HASH)
    lie = fresh.sign(1, Step.SHARE, header.encode())
    changed = Headers((lie, *event.messages[1:]), event.parcels)
    await fresh.refuses(changed, Reason.TRANSCRIPT_MISMATCH)
    await fresh.harmless(event)


async def test_models_without_number_do_not_fill_the_disk(
    counted: Stage, template: Template
) -> None:
    work = decode_work((template.folder / "round.json").read_bytes())
    assert isinstance(work, RoundWork)
    for number in range(3):
        model = np.full(sum(work.sizes), number, "<f4").tobytes()
        counted.liar.artifacts[sha256(model)] = model
        context = counted.open(work, model=sha256(model))
        await counted.refuses(Open(context), "the first model is not")
        kept = [file.name for file in counted.victim.study.artifacts.iterdir()]
        assert kept == [sha256(model).hex()]


async def test_a_task_of_an_unknown_kind_is_refused(fresh: Stage) -> None:
    task = pb.Task(study=STUDY, session=7, adverts=pb.Adverts(signed=[b"no message"]))
    await fresh.refuses(task, "signed message")
