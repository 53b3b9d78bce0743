"""A training run on storage: its settings, its checkpoints, and where to take it up again.

<output>/config.json              settings, dataset and code, written before the first update
<output>/checkpoints/step-.../    model.safetensors, training.safetensors, checkpoint.json
<output>/best.json, last.json     which of them is meant
<output>/metrics.csv, tensorboard/, report.html
"""

import dataclasses
import json
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from carn import storage
from carn.errors import CheckpointError, MissingObjectError, RunError
from carn.models.checkpoint import (
    Checkpoint,
    read_checkpoint,
    read_file,
    write_checkpoint,
    write_pointer,
)
from carn.training.config import TrainConfig
from carn.version import code_version

logger = logging.getLogger(__name__)

CONFIG = "config.json"
METRICS = "metrics.csv"
CHECKPOINTS = "checkpoints"
STATE = "training.safetensors"
# What a run owns below its output; nothing else is ever removed.
OWN_FILES = (CONFIG, METRICS, "best.json", "last.json", "report.html")
OWN_FOLDERS = (CHECKPOINTS, "tensorboard")

_STEP_FOLDER = re.compile(r"step-(\d{8,})")


@dataclass(frozen=True, kw_only=True)
class Progress:
    """What a run remembers beside tensors; kept as its checkpoints' metrics.

    Attributes:
        step: updates done.
        psnr, ssim: of the last validation.
        best_step, best_psnr, best_ssim: of the best one.
    """

    step: int = 0
    psnr: float | None = None
    ssim: float | None = None
    best_step: int | None = None
    best_psnr: float | None = None
    best_ssim: float | None = None

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> "Progress":
        """Where a run was when it wrote a checkpoint."""
        known = checkpoint.metrics
        numbers = {name: known.get(name) for name in ("psnr", "ssim", "best_psnr", "best_ssim")}
        best_step = int(known["best_step"]) if "best_step" in known else None
        return cls(step=checkpoint.step or 0, best_step=best_step, **numbers)

    def with_scores(self, step: int, psnr: float, ssim: float) -> "Progress":
        """Where the run is after a validation."""
        changed = dataclasses.replace(self, psnr=psnr, ssim=ssim)
        if self.best_psnr is not None and psnr <= self.best_psnr:
            return changed
        return dataclasses.replace(changed, best_step=step, best_psnr=psnr, best_ssim=ssim)

    def metrics(self) -> dict[str, float]:
        """The numbers among it that are known."""
        return {
            name: float(value)
            for name, value in dataclasses.asdict(self).items()
            if value is not None and name != "step"
        }


