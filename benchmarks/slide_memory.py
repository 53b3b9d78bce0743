"""Whether the memory of a node depends on the size of the slide.

The nightly job super-resolves two made-up slides, mostly glass with islands of tissue, one after
the other, each with a Ray of its own. The network is bicubic enlargement: arithmetic costs what it
costs, and what is looked at here is everything round it. With 50,000 px a side the large slide
becomes one of 100,000 x 100,000 px: 30 GB of pixels, 625 blocks.

Peaks, in MB, are of unique memory (USS), sampled twice a second, of the processes of one kind
added up: the driver, the actor that makes blocks, and the one that finishes the slide. Ray's own
daemons and its object store are counted apart.

What is predicted, and why:
  workers_ratio <= 1.3    an actor holds two blocks (50 MB of SR each) and windows of one
  finish_ratio <= 2       records are read 32 at a time, upper levels are made in strips; what grows
                          are tables, 12 bytes a tile (0.6 MB here), and the head (some MB)
  driver_ratio <= 1.3     a row of numbers a block

Prints a line of JSON for each slide and one of the ratios.

Examples:
  python benchmarks/slide_memory.py
  python benchmarks/slide_memory.py --large-px 50000
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

# `python benchmarks/slide_memory.py` puts benchmarks/ on the path, not the folder above it.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import psutil
import simplejpeg
import tifffile
import tyro

TILE_PX = 512
# Tiles along a side of the coarser level, which tissue is looked for on.
COARSE = 32


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """How large the slides are."""

    small_px: int = 8192
    """Side of the small slide."""
    large_px: int = 16_384
    """Side of the large one; 50,000 is a slide of the largest kind."""


def main(benchmark: Benchmark) -> None:
    """Measure, and print."""
    from carn.models import build_model
    from carn.models.checkpoint import write_checkpoint

    os.environ["RAY_AUTH_MODE"] = "disabled"
    with tempfile.TemporaryDirectory() as folder:
        lab = Path(folder)
        write_checkpoint(
            str(lab / "bicubic"),
            model=build_model("bicubic", scale=2),
            model_name="bicubic",
            training=None,
            step=None,
            dataset=None,
            metrics={},
        )
        peaks = {}
        for side_px in (benchmark.small_px, benchmark.large_px):
            slide = lab / f"slide_{side_px}.tif"
            write_slide(slide, side_px)
            peaks[side_px] = run(lab, slide)
            print(json.dumps({"side_px": side_px, **peaks[side_px]}), flush=True)
    small, large = peaks[benchmark.small_px], peaks[benchmark.large_px]
    ratios = {
        f"{kind}_ratio": round(large[kind] / small[kind], 2)
        for kind in ("driver", "workers", "finish")
    }
    print(json.dumps({"benchmark": "slide_memory", **ratios}))


def write_slide(path: Path, side_px: int) -> None:
    """A slide of glass with tissue on every fifth square of 2,048 px."""
    from skimage import data

    image = data.immunohistochemistry()
    rng = np.random.default_rng(1)
    glass = rng.integers(240, 246, (TILE_PX, TILE_PX, 3), dtype=np.uint8)
    kinds = [simplejpeg.encode_jpeg(pixels, quality=85) for pixels in (glass, image)]
    across = -(-side_px // TILE_PX)

    def tiles() -> Iterator[bytes]:
        for row in range(across):
            for column in range(across):
                yield kinds[is_tissue(column, row)]

    coarse = np.full((side_px // COARSE, side_px // COARSE, 3), 243, dtype=np.uint8)
    step = TILE_PX // COARSE
    for row in range(across):
        for column in range(across):
            if is_tissue(column, row):
                coarse[row * step : (row + 1) * step, column * step : (column + 1) * step] = (
                    140,
                    100,
                    90,
                )
    form = {"tile": (TILE_PX, TILE_PX), "photometric": "rgb", "metadata": None, "software": False}
    with tifffile.TiffWriter(path, bigtiff=True) as writer:
        writer.write(
            tiles(),
            shape=(side_px, side_px, 3),
            dtype=np.uint8,
            compression="jpeg",
            compressionargs={"outcolorspace": "ycbcr"},
            subsampling=(1, 1),
            resolution=(20000, 20000),
            resolutionunit="CENTIMETER",
            **form,
        )
        writer.write(coarse, compression="jpeg", subfiletype=1, **form)


def is_tissue(column: int, row: int) -> bool:
    """Whether a tile is of tissue."""
    return (column // 4 + 2 * (row // 4)) % 5 == 0


def run(lab: Path, slide: Path) -> dict[str, float]:
    """Peak memory by kind of process, and seconds, of the job on one slide."""
    root = Path(__file__).resolve().parents[1]
    command = [
        *(sys.executable, str(root / "jobs" / "super_resolve.py"), "--slides", str(slide)),
        *("--checkpoint", str(lab / "bicubic"), "--output", str(lab / f"sr_{slide.stem}")),
        *("--progress-s", "60"),
    ]
    started = time.monotonic()
    peaks: Counter[str] = Counter()
    job = psutil.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while job.poll() is None:
        for kind, size in memory_of(job).items():
            peaks[kind] = max(peaks[kind], size)
        time.sleep(0.5)
    if job.returncode:
        raise SystemExit(f"the job ended with {job.returncode}")
    found = {kind: round(peaks[kind] / 1e6, 1) for kind in sorted(peaks)}
    return found | {"seconds": round(time.monotonic() - started, 1)}


def memory_of(job: psutil.Process) -> Counter[str]:
    """Bytes of unique memory of a job's processes, by kind."""
    sizes: Counter[str] = Counter()
    processes = [job]
    try:
        processes += job.children(recursive=True)
    except psutil.NoSuchProcess:
        return sizes
    for process in processes:
        try:
            title = " ".join(process.cmdline())
            size = process.memory_full_info().uss
        except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
            continue
        if process.pid == job.pid:
            kind = "driver"
        elif "Upscaler" in title:
            kind = "workers"
        elif "Finisher" in title:
            kind = "finish"
        else:
            kind = "ray"
        sizes[kind] += size
    return sizes


if __name__ == "__main__":
    main(tyro.cli(Benchmark, description=__doc__))
