"""Add the counters of ingest activity.

Locks nothing, costs nothing: the table is new and empty. Going down drops counters
that cover two days and grow again.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "ingest_activity",
        sa.Column("slot", sa.BigInteger(), nullable=False),
        sa.Column("tenant", sa.String(length=64), nullable=False),
        sa.Column("instances", sa.BigInteger(), nullable=False),
        sa.Column("size_bytes", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("slot", "tenant", name=op.f("pk_ingest_activity")),
    )


def downgrade() -> None:
    op.drop_table("ingest_activity")
