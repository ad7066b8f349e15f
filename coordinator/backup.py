"""Copies of a coordinator: one before each upgrade of the store, and those an operator makes."""

from __future__ import annotations

import os
import sqlite3
from contextlib import closing
from pathlib import Path

from sqlalchemy.engine import make_url

from coordinator.config import Home


def copy_before_upgrade(home: Home, version: str) -> Path | None:
    """A copy of an SQLite store beside it; None where the store is on a server, whose operator
    makes it."""
    url = make_url(home.database(home.config()))
    if url.get_backend_name() != "sqlite" or not url.database:
        return None
    source = Path(url.database)
    target = source.with_name(f"{source.name}.before-upgrade-from-{version}")
    copy_sqlite(source, target)
    return target


def copy_sqlite(source: Path, target: Path) -> None:
    """A consistent copy of a database that others are using; readable by this user only."""
    os.close(os.open(target, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600))
    with closing(sqlite3.connect(source)) as live, closing(sqlite3.connect(target)) as copy:
        live.backup(copy)
