"""Read how the pixels of a slide are stored, out of the headers of its file.

Headers are read by byte range, so that a slide on object storage stays there. What a JPEG says of
itself is read by Pillow. What cannot be told is said to be unknown, never guessed.
"""

import io
import itertools
import math
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import tifffile
from PIL import Image

from carn import storage

# The tables of the encoders. This module of another room imports nothing of the project.
from carn.degradation.jpeg import TABLES, Tables, quantisation_tables
from carn.errors import SlideError
from carn.slides.dicom import (
    DICOM_HEAD_BYTES,
    DICOM_JPEG,
    DICOM_ROOT,
    DicomLevel,
    dicom_levels,
)
from carn.slides.image import IMAGE_FORMATS
from carn.slides.jpeg_stream import EOI, SOI, stream_colours
from carn.slides.slide import Level, Slide
from carn.slides.tiff_mpp import DIRECTORY_ERRORS, TIFF_HEADS
from carn.slides.tiled_tiff import MAX_DIRECTORIES, MAX_JPEG_TABLES_BYTES, HeaderFile
from carn.storage import ByteSource

Codec = Literal["jpeg", "jpeg2000", "lossless", "other", "unknown"]
JpegSubsampling = Literal["4:4:4", "4:2:2", "4:2:0", "4:4:0", "4:1:1", "4:1:0"]

# What is read of a JPEG for its headers: an ICC profile of 64 KB a marker fits, and all tables.
MAX_JPEG_HEAD_BYTES = 1024 * 1024
# Tiles of a level that are tried until one has a whole header.
MAX_TILES_TRIED = 3

# Source: https://www.loc.gov/preservation/digital/formats/content/tiff_tags.shtml, tag 259, and the
# vendors' own numbers that tifffile knows.
_TIFF_LOSSLESS = (1, 5, 8, 32773, 32946, 34925, 34926, 34933, 50000)
_TIFF_JPEG, _TIFF_OLD_JPEG = 7, 6
_TIFF_JPEG2000 = (33003, 33004, 33005, 34712)
_DICOM_CODECS: dict[str, tuple[Codec, str]] = {
    DICOM_ROOT: ("lossless", "uncompressed"),
    f"{DICOM_ROOT}.1": ("lossless", "uncompressed"),
    f"{DICOM_ROOT}.1.99": ("lossless", "deflate"),
    f"{DICOM_ROOT}.2": ("lossless", "uncompressed"),
    f"{DICOM_ROOT}.5": ("lossless", "RLE"),
    f"{DICOM_ROOT}.4.57": ("lossless", "lossless JPEG"),
    f"{DICOM_ROOT}.4.70": ("lossless", "lossless JPEG"),
    f"{DICOM_ROOT}.4.80": ("lossless", "JPEG-LS"),
    f"{DICOM_ROOT}.4.81": ("other", "near-lossless JPEG-LS"),
    f"{DICOM_ROOT}.4.90": ("lossless", "lossless JPEG 2000"),
    f"{DICOM_ROOT}.4.91": ("jpeg2000", "JPEG 2000"),
    f"{DICOM_ROOT}.4.110": ("lossless", "lossless JPEG XL"),
    f"{DICOM_ROOT}.4.201": ("lossless", "lossless HTJ2K"),
    f"{DICOM_ROOT}.4.202": ("lossless", "lossless HTJ2K"),
}
# "(256x256) JPEG/RGB Q=70|AppMag = 20|..." of Aperio, "level=5 mag=1.28125 quality=80" of Philips.
_CLAIM = re.compile(r"\b(?:Q|quality)\s*=\s*(\d{1,3})\b")
_SUBSAMPLINGS: dict[tuple[float, float], JpegSubsampling] = {
    (1, 1): "4:4:4",
    (2, 1): "4:2:2",
    (2, 2): "4:2:0",
    (1, 2): "4:4:0",
    (4, 1): "4:1:1",
    (4, 2): "4:1:0",
}


@dataclass(frozen=True, kw_only=True)
class JpegQuality:
    """The quality whose tables are a file's, or the nearest to them.

    Attributes:
        tables: whose tables are scaled.
        quality: 1..100, as the IJG's libjpeg scales.
        is_exact: whether all steps are the same.
        luma_distance: mean of |log2(step / that of the quality)|; 0 where the steps are the same.
        chroma_distance: likewise; Philips' scanners, for one, use luma's table for chroma.
    """

    tables: Tables
    quality: int
    is_exact: bool
    luma_distance: float
    chroma_distance: float


