"""What the coordinator proposes in an `Open`, checked against what this site holds.

The silo computes the whole context of the session for itself, from the roster and the plan it
accepted, from the work it was sent and from the certificates it verified, and takes part only if
the coordinator's context is the same in every field. Pure: no files, no network.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields

from protos.v1 import coordination_pb2 as pb
from secagg.certificate import Certificate
from secagg.context import NO_HASH, SessionContext
from secagg.errors import InvalidParameters, MalformedMessage
from secagg.ledger import STATIC_PURPOSES
from secagg.roster import Roster
from silo.errors import ProposalRefused
from silo.model_size import parameter_count
from study.plan import Plan
from study.quantity import (
    AuxiliaryImages,
    CensusWork,
    EvaluationWork,
    ImagesWork,
    MomentsWork,
    RoundWork,
    TagsWork,
    Work,
    decode_work,
    evaluation_bins,
    moments_bound,
    session_context,
)


@dataclass(frozen=True)
class Pinned:
    """What this site agreed to, and how the sessions so far ended."""

    plan: Plan
    roster: Roster
    purposes: tuple[str, ...]
    """What the site policy lets be summed."""
    previous: bytes = NO_HASH
    """Digest of the certificate that ended the last session."""
    counted: bool = True
    """Whether this site is in the census of the roster's epoch."""
    total: int | None = None
    """Σñ as this site has accepted it in this epoch, None before the first time."""
    tags: dict[int, Certificate] = field(default_factory=dict)
    """Attempt → sum certificate of its tags."""
    united: bool = False
    """Whether synthetic images of this site are in a union already."""
    shared: AuxiliaryImages | None = None
    """The auxiliary images that this site trains on, None before the first round."""


@dataclass(frozen=True)
class Artifact:
    """A file of the study, and how long it must be."""

    sha256: bytes
    size: int


@dataclass(frozen=True)
class Proposal:
    """A session this site can take part in."""

    context: SessionContext
    work: Work
    artifacts: tuple[Artifact, ...] = ()
    """The files that the work needs: the input model, or the sum of tags; then the samples, or
    the auxiliary images."""


def check_open(session: int, message: pb.Open, pinned: Pinned) -> Proposal:
    """Raises ProposalRefused, which names the first thing that is not as agreed."""
    try:
        context = SessionContext.decode(message.context)
        work = decode_work(message.work)
        _check_work(work, context.quantity.round, pinned)
        expected = _expected(session, context.quantity.round, work, message, pinned)
    except (MalformedMessage, InvalidParameters, ValueError) as error:
        raise ProposalRefused(f"session {session}: {error}") from error
    for part in fields(SessionContext):
        ours, theirs = getattr(expected, part.name), getattr(context, part.name)
        if ours != theirs:
            raise ProposalRefused(
                f"session {session} ({context.quantity}): {part.name} is {_shown(theirs)}, "
                f"this site has {_shown(ours)}"
            )
    # Equal, but made of the roster's own strings: the ledger's rules keep each session's for ever.
    return Proposal(expected, work, _artifacts(work, message, pinned))


def _expected(
    session: int, round: int, work: Work, message: pb.Open, pinned: Pinned
) -> SessionContext:
    reservation, model = NO_HASH, NO_HASH
    survivors: tuple[int, ...] = ()
    if isinstance(work, ImagesWork):
        reservation = bytes.fromhex(work.tags)
        survivors = pinned.tags[round].survivors
    if isinstance(work, RoundWork):
        names = ["the input model", *(["the auxiliary images"] if work.auxiliary else [])]
        model, *auxiliary = _named(message, *names)
        if work.auxiliary and auxiliary[0].hex() != work.auxiliary.sha256:
            raise ValueError(f"round {round}: the auxiliary images are not those of the work")
    if isinstance(work, EvaluationWork):
        model, samples = _named(message, "the model", "its samples")
        if samples.hex() != work.samples:
            raise ValueError(f"evaluation {round}: the samples are not those of the work")
    return session_context(
        pinned.roster,
        pinned.plan.digest(),
        pinned.plan.secure_sum.ring,
        work,
        session=session,
        round=round,
        model=model,
        reservation=reservation,
        survivors=survivors,
        previous=pinned.previous,
    )


def _check_work(work: Work, round: int, pinned: Pinned) -> None:
    """The work is the plan's. Raises ValueError."""
    plan = pinned.plan
    _check_total(work, pinned)
    if work.purpose not in pinned.purposes:
        raise ValueError(f"{work.purpose}: the site policy does not let this be summed")
    match work:
        case CensusWork():
            last = pinned.roster.epoch
        case MomentsWork():
            last = pinned.roster.epoch
            _check_moments(work, plan)
        case TagsWork():
            last = _check_tags(work, plan, pinned.united)
        case ImagesWork():
            last = _check_images(work, plan, pinned.roster.size)
            if round not in pinned.tags:
                raise ValueError(f"images {round}: there is no sum of tags {round} with this site")
        case RoundWork():
            last = plan.rounds.count
            _check_round(work, round, plan)
            _check_shared(work, round, pinned)
        case EvaluationWork():
            last = plan.rounds.count
            _check_evaluation(work, round, plan)
    first = pinned.roster.epoch if work.purpose in STATIC_PURPOSES else 1
    if not first <= round <= last:
        raise ValueError(f"{work.purpose} {round}: the plan has {first} to {last}")


