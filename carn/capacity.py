"""How large a cluster a night of slides needs: nodes, cores, network, requests, and what binds.

python -m carn.capacity --slides 3000 --input-mpp 0.5 --gpu h200 --hours 8
"""

import dataclasses
import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import tyro

from carn.capacity_rates import (
    ACTOR_MB,
    CONSISTENCY,
    DAEMONS_MB,
    ENCODE,
    END_TO_END_SHARE,
    ENGINE_TWO_CORES,
    ENLARGE,
    FINISH,
    MFLOP_PER_LR_PX,
    READ,
    READER_MB,
    ROOFLINE_MS,
    ROOFLINE_SHARE,
    SLIDE,
    START,
    TASKS,
    TWO_CORES,
    UPLOAD,
    Kind,
    Rate,
)

# Written out, for this module imports nothing of what it speaks of; the tests compare them with
# carn.slides.tiff_output, carn.uploads, carn.models.turns, jobs.sr_stages and jobs.sr_pipeline.
MAX_BLOCKS = 6000
MAX_PARTS = 10_000
MIN_PART_BYTES = 5 * 2**20
MAX_FINISHING = 8
BLOCKS_PER_TASK = {"cpu": 2, "gpu": 4}
NUM_WRITERS = 2
# Flips and turns that self-ensemble infers of each window.
NUM_TURNS = 8
# LR px of context that CARN wants to each side.
HALO_PX = 36
# Side of the windows that a GPU infers, and that carn's GPU benchmark measures.
WINDOW_PX = 1024
# The levels that blocks are encoded on; what they leave is kept beside each, in its record.
NUM_BLOCK_LEVELS = 4
# Requests of a slide beside those of its blocks: claim, notes, listings, the upload's beginning and
# end, its share of the report. Counted in a run of two slides against an S3 server.
PUTS_PER_SLIDE, GETS_PER_SLIDE, DELETES_PER_SLIDE = 47, 28, 5
# Amazon S3 answers at least so many requests a second of one prefix, and more after a while.
# Source: https://docs.aws.amazon.com/AmazonS3/latest/userguide/optimizing-performance.html
MAX_PUTS_PER_S, MAX_GETS_PER_S = 3500, 5500

Scale = Literal[2, 4, 8]


@dataclass(frozen=True, kw_only=True)
class Prices:
    """What things cost, in any one currency. Without prices only quantities are told."""

    node_hour: float | None = None
    """A node for an hour."""
    thousand_puts: float | None = None
    """A thousand PUT, POST, LIST and COPY requests."""
    thousand_gets: float | None = None
    """A thousand GET and HEAD requests."""
    gb_month: float | None = None
    """A gigabyte kept for a month."""
    gb_moved: float | None = None
    """A gigabyte over the network, in or out, where that is billed."""

    def __post_init__(self) -> None:
        for entry in dataclasses.fields(self):
            price = getattr(self, entry.name)
            if price is not None and not 0 <= price < math.inf:
                raise ValueError(f"{entry.name}={price} must not be negative")


