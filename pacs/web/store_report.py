"""The answer to a STOW-RS request: the store instances response module (PS3.18 I.2)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import orjson

from pacs.domain.study import Accepted
from pacs.web.intake import Outcome, Refused
from pacs.web.problems import PROCESSING_FAILURE, failure_reason
from storage.kernel.errors import (
    IdentityMismatch,
    ImagingError,
    StorageFull,
    TooLarge,
    Unavailable,
)
from storage.kernel.uids import is_uid

#: Owner of (0009,xx01), the sentence that explains a failure.
PRIVATE_CREATOR = "HUYING STORE"
STUDY_UID = 0x0020000D
#: The data set does not match its SOP class in all respects (PS3.18 Table I.2-1).
DOES_NOT_MATCH = 0xB007


@dataclass(slots=True)
class Report:
    """What became of the parts; `fragments` are rendered as they come in.

    Bound: an answer for `request_parts` parts is a few hundred bytes for each.
    """

    base: str
    fragments: dict[int, tuple[str, bytes]] = field(default_factory=dict)
    studies: set[str] = field(default_factory=set)
    errors: set[type[Exception]] = field(default_factory=set)
    n_stored: int = 0
    n_warned: int = 0
    n_failed: int = 0

    def keep(self, number: int, outcome: Outcome) -> None:
        """Note the outcome of part `number`."""
        if isinstance(outcome, Accepted):
            self.n_stored += 1
            self.n_warned += bool(outcome.warnings)
            if len(self.studies) < 2:
                self.studies.add(outcome.study_instance_uid)
            self.fragments[number] = ("00081199", _stored(outcome, self.base))
            return
        self.n_failed += 1
        self.errors.add(type(outcome.error))
        claimed = is_uid(outcome.sop_class_uid) and is_uid(outcome.sop_instance_uid)
        sequence = "00081198" if claimed else "0008119A"
        self.fragments[number] = (sequence, _failed(outcome, claimed=claimed))

    @property
    def status(self) -> int:
        """Status of the answer (PS3.18 Table 10.5.3-1)."""
        if self.n_stored:
            return 202 if self.n_failed or self.n_warned else 200
        for kind, status in _NONE_STORED:
            if self.errors and all(issubclass(one, kind) for one in self.errors):
                return status
        return 409

    def body(self) -> bytes:
        """Return the store instances response module as JSON."""
        members = []
        if len(self.studies) == 1:
            url = f"{self.base}/dicom-web/studies/{next(iter(self.studies))}"
            members.append(b'"00081190":' + orjson.dumps({"vr": "UR", "Value": [url]}))
        for sequence in ("00081198", "00081199", "0008119A"):
            items = [
                fragment
                for _, (kind, fragment) in sorted(self.fragments.items())
                if kind == sequence
            ]
            if items:
                members.append(
                    b'"%s":{"vr":"SQ","Value":[%s]}'
                    % (sequence.encode(), b",".join(items))
                )
        return b"{" + b",".join(members) + b"}"


#: Statuses when nothing was stored and every error is of one kind; else 409.
_NONE_STORED: Sequence[tuple[type[Exception], int]] = (
    (StorageFull, 507),
    (Unavailable, 503),
    (TooLarge, 413),
)


def _stored(accepted: Accepted, base: str) -> bytes:
    """Return an item of Referenced SOP Sequence (0008,1199)."""
    url = (
        f"{base}/dicom-web/studies/{accepted.study_instance_uid}"
        f"/series/{accepted.series_instance_uid}"
        f"/instances/{accepted.sop_instance_uid}"
    )
    item: dict[str, object] = {
        "00081150": {"vr": "UI", "Value": [accepted.sop_class_uid]},
        "00081155": {"vr": "UI", "Value": [accepted.sop_instance_uid]},
        "00081190": {"vr": "UR", "Value": [url]},
    }
    if accepted.warnings:
        item["00081196"] = {"vr": "US", "Value": [DOES_NOT_MATCH]}
        item["00741048"] = _attributes([one.tag for one in accepted.warnings])
    return orjson.dumps(item)


def _failed(refused: Refused, *, claimed: bool) -> bytes:
    """Return an item of Failed SOP (0008,1198) or Other Failures Sequence."""
    error = refused.error
    reason = PROCESSING_FAILURE
    if isinstance(error, ImagingError):
        reason = failure_reason(error)
    tag = getattr(error, "tag", None)
    if isinstance(error, IdentityMismatch) and tag == STUDY_UID:
        reason |= 1
    item: dict[str, object] = {}
    if claimed:
        item["00081150"] = {"vr": "UI", "Value": [refused.sop_class_uid]}
        item["00081155"] = {"vr": "UI", "Value": [refused.sop_instance_uid]}
    item["00081197"] = {"vr": "US", "Value": [reason]}
    # Extension: what the reason does not say, without patient data.
    if isinstance(error, ImagingError):
        item["00090010"] = {"vr": "LO", "Value": [PRIVATE_CREATOR]}
        item["00091001"] = {"vr": "LT", "Value": [str(error)[:256]]}
    if tag:
        item["00741048"] = _attributes([tag])
    return orjson.dumps(item)


def _attributes(tags: Sequence[int]) -> dict[str, object]:
    """Return Failed Attributes Sequence (0074,1048), an extension here."""
    return {
        "vr": "SQ",
        "Value": [
            {"00720026": {"vr": "AT", "Value": [f"{tag:08X}"]}} for tag in tags[:64]
        ],
    }
