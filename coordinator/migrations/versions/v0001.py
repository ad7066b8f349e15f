"""The tables of 0.1, as they were before they had versions."""

from alembic import op
from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    Float,
    ForeignKey,
    Integer,
    LargeBinary,
    String,
    Text,
)

revision, down_revision = "0001", None


def upgrade() -> None:
    _sites()
    _studies()
    _sessions()
    _watching()
    _audit_log()


def _sites() -> None:
    op.create_table(
        "sites",
        Column("name", String(63), primary_key=True),
        Column("status", String(16), nullable=False),
        Column("token", String(32), nullable=False),
        Column("request", LargeBinary),
        Column("identity", LargeBinary),
        Column("fingerprint", String(40)),
        Column("agent_version", String(64)),
        Column("changed", Float, nullable=False),
        Column("last_contact", Float),
    )
    op.create_table(
        "invitations",
        Column("token", String(32), primary_key=True),
        Column("site", String(63), ForeignKey("sites.name"), nullable=False),
        Column("issued", Float, nullable=False),
        Column("expires", Float, nullable=False),
        Column("used_by", String(64)),
    )
    op.create_table(
        "certificates",
        Column("serial", String(40), primary_key=True),
        Column("site", String(63), ForeignKey("sites.name"), nullable=False, index=True),
        Column("pem", LargeBinary, nullable=False),
        Column("request", String(64), nullable=False),
        Column("issued", Float, nullable=False),
        Column("expires", Float, nullable=False),
        Column("revoked", Boolean, nullable=False),
    )


def _studies() -> None:
    op.create_table(
        "studies",
        Column("id", String(80), primary_key=True),
        Column("plan", Text, nullable=False),
        Column("roster", LargeBinary, nullable=False),
        Column("wanted", String(16), nullable=False),
        Column("state", String(16), nullable=False),
        Column("stage", String(80), nullable=False),
        Column("error", Text),
        Column("model", LargeBinary),
        Column("created", Float, nullable=False),
        Column("ended", Float),
    )
    op.create_table(
        "answers",
        Column("study", String(80), ForeignKey("studies.id"), primary_key=True),
        Column("site", String(63), primary_key=True),
        Column("accepted", Boolean, nullable=False),
        Column("rule", Text, nullable=False),
        Column("at", Float, nullable=False),
    )
    op.create_table(
        "results",
        Column("study", String(80), ForeignKey("studies.id"), primary_key=True),
        Column("key", String(80), primary_key=True),
        Column("value", Text, nullable=False),
        Column("at", Float, nullable=False),
    )
    op.create_table(
        "artifacts",
        Column("study", String(80), ForeignKey("studies.id"), primary_key=True),
        Column("sha256", LargeBinary, primary_key=True),
        Column("role", String(40), nullable=False),
        Column("size", BigInteger, nullable=False),
        Column("published", Boolean, nullable=False),
    )


def _sessions() -> None:
    op.create_table(
        "sessions",
        Column("study", String(80), ForeignKey("studies.id"), primary_key=True),
        Column("number", Integer, primary_key=True),
        Column("quantity", String(48), nullable=False),
        Column("context", LargeBinary, nullable=False),
        Column("work", LargeBinary, nullable=False),
        Column("artifacts", Text, nullable=False),
        Column("resting", Text, nullable=False),
        Column("phase", String(16), nullable=False),
        Column("awaited", Text, nullable=False),
        Column("present", Integer, nullable=False),
        Column("deadline", Float, nullable=False),
        Column("open", Boolean, nullable=False),
        Column("certificate", LargeBinary),
        Column("outcome", Text),
        Column("opened", Float, nullable=False),
    )
    op.create_table(
        "session_events",
        Column("study", String(80), primary_key=True),
        Column("number", Integer, primary_key=True),
        Column("place", Integer, primary_key=True),
        Column("at", Float, nullable=False),
        Column("event", LargeBinary, nullable=False),
    )
    op.create_table(
        "refusals",
        Column("study", String(80), primary_key=True),
        Column("number", Integer, primary_key=True),
        Column("silo", Integer, primary_key=True),
        Column("reason", Text, nullable=False),
        Column("at", Float, nullable=False),
    )


def _watching() -> None:
    op.create_table(
        "progress",
        Column("study", String(80), primary_key=True),
        Column("site", String(63), primary_key=True),
        Column("session", Integer, nullable=False),
        Column("activity", String(80), nullable=False),
        Column("step", Integer, nullable=False),
        Column("steps", Integer, nullable=False),
        Column("at", Float, nullable=False),
    )
    op.create_table(
        "traffic",
        Column("study", String(80), primary_key=True),
        Column("site", String(63), primary_key=True),
        Column("received", BigInteger, nullable=False),
        Column("sent", BigInteger, nullable=False),
    )


def _audit_log() -> None:
    op.create_table(
        "events",
        Column("place", Integer, primary_key=True),
        Column("at", Float, nullable=False),
        Column("study", String(80), nullable=False),
        Column("kind", String(40), nullable=False),
        Column("detail", Text, nullable=False),
        Column("digest", String(64), nullable=False),
    )
    op.create_table(
        "chain_head",
        Column("id", Integer, primary_key=True),
        Column("place", Integer, nullable=False),
        Column("digest", String(64), nullable=False),
    )
