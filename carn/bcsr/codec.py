"""Lossless encodings of a tile on storage."""

from typing import Literal, cast, get_args

import imagecodecs
import numpy as np

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


def decode(content: bytes, encoding: str) -> Rgb:
    """The (H, W, 3) uint8 RGB tile of `encode`.

    Raises:
        ValueError: an encoding that is not known, or bytes that are not of it.
    """
    try:
        if encoding == "jxl":
            return cast(Rgb, imagecodecs.jpegxl_decode(content, numthreads=1))
        if encoding == "png":
            return cast(Rgb, imagecodecs.png_decode(content))
    except RuntimeError as error:  # what imagecodecs' own errors derive from
        raise ValueError(f"damaged {encoding} tile: {error}") from error
    raise ValueError(f"{encoding!r} is no tile encoding; there are {get_args(Encoding)}")
