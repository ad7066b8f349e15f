"""A silo between sessions, and after a restart."""

from __future__ import annotations

from dataclasses import dataclass

from secagg.context import SessionContext
from secagg.errors import Reason, Refused
from secagg.events import (
    Adverts,
    Confirmations,
    Headers,
    Survivors,
)
from secagg.ledger import History
from secagg.silo.base import Next, SiloParty, SiloState
from secagg.silo.masked import ConfirmedState, UnmaskedState


@dataclass(frozen=True)
class Waiting(SiloState):
    """No session is under way."""


@dataclass(frozen=True)
class Lost(SiloState):
    """A session was under way when the process died, and its keys died with it.

    Nothing can go wrong by waiting: the silo counts as dropped, or, if its input was committed,
    the others unmask it. It can still sign ABORT, or settle the session by its certificate.
    """

    context: SessionContext

    @property
    def session(self) -> SessionContext:
        return self.context

    def on_adverts(self, event: Adverts) -> Next:
        raise Refused(Reason.KEYS_LOST, f"session {self.context.session}")

    def on_headers(self, event: Headers) -> Next:
        raise Refused(Reason.KEYS_LOST, f"session {self.context.session}")

    def on_survivors(self, event: Survivors) -> Next:
        raise Refused(Reason.KEYS_LOST, f"session {self.context.session}")

    def on_confirmations(self, event: Confirmations) -> Next:
        raise Refused(Reason.KEYS_LOST, f"session {self.context.session}")


def start(party: SiloParty) -> SiloState:
    """A silo with an empty ledger."""
    return Waiting(party, History())


def resume(party: SiloParty, history: History) -> SiloState:
    """The state after a restart: what the ledger of the study says, and nothing else.

    Only the last session can be under way, and only under the roster that it was opened with:
    the threshold of another roster must not open its shares.
    """
    record = history.last
    if (
        record is None
        or record.settled is not None
        or record.aborted
        or record.overruled
        or not record.context.agrees_with(party.roster)
    ):
        return Waiting(party, history)
    if record.confirmed is None:
        return Lost(party, history, record.context)
    state = UnmaskedState if record.unmasked else ConfirmedState
    return state(party, history, record.context, record.confirmed)
