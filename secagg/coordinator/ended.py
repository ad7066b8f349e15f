"""How a session ends at the coordinator: summed, aborted with proof, or abandoned unmasked."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace

from secagg.certificate import Certificate
from secagg.coordinator.base import CoordinatorState, Next, in_order
from secagg.errors import Reason, Refused
from secagg.events import Ended, GiveUp, Received, Settle, SiloEvent
from secagg.messages import Abort, Signed, Step


@dataclass(frozen=True)
class Aborting(CoordinatorState):
    """The session is given up; waiting for t ABORTs, which prove that it will never be unmasked.

    Any member of the roster may sign, also one that took no part.
    """

    why: str
    accused: int | None = None
    aborts: Mapping[int, Signed] = field(default_factory=dict)

    @property
    def awaited(self) -> tuple[int, ...]:
        return tuple(i for i in self.roster.indices if i not in self.aborts)

    def heard(self) -> Collection[Signed]:
        return self.aborts.values()

    def request_for(self, index: int) -> SiloEvent | None:
        return GiveUp(self.context.digest) if index in self.awaited else None

    def on_received(self, event: Received) -> Next:
        if not self.accept(event, Step.ABORT, self.awaited):
            return self, []
        if Abort.decode(event.message.body).roster != self.roster.digest:
            raise Refused(Reason.ROSTER_MISMATCH, f"ABORT of {self.name(event.message.sender)}")
        state = replace(self, aborts={**self.aborts, event.message.sender: event.message})
        if len(state.aborts) < self.roster.threshold:
            return state, []
        certificate = Certificate(Step.ABORT, self.context.digest, in_order(state.aborts))
        aborted = Aborted(self.roster, self.context, certificate, self.why)
        return aborted, [Ended(self.why, certificate, self.accused)]


@dataclass(frozen=True)
class Aborted(CoordinatorState):
    """t silos signed ABORT: nothing was or will be revealed."""

    certificate: Certificate
    why: str
    over = True

    def heard(self) -> Collection[Signed]:
        return self.certificate.messages

    def request_for(self, index: int) -> SiloEvent | None:
        return Settle(self.certificate)


@dataclass(frozen=True)
class Summed(CoordinatorState):
    """The sum over U3 is known, and so is the proof that no other set was confirmed."""

    certificate: Certificate
    over = True

    def heard(self) -> Collection[Signed]:
        return self.certificate.messages

    def request_for(self, index: int) -> SiloEvent | None:
        return Settle(self.certificate)


@dataclass(frozen=True)
class Abandoned(CoordinatorState):
    """Given up before any silo was asked for its input: no mask was made, no proof is needed."""

    why: str
    over = True
