"""The pixels that are super-resolved: one resolution of a slide, or a plain image, without borders.

Frame: LR px of the view, (0, 0) at the slide's top-left corner.
"""

import logging
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from carn import storage
from carn.errors import DamagedTileError, SlideError
from carn.slides.opening import open_image, open_slide
from carn.slides.slide import MAX_REGION_PX, SCANNED_MPP, Level, Rgb, Slide

logger = logging.getLogger(__name__)

# x, y of the top-left corner, width, height.
Box = tuple[int, int, int, int]

# By how much two resolutions may differ and still count as the same: calibrated scanners of one
# model differ by a percent or so.
MPP_TOLERANCE = 0.02
# Images that are never slides, and those that may be one.
PLAIN_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")
TIFF_SUFFIXES = (".tif", ".tiff")
# How far Pillow's BICUBIC reaches, in px of the coarser of its two grids (Keys 1981).
BICUBIC_SUPPORT_PX = 2


@dataclass(frozen=True, kw_only=True)
class InputConfig:
    """Which pixels of a slide are super-resolved."""

    level: int | None = None
    """Pyramid level, 0 the finest. By default 0, or what --input-mpp leads to."""
    input_mpp: float | None = None
    """Wanted um per px: the coarsest level that is at least as fine (within 2 %) is taken."""
    resample: bool = False
    """Bring that level to just --input-mpp, by antialiased bicubic resampling."""
    mpp: float | None = None
    """Um per level-0 px, for slides and images that do not say."""
    mpp_range: tuple[float, float] | None = None
    """Um per LR px, least and largest, that the network is fit for; None for what its checkpoint
    was trained on, where that is known."""
    on_odd_mpp: Literal["warn", "level", "fail"] = "warn"
    """A slide outside of it is done and warned of; is brought to the finest pyramid level that lies
    within, where it has one; or fails."""
    on_damaged_tile: Literal["fail", "upsample"] = "fail"
    """A place that cannot be decoded fails its slide, or is enlarged from the next coarser level
    (white where there is none) and listed."""

    def __post_init__(self) -> None:
        for name in ("input_mpp", "mpp"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name}={value} must be um per px, above 0, such as 0.25")
        if self.level is not None and self.level < 0:
            raise ValueError(f"level={self.level} must be 0 (the finest) or above")
        if self.level is not None and self.input_mpp is not None:
            raise ValueError(
                f"level={self.level} and input_mpp={self.input_mpp} both choose a level; give one"
            )
        if self.resample and self.input_mpp is None:
            raise ValueError("resample=True needs input_mpp, the um per px to resample to")
        if self.mpp_range is not None and not 0 < self.mpp_range[0] <= self.mpp_range[1]:
            raise ValueError(f"mpp_range={self.mpp_range} must be um per px: least, then largest")
        if self.on_odd_mpp not in ("warn", "level", "fail"):
            raise ValueError(f"on_odd_mpp={self.on_odd_mpp!r} must be 'warn', 'level' or 'fail'")
        if self.on_odd_mpp == "level" and (self.level is not None or self.input_mpp is not None):
            raise ValueError(
                "on_odd_mpp='level' chooses a level, and so do level and input_mpp: give one"
            )
        if self.on_damaged_tile not in ("fail", "upsample"):
            raise ValueError(
                f"on_damaged_tile={self.on_damaged_tile!r} must be 'fail' or 'upsample'"
            )

    def settings(self) -> dict[str, Any]:
        """All that decides the pixels, as JSON values."""
        settings = asdict(self)
        if self.on_odd_mpp != "level":
            # Left out for what was finished before there was a choice.
            del settings["mpp_range"], settings["on_odd_mpp"]
        return settings


