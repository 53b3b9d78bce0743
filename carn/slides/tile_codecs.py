"""Decode tiles of a TIFF that are not JPEG: lossless ones, JPEG 2000, WebP and JPEG XL.

By imagecodecs. What a stream claims is held against the tile's size before pixels are made of it.
"""

import math
import struct
from dataclasses import dataclass
from typing import Any

import numpy as np
import tifffile
from numpy.typing import NDArray

Rgb = NDArray[np.uint8]

_COMPRESSION = tifffile.COMPRESSION
_NONE, _HORIZONTAL = 1, 2  # TIFF 6.0, Predictor
# Lossless ones, whose output are the bytes of the tile. Numbers: TIFF 6.0 and its technical notes;
# Zstandard is 50000, and 34926 where Loci's writers were first.
_BYTES = (1, 5, 8, 32946, 50000, 34926)
_ZSTD = (50000, 34926)
_JPEG_XL = (50002, 52546)
_WEBP, _JPEG_2000 = 50001, 34712
CODECS = (*_BYTES, *_JPEG_XL, _WEBP, _JPEG_2000)
# SOC and SIZ of a JPEG 2000 codestream (ITU-T T.800, annex A), which may lie in a file's boxes.
_SIZ = b"\xff\x4f\xff\x51"
_MAX_BOXES_BYTES = 4096


@dataclass(frozen=True, kw_only=True)
class TileCodec:
    """How the tiles of a level become pixels.

    Attributes:
        compression: TIFF's number.
        is_predicted: rows hold differences of neighbours.
        width_px, height_px: of a tile.
    """

    compression: int
    is_predicted: bool
    width_px: int
    height_px: int

    @classmethod
    def of(cls, page: Any) -> "TileCodec | None":
        """The codec of a page of 8-bit RGB; None where it is none that is decoded here."""
        is_ours = (
            page.compression in CODECS
            and page.photometric == tifffile.PHOTOMETRIC.RGB
            and page.samplesperpixel == 3
            and page.bitspersample == 8
            and page.planarconfig == tifffile.PLANARCONFIG.CONTIG
            and page.imagedepth == 1
            and page.fillorder == 1
            and page.predictor in (_NONE, _HORIZONTAL)
        )
        if not is_ours:
            return None
        return cls(
            compression=int(page.compression),
            is_predicted=page.predictor == _HORIZONTAL and page.compression in _BYTES,
            width_px=page.tilewidth,
            height_px=page.tilelength,
        )

    @property
    def max_stream_bytes(self) -> int:
        """The most that a tile may take: none of the codecs makes noise twice as large."""
        return 2 * math.prod(self._shape) + (1 << 20)

    @property
    def _shape(self) -> tuple[int, int, int]:
        return self.height_px, self.width_px, 3

    def decode(self, stream: bytes) -> Rgb:
        """The (height, width, 3) uint8 pixels of a tile.

        Raises:
            ValueError: the stream is damaged, or of another size.
        """
        try:
            pixels = self._decoded(stream)
        except (RuntimeError, MemoryError, struct.error) as error:
            raise ValueError(f"{_name(self.compression)} says {str(error)!r}") from error
        if pixels.shape != self._shape or pixels.dtype != np.uint8:
            raise ValueError(f"it holds {pixels.dtype} {pixels.shape} instead of a tile's")
        return pixels

    def _decoded(self, stream: bytes) -> Rgb:
        import imagecodecs

        if self.compression in _BYTES:
            return self._of_bytes(self._unpacked(stream))
        if self.compression == _JPEG_2000:
            self._check_siz(stream)
            pixels: Rgb = imagecodecs.jpeg2k_decode(stream)
            return pixels
        # Handed the tile's own array, they refuse a stream that claims another size.
        out: Rgb = np.empty(self._shape, dtype=np.uint8)
        if self.compression == _WEBP:
            imagecodecs.webp_decode(stream, hasalpha=False, out=out)
        else:
            imagecodecs.jpegxl_decode(stream, out=out)
        return out

    def _unpacked(self, stream: bytes) -> bytes:
        import imagecodecs

        size = math.prod(self._shape)
        if self.compression == 1:
            return stream
        if self.compression in _ZSTD:
            return bytes(imagecodecs.zstd_decode(stream, out=size))
        if self.compression == _COMPRESSION.LZW:
            return bytes(imagecodecs.lzw_decode(stream, out=size))
        return bytes(imagecodecs.zlib_decode(stream, out=size))

    def _of_bytes(self, content: bytes) -> Rgb:
        import imagecodecs

        if len(content) != math.prod(self._shape):
            raise ValueError(f"it holds {len(content)} bytes instead of {math.prod(self._shape)}")
        pixels = np.frombuffer(content, dtype=np.uint8).reshape(self._shape)
        if not self.is_predicted:
            return pixels
        summed: Rgb = imagecodecs.delta_decode(pixels, axis=-2)
        return summed

    def _check_siz(self, stream: bytes) -> None:
        at = stream.find(_SIZ, 0, _MAX_BOXES_BYTES)
        if at < 0:
            raise ValueError("it does not start as a JPEG 2000 stream")
        right, bottom, left, top = struct.unpack_from(">4I", stream, at + 8)
        (components,) = struct.unpack_from(">H", stream, at + 40)
        if (bottom - top, right - left, components) != self._shape:
            raise ValueError(
                f"it claims {right - left} x {bottom - top} px of {components} components"
            )


def _name(compression: int) -> str:
    return str(tifffile.COMPRESSION(compression).name)
