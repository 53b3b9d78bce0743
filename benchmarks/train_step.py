"""How fast CARN trains on a CPU: `carn.training` against a loop written the usual way.

CARN x2 in the paper's configuration, batches of 16 patches of 64 px HR, combined loss, Adam; tiles
of 1024 px of tissue. Both sides start from the same weights and see the same patches in the same
order. Each has processes of its own, for the memory setting is one of a process; they take turns.

Rows:
  plain      fp32, NCHW, eager, as the EDSR family's programs have it: a Dataset loads HR and LR of
             a whole tile (.npy beside each other, which is faster than their PNG), crops, flips and
             makes tensors on 0..255; a DataLoader with one worker; losses by torch and
             pytorch-msssim; Adam as it comes
  ours       `carn.training` with `--precision bf16`: tiles in memory, bf16 autocast, channels_last,
             freed memory kept, fused Adam
  synthetic  the same on one batch that is there already: no sampling, no cutting
  workers    two processes of one thread each that share the batch (DistributedDataParallel, gloo)
  compiled   ours with `--compile`; only with --compile or --full, for it takes minutes to begin
  ours fp32  with --full: ours without bf16

What is predicted, and why:
  ours_over_plain >= 2          a core does twice as many products in bf16, channels_last spares the
                                reordering of every layer, kept memory the faulting in
  data_over_synthetic >= 0.95   a batch is 16 x 15 KB out of memory; the rest is arithmetic
  ddp_overhead <= 1.15          one worker's samples/s over those of two of half the threads: 5 MB
                                of gradients are summed, and whoever is first waits
  share_of_floor >= 0.5         ours against a large product or convolution in bf16, in the same run
  loss_ratio 0.98 to 1.02       (--full) means of the last 20 of 200 steps' losses; bf16 rounds

Time is wall-clock, for threads that wait for each other are what is measured: a busy machine shows
in `spread`, the range of a row's rounds by their median. `ours_over_plain_cpu` is the same ratio in
CPU time of the processes, loader included.

Examples:
  python benchmarks/train_step.py
  python benchmarks/train_step.py --full
  python benchmarks/train_step.py --profile
"""

import json
import multiprocessing
import os
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

# `python benchmarks/train_step.py` puts benchmarks/ on the path, not the folder above it.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import psutil
import torch
import tyro
from pytorch_msssim import SSIM
from torch import Tensor, distributed, nn
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.read_tiles import tissue_tiles
from carn.bcsr.dataset import BcsrDataset
from carn.degradation.bicubic import degrade
from carn.models.layers import BCSR_MEAN
from carn.models.table import build_model
from carn.training.config import OptimizerConfig, Precision, TrainConfig, learning_rate, resolve
from carn.training.data import TrainingData
from carn.training.engine import EngineConfig, prepare, set_up
from carn.training.group import WorkerGroup
from carn.training.loss_log import LossLog
from carn.training.patches import TileStore, make_store
from carn.training.players import autocast_for, make_players
from carn.training.samples import Sampler
from carn.training.stream import map_in_threads

SCALE = 2
COMPARED_STEPS = 200
LAST_STEPS = 20
WARMUP_STEPS = 2
MIN_ROUNDS = 3
PROFILED_STEPS = 3
PROFILE_ROWS = 15
# Time for a DataLoader to fill its queue again, so that it does so in no other row's time.
SETTLE_S = 0.3
CPU = torch.device("cpu")

# Takes a number of steps, returns their losses.
Steps = Callable[[int], list[float]]


@dataclass(frozen=True, kw_only=True)
class BenchTraining:
    """What is measured."""

    full: bool = False
    """More rounds of more steps, all rows, and the losses of 200 steps of both sides."""

    compile: bool = False
    """Also measure ours compiled."""

    profile: bool = False
    """Instead: where the time of a step goes, plain and ours, by torch's profiler."""

    threads: int = 2
    """CPU threads of a row; with 1 there is no row `workers`."""

    seconds: float | None = None
    """Wall-clock time for the rounds, in s; at least three are run. Default 60, with --full 300."""


