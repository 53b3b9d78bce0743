"""How fast tiles are read: the direct reader against its floor and against OpenSlide.

One process reads 1024-px RGB tiles of level 0 from a slide of 512-px JPEG tiles (Q80, 4:2:0) whose
pixels are several times what the readers' caches hold (32 MiB each). The file is in the page cache,
so this is the processor's share of reading, which is what a cluster's cores are spent on.

Cases, in 1024-px tiles per CPU-second:
  decode      the floor: the JPEG tiles are in memory, each is decoded once, nothing is put together
  direct      `carn.slides.open_slide`
  openslide   `np.asarray(read_region(...).convert("RGB"))`, what most pipelines do
  tiffslide   `read_region(..., as_array=True)`; only where it is installed
Orders:
  aligned     on the slide's tile grid: every JPEG tile serves one read
  offset      the grid moved by (137, 137), row by row: tiles at the borders serve up to four reads
  scattered   the places of `offset`, shuffled: fewer of them are still in a cache

What is predicted, and why:
  direct_over_decode >= 0.8             beyond decoding it only copies: 3 MiB into the region, and
                                        the compressed bytes, a fifteenth of that
  direct_over_openslide >= 4            OpenSlide decodes with the same library, then composites
                                        premultiplied RGBA, divides by alpha and drops it
  direct_over_openslide_unaligned >= 3  (`offset`) a tile read touches 9 JPEG tiles; with the caches
                                        about 5 are decoded for it instead of 4, and decoding is
                                        what both readers have in common
  direct_over_openslide_scattered       lower still: fewer are found in a cache, more are decoded
Every round runs every case with a slide opened anew; a ratio is the median of the rounds' ratios.

Examples:
  python benchmarks/read_tiles.py
  python benchmarks/read_tiles.py --full
"""

import importlib
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
from typing import Any

# `python benchmarks/read_tiles.py` puts benchmarks/ on the path, not the folder that holds carn/.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import openslide
import simplejpeg
import tifffile
import tyro

from carn.demo import make_slide
from carn.slides import open_slide
from carn.slides.pyramid import write_pyramid
from carn.slides.slide import Rgb

TILE_PX = 1024
JPEG_TILE_PX = 512
QUALITY = 80
# No multiple of a JPEG block (16 px): nothing falls into place by accident.
OFFSET_PX = 137
# A demo slide that is mostly tissue.
SEED = 3
MIN_ROUNDS = 3

Place = tuple[int, int]
# Opens what a case needs and yields what is timed: a function that does `num_tiles` tiles' work.
Case = Callable[[], Any]


@dataclass(frozen=True, kw_only=True)
class ReadTiles:
    """What is measured."""

    full: bool = False
    """A slide of 8192 x 8192 px instead of 6144 x 6144, and four minutes of rounds."""

    seconds: float | None = None
    """Wall-clock time for the rounds, in s; at least three are run. Default 20, with --full 240."""


def tissue_tiles() -> list[Rgb]:
    """The demo slide's tiles that are mostly tissue: (1024, 1024, 3) uint8 RGB, seeded."""
    pixels, _ = make_slide(SEED)
    rows, columns = pixels.shape[0] // TILE_PX, pixels.shape[1] // TILE_PX
    tiles = [
        np.ascontiguousarray(pixels[y : y + TILE_PX, x : x + TILE_PX])
        for y in range(0, rows * TILE_PX, TILE_PX)
        for x in range(0, columns * TILE_PX, TILE_PX)
    ]
    # Glass is 243 with little noise; the median pixel of a tile tells which of both it mostly is.
    return [tile for tile in tiles if np.median(tile[::4, ::4].min(axis=-1)) < 225]


