"""What a block of an output slide costs beyond its JPEG encoder.

One process, one thread, encodes blocks of 4096 x 4096 px of tissue (the demo's, turned) as 512-px
tiles of four pyramid levels, JPEG Q90 4:2:0, and keeps the block on the fifth.

Cases, CPU ms per block:
  encode   `carn.slides.encoding.encode_block`
  bare     the floor: simplejpeg on the same tiles of the same levels, all lying in memory
  halve    `carn.slides.encoding.halved`, four times
  pil      `Image.fromarray(pixels).reduce(2)`, four times
  pil_way  what `encode` replaces: PIL's halving of whole levels, then each tile cut and encoded

What is predicted, and why:
  encode_over_bare >= 0.7   speed of `encode` as a share of the encoder's alone. A px of a level is
                            read once more to be cut out and once to be halved; numpy adds 3 strided
                            channels at about 1 Gpx/s, JPEG takes 2.4 ns a px
  halve_over_pil > 1.3      PIL copies RGB to 4 bytes a px and back; into fresh memory, which makes
                            it 3, unless MALLOC_MMAP_THRESHOLD_ and MALLOC_TRIM_THRESHOLD_ are high
  encode_over_pil_way > 1   halving a tile while it is in the cache, and the former
Each is the median over rounds that run every case.

Examples:
  python benchmarks/encode_slide.py
  python benchmarks/encode_slide.py --full
"""

import json
import statistics
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

# `python benchmarks/encode_slide.py` puts benchmarks/ on the path, not the folder that holds carn/.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import simplejpeg
import tyro
from PIL import Image
from read_tiles import Case, interleaved, median_ratio, tissue_tiles

from carn.slides.encoding import block_levels, encode_block, halved
from carn.slides.slide import Rgb
from carn.slides.slide_output import SlideFormat

BLOCK_PX = 4096
NUM_LEVELS = 4
FORMAT = SlideFormat()
SEED = 3


@dataclass(frozen=True, kw_only=True)
class EncodeSlide:
    """What is measured."""

    full: bool = False
    """Two minutes of rounds."""

    seconds: float | None = None
    """Wall-clock time for the rounds, in s; at least three are run. Default 15, with --full 120."""


def make_block() -> Rgb:
    """(4096, 4096, 3) uint8 RGB of tissue tiles, each turned its own way; seeded."""
    tiles = tissue_tiles()
    rng = np.random.default_rng(SEED)
    side_px = tiles[0].shape[0]
    block = np.empty((BLOCK_PX, BLOCK_PX, 3), dtype=np.uint8)
    for number in range((BLOCK_PX // side_px) ** 2):
        y, x = (place * side_px for place in divmod(number, BLOCK_PX // side_px))
        turned = np.rot90(tiles[number % len(tiles)], k=int(rng.integers(4)))
        block[y : y + side_px, x : x + side_px] = turned
    return block


def cut(levels: list[Rgb]) -> list[Rgb]:
    """All tiles of the levels, each in memory of its own."""
    side = FORMAT.tile_px
    return [
        np.ascontiguousarray(level[y : y + side, x : x + side])
        for level in levels
        for y in range(0, level.shape[0], side)
        for x in range(0, level.shape[1], side)
    ]


def encode_bare(tiles: list[Rgb]) -> list[bytes]:
    """The tiles by the bare encoder."""
    return [
        simplejpeg.encode_jpeg(
            tile,
            quality=FORMAT.quality,
            colorspace="RGB",
            colorsubsampling=FORMAT.subsampling,
        )
        for tile in tiles
    ]


def halve_all(pixels: Rgb, halve: Callable[[Rgb], Rgb]) -> list[Rgb]:
    """The block and what comes of halving it NUM_LEVELS times."""
    levels = [pixels]
    for _ in range(NUM_LEVELS):
        levels.append(halve(levels[-1]))
    return levels


def halve_pil(pixels: Rgb) -> Rgb:
    """PIL's halving."""
    return np.asarray(Image.fromarray(pixels).reduce(2))


@contextmanager
def _calling(work: Callable[[], object]) -> Iterator[Callable[[], object]]:
    yield work


def measure(pixels: Rgb, *, seconds: float) -> dict[str, float | int]:
    """The figures of this benchmark for a (H, W, 3) uint8 RGB block.

    Raises:
        ValueError: two ways that should give the same do not.
    """
    encode = partial(encode_block, pixels, num_levels=NUM_LEVELS, has_more_levels=True, form=FORMAT)
    tiles = cut(list(block_levels(pixels, num_levels=NUM_LEVELS)))
    if encode().payload != b"".join(encode_bare(tiles)):
        raise ValueError("the block's tiles are not those of the bare encoder")
    if not np.array_equal(halved(pixels), halve_pil(pixels)):
        raise ValueError("halving is not that of PIL")
    works: dict[str, Callable[[], object]] = {
        "encode": encode,
        "bare": partial(encode_bare, tiles),
        "halve": partial(halve_all, pixels, halved),
        "pil": partial(halve_all, pixels, halve_pil),
        "pil_way": lambda: encode_bare(cut(halve_all(pixels, halve_pil)[:NUM_LEVELS])),
    }
    cases: dict[str, Case] = {name: partial(_calling, work) for name, work in works.items()}
    cpu_ms = interleaved(cases, num_tiles=dict.fromkeys(cases, 1), seconds=seconds)
    figures: dict[str, float | int] = {
        "encode_over_bare": median_ratio(cpu_ms["bare"], cpu_ms["encode"]),
        "halve_over_pil": median_ratio(cpu_ms["pil"], cpu_ms["halve"]),
        "encode_over_pil_way": median_ratio(cpu_ms["pil_way"], cpu_ms["encode"]),
    }
    figures |= {f"{name}_ms": statistics.median(found) for name, found in cpu_ms.items()}
    # Level-0 px that leave as all their levels.
    figures["encode_mpx_per_cpu_s"] = pixels[..., 0].size / 1000 / figures["encode_ms"]
    figures["rounds"] = len(cpu_ms["encode"])
    return figures


def main(bench: EncodeSlide) -> None:
    """Measure, print the table and, as the last line, the figures as JSON."""
    default_s = 120.0 if bench.full else 15.0
    seconds = default_s if bench.seconds is None else bench.seconds
    figures = measure(make_block(), seconds=seconds)
    print(f"block of {BLOCK_PX} x {BLOCK_PX} px, {NUM_LEVELS} levels, one thread")
    for name, figure in figures.items():
        print(f"{name:24}{figure:10.2f}")
    print(json.dumps({name: round(figure, 3) for name, figure in figures.items()}))


if __name__ == "__main__":
    main(tyro.cli(EncodeSlide, description=__doc__))
