"""Transactions about what the steps of a study leave: their results, and artifacts.

A result is a JSON value under the step's key: `census`, `round 00007 model`. Every function runs
inside `Store.run` or `Store.do`.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Sequence
from typing import Any

from sqlalchemy import ColumnElement, Connection, delete, func, insert, select, update

from coordinator.schema import artifacts
from coordinator.schema import results as table


def result(c: Connection, name: str, key: str) -> Any:
    """The JSON value stored under `key`, or None."""
    where = (table.c.study == name) & (table.c.key == key)
    row = c.execute(select(table.c.value).where(where)).first()
    return None if row is None else json.loads(row.value)


def put_result(c: Connection, name: str, key: str, value: Any) -> None:
    text = json.dumps(value)
    c.execute(insert(table).values(study=name, key=key, value=text, at=time.time()))


def all_of(c: Connection, name: str) -> dict[str, Any]:
    """Every result of a study, in the order in which they were reached."""
    query = select(table).where(table.c.study == name).order_by(table.c.at, table.c.key)
    return {row.key: json.loads(row.value) for row in c.execute(query)}


def besides_rounds(c: Connection, name: str) -> dict[str, Any]:
    """Those of the steps before and after the rounds, in the order in which they were reached."""
    where = (table.c.study == name) & table.c.key.not_like("round %")
    query = select(table).where(where).order_by(table.c.at, table.c.key)
    return {row.key: json.loads(row.value) for row in c.execute(query)}


def of_rounds(c: Connection, name: str, first: int, last: int) -> dict[str, Any]:
    """Every result of the rounds `first` to `last`."""
    span = table.c.key.between(f"round {first:05}", f"round {last:05} ~")
    query = select(table).where(table.c.study == name, span).order_by(table.c.key)
    return {row.key: json.loads(row.value) for row in c.execute(query)}


def count(c: Connection, name: str, kind: str, until: int = 99_999) -> int:
    """How many rounds, up to round `until`, have a result of this kind: `model`, `tidy`, …"""
    where = (table.c.study == name) & _up_to(until) & table.c.key.like(f"round % {kind}")
    return int(c.execute(select(func.count()).select_from(table).where(where)).scalar_one())


def last(c: Connection, name: str, kind: str, until: int) -> Any:
    """The result of this kind of the latest round that has one, up to round `until`, or None."""
    where = (table.c.study == name) & _up_to(until) & table.c.key.like(f"round % {kind}")
    query = select(table.c.value).where(where).order_by(table.c.key.desc())
    row = c.execute(query.limit(1)).first()
    return None if row is None else json.loads(row.value)


def _up_to(until: int) -> ColumnElement[bool]:
    return table.c.key < f"round {until:05} ~"


def record_artifact(
    c: Connection, name: str, sha256: bytes, role: str, size: int, *, published: bool
) -> None:
    where = (artifacts.c.study == name) & (artifacts.c.sha256 == sha256)
    if c.execute(select(artifacts.c.role).where(where)).first() is None:
        values = {"study": name, "sha256": sha256, "role": role, "size": size}
        c.execute(insert(artifacts).values(**values, published=published))
    elif published:
        c.execute(update(artifacts).where(where).values(published=True))


def published_size(c: Connection, name: str, sha256: bytes) -> int | None:
    """The size of an artifact that the silos of the study may have, or None."""
    where = (artifacts.c.study == name) & (artifacts.c.sha256 == sha256)
    row = c.execute(select(artifacts.c.size).where(where, artifacts.c.published)).first()
    return None if row is None else int(row.size)


def done_with(
    c: Connection, name: str, roles: Sequence[str], keep: Iterable[bytes]
) -> tuple[list[bytes], list[bytes]]:
    """Digests of the study's artifacts of these roles, but those to keep; and which of them no
    other study refers to."""
    kept, column = set(keep), artifacts.c
    rows = c.execute(select(column.sha256).where(column.study == name, column.role.in_(roles)))
    done = [row.sha256 for row in rows if row.sha256 not in kept]
    others = select(column.sha256).where(column.study != name, column.sha256.in_(done))
    elsewhere = {row.sha256 for row in c.execute(others)}
    return done, [sha256 for sha256 in done if sha256 not in elsewhere]


def forget_artifacts(c: Connection, name: str, digests: Sequence[bytes]) -> None:
    """Strike artifacts whose files are gone."""
    where = (artifacts.c.study == name) & artifacts.c.sha256.in_(digests)
    c.execute(delete(artifacts).where(where))
