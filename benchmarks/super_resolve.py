"""What the nightly job costs beyond its arithmetic: slides end to end against the bare engine.

CARN x2 in the paper's configuration on a slide of tissue, blocks of 1024 LR px, all of it inferred,
on the CPUs of this machine. Sides, each in a process of its own, in turns:
  engine   the blocks' LR pixels are in memory; `Engine.upscale_many` over the job's own windows,
           results thrown away: the floor
  job      `jobs/super_resolve.py`: slide from S3 by byte range, infer, encode JPEG on all levels,
           measure consistency, upload parts, finish the pyramid, commit. The S3 server is moto's,
           over HTTP, on the same cores

What is predicted, and why:
  job_over_engine >= 0.9        LR px a second from the first block's beginning to the commit, by
                                the engine's. A block of 1 Mpx is 3 s of arithmetic; reading it
                                takes 10 ms, its 6 Mpx of pyramid 20 ms, consistency 25 ms, a part
                                20 ms, and the commit of the slide some 0.5 s
  job_over_engine_all           the same from the start of the actors: processes that import torch,
                                and the slide's calibration, are some 30 s whatever the slide's size

Prints a table and one line of JSON.

Examples:
  python benchmarks/super_resolve.py
  python benchmarks/super_resolve.py --rounds 3 --threads 2
"""

import json
import logging
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

# `python benchmarks/super_resolve.py` puts benchmarks/ on the path, not the folder above it.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import boto3
import torch
import tyro

BLOCK_PX = 2048
SCALE = 2


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """How much to measure."""

    rounds: int = 2
    """Times that both sides are run."""
    threads: int = os.cpu_count() or 1
    """Threads of the engine, and CPUs of the job's one actor."""
    columns: int = 6
    """Blocks of the slide, across."""
    rows: int = 2
    """Blocks of the slide, down."""


def main(benchmark: Benchmark) -> None:
    """Measure, and print."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as folder:
        lab = Path(folder)
        make_lab(lab, benchmark)
        server = subprocess.Popen(
            [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", "5979"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            os.environ |= {
                "AWS_ENDPOINT_URL": "http://127.0.0.1:5979",
                "AWS_ACCESS_KEY_ID": "testing",
                "AWS_SECRET_ACCESS_KEY": "testing",
                "AWS_DEFAULT_REGION": "us-east-1",
                "RAY_AUTH_MODE": "disabled",
            }
            _fill_bucket(lab)
            rounds = []
            for number in range(benchmark.rounds):
                engine = _alone(run_engine, lab, benchmark)
                job = _alone(run_job, lab, benchmark, number)
                rounds.append({"engine": engine["mpx_per_s"], **job})
                print(json.dumps(rounds[-1]), flush=True)
        finally:
            server.terminate()
            server.wait()
    result = {
        "benchmark": "super_resolve",
        "threads": benchmark.threads,
        "engine_lr_mpx_per_s": round(statistics.median(r["engine"] for r in rounds), 4),
        "job_lr_mpx_per_s": round(statistics.median(r["steady"] for r in rounds), 4),
        "job_over_engine": round(statistics.median(r["steady"] / r["engine"] for r in rounds), 3),
        "job_over_engine_all": round(statistics.median(r["all"] / r["engine"] for r in rounds), 3),
        "busy_share": round(statistics.median(r["busy_share"] for r in rounds), 3),
        "upload_s_per_mpx": round(statistics.median(r["upload_s_per_mpx"] for r in rounds), 3),
        "finish_s": round(statistics.median(r["finish_s"] for r in rounds), 2),
    }
    print(json.dumps(result))


def make_lab(lab: Path, benchmark: Benchmark) -> None:
    """A slide of tissue of whole blocks, and a network with fresh weights."""
    import numpy as np
    from skimage import data

    from carn.models import build_model
    from carn.models.checkpoint import write_checkpoint
    from carn.slides.pyramid import write_pyramid

    image = data.immunohistochemistry()
    side = BLOCK_PX // SCALE
    width, height = benchmark.columns * side, benchmark.rows * side
    mirrored = np.concatenate([image, image[:, ::-1]], axis=1)
    mirrored = np.concatenate([mirrored, mirrored[::-1]])
    repeats = (-(-height // mirrored.shape[0]), -(-width // mirrored.shape[1]), 1)
    pixels = np.ascontiguousarray(np.tile(mirrored, repeats)[:height, :width])
    write_pyramid(lab / "slide.tif", pixels, mpp_um=0.5)
    torch.manual_seed(1)
    write_checkpoint(
        str(lab / "carn"),
        model=build_model("carn", scale=SCALE),
        model_name="carn",
        training=None,
        step=None,
        dataset=None,
        metrics={},
    )


def _fill_bucket(lab: Path) -> None:
    client = boto3.client("s3")
    for _ in range(100):
        try:
            client.create_bucket(Bucket="lab")
            break
        except Exception:  # the server is starting
            time.sleep(0.2)
    client.upload_file(str(lab / "slide.tif"), "lab", "in/slide.tif")


def _alone(function: Any, *arguments: Any) -> dict[str, float]:
    """What a function returns, in a process of its own: memory settings are a process's."""
    pool = multiprocessing.get_context("spawn").Pool(1)
    found: dict[str, float] = pool.apply(function, arguments)
    pool.close()  # let it end by itself: Ray has processes to take down
    pool.join()
    return found


