"""A night of very many slides: does anything grow, and does a killed run go on quickly.

The nightly job super-resolves very many small slides with a tiny network, so that what is done
once a slide (claims, looking at it, finishing, notes) is done as often as in a large night. When
half are done, all of its processes are killed, and the same command goes on.

Sampled every two seconds: the driver, the actors that make blocks, those that finish slides, each
with unique memory (USS, MB), open files and sockets, and threads; and the files of the output's
work folder and of the temporary folder. `growth` is the mean of the last fifth of a run's samples
less that of the middle fifth (before it caches and allocators fill), per thousand slides.

What is predicted, and why:
  resume_over_start <= 1.5   what is done is told by two listings; nothing of it is opened
  growth of the driver       a summary, a line of JSON and some numbers a slide: 5 KB each, 5 MB;
                             and what Ray's own threads gather in every process
  growth of the others       none: they keep nothing of a slide
  handles, threads           none
  left behind                no work folder, no temporary file

Prints a line of JSON for each run and one of the ratio.

Examples:
  python benchmarks/night_load.py
  python benchmarks/night_load.py --num-slides 1000
"""

import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

# `python benchmarks/night_load.py` puts benchmarks/ on the path, not the folder above it.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import psutil
import tyro

ROOT = Path(__file__).resolve().parents[1]
SAMPLE_S = 2.0
# Different slides; the others are copies of them under other names.
NUM_DRAWN = 10


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """How many slides there are."""

    num_slides: int = 100
    """Slides of the inbox; 1000 for what a long night would show."""
    side_px: int = 300
    """Their width and height."""


@dataclass
class Samples:
    """What was seen of one run, by kind of process."""

    slides: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    by_kind: dict[str, dict[str, list[float]]] = field(
        default_factory=lambda: defaultdict(lambda: defaultdict(list))
    )


def main(benchmark: Benchmark) -> None:
    """Measure, and print."""
    os.environ["RAY_AUTH_MODE"] = "disabled"
    with tempfile.TemporaryDirectory() as folder:
        lab = Path(folder)
        draw(lab, benchmark)
        (lab / "tmp").mkdir()
        half = benchmark.num_slides // 2
        first = run(lab, benchmark, until=half)
        print(json.dumps({"run": "from the beginning, killed", **first}), flush=True)
        second = run(lab, benchmark, until=None)
        print(json.dumps({"run": "gone on", **second}), flush=True)
        num_done = count_done(lab)
        left = [path.name for path in (lab / "tmp").iterdir() if not path.name.startswith("ray")]
        work = sum(path.is_file() for path in (lab / "sr" / "_work").rglob("*"))
    print(
        json.dumps(
            {
                "benchmark": "night_load",
                "slides": num_done,
                "work_files_left": work,
                "temporary_files_left": left,
                "slides_per_s": second["slides_per_s"],
                "resume_over_start": round(second["first_slide_s"] / first["first_slide_s"], 2),
            }
        )
    )


def draw(lab: Path, benchmark: Benchmark) -> None:
    """The inbox and the network."""
    import torch
    from skimage import data

    from carn.models import build_model
    from carn.models.carn import CarnConfig
    from carn.models.checkpoint import write_checkpoint
    from carn.slides.pyramid import write_pyramid

    tissue = data.immunohistochemistry()
    (lab / "in").mkdir()
    drawn = []
    for number in range(NUM_DRAWN):
        pixels = np.roll(tissue, number * 37, axis=1)[: benchmark.side_px, : benchmark.side_px]
        drawn.append(lab / f"{number}.tif")
        write_pyramid(drawn[-1], np.ascontiguousarray(pixels), mpp_um=0.5, tile_px=256)
    for number in range(benchmark.num_slides):
        shutil.copy(drawn[number % NUM_DRAWN], lab / "in" / f"Case_{number:05d}.tif")
    torch.manual_seed(0)
    write_checkpoint(
        str(lab / "model"),
        model=build_model(
            "carn", scale=2, config=CarnConfig(num_blocks=1, channels=8, reduction=4)
        ),
        model_name="carn",
        training=None,
        step=0,
        dataset=None,
        metrics={},
    )


def count_done(lab: Path) -> int:
    """Slides that are committed."""
    return len(list((lab / "sr").glob("*.tif")))


