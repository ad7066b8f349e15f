"""A session's context is computed here; one that differs in any field is refused by name."""

from __future__ import annotations

import hashlib
from dataclasses import fields, replace

import pytest

from diffusion.features.pinned import FEATURE_NETWORKS
from protos.v1 import coordination_pb2 as pb
from secagg.certificate import Certificate
from secagg.context import Quantity, SessionContext
from secagg.messages import Confirm, Signed, Step
from silo.errors import ProposalRefused
from silo.model_size import parameter_count
from silo.proposal import Artifact, Pinned, Proposal, check_open
from study.plan import Plan, load_plan
from study.quantity import (
    AuxiliaryImages,
    CensusWork,
    EvaluationWork,
    ImagesWork,
    MomentsWork,
    RoundWork,
    TagsWork,
    Work,
    encode_work,
    session_context,
)
from tests.silo.studies import PLAN as PLAN_TEXT
from tests.silo.studies import make_plan, make_roster

PLAN = make_plan()
ROSTER, KEYS = make_roster(PLAN)
PURPOSES = ("census", "moments", "tags", "images", "round", "evaluation")
MODEL = hashlib.sha256(b"model").digest()
PREVIOUS = hashlib.sha256(b"previous").digest()
SUM = hashlib.sha256(b"sum of tags")
CLIP = PLAN.first_clip
ROUND = RoundWork(total_count=400, sizes=(parameter_count(PLAN.model),), clips=(CLIP,))
TAGS = TagsWork(total_count=400, images=24, slots=192)
IMAGES = ImagesWork(tags=SUM.hexdigest(), occupied=20, record_size=65)
NETWORK = {"network": "digits", "sha256": FEATURE_NETWORKS["digits"].sha256}
MOMENTS = MomentsWork(total_count=400, **NETWORK, dimension=64, bound=4.0)


COMPARED = make_plan("samples = 8", "samples = 8\nat_silos = true\nevery = 2")
SAMPLES = hashlib.sha256(b"samples")
EVALUATION = EvaluationWork(samples=SAMPLES.hexdigest(), images=8, **NETWORK, bins=10)


def certificate() -> Certificate:
    body = Confirm(bytes(32), (1, 2, 4), bytes(32)).encode()
    return Certificate(Step.CONFIRM, bytes(32), (Signed(Step.CONFIRM, 1, body, bytes(64)),))


PINNED = Pinned(PLAN, ROSTER, PURPOSES, PREVIOUS, total=400, tags={1: certificate()})


def context_of(work: Work, round: int = 1, session: int = 5) -> SessionContext:
    images, training = isinstance(work, ImagesWork), isinstance(work, RoundWork)
    return session_context(
        ROSTER,
        PLAN.digest(),
        PLAN.secure_sum.ring,
        work,
        session=session,
        round=round,
        model=MODEL if training else bytes(32),
        reservation=SUM.digest() if images else bytes(32),
        survivors=(1, 2, 4) if images else (),
        previous=PREVIOUS,
    )


def proposed(work: Work, context: SessionContext) -> pb.Open:
    artifacts = [MODEL] if isinstance(work, RoundWork) else []
    return pb.Open(context=context.encode(), work=encode_work(work), artifacts=artifacts)


@pytest.mark.parametrize("work", [CensusWork(), MOMENTS, TAGS, IMAGES, ROUND], ids=PURPOSES[:5])
def test_what_was_agreed_is_taken_part_in(work: Work) -> None:
    context = context_of(work)
    proposal = check_open(5, proposed(work, context), PINNED)
    assert (proposal.context, proposal.work) == (context, work)


ALTERED: dict[str, object] = {
    "study": "other",
    "epoch": 2,
    "roster": bytes(32),
    "silos": 5,
    "threshold": 4,
    "colluders": 0,
    "session": 6,
    "quantity": Quantity("tags", 1),
    "plan": bytes(32),
    "model": bytes(32),
    "ring": 32,
    "length": 17,
    "encoding": bytes(32),
    "reservation": MODEL,
    "survivors": (1, 2, 3),
    "previous": bytes(32),
}


@pytest.mark.parametrize("name", [field.name for field in fields(SessionContext)])
def test_a_context_that_differs_in_one_field_is_refused(name: str) -> None:
    context = replace(context_of(ROUND), **{name: ALTERED[name]})  # type: ignore[arg-type]
    with pytest.raises(ProposalRefused, match=rf"\b{name} is "):
        check_open(5, proposed(ROUND, context), PINNED)


