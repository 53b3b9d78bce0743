"""Networks that have learnt, on tissue: blocks fit together, and fast engines stay near float32."""

import copy
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from carn.degradation.bicubic import degrade
from carn.metrics import psnr
from carn.models.bicubic import Bicubic, BicubicConfig
from carn.models.carn import ChannelAttentionRetention
from carn.slides.slide import Rgb
from carn.upscaling.accuracy import DEFAULT_DB, MAX_HR_CHANGE_DB, compare
from carn.upscaling.blocks import block_region, num_blocks, read_block, upscale_block
from carn.upscaling.calibration import calibrate
from carn.upscaling.engine import Engine, EngineConfig, make_engine, reference_engine
from carn.upscaling.pooling import frozen, pool_over
from tests.upscaling.lab import view_of, whole
from tests.upscaling.networks import batch_of, window_of
from tests.upscaling.trained import trained_carn, unseen_tissue

# How much farther from their mean gates are moved.
ATTENTION = 40


def attentive(model: nn.Module, lr: Rgb) -> nn.Module:
    """The network with gates that vary with what they are shown, as long training makes them.

    Over all of `lr` they are what they were.
    """
    model = copy.deepcopy(model)
    widening = [m.gate[-2] for m in model.modules() if isinstance(m, ChannelAttentionRetention)]
    squeezed: dict[nn.Module, torch.Tensor] = {}

    def keep(layer: nn.Module, args: tuple[torch.Tensor]) -> None:
        squeezed[layer] = args[0][0, :, 0, 0]

    with torch.no_grad():
        for layer in widening:  # in the order of the network: each sees the gates before it
            handle = layer.register_forward_pre_hook(keep)
            model(batch_of(lr))
            handle.remove()
            layer.bias -= (ATTENTION - 1) * layer.weight[:, :, 0, 0] @ squeezed[layer]
            layer.weight *= ATTENTION
    return model


def in_blocks(lr: Rgb, engine: Engine, *, block_px: int) -> Rgb:
    """SR by the job's own steps."""
    view, scale = view_of(lr), engine.scale
    extent = (lr.shape[1] * scale, lr.shape[0] * scale)
    sr = np.zeros((extent[1], extent[0], 3), dtype=np.uint8)
    for index in range(math.prod(num_blocks(extent, block_px=block_px))):
        region = block_region(
            extent, block_px=block_px, index=index, scale=scale, halo_px=engine.halo_px
        )
        made = upscale_block(read_block(view, region), engine)
        sr[region.y0 : region.y1, region.x0 : region.x1] = made.pixels
    return sr


def largest_step(one: Rgb, other: Rgb) -> int:
    assert one.shape == other.shape
    return int(np.abs(one.astype(int) - other).max())


def test_the_network_has_learnt() -> None:
    hr = unseen_tissue()
    lr = batch_of(degrade(hr, scale=2))
    bicubic = Bicubic(BicubicConfig(), scale=2)
    with torch.inference_mode():
        ours, theirs = (
            float(psnr((model(lr).clamp(0, 1) * 255).round().byte(), (batch_of(hr) * 255).byte()))
            for model in (trained_carn(), bicubic)
        )
    assert ours > theirs + 0.5


def test_tissue_in_blocks_is_one_pass_over_the_whole() -> None:
    lr = np.ascontiguousarray(unseen_tissue()[40:361])  # 256 x 321 px
    model = attentive(trained_carn(), lr)
    engine = make_engine(model, EngineConfig(device="cpu", precision="fp32"))
    pooling = calibrate(view_of(lr), model, engine, num_probes=0).pooling
    assert pooling is not None
    expected = whole(frozen(model, pooling), lr, halo_px=engine.halo_px)
    for block_px in (128, 200, 333, 512):
        assert largest_step(in_blocks(lr, engine, block_px=block_px), expected) <= 1, block_px
    # The gates do depend on what they are shown: without one pooling for all, blocks disagree.
    engine.set_pooling(None)
    assert largest_step(in_blocks(lr, engine, block_px=128), expected) > 2


def test_tissue_in_blocks_of_the_fast_engine_fits_together() -> None:
    lr = np.ascontiguousarray(unseen_tissue()[40:201, :128])
    model = attentive(trained_carn(), lr)
    engine = make_engine(model, EngineConfig(device="cpu", precision="bf16"))
    calibrate(view_of(lr), model, engine, num_probes=0)
    expected = in_blocks(lr, engine, block_px=1024)
    assert largest_step(in_blocks(lr, engine, block_px=200), expected) <= 1


def compared(config: EngineConfig) -> Any:
    """An engine beside the reference, on tissue that the network was not trained on."""
    model = trained_carn()
    engine, reference = make_engine(model, config), reference_engine(model)
    halo_px = engine.halo_px
    hrs = [unseen_tissue()[top : top + 192, :192] for top in (0, 192)]
    windows = [window_of(degrade(hr, scale=2), 0, 0, 96, 96, halo_px=halo_px) for hr in hrs]
    pooling = pool_over(model, windows, halo_px=halo_px)
    engine.set_pooling(pooling)
    reference.set_pooling(pooling)
    return compare(engine, reference, windows, hr=hrs)


@pytest.mark.parametrize("precision", ["auto", "bf16"])
def test_default_engines_keep_what_is_stated(precision: Any) -> None:
    found = compared(EngineConfig(device="cpu", precision=precision))
    assert found.psnr_db >= DEFAULT_DB
    assert abs(found.hr_change_db) <= MAX_HR_CHANGE_DB
    assert found.max_difference <= 2


COMPILED = """
import json, sys
from carn.upscaling.engine import EngineConfig
from tests.upscaling.test_real_tissue import compared
found = compared(EngineConfig(device="cpu", precision=sys.argv[1], compile=True))
print(json.dumps([found.psnr_db, found.hr_change_db, found.max_difference]))
"""


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="compiling needs g++")
@pytest.mark.parametrize(("precision", "least_db"), [("fp32", 110.0), ("bf16", DEFAULT_DB)])
def test_compiled_engines_keep_what_is_stated(precision: str, least_db: float) -> None:
    # In a process of its own: what checks the shapes of tensors here cannot be compiled.
    done = subprocess.run(
        [sys.executable, "-c", COMPILED, precision],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    psnr_db, hr_change_db, max_difference = json.loads(done.stdout)
    assert psnr_db >= least_db
    assert abs(hr_change_db) <= MAX_HR_CHANGE_DB
    assert max_difference <= 2
