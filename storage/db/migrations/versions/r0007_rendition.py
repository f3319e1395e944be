"""Add encoded renditions of series, and frame tables beside prepared metadata.

Locks nothing for long: two tables are new, two columns are added without a value.
Metadata prepared before are prepared again when they are asked for. Going down forgets
where renditions are, which can be made again; their objects stay in the store.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None

BIG_ID = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
ORDINAL = sa.Text().with_variant(sa.Text(collation="C"), "postgresql")


def upgrade() -> None:
    op.add_column("series_metadata", sa.Column("zstd_body", sa.LargeBinary()))
    op.add_column("series_metadata", sa.Column("frames_body", sa.LargeBinary()))
    op.create_table(
        "rendition",
        sa.Column("id", BIG_ID, nullable=False),
        sa.Column("key", sa.String(length=32), nullable=False),
        sa.Column("tenant", sa.String(length=64), nullable=False),
        sa.Column("series_instance_uid", ORDINAL, nullable=False),
        sa.Column("transfer_syntax_uid", sa.String(length=64), nullable=False),
        sa.Column("n_instances", sa.Integer(), nullable=False),
        sa.Column("size_bytes", sa.BigInteger(), nullable=False),
        sa.Column("sha256", sa.LargeBinary(length=32), nullable=True),
        sa.Column("created_us", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_rendition")),
        sa.UniqueConstraint("key", name=op.f("uq_rendition_key")),
    )
    op.create_index(
        "ix_rendition_series",
        "rendition",
        ["tenant", "series_instance_uid"],
        unique=False,
    )
    op.create_table(
        "instance_rendition",
        sa.Column("instance_pk", BIG_ID, nullable=False),
        sa.Column("rendition_pk", BIG_ID, nullable=False),
        sa.Column("table_bytes", sa.LargeBinary(), nullable=False),
        sa.ForeignKeyConstraint(
            ["instance_pk"],
            ["instance.id"],
            name=op.f("fk_instance_rendition_instance_pk_instance"),
            ondelete="CASCADE",
        ),
        sa.ForeignKeyConstraint(
            ["rendition_pk"],
            ["rendition.id"],
            name=op.f("fk_instance_rendition_rendition_pk_rendition"),
            ondelete="CASCADE",
        ),
        sa.PrimaryKeyConstraint("instance_pk", name=op.f("pk_instance_rendition")),
    )
    op.create_index(
        "ix_instance_rendition_rendition",
        "instance_rendition",
        ["rendition_pk"],
        unique=False,
    )


def downgrade() -> None:
    op.drop_table("instance_rendition")
    op.drop_table("rendition")
    op.drop_column("series_metadata", "frames_body")
    op.drop_column("series_metadata", "zstd_body")
