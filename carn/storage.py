"""Storage behind one kind of name: a local path or `s3://bucket/key`.

Reads go by byte range, writes are atomic: a reader sees the old content or the new one, whole.

How an object store is found and what it retries stands in `carn.s3`.
"""

import errno
import functools
import hashlib
import os
import random
import re
import stat as file_stat
import sys
import tempfile
import time
import uuid
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Protocol, runtime_checkable
from urllib.parse import unquote, urlparse

from carn.errors import AccessDeniedError, MissingObjectError, StorageError, UriError
from carn.s3 import (
    MAX_CONCURRENT_REQUESTS,
    error_code,
    get_body,
    s3_client,
    s3_errors,
    split_object,
    split_s3,
)

# Two ranges of an object closer than this become one request: the bytes between cost less than
# another round trip. Small against a JPEG tile (tens of KB), so the excess stays a few percent.
COALESCE_GAP_BYTES = 8 * 1024
# How much of a local file's head and tail its fingerprint covers: hashing a 3 GB slide whole would
# cost more than reading the tiles wanted of it.
FINGERPRINT_BYTES = 64 * 1024
# Of Zarr 3 and 2, with its attributes.
ZARR_METADATA = ("zarr.json", ".zattrs")

# Times a conditional write is sent while others of the same name are under way.
CREATE_ATTEMPTS = 10

# Names that one request lists, and stretches of names that are listed at the same time.
# Source: https://docs.aws.amazon.com/AmazonS3/latest/API/API_ListObjectsV2.html
PAGE = 1000
NUM_LISTING_THREADS = 16
# Ends the hidden name of a file that is being written.
UNFINISHED_SUFFIX = ".carn-part"

# What no name may hold: it would end a line of a log, steer a terminal, or end the name.
CONTROL = re.compile(r"[\x00-\x1f\x7f]")

Range = tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class ObjectStat:
    """What storage says of one file or object, without reading it.

    Attributes:
        uri: its name.
        size: bytes.
        etag: the object store's content tag; None for local files.
        modified: when it was written, in UTC, as `list_objects` finds it; None elsewhere.
    """

    uri: str
    size: int
    etag: str | None
    modified: datetime | None = field(default=None, compare=False)


@runtime_checkable
class ByteSource(Protocol):
    """A file or object open for reading by byte range; safe to share between threads."""

    uri: str
    size: int

    def read_ranges(self, ranges: Sequence[Range]) -> list[bytes]:
        """The bytes of each (start, length); shorter where the object ends before."""

    def close(self) -> None:
        """Give the handle back."""


# ---------------------------------------------------------------------------------------- names


def is_s3(uri: str) -> bool:
    """Whether the name is of an object store."""
    return uri.startswith("s3://")


def normalize(uri: str | Path) -> str:
    """The one spelling of a name: absolute local path without `file://`, or `s3://bucket/key`.

    Raises:
        UriError: another scheme than file or s3, an S3 name without a bucket, or one that went
            through a Path and lost a slash, or one with control characters in it.
    """
    uri = str(uri)
    if CONTROL.search(uri):
        raise UriError(f"{uri!r} holds control characters, such as line breaks; rename it")
    if is_s3(uri):
        if not split_s3(uri)[0]:
            raise UriError(f"{uri!r} names no bucket; write s3://bucket/prefix")
        return uri
    if uri.startswith("s3:"):
        raise UriError(f"{uri!r} has lost a slash; write s3://bucket/prefix, as text, no Path")
    if uri.startswith("file://"):
        return normalize(unquote(urlparse(uri).path) or "/")
    if "://" in uri:
        scheme = uri.split("://", maxsplit=1)[0]
        raise UriError(f"{uri!r}: storage {scheme!r} is not supported; use a path or s3://")
    return str(Path(uri).expanduser().absolute())


def join(uri: str, *parts: str) -> str:
    """The name of something below `uri`."""
    return "/".join([uri.rstrip("/"), *(part.strip("/") for part in parts)])


def is_text(uri: str) -> bool:
    """Whether a name is text. A file's may be any bytes, which no table and no key can hold."""
    try:
        uri.encode()
    except UnicodeEncodeError:
        return False
    return True


def is_below(path: object) -> bool:
    """Whether this is a path that, put below a folder, stays there, and that has one spelling."""
    return isinstance(path, str) and all(part not in ("", ".", "..") for part in path.split("/"))


def name_of(uri: str) -> str:
    """The last component of a name."""
    return uri.rstrip("/").rsplit("/", maxsplit=1)[-1]


