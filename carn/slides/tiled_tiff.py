"""The direct reader: TIFF and SVS slides whose levels are RGB tiles, by byte range.

Tile positions come from tifffile, bytes from storage, pixels from libjpeg-turbo in its strict mode
or from imagecodecs: a damaged tile is an error of that tile alone. Bit-exact with OpenSlide on
level 0, 3 to 6 times faster on JPEG, and over S3 only the tiles that are asked for travel.
"""

import io
import itertools
import math
import re
import threading
from collections import OrderedDict
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import simplejpeg
import tifffile
from numpy.typing import NDArray

from carn.errors import SlideError
from carn.slides.jpeg_stream import (
    COLOURS_READ_BYTES,
    EOI,
    SOI,
    SOS,
    Colours,
    stream_colours,
)
from carn.slides.slide import (
    STRIP_PX,
    Level,
    Rgb,
    Slide,
    SlideProperties,
    level_downsamples,
    plausible_power,
)
from carn.slides.tiff_checks import check_is_brightfield
from carn.slides.tiff_mpp import DIRECTORY_ERRORS, TIFF_HEADS, aperio_number, tiff_mpp
from carn.slides.tile_codecs import TileCodec
from carn.storage import ByteSource

# Headers are read in blocks of this size: a directory and its neighbours arrive in one request.
HEADER_BLOCK_BYTES = 32 * 1024
# The tile lists of the largest slides take a few MB; a longer wish comes from a damaged header.
MAX_HEADER_READ_BYTES = 64 * 1024 * 1024
# All that is read of a header. The tables of a slide of 200,000 x 200,000 px take 40 to 55 MB in
# tiles of 128 px, a quarter of it in those of 256 px. Python holds ten times as much for a while.
MAX_HEADER_BYTES = 96 * 1024 * 1024
# Reads of a header, so that directories which lead in a circle end: some 20 for each directory.
MAX_HEADER_READS = 100_000
# Images in a file. Slides hold some 10; OME-TIFFs with all channels and planes hundreds.
MAX_DIRECTORIES = 2048
# Tiles larger than this are no tiles, and decoding one to cut a corner would be absurd.
MAX_TILE_PX = 8192
# Sides of tiles are multiples of 16 (TIFF 6.0, section 15). Smaller ones only cost time.
MIN_TILE_PX = 16
# Shared tables of a level go before each of its tiles: four of quantisation and eight of Huffman
# codes take 1.7 KB at the most (ITU T.81, sections B.2.4.1 and B.2.4.2).
MAX_JPEG_TABLES_BYTES = 64 * 1024
# Baseline JPEG takes 27 bits for a coefficient at the very most (ITU T.81, section F.1.2). Beside
# them a tile has its headers.
MAX_BYTES_PER_PX = 12
MAX_JPEG_HEADERS_BYTES = 1024 * 1024
# A scan of a few bytes costs a pass over the whole tile. Progressive files have about 10.
MAX_JPEG_SCANS = 100
# Decoded border tiles kept by a process, over all its slides: OpenSlide's default for one slide.
TILE_CACHE_BYTES = 32 * 1024 * 1024
# Scanners that leave tiles of bare glass out.
SPARSE_VENDORS = ("aperio", "philips")
# Bytes that an encoder may leave behind the last px of a stream. More come of a stream that was
# damaged so that its px ended early.
MAX_STRAY_BYTES = 16
_STRAY_BYTES = re.compile(r"(\d+) extraneous bytes before marker 0xd9")
# TIFF tags by number (TIFF 6.0, https://www.itu.int/itudoc/itu-t/com16/tiff-fx/docs/tiff6.pdf).
TAG_ICC_PROFILE = 34675
# APP14 "Adobe": the one marker by which a JPEG says whether its components are RGB (transform 0)
# or YCbCr (transform 1). TIFF says it in a tag instead, so the marker is put in before decoding.
ADOBE_RGB = b"\xff\xee\x00\x0eAdobe\x00\x64\x00\x00\x00\x00\x00"
ADOBE_YCBCR = b"\xff\xee\x00\x0eAdobe\x00\x64\x00\x00\x00\x00\x01"


