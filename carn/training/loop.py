"""Train a network: plain torch, one worker or many, from the first update or from any checkpoint.

Runs in a notebook, on a bare GPU machine, or in the workers of `jobs/train.py`; workers find each
other by torch.distributed, when it was initialized before.
"""

import dataclasses
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from carn import storage
from carn.bcsr.dataset import BcsrDataset, open_dataset
from carn.errors import CheckpointError, DivergedError, RunError
from carn.models.checkpoint import Checkpoint
from carn.models.table import build_model
from carn.processor import has_bf16
from carn.training.config import TrainConfig, learning_rate, resolve
from carn.training.data import TrainingData, open_training_data
from carn.training.engine import EngineConfig, choose_device, prepare, set_up
from carn.training.group import WorkerGroup
from carn.training.loss_log import LossLog
from carn.training.patches import Batch
from carn.training.players import (
    at_stage,
    autocast_for,
    make_average,
    make_players,
    player_tensors,
    restore_players,
)
from carn.training.recording import Recorder
from carn.training.run_folder import Progress, RunFolder, restore_rng, rng_tensors
from carn.training.start import starting_point
from carn.training.stream import MapUnits, map_in_threads
from carn.training.tiles import dataset_digest, load_tiles
from carn.training.validation import Scores, Validator, validation_maker

logger = logging.getLogger(__name__)

# What rank 0 says as it goes: see `train`.
Event = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """What a run came to.

    Attributes:
        output: the run's folder.
        step: updates done.
        psnr, ssim: of the best checkpoint on the validation tiles; None where there are none.
        best_step: the update it was written after.
        bicubic_psnr, bicubic_ssim: of bicubic interpolation on the same tiles.
    """

    output: str
    step: int
    psnr: float | None
    ssim: float | None
    best_step: int | None
    bicubic_psnr: float | None
    bicubic_ssim: float | None


def train(
    config: TrainConfig,
    *,
    dataset_uri: str,
    output: str,
    engine: EngineConfig | None = None,
    map_units: MapUnits = map_in_threads,
    on_event: Callable[[Event], None] = lambda event: None,
    on_checkpoint: Callable[[Mapping[str, float]], None] = lambda metrics: None,
) -> TrainResult:
    """Train until `config.steps`, taking up what is at the output; returns at once when finished.

    Args:
        config: what to learn.
        dataset_uri: a finished bcSR dataset.
        output: folder or prefix of the run, seen by every worker.
        engine: how to run.
        map_units: with `data="stream"`, what maps the reading of patches over processes.
        on_event: called on rank 0 with {"kind": "begin" | "step" | "validation" | "checkpoint",
            "step": ..., "steps": ..., "elapsed_s": ..., and numbers by name}.
        on_checkpoint: called on every worker when a checkpoint has been written, with its metrics.

    Raises:
        DatasetError, RunError, CheckpointError, StorageError, ValueError: before the first update.
        DivergedError: the loss is no number any more.
    """
    run = _Run(
        resolve(config),
        engine or EngineConfig(),
        dataset=open_dataset(dataset_uri),
        output=storage.normalize(output),
    )
    run.on_event, run.on_checkpoint = on_event, on_checkpoint
    run.announce()
    for step, batch in run.batches(map_units):
        run.update(step, batch)
        run.look(step + 1)
    return run.finish()


def check_group(config: TrainConfig, engine: EngineConfig, *, num_workers: int) -> None:
    """Settings that do not go together, said before anything is read.

    Raises:
        RunError: more workers than samples.
        ValueError: a stream of shuffled samples.
    """
    batch_size = config.patches.batch_size
    if num_workers > batch_size:
        raise RunError(
            f"{num_workers} workers cannot share a batch of {batch_size}; take fewer workers or a "
            "larger --batch-size"
        )
    if engine.data == "stream" and config.patches.order != "windowed":
        raise ValueError("--data stream reads tiles in groups: it takes --order windowed")


