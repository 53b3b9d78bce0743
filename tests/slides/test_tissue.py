"""Tissue: the island on the glass, and nothing that only looks dark."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from carn.slides import open_slide
from carn.slides.tissue import TissueMask, find_tissue, tissue_grid, tissue_mask

PINK = (205, 120, 175)
WriteSlide = Callable[..., Path]


def glass(width: int = 800, height: int = 600, *, seed: int = 0) -> np.ndarray:
    """A slide without anything on it: nearly white, with a sensor's noise in each channel."""
    noise = np.random.default_rng(seed).normal(0, 2, (height, width, 3))
    return np.clip(242 + noise, 0, 255).astype(np.uint8)


def on_ellipse(width: int, height: int, x: int, y: int, a: int, b: int) -> np.ndarray:
    rows, columns = np.mgrid[0:height, 0:width]
    return ((columns - x) / a) ** 2 + ((rows - y) / b) ** 2 <= 1


def agreement(found: np.ndarray, expected: np.ndarray) -> float:
    """Intersection over union."""
    return float((found & expected).sum() / (found | expected).sum())


@pytest.mark.parametrize(
    "colour",
    [PINK, (120, 70, 150), (150, 110, 80), (225, 195, 215)],
    ids=["eosin", "haematoxylin", "DAB", "pale"],
)
def test_the_island_is_found(colour: tuple[int, int, int]) -> None:
    pixels = glass()
    island = on_ellipse(800, 600, 300, 250, 180, 120)
    pixels[island] = colour
    assert agreement(tissue_mask(pixels), island) > 0.97


def test_empty_glass_has_no_tissue() -> None:
    for seed in range(3):
        assert not tissue_mask(glass(seed=seed)).any()
    assert not tissue_mask(np.full((50, 60, 3), 255, np.uint8)).any()
    assert not tissue_mask(np.zeros((50, 60, 3), np.uint8)).any()


def test_tinted_glass_with_an_island() -> None:
    pixels = glass() - np.array([0, 6, 3], np.uint8)
    island = on_ellipse(800, 600, 500, 300, 120, 200)
    pixels[island] = PINK
    assert agreement(tissue_mask(pixels), island) > 0.97


def test_black_pen_and_grey_edges_are_no_tissue() -> None:
    pixels = glass()
    island = on_ellipse(800, 600, 200, 300, 120, 160)
    pixels[island] = PINK
    pixels[50:550, 500:530] = (12, 10, 14)  # a stroke of the pen
    pixels[50:550, 540:570] = (2, 4, 27)  # of a bluish one
    pixels[:, 700:720] = (128, 128, 128)  # the coverslip's edge
    pixels[:, 780:] = 0  # the scanner's frame
    found = tissue_mask(pixels)
    assert not found[:, 480:].any()
    assert agreement(found, island) > 0.97


def test_specks_go_and_pinholes_are_filled() -> None:
    pixels = glass()
    pixels[100:300, 100:300] = PINK
    pixels[200:203, 200:203] = 242
    pixels[450:452, 450:452] = PINK
    found = tissue_mask(pixels)
    assert found[100:300, 100:300].all()
    assert found.sum() == 200 * 200


def test_real_slide_with_ink(shared_data: Path) -> None:
    # 5600 x 1000 px: core biopsies on glass. Tissue lies in thin cores, most of it is glass.
    with Image.open(shared_data / "overview" / "histoprep_slide_with_ink.jpg") as image:
        pixels = np.asarray(image.convert("RGB").reduce(4))
    found = tissue_mask(pixels)
    assert 0.01 < found.mean() < 0.5
    # Whatever is called glass is light and colourless; a tissue px is neither.
    saturation = pixels.max(2).astype(int) - pixels.min(2)
    assert np.percentile(saturation[~found], 90) < 40
    assert np.median(saturation[found]) > 2 * np.median(saturation[~found])
    assert pixels[~found].mean() > pixels[found].mean() + 20


# ------------------------------------------------------------------------------------- on slides


