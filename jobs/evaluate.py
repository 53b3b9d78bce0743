"""The paper's Table 2 and Figures 4 and 5 on a bcSR dataset: checkpoints in, tables and a page out.

Scores of each tile are kept as they are made: the same command goes on where it stopped, and with
more runs scores only those. Bicubic interpolation is always among the models.

Examples:
  python jobs/evaluate.py --dataset bcsr/ --runs runs/ --output evaluation/
  python jobs/evaluate.py --dataset bcsr/ --runs runs/carn-x2-seed1 runs/edsr-x2-seed1
  python jobs/evaluate.py --dataset bcsr/ --runs runs/ --conditions all
  python jobs/evaluate.py --dataset bcsr/ --runs runs/ --removed bcsr_removed/ --max-removed 100
  ray job submit --working-dir . -- python jobs/evaluate.py --dataset s3://lab/bcsr \
      --runs s3://lab/runs --output s3://lab/evaluation --gpus-per-task 0.5
"""

import logging
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

# `python jobs/evaluate.py` puts jobs/ on the path, not the folder that holds carn/ and jobs/.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import pyarrow as pa
import ray
import torch
import tyro

from carn import storage
from carn.bcsr.dataset import BcsrDataset, open_dataset
from carn.degradation.bicubic import SCALES
from carn.degradation.conditions import DEFAULT, describe, read_conditions
from carn.degradation.scanner import Degradation
from carn.errors import CarnError, DatasetError
from carn.evaluation.crops import CropStrip, choose_tiles
from carn.evaluation.lpips import load_lpips
from carn.evaluation.scoring import Protocol
from carn.evaluation.study import (
    Entrant,
    Measure,
    Stretch,
    bicubic,
    crop_uri,
    cut_crop,
    describe_unfinished,
    find_entrants,
    find_removed,
    is_split_at_random,
    judged,
    note_took,
    read_crop,
    read_scores,
    read_timing,
    read_took,
    score_stretch,
    score_uri,
    stretches,
    time_entrant,
    timing_uri,
)
from carn.evaluation.timing import Timing
from carn.log_lines import start_logging
from carn.processor import KEEPING_ENVIRONMENT, keep_freed_memory
from carn.report.evaluation_summary import Scored, group_seeds, write_evaluation
from carn.report.page import plural
from carn.training.tiles import dataset_digest
from carn.version import code_version
from jobs.ray_stage import ClusterError, progress, start_ray
from jobs.stopping import stopped_by_sigterm
from jobs.trainer import failure_text

logger = logging.getLogger("evaluate")

# Times that a part whose process died is done again.
MAX_RETRIES = 2


@dataclass(frozen=True, kw_only=True)
class ScoreConfig:
    """What is scored, and how."""

    split: Literal["test", "validation", "train"] = "test"
    """The tiles of the dataset that count."""
    protocol: Protocol = "aligned"
    """How LR is made: `aligned`, of HR cropped to a multiple of the scale; `misaligned`, as the
    paper's x3, off by up to a pixel where the scale does not divide."""
    conditions: tuple[str, ...] = tuple(DEFAULT)
    """Ways to make LR that each model is scored under, over bicubic interpolation of the same LR:
    names such as jpeg80-420, `all` for every known one, or .yaml files with a way's fields by its
    name. The tables and crops are of the first, but for the table of conditions."""
    max_tiles: int | None = None
    """Tiles that are scored, spread evenly over the split; None for all."""
    scales: tuple[int, ...] = ()
    """Scales that bicubic is scored at beside those of the runs."""
    removed: str | None = None
    """A second dataset, of tiles that the filter or the ranking removed: CARN is scored on the test
    tiles and these as well, the paper's CARN*. Of slides that the dataset has in training or
    validation none count, unless it was split at random, as the paper's was."""
    max_removed: int | None = None
    """Tiles of it that count; the paper does not say how many. None for all."""
    lpips_alexnet: str | None = None
    """AlexNet's weights (torchvision's state dict, a path or s3:// URI), to measure LPIPS with."""
    lpips_linear: str | None = None
    """LPIPS's own weights (v0.1, alex), likewise."""

    def __post_init__(self) -> None:
        for name in ("max_tiles", "max_removed"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} must be at least 1")
        if not self.conditions:
            raise ValueError("conditions names none; leave it out for bicubic LR")
        if self.protocol == "misaligned" and self.conditions != tuple(DEFAULT):
            raise ValueError(
                f"protocol='misaligned' goes with the bicubic condition alone, not with "
                f"{', '.join(self.conditions)}; leave out --conditions, or use 'aligned'"
            )
        if unknown := set(self.scales) - set(SCALES):
            raise ValueError(
                f"scales={sorted(unknown)} are not among {', '.join(map(str, SCALES))}"
            )
        if (self.lpips_alexnet is None) != (self.lpips_linear is None):
            raise ValueError("LPIPS needs both --lpips-alexnet and --lpips-linear")


