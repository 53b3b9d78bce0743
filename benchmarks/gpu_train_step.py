"""What a GPU makes of a training step: eager, in bf16, compiled, and whole in a CUDA graph.

NOT RUN ON A GPU YET: on a machine without one, all of this but CUDA itself (capture, streams,
compiled kernels) was run by the smoke path below. Take its first figures with that in mind.

CARN x2 in the paper's configuration: batches of 16 patches of 64 px HR, combined loss, Adam. The
tiles are drawn, and lie as bytes on the device, where patches are cut by indexing. Needs torch,
numpy, jaxtyping and pytorch-msssim, and nothing else that carn depends on.

Rows:
  fp32             eager, NCHW; convolutions in TF32, as torch has them unless told otherwise
  bf16             autocast, channels_last, fused Adam: what `carn.training` does
  bf16 compiled    the network's kernels by torch.compile
  graph            bf16 as one CUDA graph: patches cut, loss, gradient and Adam; the host sends only
                   the numbers of the samples and the learning rate
  graph compiled   both

What is predicted, and why:
  graph_over_bf16 >= 3      a step is 0.17 ms of arithmetic at 790 TFLOP/s, but over a thousand
                            kernels, which the host launches in 5 to 10 us each
  graph_compiled_over_graph >= 1.1   fewer passes over activations for bias, ReLU and gate
  graph_share_of_peak 0.1 to 0.4     products of 64 channels fill neither tensor cores nor caches
  weights_off <= 0.1        distance of the graph's weights after 20 steps from eager ones, by how
                            far these have come: roundings only, which Adam's first steps enlarge; a
                            graph that repeats a batch is off by a half and more

Every round runs every row; a figure is the median of the rounds. Without CUDA it says so, and takes
a few steps of a tiny network on the CPU by the same functions (`--cpu-smoke` does so anywhere).

Examples:
  python benchmarks/gpu_train_step.py
  python benchmarks/gpu_train_step.py --full
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# `python benchmarks/gpu_train_step.py` puts benchmarks/ on the path, not the folder above it.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from carn.models.layers import BCSR_MEAN
from carn.models.table import build_model
from carn.training.config import (
    NetworkConfig,
    OptimizerConfig,
    PatchConfig,
    TrainConfig,
    learning_rate,
    resolve,
)
from carn.training.engine import EngineConfig, prepare, set_up
from carn.training.group import WorkerGroup
from carn.training.patches import TileStore, cut_patches, cut_table, make_store, samples_table
from carn.training.players import Player, autocast_for, make_players
from carn.training.samples import Sampler

# The paper's number of updates: 300 epochs of 1000.
PAPER_STEPS = 300_000
CHECKED_STEPS = 20
WARMUP_STEPS = 5
MATMUL_SIDE = 8192
SEED = 7

# Takes a step's number, returns its loss on the device (which the next step may overwrite).
Step = Callable[[int], Tensor]


@dataclass(frozen=True, kw_only=True)
class Form:
    """How a row runs its steps."""

    is_bf16: bool = True
    is_compiled: bool = False
    is_graph: bool = False


FORMS = {
    "fp32": Form(is_bf16=False),
    "bf16": Form(),
    "bf16 compiled": Form(is_compiled=True),
    "graph": Form(is_graph=True),
    "graph compiled": Form(is_graph=True, is_compiled=True),
}


@dataclass(frozen=True, kw_only=True)
class Lab:
    """What all rows share: tiles on the device, samples, settings."""

    store: TileStore
    sampler: Sampler
    network: NetworkConfig
    patches: PatchConfig
    device: torch.device

    def config(self, form: Form) -> TrainConfig:
        """The settings of a row."""
        optimizer = OptimizerConfig(precision="bf16" if form.is_bf16 else "fp32")
        config = TrainConfig(
            network=self.network, patches=self.patches, optimizer=optimizer, seed=SEED
        )
        return resolve(config)


@dataclass(frozen=True, kw_only=True)
class Row:
    """A network in training."""

    step: Step
    network: nn.Module

    def weights(self) -> Tensor:
        """All of them, in one row."""
        parts = [item.detach().float().flatten() for item in self.network.parameters()]
        return torch.cat(parts).clone()


def draw_tile(rng: np.random.Generator, side_px: int) -> NDArray[np.uint8]:
    """(side, side, 3) uint8: coarse blots, finer ones on them, and grain."""
    pixels = np.full((side_px, side_px, 3), 170.0, dtype=np.float32)
    for blot_px, height in ((32, 40), (8, 25), (1, 5)):
        coarse = rng.normal(0, height, (side_px // blot_px, side_px // blot_px, 3))
        pixels += coarse.astype(np.float32).repeat(blot_px, 0).repeat(blot_px, 1)
    return np.clip(pixels, 0, 255).astype(np.uint8)


def make_lab(
    device: torch.device,
    *,
    num_tiles: int,
    side_px: int,
    network: NetworkConfig,
    patches: PatchConfig,
) -> Lab:
    """Drawn tiles on the device."""
    rng = np.random.default_rng(SEED)
    tiles = [draw_tile(rng, side_px) for _ in range(num_tiles)]
    store = make_store(tiles, scale=network.scale).to(device)
    sampler = Sampler(
        store.extents_px(),
        scale=network.scale,
        patch_px=patches.side_px(network.scale),
        batch_size=patches.batch_size,
        seed=SEED,
    )
    return Lab(store=store, sampler=sampler, network=network, patches=patches, device=device)


def make_player(lab: Lab, form: Form) -> Player:
    """A fresh network with its objective and optimiser, as `carn.training.loop` makes them."""
    config = lab.config(form)
    torch.manual_seed(SEED)
    model = build_model(
        config.network.model,
        scale=config.network.scale,
        config=config.network.model_config(BCSR_MEAN),
    )
    model.to(lab.device).train()
    prepare(model, EngineConfig(compile=form.is_compiled, channels_last=form.is_bf16))
    (player,) = make_players(model, config, device=lab.device, group=WorkerGroup())
    return player


def make_row(lab: Lab, form: Form) -> Row:
    """A row, ready for its first step: compiled and captured, its weights fresh."""
    player = make_player(lab, form)
    step = _graph_step(lab, form, player) if form.is_graph else _eager_step(lab, form, player)
    return Row(step=step, network=player.network)


def _eager_step(lab: Lab, form: Form, player: Player) -> Step:
    config = lab.config(form)
    autocast = autocast_for(config.optimizer.precision, lab.device)
    patch_px = config.patches.side_px(config.network.scale)

    def step(number: int) -> Tensor:
        lr, hr = cut_patches(lab.store, lab.sampler.step(number), patch_px=patch_px)
        if not form.is_bf16:
            lr, hr = lr.contiguous(), hr.contiguous()
        terms = player.update(
            lr,
            hr,
            learning_rate=learning_rate(number, config),
            weight=1.0,
            gradient_clip=None,
            autocast=autocast(),
        )
        return terms["loss"]

    return step


def _graph_step(lab: Lab, form: Form, player: Player) -> Step:
    """The whole step with fixed places in memory: captured on CUDA, plainly called elsewhere."""
    config, device = lab.config(form), lab.device
    patch_px = config.patches.side_px(config.network.scale)
    has_cuda = device.type == "cuda"
    rate = torch.tensor(learning_rate(0, config), device=device)
    table = samples_table(lab.sampler.step(0)).to(device)
    loss = torch.zeros((), device=device)
    optimizer = torch.optim.Adam(
        player.network.parameters(),
        lr=rate,
        betas=config.optimizer.adam_betas,
        eps=config.optimizer.adam_eps,
        fused=True,
        capturable=has_cuda,
    )

    def update() -> None:
        optimizer.zero_grad(set_to_none=True)
        lr, hr = cut_table(lab.store, table, patch_px=patch_px)
        # Without a cache of cast weights, which would outlive the graph's memory.
        with torch.autocast(device.type, dtype=torch.bfloat16, cache_enabled=False):
            terms = player.objective(lr, hr)
        terms["loss"].backward()
        optimizer.step()
        loss.copy_(terms["loss"].detach())

    run = _captured(update, player.network, optimizer) if has_cuda else update

    def step(number: int) -> Tensor:
        numbers = samples_table(lab.sampler.step(number))
        # Pinned memory is not given out again before the copy out of it is done.
        table.copy_(numbers.pin_memory() if has_cuda else numbers, non_blocking=True)
        rate.fill_(learning_rate(number, config))
        run()
        return loss

    return step


def _captured(
    update: Callable[[], None], network: nn.Module, optimizer: torch.optim.Optimizer
) -> Callable[[], None]:
    """The update as a graph; network and optimiser are as fresh afterwards as before."""
    fresh = [item.detach().clone() for item in network.parameters()]
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        # Compiles, lets cuDNN choose, and makes Adam's state: none of it can be captured.
        for _ in range(WARMUP_STEPS):
            update()
    torch.cuda.current_stream().wait_stream(side)
    with torch.no_grad():
        for item, value in zip(network.parameters(), fresh, strict=True):
            item.copy_(value)
        for state in optimizer.state.values():
            for value in state.values():
                value.zero_()
    # Gradients shall lie in the graph's own memory.
    optimizer.zero_grad(set_to_none=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        update()
    replay: Callable[[], None] = graph.replay
    return replay


# ------------------------------------------------------------------------------------ measuring


def wait(device: torch.device) -> None:
    """Until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(work: Callable[[], Any], device: torch.device) -> float:
    """Wall-clock time of some work on the device."""
    wait(device)
    start = time.perf_counter()
    work()
    wait(device)
    return time.perf_counter() - start


