"""A run: it learns, ends where an unbroken one would however often it is killed, and says why not.

Equal means equal to the bit: weights, optimizers, averages, generators.
"""

import dataclasses
import functools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from carn import storage
from carn.errors import DatasetError, DivergedError, RunError
from carn.models.checkpoint import load_model, read_checkpoint
from carn.models.srgan import SrganDiscriminator
from carn.training import players
from carn.training.config import TrainConfig
from carn.training.loop import TrainResult
from carn.training.objectives import PixelObjective
from carn.training.recording import read_metrics
from carn.training.run_folder import RunFolder
from tests.training.lab import (
    NETWORKS,
    Killed,
    kill_at,
    last_hashes,
    listening,
    run,
    tiny_config,
    tiny_engine,
    write_dataset,
)


@pytest.fixture(autouse=True)
def small_discriminator(monkeypatch: pytest.MonkeyPatch) -> None:
    """SRGAN's has 64 times the weights of the generators here."""
    monkeypatch.setattr(players, "SrganDiscriminator", lambda: SrganDiscriminator(channels=4))


def numbers(output: str) -> list[dict[str, float]]:
    """The rows of metrics.csv without what the clock decides."""
    clock = ("seconds", "images_per_s")
    return [
        {name: value for name, value in row.items() if name not in clock}
        for row in read_metrics(output)
    ]


@pytest.fixture
def both(dataset_uri: str, tmp_path: Path) -> Callable[..., tuple[str, str]]:
    """An unbroken run, and one that is killed and taken up; returns their folders."""

    def make(config: TrainConfig, *kills: int, **options: Any) -> tuple[str, str]:
        unbroken, broken = str(tmp_path / "unbroken"), str(tmp_path / "broken")
        run(config, dataset_uri, unbroken, **options)
        for step in kills:
            with pytest.raises(Killed):
                run(config, dataset_uri, broken, on_event=kill_at(step), **options)
        torch.rand(7)  # another process's generator would be elsewhere
        run(config, dataset_uri, broken, **options)
        return unbroken, broken

    return make


# -------------------------------------------------------------------------------------- resuming

RESUMED = {
    "ema": (tiny_config(optimizer={"ema_decay": 0.5}, steps=7), (5,)),
    "cosine-clip-warmup": (
        tiny_config(
            optimizer={"schedule": "cosine", "gradient_clip": 0.5, "warmup_steps": 3}, steps=7
        ),
        (5,),
    ),
    "twice": (tiny_config(steps=7), (3, 6)),
    "before-any-checkpoint": (tiny_config(steps=3), (1,)),
    "weight-decay-halving": (
        tiny_config(optimizer={"weight_decay": 0.01, "halve_every": 2}, steps=7),
        (6,),
    ),
    "bf16": (tiny_config(optimizer={"precision": "bf16"}, steps=5), (3,)),
    "srgan": (tiny_config("srgan", optimizer={"ema_decay": 0.5}, steps=5), (3,)),
    "srcnn": (tiny_config("srcnn", steps=5), (3,)),
    "swdnet-first-stage": (
        tiny_config("swdnet", steps=4, swdnet_stage_steps=3, patches={"batch_size": 2}),
        (3,),
    ),
    "swdnet-second-stage": (
        tiny_config("swdnet", steps=4, swdnet_stage_steps=1, patches={"batch_size": 2}),
        (3,),
    ),
    "windowed": (tiny_config(patches={"order": "windowed"}, steps=7), (5,)),
}


@pytest.mark.parametrize("name", RESUMED)
def test_a_killed_run_ends_where_an_unbroken_one_does(
    both: Callable[..., tuple[str, str]], name: str
) -> None:
    config, kills = RESUMED[name]
    unbroken, broken = both(config, *kills)
    assert last_hashes(broken) == last_hashes(unbroken)
    assert numbers(broken) == numbers(unbroken)
    assert [row["step"] for row in read_metrics(broken)] == list(range(1, config.steps + 1))
    for pointer in ("best.json", "last.json"):
        contents = [Path(output, pointer).read_bytes() for output in (unbroken, broken)]
        assert contents[0] == contents[1]