def settings(*, precision: Precision) -> TrainConfig:
    """The paper's recipe."""
    return resolve(TrainConfig(optimizer=OptimizerConfig(precision=precision)))


def fresh_model(config: TrainConfig) -> nn.Module:
    """The network that every row starts from."""
    torch.manual_seed(config.seed)
    model = build_model("carn", scale=SCALE, config=config.network.model_config(BCSR_MEAN))
    return model.train()


def make_sampler(config: TrainConfig, store: TileStore) -> Sampler:
    """The patches that every row sees."""
    return Sampler(
        store.extents_px(),
        scale=SCALE,
        patch_px=config.patches.side_px(SCALE),
        batch_size=config.patches.batch_size,
        seed=config.seed,
    )


def write_tiles(folder: Path) -> int:
    """Tissue and its LR as .npy; returns how many tiles."""
    tiles = tissue_tiles()
    for number, hr in enumerate(tiles):
        np.save(folder / f"hr{number}.npy", hr)
        np.save(folder / f"lr{number}.npy", degrade(hr, scale=SCALE))
    return len(tiles)


def read_store(folder: Path) -> TileStore:
    """The tiles of `write_tiles` as training holds them."""
    num_tiles = len(list(folder.glob("hr*.npy")))
    tiles = [np.load(folder / f"hr{number}.npy") for number in range(num_tiles)]
    return make_store(tiles, scale=SCALE)


# ---------------------------------------------------------------------------------- the usual way

Place = tuple[int, int, int, int, bool, bool, bool]


class PlainTiles(Dataset[tuple[Tensor, Tensor]]):
    """Pairs of patches on 0..255, by (tile, variant, top, left, flip in x, flip in y, transpose).

    The variant is that of one LR image a tile.
    """

    def __init__(self, folder: Path, *, patch_px: int) -> None:
        self._folder = folder
        self._patch_px = patch_px

    def __getitem__(self, place: Place) -> tuple[Tensor, Tensor]:
        tile, _, top, left, *turns = place
        side = self._patch_px // SCALE
        hr = np.load(self._folder / f"hr{tile}.npy")
        lr = np.load(self._folder / f"lr{tile}.npy")
        lr = lr[top : top + side, left : left + side]
        top, left, side = top * SCALE, left * SCALE, self._patch_px
        hr = hr[top : top + side, left : left + side]
        return _to_tensor(lr, *turns), _to_tensor(hr, *turns)


def _to_tensor(pixels: np.ndarray[Any, Any], flip_x: bool, flip_y: bool, transpose: bool) -> Tensor:
    if flip_x:
        pixels = pixels[:, ::-1]
    if flip_y:
        pixels = pixels[::-1]
    if transpose:
        pixels = pixels.transpose(1, 0, 2)
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1))).float()


class PlainOrder:
    """The places of the steps, as a DataLoader's sampler; without end."""

    def __init__(self, sampler: Sampler) -> None:
        self._sampler = sampler

    def __iter__(self) -> Iterator[Place]:
        number = 0
        while True:
            samples = self._sampler.step(number)
            yield from zip(*(values.tolist() for values in vars(samples).values()), strict=True)
            number += 1


def plain_steps(folder: Path) -> Steps:
    """The loop that the EDSR family's programs have."""
    config = settings(precision="fp32")
    model = fresh_model(config)
    optimizer = torch.optim.Adam(model.parameters(), lr=config.optimizer.learning_rate)
    loader = DataLoader(
        PlainTiles(folder, patch_px=config.patches.side_px(SCALE)),
        batch_size=config.patches.batch_size,
        sampler=PlainOrder(make_sampler(config, read_store(folder))),
        num_workers=1,
    )
    batches = iter(loader)
    l1, mse, ssim = nn.L1Loss(), nn.MSELoss(), SSIM(data_range=255, channel=3)
    weights = config.loss

    def run(num_steps: int) -> list[float]:
        losses = []
        for _ in range(num_steps):
            lr, hr = next(batches)
            optimizer.zero_grad()
            # The network takes and gives 0..1.
            sr = model(lr / 255) * 255
            loss = weights.alpha * l1(sr, hr) + weights.beta * mse(sr, hr)
            loss = loss + weights.gamma * (1 - ssim(sr, hr))
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses

    return run