def step_flop(lab: Lab) -> int:
    """Floating-point operations of a step's products, forward and backward."""
    form = FORMS["fp32"]
    player = make_player(lab, form)
    patch_px = lab.patches.side_px(lab.network.scale)
    lr, hr = cut_patches(lab.store, lab.sampler.step(0), patch_px=patch_px)
    with FlopCounterMode(display=False) as counter:
        player.objective(lr.contiguous(), hr.contiguous())["loss"].backward()
    return int(counter.get_total_flops())


def matmul_flops(device: torch.device, *, side: int, repeats: int) -> float:
    """FLOP/s of a large bf16 product of random numbers: the device's peak in practice."""
    left, right = (torch.randn(side, side, device=device).bfloat16() for _ in range(2))
    result = left @ right

    def work() -> None:
        for _ in range(repeats):
            torch.mm(left, right, out=result)

    return repeats * 2 * side**3 / seconds_of(work, device)


def sampling_s(lab: Lab, *, repeats: int) -> float:
    """What the host takes for a step's samples, which must be less than the step takes."""
    start = time.perf_counter()
    for number in range(repeats):
        samples_table(lab.sampler.step(number))
    return (time.perf_counter() - start) / repeats


def distance(row: Row, other: Row, *, start: Tensor) -> float:
    """How far apart two rows' weights are, by how far the other has come from the start."""
    ours, theirs = row.weights(), other.weights()
    return float((ours - theirs).norm() / (theirs - start).norm())


