"""Write an image as a pyramidal tiled TIFF that OpenSlide, QuPath, libvips and tifffile open."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import tifffile
from PIL import Image

from carn.slides.slide import Rgb

# Levels are added until the longer side is at most this: viewers want one that fits a screen.
SMALLEST_LEVEL_PX = 1024


def write_pyramid(
    path: Path,
    pixels: Rgb,
    *,
    mpp_um: float | None,
    tile_px: int = 512,
    quality: int = 90,
    description: str = "",
    icc_profile: bytes | None = None,
) -> None:
    """Write an image held in memory as a generic pyramidal BigTIFF of 4:2:0 JPEG tiles.

    Each level halves the one before by the mean of 2 x 2 px; odd sides round up.

    Args:
        path: the file to write; what was there is replaced.
        pixels: (H, W, 3) uint8 RGB, level 0.
        mpp_um: um per level-0 px, for the resolution tags; None writes none.
        tile_px: side of a tile, a multiple of 16.
        quality: JPEG quality, 1..100.
        description: ImageDescription of level 0.
        icc_profile: embedded as it is.
    """
    options = {
        "tile": (tile_px, tile_px),
        "photometric": "rgb",  # of the pixels; with JPEG, tifffile stores them as YCbCr
        "subsampling": (2, 2),
        "compression": "jpeg",
        "compressionargs": {"level": quality},
        "metadata": None,
        "software": False,
    }
    with tifffile.TiffWriter(path, bigtiff=True) as writer:
        for number, level in enumerate(pyramid_levels(pixels)):
            downsample = pixels.shape[1] / level.shape[1]
            writer.write(
                level,
                subfiletype=0 if number == 0 else 1,
                description=description if number == 0 else None,
                iccprofile=icc_profile,
                resolution=None if mpp_um is None else (1e4 / (mpp_um * downsample),) * 2,
                resolutionunit=None if mpp_um is None else "CENTIMETER",
                **options,
            )


def pyramid_levels(pixels: Rgb) -> Iterator[Rgb]:
    """The levels of an image, itself first, halving until SMALLEST_LEVEL_PX."""
    yield pixels
    while max(pixels.shape[:2]) > SMALLEST_LEVEL_PX:
        pixels = np.asarray(Image.fromarray(pixels).reduce(2))
        yield pixels