@dataclass(frozen=True, kw_only=True)
class RunFolder:
    """Where a run is kept.

    Attributes:
        uri: its folder or prefix.
        keep_checkpoints: how many of the newest checkpoints stay; the best one always does.
    """

    uri: str
    keep_checkpoints: int

    def begin(self, config: TrainConfig, *, dataset: Mapping[str, Any], overwrite: bool) -> None:
        """Say what is trained here, or check that it is what has been all along.

        Raises:
            RunError: the folder holds a run of other settings or on another dataset.
            StorageError: it cannot be written.
        """
        if overwrite:
            self.clear()
        facts = {"config": config.to_dict(), "dataset": dict(dataset)}
        known = self.facts()
        if known is not None:
            self._check_same(known, facts, config)
            storage.delete_unfinished(storage.join(self.uri, CHECKPOINTS))
            if known["config"]["steps"] >= config.steps:
                return
        version = known["code_version"] if known else code_version()
        text = json.dumps({"code_version": version, **facts}, indent=1, sort_keys=True) + "\n"
        storage.write_bytes(storage.join(self.uri, CONFIG), text.encode())

    def facts(self) -> dict[str, Any] | None:
        """What config.json says, or None where no run has begun.

        Raises:
            RunError: the file is something else's.
        """
        uri = storage.join(self.uri, CONFIG)
        try:
            content = json.loads(storage.read_bytes(uri))
            return {name: content[name] for name in ("config", "dataset", "code_version")}
        except MissingObjectError:
            return None
        except (ValueError, KeyError, TypeError) as error:
            raise RunError(f"{uri} is not of a training run; choose another --output") from error

    def _check_same(
        self, known: dict[str, Any], facts: dict[str, Any], config: TrainConfig
    ) -> None:
        way_out = "choose another --output, or begin anew with --overwrite"
        # A setting that an earlier version did not have was what its default is.
        old = _flat(TrainConfig().to_dict()) | _flat(known["config"])
        new = _flat(facts["config"])
        changed = {name for name in old.keys() | new.keys() if old.get(name) != new.get(name)}
        if config.optimizer.schedule == "halving":
            # The schedule does not look at the end, so a run may be made longer.
            changed -= {"steps"}
        if changed:
            raise RunError(
                f"{self.uri} holds a run with other settings ({', '.join(sorted(changed))}); "
                f"{way_out}"
            )
        if known["dataset"].get("digest") != facts["dataset"].get("digest"):
            raise RunError(
                f"{self.uri} holds a run on another dataset ({known['dataset'].get('uri')}); "
                f"{way_out}"
            )
        if known["code_version"] != code_version():
            logger.warning(
                "%s was begun by carn %s, this is %s: from here on its updates may differ",
                *(self.uri, known["code_version"], code_version()),
            )

    def clear(self) -> None:
        """Remove what a run has written here, and nothing else."""
        if self.facts() is None and not self.steps():
            return
        for name in OWN_FOLDERS:
            storage.delete_below(storage.join(self.uri, name))
        storage.delete([storage.join(self.uri, name) for name in OWN_FILES])

    # ---------------------------------------------------------------------------- checkpoints

    def steps(self) -> list[int]:
        """Steps that have a checkpoint folder, whole or not, ascending."""
        found = set()
        for item in storage.list_objects(storage.join(self.uri, CHECKPOINTS)):
            folder = item.uri.rsplit("/", 2)[-2]
            if match := _STEP_FOLDER.fullmatch(folder):
                found.add(int(match[1]))
        return sorted(found)

    def checkpoint_uri(self, step: int) -> str:
        """The folder of a step's checkpoint."""
        return storage.join(self.uri, CHECKPOINTS, _folder(step))

    def newest(self) -> tuple[Checkpoint, dict[str, Tensor]] | None:
        """The newest checkpoint that is whole, and its training state; None where there is none."""
        for step in reversed(self.steps()):
            try:
                checkpoint = read_checkpoint(self.checkpoint_uri(step))
                return checkpoint, read_state(checkpoint)
            except CheckpointError as error:
                logger.warning("%s is passed over: %s", self.checkpoint_uri(step), error)
        return None

    def save(
        self,
        progress: Progress,
        *,
        model: nn.Module,
        config: TrainConfig,
        dataset: Mapping[str, Any],
        loss: float,
        state: Mapping[str, Tensor],
    ) -> Checkpoint:
        """Write the checkpoint of where a run is, move the pointers, let old checkpoints go."""
        checkpoint = write_checkpoint(
            self.checkpoint_uri(progress.step),
            model=model,
            model_name=config.network.model,
            training=config.to_dict(),
            step=progress.step,
            dataset=dataset,
            metrics=progress.metrics() | {"loss": loss},
            extra_files={STATE: state_bytes(state)},
        )
        self.point(progress)
        self._prune(keep={progress.step, progress.best_step or progress.step})
        return checkpoint

    def repair(self, progress: Progress) -> Progress:
        """Make the pointers agree with where a run is taken up again."""
        if progress.best_step is not None and progress.best_step not in self.steps():
            logger.warning("the best checkpoint, of update %d, is gone", progress.best_step)
            progress = dataclasses.replace(
                progress,
                best_step=None if progress.psnr is None else progress.step,
                best_psnr=progress.psnr,
                best_ssim=progress.ssim,
            )
        self.point(progress)
        return progress

    def point(self, progress: Progress) -> None:
        """Say which checkpoints are the last and the best."""
        last = f"{CHECKPOINTS}/{_folder(progress.step)}"
        write_pointer(self.uri, name="last", checkpoint=last)
        # Without validation tiles nobody knows better: the last one stands for the best.
        best = f"{CHECKPOINTS}/{_folder(progress.best_step or progress.step)}"
        write_pointer(self.uri, name="best", checkpoint=best)

    def _prune(self, *, keep: set[int]) -> None:
        steps = self.steps()
        for step in set(steps) - set(steps[-self.keep_checkpoints :]) - keep:
            storage.delete_below(self.checkpoint_uri(step))


def state_bytes(state: Mapping[str, Tensor]) -> bytes:
    """Tensors by name as a safetensors file; equal tensors give equal bytes."""
    return safetensors.torch.save(
        {name: state[name].detach().cpu().contiguous() for name in sorted(state)}
    )


def read_state(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """The training state beside a checkpoint's weights.

    Raises:
        CheckpointError: it has none, as shipped weights do not, or it is damaged.
    """
    try:
        return safetensors.torch.load(read_file(checkpoint, name=STATE))
    except safetensors.SafetensorError as error:
        raise CheckpointError(f"{checkpoint.uri}: {STATE} is damaged ({error})") from error


def rng_tensors() -> dict[str, Tensor]:
    """The state of torch's generators."""
    found = {"rng/cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        found["rng/cuda"] = torch.cuda.get_rng_state()
    return found


def restore_rng(state: Mapping[str, Tensor]) -> None:
    """Put torch's generators back where `rng_tensors` found them."""
    torch.set_rng_state(state["rng/cpu"])
    if "rng/cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["rng/cuda"])


def _folder(step: int) -> str:
    return f"step-{step:08d}"


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat
