"""WADO-RS: retrieve studies, series, instances and their bulk data (PS3.18 10.4)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated

from fastapi import APIRouter, Depends, Request, Response

from pacs.domain.study import StoredInstance
from pacs.imaging import syntaxes
from pacs.services.retrieve import RetrieveService
from pacs.services.sources import ByteSource
from pacs.web.bodies import (
    Attachment,
    Validators,
    send_parts,
    send_source,
)
from pacs.web.dependencies import (
    BaseUrl,
    Policy,
    StoredRoute,
    access_policy,
    base_url,
    context,
    current_actor,
    path_uid,
    readable,
)
from pacs.web.leaving import Caller, Stream, caller_of
from pacs.web.multipart import MultipartWriter, Part
from pacs.web.negotiation import ANY, DICOM, ZIP, Offer, accept_of, candidates
from pacs.web.zip import archive, entries
from storage.kernel.errors import Unsupported
from storage.kernel.types import Actor

router = APIRouter(tags=["retrieve"], route_class=StoredRoute)
files = APIRouter(tags=["retrieve"], route_class=StoredRoute)

DICOM_PARTS = Offer(DICOM, multipart=True)
DICOM_SINGLE = Offer(DICOM)
ZIP_FILE = Offer(ZIP)
#: Never sent over DICOMweb (PS3.18 8.7.3.5.2).
NEVER = frozenset((syntaxes.IMPLICIT_VR_LE, syntaxes.EXPLICIT_VR_BE))


async def retrieve_service() -> RetrieveService:
    """Return the retrieve service. The application replaces this dependency."""
    raise NotImplementedError


@context
@dataclass(frozen=True, slots=True)
class RetrieveContext:
    """What every retrieve route needs."""

    request: Request
    actor: Annotated[Actor, Depends(current_actor)]
    policy: Annotated[Policy, Depends(access_policy)]
    retrieve: Annotated[RetrieveService, Depends(retrieve_service)]
    base_url: Annotated[BaseUrl, Depends(base_url)]

    @property
    def base(self) -> str:
        """What addresses in the answer begin with."""
        return self.base_url.of(self.request)

    def instance(self, study: str, series: str, instance: str) -> StoredInstance:
        """Return the instance of a path; each UID must own the next."""
        self.policy.require(self.actor, "get")
        return self.retrieve.instance(
            self.actor,
            path_uid("study", study),
            path_uid("series", series),
            path_uid("instance", instance),
        )

    def instances(self, study: str, series: str | None = None) -> list[StoredInstance]:
        """Return the instances of a study or series, in presentation order."""
        self.policy.require(self.actor, "get")
        return self.retrieve.instances(
            self.actor,
            path_uid("study", study),
            None if series is None else path_uid("series", series),
        )

    @property
    def caller(self) -> Caller:
        """Who waits for the answer."""
        return caller_of(self.request)

    def accept(self) -> str:
        """Return what the client accepts."""
        return accept_of(self.request)

    def url(self, instance: StoredInstance) -> str:
        """Return the address of an instance."""
        return (
            f"{self.base}/dicom-web/studies/{instance.study_instance_uid}"
            f"/series/{instance.series_instance_uid}"
            f"/instances/{instance.sop_instance_uid}"
        )


Asked = Annotated[RetrieveContext, Depends()]


@readable(router, "/studies/{study}")
def retrieve_study(asked: Asked, study: str) -> Response:
    """Retrieve the instances of a study."""
    return _instances(asked, asked.instances(study), study)


@readable(router, "/studies/{study}/series/{series}")
def retrieve_series(asked: Asked, study: str, series: str) -> Response:
    """Retrieve the instances of a series."""
    return _instances(asked, asked.instances(study, series), series)


@readable(router, "/studies/{study}/series/{series}/instances/{instance}")
def retrieve_instance(asked: Asked, study: str, series: str, instance: str) -> Response:
    """Retrieve one instance."""
    found = asked.instance(study, series, instance)
    offers = candidates(asked.accept(), (DICOM_PARTS, DICOM_SINGLE, ZIP_FILE))
    for offer, wanted in offers:
        target = transfer_target(asked.retrieve, found, wanted)
        if target is None:
            continue
        if offer == ZIP_FILE:
            return _zip(asked, [found], [target], instance)
        validators = instance_validators(found, target)
        if offer.multipart:
            parts = [_part(asked, found, target)]
            return send_parts(asked.request, MultipartWriter(DICOM, parts), validators)
        return send_source(
            asked.request,
            asked.retrieve.open_object(found, target, asked.caller.check),
            f"{DICOM}; transfer-syntax={target}",
            validators,
            {"Content-Location": asked.url(found)},
        )
    raise _not_available([found])


@readable(files, "/instances/{instance}/file")
def retrieve_file(asked: Asked, instance: str) -> Response:
    """Retrieve an object exactly as it is stored, in any transfer syntax."""
    asked.policy.require(asked.actor, "get")
    found = asked.retrieve.find_instance(asked.actor, path_uid("instance", instance))
    return send_source(
        asked.request,
        asked.retrieve.open_object(found),
        DICOM,
        instance_validators(found, found.transfer_syntax_uid),
        Attachment(f"{found.sop_instance_uid}.dcm").headers(),
    )


def instance_validators(instance: StoredInstance, form: str) -> Validators:
    """Return the validators of a representation of an instance, named by `form`."""
    return Validators(f"{instance.digest.hex()[:32]}-{form}", instance.received_us)


def _instances(
    asked: RetrieveContext, found: Sequence[StoredInstance], name: str
) -> Response:
    """Send many instances, each in the best syntax it can have.

    Parameters
    ----------
    name : str
        Of an archive that is saved.
    """
    acceptable = candidates(asked.accept(), (DICOM_PARTS, ZIP_FILE))
    form = acceptable[0][0]
    wanted = [syntax for offer, syntax in acceptable if offer == form]
    targets = []
    for instance in found:
        named = (transfer_target(asked.retrieve, instance, syntax) for syntax in wanted)
        target = next((one for one in named if one is not None), None)
        if target is None:
            raise _not_available(found)
        targets.append(target)
    if form == ZIP_FILE:
        return _zip(asked, found, targets, name)
    parts = [
        _part(asked, instance, target)
        for instance, target in zip(found, targets, strict=True)
    ]
    return send_parts(asked.request, MultipartWriter(DICOM, parts), Validators())


def _zip(
    asked: RetrieveContext,
    found: Sequence[StoredInstance],
    targets: Sequence[str],
    name: str,
) -> Response:
    """Send instances in a ZIP archive."""
    headers = {
        **Validators().headers(),
        **Attachment(f"{name}.zip").headers(),
        "Content-Type": ZIP,
    }
    if asked.request.method == "HEAD":
        return Response(None, 200, headers)
    opened = (
        asked.retrieve.part10(instance, target, asked.caller.check)
        for instance, target in zip(found, targets, strict=True)
    )
    return Stream(asked.request, archive(entries(found), opened), 200, headers)


def _part(asked: RetrieveContext, instance: StoredInstance, target: str) -> Part:
    """Return an instance as a part; it is opened when its turn comes."""
    stored = target == instance.transfer_syntax_uid

    def chunks() -> Iterator[bytes]:
        return asked.retrieve.part10(instance, target, asked.caller.check).chunks

    return Part(
        (
            ("Content-Type", f"{DICOM}; transfer-syntax={target}"),
            ("Content-Location", asked.url(instance)),
        ),
        instance.object_length if stored else None,
        chunks,
    )


def transfer_target(
    retrieve: RetrieveService, instance: StoredInstance, wanted: str
) -> str | None:
    """Return the transfer syntax to send for what a client named; None: cannot.

    Nothing named means Explicit VR Little Endian, but what is lossy, too long or
    cannot be decoded comes as stored (PS3.18 8.7.3.5.2).
    """
    stored = instance.transfer_syntax_uid
    if wanted in {"", ANY}:
        if stored in NEVER:
            return syntaxes.EXPLICIT_VR_LE
        if wanted == ANY or stored == syntaxes.EXPLICIT_VR_LE:
            return stored
        lossy = syntaxes.get(stored).lossy
        too_long = instance.object_length > retrieve.limits.inflated_bytes
        can = retrieve.can_send_as(instance, syntaxes.EXPLICIT_VR_LE)
        return stored if lossy or too_long or not can else syntaxes.EXPLICIT_VR_LE
    if wanted in NEVER:
        return None
    if retrieve.can_send_as(instance, wanted):
        return wanted
    # What has no pixels has one form; a study of images and reports can be sent.
    if instance.pixel_offset is None and syntaxes.is_known(wanted):
        plain = retrieve.can_send_as(instance, syntaxes.EXPLICIT_VR_LE)
        return syntaxes.EXPLICIT_VR_LE if plain else None
    return None


def _not_available(found: Sequence[StoredInstance]) -> Unsupported:
    stored = sorted({instance.transfer_syntax_uid for instance in found} - NEVER)
    kinds = ", ".join({*stored, syntaxes.EXPLICIT_VR_LE})
    return Unsupported(f"available: {DICOM_PARTS} in {kinds}")


def source_part(
    source: ByteSource, headers: Sequence[tuple[str, str]], length: int | None = None
) -> Part:
    """Return bytes as a part."""
    return Part(
        tuple(headers),
        source.length if length is None else length,
        partial(source.chunks),
    )