def measure(
    lab: Lab, forms: dict[str, Form], *, num_rounds: int, num_steps: int, matmul_side: int
) -> dict[str, Any]:
    """The figures of this benchmark."""
    start = Row(step=lambda _: torch.zeros(()), network=make_player(lab, FORMS["bf16"]).network)
    rows = {name: make_row(lab, form) for name, form in forms.items()}
    losses = {}
    for name, row in rows.items():
        losses[name] = [float(row.step(number)) for number in range(CHECKED_STEPS)]
        assert all(np.isfinite(losses[name])), f"{name}: {losses[name]}"
    off = {
        name: distance(row, rows["bf16"], start=start.weights())
        for name, row in rows.items()
        if name != "bf16"
    }
    times: dict[str, list[float]] = {name: [] for name in rows}
    peaks = []
    matmul_flops(lab.device, side=matmul_side, repeats=2)
    names = list(rows)
    for number in range(num_rounds):
        first = CHECKED_STEPS + number * num_steps
        for name in names:

            def work(step: Step = rows[name].step, first: int = first) -> None:
                for at in range(first, first + num_steps):
                    step(at)

            times[name].append(seconds_of(work, lab.device) / num_steps)
        peaks.append(matmul_flops(lab.device, side=matmul_side, repeats=10))
        names.reverse()
    flop = step_flop(lab)
    median = {name: statistics.median(values) for name, values in times.items()}
    peak = statistics.median(peaks)
    figures: dict[str, Any] = {
        "steps_per_s": {name: 1 / value for name, value in median.items()},
        "spread": {name: (max(v) - min(v)) / median[name] for name, v in times.items()},
        "tflops": {name: flop / value / 1e12 for name, value in median.items()},
        "share_of_peak": {name: flop / value / peak for name, value in median.items()},
        "paper_s": {name: value * PAPER_STEPS for name, value in median.items()},
        "weights_off": off,
        "last_loss": {name: values[-1] for name, values in losses.items()},
        "step_gflop": flop / 1e9,
        "peak_tflops": peak / 1e12,
        "sampling_us": sampling_s(lab, repeats=200) * 1e6,
    }
    for name, other in (("graph", "bf16"), ("bf16", "fp32"), ("graph compiled", "graph")):
        if name in median and other in median:
            key = f"{name}_over_{other}".replace(" ", "_")
            figures[key] = median[other] / median[name]
    return figures


