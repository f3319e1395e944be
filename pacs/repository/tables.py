"""Tables of the archive: patient, study, series, instance and what hangs on them.

`study` and `series` carry what QIDO and C-FIND ask for as materialised columns,
and `json`: the attributes of that level as a ready PS3.18 Annex F fragment
(members without the surrounding braces, counters left out).
"""

from __future__ import annotations

from sqlalchemy import (
    BigInteger,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    String,
    Text,
    UniqueConstraint,
    text,
)
from sqlalchemy.orm import Mapped, mapped_column

from storage.db.base import Base
from storage.db.tables import BigId

#: Text compared byte by byte: prefix searches can use the index on every engine.
Ordinal = Text().with_variant(Text(collation="C"), "postgresql")


class Patient(Base):
    """A patient of one tenant: (issuer, Patient ID) is the key, never the ID alone.

    Demographics are those of the first object received.
    """

    __tablename__ = "patient"

    id: Mapped[int] = mapped_column(BigId, primary_key=True)
    tenant: Mapped[str] = mapped_column(String(64))
    issuer: Mapped[str] = mapped_column(Ordinal, default="")
    patient_id: Mapped[str] = mapped_column(Ordinal, default="")
    patient_name: Mapped[str] = mapped_column(Text, default="")
    name_search: Mapped[str] = mapped_column(Ordinal, default="")
    birth_date: Mapped[str | None] = mapped_column(String(8))
    sex: Mapped[str] = mapped_column(Text, default="")
    created_us: Mapped[int] = mapped_column(BigInteger)

    __table_args__ = (UniqueConstraint("tenant", "issuer", "patient_id"),)


class Study(Base):
    """One study of one tenant.

    `name_alphabetic`, `name_ideographic`, `name_phonetic` are the component
    groups of Patient's Name, normalised (NFKC, case folded); `name_pinyin` holds
    search keys of Chinese names. `study_date` is null when it is not a date.
    `settle_due_us` is null once the study has settled; `version` counts
    ``study.settled`` events. `size_bytes` sums the stored objects.
    """

    __tablename__ = "study"

    id: Mapped[int] = mapped_column(BigId, primary_key=True)
    tenant: Mapped[str] = mapped_column(String(64))
    patient_pk: Mapped[int] = mapped_column(ForeignKey("patient.id"))
    study_instance_uid: Mapped[str] = mapped_column(Ordinal)
    study_date: Mapped[str | None] = mapped_column(String(8))
    study_time: Mapped[str | None] = mapped_column(String(16))
    accession_number: Mapped[str] = mapped_column(Ordinal, default="")
    study_id: Mapped[str] = mapped_column(Ordinal, default="")
    study_description: Mapped[str] = mapped_column(Text, default="")
    referring_physician_name: Mapped[str] = mapped_column(Text, default="")
    referring_search: Mapped[str] = mapped_column(Ordinal, default="")
    timezone_offset: Mapped[str] = mapped_column(String(16), default="")
    patient_id: Mapped[str] = mapped_column(Ordinal, default="")
    issuer: Mapped[str] = mapped_column(Ordinal, default="")
    patient_name: Mapped[str] = mapped_column(Text, default="")
    name_alphabetic: Mapped[str] = mapped_column(Ordinal, default="")
    name_ideographic: Mapped[str] = mapped_column(Ordinal, default="")
    name_phonetic: Mapped[str] = mapped_column(Ordinal, default="")
    name_pinyin: Mapped[str] = mapped_column(Ordinal, default="")
    birth_date: Mapped[str | None] = mapped_column(String(8))
    sex: Mapped[str] = mapped_column(Text, default="")
    modalities: Mapped[str] = mapped_column(Text, default="")
    sop_classes: Mapped[str] = mapped_column(Text, default="")
    n_series: Mapped[int] = mapped_column(Integer, default=0)
    n_instances: Mapped[int] = mapped_column(Integer, default=0)
    size_bytes: Mapped[int] = mapped_column(BigInteger, default=0)
    json: Mapped[str] = mapped_column(Text, default="")
    origin: Mapped[str] = mapped_column(String(16), default="external")
    flags: Mapped[int] = mapped_column(Integer, default=0)
    version: Mapped[int] = mapped_column(Integer, default=0)
    settle_due_us: Mapped[int | None] = mapped_column(BigInteger)
    created_us: Mapped[int] = mapped_column(BigInteger)
    updated_us: Mapped[int] = mapped_column(BigInteger)

    __table_args__ = (
        UniqueConstraint("tenant", "study_instance_uid"),
        Index("ix_study_date", "tenant", "study_date", "id"),
        Index("ix_study_patient_id", "tenant", "patient_id"),
        Index("ix_study_accession", "tenant", "accession_number"),
        Index("ix_study_alphabetic", "tenant", "name_alphabetic"),
        Index("ix_study_ideographic", "tenant", "name_ideographic"),
        Index("ix_study_patient", "patient_pk"),
        Index("ix_study_settle", "settle_due_us"),
    )


