"""The lease: which process holds the studies, and what it has committed."""

from alembic import op
from sqlalchemy import BigInteger, Column, Integer, Text

revision, down_revision = "0002", "0001"


def upgrade() -> None:
    lease = op.create_table(
        "lease",
        Column("id", Integer, primary_key=True),
        Column("epoch", BigInteger, nullable=False),
        Column("beat", BigInteger, nullable=False),
        Column("holder", Text, nullable=False),
    )
    op.bulk_insert(lease, [{"id": 1, "epoch": 0, "beat": 0, "holder": ""}])
