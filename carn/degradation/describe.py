"""Describe slides: how they are stored, and how sharp and how noisy their pixels are.

The file's own headers say how it is stored. Sharpness and noise are estimated on windows of tissue
and glass, and given as what `carn.degradation` would have made them of: LR at scale 2 of the HR
tissue of 40x slides. An estimate comes with an interval; `Estimate` says how often it holds.
"""

import dataclasses
import itertools
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray

from carn import storage
from carn.degradation.jpeg import through_jpeg
from carn.degradation.scanner import Degradation, apply
from carn.errors import DamagedTileError, SlideError
from carn.slides.compression import Compression, read_compression
from carn.slides.image import IMAGE_SUFFIXES
from carn.slides.opening import open_image, open_slide
from carn.slides.slide import Rgb, Slide
from carn.slides.tissue import find_tissue, tissue_grid

logger = logging.getLogger(__name__)

# Spectra are means over blocks of this side: eight JPEG blocks, and the Hann window's leakage stays
# within a band.
BLOCK_PX = 64
# Mean over rings of spatial frequency, cycles per px: [first, last) of each, and the corners beyond
# Nyquist. The first is what the others are compared with.
RINGS = (0.06, 0.10, 0.18, 0.26, 0.34, 0.42, 0.50, 0.71)
# The ring by whose fall sharpness is told in dB: the highest whose power JPEG 60 leaves within 1 dB
# in the mean.
SHARPNESS_RING = 3
# Blocks with less contrast (standard deviation of luma, grey levels) show glass, not tissue.
MIN_CONTRAST = 6.0
MIN_BLOCKS = 4
# So that a blank block has a logarithm: a tenth of the power that rounding to grey levels adds.
_LEAST_POWER = 0.01
# Windows that are enough for blocks not to overlap: what overlap adds then is time.
_MANY_WINDOWS = 8

# Noise is measured in blocks of this side, and told at mid-grey as Degradation has it.
NOISE_BLOCK_PX = 16
_LUMA = np.array([0.299, 0.587, 0.114], dtype=np.float32)
# Variance of luma where the noise of each channel has one of 1.
_LUMA_VARIANCE = float((_LUMA**2).sum())
# Flat glass: colourless, bright, not clipped, and level: the deviation of means over 4 x 4 px, in
# which noise of 3 levels leaves 0.5 (all in grey levels).
_MAX_GLASS_COLOUR, _MIN_GLASS, _CLIPPED, _MAX_SLOPE = 15.0, 180.0, 247.0, 1.2
_MIN_FLAT_BLOCKS = 8
# Squares of blur (HR px) below this are of sharpened LR: of the calibration's LR of unblurred HR,
# 1 in 100 had less than -0.64.
SHARPENED_SQUARE = -0.7
# Errors of squares grow with these. With a quarter, 0 and 3 levels are covered alike.
ERROR_GROWTH = 0.25
# The most that was calibrated. JPEG may hide as much.
MAX_NOISE_LEVELS = 3.0
MAX_BLUR_PX = 1.4
# Um per LR px for which the calibration holds: 20x within a factor of the square root of 2.
CALIBRATED_MPP = (0.35, 0.71)
MIN_CALIBRATED_QUALITY = 60

NUM_WINDOWS = 16
NUM_GLASS_WINDOWS = 4
WINDOW_PX = 256
# Share of tissue in a window, where there are such.
MIN_TISSUE_SHARE = 0.5
# Places of a slide that are considered, along its longer side.
_GRID_PLACES = 128
# Suffixes of what is never a slide.
_PLAIN_SUFFIXES = tuple(name for name in IMAGE_SUFFIXES if not name.startswith(".tif"))

