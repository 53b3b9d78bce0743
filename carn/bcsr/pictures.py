"""Small JPEG pictures of slides and tiles for the report."""

from collections.abc import Sequence

import numpy as np
import simplejpeg
from PIL import Image

from carn.bcsr.measure import TilePlace
from carn.slides import Slide
from carn.slides.slide import Rgb

SLIDE_PICTURE_PX = 640
TILE_PICTURE_PX = 160
PICTURE_QUALITY = 85


def slide_picture(slide: Slide) -> bytes:
    """JPEG of a whole slide, longer side SLIDE_PICTURE_PX."""
    return _jpeg(slide.thumbnail(SLIDE_PICTURE_PX))


def tile_pictures(slide: Slide, places: Sequence[TilePlace]) -> list[bytes]:
    """JPEG of each tile, longer side TILE_PICTURE_PX."""
    return [
        tile_picture(slide.read_region(place.x_l0, place.y_l0, place.width_px, place.height_px))
        for place in places
    ]


def tile_picture(pixels: Rgb) -> bytes:
    """JPEG of an (H, W, 3) uint8 tile, longer side at most TILE_PICTURE_PX."""
    image = Image.fromarray(pixels)
    image.thumbnail((TILE_PICTURE_PX, TILE_PICTURE_PX), Image.Resampling.BOX)
    return _jpeg(np.asarray(image))


def _jpeg(pixels: Rgb) -> bytes:
    encoded: bytes = simplejpeg.encode_jpeg(
        np.ascontiguousarray(pixels), quality=PICTURE_QUALITY, colorsubsampling="420"
    )
    return encoded