def run(lab: Path, benchmark: Benchmark, *, until: int | None) -> dict[str, object]:
    """What was seen of the job; killed with all of its processes at so many slides."""
    command = [
        *(sys.executable, str(ROOT / "jobs" / "super_resolve.py"), "--slides", str(lab / "in")),
        *("--checkpoint", str(lab / "model"), "--output", str(lab / "sr"), "--num-pictures", "4"),
    ]
    before, started = count_done(lab), time.monotonic()
    first_s, samples = None, Samples()
    with (lab / "log").open("wb") as log:
        job = psutil.Popen(
            command,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=os.environ | {"TMPDIR": str(lab / "tmp"), "RAY_TMPDIR": tempfile.gettempdir()},
        )
    while job.poll() is None:
        num_done = count_done(lab)
        now = time.monotonic() - started
        if first_s is None and num_done > before:
            first_s = now
        if until is not None and num_done >= until:
            kill(job)
            break
        if num_done == benchmark.num_slides:
            break  # the report is written now, which is not a night's growth
        if first_s is None:
            time.sleep(0.1)
            continue
        sample(samples, job, lab, num_done=num_done - before, seconds=now)
        time.sleep(SAMPLE_S)
    if until is None and job.wait():
        raise SystemExit((lab / "log").read_text()[-4000:])
    assert first_s is not None
    spans = np.diff(samples.slides)[len(samples.slides) // 5 :]
    times = np.diff(samples.seconds)[len(samples.slides) // 5 :]
    return {
        "slides": count_done(lab) - before,
        "first_slide_s": round(first_s, 1),
        "slides_per_s": round(float(spans.sum() / times.sum()), 2),
        "growth_per_1000": growth(samples),
        "last": {
            kind: {name: rows[-1] for name, rows in of.items()}
            for kind, of in samples.by_kind.items()
        },
    }


def kill(job: psutil.Popen) -> None:
    """SIGKILL to all of a job's processes, the driver first."""
    processes = [job, *job.children(recursive=True)]
    for process in processes:
        try:
            process.send_signal(signal.SIGKILL)
        except psutil.NoSuchProcess:
            continue
    job.wait()


def sample(
    samples: Samples, job: psutil.Popen, lab: Path, *, num_done: int, seconds: float
) -> None:
    """Look at the job's processes once."""
    found: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    try:
        processes = [job, *job.children(recursive=True)]
    except psutil.NoSuchProcess:
        return
    for process in processes:
        try:
            title = " ".join(process.cmdline())
            kind = kind_of(process, title, job)
            with process.oneshot():
                numbers = {
                    "uss_mb": process.memory_full_info().uss / 1e6,
                    "handles": process.num_fds(),
                    "threads": process.num_threads(),
                    "processes": 1,
                }
        except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
            continue
        for name, number in numbers.items():
            found[kind][name] += number
    found["files"]["temporary"] = sum(path.is_file() for path in (lab / "tmp").rglob("*"))
    found["files"]["work"] = sum(path.is_file() for path in (lab / "sr" / "_work").rglob("*"))
    samples.slides.append(num_done)
    samples.seconds.append(seconds)
    for kind, of in found.items():
        for name, number in of.items():
            samples.by_kind[kind][name].append(round(number, 1))


def kind_of(process: psutil.Process, title: str, job: psutil.Popen) -> str:
    """What a process is there for."""
    if process.pid == job.pid:
        return "driver"
    for name, kind in (("Upscaler", "actors"), ("Finisher", "finishers"), ("Board", "board")):
        if name in title:
            return kind
    return "workers" if "ray::" in title else "daemons"


def growth(samples: Samples) -> dict[str, dict[str, float]]:
    """How much each number grew, per thousand slides."""
    grown: dict[str, dict[str, float]] = {}
    for kind, of in samples.by_kind.items():
        for name, rows in of.items():
            fifth = len(rows) // 5
            if fifth < 2 or len(rows) != len(samples.slides):
                continue  # not there all the time
            spans = slice(2 * fifth, 3 * fifth), slice(-fifth, None)
            early, late = (statistics.mean(rows[span]) for span in spans)
            slides = [statistics.mean(samples.slides[span]) for span in spans]
            grown.setdefault(kind, {})[name] = round(
                (late - early) / (slides[1] - slides[0]) * 1000, 1
            )
    return grown


if __name__ == "__main__":
    main(tyro.cli(Benchmark, description=__doc__))