# x, y in level-0 px.
Place = tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A number and its interval.

    The interval is made to hold the truth in nine of ten images of sources like those of the
    calibration. Of organs and scanners that are not among these, whose HR is softer or crisper by
    itself, it holds the blur in eight of ten (docs/describe.md).
    """

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        """Write the number with its interval."""
        return f"{self.value:.2f} ({self.low:.2f} to {self.high:.2f})"


@dataclass(frozen=True, kw_only=True)
class Line:
    """A linear model of the square of what is estimated, and how far it is off.

    Attributes:
        weights: of the measures, the constant first.
        low, high: 5 and 95 % of the truth's square less the model's, over images it has not seen;
            for a square of 0, and a quarter more for each 1 that it has (ERROR_GROWTH).
    """

    weights: tuple[float, ...]
    low: float
    high: float

    def square(self, measures: NDArray[np.float64]) -> float:
        """Evaluate the line; the result may be below 0."""
        return float(np.dot(self.weights, measures))

    def estimate(self, measures: NDArray[np.float64]) -> Estimate:
        """Take the square root of the line's value, from 0 on, with its interval."""
        square = self.square(measures)
        spread = 1 + ERROR_GROWTH * max(0.0, square)
        low, value, high = (
            math.sqrt(max(0.0, square + spread * more)) for more in (self.low, 0.0, self.high)
        )
        return Estimate(value=value, low=low, high=high)


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """The lines by which estimates follow from measures.

    Attributes:
        blur: square of HR px, of `_spectral_measures`.
        colour_noise: square of grey levels, of `_noise_measures` without flat glass.
        flat_noise: likewise, of those on flat glass.
    """

    blur: Line
    colour_noise: Line
    flat_noise: Line


# By `python -m carn.degradation calibrate` over 145 images of 40x slides that are free to use: 32
# of breast (TNBC, 6 patients, Philips), 50 of CAMELYON16's Tumor_001 and Tumor_064, 63 of TCGA's
# open slides (brain, head and neck, lung, prostate and others). `calibrate` says how.
CALIBRATION = Calibration(
    blur=Line(
        weights=(0.0685, -0.7283, -0.9311, 3.2009, -0.2602, -2.6143, 0.0177, -0.0292),
        low=-0.458,
        high=0.454,
    ),
    colour_noise=Line(weights=(-0.4170, 0.8637, -0.7398, 1.0488), low=-1.103, high=1.077),
    flat_noise=Line(weights=(-0.4370, 1.0497), low=-0.443, high=0.437),
)


@dataclass(frozen=True, kw_only=True)
class PixelEstimates:
    """Sharpness and noise of some windows of a slide.

    Attributes:
        fall_db: by how much the power spectral density of luma on tissue falls from the ring of
            0.06..0.10 to that of 0.26..0.34 cycles/px; None without tissue.
        blur_px: standard deviation of the Gaussian that would have blurred HR tissue of a 40x slide
            as much before sampling at scale 2, HR px; None without tissue.
        is_sharpened: sharper than nearly all LR of unblurred HR. It misses much, for blur and
            sharpening undo each other, and may be said of crisp tissue.
        noise_levels: standard deviation at mid-grey, grey levels; None where there are no px to
            tell it by.
        is_noise_hidden: pixels went through JPEG, which takes noise away: there is as much as
            `noise_levels.low`, and may have been any more.
        has_flat_place: noise was measured on flat glass; else in the colour that tissue has least
            of.
    """

    fall_db: float | None
    blur_px: Estimate | None
    is_sharpened: bool
    noise_levels: Estimate | None
    is_noise_hidden: bool
    has_flat_place: bool


@dataclass(frozen=True, kw_only=True)
class SlideDescription:
    """A slide by its own headers and by its pixels.

    Attributes:
        uri: the slide.
        extent: (width, height) of the level, px.
        level: the level described.
        mpp: um per px of the level, (x, y); None where the file does not say.
        vendor: as `carn.slides.slide.SlideProperties`.
        compression: how the level is stored.
        pixels: estimates.
        num_windows: windows of tissue, and of glass, that these come from.
    """

    uri: str
    extent: tuple[int, int]
    level: int
    mpp: tuple[float, float] | None
    vendor: str
    compression: Compression
    pixels: PixelEstimates
    num_windows: tuple[int, int]

    @property
    def notes(self) -> tuple[str, ...]:
        """List the limits of the estimates, a sentence each."""
        notes = []
        quality = self.compression.quality
        if self.mpp is None:
            notes.append(
                "the file does not say its um per px (--mpp gives it); blur is told as of 0.5"
            )
        elif not self.is_calibrated:
            notes.append(
                f"blur is calibrated for {CALIBRATED_MPP[0]} to {CALIBRATED_MPP[1]} um per px: "
                "elsewhere structures have another size in px, and it may be far off"
            )
        if quality is not None and quality.quality < MIN_CALIBRATED_QUALITY:
            notes.append(f"estimates are calibrated for JPEG {MIN_CALIBRATED_QUALITY} and above")
        if self.pixels.blur_px is None:
            notes.append("no tissue was found, so that sharpness is not told")
        if self.pixels.is_noise_hidden and self.pixels.noise_levels is not None:
            notes.append("JPEG hides noise: what is told of it is what is left")
        if not self.pixels.has_flat_place:
            notes.append("no flat glass was found; noise is told by what no stain explains")
        return tuple(notes)

    @property
    def is_calibrated(self) -> bool:
        """Tell whether the level has the px size that blur was calibrated for."""
        return self.mpp is not None and CALIBRATED_MPP[0] <= sum(self.mpp) / 2 <= CALIBRATED_MPP[1]


