"""What every state of the coordinator has in common.

The coordinator is trusted with nothing but keeping the session going; each check here spares the
silos a wasted session or finds out who broke it, and no silo relies on it.
"""

from __future__ import annotations

from abc import ABC
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from secagg.context import SessionContext
from secagg.errors import Reason, Refused, UnexpectedEvent
from secagg.events import (
    CoordinatorEffect,
    CoordinatorEvent,
    Deadline,
    Received,
    SiloEvent,
)
from secagg.messages import Signed, Step
from secagg.roster import Roster

Next = tuple["CoordinatorState", Sequence[CoordinatorEffect]]


@dataclass(frozen=True)
class CoordinatorState(ABC):
    """One state of a session: whom it awaits, what it asks of whom, and what it does with events.

    `over` tells that no event can change the state any more.
    """

    roster: Roster
    context: SessionContext

    over = False

    @property
    def phase(self) -> str:
        """The name of this state as status pages show it."""
        return type(self).__name__.lower()

    @property
    def awaited(self) -> tuple[int, ...]:
        """The silos whose message the current step still lacks."""
        return ()

    def request_for(self, index: int) -> SiloEvent | None:
        """What the silo with this index is asked next, or None if nothing is wanted of it."""
        return None

    def handle(self, event: CoordinatorEvent) -> Next:
        """The next state and what to do. Raises `Refused` or `UnexpectedEvent`; then nothing
        has changed."""
        match event:
            case Received():
                return self.on_received(event)
            case Deadline():
                return self.on_deadline()
        return self.on_cancel(event.why)

    def on_received(self, event: Received) -> Next:
        if event.message in self.heard():
            return self, []  # its acknowledgement was lost; taking it again changes nothing
        raise Refused(
            Reason.WRONG_STEP,
            f"{event.message.step.name} came while the session was {self.phase}",
        )

    def on_deadline(self) -> Next:
        """Where no deadline closes the step, and when one strikes after the end: nothing."""
        return self, []

    def on_cancel(self, why: str) -> Next:
        raise UnexpectedEvent(f"cancelled while the session was {self.phase}: {why}")

    def heard(self) -> Collection[Signed]:
        """Messages accepted so far, so that one sent twice is acknowledged twice."""
        return ()

    def enough(self, present: Collection[int]) -> bool:
        """Whether a step may close: t silos, or all that a reservation was made with."""
        return len(present) >= (len(self.context.survivors) or self.roster.threshold)

    def accept(self, event: Received, step: Step, awaited: Collection[int]) -> bool:
        """Whether a message is new and belongs here; False if it is one we already hold.

        Raises `Refused` for a message that no honest silo would send now.
        """
        message = event.message
        if message in self.heard():
            return False
        message.check(self.roster, self.context.digest, step)
        if message.sender not in awaited:
            raise Refused(
                Reason.DUPLICATE_SENDER,
                f"{step.name} of {self.name(message.sender)} is not awaited",
                accused=message.sender,
            )
        return True

    def name(self, index: int) -> str:
        return self.roster.member(index).name

    def too_few(self, present: Collection[int], what: str) -> str:
        """The sentence a person reads when a session cannot go on."""
        missing = [index for index in self.roster.indices if index not in present]
        return (
            f"session {self.context.session} ({self.context.quantity}): {len(present)} of "
            f"{self.roster.size} silos {what}, the threshold is {self.roster.threshold}; "
            f"missing: {self.roster.names(missing)}. Bring a missing silo's agent back; "
            f"the step is tried again by itself"
        )


def in_order(messages: Mapping[int, Signed]) -> tuple[Signed, ...]:
    return tuple(messages[sender] for sender in sorted(messages))