# --------------------------------------------------------------------------------- carn.training


def our_steps(
    folder: Path, *, precision: Precision = "bf16", is_compiled: bool = False
) -> dict[str, Steps]:
    """The pieces that `carn.training.loop` is made of, on real patches and on one fixed batch."""
    config = settings(precision=precision)
    engine = EngineConfig(compile=is_compiled)
    set_up(engine, CPU)
    group = WorkerGroup.current()
    model = fresh_model(config)
    prepare(model, engine)
    (player,) = make_players(model, config, device=CPU, group=group)
    store = read_store(folder)
    data = TrainingData(
        # Asked for nothing, since the tiles are in memory.
        dataset=BcsrDataset(uri=str(folder), manifest={}),
        sampler=make_sampler(config, store),
        tile_ids=store.tile_ids,
        store=store,
    )
    batches = data.batches(config, group=group, device=CPU, first_step=0, map_units=map_in_threads)
    fixed = next(batches)
    batches = data.batches(config, group=group, device=CPU, first_step=0, map_units=map_in_threads)
    autocast = autocast_for(precision, CPU)
    batch_size = config.patches.batch_size

    def run(num_steps: int, *, is_fixed: bool = False) -> list[float]:
        log = LossLog(batch_size=batch_size, group=group)
        losses = []
        for number in range(num_steps):
            batch = fixed if is_fixed else next(batches)
            terms = player.update(
                batch.lr,
                batch.hr,
                learning_rate=learning_rate(number, config),
                weight=group.gradient_weight(batch_size),
                gradient_clip=None,
                autocast=autocast(),
            )
            log.add({"model": terms})
            losses.append(float(terms["loss"]))
        return losses

    return {"ours": run, "synthetic": lambda num_steps: run(num_steps, is_fixed=True)}


def peaks() -> dict[str, float]:
    """FLOP/s of the better of a large product and a large convolution, by precision."""
    found = {}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        side, image_px, channels = 1536, 128, 128
        left, right = (torch.randn(side, side).to(dtype) for _ in range(2))
        image = torch.randn(4, channels, image_px, image_px).to(
            dtype, memory_format=torch.channels_last
        )
        kernel = torch.randn(channels, channels, 3, 3).to(dtype, memory_format=torch.channels_last)
        works: list[tuple[float, Callable[[], Tensor]]] = [
            (2.0 * side**3, lambda left=left, right=right: left @ right),  # type: ignore[misc]
            (
                2.0 * 9 * channels**2 * 4 * image_px**2,
                lambda image=image, kernel=kernel: nn.functional.conv2d(  # type: ignore[misc]
                    image, kernel, padding=1
                ),
            ),
        ]
        rates = []
        for flop, work in works:
            with torch.inference_mode():
                work()
                for _ in range(3):
                    start = time.perf_counter()
                    work()
                    rates.append(flop / (time.perf_counter() - start))
        found[name] = max(rates)
    return found


def step_flop(folder: Path) -> int:
    """Floating-point operations of a step's products, forward and backward."""
    config = settings(precision="fp32")
    (player,) = make_players(fresh_model(config), config, device=CPU, group=WorkerGroup())
    side = config.patches.side_px(SCALE)
    hr = torch.rand(config.patches.batch_size, 3, side, side)
    with FlopCounterMode(display=False) as counter:
        player.objective(hr[..., ::SCALE, ::SCALE].contiguous(), hr)["loss"].backward()
    return int(counter.get_total_flops())


# ------------------------------------------------------------------------------ rows in processes

Kind = Literal["plain", "ours", "ours fp32", "compiled", "workers", "peak"]


@dataclass(frozen=True, kw_only=True)
class Result:
    """Some steps of a row: seconds by the wall and of the processor, and what came out."""

    wall_s: float
    cpu_s: float
    losses: list[float]
    peaks: dict[str, float]