@dataclass(frozen=True, kw_only=True)
class Compression:
    """The way a level's pixels are stored.

    Attributes:
        codec: `lossless` whatever the method; `other` is lossy by a method that is not looked into.
        name: the method in words.
        luma_table: 64 steps in natural order, of the first component; None where it is not JPEG.
        chroma_table: of the second component; None of grey images.
        quality: what these correspond to.
        subsampling: of chroma; None where it is not JPEG, or grey, or of no common form.
        is_rgb: JPEG of red, green and blue as they are: luma's table serves all three.
        claimed_quality: what the file's description says, whether true or not; None where nothing.
        unknown: why more is not known; None where nothing is missing.
    """

    codec: Codec
    name: str
    luma_table: tuple[int, ...] | None = None
    chroma_table: tuple[int, ...] | None = None
    quality: JpegQuality | None = None
    subsampling: JpegSubsampling | None = None
    is_rgb: bool = False
    claimed_quality: int | None = None
    unknown: str | None = None

    @property
    def is_lossless(self) -> bool:
        """Tell whether pixels are known to be stored without loss."""
        return self.codec == "lossless"

    def __str__(self) -> str:
        """Write one line for people."""
        parts = [self.name]
        if self.quality is not None:
            found = self.quality
            exact = "exact" if found.is_exact else "nearest, steps off by "
            if not found.is_exact:
                exact += f"2^{found.luma_distance:.3f} in luma, "
                exact += f"2^{found.chroma_distance:.3f} in chroma"
            parts.append(f"quality {found.quality} by {found.tables} tables ({exact})")
        if self.luma_table is not None and self.is_rgb:
            parts.append("RGB, 4:4:4")
        elif self.luma_table is not None:
            parts.append(f"chroma {self.subsampling or 'none'}")
        if self.claimed_quality is not None:
            parts.append(f"the file says Q={self.claimed_quality}")
        if self.unknown is not None:
            parts.append(f"no more is known: {self.unknown}")
        return ", ".join(parts)


class _UnknownError(Exception):
    """Something cannot be told; the message says why."""


def read_compression(slide: Slide, *, level: int = 0) -> Compression:
    """Say how a level of an open slide or plain image is stored.

    TIFF (SVS, NDPI, Philips and generic), DICOM, JPEG, PNG, BMP and WebP are looked into. Of a
    level's tiles one from the middle speaks for all; scanners encode a level's tiles alike.

    Args:
        slide: from `carn.slides.opening`.
        level: pyramid level.

    Raises:
        ValueError: no such level.
        StorageError: storage failed.
    """
    if not 0 <= level < len(slide.levels):
        raise ValueError(f"{slide.uri} has levels 0..{len(slide.levels) - 1}, not {level}")
    if slide.reader == "ome-zarr":  # of its codecs, those that are there lose nothing
        return Compression(codec="lossless", name="Zarr")
    source = storage.open_source(slide.uri)
    try:
        (head,) = source.read_ranges([(0, DICOM_HEAD_BYTES)])
        if head[:4] in TIFF_HEADS:
            return _of_tiff(source, slide.levels[level], is_finest=level == 0)
        if head[128:132] == b"DICM":
            return _of_dicom(source, head, slide.levels[level])
        if slide.reader == "image":
            return _of_image(source, head)
        raise _UnknownError(f"headers of {slide.properties.vendor} files are not looked into")
    except _UnknownError as error:
        return Compression(codec="unknown", name="unknown compression", unknown=str(error))
    finally:
        source.close()


def match_tables(luma: tuple[int, ...], chroma: tuple[int, ...] | None) -> JpegQuality:
    """Find the quality of the IJG's and of mozjpeg's tables that a pair of tables is nearest to.

    Nearest in luma, then in chroma. Where several qualities have the same tables (mozjpeg's flat
    one from 97 on), the highest.

    Args:
        luma: 64 steps in natural order.
        chroma: likewise; None where luma's alone is to be compared.
    """
    best: JpegQuality | None = None
    least = (math.inf, math.inf)
    for tables in TABLES:
        for quality in range(100, 0, -1):
            of_luma, of_chroma = quantisation_tables(quality, tables=tables)
            in_luma = _distance(luma, of_luma)
            in_chroma = 0.0 if chroma is None else _distance(chroma, of_chroma)
            if (in_luma, in_chroma) < least:
                least = in_luma, in_chroma
                best = JpegQuality(
                    tables=tables,
                    quality=quality,
                    is_exact=luma == of_luma and chroma in (None, of_chroma),
                    luma_distance=in_luma,
                    chroma_distance=in_chroma,
                )
    assert best is not None
    return best


