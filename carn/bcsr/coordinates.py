"""Tables of tile positions: read from lists, matched with slides, drawn, checked for overlap.

A position is the TOP-LEFT corner of a square tile in level-0 px; it may be negative, or so near the
right or lower border that the tile hangs over it.
"""

import csv
import io
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, get_args
from zlib import crc32

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from pyarrow import csv as arrow_csv

from carn import storage
from carn.errors import CoordinateError

POSITION_SCHEMA = pa.schema(
    [
        ("slide", pa.string()),
        ("x_l0", pa.int64()),
        ("y_l0", pa.int64()),
        ("label", pa.string()),
    ]
)
"""`slide` is a file name, its stem or a URI; `label` is "tumor", "normal" or what a CSV says."""

Anchor = Literal["corner", "centre"]

# Of a list: 5 million positions of 100 characters. CAMELYON's longest list has 200,000.
MAX_LIST_BYTES = 512 * 1024 * 1024
# Columns of a table: more are no table of positions.
MAX_COLUMNS = 1000
# Farther from a slide's corner than this, either way, is no position: slides have at most 2,000,000
# px a side, and sums of what is larger would overflow silently.
MAX_COORDINATE_PX = 10**15
# Of what a file holds, shown in an error.
MAX_SHOWN = 100

# Odd constants, far apart in 64 bits: cells of different slides and places spread over the keys.
_HASH_SLIDE, _HASH_COLUMN, _HASH_ROW = (
    np.uint64(0x9E3779B97F4A7C15),
    np.uint64(0xC2B2AE3D27D4EB4F),
    np.uint64(0x165667B19E3779F9),
)
# A cell itself and half of its neighbours: the other half finds the same pairs from their side.
_HALF_NEIGHBOURHOOD = ((0, 0), (1, 0), (-1, 1), (0, 1), (1, 1))


# -------------------------------------------------------------------------------------- reading


def read_ncrf_list(uri: str, *, label: str, tile_px: int) -> pa.Table:
    """Positions of a list in the form of NCRF: lines `Slide,x,y`, no header, patch centres.

    The label is the list's, not the slide's: lists of normal patches name tumour slides on purpose.
    Centres are whole level-0 px; top-left = centre - tile_px // 2. Order and repetitions are kept.

    Returns:
        Table of POSITION_SCHEMA.

    Raises:
        CoordinateError: the file is empty, or a line is malformed (named by its 1-based number).
        MissingObjectError: no such file.

    Source: https://github.com/baidu-research/NCRF (README, "Patch images").
    """
    _check(label != "", "label is empty; name the class of the list's positions")
    names = ["slide", "x", "y"]
    content = storage.read_bytes(uri, max_bytes=MAX_LIST_BYTES)
    rows = _parse(content, uri=uri, names=names, num_header_lines=0)
    rows = rows.append_column("label", pa.repeat(label, rows.num_rows))
    return _positions(rows, shift_px=_half(tile_px))


def read_csv(uri: str, *, anchor: Anchor, tile_px: int) -> pa.Table:
    """Positions of a comma-separated table with a header: columns uri (or slide), x, y and label.

    Columns come in any order, further ones are ignored, and uri goes before slide. x and y are
    whole level-0 px: of the tile's top-left (anchor "corner") or its centre (anchor "centre", moved
    by tile_px // 2). Order and repetitions are kept.

    Returns:
        Table of POSITION_SCHEMA.

    Raises:
        CoordinateError: a column is missing, there is no row, or a row is malformed (named by its
            1-based line number, the header being line 1).
        MissingObjectError: no such file.
        ValueError: another anchor.
    """
    _check(anchor in get_args(Anchor), f"anchor={anchor!r}; choose one of {get_args(Anchor)}")
    content = storage.read_bytes(uri, max_bytes=MAX_LIST_BYTES)
    header = content.split(b"\n", maxsplit=1)[0].decode("utf-8-sig", errors="replace")
    try:
        found = [name.strip() for name in next(csv.reader([header.rstrip("\r")]), [])]
    except csv.Error as error:
        raise CoordinateError(f"{uri}: line 1: {error}") from error
    if len(found) > MAX_COLUMNS:
        raise CoordinateError(f"{uri}: the header names {len(found)} columns, over {MAX_COLUMNS}")
    slide_column = "uri" if "uri" in found else "slide"
    wanted = {slide_column: "slide", "x": "x", "y": "y", "label": "label"}
    if any(found.count(name) != 1 for name in wanted):
        raise CoordinateError(
            f"{uri}: the header names the columns {_shown(found)}; needed, each once and separated "
            "by commas: uri (or slide), x, y, label"
        )
    names = [wanted.get(name, f"(column {number})") for number, name in enumerate(found, start=1)]
    rows = _parse(content, uri=uri, names=names, num_header_lines=1)
    return _positions(rows, shift_px=_half(tile_px) if anchor == "centre" else 0)


