"""JPEG as scanners write it: quantisation tables, chroma subsampling, encoded and decoded again."""

import functools
import io
from typing import Any, Literal

import numpy as np
from jaxtyping import UInt8
from numpy.typing import NDArray

Subsampling = Literal["4:4:4", "4:2:2", "4:2:0"]
Tables = Literal["ijg", "flat", "robidoux"]

SUBSAMPLINGS: tuple[Subsampling, ...] = ("4:4:4", "4:2:2", "4:2:0")
TABLES: tuple[Tables, ...] = ("ijg", "flat", "robidoux")

# Luma and chroma tables at quality 50, in natural order.
# Source: ITU-T T.81, tables K.1 and K.2 (libjpeg and most scanners scale these).
_IJG = (
    (
        *(16, 11, 10, 16, 24, 40, 51, 61),
        *(12, 12, 14, 19, 26, 58, 60, 55),
        *(14, 13, 16, 24, 40, 57, 69, 56),
        *(14, 17, 22, 29, 51, 87, 80, 62),
        *(18, 22, 37, 56, 68, 109, 103, 77),
        *(24, 35, 55, 64, 81, 104, 113, 92),
        *(49, 64, 78, 87, 103, 121, 120, 101),
        *(72, 92, 95, 98, 112, 100, 103, 99),
    ),
    (
        *(17, 18, 24, 47, 99, 99, 99, 99),
        *(18, 21, 26, 66, 99, 99, 99, 99),
        *(24, 26, 56, 99, 99, 99, 99, 99),
        *(47, 66, 99, 99, 99, 99, 99, 99),
        *(99,) * 32,
    ),
)
# Source: mozjpeg's tables 1 and 3, https://github.com/mozilla/mozjpeg (jcparam.c); the latter is
# N. Robidoux's, https://imagemagick.org. Both serve luma and chroma.
_FLAT = (16,) * 64
_ROBIDOUX = (
    *(16, 16, 16, 18, 25, 37, 56, 85),
    *(16, 17, 20, 27, 34, 40, 53, 75),
    *(16, 20, 24, 31, 43, 62, 91, 135),
    *(18, 27, 31, 40, 53, 74, 106, 156),
    *(25, 34, 43, 53, 69, 94, 131, 189),
    *(37, 40, 62, 74, 94, 124, 169, 238),
    *(56, 53, 91, 106, 131, 169, 226, 311),
    *(85, 75, 135, 156, 189, 238, 311, 418),
)
_BASES: dict[Tables, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "ijg": _IJG,
    "flat": (_FLAT, _FLAT),
    "robidoux": (_ROBIDOUX, _ROBIDOUX),
}


@functools.cache
def quantisation_tables(
    quality: int, *, tables: Tables = "ijg"
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Scale the luma and the chroma table to a quality as libjpeg does.

    Source: `jpeg_quality_scaling` of the IJG's libjpeg, https://ijg.org.

    Args:
        quality: 1..100.
        tables: whose.

    Returns:
        64 steps each, 1..255, in natural order.

    Raises:
        ValueError: another quality or other tables.
    """
    if not 1 <= quality <= 100:
        raise ValueError(f"JPEG quality {quality} is not in 1..100")
    if tables not in _BASES:
        raise ValueError(f"JPEG tables {tables!r} are not one of {', '.join(_BASES)}")
    percent = 5000 // quality if quality < 50 else 200 - 2 * quality
    luma, chroma = (
        tuple(min(255, max(1, (step * percent + 50) // 100)) for step in base)
        for base in _BASES[tables]
    )
    return luma, chroma


def encode_jpeg(
    pixels: UInt8[NDArray[Any], "h w 3"],
    *,
    quality: int,
    subsampling: Subsampling = "4:2:0",
    tables: Tables = "ijg",
) -> bytes:
    """Encode an image as baseline JPEG (YCbCr) with libjpeg-turbo, by way of Pillow.

    Raises:
        ValueError: as `quantisation_tables`; another subsampling.
    """
    if subsampling not in SUBSAMPLINGS:
        raise ValueError(f"subsampling {subsampling!r} is not one of {', '.join(SUBSAMPLINGS)}")
    from PIL import Image  # here, for a bare GPU machine has none

    encoded = io.BytesIO()
    Image.fromarray(pixels).save(
        encoded,
        format="JPEG",
        qtables=[list(table) for table in quantisation_tables(quality, tables=tables)],
        subsampling=subsampling,
    )
    return encoded.getvalue()


def through_jpeg(
    pixels: UInt8[NDArray[Any], "h w 3"],
    *,
    quality: int,
    subsampling: Subsampling = "4:2:0",
    tables: Tables = "ijg",
) -> UInt8[NDArray[Any], "h w 3"]:
    """Encode an image as `encode_jpeg` does and decode it again."""
    from PIL import Image

    encoded = encode_jpeg(pixels, quality=quality, subsampling=subsampling, tables=tables)
    with Image.open(io.BytesIO(encoded)) as image:
        decoded: UInt8[NDArray[Any], "h w 3"] = np.asarray(image)
        return decoded