def _distance(steps: tuple[int, ...], others: tuple[int, ...]) -> float:
    # A damaged table may hold 0.
    return sum(
        abs(math.log2(max(step, 0.5) / other)) for step, other in zip(steps, others, strict=True)
    ) / len(steps)


# --------------------------------------------------------------------------------------- JPEG


def _of_jpeg(stream: bytes, *, is_rgb: bool | None = None, name: str = "JPEG") -> Compression:
    """Read the headers of a JPEG stream; `is_rgb` is given where its container knows."""
    try:
        with warnings.catch_warnings():
            # Pixels are not decoded: their number is no danger.
            warnings.simplefilter("ignore")
            image: Any = Image.open(io.BytesIO(stream), formats=("JPEG",))
    # Whatever Pillow came upon: it names the buffer, which says nothing.
    except Exception as error:
        raise _UnknownError("its JPEG header is damaged or of a kind that is not read") from error
    layers, tables = image.layer, image.quantization
    try:
        found = [tuple(int(step) for step in tables[layer[3]]) for layer in layers[:2]]
    except KeyError as error:
        raise _UnknownError("its JPEG stream has no quantisation tables") from error
    if not found or any(len(table) != 64 for table in found):
        raise _UnknownError("its JPEG quantisation tables are damaged")
    # What the stream says of itself counts, as it does for the readers.
    said = stream_colours(stream)
    is_rgb = said == "rgb" if said is not None else bool(is_rgb)
    is_colour = len(layers) == 3
    chroma = found[1] if is_colour else None
    subsampling = None
    if is_colour:
        (_, across, down, _), (_, chroma_across, chroma_down, _) = layers[:2]
        ratio = across / max(1, chroma_across), down / max(1, chroma_down)
        subsampling = _SUBSAMPLINGS.get(ratio)
    return Compression(
        codec="jpeg",
        name=name,
        luma_table=found[0],
        chroma_table=chroma,
        quality=match_tables(found[0], None if is_rgb else chroma),
        subsampling=subsampling,
        is_rgb=is_rgb,
    )


# --------------------------------------------------------------------------------------- TIFF


def _of_tiff(source: ByteSource, level: Level, *, is_finest: bool) -> Compression:
    file = HeaderFile(source)
    try:
        with tifffile.TiffFile(file) as tiff:
            page = _page_of(tiff, level, is_finest=is_finest)
            return _of_page(page, source, first=tiff.pages[0])
    # A header that was refused is damage to tifffile, and to us.
    except (tifffile.TiffFileError, SlideError, *DIRECTORY_ERRORS) as error:
        raise _UnknownError(f"its TIFF directory is damaged ({error!s:.200})") from error


def _page_of(tiff: tifffile.TiffFile, level: Level, *, is_finest: bool) -> Any:
    """Find the directory with a level's pixels."""
    pages = list(itertools.islice(_pages(tiff), MAX_DIRECTORIES))
    fitting = [page for page in pages if _is_of(page, level)]
    if fitting:
        # A coarser level of less than a tile may fit as well, but not as closely.
        return min(fitting, key=_num_px)
    if is_finest and pages:
        # A vendor's tiles overlap, or have borders: the finest pixels there are remain so.
        return max(pages, key=_num_px)
    raise _UnknownError(
        f"no image in the file is of {level.width_px} x {level.height_px} px; the level is made "
        "of a finer one"
    )


def _is_of(page: Any, level: Level) -> bool:
    # Levels may be padded to whole tiles.
    beyond_x, beyond_y = page.imagewidth - level.width_px, page.imagelength - level.height_px
    is_wide = 0 <= beyond_x < max(1, page.tilewidth)
    return bool(is_wide and 0 <= beyond_y < max(1, page.tilelength))


def _num_px(page: Any) -> int:
    return int(page.imagewidth) * int(page.imagelength)


def _pages(tiff: tifffile.TiffFile) -> Iterator[Any]:
    for number, page in enumerate(tiff.pages):
        yield page
        # OME-TIFF keeps the coarser levels of its first image in SubIFDs.
        if number == 0 and page.subifds:
            yield from page.pages or ()


