"""One secure sum, kept going: events to the store, steps closed in time, the sum unveiled.

The state is `secagg.coordinator`'s, which is a function of the events fed to it. Every event is
in the store before it counts and before a silo hears that it was taken, so a coordinator that
dies feeds the same events again and is where it was.
"""

from __future__ import annotations

import asyncio
import json
import math
import time
from collections.abc import Collection, Coroutine, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import Any, Literal

import structlog

from coordinator import failpoints, records
from coordinator.artifacts import Artifacts
from coordinator.contacts import Bell, Contacts
from coordinator.journal import decode_event, encode_event
from coordinator.records import SessionRow, Standing
from coordinator.spool import InputLost, Spool, UploadRefused
from coordinator.store import Store
from coordinator.uploads import NotYet, Uploads
from secagg import coordinator as core
from secagg.context import SessionContext
from secagg.errors import Reason, Refused
from secagg.events import (
    Cancel,
    CoordinatorEffect,
    CoordinatorEvent,
    Deadline,
    Ended,
    Received,
    Settle,
    SiloEvent,
    Unveil,
)
from secagg.messages import MaskedInput, Parcel, Signed, Step
from secagg.roster import Roster
from study.sections import Deadlines

log = structlog.get_logger()

_TICK = 1.0


class Resuming(Exception):
    """The session is not in memory, after a restart or a failure, and will be: ask again."""


@dataclass(frozen=True)
class SessionEnd:
    """How a session ended.

    summed: the sum is an artifact. aborted: proof that nothing was or will be revealed.
    abandoned: given up before any input was masked. void: confirmed, but a dealer's keys are
    wrong or a masked input is lost, and the sum cannot be unveiled by anyone. unproven: the
    operator waits no longer for what would prove the end, so it stays in doubt at the silos.
    """

    kind: Literal["summed", "aborted", "abandoned", "void", "unproven"]
    number: int
    why: str = ""
    survivors: tuple[int, ...] = ()
    sum: str = ""
    """SHA-256 of the sum, hexadecimal."""
    missing: tuple[int, ...] = ()
    """Members of the session that are not in the sum."""
    accused: int | None = None
    seconds: Mapping[str, float] = field(default_factory=dict)
    """How long each step took."""


@dataclass(frozen=True)
class Tools:
    """What every session of this service uses."""

    store: Store
    spool: Spool
    artifacts: Artifacts
    contacts: Contacts


