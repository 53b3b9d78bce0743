"""Find the slides below a folder or prefix."""

import fnmatch
import logging
import re
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from carn import storage
from carn.errors import MissingObjectError, StorageError
from carn.storage import ObjectStat

logger = logging.getLogger(__name__)

# What OpenSlide names as its formats (https://openslide.org/formats/), other names of TIFF, and
# slides that nothing here reads: better named as failed than passed over. A name only proposes:
# what a file is gets decided by its content, when it is opened.
SLIDE_SUFFIXES = (
    *(".tif", ".tiff", ".svs", ".ndpi", ".mrxs", ".scn", ".bif", ".dcm", ".vms", ".vmu", ".czi"),
    *(".svslide", ".ptif", ".ptiff", ".btf", ".tf2", ".tf8", ".qptiff", ".isyntax", ".i2syntax"),
    ".zarr",
)
# A part of a name that is a Zarr's folder.
_ZARR_FOLDER = re.compile(r"^.*?\.zarr(?=/)", re.IGNORECASE)
# A DICOM file begins with 128 bytes of anything and this (DICOM PS3.10, section 7.1).
DICOM_MAGIC = b"DICM"
DICOM_MAGIC_AT = 128
# Suffixes of left-out files that are told.
MAX_SUFFIXES_TOLD = 8
# What makes a name a pattern.
GLOB = re.compile(r"[*?\[]")
# Where a DICOM header of an ordinary slide names its series: well within its first kilobytes.
DICOM_HEADER_BYTES = 16 * 1024
# Headers asked for at once: over S3 each is a round trip of tens of milliseconds.
NUM_HEADER_THREADS = 16
# Tag (0020,000E) SeriesInstanceUID in explicit little endian, the transfer syntax of image files
# (DICOM PS3.5 section 7.1.2): group, element, "UI", 2-byte length, value.
SERIES_UID = re.compile(rb"\x20\x00\x0e\x00UI(..)([0-9.]+)", re.DOTALL)


def list_slides(roots: Sequence[str]) -> list[str]:
    """The URIs of `find_slides`."""
    return [found.uri for found in find_slides(roots)]


def find_slides(roots: Sequence[str]) -> list[ObjectStat]:
    """The slides below folders or prefixes, that match, or named one by one, by URI and distinct.

    Files are proposed by their suffix; those without one, or with a number for one, are where they
    are DICOM by content. How many others there are is told in the log. Of the files of one DICOM
    series, which are one slide, the first by name stands for all. Object storage tells sizes and
    tags with the names, a thousand a request.

    Raises:
        MissingObjectError: a root is neither a file nor a folder or prefix with anything in it, or
            a pattern that no slide matches.
        StorageError: storage does not answer.
    """
    found: dict[str, ObjectStat] = {}
    for given in roots:
        root = storage.normalize(given)
        if root.lower().endswith(SLIDE_SUFFIXES) and storage.is_file(root):
            found[root] = storage.stat(root)
            continue
        if (folder := searched_folder(root)) is not None:
            matching = find_matching(root, folder, SLIDE_SUFFIXES)
            found.update((item.uri, item) for item in matching)
            continue
        if storage.is_zarr(root):  # and not finished: its chunks are no slides
            storage.stat(root)
        below = _with_zarrs(root, storage.list_objects(root))
        if not below:
            raise MissingObjectError(root, "no file here, and no folder or prefix with files in it")
        proposed = [item for item in below if item.uri.lower().endswith(SLIDE_SUFFIXES)]
        proposed += _nameless_dicom(below)
        found.update((item.uri, item) for item in proposed)
        _tell_left_out(root, [item for item in below if item.uri not in found])
    return [found[uri] for uri in _one_per_dicom_series(sorted(found))]


def pattern_folder(uri: str) -> str | None:
    """The folder before the first wildcard of a name; None where the name is no pattern.

    A name with wildcards in it that a local file or folder has, as it stands, is that of the file.
    """
    wildcard = GLOB.search(uri)
    if wildcard is None or (not storage.is_s3(uri) and Path(uri).exists()):
        return None
    return uri[: wildcard.start()].rpartition("/")[0]


def searched_folder(uri: str) -> str | None:
    """As `pattern_folder`, for names on object storage as well, which is asked.

    Raises:
        StorageError: storage does not answer.
    """
    folder = pattern_folder(uri)
    is_key = folder is not None and storage.is_s3(uri) and "[" in uri
    return None if is_key and (storage.is_file(uri) or storage.list_objects(uri)) else folder


def find_matching(pattern: str, folder: str, suffixes: Sequence[str]) -> list[ObjectStat]:
    """The files that match a pattern.

    Args:
        pattern: a name with `*`, `?` or `[...]` in it; `*` stays within a folder.
        folder: its `pattern_folder`.
        suffixes: what files end with, in lower case.

    Raises:
        MissingObjectError: none matches.
        StorageError: storage does not answer.
    """
    found = [
        item
        for item in _with_zarrs(folder, storage.list_objects(folder))
        if _matches(item.uri, pattern) and item.uri.lower().endswith(tuple(suffixes))
    ]
    if not found:
        raise MissingObjectError(
            pattern, f"matches nothing that ends with one of {', '.join(suffixes)}"
        )
    return found


