"""What the bcSR job costs beyond its work, and against the same job written the usual way.

Slides are copies of one 4096-px slide of real tissue (512-px JPEG tiles, Q80); tiles of 1024 px at
random places, as coordinate lists have them. CPU seconds are those of the driver and of all of
Ray's processes together, after a small run has started Ray and its workers.

Cases:
  job     `jobs/build_bcsr.py`: measure, rank, write shards, tables, report and manifest
  loop    one process, no Ray: read, filter and rank the same tiles, write the same shards
  ranked  the job's first half: measured and ranked, no tile written; `ranked loop` without Ray
  usual   Ray Data as tutorials have it: an actor reads with OpenSlide, pixels go through the object
          store, a numpy function filters, small rows come back and are ranked

What is predicted, and why:
  job_over_loop <= 1.5      the tasks do what the loop does; Ray adds some ms to each block of up to
                            32 tiles, and the job adds the report's pictures
  cpu_usual_over_ours >= 3  OpenSlide composites what libjpeg-turbo only decodes, 3 MB a tile are
                            written to and read from the object store, and numpy converts to float
  memory_100_over_10_slides <= 1.2   a worker holds one block's rows, one tile's pixels, a few open
                            slides and a bounded cache; none of it grows with the number of slides

Examples:
  python benchmarks/build_bcsr.py
  python benchmarks/build_bcsr.py --full
"""

import json
import logging
import os
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# `python benchmarks/build_bcsr.py` puts benchmarks/ on the path, not the folder that holds carn/.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("RAY_AUTH_MODE", "disabled")  # a loopback cluster of this process alone

import numpy as np
import openslide
import psutil
import pyarrow as pa
import ray
import ray.data
import tyro

from benchmarks.read_tiles import make_bench_slide
from carn.bcsr import build
from carn.bcsr.config import DrawConfig, SelectConfig
from carn.bcsr.schema import MEASURED
from carn.bcsr.selection import rank_tiles
from carn.bcsr.shards import plan_shards, write_shard
from carn.bcsr.stages import measure_unit
from jobs import build_bcsr as job_module
from jobs.build_bcsr import BuildJob, RunConfig
from jobs.ray_stage import StageRunner, start_ray

TILE_PX = 1024
SIDE_PX = 4096
SEED = 7


@dataclass(frozen=True, kw_only=True)
class BenchBuild:
    """What is measured."""

    full: bool = False
    """The paper's 2,000 tiles instead of 360, and 1,000 slides as well for the memory."""


@dataclass(frozen=True, kw_only=True)
class Lab:
    """Slides and a coordinate list below a folder."""

    root: Path
    num_tiles: int

    def job(self, output: Path, **changes: Any) -> BuildJob:
        """The job over all of the list, keeping 60 % as the paper does."""
        fields = {
            "slides": (str(self.root / "slides"),),
            "coordinates": (str(self.root / "points.csv"),),
            "csv_anchor": "corner",
            "output": str(output),
            "draw": DrawConfig(per_class=None),
            "select": SelectConfig(
                keep=self.num_tiles * 6 // 10,
                num_test=self.num_tiles // 10,
                num_validation=self.num_tiles // 20,
            ),
            "run": RunConfig(progress_s=3600),
        }
        return BuildJob(**(fields | changes))


def make_lab(root: Path, original: Path, *, num_slides: int, tiles_per_slide: int) -> Lab:
    """Copies of a slide (links: one page cache) and random corners on each."""
    (root / "slides").mkdir(parents=True)
    rng = np.random.default_rng(SEED)
    lines = ["slide,x,y,label"]
    for number in range(num_slides):
        name = f"Bench_{number:04d}"
        (root / "slides" / f"{name}.tif").symlink_to(original)
        corners = rng.integers(0, SIDE_PX - TILE_PX, size=(tiles_per_slide, 2))
        lines += [f"{name},{x},{y},tumor" for x, y in corners]
    (root / "points.csv").write_text("\n".join(lines) + "\n")
    return Lab(root=root, num_tiles=num_slides * tiles_per_slide)


