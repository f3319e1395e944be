"""Reading stored objects from their packs, and seeing that they are what was stored.

A reader that loses its pack (sealed, rewritten, deleted meanwhile) looks the location
up once more.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator

from crc32c import crc32c

from pacs.domain.study import StoredInstance
from pacs.repository import locate
from pacs.services.sources import CHUNK
from storage.db.engine import Database
from storage.kernel.errors import CorruptData, Gone
from storage.kernel.limits import MIB
from storage.packs.format import TRAILER_LENGTH, decode_trailer
from storage.packs.reader import PackGone, PackReader

log = logging.getLogger(__name__)

#: Whole objects up to this are checked before their first byte leaves.
AT_ONCE = 4 * MIB


class StoredObjects:
    """Reads objects, whole or in part.

    Whole objects are compared with the checksum behind them in the pack: short ones
    before anything of them is handed on, long ones before their last bytes are, so
    that whoever gets them never gets all of a damaged one. Ranges are not checked:
    that would cost reading the object.

    Parameters
    ----------
    database : Database
    reader : PackReader
    on_corrupt : callable, optional
        Called when an object is found damaged.
    """

    def __init__(
        self,
        database: Database,
        reader: PackReader,
        on_corrupt: Callable[[], None] | None = None,
    ) -> None:
        self._database = database
        self._reader = reader
        self._on_corrupt = on_corrupt

    def read(self, instance: StoredInstance, offset: int, length: int) -> bytes:
        """Return a range of the Part-10 object exactly as stored, unchecked."""
        return self._read(
            instance, offset, max(0, min(length, instance.object_length - offset))
        )

    def whole(self, instance: StoredInstance, start: int = 0) -> memoryview:
        """Return the object from `start` to its end.

        Raises
        ------
        CorruptData
        """
        length = instance.object_length
        data = memoryview(self._read_to_end(instance, 0))
        self._check(instance, crc32c(data[:length]), data[length:])
        return data[start:length]

    def dataset(self, instance: StoredInstance) -> memoryview:
        """Return the data set without File Meta.

        Raises
        ------
        CorruptData
        """
        return self.whole(instance, instance.dataset_offset)

    def chunks(self, instance: StoredInstance, start: int = 0) -> Iterator[bytes]:
        """Yield the object from `start` to its end, at most 1 MiB at a time.

        Raises
        ------
        CorruptData
            At first if the object is short, else instead of the last chunk.
        """
        if instance.object_length <= AT_ONCE:
            data = self.whole(instance, start)
            for begin in range(0, len(data), CHUNK):
                yield bytes(data[begin : begin + CHUNK])
            return
        crc = offset = 0
        while offset + CHUNK < instance.object_length:
            chunk = self._read(instance, offset, CHUNK)
            crc = crc32c(chunk, crc)
            # The data set begins within the first.
            yield chunk[start:] if offset == 0 else chunk
            offset += CHUNK
        data = memoryview(self._read_to_end(instance, offset))
        length = instance.object_length - offset
        self._check(instance, crc32c(data[:length], crc), data[length:])
        yield bytes(data[:length])

    def _read_to_end(self, instance: StoredInstance, offset: int) -> bytes:
        """Return the rest of the object together with the trailer behind it."""
        length = instance.object_length + TRAILER_LENGTH - offset
        try:
            return self._read(instance, offset, length)
        except CorruptData:
            self._report(instance)
            raise

    def _read(self, instance: StoredInstance, offset: int, length: int) -> bytes:
        try:
            return self._read_here(instance, offset, length)
        except PackGone:
            return self._read_here(self._again(instance), offset, length)

    def _read_here(self, instance: StoredInstance, offset: int, length: int) -> bytes:
        return self._reader.read(
            instance.pack_key, instance.object_offset + offset, length
        )

    def _again(self, instance: StoredInstance) -> StoredInstance:
        with self._database.read() as connection:
            found = locate.again(connection, instance)
        if found is None:
            raise Gone("deleted while being read")
        return found

    def _check(self, instance: StoredInstance, crc: int, trailer: memoryview) -> None:
        if decode_trailer(trailer) != (crc, instance.object_length, instance.digest):
            self._report(instance)
            raise CorruptData("the stored object fails its checksum")

    def _report(self, instance: StoredInstance) -> None:
        log.error(
            "a stored object fails its checksum",
            extra={
                "event": "object.corrupt",
                "pack": instance.pack_key,
                "offset": instance.object_offset,
            },
        )
        if self._on_corrupt is not None:
            self._on_corrupt()
