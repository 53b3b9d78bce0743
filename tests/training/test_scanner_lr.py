"""Runs on LR as scanners make it: stages, streams, resuming, starting points, conditions."""

import dataclasses
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from carn.bcsr.dataset import open_dataset
from carn.degradation.conditions import CONDITIONS
from carn.degradation.config import DegradationConfig
from carn.degradation.numbers import numbers_of
from carn.degradation.variants import LrMaker
from carn.errors import CheckpointError
from carn.models.checkpoint import load_model, read_checkpoint
from carn.training.config import TrainConfig, ValidationConfig, resolve
from carn.training.data import open_training_data
from carn.training.group import WorkerGroup
from carn.training.patches import Batch
from carn.training.recipes import with_values
from carn.training.recording import read_metrics
from carn.training.run_folder import RunFolder
from carn.training.samples import Sampler
from carn.training.start import starting_point
from carn.training.stream import map_in_threads
from carn.training.tiles import load_tiles
from carn.training.validation import Validator
from tests.training.lab import Killed, kill_at, last_hashes, run, tiny_config, tiny_engine

CPU = torch.device("cpu")
SCANNER = DegradationConfig(degradation="scanner", lr_variants=3)
FEW = ("bicubic", "jpeg80-420")


def scanner_config(model: str = "adaptive-carn", **changes: Any) -> TrainConfig:
    """A run whose estimator is trained for two updates, then the rest."""
    settings: dict[str, Any] = {
        "steps": 6,
        "degradation": SCANNER,
        "estimator_steps": 2 if model == "adaptive-carn" else None,
        "validation": {"validation_conditions": FEW, "max_validation_tiles": 2},
    }
    return tiny_config(model, **settings | changes)


def weights_of(output: str, step: int) -> dict[str, torch.Tensor]:
    folder = RunFolder(uri=output, keep_checkpoints=99)
    return load_model(folder.checkpoint_uri(step)).state_dict()


def batches(uri: str, path: Any) -> list[Batch]:
    config = scanner_config(patches={"order": "windowed", "samples_per_tile": 3}, steps=30)
    data = open_training_data(open_dataset(uri), config, path=path)
    found = data.batches(
        config, group=WorkerGroup(), device=CPU, first_step=0, map_units=map_in_threads
    )
    return list(found)


def test_streamed_batches_are_those_from_memory(dataset_uri: str) -> None:
    memory, stream = (batches(dataset_uri, path) for path in ("memory", "stream"))
    assert len(memory) == len(stream) == 30
    seen = set()
    for one, other in zip(memory, stream, strict=True):
        assert torch.equal(one.lr, other.lr)
        assert torch.equal(one.hr, other.hr)
        assert one.numbers is not None
        assert other.numbers is not None
        assert torch.equal(one.numbers, other.numbers)
        seen |= {tuple(row) for row in one.numbers.tolist()}
    # Many tiles in three variants each: whoever took one for all would see few.
    assert len(seen) > 30


def test_a_batch_is_told_how_its_own_lr_was_made(dataset_uri: str) -> None:
    config = scanner_config()
    data = open_training_data(open_dataset(dataset_uri), config, path="memory")
    samples = data.sampler.step(4)
    batch = next(
        iter(
            data.batches(
                config, group=WorkerGroup(), device=CPU, first_step=4, map_units=map_in_threads
            )
        )
    )
    assert batch.numbers is not None
    for place in range(len(samples)):
        way = LrMaker(config=SCANNER).way(
            tile=data.tile_ids[samples.tile[place]], variant=int(samples.variant[place])
        )
        np.testing.assert_array_equal(batch.numbers[place], numbers_of(way, scale=2))


def test_variants_are_drawn_alike_and_move_no_patch() -> None:
    def sampler(num_variants: int) -> Sampler:
        sizes = {"scale": 2, "patch_px": 16, "batch_size": 16, "seed": 3}
        return Sampler([(64, 64)] * 20, num_variants=num_variants, **sizes)  # type: ignore[arg-type]

    one, four = sampler(1), sampler(4)
    counts = np.zeros(4, int)
    for step in range(100):
        single, several = one.step(step), four.step(step)
        assert not single.variant.any()
        for name in ("tile", "top", "left", "flip_x", "flip_y", "transpose"):
            np.testing.assert_array_equal(getattr(single, name), getattr(several, name))
        counts += np.bincount(several.variant, minlength=4)
    assert counts.min() > 300


