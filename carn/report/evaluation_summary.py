"""What an evaluation came to: its tables and its page, from the scores that were kept."""

import csv
import io
import json
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from carn import storage
from carn.degradation.conditions import DEFAULT, describe
from carn.degradation.scanner import Degradation
from carn.evaluation.crops import CropStrip
from carn.evaluation.published import CARN_STAR, FIGURE_4, TABLE_1, TABLE_2
from carn.evaluation.scoring import conventions
from carn.evaluation.statistics import (
    Difference,
    Score,
    compare,
    holm,
    mean_scores,
    summarize_seeds,
)
from carn.evaluation.study import Entrant, model_of
from carn.evaluation.timing import Timing
from carn.models.cost import count_flops, count_parameters
from carn.models.table import MODELS
from carn.report import evaluation_report
from carn.report.evaluation_records import (
    Comparison,
    ConditionRow,
    EvaluationReport,
    ModelRow,
    TimingRow,
    Variant,
)
from carn.report.evaluation_records import CropStrip as ShownCrop

# The side of the LR image that a row's FLOPs are of, as the paper's Table 3.
FLOPS_LR_PX = 64


@dataclass(frozen=True, kw_only=True)
class Scored:
    """Entrants that differ in their seeds alone, and their scores.

    Attributes:
        entrants: one a seed.
        tables: of SCORES, one an entrant, under the first condition.
        variant: of the row: "", "MSE" or "*".
        under: tables of each further condition by its name, likewise; None where there is none.
    """

    entrants: tuple[Entrant, ...]
    tables: tuple[pa.Table, ...]
    variant: Variant
    under: Mapping[str, tuple[pa.Table | None, ...]] = field(default_factory=dict)

    @property
    def title(self) -> str:
        """Name and variant in print."""
        return self.entrants[0].title + {"": "", "MSE": " (MSE)", "*": "*"}[self.variant]


def group_seeds(
    scores: Sequence[tuple[Entrant, pa.Table]],
    *,
    is_star: bool = False,
    under: Mapping[str, Mapping[Entrant, pa.Table]] | None = None,
) -> list[Scored]:
    """Put entrants together by model and scale, those that differ in their seeds alone.

    In the order of the paper's tables; names that would be the same are told apart by a number.

    Args:
        scores: of each entrant under the first condition.
        is_star: they are of CARN*.
        under: scores by further condition and entrant.
    """
    groups: dict[tuple[str, int, str], list[tuple[Entrant, pa.Table]]] = {}
    for entrant, table in scores:
        groups.setdefault((entrant.key, entrant.scale, entrant.recipe), []).append((entrant, table))
    order = list(MODELS)
    ranked = sorted(groups.values(), key=lambda g: (g[0][0].scale, order.index(g[0][0].key)))  # type: ignore[arg-type]
    found = []
    for group in ranked:
        variant: Any = "*" if is_star else group[0][0].variant
        entrants = tuple(entrant for entrant, _ in group)
        found.append(
            Scored(
                entrants=entrants,
                tables=tuple(table for _, table in group),
                variant=variant,
                under={
                    name: tuple(tables.get(entrant) for entrant in entrants)
                    for name, tables in (under or {}).items()
                },
            )
        )
    return _told_apart(found)


def _told_apart(scored: Sequence[Scored]) -> list[Scored]:
    """Rows of one name get what differs in their trainings as well, or a number."""
    alike: dict[tuple[str, int], list[Scored]] = {}
    for item in scored:
        alike.setdefault((item.title, item.entrants[0].scale), []).append(item)
    found = []
    for item in scored:
        rivals = alike[item.title, item.entrants[0].scale]
        if len(rivals) == 1:
            found.append(item)
            continue
        trainings = [dict(rival.entrants[0].training) for rival in rivals]
        names = sorted({name for training in trainings for name in training})
        telling = [n for n in names if len({training.get(n) for training in trainings}) > 1]
        own = dict(item.entrants[0].training)
        words = [f"{name}={own.get(name, '?')}" for name in telling[:3]]
        words = words or [f"no. {rivals.index(item) + 1}"]
        settings = ", ".join(part for part in (item.entrants[0].settings, *words) if part)
        entrants = tuple(replace(entrant, settings=settings) for entrant in item.entrants)
        found.append(replace(item, entrants=entrants))
    return found