# ---------------------------------------------------------------------------------------- cases


def run_job(lab: Lab, output: Path, runner: StageRunner) -> None:
    job = lab.job(output)
    job_module.build_dataset(job, job_module.find_source(job), str(output), runner)


def measure_units(lab: Lab, output: Path) -> list[dict[str, Any]]:
    job = lab.job(output)
    drawn = job_module._draw(job, job_module.find_source(job).positions)
    return list(job_module._measure_units(job, drawn, str(output)))


def no_guard(_: str) -> AbstractContextManager[None]:
    """One process has nobody to count its deaths."""
    return nullcontext()


def run_ranked_loop(lab: Lab, output: Path, _: StageRunner) -> pa.Table:
    job = lab.job(output)
    tables = [measure_unit(unit, no_guard) for unit in measure_units(lab, output)]
    return build.select_tiles(
        pa.concat_tables(tables), white=job.filter, select=job.select, seed=job.seed
    )


def run_loop(lab: Lab, output: Path, runner: StageRunner) -> None:
    selected = run_ranked_loop(lab, output, runner)
    for plan in plan_shards(selected, encoding="jxl", tiles_per_shard=64):
        write_shard(str(output), plan, attempt=no_guard)


def run_ranked(lab: Lab, output: Path, runner: StageRunner) -> None:
    job = lab.job(output)
    tables = list(runner.run("measuring", measure_unit, measure_units(lab, output)))
    measured = pa.concat_tables([MEASURED.empty_table(), *tables])
    build.select_tiles(measured, white=job.filter, select=job.select, seed=job.seed)


class OpenSlideReader:
    """The usual read stage: a handle per slide, pixels out."""

    def __init__(self) -> None:
        self._slides: dict[str, openslide.OpenSlide] = {}

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        tiles = []
        for uri, x, y in zip(batch["uri"], batch["x"], batch["y"], strict=True):
            slide = self._slides.setdefault(uri, openslide.OpenSlide(uri))
            region = slide.read_region((int(x), int(y)), 0, (TILE_PX, TILE_PX))
            tiles.append(np.asarray(region.convert("RGB")))
        return {**batch, "tile": np.stack(tiles)}


