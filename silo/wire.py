"""Between the messages of `protos/v1` and the events of the secure sum."""

from __future__ import annotations

from protos.v1 import coordination_pb2 as pb
from secagg.errors import MalformedMessage
from secagg.events import (
    Adverts,
    Confirmations,
    GiveUp,
    Headers,
    Send,
    SiloEvent,
    Survivors,
)
from secagg.messages import Parcel, Signed


def event_of(task: pb.Task) -> SiloEvent:
    """The event that a task means. Raises MalformedMessage."""
    match task.WhichOneof("task"):
        case "adverts":
            return Adverts(tuple(Signed.decode(m) for m in task.adverts.signed))
        case "headers":
            parcels = {p.silo: Parcel(p.mailbox, p.seed) for p in task.headers.parcels}
            return Headers(tuple(Signed.decode(m) for m in task.headers.signed), parcels)
        case "survivors":
            return Survivors(tuple(task.survivors.silos))
        case "confirmations":
            return Confirmations(tuple(Signed.decode(m) for m in task.confirmations.signed))
        case "give_up":
            return GiveUp(task.give_up.context_digest)
    raise MalformedMessage(f"task {task.WhichOneof('task')!r} is unknown to this version")


def submission_of(task: pb.Task, send: Send) -> pb.SubmitRequest:
    """An answer to `task`, as it travels."""
    parcels = [
        pb.Parcel(silo=index, mailbox=parcel.mailbox, seed=parcel.seed)
        for index, parcel in sorted(send.parcels.items())
    ]
    return pb.SubmitRequest(
        study=task.study, session=task.session, signed=send.message.encode(), parcels=parcels
    )