class LrView:
    """One resolution of an open slide; reads go beyond its border and are mirrored there.

    Reads are safe from several threads. It does not pickle.

    Attributes:
        slide: the slide; closed with the view.
        config: what was asked for.
        level: the pyramid level that is read.
        extent: (width, height) in LR px.
        mpp: um per LR px, (x, y); None for plain images that nobody gave one.
        icc_profile: the slide's, or None.
        downsample: level-0 px per LR px, (x, y).
    """

    def __init__(self, slide: Slide, config: InputConfig) -> None:
        """Choose level and resolution.

        Raises:
            SlideError: the slide has no such level, or none that is fine enough; its MPP is not
                known or contradicts the config.
        """
        base_mpp = _base_mpp(slide, config)
        self.slide = slide
        self.config = config
        self.level = _chosen_level(slide, config, base_mpp)
        found = slide.levels[self.level]
        self.icc_profile = slide.properties.icc_profile
        self.downsample = (found.downsample, found.downsample)
        self.extent = (found.width_px, found.height_px)
        if config.resample:
            assert config.input_mpp is not None
            assert base_mpp is not None
            wanted = config.input_mpp
            self.downsample = (wanted / base_mpp[0], wanted / base_mpp[1])
            self.extent = (
                max(1, round(found.width_px * found.downsample / self.downsample[0])),
                max(1, round(found.height_px * found.downsample / self.downsample[1])),
            )
        self.mpp = None
        if base_mpp is not None:
            self.mpp = (base_mpp[0] * self.downsample[0], base_mpp[1] * self.downsample[1])

    def read(self, x: int, y: int, width: int, height: int) -> Rgb:
        """Pixels of any rectangle, mirrored beyond the border.

        The mirror does not repeat the border's px, and goes back and forth as far as it takes
        (`np.pad`'s "reflect"); a side of one px repeats it.

        Args:
            x, y: top-left corner in LR px; may be negative.
            width, height: in LR px.

        Returns:
            (height, width, 3) uint8 RGB.

        Raises:
            ValueError: a size that is not positive or absurdly large.
            DamagedTileError: pixels cannot be decoded; other places still can.
            StorageError: storage failed under the read.
        """
        return read_mirrored(self.read_inside, extent=self.extent, box=(x, y, width, height))

    def read_inside(self, x: int, y: int, width: int, height: int) -> Rgb:
        """As `read`, of a rectangle that lies on the slide."""
        return self._read_level(self.level, (x, y, width, height))

    def read_coarser(self, x: int, y: int, width: int, height: int) -> Rgb | None:
        """The same place (on the slide) enlarged from the next coarser level that can be read.

        Returns:
            (height, width, 3) uint8 RGB, or None where no coarser level can be read.

        Raises:
            StorageError: storage failed under the read.
        """
        for level in range(self.level + 1, len(self.slide.levels)):
            if level in self.slide.foreign_levels:
                continue
            try:
                return self._read_level(level, (x, y, width, height))
            except DamagedTileError:
                continue
        return None

    def to_l0(self, x: float, y: float) -> tuple[int, int]:
        """The level-0 px nearest to a place in LR px."""
        return round(x * self.downsample[0]), round(y * self.downsample[1])

    def close(self) -> None:
        """Close the slide."""
        self.slide.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _read_level(self, level: int, box: Box) -> Rgb:
        x, y, width, height = box
        found = self.slide.levels[level]
        step_x, step_y = (side / found.downsample for side in self.downsample)
        if abs(step_x - 1) < 1e-9 and abs(step_y - 1) < 1e-9:
            return _level_pixels(self.slide, level, box)
        columns = _source_span(x, width, step_x)
        rows = _source_span(y, height, step_y)
        pixels = read_mirrored(
            lambda *part: _level_pixels(self.slide, level, part),
            extent=(found.width_px, found.height_px),
            box=(columns[0], rows[0], columns[1] - columns[0], rows[1] - rows[0]),
        )
        place = (
            x * step_x - columns[0],
            y * step_y - rows[0],
            (x + width) * step_x - columns[0],
            (y + height) * step_y - rows[0],
        )
        # The kernel is that of the degradation: LR keeps the look that models were trained on.
        return np.asarray(
            Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC, box=place)
        )


def open_view(uri: str | Path, config: InputConfig, *, is_image: bool = False) -> LrView:
    """Open a slide or a plain image from a local path or `s3://` at the resolution that is wanted.

    What is named .png, .jpg, .jpeg, .bmp or .webp is a plain image, and so is a TIFF that no reader
    takes for a slide.

    Args:
        uri: the slide or image.
        config: which pixels of it.
        is_image: do not try whether it is a slide.

    Raises:
        MissingObjectError, AccessDeniedError, StorageError: it cannot be read.
        SlideError: neither a slide nor an image, damaged, or not of the resolution asked for.
    """
    name = storage.normalize(uri)
    if is_image or name.lower().endswith(PLAIN_SUFFIXES):
        slide = open_image(name)
    else:
        try:
            slide = open_slide(name)
        except SlideError as error:
            # A slide that is cut off is no plain image, even where Pillow would read its remains.
            is_foreign = "is not a slide in any format" in error.reason
            if not (is_foreign and name.lower().endswith(TIFF_SUFFIXES)):
                raise
            slide = open_image(name)
    try:
        return LrView(slide, config)
    except BaseException:
        slide.close()
        raise


# ---------------------------------------------------------------------------------- resolution


def _base_mpp(slide: Slide, config: InputConfig) -> tuple[float, float] | None:
    """Um per level-0 px, (x, y)."""
    mpp_x, mpp_y = slide.properties.mpp_x, slide.properties.mpp_y
    if mpp_x is not None and mpp_y is not None:
        given = config.mpp
        if given is not None and not SCANNED_MPP[0] <= (mpp_x + mpp_y) / 2 <= SCANNED_MPP[1]:
            return given, given
        if given is not None and any(
            abs(given / said - 1) > MPP_TOLERANCE for said in (mpp_x, mpp_y)
        ):
            raise SlideError(
                slide.uri,
                f"says {mpp_x:g} x {mpp_y:g} um per px, and --mpp {given:g}; leave --mpp away, or "
                "correct the slide",
            )
        return mpp_x, mpp_y
    if config.mpp is not None:
        return config.mpp, config.mpp
    if slide.reader == "image" and config.input_mpp is None:
        return None
    raise SlideError(slide.uri, "does not say its um per px; give it with --mpp")


