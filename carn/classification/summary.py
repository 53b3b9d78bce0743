"""From a finished study to its table, its summary and its page."""

import csv
import io
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from carn import storage
from carn.classification.classifier_folder import Trained, read_trained
from carn.classification.config import StudyConfig
from carn.classification.crops import CropIndex
from carn.classification.examples import examples_uri
from carn.classification.kinds import BICUBIC, GT, LR, Kind
from carn.classification.pcam import PcamCorpus
from carn.classification.statistics import (
    NUM_RESAMPLES,
    THRESHOLD,
    Estimate,
    accuracy_estimate,
    auc_estimate,
    difference_estimate,
    roc_curve,
)
from carn.classification.study import CorpusPlan, Plan, read_table
from carn.errors import DatasetError
from carn.evaluation.published import TABLE_5, row_of
from carn.evaluation.statistics import FEW_SLIDES
from carn.models.checkpoint import checkpoint_hash
from carn.report.classify_report import (
    ClassifyReport,
    CorpusReport,
    Example,
    History,
    KindRow,
    Picture,
    Range,
    Roc,
    render,
)
from carn.report.page import plural
from carn.version import code_version

TABLE = "table.csv"
SUMMARY = "summary.json"
REPORT = "report.html"
# Whose accuracies the paper's Table 5 has, of which crops. Source: the section on Table 5.
PAPER_DEPTH, PAPER_CROP_PX = 50, {"bcsr": 128, "pcam": 96}


@dataclass(frozen=True, kw_only=True)
class Result:
    """A row of the table.

    Attributes:
        corpus, trained_on: names in print.
        kind: of pictures.
        num_crops, num_slides: of the test.
        accuracy, auc: 0..1.
        over_gt, over_bicubic: difference in accuracy, -1..1; None for the kind itself.
        paper: accuracy in the paper's Table 5, 0..1; None where it has none.
    """

    corpus: str
    trained_on: str
    kind: Kind
    num_crops: int
    num_slides: int
    accuracy: Estimate
    auc: Estimate
    over_gt: Estimate | None
    over_bicubic: Estimate | None
    paper: float | None


def write_summary(plan: Plan, *, seconds: float, num_workers: int | None) -> str:
    """Write table.csv, summary.json and report.html; returns some lines that say what came out.

    Args:
        plan: of a study that is finished.
        seconds: that this run took.
        num_workers: who worked in it; None where nothing was left to do.

    Raises:
        DatasetError: the study is not finished, or a table is damaged.
        StorageError: the output cannot be written.
    """
    output = storage.normalize(plan.config.output)
    results = {corpus.corpus.name: collect(plan, corpus) for corpus in plan.corpora}
    every = [result for rows in results.values() for result in rows]
    storage.write_bytes(storage.join(output, TABLE), table_csv(every).encode())
    facts = _facts(plan, every, seconds=seconds, num_workers=num_workers)
    text = json.dumps(facts, indent=1, sort_keys=True) + "\n"
    storage.write_bytes(storage.join(output, SUMMARY), text.encode())
    report = ClassifyReport(
        title="Classification of super-resolved tissue",
        scale=plan.config.crops.scale,
        facts=_page_facts(plan),
        corpora=tuple(_corpus_report(plan, c, results[c.corpus.name]) for c in plan.corpora),
        config=_settings(plan.config),
    )
    page = storage.join(output, REPORT)
    storage.write_bytes(page, render(report).encode())
    return _words(every, page)


def collect(plan: Plan, corpus: CorpusPlan) -> list[Result]:
    """The rows of a corpus, in the order of the kinds.

    Raises:
        DatasetError: predictions are missing, or of other crops.
    """
    tables = {kind.key: read_table(plan, corpus, kind) for kind in plan.kinds}
    index = corpus.crops["test"]
    label, slides = index.label, index.slide_of_crops()
    found = {
        key: table["probability"].to_numpy().astype(np.float64) for key, table in tables.items()
    }
    titles = {kind.key: kind.title for kind in plan.kinds}
    results = []
    for kind in plan.kinds:
        probability = found[kind.key]
        over = {
            other: None
            if other == kind.key
            else difference_estimate(probability, found[other], label, slides)
            for other in (GT, BICUBIC)
        }
        results.append(
            Result(
                corpus=corpus.corpus.title,
                trained_on=titles[plan.trained_on(kind)],
                kind=kind,
                num_crops=len(index),
                num_slides=len(set(slides)),
                accuracy=accuracy_estimate(probability, label, slides),
                auc=auc_estimate(probability, label, slides),
                over_gt=over[GT],
                over_bicubic=over[BICUBIC],
                paper=published_accuracy(
                    kind,
                    corpus=corpus.corpus.name,
                    crop_px=corpus.corpus.crop_px,
                    scale=plan.config.crops.scale,
                    depth=plan.config.classifier.depth,
                ),
            )
        )
    return results