# ------------------------------------------------------------------------------------ estimates


def describe_windows(
    windows: Sequence[Rgb], *, is_lossless: bool = False, calibration: Calibration = CALIBRATION
) -> PixelEstimates:
    """Estimate sharpness and noise on windows of one slide.

    Blur holds whether or not pixels went through JPEG of quality 60 or more: the calibration has
    all of these, and its interval their differences.

    Args:
        windows: (H, W, 3) uint8 of 64 px or more a side each; of tissue, and of glass if wanted.
        is_lossless: pixels are known not to have gone through JPEG.
        calibration: how estimates follow from measures.

    Raises:
        ValueError: no windows, or one that is smaller or of another kind.
    """
    if not windows:
        raise ValueError("there are no windows to describe; give one or more")
    for window in windows:
        shape, dtype = window.shape, window.dtype
        if dtype != np.uint8 or len(shape) != 3 or shape[2] != 3 or min(shape[:2]) < BLOCK_PX:
            raise ValueError(
                f"a window of {dtype}, {shape} cannot be described; it must be uint8, "
                f"(height, width, 3), with sides of {BLOCK_PX} px or more"
            )
    measures = _spectral_measures(windows)
    blur = fall_db = None
    is_sharpened = False
    if measures is not None:
        blur = calibration.blur.estimate(measures)
        fall_db = -10 * float(measures[1 + SHARPNESS_RING])
        is_sharpened = calibration.blur.square(measures) < SHARPENED_SQUARE
    noise, has_flat_place = _noise(windows, calibration)
    if noise is not None and not is_lossless:
        high = max(noise.high, MAX_NOISE_LEVELS)
        noise = Estimate(value=noise.value, low=noise.low, high=high)
    return PixelEstimates(
        fall_db=fall_db,
        blur_px=blur,
        is_sharpened=is_sharpened,
        noise_levels=noise,
        is_noise_hidden=not is_lossless,
        has_flat_place=has_flat_place,
    )


def _spectral_measures(windows: Sequence[Rgb]) -> Float[NDArray[Any], " m"] | None:
    """Measure 1, log10 of the first ring's power, and of each other's relative to it; or None.

    The first ring's own power tells tissue of strong contrast, whose spectrum falls less.
    """
    step = BLOCK_PX if len(windows) >= _MANY_WINDOWS else BLOCK_PX // 2
    blocks = []
    for window in windows:
        luma = window.astype(np.float32) @ _LUMA
        views = np.lib.stride_tricks.sliding_window_view(luma, (BLOCK_PX, BLOCK_PX))
        found = views[::step, ::step].reshape(-1, BLOCK_PX, BLOCK_PX)
        found = found - found.mean(axis=(1, 2), keepdims=True)
        blocks.append(found[found.std(axis=(1, 2)) > MIN_CONTRAST])
    tissue = np.concatenate(blocks)
    if len(tissue) < MIN_BLOCKS:
        return None
    taper = np.hanning(BLOCK_PX + 1)[:-1].astype(np.float32)
    window_2d = np.outer(taper, taper)
    spectra = np.abs(_rfft2(tissue * window_2d)) ** 2
    power = spectra.mean(axis=0) / float((window_2d**2).sum())
    frequency = np.hypot(np.fft.fftfreq(BLOCK_PX)[:, None], np.fft.rfftfreq(BLOCK_PX)[None])
    rings = np.array(
        [
            power[(frequency >= first) & (frequency < last)].mean()
            for first, last in itertools.pairwise(RINGS)
        ]
    )
    logs = np.log10(rings + _LEAST_POWER)
    measures: NDArray[np.float64] = np.concatenate([[1.0, logs[0]], logs[1:] - logs[0]])
    return measures


def _rfft2(blocks: NDArray[np.float32]) -> NDArray[np.complex64]:
    # Here, for a bare GPU machine has none; numpy's would be of twice the precision and time.
    from scipy import fft

    found: NDArray[np.complex64] = fft.rfft2(blocks)
    return found