class Case:
    """The processes of a row, which wait until they are asked for steps."""

    def __init__(self, kind: Kind, folder: Path, *, threads: int) -> None:
        context = multiprocessing.get_context("spawn")
        num_workers = 2 if kind == "workers" else 1
        port = _free_port() if num_workers > 1 else None
        self._pipes: list[Connection] = []
        self._processes = []
        for rank in range(num_workers):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_serve,
                args=(theirs, kind, folder),
                kwargs={"threads": max(1, threads // num_workers), "rank": rank, "port": port},
            )
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)

    def __enter__(self) -> "Case":
        try:
            for pipe in self._pipes:
                pipe.recv()
        except EOFError:  # one has failed, and said why; another may wait for it
            for process in self._processes:
                process.terminate()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.join()

    def run(self, row: str, num_steps: int) -> Result:
        """Take steps; of several workers the slowest counts."""
        for pipe in self._pipes:
            pipe.send((row, num_steps))
        results: list[Result] = [pipe.recv() for pipe in self._pipes]
        time.sleep(SETTLE_S)
        return Result(
            wall_s=max(result.wall_s for result in results),
            cpu_s=sum(result.cpu_s for result in results),
            losses=results[0].losses,
            peaks=results[0].peaks,
        )


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _serve(
    pipe: Connection, kind: Kind, folder: Path, *, threads: int, rank: int, port: int | None
) -> None:
    torch.set_num_threads(threads)
    if port is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        distributed.init_process_group(
            "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2
        )
    rows: dict[str, Steps] = {}
    if kind == "plain":
        rows = {"plain": plain_steps(folder)}
    elif kind == "ours":
        rows = our_steps(folder)
    elif kind != "peak":
        precision: Precision = "fp32" if kind == "ours fp32" else "bf16"
        made = our_steps(folder, precision=precision, is_compiled=kind == "compiled")
        rows = {kind: made["ours"]}
    pipe.send("ready")
    while True:
        try:
            row, num_steps = pipe.recv()
        except EOFError:  # the other end is closed: no more is asked for
            break
        losses: list[float] = []
        found: dict[str, float] = {}
        cpu, start = _cpu_seconds(), time.perf_counter()
        if kind == "peak":
            found = peaks()
        else:
            losses = rows[row](num_steps)
        wall_s = time.perf_counter() - start
        pipe.send(Result(wall_s=wall_s, cpu_s=_cpu_seconds() - cpu, losses=losses, peaks=found))
    if port is not None:
        distributed.destroy_process_group()
    # A DataLoader's worker would be waited for.
    for child in psutil.Process().children():
        child.terminate()


def _cpu_seconds() -> float:
    process = psutil.Process()
    times = [part.cpu_times() for part in (process, *process.children(recursive=True))]
    return float(sum(part.user + part.system for part in times))


# ------------------------------------------------------------------------------------ measuring


def rounds_of(cases: dict[str, Case], *, num_steps: int, seconds: float) -> dict[str, list[Result]]:
    """What every row took in every round; the rows take turns, forwards and backwards."""
    results: dict[str, list[Result]] = {row: [] for row in cases}
    rows = list(cases)
    for row in rows:
        cases[row].run(row, WARMUP_STEPS)
    start, longest = time.monotonic(), 0.0
    while len(results[rows[0]]) < MIN_ROUNDS or time.monotonic() - start + longest < seconds:
        round_start = time.monotonic()
        for row in rows:
            results[row].append(cases[row].run(row, num_steps))
        rows.reverse()
        longest = max(longest, time.monotonic() - round_start)
    return results


def ratio(results: dict[str, list[Result]], row: str, other: str, *, of: str = "wall_s") -> float:
    """Median over rounds of how many times the first row's time the other's is."""
    pairs = zip(results[row], results[other], strict=True)
    return float(
        statistics.median(getattr(theirs, of) / getattr(ours, of) for ours, theirs in pairs)
    )


