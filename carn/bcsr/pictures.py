"""Small JPEG pictures of slides and tiles for the report."""

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


def tile_picture(slide: Slide, place: TilePlace) -> bytes:
    """JPEG of a tile, longer side at most TILE_PICTURE_PX, from the level nearest that size."""
    level = slide.level_for_downsample(max(place.width_px, place.height_px) / TILE_PICTURE_PX)
    downsample = slide.levels[level].downsample
    width = max(1, round(place.width_px / downsample))
    height = max(1, round(place.height_px / downsample))
    image = Image.fromarray(slide.read_region(place.x_l0, place.y_l0, width, height, level=level))
    image.thumbnail((TILE_PICTURE_PX, TILE_PICTURE_PX), Image.Resampling.BOX)
    return _jpeg(np.asarray(image))


def _jpeg(pixels: Rgb) -> bytes:
    encoded: bytes = simplejpeg.encode_jpeg(
        np.ascontiguousarray(pixels), quality=PICTURE_QUALITY, colorsubsampling="420"
    )
    return encoded
