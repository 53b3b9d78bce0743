"""The reader for everything the direct one leaves: JPEG 2000, NDPI, MRXS, DICOM, BIF, SCN, ...

Through OpenSlide (https://openslide.org). OpenSlide fails every read that follows a failed one on
the same handle; here the handle is opened anew after an error, so a damaged place stays its own.

On a level whose downsample is no whole number (odd sides, halved) OpenSlide interpolates, by
another fraction of a px at each location that is asked for. Such levels are read in the cells of a
fixed grid, each always by the same call: no px depends on the region that it is read with.
"""

import math
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import openslide
from PIL import Image

from carn.errors import SlideError
from carn.slides.dicom import DICOM_COLOURS_NOTE, shown_as_rgb
from carn.slides.slide import (
    Level,
    Rgb,
    Slide,
    SlideProperties,
    level_downsamples,
    plausible_mpp,
    plausible_power,
)

# Side of those cells in px of the level: few px are read beyond the region, a damaged tile takes
# few with it, and OpenSlide keeps what it has decoded for the next call. One core reads 2.1 Mpx/s
# of a JPEG 2000 slide in blocks of 2048 + 72 px; with cells of 512 px 1.7, with a call a block 2.4.
CELL_PX = 128
_SIDES = ("width", "height")


class OpenSlideSlide(Slide):
    """A slide served by OpenSlide from a local file. Opened by `carn.slides.open_slide`."""

    reader = "openslide"

    def __init__(self, uri: str, path: Path, *, pin: Any = None) -> None:
        """Open a local file.

        Args:
            uri: the name errors speak of (the object's, when `path` is a cached copy).
            path: the local file.
            pin: kept as long as the slide is open, then closed (a cache's hold on the file).

        Raises:
            SlideError: OpenSlide cannot open it.
        """
        self._path = path
        self._pin = pin
        self._lock = threading.Lock()
        self._handle: openslide.OpenSlide | None = _open(uri, path)
        handle = self._handle
        try:
            extents = list(handle.level_dimensions)
            self._native_downsamples = handle.level_downsamples
            for width, height in extents:
                if min(width, height) < 1:
                    raise SlideError(uri, f"has a level without pixels ({width} x {height})")
            downsamples = level_downsamples(extents, tile=_tile(handle))
            base = extents[0]
            levels = tuple(
                # A level padded to whole tiles, as DICOM's are, ends where the slide does.
                Level(
                    width_px=min(width, math.ceil(base[0] / downsample)),
                    height_px=min(height, math.ceil(base[1] / downsample)),
                    downsample=downsample,
                )
                for (width, height), downsample in zip(extents, downsamples, strict=True)
            )
            properties = _properties(handle)
            self._is_ycbcr = (False,) * len(levels)
            if properties.vendor == "dicom":
                self._is_ycbcr = tuple(shown_as_rgb(uri, path, extents))
                if any(self._is_ycbcr):
                    properties = replace(properties, notes=(DICOM_COLOURS_NOTE,))
            super().__init__(uri, levels=levels, properties=properties)
        # Whatever the handle says comes from the file, as text that need not be UTF-8.
        except (openslide.OpenSlideError, UnicodeDecodeError) as error:
            self.close()
            raise SlideError(uri, f"cannot be opened; OpenSlide says {str(error)!r}") from error
        except SlideError:
            self.close()
            raise

    def _read_level(self, x: int, y: int, width: int, height: int, *, level: int) -> Rgb:
        if self._native_downsamples[level].is_integer():
            return self._asked(x, y, width, height, level=level)
        found = self.levels[level]
        pixels = np.empty((height, width, 3), dtype=np.uint8)
        for top in range(y // CELL_PX * CELL_PX, y + height, CELL_PX):
            for left in range(x // CELL_PX * CELL_PX, x + width, CELL_PX):
                right = min(left + CELL_PX, found.width_px)
                bottom = min(top + CELL_PX, found.height_px)
                cell = self._asked(left, top, right - left, bottom - top, level=level)
                x0, x1 = max(left, x), min(right, x + width)
                y0, y1 = max(top, y), min(bottom, y + height)
                part = cell[y0 - top : y1 - top, x0 - left : x1 - left]
                pixels[y0 - y : y1 - y, x0 - x : x1 - x] = part
        return pixels

    def _asked(self, x: int, y: int, width: int, height: int, *, level: int) -> Rgb:
        """Pixels of one read by OpenSlide."""
        # OpenSlide divides the location by its own idea of the downsample, and interpolates where
        # that gives no whole px: the pixels are at most half a level-0 px off.
        downsample = self._native_downsamples[level]
        location = (round(x * downsample), round(y * downsample))
        with self._lock:
            if self._handle is None:
                self._handle = _open(self.uri, self._path)
            try:
                pixels = np.asarray(self._handle.read_region(location, level, (width, height)))
            except (openslide.OpenSlideError, UnicodeDecodeError) as error:
                self._handle.close()
                self._handle = None
                raise self._damaged(
                    f"OpenSlide says {str(error)!r} (region of {width} x {height} px)",
                    x,
                    y,
                    level=level,
                ) from error
        if self._is_ycbcr[level]:
            pixels = _of_ycbcr(pixels)
        return _on_white(pixels)

    def close(self) -> None:
        with self._lock:
            if self._handle is not None:
                self._handle.close()
                self._handle = None
        if self._pin is not None:
            self._pin.close()


def _open(uri: str, path: Path) -> openslide.OpenSlide:
    try:
        return openslide.OpenSlide(str(path))
    except openslide.OpenSlideUnsupportedFormatError as error:
        raise SlideError(uri, "is not a slide in any format that OpenSlide knows") from error
    except (openslide.OpenSlideError, UnicodeDecodeError) as error:
        raise SlideError(uri, f"cannot be opened; OpenSlide says {str(error)!r}") from error


def _of_ycbcr(pixels: np.ndarray[Any, np.dtype[np.uint8]]) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """(H, W, 4) with YCbCr and alpha, as RGB and alpha."""
    image = Image.fromarray(pixels[..., :3], mode="YCbCr").convert("RGB")
    return np.dstack([np.asarray(image), pixels[..., 3]])


def _on_white(rgba: np.ndarray[Any, np.dtype[np.uint8]]) -> Rgb:
    """(H, W, 4) uint8 straight alpha laid over white; places without pixels are transparent."""
    alpha = rgba[..., 3:]
    if alpha.min() == 255:
        return np.ascontiguousarray(rgba[..., :3])
    weight = alpha.astype(np.uint16)
    blended = (rgba[..., :3] * weight + 255 * (255 - weight) + 127) // 255
    return blended.astype(np.uint8)


def _properties(handle: openslide.OpenSlide) -> SlideProperties:
    known = handle.properties
    # The profile as it stands in the file comes with any region; one off the slide decodes nothing.
    nowhere = handle.read_region((-16, -16), 0, (1, 1))
    return SlideProperties(
        mpp_x=plausible_mpp(_number(known.get(openslide.PROPERTY_NAME_MPP_X))),
        mpp_y=plausible_mpp(_number(known.get(openslide.PROPERTY_NAME_MPP_Y))),
        objective_power=plausible_power(
            _number(known.get(openslide.PROPERTY_NAME_OBJECTIVE_POWER))
        ),
        vendor=known.get(openslide.PROPERTY_NAME_VENDOR, "unknown"),
        icc_profile=nowhere.info.get("icc_profile"),
    )


def _tile(handle: openslide.OpenSlide) -> tuple[int, int] | None:
    """(width, height) of the tiles of level 0, which coarser levels may be padded to."""
    sides = [_number(handle.properties.get(f"openslide.level[0].tile-{s}")) for s in _SIDES]
    width, height = sides
    return None if not width or not height else (int(width), int(height))


def _number(text: str | None) -> float | None:
    try:
        return None if text is None else float(text)
    except ValueError:
        return None
