"""Build bcSR from whole-slide images: slides + coordinates -> a checked, ranked, split dataset.

Tiles are cut at level 0, white ones dropped, the rest ranked by their colour's distance from the
mean, the farthest kept and split (the paper's rule by default; every number is an option). Where
tiles lie comes from coordinate lists (NCRF's, or CSV), from annotations (CAMELYON/ASAP XML, NCRF
JSON), or, with neither, from a grid over the tissue of each slide.

A slide or tile that cannot be read becomes a row of failures.parquet. A run that was killed is
completed by the same command. Output: manifest.json (written last), tiles/*.parquet,
measured.parquet, failures.parquet and report.html.

Examples:
  python jobs/build_bcsr.py --slides slides/ --coordinates tumor.txt normal.txt --output bcsr/
  python jobs/build_bcsr.py --slides s3://lab/slides --output s3://lab/bcsr --per-class None
  ray job submit --working-dir . -- python jobs/build_bcsr.py --slides s3://... --output s3://...
"""

import dataclasses
import io
import json
import logging
import re
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

# `python jobs/build_bcsr.py` puts jobs/ on the path, not the folder that holds carn/ and jobs/.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import tyro

from carn import storage
from carn.bcsr import build
from carn.bcsr.config import DrawConfig, FilterConfig, SelectConfig, StoreConfig
from carn.bcsr.coordinates import draw_positions
from carn.bcsr.dataset import read_manifest, write_manifest
from carn.bcsr.export import (
    begin_export,
    describe_export,
    export_state,
    finish_export,
    first_numbers,
)
from carn.bcsr.locate import LOCATED
from carn.bcsr.schema import MEASURED, SPLITS
from carn.bcsr.selection import check_groups
from carn.bcsr.shards import ShardPlan, plan_shards
from carn.bcsr.source import Source, find_images, find_listed, find_slides
from carn.bcsr.stages import export_unit, locate_unit, measure_unit, picture_unit, write_unit
from carn.degradation.bicubic import SCALES
from carn.degradation.conditions import DEFAULT, read_conditions
from carn.errors import CarnError, DatasetError, StorageError
from carn.log_lines import on_one_line, start_logging
from carn.report.bcsr_report import render
from carn.report.bcsr_summary import Place, slides_to_show, summarize, tiles_to_show
from jobs.metrics import meters
from jobs.ray_stage import StageRunner, start_ray
from jobs.stopping import stopped_by_sigterm

logger = logging.getLogger("build_bcsr")

# Names of the shards this job writes; nothing else below tiles/ is its to remove.
SHARD_NAME = re.compile(rf"({'|'.join(SPLITS)})-\d{{5}}-[0-9a-f]{{12}}\.parquet")
# Rounds of writing: one, and another each time tiles stop reading between measuring and writing.
MAX_WRITE_ROUNDS = 5


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """How the job runs. Nothing here changes the dataset."""

    num_workers: int | None = None
    """Most units of work at a time; None for as many as the cluster has CPUs."""
    tiles_per_task: int = 32
    """Tiles of a slide that one task measures."""
    progress_s: float = 10.0
    """Seconds between two lines of progress."""
    on_bad_slide: Literal["fail", "skip"] = "fail"
    """Exit status when something could not be read: 1, or 0. The dataset is finished either way."""
    overwrite: bool = False
    """Replace a finished dataset at the output that has other settings or inputs."""

    def __post_init__(self) -> None:
        for name in ("num_workers", "tiles_per_task"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} must be at least 1")


