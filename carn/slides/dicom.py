"""What the DICOM files of a slide say of their pixels: extent, codec, colours, first frame.

Only what stands in the first kilobytes is looked for, by its tags in explicit little endian, which
image files are in (DICOM PS3.5, section 7.1.2); OpenSlide reads the pixels.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from carn import storage
from carn.errors import SlideError, StorageError
from carn.slides.jpeg_stream import COLOURS_READ_BYTES, stream_colours
from carn.slides.listing import files_of_series
from carn.storage import ByteSource

# Headers begin in the first, and pixels within the second number of bytes. A header lists each
# frame's place, some 200 bytes of each.
DICOM_HEAD_BYTES = 64 * 1024
MAX_DICOM_HEADER_BYTES = 64 * 1024 * 1024
DICOM_BLOCK_BYTES = 1024 * 1024
# Source: DICOM PS3.5, annex A, https://dicom.nema.org/medical/dicom/current/output/html/part05.html
DICOM_ROOT = "1.2.840.10008.1.2"
DICOM_JPEG = (f"{DICOM_ROOT}.4.50", f"{DICOM_ROOT}.4.51")
# (0002,0010) transfer syntax, (0008,0008) image type, (0028,0004) photometric interpretation,
# (0048,0006) and (0048,0007) extent of the level, (7FE0,0010) encapsulated pixels with the first
# item after them.
_TRANSFER_SYNTAX = re.compile(rb"\x02\x00\x10\x00UI..([0-9.]+)", re.DOTALL)
_PHOTOMETRIC = re.compile(rb"\x28\x00\x04\x00CS..([A-Z_0-9]+)", re.DOTALL)
_IMAGE_TYPE = re.compile(rb"\x08\x00\x08\x00CS..([A-Z_\\ ]+)", re.DOTALL)
_MATRIX_COLUMNS = re.compile(rb"\x48\x00\x06\x00UL\x04\x00(....)", re.DOTALL)
_MATRIX_ROWS = re.compile(rb"\x48\x00\x07\x00UL\x04\x00(....)", re.DOTALL)
_PIXELS = b"\xe0\x7f\x10\x00OB\x00\x00\xff\xff\xff\xff\xfe\xff\x00\xe0"
_ITEM = b"\xfe\xff\x00\xe0"

DICOM_COLOURS_NOTE = "colours by its JPEG streams, YCbCr, not by PhotometricInterpretation"


@dataclass(frozen=True, kw_only=True)
class DicomLevel:
    """A file with a level of a slide.

    Attributes:
        uri: of the file.
        extent: (width, height) in its own px.
        syntax: UID of the transfer syntax; empty where it is missing.
        photometric: the PhotometricInterpretation; empty where it is missing.
    """

    uri: str
    extent: tuple[int, int]
    syntax: str
    photometric: str

    def first_frame(self, max_bytes: int) -> bytes | None:
        """The beginning of the first encapsulated frame; None where none is found.

        Raises:
            StorageError: it cannot be read.
        """
        source = storage.open_source(self.uri)
        try:
            return _first_frame(source, max_bytes)
        finally:
            source.close()


def dicom_levels(source: ByteSource, head: bytes) -> Iterator[DicomLevel]:
    """The levels of the slide that a file belongs to: its own first, then those beside it.

    Args:
        source: the file.
        head: its first DICOM_HEAD_BYTES.

    Raises:
        StorageError: the folder cannot be listed.
    """
    if (own := _level_of(source.uri, head)) is not None:
        yield own
    for item in files_of_series(source.uri):
        try:
            other = storage.open_source(item.uri)
        except StorageError:  # removed while we look, or another's
            continue
        try:
            (other_head,) = other.read_ranges([(0, DICOM_HEAD_BYTES)])
        finally:
            other.close()
        if (level := _level_of(item.uri, other_head)) is not None:
            yield level


def shown_as_rgb(uri: str, path: Path, extents: Sequence[tuple[int, int]]) -> Iterator[bool]:
    """Whether the YCbCr of a level's JPEG streams is taken for RGB, by its first frame.

    OpenSlide goes by the file's PhotometricInterpretation; what comes of it can be put right. The
    other way round, RGB taken for YCbCr, colours are clipped and lost.

    Args:
        uri: the name errors speak of.
        path: a file of the slide.
        extents: (width, height) of each level in its own px.

    Raises:
        SlideError: colours are lost.
        StorageError: the files cannot be read.
    """
    source = storage.open_source(str(path))
    try:
        (head,) = source.read_ranges([(0, DICOM_HEAD_BYTES)])
        levels = {level.extent: level for level in dicom_levels(source, head)}
    finally:
        source.close()
    for extent in extents:
        level = levels.get(extent)
        frame = None
        if level is not None and level.syntax in DICOM_JPEG:
            frame = level.first_frame(COLOURS_READ_BYTES)
        colours = None if frame is None else stream_colours(frame)
        if level is None or colours is None:
            yield False
            continue
        is_rgb = level.photometric == "RGB"
        if colours == "rgb" and not is_rgb:
            said = level.photometric or "no colours at all"
            raise SlideError(
                uri,
                f"says {said}, but its JPEG streams are RGB; set PhotometricInterpretation to RGB",
            )
        yield colours == "ycbcr" and is_rgb


def _level_of(uri: str, head: bytes) -> DicomLevel | None:
    columns, rows = _MATRIX_COLUMNS.search(head), _MATRIX_ROWS.search(head)
    image_type = _IMAGE_TYPE.search(head)
    # A thumbnail may have the size of a small level.
    if not columns or not rows or not image_type or b"\\VOLUME" not in image_type.group(1):
        return None
    syntax, photometric = _TRANSFER_SYNTAX.search(head), _PHOTOMETRIC.search(head)
    return DicomLevel(
        uri=uri,
        extent=(
            int.from_bytes(columns.group(1), "little"),
            int.from_bytes(rows.group(1), "little"),
        ),
        syntax=syntax.group(1).decode() if syntax else "",
        photometric=photometric.group(1).decode() if photometric else "",
    )


def _first_frame(source: ByteSource, max_bytes: int) -> bytes | None:
    """The first frame's item follows that with all offsets."""
    end = min(source.size, MAX_DICOM_HEADER_BYTES)
    for start in range(0, end, DICOM_BLOCK_BYTES):
        # A mark may lie across two blocks.
        length = min(DICOM_BLOCK_BYTES + len(_PIXELS), end - start)
        (block,) = source.read_ranges([(start, length)])
        place = block.find(_PIXELS)
        if place < 0:
            continue
        offsets = start + place + len(_PIXELS) - len(_ITEM)
        (item,) = source.read_ranges([(offsets, 8)])
        first = offsets + 8 + int.from_bytes(item[4:8], "little")
        (item,) = source.read_ranges([(first, 8)])
        if item[:4] == _ITEM:
            size = min(int.from_bytes(item[4:8], "little"), max_bytes)
            (stream,) = source.read_ranges([(first + 8, size)])
            return stream
        break
    return None
