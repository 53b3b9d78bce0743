"""Tiny networks with the notes of a training, as the evaluation finds them."""

from typing import Any

import torch

from carn.models import build_model
from carn.models.carn import CarnConfig
from carn.models.checkpoint import Checkpoint, write_checkpoint, write_pointer
from carn.training.config import resolve
from carn.training.recipes import recipe, with_values


def write_run(
    uri: str, *, seed: int = 1, scale: int = 2, digest: str = "d1", step: int = 7, **settings: Any
) -> str:
    """A trained-looking checkpoint of a tiny CARN after 7 of 7 updates; returns its URI."""
    torch.manual_seed(seed)
    size = {"num_blocks": 1, "channels": 8, "reduction": 4}
    values = {**size, "seed": seed, "steps": 7, **settings}
    config = with_values(recipe("paper", model="carn", scale=scale), values)
    network = CarnConfig(num_blocks=1, channels=8, reduction=4)
    write_checkpoint(
        uri,
        model=build_model("carn", scale=scale, config=network),
        model_name="carn",
        training=config.to_dict(),
        step=step,
        dataset={"uri": "/somewhere", "digest": digest},
        metrics={"psnr": 30.0 + seed},
    )
    return uri


def write_run_folder(uri: str, *, best: int, last: int, **changes: Any) -> str:
    """A run with a best and a last checkpoint, after so many updates; returns its URI."""
    for name, step in (("best", best), ("last", last)):
        write_run(f"{uri}/checkpoints/step-{step:08d}", step=step, **changes)
        write_pointer(uri, name=name, checkpoint=f"checkpoints/step-{step:08d}")  # type: ignore[arg-type]
    return uri


def checkpoint_of(model: str, config: dict[str, object], **values: object) -> Checkpoint:
    """What a training run of the paper's recipe leaves, but for the weights."""
    training = resolve(with_values(recipe("paper", model=model, scale=2), values)).to_dict()  # type: ignore[arg-type]
    return Checkpoint(
        uri="/c",
        model_name=model,
        model_config=config,
        scale=2,
        training=training,
        step=7,
        dataset=None,
        metrics={},
        code_version=None,
        weights_sha256="0",
        files={},
        format_version=1,
    )