def ncrf_label(uri: str) -> str | None:
    """The label a list's file name starts with, "tumor" or "normal", in any case; else None."""
    name = storage.name_of(uri).lower()
    return next((label for label in ("tumor", "normal") if name.startswith(label)), None)


def _parse(content: bytes, *, uri: str, names: list[str], num_header_lines: int) -> pa.Table:
    types = {"slide": pa.string(), "x": pa.int64(), "y": pa.int64(), "label": pa.string()}
    wanted = [name for name in types if name in names]
    try:
        rows = arrow_csv.read_csv(
            pa.BufferReader(content),
            read_options=arrow_csv.ReadOptions(column_names=names, skip_rows=num_header_lines),
            convert_options=arrow_csv.ConvertOptions(
                include_columns=wanted, column_types=types, null_values=[]
            ),
        )
    except pa.ArrowInvalid as error:
        fault = _first_fault(content, names=names, num_header_lines=num_header_lines)
        raise CoordinateError(f"{uri}: {fault or f'lists no positions ({error})'}") from error
    if rows.num_rows == 0:
        raise CoordinateError(f"{uri}: lists no positions")
    for number, name in enumerate(rows.column_names):
        if types[name] == pa.string():
            trimmed = pc.utf8_trim_whitespace(rows[name])
            if pc.any(pc.equal(trimmed, "")).as_py():
                fault = _first_fault(content, names=names, num_header_lines=num_header_lines)
                raise CoordinateError(f"{uri}: {fault}")
            rows = rows.set_column(number, name, trimmed)
        elif pc.any(pc.or_(*_beyond(rows[name]))).as_py():
            fault = _first_fault(content, names=names, num_header_lines=num_header_lines)
            raise CoordinateError(f"{uri}: {fault}")
    return rows


def _beyond(column: pa.ChunkedArray) -> tuple[Any, Any]:
    return pc.less(column, -MAX_COORDINATE_PX), pc.greater(column, MAX_COORDINATE_PX)


def _first_fault(content: bytes, *, names: list[str], num_header_lines: int) -> str | None:
    # Arrow says what is wrong, but not on which line; this slower second reading does.
    reader = csv.reader(io.StringIO(content.decode("utf-8-sig", errors="replace"), newline=""))
    try:
        for fields in reader:
            if fields and reader.line_num > num_header_lines:
                fault = _fault_of(fields, names)
                if fault is not None:
                    return f"line {reader.line_num}: {fault}"
    except csv.Error as error:
        return f"line {reader.line_num}: {error}"
    return None


def _fault_of(fields: list[str], names: list[str]) -> str | None:
    if len(fields) != len(names):
        return f"{len(fields)} columns, not the {len(names)} of {','.join(names)}"
    for name, field in zip(names, fields, strict=True):
        if name in ("x", "y") and not re.fullmatch(r"\s*-?[0-9]{1,18}\s*", field):
            return f"{name} is {_shown(field)}; it must be a whole number of level-0 px"
        if name in ("x", "y") and abs(int(field)) > MAX_COORDINATE_PX:
            return f"{name} is {_shown(field)}; no slide is that large"
        if name in ("slide", "label") and not field.strip():
            return f"{name} is empty"
        if "\N{REPLACEMENT CHARACTER}" in field:
            return f"{_shown(field)} is not UTF-8 text"
    return None


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}..."


