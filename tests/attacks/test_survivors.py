"""Over whom: lists that overlap, two sets, sets of others; and shares before they are due."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from secagg import coordinator
from secagg.errors import Reason
from secagg.events import Confirmations, Headers, Open, Survivors
from secagg.messages import Confirm, Signed, Step
from study.quantity import CensusWork, ImagesWork, TagsWork, decode_work
from study.reservation import renumber
from tests.attacks.conftest import Template
from tests.attacks.stage import ME, OTHERS, Stage, sha256

ALL = (1, 2, 3, 4, 5)


async def with_inputs(stage: Stage, *absent: int) -> None:
    """All inputs are here, but those of `absent`, who vanished after sharing."""
    stage.open(CensusWork())
    await stage.until(coordinator.Collecting)
    await stage.until(coordinator.Confirming, *absent)


def confirmations(stage: Stage, ours: Signed, survivors: tuple[int, ...]) -> Confirmations:
    """What t and more colluders would say to get our shares for `survivors`."""
    mine = Confirm.decode(ours.body)
    theirs = replace(mine, survivors=survivors)
    signed = {i: stage.sign(i, Step.CONFIRM, theirs.encode()) for i in OTHERS if i in survivors}
    return Confirmations(tuple({**signed, ME: ours}[i] for i in sorted({*signed, ME})))


async def test_shares_of_b_and_of_r_never_overlap_whatever_is_asked(fresh: Stage) -> None:
    """There is no message that names dropped silos: a silo derives them from the one set that it
    confirmed, so no list of alive and dropped silos can overlap."""
    await with_inputs(fresh, 5)
    survivors = (1, 2, 3, 4)
    (ours,) = (await fresh.ask(Survivors(survivors))).messages
    await fresh.refuses(confirmations(fresh, ours, ALL), Reason.TRANSCRIPT_MISMATCH)
    await fresh.refuses(Survivors(ALL), Reason.SECOND_VIEW)
    event = confirmations(fresh, ours, survivors)
    said = await fresh.ask(event)
    given = fresh.shares_of(said)
    assert given == {("b", 1), ("b", 2), ("b", 3), ("b", 4), ("r", 5)}
    again = await fresh.ask(event)
    assert again.submitted == said.submitted
    lie = confirmations(fresh, ours, (1, 2, 3, 5))
    await fresh.refuses(lie, Reason.TRANSCRIPT_MISMATCH, again=True)
    for survivors in ((1, 2, 3, 5), (2, 3, 4, 5)):
        await fresh.refuses(Survivors(survivors), Reason.SECOND_VIEW, again=True)


async def test_survivors_below_t_or_outside_our_view_are_refused(fresh: Stage) -> None:
    """Silo 5 vanished before it shared, so it is in nobody's U2."""
    fresh.open(CensusWork())
    await fresh.until(coordinator.Sharing)
    await fresh.until(coordinator.Confirming, 5)
    cases = (
        ((2, 3, 4), Reason.BELOW_THRESHOLD),
        ((1, 2, 4), Reason.SELF_NOT_INCLUDED),
        ((1, 2, 3, 5), Reason.NOT_A_SUBSET),
        (ALL, Reason.NOT_A_SUBSET),
        ((1, 2, 3, 4, 9), Reason.NOT_A_SUBSET),
        ((4, 3, 2, 1), Reason.NOT_ASCENDING),
    )
    for survivors, reason in cases:
        await fresh.refuses(Survivors(survivors), reason)
    doubled = Survivors((1, 1, 2, 3, 4))
    await fresh.refuses(doubled, Reason.NOT_ASCENDING, again=True)
    await fresh.harmless(Survivors((1, 2, 3, 4)))