def table_csv(results: list[Result]) -> str:
    """The rows with a header; numbers as fractions, with all their digits."""
    sink = io.StringIO()
    columns = (
        *("corpus", "trained_on", "kind", "pictures", "checkpoint", "num_crops", "num_slides"),
        *("accuracy", "accuracy_low", "accuracy_high", "auc", "auc_low", "auc_high"),
        *("over_gt", "over_gt_low", "over_gt_high"),
        *("over_bicubic", "over_bicubic_low", "over_bicubic_high", "paper_accuracy"),
    )
    writer = csv.DictWriter(sink, columns, lineterminator="\n", restval="")
    writer.writeheader()
    for result in results:
        kind = result.kind
        row: dict[str, Any] = {
            "corpus": result.corpus,
            "trained_on": result.trained_on,
            "kind": kind.key,
            "pictures": kind.title,
            "checkpoint": kind.checkpoint.uri if kind.checkpoint else "",
            "num_crops": result.num_crops,
            "num_slides": result.num_slides,
            "paper_accuracy": "" if result.paper is None else f"{result.paper:.4f}",
        }
        for name in ("accuracy", "auc", "over_gt", "over_bicubic"):
            estimate: Estimate | None = getattr(result, name)
            if estimate is not None:
                row |= {name: repr(estimate.value)}
            if estimate is not None and estimate.low is not None:
                row |= {f"{name}_low": repr(estimate.low), f"{name}_high": repr(estimate.high)}
        writer.writerow(row)
    return sink.getvalue()


# --------------------------------------------------------------------------------------- summary


def published_accuracy(
    kind: Kind, *, corpus: str, crop_px: int, scale: int, depth: int
) -> float | None:
    """What the paper's Table 5 says of a kind, 0..1; None where what is classified is not its.

    It is of x2, a ResNet-50, crops of 128 px (of PCam's images of 96 px), and of networks of one
    size and loss each.

    Args:
        kind: of pictures.
        corpus: `bcsr` or `pcam`.
        crop_px: side of a crop, px of HR.
        scale: SR factor.
        depth: of the classifier.
    """
    if scale != 2 or depth != PAPER_DEPTH or crop_px != PAPER_CROP_PX[corpus]:
        return None
    key = row_of(kind.checkpoint) if kind.checkpoint is not None else kind.key
    numbers = None if key is None else TABLE_5.get(key)
    return None if numbers is None else numbers[1 if corpus == "pcam" else 0] / 100


def _settings(config: StudyConfig) -> dict[str, object]:
    return asdict(config) | {"models": list(config.models)}


def _facts(
    plan: Plan, results: list[Result], *, seconds: float, num_workers: int | None
) -> dict[str, Any]:
    """What summary.json holds."""
    corpora = {}
    for corpus in plan.corpora:
        training = {}
        for trained_on, _ in plan.pairs():
            trained = _trained(corpus, trained_on)
            training[trained_on] = {
                "best_epoch": trained.best,
                "weights": trained.weights_uri,
                "weights_sha256": trained.weights_sha256,
                "seconds": sum(row.seconds for row in trained.history),
                "history": [asdict(row) for row in trained.history],
            }
        corpora[corpus.corpus.name] = {
            "uri": corpus.corpus.uri,
            "digest": corpus.corpus.digest,
            "crops": {split: index.class_counts() for split, index in corpus.crops.items()},
            "classifiers": training,
        }
    return {
        "code_version": code_version(),
        "config": _settings(plan.config),
        "corpora": corpora,
        "models": {
            kind.key: {"uri": kind.checkpoint.uri, "hash": checkpoint_hash(kind.checkpoint)}
            for kind in plan.kinds
            if kind.checkpoint
        },
        "seconds_of_last_run": round(seconds, 1),
        "num_workers_of_last_run": num_workers,
        "interval": {"level": 0.95, "resamples": NUM_RESAMPLES, "drawn": "slides"},
        "threshold": THRESHOLD,
        "accuracy": {
            f"{result.corpus}/{result.kind.key}": result.accuracy.value for result in results
        },
    }


