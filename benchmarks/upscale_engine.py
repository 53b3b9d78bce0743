"""How fast a CPU super-resolves with CARN: `carn.upscaling.engine` against the usual forward pass.

CARN x2 in the paper's configuration, on drawn tissue in windows of 128, 256 and 512 LR px, the
paper's patch sizes. Both sides get the same window as bytes and give back the bytes of its
interior; what counts is all px of the window, so that the halo is charged to nobody. Each side has
a process of its own, for the memory setting is one of a process; they take turns.

Rows:
  eager          the plain network: fp32, NCHW, each window pools for itself
  engine         `make_engine` as it comes: bf16 but for head, long skip and tail; channels_last;
                 gates and tail folded; freed memory kept
With --full also:
  unfolded       the engine without folding
  engine fp32    the engine in fp32
  self-ensemble  the engine, averaged over the eight flips and turns of each window

What is predicted, and why:
  best_over_eager >= 4      bf16 does twice the products, kept memory spares the faults that eager
                            spends half of its time in, channels_last the reordering, folding a
                            tenth of the products and the gates' passes: 4.8 was seen once
  share_of_floor >= 0.7     of a large bf16 product on the same threads in the same run: 33 of 35
                            convolutions are bf16 and large; the rest, adds and ReLUs are not
  self_ensemble_over_engine about 8, with --full: eight passes of the same network; turning and
                            adding touch each px a few times, the network thousands of times
  over_eager grows with the window: eager's activations leave the caches and are faulted in anew

`best_over_eager` compares each side at the size that suits it, `over_eager` both at one size; both
are medians over rounds. Time is wall-clock, and a busy machine shows in `spread`, the range of a
row's rounds by their median; `best_over_eager_cpu` is the same ratio in CPU time of the processes.

Examples:
  python benchmarks/upscale_engine.py
  python benchmarks/upscale_engine.py --full --seconds 300
  python benchmarks/upscale_engine.py --checkpoint runs/carn_x2 --profile
"""

import json
import multiprocessing
import statistics
import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

# `python benchmarks/upscale_engine.py` puts benchmarks/ on the path, not the folder above it.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
import tyro
from torch import nn

from carn.models.checkpoint import load_model
from carn.models.cost import count_flops
from carn.models.table import build_model
from carn.slides.slide import Rgb
from carn.upscaling.engine import EngineConfig, make_engine, reference_engine
from carn.upscaling.folding import fold
from carn.upscaling.pooling import has_pooling, pool_over

SIDES_PX = (128, 256, 512)
# LR px that a row super-resolves in a round at each size: two seconds of an engine.
ROUND_PX = 512**2
MIN_ROUNDS = 3
PRODUCT_SIDE = 2048
SEED = 7

# By row and size, one for each round.
Seconds = dict[tuple[str, int], list[float]]

ROWS: dict[str, EngineConfig | None] = {
    "eager": None,
    "engine": EngineConfig(device="cpu", precision="bf16"),
    "unfolded": EngineConfig(device="cpu", precision="bf16", fold=False),
    "engine fp32": EngineConfig(device="cpu", precision="fp32"),
    "self-ensemble": EngineConfig(device="cpu", precision="bf16", self_ensemble=True),
}


@dataclass(frozen=True, kw_only=True)
class BenchUpscale:
    """What is measured."""

    full: bool = False
    """All rows."""

    checkpoint: str | None = None
    """A trained model instead of CARN x2 with fresh weights."""

    profile: bool = False
    """Instead: where the time goes, eager and engine, by torch's profiler."""

    threads: int = 2
    """CPU threads of a row."""

    seconds: float = 90
    """Wall-clock time for the rounds, in s; at least three are run."""


def make_model(checkpoint: str | None) -> nn.Module:
    """The network that all rows run."""
    if checkpoint is not None:
        return load_model(checkpoint)
    torch.manual_seed(SEED)
    return build_model("carn", scale=2).eval()


