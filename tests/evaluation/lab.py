"""Tiny networks with the notes of a training, as the evaluation finds them."""

from typing import Any

import torch

from carn.models import build_model
from carn.models.carn import CarnConfig
from carn.models.checkpoint import write_checkpoint
from carn.training.recipes import recipe, with_values


def write_run(
    uri: str, *, seed: int = 1, scale: int = 2, digest: str = "d1", **settings: Any
) -> str:
    """A trained-looking checkpoint of a tiny CARN; returns its URI."""
    torch.manual_seed(seed)
    values = {"num_blocks": 1, "channels": 8, "reduction": 4, "seed": seed, **settings}
    config = with_values(recipe("paper", model="carn", scale=scale), values)
    network = CarnConfig(num_blocks=1, channels=8, reduction=4)
    write_checkpoint(
        uri,
        model=build_model("carn", scale=scale, config=network),
        model_name="carn",
        training=config.to_dict(),
        step=7,
        dataset={"uri": "/somewhere", "digest": digest},
        metrics={},
    )
    return uri