def test_first_the_estimator_learns_and_then_the_rest(dataset_uri: str, output: str) -> None:
    run(scanner_config(), dataset_uri, output, engine=tiny_engine(keep_checkpoints=9))
    first, last = weights_of(output, 2), weights_of(output, 6)
    torch.manual_seed(1)
    config = resolve(scanner_config()).network.model_config((0.6, 0.5, 0.55))
    from carn.models import build_model

    fresh = build_model("adaptive-carn", scale=2, config=config).state_dict()
    for name, weight in fresh.items():
        is_estimators = name.startswith("estimator.")
        assert torch.equal(weight, first[name]) != is_estimators, name
        assert torch.equal(first[name], last[name]) == is_estimators, name
    rows = read_metrics(output)
    assert [("estimate" in row, "l1" in row) for row in rows] == [
        (step <= 2, step > 2) for step in range(1, 7)
    ]


@pytest.mark.parametrize("kill", [1, 3, 5])
@pytest.mark.parametrize("data", ["memory", "stream"])
def test_a_killed_run_ends_where_an_unbroken_one_does(
    dataset_uri: str, tmp_path: Path, kill: int, data: str
) -> None:
    """Before, at and after the change from the first stage to the second."""
    config = scanner_config(patches={"order": "windowed"}, optimizer={"ema_decay": 0.5})
    engine = tiny_engine(data=data)
    unbroken, broken = str(tmp_path / "unbroken"), str(tmp_path / "broken")
    run(config, dataset_uri, unbroken, engine=engine)
    with pytest.raises(Killed):
        run(config, dataset_uri, broken, engine=engine, on_event=kill_at(kill))
    run(config, dataset_uri, broken, engine=engine)
    assert last_hashes(broken) == last_hashes(unbroken)


# ------------------------------------------------------------------------------- starting points


def started(config: TrainConfig, uri: str) -> TrainConfig:
    return dataclasses.replace(config, network=dataclasses.replace(config.network, start_from=uri))


def test_an_adaptive_network_starts_from_a_plain_one(dataset_uri: str, tmp_path: Path) -> None:
    plain, adaptive = str(tmp_path / "plain"), str(tmp_path / "adaptive")
    run(tiny_config(steps=2), dataset_uri, plain)
    config = started(scanner_config(), plain)
    run(config, dataset_uri, adaptive, engine=tiny_engine(keep_checkpoints=9))
    begun, source = weights_of(adaptive, 2), load_model(plain).state_dict()
    for name, weight in source.items():  # the estimator alone has learnt by then
        assert torch.equal(begun[name], weight), name
    mean = read_checkpoint(plain).model_config["mean"]
    assert read_checkpoint(adaptive).model_config["mean"] == mean
    # Nothing is left to do, and a network of its own kind gives all it has.
    again = starting_point(started(config, adaptive).network)
    assert again is not None
    model = load_model(adaptive)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    again.give_to(model)
    assert all(
        torch.equal(weight, again.tensors[name]) for name, weight in model.state_dict().items()
    )


def test_a_run_goes_on_when_its_starting_point_is_gone(dataset_uri: str, tmp_path: Path) -> None:
    start, whole, cut = (str(tmp_path / name) for name in ("start", "whole", "cut"))
    run(tiny_config(steps=1), dataset_uri, start)
    run(started(tiny_config(steps=4), start), dataset_uri, whole)
    run(started(tiny_config(steps=2), start), dataset_uri, cut)
    shutil.rmtree(start)
    run(started(tiny_config(steps=4), start), dataset_uri, cut)
    expected = weights_of(whole, 4)
    assert all(torch.equal(weight, expected[n]) for n, weight in weights_of(cut, 4).items())
    mean = read_checkpoint(whole).model_config["mean"]
    assert read_checkpoint(cut).model_config["mean"] == mean


def test_what_training_cannot_start_from_is_named(dataset_uri: str, tmp_path: Path) -> None:
    plain = str(tmp_path / "plain")
    run(tiny_config(steps=1), dataset_uri, plain)
    with pytest.raises(CheckpointError, match="is carn x2; training carn x4 cannot start from it"):
        starting_point(started(tiny_config(scale=4), plain).network)
    with pytest.raises(CheckpointError, match="training edsr x2 cannot start from it"):
        starting_point(started(tiny_config("edsr"), plain).network)
    wide = started(tiny_config(), plain)
    wide = dataclasses.replace(wide, network=dataclasses.replace(wide.network, channels=16))
    with pytest.raises(CheckpointError, match=r"cannot start from .*plain.*differs in body\.0"):
        run(wide, dataset_uri, str(tmp_path / "wide"))


# ------------------------------------------------------------------------------------- validation