def draw_window(side_px: int) -> Rgb:
    """(side, side, 3): coarse blots, finer ones on them, and grain."""
    rng = np.random.default_rng(SEED)
    pixels = np.full((side_px, side_px, 3), 170.0)
    for blot_px, height in ((32, 40), (8, 25), (1, 5)):
        coarse = rng.normal(0, height, (side_px // blot_px, side_px // blot_px, 3))
        pixels += coarse.repeat(blot_px, 0).repeat(blot_px, 1)
    drawn: Rgb = np.clip(pixels, 0, 255).astype(np.uint8)
    return drawn


class Row:
    """A network that super-resolves windows, in this process."""

    def __init__(self, name: str, *, checkpoint: str | None, threads: int) -> None:
        torch.set_num_threads(threads)
        model = make_model(checkpoint)
        self._model = model
        config = ROWS[name]
        self._engine = None if config is None else make_engine(model, config)
        plain = reference_engine(model)
        halo_px = plain.halo_px
        self._crop = halo_px * plain.scale
        if self._engine is not None and has_pooling(model):
            pooling = pool_over(model, [draw_window(256)], halo_px=halo_px)
            self._engine.set_pooling(pooling)

    def upscale(self, window: Rgb) -> Rgb:
        """SR of the window's interior."""
        if self._engine is not None:
            return self._engine.upscale(window)
        with torch.inference_mode():
            lr = torch.from_numpy(window).permute(2, 0, 1)[None].contiguous().float() / 255
            sr = self._model(lr)[0, :, self._crop : -self._crop, self._crop : -self._crop]
            levels = sr.clamp(0, 1).mul(255).round().to(torch.uint8)
            found: Rgb = levels.permute(1, 2, 0).contiguous().numpy()
            return found

    def seconds(self, side_px: int) -> tuple[float, float]:
        """Wall-clock and CPU seconds for ROUND_PX in windows of a size."""
        window = draw_window(side_px)
        start, cpu = time.perf_counter(), time.process_time()
        for _ in range(ROUND_PX // side_px**2):
            self.upscale(window)
        return time.perf_counter() - start, time.process_time() - cpu


def floor_flops(threads: int) -> float:
    """FLOP/s of a large bf16 product: what the cores do at best."""
    torch.set_num_threads(threads)
    left, right = (torch.randn(PRODUCT_SIDE, PRODUCT_SIDE).bfloat16() for _ in range(2))
    rates = []
    with torch.inference_mode():
        left @ right
        for _ in range(5):
            start = time.perf_counter()
            left @ right
            rates.append(2 * PRODUCT_SIDE**3 / (time.perf_counter() - start))
    return max(rates)


# ------------------------------------------------------------------------------ rows in processes


class Case:
    """A row's process, which waits until it is asked for windows."""

    def __init__(self, name: str, bench: BenchUpscale) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        arguments = (theirs, name, bench.checkpoint, bench.threads)
        self._process = context.Process(target=_serve, args=arguments)
        self._process.start()
        theirs.close()

    def __enter__(self) -> "Case":
        self._pipe.recv()  # EOFError where it failed, and said why
        return self

    def __exit__(self, *_: object) -> None:
        self._pipe.close()
        self._process.join()

    def run(self, side_px: int) -> tuple[float, float]:
        """Wall-clock and CPU seconds for ROUND_PX."""
        self._pipe.send(side_px)
        found: tuple[float, float] = self._pipe.recv()
        return found

    def floor_flops(self) -> float:
        """FLOP/s of a large product."""
        self._pipe.send(None)
        found: float = self._pipe.recv()
        return found


def _serve(pipe: Connection, name: str, checkpoint: str | None, threads: int) -> None:
    row = Row(name, checkpoint=checkpoint, threads=threads)
    for side_px in SIDES_PX:  # kernels are chosen, memory is taken
        row.upscale(draw_window(side_px))
    pipe.send("ready")
    while True:
        try:
            side_px = pipe.recv()
        except EOFError:  # the other end is closed: no more is asked for
            return
        pipe.send(floor_flops(threads) if side_px is None else row.seconds(side_px))


# ------------------------------------------------------------------------------------- measuring


def measure(bench: BenchUpscale) -> dict[str, Any]:
    """The figures of this benchmark."""
    names = list(ROWS) if bench.full else ["eager", "engine"]
    wall: Seconds = {(name, side): [] for name in names for side in SIDES_PX}
    cpu: Seconds = {key: [] for key in wall}
    floors: list[float] = []
    with ExitStack() as stack:
        cases = {name: stack.enter_context(Case(name, bench)) for name in names}
        start, longest = time.monotonic(), 0.0
        while len(floors) < MIN_ROUNDS or time.monotonic() - start + longest < bench.seconds:
            round_start = time.monotonic()
            for side in SIDES_PX:
                for name in names:
                    for found, value in zip((wall, cpu), cases[name].run(side), strict=True):
                        found[name, side].append(value)
            floors.append(cases["engine"].floor_flops())
            names.reverse()
            longest = max(longest, time.monotonic() - round_start)
    model = make_model(bench.checkpoint)
    # Any pooling serves to count by.
    pooling = pool_over(model, [draw_window(64)], halo_px=0) if has_pooling(model) else None
    flop = {
        name: count_flops(network, lr_px=(256, 256), with_biases=False) / 256**2
        for name, network in (("plain", model), ("folded", fold(model, pooling)))
    }
    medians = {key: statistics.median(values) for key, values in wall.items()}
    ensemble = {}
    if bench.full:
        ensemble = {
            f"self_ensemble_over_engine{suffix}": _ratio(
                _best(seconds, "self-ensemble"), _best(seconds, "engine")
            )
            for suffix, seconds in (("", wall), ("_cpu", cpu))
        }
    return {
        "best_over_eager": _ratio(_best(wall, "eager"), _best(wall, "engine")),
        "best_over_eager_cpu": _ratio(_best(cpu, "eager"), _best(cpu, "engine")),
        **ensemble,
        "over_eager": {
            side: _ratio(wall["eager", side], wall["engine", side]) for side in SIDES_PX
        },
        "share_of_floor": statistics.median(
            flop["folded"] * ROUND_PX / ours / floor
            for ours, floor in zip(_best(wall, "engine"), floors, strict=True)
        ),
        "lr_kpx_per_s": {
            name: {side: ROUND_PX / medians[name, side] / 1e3 for side in SIDES_PX}
            for name in dict.fromkeys(name for name, _ in wall)
        },
        "spread": {
            f"{name} {side}": (max(values) - min(values)) / medians[name, side]
            for (name, side), values in wall.items()
        },
        "floor_gflops": statistics.median(floors) / 1e9,
        "mflop_per_lr_px": {name: value / 1e6 for name, value in flop.items()},
        "rounds": len(floors),
        "threads": bench.threads,
    }


def _best(seconds: Seconds, name: str) -> list[float]:
    """What a row took in each round at the size that suited it best."""
    return [min(values) for values in zip(*(seconds[name, side] for side in SIDES_PX), strict=True)]


def _ratio(theirs: list[float], ours: list[float]) -> float:
    """Median over rounds of how many times the second's time the first's is."""
    return statistics.median(one / other for one, other in zip(theirs, ours, strict=True))


def profile(bench: BenchUpscale) -> None:
    """Print the operators that both sides spend most time in."""
    for name in ("eager", "engine"):
        row = Row(name, checkpoint=bench.checkpoint, threads=bench.threads)
        window = draw_window(256)
        row.upscale(window)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as found:
            for _ in range(3):
                row.upscale(window)
        print(f"{name}, 3 windows of 256 px")
        print(found.key_averages().table(sort_by="self_cpu_time_total", row_limit=12))


def main(bench: BenchUpscale) -> None:
    """Measure, print the table and, as the last line, the figures as JSON."""
    if bench.profile:
        profile(bench)
        return
    figures = measure(bench)
    print(f"LR kpx/s, {bench.threads} threads; windows of")
    print(f"{'':14}" + "".join(f"{side:>7} px" for side in SIDES_PX))
    for name, rates in figures["lr_kpx_per_s"].items():
        print(f"{name:14}" + "".join(f"{rates[side]:10.1f}" for side in SIDES_PX))
    print(
        f"engine over eager: {figures['best_over_eager']:.2f}; {figures['share_of_floor']:.2f} of "
        f"a bf16 product's {figures['floor_gflops']:.0f} GFLOP/s"
    )
    print(json.dumps(_rounded(figures)))


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _rounded(part) for name, part in value.items()}
    return round(value, 3) if isinstance(value, float) else value


if __name__ == "__main__":
    main(tyro.cli(BenchUpscale, description=__doc__))