def write_evaluation(
    uri: str,
    *,
    scored: Sequence[Scored],
    timings: Sequence[tuple[Entrant, Timing]],
    crops: Sequence[CropStrip],
    facts: Mapping[str, Any],
    failures: Sequence[str],
    left_out: Sequence[str] = (),
    conditions: Mapping[str, Degradation] = DEFAULT,
) -> str:
    """Write the tables and the page of an evaluation, and say what it came to.

    Args:
        uri: folder or prefix.
        scored: of `group_seeds`; rows with a star last.
        timings, crops: as far as they were made.
        facts: `dataset_uri`, `dataset_digest`, `code_version`, `seconds`, `machine`, `notes`, and
            the `settings` of the job.
        failures: what could not be scored, and why.
        left_out: runs that were found and are not scored, since they are not finished.
        conditions: ways to make LR by name; the tables are of the first.

    Returns:
        Lines to print.

    Raises:
        StorageError: they cannot be written.
    """
    report = make_report(
        scored=scored,
        timings=timings,
        crops=crops,
        facts=facts,
        failures=failures,
        left_out=left_out,
        conditions=conditions,
    )
    kept = _all_scores(scored, conditions=list(conditions))
    storage.write_bytes(storage.join(uri, "scores.parquet"), kept)
    rows = [asdict(row) for row in report.rows]
    storage.write_bytes(storage.join(uri, "table2.csv"), _csv(rows))
    by_condition = [asdict(row) for row in report.condition_rows]
    storage.write_bytes(storage.join(uri, "conditions.csv"), _csv(by_condition))
    comparisons = [asdict(comparison) for comparison in report.comparisons]
    storage.write_bytes(storage.join(uri, "significance.csv"), _csv(comparisons))
    storage.write_bytes(storage.join(uri, "timings.csv"), _csv([asdict(t) for t in report.timings]))
    summary = {
        **{name: value for name, value in facts.items() if name != "notes"},
        "convention": report.convention,
        "convention_y": report.convention_y,
        "rows": rows,
        "conditions": [
            {"name": name, "words": describe(way), **asdict(way)}
            for name, way in conditions.items()
        ],
        "condition_rows": by_condition,
        "comparisons": comparisons,
        "failures": list(failures),
        "left_out": list(left_out),
    }
    storage.write_bytes(
        storage.join(uri, "summary.json"), (json.dumps(summary, indent=1) + "\n").encode()
    )
    page = storage.join(uri, "report.html")
    storage.write_bytes(page, evaluation_report.render(report).encode())
    return _said(report, failures, page=page)


def _said(report: EvaluationReport, failures: Sequence[str], *, page: str) -> str:
    width = max((len(row.title) for row in report.rows), default=0)
    lines = [report.convention]
    for row in report.rows:
        spread = "" if row.psnr_std is None else f" +- {row.psnr_std:.3f}"
        paper = "" if row.paper_psnr_db is None else f"   (paper: {row.paper_psnr_db:.3f} dB)"
        lines.append(
            f"  x{row.scale} {row.title:{width}}  {row.psnr_db:.3f}{spread} dB, SSIM {row.ssim:.4f}"
            f"{paper}"
        )
    lines += _said_of_conditions(report, width=width)
    lines.append(f"  report   {page}")
    lines += [f"  failed   {text}" for text in failures[:5]]
    lines += [f"  left out, not finished   {text}" for text in report.left_out[:5]]
    return "\n".join(lines)


def _said_of_conditions(report: EvaluationReport, *, width: int) -> list[str]:
    """Say the gains under each condition, a line a model; nothing where there is one condition."""
    if len(report.conditions) < 2:
        return []
    gains: dict[tuple[int, str], list[str]] = {}
    for row in report.condition_rows:
        if row.gain_db is not None:
            words = f"{row.condition} {row.gain_db:+.2f}"
            gains.setdefault((row.scale, row.model), []).append(words)
    return ["Gain over bicubic interpolation of the same LR, dB:"] + [
        f"  x{scale} {model:{width}}  {', '.join(words)}" for (scale, model), words in gains.items()
    ]


