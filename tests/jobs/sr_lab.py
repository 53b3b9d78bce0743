"""A small lab for the tests of the nightly job: drawn slides, a tiny network, the job over them."""

import json
from pathlib import Path
from typing import Any

import torch

from carn.models import build_model
from carn.models.carn import CarnConfig
from carn.models.checkpoint import write_checkpoint
from carn.slides.slide_output import SlideFormat
from carn.upscaling.engine import EngineConfig
from jobs.sr_config import ClusterConfig, RunConfig, SuperResolveJob
from tests.jobs.lab import draw_slide

TILE_PX = 64
BLOCK_PX = 256


def write_model(uri: str, *, scale: int = 2, seed: int = 0) -> str:
    """A tiny CARN whose gates depend on what it pools, as a checkpoint."""
    torch.manual_seed(seed)
    config = CarnConfig(num_blocks=1, channels=8, reduction=4)
    model = build_model("carn", scale=scale, config=config)
    write_checkpoint(
        uri, model=model, model_name="carn", training=None, step=0, dataset=None, metrics={}
    )
    return uri


def draw_inbox(folder: Path, *, num_slides: int = 2, width: int = 300, height: int = 220) -> Path:
    """Slides Case_1.tif, Case_2.tif, ... of a few blocks each."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(1, num_slides + 1):
        draw_slide(folder / f"Case_{number}.tif", number, width=width, height=height)
    return folder


def make_sr_job(lab: Path, output: Path | str, **changes: Any) -> SuperResolveJob:
    """The job over `lab`/inbox with `lab`/model; `run` and `cluster` are merged into the lab's."""
    run = {"block_px": BLOCK_PX, "progress_s": 0.5} | changes.pop("run", {})
    cluster = {"cpus_per_actor": 1.0, "max_actors": 1} | changes.pop("cluster", {})
    fields: dict[str, Any] = {
        "slides": (str(lab / "inbox"),),
        "checkpoint": str(lab / "model"),
        "output": str(output),
        "format": SlideFormat(tile_px=TILE_PX),
        "engine": EngineConfig(device="cpu", num_threads=1),
        "run": RunConfig(**run),
        "cluster": ClusterConfig(**cluster),
    }
    return SuperResolveJob(**(fields | changes))


def last_summary(output: Path) -> dict[str, Any]:
    """What the newest run below an output said."""
    newest = max((output / "runs").iterdir())
    content: dict[str, Any] = json.loads((newest / "summary.json").read_text())
    return content