@dataclass(frozen=True, kw_only=True)
class BuildJob:
    """What `build_bcsr.py` is asked to do."""

    output: str
    """Folder or s3:// prefix of the dataset."""
    slides: tuple[str, ...] = ()
    """Slides: folders or s3:// prefixes, searched at any depth; globs ('s3://lab/2026-*/*.svs'); or
    single files."""
    coordinates: tuple[str, ...] = ()
    """Coordinate lists: NCRF's (`Slide,x,y`, patch centres; label by file name, tumor* or normal*),
    or .csv with a header: uri (or slide), x, y, label."""
    csv_anchor: Literal["corner", "centre"] | None = None
    """What x, y of a .csv are: the tile's top-left corner, or its centre. Must be said."""
    annotations: str | None = None
    """Folder or prefix of annotations named as their slides: CAMELYON/ASAP .xml or NCRF .json.
    Tumour points are drawn inside tumour, normal ones on tissue outside it."""
    images: str | None = None
    """Instead of slides: a folder of plain images, or the published layout (a folder with HR/).
    Each becomes a tile as it is, labelled by its subfolder; use with --split numbered or paper."""
    draw: DrawConfig = field(default_factory=DrawConfig)
    filter: FilterConfig = field(default_factory=FilterConfig)
    select: SelectConfig = field(default_factory=SelectConfig)
    store: StoreConfig = field(default_factory=StoreConfig)
    seed: int = 1
    """Of every random choice: the draw, points in annotations, the split."""
    export: Literal["edsr"] | None = None
    """Also write <output>/edsr in the layout that the EDSR family of codebases reads."""
    export_scales: tuple[int, ...] = (2, 3, 4, 8)
    """Scales of the exported LR images."""
    export_conditions: tuple[str, ...] = tuple(DEFAULT)
    """Ways to make the exported LR images, each into LR_<its name>: names such as jpeg80-420, `all`
    for every known one, or .yaml files with a way's fields by its name."""
    run: RunConfig = field(default_factory=RunConfig)

    def __post_init__(self) -> None:
        if bool(self.slides) == bool(self.images):
            raise ValueError("say where the pixels are: either --slides or --images")
        if self.images and (self.coordinates or self.annotations):
            raise ValueError(
                "--images takes each image whole; --coordinates and --annotations do not apply"
            )
        if self.coordinates and self.annotations:
            raise ValueError("tiles come from --coordinates or from --annotations, not from both")
        has_csv = any(uri.lower().endswith(".csv") for uri in self.coordinates)
        if has_csv != (self.csv_anchor is not None):
            raise ValueError(
                "say with --csv-anchor whether x, y of the .csv are a tile's corner or its centre"
                if has_csv
                else "--csv-anchor is for .csv coordinates, and none are given"
            )
        for root in (*self.slides, *((self.images,) if self.images else ())):
            below = storage.normalize(root).rstrip("/") + "/"
            if (storage.normalize(self.output).rstrip("/") + "/").startswith(below):
                raise ValueError(
                    f"--output {self.output} lies in {root}, which is read; choose another"
                )
        if self.seed < 0:
            raise ValueError(f"seed={self.seed} must not be negative")
        for uri in (self.output, *self.slides, *self.coordinates):
            storage.normalize(uri)  # an unknown kind of storage is an error
        unknown = sorted(set(self.export_scales) - set(SCALES))
        if unknown:
            raise ValueError(f"export_scales={unknown} are not among {SCALES}")
        if not self.export_conditions:
            raise ValueError("export_conditions names none; leave it out for bicubic LR")

    def settings(self) -> dict[str, Any]:
        """All that decides the dataset, as JSON values: the config that the manifest keeps."""
        every = dataclasses.asdict(self)
        left_out = ("output", "run", "export", "export_scales", "export_conditions")
        content = {name: value for name, value in every.items() if name not in left_out}
        # However they were spelled, in whatever order.
        content["slides"] = sorted(map(storage.normalize, self.slides))
        content["coordinates"] = sorted(map(storage.normalize, self.coordinates))
        for name in ("annotations", "images"):
            content[name] = content[name] and storage.normalize(content[name])
        settings: dict[str, Any] = json.loads(json.dumps(content))
        return settings


def main(job: BuildJob) -> int:
    """Build the dataset; returns the process's exit status."""
    start_logging()
    logging.getLogger("botocore").setLevel(logging.WARNING)  # it would say where keys come from
    output = storage.normalize(job.output)
    read_conditions(job.export_conditions)  # a name that is wrong is better known now
    source = find_source(job)
    manifest = read_manifest(output)
    runner = None
    if manifest is not None and not job.run.overwrite:
        _check_same(manifest, job, source, output)
        logger.info("%s is finished already; nothing to build", output)
    else:
        runner = _start_runner(job)
        manifest = build_dataset(job, source, output, runner)
    if job.export == "edsr":
        export_edsr(job, manifest, output, runner)
    num_failures = manifest["counts"]["failures"]
    print(_summary(manifest, output), flush=True)
    return 1 if num_failures and job.run.on_bad_slide == "fail" else 0