def test_each_condition_has_a_score_and_the_mean_is_over_all(dataset_uri: str) -> None:
    conditions = {name: CONDITIONS[name] for name in FEW}
    dataset = open_dataset(dataset_uri)
    config = ValidationConfig(validation_crop_px=None)
    store = load_tiles(dataset, split="validation", scale=2, maker=LrMaker(conditions=conditions))
    validator = Validator(store, config, group=WorkerGroup())
    scores = validator.bicubic(CPU)
    parts = validator.by_condition(scores)
    assert list(parts) == list(FEW)
    clean = Validator(load_tiles(dataset, split="validation", scale=2), config, group=WorkerGroup())
    np.testing.assert_array_equal(parts["bicubic"].psnr, clean.bicubic(CPU).psnr)
    assert clean.by_condition(clean.bicubic(CPU)) == {}
    assert parts["jpeg80-420"].mean_psnr < parts["bicubic"].mean_psnr - 0.5
    assert scores.mean_psnr == pytest.approx(np.mean([p.mean_psnr for p in parts.values()]))
    assert validator.tile_ids[0] == "validation_0 (bicubic)"
    assert validator.tile_ids[-1] == "validation_3 (jpeg80-420)"
    assert "each under bicubic, jpeg80-420" in validator.convention


def test_scores_by_condition_are_kept_and_are_no_loss(dataset_uri: str, output: str) -> None:
    run(scanner_config("carn"), dataset_uri, output)
    header = Path(output, "metrics.csv").read_text().splitlines()[0].split(",")
    assert header[-4:] == [f"validation_{m}/{name}" for name in FEW for m in ("psnr", "ssim")]
    last = read_metrics(output)[-1]
    parts = [last[f"validation_psnr/{name}"] for name in FEW]
    assert last["validation_psnr"] == pytest.approx(np.mean(parts))
    from carn.report.train_summary import write_report

    assert "PSNR" in write_report(output)
    # Each beside interpolation of its own LR, not of all LR together.
    page = re.sub(r"<[^>]+>", " ", Path(output, "report.html").read_text())
    store = load_tiles(
        open_dataset(dataset_uri),
        split="validation",
        scale=2,
        maker=LrMaker(conditions={name: CONDITIONS[name] for name in FEW}),
    )
    settings = scanner_config().validation
    validator = Validator(store, settings, group=WorkerGroup())
    for name, part in validator.by_condition(validator.bicubic(CPU)).items():
        assert re.search(
            rf"{name}\s+{part.mean_psnr:.2f}\s+{last[f'validation_psnr/{name}']:.2f}", page
        )


# --------------------------------------------------------------------------------------- settings


def test_scanner_lr_is_validated_under_all_conditions_unless_said() -> None:
    config = tiny_config(degradation=SCANNER)
    assert resolve(config).validation.validation_conditions == tuple(CONDITIONS)
    assert resolve(tiny_config()).validation.validation_conditions == ()
    assert resolve(scanner_config()).validation.validation_conditions == FEW


def test_lists_of_any_length_are_read_from_files() -> None:
    values = {"degradation": "scanner", "jpeg_tables": ["ijg", "flat"], "jpeg_quality": [60, 90]}
    config = with_values(TrainConfig(), values)
    assert config.degradation.jpeg_tables == ("ijg", "flat")
    assert with_values(TrainConfig(), config.to_dict()) == config
    with pytest.raises(ValueError, match="jpeg_tables='kodak' must be one of"):
        with_values(TrainConfig(), {"degradation": "scanner", "jpeg_tables": ["kodak"]})
    with pytest.raises(ValueError, match=r"jpeg_quality=.* is not of type"):
        with_values(TrainConfig(), {"degradation": "scanner", "jpeg_quality": [60, 70, 80]})


def test_an_estimator_must_leave_something_to_the_rest() -> None:
    with pytest.raises(ValueError, match=r"estimator_steps=6 leave nothing.*--estimator-steps"):
        scanner_config(estimator_steps=6)
    assert resolve(scanner_config(estimator_steps=None)).estimator_steps == 2


def test_a_run_of_an_earlier_version_goes_on(dataset_uri: str, output: str) -> None:
    run(tiny_config(steps=2), dataset_uri, output)
    place = Path(output, "config.json")
    facts = json.loads(place.read_text())
    for name in ("degradation", "estimator_steps"):
        del facts["config"][name]
    del facts["config"]["network"]["start_from"]
    del facts["config"]["validation"]["validation_conditions"]
    place.write_text(json.dumps(facts))
    assert run(tiny_config(steps=4), dataset_uri, output).step == 4
