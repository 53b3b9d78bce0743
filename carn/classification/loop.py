"""Train a classifier: plain torch, one worker or many, from the first epoch or from any other.

Batches, flips and turns depend on the seed, the epoch and the place in it alone, so a run that is
taken up again ends with the same weights. The batch is shared by the workers. Batch normalisation
looks at all of it on GPUs; on CPUs, where torch has no such layer for several workers, each worker
normalises over its share, so that there their number changes the numbers.
"""

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, distributed, nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from carn.classification.classifier_folder import (
    Epoch,
    Trained,
    finish,
    read_trained,
    resume,
    save_epoch,
)
from carn.classification.config import ClassifierConfig
from carn.classification.crop_store import CropStore
from carn.classification.resnet import ResNet, load_weights
from carn.errors import RunError
from carn.training.group import WorkerGroup

logger = logging.getLogger(__name__)

# Crops of one forward pass without gradients.
TEST_BATCH = 128

Event = Mapping[str, Any]


class ClassifierDivergedError(RunError):
    """The loss stopped being a number."""


def train_classifier(
    config: ClassifierConfig,
    *,
    crops: CropStore,
    validation: CropStore | None,
    folder: str,
    device: torch.device,
    group: WorkerGroup,
    on_event: Callable[[Event], None] = lambda event: None,
) -> Trained:
    """Train to the last epoch, taking up what is in the folder; returns at once when finished.

    Args:
        config: how.
        crops: what to learn.
        validation: what chooses the epoch, by accuracy and then by loss; None for the last one.
        folder: folder or prefix, seen by every worker.
        device: where to compute.
        group: the workers.
        on_event: called on rank 0 after each epoch with {"kind": "epoch", "epochs": ..., and what
            Epoch holds}.

    Raises:
        RunError: more workers than the batch has pairs of crops, or no bf16 here.
        ClassifierDivergedError: the loss is no number any more.
        CheckpointError: the weights to start from, or those in the folder, are damaged.
    """
    if (found := read_trained(folder)) is not None:
        return found
    check_batch(config, num_workers=group.world_size, num_crops=len(crops))
    autocast = _autocast(config, device)
    torch.manual_seed(config.seed)
    model = ResNet(depth=config.depth)
    if config.weights is not None:
        load_weights(model, config.weights)
    model.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if device.type == "cuda" and group.world_size > 1:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)  # type: ignore[no-untyped-call]
    optimizer = torch.optim.Adam(model.parameters(), lr=config.learning_rate)
    history = resume(folder, model, optimizer, group=group)
    parallel: nn.Module = model
    if group.world_size > 1:
        ids = [device.index] if device.type == "cuda" else None
        parallel = DistributedDataParallel(model, device_ids=ids)
    for epoch in range(len(history) + 1, config.epochs + 1):
        begun = time.perf_counter()
        loss = _train_epoch(
            parallel,
            optimizer,
            config,
            crops,
            epoch=epoch,
            device=device,
            group=group,
            cast=autocast,
        )
        _share_buffers(model, group)
        scores = None if validation is None else score(model, validation, device, group=group)
        row = Epoch(
            epoch=epoch,
            loss=loss,
            validation_loss=scores[0] if scores else None,
            validation_accuracy=scores[1] if scores else None,
            seconds=time.perf_counter() - begun,
        )
        history.append(row)
        if group.rank == 0:
            save_epoch(folder, model, optimizer, history)
            on_event({"kind": "epoch", "epochs": config.epochs, **asdict(row)})
        group.barrier()
    if group.rank == 0:
        finish(folder, history)
    group.barrier()
    trained = read_trained(folder)
    if trained is None:
        raise RunError(
            f"worker {group.rank} does not see {folder}; the output must be storage that all nodes "
            "share, such as s3://"
        )
    return trained


def check_batch(config: ClassifierConfig, *, num_workers: int, num_crops: int | None) -> None:
    """Whether a batch can be shared out.

    Raises:
        RunError: a worker would get one crop or none, and batch normalisation needs two.
    """
    if 2 * num_workers > config.batch_size:
        raise RunError(
            f"{num_workers} workers cannot share a batch of {config.batch_size}, for each needs "
            "two crops; take fewer workers or a larger --batch-size"
        )
    if num_crops is not None and num_crops < 2 * num_workers:
        raise RunError(
            f"{num_crops} crops are too few to train on; take more of them, or a larger dataset"
        )


# ----------------------------------------------------------------------------------------- steps


def _train_epoch(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    config: ClassifierConfig,
    crops: CropStore,
    *,
    epoch: int,
    device: torch.device,
    group: WorkerGroup,
    cast: Callable[[], AbstractContextManager[Any]],
) -> float:
    """One pass over the crops; returns the mean loss, the same on every worker."""
    model.train()
    order = epoch_order(len(crops), config=config, epoch=epoch)
    num_steps = len(order)
    total = torch.zeros((), dtype=torch.float64, device=device)
    for place, (pixels, labels) in enumerate(
        _prefetch(_load(rows, turns, crops, group=group) for rows, turns in order)
    ):
        step = (epoch - 1) * num_steps + place
        rate = learning_rate(step, num_steps=num_steps * config.epochs, config=config)
        for parameters in optimizer.param_groups:
            parameters["lr"] = rate
        optimizer.zero_grad(set_to_none=True)
        batch_size = len(order[place][0])
        with cast():
            logits = model(to_input(pixels, device))
        loss = functional.cross_entropy(logits.float(), labels.to(device))
        torch.autograd.backward(loss * group.gradient_weight(batch_size))
        optimizer.step()
        total += loss.detach().double() * (len(labels) / batch_size)
    mean = float(group.sum(total)) / num_steps
    if not math.isfinite(mean):
        raise ClassifierDivergedError(
            f"the classifier's loss in epoch {epoch} is not a finite number; take a lower "
            "--learning-rate"
        )
    return mean


