"""A sweep on storage: what its trials have come to, over their seeds, and what is made of that."""

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
import yaml

from carn.errors import RunError
from carn.models import build_model
from carn.training.config import TrainConfig
from carn.training.recipes import flat, recipe, with_values
from carn.training.run_folder import Progress, RunFolder
from carn.tuning.space import Space, parse_space
from carn.tuning.sweep import (
    Outcome,
    SweepFolder,
    Trial,
    best_by_scale,
    best_name,
    best_of,
    best_yaml,
    csv_bytes,
    join_seeds,
    make_trial,
    parquet_bytes,
    results_table,
    steps_of,
    trials_table,
)

DATASET = {"uri": "/data/bcsr", "digest": "d1"}


@pytest.fixture
def space() -> Space:
    content = {
        "settings": {"num_blocks": 1, "channels": 16, "steps": 10},
        "search": {"reduction": [2, 4]},
        "seeds": [1, 7],
    }
    return parse_space(content, name="small")


@pytest.fixture
def base(space: Space) -> TrainConfig:
    return space.start(recipe("paper", model="carn", scale=2))


def pretend(
    folder: SweepFolder, space: Space, base: TrainConfig, trial: Trial, *, step: int, psnr: float
) -> None:
    """A run as the training loop leaves it at a step."""
    config = space.config(trial.point, base=base, seed=trial.seed)
    run = RunFolder(uri=folder.trial_uri(trial), keep_checkpoints=1)
    folder.note_trial(trial)
    run.begin(config, dataset=DATASET, overwrite=False)
    network = config.network
    model = build_model("carn", scale=2, config=network.model_config((0.5, 0.5, 0.5)))
    run.save(
        Progress(step=step, psnr=psnr, ssim=0.9, best_step=step, best_psnr=psnr, best_ssim=0.9),
        model=model,
        config=config,
        dataset=DATASET,
        loss=1.0,
        state={"x": torch.zeros(1)},
    )


def test_trials_and_their_states(tmp_path: Path, space: Space, base: TrainConfig) -> None:
    folder = SweepFolder(uri=str(tmp_path))
    folder.begin(space, base=base, dataset=DATASET)
    trials = [make_trial(point, seed=seed) for point in space.grid() for seed in space.seeds]
    assert len({trial.name for trial in trials}) == 4
    assert [o.state for o in folder.outcomes(trials, base=base)] == ["new"] * 4
    pretend(folder, space, base, trials[0], step=10, psnr=31.0)
    pretend(folder, space, base, trials[1], step=5, psnr=30.0)
    pretend(folder, space, base, trials[2], step=5, psnr=29.0)
    folder.note_stopped(trials[2], step=5)
    folder.note_trial(trials[3])
    folder.note_failure(trials[3], "the loss is no number", is_lasting=True)
    found = folder.outcomes(trials, base=base)
    assert [o.state for o in found] == ["done", "begun", "stopped", "failed"]
    assert [o.psnr_db for o in found] == [31.0, 30.0, 29.0, None]
    assert (found[3].reason, found[3].is_lasting) == ("the loss is no number", True)
    assert {trial.name for trial in folder.trials()} == {trial.name for trial in trials}
    for trial in trials[2:]:
        folder.reopen(trial)
    assert [o.state for o in folder.outcomes(trials[2:], base=base)] == ["begun", "begun"]


def test_a_folder_is_one_sweeps(tmp_path: Path, space: Space, base: TrainConfig) -> None:
    folder = SweepFolder(uri=str(tmp_path))
    folder.begin(space, base=base, dataset=DATASET)
    folder.begin(space, base=with_values(base, {"reduction": 4, "seed": 9}), dataset=DATASET)
    with pytest.raises(RunError, match="other settings"):
        folder.begin(space, base=with_values(base, {"steps": 11}), dataset=DATASET)
    with pytest.raises(RunError, match="dataset"):
        folder.begin(space, base=base, dataset=DATASET | {"digest": "d2"})
    (tmp_path / "sweep.json").write_text("[]")
    with pytest.raises(RunError, match="not of a sweep"):
        folder.begin(space, base=base, dataset=DATASET)


def outcome(point: dict[str, int], seed: int, psnr: float | None, state: str = "done") -> Outcome:
    trial = make_trial(dict(point), seed=seed)
    return Outcome(trial=trial, state=state, psnr_db=psnr, ssim=0.9, seconds=seed, step=10)  # type: ignore[arg-type]


def test_seeds_are_one_point(space: Space, base: TrainConfig) -> None:
    outcomes = [
        outcome({"reduction": 2}, 1, 30.0),
        outcome({"reduction": 4}, 1, 31.0),
        outcome({"reduction": 2}, 7, 32.0),
        outcome({"reduction": 4}, 7, 31.5, "begun"),
    ]
    two, four = join_seeds(space, outcomes, base=base)
    assert (two.psnr_db, two.seeds, two.seconds) == (31.0, (1, 7), 4.0)
    assert two.psnr_std == pytest.approx(2**0.5)
    # The seed that is not done does not count, and the point is not done.
    assert (four.psnr_db, four.psnr_std, four.state) == (31.0, None, "begun")
    assert two.num_params > four.num_params
    # Points whose seeds are all there go first.
    assert best_of([two, four]) is two
    assert best_of([]) is None


def test_scales_do_not_compete(base: TrainConfig) -> None:
    space = parse_space({"search": {"scale": [2, 4], "reduction": [2, 4]}}, name="scales")
    outcomes = [
        outcome({"scale": scale, "reduction": reduction}, 1, 40.0 / scale + reduction)
        for scale in (2, 4)
        for reduction in (2, 4)
    ]
    best = best_by_scale(join_seeds(space, outcomes, base=base))
    assert {scale: result.point["reduction"] for scale, result in best.items()} == {2: 4, 4: 4}
    assert [best_name(scale) for scale in best] == ["best-x2.yaml", "best-x4.yaml"]
    assert best_by_scale([]) == {}


def test_a_run_is_whole_by_its_own_steps(base: TrainConfig) -> None:
    assert steps_of(make_trial({"reduction": 2}, seed=1), base) == base.steps
    assert steps_of(make_trial({"steps": 7}, seed=1), base) == 7


def test_the_best_config_trains(space: Space, base: TrainConfig, tmp_path: Path) -> None:
    results = join_seeds(space, [outcome({"reduction": 2}, 1, 30.0)], base=base)
    text = best_yaml(space, results[0], base=base)
    settings = yaml.safe_load(text)
    config = with_values(TrainConfig(), flat(settings))
    assert config.network.reduction == 2
    assert config.steps == 10
    assert "seed" not in settings


def test_tables(space: Space, base: TrainConfig, tmp_path: Path) -> None:
    outcomes = [
        outcome({"reduction": 2}, 1, 30.0),
        outcome({"reduction": 4}, 1, 31.0),
        outcome({"reduction": 4}, 7, None, "failed"),
    ]
    path = tmp_path / "t.parquet"
    path.write_bytes(parquet_bytes(trials_table(outcomes, space.columns)))
    rows = pq.read_table(path).to_pylist()
    assert [row["reduction"] for row in rows] == [2, 4, 4]
    assert [row["state"] for row in rows] == ["done", "done", "failed"]
    results = results_table(join_seeds(space, outcomes, base=base), space.columns)
    assert results["reduction"].to_pylist() == [4, 2]
    assert csv_bytes(results).decode().splitlines()[0].startswith('"reduction","state"')
    json.dumps(results.to_pylist())
