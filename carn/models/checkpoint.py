"""A trained model on storage: its weights, and beside them what they are.

A checkpoint is a folder or prefix with `model.safetensors`, further files the caller adds (training
state), and `checkpoint.json`, which is written last and lists the SHA-256 of each: a checkpoint
that is torn, or mixed of two, does not load. The weights' own header says the architecture too, so
the weights file loads alone. Nothing is ever unpickled.

A training run's folder holds checkpoints and two pointers to them, `best.json` and `last.json`.
Where a checkpoint is asked for, the run's folder stands for its best, and the name of a network
that comes with the project (`carn.models.shipped`) for that network.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import nn

from carn import storage
from carn.errors import CheckpointError, MissingObjectError
from carn.models.pickled import MAX_WEIGHTS_BYTES
from carn.models.shipped import SCHEME, place_of, shipped_names, shipped_uri
from carn.models.weights import (
    FORMAT,
    FORMAT_VERSION,
    Architecture,
    architecture_of,
    build,
    listed,
    pack_model,
    parse_architecture,
    parse_format,
    to_json,
    typed,
    unpack,
)
from carn.version import code_version

CHECKPOINT = "checkpoint.json"
WEIGHTS = "model.safetensors"
BEST = "best.json"
LAST = "last.json"


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """What a checkpoint is, without its weights.

    Attributes:
        uri: its folder, or the weights file where there is no more than that; `shipped:<name>`
            for one that comes with the project, which each machine has in a place of its own.
        model_name: architecture, a key of MODELS.
        model_config: the architecture's config, as JSON has it.
        scale: SR factor.
        training: the config of the training run; None for weights from elsewhere.
        step: optimizer updates so far; None where nothing is known.
        dataset: what identifies the dataset that was trained on; None where nothing is known.
        metrics: validation metrics by name.
        code_version: the code that wrote it; None for a weights file alone.
        weights_sha256: of `model.safetensors`, whose header holds architecture, config and scale.
        files: SHA-256 of each further file, by name.
        format_version: of the checkpoint's layout.
    """

    uri: str
    model_name: str
    model_config: Mapping[str, Any]
    scale: int
    training: Mapping[str, Any] | None
    step: int | None
    dataset: Mapping[str, Any] | None
    metrics: Mapping[str, float]
    code_version: str | None
    weights_sha256: str
    files: Mapping[str, str]
    format_version: int

    @property
    def architecture(self) -> Architecture:
        """The network without its weights."""
        return Architecture(name=self.model_name, config=self.model_config, scale=self.scale)

    @property
    def weights_uri(self) -> str:
        """The weights file."""
        return self.uri if _is_weights(self.uri) else storage.join(self.uri, WEIGHTS)


# -------------------------------------------------------------------------------------- writing


def write_checkpoint(
    uri: str,
    *,
    model: nn.Module,
    model_name: str,
    training: Mapping[str, Any] | None,
    step: int | None,
    dataset: Mapping[str, Any] | None,
    metrics: Mapping[str, float],
    extra_files: Mapping[str, bytes] | None = None,
) -> Checkpoint:
    """Write a checkpoint, over one that is there; equal models give equal weights files.

    Args:
        uri: its folder or prefix.
        model: a model of MODELS, bare, compiled, or wrapped for data-parallel training; its
            floating tensors are stored as float32.
        model_name: its name in MODELS.
        training: the training run's config, anything JSON can say; None for weights from elsewhere.
        step: optimizer updates so far.
        dataset: what identifies the dataset, likewise.
        metrics: finite numbers by name.
        extra_files: content by plain file name.

    Returns:
        What `read_checkpoint` finds there.

    Raises:
        CheckpointError: a weight is not finite.
        ValueError: the model is not what `model_name` says, a metric is not finite, or a file's
            name is taken or no plain name.
        AccessDeniedError, StorageError: the location cannot be written.
    """
    uri = storage.normalize(uri).rstrip("/")
    extra_files = extra_files or {}
    for name in extra_files:
        if name in (CHECKPOINT, WEIGHTS) or not re.fullmatch(r"\w[\w.-]*", name):
            raise ValueError(
                f"extra_files: {name!r} must be a plain file name, neither {CHECKPOINT} nor "
                f"{WEIGHTS}"
            )
    weights = pack_model(model, model_name=model_name)
    facts = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "model": asdict(architecture_of(model, model_name=model_name)),
        "training": training,
        "step": step,
        "dataset": dataset,
        "metrics": {name: float(value) for name, value in metrics.items()},
        "code_version": code_version(),
        "weights_sha256": _sha256(weights),
        "files": {name: _sha256(content) for name, content in extra_files.items()},
    }
    text = f"{to_json(facts, indent=1)}\n".encode()
    for name, content in extra_files.items():
        storage.write_bytes(storage.join(uri, name), content)
    storage.write_bytes(storage.join(uri, WEIGHTS), weights)
    storage.write_bytes(storage.join(uri, CHECKPOINT), text)
    return _parse(text, uri=uri)


def write_pointer(run_uri: str, *, name: Literal["best", "last"], checkpoint: str) -> None:
    """Make a checkpoint the best or the last of its run.

    Args:
        run_uri: the run's folder or prefix.
        name: which pointer.
        checkpoint: the checkpoint, relative to the run, such as `checkpoints/step-00001000`.

    Raises:
        ValueError: `checkpoint` leads out of the run.
        AccessDeniedError, StorageError: the location cannot be written.
    """
    if not storage.is_below(checkpoint):
        raise ValueError(f"checkpoint={checkpoint!r} must be a path below the run's folder")
    text = json.dumps({"checkpoint": checkpoint}) + "\n"
    storage.write_bytes(storage.join(storage.normalize(run_uri), f"{name}.json"), text.encode())


# -------------------------------------------------------------------------------------- reading


def read_checkpoint(uri: str) -> Checkpoint:
    """What a checkpoint is. Its weights are neither read nor verified, unless they stand alone.

    Args:
        uri: the folder, its `checkpoint.json` or `model.safetensors`, a weights file alone, a run's
            folder (its best checkpoint), a run's `best.json` or `last.json`, or the name of a
            network that comes with the project.

    Raises:
        CheckpointError: there is none, it is not whole, or it is of another format.
        AccessDeniedError, StorageError: storage does not let it be read.
    """
    place = _located(uri)
    if not _is_weights(place):
        return _parse(_read(storage.join(place, CHECKPOINT), owner=place), uri=place)
    content = _read(place, owner=place)
    architecture, _ = unpack(content, uri=place)
    return Checkpoint(
        uri=place,
        model_name=architecture.name,
        model_config=architecture.config,
        scale=architecture.scale,
        training=None,
        step=None,
        dataset=None,
        metrics={},
        code_version=None,
        weights_sha256=_sha256(content),
        files={},
        format_version=FORMAT_VERSION,
    )


def load_model(
    checkpoint: str | Checkpoint,
    *,
    device: str | torch.device = "cpu",
    expect_name: str | None = None,
    expect_scale: int | None = None,
) -> nn.Module:
    """The model of a checkpoint, in evaluation mode, float32. The global random state stays.

    Args:
        checkpoint: it, or any of the names that `read_checkpoint` takes.
        device: where to put the model.
        expect_name: the architecture it has to be.
        expect_scale: the SR factor it has to be made for.

    Raises:
        CheckpointError: as `read_checkpoint`; it is another architecture or scale than expected;
            the weights are damaged or of another checkpoint; tensors are missing, unexpected or
            misshapen.
        AccessDeniedError, StorageError: storage does not let it be read.
    """
    if isinstance(checkpoint, str):
        checkpoint = read_checkpoint(checkpoint)
    if expect_name not in (None, checkpoint.model_name):
        raise CheckpointError(
            f"{checkpoint.uri} is a {checkpoint.model_name} checkpoint; {expect_name} was asked for"
        )
    if expect_scale not in (None, checkpoint.scale):
        raise CheckpointError(
            f"{checkpoint.uri} super-resolves x{checkpoint.scale}; x{expect_scale} was asked for"
        )
    content = _read(checkpoint.weights_uri, owner=checkpoint.uri)
    _verify(content, checkpoint.weights_sha256, uri=checkpoint.weights_uri)
    architecture, tensors = unpack(content, uri=checkpoint.weights_uri)
    # The weights' hash stands for the model in outputs: a config altered beside it must not pass.
    if architecture != checkpoint.architecture:
        raise CheckpointError(
            f"{checkpoint.uri}: {CHECKPOINT} says {checkpoint.architecture}, the weights "
            f"{architecture}; {CHECKPOINT} was altered"
        )
    return build(architecture, tensors, uri=checkpoint.uri).to(device)


def read_file(checkpoint: Checkpoint, *, name: str) -> bytes:
    """One of the further files of a checkpoint, verified.

    Raises:
        CheckpointError: there is none of this name, or it is damaged.
        AccessDeniedError, StorageError: storage does not let it be read.
    """
    if name not in checkpoint.files:
        raise CheckpointError(f"{checkpoint.uri} has no {name}; it has {listed(checkpoint.files)}")
    uri = storage.join(checkpoint.uri, name)
    content = _read(uri, owner=checkpoint.uri)
    _verify(content, checkpoint.files[name], uri=uri)
    return content


def checkpoint_hash(checkpoint: str | Checkpoint) -> str:
    """What tells two models apart, for outputs to name: `sha256:...` over the weights file.

    The file's header holds architecture, config and scale, so that equal hashes mean equal results;
    when and on what it was trained does not matter. Weights in a folder are not read for it.

    Raises:
        CheckpointError, AccessDeniedError, StorageError: as `read_checkpoint`.
    """
    if isinstance(checkpoint, str):
        checkpoint = read_checkpoint(checkpoint)
    return f"sha256:{checkpoint.weights_sha256}"


def checkpoint_uri(uri: str) -> str:
    """The one spelling of what names a checkpoint: `shipped:<name>`, else as storage has it.

    Raises:
        CheckpointError: both a network that comes with the project and a path here are meant.
        UriError: as `storage.normalize`.
    """
    return shipped_uri(uri) or storage.normalize(uri).rstrip("/")


def _located(uri: str) -> str:
    """The checkpoint's folder, or the lone weights file, that a name means."""
    uri = checkpoint_uri(uri)
    if uri.startswith(SCHEME):
        return uri
    folder, _, name = uri.rpartition("/")
    if name == CHECKPOINT:
        return folder
    if name in (BEST, LAST):
        return _pointed_to(uri)
    if _is_weights(uri):
        has_facts = name == WEIGHTS and storage.is_file(storage.join(folder, CHECKPOINT))
        return folder if has_facts else uri
    best = storage.join(uri, BEST)
    if not storage.is_file(storage.join(uri, CHECKPOINT)) and storage.is_file(best):
        return _pointed_to(best)
    return uri


