"""The quantities of a study: what each secure sum adds up, and how both sides derive its context.

The coordinator sends the *work* of a session as canonical JSON; silo and coordinator then compute
ring, length and encoding digest from it with the same functions, so that a coordinator cannot ask
two silos for different encodings without their masks failing to cancel.

| purpose | round | vector | ring |
|---|---|---|---|
| census | roster epoch | coarse sample count | 32 |
| moments | roster epoch | feature sums and outer products of the real images | 32 |
| tags | attempt | slot tags of the anonymous union | 32 |
| images | attempt | synthetic images in the slots won | 8 |
| round | round | weighted model delta, loss, saturation and fault counters | the plan's |
| evaluation | round | KID, coverage, share of copies, loss by timestep | 32 |
"""

from __future__ import annotations

import hashlib
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from secagg.context import Quantity, SessionContext
from secagg.errors import MalformedMessage
from secagg.roster import Roster
from study.encoding import Encoding
from study.fixed_point import FixedPoint
from study.integers import Field as IntegerField
from study.integers import Integers, Ring

Sha256Hex = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Count = Annotated[int, Field(ge=1, le=10**12)]


class _Work(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class CensusWork(_Work):
    """Contribute the coarse sample count."""

    purpose: Literal["census"] = "census"


class MomentsWork(_Work):
    """Contribute count, Σf and Σffᵀ of the real images under the named feature network.

    Values are divided by `total_count` (Σñ), so `bound` limits a weighted mean whatever the number
    of images.
    """

    purpose: Literal["moments"] = "moments"
    total_count: Count
    network: str
    sha256: Sha256Hex
    dimension: Annotated[int, Field(ge=1, le=4096)]
    bound: Annotated[float, Field(gt=0)]


class TagsWork(_Work):
    """Draw slots for one's share of the auxiliary set (the anonymous union's first sum)."""

    purpose: Literal["tags"] = "tags"
    total_count: Count
    images: Annotated[int, Field(ge=1, le=10**7)]
    slots: Annotated[int, Field(ge=1, le=10**8)]


class ImagesWork(_Work):
    """Put synthetic images into the slots won; `occupied` slots are left after renumbering."""

    purpose: Literal["images"] = "images"
    tags: Sha256Hex
    occupied: Annotated[int, Field(ge=1, le=10**8)]
    record_size: Annotated[int, Field(ge=2, le=10**8)]


class AuxiliaryImages(_Work):
    """The auxiliary images that silos train on beside their own: `images` records of the anonymous
    union, without their first byte."""

    sha256: Sha256Hex
    images: Annotated[int, Field(ge=1, le=10**8)]


class RoundWork(_Work):
    """Train from the input model and contribute the weighted delta."""

    purpose: Literal["round"] = "round"
    total_count: Count
    sizes: tuple[Annotated[int, Field(ge=1)], ...]
    clips: tuple[Annotated[float, Field(gt=0)], ...]
    auxiliary: AuxiliaryImages | None = None
    """Where the strategy has an auxiliary_share, and as long as it says so."""


class EvaluationWork(_Work):
    """Compare the input model, and published samples of it, with the real images.

    The vector holds KID, coverage, share of copies, then the loss in each of `bins` bins of
    timesteps, of one silo each: the mean is over silos, since weights would make the absence of a
    silo tell its count.
    """

    purpose: Literal["evaluation"] = "evaluation"
    samples: Sha256Hex
    """Of `images` images, uint8, (c, h, w) each, one after the other."""
    images: Annotated[int, Field(ge=2, le=1_000_000)]
    network: str
    sha256: Sha256Hex
    bins: Annotated[int, Field(ge=1, le=100)]


Work = CensusWork | MomentsWork | TagsWork | ImagesWork | RoundWork | EvaluationWork
_ADAPTER: TypeAdapter[Work] = TypeAdapter(Annotated[Work, Field(discriminator="purpose")])


def encode_work(work: Work) -> bytes:
    """Canonical JSON: fields in order of declaration, shortest floats, no spaces; what is absent is
    left out."""
    return work.model_dump_json(exclude_none=True).encode("utf-8")


def decode_work(data: bytes) -> Work:
    """Raises `MalformedMessage` for anything that `encode_work` would not have written."""
    try:
        work = _ADAPTER.validate_json(data)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise MalformedMessage(f"work of a session: {where}: {first['msg']}") from error
    if encode_work(work) != data:
        raise MalformedMessage("work of a session: the JSON is not canonical")
    return work


def count_encoding(silos: int) -> Integers:
    """The census vector: one count of at most 40 bits."""
    return Integers(32, silos, (IntegerField("count", 40),))


def moments_bound(feature_bound: float) -> float:
    """B of the moments vector: what |n/Σñ| ≤ 1, a mean feature and a mean product stay below."""
    return max(1.0, feature_bound, feature_bound**2)


def moments_encoding(work: MomentsWork, silos: int) -> FixedPoint:
    """The moments vector: n/Σñ, then Σf/Σñ, then the upper triangle of Σffᵀ/Σñ."""
    d = work.dimension
    return FixedPoint(silos=silos, size=1 + d + d * (d + 1) // 2, bound=work.bound)


def evaluation_encoding(work: EvaluationWork, silos: int) -> FixedPoint:
    """The evaluation vector; steps of 2^-31, and losses of a model that diverged are clipped."""
    return FixedPoint(silos=silos, size=3 + work.bins, bound=2.0**16)


def evaluation_bins(num_train_timesteps: int) -> int:
    """Bins of the loss by timestep: ten, or fewer where there are fewer timesteps."""
    return min(10, num_train_timesteps)


def delta_encoding(work: RoundWork, silos: int, ring: Ring) -> Encoding:
    """The vector of a model round."""
    return Encoding(ring, silos, work.total_count, work.sizes, work.clips)


def vector_of(work: Work, silos: int, ring: Ring) -> tuple[Ring, int, bytes]:
    """(ring, length, SHA-256 of the work and of every encoding parameter) of a session's vector.

    `ring` is the plan's, used by model rounds; every other quantity has its own.
    Raises ValueError for parameters that the encoding refuses.
    """
    match work:
        case CensusWork():
            census = count_encoding(silos)
            kind, length, parameters = census.ring, census.length, census.parameters()
        case MomentsWork():
            moments = moments_encoding(work, silos)
            kind, length, parameters = 32, moments.length, moments.parameters()
        case TagsWork():
            kind, length, parameters = 32, work.slots, b""
        case ImagesWork():
            kind, length, parameters = 8, work.occupied * work.record_size, b""
        case RoundWork():
            delta = delta_encoding(work, silos, ring)
            kind, length, parameters = ring, delta.length, delta.parameters()
        case EvaluationWork():
            measures = evaluation_encoding(work, silos)
            kind, length, parameters = 32, measures.length, measures.parameters()
    encoding = hashlib.sha256(
        hashlib.sha256(encode_work(work)).digest() + hashlib.sha256(parameters).digest()
    )
    return kind, length, encoding.digest()


def session_context(
    roster: Roster,
    plan_digest: bytes,
    plan_ring: Ring,
    work: Work,
    *,
    session: int,
    round: int,
    model: bytes = bytes(32),
    reservation: bytes = bytes(32),
    survivors: tuple[int, ...] = (),
    previous: bytes = bytes(32),
) -> SessionContext:
    """The context that both sides compute for themselves; equal digests or no sum.

    A silo calls this with the values that it holds (its pinned roster, the plan it accepted, the
    SHA-256 of the model as it read it) and compares the result with what the coordinator sent.
    """
    ring, length, encoding = vector_of(work, roster.size, plan_ring)
    return SessionContext(
        study=roster.study,
        epoch=roster.epoch,
        roster=roster.digest,
        silos=roster.size,
        threshold=roster.threshold,
        colluders=roster.colluders,
        session=session,
        quantity=Quantity(work.purpose, round),
        plan=plan_digest,
        model=model,
        ring=ring,
        length=length,
        encoding=encoding,
        reservation=reservation,
        survivors=survivors,
        previous=previous,
    )