def test_what_is_drawn_while_training_goes_on_where_it_was(
    both: Callable[..., tuple[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As dropout would: no network here draws anything, but one may."""
    original = PixelObjective.forward

    def forward(self: PixelObjective, lr: torch.Tensor, hr: torch.Tensor) -> Any:
        return original(self, lr + 0.1 * torch.rand_like(lr), hr)

    monkeypatch.setattr(PixelObjective, "forward", forward)
    unbroken, broken = both(tiny_config(steps=7), 5)
    assert last_hashes(broken) == last_hashes(unbroken)


def test_a_killed_stream_ends_where_an_unbroken_one_does(
    both: Callable[..., tuple[str, str]],
) -> None:
    config = tiny_config(patches={"order": "windowed"}, steps=7)
    unbroken, broken = both(config, 5, engine=tiny_engine(data="stream"))
    assert last_hashes(broken) == last_hashes(unbroken)


def test_weights_differ_where_they_should(dataset_uri: str, tmp_path: Path) -> None:
    """What the tests above compare can differ."""
    found = set()
    for name, config in (
        ("as-is", tiny_config(steps=2)),
        ("seed", tiny_config(steps=2, seed=2)),
        ("rate", tiny_config(steps=2, optimizer={"learning_rate": 1.0001e-3})),
        ("straight", tiny_config(steps=2, patches={"augment": False})),
        ("clip", tiny_config(steps=2, optimizer={"gradient_clip": 1e-9})),
    ):
        run(config, dataset_uri, tmp_path / name)
        found.add(last_hashes(str(tmp_path / name))[1])
    assert len(found) == 5


def test_the_same_run_twice_is_the_same(dataset_uri: str, tmp_path: Path) -> None:
    for name in "ab":
        run(tiny_config(steps=3), dataset_uri, tmp_path / name)
        torch.rand(3)
    assert last_hashes(str(tmp_path / "a")) == last_hashes(str(tmp_path / "b"))


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "checkpoint.json").unlink(),
        lambda folder: (folder / "training.safetensors").write_bytes(b"half"),
    ],
)
def test_a_torn_checkpoint_costs_its_updates_alone(
    dataset_uri: str, tmp_path: Path, damage: Callable[[Path], Any]
) -> None:
    unbroken, broken = str(tmp_path / "unbroken"), str(tmp_path / "broken")
    config = tiny_config(steps=7, optimizer={"ema_decay": 0.5})
    run(config, dataset_uri, unbroken)
    with pytest.raises(Killed):
        run(config, dataset_uri, broken, on_event=kill_at(5))
    damage(Path(broken, "checkpoints", "step-00000004"))
    events, listener = listening()
    run(config, dataset_uri, broken, on_event=listener)
    assert events[0]["step"] == 3
    assert last_hashes(broken) == last_hashes(unbroken)
    assert numbers(broken) == numbers(unbroken)


@pytest.mark.parametrize("step", [2, 3, 6])
def test_a_kill_between_checkpoint_and_pointers(
    dataset_uri: str, tmp_path: Path, step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    unbroken, broken = str(tmp_path / "unbroken"), str(tmp_path / "broken")
    config = tiny_config()
    result = run(config, dataset_uri, unbroken)
    original = RunFolder.point

    def point(self: RunFolder, progress: Any) -> None:
        if progress.step == step:
            raise Killed
        original(self, progress)

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "point", point)
        with pytest.raises(Killed):
            run(config, dataset_uri, broken)
    assert dataclasses.replace(run(config, dataset_uri, broken), output=unbroken) == result
    assert last_hashes(broken) == last_hashes(unbroken)
    assert read_checkpoint(broken).step == read_checkpoint(unbroken).step
    assert numbers(broken) == numbers(unbroken)


def test_a_kill_between_metrics_and_checkpoint(
    dataset_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unbroken, broken = str(tmp_path / "unbroken"), str(tmp_path / "broken")
    config = tiny_config()
    run(config, dataset_uri, unbroken)

    def save(self: RunFolder, progress: Any, **_: Any) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "save", save)
        with pytest.raises(Killed):
            run(config, dataset_uri, broken)
    assert [row["step"] for row in read_metrics(broken)] == [1, 2]
    run(config, dataset_uri, broken)
    assert numbers(broken) == numbers(unbroken)


def test_a_finished_run_returns_at_once(
    dataset_uri: str, output: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = run(tiny_config(), dataset_uri, output)
    before = last_hashes(output), read_metrics(output)
    events, listener = listening()
    monkeypatch.setattr(PixelObjective, "forward", None)
    assert run(tiny_config(), dataset_uri, output, on_event=listener) == first
    assert [event["kind"] for event in events] == ["begin"]
    assert events[0]["best_psnr"] == first.psnr
    assert (last_hashes(output), read_metrics(output)) == before


def test_a_halving_run_goes_on_when_it_is_made_longer(dataset_uri: str, tmp_path: Path) -> None:
    long, longer = str(tmp_path / "long"), str(tmp_path / "longer")
    run(tiny_config(steps=9), dataset_uri, long)
    run(tiny_config(steps=6), dataset_uri, longer)
    events, listener = listening()
    result = run(tiny_config(steps=9), dataset_uri, longer, on_event=listener)
    assert events[0]["step"] == 6
    assert result.step == 9
    (step, weights, _), (long_step, long_weights, _) = last_hashes(longer), last_hashes(long)
    assert (step, weights) == (long_step, long_weights) == (9, long_weights)
    facts = json.loads(Path(longer, "config.json").read_text())
    assert facts["config"]["steps"] == 9


# ------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("changed", "name"),
    [
        (tiny_config(seed=9), "seed"),
        (tiny_config("edsr"), "network.model"),
        (tiny_config(optimizer={"learning_rate": 0.5}), "optimizer.learning_rate"),
    ],
)
def test_a_run_with_other_settings_is_not_gone_on_with(
    dataset_uri: str, output: str, changed: TrainConfig, name: str
) -> None:
    run(tiny_config(steps=2), dataset_uri, output)
    before = last_hashes(output)
    with pytest.raises(RunError, match=f"other settings .*{name}"):
        run(changed, dataset_uri, output)
    assert last_hashes(output) == before


def test_a_run_on_another_dataset_is_not_gone_on_with(
    dataset_uri: str, output: str, tmp_path: Path
) -> None:
    run(tiny_config(steps=2), dataset_uri, output)
    other = str(tmp_path / "other")
    write_dataset(other, seed=1)
    with pytest.raises(RunError, match="on another dataset"):
        run(tiny_config(steps=2), other, output)
    # Begun anew, it is another run, and the folder holds nothing of the first.
    Path(output, "notes.txt").write_text("mine")
    run(tiny_config(steps=1), other, output, engine=tiny_engine(overwrite=True))
    assert [row["step"] for row in read_metrics(output)] == [1]
    assert [path.name for path in Path(output, "checkpoints").iterdir()] == ["step-00000001"]
    assert Path(output, "notes.txt").read_text() == "mine"


def test_a_patch_larger_than_a_tile_names_the_tile(dataset_uri: str, output: str) -> None:
    config = tiny_config(patches={"patch_px": 72})
    with pytest.raises(ValueError, match="patch_px=72 is larger than tile train_0 of 64 x 64 px"):
        run(config, dataset_uri, output)


def test_a_dataset_without_training_tiles_is_named(tmp_path: Path, output: str) -> None:
    uri = str(tmp_path / "empty")
    write_dataset(uri, train=[])
    with pytest.raises(DatasetError, match="no train tiles"):
        run(tiny_config(), uri, output)


# ------------------------------------------------------------------------------------ diverging


@pytest.fixture
def lose_at(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, float], None]:
    """Make the loss of one update another number."""

    def patch(step: int, value: float) -> None:
        calls = 0
        original = PixelObjective.forward

        def forward(self: PixelObjective, lr: torch.Tensor, hr: torch.Tensor) -> Any:
            nonlocal calls
            calls += 1
            terms = original(self, lr, hr)
            return terms | {"loss": terms["loss"] * value} if calls == step else terms

        monkeypatch.setattr(PixelObjective, "forward", forward)

    return patch


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("order", ["shuffled", "windowed"])
def test_a_loss_that_is_no_number_is_found_at_its_update(
    dataset_uri: str,
    output: str,
    lose_at: Callable[[int, float], None],
    value: float,
    order: str,
) -> None:
    config = tiny_config(
        steps=20, validation={"validate_every": 20}, patches={"order": order, "batch_size": 3}
    )
    lose_at(7, value)
    engine = tiny_engine(log_every=5, checkpoint_every=5)
    with pytest.raises(DivergedError) as caught:
        run(config, dataset_uri, output, engine=engine)
    error = caught.value
    assert error.step == 7
    assert error.checkpoint == f"{output}/checkpoints/step-00000005"
    # The batch of update 7 is that of step 6, counted from 0.
    from carn.bcsr.dataset import open_dataset
    from carn.training.data import open_training_data

    data = open_training_data(open_dataset(dataset_uri), config, path="memory")
    tiles = data.sampler.step(6).tile.tolist()
    assert set(error.tile_ids) == {f"train_{tile}" for tile in tiles}
    assert len(error.tile_ids) == len(set(error.tile_ids))
    assert last_hashes(output)[0] == 5  # nothing of it was kept
    assert [row["step"] for row in read_metrics(output)] == [5]


def test_a_run_that_diverged_at_once_has_no_checkpoint_to_name(
    dataset_uri: str, output: str, lose_at: Callable[[int, float], None]
) -> None:
    lose_at(1, math.nan)
    with pytest.raises(DivergedError, match="no checkpoint was written before") as caught:
        run(tiny_config(), dataset_uri, output)
    assert (caught.value.step, caught.value.checkpoint) == (1, None)


def test_a_learning_rate_beyond_reason_diverges(dataset_uri: str, output: str) -> None:
    config = tiny_config(optimizer={"learning_rate": 1e30})
    with pytest.raises(DivergedError) as caught:
        run(config, dataset_uri, output)
    assert caught.value.step == 2


@pytest.mark.parametrize("optimizer", [{}, {"ema_decay": 0.5}])
def test_weights_that_are_no_numbers_are_not_kept(
    dataset_uri: str, output: str, optimizer: dict[str, float]
) -> None:
    # The first loss is a number; a step that float32 cannot hold follows.
    config = tiny_config(optimizer={"learning_rate": 1e39} | optimizer)
    engine = tiny_engine(checkpoint_every=1)
    with pytest.raises(DivergedError) as caught:
        run(config, dataset_uri, output, engine=engine)
    assert (caught.value.step, caught.value.checkpoint) == (1, None)
    assert RunFolder(uri=output, keep_checkpoints=1).steps() == []


# --------------------------------------------------------------------------- every network learns


@pytest.mark.parametrize("model", NETWORKS)
def test_every_network_trains_and_goes_on(dataset_uri: str, output: str, model: str) -> None:
    config = tiny_config(
        model,
        steps=3,
        patches={"batch_size": 2},
        validation={"max_validation_tiles": 1},
        swdnet_stage_steps=1,
    )
    with pytest.raises(Killed):
        run(config, dataset_uri, output, on_event=kill_at(3))
    events, listener = listening()
    result = run(config, dataset_uri, output, on_event=listener)
    assert [event["step"] for event in events if event["kind"] == "step"] == [3]
    assert result.psnr is not None
    network = load_model(output, expect_name=model, expect_scale=2)
    fresh = {name: value.clone() for name, value in network.state_dict().items()}
    network.load_state_dict(fresh)
    sr = network(torch.rand(1, 3, 9, 11))
    assert sr.shape == (1, 3, 18, 22)
    assert sr.isfinite().all()


@pytest.mark.parametrize("scale", [3, 4, 8])
def test_every_scale_trains(dataset_uri: str, output: str, scale: int) -> None:
    result = run(tiny_config(steps=2, scale=scale), dataset_uri, output)
    assert result.bicubic_psnr is not None
    assert load_model(output, expect_scale=scale) is not None


def test_a_network_learns_a_few_patches_by_heart(tmp_path: Path, output: str) -> None:
    uri = str(tmp_path / "four")
    write_dataset(uri, train=[(16, 16)] * 4, validation=[])
    config = tiny_config(
        steps=300,
        patches={"augment": False},
        optimizer={"learning_rate": 1e-3},
        validation={"validate_every": 300},
    )
    engine = tiny_engine(log_every=10, checkpoint_every=300)
    result = run(config, uri, output, engine=engine)
    l1 = [row["l1"] for row in read_metrics(output)]
    assert l1[-1] < 0.25 * l1[0]
    assert l1[-1] < 10  # grey levels
    assert (result.psnr, result.bicubic_psnr, result.best_step) == (None, None, None)
    # Where nothing is validated, the last one stands for the best.
    assert read_checkpoint(output).step == 300


@pytest.mark.parametrize(("stage_steps", "changes_after"), [(1, 1), (None, 2), (0, 0)])
def test_swdnet_changes_its_objective_on_its_way(
    dataset_uri: str, output: str, stage_steps: int | None, changes_after: int
) -> None:
    config = tiny_config(
        "swdnet",
        steps=4,
        swdnet_stage_steps=stage_steps,
        patches={"batch_size": 2},
        validation={"max_validation_tiles": 1},
    )
    run(config, dataset_uri, output)
    # The first stage looks at the spatial network alone.
    second = [row["step"] for row in read_metrics(output) if "wavelet" in row]
    assert second == list(range(changes_after + 1, 5))


# --------------------------------------------------------------------------- what is kept and said


def test_the_best_pointer_is_the_best(dataset_uri: str, output: str) -> None:
    config = tiny_config(steps=12, validation={"validate_every": 2})
    result = run(config, dataset_uri, output)
    scores = {
        row["step"]: row["validation_psnr"]
        for row in read_metrics(output)
        if "validation_psnr" in row
    }
    assert sorted(scores) == [2, 4, 6, 8, 10, 12]
    best = max(scores, key=scores.__getitem__)
    assert (result.best_step, result.psnr) == (best, scores[best])
    assert read_checkpoint(output).step == best
    assert read_checkpoint(output).metrics["psnr"] == scores[best]


@pytest.mark.parametrize("keep", [1, 3])
def test_checkpoints_do_not_pile_up(dataset_uri: str, output: str, keep: int) -> None:
    engine = tiny_engine(checkpoint_every=1, keep_checkpoints=keep)
    result = run(tiny_config(steps=8), dataset_uri, output, engine=engine)
    kept = RunFolder(uri=output, keep_checkpoints=keep).steps()
    assert set(kept) == {*range(8 - keep + 1, 9), result.best_step}


def test_the_average_is_what_is_validated_and_shipped(dataset_uri: str, tmp_path: Path) -> None:
    plain, averaged = str(tmp_path / "plain"), str(tmp_path / "averaged")
    engine = tiny_engine(checkpoint_every=1, keep_checkpoints=9)
    run(tiny_config(steps=3), dataset_uri, plain, engine=engine)
    config = tiny_config(steps=3, optimizer={"ema_decay": 0.2})
    run(config, dataset_uri, averaged, engine=engine)
    # The average begins with the first update's weights, and forgets them at first more quickly.
    decays = {2: 2 / 11, 3: 0.2}
    found = [
        load_model(f"{plain}/checkpoints/step-0000000{step}").state_dict() for step in (1, 2, 3)
    ]
    shipped = load_model(f"{averaged}/last.json").state_dict()
    for name, tensor in shipped.items():
        wanted = functools.reduce(
            lambda mean, step, name=name: (
                decays[step] * mean + (1 - decays[step]) * found[step - 1][name]
            ),
            decays,
            found[0][name],
        )
        torch.testing.assert_close(tensor, wanted, rtol=1e-5, atol=1e-7)
    rows = [read_metrics(output)[-1] for output in (plain, averaged)]
    assert rows[0]["loss"] == rows[1]["loss"]
    assert rows[0]["validation_psnr"] != rows[1]["validation_psnr"]


def test_events_and_reports_in_their_order(dataset_uri: str, output: str) -> None:
    events, listener = listening()
    reports: list[dict[str, float]] = []
    result = run(
        tiny_config(steps=4),
        dataset_uri,
        output,
        on_event=listener,
        on_checkpoint=lambda metrics: reports.append(dict(metrics)),
    )
    order = [(event["kind"], event["step"]) for event in events]
    assert order == [
        ("begin", 0),
        ("step", 1),
        ("step", 2),
        ("checkpoint", 2),
        ("step", 3),
        ("validation", 3),
        ("checkpoint", 3),
        ("step", 4),
        ("validation", 4),
        ("checkpoint", 4),
    ]
    assert all(event["steps"] == 4 and event["num_workers"] == 1 for event in events)
    assert events[0]["bicubic_psnr"] == result.bicubic_psnr
    seconds = [event["elapsed_s"] for event in events]
    assert 0 <= seconds[0] <= seconds[-1]
    assert seconds == sorted(seconds)
    assert [report["step"] for report in reports] == [2, 3, 4]
    assert "validation_psnr" not in reports[0]
    assert reports[2]["validation_psnr"] > 0
    assert result == TrainResult(
        output=output,
        step=4,
        psnr=result.psnr,
        ssim=result.ssim,
        best_step=result.best_step,
        bicubic_psnr=result.bicubic_psnr,
        bicubic_ssim=result.bicubic_ssim,
    )


def test_how_often_is_looked_does_not_change_what_is_learnt(
    dataset_uri: str, tmp_path: Path
) -> None:
    often, rarely = str(tmp_path / "often"), str(tmp_path / "rarely")
    run(tiny_config(steps=6), dataset_uri, often)
    engine = tiny_engine(log_every=4, checkpoint_every=100)
    run(tiny_config(steps=6), dataset_uri, rarely, engine=engine)
    assert last_hashes(rarely)[1] == last_hashes(often)[1]
    rows, means = read_metrics(often), read_metrics(rarely)
    assert [row["step"] for row in means] == [3, 4, 6]  # the first by validation
    for row, steps in zip(means, ((1, 2, 3), (4,), (5, 6)), strict=True):
        wanted = sum(rows[step - 1]["loss"] for step in steps) / len(steps)
        assert row["loss"] == pytest.approx(wanted, rel=1e-12)


def test_a_run_on_an_object_store(s3: Any, dataset_uri: str, output: str) -> None:
    for item in storage.list_objects(dataset_uri):
        s3.put("sets/bcsr" + item.uri.removeprefix(dataset_uri), Path(item.uri))
    remote = s3.uri("runs/a")
    config = tiny_config(steps=4)
    run(config, dataset_uri, output)
    with pytest.raises(Killed):
        run(config, s3.uri("sets/bcsr"), remote, on_event=kill_at(4))
    run(config, s3.uri("sets/bcsr"), remote)
    assert last_hashes(remote) == last_hashes(output)
    assert numbers(remote) == numbers(output)
    top = {key.split("/")[2] for key in s3.list_keys() if key.startswith("runs/a/")}
    assert top == {
        *("config.json", "metrics.csv", "best.json", "last.json", "checkpoints", "tensorboard")
    }
    assert load_model(remote, expect_name="carn") is not None
