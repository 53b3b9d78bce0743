"""A small CARN that has learnt: its weights lie beside this file.

`python -m tests.upscaling.trained` makes them again, in a minute or two.
"""

from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from torch import nn

from carn.degradation.bicubic import degrade
from carn.models import build_model
from carn.models.carn import CarnConfig
from carn.slides.slide import Rgb
from tests.upscaling.networks import batch_of, tissue

WEIGHTS = Path(__file__).with_suffix(".safetensors")
CONFIG = CarnConfig(num_blocks=2, channels=16, reduction=4)
NUM_STEPS, BATCH, PATCH_PX = 300, 8, 24


def trained_carn() -> nn.Module:
    """CARN x2 in evaluation mode."""
    model = build_model("carn", scale=2, config=CONFIG)
    model.load_state_dict(safetensors.torch.load_file(WEIGHTS))
    return model.eval()


def unseen_tissue() -> Rgb:
    """(512, 256, 3): the half of the tissue that it was not trained on."""
    return tissue()[:, 256:]


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    model = build_model("carn", scale=2, config=CONFIG)
    hr = tissue()[:, :256]
    lr = degrade(hr, scale=2)
    optimizer = torch.optim.Adam(model.parameters())
    for step in range(NUM_STEPS):
        optimizer.param_groups[0]["lr"] = 3e-3 * (1 - step / NUM_STEPS)
        ys, xs = (rng.integers(0, side - PATCH_PX, BATCH) for side in lr.shape[:2])
        low, high = (
            batch_of(
                *(
                    image[y * by : (y + PATCH_PX) * by, x * by : (x + PATCH_PX) * by]
                    for x, y in zip(xs, ys, strict=True)
                )
            )
            for image, by in ((lr, 1), (hr, 2))
        )
        loss = (model(low) - high).abs().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    safetensors.torch.save_file(model.state_dict(), WEIGHTS)


if __name__ == "__main__":
    main()
