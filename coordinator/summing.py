"""One quantity, summed: sessions are opened for it until one of them ends with a sum."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import structlog

from coordinator import records
from coordinator.records import SessionRow
from coordinator.sessions import Session, SessionEnd, Tools
from coordinator.studies import LiveStudy
from secagg.certificate import Certificate
from secagg.context import NO_HASH, Quantity, SessionContext
from study.quantity import Work, encode_work, session_context

log = structlog.get_logger()

_FIRST_PAUSE, _LONGEST_PAUSE = 0.5, 30.0


class Stopped(Exception):
    """The operator stopped the study."""


class RosterChanged(Exception):
    """The operator wants another roster: the next session is opened under it, or none."""


class StudyFailed(Exception):
    """The study cannot go on; the text says why and what to do."""


@dataclass(frozen=True)
class Asked:
    """What is to be summed, and by whom."""

    work: Work
    round: int
    members: Collection[int]
    """Roster indices of the silos that are asked."""
    model: bytes = NO_HASH
    reservation: bytes = NO_HASH
    survivors: tuple[int, ...] = ()
    artifacts: Sequence[bytes] = ()
    patient: bool = False
    """Wait for silos that are out of contact until the step's deadline."""
    once: bool = False
    """One session; if it brings no sum, say so instead of opening another."""

    @property
    def quantity(self) -> Quantity:
        return Quantity(self.work.purpose, self.round)


