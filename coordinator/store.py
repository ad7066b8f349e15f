"""The store: transactions over one database, and the audit log that every change is written to.

A transaction is a function whose first argument is the connection; `coordinator.registry` and
`coordinator.records` are made of such functions. `run` executes one and returns when it is
durable; `do` does the same off the event loop.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import sqlite3
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, Concatenate, ParamSpec, TypeVar

from sqlalchemy import Connection, create_engine, event, insert, select, update
from sqlalchemy.engine import make_url
from sqlalchemy.exc import OperationalError

from coordinator import schema

P = ParamSpec("P")
T = TypeVar("T")
_GENESIS = "0" * 64


class StoreError(Exception):
    """The database cannot be used; the text says what to do."""


class Store:
    """The database at `url`, its tables made where they are missing."""

    def __init__(self, url: str) -> None:
        self._engine = create_engine(make_url(url))
        if self._engine.dialect.name == "sqlite":
            event.listen(self._engine, "connect", _prepare_sqlite)
            event.listen(self._engine, "begin", _begin_immediate)
        # One thread: transactions commit in the order in which they were asked for, and SQLite,
        # which has one writer anyway, is never contended from within. fsync blocks no event loop.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="store")
        try:
            with self._engine.begin() as connection:
                schema.metadata.create_all(connection)
                if connection.execute(select(schema.chain_head)).first() is None:
                    head = insert(schema.chain_head).values(id=1, place=0, digest=_GENESIS)
                    connection.execute(head)
        except OperationalError as error:
            raise StoreError(
                f"the store {make_url(url).render_as_string()} cannot be opened ({error.orig}): "
                "check the path or the database server, and that the disk is not full"
            ) from error

    def run(
        self, work: Callable[Concatenate[Connection, P], T], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        """Run `work` as one transaction: when this returns all of it is durable, else none."""
        with self._engine.begin() as connection:
            return work(connection, *args, **kwargs)

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


def _prepare_sqlite(connection: sqlite3.Connection, _record: object) -> None:
    # The driver's own transactions begin late and cannot be IMMEDIATE; `_begin_immediate` does it.
    connection.isolation_level = None
    for pragma in (
        "journal_mode = WAL",
        # FULL: with NORMAL a power cut may lose the last commits of a WAL, but a message that was
        # acknowledged is never sent again.
        "synchronous = FULL",
        "busy_timeout = 10000",
        # Deleted session events held the silos' shares: overwrite them.
        "secure_delete = ON",
        "foreign_keys = ON",
    ):
        connection.execute(f"PRAGMA {pragma}")


def _begin_immediate(connection: Connection) -> None:
    # The command line writes to the same file: a transaction that reads first and then writes
    # would otherwise fail, and not wait, when the other side wrote in between.
    connection.exec_driver_sql("BEGIN IMMEDIATE")


def note(connection: Connection, /, kind: str, study: str = "", **detail: Any) -> None:
    """Append to the audit log, in the transaction that does what is noted."""
    head = connection.execute(select(schema.chain_head).with_for_update()).one()
    row = {
        "place": head.place + 1,
        "at": time.time(),
        "study": study,
        "kind": kind,
        "detail": json.dumps(detail, sort_keys=True, ensure_ascii=False),
    }
    digest = _link(head.digest, row)
    connection.execute(insert(schema.events).values(**row, digest=digest))
    connection.execute(update(schema.chain_head).values(place=head.place + 1, digest=digest))


def verify_log(connection: Connection) -> int:
    """How many events the audit log holds; raises StoreError where one was changed or removed."""
    digest, place = _GENESIS, 0
    for row in connection.execute(select(schema.events).order_by(schema.events.c.place)).mappings():
        digest, place = _link(digest, row), place + 1
        if row["place"] != place or row["digest"] != digest:
            raise StoreError(f"the audit log was changed at or before entry {row['place']}")
    head = connection.execute(select(schema.chain_head)).one()
    if (head.place, head.digest) != (place, digest):
        raise StoreError(f"the audit log ends at entry {place}, {head.place} were written")
    return place


def _link(before: str, row: Any) -> str:
    fields = [before, row["place"], repr(row["at"]), row["study"], row["kind"], row["detail"]]
    return hashlib.sha256(json.dumps(fields).encode()).hexdigest()
