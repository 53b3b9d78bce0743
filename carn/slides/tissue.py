"""Where a slide has tissue, found on a coarse level."""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from carn.slides.slide import Rgb, Slide

# Longest side of the picture the tissue is looked for on: at 2048 px one mask px of a 100,000-px
# slide covers 50 px, a fraction of a 1024-px tile, and reading it costs a few MB.
MASK_SIDE_PX = 2048
# Stained tissue differs from glass by its colour; colourless grey is dust, a coverslip's edge or a
# scanner's frame. The threshold is Otsu's, but never below this (of 255): on an empty slide Otsu
# would split the noise of the glass.
MIN_SATURATION = 15
# Nor above this: where the stain is bimodal itself, Otsu would part strong from weak.
MAX_SATURATION = 40
# Black ink and frames are darker than this in every channel.
MIN_GREY = 30


@dataclass(frozen=True, kw_only=True)
class TissueMask:
    """A coarse mask of the tissue on a slide.

    Attributes:
        mask: (h, w) bool, True on tissue.
        downsample: level-0 px per mask px.
        extent: (width, height) of the slide in level-0 px.
    """

    mask: NDArray[np.bool_]
    downsample: float
    extent: tuple[int, int]

    def share(self, x_l0: int, y_l0: int, side_px: int) -> float:
        """Share of tissue (0..1) under a square of level-0 px; outside the slide there is none."""
        x0, y0 = math.floor(x_l0 / self.downsample), math.floor(y_l0 / self.downsample)
        x1 = max(x0 + 1, math.ceil((x_l0 + side_px) / self.downsample))
        y1 = max(y0 + 1, math.ceil((y_l0 + side_px) / self.downsample))
        on_slide = self.mask[max(0, y0) : max(0, y1), max(0, x0) : max(0, x1)]
        return float(on_slide.sum() / ((x1 - x0) * (y1 - y0)))


def tissue_mask(pixels: Rgb, *, is_generous: bool = False) -> NDArray[np.bool_]:
    """True on tissue, for a picture of a slide on a light background.

    Saturation above Otsu's threshold (Otsu 1979, https://doi.org/10.1109/TSMC.1979.4310076), as is
    usual for H&E. Specks narrower than 3 px go, and gaps narrower than 7 px are filled.

    Args:
        pixels: (H, W, 3) uint8 RGB.
        is_generous: rather take glass for tissue than the other way round: saturation above
            MIN_SATURATION counts, and specks of 2 x 2 px stay.
    """
    from scipy import ndimage
    from skimage.filters import threshold_otsu

    low = pixels.min(axis=2).astype(np.int16)
    high = pixels.max(axis=2).astype(np.int16)
    saturation = high - low
    # Black or pen-dark pixels would drag the threshold; glass and tissue are what it must part.
    considered = saturation[high >= MIN_GREY]
    limit = float(MIN_SATURATION)
    if not is_generous and considered.size and considered.min() < considered.max():
        limit = min(max(limit, float(threshold_otsu(considered))), MAX_SATURATION)
    tissue = (saturation > limit) & (high >= MIN_GREY)
    least_px = 2 if is_generous else 3
    tissue = ndimage.binary_opening(tissue, structure=np.ones((least_px, least_px)))
    tissue = ndimage.binary_closing(tissue, structure=np.ones((7, 7)))
    cleaned: NDArray[np.bool_] = tissue
    return cleaned


def find_tissue(
    slide: Slide, *, max_side_px: int = MASK_SIDE_PX, is_generous: bool = False
) -> TissueMask:
    """The tissue of a slide, on a picture of it with sides of at most `max_side_px`.

    Args:
        slide: where to look.
        max_side_px: of the picture.
        is_generous: as `tissue_mask`.

    Raises:
        DamagedTileError: the coarse level cannot be decoded.
    """
    pixels = slide.thumbnail(max_side_px)
    downsample = max(slide.extent[0] / pixels.shape[1], slide.extent[1] / pixels.shape[0])
    return TissueMask(
        mask=tissue_mask(pixels, is_generous=is_generous),
        downsample=downsample,
        extent=slide.extent,
    )


def tissue_grid(tissue: TissueMask, *, tile_px: int, min_share: float) -> NDArray[np.int64]:
    """Top-left corners (n, 2) of the grid tiles that lie on the slide whole and hold tissue.

    The grid starts at (0, 0) and steps by `tile_px` level-0 px. Rows ordered by y, then x.

    Args:
        tissue: where the tissue is.
        tile_px: side of a tile in level-0 px.
        min_share: least share of tissue (0..1) a tile must hold.
    """
    width, height = tissue.extent
    corners = [
        (x, y)
        for y in range(0, height - tile_px + 1, tile_px)
        for x in range(0, width - tile_px + 1, tile_px)
        if tissue.share(x, y, tile_px) >= min_share
    ]
    return np.asarray(corners, dtype=np.int64).reshape(-1, 2)