def _matches(uri: str, pattern: str) -> bool:
    """Whether each part of a name matches that of the pattern."""
    parts, wanted = uri.split("/"), pattern.split("/")
    return len(parts) == len(wanted) and all(map(fnmatch.fnmatchcase, parts, wanted))


def _with_zarrs(root: str, items: Sequence[ObjectStat]) -> list[ObjectStat]:
    """What is listed, with each folder that is a Zarr for all that is in it.

    One without metadata, which is being written, is no slide and left out.
    """
    base = root.rstrip("/") + "/"
    kept, zarrs = [], set()
    for item in items:
        found = _ZARR_FOLDER.match(item.uri.removeprefix(base))
        if found is None:
            kept.append(item)
        else:
            zarrs.add(base + found.group(0))

    def stat(uri: str) -> ObjectStat | None:
        try:
            return storage.stat(uri)
        except MissingObjectError:
            logger.info("%s is left out: its metadata are not there (yet)", uri)
            return None
        except StorageError:  # which says why when it is opened
            return ObjectStat(uri=uri, size=0, etag=None)

    with ThreadPoolExecutor(NUM_HEADER_THREADS) as pool:
        kept += [item for item in pool.map(stat, sorted(zarrs)) if item is not None]
    return sorted(kept, key=lambda item: item.uri)


def _nameless_dicom(below: Sequence[ObjectStat]) -> list[ObjectStat]:
    """Files without a suffix, or with a number for one as UIDs have, that are DICOM by content."""
    nameless = [
        item
        for item in below
        if _is_nameless(storage.name_of(item.uri)) and item.size > DICOM_MAGIC_AT
    ]
    with ThreadPoolExecutor(NUM_HEADER_THREADS) as pool:
        verdicts = list(pool.map(lambda item: DICOM_MAGIC in _head_of(item.uri)[128:132], nameless))
    return [item for item, is_dicom in zip(nameless, verdicts, strict=True) if is_dicom]


def _is_nameless(name: str) -> bool:
    suffix = Path(name).suffix
    return not suffix or suffix[1:].isdigit()


def _tell_left_out(root: str, items: Sequence[ObjectStat]) -> None:
    if not items:
        return
    suffixes = Counter(Path(item.uri).suffix.lower() or "without a suffix" for item in items)
    told = [f"{number} {name}" for name, number in suffixes.most_common(MAX_SUFFIXES_TOLD)]
    more = len(suffixes) - len(told)
    listed = ", ".join(told) + (f" and {more} other kinds" if more else "")
    logger.info(
        "%s: %d files are left out, for they are not named as slides: %s",
        *(root, len(items), listed),
    )


def files_of_series(uri: str) -> list[ObjectStat]:
    """The other files of a DICOM file's series in its folder; none of what is no DICOM.

    Raises:
        StorageError: the folder cannot be listed.
    """
    series = _series_uid(uri) if is_dicom_name(uri) else None
    if series is None:
        return []
    folder = uri.rsplit("/", maxsplit=1)[0]
    beside = [
        item
        for item in storage.list_objects(folder)
        if item.uri != uri and item.uri.rsplit("/", maxsplit=1)[0] == folder
    ]
    named = [item for item in beside if is_dicom_name(item.uri)]
    with ThreadPoolExecutor(NUM_HEADER_THREADS) as pool:
        uids = list(pool.map(_series_uid, [item.uri for item in named]))
    return [item for item, uid in zip(named, uids, strict=True) if uid == series]


def _one_per_dicom_series(uris: list[str]) -> list[str]:
    dicom = [uri for uri in uris if is_dicom_name(uri)]
    with ThreadPoolExecutor(NUM_HEADER_THREADS) as pool:
        uids = dict(zip(dicom, pool.map(_series_uid, dicom), strict=True))
    kept, series = [], set()
    for uri in uris:
        if (uid := uids.get(uri)) is not None:
            if uid in series:
                continue
            series.add(uid)
        kept.append(uri)
    if len(kept) < len(uris):
        logger.info("%d DICOM files make up %d slides", len(dicom), sum(map(is_dicom_name, kept)))
    return kept


def is_dicom_name(uri: str) -> bool:
    """Whether a file may be DICOM by its name: `.dcm`, none of a suffix, or a UID's number."""
    name = storage.name_of(uri)
    return Path(name).suffix.lower() == ".dcm" or _is_nameless(name)


def _series_uid(uri: str) -> bytes | None:
    found = SERIES_UID.search(_head_of(uri))
    return found.group(2) if found else None


def _head_of(uri: str) -> bytes:
    """The first kilobytes; none of what cannot be read, which is an error when it is opened."""
    try:
        source = storage.open_source(uri)
    except StorageError:
        return b""
    try:
        (header,) = source.read_ranges([(0, DICOM_HEADER_BYTES)])
    except StorageError:
        return b""
    finally:
        source.close()
    return header
