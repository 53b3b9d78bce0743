"""What a lossless tile costs to write, to read and to keep: JPEG XL, PNG and WebP.

One process encodes and decodes 1024-px tiles of tissue (the demo's), one thread per codec.

Encodings:
  jxl            `carn.bcsr.codec`'s default: JPEG XL lossless at effort 1
  png            `carn.bcsr.codec`'s other one: PNG at level 1
  pil_png        PIL's `save(..., "PNG")` as it comes, at level 6: what most pipelines do
  webp           PIL's `save(..., "WEBP", lossless=True)` as it comes
  jxl_2, jxl_3   JPEG XL at efforts 2 and 3; only with --full

What is predicted, and why:
  png_over_jxl_write >= 8   effort 1 predicts from fixed neighbours and codes runs and Huffman
                            symbols in one vectorised pass; PNG tries filters, then deflate searches
                            for matches that the noise of a sensor does not have
  png_over_jxl_bytes > 1.2  it decorrelates colours (YCoCg) and predicts in two dimensions
  png_over_jxl_read < 1     the price: a JPEG XL decoder walks a general tree of contexts for every
                            sample, where inflate copies bytes and undoes a filter
A ratio above 1 speaks for JPEG XL. Each is the median over rounds that run every encoding.

Examples:
  python benchmarks/encode_tiles.py
  python benchmarks/encode_tiles.py --full
"""

import io
import json
import statistics
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

# `python benchmarks/encode_tiles.py` puts benchmarks/ on the path, not the folder that holds carn/.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import imagecodecs
import numpy as np
import tyro
from PIL import Image
from read_tiles import Case, interleaved, median_ratio, tissue_tiles

from carn.bcsr import codec
from carn.slides.slide import Rgb

Encode = Callable[[Rgb], bytes]
Decode = Callable[[bytes], Rgb]


@dataclass(frozen=True, kw_only=True)
class EncodeTiles:
    """What is measured."""

    full: bool = False
    """All tissue tiles instead of three, JPEG XL at higher efforts too, two minutes of rounds."""

    seconds: float | None = None
    """Wall-clock time for the rounds, in s; at least three are run. Default 15, with --full 120."""


def _encode_pil(pixels: Rgb, *, form: str, **options: bool) -> bytes:
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, form, **options)
    return content.getvalue()


def _decode_pil(content: bytes) -> Rgb:
    return np.asarray(Image.open(io.BytesIO(content)))


def _encode_jxl(pixels: Rgb, *, effort: int) -> bytes:
    return cast(
        bytes, imagecodecs.jpegxl_encode(pixels, lossless=True, effort=effort, numthreads=1)
    )


def encodings(*, full: bool) -> dict[str, tuple[Encode, Decode]]:
    """What is compared, by name: a function to bytes and the one back."""
    found: dict[str, tuple[Encode, Decode]] = {
        "jxl": (partial(codec.encode, encoding="jxl"), partial(codec.decode, encoding="jxl")),
        "png": (partial(codec.encode, encoding="png"), partial(codec.decode, encoding="png")),
        "pil_png": (partial(_encode_pil, form="PNG"), _decode_pil),
        "webp": (partial(_encode_pil, form="WEBP", lossless=True), _decode_pil),
    }
    if full:
        for effort in (2, 3):
            found[f"jxl_{effort}"] = (partial(_encode_jxl, effort=effort), found["jxl"][1])
    return found


@contextmanager
def _each(work: Callable[[Any], object], items: list[Any]) -> Iterator[Callable[[], None]]:
    def each() -> None:
        for item in items:
            work(item)

    yield each


def measure(
    tiles: list[Rgb], compared: dict[str, tuple[Encode, Decode]], *, seconds: float
) -> dict[str, float | int]:
    """The figures of this benchmark for (H, W, 3) uint8 RGB tiles.

    Raises:
        ValueError: an encoding that did not give back the pixels.
    """
    cases: dict[str, Case] = {}
    num_bytes = {}
    for name, (encode, decode) in compared.items():
        contents = [encode(tile) for tile in tiles]
        if not all(np.array_equal(decode(c), t) for c, t in zip(contents, tiles, strict=True)):
            raise ValueError(f"{name} is not lossless as it is called here")
        num_bytes[name] = sum(map(len, contents)) / len(tiles)
        cases[f"{name}_write"] = partial(_each, encode, tiles)
        cases[f"{name}_read"] = partial(_each, decode, contents)
    cpu_ms = interleaved(cases, num_tiles=dict.fromkeys(cases, len(tiles)), seconds=seconds)

    figures: dict[str, float | int] = {
        f"png_over_jxl_{what}": median_ratio(cpu_ms[f"png_{what}"], cpu_ms[f"jxl_{what}"])
        for what in ("write", "read")
    }
    figures["png_over_jxl_bytes"] = num_bytes["png"] / num_bytes["jxl"]
    for name in compared:
        figures[f"{name}_write_ms"] = statistics.median(cpu_ms[f"{name}_write"])
        figures[f"{name}_read_ms"] = statistics.median(cpu_ms[f"{name}_read"])
        figures[f"{name}_bytes"] = num_bytes[name]
    figures["tiles"] = len(tiles)
    figures["rounds"] = len(cpu_ms["jxl_write"])
    return figures


def main(bench: EncodeTiles) -> None:
    """Measure, print the table and, as the last line, the figures as JSON."""
    tiles = tissue_tiles()
    compared = encodings(full=bench.full)
    default_s = 120.0 if bench.full else 15.0
    figures = measure(
        tiles if bench.full else tiles[:3],
        compared,
        seconds=default_s if bench.seconds is None else bench.seconds,
    )
    print("lossless 1024-px RGB tile, CPU ms and bytes")
    print(f"{'':12}{'write ms':>12}{'read ms':>12}{'bytes':>12}")
    for name in compared:
        print(
            f"{name:12}{figures[f'{name}_write_ms']:12.1f}{figures[f'{name}_read_ms']:12.1f}"
            f"{figures[f'{name}_bytes']:12,.0f}"
        )
    print()
    for name, figure in figures.items():
        if "_over_" in name:
            print(f"{name:24}{figure:6.2f}")
    print(json.dumps({name: round(figure, 3) for name, figure in figures.items()}))


if __name__ == "__main__":
    main(tyro.cli(EncodeTiles, description=__doc__))
