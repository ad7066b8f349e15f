"""Steps 0 to 2 at the coordinator: adverts (U1), headers with parcels (U2), inputs (U3)."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace

from secagg.context import SessionContext
from secagg.coordinator.base import CoordinatorState, Next, in_order
from secagg.coordinator.ended import Abandoned, Aborting
from secagg.coordinator.unmasking import Confirming
from secagg.errors import InvalidParameters, MalformedMessage, Reason, Refused
from secagg.events import Adverts, Ended, Headers, Open, Received, SiloEvent
from secagg.messages import (
    Advert,
    Complaint,
    Header,
    MaskedInput,
    Parcel,
    Signed,
    Step,
    transcript,
)
from secagg.primitives import SEALING_BYTES, SECRET_BYTES, digest, usable
from secagg.roster import Roster
from secagg.shamir import SHARE_BYTES

MAILBOX_BYTES = 2 * SHARE_BYTES + SEALING_BYTES
SEED_BYTES = SECRET_BYTES + SEALING_BYTES


def open_session(roster: Roster, context: SessionContext) -> Advertising:
    """Raises `InvalidParameters` where the context is for another roster."""
    if not context.agrees_with(roster):
        raise InvalidParameters("the session's context is for another roster")
    return Advertising(roster, context)


@dataclass(frozen=True)
class Advertising(CoordinatorState):
    """Step 0: waiting for adverts. Silos prepare their vector first, so this is the long step."""

    adverts: Mapping[int, Signed] = field(default_factory=dict)

    @property
    def awaited(self) -> tuple[int, ...]:
        expected = self.context.survivors or tuple(self.roster.indices)
        return tuple(i for i in expected if i not in self.adverts)

    def heard(self) -> Collection[Signed]:
        return self.adverts.values()

    def request_for(self, index: int) -> SiloEvent | None:
        return Open(self.context) if index in self.awaited else None

    def on_received(self, event: Received) -> Next:
        if not self.accept(event, Step.ADVERTISE, self.awaited):
            return self, []
        advert = Advert.decode(event.message.body)
        # One key that nobody can seal to would stop every silo at the next step.
        if not usable(advert.mailbox) or not usable(advert.mask):
            sender = event.message.sender
            raise Refused(Reason.BAD_KEY, f"advert of {self.name(sender)}", sender)
        state = replace(self, adverts={**self.adverts, event.message.sender: event.message})
        return (state, []) if state.awaited else state._close()

    def on_deadline(self) -> Next:
        if not self.enough(self.adverts):
            return self.on_cancel(self.too_few(self.adverts, "advertised"))
        return self._close()

    def on_cancel(self, why: str) -> Next:
        # No silo has been asked for a masked input, so there is nothing that a proof could be of.
        return Abandoned(self.roster, self.context, why), [Ended(why, None)]

    def _close(self) -> Next:
        t1 = transcript("T1", self.context.digest, in_order(self.adverts))
        return Sharing(self.roster, self.context, self.adverts, t1), []


@dataclass(frozen=True)
class Sharing(CoordinatorState):
    """Step 1: waiting for the headers and parcels of U1."""

    adverts: Mapping[int, Signed]
    t1: bytes
    headers: Mapping[int, Signed] = field(default_factory=dict)
    parcels: Mapping[int, Mapping[int, Parcel]] = field(default_factory=dict, repr=False)

    @property
    def awaited(self) -> tuple[int, ...]:
        return tuple(i for i in sorted(self.adverts) if i not in self.headers)

    def heard(self) -> Collection[Signed]:
        return [*self.adverts.values(), *self.headers.values()]

    def request_for(self, index: int) -> SiloEvent | None:
        return Adverts(in_order(self.adverts)) if index in self.awaited else None

    def on_received(self, event: Received) -> Next:
        if not self.accept(event, Step.SHARE, self.awaited):
            return self, []
        sender = event.message.sender
        self._check(Header.decode(event.message.body), sender, event.parcels)
        state = replace(
            self,
            headers={**self.headers, sender: event.message},
            parcels={**self.parcels, sender: event.parcels},
        )
        return (state, []) if state.awaited else state._close()

    def _check(self, header: Header, sender: int, parcels: Mapping[int, Parcel]) -> None:
        if header.t1 != self.t1:
            raise Refused(Reason.TRANSCRIPT_MISMATCH, f"header of {self.name(sender)}", sender)
        receivers = set(self.adverts) - {sender}
        if header.receivers != tuple(sorted(self.adverts)) or set(parcels) != receivers:
            raise MalformedMessage(f"header of {self.name(sender)}: not one parcel per receiver")
        for receiver, parcel in parcels.items():
            dealt = header.to(receiver)
            sizes = (MAILBOX_BYTES, SEED_BYTES if sender < receiver else 0)
            if (len(parcel.mailbox), len(parcel.seed)) != sizes:
                raise MalformedMessage(f"parcel for {self.name(receiver)}: not of {sizes} bytes")
            seed = digest("parcel", parcel.seed) if parcel.seed else b""
            if (digest("parcel", parcel.mailbox), seed) != (
                dealt.mailbox_parcel,
                dealt.seed_parcel,
            ):
                raise Refused(Reason.BAD_CIPHERTEXT, f"parcel for {self.name(receiver)}", sender)

    def on_deadline(self) -> Next:
        if not self.enough(self.headers):
            return self.on_cancel(self.too_few(self.headers, "shared their keys"))
        return self._close()

    def on_cancel(self, why: str) -> Next:
        return Abandoned(self.roster, self.context, why), [Ended(why, None)]

    def _close(self) -> Next:
        t2 = transcript("T2", self.t1, in_order(self.headers))
        return (
            Collecting(
                self.roster,
                self.context,
                self.adverts,
                self.t1,
                self.headers,
                self.parcels,
                t2,
            ),
            [],
        )


@dataclass(frozen=True)
class Collecting(CoordinatorState):
    """Step 2: waiting for the masked inputs of U2. From here on only a proof ends the session."""

    adverts: Mapping[int, Signed]
    t1: bytes
    headers: Mapping[int, Signed]
    parcels: Mapping[int, Mapping[int, Parcel]] = field(repr=False)
    t2: bytes
    inputs: Mapping[int, Signed] = field(default_factory=dict)

    @property
    def awaited(self) -> tuple[int, ...]:
        return tuple(i for i in sorted(self.headers) if i not in self.inputs)

    def heard(self) -> Collection[Signed]:
        return [*self.adverts.values(), *self.headers.values(), *self.inputs.values()]

    def request_for(self, index: int) -> SiloEvent | None:
        if index not in self.awaited:
            return None
        parcels = {i: dealt[index] for i, dealt in self.parcels.items() if index in dealt}
        return Headers(in_order(self.headers), parcels)

    def on_received(self, event: Received) -> Next:
        if event.message.step is Step.COMPLAIN:
            return self._on_complaint(event.message)
        if not self.accept(event, Step.MASKED_INPUT, self.awaited):
            return self, []
        sender = event.message.sender
        masked = MaskedInput.decode(event.message.body)
        if masked.t2 != self.t2:
            raise Refused(Reason.TRANSCRIPT_MISMATCH, f"input of {self.name(sender)}", sender)
        if masked.size != self.context.vector_bytes:
            raise MalformedMessage(
                f"masked input of {masked.size} bytes, the session's vector has "
                f"{self.context.vector_bytes}"
            )
        state = replace(self, inputs={**self.inputs, sender: event.message})
        return (state, []) if state.awaited else state._close()

    def _on_complaint(self, message: Signed) -> Next:
        """A complaint cannot be judged here (only its receiver opens a parcel), so the session is
        given up and the accused dealer sits out the next one."""
        message.check(self.roster, self.context.digest, Step.COMPLAIN)
        accused = Complaint.decode(message.body).accused
        if message.sender not in self.headers or accused not in self.headers:
            raise Refused(Reason.NOT_A_SUBSET, "a complaint by or about a silo outside the session")
        why = (
            f"session {self.context.session} ({self.context.quantity}): "
            f"{self.name(message.sender)} cannot use what {self.name(accused)} dealt"
        )
        return Aborting(self.roster, self.context, why, accused), []

    def on_deadline(self) -> Next:
        if not self.enough(self.inputs):
            return self.on_cancel(self.too_few(self.inputs, "delivered their masked input"))
        return self._close()

    def on_cancel(self, why: str) -> Next:
        return Aborting(self.roster, self.context, why), []

    def _close(self) -> Next:
        return Confirming(self.roster, self.context, self), []