def stem_of(uri: str) -> str:
    """The last component without its extension (`a/Tumor_001.tif` -> `Tumor_001`)."""
    return Path(name_of(uri)).stem


# -------------------------------------------------------------------------------------- reading


def stat(uri: str) -> ObjectStat:
    """Size and tag of a file or object.

    Raises:
        MissingObjectError: nothing is there.
        AccessDeniedError: the credentials do not open it.
        StorageError: it is a directory, or storage does not answer.
    """
    if is_zarr(uri):
        return replace(_stat_metadata(uri), uri=uri)
    if is_s3(uri):
        bucket, key = split_object(uri)
        with s3_errors(uri):
            head = s3_client().head_object(Bucket=bucket, Key=key)
        return ObjectStat(uri=uri, size=head["ContentLength"], etag=head["ETag"].strip('"'))
    with local_errors(uri):
        path = Path(uri)
        if path.is_dir():
            raise StorageError(uri, "is a directory; name a file in it")
        found = path.stat()
        # Opening a pipe waits for ever, and a device may have no end.
        if not file_stat.S_ISREG(found.st_mode):
            raise StorageError(uri, "is a pipe, socket or device; name a file")
        return ObjectStat(uri=uri, size=found.st_size, etag=None)


def _stat_metadata(uri: str) -> ObjectStat:
    """Of a Zarr, its root's metadata, which writers of this project write last, stand for it."""
    for name in ZARR_METADATA:
        with suppress(MissingObjectError):
            return stat(join(uri, name))
    raise MissingObjectError(uri, f"no Zarr here: it has no {' or '.join(ZARR_METADATA)}")


def is_zarr(uri: str) -> bool:
    """Whether the name is that of a Zarr: `.zarr`, and no local file."""
    named = uri.rstrip("/").lower().endswith(".zarr")
    return named and (is_s3(uri) or not Path(uri).is_file())


def is_file(uri: str) -> bool:
    """Whether a file, an object or a Zarr (no other directory or prefix) is there."""
    if not is_s3(uri) and not is_zarr(uri):
        return Path(uri).is_file()
    try:
        stat(uri)
    except MissingObjectError:
        return False
    return True


def identity(uri: str) -> str:
    """A short text that changes when the content does: the ETag, or a fingerprint of a local file.

    The fingerprint is a SHA-256 over size, first and last 64 KiB: equal on copies, cheap on slides
    of gigabytes, and changed by truncation or replacement (though not by a byte altered amid).
    """
    return identity_of(stat(uri))


def identity_of(found: ObjectStat) -> str:
    """What `identity` says, of something that has been listed: an object costs no request."""
    if found.etag is not None:
        return f"etag:{found.etag}:{found.size}"
    path = _stat_metadata(found.uri).uri if is_zarr(found.uri) else found.uri
    with local_errors(found.uri), Path(path).open("rb") as file:
        digest = hashlib.sha256(str(found.size).encode())
        digest.update(file.read(FINGERPRINT_BYTES))
        if found.size > FINGERPRINT_BYTES:
            file.seek(max(FINGERPRINT_BYTES, found.size - FINGERPRINT_BYTES))
            digest.update(file.read())
    return f"sha256-ends:{digest.hexdigest()[:32]}:{found.size}"


def content_hash(uri: str, *, max_bytes: int | None = None) -> str:
    """SHA-256 over the whole content, for files small enough to be read for it.

    Raises:
        MissingObjectError, AccessDeniedError, StorageError: as `stat`.
    """
    return f"sha256:{hashlib.sha256(read_bytes(uri, max_bytes=max_bytes)).hexdigest()}"


def list_objects(uri: str) -> list[ObjectStat]:
    """Every file or object below a folder or prefix, at any depth, ordered by name.

    Hidden files (a component below `uri` that starts with a dot) are left out. Links are followed,
    but not to a folder that holds them. A missing folder or an empty prefix
    gives an empty list.

    Raises:
        AccessDeniedError, StorageError: as `stat`.
    """
    if is_s3(uri):
        folder = uri.rstrip("/") + "/"
        return [
            found for found in _list_s3(folder) if "/." not in "/" + found.uri.removeprefix(folder)
        ]
    stats = []
    with local_errors(uri):
        for folder, folders, files in os.walk(uri, followlinks=True, onerror=raise_unless_missing):
            folders[:] = [
                name
                for name in folders
                if not name.startswith(".") and not _leads_back(Path(folder, name))
            ]
            for name in files:
                path = Path(folder, name)
                # Neither a dangling link, nor a pipe, on which a reader would wait, is a file.
                if not name.startswith(".") and path.is_file():
                    with suppress(FileNotFoundError):  # removed while we look
                        stats.append(_local_stat(path))
    return sorted(stats, key=lambda item: item.uri)


