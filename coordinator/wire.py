"""Between the messages of `protos/v1` and the values of the secure sum, and what a message must be.

A message that lacks a field, or has one that this version does not know, is refused: nothing that
was signed is ever acted on in part.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import lru_cache

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message
from google.protobuf.unknown_fields import UnknownFieldSet

from protos.v1 import coordination_pb2 as pb
from secagg.events import Adverts, Confirmations, GiveUp, Headers, Open, SiloEvent, Survivors
from secagg.messages import Parcel


class BadRequest(ValueError):
    """A message that is not what the protocol says; the text names the field."""


# The most that a field may hold; what travels by upload or is bounded by its parser is not here.
_LIMITS = {
    "study": 80,
    "reason": 500,
    "activity": 80,
    "rule": 200,
    "agent_version": 64,
    "certificate_request": 8192,
}
_EXACT = {
    "sha256": 32,
    "plan_digest": 32,
    "roster_digest": 32,
    "identity_key": 32,
    "identity_proof": 64,
    "signature": 64,
}

# No plan has orders of so many steps, and an integer column of every store holds them.
_MOST_STEPS = 1_000_000_000


def check(message: Message, required: Iterable[str] = ()) -> None:
    """Raises BadRequest for unknown, missing and oversized fields."""
    _refuse_unknown(message, type(message).__name__)
    for name in required:
        if not getattr(message, name):
            raise BadRequest(f"{type(message).__name__}.{name} is missing")
    for name in _bounded(message.DESCRIPTOR):
        value = getattr(message, name)
        if not value:
            continue
        if name in _LIMITS and len(value) > _LIMITS[name]:
            raise BadRequest(
                f"{type(message).__name__}.{name} has {len(value)} bytes, at most "
                f"{_LIMITS[name]} are allowed"
            )
        if name in _EXACT and len(value) != _EXACT[name]:
            raise BadRequest(
                f"{type(message).__name__}.{name} has {len(value)} bytes, not {_EXACT[name]}"
            )
        if isinstance(value, str) and not value.isprintable():
            raise BadRequest(f"{type(message).__name__}.{name} holds characters of control")


def check_steps(progress: pb.ReportProgressRequest) -> None:
    """Raises BadRequest for figures that no work of a plan has."""
    if not progress.step <= progress.steps <= _MOST_STEPS:
        raise BadRequest(
            f"ReportProgressRequest: step {progress.step} of {progress.steps}: step is at most "
            f"steps, and steps at most {_MOST_STEPS}"
        )


@lru_cache
def _bounded(kind: Descriptor) -> tuple[str, ...]:
    """The fields that have a limit of their own, and all text. Others are not even read: looking
    at a chunk's bytes copies them."""
    text = FieldDescriptor.TYPE_STRING
    fields = (f for f in kind.fields if f.name in _LIMITS or f.name in _EXACT or f.type == text)
    return tuple(field.name for field in fields)


@lru_cache
def _nested(kind: Descriptor) -> tuple[FieldDescriptor, ...]:
    return tuple(field for field in kind.fields if field.message_type is not None)


def _refuse_unknown(message: Message, where: str) -> None:
    unknown = UnknownFieldSet(message)
    if len(unknown):
        raise BadRequest(
            f"{where} has field {unknown[0].field_number}, which this version does not know: "
            "agent and coordinator are of different versions, update the older one"
        )
    for field in _nested(message.DESCRIPTOR):
        value = getattr(message, field.name)
        for part in value if field.is_repeated else [value]:
            _refuse_unknown(part, f"{where}.{field.name}")


def parcels_of(parcels: Iterable[pb.Parcel]) -> Mapping[int, Parcel]:
    """Receiver → parcel. Raises BadRequest where one receiver has two."""
    found: dict[int, Parcel] = {}
    for parcel in parcels:
        if parcel.silo in found or not parcel.silo:
            raise BadRequest(f"SubmitRequest.parcels: silo {parcel.silo} is no receiver, or twice")
        found[parcel.silo] = Parcel(parcel.mailbox, parcel.seed)
    return found


def task_of(
    study: str, session: int, request: SiloEvent, work: bytes, artifacts: list[bytes], why: str
) -> pb.Task:
    """What a silo is asked, as it travels."""
    task = pb.Task(study=study, session=session)
    match request:
        case Open(context):
            opened = pb.Open(context=context.encode(), work=work, artifacts=artifacts)
            task.open.CopyFrom(opened)
        case Adverts(messages):
            task.adverts.CopyFrom(pb.Adverts(signed=[m.encode() for m in messages]))
        case Headers(messages, parcels):
            packed = [
                pb.Parcel(silo=i, mailbox=p.mailbox, seed=p.seed)
                for i, p in sorted(parcels.items())
            ]
            signed = [m.encode() for m in messages]
            task.headers.CopyFrom(pb.Headers(signed=signed, parcels=packed))
        case Survivors(survivors):
            task.survivors.CopyFrom(pb.Survivors(silos=survivors))
        case Confirmations(messages):
            task.confirmations.CopyFrom(pb.Confirmations(signed=[m.encode() for m in messages]))
        case GiveUp(ctx):
            task.give_up.CopyFrom(pb.GiveUp(context_digest=ctx, reason=why))
        case _:
            raise AssertionError(request)
    return task