def _check_total(work: Work, pinned: Pinned) -> None:
    """Σñ is accepted once. Whether a vector can be encoded depends on ñ ≤ Σñ; a coordinator that
    could try one Σñ after the other would read ñ from when this site refuses."""
    if not isinstance(work, RoundWork | TagsWork | MomentsWork):
        return
    if not pinned.counted:
        raise ValueError(f"{work.purpose}: this site is not in the census, so it has no weight")
    if pinned.total not in (None, work.total_count):
        raise ValueError(f"total_count is {work.total_count}, it was {pinned.total}")


def _check_moments(work: MomentsWork, plan: Plan) -> None:
    agreed = plan.evaluation
    if agreed is None or (work.network, work.sha256) != (agreed.feature_network, agreed.sha256):
        raise ValueError(f"moments: feature network {work.network!r} is not the plan's")
    if work.bound != moments_bound(agreed.feature_bound):
        raise ValueError(f"moments: the bound {work.bound} does not follow from the plan's")


def _check_tags(work: TagsWork, plan: Plan, united: bool) -> int:
    if united:  # two unions over different silos would tell the styles of single ones apart
        raise ValueError("tags: this site's synthetic images are in a union already")
    agreed = plan.auxiliary
    if agreed is None or work.images != agreed.images:
        raise ValueError(f"tags: {work.images} synthetic images are not what the plan says")
    if work.slots != agreed.images * agreed.slots_per_image:
        raise ValueError(f"tags: {work.slots} slots are not what the plan says")
    return agreed.max_attempts


def _check_images(work: ImagesWork, plan: Plan, silos: int) -> int:
    if plan.auxiliary is None or work.record_size != plan.record_size:
        raise ValueError(f"images: records of {work.record_size} bytes are not the plan's images")
    if work.occupied > (most := plan.auxiliary.most(silos)):
        raise ValueError(
            f"images: {work.occupied} slots are taken, all sites together offer at most {most}: "
            "a site offers more than its share, and would be most of the auxiliary set"
        )
    return plan.auxiliary.max_attempts


def _check_round(work: RoundWork, round: int, plan: Plan) -> None:
    parts = plan.strategy.parts
    if sum(work.sizes) != parts * parameter_count(plan.model):
        raise ValueError(f"round {round}: {sum(work.sizes)} parameters are not the plan's model")
    if round == 1 and work.clips != plan.first_clips(len(work.sizes) // parts):
        raise ValueError(f"round 1: the clips are not the plan's first_clip = {plan.first_clip}")


def _check_shared(work: RoundWork, round: int, pinned: Pinned) -> None:
    """One set for the whole study: a coordinator that names another one in every round would choose
    what this site trains on, round by round, and fill its disk."""
    plan, named = pinned.plan, work.auxiliary
    wanted = plan.strategy.local_rules().auxiliary_share > 0.0
    # A round on one's own images alone gives away no more than a study without such a set would.
    if named is None and plan.may_stop_sharing(round):
        return
    if wanted != (named is not None):
        raise ValueError(
            f"round {round}: auxiliary images to train on are {'' if wanted else 'not '}in the plan"
        )
    if named is None:
        return
    if plan.auxiliary is None or named.images > plan.auxiliary.most(pinned.roster.size):
        raise ValueError(f"round {round}: {named.images} auxiliary images are too many")
    before = pinned.shared or named
    if named != before:
        raise ValueError(
            f"round {round}: the auxiliary images are {named.images} of {named.sha256}, they were "
            f"{before.images} of {before.sha256}"
        )


def _check_evaluation(work: EvaluationWork, round: int, plan: Plan) -> None:
    agreed = plan.evaluation
    if agreed is None or not agreed.at_silos or not plan.evaluates(round):
        raise ValueError(f"evaluation {round}: the plan has none of this round at the silos")
    wanted = (agreed.feature_network, agreed.sha256, agreed.samples)
    if (work.network, work.sha256, work.images) != wanted:
        raise ValueError(f"evaluation {round}: network or number of samples are not the plan's")
    if work.bins != evaluation_bins(plan.schedule.num_train_timesteps):
        raise ValueError(f"evaluation {round}: {work.bins} bins are not what the plan says")


def _artifacts(work: Work, message: pb.Open, pinned: Pinned) -> tuple[Artifact, ...]:
    plan = pinned.plan
    match work:
        case RoundWork():
            given = Artifact(message.artifacts[0], 4 * sum(work.sizes))
            if work.auxiliary is None:
                return (given,)
            size = work.auxiliary.images * (plan.record_size - 1)
            return given, Artifact(message.artifacts[1], size)
        case EvaluationWork():
            model, samples = message.artifacts
            return (
                Artifact(model, 4 * parameter_count(plan.model)),
                Artifact(samples, work.images * math.prod(plan.data.shape)),
            )
        case ImagesWork():
            return (Artifact(bytes.fromhex(work.tags), 4 * _slots(plan)),)
        case _:
            return ()


def _slots(plan: Plan) -> int:
    return plan.auxiliary.slots_per_image * plan.auxiliary.images if plan.auxiliary else 0


def _named(message: pb.Open, *names: str) -> tuple[bytes, ...]:
    if len(message.artifacts) != len(names):
        raise ValueError(f"{len(message.artifacts)} artifacts, not {' and '.join(names)}")
    return tuple(message.artifacts)


def _shown(value: object) -> str:
    return value.hex() if isinstance(value, bytes) else str(value)
