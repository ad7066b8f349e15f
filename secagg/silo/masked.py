"""Steps 3 and 4 at a silo: confirm one survivor set, then open what that set alone needs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from secagg.codec import Reader, blob, items, u16
from secagg.context import SessionContext
from secagg.errors import MalformedMessage, Reason, Refused
from secagg.events import Confirmations, Headers, InputMasked, Record, Send, Survivors
from secagg.ledger import Confirmed, Unmasked
from secagg.messages import Confirm, Signed, Step, Unmask, check_set, transcript
from secagg.primitives import Secret, lock, unlock
from secagg.roster import MAX_SILOS
from secagg.shamir import SHARE_BYTES
from secagg.silo.base import Next, SiloParty, SiloState, second_view
from secagg.silo.shared import Shares


@dataclass(frozen=True)
class MaskedState(SiloState):
    """Our masked input is made and being uploaded; waiting for U3."""

    context: SessionContext
    t1: bytes
    t2: bytes
    members: tuple[int, ...]
    shares: Mapping[int, Shares] = field(repr=False)
    vector: bytes
    sent: Send

    @property
    def session(self) -> SessionContext:
        return self.context

    def wipe(self) -> None:
        for share_b, share_r in self.shares.values():
            share_b.wipe()
            share_r.wipe()

    def on_headers(self, event: Headers) -> Next:
        if transcript("T2", self.t1, event.messages) != self.t2:
            raise second_view("headers")
        return self, [self.sent]

    def on_input_masked(self, event: InputMasked) -> Next:
        if event.vector != self.vector:
            raise second_view("masked input")
        return self, [self.sent]

    def on_survivors(self, event: Survivors) -> Next:
        u3 = event.survivors
        check_survivors(self.party, self.context, self.members, u3)
        ctx = self.context.digest
        locked = _lock_shares(self.party, ctx, self.members, u3, self.shares)
        entry = Confirmed(ctx, self.t2, self.members, u3, self.vector, locked)
        confirmed = ConfirmedState(self.party, self.history.after(entry), self.context, entry=entry)
        self.wipe()
        return confirmed, [Record(entry), confirmed.confirmation()]


def check_survivors(
    party: SiloParty, context: SessionContext, u2: tuple[int, ...], u3: tuple[int, ...]
) -> None:
    """self ∈ U3 ⊆ our U2, |U3| ≥ t, and U3 is what a reservation was made with."""
    if any(a >= b for a, b in pairwise(u3)):
        raise Refused(Reason.NOT_ASCENDING, "survivors")
    if not set(u3) <= set(u2):
        raise Refused(Reason.NOT_A_SUBSET, f"survivors {u3} of {u2}")
    if party.index not in u3:
        raise Refused(Reason.SELF_NOT_INCLUDED, f"survivors {u3}")
    if len(u3) < party.roster.threshold:
        raise Refused(Reason.BELOW_THRESHOLD, f"{len(u3)} survivors")
    if context.survivors and u3 != context.survivors:
        raise Refused(Reason.WRONG_SURVIVORS, f"{u3}, reserved with {context.survivors}")


@dataclass(frozen=True)
class ConfirmedState(SiloState):
    """We signed one survivor set. Everything this state needs is in the ledger as well."""

    context: SessionContext
    entry: Confirmed = field(repr=False)

    @property
    def session(self) -> SessionContext:
        return self.context

    def confirmation(self) -> Send:
        body = Confirm(self.entry.t2, self.entry.survivors, self.entry.vector).encode()
        return Send(self.party.sign(Step.CONFIRM, self.context.digest, body))

    def on_survivors(self, event: Survivors) -> Next:
        if event.survivors != self.entry.survivors:
            raise second_view("survivors")
        return self, [self.confirmation()]

    def on_confirmations(self, event: Confirmations) -> Next:
        """Release shares only for a set that at least t silos confirmed, all the same as we.

        b-shares for U3 and r-shares for U2 ∖ U3 never overlap, because both sets are our own and
        not the coordinator's: the coordinator cannot get both secrets of one silo from us.
        """
        self._check_confirmations(event.messages)
        self.history.check_unmask(self.context.digest)
        message = self._unmask()
        entry = Unmasked(self.context.digest)
        unmasked = UnmaskedState(
            self.party, self.history.after(entry), self.context, entry=self.entry
        )
        return unmasked, [Record(entry), Send(message)]

    def _check_confirmations(self, messages: Sequence[Signed]) -> None:
        roster, ours = self.party.roster, self.entry
        check_set(messages, roster, self.context.digest, Step.CONFIRM)
        if len(messages) < roster.threshold:
            raise Refused(Reason.BELOW_THRESHOLD, f"{len(messages)} confirmations")
        for message in messages:
            name = roster.member(message.sender).name
            if message.sender not in ours.survivors:
                raise Refused(Reason.NOT_A_SUBSET, f"{name} confirms without being a survivor")
            try:
                confirm = Confirm.decode(message.body)
            except MalformedMessage as error:
                raise Refused(Reason.TRANSCRIPT_MISMATCH, str(error), message.sender) from error
            if (confirm.t2, confirm.survivors) != (ours.t2, ours.survivors):
                raise Refused(Reason.TRANSCRIPT_MISMATCH, f"confirmation of {name}")

    def _unmask(self) -> Signed:
        e = self.entry
        shares_b, shares_r = _unlock_shares(self.party, e)
        body = Unmask(
            tuple((i, shares_b[i]) for i in e.survivors),
            tuple((i, shares_r[i]) for i in e.members if i not in e.survivors),
        ).encode()
        for share in (*shares_b.values(), *shares_r.values()):
            share.wipe()
        return self.party.sign(Step.UNMASK, self.context.digest, body)


@dataclass(frozen=True)
class UnmaskedState(ConfirmedState):
    """Our shares are out. The same request gets the same answer; ABORT is refused by the ledger."""

    def on_confirmations(self, event: Confirmations) -> Next:
        self._check_confirmations(event.messages)
        return self, [Send(self._unmask())]


def _lock_shares(
    party: SiloParty,
    ctx: bytes,
    members: tuple[int, ...],
    survivors: tuple[int, ...],
    shares: Mapping[int, Shares],
) -> bytes:
    """Encrypts exactly the shares that unmasking this survivor set will need, and no others:
    what was never written can not be asked for after a restart."""
    plain = Secret(
        items(u16(i) + blob(shares[i][0 if i in survivors else 1].reveal()) for i in members)
    )
    locked = lock(party.ledger_key, plain, ctx, party.entropy)
    plain.wipe()
    return locked


def _unlock_shares(
    party: SiloParty, entry: Confirmed
) -> tuple[dict[int, Secret], dict[int, Secret]]:
    plain = unlock(party.ledger_key, entry.locked_shares, entry.ctx)
    reader = Reader(plain.reveal(), "shares")
    plain.wipe()
    pairs = dict(reader.items(lambda: (reader.u16(), Secret(reader.blob(SHARE_BYTES))), MAX_SILOS))
    reader.finish()
    shares_b = {i: share for i, share in pairs.items() if i in entry.survivors}
    shares_r = {i: share for i, share in pairs.items() if i not in entry.survivors}
    return shares_b, shares_r
