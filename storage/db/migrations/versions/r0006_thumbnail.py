"""Add the pictures that stand for settled series and studies.

Locks nothing, costs nothing: the table is new and empty. What has settled before gets
its pictures when they are asked for. Going down forgets pictures that can be made
again.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None

BIG_ID = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
    op.create_table(
        "thumbnail",
        sa.Column("id", BIG_ID, nullable=False),
        sa.Column("study_pk", BIG_ID, nullable=False),
        sa.Column("series_pk", BIG_ID, nullable=False),
        sa.Column("instance_pk", BIG_ID, nullable=False),
        sa.Column("frame_number", sa.Integer(), nullable=False),
        sa.Column("stands_for", sa.Integer(), nullable=False),
        sa.Column("revision", sa.Integer(), nullable=False),
        sa.Column("edition", sa.String(length=16), nullable=False),
        sa.Column("width", sa.Integer(), nullable=False),
        sa.Column("height", sa.Integer(), nullable=False),
        sa.Column("picture", sa.LargeBinary(), nullable=False),
        sa.ForeignKeyConstraint(
            ["study_pk"],
            ["study.id"],
            name=op.f("fk_thumbnail_study_pk_study"),
            ondelete="CASCADE",
        ),
        sa.ForeignKeyConstraint(
            ["series_pk"],
            ["series.id"],
            name=op.f("fk_thumbnail_series_pk_series"),
            ondelete="CASCADE",
        ),
        sa.ForeignKeyConstraint(
            ["instance_pk"],
            ["instance.id"],
            name=op.f("fk_thumbnail_instance_pk_instance"),
            ondelete="CASCADE",
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_thumbnail")),
        sa.UniqueConstraint(
            "instance_pk",
            "frame_number",
            name=op.f("uq_thumbnail_instance_pk_frame_number"),
        ),
    )
    op.create_index("ix_thumbnail_study", "thumbnail", ["study_pk"], unique=False)
    op.create_index("ix_thumbnail_series", "thumbnail", ["series_pk"], unique=False)


def downgrade() -> None:
    op.drop_table("thumbnail")
