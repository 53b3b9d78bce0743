"""What a machine without Ray, slide libraries or Arrow can do: networks and training steps."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# What opens slides, draws pictures and runs a cluster; training from a dataset needs none of it.
NOT_FOR_DATASETS = {
    *("ray", "openslide", "tifffile", "simplejpeg", "scipy", "skimage", "shapely", "matplotlib"),
    *("jinja2", "tyro", "onnx", "onnxruntime", "psutil"),
}
# Everything else that a GPU machine with torch alone does not have.
NOT_FOR_STEPS = NOT_FOR_DATASETS | {
    *("imagecodecs", "pyarrow", "boto3", "botocore", "safetensors", "PIL", "tqdm", "tensorboardX"),
}

HOOK = """
import sys
from importlib.machinery import PathFinder

class Bare(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name.split(".")[0] not in {absent!r}:
            return PathFinder.find_spec(name, path, target)

sys.meta_path[:] = [Bare if finder is PathFinder else finder for finder in sys.meta_path]
"""

ONE_STEP = """
import numpy as np
import torch
from carn.models import build_model
from carn.training import engine, loss_log, objectives
from carn.training.config import NetworkConfig, PatchConfig, TrainConfig, learning_rate, resolve
from carn.training.group import WorkerGroup
from carn.training.patches import cut_patches, make_store
from carn.training.players import autocast_for, make_players
from carn.training.samples import Sampler

config = resolve(
    TrainConfig(
        network=NetworkConfig(num_blocks=1, channels=8),
        patches=PatchConfig(batch_size=2, patch_px=16),
    )
)
device, group = engine.choose_device("cpu"), WorkerGroup.current()
tiles = np.random.default_rng(0).integers(0, 256, (3, 32, 40, 3), dtype=np.uint8)
store = make_store(list(tiles), scale=2)
sampler = Sampler(store.extents_px(), scale=2, patch_px=16, batch_size=2, seed=1)
model = build_model("carn", scale=2, config=config.network.model_config((0.5, 0.5, 0.5)))
engine.prepare(model, engine.EngineConfig())
before = [weights.detach().clone() for weights in model.parameters()]
(player,) = make_players(model, config, device=device, group=group)
lr, hr = cut_patches(store, sampler.step(0), patch_px=16)
terms = player.update(
    lr, hr, learning_rate=learning_rate(0, config), weight=1.0, gradient_clip=None,
    autocast=autocast_for("bf16", device)(),
)
log = loss_log.LossLog(batch_size=2, group=group)
log.add({"model": terms})
moved = any(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
print(moved and log.means()["loss"] > 0)
"""


def run(code: str, *, absent: set[str]) -> "subprocess.CompletedProcess[str]":
    """A Python of its own in which some packages cannot be imported."""
    return subprocess.run(
        [sys.executable, "-c", HOOK.format(absent=absent) + code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


ONE_WINDOW = """
import numpy as np
from carn.models import build_model
from carn.models.carn import CarnConfig
from carn.upscaling.engine import EngineConfig, make_engine
from carn.upscaling.pooling import pool_over

config = CarnConfig(num_blocks=1, channels=8, reduction=4)
model = build_model("carn", scale=2, config=config).eval()
engine = make_engine(model, EngineConfig(device="cpu", num_threads=1))
side = 2 * engine.halo_px + 12
window = np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)
engine.set_pooling(pool_over(model, [window], halo_px=engine.halo_px))
print(engine.upscale(window).shape)
"""


def test_super_resolving_a_window_needs_torch_and_numpy() -> None:
    found = run(ONE_WINDOW, absent=NOT_FOR_STEPS)
    assert found.returncode == 0, found.stderr
    assert found.stdout.strip() == "(24, 24, 3)"


def test_a_step_of_training_needs_torch_and_numpy() -> None:
    found = run(ONE_STEP, absent=NOT_FOR_STEPS)
    assert found.returncode == 0, found.stderr
    assert found.stdout.strip() == "True"


def test_the_loop_needs_nothing_that_reads_slides() -> None:
    found = run(
        "import carn.training.loop, carn.training.progress, carn.bcsr.export",
        absent=NOT_FOR_DATASETS,
    )
    assert found.returncode == 0, found.stderr


@pytest.mark.parametrize(
    ("module", "package"),
    [("carn.training.loop", "pyarrow"), ("carn.slides.openslide_reader", "openslide")],
)
def test_what_is_absent_here_is_absent(module: str, package: str) -> None:
    """The other tests would pass with anything, were the packages there after all."""
    found = run(f"import {module}", absent={package})
    assert found.returncode != 0
    assert f"No module named '{package}" in found.stderr


def test_the_benchmark_of_a_gpu_runs_without_one() -> None:
    code = (
        "import runpy\nsys.argv = ['gpu_train_step.py', '--cpu-smoke']\n"
        "runpy.run_path('benchmarks/gpu_train_step.py', run_name='__main__')"
    )
    found = run(code, absent=NOT_FOR_STEPS)
    assert found.returncode == 0, found.stderr
    assert '"smoke": "passed"' in found.stdout.splitlines()[-1]