class Series(Base):
    """One series. `n_instances` and `size_bytes` are kept by ingest and delete."""

    __tablename__ = "series"

    id: Mapped[int] = mapped_column(BigId, primary_key=True)
    tenant: Mapped[str] = mapped_column(String(64))
    study_pk: Mapped[int] = mapped_column(ForeignKey("study.id", ondelete="CASCADE"))
    series_instance_uid: Mapped[str] = mapped_column(Ordinal)
    modality: Mapped[str] = mapped_column(String(64), default="")
    series_number: Mapped[int | None] = mapped_column(BigInteger)
    series_description: Mapped[str] = mapped_column(Text, default="")
    body_part: Mapped[str] = mapped_column(Text, default="")
    laterality: Mapped[str] = mapped_column(Text, default="")
    station_name: Mapped[str] = mapped_column(Text, default="")
    institution_name: Mapped[str] = mapped_column(Text, default="")
    pps_start_date: Mapped[str | None] = mapped_column(String(8))
    pps_start_time: Mapped[str | None] = mapped_column(String(16))
    scheduled_step_id: Mapped[str] = mapped_column(Text, default="")
    requested_procedure_id: Mapped[str] = mapped_column(Text, default="")
    n_instances: Mapped[int] = mapped_column(Integer, default=0)
    size_bytes: Mapped[int] = mapped_column(BigInteger, default=0)
    json: Mapped[str] = mapped_column(Text, default="")
    sealed_version: Mapped[int] = mapped_column(Integer, default=0)
    revision: Mapped[int] = mapped_column(Integer, default=0)
    created_us: Mapped[int] = mapped_column(BigInteger)
    updated_us: Mapped[int] = mapped_column(BigInteger)

    __table_args__ = (
        UniqueConstraint("tenant", "series_instance_uid"),
        Index("ix_series_study", "study_pk"),
    )


class Instance(Base):
    """One stored object and where its bytes are.

    `record_offset` and `object_offset` count from the start of the pack;
    `dataset_offset` and `pixel_offset` (value of Pixel Data; null without) count
    from the start of the object. `header_end` is where Pixel Data's element (or
    the object) begins, so that metadata is one short read. `digest` is SHA-256
    of the data set bytes as received. `settled_version` is null until a settle
    has reported the instance.
    """

    __tablename__ = "instance"

    id: Mapped[int] = mapped_column(BigId, primary_key=True)
    tenant: Mapped[str] = mapped_column(String(64))
    series_pk: Mapped[int] = mapped_column(ForeignKey("series.id", ondelete="CASCADE"))
    sop_instance_uid: Mapped[str] = mapped_column(Ordinal)
    sop_class_uid: Mapped[str] = mapped_column(String(64))
    transfer_syntax_uid: Mapped[str] = mapped_column(String(64))
    instance_number: Mapped[int | None] = mapped_column(BigInteger)
    rows: Mapped[int | None] = mapped_column(Integer)
    columns: Mapped[int | None] = mapped_column(Integer)
    bits_allocated: Mapped[int | None] = mapped_column(Integer)
    samples: Mapped[int | None] = mapped_column(Integer)
    number_of_frames: Mapped[int | None] = mapped_column(BigInteger)
    digest: Mapped[bytes] = mapped_column(LargeBinary(32))
    pack_pk: Mapped[int] = mapped_column(ForeignKey("pack.id"))
    record_offset: Mapped[int] = mapped_column(BigInteger)
    object_offset: Mapped[int] = mapped_column(BigInteger)
    object_length: Mapped[int] = mapped_column(BigInteger)
    dataset_offset: Mapped[int] = mapped_column(Integer)
    header_end: Mapped[int] = mapped_column(BigInteger)
    pixel_offset: Mapped[int | None] = mapped_column(BigInteger)
    flags: Mapped[int] = mapped_column(Integer, default=0)
    settled_version: Mapped[int | None] = mapped_column(Integer)
    received_us: Mapped[int] = mapped_column(BigInteger)

    __table_args__ = (
        UniqueConstraint("tenant", "sop_instance_uid"),
        Index("ix_instance_series", "series_pk", "instance_number", "id"),
        Index("ix_instance_pack", "pack_pk", "record_offset"),
    )


