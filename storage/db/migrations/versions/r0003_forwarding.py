"""Add how far studies have been sent on to peers.

Locks nothing, costs nothing: the table is new and empty. Going down forgets progress:
peers are sent duplicates, which they recognise.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

BIG_ID = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
    op.create_table(
        "forwarding",
        sa.Column("id", BIG_ID, nullable=False),
        sa.Column("peer", sa.String(length=16), nullable=False),
        sa.Column("study_pk", BIG_ID, nullable=False),
        sa.Column("version", sa.Integer(), nullable=False),
        sa.Column("sent", sa.Text(), nullable=False),
        sa.Column("updated_us", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(
            ["study_pk"],
            ["study.id"],
            name=op.f("fk_forwarding_study_pk_study"),
            ondelete="CASCADE",
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_forwarding")),
        sa.UniqueConstraint(
            "peer", "study_pk", name=op.f("uq_forwarding_peer_study_pk")
        ),
    )
    op.create_index("ix_forwarding_study", "forwarding", ["study_pk"], unique=False)


def downgrade() -> None:
    op.drop_table("forwarding")