def _trained(corpus: CorpusPlan, trained_on: str) -> Trained:
    trained = read_trained(corpus.classifier_uri(trained_on))
    assert trained is not None  # its predictions have been read
    return trained


def _words(results: list[Result], page: str) -> str:
    lines = []
    for result in results:
        accuracy = result.accuracy
        interval = (
            ""
            if accuracy.low is None
            else f" ({100 * accuracy.low:.2f} to {100 * (accuracy.high or 0):.2f})"
        )
        lines.append(
            f"{result.corpus}, {result.kind.title}: accuracy {100 * accuracy.value:.2f} %{interval}"
            f", AUC {result.auc.value:.4f}"
        )
    return "\n".join([*lines, f"report: {page}"])


# ------------------------------------------------------------------------------------------ page


def _page_facts(plan: Plan) -> dict[str, str]:
    config, classifier = plan.config, plan.config.classifier
    start = (
        "random weights" if classifier.weights is None else f"the weights of {classifier.weights}"
    )
    trained = (
        "on GT, for all kinds" if config.train_on == "gt" else "for each kind of picture its own"
    )
    return {
        "Classifier": f"ResNet-{classifier.depth}, from {start}",
        "Trained": trained,
        "Recipe": f"{plural(classifier.epochs, 'epoch')}, Adam {classifier.learning_rate:g}, "
        f"batch {classifier.batch_size}, {classifier.precision}, seed {classifier.seed}; "
        "flips and turns; classes as they come",
        "Super-resolution": f"x{config.crops.scale}, of the whole tile's LR, then cut",
        "Training took": f"{_training_seconds(plan) / 60:.1f} min",
        "Code": code_version(),
    }


def _training_seconds(plan: Plan) -> float:
    return sum(
        row.seconds
        for corpus in plan.corpora
        for trained_on, _ in plan.pairs()
        for row in _trained(corpus, trained_on).history
    )


def _corpus_report(plan: Plan, corpus: CorpusPlan, results: list[Result]) -> CorpusReport:
    index = corpus.crops["test"]
    tables = {kind.key: read_table(plan, corpus, kind) for kind in plan.kinds}
    rocs = []
    for kind in plan.kinds:
        probability = tables[kind.key]["probability"].to_numpy().astype(np.float64)
        false, true = roc_curve(probability, index.label)
        rocs.append(Roc(label=kind.title, false_positive=false, true_positive=true))
    histories = tuple(
        History(
            label=next(kind.title for kind in plan.kinds if kind.key == trained_on),
            loss=tuple(row.loss for row in trained.history),
            validation_accuracy=tuple(row.validation_accuracy for row in trained.history),
            best=trained.best,
        )
        for trained_on, trained in (
            (trained_on, _trained(corpus, trained_on)) for trained_on, _ in plan.pairs()
        )
    )
    return CorpusReport(
        title=corpus.corpus.title,
        facts=_corpus_facts(corpus),
        notes=_notes(plan, corpus, results),
        rows=tuple(_row(result) for result in results),
        rocs=tuple(rocs),
        histories=histories,
        examples=_examples(plan, corpus, tables),
    )


def _corpus_facts(corpus: CorpusPlan) -> dict[str, str]:
    def counts(index: CropIndex) -> str:
        found = index.class_counts()
        slides = len(set(index.slide_of_crops()))
        if not len(index):
            return "none"
        of_classes = f"{found['tumor']:,} tumour and {found['normal']:,} normal crops"
        return f"{of_classes} of {plural(slides, 'slide')}"

    return {
        "Dataset": f"{corpus.corpus.uri} ({corpus.corpus.digest[:12]})",
        "Crops": f"{corpus.corpus.crop_px} px of HR",
        "Training": counts(corpus.crops["train"]),
        "Validation": counts(corpus.crops["validation"]),
        "Test": counts(corpus.crops["test"]),
    }


