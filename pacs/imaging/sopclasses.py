"""Which SOP classes are stored (PS3.4 B.5, PS3.6 Annex A)."""

from __future__ import annotations

from functools import cache, lru_cache

from storage.kernel.uids import is_uid

MEDIA_STORAGE_DIRECTORY = "1.2.840.10008.1.3.10"
VERIFICATION = "1.2.840.10008.1.1"

#: Where the standard puts storage classes; new ones appear here before our
#: dictionary knows them.
_STORAGE_ROOTS = ("1.2.840.10008.5.1.4.1.1.", "1.2.840.10008.5.1.1.27",
                  "1.2.840.10008.5.1.1.29", "1.2.840.10008.5.1.1.30",
                  "1.2.840.10008.5.1.4.34.7", "1.2.840.10008.5.1.4.38.1",
                  "1.2.840.10008.5.1.4.39.1", "1.2.840.10008.5.1.4.43.1",
                  "1.2.840.10008.5.1.4.44.1", "1.2.840.10008.5.1.4.45.1")  # fmt: skip
_STANDARD_ROOT = "1.2.840.10008."


@cache
def storage_classes() -> tuple[str, ...]:
    """Return the storage SOP classes of the dictionary, retired ones too, sorted."""
    from pydicom._uid_dict import UID_dictionary

    return tuple(
        sorted(
            uid
            for uid, entry in UID_dictionary.items()
            if entry[1] == "SOP Class" and uid.startswith(_STORAGE_ROOTS)
        )
    )


@lru_cache(maxsize=1024)
def is_storage(uid: str) -> bool:
    """Tell whether objects of this SOP class are stored.

    The standard's storage classes, also ones newer than our dictionary, and
    private classes: a class unknown to us is kept as a generic composite object.
    Services, well-known instances and the Media Storage Directory are not.
    """
    if not is_uid(uid) or uid.count(".") < 3:
        return False
    if uid.startswith(_STANDARD_ROOT):
        return uid.startswith(_STORAGE_ROOTS)
    return True
