"""A study from end to end, on one of its workers; finished parts on storage are taken up.

<output>/<corpus>/study.json                       settings and corpus, written first
<output>/<corpus>/classifiers/<trained on>/        see carn.classification.loop
<output>/<corpus>/predictions/<trained on>/<kind>.parquet
<output>/<corpus>/_work/                           unfinished parts, SR of training crops, examples
"""

import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from carn import storage
from carn.classification.bcsr_corpus import open_bcsr
from carn.classification.classifier_folder import FINISHED, Trained, load_classifier, read_trained
from carn.classification.config import StudyConfig
from carn.classification.crop_store import PictureSource, load_crops
from carn.classification.crops import Corpus, CropIndex, Split, check_index, draw_subset
from carn.classification.examples import examples_uri, write_examples
from carn.classification.kinds import GT, Kind, find_kinds
from carn.classification.loop import Event, check_batch, train_classifier
from carn.classification.pcam import open_pcam
from carn.classification.prediction import predict_kind, read_predictions
from carn.errors import DatasetError, MissingObjectError, RunError
from carn.processor import keep_freed_memory
from carn.training.engine import choose_device
from carn.training.group import WorkerGroup
from carn.version import code_version

logger = logging.getLogger(__name__)

STUDY = "study.json"
SPLITS: tuple[Split, ...] = ("train", "validation", "test")
CORPORA = ("bcsr", "pcam")


@dataclass(frozen=True, kw_only=True, eq=False)
class CorpusPlan:
    """What is done on a corpus.

    Attributes:
        corpus: it.
        crops: the crops of each split that are used; none in `validation` where it has none.
        folder: where what comes out is kept.
    """

    corpus: Corpus
    crops: Mapping[Split, CropIndex]
    folder: str

    def classifier_uri(self, trained_on: str) -> str:
        """The folder of a classifier."""
        return storage.join(self.folder, "classifiers", trained_on)

    def predictions_uri(self, trained_on: str, kind: str) -> str:
        """The table of a kind."""
        return storage.join(self.folder, "predictions", trained_on, f"{kind}.parquet")

    @property
    def work_uri(self) -> str:
        """What is of no use once the study is finished."""
        return storage.join(self.folder, "_work")


@dataclass(frozen=True, kw_only=True, eq=False)
class Plan:
    """A study whose inputs are there."""

    config: StudyConfig
    kinds: tuple[Kind, ...]
    corpora: tuple[CorpusPlan, ...]

    def trained_on(self, kind: Kind) -> str:
        """The kind of picture that the classifier of a kind is trained on."""
        return GT if self.config.train_on == "gt" else kind.key

    def pairs(self) -> list[tuple[str, tuple[Kind, ...]]]:
        """Each classifier, with the kinds that are tested by it."""
        if self.config.train_on == "gt":
            return [(GT, self.kinds)]
        return [(kind.key, (kind,)) for kind in self.kinds]


def make_plan(config: StudyConfig, *, num_workers: int = 1) -> Plan:
    """Look at all inputs; nothing is written.

    Raises:
        ValueError: no corpus, or a model named twice.
        CheckpointError: a checkpoint is not whole, or of another scale.
        DatasetError: a corpus is not whole, unlabelled, or lacks a class.
        RunError: the batch cannot be shared by the workers.
        StorageError: storage does not let something be read.
    """
    crops = config.crops
    if config.dataset is None and config.pcam is None:
        raise ValueError("say what is classified: --dataset, --pcam, or both")
    kinds = find_kinds(config.models, scale=crops.scale)
    if config.classifier.weights is not None:
        storage.stat(storage.normalize(config.classifier.weights))
    found: list[Corpus] = []
    if config.dataset is not None:
        found.append(
            open_bcsr(config.dataset, crop_px=crops.crop_px, group_regex=crops.group_regex)
        )
    if config.pcam is not None:
        found.append(open_pcam(config.pcam, group_regex=crops.group_regex))
    plans = []
    for corpus in found:
        if corpus.crop_px % crops.scale:
            raise ValueError(
                f"{corpus.title}'s images of {corpus.crop_px} px do not divide by "
                f"scale={crops.scale}; leave it out, or take another --scale"
            )
        indexes: dict[Split, CropIndex] = {}
        for number, split in enumerate(SPLITS):
            indexes[split] = draw_subset(
                corpus.index(split),
                max_tiles=crops.max_tiles,
                max_crops=crops.max_crops,
                seed=3 * config.classifier.seed + number,
            )
            if split != "validation":
                check_index(indexes[split], uri=corpus.uri, split=split)
        check_batch(config.classifier, num_workers=num_workers, num_crops=len(indexes["train"]))
        folder = storage.join(storage.normalize(config.output), corpus.name)
        plans.append(CorpusPlan(corpus=corpus, crops=indexes, folder=folder))
    return Plan(config=config, kinds=kinds, corpora=tuple(plans))