def _positions(rows: pa.Table, *, shift_px: int) -> pa.Table:
    columns = [
        rows["slide"],
        pc.subtract(rows["x"], shift_px),
        pc.subtract(rows["y"], shift_px),
        rows["label"],
    ]
    return pa.table(columns, schema=POSITION_SCHEMA)


def _half(tile_px: int) -> int:
    _check(tile_px >= 1, f"tile_px={tile_px}; a tile has at least 1 px")
    return tile_px // 2


def _check(is_met: bool, reason: str) -> None:
    if not is_met:
        raise ValueError(reason)


# ------------------------------------------------------------------------------------- resolving


def resolve_slides(positions: pa.Table, slide_uris: Sequence[str]) -> tuple[pa.Table, list[str]]:
    """Positions with the URI of their slide, and the names that no slide answers to.

    A name is a URI (anything with a slash), or a file name with or without its extension; where no
    file has it in that case, the one file that has it in another case does. Rows without a slide
    are left out. A position listed twice with the same label stays once, where it first stood.

    Args:
        positions: table of POSITION_SCHEMA.
        slide_uris: the slides there are.

    Returns:
        The table with a further column `uri`, in the order given, and the sorted distinct names
        not found. Column `slide` then holds one spelling per slide (so draws do not depend on the
        list's): the stem, or the URI where two of the slides share a stem.

    Raises:
        CoordinateError: a name fits two slides, or one place has two labels.
    """
    find = _slide_finder(slide_uris)
    num_with_stem = Counter(storage.stem_of(uri) for uri in set(slide_uris))
    names = pc.dictionary_encode(positions["slide"].combine_chunks())
    asked = names.dictionary.to_pylist()
    uris = [find(name) for name in asked]
    spellings = [
        storage.stem_of(uri) if uri and num_with_stem[storage.stem_of(uri)] == 1 else uri
        for uri in uris
    ]
    table = pa.table(
        {
            "slide": pa.array(spellings, pa.string()).take(names.indices),
            **{name: positions[name] for name in POSITION_SCHEMA.names[1:]},
            "uri": pa.array(uris, pa.string()).take(names.indices),
        }
    ).filter(pc.is_valid(pc.field("uri")))
    missing = sorted(name for name, uri in zip(asked, uris, strict=True) if uri is None)
    return _without_repetitions(table), missing


def _slide_finder(slide_uris: Sequence[str]) -> Callable[[str], str | None]:
    by_uri: dict[str, str] = {}
    by_name: dict[str, list[str]] = {}
    by_folded_name: dict[str, list[str]] = {}
    for uri in dict.fromkeys(slide_uris):
        by_uri[storage.normalize(uri)] = uri
        names = {storage.name_of(uri), storage.stem_of(uri)}
        for name in names:
            by_name.setdefault(name, []).append(uri)
        for name in {name.casefold() for name in names}:
            by_folded_name.setdefault(name, []).append(uri)

    def find(name: str) -> str | None:
        if "/" in name:
            return by_uri.get(storage.normalize(name))
        fitting = by_name.get(name, [])
        if len(fitting) > 1:
            raise CoordinateError(
                f"slide {name!r} may be {fitting[0]} or {fitting[1]}; give URIs instead of names"
            )
        fitting = fitting or by_folded_name.get(name.casefold(), [])
        return fitting[0] if len(fitting) == 1 else None

    return find


def _without_repetitions(table: pa.Table) -> pa.Table:
    place = ["uri", "x_l0", "y_l0"]
    numbered = table.append_column("number", pa.array(np.arange(table.num_rows)))
    firsts = numbered.group_by([*place, "label"]).aggregate([("number", "min")])
    kept = table.take(pa.array(np.sort(firsts["number_min"].to_numpy())))
    conflicts = (
        kept.append_column("number", pa.array(np.arange(kept.num_rows)))
        .group_by(place)
        .aggregate([("number", "count"), ("number", "min"), ("number", "max")])
        .filter(pc.field("number_count") > 1)
        .sort_by("number_min")
    )
    if conflicts.num_rows:
        first = conflicts.slice(0, 1).to_pylist()[0]
        labels = [kept["label"][first[end]].as_py() for end in ("number_min", "number_max")]
        raise CoordinateError(
            f"{first['uri']}: the tile at level-0 px ({first['x_l0']}, {first['y_l0']}) is listed "
            f"as {labels[0]!r} and as {labels[1]!r}; a place has one label"
        )
    return kept