def epoch_order(
    num_crops: int, *, config: ClassifierConfig, epoch: int
) -> list[tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]]:
    """The batches of an epoch: rows of crops, and which of 8 flips and turns each gets.

    What does not fill a batch is left out of this epoch, as long as there is one full batch.
    """
    rng = np.random.default_rng([config.seed, epoch])
    rows, turns = rng.permutation(num_crops), rng.integers(8, size=num_crops)
    size = min(config.batch_size, num_crops)
    starts = range(0, num_crops - size + 1, size)
    return [(rows[start : start + size], turns[start : start + size]) for start in starts]


def learning_rate(step: int, *, num_steps: int, config: ClassifierConfig) -> float:
    """Of an update (from 0): half a cosine from the configured rate towards zero."""
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * step / num_steps))


def turn(crop: npt.NDArray[np.uint8], code: int) -> npt.NDArray[np.uint8]:
    """One of the 8 flips and turns of a square (side, side, 3) crop, as a view; 0 leaves it."""
    if code & 1:
        crop = crop[::-1]
    if code & 2:
        crop = crop[:, ::-1]
    return crop.transpose(1, 0, 2) if code & 4 else crop


def to_input(pixels: Tensor, device: torch.device) -> Tensor:
    """What the network takes, (b, 3, h, w) on 0..1, of (b, h, w, 3) uint8."""
    return pixels.to(device, non_blocking=True).permute(0, 3, 1, 2).float().div_(255)


def _load(
    rows: npt.NDArray[np.int64],
    turns: npt.NDArray[np.int64],
    crops: CropStore,
    *,
    group: WorkerGroup,
) -> Callable[[], tuple[Tensor, Tensor]]:
    own, own_turns = rows[group.rank :: group.world_size], turns[group.rank :: group.world_size]

    def load() -> tuple[Tensor, Tensor]:
        turned = [turn(crops.pixels[n], t) for n, t in zip(own, own_turns.tolist(), strict=True)]
        return torch.from_numpy(np.stack(turned)), torch.from_numpy(crops.index.label[own])

    return load


def _prefetch(
    loads: Iterator[Callable[[], tuple[Tensor, Tensor]]],
) -> Iterator[tuple[Tensor, Tensor]]:
    """Each batch, the next one being read meanwhile."""
    with ThreadPoolExecutor(1) as pool:
        waiting = None
        for load in loads:
            coming = pool.submit(load)
            if waiting is not None:
                yield waiting.result()
            waiting = coming
        if waiting is not None:
            yield waiting.result()


def _autocast(
    config: ClassifierConfig, device: torch.device
) -> Callable[[], AbstractContextManager[Any]]:
    if config.precision == "fp32":
        return nullcontext
    if device.type == "cuda" and not torch.cuda.is_bf16_supported():
        raise RunError("this GPU has no bf16; use --precision fp32")
    return lambda: torch.autocast(device.type, torch.bfloat16)


# ---------------------------------------------------------------------------------------- scores


def predict(
    model: nn.Module, pixels: npt.NDArray[np.uint8], device: torch.device
) -> npt.NDArray[np.float32]:
    """(n,) probability that each crop is tumour, in float32; the network is put in eval mode.

    Args:
        model: the classifier, on `device`.
        pixels: (n, side, side, 3) uint8.
        device: where to compute.
    """
    model.eval()
    found = [np.empty(0, np.float32)]
    with torch.inference_mode():
        for start in range(0, len(pixels), TEST_BATCH):
            block = torch.from_numpy(np.array(pixels[start : start + TEST_BATCH]))
            logits = model(to_input(block, device)).float()
            found.append(functional.softmax(logits, 1)[:, 1].cpu().numpy())
    return np.concatenate(found)


def score(
    model: nn.Module, crops: CropStore, device: torch.device, *, group: WorkerGroup
) -> tuple[float, float]:
    """Mean cross-entropy and accuracy over crops, shared out over the workers."""
    first, last = (len(crops) * (group.rank + end) // group.world_size for end in (0, 1))
    probability = predict(model, crops.pixels[first:last], device).astype(np.float64)
    label = crops.index.label[first:last]
    of_truth = np.where(label == 1, probability, 1 - probability)
    loss = -np.log(np.maximum(of_truth, np.finfo(np.float32).tiny)).sum()
    right = ((probability >= 0.5) == (label == 1)).sum()
    sums = group.sum(torch.tensor([loss, right], dtype=torch.float64, device=device)).tolist()
    return sums[0] / len(crops), sums[1] / len(crops)


def _share_buffers(model: nn.Module, group: WorkerGroup) -> None:
    """Give all workers rank 0's running means, which are those that are kept."""
    if group.world_size > 1:
        for buffer in model.buffers():
            distributed.broadcast(buffer, src=0)