def begin(plan: Plan, *, overwrite: bool) -> None:
    """Say what is done at the output, or check that it is what has been all along.

    Raises:
        RunError: the output holds a study of other settings or of another dataset.
        StorageError: it cannot be written.
    """
    for corpus in plan.corpora:
        uri = storage.join(corpus.folder, STUDY)
        if overwrite and _known(uri) is not None:
            storage.delete_below(corpus.folder)
        facts = {
            "learning": plan.config.learning(),
            "corpus": {"uri": corpus.corpus.uri, "digest": corpus.corpus.digest},
        }
        known = _known(uri)
        if known is None:
            text = json.dumps({"code_version": code_version(), **facts}, indent=1, sort_keys=True)
            storage.write_bytes(uri, text.encode() + b"\n")
            continue
        _check_same(known, facts, uri=corpus.folder)
        storage.delete_unfinished(corpus.folder)


def is_finished(plan: Plan) -> bool:
    """Whether every classifier is trained, every kind tested, and the page's examples are made."""
    return all(_is_done(plan, corpus) for corpus in plan.corpora)


def _is_done(plan: Plan, corpus: CorpusPlan) -> bool:
    tables = {}
    for trained_on, kinds in plan.pairs():
        trained = read_trained(corpus.classifier_uri(trained_on))
        if trained is None:
            return False
        for kind in kinds:
            uri = corpus.predictions_uri(trained_on, kind.key)
            table = read_predictions(uri, classifier_sha256=trained.weights_sha256)
            if table is None:
                return False
            tables[kind.key] = table
    # They are of the very kinds that are compared: with fewer of them, others are the examples.
    return storage.is_file(
        examples_uri(
            corpus.work_uri, kinds=plan.kinds, train_on=plan.config.train_on, tables=tables
        )
    )


def run_study(config: StudyConfig, *, on_event: Callable[[Event], None] = lambda _: None) -> None:
    """Train and test whatever is not yet; every worker of torch.distributed's group calls it.

    Args:
        config: the study, which `begin` has begun.
        on_event: called on rank 0 with {"kind": "epoch", "corpus": ..., "trained_on": ..., and what
            `train_classifier` says} and {"kind": "tested", "corpus", "trained_on", "pictures"}.

    Raises:
        CarnError: as `make_plan`, `train_classifier` and `predict_kind`.
    """
    group = WorkerGroup.current()
    plan = make_plan(config, num_workers=group.world_size)
    device = choose_device(config.device)
    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    if device.type == "cpu":
        keep_freed_memory()
    else:
        # TF32 keeps 10 bits of the mantissa: it would call itself fp32, and score as such.
        torch.backends.cudnn.allow_tf32 = False
        torch.backends.cuda.matmul.allow_tf32 = False
    for corpus in plan.corpora:
        worker = _Worker(plan, corpus, device=device, group=group, on_event=on_event)
        for trained_on, kinds in plan.pairs():
            trained = worker.train(trained_on)
            for kind in kinds:
                worker.test(kind, trained)
        worker.keep_examples()