def numpy_filter(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The usual filter stage: pixels in, numbers out."""
    grey = batch["tile"] @ np.array([0.299, 0.587, 0.114])
    return {
        "uri": batch["uri"],
        "white": (grey > 224).mean(axis=(1, 2)),
        "mean": batch["tile"].mean(axis=(1, 2)),
    }


def run_usual(lab: Lab, output: Path, _: StageRunner) -> None:
    rows = [
        {"uri": unit["uri"], "x": x, "y": y}
        for unit in measure_units(lab, output)
        for x, y, *_ in unit["places"]
    ]
    dataset = (
        ray.data.from_items(rows, override_num_blocks=max(1, len(rows) // 12))
        .map_batches(
            OpenSlideReader, compute=ray.data.ActorPoolStrategy(size=1), batch_size=12, num_cpus=1
        )
        .map_batches(numpy_filter, batch_size=12)
    )
    kept = [row for row in dataset.iter_rows() if row["white"] <= 0.6]
    rank_tiles(np.stack([row["mean"] for row in kept]))


CASES: dict[str, Callable[[Lab, Path, StageRunner], Any]] = {
    "job": run_job,
    "loop": run_loop,
    "ranked": run_ranked,
    "ranked loop": run_ranked_loop,
    "usual": run_usual,
}


# ------------------------------------------------------------------------------------- measuring


class Processes(threading.Thread):
    """Watches this process and all below it: CPU time, also of those that end, and memory peaks."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self._cpu: dict[tuple[int, float], float] = {}
        self._peaks: dict[tuple[int, float], int] = {}
        self._lock = threading.Lock()

    def run(self) -> None:
        while True:
            self.look()
            time.sleep(0.2)

    def look(self) -> None:
        for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
            try:
                key = process.pid, process.create_time()
                cpu = process.cpu_times()
                is_worker = any(part.startswith("ray::") for part in process.cmdline()[:1])
                status = Path(f"/proc/{process.pid}/status").read_text()
            except (psutil.Error, OSError):
                continue
            with self._lock:
                self._cpu[key] = cpu.user + cpu.system
                peak = [line for line in status.splitlines() if line.startswith("VmHWM")]
                if is_worker and peak:
                    self._peaks[key] = int(peak[0].split()[1]) * 1024

    def cpu_seconds(self) -> float:
        """CPU time used so far, by the living and by the ended."""
        self.look()
        with self._lock:
            return sum(self._cpu.values())

    def worker_peak_bytes(self) -> int:
        """The largest peak of resident memory of a Ray worker so far, by the kernel's count."""
        self.look()
        with self._lock:
            return max(self._peaks.values(), default=0)


def main(bench: BenchBuild) -> None:
    logging.disable(logging.WARNING)
    processes = Processes()
    processes.start()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        original = root / "original.tif"
        make_bench_slide(original, side_px=SIDE_PX)
        start_ray()
        runner = StageRunner()

        # Memory first, with fresh workers and more and more slides, each with the same few tiles.
        # This also starts the processes that the cases below find running.
        peaks = {}
        for num_slides in (10, 100, 1000) if bench.full else (10, 100):
            name = f"memory_{num_slides}"
            many = make_lab(root / name, original, num_slides=num_slides, tiles_per_slide=2)
            run_ranked(many, root / f"{name}_out", runner)
            peaks[num_slides] = processes.worker_peak_bytes()

        # The job once, small: what it imports is start-up as well.
        run_job(
            make_lab(root / "s", original, num_slides=6, tiles_per_slide=2), root / "s_out", runner
        )

        num_slides = 100 if bench.full else 18
        lab = make_lab(root / "lab", original, num_slides=num_slides, tiles_per_slide=20)
        # The usual way is too slow for all of them. Its actor starts anew with every run, so its
        # cost a tile is that of the tiles between a small run and a larger one.
        few = make_lab(root / "few", original, num_slides=3, tiles_per_slide=20)
        fewer = make_lab(root / "fewer", original, num_slides=1, tiles_per_slide=20)
        cost = {}
        for name, case in CASES.items():
            runs = (few, fewer) if case is run_usual else (lab,)
            cpu, wall = [], []
            for tiles in runs:
                before, start = processes.cpu_seconds(), time.monotonic()
                case(tiles, root / "out", runner)
                cpu.append(processes.cpu_seconds() - before)
                wall.append(time.monotonic() - start)
                shutil.rmtree(root / "out", ignore_errors=True)
            num_tiles = runs[0].num_tiles - sum(run.num_tiles for run in runs[1:])
            cost[name] = (cpu[0] - sum(cpu[1:])) / num_tiles * 1e3, sum(wall), num_tiles

    print(f"{'case':12}{'tiles':>7}{'CPU ms a tile':>16}{'wall s':>9}")
    for name, (cpu_ms, wall, num_tiles) in cost.items():
        print(f"{name:12}{num_tiles:7}{cpu_ms:16.1f}{wall:9.1f}")
    for num_slides, peak in peaks.items():
        print(f"peak of a worker, {num_slides} slides: {peak / 1e6:.0f} MB")
    figures = {
        "job_over_loop": cost["job"][0] / cost["loop"][0],
        "ranked_over_loop": cost["ranked"][0] / cost["ranked loop"][0],
        "cpu_usual_over_ours": cost["usual"][0] / cost["ranked"][0],
        "memory_100_over_10_slides": peaks[100] / peaks[10],
        "cpu_ms_a_tile": {name: round(cpu_ms, 2) for name, (cpu_ms, *_) in cost.items()},
        "num_tiles": lab.num_tiles,
    }
    print(json.dumps({k: round(v, 3) if isinstance(v, float) else v for k, v in figures.items()}))


if __name__ == "__main__":
    main(tyro.cli(BenchBuild, description=__doc__))
