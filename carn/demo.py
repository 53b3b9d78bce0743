"""Slides for the demo, made on the spot from real tissue, and a coordinate list for them.

The tissue is the immunohistochemistry image that ships with scikit-image (colonic glands, DAB and
haematoxylin; https://scikit-image.org/docs/stable/api/skimage.data.html). It is mirrored, turned
and bent into a seamless field, stained differently on every slide, and laid as islands on glass.

    python -m carn.demo demo/
"""

import sys
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from skimage import data
from torch.nn import functional

from carn.slides.pyramid import write_pyramid
from carn.slides.slide import Rgb

NUM_SLIDES = 6
# Sides are multiples of 64: slow fields are drawn at 1/64 and enlarged.
EXTENT_PX = (4096, 3072)
MPP_UM = 0.25
# Patch centres listed of each class and slide, as NCRF's lists do for CAMELYON16.
POINTS_PER_CLASS = 24
# Background of a slide: nearly white, with the grain of a sensor.
GLASS_GREY = 243


def make_slide(seed: int) -> tuple[Rgb, NDArray[np.bool_]]:
    """A slide's pixels, and the part of its tissue that plays the tumour.

    Returns:
        (H, W, 3) uint8 RGB and an (H // 16, W // 16) bool mask.
    """
    rng = np.random.default_rng(seed)
    width, height = EXTENT_PX
    tissue = _tissue_field(rng, height, width)
    shape = (height // 16, width // 16)
    # Slow fields at 1/16 scale: one raises the islands of tissue, one the tumour among it.
    island = _slow_noise(rng, shape, sigma_px=26)
    rows = np.linspace(-1, 1, shape[0])[:, None]
    columns = np.linspace(-1, 1, shape[1])[None, :]
    island = island + 0.9 - 1.6 * np.maximum(np.abs(rows), np.abs(columns)) ** 4
    is_tissue = island > 0.2
    is_tumor = is_tissue & (_slow_noise(rng, shape, sigma_px=18) > 0.35)
    # The tumour is stained darker, the rim of an island fades into the glass.
    density = np.where(is_tumor, 1.35, 0.95) * np.clip((island - 0.2) * 8, 0, 1)
    density = ndimage.zoom(ndimage.gaussian_filter(density, 2), 16, order=1).astype(np.float32)
    stain = rng.uniform(0.8, 1.25, size=3).astype(np.float32)
    glass = GLASS_GREY + 1.2 * rng.standard_normal((height, width, 1), dtype=np.float32)
    # Beer-Lambert: stain strength scales optical density, not intensity.
    pixels = glass * np.exp(-tissue * density[..., None] * stain)
    return np.clip(np.rint(pixels), 0, 255).astype(np.uint8), is_tumor


def _tissue_field(rng: np.random.Generator, height: int, width: int) -> NDArray[np.float32]:
    """Optical density (H, W, 3) of tissue without seams: one real image, mirrored, turned, bent."""
    image = data.immunohistochemistry().astype(np.float32)
    density = torch.from_numpy(-np.log(np.clip(image, 4, 240) / 240)).permute(2, 0, 1)[None]
    side = image.shape[0]
    rows, columns = np.mgrid[0:height, 0:width].astype(np.float32) * (2 / side)
    # Bending by up to a tile hides that tissue repeats; slowly, so that cells keep their form.
    rows += 0.6 * _slow_field(rng, height, width)
    columns += 0.6 * _slow_field(rng, height, width)
    angle = rng.uniform(0, 2 * np.pi)
    cos, sin = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    grid = np.stack([cos * columns - sin * rows, sin * columns + cos * rows], axis=-1)
    field = functional.grid_sample(
        density,
        torch.from_numpy(grid)[None],
        mode="bicubic",
        padding_mode="reflection",
        align_corners=False,
    )
    stained: NDArray[np.float32] = field[0].permute(1, 2, 0).clamp(min=0).numpy()
    stained *= 1 + 0.2 * _slow_field(rng, height, width)[..., None]
    return stained


def _slow_field(rng: np.random.Generator, height: int, width: int) -> NDArray[np.float32]:
    noise = _slow_noise(rng, (height // 64, width // 64), sigma_px=8)
    field: NDArray[np.float32] = ndimage.zoom(noise.astype(np.float32), 64, order=1)
    return field


def _slow_noise(
    rng: np.random.Generator, shape: tuple[int, int], *, sigma_px: float
) -> NDArray[np.float64]:
    noise = ndimage.gaussian_filter(rng.normal(size=shape), sigma_px, mode="reflect")
    scaled: NDArray[np.float64] = noise / noise.std()
    return scaled


def draw_centres(
    rng: np.random.Generator, mask: NDArray[np.bool_], *, count: int, margin_px: int
) -> NDArray[np.int64]:
    """Centres (n, 2) in level-0 px on a 1/16 mask, at least `margin_px` from the slide's border."""
    margin = margin_px // 16
    inner = np.zeros_like(mask)
    inner[margin:-margin, margin:-margin] = mask[margin:-margin, margin:-margin]
    rows, columns = np.nonzero(inner)
    chosen = rng.choice(len(rows), size=min(count, len(rows)), replace=False)
    jitter = rng.integers(16, size=(len(chosen), 2))
    return np.stack([columns[chosen], rows[chosen]], axis=1) * 16 + jitter


def make_demo(folder: Path) -> None:
    """Write `slides/*.tif`, `tumor.txt` and `normal.txt` (NCRF's format); what is there stays."""
    lists: dict[str, list[str]] = {"tumor": [], "normal": []}
    (folder / "slides").mkdir(parents=True, exist_ok=True)
    finished = folder / "normal.txt"
    if finished.exists():
        return
    for number in range(1, NUM_SLIDES + 1):
        pixels, is_tumor = make_slide(number)
        name = f"Demo_{number:03d}"
        write_pyramid(folder / "slides" / f"{name}.tif", pixels, mpp_um=MPP_UM)
        rng = np.random.default_rng([number, 1])
        # Normal points may fall anywhere but on tumour, some on glass: the white filter's work.
        for label, mask in (("tumor", is_tumor), ("normal", ~is_tumor)):
            centres = draw_centres(rng, mask, count=POINTS_PER_CLASS, margin_px=256)
            lists[label] += [f"{name},{x},{y}" for x, y in centres]
    for label, lines in lists.items():
        (folder / f"{label}.txt").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    make_demo(Path(sys.argv[1] if len(sys.argv) > 1 else "demo"))
