"""One file or object written in parts by any number of processes, seen by nobody until it is whole.

S3: a multipart upload. Local folders: part files in a hidden folder beside the target, which
`complete` joins beside the target and renames. A part is replaced by writing its number again.

Source: https://docs.aws.amazon.com/AmazonS3/latest/userguide/mpuoverview.html
"""

import base64
import hashlib
import os
import re
import secrets
import shutil
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from io import FileIO
from pathlib import Path

from carn import storage
from carn.errors import (
    ExtraPartError,
    MissingObjectError,
    StalePartError,
    StorageError,
    UploadGoneError,
)
from carn.s3 import error_code, s3_client, s3_errors, split_object, split_s3
from carn.storage import ObjectStat

# Every part of an object on S3 but the last is at least this large; local parts may be smaller.
# Source: https://docs.aws.amazon.com/AmazonS3/latest/userguide/qfacts.html
MIN_PART_BYTES = 5 * 2**20
MAX_PARTS = 10_000

# Ends the hidden name of a folder of part files.
UPLOAD_SUFFIX = ".carn-upload"
_STARTED = "%Y%m%dT%H%M%S%f"
_ABORTED = "-aborted"
_FOLDER = re.compile(rf"\.(.+)\.(\d{{8}}T\d{{12}}Z-[0-9a-f]{{12}}(?:{_ABORTED})?){UPLOAD_SUFFIX}")
_PART = re.compile(r"(\d{5})\.([0-9a-f]{32})\.(\d+)")
_COPY_BYTES = 16 * 2**20


@dataclass(frozen=True, kw_only=True)
class Part:
    """One part as storage has it.

    Attributes:
        number: 1 to MAX_PARTS; parts are joined in this order, and numbers may be left out.
        etag: what storage calls its content: the MD5 in hex, except in buckets with a KMS key.
        size: bytes.
    """

    number: int
    etag: str
    size: int


@dataclass(frozen=True, kw_only=True)
class UploadInfo:
    """An upload that is neither completed nor aborted.

    Attributes:
        uri: what it will be.
        upload_id: what names it to the other functions.
        started: when, in UTC, by the clock of the store or the machine that began it.
    """

    uri: str
    upload_id: str
    started: datetime


def begin(uri: str) -> str:
    """Start an upload; returns its id. Any number may be under way for one name.

    Where the answer to the request is lost a second upload is started: `list_uploads` finds the
    other.

    Raises:
        AccessDeniedError, StorageError: the location cannot be written.
    """
    if storage.is_s3(uri):
        bucket, key = split_object(uri)
        with s3_errors(uri):
            answer = s3_client().create_multipart_upload(Bucket=bucket, Key=key)
        return str(answer["UploadId"])
    upload_id = f"{datetime.now(UTC):{_STARTED}}Z-{secrets.token_hex(6)}"
    with storage.local_errors(uri):
        _folder_of(uri, upload_id).mkdir(parents=True)
    return upload_id


def put_part(uri: str, upload_id: str, number: int, content: bytes) -> Part:
    """Write one part, in place of the one that has this number. The store checks its MD5.

    Raises:
        ValueError: the number is not one of 1 to MAX_PARTS.
        UploadGoneError: the upload was completed or aborted.
        AccessDeniedError, StorageError: the part cannot be written; nothing else is lost by that.
    """
    if not 1 <= number <= MAX_PARTS:
        raise ValueError(f"part number {number} of {uri}: must be 1 to {MAX_PARTS:,}")
    digest = hashlib.md5(content, usedforsecurity=False)
    if not storage.is_s3(uri):
        part = Part(number=number, etag=digest.hexdigest(), size=len(content))
        _put_file(uri, upload_id, part, content)
        return part
    bucket, key = split_object(uri)
    with _upload_errors(uri, upload_id):
        answer = s3_client().upload_part(
            Bucket=bucket,
            Key=key,
            UploadId=upload_id,
            PartNumber=number,
            Body=content,
            ContentMD5=base64.b64encode(digest.digest()).decode(),
        )
    if "ETag" not in answer:  # Python takes an answer cut within its headers for a whole one
        raise StorageError(uri, f"the answer to part {number} broke off; write the part again")
    return Part(number=number, etag=answer["ETag"].strip('"'), size=len(content))