@dataclass(frozen=True, kw_only=True)
class Question:
    """What is to be done, with what kind of nodes, and what is assumed of it."""

    slides: int
    """Slides to super-resolve."""
    hours: float = 8.0
    """Time that there is for them, nodes being up."""
    input_mpp: float = 0.5
    """Micrometres per px of the input: with --slide-mm, its size in px."""
    slide_mm: tuple[float, float] = (20.0, 15.0)
    """Width and height of what is scanned of a slide, millimetres."""
    slide_px: tuple[int, int] | None = None
    """Width and height of the input in px, instead of --slide-mm."""
    tissue_share: float = 0.35
    """Share of the px that go through the network (near tissue); the rest is enlarged."""
    flat_share: float = 0.5
    """Share of that rest that is of one colour, as scanners fill what they did not scan: it costs
    next to nothing."""
    model: str = "carn"
    """The network. Only CARN's rates are known; for others say --engine-mpx-per-s."""
    scale: Scale = 2
    """SR px per LR px along a side."""
    gpu: Literal["h200", "h100", "other"] = "h200"
    """What infers; `other` needs --engine-mpx-per-s."""
    cpu_only: bool = False
    """Infer on the cores."""
    engine_mpx_per_s: float | None = None
    """LR Mpx a second that one GPU (with --cpu-only: one core) infers, halos left out: the
    `useful_lr_mpx_per_s` of benchmarks/gpu_upscale_engine.py. Without --self-ensemble, whatever is
    asked."""
    self_ensemble: bool = False
    """As super_resolve.py's: each window is inferred eight times."""
    gpus_per_node: int = 1
    """GPUs of a node."""
    cores_per_node: int = 16
    """Physical cores of a node; the measured rates are of such."""
    network_gbit: float = 25.0
    """Network of a node to storage, Gbit/s, in each direction."""
    utilization: float = 0.8
    """Share of the time that is work: the rest is starting, the last slides, lost nodes."""
    block_px: int = 4096
    """As super_resolve.py's."""
    input_tile_px: int = 256
    """Side of the JPEG tiles of the input."""
    input_bytes_per_px: float = 0.2
    """Size of an input file by its level-0 px."""
    tissue_bytes_per_px: float = 0.33
    """Bytes of the output by its SR px, where there is tissue; all levels."""
    glass_bytes_per_px: float = 0.03
    """The same, where there is none and it is not of one colour."""
    prices: Prices = field(default_factory=Prices)

    def __post_init__(self) -> None:
        _check_positive(
            *(
                (name, getattr(self, name))
                for name in (
                    *("slides", "hours", "input_mpp", "utilization", "engine_mpx_per_s"),
                    *("gpus_per_node", "cores_per_node", "network_gbit", "block_px"),
                    *("input_tile_px", "input_bytes_per_px", "tissue_bytes_per_px"),
                )
            ),
            *(("slide_mm", side) for side in self.slide_mm),
            *(("slide_px", side) for side in self.slide_px or ()),
        )
        for name in ("tissue_share", "flat_share", "utilization", "glass_bytes_per_px"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)} must be in 0..1")
        if self.engine_mpx_per_s is None and self.model != "carn":
            raise ValueError(f"model={self.model!r}: say how fast it is with --engine-mpx-per-s")
        if self.engine_mpx_per_s is None and self.gpu == "other" and not self.cpu_only:
            raise ValueError("gpu='other': say how fast it is with --engine-mpx-per-s")


def _check_positive(*values: tuple[str, float | None]) -> None:
    for name, value in values:
        if value is not None and not (value > 0 and math.isfinite(value)):
            raise ValueError(f"{name}={value} must be positive")