class FrameTableRow(Base):
    """Offsets of the frames of an encapsulated multi-frame object."""

    __tablename__ = "frame_table"

    instance_pk: Mapped[int] = mapped_column(
        ForeignKey("instance.id", ondelete="CASCADE"), primary_key=True
    )
    table_bytes: Mapped[bytes] = mapped_column(LargeBinary)


class Rendition(Base):
    """An object of the store that holds frames of a series in another encoding.

    It can be made again. It goes as soon as one of the `n_instances` it was made of
    has gone: `sha256` and their number are known once it is complete.
    """

    __tablename__ = "rendition"

    id: Mapped[int] = mapped_column(BigId, primary_key=True)
    key: Mapped[str] = mapped_column(String(32), unique=True)
    tenant: Mapped[str] = mapped_column(String(64))
    series_instance_uid: Mapped[str] = mapped_column(Ordinal)
    transfer_syntax_uid: Mapped[str] = mapped_column(String(64))
    n_instances: Mapped[int] = mapped_column(Integer, default=0)
    size_bytes: Mapped[int] = mapped_column(BigInteger, default=0)
    sha256: Mapped[bytes | None] = mapped_column(LargeBinary(32))
    created_us: Mapped[int] = mapped_column(BigInteger)

    __table_args__ = (Index("ix_rendition_series", "tenant", "series_instance_uid"),)


class InstanceRendition(Base):
    """Where the frames of an instance are in a rendition.

    `table_bytes` has offset, length and CRC-32C of each, 64 bits each, little endian.
    """

    __tablename__ = "instance_rendition"

    instance_pk: Mapped[int] = mapped_column(
        ForeignKey("instance.id", ondelete="CASCADE"), primary_key=True
    )
    rendition_pk: Mapped[int] = mapped_column(
        ForeignKey("rendition.id", ondelete="CASCADE")
    )
    table_bytes: Mapped[bytes] = mapped_column(LargeBinary)

    __table_args__ = (Index("ix_instance_rendition_rendition", "rendition_pk"),)


class SeriesMetadata(Base):
    """The WADO-RS metadata of a series, ready to send, and its frame table.

    Valid while `revision` equals the series' own.
    """

    __tablename__ = "series_metadata"

    series_pk: Mapped[int] = mapped_column(
        ForeignKey("series.id", ondelete="CASCADE"), primary_key=True
    )
    revision: Mapped[int] = mapped_column(Integer)
    etag: Mapped[str] = mapped_column(String(64))
    gzip_body: Mapped[bytes] = mapped_column(LargeBinary)
    zstd_body: Mapped[bytes | None] = mapped_column(LargeBinary)
    frames_body: Mapped[bytes | None] = mapped_column(LargeBinary)


class Thumbnail(Base):
    """The picture that stands for a series or a study, made when it settled.

    Valid while `revision` equals the series' own. `stands_for` is a sum of
    `pacs.repository.thumbnails.SERIES` and `STUDY`; `edition` says how it was made.
    """

    __tablename__ = "thumbnail"

    id: Mapped[int] = mapped_column(BigId, primary_key=True)
    study_pk: Mapped[int] = mapped_column(ForeignKey("study.id", ondelete="CASCADE"))
    series_pk: Mapped[int] = mapped_column(ForeignKey("series.id", ondelete="CASCADE"))
    instance_pk: Mapped[int] = mapped_column(
        ForeignKey("instance.id", ondelete="CASCADE")
    )
    frame_number: Mapped[int] = mapped_column(Integer)
    stands_for: Mapped[int] = mapped_column(Integer)
    revision: Mapped[int] = mapped_column(Integer)
    edition: Mapped[str] = mapped_column(String(16))
    width: Mapped[int] = mapped_column(Integer)
    height: Mapped[int] = mapped_column(Integer)
    picture: Mapped[bytes] = mapped_column(LargeBinary)

    __table_args__ = (
        UniqueConstraint("instance_pk", "frame_number"),
        Index("ix_thumbnail_study", "study_pk"),
        Index("ix_thumbnail_series", "series_pk"),
    )


