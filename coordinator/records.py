"""Transactions about studies: state, rosters and answers, sessions and their events.

Every function runs inside `Store.run` or `Store.do`.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, Select, delete, func, insert, select, update

from coordinator.results import record_artifact
from coordinator.schema import (
    answers,
    refusals,
    rosters,
    session_events,
    sessions,
    studies,
)
from coordinator.store import note
from secagg.roster import Roster


class NoSuchStudy(Exception):
    """There is no study of this name; `study list` shows those there are."""


# --- studies


@dataclass(frozen=True)
class StudyRow:
    """One study as the store knows it."""

    id: str
    plan: str
    roster: bytes
    """Of the epoch that the study is in."""
    next_roster: bytes | None
    """Of the epoch that begins before the next session, where the operator wants one."""
    wanted: str
    """run, pause, stop or abandon (stop, also with a session of which nothing proves the end): what
    the operator asked for."""
    state: str
    """offered, running, finished, stopped or failed."""
    stage: str
    error: str | None
    model: bytes | None
    created: float
    ended: float | None

    @property
    def over(self) -> bool:
        return self.state in ("finished", "stopped", "failed")

    @property
    def stopping(self) -> bool:
        """Whether the operator wants the study to end."""
        return self.wanted in ("stop", "abandon")


def all_studies(c: Connection) -> list[StudyRow]:
    return [
        StudyRow(**row) for row in c.execute(select(studies).order_by(studies.c.created)).mappings()
    ]


def study(c: Connection, name: str) -> StudyRow:
    row = c.execute(select(studies).where(studies.c.id == name)).mappings().first()
    if row is None:
        raise NoSuchStudy(
            f"there is no study '{name}': `concilium study list` shows those there are"
        )
    return StudyRow(**row)


def create_study(c: Connection, name: str, plan: str, roster: Roster) -> None:
    row = StudyRow(
        id=name,
        plan=plan,
        roster=roster.encode(),
        next_roster=None,
        wanted="run",
        state="offered",
        stage="offered",
        error=None,
        model=None,
        created=time.time(),
        ended=None,
    )
    c.execute(insert(studies).values(**vars(row)))
    _keep_roster(c, name, roster)
    note(c, "study.created", name, roster=roster.fingerprint)


# --- rosters


def propose_roster(c: Connection, name: str, roster: Roster) -> None:
    """The operator wants `roster` from the next session on; one proposed before it is dropped."""
    c.execute(update(studies).where(studies.c.id == name).values(next_roster=roster.encode()))
    silos = [member.name for member in roster.members]
    note(c, "study.roster", name, epoch=roster.epoch, roster=roster.fingerprint, silos=silos)


def enter_epoch(c: Connection, name: str) -> StudyRow:
    """Make the proposed roster the study's, and offer the study under it.

    Never while a session is open: it belongs to the roster before, whose threshold ends it.
    """
    before = study(c, name)
    if before.next_roster is None:
        return before
    if live_session(c, name) is not None:
        raise AssertionError(f"study {name}: a session is open under the roster before")
    roster = Roster.decode(before.next_roster)
    values = {"roster": before.next_roster, "next_roster": None, "error": None}
    c.execute(update(studies).where(studies.c.id == name).values(**values, state="offered"))
    _keep_roster(c, name, roster)
    note(c, "study.epoch", name, epoch=roster.epoch, roster=roster.fingerprint)
    return study(c, name)


def _keep_roster(c: Connection, name: str, roster: Roster) -> None:
    values = {"study": name, "epoch": roster.epoch, "roster": roster.encode()}
    c.execute(insert(rosters).values(**values, entered=time.time()))


def epoch_entered(c: Connection, name: str, epoch: int) -> float:
    """When a study was offered under the roster of an epoch."""
    where = (rosters.c.study == name) & (rosters.c.epoch == epoch)
    return float(c.execute(select(rosters.c.entered).where(where)).one().entered)


def rosters_of(c: Connection, name: str) -> dict[int, Roster]:
    """epoch → roster, of all that a study was offered under."""
    query = select(rosters).where(rosters.c.study == name).order_by(rosters.c.epoch)
    return {row.epoch: Roster.decode(row.roster) for row in c.execute(query)}


# --- answers


def want(c: Connection, name: str, wanted: str) -> None:
    """Note what the operator wants of a study: run, pause, stop, abandon."""
    before = study(c, name)
    if before.wanted != wanted:
        c.execute(update(studies).where(studies.c.id == name).values(wanted=wanted))
        note(c, f"study.{wanted}", name)


def set_stage(c: Connection, name: str, stage: str) -> None:
    c.execute(update(studies).where(studies.c.id == name).values(stage=stage, error=None))


def set_error(c: Connection, name: str, error: str) -> None:
    """What keeps the study from going on, for a person; cleared by the next stage."""
    if study(c, name).error != error:
        c.execute(update(studies).where(studies.c.id == name).values(error=error))
        note(c, "study.error", name, error=error)


def set_state(c: Connection, name: str, state: str, error: str | None = None) -> None:
    before = study(c, name)
    if before.state == state:
        return
    values: dict[str, Any] = {"state": state, "error": error}
    if state in ("finished", "stopped", "failed"):
        values |= {"ended": time.time(), "stage": state}
    c.execute(update(studies).where(studies.c.id == name).values(**values))
    note(c, f"study.{state}", name, **({"error": error} if error else {}))


def set_model(c: Connection, name: str, sha256: bytes) -> None:
    c.execute(update(studies).where(studies.c.id == name).values(model=sha256))


@dataclass(frozen=True)
class Answer:
    """What an institution said to an offer of a study."""

    accepted: bool
    left: bool
    """It had accepted, and takes part no more."""
    rule: str
    """What forbids it, or why it left."""

    @property
    def takes_part(self) -> bool:
        return self.accepted and not self.left


def answer(c: Connection, name: str, epoch: int, site: str, accepted: bool, rule: str) -> None:
    """What an institution says to the offer; it may think again until the study runs."""
    before = answers_of(c, name, epoch).get(site)
    if before is None or before.accepted != accepted:
        _put_answer(c, name, epoch, site, Answer(accepted, False, rule))
        note(c, "study.accepted" if accepted else "study.declined", name, site=site, rule=rule)


def leave(c: Connection, name: str, epoch: int, site: str, reason: str) -> None:
    """An institution that had accepted takes part no more."""
    before = answers_of(c, name, epoch).get(site)
    if before is None or not before.left:
        accepted = before is not None and before.accepted
        _put_answer(c, name, epoch, site, Answer(accepted, True, reason))
        note(c, "study.left", name, site=site, reason=reason)


def _put_answer(c: Connection, name: str, epoch: int, site: str, said: Answer) -> None:
    where = (answers.c.study == name) & (answers.c.epoch == epoch) & (answers.c.site == site)
    c.execute(delete(answers).where(where))
    values = vars(said) | {"study": name, "epoch": epoch, "site": site, "at": time.time()}
    c.execute(insert(answers).values(**values))


def answers_of(c: Connection, name: str, epoch: int) -> dict[str, Answer]:
    """site → what it said to the offer of this epoch's roster."""
    where = (answers.c.study == name) & (answers.c.epoch == epoch)
    rows = c.execute(select(answers).where(where))
    return {row.site: Answer(row.accepted, row.left, row.rule) for row in rows}