def list_parts(uri: str, upload_id: str) -> dict[int, Part]:
    """The parts that storage has, by number.

    Raises:
        UploadGoneError: the upload was completed or aborted.
        AccessDeniedError, StorageError: storage does not answer.
    """
    if not storage.is_s3(uri):
        return _list_files(uri, upload_id)
    bucket, key = split_object(uri)
    with _upload_errors(uri, upload_id):
        pages = s3_client().get_paginator("list_parts")
        return {
            item["PartNumber"]: Part(
                number=item["PartNumber"], etag=item["ETag"].strip('"'), size=item["Size"]
            )
            for page in pages.paginate(Bucket=bucket, Key=key, UploadId=upload_id)
            for item in page.get("Parts", [])
        }


def complete(uri: str, upload_id: str, parts: Sequence[Part]) -> ObjectStat:
    """Join these parts, in the order of their numbers: the object appears, whole, in one step.

    An upload that has been completed with these very parts (its answer was lost, or its process
    killed) counts as completed by this call. Parts of the upload that are not given are dropped,
    except by Ceph, which joins all or none. A local folder needs room for the parts twice while
    they are joined.

    Raises:
        ValueError: no parts, or two of one number.
        ExtraPartError: the upload has other parts as well, and the store is Ceph.
        StalePartError: storage has not all of these parts, or has others of their number.
        UploadGoneError: the upload was aborted, or completed with other parts.
        AccessDeniedError, StorageError: storage refuses; the parts are kept.
    """
    parts = sorted(parts, key=lambda part: part.number)
    if len({part.number for part in parts}) != len(parts) or not parts:
        raise ValueError(f"{uri}: needs at least one part, and one of each number")
    try:
        there = list_parts(uri, upload_id)
        stale = tuple(part.number for part in parts if there.get(part.number) != part)
        if stale:
            raise StalePartError(uri, stale)
        join = _join_object if storage.is_s3(uri) else _join_files
        join(uri, upload_id, parts)
    except (UploadGoneError, StalePartError):
        if not _is_completed(uri, parts):
            raise
    if not storage.is_s3(uri):
        with suppress(StorageError):  # part files that cannot be removed undo nothing
            abort(uri, upload_id)
    # Asked for, as Ceph's answer to a completion has no tag.
    return storage.stat(uri)


def abort(uri: str, upload_id: str) -> None:
    """Drop an upload and its parts; one that is gone counts as dropped.

    A part whose writing is under way meanwhile may stay on S3: abort again when all writers ended.

    Raises:
        AccessDeniedError, StorageError: it could not be dropped.
    """
    if storage.is_s3(uri):
        bucket, key = split_object(uri)
        with suppress(UploadGoneError), _upload_errors(uri, upload_id):
            s3_client().abort_multipart_upload(Bucket=bucket, Key=key, UploadId=upload_id)
        return
    folder = _folder_of(uri, upload_id)
    with storage.local_errors(uri), suppress(FileNotFoundError):
        if not upload_id.endswith(_ABORTED):
            # Under another name first: who still writes parts finds the upload gone.
            folder = folder.rename(_folder_of(uri, upload_id + _ABORTED))
        shutil.rmtree(folder)


def list_uploads(prefix_uri: str) -> list[UploadInfo]:
    """The uploads under way below a folder or prefix, at any depth, the oldest first.

    Raises:
        AccessDeniedError, StorageError: storage does not answer.
    """
    list_below = _list_multipart if storage.is_s3(prefix_uri) else _list_folders
    found = list_below(prefix_uri)
    return sorted(found, key=lambda upload: (upload.started, upload.uri, upload.upload_id))


