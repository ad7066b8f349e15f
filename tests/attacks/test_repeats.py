"""Once more: replays, finished rounds, static sums, claimed failures and false certificates."""

from __future__ import annotations

from dataclasses import replace

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from protos.v1 import coordination_pb2 as pb
from secagg import coordinator
from secagg.certificate import Certificate
from secagg.context import Quantity
from secagg.errors import Reason
from secagg.events import Confirmations, GiveUp, Open, Settle
from secagg.messages import Abort, Confirm, Signed, Step
from study.quantity import CensusWork, RoundWork, TagsWork, Work, decode_work
from tests.attacks.conftest import Template
from tests.attacks.stage import OTHERS, STUDY, Stage, sha256


def work_of(template: Template, name: str) -> Work:
    return decode_work((template.folder / f"{name}.json").read_bytes())


async def summed(stage: Stage, work: Work, *absent: int, **changes: object) -> None:
    stage.open(work, **changes)
    await stage.until(coordinator.Unmasking, *absent)
    await stage.until(coordinator.Summed, *absent)


async def test_a_session_number_is_used_once(counted: Stage, template: Template) -> None:
    tags = work_of(template, "tags")
    for number in (counted.number, 2, 1):
        counted.number = number - 1
        context = counted.open(tags)
        await counted.refuses(Open(context), f"session {number} was proposed, the ledger holds 5")


async def test_a_session_under_way_is_not_opened_as_another(
    counted: Stage, template: Template
) -> None:
    context = counted.open(work_of(template, "tags"))
    said = await counted.ask(Open(context))
    again = await counted.ask(Open(context))
    assert again.submitted == said.submitted  # its answer may have been lost on the way
    counted.number -= 1
    other = counted.open(work_of(template, "moments"))
    await counted.refuses(Open(other), Reason.SESSION_NOT_NEW)


async def test_a_finished_round_is_not_asked_again_without_one_silo(
    counted: Stage, template: Template
) -> None:
    """The subtraction: four silos were summed; it says that this failed, and asks all five."""
    work, model = work_of(template, "round"), sha256((template.folder / "model").read_bytes())
    assert isinstance(work, RoundWork)
    await summed(counted, work, 5, model=model)
    assert counted.sum
    again = counted.open(work, model=model)
    await counted.refuses(Open(again), Reason.IN_DOUBT)
    await counted.refuses(Open(counted.open(work, round=2, model=model)), Reason.IN_DOUBT)


async def test_a_finished_round_is_not_summed_again_under_any_name(
    counted: Stage, template: Template
) -> None:
    work, model = work_of(template, "round"), sha256((template.folder / "model").read_bytes())
    assert isinstance(work, RoundWork)
    await summed(counted, work, model=model)
    await counted.settle()
    await counted.refuses(Open(counted.open(work, model=model)), Reason.QUANTITY_CLOSED)
    renamed = counted.open(work, round=2, model=model)
    await counted.refuses(Open(renamed), Reason.MODEL_REUSED)
    other = work.model_copy(update={"clips": tuple(2 * clip for clip in work.clips)})
    rescaled = counted.open(other, round=3, model=model)
    await counted.refuses(Open(rescaled), Reason.MODEL_REUSED)
    for purpose in ("tags", "census", "a-name-of-its-own"):
        disguised = replace(rescaled, quantity=Quantity(purpose, 3))
        await counted.refuses(Open(disguised), f"quantity is {purpose} 3, this site has round 3")


@pytest.mark.parametrize("name", ["census", "moments"])
async def test_static_sums_are_not_asked_again_over_another_set(
    counted: Stage, template: Template, name: str
) -> None:
    """The whole and the whole without one silo, subtracted, would be that silo's."""
    work = CensusWork() if name == "census" else work_of(template, "moments")
    if name == "moments":
        await summed(counted, work)
        await counted.settle()
    context = counted.open(work)
    await counted.refuses(Open(context), Reason.QUANTITY_CLOSED)
    later = counted.open(work, round=2)
    await counted.refuses(Open(later), "the plan has 1 to 1")
    next_epoch = replace(later, epoch=2)
    await counted.refuses(Open(replace(next_epoch, quantity=Quantity(name, 1))), "epoch is 2")


async def test_a_count_cannot_be_searched_for(counted: Stage, template: Template) -> None:
    tags = work_of(template, "tags")
    assert isinstance(tags, TagsWork)
    for total in (99, 50, 101):
        asked = counted.open(tags.model_copy(update={"total_count": total}))
        await counted.refuses(Open(asked), f"total_count is {total}, it was 100")


