"""Named limits. Every loop over outside data is bounded by one of these."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

KIB = 1024
MIB = 1024 * KIB
GIB = 1024 * MIB


class Limits(BaseModel):
    """What one request, object or peer may cost us.

    A field's description is its meaning and unit; `TooLarge.limit` names it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    memory_instance_bytes: int = Field(
        4 * MIB, ge=64 * KIB, description="larger instances get a pack of their own"
    )
    instance_bytes: int = Field(
        16 * GIB, ge=KIB, description="one data set as received"
    )
    command_bytes: int = Field(64 * KIB, ge=KIB, description="one DIMSE command set")
    identifier_bytes: int = Field(
        1 * MIB, ge=KIB, description="one C-FIND/C-MOVE data set"
    )
    action_bytes: int = Field(
        16 * MIB, ge=KIB, description="one N-ACTION data set: 100,000 references"
    )
    sequence_depth: int = Field(64, ge=1, description="nesting of sequences")
    elements: int = Field(
        1_000_000, ge=100, description="elements of one data set, nested ones counted"
    )
    inflated_bytes: int = Field(
        1 * GIB, ge=KIB, description="a deflated data set, once inflated"
    )
    inflation_ratio: int = Field(
        100, ge=2, description="inflated size over deflated size, above 1 MiB"
    )
    pdu_bytes: int = Field(
        256 * KIB, ge=4 * KIB, description="maximum PDU length we announce and accept"
    )
    associate_pdu_bytes: int = Field(
        256 * KIB, ge=4 * KIB, description="an A-ASSOCIATE-RQ"
    )
    request_bytes: int = Field(64 * GIB, ge=KIB, description="one HTTP request body")
    request_parts: int = Field(100_000, ge=1, description="parts of one STOW request")
    part_header_bytes: int = Field(16 * KIB, ge=256, description="headers of one part")
    query_limit: int = Field(1000, ge=1, description="rows of one QIDO answer")
    find_results: int = Field(
        200_000, ge=1, description="matches of one C-FIND before A700"
    )
    move_instances: int = Field(
        65_535, ge=1, description="sub-operations of one C-MOVE/C-GET; US counters"
    )
    matching_key_chars: int = Field(
        1024, ge=64, description="characters of one matching key but UID lists"
    )
    matching_wildcards: int = Field(
        16, ge=1, description="runs of * in one matching key"
    )
    uid_list: int = Field(50_000, ge=1, description="UIDs of one matching key")
    frames_list: int = Field(2_000, ge=1, description="frame numbers of one request")
    archive_entries: int = Field(200_000, ge=1, description="entries of one ZIP")
    archive_bytes: int = Field(64 * GIB, ge=KIB, description="a ZIP, once inflated")
    archive_ratio: int = Field(200, ge=2, description="inflation of one ZIP entry")
    conversion_frames: int = Field(
        100_000, ge=1, description="frames of one object that is converted whole"
    )
    conversion_seconds: float = Field(
        300, gt=0, description="converting one object into another transfer syntax"
    )
    conversion_memory: int = Field(
        32 * MIB,
        ge=0,
        description="a converted object in memory; longer ones go to a temporary file",
    )
    stream_bytes: int = Field(
        256 * GIB, ge=MIB, description="what one stream of frames may announce"
    )
    stream_ratio: int = Field(
        1000, ge=2, description="announced over stored bytes, above 256 MiB"
    )
    rendered_pixels: int = Field(
        32 * MIB, ge=KIB, description="pixels of one picture, or of one animation"
    )
    decode_seconds: float = Field(30, gt=0, description="one decode request")
    decode_bytes: int = Field(
        2 * GIB, ge=MIB, description="address space a decoder may add"
    )
    audit_detail_bytes: int = Field(
        4 * KIB, ge=256, description="detail of one audit record; more is cut"
    )
    audit_pending: int = Field(
        20_000, ge=100, description="audited reads that wait to be written"
    )
    audit_pending_seconds: float = Field(
        10, gt=0, description="longest such wait before reads are refused"
    )
    volume_bytes: int = Field(
        768 * MIB, ge=MIB, description="one volume in memory: its voxels"
    )
    volume_seconds: float = Field(60, gt=0, description="reading one volume")
    render_seconds: float = Field(30, gt=0, description="one picture of a volume")
    render_bytes: int = Field(
        1 * GIB, ge=64 * MIB, description="address space one picture may add"
    )
    render_pixels: int = Field(
        4 * MIB, ge=1024, description="pixels of one picture of a volume"
    )
    render_samples: int = Field(
        512 * MIB, ge=MIB, description="samples of one slab or volume rendering"
    )
    overlay_points: int = Field(
        500_000, ge=100, description="points of the graphics of one overlay answer"
    )
    overlay_masks: int = Field(10_000, ge=10, description="masks of one overlay answer")
    overlay_runs: int = Field(
        2_000_000, ge=1000, description="runs of the masks of one overlay answer"
    )
    overlay_objects: int = Field(200, ge=1, description="objects of one overlay answer")
