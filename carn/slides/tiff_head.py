"""The head of a pyramidal BigTIFF: header, directories and tile tables, without its tiles.

What OpenSlide, QuPath, libvips and tifffile need of a generic pyramid: the first directory is level
0 and tiled, the lower levels are further directories of the main chain, marked as reduced images.

Source: TIFF 6.0 (https://www.itu.int/itudoc/itu-t/com16/tiff-fx/docs/tiff6.pdf); BigTIFF
(https://www.awaresystems.be/imaging/tiff/bigtiff.html); JPEG in TIFF: Technical Note 2
(https://www.awaresystems.be/imaging/tiff/specification/TIFFTechNote2.txt).
"""

import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

from carn import __version__
from carn.slides.slide_output import NOTICE, OutputSpec, level_extents, level_mpp, num_tiles

# Field types.
_ASCII, _SHORT, _LONG, _RATIONAL, _UNDEFINED, _LONG8 = 2, 3, 4, 5, 7, 16
_DTYPES = {_SHORT: "<u2", _LONG: "<u4", _RATIONAL: "<u4", _LONG8: "<u8"}
# What fits into a BigTIFF entry itself.
_INLINE_BYTES = 8
_MAX_LONG = 2**32 - 1

_PREDICTOR = 317
_TILE_OFFSETS, _TILE_BYTE_COUNTS = 324, 325
_SUBSAMPLING_FACTORS = {"420": (2, 2), "422": (2, 1), "444": (1, 1)}


@dataclass(frozen=True, kw_only=True)
class LevelTables:
    """Where the tiles of a level lie, row by row.

    Attributes:
        offsets: uint64, from the start of the file.
        byte_counts: uint32.
    """

    offsets: NDArray[np.uint64]
    byte_counts: NDArray[np.uint32]


@dataclass(frozen=True, kw_only=True)
class _Entry:
    tag: int
    type: int
    count: int
    content: bytes


def head_bytes(spec: OutputSpec, *, icc_profile: bytes | None) -> int:
    """How long the head is, whatever its tables say."""
    places = [num_tiles(extent, spec.format.tile_px) for extent in level_extents(spec.extent)]
    return len(
        make_head(
            spec,
            tables=[
                LevelTables(
                    offsets=np.zeros(columns * rows, np.uint64),
                    byte_counts=np.zeros(columns * rows, np.uint32),
                )
                for columns, rows in places
            ],
            icc_profile=icc_profile,
        )
    )


def make_head(
    spec: OutputSpec, *, tables: Sequence[LevelTables], icc_profile: bytes | None
) -> bytes:
    """The bytes of a BigTIFF before its first tile.

    Every level states its own extent, resolution and, where there is one, ICC profile. Level 0
    describes the slide by JSON: the notice, um per px, and the provenance of the spec.

    Args:
        spec: the slide.
        tables: of each level, finest first.
        icc_profile: None embeds none.

    Raises:
        ValueError: tables that are not of the spec's levels.
    """
    extents = level_extents(spec.extent)
    if len(tables) != len(extents):
        raise ValueError(f"{spec.uri} has {len(extents)} levels, not {len(tables)}")
    directories = []
    for level, (extent, table) in enumerate(zip(extents, tables, strict=True)):
        columns, rows = num_tiles(extent, spec.format.tile_px)
        if len(table.offsets) != columns * rows or len(table.byte_counts) != columns * rows:
            raise ValueError(f"level {level} of {spec.uri} has {columns * rows} tiles")
        directories.append(
            [
                *_level_entries(spec, level=level, extent=extent, icc_profile=icc_profile),
                _numbers(_TILE_OFFSETS, _LONG8, table.offsets),
                _numbers(_TILE_BYTE_COUNTS, _LONG, table.byte_counts),
            ]
        )
    return _lay_out(directories)


def description(spec: OutputSpec) -> str:
    """What level 0 says of the slide: JSON, in ASCII."""
    says: Mapping[str, Any] = {
        "notice": NOTICE,
        "mpp_um": None if spec.mpp is None else list(spec.mpp),
        "provenance": json.loads(json.dumps(spec.provenance, sort_keys=True)),
    }
    return json.dumps(says, ensure_ascii=True)