async def test_a_claimed_failure_needs_t_genuine_aborts(counted: Stage, template: Template) -> None:
    tags = work_of(template, "tags")
    counted.open(tags)
    await counted.until(coordinator.Confirming)
    ctx = counted.ctx
    aborts = tuple(counted.abort(i) for i in OTHERS)
    forged = Signed.by(Ed25519PrivateKey.generate(), Step.ABORT, 3, ctx, aborts[1].body)
    other = counted.abort(5, ctx=bytes(32))
    elsewhere = Abort(replace(counted.roster, study="second").digest).encode()
    foreign = counted.sign(5, Step.ABORT, elsewhere)
    false = (
        Certificate(Step.ABORT, ctx, (*aborts[:3], foreign)),
        Certificate(Step.ABORT, ctx, tuple(counted.sign(i, Step.ABORT, b"") for i in OTHERS)),
        Certificate(Step.ABORT, ctx, aborts[:3]),
        Certificate(Step.ABORT, ctx, (*aborts[:2], forged, aborts[2])),
        Certificate(Step.ABORT, ctx, (*aborts[:3], other)),
        Certificate(Step.ABORT, ctx, (*aborts[:3], aborts[2])),
        Certificate(Step.CONFIRM, ctx, aborts),
    )
    for certificate in false:
        await counted.refuses(Settle(certificate), Reason.BAD_CERTIFICATE)
    number = counted.number
    again = counted.open(tags, round=2)
    await counted.refuses(Open(again), f"session {number} (tags 1)")


async def test_a_session_ends_in_one_way_only(counted: Stage, template: Template) -> None:
    """CONFIRM and ABORT do not exclude each other, so a liar can come by both certificates."""
    counted.open(work_of(template, "tags"))
    await counted.until(coordinator.Unmasking)
    confirmed = counted.request(Confirmations).messages
    aborts = tuple(counted.abort(i) for i in OTHERS)
    said = await counted.ask(Settle(Certificate(Step.ABORT, counted.ctx, aborts)))
    assert said.refusals == []
    as_sum = Certificate(Step.CONFIRM, counted.ctx, confirmed)
    await counted.refuses(Settle(as_sum), "this session ended otherwise")


async def test_a_sum_over_another_set_than_we_confirmed_settles_nothing(
    counted: Stage, template: Template
) -> None:
    counted.open(work_of(template, "tags"))
    await counted.until(coordinator.Unmasking)
    ours = Confirm.decode(counted.request(Confirmations).messages[0].body)
    theirs = replace(ours, survivors=(1, 2, 4, 5))
    messages = tuple(counted.sign(i, Step.CONFIRM, theirs.encode()) for i in OTHERS)
    lie = Settle(Certificate(Step.CONFIRM, counted.ctx, messages))
    await counted.refuses(lie, "another sum than the one we confirmed")


async def test_a_certificate_counts_for_its_own_session_only(
    counted: Stage, template: Template
) -> None:
    counted.open(work_of(template, "tags"))
    await counted.until(coordinator.Summed)
    certificate = await counted.settle()
    outcome = pb.Outcome(certificate=certificate.encode())
    wrong = pb.Task(study=STUDY, session=counted.number + 1, outcome=outcome)
    await counted.refuses(wrong, f"the certificate of session {counted.number}")
    # One of a session that we never saw, under the number of one that we did.
    unknown = Certificate(
        Step.ABORT,
        bytes(32),
        tuple(counted.abort(i, ctx=bytes(32)) for i in OTHERS),
    )
    await counted.refuses(Settle(unknown), "views were split")


async def test_shares_and_abort_exclude_each_other(fresh: Stage) -> None:
    fresh.open(CensusWork())
    await fresh.until(coordinator.Unmasking)
    event = fresh.request(Confirmations)
    said = await fresh.ask(event)
    assert said.steps == [Step.UNMASK]
    await fresh.refuses(GiveUp(fresh.ctx), Reason.ALREADY_UNMASKED)
    await fresh.restart()
    await fresh.refuses(GiveUp(fresh.ctx), Reason.ALREADY_UNMASKED)


async def test_after_abort_no_share_is_given_also_after_a_restart(fresh: Stage) -> None:
    fresh.open(CensusWork())
    await fresh.until(coordinator.Unmasking)
    event = fresh.request(Confirmations)
    said = await fresh.ask(GiveUp(fresh.ctx))
    assert said.steps == [Step.ABORT]
    await fresh.refuses(event, "Confirmations in state Waiting")
    await fresh.restart()
    await fresh.refuses(event, "Confirmations in state Waiting")
    await fresh.refuses(Open(fresh.session.context), Reason.SESSION_NOT_NEW)


async def test_what_is_given_up_before_it_opens_never_opens(fresh: Stage) -> None:
    context = fresh.open(CensusWork())
    said = await fresh.ask(GiveUp(context.digest))
    assert said.steps == [Step.ABORT]
    await fresh.refuses(Open(context), Reason.ALREADY_ABORTED)


async def test_a_request_to_give_up_cannot_spoil_the_ledger(fresh: Stage) -> None:
    fresh.open(CensusWork())
    for length in (0, 31, 33, 5000):
        await fresh.refuses(GiveUp(bytes(length)), f"a context digest of {length} bytes")