def test_tissue_of_a_slide_is_in_its_frame(write_slide: WriteSlide) -> None:
    pixels = glass(1500, 1100)
    island = on_ellipse(1500, 1100, 900, 400, 300, 250)
    pixels[island] = PINK
    with open_slide(write_slide(pixels=pixels, num_levels=3)) as slide:
        tissue = find_tissue(slide, max_side_px=300)
    assert tissue.extent == (1500, 1100)
    assert max(tissue.mask.shape) == 300
    assert tissue.downsample == pytest.approx(5, rel=0.01)
    enlarged = np.kron(tissue.mask, np.ones((5, 5), bool))[:1100, :1500]
    assert agreement(enlarged, island) > 0.93
    assert tissue.share(850, 350, 100) == 1.0
    assert tissue.share(0, 0, 200) == 0.0


def test_share_is_of_the_whole_square() -> None:
    mask = np.zeros((60, 80), bool)
    mask[20:40, 0:30] = True
    tissue = TissueMask(mask=mask, downsample=10.0, extent=(800, 600))
    assert tissue.share(0, 200, 200) == 1.0
    assert tissue.share(200, 200, 200) == 0.5
    assert tissue.share(100, 100, 200) == 0.5
    assert tissue.share(400, 200, 200) == 0.0
    # Below a mask px: the px it lies in.
    assert tissue.share(3, 203, 4) == 1.0
    # Beyond the border there is no tissue.
    assert tissue.share(-100, 200, 200) == 0.5
    for x, y in ((-300, 200), (-200, 200), (0, -500), (800, 200), (0, 600), (5000, 5000)):
        assert tissue.share(x, y, 200) == 0.0, (x, y)


@given(
    width=st.integers(10, 500),
    height=st.integers(10, 500),
    tile_px=st.integers(5, 120),
    min_share=st.sampled_from([0.0, 0.01, 0.3, 1.0]),
    seed=st.integers(0, 5),
)
def test_the_grid_holds_each_tissue_tile_once(
    width: int, height: int, tile_px: int, min_share: float, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    mask = rng.random((height // 5 + 1, width // 5 + 1)) < 0.4
    tissue = TissueMask(mask=mask, downsample=5.0, extent=(width, height))
    corners = tissue_grid(tissue, tile_px=tile_px, min_share=min_share)
    assert corners.shape[1] == 2
    assert corners.dtype == np.int64
    covered = np.zeros((height, width), int)
    for x, y in corners:
        assert x >= 0 and y >= 0 and x + tile_px <= width and y + tile_px <= height  # noqa: PT018
        assert tissue.share(x, y, tile_px) >= min_share
        covered[y : y + tile_px, x : x + tile_px] += 1
    assert covered.max(initial=0) <= 1
    left_out = [
        (x, y)
        for y in range(0, height - tile_px + 1, tile_px)
        for x in range(0, width - tile_px + 1, tile_px)
        if not covered[y, x]
    ]
    assert all(tissue.share(x, y, tile_px) < min_share for x, y in left_out)
    assert corners.tolist() == sorted(corners.tolist(), key=lambda corner: (corner[1], corner[0]))


def test_an_empty_slide_gives_no_tiles(write_slide: WriteSlide) -> None:
    with open_slide(write_slide(pixels=glass())) as slide:
        corners = tissue_grid(find_tissue(slide), tile_px=100, min_share=0.01)
    assert corners.shape == (0, 2)


def test_a_generous_mask_keeps_small_and_pale_tissue() -> None:
    pixels = np.full((60, 60, 3), 240, dtype=np.uint8)
    pixels[10:40, 10:40] = (150, 60, 130)  # strong, so that Otsu parts it from the pale
    pixels[50:52, 50:52] = (190, 120, 170)  # a speck of 2 x 2 px
    pixels[20:40, 45:55] = (240, 222, 236)  # pale
    strict, generous = tissue_mask(pixels), tissue_mask(pixels, is_generous=True)
    assert strict[20, 20]
    assert not strict[50, 50]
    assert not strict[30, 50]
    assert generous[20, 20]
    assert generous[50, 50]
    assert generous[30, 50]
    assert not generous[:8].any()
