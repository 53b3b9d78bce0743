"""Outlines of tumour on a slide: read from ASAP XML or NCRF JSON, and tiles drawn from them.

Everything here is in level-0 px of the slide.
"""

import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from xml.etree.ElementTree import ParseError
from zlib import crc32

import numpy as np
import pyarrow as pa
import shapely
from numpy.typing import NDArray

from carn import storage
from carn.bcsr.coordinates import POSITION_SCHEMA
from carn.errors import CoordinateError
from carn.plain_xml import DoctypeError, parse_xml
from carn.slides.slide import MAX_EXTENT_PX
from carn.slides.tissue import TissueMask

# What the two challenges call their groups: _0, _1, _2, Tumor and Exclusion in CAMELYON16,
# metastases and normal in CAMELYON17 (https://camelyon17.grand-challenge.org/Data/, README files).
TUMOR_GROUPS = ("_0", "_1", "Tumor", "metastases")
EXCLUDED_GROUPS = ("_2", "Exclusion", "normal")

# Of an annotation. CAMELYON's largest has some MB; as XML in memory it takes twenty times as much.
MAX_ANNOTATION_BYTES = 64 * 1024 * 1024
# Places where outlines meet, beside the corners of each. Making valid and uniting take time and
# memory for each of them, and a drawing of 10,000 strokes to and fro has 50 million. Drawn by hand
# they are a few hundred; the share is for outlines that follow one another.
MAX_MEETINGS, MAX_MEETINGS_PER_VERTEX = 200_000, 16
# Pairs of an edge and an edge near it that are looked at at once: 8 MB.
_PAIRS_AT_ONCE = 1 << 19
# Coordinates beyond this are of no slide; their squares would leave a float's precision.
_MAX_COORDINATE = 10.0 * MAX_EXTENT_PX

# Kinds of ASAP annotation that enclose an area; the others are dots, point sets and measures.
_AREA_TYPES = ("Polygon", "Spline", "Rectangle")

# Draws are made in batches, and end when these many have not given enough. In tumour nearly every
# draw is good, so it ends early only where there are too few distinct pixels.
_MAX_TUMOR_BATCHES = 32
_NORMAL_BATCH = 4096
_MIN_NORMAL_TRIES = 100_000


@dataclass(frozen=True, kw_only=True)
class Annotation:
    """What is outlined on one slide, in level-0 px.

    Attributes:
        tumor: union of the tumour polygons; empty where there are none.
        excluded: union of the polygons of what is no tumour, most often inside of one.
    """

    tumor: shapely.Geometry
    excluded: shapely.Geometry


# --------------------------------------------------------------------------------------- reading


def read_annotation(
    uri: str,
    *,
    tumor_groups: Sequence[str] = TUMOR_GROUPS,
    excluded_groups: Sequence[str] = EXCLUDED_GROUPS,
) -> Annotation:
    """The annotation in a file of ASAP XML or NCRF JSON, told apart by content.

    Args:
        uri: the file.
        tumor_groups, excluded_groups: names of ASAP's groups, as of `read_asap_xml`.

    Raises:
        CoordinateError: it is neither, or as `read_asap_xml` and `read_ncrf_json`.
        MissingObjectError: no such file.
    """
    content = storage.read_bytes(uri, max_bytes=MAX_ANNOTATION_BYTES)
    match content.removeprefix(b"\xef\xbb\xbf").lstrip()[:1]:
        case b"<":
            return _from_asap_xml(content, uri, tumor_groups, excluded_groups)
        case b"{":
            return _from_ncrf_json(content, uri)
    raise CoordinateError(f"{uri}: neither XML nor a JSON object; give an ASAP or NCRF annotation")


def read_asap_xml(
    uri: str,
    *,
    tumor_groups: Sequence[str] = TUMOR_GROUPS,
    excluded_groups: Sequence[str] = EXCLUDED_GROUPS,
) -> Annotation:
    """The annotation in an XML file of ASAP, as CAMELYON has them.

    Points follow their Order. Outlines that cross themselves are made valid; those without an area,
    or of a kind that has none (dots, measures), are left out with a warning. A spline counts as the
    polygon of its points.

    Raises:
        CoordinateError: malformed XML, another document, one with a document type declaration (it
            could declare entities), a coordinate that is no number, or a group in neither list.
        MissingObjectError: no such file.

    Source: https://github.com/computationalpathologygroup/ASAP
    """
    content = storage.read_bytes(uri, max_bytes=MAX_ANNOTATION_BYTES)
    return _from_asap_xml(content, uri, tumor_groups, excluded_groups)


