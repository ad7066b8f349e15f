"""The versions of the store's tables, and the way from each to the next (alembic).

`versions/v0001.py` makes the tables that 0.1 had before there were versions; every change of
`coordinator.schema` since is one more file. A store made before is taken for version 0001.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from sqlalchemy import Connection, inspect, text

_FOLDER = Path(__file__).parent
FIRST = "0001"
KNOWN = tuple(sorted(p.stem.removeprefix("v") for p in _FOLDER.glob("versions/v*.py")))
NEWEST = KNOWN[-1]

Standing = Literal["empty", "unversioned", "older", "current", "unknown"]


def version(c: Connection) -> str | None:
    """The version of the tables that are there; None where there are none, or none is noted."""
    if not inspect(c).has_table("alembic_version"):
        return None
    found: str | None = c.execute(text("SELECT version_num FROM alembic_version")).scalar()
    return found


def standing(c: Connection) -> Standing:
    """How the tables that are there compare with those that this program works with."""
    found = version(c)
    if found is None:
        return "unversioned" if inspect(c).has_table("studies") else "empty"
    if found == NEWEST:
        return "current"
    return "older" if found in KNOWN else "unknown"


def upgrade(c: Connection, to: str = NEWEST) -> None:
    """Bring the tables to version `to`, in the caller's transaction: all of it or nothing."""
    # Imported here: no other command needs it, and it takes longer than most of them.
    from alembic import command
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(_FOLDER).replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    config.attributes["connection"] = c
    if standing(c) == "unversioned":
        command.stamp(config, FIRST)
    command.upgrade(config, to)
