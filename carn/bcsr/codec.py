"""Lossless encodings of a tile on storage."""

from typing import Literal, cast, get_args

import imagecodecs
import numpy as np

from carn.slides.image import MAX_IMAGE_PX
from carn.slides.slide import Rgb

# JPEG XL at effort 1 is the default: it writes an order of magnitude faster than PNG at level 1 and
# reads about as fast (`benchmarks/encode_tiles.py`).
Encoding = Literal["jxl", "png"]


def encode(pixels: Rgb, encoding: Encoding) -> bytes:
    """Lossless bytes of an (H, W, 3) uint8 RGB tile; the same pixels give the same bytes.

    Raises:
        ValueError: an encoding that is not known.
    """
    if encoding == "jxl":
        return cast(bytes, imagecodecs.jpegxl_encode(pixels, lossless=True, effort=1, numthreads=1))
    if encoding == "png":
        return cast(bytes, imagecodecs.png_encode(np.ascontiguousarray(pixels), level=1))
    raise ValueError(f"{encoding!r} is no tile encoding; there are {get_args(Encoding)}")


def decode(content: bytes, encoding: str, *, extent: tuple[int, int]) -> Rgb:
    """The (H, W, 3) uint8 RGB tile of `encode`.

    Args:
        content: the tile's bytes.
        encoding: of `encode`.
        extent: (width, height) that it must have; what claims another one is not decoded.

    Raises:
        ValueError: an encoding that is not known, bytes that are not of it, or an extent that is
            not theirs or of no tile.
    """
    width, height = extent
    if min(extent) < 1 or width * height > MAX_IMAGE_PX:
        raise ValueError(f"a tile of {width} x {height} px; at most {MAX_IMAGE_PX} px are decoded")
    try:
        if encoding == "jxl":
            out = np.empty((height, width, 3), dtype=np.uint8)
            return cast(Rgb, imagecodecs.jpegxl_decode(content, numthreads=1, out=out))
        if encoding == "png":
            out = np.empty((height, width, 3), dtype=np.uint8)
            return cast(Rgb, imagecodecs.png_decode(content, out=out))
    # What imagecodecs' own errors derive from; and what it raises of another extent.
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"damaged {encoding} tile: {error}") from error
    raise ValueError(f"{encoding!r} is no tile encoding; there are {get_args(Encoding)}")
