"""Find the slides below a folder or prefix."""

import fnmatch
import logging
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from carn import storage
from carn.errors import MissingObjectError, StorageError
from carn.storage import ObjectStat

logger = logging.getLogger(__name__)

# What OpenSlide names as its formats (https://openslide.org/formats/). A name only proposes: what a
# file is gets decided by its content, when it is opened.
SLIDE_SUFFIXES = (
    *(".tif", ".tiff", ".svs", ".ndpi", ".mrxs", ".scn", ".bif", ".dcm", ".vms", ".vmu", ".czi"),
    ".svslide",
)
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

    Files are proposed by their suffix. Of the files of one DICOM series, which are one slide, the
    first by name stands for all. Object storage tells sizes and tags with the names, a thousand a
    request.

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
        if (folder := pattern_folder(root)) is not None:
            matching = find_matching(root, folder, SLIDE_SUFFIXES)
            found.update((item.uri, item) for item in matching)
            continue
        below = storage.list_objects(root)
        if not below:
            raise MissingObjectError(root, "no file here, and no folder or prefix with files in it")
        found.update(
            (item.uri, item) for item in below if item.uri.lower().endswith(SLIDE_SUFFIXES)
        )
    return [found[uri] for uri in _one_per_dicom_series(sorted(found))]


def pattern_folder(uri: str) -> str | None:
    """The folder before the first wildcard of a name; None where the name is no pattern.

    A name with wildcards in it that a local file or folder has, as it stands, is that of the file.
    """
    wildcard = GLOB.search(uri)
    if wildcard is None or (not storage.is_s3(uri) and Path(uri).exists()):
        return None
    return uri[: wildcard.start()].rpartition("/")[0]


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
        for item in storage.list_objects(folder)
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


def _one_per_dicom_series(uris: list[str]) -> list[str]:
    dicom = [uri for uri in uris if _is_dicom(uri)]
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
        logger.info("%d DICOM files make up %d slides", len(dicom), sum(map(_is_dicom, kept)))
    return kept


def _is_dicom(uri: str) -> bool:
    return Path(storage.name_of(uri)).suffix.lower() == ".dcm"


def _series_uid(uri: str) -> bytes | None:
    try:
        source = storage.open_source(uri)
    except StorageError:  # it stands for itself, and is an error when it is opened
        return None
    try:
        (header,) = source.read_ranges([(0, DICOM_HEADER_BYTES)])
    finally:
        source.close()
    found = SERIES_UID.search(header)
    return found.group(2) if found else None