def measure(bench: BenchTraining, folder: Path) -> dict[str, Any]:
    """The figures of this benchmark."""
    compared: dict[str, list[float]] = {}
    if bench.full:
        both: tuple[Kind, ...] = ("plain", "ours")
        for kind in both:
            with Case(kind, folder, threads=bench.threads) as case:
                compared[kind] = case.run(kind, COMPARED_STEPS).losses
    kinds: list[Kind] = ["plain", "ours", "peak"]
    kinds += ["workers"] if bench.threads > 1 else []
    kinds += ["compiled"] if bench.full or bench.compile else []
    kinds += ["ours fp32"] if bench.full else []
    num_steps = 8 if bench.full else 4
    default_s = 300.0 if bench.full else 60.0
    seconds = default_s if bench.seconds is None else bench.seconds
    with ExitStack() as stack:
        cases: dict[str, Case] = {
            kind: stack.enter_context(Case(kind, folder, threads=bench.threads)) for kind in kinds
        }
        cases["synthetic"] = cases["ours"]
        results = rounds_of(cases, num_steps=num_steps, seconds=seconds)

    peak = results.pop("peak")
    flop = step_flop(folder)
    figures: dict[str, Any] = {
        "ours_over_plain": ratio(results, "ours", "plain"),
        "ours_over_plain_cpu": ratio(results, "ours", "plain", of="cpu_s"),
        "data_over_synthetic": ratio(results, "ours", "synthetic"),
    }
    if "workers" in results:
        figures["ddp_overhead"] = ratio(results, "ours", "workers")
    if "compiled" in results:
        figures["compiled_over_ours"] = ratio(results, "compiled", "ours")
    if compared:
        last = {kind: statistics.mean(values[-LAST_STEPS:]) for kind, values in compared.items()}
        figures["loss_ratio"] = last["ours"] / last["plain"]
        figures["last_loss"] = last
    shares = {
        (row, precision): statistics.median(
            flop * num_steps / result.wall_s / found.peaks[precision]
            for result, found in zip(rounds, peak, strict=True)
        )
        for row, rounds in results.items()
        for precision in ("bf16", "fp32")
    }
    # In the precision that a row computes in.
    share = {
        row: shares[row, "fp32" if row in ("plain", "ours fp32") else "bf16"] for row in results
    }
    wall = {row: [result.wall_s for result in rounds] for row, rounds in results.items()}
    medians = {row: statistics.median(values) for row, values in wall.items()}
    batch_size = settings(precision="fp32").patches.batch_size
    return figures | {
        "share_of_floor": share,
        "samples_per_s": {row: num_steps * batch_size / value for row, value in medians.items()},
        "spread": {row: (max(v) - min(v)) / medians[row] for row, v in wall.items()},
        "peak_gflops": {
            name: statistics.median(found.peaks[name] for found in peak) / 1e9
            for name in ("fp32", "bf16")
        },
        "step_gflop": flop / 1e9,
        "rounds": len(peak),
        "threads": bench.threads,
    }


def profile(folder: Path, *, threads: int) -> None:
    """Print the operators that the steps of both sides spend most time in."""
    torch.set_num_threads(threads)
    for name, steps in (("plain", plain_steps(folder)), ("ours", our_steps(folder)["ours"])):
        steps(WARMUP_STEPS)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as found:
            steps(PROFILED_STEPS)
        print(f"{name}, {PROFILED_STEPS} steps")
        table = found.key_averages().table(sort_by="self_cpu_time_total", row_limit=PROFILE_ROWS)
        print(table)


def main(bench: BenchTraining) -> None:
    """Make the tiles, measure, print the table and, as the last line, the figures as JSON."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_tiles(folder)
        if bench.profile:
            profile(folder, threads=bench.threads)
            return
        figures = measure(bench, folder)
    print(f"{figures['step_gflop']:.0f} GFLOP a step, {bench.threads} threads")
    print(f"{'':12}{'samples/s':>12}{'of the floor':>14}{'spread':>9}")
    for row, rate in figures["samples_per_s"].items():
        share, spread = figures["share_of_floor"][row], figures["spread"][row]
        print(f"{row:12}{rate:12.1f}{share:14.2f}{spread:9.2f}")
    print("floor: " + ", ".join(f"{n} {r:.0f} GFLOP/s" for n, r in figures["peak_gflops"].items()))
    print(json.dumps(_rounded(figures)))


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _rounded(part) for name, part in value.items()}
    return round(value, 3) if isinstance(value, float) else value


if __name__ == "__main__":
    main(tyro.cli(BenchTraining, description=__doc__))