def make_report(
    *,
    scored: Sequence[Scored],
    timings: Sequence[tuple[Entrant, Timing]],
    crops: Sequence[CropStrip],
    facts: Mapping[str, Any],
    failures: Sequence[str],
    left_out: Sequence[str] = (),
    conditions: Mapping[str, Degradation] = DEFAULT,
) -> EvaluationReport:
    """The page's content; arguments as `write_evaluation`."""
    scales = sorted({item.entrants[0].scale for item in scored})
    tables = [table for item in scored if item.variant != "*" for table in item.tables]
    first = tables[0] if tables else pa.table({"slide": []})
    rgb, _ = conventions(scale=scales[0] if scales else 2)
    luma = " ".join(f"x{scale}: {conventions(scale=scale)[1]}" for scale in scales)
    side = FLOPS_LR_PX
    notes = (
        *facts["notes"],
        *(f"Not scored: {text}" for text in failures),
        f"FLOPs in the table of scores are of one LR image of {side} x {side} px, two for a "
        "multiplication and addition. The paper's numbers are of its own test set, which is not "
        "this one.",
    )
    return EvaluationReport(
        title="Evaluation",
        dataset_uri=str(facts["dataset_uri"]),
        convention=rgb,
        convention_y=luma,
        num_tiles=len(first),
        num_slides=len(set(first["slide"].to_pylist())),
        code_version=str(facts["code_version"]),
        seconds=float(facts["seconds"]),
        machine=str(facts["machine"]),
        rows=tuple(_row(item) for item in scored),
        comparisons=tuple(c for scale in scales for c in _comparisons(scored, scale)),
        timings=tuple(_timings(scored, timings)),
        crops=tuple(ShownCrop(**vars(strip)) for strip in crops),
        notes=notes,
        left_out=tuple(left_out),
        spread=tuple(_spreads(scored, scales)),
        conditions=tuple((name, describe(way)) for name, way in conditions.items()),
        condition_rows=tuple(
            row
            for scale in scales
            for row in _condition_rows(scored, scale=scale, conditions=list(conditions))
        ),
    )


def _row(item: Scored) -> ModelRow:
    entrant = item.entrants[0]
    found = summarize_seeds(item.tables)
    published = _published(entrant, item.variant)
    model = model_of(entrant, "cpu")
    side = FLOPS_LR_PX
    seeds = tuple(e.seed for e in item.entrants if e.seed is not None)
    is_trained = entrant.checkpoint is not None
    return ModelRow(
        model=entrant.title,
        key=entrant.key,
        scale=entrant.scale,
        variant=item.variant,
        num_seeds=len(item.entrants) if is_trained else 0,
        seeds=seeds,
        psnr_db=found.psnr_db,
        psnr_std=found.psnr_std,
        ssim=found.ssim,
        ssim_std=found.ssim_std,
        psnr_y_db=found.psnr_y_db,
        psnr_y_std=found.psnr_y_std,
        ssim_y=found.ssim_y,
        ssim_y_std=found.ssim_y_std,
        lpips=found.lpips,
        lpips_std=found.lpips_std,
        params=count_parameters(model),
        flops=count_flops(model, lr_px=(side, side)) if is_trained else 0,
        steps=entrant.steps,
        planned_steps=entrant.planned_steps,
        best_steps=tuple(e.best_step for e in item.entrants if e.best_step is not None),
        trained_on=entrant.trained_on[:8],
        paper_psnr_db=published and published[0],
        paper_ssim=published and published[1],
        # Size alone tells the network here: the loss takes no part in it.
        paper_params=None
        if entrant.architecture or entrant.scale != 2
        else TABLE_1.get(entrant.key),
    )


