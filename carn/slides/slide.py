"""What every slide can do, whichever reader serves it.

Frames: a *location* (x, y) is in level-0 px of the slide, a *size* (width, height) is in px of the
level that is read. Pixels are (H, W, 3) uint8 RGB.
"""

import math
from abc import ABC, abstractmethod
from contextlib import suppress
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from carn.errors import DamagedTileError, SlideError
from carn.slides.level_check import is_of_slide

Rgb = NDArray[np.uint8]

# A bad header can claim any extent. 2,000,000 px at 0.1 um/px are 20 cm of glass: no scanner's.
MAX_EXTENT_PX = 2_000_000
# All pixels of a slide: the whole of a glass slide, 75 x 25 mm, at 0.1 um/px has 1.9e11.
MAX_SLIDE_PX = 1 << 38
# Pixels that are read to make a picture of the whole slide. A pyramid spares reading more; without
# one, 262,000 x 262,000 px take some minutes, and a header of a few KB could ask for days.
MAX_REDUCED_PX = 1 << 36
# The most pixels one read may ask for (3 GiB of RGB): more is a mistake, not a region.
MAX_REGION_PX = 1 << 30
# Longer side of the picture by which places are chosen that levels are compared at.
CHECKED_PX = 1024
# Pixels that are held at once when a whole level is made smaller: 48 MB of RGB.
STRIP_PX = 1 << 24
# Um per level-0 px of any brightfield scan, overviews included: 100x under oil to 0.5x.
SCANNED_MPP = (0.05, 20.0)
# Resolution tags coarser than this are the dots per inch of a printer, not of a microscope: 72 dpi,
# the usual placeholder, would be 353 um per px. The whole width of a glass slide in 512 px is 50.
MAX_MPP_UM = 100.0


@dataclass(frozen=True, kw_only=True)
class Level:
    """One level of a slide's pyramid.

    Attributes:
        width_px, height_px: its extent in its own px.
        downsample: level-0 px per px of this level.
    """

    width_px: int
    height_px: int
    downsample: float


@dataclass(frozen=True, kw_only=True)
class Inside:
    """The part of a region that lies on the slide, in px of the region: [x0, x1) x [y0, y1)."""

    x0: int
    y0: int
    x1: int
    y1: int

    @property
    def is_empty(self) -> bool:
        """Whether the region misses the slide."""
        return self.x1 <= self.x0 or self.y1 <= self.y0


@dataclass(frozen=True, kw_only=True)
class SlideProperties:
    """What is known of a slide, from its own header only.

    Attributes:
        mpp_x, mpp_y: um per level-0 px; None when the file does not say. Never guessed.
        objective_power: magnification as the file states it, or None.
        vendor: the format's name in OpenSlide's vocabulary (`aperio`, `generic-tiff`, ...).
        icc_profile: the embedded ICC profile, or None.
        notes: what was decided against the file's own word, or where it has several.
    """

    mpp_x: float | None = None
    mpp_y: float | None = None
    objective_power: float | None = None
    vendor: str
    icc_profile: bytes | None = None
    notes: tuple[str, ...] = ()


