"""Every event in every state of a silo: what it does, or why it refuses (docs/secure-sum.md).

A cell reads "next state: ledger entries and messages, in order"; a reason in capitals is a refusal
and a dash an `UnexpectedEvent`, and then nothing has changed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import pytest

from secagg import coordinator, silo
from secagg.certificate import Certificate
from secagg.errors import Refused, UnexpectedEvent
from secagg.events import (
    Adverts,
    Confirmations,
    GiveUp,
    Headers,
    InputMasked,
    MaskInput,
    Open,
    Received,
    Record,
    Send,
    Settle,
    SiloEffect,
    SiloEvent,
    Survivors,
)
from secagg.messages import Abort, Confirm, Step
from tests.secagg.world import make_context, make_world

BEFORE = ("Waiting", "Advertised")
AFTER = ("Shared", "Masking", "Masked", "Confirmed", "Unmasked", "Lost", "LostMasked", "Aborted")
STATES = BEFORE + AFTER
_SESSION_CLOSED = dict.fromkeys(AFTER, "SESSION_NOT_NEW")
_LOST = dict.fromkeys(("Lost", "LostMasked"), "KEYS_LOST")
_MASKED = ("Masked", "Confirmed", "Unmasked", "LostMasked", "Aborted")
_IN_DOUBT = dict.fromkeys(_MASKED, "IN_DOUBT")
_OPENED = "Advertised: Opened ADVERTISE"
_GIVEN_UP = "Waiting: Aborted ABORT"
_SETTLED = "Waiting: Settled"


def row(default: str, **cells: str) -> dict[str, str]:
    return dict.fromkeys(STATES, default) | cells


# The coordinator's requests of our session, then each of them with other content.
TABLE = {
    "open": row(_OPENED, **_SESSION_CLOSED, Advertised="same: ADVERTISE"),
    "open the next": row(_OPENED, **_IN_DOUBT),
    "adverts": row("-", **_LOST, Advertised="Shared: SHARE", Shared="same: SHARE"),
    "other adverts": row("-", **_LOST, Advertised="Shared: SHARE", Shared="SECOND_VIEW"),
    "headers": row(
        "-", **_LOST, Shared="Masking: mask", Masking="same: mask", Masked="same: MASKED_INPUT"
    ),
    "other headers": row(
        "-", **_LOST, Shared="Masking: mask", Masking="SECOND_VIEW", Masked="SECOND_VIEW"
    ),
    "masked": row("-", Masking="MaskedState: Masked MASKED_INPUT", Masked="same: MASKED_INPUT"),
    "masked otherwise": row("-", Masking="MaskedState: Masked MASKED_INPUT", Masked="SECOND_VIEW"),
    "survivors": row(
        "-",
        **_LOST,
        Masking="SECOND_VIEW",
        Masked="ConfirmedState: Confirmed CONFIRM",
        Confirmed="same: CONFIRM",
        Unmasked="same: CONFIRM",
    ),
    "other survivors": row(
        "-",
        **_LOST,
        Masking="SECOND_VIEW",
        Masked="ConfirmedState: Confirmed CONFIRM",
        Confirmed="SECOND_VIEW",
        Unmasked="SECOND_VIEW",
    ),
    "confirmations": row(
        "-", **_LOST, Confirmed="UnmaskedState: Unmasked UNMASK", Unmasked="same: UNMASK"
    ),
    "too few confirmations": row(
        "-", **_LOST, Confirmed="BELOW_THRESHOLD", Unmasked="BELOW_THRESHOLD"
    ),
    "give up": row(_GIVEN_UP, Unmasked="ALREADY_UNMASKED", Aborted="Waiting: ABORT"),
    "give up another": row("same: Aborted ABORT", Aborted="same: Aborted ABORT"),
    "sum certificate": row(_SETTLED, Waiting="same:"),
    "abort certificate": row(_SETTLED, Waiting="same:"),
    "other certificate": row("same:"),
}


class Cast:
    """A session of four silos, of which the first is brought into a state and then asked."""

    def __init__(self) -> None:
        self.world = make_world(4)
        self.site = self.world.silos[1]
        self.ctx = self.world.session.context.digest
        self.asked: dict[type[SiloEvent], SiloEvent] = {}
        self.vector = hashlib.sha256(b"masked").digest()

    def ask(self) -> SiloEvent:
        """What the coordinator wants of silo 1 once all others have answered."""
        phase = type(self.world.session)
        if phase is not coordinator.Unmasking:  # three of them suffice to end it
            self.world.pump(lambda i: i != 1 and isinstance(self.world.session, phase))
        request = self.world.session.request_for(1)
        assert request is not None
        self.asked[type(request)] = request
        return request

    def go(self) -> None:
        for sent in self.site.deliver(self.ask()):
            self.world.feed(Received(sent.message, sent.parcels))

    def bring_to(self, state: str) -> None:
        steps = {"Advertised": 1, "Shared": 2, "Masking": 2, "Masked": 3, "Confirmed": 4}
        steps |= {"Unmasked": 5, "Lost": 2, "LostMasked": 3, "Aborted": 3}
        for _ in range(steps.get(state, 0)):
            self.go()
        if state == "Masking":
            self.site.state, _ = self.site.state.handle(self.ask())
        if state in ("Lost", "LostMasked"):
            self.site.restart()
        if state == "Aborted":
            self.site.deliver(GiveUp(self.ctx))
        if state != "Unmasked":  # there it has all been asked
            self.ask()

    def event(self, name: str) -> SiloEvent:
        make: dict[str, Callable[[], SiloEvent]] = {
            "open": lambda: Open(self.world.session.context),
            "open the next": lambda: Open(make_context(self.world.roster, session=2)),
            "adverts": lambda: self.asked.get(Adverts, Adverts(())),
            "other adverts": lambda: Adverts(self._known(Adverts)[:3]),
            "headers": lambda: self.asked.get(Headers, Headers((), {})),
            "other headers": lambda: Headers(self._known(Headers)[:3], self._parcels()),
            "masked": lambda: InputMasked(self._vector(), 2000),
            "masked otherwise": lambda: InputMasked(bytes(32), 2000),
            "survivors": lambda: Survivors((1, 2, 3, 4)),
            "other survivors": lambda: Survivors((1, 2, 3)),
            "confirmations": lambda: self.asked.get(Confirmations, Confirmations(())),
            "too few confirmations": lambda: Confirmations(self._known(Confirmations)[:2]),
            "give up": lambda: GiveUp(self.ctx),
            "give up another": lambda: GiveUp(bytes(32)),
            "sum certificate": lambda: Settle(self._certificate(Step.CONFIRM, self.ctx)),
            "abort certificate": lambda: Settle(self._certificate(Step.ABORT, self.ctx)),
            "other certificate": lambda: Settle(self._certificate(Step.ABORT, bytes(32))),
        }
        return make[name]()

    def _known(self, kind: type) -> tuple:
        request = self.asked.get(kind)
        return getattr(request, "messages", ())

    def _parcels(self) -> dict:
        request = self.asked.get(Headers)
        return dict(request.parcels) if isinstance(request, Headers) else {}

    def _vector(self) -> bytes:
        return getattr(self.site.state, "vector", self.vector)

    def _certificate(self, step: Step, ctx: bytes) -> Certificate:
        """As the other three sign it; a sum is over all four, in the transcript of silo 1."""
        entry = getattr(self.site.state, "entry", None)
        t2 = entry.t2 if entry is not None else bytes(32)
        confirm = Confirm(t2, (1, 2, 3, 4), bytes(32))
        body = (confirm if step is Step.CONFIRM else Abort(self.world.roster.digest)).encode()
        signed = tuple(self.world.silos[i].party.sign(step, ctx, body) for i in (2, 3, 4))
        return Certificate(step, ctx, signed)


def told(before: silo.SiloState, after: silo.SiloState, effects: list[SiloEffect]) -> str:
    words = []
    for effect in effects:
        match effect:
            case Record(entry):
                words.append(type(entry).__name__)
            case Send(message):
                words.append(message.step.name)
            case MaskInput():
                words.append("mask")
    same = type(before) is type(after) and getattr(before, "context", 0) == getattr(
        after, "context", 0
    )
    name = "same" if same and not isinstance(after, silo.Waiting) else type(after).__name__
    return f"{name}: {' '.join(words)}".strip()


def normal(cell: str, state: str) -> str:
    """ "same" of a waiting silo is "Waiting"."""
    return cell.replace("same", "Waiting") if state in ("Waiting", "Aborted") else cell


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("name", TABLE)
def test_a_silo_answers_every_event_in_every_state_as_the_table_says(name: str, state: str) -> None:
    cast = Cast()
    cast.bring_to(state)
    before, cell = cast.site.state, TABLE[name][state]
    event = cast.event(name)
    if cell == "-":
        with pytest.raises(UnexpectedEvent, match=type(event).__name__):
            before.handle(event)
    elif cell.isupper():
        with pytest.raises(Refused) as caught:
            before.handle(event)
        assert caught.value.reason.name == cell
    else:
        after, effects = before.handle(event)
        assert told(before, after, list(effects)) == normal(cell, state)


def test_the_cast_reaches_the_states_that_the_table_names() -> None:
    found = {}
    for state in STATES:
        cast = Cast()
        cast.bring_to(state)
        found[state] = type(cast.site.state).__name__.removesuffix("State")
    aliases = {"LostMasked": "Lost", "Aborted": "Waiting"}
    assert found == {state: aliases.get(state, state) for state in STATES}


def test_a_coordinator_that_waits_for_silo_1_is_where_the_cast_left_it() -> None:
    cast = Cast()
    cast.bring_to("Masked")
    assert isinstance(cast.world.session, coordinator.Confirming)