def _condition_rows(
    scored: Sequence[Scored], *, scale: int, conditions: Sequence[str]
) -> Iterator[ConditionRow]:
    """A row for each model at a scale and each condition that it has scores under."""
    here = [item for item in scored if item.entrants[0].scale == scale and item.variant != "*"]
    base = next((item for item in here if item.entrants[0].key == "bicubic"), None)
    for item in here:
        for number, condition in enumerate(conditions):
            further = None if number == 0 else condition
            tables = _tables_under(item, further)
            zero = [] if base is None or item is base else _tables_under(base, further)
            if tables:
                yield _condition_row(item, tables, zero, condition=condition)


def _tables_under(item: Scored, condition: str | None) -> list[pa.Table]:
    """The tables of a model under a further condition, or under the first (None)."""
    if condition is None:
        return list(item.tables)
    return [table for table in item.under.get(condition, ()) if table is not None]


def _condition_row(
    item: Scored, tables: Sequence[pa.Table], zero: Sequence[pa.Table], *, condition: str
) -> ConditionRow:
    found = summarize_seeds(tables)
    gain_db = ssim_gain = least_db = least_slide_db = None
    if zero:
        bicubic = summarize_seeds(zero)
        gain_db, ssim_gain = found.psnr_db - bicubic.psnr_db, found.ssim - bicubic.ssim
        zeros = mean_scores(zero)
        gains = {tile: value - zeros[tile] for tile, value in mean_scores(tables).items()}
        by_slide: dict[str, list[float]] = {}
        for row in tables[0].select(["tile_id", "slide"]).to_pylist():
            by_slide.setdefault(row["slide"], []).append(gains[row["tile_id"]])
        least_db = min(gains.values())
        least_slide_db = min(statistics.fmean(values) for values in by_slide.values())
    return ConditionRow(
        scale=item.entrants[0].scale,
        model=item.title,
        key=item.entrants[0].key,
        condition=condition,
        num_seeds=len(tables) if item.entrants[0].checkpoint is not None else 0,
        psnr_db=found.psnr_db,
        ssim=found.ssim,
        gain_db=gain_db,
        ssim_gain=ssim_gain,
        num_images=found.num_tiles,
        num_slides=found.num_slides,
        least_gain_db=least_db,
        least_slide_gain_db=least_slide_db,
    )


def _published(entrant: Entrant, variant: str) -> tuple[float, float] | None:
    """The paper's numbers, where network and loss are the paper's."""
    key = entrant.paper_row
    if variant == "*":
        key = CARN_STAR if key == "carn" else None
    return None if key is None else TABLE_2.get((key, entrant.scale))


def _comparisons(scored: Sequence[Scored], scale: int) -> list[Comparison]:
    """CARN against each of the others, and the best against each, corrected for all of them.

    The best is that of the very scores that are compared: its own tests alone would be kinder than
    they should be, and CARN's are there whoever is the best.
    """
    here = [item for item in scored if item.entrants[0].scale == scale and item.variant != "*"]
    if len(here) < 2:
        return []
    best = max(here, key=lambda item: summarize_seeds(item.tables).psnr_db)
    reference = _reference(here) or best
    pairs = [(reference, other) for other in here if other is not reference]
    if best is not reference:
        others = [item for item in here if item is not best and item is not reference]
        pairs += [(best, other) for other in others]
    psnrs, ssims = _compared(pairs, "psnr_db"), _compared(pairs, "ssim")
    return [
        Comparison(
            scale=scale,
            a=a.title,
            b=b.title,
            difference_db=of_psnr.mean,
            low_db=of_psnr.low,
            high_db=of_psnr.high,
            p=of_psnr.p,
            p_holm=psnr_p_holm,
            ssim_difference=of_ssim.mean,
            ssim_low=of_ssim.low,
            ssim_high=of_ssim.high,
            ssim_p=of_ssim.p,
            ssim_p_holm=ssim_p_holm,
            unit=of_psnr.unit,
            num_tiles=of_psnr.num_tiles,
            num_slides=of_psnr.num_slides,
        )
        for (a, b), (of_psnr, psnr_p_holm), (of_ssim, ssim_p_holm) in zip(
            pairs, psnrs, ssims, strict=True
        )
    ]