async def test_a_second_survivor_set_is_refused_also_after_a_restart(fresh: Stage) -> None:
    await with_inputs(fresh)
    (ours,) = (await fresh.ask(Survivors(ALL))).messages
    await fresh.refuses(Survivors((1, 2, 3, 4)), Reason.SECOND_VIEW)
    await fresh.restart()
    await fresh.refuses(Survivors((1, 2, 3, 4)), Reason.SECOND_VIEW)
    assert (await fresh.ask(Survivors(ALL))).messages == [ours]
    lie = confirmations(fresh, ours, (1, 2, 3, 4))
    await fresh.refuses(lie, Reason.TRANSCRIPT_MISMATCH)


async def test_shares_before_a_survivor_set_was_confirmed_are_refused(fresh: Stage) -> None:
    await with_inputs(fresh)
    confirmed = []
    for i in OTHERS:
        confirmed += [sent.message for sent in fresh.peers[i].deliver(Survivors(ALL))]
    await fresh.refuses(Confirmations(tuple(confirmed)), "Confirmations in state MaskedState")
    await fresh.harmless(Survivors(ALL))


async def test_survivors_before_there_is_an_input_are_refused(fresh: Stage) -> None:
    fresh.open(CensusWork())
    await fresh.until(coordinator.Collecting)
    await fresh.refuses(Survivors(ALL), "Survivors in state Shared")
    await fresh.harmless(fresh.request(Headers))


async def test_fewer_than_t_confirmations_open_nothing(fresh: Stage) -> None:
    await with_inputs(fresh)
    (ours,) = (await fresh.ask(Survivors(ALL))).messages
    event = confirmations(fresh, ours, ALL)
    await fresh.refuses(Confirmations(event.messages[:3]), Reason.BELOW_THRESHOLD)
    padded = Confirmations((*event.messages[:3], event.messages[2]))
    await fresh.refuses(padded, Reason.DUPLICATE_SENDER)


async def test_a_confirmation_from_outside_the_survivors_does_not_count(fresh: Stage) -> None:
    await with_inputs(fresh, 5)
    (ours,) = (await fresh.ask(Survivors((1, 2, 3, 4)))).messages
    genuine = confirmations(fresh, ours, (1, 2, 3, 4)).messages
    outsider = fresh.sign(5, Step.CONFIRM, Confirm.decode(genuine[0].body).encode())
    lie = Confirmations((*genuine[:3], outsider))
    await fresh.refuses(lie, f"{Reason.NOT_A_SUBSET.value}: zenith confirms without being")


async def test_images_are_summed_over_exactly_the_silos_of_their_tags(
    counted: Stage, template: Template
) -> None:
    tags = decode_work((template.folder / "tags.json").read_bytes())
    assert isinstance(tags, TagsWork)
    counted.open(tags)
    for peer in counted.peers.values():
        peer.vector = np.zeros(tags.slots, np.uint32)  # the others offer nothing
    await counted.until(coordinator.Summed)
    await counted.settle()
    total = counted.sum
    counted.liar.artifacts[sha256(total)] = total
    occupied = len(renumber(np.frombuffer(total, "<u4")))
    # One site that marks all slots would win most of them, and be most of the auxiliary set.
    flood = ImagesWork(tags=sha256(total).hex(), occupied=tags.images + 6, record_size=65)
    context = counted.open(flood, reservation=sha256(total), survivors=ALL)
    await counted.refuses(Open(context), "all sites together offer at most")
    work = ImagesWork(tags=sha256(total).hex(), occupied=occupied, record_size=65)
    context = counted.open(work, reservation=sha256(total), survivors=ALL)
    await counted.refuses(Open(replace(context, survivors=(1, 2, 3, 4))), "survivors is")
    await counted.refuses(Open(replace(context, survivors=(1, 2, 4, 5))), "survivors is (1, 2, 4")
    await counted.until(coordinator.Confirming)
    await counted.refuses(Survivors((1, 2, 3, 4)), Reason.WRONG_SURVIVORS)
    await counted.until(coordinator.Summed)
    await counted.settle()
    # A second union over other silos would tell by the difference of the two who made what.
    await counted.refuses(Open(counted.open(tags, round=2)), "in a union already")