def _pointed_to(pointer: str) -> str:
    run = pointer.rpartition("/")[0]
    try:
        target = json.loads(_read(pointer, owner=run))["checkpoint"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{pointer} does not point to a checkpoint") from error
    if not storage.is_below(target):
        raise CheckpointError(f"{pointer} points to {target!r}, which is not below its run")
    return storage.join(run, target)


def _is_weights(uri: str) -> bool:
    return uri.endswith(".safetensors")


def _read(uri: str, *, owner: str) -> bytes:
    try:
        return storage.read_bytes(place_of(uri), max_bytes=MAX_WEIGHTS_BYTES)
    except MissingObjectError as error:
        name = storage.name_of(uri)
        raise CheckpointError(
            f"{owner} holds no finished checkpoint (no {name}); name the folder of a checkpoint or "
            "of a training run, a .safetensors file, or a network that comes with the project: "
            f"{', '.join(shipped_names())}"
        ) from error


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _verify(content: bytes, sha256: str, *, uri: str) -> None:
    if _sha256(content) != sha256:
        raise CheckpointError(
            f"{uri} is damaged or of another checkpoint: its SHA-256 is {_sha256(content)}, "
            f"not {sha256}"
        )


def _parse(content: bytes, *, uri: str) -> Checkpoint:
    name = storage.join(uri, CHECKPOINT)
    fields = parse_format(content, uri=name)
    try:
        architecture = parse_architecture(fields["model"])
        return Checkpoint(
            uri=uri,
            model_name=architecture.name,
            model_config=architecture.config,
            scale=architecture.scale,
            training=_optional(fields["training"], dict),
            step=_optional(fields["step"], int),
            dataset=_optional(fields["dataset"], dict),
            metrics={key: float(value) for key, value in fields["metrics"].items()},
            code_version=typed(fields["code_version"], str),
            weights_sha256=typed(fields["weights_sha256"], str),
            files={key: typed(value, str) for key, value in fields["files"].items()},
            format_version=fields["format_version"],
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{name} is not whole: {error!r}") from error


def _optional(value: Any, kind: type) -> Any:
    return None if value is None else typed(value, kind)