# --- sessions


@dataclass(frozen=True)
class SessionRow:
    """One session of the secure sum as the store knows it."""

    study: str
    number: int
    epoch: int
    quantity: str
    context: bytes
    work: bytes
    artifacts: str
    resting: str
    phase: str
    awaited: str
    present: int
    deadline: float
    open: bool
    certificate: bytes | None
    outcome: str | None
    log_place: int | None
    log_digest: str | None
    opened: float


@dataclass(frozen=True)
class Standing:
    """Where a session stands after an event: what the status shows, and when the step is over."""

    phase: str
    awaited: tuple[str, ...]
    present: int
    deadline: float


def next_number(c: Connection, name: str) -> int:
    """Session numbers only rise within a study, whatever became of the sessions."""
    query = select(func.max(sessions.c.number)).where(sessions.c.study == name)
    return int(c.execute(query).scalar() or 0) + 1


def skip_numbers(c: Connection, name: str, count: int) -> None:
    """After a restore: silos may have seen sessions that this store does not know of."""
    number = next_number(c, name) - 1 + count
    outcome = {"kind": "abandoned", "number": number, "why": "restored from a backup"}
    epoch = Roster.decode(study(c, name).roster).epoch
    values = {"study": name, "number": number, "epoch": epoch, "quantity": "restored"}
    values |= {"context": b"", "work": b""}
    values |= {"artifacts": "[]", "resting": "[]", "phase": "abandoned", "awaited": "[]"}
    values |= {"present": 0, "deadline": 0.0, "open": False, "outcome": json.dumps(outcome)}
    c.execute(insert(sessions).values(**values, opened=time.time()))


def open_session(c: Connection, row: SessionRow) -> None:
    c.execute(insert(sessions).values(**vars(row)))
    note(c, "session.opened", row.study, session=row.number, quantity=row.quantity)