# --------------------------------------------------------------------------------------- drawing


def draw_positions(
    positions: pa.Table,
    *,
    per_class: int | None,
    seed: int,
    even_over_slides: bool,
    allow_overlap: bool,
    tile_px: int,
) -> pa.Table:
    """A seeded draw of up to `per_class` positions of each label, without replacement.

    The draw does not depend on the order of the rows. A label's draw does not depend on the other
    labels either, but where overlap is forbidden: there labels draw in alphabetical order, and
    a later one goes round the tiles of the earlier. Where fewer fit than are asked for, those that
    do come back.

    Args:
        positions: table of POSITION_SCHEMA; further columns are kept.
        per_class: how many of each label; None takes all.
        seed: not negative.
        even_over_slides: slides give one position each, in turns, until there are enough; otherwise
            each position is as likely as any other.
        allow_overlap: whether two tiles of a slide may share pixels, whatever their labels. If not,
            a position in the way of an earlier one is passed over for the next.
        tile_px: side of a tile in level-0 px.

    Returns:
        The rows drawn, ordered by slide, y_l0, x_l0 and label.

    Raises:
        ValueError: per_class or tile_px below 1, or a negative seed.
    """
    _check(per_class is None or per_class >= 1, f"per_class={per_class}; draw at least 1, or None")
    _check(tile_px >= 1, f"tile_px={tile_px}; a tile has at least 1 px")
    _check(seed >= 0, f"seed={seed}; a seed is not negative")
    ordered = positions.sort_by(
        [(name, "ascending") for name in ("label", "slide", "y_l0", "x_l0")]
    )
    slides, _ = _encode(ordered["slide"])
    labels, label_names = _encode(ordered["label"])
    fits = _accept_any if allow_overlap else _overlap_filter(ordered, slides, tile_px)
    drawn: list[int] = []
    for code, label in enumerate(label_names):
        rows = np.flatnonzero(labels == code)
        rng = np.random.default_rng([seed, crc32(label.encode())])
        queues = (
            _queues_by_slide(rows, slides, rng) if even_over_slides else [rng.permutation(rows)]
        )
        quota = len(rows) if per_class is None else per_class
        drawn += _take_in_turns(queues, quota=quota, fits=fits)
    return ordered.take(pa.array(drawn, pa.int64())).sort_by(
        [(name, "ascending") for name in ("slide", "y_l0", "x_l0", "label")]
    )


def _encode(column: pa.ChunkedArray) -> tuple[NDArray[np.int64], list[str]]:
    # Codes count in order of first appearance.
    encoded = pc.dictionary_encode(column.combine_chunks())
    return encoded.indices.to_numpy().astype(np.int64), encoded.dictionary.to_pylist()


def _queues_by_slide(
    rows: NDArray[np.int64], slides: NDArray[np.int64], rng: np.random.Generator
) -> list[NDArray[np.int64]]:
    groups = np.split(rows, np.flatnonzero(np.diff(slides[rows])) + 1)
    return [rng.permutation(groups[index]) for index in rng.permutation(len(groups))]


def _take_in_turns(
    queues: Sequence[NDArray[np.int64]], *, quota: int, fits: Callable[[int], bool]
) -> list[int]:
    drawn: list[int] = []
    waiting: list[Iterator[int]] = [iter(queue.tolist()) for queue in queues]
    while waiting and len(drawn) < quota:
        still_waiting = []
        for queue in waiting[: quota - len(drawn)]:
            row = next(filter(fits, queue), None)
            if row is not None:
                drawn.append(row)
                still_waiting.append(queue)
        waiting = still_waiting + waiting[quota - len(drawn) :]
    return drawn


def _accept_any(_row: int) -> bool:
    return True