def _notes(plan: Plan, corpus: CorpusPlan, results: list[Result]) -> tuple[str, ...]:
    config, notes = plan.config, []
    num_slides = results[0].num_slides
    if isinstance(corpus.corpus, PcamCorpus) and not corpus.corpus.has_slides:
        notes.append(
            "The tables that name each image's slide (…_meta.csv) are not beside the images: each "
            "image counts as independent, and intervals are narrower than they should be."
        )
    elif num_slides == 1:
        notes.append("All test crops are of one slide: there are no intervals.")
    elif num_slides < FEW_SLIDES:
        notes.append(
            f"The test crops are of {num_slides} slides only; intervals over so few are rough."
        )
    limits = [
        f"{what} {count:,}"
        for what, count in (
            ("tiles a split:", config.crops.max_tiles),
            ("crops a split:", config.crops.max_crops),
        )
        if count is not None
    ]
    if limits:
        notes.append(f"A seeded part of the dataset was used (at most {'; '.join(limits)}).")
    if not len(corpus.crops["validation"]):
        notes.append("There are no validation crops: the last epoch stands for the best.")
    shared = set(corpus.crops["train"].slide_of_crops()) & set(
        corpus.crops["test"].slide_of_crops()
    )
    if shared:
        notes.append(
            f"{plural(len(shared), 'slide')} of the test {'is' if len(shared) == 1 else 'are'} in "
            "the training split, too: accuracies are of tissue that the classifier, and models "
            "trained on this dataset, have partly seen."
        )
    others = [
        kind.title
        for kind in plan.kinds
        if kind.checkpoint is not None
        and (kind.checkpoint.dataset or {}).get("digest") != corpus.corpus.digest
    ]
    if others:
        cut = (
            " PCam is cut from CAMELYON16's slides, of which bcSR is made, too."
            if corpus.corpus.name == "pcam"
            else ""
        )
        notes.append(
            f"{', '.join(others)}: trained to super-resolve on another dataset or an unknown one; "
            f"whether that held slides of the test is not known here.{cut}"
        )
    (low, high) = sorted(corpus.crops["test"].class_counts().values())
    if high > 1.5 * low:
        notes.append(
            f"The test's classes are {low:,} and {high:,} crops: taking all for the larger one "
            f"would be {100 * high / (low + high):.1f} % accurate."
        )
    return tuple(notes)


def _row(result: Result) -> KindRow:
    def scaled(estimate: Estimate | None) -> Range | None:
        return None if estimate is None else Range(estimate.value, estimate.low, estimate.high)

    accuracy, auc = scaled(result.accuracy), scaled(result.auc)
    assert accuracy is not None
    assert auc is not None
    return KindRow(
        title=result.kind.title,
        detail=result.kind.checkpoint.uri if result.kind.checkpoint else "",
        is_reference=result.kind.key in (GT, LR),
        num_crops=result.num_crops,
        num_slides=result.num_slides,
        accuracy=accuracy,
        auc=auc,
        over_gt=scaled(result.over_gt),
        over_bicubic=scaled(result.over_bicubic),
        paper=result.paper,
    )


def _examples(
    plan: Plan, corpus: CorpusPlan, tables: Mapping[str, pa.Table]
) -> tuple[Example, ...]:
    uri = examples_uri(
        corpus.work_uri, kinds=plan.kinds, train_on=plan.config.train_on, tables=tables
    )
    if not storage.is_file(uri):
        raise DatasetError(f"{uri} is not there; run again, and the examples are made")
    rows = pq.read_table(io.BytesIO(storage.read_bytes(uri))).to_pylist()
    titles = {kind.key: kind.title for kind in plan.kinds}
    grouped: dict[int, list[dict[str, Any]]] = {}
    for row in rows:
        grouped.setdefault(row["number"], []).append(row)
    return tuple(
        Example(
            title=f"{group[0]['tile_id']} at {group[0]['x_px']}, {group[0]['y_px']} px",
            is_tumor=group[0]["label"] == "tumor",
            pictures=tuple(
                Picture(title=titles[row["kind"]], png=row["png"], probability=row["probability"])
                for row in group
            ),
        )
        for group in grouped.values()
    )