@dataclass(frozen=True, kw_only=True)
class FiguresConfig:
    """What is made besides the table."""

    timing: bool = True
    """Time each model (Figure 4), with a machine's CPUs or a GPU to itself."""
    timing_repeats: int = 20
    """Passes that are timed."""
    timing_seconds: float = 60.0
    """No pass of a model begins after that long."""
    crops: int = 6
    """Places shown (Figure 5), for each scale, where the models differ most; 0 for none."""

    def __post_init__(self) -> None:
        if self.timing_repeats < 3:
            raise ValueError(f"timing_repeats={self.timing_repeats} must be at least 3")
        if self.crops < 0:
            raise ValueError(f"crops={self.crops} must not be negative")


@dataclass(frozen=True, kw_only=True)
class TasksConfig:
    """What a part of the work has of the cluster."""

    cpus_per_task: float = 1.0
    """CPUs of a task, and its threads."""
    gpus_per_task: float | None = None
    """GPUs of a task, such as 0.5; None for one where the cluster has any."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto`: GPUs where there are any."""
    progress_s: float = 10.0
    """Seconds between two lines of progress in the log."""

    def __post_init__(self) -> None:
        if not self.cpus_per_task > 0:
            raise ValueError(f"cpus_per_task={self.cpus_per_task} must be positive")
        if self.gpus_per_task is not None and not self.gpus_per_task >= 0:
            raise ValueError(f"gpus_per_task={self.gpus_per_task} must not be negative")


@dataclass(frozen=True, kw_only=True)
class EvaluateJob:
    """What `evaluate.py` is asked to do."""

    dataset: str
    """Folder or s3:// prefix of a finished bcSR dataset."""
    runs: tuple[str, ...] = ()
    """Training runs, checkpoints, weights files, names of networks that come with the project
    (carn-x2), or folders of runs, of which the finished ones count."""
    output: str = "evaluation"
    """Folder or s3:// prefix of the evaluation, which all nodes must share."""
    score: ScoreConfig
    figures: FiguresConfig
    tasks: TasksConfig

    def __post_init__(self) -> None:
        storage.normalize(self.dataset)
        if "RAY_ADDRESS" in os.environ and self.output == "evaluation":
            raise ValueError(
                "say with --output where the evaluation is to be kept: on a cluster the folder "
                "that the job starts in is thrown away"
            )


def main(job: EvaluateJob) -> int:
    """Evaluate; returns the process's exit status."""
    start_logging()
    logging.getLogger("botocore").setLevel(logging.WARNING)  # it would say where keys come from
    evaluation = Evaluation(job)
    evaluation.prepare()
    print(evaluation.run(), flush=True)
    return 1 if evaluation.failures else 0


@dataclass(frozen=True, kw_only=True)
class Part:
    """A part of the work: a call that leaves its result at a place, unless it is there."""

    uri: str
    name: str
    call: Callable[..., bytes]
    arguments: tuple[Any, ...]
    options: dict[str, Any]