def build_dataset(
    job: BuildJob, source: Source, output: str, runner: StageRunner
) -> dict[str, Any]:
    """All stages from positions to the committed manifest, which is returned."""
    # A place that cannot be written is better known now than after all the measuring.
    storage.write_bytes(storage.join(output, "_work", "begun"), b"")
    failures = _missing_failures(source.missing) + _unnameable_failures(source.unnameable)
    empty_slides: list[str] = []
    if job.images:
        units = list(_image_units(job, source, output))
        num_listed = len(units)
    else:
        located = source.positions
        if located is None:
            located, more, empty_slides = locate(job, source, output, runner)
            failures += more
        num_listed = len(located) + sum(source.missing.values())
        drawn = _draw(job, located)
        _check_split(job, drawn)
        units = list(_measure_units(job, drawn, output))
    measured = pa.concat_tables(
        [MEASURED.empty_table(), *_counted(runner.run("measuring", measure_unit, units))]
    )
    measured = build.with_lost(measured, units)
    failures += build.measured_failures(measured)
    # Written before the selection as well: when nothing is left to select, it says why.
    failures_uri = storage.join(output, "failures.parquet")
    build.write_table(failures_uri, build.failures_table(failures))
    selected, plans, shard_bytes, write_failures = select_and_write(job, measured, output, runner)
    failures += write_failures
    tile_px = job.filter.tile_px
    manifest = build.make_manifest(
        selected,
        config=job.settings(),
        source_digest=source.digest,
        lists=source.lists,
        empty_slides=empty_slides,
        num_listed=num_listed,
        num_missing=sum(source.missing.values()),
        plans=plans,
        shard_bytes=shard_bytes,
        num_failures=len(failures),
        overlaps=[] if job.images else build.overlap_report(selected, tile_px=tile_px),
    )
    table = build.failures_table(failures)
    report = summarize(
        selected,
        manifest=manifest,
        failures=table.to_pylist(),
        pictures=take_pictures(job, selected, runner),
        max_white_fraction=_white_filter(job).max_white_fraction,
    )
    build.write_table(storage.join(output, "measured.parquet"), selected)
    build.write_table(failures_uri, table)
    storage.write_bytes(storage.join(output, "report.html"), render(report).encode())
    _commit(output, manifest)
    if job.select.split == "by-slide":
        _warn_of_splits(job, manifest)
    if not job.images:
        for doubt in build.doubts_about_magnification(manifest["inputs"]):
            logger.warning("%s", doubt)
    return manifest


# --------------------------------------------------------------------------------------- source


def find_source(job: BuildJob) -> Source:
    """What the job starts from; all cheap checks are made here.

    Raises:
        CarnError: nothing there, no access, a malformed list, or no listed slide is there.
    """
    if job.images:
        return find_images(job.images)
    if not job.coordinates:
        return find_slides(job.slides, annotations=job.annotations)
    return find_listed(
        job.slides,
        coordinates=job.coordinates,
        csv_anchor=job.csv_anchor,
        tile_px=job.filter.tile_px,
    )


def _check_same(manifest: dict[str, Any], job: BuildJob, source: Source, output: str) -> None:
    way_out = "choose another --output, or replace it with --overwrite"
    if manifest["config"] != job.settings():
        known = manifest["config"]
        changed = [name for name, value in job.settings().items() if known.get(name) != value]
        raise DatasetError(
            f"{output} holds a finished dataset with other settings ({', '.join(changed)}); "
            f"{way_out}"
        )
    if manifest["source_digest"] != source.digest:
        raise DatasetError(
            f"{output} holds a finished dataset, but slides or lists were added, removed or "
            f"changed since; {way_out}"
        )


# --------------------------------------------------------------------------------------- stages


def _start_runner(job: BuildJob) -> StageRunner:
    logger.info("starting Ray, or connecting to it")
    start_ray()
    return StageRunner(num_workers=job.run.num_workers, progress_s=job.run.progress_s)