class _Run:
    """A run on one of its workers: everything that an update touches."""

    on_event: Callable[[Event], None]
    on_checkpoint: Callable[[Mapping[str, float]], None]

    def __init__(
        self, config: TrainConfig, engine: EngineConfig, *, dataset: BcsrDataset, output: str
    ) -> None:
        self.config, self.engine = config, engine
        self.group = WorkerGroup.current()
        self.device = choose_device(engine.device)
        check_group(config, engine, num_workers=self.group.world_size)
        set_up(engine, self.device)
        self.folder = RunFolder(uri=output, keep_checkpoints=engine.keep_checkpoints)
        self.identity = {
            "uri": dataset.uri,
            "digest": dataset_digest(dataset),
            "hr_mpp": dataset.mpp_range,
        }
        if self.group.rank == 0:
            self.folder.begin(config, dataset=self.identity, overwrite=engine.overwrite)
        self.group.barrier()
        self.data: TrainingData = open_training_data(dataset, config, path=engine.data)
        found = self.folder.newest()
        # Rank 0's answer is everybody's.
        step = self.group.broadcast(found[0].step or 0 if found else 0)
        self._make_model(dataset, resumed=found[0] if found and step else None)
        self.progress = self._resume(found, step=step)
        self.validator: Validator | None = None
        self.bicubic: Scores | None = None
        if dataset.num_tiles("validation"):
            maker = validation_maker(config)
            scale = config.network.scale
            store = load_tiles(dataset, split="validation", scale=scale, maker=maker)
            self.validator = Validator(store, config.validation, group=self.group)
            self.bicubic = self.validator.bicubic(self.device)
        self.recorder: Recorder | None = None
        if self.group.rank == 0:
            self.recorder = Recorder(output, first_step=self.progress.step)
        self.losses = LossLog(batch_size=config.patches.batch_size, group=self.group)
        self.clock = self.begun = time.perf_counter()

    def _make_model(self, dataset: BcsrDataset, *, resumed: Checkpoint | None) -> None:
        network = self.config.network
        torch.manual_seed(self.config.seed)
        # A run that goes on needs its starting point no more, which may be gone.
        start = None if resumed is not None else starting_point(network)
        mean = None if start is None else start.mean
        if resumed is not None and (kept := resumed.model_config.get("mean")) is not None:
            mean = (kept[0], kept[1], kept[2])
        model_config = network.model_config(mean or dataset.channel_means)
        self.model = build_model(network.model, scale=network.scale, config=model_config)
        if start is not None:
            start.give_to(self.model)
        self.model.to(self.device).train()
        prepare(self.model, self.engine)
        self.players = make_players(self.model, self.config, device=self.device, group=self.group)
        self.average = make_average(self.model, self.config.optimizer.ema_decay)
        precision = self.config.optimizer.precision
        if precision == "bf16" and self.group.rank == 0 and not has_bf16(self.device):
            logger.warning("%s has no bf16 multiplication: fp32 is faster here", self.device)
        self.autocast = autocast_for(precision, self.device)

    @property
    def shipped(self) -> nn.Module:
        """The network that is validated and kept: the moving average, where there is one."""
        return self.model if self.average is None else self.average.module

    def announce(self) -> None:
        """Tell where the run begins."""
        self.clock = self.begun = time.perf_counter()
        facts = {"bicubic_psnr": self.bicubic.mean_psnr} if self.bicubic else {}
        if self.progress.best_psnr is not None:
            facts["best_psnr"] = self.progress.best_psnr
        self._tell("begin", self.progress.step, facts)

    def batches(self, map_units: MapUnits) -> Iterator[tuple[int, Batch]]:
        """The steps that are left, each with this worker's patches."""
        first = self.progress.step
        batches = self.data.batches(
            self.config,
            group=self.group,
            device=self.device,
            first_step=first,
            map_units=map_units,
        )
        return zip(range(first, self.config.steps), batches, strict=True)

    def update(self, step: int, batch: Batch) -> None:
        """One step of every optimiser."""
        config = self.config
        self.players = at_stage(
            self.players, step=step, config=config, device=self.device, group=self.group
        )
        terms = {
            player.name: player.update(
                batch.lr,
                batch.hr,
                numbers=batch.numbers,
                learning_rate=learning_rate(step, config),
                weight=self.group.gradient_weight(config.patches.batch_size),
                gradient_clip=config.optimizer.gradient_clip,
                autocast=self.autocast(),
            )
            for player in self.players
        }
        self.losses.add(terms)
        if self.average is not None:
            self.average.update_parameters(self.model)

    def look(self, done: int) -> None:
        """After an update: record, validate and keep, when it is time."""
        config, engine = self.config, self.engine
        is_last = done == config.steps
        is_validation = is_last or done % config.validation.validate_every == 0
        is_checkpoint = is_validation or done % engine.checkpoint_every == 0
        if not (is_checkpoint or done % engine.log_every == 0):
            return
        row = self._record(done)
        if is_checkpoint and not self._is_finite():
            # The loss was a number, what it did to the weights was not.
            raise self._diverged(done - 1)
        if is_validation and self.validator is not None:
            row |= self._validate(done, self.validator)
        if is_checkpoint:
            self._checkpoint(done, row)
        self.losses.clear()
        self.clock = time.perf_counter()

    def _record(self, done: int) -> dict[str, float]:
        for index in self.losses.not_finite():
            raise self._diverged(done - self.losses.num_steps + index)
        row = self.losses.means()
        seconds = time.perf_counter() - self.clock
        batch_size = self.config.patches.batch_size
        row |= {
            "learning_rate": learning_rate(done - 1, self.config),
            "images_per_s": self.losses.num_steps * batch_size / seconds,
        }
        if self.recorder is not None:
            elapsed = self.recorder.seconds + seconds
            self.recorder.add({"step": float(done), "seconds": elapsed, **row})
        self._tell("step", done, row)
        return row

    def _diverged(self, bad: int) -> DivergedError:
        kept = [step for step in self.folder.steps() if step <= bad]
        last = self.folder.checkpoint_uri(kept[-1]) if kept else None
        return DivergedError(bad + 1, self.data.names_at(bad), last)

    def _validate(self, done: int, validator: Validator) -> dict[str, float]:
        scores = validator.score(self.shipped, self.device)
        self.progress = self.progress.with_scores(done, scores.mean_psnr, scores.mean_ssim)
        found = {"validation_psnr": scores.mean_psnr, "validation_ssim": scores.mean_ssim}
        for name, part in validator.by_condition(scores).items():
            found[f"validation_psnr/{name}"] = part.mean_psnr
            found[f"validation_ssim/{name}"] = part.mean_ssim
        if self.recorder is not None:
            self.recorder.add({"step": float(done), **found})
        self._tell("validation", done, found)
        return found

    def _checkpoint(self, done: int, row: dict[str, float]) -> None:
        self.progress = dataclasses.replace(self.progress, step=done)
        if self.recorder is not None:
            self.recorder.flush()
            self.folder.save(
                self.progress,
                model=self.shipped,
                config=self.config,
                dataset=self.identity,
                loss=row["loss"],
                state=self._state(),
            )
        self._tell("checkpoint", done, {})
        self.on_checkpoint({"step": done, **row})

    def finish(self) -> TrainResult:
        """Close what is open; what the run came to."""
        if self.recorder is not None:
            self.recorder.close()
        self.group.barrier()
        progress, bicubic = self.progress, self.bicubic
        return TrainResult(
            output=self.folder.uri,
            step=progress.step,
            psnr=progress.best_psnr,
            ssim=progress.best_ssim,
            best_step=progress.best_step,
            bicubic_psnr=bicubic.mean_psnr if bicubic else None,
            bicubic_ssim=bicubic.mean_ssim if bicubic else None,
        )

    def _tell(self, kind: str, step: int, numbers: Mapping[str, float]) -> None:
        if self.group.rank == 0:
            facts = {
                "steps": self.config.steps,
                "num_workers": self.group.world_size,
                "elapsed_s": time.perf_counter() - self.begun,
            }
            self.on_event({"kind": kind, "step": step, **facts, **numbers})

    # ------------------------------------------------------------------------------- state

    def _state(self) -> dict[str, Tensor]:
        """Every tensor that the next update depends on."""
        state = dict(player_tensors(self.players)) | rng_tensors()
        if self.average is not None:
            for name, value in self.average.state_dict().items():
                state[f"average/{name}"] = value
        return state

    def _is_finite(self) -> bool:
        """Whether all that would be kept is made of numbers, on every worker."""
        kept = [tensor for tensor in self._state().values() if tensor.is_floating_point()]
        bad = torch.stack([(~torch.isfinite(tensor)).any().to(self.device) for tensor in kept])
        return not bool(self.group.sum(bad.double()).any())

    def _resume(self, found: tuple[Checkpoint, dict[str, Tensor]] | None, *, step: int) -> Progress:
        """Put everything where the newest whole checkpoint left it, which is of this step."""
        if step == 0:
            return Progress()
        if found is None or found[0].step != step:
            raise RunError(
                f"worker {self.group.rank} does not see checkpoint {step} below "
                f"{self.folder.uri}; the output must be storage that all nodes share, such as s3://"
            )
        checkpoint, state = found
        try:
            restore_players(self.players, state)
            restore_rng(state)
            if self.average is not None:
                prefix = "average/"
                kept = {n.removeprefix(prefix): t for n, t in state.items() if n.startswith(prefix)}
                self.average.load_state_dict(kept)
        except (KeyError, RuntimeError, ValueError) as error:
            raise CheckpointError(
                f"{checkpoint.uri} holds the state of another network: {error}"
            ) from error
        progress = Progress.of(checkpoint)
        if self.group.rank == 0:
            progress = self.folder.repair(progress)
            logger.info("goes on from update %s (%s)", f"{step:,}", checkpoint.uri)
        return progress