class Deletion(Base):
    """What was deleted: the row state beside the tombstone in the pack.

    `reported_version` is null until a settle has named the removal.
    `erased_us` is set when the bytes are gone; until then `deadline_us` runs.
    """

    __tablename__ = "deletion"

    id: Mapped[int] = mapped_column(BigId, primary_key=True)
    tenant: Mapped[str] = mapped_column(String(64))
    study_instance_uid: Mapped[str] = mapped_column(Text)
    series_instance_uid: Mapped[str] = mapped_column(Text)
    sop_instance_uid: Mapped[str] = mapped_column(Text)
    digest: Mapped[bytes] = mapped_column(LargeBinary(32))
    pack_key: Mapped[str] = mapped_column(String(32))
    record_offset: Mapped[int] = mapped_column(BigInteger)
    actor: Mapped[str] = mapped_column(Text)
    reason: Mapped[str] = mapped_column(Text, default="")
    deleted_us: Mapped[int] = mapped_column(BigInteger)
    deadline_us: Mapped[int] = mapped_column(BigInteger)
    erased_us: Mapped[int | None] = mapped_column(BigInteger)
    reported_version: Mapped[int | None] = mapped_column(Integer)

    __table_args__ = (
        Index("ix_deletion_uid", "tenant", "sop_instance_uid"),
        Index("ix_deletion_study", "tenant", "study_instance_uid", "reported_version"),
        Index("ix_deletion_pack", "pack_key", "erased_us"),
        # Bound: deletions stay as proof for ever; those to do are few.
        Index(
            "ix_deletion_due",
            "tenant",
            "deadline_us",
            sqlite_where=text("erased_us IS NULL"),
            postgresql_where=text("erased_us IS NULL"),
        ),
    )


class Peer(Base):
    """A remote AE: what it may do here, and where C-MOVE reaches it."""

    __tablename__ = "peer"

    id: Mapped[int] = mapped_column(BigId, primary_key=True)
    title: Mapped[str] = mapped_column(String(16), unique=True)
    host: Mapped[str] = mapped_column(Text, default="")
    port: Mapped[int] = mapped_column(Integer, default=0)
    tenant: Mapped[str] = mapped_column(String(64), default="")
    may: Mapped[str] = mapped_column(Text, default="echo store")
    tls: Mapped[int] = mapped_column(Integer, default=0)
    forward: Mapped[int] = mapped_column(Integer, default=0)
    created_us: Mapped[int] = mapped_column(BigInteger)


class CommitmentRequest(Base):
    """A storage commitment transaction and its result until delivered."""

    __tablename__ = "commitment_request"

    id: Mapped[int] = mapped_column(BigId, primary_key=True)
    tenant: Mapped[str] = mapped_column(String(64))
    peer_ae: Mapped[str] = mapped_column(String(16))
    called_ae: Mapped[str] = mapped_column(String(16))
    transaction_uid: Mapped[str] = mapped_column(String(64))
    request: Mapped[str] = mapped_column(Text)
    result: Mapped[str | None] = mapped_column(Text)
    state: Mapped[str] = mapped_column(String(12), default="requested")
    attempts: Mapped[int] = mapped_column(Integer, default=0)
    created_us: Mapped[int] = mapped_column(BigInteger)
    delivered_us: Mapped[int | None] = mapped_column(BigInteger)

    __table_args__ = (UniqueConstraint("peer_ae", "transaction_uid"),)


class Forwarding(Base):
    """How far one study has been sent on to one peer.

    Instances settled up to `version` are dealt with; `sent` lists (JSON) the row
    keys of later ones that are too, while a job is at work on them.
    """

    __tablename__ = "forwarding"

    id: Mapped[int] = mapped_column(BigId, primary_key=True)
    peer: Mapped[str] = mapped_column(String(16))
    study_pk: Mapped[int] = mapped_column(ForeignKey("study.id", ondelete="CASCADE"))
    version: Mapped[int] = mapped_column(Integer, default=0)
    sent: Mapped[str] = mapped_column(Text, default="[]")
    updated_us: Mapped[int] = mapped_column(BigInteger)

    __table_args__ = (
        UniqueConstraint("peer", "study_pk"),
        Index("ix_forwarding_study", "study_pk"),
    )
