"""What has become of the slides of one run of super_resolve.py: counted, said, written down."""

import logging
import time
import uuid
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import numpy as np

from carn import storage
from carn.errors import StorageError
from carn.models.checkpoint import Checkpoint, checkpoint_hash
from carn.report.sr_records import STAGES, Pace, RunSummary, SlideLine, SlideSummary
from carn.report.sr_summary import RUNS, write_run
from carn.version import code_version
from jobs.metrics import meters
from jobs.sr_config import SuperResolveJob
from jobs.sr_stages import ProgressLines

# One line of JSON for each slide, when it has reached its final state; see SlideLine.
slide_logger = logging.getLogger("carn.slide")

# Points of the report's curve of throughput.
PACE_STEPS = 24
SLIDE_LINES = "slides.jsonl"


class Tally:
    """The slides of a run by name, and what the work on them has come to."""

    def __init__(self, job: SuperResolveJob, *, checkpoint: Checkpoint, output: str) -> None:
        """Nothing is known yet.

        Args:
            job: what was asked for.
            checkpoint: that slides are made with.
            output: folder or prefix of the slides, normalized.
        """
        self.job = job
        self.checkpoint = checkpoint
        self.output = output
        self.started = datetime.now().astimezone()
        self.run_id = f"{self.started.astimezone(UTC):%Y-%m-%dT%H-%M-%S}-{uuid.uuid4().hex[:4]}"
        self.slides: dict[str, SlideSummary] = {}
        # Bytes of the inputs.
        self.sizes: dict[str, int] = {}
        # Of the slides that have reached their final state.
        self.lines: dict[str, SlideLine] = {}
        self.retries: Counter[str] = Counter()
        self.pictures: dict[str, bytes] = {}
        self.stages: dict[str, float] = dict.fromkeys(STAGES, 0.0)
        self.num_actors = 0
        self.num_lr_px = 0
        self.working_seconds = 0.0
        self.actor_seconds = 0.0
        # (seconds since the start, LR px) of each block.
        self.made: list[tuple[float, int]] = []
        # When the first block was begun, in seconds since the epoch, by the clock of who did.
        self.first_began: float | None = None
        self.show = ProgressLines({}, every_s=job.run.progress_s)
        self.is_reported = True
        self._slide_stages: dict[str, Counter[str]] = {}

    def begin(self, names: Sequence[str]) -> None:
        """These slides are to be done."""
        sizes = {name: self.sizes.get(name, 0) for name in names}
        self.show = ProgressLines(sizes, every_s=self.job.run.progress_s)

    def block(self, name: str, facts: Mapping[str, Any], *, num_left: int, num_blocks: int) -> None:
        """Count a block of a slide that is on storage; facts as `run_blocks` gives them."""
        began = facts.get("began", time.time())
        self.first_began = min(self.first_began or began, began)
        spent = {stage: facts.get(stage, 0.0) for stage in STAGES}
        self._slide_stages.setdefault(name, Counter()).update(spent)
        for stage, stage_s in spent.items():
            self.stages[stage] += stage_s
        self.num_lr_px += facts["num_lr_px"]
        seconds = (datetime.now().astimezone() - self.started).total_seconds()
        self.made.append((seconds, facts["num_lr_px"]))
        self.show.block(
            name, num_left=num_left, num_blocks=num_blocks, num_lr_px=facts["num_lr_px"]
        )

    def wave(self, seconds: float, *, num_actors: int) -> None:
        """So many actors have been at work for so long."""
        self.working_seconds += seconds
        self.actor_seconds += seconds * num_actors
        self.num_actors = max(self.num_actors, num_actors)

    def set(self, name: str, **changes: Any) -> None:
        """Note something of a slide."""
        self.slides[name] = replace(self.slides[name], **changes)

    def end(self, name: str, **changes: Any) -> None:
        """Note what a slide has come to in this run, and say so."""
        self.set(name, **changes)
        self._say(name)
        self.show.end(name)

    def _say(self, name: str) -> None:
        if self.job.run.dry_run:
            return
        slide = self.slides[name]
        line = SlideLine.of(
            slide,
            time=datetime.now().astimezone().isoformat(timespec="milliseconds"),
            run_id=self.run_id,
            model=self.checkpoint.model_name,
            stages=self._slide_stages.pop(name, {}),
            bytes_in=self.sizes.get(name),
            retries=self.retries[name],
        )
        self.lines[name] = line
        slide_logger.info("%s", line)
        meters().add("carn_sr_slides_total", status=slide.status)
        meters().set("carn_sr_slides_left", len(self.slides) - len(self.lines))
        if slide.status == "done":
            meters().add("carn_sr_input_bytes_total", line.bytes_in or 0)
            meters().add("carn_sr_output_bytes_total", line.bytes_out or 0)

    def count(self, *statuses: str) -> int:
        """How many slides ended so."""
        return sum(slide.status in statuses for slide in self.slides.values())

    def conclude(self, stopped: str | None) -> str:
        """Write the run's summary and report; returns what to say of it.

        Args:
            stopped: why the run ended early; None where it did not.
        """
        for name in [name for name in self.slides if name not in self.lines]:
            self._say(name)  # it was stopped before this one
        summary = RunSummary(
            run_id=self.run_id,
            started=self.started.isoformat(timespec="seconds"),
            ended=datetime.now().astimezone().isoformat(timespec="seconds"),
            checkpoint=self.checkpoint.uri,
            checkpoint_hash=checkpoint_hash(self.checkpoint),
            model=self.checkpoint.model_name,
            scale=self.checkpoint.scale,
            output=self.output,
            code_version=code_version(),
            is_stopped=stopped,
            num_listed=len(self.slides),
            slides=tuple(self.slides.values()),
            stages=self.stages,
            busy_share=self.stages["infer_s"] / self.actor_seconds if self.num_lr_px else None,
            num_actors=self.num_actors,
            lr_mpx_per_s=self.num_lr_px / 1e6 / self.working_seconds if self.num_lr_px else None,
            config=self.job.settings(),
            pace=_pace(self.made),
            self_ensemble=self.job.engine.self_ensemble,
        )
        try:
            lines_uri = storage.join(self.output, RUNS, self.run_id, SLIDE_LINES)
            text = "".join(f"{line.to_json()}\n" for line in self.lines.values())
            storage.write_bytes(lines_uri, text.encode())
            report = write_run(self.output, summary, self.pictures)
        except (StorageError, ValueError) as error:
            # A full disk, a store that is down, a name that no file may have: what is known is said
            self.is_reported = False
            report = f"could not be written: {error}"
        lines = [
            f"{self.count('done'):,} slides super-resolved, {self.count('skipped'):,} done before, "
            f"{self.count('failed', 'conflict'):,} failed, "
            f"{self.count('unfinished', 'claimed'):,} left"
            + (f" (stopped: {stopped})" if stopped else ""),
            f"  output   {self.output}",
            f"  report   {report}",
        ]
        bad = [slide for slide in self.slides.values() if slide.status in ("failed", "conflict")]
        lines += [f"  failed   {slide.name}: {slide.reason}" for slide in bad[:5]]
        if len(bad) > 5:
            lines.append(f"           and {len(bad) - 5:,} more, in {report}")
        if self.count("unfinished"):
            lines.append("  the same command goes on from here")
        return "\n".join(lines)


def _pace(made: Sequence[tuple[float, int]]) -> Pace | None:
    """Throughput over the run, in PACE_STEPS stretches of it; of (seconds, LR px) of each block."""
    if len(made) < 2 * PACE_STEPS:
        return None
    edges = np.linspace(0, made[-1][0], PACE_STEPS + 1)
    seconds, px = zip(*made, strict=True)
    sums, _ = np.histogram(seconds, bins=edges, weights=px)
    return Pace(
        seconds=tuple(((edges[:-1] + edges[1:]) / 2).tolist()),
        lr_mpx_per_s=tuple((sums / 1e6 / np.diff(edges)).tolist()),
    )