@dataclass(frozen=True, kw_only=True)
class SlideDemand:
    """What one slide takes.

    Attributes:
        extent_px: (width, height) of the LR.
        lr_mpx, inferred_mpx, enlarged_mpx: LR Mpx in all, through the network, enlarged.
        num_blocks, block_px: blocks, and their side in SR px.
        read_factor: px that are decoded for each px of the slide: whole tiles, for blocks and their
            context, kept from none to the next.
        gpu_s: GPU-seconds.
        core_s: core-seconds by stage.
        in_bytes, out_bytes: over the network, from and to storage.
        stored_bytes: of the finished slide.
        puts, gets, deletes: requests.
        num_parts: of the multipart upload.
    """

    extent_px: tuple[int, int]
    lr_mpx: float
    inferred_mpx: float
    enlarged_mpx: float
    num_blocks: int
    block_px: int
    read_factor: float
    gpu_s: float
    core_s: Mapping[str, float]
    in_bytes: float
    out_bytes: float
    stored_bytes: float
    puts: int
    gets: int
    deletes: int
    num_parts: int


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The answer.

    Attributes:
        question: what was asked, with all that was assumed.
        rates: what it is reckoned from, by name.
        slide: what one slide takes.
        nodes: that do it in time.
        nodes_by_resource: that each resource by itself would need, not rounded.
        binding: the resource that needs most.
        binding_stage: its largest user.
        jobs: runs side by side, where one driver cannot feed the nodes.
        jobs_by_limit: that each limit of one run asks for, not rounded.
        lr_mpx_per_s_per_node: LR Mpx that a node makes in a second of work.
        hours_needed: by these nodes.
        gpus, cores: of all nodes.
        cores_per_gpu: that keep one GPU busy, by stage; empty without GPUs.
        actors_per_gpu: that keep it busy, for each looks after one block at a time.
        node_memory_gb, object_store_gb: of a node, at least.
        in_gbit_per_s, out_gbit_per_s: of the cluster, in the mean over the time of work.
        puts_per_s, gets_per_s: likewise.
        totals: of the night: bytes and requests.
        costs: of what has a price.
        is_predicted: whether a rate that decides was predicted, not measured.
    """

    question: Question
    rates: Mapping[str, Rate]
    slide: SlideDemand
    nodes: int
    nodes_by_resource: Mapping[str, float]
    binding: str
    binding_stage: str
    jobs: int
    jobs_by_limit: Mapping[str, float]
    lr_mpx_per_s_per_node: float
    hours_needed: float
    gpus: int
    cores: int
    cores_per_gpu: Mapping[str, float]
    actors_per_gpu: int
    node_memory_gb: float
    object_store_gb: float
    in_gbit_per_s: float
    out_gbit_per_s: float
    puts_per_s: float
    gets_per_s: float
    totals: Mapping[str, float]
    costs: Mapping[str, float]
    is_predicted: bool

    def to_json(self) -> str:
        """All of it, one object on one line."""
        return json.dumps(dataclasses.asdict(self), allow_nan=False)


# ---------------------------------------------------------------------------------- the model


def engine_rate(question: Question) -> Rate:
    """Say how many LR Mpx a second one GPU infers, or one core, without halos."""
    rate = _plain_engine_rate(question)
    if not question.self_ensemble:
        return rate
    return dataclasses.replace(
        rate,
        value=rate.value / NUM_TURNS,
        source=f"{rate.source}, by the {NUM_TURNS} turns of --self-ensemble",
    )


def _plain_engine_rate(question: Question) -> Rate:
    unit = "LR Mpx/s of a core" if question.cpu_only else "LR Mpx/s of a GPU"
    if question.engine_mpx_per_s is not None:
        return Rate(
            value=question.engine_mpx_per_s, unit=unit, kind="given", source="--engine-mpx-per-s"
        )
    scale = question.scale
    if question.cpu_only:
        slower = MFLOP_PER_LR_PX[2] / MFLOP_PER_LR_PX[scale]
        kind: Kind = "measured" if scale == 2 else "predicted"
        text = f"super_resolve.py, {ENGINE_TWO_CORES} LR Mpx/s at x2 on {TWO_CORES}"
        if scale != 2:
            text += f", by FLOPs to x{scale}"
        return Rate(value=ENGINE_TWO_CORES / 2 * slower, unit=unit, kind=kind, source=text)
    useful = (WINDOW_PX / (WINDOW_PX + 2 * HALO_PX)) ** 2
    roofline_ms = ROOFLINE_MS[question.gpu][scale]
    return Rate(
        value=1000 / roofline_ms * ROOFLINE_SHARE * END_TO_END_SHARE * useful,
        unit=unit,
        kind="predicted",
        source=f"roofline of {roofline_ms} ms an LR Mpx, of which {ROOFLINE_SHARE:.0%} are hoped "
        f"for, {END_TO_END_SHARE:.0%} of that end to end; halos left out",
    )


def rates_of(question: Question) -> dict[str, Rate]:
    """What a question is reckoned from."""
    device = "cpu" if question.cpu_only else "gpu"
    return {
        "engine": engine_rate(question),
        "read": READ,
        "encode": ENCODE,
        "consistency": CONSISTENCY,
        "enlarge": ENLARGE,
        "upload": UPLOAD,
        "finish": FINISH,
        "slide": SLIDE,
        "tasks": TASKS,
        "start": START,
        "actor_memory": ACTOR_MB[device],
        "reader_memory": READER_MB,
        "daemon_memory": DAEMONS_MB,
    }


def extent_px(question: Question) -> tuple[int, int]:
    """(width, height) of a slide's LR."""
    if question.slide_px is not None:
        return question.slide_px
    width_mm, height_mm = question.slide_mm
    per_mm = 1000 / question.input_mpp
    return math.ceil(width_mm * per_mm), math.ceil(height_mm * per_mm)