def _chosen_level(slide: Slide, config: InputConfig, mpp: tuple[float, float] | None) -> int:
    if config.input_mpp is None:
        level = _level_within(slide, config, mpp) if config.level is None else config.level
        if level >= len(slide.levels):
            raise SlideError(
                slide.uri,
                f"has levels 0..{len(slide.levels) - 1}, not {level}; choose another --level, or "
                "say --input-mpp",
            )
        return level
    assert mpp is not None
    coarser = max(mpp)

    def mpp_of(level: Level) -> float:
        return level.downsample * coarser

    wanted = config.input_mpp
    fine = [
        number
        for number, level in enumerate(slide.levels)
        if mpp_of(level) <= wanted * (1 + MPP_TOLERANCE)
    ]
    if not fine:
        raise SlideError(
            slide.uri,
            f"has {mpp_of(slide.levels[0]):g} um per px at its finest, coarser than --input-mpp "
            f"{wanted:g}; ask for {mpp_of(slide.levels[0]):g} or more",
        )
    chosen = max(fine, key=lambda number: mpp_of(slide.levels[number]))
    found = mpp_of(slide.levels[chosen])
    if not config.resample and found < wanted * (1 - MPP_TOLERANCE):
        logger.warning(
            "%s: level %d has %g um per px, --input-mpp is %g; --resample makes it just that",
            *(slide.uri, chosen, found, wanted),
        )
    return chosen


def _level_within(slide: Slide, config: InputConfig, mpp: tuple[float, float] | None) -> int:
    """Level 0, or what is wanted of a slide that is not of the px size that the network knows."""
    if config.mpp_range is None or mpp is None or config.on_odd_mpp == "warn":
        return 0
    low, high = config.mpp_range
    sizes = [level.downsample * sum(mpp) / 2 for level in slide.levels]
    within = [number for number, size in enumerate(sizes) if low <= size <= high]
    if within and (within[0] == 0 or config.on_odd_mpp == "level"):
        return within[0]
    if config.on_odd_mpp == "level":
        return 0  # there is none: it is warned of
    raise SlideError(
        slide.uri,
        f"has {sizes[0]:.3g} um per px, and the network is fit for {low:.3g} to {high:.3g}; "
        "choose a level (--input-mpp, --on-odd-mpp level), or say --on-odd-mpp warn",
    )


# ------------------------------------------------------------------------------------- reading


def read_mirrored(
    read_inside: Callable[[int, int, int, int], Rgb], *, extent: tuple[int, int], box: Box
) -> Rgb:
    """Pixels of any rectangle, by a function (x, y, width, height) that reads those within.

    Of the inside only what shows is read, and once. See `LrView.read`.
    """
    x, y, width, height = box
    if width < 1 or height < 1 or width * height > MAX_REGION_PX:
        raise ValueError(
            f"a region of {width} x {height} px cannot be read: both sides must be positive and "
            f"hold at most {MAX_REGION_PX} px; read it in parts"
        )
    if x >= 0 and y >= 0 and x + width <= extent[0] and y + height <= extent[1]:
        return read_inside(x, y, width, height)
    columns = _mirrored_places(x, width, side=extent[0])
    rows = _mirrored_places(y, height, side=extent[1])
    left, top = int(columns.min()), int(rows.min())
    pixels = read_inside(left, top, int(columns.max()) + 1 - left, int(rows.max()) + 1 - top)
    return pixels[rows - top][:, columns - left]


def _mirrored_places(start: int, length: int, *, side: int) -> NDArray[np.intp]:
    """Where on 0..side-1 each of `length` places from `start` on is mirrored to."""
    period = max(1, 2 * (side - 1))
    places = np.arange(start, start + length) % period
    return np.minimum(places, period - places) if side > 1 else places


def _level_pixels(slide: Slide, level: int, box: Box) -> Rgb:
    """A box in px of a level; `Slide.read_region` finds its corner by level-0 px."""
    x, y, width, height = box
    downsample = slide.levels[level].downsample
    return slide.read_region(
        round(x * downsample), round(y * downsample), width, height, level=level
    )


def _source_span(start: int, length: int, step: float) -> tuple[int, int]:
    """[first, last) px of the source grid that the kernel reaches, for px of `step` source px."""
    reach = BICUBIC_SUPPORT_PX * max(1.0, step) + 1
    return math.floor(start * step - reach), math.ceil((start + length) * step + reach)