def _level_entries(
    spec: OutputSpec, *, level: int, extent: tuple[int, int], icc_profile: bytes | None
) -> list[_Entry]:
    form = spec.format
    is_jpeg = form.compression == "jpeg"
    entries = [
        _numbers(254, _LONG, [0 if level == 0 else 1]),  # NewSubfileType: a reduced image
        _numbers(256, _LONG, [extent[0]]),  # ImageWidth
        _numbers(257, _LONG, [extent[1]]),  # ImageLength
        _numbers(258, _SHORT, [8, 8, 8]),  # BitsPerSample
        _numbers(259, _SHORT, [7 if is_jpeg else 8]),  # Compression: JPEG, or Deflate
        _numbers(262, _SHORT, [6 if is_jpeg else 2]),  # PhotometricInterpretation: YCbCr, or RGB
        _numbers(277, _SHORT, [3]),  # SamplesPerPixel
        _numbers(284, _SHORT, [1]),  # PlanarConfiguration: px by px
        _text(305, f"carn {__version__}"),  # Software
        _numbers(322, _LONG, [form.tile_px]),  # TileWidth
        _numbers(323, _LONG, [form.tile_px]),  # TileLength
    ]
    if level == 0:
        entries.append(_text(270, description(spec)))  # ImageDescription
    if is_jpeg:
        entries.append(_numbers(530, _SHORT, _SUBSAMPLING_FACTORS[form.subsampling]))
    else:
        entries.append(_numbers(_PREDICTOR, _SHORT, [2]))  # differences along rows
    if spec.mpp is not None:
        mpp_x, mpp_y = level_mpp(spec.mpp, level)
        entries += [
            _numbers(282, _RATIONAL, _px_per_cm(mpp_x)),  # XResolution
            _numbers(283, _RATIONAL, _px_per_cm(mpp_y)),  # YResolution
            _numbers(296, _SHORT, [3]),  # ResolutionUnit: centimetre
        ]
    if icc_profile is not None:
        entries.append(
            _Entry(tag=34675, type=_UNDEFINED, count=len(icc_profile), content=icc_profile)
        )
    return entries


def _px_per_cm(mpp: float) -> tuple[int, int]:
    """The fraction of two LONGs that is nearest to the resolution of px this many um wide."""
    exact = Fraction(10_000) / Fraction(mpp)
    # The numerator is the larger one: it must fit as well.
    largest = int(_MAX_LONG / exact) if exact > 1 else _MAX_LONG
    found = exact.limit_denominator(max(1, min(_MAX_LONG, largest)))
    return found.numerator, found.denominator


def _numbers(tag: int, kind: int, values: Sequence[int] | NDArray[Any]) -> _Entry:
    content = np.asarray(values).astype(_DTYPES[kind]).tobytes()
    count = len(values) // 2 if kind == _RATIONAL else len(values)
    return _Entry(tag=tag, type=kind, count=count, content=content)


def _text(tag: int, text: str) -> _Entry:
    content = text.encode("ascii") + b"\0"
    return _Entry(tag=tag, type=_ASCII, count=len(content), content=content)


def _lay_out(directories: Sequence[Sequence[_Entry]]) -> bytes:
    """Header, directories, then their values, the long tile tables last.

    A reader over a network has directories and descriptions of all levels with its first request.
    """
    starts = [16]
    for entries in directories:
        starts.append(_aligned(starts[-1] + 8 + 20 * len(entries) + 8))
    tables = (_TILE_OFFSETS, _TILE_BYTE_COUNTS)
    by_reading = sorted(
        (
            (entry.tag in tables, number, entry.tag)
            for number, entries in enumerate(directories)
            for entry in entries
            if len(entry.content) > _INLINE_BYTES
        ),
    )
    found = {
        (number, entry.tag): entry
        for number, entries in enumerate(directories)
        for entry in entries
    }
    offsets: dict[tuple[int, int], int] = {}
    values = bytearray()
    for _, number, tag in by_reading:
        offsets[number, tag] = starts[-1] + len(values)
        content = found[number, tag].content
        values += content.ljust(_aligned(len(content)), b"\0")

    # Little-endian, version 43, offsets of 8 bytes, first directory.
    head = bytearray(struct.pack("<2sHHHQ", b"II", 43, 8, 0, starts[0]))
    for number, entries in enumerate(directories):
        head += struct.pack("<Q", len(entries))
        for entry in sorted(entries, key=lambda entry: entry.tag):
            head += struct.pack("<HHQ", entry.tag, entry.type, entry.count)
            place = offsets.get((number, entry.tag))
            head += entry.content.ljust(8, b"\0") if place is None else struct.pack("<Q", place)
        is_last = number + 1 == len(directories)
        head += struct.pack("<Q", 0 if is_last else starts[number + 1])
        head = head.ljust(starts[number + 1], b"\0")
    return bytes(head + values)


def _aligned(position: int) -> int:
    # Directories and values start on a word, which in a BigTIFF is of 8 bytes.
    return -(-position // 8) * 8