def _overlap_filter(
    positions: pa.Table, slides: NDArray[np.int64], tile_px: int
) -> Callable[[int], bool]:
    # Tiles accepted so far by grid cell of one tile's size: a cell holds the corner of at most one,
    # and only the 8 cells round it can hold one that overlaps.
    occupied: dict[tuple[int, int, int], tuple[int, int]] = {}
    slide_of, x_of, y_of = (
        slides.tolist(),
        positions["x_l0"].to_pylist(),
        positions["y_l0"].to_pylist(),
    )

    def fits(row: int) -> bool:
        slide, x, y = slide_of[row], x_of[row], y_of[row]
        column, line = x // tile_px, y // tile_px
        for dy in (0, -1, 1):
            for dx in (0, -1, 1):
                other = occupied.get((slide, column + dx, line + dy))
                if other and abs(other[0] - x) < tile_px and abs(other[1] - y) < tile_px:
                    return False
        occupied[slide, column, line] = (x, y)
        return True

    return fits


# --------------------------------------------------------------------------------------- overlap


def overlap_pairs(
    slide: NDArray[Any], x_l0: NDArray[np.int64], y_l0: NDArray[np.int64], *, tile_px: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]:
    """All pairs of tiles that share pixels, and how much of a tile's area each pair shares.

    Time and memory grow with the tiles and the pairs found, not with the square of the tiles.

    Args:
        slide: (n,) name or number of each tile's slide; tiles of different slides share nothing.
        x_l0: (n,) left borders in level-0 px.
        y_l0: (n,) upper borders in level-0 px.
        tile_px: side of a tile in level-0 px.

    Returns:
        Indices i < j of each pair, int64 and ordered by i, then j, and their shares, float64 in
        (0, 1]. Tiles that only touch are no pair.

    Raises:
        ValueError: tile_px below 1, or arrays of different lengths.
    """
    _check(tile_px >= 1, f"tile_px={tile_px}; a tile has at least 1 px")
    _check(len(slide) == len(x_l0) == len(y_l0), "slide, x_l0 and y_l0 differ in length")
    slides = np.unique(slide, return_inverse=True)[1].astype(np.int64)
    x, y = x_l0.astype(np.int64), y_l0.astype(np.int64)
    columns, rows = x // tile_px, y // tile_px
    # Products wrap round in 64 bits, and sums of them do alike; keys that collide by that are
    # told apart by the cells themselves below.
    keys = _cell_keys(slides, columns, rows)
    order = np.argsort(keys, kind="stable")
    keys_in_order = keys[order]
    found = []
    for dx, dy in _HALF_NEIGHBOURHOOD:
        sought = _cell_keys(slides, columns + dx, rows + dy)
        first = np.searchsorted(keys_in_order, sought, side="left")
        counts = np.searchsorted(keys_in_order, sought, side="right") - first
        one = np.repeat(np.arange(len(keys)), counts)
        step = np.arange(len(one)) - np.repeat(np.cumsum(counts) - counts, counts)
        other = order[np.repeat(first, counts) + step]
        is_pair = (
            (slides[one] == slides[other])
            & (columns[one] + dx == columns[other])
            & (rows[one] + dy == rows[other])
            & (np.abs(x[one] - x[other]) < tile_px)
            & (np.abs(y[one] - y[other]) < tile_px)
        )
        if (dx, dy) == (0, 0):
            is_pair &= one < other
        found.append(np.stack([one[is_pair], other[is_pair]]))
    i, j = np.sort(np.concatenate(found, axis=1), axis=0)
    by_index = np.lexsort((j, i))
    i, j = i[by_index], j[by_index]
    shared_px = (tile_px - np.abs(x[i] - x[j])) * (tile_px - np.abs(y[i] - y[j]))
    return i, j, shared_px / float(tile_px) ** 2


def _cell_keys(
    slides: NDArray[np.int64], columns: NDArray[np.int64], rows: NDArray[np.int64]
) -> NDArray[np.uint64]:
    keys: NDArray[np.uint64] = slides.astype(np.uint64) * _HASH_SLIDE
    keys += columns.astype(np.uint64) * _HASH_COLUMN
    keys += rows.astype(np.uint64) * _HASH_ROW
    return keys
