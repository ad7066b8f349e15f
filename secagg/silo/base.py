"""What every state of a silo has in common: who we are, and an answer to events out of place."""

from __future__ import annotations

from abc import ABC
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from secagg.errors import MalformedMessage, Reason, Refused, UnexpectedEvent
from secagg.events import (
    Adverts,
    Confirmations,
    GiveUp,
    Headers,
    InputMasked,
    Open,
    Record,
    Send,
    Settle,
    SiloEffect,
    SiloEvent,
    Survivors,
)
from secagg.ledger import Aborted, History
from secagg.messages import Abort, Complaint, Signed, Step
from secagg.primitives import HASH_BYTES, Entropy, Secret
from secagg.roster import Roster

if TYPE_CHECKING:
    from secagg.context import SessionContext


@dataclass(frozen=True)
class SiloParty:
    """The silo itself: its pinned roster, place, identity key, ledger key and source of entropy."""

    roster: Roster
    index: int
    identity: Ed25519PrivateKey = field(repr=False)
    ledger_key: Secret = field(repr=False)
    entropy: Entropy = field(repr=False)

    def sign(self, step: Step, ctx: bytes, body: bytes) -> Signed:
        return Signed.by(self.identity, step, self.index, ctx, body)


Next = tuple["SiloState", Sequence[SiloEffect]]


@dataclass(frozen=True)
class SiloState(ABC):
    """One state of the silo. `history` is the ledger as it will be once all effects are done.

    A state answers the events of its own step. `Open`, `GiveUp` and `Settle` have an answer in
    every state; whatever else comes out of place raises `UnexpectedEvent` and changes nothing.
    """

    party: SiloParty
    history: History

    def handle(self, event: SiloEvent) -> Next:
        """The next state and what to do, in order.

        Raises `Refused` where an honest silo must not answer, `UnexpectedEvent` where this state
        has no answer; in both cases the state stays as it was.
        """
        match event:
            case Open():
                return self.on_open(event)
            case Adverts():
                return self.on_adverts(event)
            case Headers():
                return self.on_headers(event)
            case InputMasked():
                return self.on_input_masked(event)
            case Survivors():
                return self.on_survivors(event)
            case Confirmations():
                return self.on_confirmations(event)
            case GiveUp():
                return self.on_give_up(event)
        return self.on_settle(event)

    @property
    def session(self) -> SessionContext | None:
        """The context of the session that this state belongs to."""
        return None

    def on_open(self, event: Open) -> Next:
        from secagg.silo.advertised import open_session

        return open_session(self, event)

    def on_adverts(self, event: Adverts) -> Next:
        raise self._unexpected(event)

    def on_headers(self, event: Headers) -> Next:
        raise self._unexpected(event)

    def on_input_masked(self, event: InputMasked) -> Next:
        raise self._unexpected(event)

    def on_survivors(self, event: Survivors) -> Next:
        raise self._unexpected(event)

    def on_confirmations(self, event: Confirmations) -> Next:
        raise self._unexpected(event)

    def on_give_up(self, event: GiveUp) -> Next:
        """Sign ABORT, also for a session that we never opened: the ledger keeps us to it.

        Safe: the entry is durable before the signature leaves, and `check_unmask` reads it. A
        session of another study has another ledger, which may say that it was unmasked; so what
        is signed names our roster, and proves nothing about a session of any other.
        """
        from secagg.silo.ended import Waiting

        if len(event.ctx) != HASH_BYTES:  # it would go into the ledger and never be read again
            raise MalformedMessage(f"give up: a context digest of {len(event.ctx)} bytes")
        self.history.check_abort(event.ctx)
        body = Abort(self.party.roster.digest).encode()
        message = self.party.sign(Step.ABORT, event.ctx, body)
        if event.ctx in self.history.aborted:
            return self, [Send(message)]
        entry = Aborted(event.ctx)
        history = self.history.after(entry)
        effects: list[SiloEffect] = [Record(entry), Send(message)]
        if self.session is not None and self.session.digest == event.ctx:
            self.wipe()
            return Waiting(self.party, history), effects
        return self.with_history(history), effects

    def on_settle(self, event: Settle) -> Next:
        """Accept how a session ended, once; the proof is checked against the pinned roster.

        That has to be the roster of the session: the signatures of another roster's threshold
        would prove nothing about it (docs/secure-sum.md, "Rosters change between sessions").
        """
        from secagg.silo.ended import Waiting

        certificate, roster = event.certificate, self.party.roster
        record = self.history.sessions.get(certificate.context)
        if record is not None and not record.context.agrees_with(roster):
            raise Refused(Reason.ROSTER_MISMATCH, f"session {record.context.session}")
        certificate.check(roster)
        entry = self.history.settle(certificate, self.party.index)
        if entry is None:
            return self, []
        history = self.history.after(entry)
        if self.session is not None and self.session.digest == entry.ctx:
            self.wipe()
            return Waiting(self.party, history), [Record(entry)]
        return self.with_history(history), [Record(entry)]

    def with_history(self, history: History) -> SiloState:
        return replace(self, history=history)

    def wipe(self) -> None:  # noqa: B027 - a state without secrets has nothing to overwrite
        """Overwrite the secrets of this state."""

    def _unexpected(self, event: SiloEvent) -> UnexpectedEvent:
        return UnexpectedEvent(f"{type(event).__name__} in state {type(self).__name__}")


def second_view(what: str) -> Refused:
    return Refused(Reason.SECOND_VIEW, what)


def complain(party: SiloParty, ctx: bytes, accused: int) -> Send:
    """Step 2 refused: tell the coordinator whose dealing contradicts its own signed header."""
    return Send(party.sign(Step.COMPLAIN, ctx, Complaint(accused).encode()))