def read_ncrf_json(uri: str) -> Annotation:
    """The annotation in a JSON file of NCRF; "positive" is tumour, "negative" is excluded.

    Outlines that cross themselves are made valid; those without an area are left out with a
    warning.

    Raises:
        CoordinateError: malformed JSON, or another structure than
            {"positive": [{"name": ..., "vertices": [[x, y], ...]}, ...], "negative": [...]}.
        MissingObjectError: no such file.

    Source: https://github.com/baidu-research/NCRF (README, "Annotations")
    """
    return _from_ncrf_json(storage.read_bytes(uri, max_bytes=MAX_ANNOTATION_BYTES), uri)


def _from_asap_xml(
    content: bytes, uri: str, tumor_groups: Sequence[str], excluded_groups: Sequence[str]
) -> Annotation:
    try:
        root = parse_xml(content)
    except DoctypeError as error:
        raise CoordinateError(f"{uri}: {error}") from error
    except (ParseError, ValueError, LookupError) as error:
        raise CoordinateError(f"{uri}: malformed XML: {error}") from error
    if root.tag != "ASAP_Annotations":
        raise CoordinateError(f"{uri}: the root element is {root.tag:.40}, not ASAP_Annotations")
    tumor: list[NDArray[np.float64]] = []
    excluded: list[NDArray[np.float64]] = []
    for element in root.iterfind("Annotations/Annotation"):
        name = element.get("Name", "")
        kind = element.get("Type", "Polygon")
        if kind not in _AREA_TYPES:
            _log().warning("%s: annotation %r is a %s, no area: left out", uri, name, kind)
            continue
        group = element.get("PartOfGroup", "None")
        if group not in (*tumor_groups, *excluded_groups):
            raise CoordinateError(
                f"{uri}: annotation {name!r} is of the unknown group {group[:40]!r}; known are "
                f"{list(tumor_groups)} for tumour and {list(excluded_groups)} for the rest: name "
                "it with --tumor-groups or --excluded-groups"
            )
        try:
            points = [
                (
                    float(point.get("Order", number)),
                    float(point.attrib["X"]),
                    float(point.attrib["Y"]),
                )
                for number, point in enumerate(element.iterfind("Coordinates/Coordinate"))
            ]
        except (KeyError, ValueError) as error:
            raise CoordinateError(
                f"{uri}: annotation {name!r}: a Coordinate needs numbers X, Y, Order ({error})"
            ) from error
        points.sort(key=lambda point: point[0])
        outlines = _outlines([point[1:] for point in points], uri=uri, name=name)
        (tumor if group in tumor_groups else excluded).extend(outlines)
    return _annotation(tumor, excluded, uri=uri)


def _from_ncrf_json(content: bytes, uri: str) -> Annotation:
    try:
        document = json.loads(content)
        tumor, excluded = (
            [
                outline
                for entry in document[key]
                for outline in _outlines(entry["vertices"], uri=uri, name=entry.get("name", ""))
            ]
            for key in ("positive", "negative")
        )
    except CoordinateError:
        raise
    except (ValueError, RecursionError) as error:
        raise CoordinateError(f"{uri}: malformed JSON: {error}") from error
    except (KeyError, TypeError, AttributeError) as error:
        raise CoordinateError(
            f'{uri}: not an NCRF annotation, which has lists "positive" and "negative" of objects '
            f'with "vertices" ({type(error).__name__}: {error})'
        ) from error
    return _annotation(tumor, excluded, uri=uri)


def _annotation(
    tumor: list[NDArray[np.float64]], excluded: list[NDArray[np.float64]], *, uri: str
) -> Annotation:
    _check_meetings([*tumor, *excluded], uri=uri)
    try:
        return Annotation(tumor=_union(tumor, uri=uri), excluded=_union(excluded, uri=uri))
    except shapely.errors.GEOSException as error:
        raise CoordinateError(f"{uri}: its outlines cannot be united: {error}") from error