def _noise(windows: Sequence[Rgb], calibration: Calibration) -> tuple[Estimate | None, bool]:
    """Estimate noise, and say whether there was flat glass for it."""
    measured, is_flat = _noise_measures(windows)
    if measured is None:
        return None, False
    line = calibration.flat_noise if is_flat else calibration.colour_noise
    return line.estimate(measured), is_flat


def _noise_measures(windows: Sequence[Rgb]) -> tuple[NDArray[np.float64] | None, bool]:
    """Measure variances that tell noise, and say whether they are of flat glass.

    On glass: 1, and the variance of luma. Elsewhere: 1, the 10 and 50 % quantiles of the variance
    in colour over blocks, and what it would be in a block without detail, by a line through the
    half of blocks that have least.
    """
    # Of many windows the middles are enough.
    share = 2 if len(windows) >= _MANY_WINDOWS else 1
    blocks = [_noise_blocks(_middle(window, share)) for window in windows]
    in_colour, in_luma, is_flat, is_clipped = (
        np.concatenate([block[number] for block in blocks]) for number in range(4)
    )
    if is_flat.sum() >= _MIN_FLAT_BLOCKS:
        # Dust and cells at the edge are in the upper half.
        return np.array([1.0, np.quantile(in_luma[is_flat], 0.25)]), True
    in_colour, in_luma = in_colour[~is_clipped], in_luma[~is_clipped]
    if len(in_colour) < _MIN_FLAT_BLOCKS:
        return None, False
    low, middle = np.quantile(in_colour, (0.1, 0.5))
    calm = np.argsort(in_luma)[: max(_MIN_FLAT_BLOCKS, len(in_luma) // 2)]
    design = np.stack([np.ones(len(calm)), in_luma[calm]], axis=1)
    without_detail = np.linalg.lstsq(design, in_colour[calm], rcond=None)[0][0]
    return np.array([1.0, low, middle, without_detail]), False


def _middle(window: Rgb, share: int) -> Rgb:
    height, width = window.shape[:2]
    top, left = (height - height // share) // 2, (width - width // share) // 2
    return window[top : top + height // share, left : left + width // share]


def _noise_blocks(window: Rgb) -> tuple[NDArray[Any], ...]:
    """Measure each block: variances at the highest frequencies, is flat glass, is clipped.

    The finest diagonal detail of a Haar wavelet has the variance of white noise and little of
    tissue. In colour: two dyes leave one direction of RGB free, that in which detail varies least
    (the least eigenvalue of its covariance); and in luma. Both as noise at mid-grey.

    Source: D. Donoho 1995, https://doi.org/10.1109/18.382009, for noise by the finest wavelets.
    """
    side = NOISE_BLOCK_PX
    height, width = ((length - 1) // side * side for length in window.shape[:2])
    pixels = window[: height + 1, : width + 1].astype(np.float32)
    across = pixels[:, :-1] - pixels[:, 1:]
    detail = _in_blocks((across[:-1] - across[1:]) / 2, side)
    colours = _in_blocks(pixels[:height, :width], side)
    covariance = detail.transpose(0, 2, 1) @ detail / np.float32(side**2)
    mean = colours.mean(axis=1)
    # As in Degradation: noise has 1.4 of its size at black and 0.6 at white.
    scale = (1.4 - 0.8 * mean.mean(axis=1) / 255) ** 2
    in_colour = np.linalg.eigvalsh(covariance)[:, 0] / scale
    in_luma = (covariance @ _LUMA) @ _LUMA / scale / _LUMA_VARIANCE
    coarse: NDArray[np.float32] = (
        pixels[:height, :width].reshape(height // 4, 4, width // 4, 4, 3).mean(axis=(1, 3))
    )
    slope = np.std(_in_blocks(coarse, side // 4) @ _LUMA, axis=1)
    is_clipped = mean.max(axis=1) >= _CLIPPED
    is_flat = (
        (mean.min(axis=1) >= _MIN_GLASS)
        & (np.ptp(mean, axis=1) <= _MAX_GLASS_COLOUR)
        & (slope <= _MAX_SLOPE)
        & ~is_clipped
    )
    return in_colour, in_luma, is_flat, is_clipped


def _in_blocks(pixels: NDArray[Any], side: int) -> NDArray[Any]:
    """Cut (H, W, C) into (blocks, side * side, C)."""
    height, width, channels = pixels.shape
    parts = pixels.reshape(height // side, side, width // side, side, channels)
    return parts.transpose(0, 2, 1, 3, 4).reshape(-1, side * side, channels)


# ---------------------------------------------------------------------------------- calibration


# Measures, the truth's square, the number of the image.
_Row = tuple[NDArray[np.float64], float, int]


def calibrate(images: Mapping[str, Rgb], *, num_ways: int = 16, num_folds: int = 5) -> Calibration:
    """Find the constants of the estimates anew.

    Each image is made into LR at scale 2 in `num_ways` ways: blur of 0..1.4 HR px or (a fifth)
    none, noise of 0..3 levels or (a third) none, sampling in between mean and bicubic, three in
    four with JPEG 60 to 98 of any subsampling. Lines are least squares of the truth's square, made
    unbiased at each truth. Intervals are those of images that the line was not fitted to: a fold
    holds images that are neighbours by name, which are of one source.

    Args:
        images: HR of 40x slides by name, (H, W, 3) uint8 of 256 px or more a side.
        num_ways: LR images of each.
        num_folds: parts of the images of which all but one are fitted to at a time.
    """
    spectral: list[_Row] = []
    noisy: dict[bool, list[_Row]] = {True: [], False: []}
    for number, name in enumerate(sorted(images)):
        rng = np.random.default_rng([1, number])
        for way in _ways(rng, num_ways):
            lossless = apply(
                images[name], dataclasses.replace(way, jpeg_quality=None), scale=2, rng=rng
            )
            measures, is_flat = _noise_measures([lossless])
            if measures is not None:
                noisy[is_flat].append((measures, way.noise_levels**2, number))
            measures = _spectral_measures([_stored(lossless, way)])
            if measures is not None:
                spectral.append((measures, way.blur_px**2, number))
    flat = _fit(noisy[True], num_folds)
    # Gaps in tissue have some detail, which the line takes away. Wide glass has none.
    flat = dataclasses.replace(flat, high=max(flat.high, -flat.weights[0]))
    return Calibration(
        blur=_fit(spectral, num_folds),
        colour_noise=_fit(noisy[False], num_folds),
        flat_noise=flat,
    )


def _ways(rng: np.random.Generator, num_ways: int) -> Iterator[Degradation]:
    for _ in range(num_ways):
        yield Degradation(
            blur_px=float(rng.uniform(0, MAX_BLUR_PX)) if rng.random() < 0.8 else 0.0,
            mean_weight=float(np.clip(3 * rng.random() - 1, 0, 1)),
            noise_levels=float(rng.uniform(0, MAX_NOISE_LEVELS)) if rng.random() < 2 / 3 else 0.0,
            jpeg_quality=int(rng.integers(60, 99)) if rng.random() < 0.75 else None,
            jpeg_subsampling=("4:4:4", "4:2:2", "4:2:0")[int(rng.integers(3))],
        )


def _stored(lossless: Rgb, way: Degradation) -> Rgb:
    if way.jpeg_quality is None:
        return lossless
    return through_jpeg(lossless, quality=way.jpeg_quality, subsampling=way.jpeg_subsampling)


def _fit(rows: Sequence[_Row], num_folds: int) -> Line:
    designs, squares, images = (np.array(column) for column in zip(*rows, strict=True))
    known, places = np.unique(images, return_inverse=True)
    folds = places * num_folds // len(known)
    told = np.empty(len(rows))
    for fold in range(num_folds):
        is_out = folds == fold
        told[is_out] = designs[is_out] @ _least_squares(designs[~is_out], squares[~is_out])
    weights = _least_squares(designs, squares)
    # Least squares draw towards the mean of what was tried: the least are told too large, the
    # largest too small. Turned back, they are right in the mean wherever they lie.
    slope = float(np.cov(told, squares)[0, 1] / squares.var(ddof=1))
    start = float(told.mean() - slope * squares.mean())
    told = (told - start) / slope
    unbiased = weights / slope
    unbiased[0] -= start / slope
    errors = (squares - told) / (1 + ERROR_GROWTH * np.maximum(told, 0.0))
    low, high = np.quantile(errors, (0.05, 0.95))
    return Line(weights=tuple(map(float, unbiased)), low=float(low), high=float(high))


def _least_squares(
    designs: NDArray[np.float64], squares: NDArray[np.float64]
) -> NDArray[np.float64]:
    found: NDArray[Any] = np.linalg.lstsq(designs, squares, rcond=None)[0]
    return found


# --------------------------------------------------------------------------------------- slides


def describe_slide(
    uri: str | Path,
    *,
    level: int = 0,
    mpp_um: float | None = None,
    num_windows: int = NUM_WINDOWS,
    window_px: int = WINDOW_PX,
) -> SlideDescription:
    """Describe a slide or a plain image from a local path or `s3://`.

    Of a slide that is read directly only headers, a coarse level and the windows are read.

    Args:
        uri: the slide or image.
        level: pyramid level.
        mpp_um: um per level-0 px, where the file does not say.
        num_windows: most windows of tissue that are looked at, spread over it.
        window_px: their side, px of the level.

    Raises:
        ValueError: windows that are too few or too small.
        MissingObjectError, AccessDeniedError, StorageError: it cannot be read.
        SlideError: neither a slide nor an image, damaged, without such a level, or too small.
    """
    if num_windows < 1 or window_px < BLOCK_PX:
        raise ValueError(
            f"num_windows={num_windows} must be 1 or more, window_px={window_px} {BLOCK_PX} or more"
        )
    with _open(storage.normalize(uri)) as slide:
        if not 0 <= level < len(slide.levels):
            raise SlideError(slide.uri, f"has levels 0..{len(slide.levels) - 1}, not {level}")
        found = slide.levels[level]
        side_px = min(window_px, found.width_px, found.height_px)
        if side_px < BLOCK_PX:
            raise SlideError(
                slide.uri,
                f"has {found.width_px} x {found.height_px} px on level {level}; sides of "
                f"{BLOCK_PX} px or more can be described",
            )
        compression = read_compression(slide, level=level)
        tissue, glass = _places(slide, round(side_px * found.downsample), num_windows)
        on_tissue = _read(slide, tissue, level, side_px)
        on_glass = _read(slide, glass, level, side_px)
        if not on_tissue and not on_glass:
            raise SlideError(slide.uri, f"is damaged wherever level {level} was looked at")
        pixels = describe_windows([*on_tissue, *on_glass], is_lossless=compression.is_lossless)
        mpp_x, mpp_y = slide.properties.mpp_x or mpp_um, slide.properties.mpp_y or mpp_um
        mpp = None
        if mpp_x is not None and mpp_y is not None:
            mpp = (mpp_x * found.downsample, mpp_y * found.downsample)
        return SlideDescription(
            uri=slide.uri,
            extent=(found.width_px, found.height_px),
            level=level,
            mpp=mpp,
            vendor=slide.properties.vendor,
            compression=compression,
            pixels=pixels,
            num_windows=(len(on_tissue), len(on_glass)),
        )


def _open(uri: str) -> Slide:
    """Open a slide, or a plain image: by its name, or a TIFF that no reader takes for a slide."""
    if uri.lower().endswith(_PLAIN_SUFFIXES):
        return open_image(uri)
    try:
        return open_slide(uri)
    except SlideError as error:
        # A slide that is cut off is no plain image, even where Pillow would read its remains.
        is_foreign = "is not a slide in any format" in error.reason
        if not (is_foreign and uri.lower().endswith(IMAGE_SUFFIXES)):
            raise
        return open_image(uri)


def _places(slide: Slide, side_l0: int, num_windows: int) -> tuple[list[Place], list[Place]]:
    """Choose top-left corners of windows of tissue and of glass, spread over the slide."""
    mask = find_tissue(slide)
    cell_l0 = max(side_l0, math.ceil(max(slide.extent) / _GRID_PLACES))
    cells = tissue_grid(mask, tile_px=cell_l0, min_share=0.0)
    # In the middle of its cell.
    corners = cells + (cell_l0 - side_l0) // 2
    shares = np.array([mask.share(int(x), int(y), side_l0) for x, y in corners])
    tissue = _spread(corners[shares >= MIN_TISSUE_SHARE], num_windows)
    if not tissue:
        tissue = _spread(corners[shares > 0], num_windows)
    return tissue, _spread(corners[shares == 0], NUM_GLASS_WINDOWS)


def _spread(corners: NDArray[np.int64], number: int) -> list[Place]:
    chosen = np.unique(np.linspace(0, len(corners) - 1, min(number, len(corners))).round())
    return [(int(corners[n][0]), int(corners[n][1])) for n in chosen.astype(int)]


def _read(slide: Slide, places: Sequence[Place], level: int, side_px: int) -> list[Rgb]:
    windows = []
    for x_l0, y_l0 in places:
        try:
            windows.append(slide.read_region(x_l0, y_l0, side_px, side_px, level=level))
        except DamagedTileError as error:
            logger.warning("%s: left out of the estimates", error)
    return windows