def _local_stat(path: Path) -> ObjectStat:
    known = path.stat()
    modified = datetime.fromtimestamp(known.st_mtime, UTC)
    return ObjectStat(uri=str(path), size=known.st_size, etag=None, modified=modified)


def list_prefix(uri: str) -> list[ObjectStat]:
    """Every file or object whose name starts with this text, ordered by name, hidden or not.

    Local folders are not descended into: `a/b.` finds `a/b.1.json`, not `a/b.d/c`.

    Raises:
        AccessDeniedError, StorageError: as `stat`.
    """
    if is_s3(uri):
        return _list_s3(uri)
    folder, _, start = uri.rpartition("/")
    stats = []
    with local_errors(uri), suppress(FileNotFoundError), os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith(start) and entry.is_file():
                with suppress(FileNotFoundError):  # removed while we look
                    size = entry.stat().st_size
                    stats.append(ObjectStat(uri=entry.path, size=size, etag=None))
    return sorted(stats, key=lambda found: found.uri)


def list_among(uri: str, names: Iterable[str]) -> list[ObjectStat]:
    """What lies below an `s3://` prefix from the first to the last of some names, and all between.

    Where the names are many, the stretches between some of them are listed at the same time: a
    listing gives a thousand names a request, and asks for the next thousand only then.

    Args:
        uri: the prefix.
        names: URIs below it. What begins with the last of them is found, too.

    Raises:
        AccessDeniedError, StorageError: as `stat`.
    """
    ordered = sorted(names)
    if not ordered:
        return []
    num_parts = max(1, min(NUM_LISTING_THREADS, len(ordered) // PAGE))
    firsts = [ordered[number * len(ordered) // num_parts] for number in range(num_parts)]
    ends = [*firsts[1:], ordered[-1] + chr(sys.maxunicode)]
    with ThreadPoolExecutor(num_parts) as pool:
        parts = pool.map(lambda first, end: _list_s3(uri, first=first, end=end), firsts, ends)
        return [item for part in parts for item in part]


def _list_s3(uri: str, *, first: str | None = None, end: str | None = None) -> list[ObjectStat]:
    """Objects below a prefix, ordered; from a URI on, and before another, where these are given."""
    bucket, prefix = split_s3(uri)
    found: list[ObjectStat] = []
    # S3 begins after a name: what that of the first begins with comes before it.
    after = {} if first is None else {"StartAfter": split_s3(first)[1][:-1]}
    with s3_errors(uri.rstrip("/")):
        pages = s3_client().get_paginator("list_objects_v2")
        for page in pages.paginate(Bucket=bucket, Prefix=prefix, **after):
            found += (
                ObjectStat(
                    uri=f"s3://{bucket}/{item['Key']}",
                    size=item["Size"],
                    etag=item["ETag"].strip('"'),
                    modified=item["LastModified"].astimezone(UTC),
                )
                for item in page.get("Contents", [])
                if not item["Key"].endswith("/")
            )
            if end is not None and found and found[-1].uri >= end:
                break
    return sorted(
        (
            item
            for item in found
            if (first is None or item.uri >= first) and (end is None or item.uri < end)
        ),
        key=lambda item: item.uri,
    )


def _leads_back(folder: Path) -> bool:
    return folder.is_symlink() and folder.parent.resolve().is_relative_to(folder.resolve())


def read_bytes(uri: str, *, max_bytes: int | None = None) -> bytes:
    """The whole content.

    Args:
        uri: the file or object.
        max_bytes: more is refused before it is read; None for what this project wrote itself.

    Raises:
        MissingObjectError, AccessDeniedError, StorageError: as `stat`; or it is larger.
    """
    if max_bytes is not None and (size := stat(uri).size) > max_bytes:
        raise StorageError(uri, f"has {size} bytes; at most {max_bytes} are read of its kind")
    if is_s3(uri):
        bucket, key = split_object(uri)
        with s3_errors(uri):
            return get_body(Bucket=bucket, Key=key)
    with local_errors(uri):
        return Path(uri).read_bytes()


def open_source(uri: str) -> ByteSource:
    """Open a file or object for reading by byte range.

    Raises:
        MissingObjectError, AccessDeniedError, StorageError: as `stat`.
    """
    return _S3Source(uri) if is_s3(uri) else _LocalSource(uri)


class _LocalSource:
    def __init__(self, uri: str) -> None:
        self.uri = uri
        self.size = stat(uri).size
        with local_errors(uri):
            self._file = Path(uri).open("rb", buffering=0)  # noqa: SIM115 - closed by close()

    def read_ranges(self, ranges: Sequence[Range]) -> list[bytes]:
        descriptor = self._file.fileno()
        with local_errors(self.uri):
            return [os.pread(descriptor, length, start) for start, length in ranges]

    def close(self) -> None:
        self._file.close()


class _S3Source:
    def __init__(self, uri: str) -> None:
        found = stat(uri)
        self.uri = uri
        self.size = found.size
        self._etag = found.etag
        self._bucket, self._key = split_s3(uri)

    def read_ranges(self, ranges: Sequence[Range]) -> list[bytes]:
        spans = coalesce(ranges)
        if len(spans) == 1:
            blocks = [self._get(spans[0])]
        else:
            blocks = list(_request_pool(os.getpid()).map(self._get, spans))
        starts = [start for start, _ in spans]
        parts = []
        for start, length in ranges:
            index = bisect_right(starts, start) - 1
            offset = start - starts[index]
            parts.append(blocks[index][offset : offset + length])
        return parts

    def _get(self, span: Range) -> bytes:
        start, length = span
        end = min(start + length, self.size)
        if start >= end:
            return b""
        with s3_errors(self.uri):
            return get_body(
                Bucket=self._bucket,
                Key=self._key,
                Range=f"bytes={start}-{end - 1}",
                # Bytes of two versions of an object must not be taken for one slide.
                IfMatch=f'"{self._etag}"',
            )

    def close(self) -> None:
        """Nothing is held: requests go over the shared client's connections."""


@functools.lru_cache(maxsize=1)
def _request_pool(_process: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(MAX_CONCURRENT_REQUESTS, thread_name_prefix="storage")


def coalesce(ranges: Sequence[Range], *, gap_bytes: int = COALESCE_GAP_BYTES) -> list[Range]:
    """The fewest (start, length) spans, in order, that cover the ranges and skip larger gaps."""
    spans: list[Range] = []
    for start, length in sorted(ranges):
        if spans and start <= spans[-1][0] + spans[-1][1] + gap_bytes:
            first, covered = spans[-1]
            spans[-1] = (first, max(covered, start + length - first))
        else:
            spans.append((start, length))
    return spans


def download(uri: str, path: Path) -> None:
    """Copy an object to a local path, atomically; its parent must exist.

    Raises:
        MissingObjectError, AccessDeniedError, StorageError: as `stat`, or of the local path.
    """
    bucket, key = split_object(uri)
    with local_errors(str(path)), temporary_beside(path) as temporary:
        with s3_errors(uri):
            s3_client().download_file(bucket, key, str(temporary))
        temporary.replace(path)


# -------------------------------------------------------------------------------------- writing


def write_bytes(uri: str, content: bytes) -> None:
    """Write a whole file or object, atomically, over what was there.

    Raises:
        AccessDeniedError, StorageError: the location cannot be written.
    """
    if is_s3(uri):
        bucket, key = split_object(uri)
        with s3_errors(uri):
            s3_client().put_object(Bucket=bucket, Key=key, Body=content)
        return
    path = Path(uri)
    with local_errors(uri):
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary_beside(path) as temporary:
            write_durably(temporary, content)
            temporary.replace(path)


def write_durably(path: Path, content: bytes) -> None:
    """Write a local file; the disk has it on return."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def create_bytes(uri: str, content: bytes) -> bool:
    """Write a whole file or object, atomically, only if nothing is there; whether we did.

    Of any number of racers one gets True. A request whose answer was lost is known as ours by its
    content, so racers put something unique into theirs.

    Raises:
        AccessDeniedError, StorageError: the location cannot be written.

    Source: https://docs.aws.amazon.com/AmazonS3/latest/userguide/conditional-writes.html
    """
    return _create_object(uri, content) if is_s3(uri) else _create_file(uri, content)


def check_creates(folder: str) -> None:
    """Make sure that of several writers of one name storage lets one win, by trying it.

    Args:
        folder: folder or prefix; what is written there for the trial is removed.

    Raises:
        StorageError: it cannot be written, or does not do that: two runs would do the same work.
    """
    uri = join(folder, f"probe-{uuid.uuid4().hex}")
    try:
        if not create_bytes(uri, b"first"):
            raise StorageError(uri, "cannot be created, though nothing was there")
        if create_bytes(uri, b"second"):
            raise StorageError(
                folder,
                "the store overwrites what should only be written where nothing is (it passes over "
                "If-None-Match), so that runs could not tell whose work a slide is; take a store "
                "that knows conditional writes",
            )
    except StorageError as error:
        if error_code(error) not in ("NotImplemented", "InvalidArgument", "MethodNotAllowed"):
            raise
        raise StorageError(
            folder,
            f"the store refuses conditional writes (If-None-Match: {error_code(error)}), by which "
            "runs claim slides; take one that knows them",
        ) from error
    finally:
        with suppress(StorageError):
            delete([uri])


def _create_object(uri: str, content: bytes) -> bool:
    bucket, key = split_object(uri)
    for attempt in range(1, CREATE_ATTEMPTS + 1):
        try:
            with s3_errors(uri):
                s3_client().put_object(Bucket=bucket, Key=key, Body=content, IfNoneMatch="*")
            return True
        except StorageError as error:
            code = error_code(error)
            if code in ("PreconditionFailed", "412"):  # the latter where its answer broke off
                break
            # Others write it at this moment: who won shows when they are done.
            if code != "ConditionalRequestConflict" or attempt == CREATE_ATTEMPTS:
                raise
            time.sleep(random.uniform(0, 0.1 * attempt))
    try:
        return read_bytes(uri) == content
    except MissingObjectError:
        return False


def _create_file(uri: str, content: bytes) -> bool:
    path = Path(uri)
    with local_errors(uri):
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary_beside(path) as temporary:
            write_durably(temporary, content)
            try:
                os.link(temporary, path)
            except FileExistsError:
                # A network file system that lost its answer says so of our own link, too.
                return temporary.stat().st_nlink > 1
            except OSError as error:
                if error.errno not in (errno.EPERM, errno.EOPNOTSUPP):
                    raise
                reason = "its file system has no hard links, which make one winner of many"
                raise StorageError(uri, f"{reason}; name a folder on another") from error
    return True


def delete(uris: Sequence[str]) -> None:
    """Remove files or objects; those that are not there count as removed.

    Raises:
        AccessDeniedError, StorageError: something could not be removed.
    """
    for uri in uris:
        if is_s3(uri):
            bucket, key = split_object(uri)
            with s3_errors(uri):
                s3_client().delete_object(Bucket=bucket, Key=key)
        else:
            with local_errors(uri):
                Path(uri).unlink(missing_ok=True)


def delete_below(uri: str) -> None:
    """Remove every file or object below a folder or prefix, and the folders left empty by that."""
    delete([item.uri for item in list_objects(uri)])
    if not is_s3(uri) and Path(uri).is_dir():
        for folder, _, _ in os.walk(uri, topdown=False):
            if "/." not in folder.removeprefix(uri):  # an upload under way may be empty yet
                with suppress(OSError):  # not empty: a hidden file is not ours to remove
                    Path(folder).rmdir()


def delete_unfinished(uri: str) -> None:
    """Remove the half-written files that killed processes left below a folder.

    To be called when nobody writes there. Object stores hold no such files.

    Raises:
        AccessDeniedError, StorageError: something could not be removed.
    """
    if is_s3(uri):
        return
    with local_errors(uri):
        for path in Path(uri).rglob(f".*{UNFINISHED_SUFFIX}"):
            path.unlink(missing_ok=True)


@contextmanager
def temporary_beside(path: Path) -> Iterator[Path]:
    """A new hidden file beside `path`, to be renamed to it; removed where that did not happen."""
    # Beside the target, so that the rename stays on one file system; hidden, so that no listing
    # takes a half-written file of a killed process for a whole one.
    descriptor, name = tempfile.mkstemp(
        dir=path.parent, prefix=f".{path.name}.", suffix=UNFINISHED_SUFFIX
    )
    os.close(descriptor)
    temporary = Path(name)
    temporary.chmod(0o666 & ~_umask())
    try:
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


@functools.cache
def _umask() -> int:
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


# --------------------------------------------------------------------------------------- errors


@contextmanager
def local_errors(uri: str) -> Iterator[None]:
    """Turn what the file system raises into errors that name the file.

    Raises:
        MissingObjectError, AccessDeniedError, StorageError: instead of OSError.
    """
    try:
        yield
    except FileNotFoundError as error:
        raise MissingObjectError(uri, "no such file") from error
    except PermissionError as error:
        raise AccessDeniedError(
            uri, "permission denied: check the file's owner and mode"
        ) from error
    except OSError as error:
        raise StorageError(uri, error.strerror or str(error)) from error


def raise_unless_missing(error: OSError) -> None:
    """What `os.walk` is to do with an error: a folder that is not there holds nothing."""
    if not isinstance(error, FileNotFoundError):
        raise error