def smoke() -> None:
    """The same functions on a CPU, with a network and tiles of a few px."""
    lab = make_lab(
        torch.device("cpu"),
        num_tiles=3,
        side_px=64,
        network=NetworkConfig(num_blocks=1, channels=8),
        patches=PatchConfig(batch_size=2, patch_px=32),
    )
    # Compiling takes a compiler and a minute; without CUDA `graph` is called as it stands.
    forms = {name: form for name, form in FORMS.items() if not form.is_compiled}
    figures = measure(lab, forms, num_rounds=1, num_steps=2, matmul_side=128)
    assert figures["weights_off"]["graph"] < 0.1, figures["weights_off"]
    print(f"smoke path on the CPU: {figures['last_loss']}, off by {figures['weights_off']}")
    print(json.dumps({"smoke": "passed", "has_cuda": torch.cuda.is_available()}))


def main(*, is_full: bool, is_smoke: bool) -> None:
    """Measure, print the table and, as the last line, the figures as JSON."""
    if not torch.cuda.is_available():
        print("torch sees no CUDA device here: nothing is measured")
    if is_smoke or not torch.cuda.is_available():
        smoke()
        return
    device = torch.device("cuda", torch.cuda.current_device())
    set_up(EngineConfig(), device)
    lab = make_lab(
        device,
        num_tiles=64,
        side_px=1024,
        network=NetworkConfig(),
        patches=PatchConfig(),
    )
    rounds, steps = (15, 500) if is_full else (5, 200)
    figures = measure(lab, FORMS, num_rounds=rounds, num_steps=steps, matmul_side=MATMUL_SIDE)
    print(f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}")
    print(f"peak {figures['peak_tflops']:.0f} TFLOP/s (bf16 product of {MATMUL_SIDE} squared)")
    print(f"{'':16}{'steps/s':>10}{'TFLOP/s':>10}{'of peak':>10}{'3e5 steps':>12}{'spread':>9}")
    for name in FORMS:
        print(
            f"{name:16}{figures['steps_per_s'][name]:10.1f}{figures['tflops'][name]:10.1f}"
            f"{figures['share_of_peak'][name]:10.3f}{figures['paper_s'][name]:10.0f} s"
            f"{figures['spread'][name]:9.2f}"
        )
    print(f"weights off those of bf16 after {CHECKED_STEPS} steps: {figures['weights_off']}")
    print(json.dumps(_rounded(figures)))


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _rounded(part) for name, part in value.items()}
    return float(f"{value:.4g}") if isinstance(value, float) else value


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--full", action="store_true", help="more rounds, of more steps")
    parser.add_argument("--cpu-smoke", action="store_true", help="only try it, on the CPU")
    options = parser.parse_args()
    main(is_full=options.full, is_smoke=options.cpu_smoke)