class Summing:
    """The secure sums of one study, one after the other."""

    def __init__(self, tools: Tools, live: LiveStudy, absent_after: float) -> None:
        self._tools, self._live, self._absent_after = tools, live, absent_after

    async def sum(self, asked: Asked) -> SessionEnd:
        """The end of a session that summed the quantity; with `once`, of any session.

        A session that was under way when the service died is taken up again, and one that ended
        just before is not repeated. Raises Stopped, RosterChanged, StudyFailed.
        """
        store, name = self._tools.store, self._live.id
        row = await store.do(records.last_session, name)
        accused: int | None = None
        pause = _FIRST_PAUSE
        if row is not None and not row.open and row.quantity == str(asked.quantity):
            end = _end_of(row)
            if end.kind == "void":
                raise StudyFailed(_why_void(end))
            if end.kind == "summed" or asked.once:
                return end
            if row.epoch == self._live.roster.epoch:  # indices mean nothing in another one
                accused = end.accused
        while True:
            row = await store.do(records.live_session, name)
            if row is None:
                # What the operator wanted before this session opens, it honours: the service sees
                # the store's changes by itself only every half second.
                self._live.operator_wants(await store.do(records.study, name))
                await self.may_go_on()
                self.check_roster()
                await self._enough_in_contact(asked)
                row = await self._open(asked, accused)
            end = await self._drive(row, asked)
            if end.kind == "unproven":
                raise Stopped
            if end.kind == "void":
                raise StudyFailed(_why_void(end))
            if end.kind == "summed" or asked.once:
                return end
            await store.do(records.set_error, name, end.why)
            accused = end.accused
            await self._rest(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)

    async def may_go_on(self) -> None:
        """Returns when the operator lets the study run; raises Stopped.

        A session that is open, after a restart for example, is ended first whatever is wanted.
        """
        if self._live.unfinished:
            return
        while self._live.row.wanted == "pause":
            await self._live.bell.wait(60)
        if self._live.row.stopping:
            raise Stopped

    def check_roster(self) -> None:
        """Raises RosterChanged where the operator wants another roster."""
        # Here and nowhere else: what was summed before is worked off under the roster that it was
        # summed with, and no session is open that the new roster could not end.
        if self._live.row.next_roster is not None:
            raise RosterChanged

    async def _rest(self, seconds: float) -> None:
        """Wait, but not for an operator who wants the study stopped."""
        end = time.time() + seconds
        while (left := end - time.time()) > 0 and not self._live.row.stopping:
            await self._live.bell.wait(left)

    async def _enough_in_contact(self, asked: Asked) -> None:
        """Wait for t of those asked: a session that cannot end would only use up their time."""
        live, contacts = self._live, self._tools.contacts
        needed, since, told = live.roster.threshold, time.time(), False
        while not asked.survivors:
            wanted = [i for i in asked.members if live.takes_part(i)]
            here = [
                i
                for i in wanted
                if contacts.present(live.roster.member(i).name, self._absent_after)
            ]
            if len(here) >= needed:
                return
            if not told and time.time() - since > self._absent_after:
                told = True
                missing = live.roster.names([i for i in wanted if i not in here])
                left = live.roster.names([i for i in asked.members if i not in wanted])
                await self._tools.store.do(
                    records.set_error,
                    live.id,
                    f"{asked.quantity}: {len(here)} of {len(asked.members)} silos are in contact, "
                    f"the threshold is {needed}; missing: {missing}; left: {left}. Bring a missing "
                    "silo's agent back and the study goes on by itself; without sites that are "
                    f"gone for good it goes on by `concilium study roster {live.id}`",
                )
            await live.bell.wait(min(1.0, self._absent_after / 4))
            await self.may_go_on()
            self.check_roster()

    async def _open(self, asked: Asked, accused: int | None) -> SessionRow:
        live, store = self._live, self._tools.store
        last = await store.do(records.last_certified, live.id, live.roster.epoch)
        number = await store.do(records.next_number, live.id)
        context = session_context(
            live.roster,
            live.plan.digest(),
            live.plan.secure_sum.ring,
            asked.work,
            session=number,
            round=asked.round,
            model=asked.model,
            reservation=asked.reservation,
            survivors=asked.survivors,
            previous=_digest_of(last),
        )
        row = self._row(context, asked, accused)
        await store.do(records.open_session, row)
        log.info("session.opened", study=live.id, session=number, quantity=row.quantity)
        return row

    def _row(self, context: SessionContext, asked: Asked, accused: int | None) -> SessionRow:
        live, now = self._live, time.time()
        expected = asked.survivors or tuple(live.roster.indices)
        asked_now = {i for i in asked.members if live.takes_part(i) and i != accused}
        resting = [i for i in expected if i not in asked_now]
        awaited = [live.roster.member(i).name for i in expected if i not in resting]
        return SessionRow(
            study=live.id,
            number=context.session,
            epoch=context.epoch,
            quantity=str(context.quantity),
            context=context.encode(),
            work=encode_work(asked.work),
            artifacts=json.dumps([sha256.hex() for sha256 in asked.artifacts]),
            resting=json.dumps(resting),
            phase="advertising",
            awaited=json.dumps(awaited),
            present=0,
            deadline=now + live.plan.deadlines.advertise,
            open=True,
            certificate=None,
            outcome=None,
            log_place=None,
            log_digest=None,
            opened=now,
        )

    async def _drive(self, row: SessionRow, asked: Asked) -> SessionEnd:
        live = self._live
        absent_after = float("inf") if asked.patient else self._absent_after
        before, live.session = live.session, None
        live.unfinished = live.last = row.number
        if before is not None:
            await before.detach()
        session = Session(
            self._tools, row, live.roster, live.plan.deadlines, live.bell, absent_after
        )
        await session.resume()
        live.session = session
        live.bell.ring()
        stopper = asyncio.create_task(self._cancel_when_stopped(session))
        try:
            end = await session.run()
        finally:
            stopper.cancel()
        live.unfinished = 0
        if end.kind == "unproven":
            live.session = None  # it would go on asking silos for what nobody takes any more
        elif end.kind != "abandoned":
            live.certified = row.number
            live.bell.ring()
        return end

    async def _cancel_when_stopped(self, session: Session) -> None:
        live, number = self._live, session.row.number
        while not live.row.stopping:
            await live.bell.wait(60)
        await session.cancel(f"session {number}: the study centre stopped the study")
        while live.row.wanted != "abandon":
            await live.bell.wait(60)
        session.abandon(
            f"session {number} ({session.context.quantity}): the study centre ended the study "
            "while nothing proved how the session ended"
        )


def _digest_of(last: SessionRow | None) -> bytes:
    # Of this epoch: a silo that joined with it could not verify one of the roster before.
    if last is None or last.certificate is None:
        return NO_HASH
    return Certificate.decode(last.certificate).digest


def _why_void(end: SessionEnd) -> str:
    where = "to this machine's disk, and start a new study"
    if end.accused is not None:
        where = "at that site, and start a new study without it"
    return (
        f"{end.why}. The silos settled this sum, so it cannot be asked for again: find out what "
        f"happened {where}"
    )


def _end_of(row: SessionRow) -> SessionEnd:
    if row.outcome is None:
        raise AssertionError(f"session {row.number} is closed without an outcome")
    values = json.loads(row.outcome)
    values["survivors"], values["missing"] = tuple(values["survivors"]), tuple(values["missing"])
    return SessionEnd(**values)