@pytest.mark.parametrize(
    ("work", "round", "said"),
    [
        (ROUND, 4, "round 4: the plan has 1 to 3"),
        (CensusWork(), 2, "census 2: the plan has 1 to 1"),
        (TAGS, 3, "tags 3: the plan has 1 to 2"),
        (IMAGES, 2, "no sum of tags 2 with this site"),
        (ROUND.model_copy(update={"clips": (0.5,)}), 1, "not the plan's first_clip"),
        (ROUND.model_copy(update={"sizes": (9,)}), 1, "9 parameters are not the plan's model"),
        (TAGS.model_copy(update={"images": 25}), 1, "25 synthetic images"),
        (TAGS.model_copy(update={"slots": 193}), 1, "193 slots"),
        (IMAGES.model_copy(update={"record_size": 66}), 1, "records of 66 bytes"),
        (MOMENTS.model_copy(update={"sha256": "cd" * 32}), 1, "network 'digits' is not the plan's"),
        (MOMENTS.model_copy(update={"bound": 36.0}), 1, "the bound 36.0 does not follow"),
    ],
)
def test_work_beyond_the_plan_is_refused(work: Work, round: int, said: str) -> None:
    with pytest.raises(ProposalRefused, match=said):
        check_open(5, proposed(work, context_of(work, round)), PINNED)


def test_a_site_whose_images_are_in_a_union_offers_no_others() -> None:
    check_open(5, proposed(TAGS, context_of(TAGS, 2)), PINNED)
    with pytest.raises(ProposalRefused, match="in a union already"):
        check_open(5, proposed(TAGS, context_of(TAGS, 2)), replace(PINNED, united=True))


@pytest.mark.parametrize("work", [MOMENTS, TAGS, ROUND])
def test_the_total_is_accepted_once_so_that_nobody_can_search_for_a_count(work: Work) -> None:
    lower = work.model_copy(update={"total_count": 399})
    with pytest.raises(ProposalRefused, match="total_count is 399, it was 400"):
        check_open(5, proposed(lower, context_of(lower)), PINNED)
    check_open(5, proposed(lower, context_of(lower)), replace(PINNED, total=None))
    with pytest.raises(ProposalRefused, match="not in the census"):
        check_open(5, proposed(work, context_of(work)), replace(PINNED, counted=False))


def test_what_the_policy_withholds_and_what_cannot_be_parsed_is_refused() -> None:
    few = replace(PINNED, purposes=("census",))
    with pytest.raises(ProposalRefused, match="round: the site policy"):
        check_open(5, proposed(ROUND, context_of(ROUND)), few)
    message = proposed(ROUND, context_of(ROUND))
    message.context += b"x"
    with pytest.raises(ProposalRefused, match="too many at the end"):
        check_open(5, message, PINNED)
    message = proposed(ROUND, context_of(ROUND))
    message.work = message.work.replace(b"{", b"{ ", 1)
    with pytest.raises(ProposalRefused, match="not canonical"):
        check_open(5, message, PINNED)
    message = proposed(ROUND, context_of(ROUND))
    message.artifacts.append(bytes(32))
    with pytest.raises(ProposalRefused, match="2 artifacts"):
        check_open(5, message, PINNED)


def asked_to_evaluate(round: int = 2, **changes: object) -> tuple[SessionContext, pb.Open]:
    work = EVALUATION.model_copy(update=changes)
    context = session_context(
        ROSTER,
        COMPARED.digest(),
        16,
        work,
        session=5,
        round=round,
        model=MODEL,
        previous=PREVIOUS,
    )
    artifacts = [MODEL, SAMPLES.digest()]
    return context, pb.Open(context=context.encode(), work=encode_work(work), artifacts=artifacts)


def test_an_evaluation_names_model_and_samples_and_how_long_they_are() -> None:
    pinned = replace(PINNED, plan=COMPARED)
    context, message = asked_to_evaluate()
    proposal = check_open(5, message, pinned)
    size = 4 * parameter_count(COMPARED.model)
    assert proposal.context == context
    assert proposal.artifacts == (Artifact(MODEL, size), Artifact(SAMPLES.digest(), 8 * 64))
    message.artifacts[0] = bytes(32)
    with pytest.raises(ProposalRefused, match="model is"):
        check_open(5, message, pinned)
    message.artifacts[1] = bytes(32)
    with pytest.raises(ProposalRefused, match="the samples are not those of the work"):
        check_open(5, message, pinned)
    del message.artifacts[1]
    with pytest.raises(ProposalRefused, match="1 artifacts, not the model and its samples"):
        check_open(5, message, pinned)