def blocks_of(extent: tuple[int, int], *, scale: int, block_px: int) -> tuple[int, int]:
    """Blocks of a slide, and their side in SR px, which is doubled until they are few enough."""
    while True:
        columns, rows = (-(-side * scale // block_px) for side in extent)
        if columns * rows <= MAX_BLOCKS:
            return columns * rows, block_px
        block_px *= 2


def demand_of(question: Question, rates: Mapping[str, Rate]) -> SlideDemand:
    """What one slide takes."""
    extent, scale = extent_px(question), question.scale
    lr_mpx = extent[0] * extent[1] / 1e6
    inferred = lr_mpx * question.tissue_share
    enlarged = (lr_mpx - inferred) * (1 - question.flat_share)
    num_blocks, block_px = blocks_of(extent, scale=scale, block_px=question.block_px)
    side = block_px / scale
    tile = question.input_tile_px
    read_factor = ((side + 2 * tile) / side) ** 2
    by_area = (scale / 2) ** 2
    core_s = {
        "read": lr_mpx * read_factor / rates["read"].value,
        "enlarge": enlarged * by_area * rates["enlarge"].value,
        "consistency": lr_mpx * by_area * rates["consistency"].value,
        "encode": lr_mpx * scale**2 / rates["encode"].value,
        "upload": (inferred + enlarged) * by_area * rates["upload"].value,
        "finish": num_blocks * rates["finish"].value,
        "slide": rates["slide"].value,
    }
    infer_s = inferred / rates["engine"].value
    if question.cpu_only:
        core_s["infer"] = infer_s
    sr_px = 1e6 * scale**2
    stored = sr_px * (
        inferred * question.tissue_bytes_per_px + enlarged * question.glass_bytes_per_px
    )
    # Beside each block: what its levels leave for those above, and the map of consistency.
    record_bytes = 3 * (block_px / 2**NUM_BLOCK_LEVELS) ** 2 + 4 * (side / 64) ** 2
    file_bytes = lr_mpx * 1e6 * question.input_bytes_per_px
    block_bytes = stored / num_blocks
    is_small = block_bytes < MIN_PART_BYTES
    in_groups = 2 * MIN_PART_BYTES  # small blocks are joined to parts of about this
    num_parts = 1 + (math.ceil(stored / in_groups) if is_small else num_blocks)
    small_bytes = stored if is_small else 0.0
    tile_rows = math.ceil(side / tile) + 2
    return SlideDemand(
        extent_px=extent,
        lr_mpx=lr_mpx,
        inferred_mpx=inferred,
        enlarged_mpx=enlarged,
        num_blocks=num_blocks,
        block_px=block_px,
        read_factor=read_factor,
        gpu_s=0.0 if question.cpu_only else infer_s,
        core_s=core_s,
        in_bytes=file_bytes * read_factor + 2 * num_blocks * record_bytes + small_bytes,
        out_bytes=stored + num_blocks * record_bytes + small_bytes,
        stored_bytes=stored,
        # A payload and a record for each block.
        puts=2 * num_blocks + (num_parts if is_small else 1) + PUTS_PER_SLIDE,
        # A row of tiles is one range; records are read twice at the end, small payloads once.
        gets=num_blocks * (tile_rows + 2 + is_small) + GETS_PER_SLIDE,
        deletes=num_blocks * (1 + is_small) + DELETES_PER_SLIDE,
        num_parts=num_parts,
    )


def plan(question: Question) -> Plan:
    """How large a cluster a night needs."""
    rates = rates_of(question)
    slide = demand_of(question, rates)
    work_s = question.hours * 3600 * question.utilization
    link = question.network_gbit * 1e9 / 8
    # Seconds of one node for one slide, by resource.
    node_s = {
        "cores": sum(slide.core_s.values()) / question.cores_per_node,
        "network in": slide.in_bytes / link,
        "network out": slide.out_bytes / link,
    }
    if not question.cpu_only:
        node_s["gpu"] = slide.gpu_s / question.gpus_per_node
    binding = max(node_s, key=lambda name: node_s[name])
    by_resource = {name: question.slides * value / work_s for name, value in node_s.items()}
    nodes = max(1, math.ceil(by_resource[binding] - 1e-9))
    device: Literal["cpu", "gpu"] = "cpu" if question.cpu_only else "gpu"
    tasks = slide.num_blocks / BLOCKS_PER_TASK[device]
    jobs_by_limit = {
        "driver": question.slides * tasks / rates["tasks"].value / work_s,
        "finishing": question.slides * slide.core_s["finish"] / MAX_FINISHING / work_s,
    }
    actors = _actors_per_gpu(slide)
    memory_gb, store_gb = _memory(question, slide, rates, actors_per_gpu=actors)
    jobs = max(1, math.ceil(max(jobs_by_limit.values()) - 1e-9))
    # Nodes may be faster than the drivers that feed them.
    busy_s = max(
        question.slides * node_s[binding] / nodes, max(jobs_by_limit.values()) / jobs * work_s
    )
    totals = {
        "lr_mpx": question.slides * slide.lr_mpx,
        "in_bytes": question.slides * slide.in_bytes,
        "out_bytes": question.slides * slide.out_bytes,
        "stored_bytes": question.slides * slide.stored_bytes,
        "puts": float(question.slides * slide.puts),
        "gets": float(question.slides * slide.gets),
        "deletes": float(question.slides * slide.deletes),
        "node_hours": nodes * question.hours,
    }
    deciding = {"gpu": ("engine",), "cores": tuple(slide.core_s)}.get(binding, ())
    kinds = {rates["engine" if name == "infer" else name].kind for name in deciding}
    return Plan(
        question=question,
        rates=rates,
        slide=slide,
        nodes=nodes,
        nodes_by_resource=by_resource,
        binding=binding,
        binding_stage=_stage_of(binding, slide),
        jobs=jobs,
        jobs_by_limit=jobs_by_limit,
        lr_mpx_per_s_per_node=slide.lr_mpx / node_s[binding],
        hours_needed=busy_s / question.utilization / 3600 + rates["start"].value / 3600,
        gpus=0 if question.cpu_only else nodes * question.gpus_per_node,
        cores=nodes * question.cores_per_node,
        cores_per_gpu=(
            {name: value / slide.gpu_s for name, value in slide.core_s.items()}
            if slide.gpu_s
            else {}
        ),
        actors_per_gpu=actors,
        node_memory_gb=memory_gb,
        object_store_gb=store_gb,
        in_gbit_per_s=totals["in_bytes"] * 8 / 1e9 / busy_s,
        out_gbit_per_s=totals["out_bytes"] * 8 / 1e9 / busy_s,
        puts_per_s=totals["puts"] / busy_s,
        gets_per_s=totals["gets"] / busy_s,
        totals=totals,
        costs=_costs(question.prices, totals),
        is_predicted="predicted" in kinds,
    )


def _stage_of(binding: str, slide: SlideDemand) -> str:
    if binding == "gpu":
        return "infer"
    if binding == "cores":
        return max(slide.core_s, key=lambda name: slide.core_s[name])
    return "read" if binding == "network in" else "upload"


def _actors_per_gpu(slide: SlideDemand) -> int:
    """Actors that share a GPU so that it is never idle; 0 without GPUs.

    The thread of an actor that infers a block also enlarges its background; its writers measure its
    consistency, encode and upload meanwhile.
    """
    if not slide.gpu_s:
        return 0
    written = sum(slide.core_s[name] for name in ("consistency", "encode", "upload"))
    inferred = slide.gpu_s + slide.core_s["enlarge"]
    return math.ceil(max(inferred, written / NUM_WRITERS) / slide.gpu_s - 1e-9)


def _memory(
    question: Question, slide: SlideDemand, rates: Mapping[str, Rate], *, actors_per_gpu: int
) -> tuple[float, float]:
    """GB of a node, and of its object store."""
    block_bytes = 3 * (slide.block_px / question.scale + 2 * HALO_PX) ** 2
    if question.cpu_only:
        # Two cores an actor; it reads for itself, and pixels cross no store.
        actors = max(1, question.cores_per_node // 2)
        needed_mb = actors * rates["actor_memory"].value + rates["daemon_memory"].value
        return needed_mb / 1e3, 0.0
    actors = actors_per_gpu * question.gpus_per_node
    readers = 2 * actors
    # What a reader has made, and what waits at an actor: a task each, and another on its way.
    store = 2 * (readers + actors) * BLOCKS_PER_TASK["gpu"] * block_bytes / 1e9
    needed_mb = (
        actors * rates["actor_memory"].value
        + readers * rates["reader_memory"].value
        + rates["daemon_memory"].value
    )
    return needed_mb / 1e3 + store, store


def _costs(prices: Prices, totals: Mapping[str, float]) -> dict[str, float]:
    moved = (totals["in_bytes"] + totals["out_bytes"]) / 1e9
    found = {
        "nodes": (prices.node_hour, totals["node_hours"]),
        "PUT requests": (prices.thousand_puts, totals["puts"] / 1000),
        "GET requests": (prices.thousand_gets, totals["gets"] / 1000),
        "storage, a month": (prices.gb_month, totals["stored_bytes"] / 1e9),
        "network": (prices.gb_moved, moved),
    }
    return {name: price * amount for name, (price, amount) in found.items() if price is not None}


# ---------------------------------------------------------------------------------- its words


def table(answer: Plan) -> str:
    """The answer for people."""
    question, slide, totals = answer.question, answer.slide, answer.totals
    width, height = slide.extent_px
    rows = [
        (
            "asked",
            f"{question.slides:,} slides in {question.hours:g} h, {question.model} x"
            f"{question.scale}{', self-ensemble' * question.self_ensemble}, "
            f"{'CPUs only' if question.cpu_only else question.gpu}",
        ),
        (
            "a slide",
            f"{width:,} x {height:,} px: {slide.inferred_mpx:,.0f} LR Mpx inferred, "
            f"{slide.enlarged_mpx:,.0f} enlarged, of {slide.lr_mpx:,.0f}; {slide.num_blocks:,} "
            f"blocks of {slide.block_px:,} SR px",
        ),
        (
            "a node",
            (f"{question.gpus_per_node} GPU, " if not question.cpu_only else "")
            + f"{question.cores_per_node} cores, {question.network_gbit:g} Gbit/s; at least "
            f"{answer.node_memory_gb:.0f} GB of memory, {answer.object_store_gb:.1f} of them "
            "object store",
        ),
        ("nodes", f"{answer.nodes:,}" + (f" ({answer.gpus:,} GPUs)" if answer.gpus else "")),
        ("binds", f"{answer.binding}, most of it to {answer.binding_stage}"),
        (
            "nodes by resource",
            ", ".join(f"{name} {need:.2f}" for name, need in answer.nodes_by_resource.items()),
        ),
        (
            "time",
            f"{answer.hours_needed:.1f} h, {answer.lr_mpx_per_s_per_node:.3g} LR Mpx/s of a node",
        ),
    ]
    if answer.cores_per_gpu:
        stages = ", ".join(f"{name} {cores:.1f}" for name, cores in answer.cores_per_gpu.items())
        rows += [
            ("cores a GPU keeps busy", f"{sum(answer.cores_per_gpu.values()):.1f}: {stages}"),
            (
                "actors a GPU",
                f"{answer.actors_per_gpu} (--gpus-per-actor {1 / answer.actors_per_gpu:.2g})",
            ),
        ]
    else:
        stages = ", ".join(f"{name} {seconds:,.0f}" for name, seconds in slide.core_s.items())
        rows.append(("core-seconds a slide", stages))
    rows += [
        (
            "jobs side by side",
            f"{answer.jobs} ("
            + ", ".join(f"{name} {need:.2f}" for name, need in answer.jobs_by_limit.items())
            + ")",
        ),
        (
            "network",
            f"in {totals['in_bytes'] / 1e12:,.2f} TB at {answer.in_gbit_per_s:.2f} Gbit/s, out "
            f"{totals['out_bytes'] / 1e12:,.2f} TB at {answer.out_gbit_per_s:.2f} Gbit/s",
        ),
        (
            "requests",
            f"PUT {totals['puts']:,.0f}, {answer.puts_per_s:,.0f}/s "
            f"({answer.puts_per_s / MAX_PUTS_PER_S:.1%} of a prefix's), GET {totals['gets']:,.0f}, "
            f"{answer.gets_per_s:,.0f}/s ({answer.gets_per_s / MAX_GETS_PER_S:.1%}), DELETE "
            f"{totals['deletes']:,.0f}",
        ),
        ("parts a slide", f"{slide.num_parts:,} of {MAX_PARTS:,}"),
        ("output", f"{totals['stored_bytes'] / 1e12:,.2f} TB"),
    ]
    rows += [(f"cost: {name}", f"{cost:,.2f}") for name, cost in answer.costs.items()]
    lines = [f"{name:24}{text}" for name, text in rows]
    lines += ["", "reckoned from"]
    lines += [
        f"  {name:16}{rate.value:>8.4g} {rate.unit:24}{rate.kind:10} {rate.source}"
        for name, rate in answer.rates.items()
    ]
    if answer.is_predicted:
        lines += ["", "What binds is PREDICTED, not measured: say --engine-mpx-per-s to be sure."]
    return "\n".join(lines)


@dataclass(frozen=True, kw_only=True)
class Command(Question):
    """How large a cluster a night of slides needs, and what binds."""

    json: bool = False
    """Print all of it as one JSON object instead."""


def main(command: Command) -> int:
    """Print the answer; returns the process's exit status."""
    content = {entry.name: getattr(command, entry.name) for entry in dataclasses.fields(Question)}
    answer = plan(Question(**content))
    print(answer.to_json() if command.json else table(answer))  # noqa: T201 - what it is for
    return 0


def cli(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line and answer."""
    return main(
        tyro.cli(
            Command,
            prog="python -m carn.capacity",
            args=arguments,
            config=(tyro.conf.OmitArgPrefixes,),
        )
    )


if __name__ == "__main__":
    sys.exit(cli())