def live_session(c: Connection, name: str) -> SessionRow | None:
    """The session that is under way, if there is one."""
    query = select(sessions).where(sessions.c.study == name, sessions.c.open)
    row = c.execute(query).mappings().first()
    return None if row is None else SessionRow(**row)


def sessions_under_way(c: Connection) -> set[tuple[str, int]]:
    """(study, number) of every session that is not over."""
    rows = c.execute(select(sessions.c.study, sessions.c.number).where(sessions.c.open))
    return {(row.study, row.number) for row in rows}


def last_session(c: Connection, name: str) -> SessionRow | None:
    query = select(sessions).where(sessions.c.study == name).order_by(sessions.c.number.desc())
    row = c.execute(query.limit(1)).mappings().first()
    return None if row is None else SessionRow(**row)


def append_event(
    c: Connection, name: str, number: int, place: int, event: bytes, standing: Standing
) -> None:
    """One more event of a session, and where it stands then."""
    values = {"study": name, "number": number, "place": place, "event": event, "at": time.time()}
    c.execute(insert(session_events).values(**values))
    set_standing(c, name, number, standing)


def set_standing(c: Connection, name: str, number: int, standing: Standing) -> None:
    where = (sessions.c.study == name) & (sessions.c.number == number)
    values = vars(standing) | {"awaited": json.dumps(standing.awaited)}
    c.execute(update(sessions).where(where).values(**values))


def session_log(c: Connection, name: str, number: int) -> list[tuple[float, bytes]]:
    """(time, event) of a session in order."""
    where = (session_events.c.study == name) & (session_events.c.number == number)
    query = select(session_events).where(where).order_by(session_events.c.place)
    return [(row.at, row.event) for row in c.execute(query)]


def end_session(
    c: Connection,
    name: str,
    number: int,
    certificate: bytes | None,
    outcome: Mapping[str, Any],
    size: int,
) -> None:
    """A session is over. Its events go: they hold the silos' shares, and whoever later got hold of
    both the shares and the uploads could unmask single inputs. `size` is that of the sum."""
    where = (sessions.c.study == name) & (sessions.c.number == number)
    noted = {key: outcome[key] for key in ("survivors", "why", "accused") if outcome[key]}
    place, head = note(c, f"session.{outcome['kind']}", name, session=number, **noted)
    values = {
        "open": False,
        "certificate": certificate,
        "outcome": json.dumps(outcome),
        "awaited": "[]",
        "phase": outcome["kind"],
        "log_place": place,
        "log_digest": head,
    }
    c.execute(update(sessions).where(where).values(**values))
    here = (session_events.c.study == name) & (session_events.c.number == number)
    c.execute(delete(session_events).where(here))
    if outcome["sum"]:
        digest = bytes.fromhex(outcome["sum"])
        record_artifact(c, name, digest, "sum", size, published=False)
        c.execute(update(studies).where(studies.c.id == name).values(error=None))


def certified_after(c: Connection, name: str, epoch: int, number: int) -> SessionRow | None:
    """The first session of an epoch after `number` that ended with a certificate."""
    query = _certified(name, epoch).where(sessions.c.number > number).order_by(sessions.c.number)
    row = c.execute(query.limit(1)).mappings().first()
    return None if row is None else SessionRow(**row)


def last_certified(c: Connection, name: str, epoch: int) -> SessionRow | None:
    """The last session of an epoch that ended with a certificate."""
    query = _certified(name, epoch).order_by(sessions.c.number.desc())
    row = c.execute(query.limit(1)).mappings().first()
    return None if row is None else SessionRow(**row)


def _certified(name: str, epoch: int) -> Select[Any]:
    # A certificate proves something only to those who hold the roster that it was made under.
    here = (sessions.c.study == name) & (sessions.c.epoch == epoch)
    return select(sessions).where(here, sessions.c.certificate.is_not(None))


def refuse(c: Connection, name: str, number: int, silo: int, site: str, reason: str) -> None:
    """A silo said why it takes no part in a session; the first reason stands."""
    if silo in refusals_of(c, name, number):
        return
    values = {"study": name, "number": number, "silo": silo, "reason": reason, "at": time.time()}
    c.execute(insert(refusals).values(**values))
    note(c, "session.refused", name, session=number, site=site, reason=reason)


def refusals_of(c: Connection, name: str, number: int) -> dict[int, str]:
    """roster index → reason."""
    where = (refusals.c.study == name) & (refusals.c.number == number)
    return {row.silo: row.reason for row in c.execute(select(refusals).where(where))}
