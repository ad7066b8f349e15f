"""The tables of the store: SQLAlchemy Core, the same on SQLite and PostgreSQL.

Times are seconds since 1970 (UTC) as floating point. Canonical encodings of the secure sum are
kept as the bytes they are.

A change here needs a file in `coordinator/migrations/versions`, or stores that exist lack it.
"""

from __future__ import annotations

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    Float,
    ForeignKey,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    Text,
)

metadata = MetaData()

# --- who may call

sites = Table(
    "sites",
    metadata,
    Column("name", String(63), primary_key=True),
    Column("status", String(16), nullable=False),  # invited, pending, approved, revoked
    Column("token", String(32), nullable=False),  # the only invitation that counts
    Column("request", LargeBinary),
    Column("identity", LargeBinary),
    Column("fingerprint", String(40)),
    Column("agent_version", String(64)),
    Column("changed", Float, nullable=False),
    Column("last_contact", Float),
    Column("countersigned", Integer),  # the last entry of the audit log that it signed
)

invitations = Table(
    "invitations",
    metadata,
    Column("token", String(32), primary_key=True),
    Column("site", ForeignKey("sites.name"), nullable=False),
    Column("issued", Float, nullable=False),
    Column("expires", Float, nullable=False),
    Column("used_by", String(64)),  # SHA-256 of the one request it let in
)

certificates = Table(
    "certificates",
    metadata,
    Column("serial", String(40), primary_key=True),
    Column("site", ForeignKey("sites.name"), nullable=False, index=True),
    Column("pem", LargeBinary, nullable=False),
    Column("request", String(64), nullable=False),  # SHA-256 of the request it answers
    Column("issued", Float, nullable=False),
    Column("expires", Float, nullable=False),
    Column("revoked", Boolean, nullable=False),
)

# --- studies

studies = Table(
    "studies",
    metadata,
    Column("id", String(80), primary_key=True),
    Column("plan", Text, nullable=False),  # canonical TOML
    Column("roster", LargeBinary, nullable=False),  # of the epoch that the study is in
    Column("next_roster", LargeBinary),  # of the epoch that begins before the next session
    Column("wanted", String(16), nullable=False),  # by the operator: run, pause, stop, abandon
    Column("state", String(16), nullable=False),  # offered, running, finished, stopped, failed
    Column("stage", String(80), nullable=False),  # what the runner is at, for people
    Column("error", Text),
    Column("model", LargeBinary),  # SHA-256 of the newest global model
    Column("created", Float, nullable=False),
    Column("ended", Float),
)

rosters = Table(
    "rosters",
    metadata,
    Column("study", ForeignKey("studies.id"), primary_key=True),
    Column("epoch", Integer, primary_key=True),
    Column("roster", LargeBinary, nullable=False),
    Column("entered", Float, nullable=False),
)
"""Every roster that a study was offered under, the present one included."""

answers = Table(
    "answers",
    metadata,
    Column("study", ForeignKey("studies.id"), primary_key=True),
    Column("epoch", Integer, primary_key=True),
    Column("site", String(63), primary_key=True),
    Column("accepted", Boolean, nullable=False),
    Column("left", Boolean, nullable=False),  # it had accepted, and takes part no more
    Column("rule", Text, nullable=False),
    Column("at", Float, nullable=False),
)

results = Table(
    "results",
    metadata,
    Column("study", ForeignKey("studies.id"), primary_key=True),
    Column("key", String(80), primary_key=True),
    Column("value", Text, nullable=False),  # JSON
    Column("at", Float, nullable=False),
)

artifacts = Table(
    "artifacts",
    metadata,
    Column("study", ForeignKey("studies.id"), primary_key=True),
    Column("sha256", LargeBinary, primary_key=True),
    Column("role", String(40), nullable=False),
    Column("size", BigInteger, nullable=False),
    Column("published", Boolean, nullable=False),  # whether the silos of the study may have it
)

# --- sessions of the secure sum

sessions = Table(
    "sessions",
    metadata,
    Column("study", ForeignKey("studies.id"), primary_key=True),
    Column("number", Integer, primary_key=True),
    Column("epoch", Integer, nullable=False),  # of the roster it is for
    Column("quantity", String(48), nullable=False),
    Column("context", LargeBinary, nullable=False),
    Column("work", LargeBinary, nullable=False),
    Column("artifacts", Text, nullable=False),  # JSON list of hex digests
    Column("resting", Text, nullable=False),  # JSON list of indices that are not offered it
    Column("phase", String(16), nullable=False),
    Column("awaited", Text, nullable=False),  # JSON list of names
    Column("present", Integer, nullable=False),
    Column("deadline", Float, nullable=False),
    Column("open", Boolean, nullable=False),
    Column("certificate", LargeBinary),
    Column("outcome", Text),  # JSON
    Column("log_place", Integer),  # the audit log's head when the outcome was written to it
    Column("log_digest", String(64)),
    Column("opened", Float, nullable=False),
)

session_events = Table(
    "session_events",
    metadata,
    Column("study", String(80), primary_key=True),
    Column("number", Integer, primary_key=True),
    Column("place", Integer, primary_key=True),
    Column("at", Float, nullable=False),
    Column("event", LargeBinary, nullable=False),
)

refusals = Table(
    "refusals",
    metadata,
    Column("study", String(80), primary_key=True),
    Column("number", Integer, primary_key=True),
    Column("silo", Integer, primary_key=True),
    Column("reason", Text, nullable=False),
    Column("at", Float, nullable=False),
)

# --- what people look at

progress = Table(
    "progress",
    metadata,
    Column("study", String(80), primary_key=True),
    Column("site", String(63), primary_key=True),
    Column("session", Integer, nullable=False),
    Column("activity", String(80), nullable=False),
    Column("step", Integer, nullable=False),
    Column("steps", Integer, nullable=False),
    Column("at", Float, nullable=False),
)

traffic = Table(
    "traffic",
    metadata,
    Column("study", String(80), primary_key=True),
    Column("site", String(63), primary_key=True),
    Column("received", BigInteger, nullable=False),
    Column("sent", BigInteger, nullable=False),
)

events = Table(
    "events",
    metadata,
    Column("place", Integer, primary_key=True),
    Column("at", Float, nullable=False),
    Column("study", String(80), nullable=False),
    Column("kind", String(40), nullable=False),
    Column("detail", Text, nullable=False),  # JSON
    Column("digest", String(64), nullable=False),
)
"""The audit log. digest = SHA-256(digest before, place, at, study, kind, detail)."""

chain_head = Table(
    "chain_head",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("place", Integer, nullable=False),
    Column("digest", String(64), nullable=False),
)
"""One row: the last event. Locked by whoever appends, so that the chain never forks."""

lease = Table(
    "lease",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("epoch", BigInteger, nullable=False),
    Column("beat", BigInteger, nullable=False),
    Column("holder", Text, nullable=False),
)
"""One row: which process holds the studies (`coordinator.lease`). It may never change its form: a
newer program has to take it from an older one before it upgrades the rest."""