_HOSTILE = ", more than any slide's; it is damaged or hostile"


class NotTiledTiffError(Exception):
    """The file is none of this reader's; another may read it."""


class _TileCache:
    """Decoded tiles that were needed in part, least recently used out first; thread-safe.

    Neighbouring regions that do not follow the slide's tile grid share the tiles at their borders.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._bytes = 0
        self._tiles: OrderedDict[tuple[int, ...], Rgb] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: tuple[int, ...]) -> Rgb | None:
        with self._lock:
            tile = self._tiles.get(key)
            if tile is not None:
                self._tiles.move_to_end(key)
            return tile

    def put(self, key: tuple[int, ...], tile: Rgb) -> None:
        with self._lock:
            if key not in self._tiles and tile.nbytes <= self._max_bytes:
                self._tiles[key] = tile
                self._bytes += tile.nbytes
                while self._bytes > self._max_bytes:
                    self._bytes -= self._tiles.popitem(last=False)[1].nbytes


_tile_cache = _TileCache(TILE_CACHE_BYTES)
_slide_ids = itertools.count()


@dataclass(frozen=True, kw_only=True)
class _TiledLevel:
    """A level's tile grid. `offsets` and `lengths` are per tile, row by row; length 0 is absent."""

    width_px: int
    height_px: int
    tile_width_px: int
    tile_height_px: int
    offsets: NDArray[np.uint64]
    lengths: NDArray[np.uint32]
    # The level's shared tables, from behind SOI and application markers on; colours where a stream
    # does not say its own.
    tables: bytes
    colours: Colours
    tag_colours: Colours
    # None of JPEG.
    codec: TileCodec | None

    @property
    def tiles_across(self) -> int:
        return math.ceil(self.width_px / self.tile_width_px)

    @property
    def tiles_down(self) -> int:
        return math.ceil(self.height_px / self.tile_height_px)

    def has_tiles(self, x0: int, y0: int, x1: int, y1: int) -> bool:
        """Whether any tile of a box in px of the level is there."""
        grid = self.lengths[: self.tiles_across * self.tiles_down]
        rows = slice(y0 // self.tile_height_px, (y1 - 1) // self.tile_height_px + 1)
        columns = slice(x0 // self.tile_width_px, (x1 - 1) // self.tile_width_px + 1)
        return bool(grid.reshape(-1, self.tiles_across)[rows, columns].any())

    @property
    def max_stream_bytes(self) -> int:
        if self.codec is not None:
            return self.codec.max_stream_bytes
        return MAX_JPEG_HEADERS_BYTES + MAX_BYTES_PER_PX * self.tile_width_px * self.tile_height_px


class TiledTiffSlide(Slide):
    """A TIFF of RGB tiles. Opened by `carn.slides.open_slide`."""

    reader = "tiled-tiff"

    def __init__(self, source: ByteSource) -> None:
        """Read the header of an open file or object; closes it when that fails.

        Raises:
            NotTiledTiffError: not a TIFF whose levels are all tiles of 8-bit RGB.
            SlideError: such a TIFF, but with an impossible header.
            StorageError: storage failed.
        """
        self._source = source
        self._id = next(_slide_ids)
        tiled_levels, properties = _read_header(source)
        extents = [(level.width_px, level.height_px) for level in tiled_levels]
        tile = (tiled_levels[0].tile_width_px, tiled_levels[0].tile_height_px)
        downsamples = level_downsamples(extents, tile=tile)
        width, height = extents[0]
        levels = tuple(
            # A level padded to whole tiles ends where the slide does.
            Level(
                width_px=min(w, math.ceil(width / downsample)),
                height_px=min(h, math.ceil(height / downsample)),
                downsample=downsample,
            )
            for (w, h), downsample in zip(extents, downsamples, strict=True)
        )
        notes = (
            *properties.notes,
            *_colour_notes(tiled_levels[0], source),
            *_absence_notes(tiled_levels[0], vendor=properties.vendor),
        )
        super().__init__(source.uri, levels=levels, properties=replace(properties, notes=notes))
        self._tiled_levels = tiled_levels

    def _read_level(self, x: int, y: int, width: int, height: int, *, level: int) -> Rgb:
        grid = self._tiled_levels[level]
        tile_width, tile_height = grid.tile_width_px, grid.tile_height_px
        places = [
            (column, row)
            for row in range(y // tile_height, (y + height - 1) // tile_height + 1)
            for column in range(x // tile_width, (x + width - 1) // tile_width + 1)
        ]
        tiles = {place: _tile_cache.get((self._id, level, *place)) for place in places}
        missing = [place for place in places if tiles[place] is None]
        streams = dict(zip(missing, self._fetch(missing, grid, level=level), strict=True))
        region = np.empty((height, width, 3), dtype=np.uint8)
        for column, row in places:
            left, top = column * tile_width - x, row * tile_height - y
            x0, x1 = max(left, 0), min(left + tile_width, width)
            y0, y1 = max(top, 0), min(top + tile_height, height)
            tile = tiles[column, row]
            if tile is None:
                stream = streams[column, row]
                if stream is None:
                    box = (x + x0, y + y0, x1 - x0, y1 - y0)
                    region[y0:y1, x0:x1] = self._without_tile(box, level=level)
                    continue
                tile = self._decode(stream, column, row, grid, level=level)
                if (y1 - y0, x1 - x0) != tile.shape[:2]:
                    # The rest of it is what a neighbouring region will ask for.
                    _tile_cache.put((self._id, level, column, row), tile)
            region[y0:y1, x0:x1] = tile[y0 - top : y1 - top, x0 - left : x1 - left]
        return region

    def _without_tile(self, box: tuple[int, int, int, int], *, level: int) -> Rgb:
        """Px of a box whose tile is absent: of the next finer level that has some; white else."""
        x, y, width, height = box
        for finer in range(level - 1, -1, -1):
            step = self.levels[level].downsample / self.levels[finer].downsample
            found = self.levels[finer]
            x0, y0 = min(int(x * step), found.width_px - 1), min(int(y * step), found.height_px - 1)
            x1 = max(x0 + 1, min(round((x + width) * step), found.width_px))
            y1 = max(y0 + 1, min(round((y + height) * step), found.height_px))
            if (x1 - x0) * (y1 - y0) > STRIP_PX:
                break
            if self._tiled_levels[finer].has_tiles(x0, y0, x1, y1):
                pixels = self._read_level(x0, y0, x1 - x0, y1 - y0, level=finer)
                return smaller(pixels, (width, height))
        return np.full((height, width, 3), 255, dtype=np.uint8)

    def _fetch(
        self, places: list[tuple[int, int]], grid: _TiledLevel, *, level: int
    ) -> list[bytes | None]:
        """The JPEG stream of each (column, row), None for tiles the scanner left out."""
        numbers = [row * grid.tiles_across + column for column, row in places]
        ranges = [(int(grid.offsets[n]), int(grid.lengths[n])) for n in numbers]
        for (column, row), (start, length) in zip(places, ranges, strict=True):
            if length and start + length > self._source.size:
                raise self._damaged(
                    f"its {length} bytes at {start} lie beyond the end of the file "
                    f"({self._source.size} bytes): the file is truncated",
                    column * grid.tile_width_px,
                    row * grid.tile_height_px,
                    level=level,
                )
            if length > grid.max_stream_bytes:
                raise self._damaged(
                    f"it claims {length} bytes, more than a tile of {grid.tile_width_px} x "
                    f"{grid.tile_height_px} px can take ({grid.max_stream_bytes})",
                    column * grid.tile_width_px,
                    row * grid.tile_height_px,
                    level=level,
                )
        streams = self._source.read_ranges([span for span in ranges if span[1]])
        present = iter(streams)
        return [next(present) if length else None for _, length in ranges]

    def _decode(
        self,
        stream: bytes,
        column: int,
        row: int,
        grid: _TiledLevel,
        *,
        level: int,
        strict: bool = True,
    ) -> Rgb:
        expected = (grid.tile_height_px, grid.tile_width_px, 3)
        fail = partial(self._damaged, x=column * expected[1], y=row * expected[0], level=level)
        if grid.codec is not None:
            try:
                return grid.codec.decode(stream)
            except ValueError as error:
                raise fail(str(error)) from error
        if stream[:2] != SOI:
            raise fail("it does not start as a JPEG stream")
        if (num_scans := stream.count(SOS)) > MAX_JPEG_SCANS:
            raise fail(f"it holds {num_scans} scans, more than {MAX_JPEG_SCANS}")
        try:
            tile: Rgb = simplejpeg.decode_jpeg(
                with_colours(stream, grid),
                colorspace="RGB",
                # Bounds the pixels a hostile stream can claim to those of a tile.
                buffer=np.empty(math.prod(expected), dtype=np.uint8),
                strict=strict,
            )
        except ValueError as error:
            if strict and _is_harmless(str(error)):
                return self._decode(stream, column, row, grid, level=level, strict=False)
            raise fail(f"libjpeg-turbo says {str(error)!r}") from error
        if tile.shape != expected:
            raise fail(f"it holds {tile.shape[1]} x {tile.shape[0]} px instead of a tile's")
        return tile

    def close(self) -> None:
        self._source.close()


def with_colours(stream: bytes, grid: _TiledLevel) -> bytes:
    """A tile's stream with the level's tables, and a marker that says which colours it has.

    Where the stream says it itself, that counts: QuPath up to 0.4.3 wrote YCbCr under a tag of RGB.
    """
    colours = stream_colours(stream) or grid.colours
    marker = ADOBE_RGB if colours == "rgb" else ADOBE_YCBCR
    return SOI + marker + grid.tables + stream[_skip_application_markers(stream) :]


def _colour_notes(grid: _TiledLevel, source: ByteSource) -> tuple[str, ...]:
    """Say where the streams of a level have other colours than the TIFF says, by one of them."""
    present = np.flatnonzero(grid.lengths)
    if grid.codec is not None or not len(present):
        return ()
    middle = present[len(present) // 2]
    length = min(int(grid.lengths[middle]), COLOURS_READ_BYTES)
    (head,) = source.read_ranges([(int(grid.offsets[middle]), length)])
    found = stream_colours(head) or grid.colours
    if found == grid.tag_colours:
        return ()
    names = {"rgb": "RGB", "ycbcr": "YCbCr"}
    return (f"colours by its JPEG streams, {names[found]}, not by the TIFF tag",)


def _absence_notes(grid: _TiledLevel, *, vendor: str) -> tuple[str, ...]:
    """Say how many tiles a file lacks that no scanner wrote, and so did not leave out."""
    number = int((grid.lengths[: grid.tiles_across * grid.tiles_down] == 0).sum())
    if not number or vendor in SPARSE_VENDORS:
        return ()
    return (f"{number} of its {grid.tiles_across * grid.tiles_down} tiles are absent: white",)


def smaller(pixels: Rgb, size: tuple[int, int]) -> Rgb:
    """Means over the px that each px of a smaller picture of (width, height) covers."""
    from PIL import Image

    return np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BOX))


def _is_harmless(warning: str) -> bool:
    """Whether libjpeg warns of a few bytes between the last px and the end of a stream, no more."""
    found = _STRAY_BYTES.search(warning)
    return found is not None and int(found[1]) <= MAX_STRAY_BYTES


def _skip_application_markers(stream: bytes) -> int:
    # A JFIF or Adobe marker of the tile's own would overrule what the TIFF says of its colours.
    position = len(SOI)
    while re.match(rb"\xff[\xe0-\xef]", stream[position : position + 2]):
        position += 2 + int.from_bytes(stream[position + 2 : position + 4], "big")
    return position


# -------------------------------------------------------------------------------------- header


def _read_header(source: ByteSource) -> tuple[list[_TiledLevel], SlideProperties]:
    file = HeaderFile(source)
    try:
        with tifffile.TiffFile(file) as tiff:
            found = _pages(tiff, source.uri)
            # The largest is level 0, wherever it stands.
            pages = sorted(filter(_is_level, found), key=lambda page: -page.imagewidth)
            # Before anybody else gets the file, too: what OpenSlide finds no memory for ends the
            # process.
            _check_byte_counts(found, source)
            if not tiff.is_ndpi:  # whose levels are one JPEG each, cut at its restart markers
                _check_tiles(pages, source.uri)
            if pages:
                others = [page for page in found if page is not pages[0]]
                check_is_brightfield([pages[0], *others], source.uri)
            if tiff.is_scn or tiff.is_bif or tiff.is_ndpi or tiff.is_qpi:
                # Several images, overlapping tiles or strips under a TIFF's clothes.
                raise NotTiledTiffError("a vendor's own layout")
            if not pages or not _is_level(found[0]):
                raise NotTiledTiffError("the first image is not tiled")
            if not all(_is_rgb_jpeg(page) or TileCodec.of(page) for page in pages):
                raise NotTiledTiffError(_why_not(pages))
            levels = [_tiled_level(page, source.uri) for page in _pyramid(pages)]
            _check_is_whole(levels, source)
            return levels, _properties(tiff, pages[0])
    except SlideError:
        raise
    except (NotTiledTiffError, tifffile.TiffFileError, *DIRECTORY_ERRORS) as error:
        # tifffile takes what the file refuses for damage, and goes on or gives up.
        if file.refusal is not None:
            raise SlideError(source.uri, file.refusal) from error
        if isinstance(error, NotTiledTiffError):
            raise
        # What cannot be checked is not handed on.
        if source.read_ranges([(0, len(TIFF_HEADS[0]))])[0] in TIFF_HEADS:
            raise SlideError(
                source.uri, f"cannot be opened: a damaged TIFF directory ({error!s:.200})"
            ) from error
        raise NotTiledTiffError(str(error)) from error


def _pages(tiff: tifffile.TiffFile, uri: str) -> list[Any]:
    pages = _listed(tiff.pages, uri)
    # OME-TIFF keeps the coarser levels of its first image in SubIFDs.
    below = _listed(pages[0].pages, uri) if pages and pages[0].subifds else []
    return pages[:1] + below if below else pages


def _listed(pages: Any, uri: str) -> list[Any]:
    # One by one: a list asks for their number first, and a chain that bites its tail has none.
    found = list(itertools.islice(iter(pages), MAX_DIRECTORIES + 1))
    if len(found) > MAX_DIRECTORIES:
        raise SlideError(
            uri,
            f"holds more than {MAX_DIRECTORIES} images, or directories that lead in a circle; the "
            "header is damaged or hostile",
        )
    return found


def _is_level(page: Any) -> bool:
    is_mask = bool(page.subfiletype & 4)
    return bool(page.is_tiled) and not is_mask


def _check_byte_counts(pages: list[Any], source: ByteSource) -> None:
    for page in pages:
        counts = np.asarray(page.databytecounts, dtype=np.uint64)
        if counts.size and counts.max() > source.size:
            raise SlideError(
                source.uri,
                f"is truncated or damaged: it lists {counts.max()} bytes for a tile, and has "
                f"{source.size} in all; transfer it again",
            )


def _check_tiles(pages: list[Any], uri: str) -> None:
    # Whoever decodes such tiles, whatever their compression, would spend memory or time on nothing.
    for page in pages:
        sides = page.tilewidth, page.tilelength
        if not MIN_TILE_PX <= min(sides) <= max(sides) <= MAX_TILE_PX:
            raise SlideError(
                uri,
                f"has tiles of {sides[0]} x {sides[1]} px; sides of {MIN_TILE_PX} to {MAX_TILE_PX} "
                "px are read: store it anew with such tiles",
            )


def _why_not(pages: list[Any]) -> str:
    """Why tiles are not read directly, with the codec's own name."""
    found = sorted({_codec_name(page) for page in pages})
    colours = getattr(pages[0].photometric, "name", pages[0].photometric)
    return (
        f"tiles of {', '.join(found)} in {colours} are not read by it; store it anew as RGB in "
        "tiles of JPEG or Deflate"
    )


def _codec_name(page: Any) -> str:
    # A number that tifffile does not know stays one.
    return str(getattr(page.compression, "name", page.compression))


def _is_rgb_jpeg(page: Any) -> bool:
    return (
        page.compression == tifffile.COMPRESSION.JPEG
        and page.photometric in (tifffile.PHOTOMETRIC.RGB, tifffile.PHOTOMETRIC.YCBCR)
        and page.samplesperpixel == 3
        and page.bitspersample == 8
        and page.planarconfig == tifffile.PLANARCONFIG.CONTIG
        and page.imagedepth == 1
    )


def _pyramid(pages: list[Any]) -> list[Any]:
    """The largest page and those that are the same, smaller; finest first.

    A page is a level when its shape is the first one's, and it says that it is reduced, is below
    the first in the file, or is smaller by a whole factor, but for rounding and padding to tiles.
    """
    base = pages[0]
    shape = base.imagewidth / base.imagelength
    levels = [base]
    for page in pages[1:]:
        is_smaller = page.imagewidth < levels[-1].imagewidth
        # Padding to whole tiles bends the shape of small levels; a macro image bends it more.
        slack = (
            1 + (page.tilewidth + 1) / page.imagewidth + (page.tilelength + 1) / page.imagelength
        )
        ratio = page.imagewidth / page.imagelength / shape
        # Of the main chain, or of a page's SubIFDs.
        says_so = bool(page.subfiletype & 1) or len(page.treeindex) > 1
        has_shape = 1 / slack <= ratio <= slack
        if is_smaller and has_shape and (says_so or _divides(base, page)):
            levels.append(page)
    return levels


def _divides(base: Any, page: Any) -> bool:
    """Whether a page is smaller than another by a whole factor, rounded or padded to tiles."""
    sides = (
        (base.imagewidth, page.imagewidth, page.tilewidth),
        (base.imagelength, page.imagelength, page.tilelength),
    )
    ratio = max(full / found for full, found, _ in sides)
    # Padding hides the factor of small levels, which is a power of two then.
    factors = (max(1, round(ratio)), 2 ** max(0, round(math.log2(ratio))))
    return any(
        all(
            abs(found - full / factor) <= max(1.0, 0.002 * full / factor)
            or found == math.ceil(full / factor / tile) * tile
            for full, found, tile in sides
        )
        for factor in factors
    )


def _tiled_level(page: Any, uri: str) -> _TiledLevel:
    offsets = np.asarray(page.dataoffsets, dtype=np.uint64)
    lengths = np.asarray(page.databytecounts, dtype=np.uint32)
    # By the tags: where they say nothing, tifffile takes a tile's extent for the image's.
    width, height = (int(page.tags.valueof(name, 0)) for name in ("ImageWidth", "ImageLength"))
    if min(width, height, page.tilewidth, page.tilelength) < 1:
        raise SlideError(uri, f"has a level without pixels ({width} x {height})")
    expected = math.ceil(width / page.tilewidth) * math.ceil(height / page.tilelength)
    if len(offsets) < expected or len(lengths) < expected:
        raise SlideError(
            uri,
            f"lists {min(len(offsets), len(lengths))} tiles for a level of {width} x {height} px "
            f"that needs {expected}: the header is damaged or cut off",
        )
    tables = page.jpegtables or b""
    if len(tables) > MAX_JPEG_TABLES_BYTES:
        raise SlideError(
            uri,
            f"has JPEG tables of {len(tables)} bytes, more than {MAX_JPEG_TABLES_BYTES}; the "
            "header is damaged or hostile",
        )
    by_tag: Colours = "rgb" if page.photometric == tifffile.PHOTOMETRIC.RGB else "ycbcr"
    return _TiledLevel(
        width_px=width,
        height_px=height,
        tile_width_px=page.tilewidth,
        tile_height_px=page.tilelength,
        offsets=offsets,
        lengths=lengths,
        tables=tables[_skip_application_markers(tables) :].removesuffix(EOI) if tables else b"",
        colours=stream_colours(tables) or by_tag,
        tag_colours=by_tag,
        codec=TileCodec.of(page),
    )


def _check_is_whole(levels: list[_TiledLevel], source: ByteSource) -> None:
    """Refuse a file that was cut off: transferring it again helps, reading its remains does not."""
    beyond = sum(
        int(((level.offsets + level.lengths > source.size) & (level.lengths > 0)).sum())
        for level in levels
    )
    if beyond:
        total = sum(len(level.offsets) for level in levels)
        raise SlideError(
            source.uri,
            f"is truncated: {beyond} of its {total} tiles lie beyond the end of the file "
            f"({source.size} bytes); transfer it again",
        )


def _properties(tiff: tifffile.TiffFile, page: Any) -> SlideProperties:
    description = page.description or ""
    icc = page.tags.valueof(TAG_ICC_PROFILE)
    (mpp_x, mpp_y), said_by = tiff_mpp(tiff, page)
    is_aperio = description.startswith("Aperio")
    power = plausible_power(aperio_number(description, "AppMag")) if is_aperio else None
    is_xml = said_by == "OME-XML"
    return SlideProperties(
        mpp_x=mpp_x,
        mpp_y=mpp_y,
        objective_power=power,
        vendor="aperio" if is_aperio else "philips" if tiff.is_philips else "generic-tiff",
        icc_profile=bytes(icc) if icc else None,
        notes=("um per px by OME-XML, not by the resolution tags",) if is_xml else (),
    )


class HeaderFile(io.RawIOBase):
    """A read-only file over a byte source for tifffile, which reads directories in small pieces.

    Blocks are kept: directories are short-lived, so what is kept is freed with the parse. What a
    header may cost is bounded: the read that would go beyond is refused, and all that follow.

    Attributes:
        refusal: why; None as long as nothing was refused.
    """

    def __init__(self, source: ByteSource) -> None:
        self._source = source
        self._position = 0
        self._blocks: dict[int, bytes] = {}
        self._num_reads = 0
        self._num_bytes = 0
        self.refusal: str | None = None
        self.name = source.uri

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._source.size}
        self._position = max(0, start[whence] + offset)
        return self._position

    def read(self, size: int = -1) -> bytes:
        end = self._source.size if size < 0 else min(self._position + size, self._source.size)
        if end <= self._position:
            return b""
        self._count(end - self._position)
        first, last = self._position // HEADER_BLOCK_BYTES, (end - 1) // HEADER_BLOCK_BYTES
        missing = [n for n in range(first, last + 1) if n not in self._blocks]
        if missing:
            span = (
                missing[0] * HEADER_BLOCK_BYTES,
                (missing[-1] - missing[0] + 1) * HEADER_BLOCK_BYTES,
            )
            (content,) = self._source.read_ranges([span])
            for n in range(missing[0], missing[-1] + 1):
                start = (n - missing[0]) * HEADER_BLOCK_BYTES
                self._blocks[n] = content[start : start + HEADER_BLOCK_BYTES]
        joined = b"".join(self._blocks[n] for n in range(first, last + 1))
        start = self._position - first * HEADER_BLOCK_BYTES
        content = joined[start : start + end - self._position]
        self._position += len(content)
        return content

    def _count(self, num_bytes: int) -> None:
        self._num_reads += 1
        self._num_bytes += num_bytes
        if num_bytes > MAX_HEADER_READ_BYTES:
            self.refusal = f"has a directory entry of {num_bytes} bytes"
        elif self._num_bytes > MAX_HEADER_BYTES:
            self.refusal = f"has a header of more than {MAX_HEADER_BYTES} bytes"
        elif self._num_reads > MAX_HEADER_READS:
            self.refusal = "has a header without an end"
        if self.refusal is not None:
            self.refusal = self.refusal.removesuffix(_HOSTILE) + _HOSTILE
            raise ValueError(self.refusal)

    def readinto(self, buffer: Any) -> int:
        # tifffile reads NDPI's tables into arrays of numbers.
        view = memoryview(buffer).cast("B")
        content = self.read(len(view))
        view[: len(content)] = content
        return len(content)
