"""WADO-RS pixel data and bulk data: frames, bulkdata, pixeldata (PS3.18 10.4.1.1)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from importlib.metadata import version

import orjson
from fastapi import APIRouter, Response

from pacs.domain.study import StoredInstance
from pacs.imaging import syntaxes
from pacs.imaging.encoders import ENCODERS, resolution_offsets
from pacs.services.retrieve import RetrieveService, bulkdata_prefix
from pacs.services.sources import ByteSource
from pacs.web.bodies import (
    IMMUTABLE,
    Attachment,
    Validators,
    not_modified,
    send_parts,
    send_source,
)
from pacs.web.dependencies import StoredRoute, readable
from pacs.web.multipart import MultipartWriter, Part
from pacs.web.negotiation import ANY, OCTETS, Offer, candidates
from pacs.web.retrieve import (
    NEVER,
    Asked,
    RetrieveContext,
    instance_validators,
    source_part,
)
from storage.kernel.errors import InvalidParameter, NotFound, Unsupported

router = APIRouter(tags=["bulk data"], route_class=StoredRoute)

_INSTANCE = "/studies/{study}/series/{series}/instances/{instance}"
_NUMBERS = re.compile(r"[0-9]{1,9}(?:,[0-9]{1,9})*\Z")
OCTET_PARTS = Offer(OCTETS, multipart=True)
OCTET_SINGLE = Offer(OCTETS)
#: Values that a page could run; they are only ever offered for saving.
ENCAPSULATED_DOCUMENT = "00420011"
PIXELS = "7FE00010"
#: Image types that frames are encoded in when asked for.
ENCODED_TYPES = tuple(
    dict.fromkeys(
        syntaxes.get(uid).media_type
        for uid in ENCODERS
        if syntaxes.get(uid).media_type != OCTETS
    )
)
HTJ2K = frozenset(f"1.2.840.10008.1.2.4.20{n}" for n in (1, 2, 3))
#: Extension: bytes that hold each resolution of an HTJ2K frame, the smallest first.
RESOLUTIONS = "Resolution-Offsets"
#: More of a code stream is not looked at for its main header.
MAIN_HEADER = 4096


@readable(router, _INSTANCE + "/frames/{frames}")
def retrieve_frames(
    asked: Asked, study: str, series: str, instance: str, frames: str
) -> Response:
    """Retrieve frames, in the order they are asked for."""
    numbers = parse_frame_list(frames, asked.retrieve.limits.frames_list)
    found = asked.instance(study, series, instance)
    offers = frame_offers(found.transfer_syntax_uid, single=len(numbers) == 1)
    try:
        acceptable = candidates(asked.accept(), offers)
    except Unsupported:
        acceptable = []
    for offer, wanted in acceptable:
        target = frame_target(asked.retrieve, found, offer.media_type, wanted)
        if target is None:
            continue
        forms = asked.retrieve.frame_forms(found, numbers, target)
        kind = f"{offer.media_type}; transfer-syntax={target}"
        validators = Validators(
            f"{found.digest.hex()[:32]}-{_form_name(found, target)}-{frames[:64]}",
            cache=IMMUTABLE,
        )
        if not offer.multipart:
            if validators.unchanged(asked.request):
                return not_modified(validators)
            source = forms[0].open()
            headers = _resolutions(source)
            return send_source(asked.request, source, kind, validators, headers)
        url = asked.url(found)
        parts = [
            Part(
                (("Content-Type", kind), ("Content-Location", f"{url}/frames/{n}")),
                form.length,
                form.chunks,
            )
            for n, form in zip(numbers, forms, strict=True)
        ]
        writer = MultipartWriter(offer.media_type, parts)
        return send_parts(asked.request, writer, validators)
    raise _not_available(asked.retrieve, found)


@cache
def _codecs() -> str:
    """Return the version of the codecs: another one may write other bytes."""
    return version("imagecodecs")


def _form_name(instance: StoredInstance, target: str) -> str:
    """Return what tells this form of a frame from others, also of later releases."""
    made = target != instance.transfer_syntax_uid and target in ENCODERS
    return f"{target}-{_codecs()}" if made else target


def _resolutions(source: ByteSource) -> dict[str, str]:
    """Return where the resolutions of an HTJ2K frame end, as a header of ours."""
    if source.transfer_syntax_uid not in HTJ2K:
        return {}
    head = source.read(0, min(source.length, MAIN_HEADER))
    offsets = resolution_offsets(head, source.length)
    return {RESOLUTIONS: ", ".join(map(str, offsets))} if offsets else {}


def parse_frame_list(text: str, allowed: int) -> list[int]:
    """Return the frame numbers of a path, in their order.

    Raises
    ------
    InvalidParameter
        Not a list of different numbers from 1, or more than `allowed`.
    """
    if not _NUMBERS.match(text):
        raise InvalidParameter("frames", "not a list of numbers")
    numbers = [int(part) for part in text.split(",")]
    if len(numbers) > allowed:
        raise InvalidParameter("frames", f"more than {allowed}")
    if 0 in numbers or len(set(numbers)) < len(numbers):
        raise InvalidParameter("frames", "zero, or a number twice")
    return numbers


@cache
def frame_offers(transfer_syntax_uid: str, *, single: bool) -> tuple[Offer, ...]:
    """Return the forms that frames in a syntax may be given in, the default first."""
    syntax = syntaxes.get(transfer_syntax_uid)
    own = [] if syntax.media_type == OCTETS else [syntax.media_type]
    kinds = [OCTETS, *own]
    if not syntax.decodes:
        # Video and the like have no raw form: their own comes first.
        kinds = [*own, OCTETS]
    else:
        kinds += [kind for kind in ENCODED_TYPES if kind not in own]
    return tuple(
        Offer(kind, multipart=multipart)
        for kind in kinds
        for multipart in (True, False)
        if multipart or single
    )


def frame_target(
    retrieve: RetrieveService, instance: StoredInstance, media_type: str, wanted: str
) -> str | None:
    """Return the transfer syntax for what a client named; None: cannot.

    Without one, octets are Explicit VR Little Endian, but lossy pixels come as stored
    (PS3.18 8.7.3.5.2); an image type is what is stored if that is of the type, else its
    default.
    """
    stored = instance.transfer_syntax_uid
    syntax = syntaxes.get(stored)
    plain = syntaxes.EXPLICIT_VR_LE
    as_stored = stored if syntax.encapsulated else plain
    if wanted in NEVER:
        return None
    if media_type in {OCTETS, syntax.media_type} and wanted in {ANY, stored}:
        return as_stored
    if media_type != OCTETS:
        if wanted in {"", ANY}:
            if syntax.media_type == media_type:
                return as_stored
            wanted = syntaxes.MEDIA_TYPE_DEFAULTS.get(media_type, "")
        elif (
            not syntaxes.is_known(wanted)
            or syntaxes.get(wanted).media_type != media_type
        ):
            return None
    elif not wanted:
        return as_stored if syntax.lossy or not syntax.decodes else plain
    elif wanted == plain:
        return plain if syntax.decodes else None
    # Tolerates: the syntax of an image type, asked for as octets.
    return wanted if retrieve.can_send_as(instance, wanted) else None


def _not_available(retrieve: RetrieveService, instance: StoredInstance) -> Unsupported:
    """Say which forms there are, and what is stored."""
    stored = instance.transfer_syntax_uid
    syntax = syntaxes.get(stored)
    plain = [syntaxes.EXPLICIT_VR_LE] if syntax.decodes else []
    uids = [uid for uid in ENCODERS if retrieve.can_send_as(instance, uid)]
    kinds = [
        f"{syntaxes.get(uid).media_type}; transfer-syntax={uid}"
        for uid in dict.fromkeys((*plain, *({stored} - NEVER), *uids))
    ]
    return Unsupported(f"available: {', '.join(kinds)}; stored in {stored}")


@readable(router, _INSTANCE + "/bulkdata/{path:path}")
def retrieve_bulkdata(
    asked: Asked, study: str, series: str, instance: str, path: str
) -> Response:
    """Retrieve the value of one element: a tag, or tag/item/tag."""
    found = asked.instance(study, series, instance)
    bulk = asked.retrieve.bulkdata(found, path)
    offers = [OCTET_PARTS, OCTET_SINGLE]
    headers: dict[str, str] = {}
    if path == ENCAPSULATED_DOCUMENT:
        headers = Attachment(found.sop_instance_uid).headers()
        own = [Offer(bulk.mime_type), Offer(bulk.mime_type, multipart=True)]
        offers = own + [offer for offer in offers if offer not in own]
    offer, _ = candidates(asked.accept(), offers)[0]
    validators = instance_validators(found, f"bulk-{path.replace('/', '.')}"[:128])
    if not offer.multipart:
        return send_source(
            asked.request, bulk.source, offer.media_type, validators, headers
        )
    url = f"{asked.base}{bulkdata_prefix(found)}/{path}"
    part = source_part(
        bulk.source, (("Content-Type", offer.media_type), ("Content-Location", url))
    )
    response = send_parts(
        asked.request, MultipartWriter(offer.media_type, [part]), validators
    )
    response.headers.update(headers)
    return response


@readable(router, "/studies/{study}/bulkdata")
def study_bulkdata(asked: Asked, study: str) -> Response:
    """Retrieve all bulk data of a study."""
    return _all_bulk(asked, asked.instances(study))


@readable(router, "/studies/{study}/series/{series}/bulkdata")
def series_bulkdata(asked: Asked, study: str, series: str) -> Response:
    """Retrieve all bulk data of a series."""
    return _all_bulk(asked, asked.instances(study, series))


@readable(router, _INSTANCE + "/bulkdata")
def instance_bulkdata(asked: Asked, study: str, series: str, instance: str) -> Response:
    """Retrieve all bulk data of an instance."""
    return _all_bulk(asked, [asked.instance(study, series, instance)])


@readable(router, "/studies/{study}/pixeldata")
def study_pixeldata(asked: Asked, study: str) -> Response:
    """Retrieve the pixel data of a study."""
    return _all_pixels(asked, asked.instances(study))


@readable(router, "/studies/{study}/series/{series}/pixeldata")
def series_pixeldata(asked: Asked, study: str, series: str) -> Response:
    """Retrieve the pixel data of a series."""
    return _all_pixels(asked, asked.instances(study, series))


@readable(router, _INSTANCE + "/pixeldata")
def instance_pixeldata(
    asked: Asked, study: str, series: str, instance: str
) -> Response:
    """Retrieve the pixel data of an instance."""
    return _all_pixels(asked, [asked.instance(study, series, instance)])


def _all_bulk(asked: RetrieveContext, found: Sequence[StoredInstance]) -> Response:
    """Send every value that the metadata give by reference."""
    candidates(asked.accept(), (OCTET_PARTS,))
    parts: list[Part] = []
    for instance in found:
        prefix = bulkdata_prefix(instance)
        for path in _references(
            orjson.loads(asked.retrieve.metadata(instance)), prefix
        ):
            if path == PIXELS:
                parts += _pixel_parts(asked, instance)
                continue
            bulk = asked.retrieve.bulkdata(instance, path)
            url = f"{asked.base}{prefix}/{path}"
            kinds = (("Content-Type", bulk.mime_type), ("Content-Location", url))
            # Bound: values wait as places, not as bytes; each is read again.
            parts.append(
                Part(
                    kinds,
                    bulk.source.length,
                    lambda instance=instance, path=path: (  # type: ignore[misc]
                        asked.retrieve.bulkdata(instance, path).source.chunks()
                    ),
                )
            )
    return _send_all(asked, parts)


def _references(attributes: dict[str, dict[str, object]], prefix: str) -> list[str]:
    """Return the paths of all values given by reference."""
    found: list[str] = []
    for element in attributes.values():
        uri = element.get("BulkDataURI")
        if isinstance(uri, str):
            found.append(uri.removeprefix(prefix + "/"))
        values = element.get("Value")
        if element.get("vr") == "SQ" and isinstance(values, list):
            for item in values:
                found += _references(item or {}, prefix)
    return found


def _all_pixels(asked: RetrieveContext, found: Sequence[StoredInstance]) -> Response:
    candidates(asked.accept(), (OCTET_PARTS,))
    parts: list[Part] = []
    for instance in found:
        parts += _pixel_parts(asked, instance)
    return _send_all(asked, parts)


def _pixel_parts(asked: RetrieveContext, instance: StoredInstance) -> list[Part]:
    """Return native Pixel Data as one part, encapsulated frames as one each."""
    syntax = syntaxes.get(instance.transfer_syntax_uid)
    count = asked.retrieve.frame_count(instance)
    if not count:
        return []
    url = asked.url(instance)
    if not syntax.encapsulated and not syntax.deflated:
        bulk = asked.retrieve.bulkdata(instance, PIXELS)
        kind = f"{OCTETS}; transfer-syntax={syntaxes.EXPLICIT_VR_LE}"
        return [
            source_part(
                bulk.source,
                (
                    ("Content-Type", kind),
                    ("Content-Location", f"{url}/bulkdata/7FE00010"),
                ),
            )
        ]
    sources: list[ByteSource] = asked.retrieve.open_frames(
        instance, range(1, count + 1)
    )
    kind = f"{syntax.media_type}; transfer-syntax={sources[0].transfer_syntax_uid}"
    return [
        source_part(
            source,
            (("Content-Type", kind), ("Content-Location", f"{url}/frames/{n}")),
        )
        for n, source in enumerate(sources, start=1)
    ]


def _send_all(asked: RetrieveContext, parts: Sequence[Part]) -> Response:
    if not parts:
        raise NotFound("no bulk data")
    return send_parts(asked.request, MultipartWriter(OCTETS, parts), Validators())