@pytest.mark.parametrize(
    ("round", "changes", "said"),
    [
        (1, {}, "evaluation 1: the plan has none of this round"),
        (4, {}, "evaluation 4: the plan has"),
        (2, {"images": 9}, "number of samples are not the plan's"),
        (2, {"sha256": "cd" * 32}, "network or number"),
        (2, {"bins": 100}, "100 bins are not what the plan says"),
    ],
)
def test_an_evaluation_beyond_the_plan_is_refused(
    round: int, changes: dict[str, object], said: str
) -> None:
    _, message = asked_to_evaluate(round, **changes)
    with pytest.raises(ProposalRefused, match=said):
        check_open(5, message, replace(PINNED, plan=COMPARED))
    _, ordinary = asked_to_evaluate()
    with pytest.raises(ProposalRefused, match="the plan has none of this round at the silos"):
        check_open(5, ordinary, PINNED)
    forbidden = replace(PINNED, plan=COMPARED, purposes=("census", "round"))
    with pytest.raises(ProposalRefused, match="evaluation: the site policy"):
        check_open(5, ordinary, forbidden)


def test_auxiliary_images_to_train_on_come_where_the_plan_says_so_and_are_the_work_s() -> None:
    plan = make_plan('kind = "fedddpm"', 'kind = "fedddpm"\nauxiliary_share = 0.5')
    images = hashlib.sha256(b"images").digest()

    def check(work: RoundWork, *artifacts: bytes, plan: Plan = plan) -> Proposal:
        context = session_context(
            ROSTER, plan.digest(), 16, work, session=5, round=1, model=MODEL, previous=PREVIOUS
        )
        message = pb.Open(
            context=context.encode(), work=encode_work(work), artifacts=[MODEL, *artifacts]
        )
        return check_open(5, message, replace(PINNED, plan=plan, shared=pinned))

    pinned: AuxiliaryImages | None = None

    def shared(n: int) -> RoundWork:
        named = AuxiliaryImages(sha256=images.hex(), images=n)
        return ROUND.model_copy(update={"auxiliary": named})

    assert check(shared(20), images).artifacts[1] == Artifact(images, 20 * 64)
    with pytest.raises(ProposalRefused, match="to train on are in the plan"):
        check(ROUND)
    with pytest.raises(ProposalRefused, match="to train on are not in the plan"):
        check(shared(20), images, plan=PLAN)
    with pytest.raises(ProposalRefused, match="29 auxiliary images are too many"):
        check(shared(29), images)  # all sites together offer 24, and one each that rounding gives
    with pytest.raises(ProposalRefused, match="not those of the work"):
        check(shared(20), MODEL)
    pinned = shared(20).auxiliary
    check(shared(20), images)
    with pytest.raises(ProposalRefused, match="the auxiliary images are .*, they were "):
        check(shared(19), images)
    with pytest.raises(ProposalRefused, match="1 artifacts, not the input model and the aux"):
        check(shared(20))


def test_a_round_without_auxiliary_images_comes_no_earlier_than_the_plan_lets_it() -> None:
    plus = 'kind = "fedddpm_plus"\nauxiliary_share = 0.5'

    def check(round: int, strategy: str) -> Proposal:
        text = PLAN_TEXT.replace('kind = "fedddpm"', strategy).replace("{sha256}", "ab" * 32)
        plan = load_plan(text.replace("samples = 8", "samples = 8\nevery = 2"))
        context = session_context(
            ROSTER, plan.digest(), 16, ROUND, session=5, round=round, model=MODEL, previous=PREVIOUS
        )
        message = pb.Open(context=context.encode(), work=encode_work(ROUND), artifacts=[MODEL])
        return check_open(5, message, replace(PINNED, plan=plan))

    assert len(check(3, plus).artifacts) == 1, "after the evaluation of round 2"
    for round, strategy in (
        (2, plus),
        (3, plus + "\nshare_until = 0.0"),
        (3, 'kind = "fedddpm"\nauxiliary_share = 0.5'),
    ):
        with pytest.raises(ProposalRefused, match="to train on are in the plan"):
            check(round, strategy)