def run_engine(lab: Path, benchmark: Benchmark) -> dict[str, float]:
    """LR megapixels a second of the engine on the job's windows."""
    from carn.models.checkpoint import load_model
    from carn.upscaling.blocks import LrBlock, block_region, read_block
    from carn.upscaling.calibration import calibrate
    from carn.upscaling.engine import EngineConfig, make_engine
    from carn.upscaling.lr_view import InputConfig, open_view

    model = load_model(str(lab / "carn"))
    engine = make_engine(model, EngineConfig(num_threads=benchmark.threads, device="cpu"))
    view = open_view(lab / "slide.tif", InputConfig())
    calibrate(view, model, engine)
    extent = (view.extent[0] * SCALE, view.extent[1] * SCALE)
    windows = []
    for index in range(benchmark.columns * benchmark.rows):
        region = block_region(
            extent, block_px=BLOCK_PX, index=index, scale=SCALE, halo_px=engine.halo_px
        )
        block: LrBlock = read_block(view, region)
        # Blocks of 1024 LR px are windows of their own.
        windows.append(block.pixels)
    list(engine.upscale_many(windows[:1]))
    started = time.perf_counter()
    for _ in engine.upscale_many(windows):
        pass
    seconds = time.perf_counter() - started
    return {"mpx_per_s": view.extent[0] * view.extent[1] / 1e6 / seconds}


def run_job(lab: Path, benchmark: Benchmark, number: int) -> dict[str, float]:
    """LR megapixels a second of the job."""
    from carn.upscaling.engine import EngineConfig
    from carn.upscaling.inputs import find_inputs
    from carn.upscaling.task import PixelConfig
    from jobs.sr_config import ClusterConfig, RunConfig, SuperResolveJob
    from jobs.sr_night import Night, check_checkpoint

    job = SuperResolveJob(
        slides=("s3://lab/in",),
        checkpoint=str(lab / "carn"),
        output=f"s3://lab/out{number}",
        pixels=PixelConfig(background="infer"),
        engine=EngineConfig(num_threads=benchmark.threads, device="cpu"),
        run=RunConfig(block_px=BLOCK_PX),
        cluster=ClusterConfig(cpus_per_actor=float(benchmark.threads), max_actors=1),
    )
    checkpoint, halo_px = check_checkpoint(job)
    night = Night(job, checkpoint=checkpoint, halo_px=halo_px, output=job.output)
    night.judge(find_inputs(job.slides))
    night.begin()
    night.work()
    since_start = (datetime.now().astimezone() - night.tally.started).total_seconds()
    assert night.tally.count("done") == 1, night.tally.slides
    assert night.tally.first_began is not None
    num_px = sum(count for _, count in night.tally.made)
    return {
        "steady": num_px / 1e6 / (time.time() - night.tally.first_began),
        "all": num_px / 1e6 / night.tally.working_seconds,
        "busy_share": night.tally.stages["infer_s"] / night.tally.working_seconds,
        "upload_s_per_mpx": night.tally.stages["upload_s"] / num_px * 1e6,
        # From the last block's upload to the commit, and what is tidied up after it.
        "finish_s": since_start - max(made_at for made_at, _ in night.tally.made),
    }


if __name__ == "__main__":
    main(tyro.cli(Benchmark, description=__doc__))