class Session:
    """The session of `row`. `resume` feeds what the store holds, `run` drives it to its end."""

    def __init__(
        self,
        tools: Tools,
        row: SessionRow,
        roster: Roster,
        deadlines: Deadlines,
        bell: Bell,
        absent_after: float,
    ) -> None:
        self._tools, self.row, self._roster, self._deadlines = tools, row, roster, deadlines
        self.bell, self._absent_after = bell, absent_after
        self.context = SessionContext.decode(row.context)
        self.resting: tuple[int, ...] = tuple(json.loads(row.resting))
        self.artifacts = [bytes.fromhex(name) for name in json.loads(row.artifacts)]
        self.state: core.CoordinatorState = core.open_session(roster, self.context)
        self.refusals: dict[int, str] = {}
        self._deadline, self._place = row.deadline, 0
        self._effects: Sequence[CoordinatorEffect] = ()
        self._steps = [(self.state.phase, row.opened)]
        self._lock = asyncio.Lock()
        self._running: set[asyncio.Task[None]] = set()
        self._overdue = self._detached = False
        self._abandoned = ""
        self.uploads = Uploads(tools.spool)
        self._here: Collection[int] = ()
        self._inputs: Mapping[int, bytes] = {}

    async def resume(self) -> None:
        """Feed the events that the store holds; the state afterwards is the one they left."""
        store, name, number = self._tools.store, self.row.study, self.row.number
        self.refusals = await store.do(records.refusals_of, name, number)
        for at, event in await store.do(records.session_log, name, number):
            state, effects = await asyncio.to_thread(self.state.handle, decode_event(event))
            self._advance(state, effects, at)
        # While the service was down nobody could answer: a step that is due is given the time in
        # which a silo would be found out of contact. A clock that was set back gains nothing.
        now, whole = time.time(), self._seconds(self.state)
        self._deadline = min(max(self._deadline, now + min(self._absent_after, whole)), now + whole)

    def request_for(self, index: int) -> SiloEvent | None:
        """What this silo is asked next; certificates are handed out once they are recorded."""
        request = self.state.request_for(index)
        if isinstance(request, Settle):
            return None
        if index in self._unavailable and not isinstance(self.state, core.Aborting):
            return None
        return request

    @property
    def _unavailable(self) -> set[int]:
        return {*self.resting, *self.refusals}

    async def receive(self, message: Signed, parcels: Mapping[int, Parcel]) -> None:
        """Take a silo's message; on return it is durable. One that was taken before is taken
        again without effect. Raises what the core raises, and NotYet."""
        if message.step is Step.MASKED_INPUT:
            await asyncio.to_thread(self._check_upload, message)
        await self._whole(self._apply(Received(message, parcels)))

    def _check_upload(self, message: Signed) -> None:
        # The message counts as "the whole input is committed", so it must be, before it counts.
        masked = MaskedInput.decode(message.body)
        row, silo = self.row, message.sender
        if isinstance(self.state, core.Collecting) and not self._tools.spool.holds(
            row.study, row.number, silo, masked.vector, masked.size
        ):
            committed = self._tools.spool.committed(row.study, row.number, silo)
            raise NotYet(
                f"the vector that this message speaks of is not here: {committed} of "
                f"{masked.size} bytes are committed; upload the rest first"
            )

    async def refuse(self, index: int, site: str, reason: str) -> None:
        """A silo says why it takes no part; nothing more is asked of it in this session."""
        name, number = self.row.study, self.row.number
        await self._tools.store.do(records.refuse, name, number, index, site, reason)
        self.refusals.setdefault(index, reason)
        standing = self._standing(self.state, self._deadline)
        await self._tools.store.do(records.set_standing, name, number, standing)
        self.bell.ring()

    def check_upload(self, silo: int, size: int) -> None:
        """Raises Refused or UploadRefused unless the session waits for this silo's vector now."""
        if not isinstance(self.state, core.Collecting):
            raise Refused(Reason.WRONG_STEP, f"session {self.row.number} takes no uploads now")
        if silo not in self.state.headers:
            raise Refused(Reason.NOT_A_SUBSET, "this silo did not share its keys in the session")
        if size != self.context.vector_bytes:
            raise UploadRefused(
                f"{size} bytes are announced, the vector has {self.context.vector_bytes}"
            )

    async def detach(self) -> None:
        """Take no event any more: another object goes on with this session, from the store."""
        async with self._lock:
            self._detached = True

    async def cancel(self, why: str) -> None:
        """End the session if it can still be ended."""
        if not self.state.over and not isinstance(self.state, core.Unmasking | core.Aborting):
            await self._whole(self._apply(Cancel(why)))

    def abandon(self, why: str) -> None:
        """Wait no longer, once the step is overdue, for what would prove how the session ended."""
        self._abandoned = why
        self.bell.ring()

    async def run(self) -> SessionEnd:
        """Close steps when they are due, until the session is over and its end is recorded."""
        tick = min(_TICK, self._absent_after / 4)
        while not self.state.over:
            if self._abandoned and self._overdue:
                # What comes from now on must not count: the end is about to be recorded.
                await self.detach()
                break
            await self.bell.wait(
                min(tick, self._deadline - time.time()) if not self._overdue else tick
            )
            await self._whole(self._close_if_due())
        return await self._finish()

    async def _whole(self, work: Coroutine[Any, Any, None]) -> None:
        """Run to the end whatever becomes of the caller: a call that is cancelled between the
        commit and the change of state would leave the two at odds."""
        task = asyncio.ensure_future(work)
        self._running.add(task)
        task.add_done_callback(self._running.discard)
        await asyncio.shield(task)

    async def _apply(self, event: CoordinatorEvent) -> None:
        async with self._lock:
            await self._apply_locked(event)

    async def _apply_locked(self, event: CoordinatorEvent) -> None:
        if self._detached:
            raise Resuming("the session was interrupted and is being taken up again: ask again")
        if self.state.over:
            return  # its outcome is what the silos are told next
        state, effects = await asyncio.to_thread(self.state.handle, event)
        if state is self.state:
            return
        moved = state.phase != self.state.phase
        now = time.time()
        deadline = now + self._seconds(state) if moved else self._deadline
        name, number, place = self.row.study, self.row.number, self._place
        standing = self._standing(state, deadline)
        raw = encode_event(event)
        await self._tools.store.do(records.append_event, name, number, place, raw, standing)
        self._deadline = deadline
        self._advance(state, effects, now)
        if moved:
            log.info("session.step", study=name, session=number, phase=state.phase)
        if isinstance(state, core.Aborting) and moved:
            await self._tools.store.do(records.set_error, name, state.why)
        if moved:
            # Only now does anybody get another request; else each of N messages would have N long
            # polls look again.
            self.bell.ring()

    def _advance(
        self, state: core.CoordinatorState, effects: Sequence[CoordinatorEffect], at: float
    ) -> None:
        if isinstance(self.state, core.Unmasking):
            messages = self.state.confirmed.collected.inputs.items()
            self._inputs = {i: MaskedInput.decode(m.body).vector for i, m in messages}
        elif not isinstance(self.state, core.Aborting):
            self._here = answered(self.state)
        if state.phase != self.state.phase:
            self._steps.append((state.phase, at))
            self._overdue = False
        self.state, self._effects, self._place = state, effects, self._place + 1

    def _standing(self, state: core.CoordinatorState, deadline: float) -> Standing:
        out = set() if isinstance(state, core.Aborting) else self._unavailable
        awaited = tuple(self._roster.member(i).name for i in state.awaited if i not in out)
        return Standing(state.phase, awaited, len(answered(state)), deadline)

    def _seconds(self, state: core.CoordinatorState) -> float:
        """How long the plan gives a step. What cannot be closed by time alone is only reported
        when that time is over."""
        d = self._deadlines
        steps = {"advertising": d.advertise, "sharing": d.share, "collecting": d.input}
        return steps.get(state.phase, d.confirm if state.phase == "confirming" else d.unmask)

    async def _close_if_due(self) -> None:
        async with self._lock:
            # A clock that was set back must not make the step longer than the plan does.
            self._deadline = min(self._deadline, time.time() + self._seconds(self.state))
            if self.state.over or not self._due():
                return
            if isinstance(self.state, core.Unmasking | core.Aborting):
                await self._report_overdue()
            else:
                await self._apply_locked(self._closing_event())

    def _due(self) -> bool:
        """Whether the step's time is over, or waiting longer can bring nothing."""
        if time.time() >= self._deadline:
            return not self._overdue
        if isinstance(self.state, core.Unmasking | core.Aborting):
            return False
        here = answered(self.state)
        hoped_for = [i for i in self.state.awaited if i not in self._unavailable]
        if len(here) + len(hoped_for) < (len(self.context.survivors) or self._roster.threshold):
            return True
        return len(here) >= self._roster.threshold and all(map(self._absent, hoped_for))

    def _absent(self, index: int) -> bool:
        name = self._roster.member(index).name
        return self._tools.contacts.absent(name, self._absent_after)

    def _closing_event(self) -> CoordinatorEvent:
        """A deadline; but a sum over a fixed set of silos is over when one of them is missing."""
        state, here = self.state, answered(self.state)
        if self.context.survivors and isinstance(
            state, core.Advertising | core.Sharing | core.Collecting
        ):
            gone = [i for i in self.context.survivors if i not in here]
            return Cancel(
                f"session {self.context.session} ({self.context.quantity}) is for exactly the "
                f"silos of an earlier sum, and these are missing: {self._roster.names(gone)}. "
                f"It is begun anew by itself{self._reasons()}"
            )
        if (
            self.refusals
            and len(here) < self._roster.threshold
            and not isinstance(state, core.Confirming)
        ):
            return Cancel(state.too_few(here, "took part") + self._reasons())
        return Deadline()

    def _reasons(self) -> str:
        said = [f"{self._roster.member(i).name}: {why}" for i, why in self.refusals.items()]
        return f" (refused: {'; '.join(said)})" if said else ""

    async def _report_overdue(self) -> None:
        """These two steps have no way back; a person is told whom they wait for."""
        state, self._overdue = self.state, True
        have, needed = len(answered(state)), self._roster.threshold
        missing = self._roster.names(state.awaited)
        if isinstance(state, core.Aborting):
            why = (
                f"{state.why}. First {needed} silos must sign that they give the session up: "
                f"{have} have, not yet {missing}. One that released its shares never signs: after "
                "the restore of an older backup nothing may ever prove the end, and "
                f"`concilium study stop {self.row.study} --abandon` ends the study without"
            )
        else:
            why = (
                f"session {self.context.session} ({self.context.quantity}): {have} silos released "
                f"their shares, the threshold is {needed}; missing: {missing}. Bring a missing "
                "silo's agent back; it goes on by itself"
            )
        log.warning("session.overdue", study=self.row.study, session=self.row.number, why=why)
        await self._tools.store.do(records.set_error, self.row.study, why)

    async def _finish(self) -> SessionEnd:
        end = await self._end()
        certificate = getattr(self.state, "certificate", None)
        raw = None if certificate is None else certificate.encode()
        name, number = self.row.study, self.row.number
        size = self.context.vector_bytes
        await self._tools.store.do(records.end_session, name, number, raw, asdict(end), size)
        await asyncio.to_thread(self._tools.spool.discard, name, number)
        how = {"kind": end.kind, "survivors": end.survivors, "why": end.why}
        log.info("session.ended", study=name, session=number, quantity=self.row.quantity, **how)
        self.bell.ring()
        return end

    async def _end(self) -> SessionEnd:
        steps = [*self._steps, ("", time.time())]
        seconds = {
            phase: round(after - at, 3)
            for (phase, at), (_, after) in pairwise(steps)
            if math.isfinite(at) and phase not in ("summed", "aborted", "abandoned")
        }
        number, expected = self.context.session, self.context.survivors or self._roster.indices
        if not self.state.over:
            missing = tuple(self.state.awaited)
            why = f"{self._abandoned}; not heard of: {self._roster.names(missing)}"
            return SessionEnd("unproven", number, why, (), "", missing, None, seconds)
        for effect in self._effects:
            match effect:
                case Unveil():
                    missing = tuple(i for i in expected if i not in effect.survivors)
                    try:
                        digest = await asyncio.to_thread(self._unveil, effect)
                    except InputLost as lost:
                        # The confirmations prove the sum's set, so the silos can settle.
                        why, accused = self._lost(lost), lost.silo if lost.alone else None
                        return SessionEnd("void", number, why, (), "", missing, accused, seconds)
                    return SessionEnd(
                        "summed", number, "", effect.survivors, digest.hex(), missing, None, seconds
                    )
                case Ended(why, certificate, accused):
                    kind: Literal["void", "aborted", "abandoned"] = "abandoned"
                    if certificate is not None:
                        kind = "void" if certificate.is_sum else "aborted"
                    missing = tuple(i for i in expected if i not in self._here)
                    return SessionEnd(kind, number, why, (), "", missing, accused, seconds)
        raise AssertionError(self.state)

    def _lost(self, lost: InputLost) -> str:
        name, number = self._roster.member(lost.silo).name, self.context.session
        whose = name if lost.alone else "every silo"
        return (
            f"session {number} ({self.context.quantity}): the masked input of {whose} was taken "
            f"whole and is not there any more: {lost}"
        )

    def _unveil(self, effect: Unveil) -> bytes:
        row, context = self.row, self.context
        inputs = {i: self._inputs[i] for i in effect.survivors}
        total = self._tools.spool.fold(
            row.study, row.number, inputs, context.ring, context.length, effect.keys
        )
        failpoints.reach(f"folded, session {row.number}")
        return self._tools.artifacts.put(total.data.cast("B"))


def answered(state: core.CoordinatorState) -> Collection[int]:
    """The silos whose message of the current step is there."""
    match state:
        case core.Advertising():
            return state.adverts
        case core.Sharing():
            return state.headers
        case core.Collecting():
            return state.inputs
        case core.Confirming():
            return state.confirmations
        case core.Unmasking():
            return state.shares
        case core.Aborting():
            return state.aborts
    return ()