def check_parts(folder: str) -> None:
    """Make sure that a store takes parts of different lengths, by trying it: 10 MB are sent.

    AWS does, and so do disks, of which neither is asked. Cloudflare's R2 does not
    (https://developers.cloudflare.com/r2/objects/upload-objects/).

    Args:
        folder: folder or prefix; what is written there for the trial is removed.

    Raises:
        StorageError: it does not, or cannot be written.
    """
    if not storage.is_s3(folder) or ".amazonaws.com" in str(s3_client().meta.endpoint_url):
        return
    uri = storage.join(folder, f"probe-{secrets.token_hex(16)}")
    upload_id = begin(uri)
    lengths = (MIN_PART_BYTES, MIN_PART_BYTES + 1, 1)
    try:
        parts = [put_part(uri, upload_id, n + 1, bytes(size)) for n, size in enumerate(lengths)]
        complete(uri, upload_id, parts)
    except (StalePartError, ExtraPartError) as error:
        raise StorageError(
            folder,
            "the store takes an object only in parts of one length, and those of a slide are as "
            "long as their blocks came out; write OME-Zarr (--container ome-zarr), or to another "
            "store",
        ) from error
    finally:
        with suppress(StorageError):
            abort(uri, upload_id)
        with suppress(StorageError):
            storage.delete([uri])


# ------------------------------------------------------------------------------- object storage


@contextmanager
def _upload_errors(uri: str, upload_id: str) -> Iterator[None]:
    try:
        with s3_errors(uri):
            yield
    except StorageError as error:
        if error_code(error) in ("NoSuchUpload", "NoSuchKey"):  # the latter is Ceph's word
            raise _gone(uri, upload_id) from error
        raise


def _gone(uri: str, upload_id: str) -> UploadGoneError:
    return UploadGoneError(
        uri, f"the upload {upload_id} was completed or aborted; begin another to write it anew"
    )


def _join_object(uri: str, upload_id: str, parts: Sequence[Part]) -> None:
    bucket, key = split_object(uri)
    named = [{"PartNumber": part.number, "ETag": f'"{part.etag}"'} for part in parts]
    try:
        with _upload_errors(uri, upload_id):
            s3_client().complete_multipart_upload(
                Bucket=bucket, Key=key, UploadId=upload_id, MultipartUpload={"Parts": named}
            )
    except StorageError as error:
        code = error_code(error)
        if code == "InvalidPart":
            raise _invalid_part(uri, upload_id, parts) from error
        if code == "EntityTooSmall":
            small = [part.number for part in parts[:-1] if part.size < MIN_PART_BYTES]
            reason = f"parts {small[:20]} are smaller than {MIN_PART_BYTES:,} bytes"
            raise StorageError(uri, f"{reason}, as only the last may be") from error
        raise


def _invalid_part(uri: str, upload_id: str, parts: Sequence[Part]) -> StorageError:
    there = list_parts(uri, upload_id)
    stale = tuple(part.number for part in parts if there.get(part.number) != part)
    others = sorted(there.keys() - {part.number for part in parts})
    if others and not stale:
        return ExtraPartError(uri, tuple(others))
    return StalePartError(uri, stale or tuple(part.number for part in parts))


def _list_multipart(prefix_uri: str) -> list[UploadInfo]:
    bucket, prefix = split_s3(prefix_uri.rstrip("/") + "/")
    with s3_errors(prefix_uri):
        pages = s3_client().get_paginator("list_multipart_uploads")
        return [
            UploadInfo(
                uri=f"s3://{bucket}/{item['Key']}",
                upload_id=item["UploadId"],
                started=item["Initiated"].astimezone(UTC),
            )
            for page in pages.paginate(Bucket=bucket, Prefix=prefix)
            for item in page.get("Uploads", [])
        ]


def _is_completed(uri: str, parts: Sequence[Part]) -> bool:
    """Whether what is there now is these parts, joined."""
    size = sum(part.size for part in parts)
    try:
        found = storage.stat(uri)
        if found.size != size:
            return False
        if found.etag is not None:
            return found.etag == multipart_etag(parts)
        with storage.local_errors(uri), Path(uri).open("rb") as file:
            return all(
                hashlib.md5(file.read(part.size), usedforsecurity=False).hexdigest() == part.etag
                for part in parts
            )
    except MissingObjectError:
        return False


