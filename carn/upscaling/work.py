"""The work on one slide, step by step: inspect it, make its blocks, finish it.

Every step may run in another process or on another machine, may be killed and done again, and finds
what the earlier ones left on storage. `jobs/super_resolve.py` spreads the steps over a cluster.
"""

import hashlib
import json
import logging
import time
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from carn import storage
from carn.errors import DamagedTileError, MissingObjectError, SlideError
from carn.models.checkpoint import load_model
from carn.slides.compression import read_compression
from carn.slides.slide import Rgb
from carn.slides.slide_output import OutputSpec, SlideOutput, open_output
from carn.slides.tiff_output import MAX_BLOCKS
from carn.upscaling.blocks import (
    BlockRegion,
    LrBlock,
    block_consistency,
    block_region,
    read_block,
    upscale_block,
)
from carn.upscaling.calibration import Calibration, calibrate
from carn.upscaling.engine import Engine, EngineConfig, make_engine, reference_engine
from carn.upscaling.lr_view import LrView, open_view
from carn.upscaling.showing import choose_show, jpeg, shown_facts
from carn.upscaling.suitability import file_warnings
from carn.upscaling.task import SlidePlan, SlideTask
from carn.upscaling.telling import tell
from carn.upscaling.windows import TissueCells

logger = logging.getLogger(__name__)

# An engine this far from fp32 on a slide's own tissue is not used for it.
MIN_ACCURACY_DB = 60.0
# Longer side of the picture of the LR slide in the report.
THUMBNAIL_PX = 1024
# Names in a slide's work folder.
ICC_NAME, THUMBNAIL_NAME = "source.icc", "source.jpg"
# Slides whose header, cells and calibration a process keeps at hand.
MAX_OPEN = 4


