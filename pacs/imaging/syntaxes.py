"""Transfer syntaxes: what each is, and what we can do with it (PS3.5 Annex A)."""

from __future__ import annotations

from dataclasses import dataclass

from storage.kernel.errors import UnsupportedTransferSyntax


@dataclass(frozen=True, slots=True)
class TransferSyntax:
    """One transfer syntax.

    Attributes
    ----------
    media_type : str
        Of single frames in DICOMweb (PS3.18 Table 8.7.3-5).
    decodes : bool
        Whether frames can be converted to native pixels here.
    """

    uid: str
    name: str
    explicit: bool = True
    little_endian: bool = True
    encapsulated: bool = True
    deflated: bool = False
    lossy: bool = False
    media_type: str = "application/octet-stream"
    decodes: bool = True


_P = "1.2.840.10008.1.2"
_TABLE = (
    TransferSyntax(_P, "Implicit VR Little Endian", explicit=False, encapsulated=False),
    TransferSyntax(f"{_P}.1", "Explicit VR Little Endian", encapsulated=False),
    TransferSyntax(
        f"{_P}.1.99", "Deflated Explicit VR LE", encapsulated=False, deflated=True
    ),
    TransferSyntax(f"{_P}.1.98", "Encapsulated Uncompressed Explicit VR LE"),
    TransferSyntax(
        f"{_P}.2", "Explicit VR Big Endian", little_endian=False, encapsulated=False
    ),
    TransferSyntax(
        f"{_P}.4.50", "JPEG Baseline (1)", lossy=True, media_type="image/jpeg"
    ),
    TransferSyntax(
        f"{_P}.4.51", "JPEG Extended (2, 4)", lossy=True, media_type="image/jpeg"
    ),
    TransferSyntax(
        f"{_P}.4.53",
        "JPEG Spectral Selection (6, 8)",
        lossy=True,
        media_type="image/jpeg",
    ),
    TransferSyntax(
        f"{_P}.4.55",
        "JPEG Full Progression (10, 12)",
        lossy=True,
        media_type="image/jpeg",
    ),
    TransferSyntax(f"{_P}.4.57", "JPEG Lossless (14)", media_type="image/jpeg"),
    TransferSyntax(f"{_P}.4.70", "JPEG Lossless SV1", media_type="image/jpeg"),
    TransferSyntax(f"{_P}.4.80", "JPEG-LS Lossless", media_type="image/jls"),
    TransferSyntax(
        f"{_P}.4.81", "JPEG-LS Near-lossless", lossy=True, media_type="image/jls"
    ),
    TransferSyntax(f"{_P}.4.90", "JPEG 2000 Lossless", media_type="image/jp2"),
    TransferSyntax(f"{_P}.4.91", "JPEG 2000", lossy=True, media_type="image/jp2"),
    TransferSyntax(
        f"{_P}.4.92",
        "JPEG 2000 Part 2 Lossless",
        media_type="image/jpx",
        decodes=False,
    ),
    TransferSyntax(
        f"{_P}.4.93",
        "JPEG 2000 Part 2",
        lossy=True,
        media_type="image/jpx",
        decodes=False,
    ),
    TransferSyntax(
        f"{_P}.4.100",
        "MPEG2 MP@ML",
        lossy=True,
        media_type="video/mpeg",
        decodes=False,
    ),
    TransferSyntax(
        f"{_P}.4.100.1",
        "Fragmentable MPEG2 MP@ML",
        lossy=True,
        media_type="video/mpeg",
        decodes=False,
    ),
    TransferSyntax(
        f"{_P}.4.101",
        "MPEG2 MP@HL",
        lossy=True,
        media_type="video/mpeg",
        decodes=False,
    ),
    TransferSyntax(
        f"{_P}.4.101.1",
        "Fragmentable MPEG2 MP@HL",
        lossy=True,
        media_type="video/mpeg",
        decodes=False,
    ),
    *(
        TransferSyntax(
            f"{_P}.4.{number}",
            name,
            lossy=True,
            media_type="video/mp4",
            decodes=False,
        )
        for number, name in (
            ("102", "MPEG-4 AVC/H.264 HP 4.1"),
            ("102.1", "Fragmentable MPEG-4 AVC/H.264 HP 4.1"),
            ("103", "MPEG-4 AVC/H.264 BD HP 4.1"),
            ("103.1", "Fragmentable MPEG-4 AVC/H.264 BD HP 4.1"),
            ("104", "MPEG-4 AVC/H.264 HP 4.2 2D"),
            ("104.1", "Fragmentable MPEG-4 AVC/H.264 HP 4.2 2D"),
            ("105", "MPEG-4 AVC/H.264 HP 4.2 3D"),
            ("105.1", "Fragmentable MPEG-4 AVC/H.264 HP 4.2 3D"),
            ("106", "MPEG-4 AVC/H.264 Stereo HP 4.2"),
            ("106.1", "Fragmentable MPEG-4 AVC/H.264 Stereo HP 4.2"),
            ("107", "HEVC/H.265 Main 5.1"),
            ("108", "HEVC/H.265 Main 10 5.1"),
        )
    ),
    TransferSyntax(f"{_P}.4.110", "JPEG XL Lossless", media_type="image/jxl"),
    TransferSyntax(
        f"{_P}.4.111",
        "JPEG XL JPEG Recompression",
        lossy=True,
        media_type="image/jxl",
    ),
    TransferSyntax(f"{_P}.4.112", "JPEG XL", lossy=True, media_type="image/jxl"),
    TransferSyntax(f"{_P}.4.201", "HTJ2K Lossless", media_type="image/jphc"),
    TransferSyntax(f"{_P}.4.202", "HTJ2K Lossless RPCL", media_type="image/jphc"),
    TransferSyntax(f"{_P}.4.203", "HTJ2K", lossy=True, media_type="image/jphc"),
    TransferSyntax(f"{_P}.5", "RLE Lossless", media_type="image/dicom-rle"),
    TransferSyntax(f"{_P}.8.1", "Deflated Image Frame"),
)
_BY_UID = {syntax.uid: syntax for syntax in _TABLE}

IMPLICIT_VR_LE = _P
EXPLICIT_VR_LE = f"{_P}.1"
EXPLICIT_VR_BE = f"{_P}.2"
DEFLATED = f"{_P}.1.99"


#: Transfer syntax of frames of a media type that name none (PS3.18 Table 8.7.3-5).
MEDIA_TYPE_DEFAULTS = {
    "image/dicom-rle": f"{_P}.5",
    "image/jls": f"{_P}.4.80",
    "image/jp2": f"{_P}.4.90",
    "image/jpeg": f"{_P}.4.70",
    "image/jphc": f"{_P}.4.201",
    "image/jpx": f"{_P}.4.92",
    "image/jxl": f"{_P}.4.110",
}


def is_known(uid: str) -> bool:
    """Tell whether objects in this transfer syntax can be stored."""
    return uid in _BY_UID


def get(uid: str) -> TransferSyntax:
    """Return the transfer syntax `uid`.

    Raises
    ------
    UnsupportedTransferSyntax
    """
    try:
        return _BY_UID[uid]
    except KeyError:
        raise UnsupportedTransferSyntax("unknown transfer syntax") from None


def all_syntaxes() -> tuple[TransferSyntax, ...]:
    """Return every transfer syntax that can be stored, in table order."""
    return _TABLE