def multipart_etag(parts: Sequence[Part]) -> str | None:
    """The tag of an object joined from these parts; None where theirs are no MD5s (KMS keys).

    Source: https://docs.aws.amazon.com/AmazonS3/latest/userguide/checking-object-integrity.html
    """
    try:
        digests = b"".join(bytes.fromhex(part.etag) for part in parts)
    except ValueError:
        return None
    return f"{hashlib.md5(digests, usedforsecurity=False).hexdigest()}-{len(parts)}"


# -------------------------------------------------------------------------------- local folders


def _folder_of(uri: str, upload_id: str) -> Path:
    path = Path(uri)
    return path.with_name(f".{path.name}.{upload_id}{UPLOAD_SUFFIX}")


def _file_name(part: Part) -> str:
    return f"{part.number:05d}.{part.etag}.{part.size}"


def _put_file(uri: str, upload_id: str, part: Part, content: bytes) -> None:
    path = _folder_of(uri, upload_id) / _file_name(part)
    try:
        with storage.local_errors(uri), storage.temporary_beside(path) as temporary:
            storage.write_durably(temporary, content)
            now = time.time_ns()  # of two files of one number the one finished later counts
            os.utime(temporary, ns=(now, now))
            temporary.replace(path)
    except MissingObjectError as error:
        raise _gone(uri, upload_id) from error


def _list_files(uri: str, upload_id: str) -> dict[int, Part]:
    folder = _folder_of(uri, upload_id)
    versions: dict[int, list[Part]] = defaultdict(list)
    try:
        with storage.local_errors(uri):
            names = [path.name for path in folder.iterdir()]
    except MissingObjectError as error:
        raise _gone(uri, upload_id) from error
    for name in names:
        if match := _PART.fullmatch(name):
            number, etag, size = match.groups()
            versions[int(number)].append(Part(number=int(number), etag=etag, size=int(size)))
    return {number: _newest(folder, versions[number]) for number in sorted(versions)}


def _newest(folder: Path, versions: list[Part]) -> Part:
    if len(versions) == 1:
        return versions[0]

    def finished(part: Part) -> tuple[int, str]:
        try:
            return (folder / _file_name(part)).stat().st_mtime_ns, part.etag
        except FileNotFoundError:  # removed by another who lists
            return 0, part.etag

    *older, newest = sorted(versions, key=finished)
    for part in older:
        (folder / _file_name(part)).unlink(missing_ok=True)
    return newest


def _join_files(uri: str, upload_id: str, parts: Sequence[Part]) -> None:
    folder = _folder_of(uri, upload_id)
    try:
        # Among the parts: what a killed process leaves goes with them.
        with storage.local_errors(uri), storage.temporary_beside(folder / "joined") as temporary:
            with temporary.open("wb", buffering=0) as target:
                for part in parts:
                    try:
                        copied = _append(folder / _file_name(part), target)
                    except FileNotFoundError as error:
                        raise StalePartError(uri, (part.number,)) from error
                    if copied != part.size:
                        raise StalePartError(uri, (part.number,))
                os.fsync(target.fileno())
            temporary.replace(uri)
    except MissingObjectError as error:
        raise _gone(uri, upload_id) from error


def _append(path: Path, target: FileIO) -> int:
    start = target.tell()
    with path.open("rb", buffering=0) as source:
        try:
            # A network file system that knows this call moves no bytes through this machine.
            while os.copy_file_range(source.fileno(), target.fileno(), 2**30):
                pass
        except (AttributeError, OSError):
            # Not known here, or a real failure, which then shows again.
            shutil.copyfileobj(source, target, _COPY_BYTES)
    return target.tell() - start


def _list_folders(root: str) -> list[UploadInfo]:
    found = []
    with storage.local_errors(root):
        for folder, folders, _ in os.walk(root, onerror=storage.raise_unless_missing):
            matches = {name: _FOLDER.fullmatch(name) for name in folders}
            folders[:] = [name for name, match in matches.items() if match is None]
            for match in matches.values():
                if match:
                    name, upload_id = match.groups()
                    started = datetime.strptime(upload_id.partition("Z")[0], _STARTED)
                    found.append(
                        UploadInfo(
                            uri=str(Path(folder, name)),
                            upload_id=upload_id,
                            started=started.replace(tzinfo=UTC),
                        )
                    )
    return found