def _of_page(page: Any, source: ByteSource, *, first: Any) -> Compression:
    number = int(page.compression)
    claim = _claimed(page.description or "") or _claimed(first.description or "")
    name = tifffile.COMPRESSION(number).name.lower().replace("_", " ")
    codec: Codec = "other"
    if number in _TIFF_LOSSLESS:
        codec, name = "lossless", "uncompressed" if number == 1 else f"lossless ({name})"
    elif number in _TIFF_JPEG2000:
        codec, name = "jpeg2000", "JPEG 2000"
    elif number in (_TIFF_JPEG, _TIFF_OLD_JPEG):
        return _of_jpeg_page(page, source, claim=claim)
    return Compression(codec=codec, name=name, claimed_quality=claim)


def _of_jpeg_page(page: Any, source: ByteSource, *, claim: int | None) -> Compression:
    is_rgb = None
    if page.photometric in (tifffile.PHOTOMETRIC.RGB, tifffile.PHOTOMETRIC.YCBCR):
        is_rgb = page.photometric == tifffile.PHOTOMETRIC.RGB and page.samplesperpixel == 3
    why: str = "no tile of it is stored"
    for stream in _heads(page, source):
        try:
            found = _of_jpeg(stream, is_rgb=is_rgb)
        except _UnknownError as error:
            why = str(error)
            continue
        return Compression(**{**vars(found), "claimed_quality": claim})
    return Compression(codec="jpeg", name="JPEG", claimed_quality=claim, unknown=why)


def _heads(page: Any, source: ByteSource) -> Iterator[bytes]:
    """Read the beginnings of some JPEG streams of a page, with the tables that all share."""
    header = page.jpegheader if page.is_ndpi else None
    if header:
        # Hamamatsu stores a level as one JPEG, cut at its restart markers.
        yield bytes(header)
        return
    tables = bytes(page.jpegtables or b"")[:MAX_JPEG_TABLES_BYTES]
    shared = tables.removeprefix(SOI).removesuffix(EOI)
    places = [
        (int(offset), int(length))
        for offset, length in zip(page.dataoffsets, page.databytecounts, strict=False)
        if length
    ]
    # At the border of a slide tiles are blank, and the first are where damage shows least.
    order = sorted({len(places) // 2, 0, len(places) - 1}, key=lambda n: abs(n - len(places) // 2))
    for number in [n for n in order if 0 <= n < len(places)][:MAX_TILES_TRIED]:
        offset, length = places[number]
        (stream,) = source.read_ranges([(offset, min(length, MAX_JPEG_HEAD_BYTES))])
        if stream.startswith(SOI):
            yield SOI + shared + stream[len(SOI) :]


def _claimed(description: str) -> int | None:
    found = _CLAIM.search(description)
    return int(found.group(1)) if found else None


# -------------------------------------------------------------------------------------- DICOM


def _of_dicom(source: ByteSource, head: bytes, level: Level) -> Compression:
    """Find a level's file, which need not be the one that was named, and read its headers."""
    for found in dicom_levels(source, head):
        if found.extent == (level.width_px, level.height_px):
            return _of_dicom_level(found)
    raise _UnknownError(
        f"no DICOM file of the series says that it has {level.width_px} x {level.height_px} px"
    )


def _of_dicom_level(level: DicomLevel) -> Compression:
    if level.syntax in _DICOM_CODECS:
        codec, name = _DICOM_CODECS[level.syntax]
        return Compression(codec=codec, name=name)
    if level.syntax not in DICOM_JPEG:
        raise _UnknownError(f"its DICOM transfer syntax is {level.syntax or 'missing'}")
    try:
        if (stream := level.first_frame(MAX_JPEG_HEAD_BYTES)) is None:
            raise _UnknownError("its first DICOM frame is not found")
        return _of_jpeg(stream, is_rgb=level.photometric == "RGB")
    except _UnknownError as error:
        return Compression(codec="jpeg", name="JPEG", unknown=str(error))


# ------------------------------------------------------------------------------- plain images


def _of_image(source: ByteSource, head: bytes) -> Compression:
    (content,) = source.read_ranges([(0, MAX_JPEG_HEAD_BYTES)])
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(content), formats=IMAGE_FORMATS) as image:
                form = image.format
    except Exception as error:
        raise _UnknownError("its header is damaged or of a kind that is not read") from error
    if form in ("JPEG", "MPO"):
        return _of_jpeg(content)
    if form in ("PNG", "BMP"):
        return Compression(codec="lossless", name=f"lossless ({form})")
    # RIFF, size, "WEBP", then the first chunk's name: VP8L is without loss.
    if head[12:16] == b"VP8L":
        return Compression(codec="lossless", name="lossless (WebP)")
    return Compression(codec="other", name=f"{form}")
