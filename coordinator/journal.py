"""The events of a session as bytes: what the store keeps, and a restarted coordinator feeds again.

The encoding is the secure sum's own (`secagg.codec`).
"""

from __future__ import annotations

from secagg.codec import Reader, blob, items, text, u8, u16
from secagg.errors import MalformedMessage
from secagg.events import Cancel, CoordinatorEvent, Deadline, Received
from secagg.messages import Parcel, Signed
from secagg.roster import MAX_SILOS

_MAX_EVENT = 1 << 26


def encode_event(event: CoordinatorEvent) -> bytes:
    """An event as the store keeps it."""
    match event:
        case Received(message, parcels):
            packed = (u16(i) + blob(p.mailbox) + blob(p.seed) for i, p in sorted(parcels.items()))
            return u8(1) + blob(message.encode()) + items(packed)
        case Deadline():
            return u8(2)
        case Cancel(why):
            return u8(3) + text(why)


def decode_event(data: bytes) -> CoordinatorEvent:
    """The inverse of `encode_event`; raises MalformedMessage."""
    reader = Reader(data, "session event")
    kind = reader.u8()
    event: CoordinatorEvent = Deadline()
    if kind == 1:
        message = Signed.decode(reader.blob(_MAX_EVENT))
        parcels = reader.items(
            lambda: (reader.u16(), Parcel(reader.blob(_MAX_EVENT), reader.blob(_MAX_EVENT))),
            MAX_SILOS,
        )
        receivers = [receiver for receiver, _ in parcels]
        if receivers != sorted(set(receivers)):
            raise MalformedMessage("session event: parcels are not in order of receiver")
        event = Received(message, dict(parcels))
    elif kind == 3:
        event = Cancel(reader.text(_MAX_EVENT))
    elif kind != 2:
        raise MalformedMessage(f"session event: no kind {kind}")
    reader.finish()
    return event