class _Worker:
    """A corpus of the study on one of its workers."""

    def __init__(
        self,
        plan: Plan,
        corpus: CorpusPlan,
        *,
        device: torch.device,
        group: WorkerGroup,
        on_event: Callable[[Event], None],
    ) -> None:
        self.plan, self.corpus = plan, corpus
        self.device, self.group = device, group
        self.on_event = on_event
        self._model: tuple[str, nn.Module | None] = ("", None)

    def source(self, kind: Kind, split: Split) -> PictureSource:
        """What makes the pictures of a kind; its model is kept until another kind's turn."""
        scale = self.plan.config.crops.scale
        if self._model[0] != kind.key:
            self._model = (kind.key, kind.make_model(scale=scale, device=self.device))
        return PictureSource(
            corpus=self.corpus.corpus,
            split=split,
            index=self.corpus.crops[split],
            kind=kind,
            model=self._model[1],
            scale=scale,
            device=self.device,
        )

    def train(self, trained_on: str) -> Trained:
        """The classifier of a kind, trained if it is not."""
        folder = self.corpus.classifier_uri(trained_on)
        # Rank 0's answer is everybody's: another may come to look when the file is just there.
        if self.group.broadcast(int(storage.is_file(storage.join(folder, FINISHED)))):
            found = read_trained(folder)
            if found is None:
                raise RunError(
                    f"worker {self.group.rank} does not see {folder}; the output must be storage "
                    "that all nodes share, such as s3://"
                )
            return found
        (kind,) = (kind for kind in self.plan.kinds if kind.key == trained_on)
        stores = {
            split: load_crops(
                self.source(kind, split), work_uri=self.corpus.work_uri, group=self.group
            )
            for split in ("train", "validation")
            if len(self.corpus.crops[split])
        }
        names = {"corpus": self.corpus.corpus.title, "trained_on": kind.title}
        return train_classifier(
            self.plan.config.classifier,
            crops=stores["train"],
            validation=stores.get("validation"),
            folder=folder,
            device=self.device,
            group=self.group,
            on_event=lambda event: self.on_event({**event, **names}),
        )

    def test(self, kind: Kind, trained: Trained) -> None:
        """The predictions of a kind, made if they are not."""
        trained_on = self.plan.trained_on(kind)
        uri = self.corpus.predictions_uri(trained_on, kind.key)
        found = read_predictions(uri, classifier_sha256=trained.weights_sha256)
        if self.group.broadcast(int(found is not None)):
            return
        predict_kind(
            self.source(kind, "test"),
            classifier=load_classifier(trained, self.plan.config.classifier, self.device),
            classifier_sha256=trained.weights_sha256,
            uri=uri,
            parts_uri=storage.join(self.corpus.work_uri, "predictions", trained_on, kind.key),
            device=self.device,
            group=self.group,
        )
        if self.group.rank == 0:
            names = {"corpus": self.corpus.corpus.title, "trained_on": trained_on}
            self.on_event({"kind": "tested", "pictures": kind.title, **names})

    def keep_examples(self) -> None:
        """Pictures of a few crops on which the kinds differ, for the page; rank 0 makes them."""
        if self.group.rank == 0:
            tables = {
                kind.key: read_table(self.plan, self.corpus, kind) for kind in self.plan.kinds
            }
            write_examples(
                tables,
                kinds=self.plan.kinds,
                make_source=lambda kind: self.source(kind, "test"),
                train_on=self.plan.config.train_on,
                work_uri=self.corpus.work_uri,
            )
        self.group.barrier()


def read_table(plan: Plan, corpus: CorpusPlan, kind: Kind) -> Any:
    """The finished predictions of a kind.

    Raises:
        DatasetError: they are not there.
    """
    trained_on = plan.trained_on(kind)
    trained = read_trained(corpus.classifier_uri(trained_on))
    uri = corpus.predictions_uri(trained_on, kind.key)
    table = trained and read_predictions(uri, classifier_sha256=trained.weights_sha256)
    if table is None:
        raise DatasetError(f"{uri} is not of the classifier that is there; run again")
    return table


def _known(uri: str) -> dict[str, Any] | None:
    try:
        content = json.loads(storage.read_bytes(uri))
        return {name: content[name] for name in ("learning", "corpus", "code_version")}
    except MissingObjectError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise RunError(f"{uri} is not of a study; choose another --output") from error


def _check_same(known: dict[str, Any], facts: dict[str, Any], *, uri: str) -> None:
    way_out = "choose another --output, or begin anew with --overwrite"
    old, new = (
        {name: value for part in content["learning"].values() for name, value in part.items()}
        for content in (known, facts)
    )
    changed = {name for name in old.keys() | new.keys() if old.get(name) != new.get(name)}
    if changed:
        raise RunError(
            f"{uri} holds a study with other settings ({', '.join(sorted(changed))}); {way_out}"
        )
    if known["corpus"].get("digest") != facts["corpus"]["digest"]:
        raise RunError(
            f"{uri} holds a study of another dataset ({known['corpus'].get('uri')}); {way_out}"
        )
    if known["code_version"] != code_version():
        logger.warning(
            "%s was begun by carn %s, this is %s: what is finished is kept as it is",
            *(uri, known["code_version"], code_version()),
        )
