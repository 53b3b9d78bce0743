"""What an LR variant as scanners make it costs, and what filling a node's cache with them costs.

One process, one thread: 1024-px tiles of tissue (the demo's) become LR at scale 2.

Rows:
  scanner  `carn.degradation`: blur, sampling, noise, unsharp mask and JPEG, drawn as training does
  bicubic  the paper's LR, by the same library calls as ever
  jpeg     the floor: encoding and decoding LR of that size by Pillow, and nothing else
  usual    the same steps written the usual way, in float64 by scipy and scikit-image
  step     one update of CARN x2 by the paper's recipe on one thread, as `train_step.py` has it

What is predicted, and why:
  usual_over_scanner >= 2   float32 instead of float64, blurs cut off where they are spent, and no
                            copies between steps; JPEG costs both the same
  scanner_over_jpeg <= 5    blur and sampling work on four times the px that JPEG sees
  fill_share <= 0.1         filling the cache with 8 variants of 900 tiles of 1024 px, by the time
                            that 300,000 updates take on as many cores
  gpu_fill_s <= 60          the same on 16 cores beside a GPU, where such a run is to take 600 s

Examples:
  python benchmarks/degrade_tiles.py
  python benchmarks/degrade_tiles.py --full
"""

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

# `python benchmarks/degrade_tiles.py` puts benchmarks/ on the path, not the folder above it.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
import tyro
from scipy.ndimage import gaussian_filter
from skimage.transform import resize

from benchmarks.read_tiles import Case, interleaved, median_ratio, tissue_tiles
from benchmarks.train_step import our_steps, write_tiles
from carn.degradation.bicubic import degrade
from carn.degradation.config import DegradationConfig
from carn.degradation.jpeg import through_jpeg
from carn.degradation.scanner import Degradation
from carn.degradation.variants import LrMaker
from carn.processor import has_bf16
from carn.slides.slide import Rgb

SCALE = 2
NUM_VARIANTS = 8
# The paper's: tiles of training, updates.
PAPER_TILES, PAPER_STEPS = 900, 300_000
GPU_CORES = 16
TIMED_STEPS = 12


@dataclass(frozen=True, kw_only=True)
class DegradeTiles:
    """What is measured."""

    full: bool = False
    """All tissue tiles instead of three, and two minutes of rounds."""

    seconds: float | None = None
    """Wall-clock time for the rounds, in s; at least three are run. Default 20, with --full 120."""


def make_usual(hr: Rgb, way: Degradation, rng: np.random.Generator) -> Rgb:
    """LR as a program has it that was written for clarity alone; not the same px."""
    pixels = hr / 255.0
    if way.blur_px:
        pixels = gaussian_filter(pixels, sigma=(way.blur_px, way.blur_px, 0))
    sides = (hr.shape[0] // SCALE, hr.shape[1] // SCALE)
    lr = resize(pixels, sides, order=3, anti_aliasing=True)
    if way.noise_levels:
        lr = lr + rng.normal(0, way.noise_levels / 255, lr.shape)
    if way.sharpen_amount:
        blurred = gaussian_filter(lr, sigma=(way.sharpen_px, way.sharpen_px, 0))
        lr = lr + way.sharpen_amount * (lr - blurred)
    levels = np.rint(np.clip(lr, 0, 1) * 255).astype(np.uint8)
    if way.jpeg_quality is None:
        return levels
    return through_jpeg(levels, quality=way.jpeg_quality, subsampling=way.jpeg_subsampling)


@contextmanager
def _each(work: Callable[[int, Rgb], object], tiles: list[Rgb]) -> Iterator[Callable[[], None]]:
    def each() -> None:
        for number, tile in enumerate(tiles):
            for variant in range(NUM_VARIANTS):
                work(NUM_VARIANTS * number + variant, tile)

    yield each


def measure(tiles: list[Rgb], *, seconds: float) -> dict[str, float]:
    """The figures of this benchmark for (H, W, 3) uint8 tiles; CPU ms are of one variant."""
    maker = LrMaker(config=DegradationConfig(degradation="scanner", lr_variants=NUM_VARIANTS))
    small = [degrade(tile, scale=SCALE) for tile in tiles]
    rng = np.random.default_rng(0)

    def scanner(number: int, tile: Rgb) -> Rgb:
        return maker.make(tile, scale=SCALE, tile="tile", variant=number)

    def usual(number: int, tile: Rgb) -> Rgb:
        return make_usual(tile, maker.way(tile="tile", variant=number), rng)

    def jpeg(number: int, lr: Rgb) -> Rgb:
        del number
        return through_jpeg(lr, quality=80)

    def bicubic(number: int, tile: Rgb) -> Rgb:
        del number
        return degrade(tile, scale=SCALE)

    cases: dict[str, Case] = {
        "scanner": partial(_each, scanner, tiles),
        "bicubic": partial(_each, bicubic, tiles),
        "usual": partial(_each, usual, tiles),
        "jpeg": partial(_each, jpeg, small),
    }
    sizes = dict.fromkeys(cases, NUM_VARIANTS * len(tiles))
    cpu_ms = interleaved(cases, num_tiles=sizes, seconds=seconds)
    step_s = step_seconds()
    megapixels = tiles[0].shape[0] * tiles[0].shape[1] / 1e6
    figures = {f"{name}_ms": statistics.median(times) for name, times in cpu_ms.items()}
    fill_s = PAPER_TILES * NUM_VARIANTS * figures["scanner_ms"] / 1000
    return figures | {
        "usual_over_scanner": median_ratio(cpu_ms["usual"], cpu_ms["scanner"]),
        "scanner_over_jpeg": median_ratio(cpu_ms["scanner"], cpu_ms["jpeg"]),
        "scanner_over_bicubic": median_ratio(cpu_ms["scanner"], cpu_ms["bicubic"]),
        "variants_per_core_s": 1000 / figures["scanner_ms"],
        "hr_mp_per_core_s": 1000 * megapixels / figures["scanner_ms"],
        "step_ms": 1000 * step_s,
        "fill_core_s": fill_s,
        "fill_share": fill_s / (PAPER_STEPS * step_s),
        "gpu_fill_s": fill_s / GPU_CORES,
        "rounds": float(len(cpu_ms["scanner"])),
    }


def step_seconds() -> float:
    """Of one update of CARN x2 by the paper's recipe, CPU s of one thread."""
    precision = "bf16" if has_bf16(torch.device("cpu")) else "fp32"
    with tempfile.TemporaryDirectory() as folder:
        write_tiles(Path(folder))
        run = our_steps(Path(folder), precision=precision)["ours"]
        run(2)
        before = time.process_time()
        run(TIMED_STEPS)
        return (time.process_time() - before) / TIMED_STEPS


def main(bench: DegradeTiles) -> None:
    """Measure, print the table and, as the last line, the figures as JSON."""
    torch.set_num_threads(1)
    tiles = tissue_tiles()
    seconds = bench.seconds or (120.0 if bench.full else 20.0)
    figures = measure(tiles if bench.full else tiles[:3], seconds=seconds)
    print(f"LR of a {tiles[0].shape[1]}-px tile at scale {SCALE}, CPU ms of one variant")
    for name in ("scanner", "bicubic", "usual", "jpeg"):
        print(f"{name:24}{figures[f'{name}_ms']:10.1f}")
    print()
    for name, figure in figures.items():
        if not name.endswith("_ms") or name == "step_ms":
            print(f"{name:24}{figure:10.3g}")
    print(json.dumps({name: round(figure, 4) for name, figure in figures.items()}))


if __name__ == "__main__":
    main(tyro.cli(DegradeTiles, description=__doc__))