def locate(
    job: BuildJob, source: Source, output: str, runner: StageRunner
) -> tuple[pa.Table, list[dict[str, Any]], list[str]]:
    """Positions on the slides, FAILURES rows of slides that fail, names of those without any."""
    work_uri = storage.join(output, "_work", "located")
    common = {"tile_px": job.filter.tile_px, "work_uri": work_uri}
    units = []
    for uri, name in source.names.items():
        unit = {"slide": name, "uri": uri, **common}
        if job.annotations is None:
            units.append(unit | {"min_tissue": job.draw.min_tissue})
            continue
        annotation = source.annotations.get(name)
        if annotation is None and job.draw.unannotated_slides == "skip":
            continue
        identity = None if annotation is None else source.lists[annotation]
        units.append(
            unit
            | {"annotation_uri": annotation, "annotation_identity": identity, "seed": job.seed}
            | {"points_per_label": job.draw.points_per_slide}
            | {"tumor_groups": job.draw.tumor_groups}
            | {"excluded_groups": job.draw.excluded_groups}
        )
    if len(units) < len(source.names):
        logger.info("%d slides without annotation are left out", len(source.names) - len(units))
    tables = list(runner.run("locating", locate_unit, units))
    found = pa.concat_tables(tables)
    failed = found.filter(pc.is_valid(found["reason"])).to_pylist()
    rows = [
        {"slide": row["slide"], "uri": row["uri"], "num_tiles": 0, "stage": "locate"}
        | {"x_l0": None, "y_l0": None, "reason": row["reason"]}
        for row in failed
    ]
    located = found.filter(pc.is_null(found["reason"])).select(LOCATED.names)
    empty = sorted({str(unit["slide"]) for unit in units} - set(found["slide"].to_pylist()))
    if empty:
        logger.warning("%d slides offer no tile: %s", len(empty), ", ".join(empty))
    if len(tables) < len(units):
        raise DatasetError(f"{len(units) - len(tables)} slides were not looked at: {build.LOST}")
    if not len(located):
        first = (
            f"; the first failure: {failed[0]['slide']}: {failed[0]['reason']}" if failed else ""
        )
        raise DatasetError(
            f"no tile of {job.filter.tile_px} px was found on {len(units)} slides: they are "
            f"smaller, or hold less tissue than --min-tissue {job.draw.min_tissue}{first}"
        )
    return located, rows, empty


def _draw(job: BuildJob, located: pa.Table) -> pa.Table:
    drawn = draw_positions(
        located,
        per_class=job.draw.per_class,
        seed=job.seed,
        even_over_slides=job.draw.even_over_slides,
        allow_overlap=job.draw.allow_overlap,
        tile_px=job.filter.tile_px,
    )
    for count in pc.value_counts(drawn["label"]).to_pylist():
        wished = job.draw.per_class
        short = f" (of {wished:,} wished)" if wished and count["counts"] < wished else ""
        logger.info("drawn: %s %s tiles%s", f"{count['counts']:,}", count["values"], short)
    return drawn


def _check_split(job: BuildJob, drawn: pa.Table) -> None:
    """Too few slides for the splits is better said before the tiles are read than after."""
    if job.select.split == "by-slide":
        names = pc.unique(drawn["slide"]).to_pylist()
        groups = {build.group_of(name, job.select.group_regex) for name in names}
        num_test, num_validation = job.select.wished(min(len(drawn), job.select.keep or len(drawn)))
        check_groups(len(groups), num_test=num_test, num_validation=num_validation)


def _warn_of_splits(job: BuildJob, manifest: dict[str, Any]) -> None:
    splits = manifest["splits"]
    wished = dict(zip(("test", "validation"), job.select.wished(sum(splits.values())), strict=True))
    for name, count in wished.items():
        if abs(splits[name] - count) > 0.1 * count or not splits[name]:
            logger.warning("%d %s tiles (%d wished): slides go whole", splits[name], name, count)


def _measure_units(job: BuildJob, drawn: pa.Table, output: str) -> Iterator[dict[str, Any]]:
    by_slide: dict[tuple[str, str], list[list[Any]]] = defaultdict(list)
    side = job.filter.tile_px
    for row in drawn.sort_by(build.TILE_ORDER).to_pylist():
        place = [row["x_l0"], row["y_l0"], side, side, row["label"]]
        by_slide[row["slide"], row["uri"]].append(place)
    for (slide, uri), places in by_slide.items():
        for start in range(0, len(places), job.run.tiles_per_task):
            yield {
                "slide": slide,
                "uri": uri,
                "places": places[start : start + job.run.tiles_per_task],
                "grey_threshold": job.filter.grey_threshold,
                "work_uri": storage.join(output, "_work", "measured"),
            }


def _image_units(job: BuildJob, source: Source, output: str) -> Iterator[dict[str, Any]]:
    root = storage.normalize(str(job.images)).rstrip("/") + "/"
    for uri, name in source.names.items():
        folder = uri.removeprefix(root).rpartition("/")[0]
        yield {
            "slide": name,
            "uri": uri,
            "places": None,
            "label": folder if folder not in ("", "HR") else "unlabeled",
            "grey_threshold": job.filter.grey_threshold,
            "work_uri": storage.join(output, "_work", "measured"),
        }


