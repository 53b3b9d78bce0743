"""A classifier on storage: its epochs, and where to take its training up again.

`<folder>/epoch-0001.safetensors`  the network after an epoch, by torchvision's names
`<folder>/state.safetensors`       the optimiser after the last epoch; its header holds the history
`<folder>/classifier.json`         written last: the history, and which epoch is the best
"""

import hashlib
import json
import logging
import math
from dataclasses import asdict, dataclass
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from carn import storage
from carn.classification.config import ClassifierConfig
from carn.classification.resnet import ResNet
from carn.errors import CheckpointError, MissingObjectError, RunError
from carn.training.group import WorkerGroup

logger = logging.getLogger(__name__)

FINISHED = "classifier.json"
STATE = "state.safetensors"


@dataclass(frozen=True, kw_only=True)
class Epoch:
    """What an epoch came to.

    Attributes:
        epoch: from 1.
        loss: mean cross-entropy of its updates.
        validation_loss, validation_accuracy: after it; None without validation crops.
        seconds: that it took, validation included.
    """

    epoch: int
    loss: float
    validation_loss: float | None
    validation_accuracy: float | None
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A trained classifier.

    Attributes:
        history: its epochs.
        best: the epoch whose weights it has.
        weights_uri: they.
        weights_sha256: of their file.
    """

    history: tuple[Epoch, ...]
    best: int
    weights_uri: str
    weights_sha256: str


def best_epoch(history: list[Epoch]) -> int:
    """The epoch with the highest validation accuracy, then the lowest loss, then the earliest.

    Without validation it is the last one.
    """
    scored = [row for row in history if row.validation_accuracy is not None]
    if not scored:
        return history[-1].epoch

    def rank(row: Epoch) -> tuple[float, float, int]:
        loss = row.validation_loss
        assert row.validation_accuracy is not None
        assert loss is not None
        return (-row.validation_accuracy, loss if math.isfinite(loss) else math.inf, row.epoch)

    return min(scored, key=rank).epoch


def read_trained(folder: str) -> Trained | None:
    """The finished classifier of a folder; None where there is none yet.

    Raises:
        CheckpointError: the folder holds something else.
    """
    uri = storage.join(folder, FINISHED)
    try:
        content = json.loads(storage.read_bytes(uri))
        return Trained(
            history=tuple(Epoch(**row) for row in content["history"]),
            best=content["best"],
            weights_uri=storage.join(folder, _weights(content["best"])),
            weights_sha256=content["weights_sha256"],
        )
    except MissingObjectError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{uri} is not of a classifier ({error!r}); remove it") from error


def load_classifier(trained: Trained, config: ClassifierConfig, device: torch.device) -> ResNet:
    """The network of a finished classifier, verified, in evaluation mode.

    Raises:
        CheckpointError: its file is damaged or another's.
    """
    content = storage.read_bytes(trained.weights_uri)
    _verify(content, trained.weights_sha256, uri=trained.weights_uri)
    model = ResNet(depth=config.depth)
    model.load_state_dict(safetensors.torch.load(content))
    return model.to(device).eval()


def save_epoch(
    folder: str, model: nn.Module, optimizer: torch.optim.Optimizer, history: list[Epoch]
) -> None:
    """Write the last epoch: weights first, then what says that they count; old weights go."""
    epoch = history[-1].epoch
    weights = safetensors.torch.save(
        {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    )
    storage.write_bytes(storage.join(folder, _weights(epoch)), weights)
    facts = json.dumps(
        {
            "history": [asdict(row) for row in history],
            "sha256": {**_known_hashes(folder), str(epoch): _sha256(weights)},
        }
    )
    state = {
        f"{number}/{name}": value.detach().cpu().contiguous()
        for number, values in optimizer.state_dict()["state"].items()
        for name, value in values.items()
    }
    content = safetensors.torch.save(state, metadata={"facts": facts})
    storage.write_bytes(storage.join(folder, STATE), content)
    for old in range(1, epoch):
        if old != best_epoch(history):
            storage.delete([storage.join(folder, _weights(old))])


def finish(folder: str, history: list[Epoch]) -> None:
    """Say that the classifier is trained; only the best epoch's weights stay."""
    best = best_epoch(history)
    facts = {
        "history": [asdict(row) for row in history],
        "best": best,
        "weights_sha256": _known_hashes(folder)[str(best)],
    }
    text = json.dumps(facts, indent=1) + "\n"
    storage.write_bytes(storage.join(folder, FINISHED), text.encode())
    storage.delete([storage.join(folder, STATE)])
    for row in history:
        if row.epoch != best:
            storage.delete([storage.join(folder, _weights(row.epoch))])


def resume(
    folder: str, model: nn.Module, optimizer: torch.optim.Optimizer, *, group: WorkerGroup
) -> list[Epoch]:
    """Put network and optimiser where the last whole epoch left them; its history.

    Raises:
        CheckpointError: what is there is damaged.
        RunError: a worker does not see what rank 0 sees.
    """
    uri = storage.join(folder, STATE)
    found = _read_state(uri)
    num_done = group.broadcast(0 if found is None else len(found[0]["history"]))
    if num_done == 0:
        return []
    if found is None or len(found[0]["history"]) != num_done:
        raise RunError(
            f"worker {group.rank} does not see epoch {num_done} below {folder}; the output must be "
            "storage that all nodes share, such as s3://"
        )
    facts, state = found
    weights_uri = storage.join(folder, _weights(num_done))
    content = storage.read_bytes(weights_uri)
    _verify(content, facts["sha256"][str(num_done)], uri=weights_uri)
    model.load_state_dict(safetensors.torch.load(content))
    values: dict[int, dict[str, Tensor]] = {}
    for key, value in state.items():
        number, _, name = key.partition("/")
        values.setdefault(int(number), {})[name] = value
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": values, "param_groups": groups})
    if group.rank == 0:
        logger.info("the classifier goes on after epoch %d (%s)", num_done, folder)
    return [Epoch(**row) for row in facts["history"]]


def _read_state(uri: str) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
    try:
        content = storage.read_bytes(uri)
    except MissingObjectError:
        return None
    try:
        length = int.from_bytes(content[:8], "little")
        facts = json.loads(json.loads(content[8 : 8 + length])["__metadata__"]["facts"])
        return facts, safetensors.torch.load(content)
    except (safetensors.SafetensorError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"{uri} is damaged ({error}); remove its folder, and the classifier is trained anew"
        ) from error


def _known_hashes(folder: str) -> dict[str, str]:
    found = _read_state(storage.join(folder, STATE))
    hashes: dict[str, str] = found[0]["sha256"] if found else {}
    return hashes


def _weights(epoch: int) -> str:
    return f"epoch-{epoch:04d}.safetensors"


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _verify(content: bytes, sha256: str, *, uri: str) -> None:
    if _sha256(content) != sha256:
        raise CheckpointError(
            f"{uri} is damaged or of another run; remove its folder, and the classifier is "
            "trained anew"
        )