class Evaluation:
    """One run of the job."""

    def __init__(self, job: EvaluateJob) -> None:
        self.job = job
        self.output = storage.normalize(job.output).rstrip("/")
        self.failures: list[str] = []
        self.device = "cpu"
        self.machine = ""
        self._resources: dict[str, float] = {}
        self._node_cpus = 1.0
        self._started = time.monotonic()
        # What earlier runs of this evaluation took, and on what machine the last of them was.
        self._took_before, self._machine_before = 0.0, ""
        self._has_worked = False

    def prepare(self) -> None:
        """Find out before anything is started what there is to score.

        Raises:
            CarnError, ValueError: there is nothing, or it does not go together.
        """
        score = self.job.score
        self.conditions = read_conditions(score.conditions)
        self.dataset = _opened(self.job.dataset, score.split)
        self.entrants, unfinished = find_entrants(self.job.runs)
        self.left_out = [describe_unfinished(entrant) for entrant in unfinished]
        scales = sorted({entrant.scale for entrant in self.entrants} | set(score.scales))
        if not scales:
            raise ValueError("nothing to score: name --runs, or --scales for bicubic alone")
        self.entrants += [bicubic(scale) for scale in scales]
        lpips = None
        if score.lpips_alexnet is not None and score.lpips_linear is not None:
            lpips = (storage.normalize(score.lpips_alexnet), storage.normalize(score.lpips_linear))
            load_lpips(alexnet=lpips[0], linear=lpips[1])  # or every part would fail for them
        self.measure = Measure(
            dataset=self.dataset.uri,
            split=score.split,
            protocol=score.protocol,
            max_tiles=score.max_tiles,
            lpips=lpips,
            way=next(iter(self.conditions.values())),
        )
        self.digest = dataset_digest(self.dataset)
        self.stretches = stretches(self.dataset.num_tiles(score.split), max_tiles=score.max_tiles)
        self.removed: BcsrDataset | None = None
        self.removed_stretches: list[Stretch] = []
        self.num_seen = 0
        if score.removed is not None:
            self.removed = _opened(score.removed, "test")
            self.removed_stretches = self._find_removed(self.removed)
        self._took_before, self._machine_before = read_took(self.output)
        storage.write_bytes(storage.join(self.output, "begun"), code_version().encode())

    def _find_removed(self, removed: BcsrDataset) -> list[Stretch]:
        """The tiles of the second dataset that CARN* is scored on, see `find_removed`."""
        others, self.num_seen = find_removed(self.dataset, removed)
        if self.num_seen:
            logger.warning("left out of CARN*: %s", self._said_of_seen(removed))
        if not others and self.num_seen:
            raise DatasetError(
                f"nothing of {removed.uri} is left for CARN*: {self._said_of_seen(removed)}; build "
                "it with the test slides of the first dataset alone"
            )
        if not others:
            raise DatasetError(
                f"every test tile of {removed.uri} is in {self.dataset.uri} already: --removed is "
                "for tiles that its filter or ranking left out"
            )
        chosen = stretches(len(others), max_tiles=self.job.score.max_removed)
        return [Stretch(tiles=tuple(others[n] for n in item.tiles)) for item in chosen]

    def _said_of_seen(self, removed: BcsrDataset) -> str:
        return (
            f"{plural(self.num_seen, 'test tile')} of {removed.uri} {_is(self.num_seen)} of slides "
            f"that {self.dataset.uri} has in training or validation"
        )

    def run(self) -> str:
        """Score, time and cut crops; write the tables and the page. Returns what to say."""
        parts = self._scoring()
        missing = [part for part in parts if not storage.is_file(part.uri)]
        logger.info(
            "%s of scores to make, %d made before",
            plural(len(missing), "part"),
            len(parts) - len(missing),
        )
        self._start()
        self._do(parts, "scoring")
        scored = self._collected()
        crops = self._crops(scored)
        timings = self._timings()
        self._note_took()
        facts = {
            "dataset_uri": self.dataset.uri,
            "dataset_digest": self.digest,
            "code_version": code_version(),
            "seconds": self._took(),
            "machine": self.machine if self._has_worked else self._machine_before or self.machine,
            "notes": self._notes(),
            "settings": asdict(self.job),
        }
        return write_evaluation(
            self.output,
            scored=scored,
            timings=timings,
            crops=crops,
            facts=facts,
            failures=self.failures,
            left_out=self.left_out,
            conditions=self.conditions,
        )

    def _took(self) -> float:
        """Seconds so far, earlier runs of this evaluation with them.

        One that found nothing to do took none: the scores are no more expensive for it.
        """
        own = time.monotonic() - self._started if self._has_worked else 0.0
        return self._took_before + own

    def _note_took(self) -> None:
        if self._has_worked:
            note_took(self.output, seconds=self._took(), machine=self.machine)

    def _start(self) -> None:
        """Connect to Ray, and choose what a task has of it."""
        logger.info("starting Ray, or connecting to it")
        start_ray()
        list_nodes: Any = ray.nodes
        nodes = [node["Resources"] for node in list_nodes() if node["Alive"]]
        cpus, gpus = (sum(node.get(name, 0.0) for node in nodes) for name in ("CPU", "GPU"))
        wanted = self.job.tasks
        if wanted.device == "cuda" and not gpus:
            raise ClusterError("a GPU was asked for, and the cluster has none; use --device cpu")
        is_cuda = wanted.device != "cpu" and gpus > 0
        self.device = "cuda" if is_cuda else "cpu"
        share = 1.0 if wanted.gpus_per_task is None else wanted.gpus_per_task
        self._resources = {"num_cpus": wanted.cpus_per_task, "num_gpus": share * is_cuda}
        self._node_cpus = max(node.get("CPU", 0.0) for node in nodes)
        if self._node_cpus < wanted.cpus_per_task:
            raise ClusterError(
                f"no node has the {wanted.cpus_per_task:g} CPUs of a task; lower --cpus-per-task"
            )
        self.machine = f"{plural(len(nodes), 'node')}, {cpus:g} CPUs, {gpus:g} GPUs"

    # ------------------------------------------------------------------------------- the parts

    def _scoring(self) -> list[Part]:
        """What scores are made of; CARN also on removed tiles."""
        parts = [
            self._score_part(entrant, self.dataset, replace(self.measure, way=way), stretch)
            for entrant in self.entrants
            for way in self.conditions.values()
            for stretch in self.stretches
        ]
        if self.removed is not None:
            parts += [
                self._score_part(entrant, self.removed, self._removed_measure(), stretch)
                for entrant in self._starred()
                for stretch in self.removed_stretches
            ]
        # Conditions that differ in their names alone are one.
        return list({part.uri: part for part in parts}.values())

    def _score_part(
        self, entrant: Entrant, dataset: BcsrDataset, measure: Measure, stretch: Stretch
    ) -> Part:
        return Part(
            uri=self._score_uri(entrant, dataset, measure, stretch),
            name=f"{entrant.checkpoint or 'bicubic'} x{entrant.scale}{self._under(measure.way)}",
            call=score_stretch,
            arguments=(entrant, dataset, stretch),
            options={"measure": measure},
        )

    def _under(self, way: Degradation) -> str:
        """Name the condition of a part, where there are several."""
        names = [name for name, known in self.conditions.items() if known == way]
        return f" under {names[0]}" if len(self.conditions) > 1 else ""

    def _score_uri(
        self, entrant: Entrant, dataset: BcsrDataset, measure: Measure, stretch: Stretch
    ) -> str:
        digest = measure.digest(dataset_digest(dataset))
        return score_uri(self.output, entrant, stretch, measure=digest)

    def _removed_measure(self) -> Measure:
        assert self.removed is not None
        return Measure(
            dataset=self.removed.uri,
            split="test",
            protocol=self.measure.protocol,
            max_tiles=None,
            lpips=self.measure.lpips,
            way=self.measure.way,
        )

    def _starred(self) -> list[Entrant]:
        return [item for item in self.entrants if item.key == "carn" and not item.variant]

    def _collected(self) -> list[Scored]:
        """The scores of every entrant that has all of them under the first condition."""
        scores, starred = [], []
        for entrant in self.entrants:
            table = self._table(entrant, self.dataset, self.measure, self.stretches)
            if table is None:
                continue
            scores.append((entrant, table))
            if self.removed is not None and entrant in self._starred():
                more = self._table(
                    entrant, self.removed, self._removed_measure(), self.removed_stretches
                )
                if more is not None:
                    starred.append((entrant, pa.concat_tables([table, more])))
        if not scores:
            raise CarnError(f"nothing could be scored: {'; '.join(self.failures[:3])}")
        under = {
            name: {
                entrant: table
                for entrant, _ in scores
                for table in [self._table(entrant, self.dataset, measure, self.stretches)]
                if table is not None
            }
            for name, way in list(self.conditions.items())[1:]
            for measure in [replace(self.measure, way=way)]
        }
        return group_seeds(scores, under=under) + group_seeds(starred, is_star=True)

    def _table(
        self, entrant: Entrant, dataset: BcsrDataset, measure: Measure, parts: Sequence[Stretch]
    ) -> pa.Table | None:
        tables = [
            read_scores(self._score_uri(entrant, dataset, measure, stretch)) for stretch in parts
        ]
        found = [table for table in tables if table is not None]
        return pa.concat_tables(found) if found and len(found) == len(tables) else None

    def _crops(self, scored: Sequence[Scored]) -> list[CropStrip]:
        """Figure 5, of the first seed of each model."""
        strips, parts = [], []
        if not self.job.figures.crops:
            return []
        ids = self.dataset.table(self.job.score.split)["tile_id"].to_pylist()
        measure = self.measure.digest(self.digest)
        for scale in sorted({entrant.scale for entrant in self.entrants}):
            here = [i for i in scored if i.entrants[0].scale == scale and i.variant != "*"]
            if len(here) < 2:
                continue
            shown = {item.title: item.entrants[0] for item in here}
            deciding = judged(shown)
            tables = {item.title: item.tables for item in here if item.title in deciding}
            for tile_id in choose_tiles(tables, n=self.job.figures.crops):
                tile = ids.index(tile_id)
                parts.append(
                    Part(
                        uri=crop_uri(self.output, shown, tile, measure=measure),
                        name=f"crop of {tile_id} x{scale}",
                        call=cut_crop,
                        arguments=(shown, self.dataset, tile),
                        options={"measure": self.measure},
                    )
                )
        self._do(parts, "crops")
        for part in parts:
            strip = read_crop(part.uri)
            if strip is not None:
                strips.append(strip)
        return strips

    def _timings(self) -> list[tuple[Entrant, Timing]]:
        """Figure 4: one of the seeds of each network, one after another, undisturbed."""
        figures = self.job.figures
        if not figures.timing:
            return []
        ones = {(e.key, e.scale, e.architecture): e for e in reversed(self.entrants)}
        kind = f"{self.device}, {self._node_cpus:g} CPUs"
        options: Any = {
            "repeats": figures.timing_repeats,
            "max_seconds": figures.timing_seconds,
        }
        timed = [(e, timing_uri(self.output, e, machine=kind, **options)) for e in ones.values()]
        for entrant, uri in timed:
            part = Part(
                uri=uri,
                name=f"timing of {entrant.title} x{entrant.scale}",
                call=time_entrant,
                arguments=(entrant,),
                options=options,
            )
            self._do([part], f"timing {entrant.title} x{entrant.scale}", is_alone=True)
        found = [(entrant, read_timing(uri)) for entrant, uri in timed]
        return [(entrant, timing) for entrant, timing in found if timing is not None]

    def _do(self, parts: Sequence[Part], name: str, *, is_alone: bool = False) -> None:
        """Do the parts that are not done, over the cluster; what fails is noted."""
        open_parts = [part for part in parts if not storage.is_file(part.uri)]
        if not open_parts:
            return
        resources = self._resources
        if is_alone:
            is_cuda = self.device == "cuda"
            # All of a machine's CPUs: nothing else of this cluster runs beside it.
            resources = {"num_cpus": 1.0 if is_cuda else self._node_cpus, "num_gpus": 1.0 * is_cuda}
        threads = max(1, int(resources["num_cpus"]))
        self._has_worked = True
        started = said = time.monotonic()
        to_first = 0.0
        for number, (part, reason) in enumerate(
            _done(open_parts, device=self.device, threads=threads, resources=resources), start=1
        ):
            if reason is not None:
                logger.warning("%s: %s", part.name, reason)
                if f"{part.name}: {reason}" not in self.failures:
                    self.failures.append(f"{part.name}: {reason}")
            now = time.monotonic()
            to_first = to_first or now - started
            if now - said >= self.job.tasks.progress_s or number == len(open_parts):
                said = now
                self._note_took()
                text = progress(
                    number, len(open_parts), seconds=now - started, seconds_to_first=to_first
                )
                logger.info("%s: %s", name, text)

    def _notes(self) -> list[str]:
        """What a reader has to know of how the numbers came about."""
        notes = self._notes_of_conditions()
        others = [
            entrant
            for entrant in self.entrants
            if entrant.checkpoint is not None and entrant.trained_on != self.digest
        ]
        if others:
            names = ", ".join(sorted({f"{e.title} x{e.scale}" for e in others}))
            notes.append(
                f"{names}: trained on another dataset or an unknown one; whether that held these "
                "tiles is not known here."
            )
        if is_split_at_random(self.dataset):
            notes.append(
                "The dataset was split at random, as in the paper: tiles of one slide are in "
                "training and test, and may overlap. Scores are too good by an unknown amount."
            )
        if self.job.score.split != "test":
            notes.append(f"Scored on the {self.job.score.split} split, not on the test split.")
        if self.job.score.protocol == "misaligned":
            notes.append(
                "LR is made as the paper's x3: where the scale does not divide a tile's side, SR "
                "is off HR by up to a pixel, and every score is lower for it."
            )
        elif any(entrant.scale == 3 for entrant in self.entrants):
            notes.append(
                "At ×3 LR and HR are aligned here. The paper does not say so, but its ×3 scores "
                "are most likely of LR that is off by up to a pixel (nothing else explains how "
                "little they lie above ×4), and lower for it: --protocol misaligned is like them."
            )
        if self.removed is not None:
            count = sum(len(stretch.tiles) for stretch in self.removed_stretches)
            notes.append(
                f"CARN*: the test tiles and {count} of {self.removed.uri} that are in no split."
                + (f" Left out: {self._said_of_seen(self.removed)}." if self.num_seen else "")
            )
            if is_split_at_random(self.dataset):
                notes.append(
                    "CARN*: tiles of slides that are in training count, too, as they do among the "
                    "test tiles of a random split."
                )
        return notes

    def _notes_of_conditions(self) -> list[str]:
        """Say what LR the tables are of, where it is not bicubic alone."""
        (first, way), *others = self.conditions.items()
        is_bicubic = way == Degradation()
        if not others and is_bicubic:
            return []
        made = "bicubic LR" if is_bicubic else f"LR made as {first} ({describe(way)})"
        note = f"Scores, differences, tiles and crops are of {made}."
        if others:
            note += " How the models do on other LR is in the table of conditions."
        if not is_bicubic:
            note += " The paper's numbers are of bicubic LR."
        return [note]