def _counted(tables: Iterator[pa.Table]) -> Iterator[pa.Table]:
    """The tables of measuring, their tiles counted."""
    for table in tables:
        num_failed = pc.sum(pc.is_valid(table["reason"])).as_py() or 0
        meters().add("carn_bcsr_tiles_total", len(table) - num_failed, outcome="measured")
        meters().add("carn_bcsr_tiles_total", num_failed, outcome="failed")
        yield table


def select_and_write(
    job: BuildJob, measured: pa.Table, output: str, runner: StageRunner
) -> tuple[pa.Table, list[ShardPlan], dict[str, int], list[dict[str, Any]]]:
    """Choose tiles and write their shards; tiles that no longer read are chosen around.

    Returns:
        Columns of SELECTED, the shards, their sizes, and FAILURES rows.
    """
    write_failures: list[dict[str, Any]] = []
    for _ in range(MAX_WRITE_ROUNDS):
        selected = build.select_tiles(
            measured, white=_white_filter(job), select=_selection(job, measured), seed=job.seed
        )
        plans = plan_shards(
            selected,
            encoding=job.store.encoding,
            tiles_per_shard=job.store.tiles_per_shard,
        )
        units = [dataclasses.asdict(plan) | {"output": output} for plan in plans]
        results = []
        num_tiles = {plan.name: len(plan.rows) for plan in plans}
        for table in runner.run("writing", write_unit, units):
            for row in table.to_pylist():
                results.append(row)
                if row["num_bytes"] > 0:
                    meters().add("carn_bcsr_tiles_total", num_tiles[row["name"]], outcome="written")
                    meters().add("carn_bcsr_written_bytes_total", row["num_bytes"])
        shard_bytes = {row["name"]: row["num_bytes"] for row in results}
        broken = [row for row in results if row["num_bytes"] < 0]
        if broken:
            raise StorageError(output, f"a shard cannot be written: {broken[0]['failures']}")
        if len(results) < len(plans):
            raise DatasetError(f"{len(plans) - len(results)} shards were not written: {build.LOST}")
        failed = [tuple(failure) for row in results for failure in json.loads(row["failures"])]
        if not failed:
            return selected, plans, shard_bytes, write_failures
        logger.warning("%d tiles no longer read; others are chosen in their place", len(failed))
        measured = build.mark_failed(measured, failed)
        write_failures += [
            {"slide": slide, "uri": uri, "x_l0": x, "y_l0": y, "num_tiles": 1}
            | {"stage": "write", "reason": reason}
            for slide, uri, x, y, reason in failed
        ]
    raise DatasetError(
        f"tiles that were measured stopped reading in {MAX_WRITE_ROUNDS} rounds; is the storage of "
        "the slides failing? What is finished is kept: run again"
    )


def _white_filter(job: BuildJob) -> FilterConfig:
    # Images are taken as they are: whoever made them has chosen already.
    return dataclasses.replace(job.filter, max_white_fraction=1.0) if job.images else job.filter


def _selection(job: BuildJob, measured: pa.Table) -> SelectConfig:
    if not job.images:
        return job.select
    return dataclasses.replace(job.select, keep=max(len(measured), job.select.keep or 1))


def take_pictures(job: BuildJob, selected: pa.Table, runner: StageRunner) -> dict[Place, bytes]:
    """JPEGs for the report: some slides, some kept and some dropped tiles."""
    kept, dropped = tiles_to_show(selected)
    with_thumbnail = set() if job.images else set(slides_to_show(selected))
    places: dict[str, list[list[int]]] = {uri: [] for uri in sorted(with_thumbnail)}
    for row in (*kept, *dropped):
        place = [row["x_l0"], row["y_l0"], row["width_px"], row["height_px"]]
        places.setdefault(row["uri"], []).append(place)
    units = [
        {"uri": uri, "is_image": bool(job.images), "has_thumbnail": uri in with_thumbnail}
        | {"places": wanted}
        for uri, wanted in places.items()
    ]
    return {
        (row["uri"], row["x_l0"], row["y_l0"]): row["jpeg"]
        for table in runner.run("picturing", picture_unit, units)
        for row in table.to_pylist()
    }


