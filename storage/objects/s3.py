"""Objects in a bucket of any S3 service.

A store that is down must delay only what lives there, and only a little: requests
have a time limit, retries are few, and after a failure the next calls fail at once
for some seconds instead of queueing behind it.
"""

from __future__ import annotations

import hashlib
import io
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import urllib3
from minio import Minio
from minio.error import MinioException, S3Error

from storage.kernel.errors import CorruptData, DependencyDown, NotFound
from storage.kernel.limits import MIB
from storage.kernel.settings import S3
from storage.objects.protocol import ObjectInfo, check_key

#: Parts of an upload; one is held in memory.
PART_BYTES = 16 * MIB
CHUNK = MIB
#: How long calls fail at once after one found the service down.
COOL_SECONDS = 3.0
_DIGEST = "sha256"
_ABSENT = {"NoSuchKey", "NoSuchObject", "NoSuchBucket", "ResourceNotFound"}
_OURS_ALREADY = {"BucketAlreadyOwnedByYou", "BucketAlreadyExists"}


class S3ObjectStore:
    """Objects in one bucket, which is made on first use; safe from any thread.

    The digest travels as user metadata, so that `stat` knows it.

    Parameters
    ----------
    settings : S3
    """

    def __init__(self, settings: S3) -> None:
        self._bucket = settings.bucket
        self._seconds = settings.timeout_seconds
        pool = urllib3.PoolManager(
            timeout=urllib3.Timeout(
                connect=min(self._seconds, 5.0), read=self._seconds
            ),
            maxsize=8,
            cert_reqs="CERT_REQUIRED",
            # Bound: a dead service costs at most two time limits.
            retries=urllib3.Retry(
                connect=1,
                read=1,
                status=2,
                backoff_factor=0.1,
                status_forcelist=[500, 502, 503, 504],
            ),
        )
        self._client = Minio(
            endpoint=settings.endpoint,
            access_key=settings.access_key.get_secret_value(),
            secret_key=settings.secret_key.get_secret_value(),
            secure=settings.secure,
            region=settings.region,
            http_client=pool,
        )
        self._lock = threading.Lock()
        self._has_bucket = False
        self._down_until = 0.0

    def put_file(self, key: str, path: Path, sha256: str) -> ObjectInfo:
        check_key(key)
        size = _length(path)
        with self._answering():
            self._ensure_bucket()
            with path.open("rb") as file:
                body = _Hashing(file)
                self._client.put_object(
                    bucket_name=self._bucket,
                    object_name=key,
                    data=body,  # type: ignore[arg-type]  # only `read` is used
                    length=size,
                    part_size=PART_BYTES if size > PART_BYTES else 0,
                    num_parallel_uploads=1,
                    metadata={_DIGEST: sha256},
                )
        stored = self.stat(key)
        expected = ObjectInfo(key, size, sha256)
        if body.digest() != sha256 or stored != expected:
            self.delete(key)
            raise CorruptData("the object store does not hold what was sent")
        return expected

    def read(self, key: str, offset: int, length: int) -> bytes:
        if length <= 0:
            if self.stat(key) is None:
                raise NotFound("no such object")
            return b""
        check_key(key)
        deadline = time.monotonic() + self._seconds * (1 + length / (8 * MIB))
        with self._answering():
            try:
                response = self._client.get_object(
                    bucket_name=self._bucket,
                    object_name=key,
                    offset=offset,
                    length=length,
                )
            except S3Error as error:
                if error.code in _ABSENT:
                    raise NotFound("no such object") from error
                if error.code == "InvalidRange":
                    return b""
                raise
            try:
                parts = []
                for part in response.stream(CHUNK):
                    parts.append(part)
                    if time.monotonic() > deadline:
                        raise TimeoutError("object store: too slow")
            finally:
                # Never drained: a connection that was slow is not worth keeping.
                if time.monotonic() > deadline:
                    response.close()
                response.release_conn()
        return b"".join(parts)[:length]

    def stat(self, key: str) -> ObjectInfo | None:
        check_key(key)
        with self._answering():
            try:
                found = self._client.stat_object(
                    bucket_name=self._bucket, object_name=key
                )
            except S3Error as error:
                if error.code in _ABSENT:
                    return None
                raise
        kept = {name.lower(): value for name, value in (found.metadata or {}).items()}
        return ObjectInfo(key, found.size or 0, kept.get(f"x-amz-meta-{_DIGEST}", ""))

    def delete(self, key: str) -> None:
        check_key(key)
        with self._answering():
            try:
                self._client.remove_object(bucket_name=self._bucket, object_name=key)
            except S3Error as error:
                if error.code not in _ABSENT:
                    raise

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        with self._answering():
            try:
                for found in self._client.list_objects(
                    bucket_name=self._bucket, prefix=prefix or None, recursive=True
                ):
                    yield ObjectInfo(found.object_name or "", found.size or 0, "")
            except S3Error as error:
                if error.code not in _ABSENT:
                    raise

    def health(self) -> None:
        with self._answering():
            self._ensure_bucket()
            probe = ".health"
            self._client.put_object(
                bucket_name=self._bucket,
                object_name=probe,
                data=io.BytesIO(b"ok"),
                length=2,
            )
            self._client.remove_object(bucket_name=self._bucket, object_name=probe)

    def _ensure_bucket(self) -> None:
        with self._lock:
            if self._has_bucket:
                return
            if not self._client.bucket_exists(bucket_name=self._bucket):
                try:
                    self._client.make_bucket(bucket_name=self._bucket)
                except S3Error as error:
                    if error.code not in _OURS_ALREADY:
                        raise
            self._has_bucket = True

    @contextmanager
    def _answering(self) -> Iterator[None]:
        """Turn every failure into DependencyDown, and remember those of the service."""
        if time.monotonic() < self._down_until:
            raise DependencyDown("object store does not answer")
        try:
            yield
        except S3Error as error:
            if error.code == "NoSuchBucket":
                self._has_bucket = False
            raise DependencyDown(f"object store: {error.code}") from error
        except (MinioException, urllib3.exceptions.HTTPError, OSError) as error:
            self._down_until = time.monotonic() + COOL_SECONDS
            raise DependencyDown("object store does not answer") from error


class _Hashing:
    """A file that is hashed as it is read."""

    def __init__(self, file: io.BufferedReader) -> None:
        self._file = file
        self._sha256 = hashlib.sha256()

    def read(self, size: int = -1) -> bytes:
        data = self._file.read(size)
        self._sha256.update(data)
        return data

    def digest(self) -> str:
        return self._sha256.hexdigest()


def _length(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError as error:
        raise DependencyDown(f"object store: {error.strerror}") from error
