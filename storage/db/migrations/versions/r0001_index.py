"""Create the index: tenants, packs, change feed, archive.

Locks nothing, costs nothing: the database is empty.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

BIG_ID = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
ORDINAL = sa.Text().with_variant(sa.Text(collation="C"), "postgresql")


def upgrade() -> None:
    op.create_table(
        "commitment_request",
        sa.Column("id", BIG_ID, nullable=False),
        sa.Column("tenant", sa.String(length=64), nullable=False),
        sa.Column("peer_ae", sa.String(length=16), nullable=False),
        sa.Column("called_ae", sa.String(length=16), nullable=False),
        sa.Column("transaction_uid", sa.String(length=64), nullable=False),
        sa.Column("request", sa.Text(), nullable=False),
        sa.Column("result", sa.Text(), nullable=True),
        sa.Column("state", sa.String(length=12), nullable=False),
        sa.Column("attempts", sa.Integer(), nullable=False),
        sa.Column("created_us", sa.BigInteger(), nullable=False),
        sa.Column("delivered_us", sa.BigInteger(), nullable=True),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_commitment_request")),
        sa.UniqueConstraint(
            "peer_ae",
            "transaction_uid",
            name=op.f("uq_commitment_request_peer_ae_transaction_uid"),
        ),
    )
    op.create_table(
        "deletion",
        sa.Column("id", BIG_ID, nullable=False),
        sa.Column("tenant", sa.String(length=64), nullable=False),
        sa.Column("study_instance_uid", sa.Text(), nullable=False),
        sa.Column("series_instance_uid", sa.Text(), nullable=False),
        sa.Column("sop_instance_uid", sa.Text(), nullable=False),
        sa.Column("digest", sa.LargeBinary(length=32), nullable=False),
        sa.Column("pack_key", sa.String(length=32), nullable=False),
        sa.Column("record_offset", sa.BigInteger(), nullable=False),
        sa.Column("actor", sa.Text(), nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("deleted_us", sa.BigInteger(), nullable=False),
        sa.Column("deadline_us", sa.BigInteger(), nullable=False),
        sa.Column("erased_us", sa.BigInteger(), nullable=True),
        sa.Column("reported_version", sa.Integer(), nullable=True),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_deletion")),
    )
    op.create_index(
        "ix_deletion_due",
        "deletion",
        ["tenant", "deadline_us"],
        unique=False,
        sqlite_where=sa.text("erased_us IS NULL"),
        postgresql_where=sa.text("erased_us IS NULL"),
    )
    op.create_index(
        "ix_deletion_pack", "deletion", ["pack_key", "erased_us"], unique=False
    )
    op.create_index(
        "ix_deletion_study",
        "deletion",
        ["tenant", "study_instance_uid", "reported_version"],
        unique=False,
    )
    op.create_index(
        "ix_deletion_uid", "deletion", ["tenant", "sop_instance_uid"], unique=False
    )
    op.create_table(
        "feed",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("epoch", sa.String(length=32), nullable=False),
        sa.Column("last_position", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_feed")),
    )
    op.create_table(
        "outbox_event",
        sa.Column("id", BIG_ID, nullable=False),
        sa.Column("position", sa.BigInteger(), nullable=True),
        sa.Column("tenant", sa.String(length=64), nullable=False),
        sa.Column("kind", sa.String(length=40), nullable=False),
        sa.Column("subject", sa.String(length=128), nullable=False),
        sa.Column("payload", sa.Text(), nullable=False),
        sa.Column("created_us", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_outbox_event")),
        sa.UniqueConstraint("position", name=op.f("uq_outbox_event_position")),
    )
    op.create_table(
        "pack",
        sa.Column("id", BIG_ID, nullable=False),
        sa.Column("key", sa.String(length=32), nullable=False),
        sa.Column("tenant", sa.String(length=64), nullable=False),
        sa.Column("kind", sa.String(length=8), nullable=False),
        sa.Column("place", sa.String(length=8), nullable=False),
        sa.Column("node_id", sa.String(length=32), nullable=False),
        sa.Column("state", sa.String(length=8), nullable=False),
        sa.Column("size_bytes", sa.BigInteger(), nullable=False),
        sa.Column("sha256", sa.LargeBinary(length=32), nullable=True),
        sa.Column("created_us", sa.BigInteger(), nullable=False),
        sa.Column("delete_after_us", sa.BigInteger(), nullable=True),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_pack")),
        sa.UniqueConstraint("key", name=op.f("uq_pack_key")),
    )
    op.create_index("ix_pack_state", "pack", ["state", "delete_after_us"], unique=False)
    op.create_table(
        "patient",
        sa.Column("id", BIG_ID, nullable=False),
        sa.Column("tenant", sa.String(length=64), nullable=False),
        sa.Column("issuer", ORDINAL, nullable=False),
        sa.Column("patient_id", ORDINAL, nullable=False),
        sa.Column("patient_name", sa.Text(), nullable=False),
        sa.Column("name_search", ORDINAL, nullable=False),
        sa.Column("birth_date", sa.String(length=8), nullable=True),
        sa.Column("sex", sa.Text(), nullable=False),
        sa.Column("created_us", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_patient")),
        sa.UniqueConstraint(
            "tenant",
            "issuer",
            "patient_id",
            name=op.f("uq_patient_tenant_issuer_patient_id"),
        ),
    )
    op.create_table(
        "peer",
        sa.Column("id", BIG_ID, nullable=False),
        sa.Column("title", sa.String(length=16), nullable=False),
        sa.Column("host", sa.Text(), nullable=False),
        sa.Column("port", sa.Integer(), nullable=False),
        sa.Column("tenant", sa.String(length=64), nullable=False),
        sa.Column("may", sa.Text(), nullable=False),
        sa.Column("tls", sa.Integer(), nullable=False),
        sa.Column("forward", sa.Integer(), nullable=False),
        sa.Column("created_us", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_peer")),
        sa.UniqueConstraint("title", name=op.f("uq_peer_title")),
    )
    op.create_table(
        "subscriber",
        sa.Column("name", sa.String(length=64), nullable=False),
        sa.Column("epoch", sa.String(length=32), nullable=False),
        sa.Column("position", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("name", name=op.f("pk_subscriber")),
    )
    op.create_table(
        "tenant",
        sa.Column("id", BIG_ID, nullable=False),
        sa.Column("key", sa.String(length=64), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("created_us", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_tenant")),
        sa.UniqueConstraint("key", name=op.f("uq_tenant_key")),
    )
    op.create_table(
        "study",
        sa.Column("id", BIG_ID, nullable=False),
        sa.Column("tenant", sa.String(length=64), nullable=False),
        sa.Column("patient_pk", BIG_ID, nullable=False),
        sa.Column("study_instance_uid", ORDINAL, nullable=False),
        sa.Column("study_date", sa.String(length=8), nullable=True),
        sa.Column("study_time", sa.String(length=16), nullable=True),
        sa.Column("accession_number", ORDINAL, nullable=False),
        sa.Column("study_id", ORDINAL, nullable=False),
        sa.Column("study_description", sa.Text(), nullable=False),
        sa.Column("referring_physician_name", sa.Text(), nullable=False),
        sa.Column("referring_search", ORDINAL, nullable=False),
        sa.Column("timezone_offset", sa.String(length=16), nullable=False),
        sa.Column("patient_id", ORDINAL, nullable=False),
        sa.Column("issuer", ORDINAL, nullable=False),
        sa.Column("patient_name", sa.Text(), nullable=False),
        sa.Column("name_alphabetic", ORDINAL, nullable=False),
        sa.Column("name_ideographic", ORDINAL, nullable=False),
        sa.Column("name_phonetic", ORDINAL, nullable=False),
        sa.Column("name_pinyin", ORDINAL, nullable=False),
        sa.Column("birth_date", sa.String(length=8), nullable=True),
        sa.Column("sex", sa.Text(), nullable=False),
        sa.Column("modalities", sa.Text(), nullable=False),
        sa.Column("sop_classes", sa.Text(), nullable=False),
        sa.Column("n_series", sa.Integer(), nullable=False),
        sa.Column("n_instances", sa.Integer(), nullable=False),
        sa.Column("size_bytes", sa.BigInteger(), nullable=False),
        sa.Column("json", sa.Text(), nullable=False),
        sa.Column("origin", sa.String(length=16), nullable=False),
        sa.Column("flags", sa.Integer(), nullable=False),
        sa.Column("version", sa.Integer(), nullable=False),
        sa.Column("settle_due_us", sa.BigInteger(), nullable=True),
        sa.Column("created_us", sa.BigInteger(), nullable=False),
        sa.Column("updated_us", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(
            ["patient_pk"], ["patient.id"], name=op.f("fk_study_patient_pk_patient")
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_study")),
        sa.UniqueConstraint(
            "tenant",
            "study_instance_uid",
            name=op.f("uq_study_tenant_study_instance_uid"),
        ),
    )
    op.create_index(
        "ix_study_accession", "study", ["tenant", "accession_number"], unique=False
    )
    op.create_index(
        "ix_study_alphabetic", "study", ["tenant", "name_alphabetic"], unique=False
    )
    op.create_index(
        "ix_study_date", "study", ["tenant", "study_date", "id"], unique=False
    )
    op.create_index(
        "ix_study_ideographic", "study", ["tenant", "name_ideographic"], unique=False
    )
    op.create_index("ix_study_patient", "study", ["patient_pk"], unique=False)
    op.create_index(
        "ix_study_patient_id", "study", ["tenant", "patient_id"], unique=False
    )
    op.create_index("ix_study_settle", "study", ["settle_due_us"], unique=False)
    op.create_table(
        "series",
        sa.Column("id", BIG_ID, nullable=False),
        sa.Column("tenant", sa.String(length=64), nullable=False),
        sa.Column("study_pk", BIG_ID, nullable=False),
        sa.Column("series_instance_uid", ORDINAL, nullable=False),
        sa.Column("modality", sa.String(length=64), nullable=False),
        sa.Column("series_number", sa.BigInteger(), nullable=True),
        sa.Column("series_description", sa.Text(), nullable=False),
        sa.Column("body_part", sa.Text(), nullable=False),
        sa.Column("laterality", sa.Text(), nullable=False),
        sa.Column("station_name", sa.Text(), nullable=False),
        sa.Column("institution_name", sa.Text(), nullable=False),
        sa.Column("pps_start_date", sa.String(length=8), nullable=True),
        sa.Column("pps_start_time", sa.String(length=16), nullable=True),
        sa.Column("scheduled_step_id", sa.Text(), nullable=False),
        sa.Column("requested_procedure_id", sa.Text(), nullable=False),
        sa.Column("n_instances", sa.Integer(), nullable=False),
        sa.Column("size_bytes", sa.BigInteger(), nullable=False),
        sa.Column("json", sa.Text(), nullable=False),
        sa.Column("sealed_version", sa.Integer(), nullable=False),
        sa.Column("revision", sa.Integer(), nullable=False),
        sa.Column("created_us", sa.BigInteger(), nullable=False),
        sa.Column("updated_us", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(
            ["study_pk"],
            ["study.id"],
            name=op.f("fk_series_study_pk_study"),
            ondelete="CASCADE",
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_series")),
        sa.UniqueConstraint(
            "tenant",
            "series_instance_uid",
            name=op.f("uq_series_tenant_series_instance_uid"),
        ),
    )
    op.create_index("ix_series_study", "series", ["study_pk"], unique=False)
    op.create_table(
        "instance",
        sa.Column("id", BIG_ID, nullable=False),
        sa.Column("tenant", sa.String(length=64), nullable=False),
        sa.Column("series_pk", BIG_ID, nullable=False),
        sa.Column("sop_instance_uid", ORDINAL, nullable=False),
        sa.Column("sop_class_uid", sa.String(length=64), nullable=False),
        sa.Column("transfer_syntax_uid", sa.String(length=64), nullable=False),
        sa.Column("instance_number", sa.BigInteger(), nullable=True),
        sa.Column("rows", sa.Integer(), nullable=True),
        sa.Column("columns", sa.Integer(), nullable=True),
        sa.Column("bits_allocated", sa.Integer(), nullable=True),
        sa.Column("samples", sa.Integer(), nullable=True),
        sa.Column("number_of_frames", sa.BigInteger(), nullable=True),
        sa.Column("digest", sa.LargeBinary(length=32), nullable=False),
        sa.Column("pack_pk", BIG_ID, nullable=False),
        sa.Column("record_offset", sa.BigInteger(), nullable=False),
        sa.Column("object_offset", sa.BigInteger(), nullable=False),
        sa.Column("object_length", sa.BigInteger(), nullable=False),
        sa.Column("dataset_offset", sa.Integer(), nullable=False),
        sa.Column("header_end", sa.BigInteger(), nullable=False),
        sa.Column("pixel_offset", sa.BigInteger(), nullable=True),
        sa.Column("flags", sa.Integer(), nullable=False),
        sa.Column("settled_version", sa.Integer(), nullable=True),
        sa.Column("received_us", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(
            ["pack_pk"], ["pack.id"], name=op.f("fk_instance_pack_pk_pack")
        ),
        sa.ForeignKeyConstraint(
            ["series_pk"],
            ["series.id"],
            name=op.f("fk_instance_series_pk_series"),
            ondelete="CASCADE",
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_instance")),
        sa.UniqueConstraint(
            "tenant",
            "sop_instance_uid",
            name=op.f("uq_instance_tenant_sop_instance_uid"),
        ),
    )
    op.create_index(
        "ix_instance_pack", "instance", ["pack_pk", "record_offset"], unique=False
    )
    op.create_index(
        "ix_instance_series",
        "instance",
        ["series_pk", "instance_number", "id"],
        unique=False,
    )
    op.create_table(
        "series_metadata",
        sa.Column("series_pk", BIG_ID, nullable=False),
        sa.Column("revision", sa.Integer(), nullable=False),
        sa.Column("etag", sa.String(length=64), nullable=False),
        sa.Column("gzip_body", sa.LargeBinary(), nullable=False),
        sa.ForeignKeyConstraint(
            ["series_pk"],
            ["series.id"],
            name=op.f("fk_series_metadata_series_pk_series"),
            ondelete="CASCADE",
        ),
        sa.PrimaryKeyConstraint("series_pk", name=op.f("pk_series_metadata")),
    )
    op.create_table(
        "frame_table",
        sa.Column("instance_pk", BIG_ID, nullable=False),
        sa.Column("table_bytes", sa.LargeBinary(), nullable=False),
        sa.ForeignKeyConstraint(
            ["instance_pk"],
            ["instance.id"],
            name=op.f("fk_frame_table_instance_pk_instance"),
            ondelete="CASCADE",
        ),
        sa.PrimaryKeyConstraint("instance_pk", name=op.f("pk_frame_table")),
    )


def downgrade() -> None:
    op.drop_table("frame_table")
    op.drop_table("series_metadata")
    op.drop_table("instance")
    op.drop_table("series")
    op.drop_table("study")
    op.drop_table("tenant")
    op.drop_table("subscriber")
    op.drop_table("peer")
    op.drop_table("patient")
    op.drop_table("pack")
    op.drop_table("outbox_event")
    op.drop_table("feed")
    op.drop_table("deletion")
    op.drop_table("commitment_request")