def interleaved(
    cases: dict[str, Case], *, num_tiles: dict[str, int], seconds: float
) -> dict[str, list[float]]:
    """CPU ms per tile of each case, one number per round.

    Every round runs all cases, in turn forwards and backwards: what else goes on at the machine
    hits neighbours alike, and falls out of the ratio within a round.

    Args:
        cases: context managers that yield the function to be timed; set-up is not timed.
        num_tiles: tiles that a case's function works through.
        seconds: wall-clock time after which no round is started; at least MIN_ROUNDS are run.
    """
    cpu_ms: dict[str, list[float]] = {name: [] for name in cases}
    names = list(cases)
    start = time.monotonic()
    longest = 0.0
    while len(cpu_ms[names[0]]) < MIN_ROUNDS or time.monotonic() - start + longest < seconds:
        round_start = time.monotonic()
        for name in names:
            with cases[name]() as work:
                before = time.process_time()
                work()
                cpu_ms[name].append((time.process_time() - before) * 1000 / num_tiles[name])
        names.reverse()
        longest = max(longest, time.monotonic() - round_start)
    return cpu_ms


def median_ratio(numerators: list[float], denominators: list[float]) -> float:
    """Median over rounds of numerator / denominator."""
    return statistics.median(a / b for a, b in zip(numerators, denominators, strict=True))


def make_bench_slide(path: Path, *, side_px: int) -> None:
    """Write a square slide of tissue tiles, each turned its own way; seeded."""
    tiles = tissue_tiles()
    rng = np.random.default_rng(SEED)
    pixels = np.empty((side_px, side_px, 3), dtype=np.uint8)
    for number, (x, y) in enumerate(grid(side_px, offset_px=0)):
        turned = np.rot90(tiles[number % len(tiles)], k=int(rng.integers(4)))
        pixels[y : y + TILE_PX, x : x + TILE_PX] = turned
    write_pyramid(path, pixels, mpp_um=0.25, tile_px=JPEG_TILE_PX, quality=QUALITY)


def grid(side_px: int, *, offset_px: int) -> list[Place]:
    """Top-left corners (x, y) in level-0 px of the tiles that lie wholly on the slide, by rows."""
    starts = range(offset_px, side_px - TILE_PX + 1, TILE_PX)
    return [(x, y) for y in starts for x in starts]


def jpeg_streams(path: Path) -> list[bytes]:
    """The JPEG tiles of level 0, as they stand in the file."""
    with tifffile.TiffFile(path) as tiff, path.open("rb") as file:
        page: Any = tiff.pages[0]
        assert page.jpegtables is None, "tifffile writes each tile with its own tables"
        streams = []
        for start, length in zip(page.dataoffsets, page.databytecounts, strict=True):
            file.seek(start)
            streams.append(file.read(length))
    return streams


@contextmanager
def _decoding(streams: list[bytes]) -> Iterator[Callable[[], None]]:
    def work() -> None:
        for stream in streams:
            simplejpeg.decode_jpeg(stream, colorspace="RGB", strict=True)

    yield work


@contextmanager
def _direct(path: Path, places: list[Place]) -> Iterator[Callable[[], None]]:
    with open_slide(path) as slide:
        assert slide.reader == "tiled-tiff"

        def work() -> None:
            for x, y in places:
                slide.read_region(x, y, TILE_PX, TILE_PX)

        yield work


def _openslide_tile(handle: openslide.OpenSlide, x: int, y: int) -> Rgb:
    return np.asarray(handle.read_region((x, y), 0, (TILE_PX, TILE_PX)).convert("RGB"))


@contextmanager
def _openslide(path: Path, places: list[Place]) -> Iterator[Callable[[], None]]:
    with openslide.OpenSlide(str(path)) as handle:

        def work() -> None:
            for x, y in places:
                _openslide_tile(handle, x, y)

        yield work


@contextmanager
def _tiffslide(path: Path, places: list[Place]) -> Iterator[Callable[[], None]]:
    with importlib.import_module("tiffslide").TiffSlide(path) as handle:

        def work() -> None:
            for x, y in places:
                handle.read_region((x, y), 0, (TILE_PX, TILE_PX), as_array=True)

        yield work