def inspect(task: SlideTask) -> SlidePlan:
    """Look at a slide, begin its output, and find what is left to do.

    Raises:
        CarnError: it cannot be opened, does not say its MPP, or the output cannot be begun.
    """
    check_identity(task)
    with closing(open_view(task.uri, task.input, is_image=task.is_image)) as view:
        scale = task.scale
        extent = (view.extent[0] * scale, view.extent[1] * scale)
        block_px = task.block_px
        while -(-extent[0] // block_px) * -(-extent[1] // block_px) > MAX_BLOCKS:
            block_px *= 2
        spec = OutputSpec(
            uri=task.output_uri,
            work_uri=task.work_uri,
            extent=extent,
            block_px=block_px,
            mpp=view.mpp and (view.mpp[0] / scale, view.mpp[1] / scale),
            provenance=task.provenance(),
            format=task.format.fitting(extent),
        )
        cells = (
            None
            if task.pixels.background == "infer"
            else TissueCells.of(view, halo_px=task.halo_px)
        )
        if cells is not None:
            storage.write_bytes(storage.join(task.work_uri, "cells.npz"), cells.to_bytes())
        view.slide.check_level(view.level)
        output = open_output(spec)
        output.begin()
        thumbnail = _keep_looks(view, task)
        done = output.done_blocks()
        show, show_cell = choose_show(
            cells, extent_lr=view.extent, block_px=block_px, scale=scale, thumbnail=thumbnail
        )
        compression = read_compression(view.slide, level=view.level)
        return SlidePlan(
            task=task,
            spec=spec,
            lr_extent=view.extent,
            mpp=view.mpp,
            downsample=view.downsample,
            l0_extent=view.slide.extent,
            num_blocks=output.num_blocks,
            done=tuple(sorted(done)),
            tissue_share=1.0 if cells is None else float(cells.cells.mean()),
            compression=str(compression),
            notes=view.slide.notes,
            foreign_levels=tuple(sorted(view.slide.foreign_levels)),
            warnings=file_warnings(
                task.trained,
                compression=compression,
                mpp=view.mpp,
                mpp_range=task.input.mpp_range,
            ),
            show=show,
            show_cell=show_cell,
        )


def _keep_looks(view: LrView, task: SlideTask) -> Rgb | None:
    """Keep what the last step needs of the input: it may run where the slide would be fetched.

    Returns:
        The slide made small; None where it is too damaged for that.
    """
    if view.icc_profile is not None:
        storage.write_bytes(storage.join(task.work_uri, ICC_NAME), view.icc_profile)
    try:
        thumbnail = view.slide.thumbnail(THUMBNAIL_PX)
    except DamagedTileError:  # said of the slide in time, where it matters
        return None
    storage.write_bytes(storage.join(task.work_uri, THUMBNAIL_NAME), jpeg(thumbnail))
    return thumbnail


def kept_look(plan: SlidePlan, name: str) -> bytes | None:
    """What `inspect` kept of the input under a name; None where there was nothing to keep."""
    try:
        return storage.read_bytes(storage.join(plan.task.work_uri, name))
    except MissingObjectError:
        return None


@dataclass
class _Open:
    """A slide a process works on."""

    view: LrView
    cells: TissueCells | None
    output: SlideOutput
    calibration: Calibration | None = None


class BlockMaker:
    """Makes blocks of slides in one process; keeps the network and the last few slides at hand."""

    def __init__(self, config: EngineConfig, *, num_writers: int = 2) -> None:
        """Load nothing yet.

        Args:
            config: of the engine.
            num_writers: threads that encode and upload while the next block is inferred.
        """
        self._config = config
        self._writers = ThreadPoolExecutor(num_writers, thread_name_prefix="write")
        self._open: dict[str, _Open] = {}
        self._engines: dict[str, tuple[nn.Module, Engine, Engine]] = {}
        self._current = ""

    def read(self, plan: SlidePlan, index: int) -> LrBlock:
        """The LR pixels of a block with their surroundings.

        Raises:
            CarnError: they cannot be read.
        """
        return read_block(
            self._opened(plan).view,
            region_of(plan, index),
            on_damage=plan.task.input.on_damaged_tile,
        )

    def has_calibration(self, plan: SlidePlan) -> bool:
        """Whether the slide's calibration is known here, or found on storage now."""
        opened = self._opened(plan)
        if opened.calibration is None:
            _, engine, _ = self._networks(plan)
            try:
                content = storage.read_bytes(calibration_uri(plan, engine.description))
            except MissingObjectError:
                return False
            opened.calibration = Calibration.from_bytes(content)
        return True

    def calibrate(self, plan: SlidePlan) -> None:
        """Work the slide's calibration out, and leave it on storage for the others."""
        opened = self._opened(plan)
        model, engine, _ = self._networks(plan)
        found = calibrate(
            opened.view,
            model,
            engine,
            tissue=opened.cells,
            seed=plan.task.pixels.seed,
            pools=plan.task.pixels.pooling == "slide",
        )
        if found.accuracy_db < MIN_ACCURACY_DB:
            logger.warning(
                "%s: %s is %.1f dB from fp32 on its tissue; it is done in fp32",
                plan.task.name,
                engine.description,
                found.accuracy_db,
            )
        storage.write_bytes(calibration_uri(plan, engine.description), found.to_bytes())
        opened.calibration = found
        self._current = ""  # the engine was tried out with others

    def begin_block(
        self, plan: SlidePlan, index: int, read: LrBlock | None = None
    ) -> tuple[Future[dict[str, Any]], dict[str, Any]]:
        """Super-resolve a block, and begin to put it on storage.

        Args:
            plan: the slide, calibrated.
            index: of the block.
            read: what `read` gave, where another process has read it.

        Returns:
            The upload, which gives its share of the facts, and the facts known so far: seconds by
            stage and LR px.

        Raises:
            CarnError: the block cannot be read or inferred.
        """
        facts: dict[str, Any] = {}
        started = time.perf_counter()
        if read is None:
            read = self.read(plan, index)
            facts["read_s"] = time.perf_counter() - started
        started = time.perf_counter()
        opened = self._opened(plan)
        engine = self._engine(plan)
        result = upscale_block(read, engine, tissue=opened.cells)
        facts["infer_s"] = time.perf_counter() - started
        facts["num_lr_px"] = result.num_inferred_px + result.num_background_px
        record: dict[str, Any] = {
            "num_inferred_px": result.num_inferred_px,
            "num_background_px": result.num_background_px,
            "damage": json.dumps([asdict(item) for item in result.damage]),
            "engine": engine.description,
        }
        record |= shown_facts(plan, index, read, result.pixels)
        output = opened.output

        def write() -> dict[str, Any]:
            seconds: dict[str, float] = {}
            started = time.perf_counter()
            record["consistency"] = block_consistency(read, result.pixels)
            checked = time.perf_counter() - started
            num_bytes = output.write_block(index, result.pixels, facts=record, seconds=seconds)
            seconds["encode_s"] = seconds.get("encode_s", 0.0) + checked
            return {**seconds, "num_bytes": num_bytes}

        return self._writers.submit(write), facts

    def _opened(self, plan: SlidePlan) -> _Open:
        key = plan.task.work_uri
        if key not in self._open:
            check_identity(plan.task)
            while len(self._open) >= MAX_OPEN:
                self._open.pop(next(iter(self._open))).view.close()
            cells = None
            if plan.task.pixels.background != "infer":
                content = storage.read_bytes(storage.join(plan.task.work_uri, "cells.npz"))
                cells = TissueCells.from_bytes(content)
            view = open_view(plan.task.uri, plan.task.input, is_image=plan.task.is_image)
            view.slide.foreign_levels.update(plan.foreign_levels)
            self._open[key] = _Open(
                view=view,
                cells=cells,
                output=open_output(plan.spec),
            )
        return self._open[key]

    def _networks(self, plan: SlidePlan) -> tuple[nn.Module, Engine, Engine]:
        """The network, the engine that runs it, and the one that is right by definition."""
        key = json.dumps([plan.task.checkpoint_hash, dict(plan.task.told)])
        if key not in self._engines:
            # On the engine's device: pooling and the reference are computed where the model lies.
            device = "cuda" if self._config.device == "cuda" else "cpu"
            model = load_model(plan.task.checkpoint, device=device, expect_scale=plan.task.scale)
            tell(model, plan.task.told, network=plan.task.checkpoint)
            engine = make_engine(model, self._config)
            reference = reference_engine(model, self_ensemble=engine.self_ensemble)
            self._engines[key] = model, engine, reference
        return self._engines[key]

    def _engine(self, plan: SlidePlan) -> Engine:
        calibration = self._opened(plan).calibration
        assert calibration is not None
        _, fast, reference = self._networks(plan)
        # Not a number where nothing could be tried: bf16's networks are those known to be exact.
        engine = reference if calibration.accuracy_db < MIN_ACCURACY_DB else fast
        if self._current != plan.task.work_uri:
            engine.set_pooling(calibration.pooling)
            self._current = plan.task.work_uri
        return engine


def calibration_uri(plan: SlidePlan, engine: str) -> str:
    """What the slide's poolings were frozen at, and how exact one kind of engine is on it.

    Args:
        plan: the slide.
        engine: its description; "" for what the names of all begin with.
    """
    digest = hashlib.sha256(engine.encode()).hexdigest()[:8] if engine else ""
    return storage.join(plan.task.work_uri, f"calibration-{digest}")


def check_identity(task: SlideTask) -> None:
    """Make sure that the input is still what it was when it was listed.

    Raises:
        SlideError: it was replaced.
        StorageError: it cannot be read.
    """
    if storage.identity(task.uri) != task.identity:
        raise SlideError(task.uri, "was replaced while it was worked on; the next run begins anew")


def region_of(plan: SlidePlan, index: int) -> BlockRegion:
    """Where a block of a slide lies, and what is read for it."""
    return block_region(
        plan.spec.extent,
        block_px=plan.spec.block_px,
        index=index,
        scale=plan.task.scale,
        halo_px=plan.task.halo_px,
    )
