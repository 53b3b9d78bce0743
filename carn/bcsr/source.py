"""What a build starts from: slides or images, and where lists or annotations say tiles lie.

Everything here is cheap, so that what is missing or malformed is said before any work begins.
"""

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from carn import storage
from carn.bcsr.coordinates import (
    MAX_LIST_BYTES,
    Anchor,
    ncrf_label,
    read_csv,
    read_ncrf_list,
    resolve_slides,
)
from carn.bcsr.locate import find_annotations, name_slides
from carn.errors import CoordinateError, StorageError
from carn.slides.image import IMAGE_SUFFIXES
from carn.slides.listing import list_slides

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where tiles may be cut.

    Attributes:
        names: the name of each slide or image, by its URI.
        positions: columns of LOCATED, when lists say where tiles lie; else None.
        annotations: the annotation of a slide, by the slide's name.
        missing: positions listed on slides that are not there, by the name they are listed under.
        unnameable: files that are left out because their names are no text, as Python writes them.
        lists: the identity of each coordinate list or annotation, by its URI.
        digest: changes when a slide or list that is used comes, goes or is replaced.
    """

    names: dict[str, str]
    positions: pa.Table | None
    annotations: dict[str, str]
    missing: dict[str, int]
    unnameable: tuple[str, ...]
    lists: dict[str, str]
    digest: str


def find_images(root: str) -> Source:
    """The plain images below a folder or prefix, or of its HR/ where it has one.

    Raises:
        StorageError: there are none, or storage does not answer.
    """
    root = storage.normalize(root)
    found = storage.list_objects(storage.join(root, "HR")) or storage.list_objects(root)
    uris = [item.uri for item in found if item.uri.lower().endswith(IMAGE_SUFFIXES)]
    uris, unnameable = _parted(uris)
    if not uris:
        raise StorageError(root, f"no images here ({', '.join(IMAGE_SUFFIXES)})")
    return _source(name_slides(uris), unnameable=unnameable)


def find_slides(roots: Sequence[str], *, annotations: str | None = None) -> Source:
    """The slides below folders or prefixes, with their annotations where a folder of them is given.

    Raises:
        StorageError: there are no slides, or storage does not answer.
        CoordinateError: no annotation belongs to a slide, or one to two.
    """
    names, unnameable = _name_slides_below(roots)
    if annotations is None:
        return _source(names, unnameable=unnameable)
    found = find_annotations(annotations, names)
    if not found:
        raise CoordinateError(
            f"{annotations} holds no annotation (.xml or .json) named as a slide, such as "
            f"{storage.stem_of(next(iter(names)))!r}"
        )
    return _source(names, annotations=found, lists=sorted(found.values()), unnameable=unnameable)


def find_listed(
    roots: Sequence[str], *, coordinates: Sequence[str], csv_anchor: Anchor | None, tile_px: int
) -> Source:
    """The slides that coordinate lists name, and the positions on them.

    Args:
        roots: folders or prefixes of the slides, or single slides.
        coordinates: NCRF lists, whose names begin with their label, or .csv with a header.
        csv_anchor: what x, y of a .csv are.
        tile_px: side of a tile in level-0 px.

    Raises:
        CoordinateError: a list is malformed, or no slide that is listed is there.
        StorageError: there are no slides, or storage does not answer.
    """
    # A list is text, and cannot mean a slide whose name is none.
    names, _ = _name_slides_below(roots)
    lists = [storage.normalize(uri) for uri in coordinates]
    listed = pa.concat_tables(
        [_read_list(uri, csv_anchor=csv_anchor, tile_px=tile_px) for uri in lists]
    )
    positions, missing = resolve_slides(listed, list(names))
    counts = {row["values"]: row["counts"] for row in pc.value_counts(listed["slide"]).to_pylist()}
    num_missing = {name: counts[name] for name in missing}
    where = " ".join(roots)
    if missing:
        logger.warning(
            "%d of the listed slides are not below %s (%d positions): %s",
            *(len(missing), where, sum(num_missing.values()), ", ".join(missing)),
        )
    if not len(positions):
        example = storage.name_of(next(iter(names)))
        raise CoordinateError(
            f"none of the {len(missing)} listed slides is below {where}; lists name slides such as "
            f"{missing[0]!r}, files are named such as {example!r}"
        )
    uris = positions["uri"].to_pylist()
    named = positions.set_column(0, "slide", pa.array([names[uri] for uri in uris]))
    used = {uri: names[uri] for uri in sorted(set(uris))}
    return _source(used, positions=named, missing=num_missing, lists=lists)


def _name_slides_below(roots: Sequence[str]) -> tuple[dict[str, str], tuple[str, ...]]:
    """The name of each slide, and the files whose names are no text."""
    uris, unnameable = _parted(list_slides(roots))
    if not uris:
        raise StorageError(" ".join(roots), "no slides here (by their file names' extensions)")
    return name_slides(uris), unnameable


def _parted(uris: Sequence[str]) -> tuple[list[str], tuple[str, ...]]:
    """Those that are text, and how Python writes those that are not."""
    unnameable = tuple(
        uri.encode(errors="backslashreplace").decode() for uri in uris if not storage.is_text(uri)
    )
    return [uri for uri in uris if storage.is_text(uri)], unnameable


def _read_list(uri: str, *, csv_anchor: Anchor | None, tile_px: int) -> pa.Table:
    if csv_anchor is not None and uri.lower().endswith(".csv"):
        return read_csv(uri, anchor=csv_anchor, tile_px=tile_px)
    label = ncrf_label(uri)
    if label is None:
        raise CoordinateError(
            f"{uri}: the label of an NCRF list is told by its name, which must begin with tumor or "
            "normal; rename it, or give a .csv with a header (uri, x, y, label)"
        )
    return read_ncrf_list(uri, label=label, tile_px=tile_px)


def _source(
    names: dict[str, str],
    *,
    positions: pa.Table | None = None,
    annotations: dict[str, str] | None = None,
    missing: dict[str, int] | None = None,
    unnameable: tuple[str, ...] = (),
    lists: Sequence[str] = (),
) -> Source:
    hashes = {uri: storage.content_hash(uri, max_bytes=MAX_LIST_BYTES) for uri in lists}
    return Source(
        names=names,
        positions=positions,
        annotations=annotations or {},
        missing=missing or {},
        unnameable=unnameable,
        lists=hashes,
        digest=_digest(list(names), hashes),
    )


def _digest(uris: Sequence[str], lists: Mapping[str, str]) -> str:
    with ThreadPoolExecutor(16) as pool:
        found = dict(zip(uris, pool.map(_identity_or_none, uris), strict=True))
    text = json.dumps([found, dict(lists)], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def _identity_or_none(uri: str) -> str | None:
    try:
        return storage.identity(uri)
    except StorageError:
        return None  # whoever reads it will say why