def has_tiffslide() -> bool:
    """Whether tiffslide can be imported; it is no requirement of this project."""
    try:
        importlib.import_module("tiffslide")
    except ImportError:
        return False
    return True


def samples_unlike_openslide(path: Path, places: list[Place]) -> int:
    """How many of the places' R, G and B values differ between the direct reader and OpenSlide."""
    with open_slide(path) as slide, openslide.OpenSlide(str(path)) as handle:
        return sum(
            int(
                np.count_nonzero(
                    slide.read_region(x, y, TILE_PX, TILE_PX) != _openslide_tile(handle, x, y)
                )
            )
            for x, y in places
        )


def measure(path: Path, *, side_px: int, seconds: float) -> dict[str, float | int]:
    """The figures of this benchmark for a slide of `make_bench_slide`."""
    streams = jpeg_streams(path)
    offset = grid(side_px, offset_px=OFFSET_PX)
    orders = {
        "aligned": grid(side_px, offset_px=0),
        "offset": offset,
        "scattered": [offset[i] for i in np.random.default_rng(SEED).permutation(len(offset))],
    }
    readers = {"direct": _direct, "openslide": _openslide}
    if has_tiffslide():
        readers["tiffslide"] = _tiffslide
    cases: dict[str, Case] = {"decode": partial(_decoding, streams)}
    num_tiles = {"decode": len(streams) * JPEG_TILE_PX**2 // TILE_PX**2}
    for order, places in orders.items():
        for reader, case in readers.items():
            cases[f"{reader}_{order}"] = partial(case, path, places)
            num_tiles[f"{reader}_{order}"] = len(places)
    cpu_ms = interleaved(cases, num_tiles=num_tiles, seconds=seconds)

    figures: dict[str, float | int] = {}
    direct = cpu_ms["direct_aligned"]
    figures["direct_over_decode"] = median_ratio(cpu_ms["decode"], direct)
    for order, suffix in (("aligned", ""), ("offset", "_unaligned"), ("scattered", "_scattered")):
        for reader in list(readers)[1:]:
            figures[f"direct_over_{reader}{suffix}"] = median_ratio(
                cpu_ms[f"{reader}_{order}"], cpu_ms[f"direct_{order}"]
            )
    for name, rounds in cpu_ms.items():
        figures[f"{name}_tiles_per_cpu_s"] = 1000 / statistics.median(rounds)
    figures["jpeg_bytes_per_px"] = sum(map(len, streams)) / side_px**2
    figures["samples_unlike_openslide"] = samples_unlike_openslide(path, offset[:4])
    figures["rounds"] = len(direct)
    return figures


def main(bench: ReadTiles) -> None:
    """Make the slide, measure, print the table and, as the last line, the figures as JSON."""
    side_px = 8192 if bench.full else 6144
    default_s = 240.0 if bench.full else 20.0
    seconds = default_s if bench.seconds is None else bench.seconds
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "slide.tif"
        make_bench_slide(path, side_px=side_px)
        figures = measure(path, side_px=side_px, seconds=seconds)
    print(f"{TILE_PX}-px tiles per CPU-second, {side_px} x {side_px} px of {JPEG_TILE_PX}-px JPEG")
    print(f"{'':12}{'aligned':>12}{'offset':>12}{'scattered':>12}")
    print(f"{'decode':12}{figures['decode_tiles_per_cpu_s']:12.0f}")
    for reader in ("direct", "openslide", "tiffslide"):
        if f"{reader}_aligned_tiles_per_cpu_s" in figures:
            rates = [
                figures[f"{reader}_{order}_tiles_per_cpu_s"]
                for order in ("aligned", "offset", "scattered")
            ]
            print(f"{reader:12}" + "".join(f"{rate:12.0f}" for rate in rates))
    print()
    for name, figure in figures.items():
        if "_over_" in name:
            print(f"{name:36}{figure:6.2f}")
    print(json.dumps({name: round(figure, 3) for name, figure in figures.items()}))


if __name__ == "__main__":
    main(tyro.cli(ReadTiles, description=__doc__))