class Slide(ABC):
    """An open whole-slide image. Reads are safe from several threads; it does not pickle.

    Attributes:
        uri: where it was opened from.
        reader: which reader serves it: `tiled-tiff`, `openslide` or `image`.
        levels: finest first; level 0 is the slide's own frame.
        properties: MPP, objective power, vendor and ICC profile.
        foreign_levels: those that were found not to be level 0 made smaller; see `thumbnail`.
    """

    reader: str

    def __init__(self, uri: str, *, levels: tuple[Level, ...], properties: SlideProperties) -> None:
        base = levels[0]
        if base.width_px < 1 or base.height_px < 1:
            raise SlideError(uri, f"has no pixels ({base.width_px} x {base.height_px})")
        if max(base.width_px, base.height_px) > MAX_EXTENT_PX:
            raise SlideError(
                uri,
                f"claims {base.width_px} x {base.height_px} px, more than any scanner's "
                f"{MAX_EXTENT_PX}; the header is damaged or hostile",
            )
        if base.width_px * base.height_px > MAX_SLIDE_PX:
            raise SlideError(
                uri,
                f"claims {base.width_px} x {base.height_px} px, more than the {MAX_SLIDE_PX} of a "
                "whole glass slide; the header is damaged or hostile",
            )
        self.uri = uri
        self.levels = levels
        self.properties = properties
        self.foreign_levels: set[int] = set()

    @property
    def notes(self) -> tuple[str, ...]:
        """What was decided against the file's own word so far."""
        foreign = tuple(
            f"level {level} is not this slide made smaller, and is left out"
            for level in sorted(self.foreign_levels)
        )
        return (*self.properties.notes, *foreign)

    @property
    def extent(self) -> tuple[int, int]:
        """(width, height) in level-0 px."""
        return self.levels[0].width_px, self.levels[0].height_px

    @property
    def mpp(self) -> float | None:
        """Mean of the um per level-0 px of both axes, or None when the file does not say."""
        mpp_x, mpp_y = self.properties.mpp_x, self.properties.mpp_y
        return None if mpp_x is None or mpp_y is None else (mpp_x + mpp_y) / 2

    def level_for_downsample(self, downsample: float) -> int:
        """The coarsest level that is at least as fine as `downsample` (level-0 px per px)."""
        # A level of 3.9998 serves a wish for 4: pyramids round their extents.
        fine = [i for i, level in enumerate(self.levels) if level.downsample <= downsample * 1.01]
        return max(fine, key=lambda i: self.levels[i].downsample, default=0)

    def inside(
        self, x_l0: int, y_l0: int, width_px: int, height_px: int, *, level: int = 0
    ) -> Inside:
        """Which part of a region (arguments as `read_region`) lies on the slide."""
        x, y = self._level_location(x_l0, y_l0, level=level)
        found = self.levels[level]
        return Inside(
            x0=min(max(0, -x), width_px),
            y0=min(max(0, -y), height_px),
            x1=max(0, min(width_px, found.width_px - x)),
            y1=max(0, min(height_px, found.height_px - y)),
        )

    def read_region(
        self, x_l0: int, y_l0: int, width_px: int, height_px: int, *, level: int = 0
    ) -> Rgb:
        """Pixels of a region, white where it leaves the slide (see `inside`).

        Args:
            x_l0, y_l0: top-left corner in level-0 px; may be negative. On coarser levels it is
                rounded to the level's nearest pixel.
            width_px, height_px: size in px of `level`.
            level: pyramid level.

        Returns:
            (height_px, width_px, 3) uint8 RGB.

        Raises:
            ValueError: no such level, or a size that is not positive or absurdly large.
            DamagedTileError: pixels of the region cannot be decoded; other regions still can.
            StorageError: storage failed under the read.
        """
        if not 0 <= level < len(self.levels):
            raise ValueError(f"{self.uri} has levels 0..{len(self.levels) - 1}, not {level}")
        if width_px < 1 or height_px < 1 or width_px * height_px > MAX_REGION_PX:
            raise ValueError(
                f"a region of {width_px} x {height_px} px cannot be read: both sides must be "
                f"positive and hold at most {MAX_REGION_PX} px; read it in parts"
            )
        x, y = self._level_location(x_l0, y_l0, level=level)
        inside = self.inside(x_l0, y_l0, width_px, height_px, level=level)
        if inside.is_empty:
            return np.full((height_px, width_px, 3), 255, dtype=np.uint8)
        width, height = inside.x1 - inside.x0, inside.y1 - inside.y0
        pixels = self._read_level(x + inside.x0, y + inside.y0, width, height, level=level)
        if (height, width) == (height_px, width_px):
            return pixels
        region = np.full((height_px, width_px, 3), 255, dtype=np.uint8)
        region[inside.y0 : inside.y1, inside.x0 : inside.x1] = pixels
        return region

    def thumbnail(self, max_side_px: int) -> Rgb:
        """The whole slide, its longer side at most `max_side_px`, by area means.

        It is made from the coarsest level that is fine enough, read in strips, so that a slide
        without a pyramid takes no more memory than one with; where that level is damaged, or is not
        what level 0 shows, from a finer one.

        Raises:
            DamagedTileError: no level that is fine enough can be read.
            SlideError: that level has more than MAX_REDUCED_PX.
        """
        downsample = max(1.0, max(self.extent) / max_side_px)
        size = (
            max(1, round(self.extent[0] / downsample)),
            max(1, round(self.extent[1] / downsample)),
        )
        first = self.level_for_downsample(downsample)
        for level in range(first, 0, -1):
            if level in self.foreign_levels:
                continue
            try:
                picture = self._reduced(level, size)
            except DamagedTileError:
                continue
            if is_of_slide(picture, self._read_base, extent=self.extent):
                return picture
            self.foreign_levels.add(level)
        return self._reduced(0, size)

    def check_level(self, level: int) -> None:
        """Hold a level that is to be read against level 0, at places with something to see.

        Raises:
            SlideError: it is not this slide made smaller.
            DamagedTileError: no level can be read.
        """
        downsample = self.levels[level].downsample

        def read(x: int, y: int, width: int, height: int) -> Rgb:
            sides = (max(1, round(side / downsample)) for side in (width, height))
            return self.read_region(x, y, *sides, level=level)

        is_own = level == 0 or is_of_slide(
            self.thumbnail(CHECKED_PX), self._read_base, extent=self.extent, other=read
        )
        if not is_own:
            raise SlideError(
                self.uri,
                f"has a level {level} that is not level 0 made smaller, but another image; choose "
                "another level",
            )

    def _read_base(self, x: int, y: int, width: int, height: int) -> Rgb:
        return self._read_level(x, y, width, height, level=0)

    def _reduced(self, level: int, size: tuple[int, int]) -> Rgb:
        from PIL import Image

        found = self.levels[level]
        if found.width_px * found.height_px > MAX_REDUCED_PX:
            raise SlideError(
                self.uri,
                f"has no level between {found.width_px} x {found.height_px} px and a picture of "
                f"{size[0]} x {size[1]} px; store it anew with a pyramid",
            )
        factor = max(1, min(found.width_px // size[0], found.height_px // size[1]))
        rows = max(1, STRIP_PX // (found.width_px * factor)) * factor
        strips = []
        for top in range(0, found.height_px, rows):
            height = min(rows, found.height_px - top)
            strip = self._read_level(0, top, found.width_px, height, level=level)
            strips.append(np.asarray(Image.fromarray(strip).reduce(factor)))
        image = Image.fromarray(np.concatenate(strips) if len(strips) > 1 else strips[0])
        return np.asarray(image if image.size == size else image.resize(size, Image.Resampling.BOX))

    def _level_location(self, x_l0: int, y_l0: int, *, level: int) -> tuple[int, int]:
        if level == 0:
            return x_l0, y_l0
        downsample = self.levels[level].downsample
        return math.floor(x_l0 / downsample + 0.5), math.floor(y_l0 / downsample + 0.5)

    def _damaged(self, reason: str, x: int, y: int, *, level: int) -> DamagedTileError:
        downsample = self.levels[level].downsample
        return DamagedTileError(
            self.uri, reason, level, round(x * downsample), round(y * downsample)
        )

    @abstractmethod
    def _read_level(self, x: int, y: int, width: int, height: int, *, level: int) -> Rgb:
        """Pixels of a box that lies on the slide, all in px of the level."""

    @abstractmethod
    def close(self) -> None:
        """Give file handles back. Reading afterwards is an error."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        # Cached slides are shared: the last holder lets go, not a caller who knows of it.
        with suppress(Exception):
            self.close()

    def __reduce__(self) -> str:
        raise TypeError(
            f"an open slide does not travel; send its URI ({self.uri}) and open it there"
        )


def plausible_mpp(mpp: float | None) -> float | None:
    """The value when it can be of a microscope (see MAX_MPP_UM), else None."""
    return mpp if mpp is not None and math.isfinite(mpp) and 0 < mpp <= MAX_MPP_UM else None


def plausible_power(power: float | None) -> float | None:
    """The magnification when it is a positive, finite number, else None."""
    return power if power is not None and math.isfinite(power) and power > 0 else None


def level_downsamples(
    extents: list[tuple[int, int]], *, tile: tuple[int, int] | None = None
) -> list[float]:
    """Level-0 px per level px, for (width, height) of each level, finest first.

    Pyramids halve their extents and round, and some scanners pad every level to whole tiles: where
    a power of two explains both sides of a level, that is its downsample. Otherwise it is the mean
    of both axes' ratios, OpenSlide's definition; the two differ by the rounding or the padding
    (a CAMELYON16 slide's level of 1024 x 2048 px is 128 times coarser, not 101.75 times).

    Args:
        extents: (width, height) of each level in its own px.
        tile: (width, height) of the tiles that levels may be padded to.
    """
    width, height = extents[0]
    downsamples = []
    for level_width, level_height in extents:
        ratio = (width / level_width + height / level_height) / 2
        power = 2.0 ** round(math.log2(max(width / level_width, height / level_height, 1.0)))
        if _is_explained(width, level_width, power, tile and tile[0]) and _is_explained(
            height, level_height, power, tile and tile[1]
        ):
            ratio = power
        downsamples.append(ratio)
    return downsamples


def _is_explained(full: int, found: int, power: float, tile: int | None) -> bool:
    exact = full / power
    if math.floor(exact) <= found <= math.ceil(exact):
        return True
    return bool(tile) and found == math.ceil(exact / tile) * tile  # type: ignore[operator]