def _is(number: int) -> str:
    return "is" if number == 1 else "are"


def _opened(uri: str, split: str) -> BcsrDataset:
    dataset = open_dataset(uri)
    if not dataset.num_tiles(split):
        raise DatasetError(f"{dataset.uri} has no {split} tiles to score")
    return dataset


def _done(
    parts: Sequence[Part], *, device: str, threads: int, resources: dict[str, float]
) -> Iterator[tuple[Part, str | None]]:
    """Do parts as Ray tasks; yields each as it ends, with why it failed or None."""
    do_part: Any = _do_part  # Ray's annotation of what it calls leaves keyword arguments out
    call: Any = ray.remote(do_part).options(
        max_retries=MAX_RETRIES,
        runtime_env={"env_vars": dict(KEEPING_ENVIRONMENT)},
        num_cpus=resources["num_cpus"],
        num_gpus=resources["num_gpus"],
    )
    running = {call.remote(part, device=device, threads=threads): part for part in parts}
    while running:
        (reference,), _ = ray.wait(list(running), num_returns=1)
        part = running.pop(reference)
        try:
            reason = ray.get(reference)
        except ray.exceptions.RayTaskError as error:
            # Raised by the part itself, and so not tried again.
            reason = failure_text(error)
        except ray.exceptions.RayError as error:
            reason = f"its process died {MAX_RETRIES + 1} times: {str(error).splitlines()[0]}"
        yield part, reason


def _do_part(part: Part, *, device: str, threads: int) -> str | None:
    """Leave the result of a part at its place; why it failed, or None."""
    torch.set_num_threads(threads)
    if device == "cpu":
        keep_freed_memory()
    try:
        storage.write_bytes(part.uri, part.call(*part.arguments, **part.options, device=device))
    except (CarnError, ValueError) as error:
        return str(error)
    return None


def cli() -> int:
    """Parse the command line, run, and turn expected errors into one line each."""
    try:
        job = tyro.cli(EvaluateJob, description=__doc__, config=(tyro.conf.OmitArgPrefixes,))
        with stopped_by_sigterm():
            return main(job)
    except (CarnError, ValueError) as error:
        print(f"evaluate: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("evaluate: stopped; the same command goes on from here", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(cli())
