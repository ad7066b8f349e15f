"""The store: transactions over one database, and the audit log that every change is written to.

A transaction is a function whose first argument is the connection; `coordinator.registry` and
`coordinator.records` are made of such functions. `run` executes one and returns when it is
durable; `do` does the same off the event loop. A transaction may be begun anew before it is
committed (PostgreSQL refuses one that another came in between of), so it acts on the database only.
"""

from __future__ import annotations

import asyncio
import json
import random
import sqlite3
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any, Concatenate, ParamSpec, TypeVar

from sqlalchemy import Connection, Engine, create_engine, event, insert, select, update
from sqlalchemy.engine import make_url
from sqlalchemy.exc import DBAPIError, OperationalError

from coordinator import failpoints, lease, migrations, schema
from study.audit_log import GENESIS, Entry

P = ParamSpec("P")
T = TypeVar("T")
_ATTEMPTS, _PAUSE, _LONGEST_PAUSE = 30, 0.02, 0.5
_BUSY_SECONDS = 10
# serialization_failure, deadlock_detected: nothing of the transaction has happened.
_AGAIN = ("40001", "40P01")


class StoreError(Exception):
    """The database cannot be used; the text says what to do."""


class Fenced(StoreError):
    """Another process holds the studies now: this one has to end."""


class Store:
    """The database at `url`; an empty one gets its tables.

    Raises StoreError where it cannot be opened, and for tables of another version than this
    program's; with `upgrade` those of an older one are brought up to date by `upgrade`.
    """

    def __init__(self, url: str, *, upgrade: bool = False) -> None:
        self._engine = _engine(url)
        self._epoch: int | None = None
        self._beat = 0
        self._on_fenced: Callable[[], None] = lambda: None
        # One thread: transactions commit in the order in which they were asked for, and SQLite,
        # which has one writer anyway, is never contended from within. fsync blocks no event loop.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="store")
        self._name = make_url(url).render_as_string()
        try:
            self.run(_prepare, self._name, upgrade)
        except OperationalError as error:
            raise StoreError(
                f"the store {self._name} cannot be opened ({error.orig}): "
                "check the path or the database server, and that the disk is not full"
            ) from error

    @property
    def epoch(self) -> int:
        """The fencing number of this process; 0 where it does not hold the lease."""
        return self._epoch or 0

    def run(
        self, work: Callable[Concatenate[Connection, P], T], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        """Run `work` as one transaction: when this returns all of it is durable, else none.

        Raises Fenced where another process has taken the lease that this one held.
        """

        def job(connection: Connection) -> T:
            return work(connection, *args, **kwargs)

        point = failpoints.transaction(work, args)
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                return self._once(job, point)
            except DBAPIError as error:
                if attempt == _ATTEMPTS or not _nothing_happened(error):
                    raise
            # By chance, so that writers which met once do not meet again and again.
            time.sleep(random.uniform(0, min(_PAUSE * 2**attempt, _LONGEST_PAUSE)))  # noqa: S311
        raise AssertionError("the last attempt returns or raises")

    def _once(self, job: Callable[[Connection], T], point: str) -> T:
        with self._engine.connect() as connection:
            connection.info["wrote"] = False
            transaction = connection.begin()
            try:
                result = job(connection)
                wrote = bool(connection.info["wrote"])
                if wrote and self._epoch is not None:
                    self._fence(connection, self._epoch)
                if wrote:
                    failpoints.reach(f"before {point}")
            except BaseException:
                transaction.rollback()
                raise
            try:
                transaction.commit()
            except DBAPIError as error:
                if not error.connection_invalidated or not wrote:
                    raise
                self._find_out(error)
        if wrote:
            self._beat += 1
            failpoints.reach(f"after {point}")
        return result

    def _fence(self, connection: Connection, epoch: int) -> None:
        if not lease.beat(connection, epoch):
            self._on_fenced()
            raise Fenced(
                "another coordinator has taken over the studies of this store, since this one did "
                "not answer for too long: this one ends, and changes nothing any more"
            )

    def _find_out(self, error: DBAPIError) -> None:
        """The connection broke while a commit was under way: returns where it has happened.

        Who holds the lease counts its transactions in it, so the count tells; but only when the
        server has done with the commit, which may go on without its client.
        """
        if self._epoch is None:
            raise StoreError(
                f"the connection to {self._name} broke while a change was being committed: look "
                "whether it was made, and repeat it if not"
            ) from error
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                with self._engine.connect() as connection:
                    found = lease.look(connection, settled=True)
                break
            except OperationalError:
                if attempt == _ATTEMPTS:
                    raise
                time.sleep(min(_PAUSE * 2**attempt, _LONGEST_PAUSE))
        if found.epoch != self._epoch:
            self._on_fenced()
            raise Fenced("another coordinator has taken over the studies of this store")
        if found.beat == self._beat:
            raise error  # it did not happen, and is begun anew
        if found.beat != self._beat + 1:
            raise AssertionError(f"beat {found.beat} of the lease, {self._beat} were counted")

    def hold(self, epoch: int, on_fenced: Callable[[], None]) -> None:
        """Commit under this epoch of the lease from now on, and nothing when it is taken away."""
        self._epoch, self._beat, self._on_fenced = epoch, 0, on_fenced

    async def do(
        self, work: Callable[Concatenate[Connection, P], T], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        """`run` in the store's thread.

        A caller that is cancelled meanwhile does not undo the transaction; whoever must know
        whether it happened runs this in a task of its own.
        """
        job = partial(self.run, work, *args, **kwargs)
        return await asyncio.get_running_loop().run_in_executor(self._thread, job)

    def close(self) -> None:
        self._thread.shutdown(wait=True)
        self._engine.dispose()


def _engine(url: str) -> Engine:
    found = make_url(url)
    if found.get_backend_name() == "sqlite":
        engine = create_engine(found)
        event.listen(engine, "connect", _prepare_sqlite)
        event.listen(engine, "begin", _begin_immediate)
    else:
        # A server that vanished without a word is noticed in time to try again.
        patience = {"connect_timeout": "10", "keepalives_idle": "10", "keepalives_interval": "5"}
        patience |= {"keepalives_count": "3", "tcp_user_timeout": "20000"}
        engine = create_engine(
            found.update_query_dict({k: v for k, v in patience.items() if k not in found.query}),
            isolation_level="SERIALIZABLE",
            pool_pre_ping=True,
        )
        event.listen(engine, "connect", _prepare_postgresql)
    event.listen(engine, "before_cursor_execute", _note_write)
    return engine


def _prepare_sqlite(connection: sqlite3.Connection, _record: object) -> None:
    # The driver's own transactions begin late and cannot be IMMEDIATE; `_begin_immediate` does it.
    connection.isolation_level = None
    for pragma in (
        f"busy_timeout = {_BUSY_SECONDS * 1000}",
        "journal_mode = WAL",
        # FULL: with NORMAL a power cut may lose the last commits of a WAL, but a message that was
        # acknowledged is never sent again.
        "synchronous = FULL",
        # Deleted session events held the silos' shares: overwrite them.
        "secure_delete = ON",
        "foreign_keys = ON",
    ):
        connection.execute(f"PRAGMA {pragma}")


def _begin_immediate(connection: Connection) -> None:
    # The command line writes to the same file: a transaction that reads first and then writes
    # would otherwise fail, and not wait, when the other side wrote in between.
    connection.exec_driver_sql("BEGIN IMMEDIATE")


def _prepare_postgresql(connection: Any, _record: object) -> None:
    with connection.cursor() as cursor:
        # A process that is stopped inside a transaction must not keep its locks from the standby.
        cursor.execute("SET idle_in_transaction_session_timeout = '10s'")
        cursor.execute("SET lock_timeout = '20s'")
    connection.commit()


def _note_write(
    connection: Connection,
    _cursor: object,
    _statement: str,
    _parameters: object,
    context: Any,
    _many: bool,
) -> None:
    if context.isinsert or context.isupdate or context.isdelete or context.isddl:
        connection.info["wrote"] = True


def _nothing_happened(error: DBAPIError) -> bool:
    """Whether the transaction was undone for a reason that passes: a conflict, or a connection
    that broke before the commit (`_find_out` has looked, where it broke during one)."""
    return error.connection_invalidated or getattr(error.orig, "sqlstate", None) in _AGAIN


def _prepare(c: Connection, name: str, may_upgrade: bool) -> None:
    """Raises StoreError unless this program can work with the tables that are there."""
    match migrations.standing(c):
        case "empty":
            migrations.upgrade(c)
            c.execute(insert(schema.chain_head).values(id=1, place=0, digest=GENESIS))
        case "unknown":
            raise StoreError(
                f"the store {name} has version {migrations.version(c)}, this program knows "
                f"{migrations.NEWEST}: a newer concilium wrote it. Install that one, or restore "
                "the backup that was made before the upgrade"
            )
        case "older" | "unversioned" if not may_upgrade:
            raise StoreError(
                f"the store {name} has version {migrations.version(c) or 'of 0.1'}, this program "
                f"needs {migrations.NEWEST}: make a backup with the concilium that wrote it, then "
                "restart `concilium coordinator serve`, which upgrades it"
            )


def sign_of_life(connection: Connection) -> None:
    """A transaction that changes nothing, and is counted in the lease."""
    connection.info["wrote"] = True


def note(connection: Connection, /, kind: str, study: str = "", **detail: Any) -> tuple[int, str]:
    """Append to the audit log, in the transaction that does what is noted; the head it has then:
    the entry's place and digest."""
    head = connection.execute(select(schema.chain_head).with_for_update()).one()
    place, text = head.place + 1, json.dumps(detail, sort_keys=True, ensure_ascii=False)
    draft = Entry(place, time.time(), study, kind, text, "")
    entry = replace(draft, digest=draft.follows(head.digest))
    connection.execute(insert(schema.events).values(**vars(entry)))
    connection.execute(update(schema.chain_head).values(place=place, digest=entry.digest))
    return place, entry.digest