def export_edsr(
    job: BuildJob, manifest: dict[str, Any], output: str, runner: StageRunner | None
) -> None:
    """Write <output>/edsr, unless it holds this dataset at these scales and conditions already."""
    export_uri = storage.join(output, "edsr")
    conditions = read_conditions(job.export_conditions)
    state = describe_export(manifest, scales=job.export_scales, conditions=conditions)
    known, is_finished = export_state(export_uri)
    if known == state and is_finished:
        logger.info("%s is exported already", export_uri)
        return
    if known != state:
        if is_finished and not job.run.overwrite:
            raise DatasetError(
                f"{export_uri} holds an export of another dataset, of other scales or conditions; "
                "remove it, or replace it with --overwrite"
            )
        if known is None and storage.list_objects(export_uri):
            raise DatasetError(f"{export_uri} holds files that are no export's; move them away")
        storage.delete_below(export_uri)
        begin_export(export_uri, state)
    runner = runner or _start_runner(job)
    numbers = first_numbers(manifest["shards"])
    num_digits = max(4, len(str(sum(manifest["splits"].values()))))
    units = [
        {"output": output, "export_uri": export_uri, "name": name, "first_number": numbers[name]}
        | {"scales": sorted(job.export_scales), "num_digits": num_digits}
        | {"conditions": {name: dataclasses.asdict(way) for name, way in conditions.items()}}
        for name in numbers
    ]
    results = [
        row for table in runner.run("exporting", export_unit, units) for row in table.to_pylist()
    ]
    reasons = [row["reason"] for row in results if row["reason"]]
    if reasons or len(results) < len(units):
        raise DatasetError(f"the export is incomplete: {reasons[0] if reasons else build.LOST}")
    storage.delete_unfinished(export_uri)
    finish_export(export_uri, state)


# --------------------------------------------------------------------------------------- the end


def _missing_failures(missing: dict[str, int]) -> list[dict[str, Any]]:
    return [
        {"slide": name, "uri": None, "x_l0": None, "y_l0": None, "num_tiles": count}
        | {"stage": "resolve", "reason": "no file of that name among the slides"}
        for name, count in sorted(missing.items())
    ]


def _unnameable_failures(unnameable: Sequence[str]) -> list[dict[str, Any]]:
    return [
        {"slide": storage.stem_of(uri), "uri": uri, "x_l0": None, "y_l0": None, "num_tiles": 0}
        | {"stage": "resolve", "reason": "its name is no UTF-8 text; rename it"}
        for uri in unnameable
    ]


def _commit(output: str, manifest: dict[str, Any]) -> None:
    """Tidy up what is of no more use, write the manifest, remove shards of an earlier selection."""
    storage.delete_unfinished(output)
    if not manifest["counts"]["failures"]:
        storage.delete_below(storage.join(output, "_work"))
    shards = {shard["name"] for shard in manifest["shards"]}
    found = {
        storage.name_of(item.uri) for item in storage.list_objects(storage.join(output, "tiles"))
    }
    if shards - found:
        raise DatasetError(
            f"{len(shards - found)} shards vanished from {output} while it was built; does another "
            "job write there? Build again"
        )
    write_manifest(output, manifest)
    # The shards of the manifest before were whole until now.
    stale = sorted(name for name in found - shards if SHARD_NAME.fullmatch(name))
    storage.delete([storage.join(output, "tiles", name) for name in stale])


def _summary(manifest: dict[str, Any], output: str) -> str:
    splits = manifest["splits"]
    lines = [
        f"bcSR is ready: {sum(splits.values()):,} tiles ("
        + ", ".join(f"{splits[name]:,} {name}" for name in SPLITS)
        + f") of {len(manifest['inputs']):,} slides",
        f"  dataset  {output}",
        f"  report   {storage.join(output, 'report.html')}",
    ]
    num_failures = manifest["counts"]["failures"]
    if num_failures:
        uri = storage.join(output, "failures.parquet")
        lines.append(f"  failures {num_failures:,}, in {uri}, such as:")
        rows = pq.read_table(io.BytesIO(storage.read_bytes(uri))).slice(0, 3).to_pylist()
        lines += [f"    {on_one_line(row['slide'])}: {on_one_line(row['reason'])}" for row in rows]
        lines.append("  to try them again, run the same with --overwrite; what was read is kept")
    return "\n".join(lines)


def cli() -> int:
    """Parse the command line, run, and turn expected errors into one line each."""
    try:
        job = tyro.cli(BuildJob, description=__doc__, config=(tyro.conf.OmitArgPrefixes,))
    except ValueError as error:
        print(f"build_bcsr: {error}", file=sys.stderr)
        return 2
    try:
        with stopped_by_sigterm():
            return main(job)
    except CarnError as error:
        print(f"build_bcsr: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("build_bcsr: stopped; the same command goes on from here", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(cli())
