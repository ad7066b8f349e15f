"""Roster epochs, and what silos sign of the audit log. What there was is of epoch 1."""

import json
import time

import sqlalchemy as sa
from alembic import op
from sqlalchemy import Boolean, Column, Float, ForeignKey, Integer, LargeBinary, String, Text

from study.audit_log import Entry

revision, down_revision = "0003", "0002"


def upgrade() -> None:
    op.add_column("sites", Column("countersigned", Integer))
    op.add_column("studies", Column("next_roster", LargeBinary))
    op.add_column("sessions", Column("epoch", Integer, nullable=False, server_default="1"))
    op.add_column("sessions", Column("log_place", Integer))
    op.add_column("sessions", Column("log_digest", String(64)))
    op.create_table(
        "rosters",
        Column("study", String(80), ForeignKey("studies.id"), primary_key=True),
        Column("epoch", Integer, primary_key=True),
        Column("roster", LargeBinary, nullable=False),
        Column("entered", Float, nullable=False),
    )
    op.execute("INSERT INTO rosters SELECT id, 1, roster, created FROM studies")
    op.rename_table("answers", "answers_of_epoch_1")
    op.create_table(
        "answers",
        Column("study", String(80), ForeignKey("studies.id"), primary_key=True),
        Column("epoch", Integer, primary_key=True),
        Column("site", String(63), primary_key=True),
        Column("accepted", Boolean, nullable=False),
        Column("left", Boolean, nullable=False),
        Column("rule", Text, nullable=False),
        Column("at", Float, nullable=False),
    )
    op.execute(
        'INSERT INTO answers (study, epoch, site, accepted, "left", rule, at) '
        "SELECT study, 1, site, accepted, false, rule, at FROM answers_of_epoch_1"
    )
    op.drop_table("answers_of_epoch_1")
    _note_identities(op.get_bind())


def _note_identities(c: sa.Connection) -> None:
    """The log holds the keys that its countersignatures are checked with."""
    head = sa.table("chain_head", sa.column("place"), sa.column("digest"))
    events = sa.table("events", *(sa.column(name) for name in Entry.__dataclass_fields__))
    found = c.execute(sa.text("SELECT name, identity FROM sites WHERE identity IS NOT NULL"))
    for name, identity in found.all():
        last = c.execute(sa.select(head)).one()
        detail = json.dumps({"identity": bytes(identity).hex(), "site": name}, sort_keys=True)
        draft = Entry(last.place + 1, time.time(), "", "site.identity", detail, "")
        entry = vars(draft) | {"digest": draft.follows(last.digest)}
        c.execute(sa.insert(events).values(**entry))
        c.execute(sa.update(head).values(place=entry["place"], digest=entry["digest"]))