def _reference(here: Sequence[Scored]) -> Scored | None:
    """The CARN that is held against the others, by nothing that the test split has to say.

    The paper's own where there is one; of several, that of the highest PSNR in validation; of those
    that do not say it, the first.
    """

    def rank(item: Scored) -> tuple[bool, float]:
        known = [e.validation_psnr_db for e in item.entrants if e.validation_psnr_db is not None]
        mean = statistics.fmean(known) if known else -math.inf
        return item.entrants[0].paper_row == "carn", mean

    carns = [item for item in here if item.entrants[0].key == "carn" and item.variant == ""]
    return max(carns, key=rank, default=None)


def _compared(
    pairs: Sequence[tuple[Scored, Scored]], score: Score
) -> list[tuple[Difference, float | None]]:
    """The difference of each pair, and its p corrected for the number of pairs."""
    found = [compare(a.tables, b.tables, score=score) for a, b in pairs]
    return list(zip(found, holm([difference.p for difference in found]), strict=True))


def _timings(
    scored: Sequence[Scored], timings: Sequence[tuple[Entrant, Timing]]
) -> Iterator[TimingRow]:
    """A row for each model that is scored: networks of one architecture take as long."""
    known = {(e.key, e.scale, e.architecture): timing for e, timing in timings}
    for item in scored:
        entrant = item.entrants[0]
        timing = known.get((entrant.key, entrant.scale, entrant.architecture))
        if timing is None or item.variant == "*":
            continue
        is_papers = entrant.key == "carn" and not entrant.architecture
        yield TimingRow(
            model=item.title,
            scale=entrant.scale,
            seconds=timing.seconds_median,
            low_s=timing.seconds_iqr[0],
            high_s=timing.seconds_iqr[1],
            lr_width_px=timing.lr_px[0],
            lr_height_px=timing.lr_px[1],
            repeats=timing.repeats,
            params=timing.params,
            flops=timing.flops,
            device=timing.device,
            threads=timing.threads,
            torch_version=timing.torch_version,
            paper_seconds=FIGURE_4.get(entrant.scale) if is_papers else None,
        )


def _spreads(
    scored: Sequence[Scored], scales: Sequence[int]
) -> list[tuple[str, tuple[float, ...]]]:
    """PSNR gains over bicubic of each tile, by model and scale."""
    found = []
    for scale in scales:
        here = [item for item in scored if item.entrants[0].scale == scale and item.variant != "*"]
        base = next((item for item in here if item.entrants[0].key == "bicubic"), None)
        if base is None:
            continue
        zero = mean_scores(base.tables)
        for item in here:
            if item is not base:
                gains = [value - zero[tile] for tile, value in mean_scores(item.tables).items()]
                found.append((f"x{scale} {item.title}", tuple(gains)))
    return found


def _all_scores(scored: Sequence[Scored], *, conditions: Sequence[str]) -> bytes:
    """Every tile's scores by every entrant under every condition, as a Parquet file."""
    every = [
        (condition, item, entrant, table)
        for number, condition in enumerate(conditions)
        for item in scored
        for entrant, table in zip(
            item.entrants,
            item.tables if number == 0 else item.under.get(condition, (None,) * len(item.entrants)),
            strict=True,
        )
    ]
    tables = []
    for condition, item, entrant, table in every:
        if table is not None:
            columns = {
                "model": item.title,
                "key": entrant.key,
                "variant": item.variant,
                "scale": entrant.scale,
                "seed": entrant.seed,
                "checkpoint": entrant.checkpoint,
                "checkpoint_hash": entrant.checkpoint_hash,
                "condition": condition,
            }
            kinds = {"scale": pa.int32(), "seed": pa.int64()}
            about = pa.table(
                {
                    name: pa.array([value] * len(table), kinds.get(name, pa.string()))
                    for name, value in columns.items()
                }
            )
            columns_of = [*about.columns, *table.columns]
            names = [*about.column_names, *table.column_names]
            tables.append(pa.Table.from_arrays(columns_of, names=names))
    sink = io.BytesIO()
    pq.write_table(pa.concat_tables(tables), sink)
    return sink.getvalue()


def _csv(rows: Sequence[Mapping[str, Any]]) -> bytes:
    buffer = io.StringIO(newline="")
    if rows:
        writer = csv.DictWriter(buffer, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return buffer.getvalue().encode()