def _check_meetings(outlines: list[NDArray[np.float64]], *, uri: str) -> None:
    if not outlines:
        return
    edges = shapely.linestrings(
        np.concatenate([np.stack([points, np.roll(points, -1, 0)], axis=1) for points in outlines])
    )
    tree = shapely.STRtree(edges)
    most = MAX_MEETINGS + MAX_MEETINGS_PER_VERTEX * len(edges)
    at_once = max(1, _PAIRS_AT_ONCE // len(edges))
    found = 0
    for start in range(0, len(edges), at_once):
        found += tree.query(edges[start : start + at_once], predicate="intersects").shape[1]
        if found > most:
            raise CoordinateError(
                f"{uri}: the outlines cross each other in more than {MAX_MEETINGS:,} places; draw "
                "outlines that go round areas once"
            )


def _union(outlines: list[NDArray[np.float64]], *, uri: str) -> shapely.Geometry:
    return shapely.union_all([polygon for points in outlines for polygon in _polygons(points, uri)])


def _outlines(points: Any, *, uri: str, name: str) -> list[NDArray[np.float64]]:
    # None or one.
    try:
        vertices = np.array(points, dtype=np.float64).reshape(len(points), 2)
    except (TypeError, ValueError, OverflowError) as error:
        raise CoordinateError(f"{uri}: annotation {name!r}: vertices are not x, y pairs") from error
    if not np.isfinite(vertices).all():
        raise CoordinateError(f"{uri}: annotation {name!r} has a coordinate that is not finite")
    if vertices.size and np.abs(vertices).max() > _MAX_COORDINATE:
        raise CoordinateError(f"{uri}: annotation {name!r} has a coordinate that is of no slide")
    if len(vertices) < 3:
        _log().warning(
            "%s: annotation %r has %d points, no area: left out", uri, name, len(vertices)
        )
        return []
    return [vertices]


def _polygons(vertices: NDArray[np.float64], uri: str) -> list[shapely.Geometry]:
    # None or one, valid, of one or several parts.
    # "structure" keeps areas that a hand-drawn outline goes round twice; "linework" would make
    # holes of them.
    polygon = shapely.make_valid(
        shapely.Polygon(vertices), method="structure", keep_collapsed=False
    )
    if polygon.is_empty:
        _log().warning("%s: an annotation is a line, no area: left out", uri)
        return []
    return [polygon]


def _log() -> logging.Logger:
    return logging.getLogger(__name__)


# --------------------------------------------------------------------------------------- drawing


def draw_in_annotation(
    annotation: Annotation | None,
    *,
    slide: str,
    tissue: TissueMask,
    tile_px: int,
    points_per_label: int,
    seed: int,
) -> pa.Table:
    """Seeded positions of tiles: centred in tumour ("tumor") and on tissue clear of it ("normal").

    Tumour centres are distinct pixels, uniform over the area inside tumour and outside of excluded.
    Normal centres are distinct pixels on tissue, spread over the pixels of its mask (none gives a
    second before the others had their turn), whose whole tile is disjoint from every tumour
    polygon. Every centre is on the slide; tiles may hang over its border. The draw depends on the
    seed and the slide's name alone, not on other slides.

    Args:
        annotation: None for a slide without tumour.
        slide: its name, for the column `slide`.
        tissue: its tissue and extent.
        tile_px: side of a tile in level-0 px.
        points_per_label: how many of each label; fewer come back where there are not that many.
        seed: not negative.

    Returns:
        Table of POSITION_SCHEMA (top-left = centre - tile_px // 2), tumour before normal, each in
        the order drawn.

    Raises:
        ValueError: tile_px or points_per_label below 1, or a negative seed.
    """
    if tile_px < 1 or points_per_label < 1 or seed < 0:
        raise ValueError(
            f"tile_px={tile_px}, points_per_label={points_per_label}, seed={seed}: the first two "
            "are at least 1, the seed is not negative"
        )
    rng = np.random.default_rng([seed, crc32(slide.encode())])
    tumor = shapely.union_all([]) if annotation is None else annotation.tumor
    excluded = shapely.union_all([]) if annotation is None else annotation.excluded
    region = shapely.difference(tumor, excluded)
    centres = {
        "tumor": _first_distinct(
            _tumor_batches(region, extent=tissue.extent, num=points_per_label, rng=rng),
            num=points_per_label,
        ),
        "normal": _first_distinct(
            _normal_batches(tumor, tissue=tissue, tile_px=tile_px, rng=rng), num=points_per_label
        ),
    }
    corners = np.concatenate(list(centres.values())) - tile_px // 2
    labels = np.repeat(list(centres), [len(found) for found in centres.values()])
    columns = [[slide] * len(corners), corners[:, 0], corners[:, 1], labels.tolist()]
    return pa.table(columns, schema=POSITION_SCHEMA)


def _first_distinct(batches: Iterator[NDArray[np.int64]], *, num: int) -> NDArray[np.int64]:
    found: dict[tuple[int, ...], None] = {}
    for batch in batches:
        found.update(dict.fromkeys(map(tuple, batch.tolist())))
        if len(found) >= num:
            break
    return np.array(list(found)[:num], dtype=np.int64).reshape(-1, 2)


def _tumor_batches(
    region: shapely.Geometry, *, extent: tuple[int, int], num: int, rng: np.random.Generator
) -> Iterator[NDArray[np.int64]]:
    # Triangles make thin and tiny polygons as easy to hit as round ones.
    triangles = shapely.get_parts(shapely.constrained_delaunay_triangles(region))
    areas = shapely.area(triangles)
    if not areas.sum():
        return
    corners = shapely.get_coordinates(triangles).reshape(-1, 4, 2)[:, :3]
    shapely.prepare(region)
    for _ in range(_MAX_TUMOR_BATCHES):
        size = 4 * num + 64
        chosen = corners[rng.choice(len(areas), size=size, p=areas / areas.sum())]
        u, v = rng.random((2, size, 1))
        # The unit square folded onto its lower triangle keeps the density even.
        u, v = np.where(u + v > 1, 1 - u, u), np.where(u + v > 1, 1 - v, v)
        points = (
            chosen[:, 0] + u * (chosen[:, 1] - chosen[:, 0]) + v * (chosen[:, 2] - chosen[:, 0])
        )
        centres = np.rint(points).astype(np.int64)
        is_inside = shapely.contains_xy(region, centres[:, 0], centres[:, 1])
        yield centres[is_inside & _is_on_slide(centres, extent)]


def _normal_batches(
    tumor: shapely.Geometry, *, tissue: TissueMask, tile_px: int, rng: np.random.Generator
) -> Iterator[NDArray[np.int64]]:
    pixels = np.flatnonzero(tissue.mask)
    if not len(pixels):
        return
    shapely.prepare(tumor)
    num_tries = 0
    while num_tries < _MIN_NORMAL_TRIES:
        order = rng.permutation(pixels)
        for start in range(0, len(order), _NORMAL_BATCH):
            rows, columns = np.divmod(order[start : start + _NORMAL_BATCH], tissue.mask.shape[1])
            corners = np.stack([columns, rows], axis=1)
            centres = np.floor((corners + rng.random(corners.shape)) * tissue.downsample)
            centres = centres.astype(np.int64)
            x, y = (centres - tile_px // 2).T
            is_clear = ~shapely.intersects(tumor, shapely.box(x, y, x + tile_px, y + tile_px))
            # Where a mask px starts amid a pixel, cutting to whole px may leave the tissue.
            columns, rows = (centres / tissue.downsample).astype(np.int64).T
            is_on_tissue = tissue.mask[rows, columns] & _is_on_slide(centres, tissue.extent)
            yield centres[is_clear & is_on_tissue]
        num_tries += len(order)


def _is_on_slide(centres: NDArray[np.int64], extent: tuple[int, int]) -> NDArray[np.bool_]:
    is_on = (centres >= 0) & (centres < np.array(extent))
    return is_on[:, 0] & is_on[:, 1]
