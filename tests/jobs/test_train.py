"""Training as a job: a run through Ray, what it refuses and how, and that workers change nothing.

Runs of the job are held against `carn.training.loop.train` in this process, without Ray.
"""

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ray

from carn import storage
from carn.errors import DatasetError, DivergedError
from carn.models.checkpoint import load_model, read_checkpoint
from carn.training.config import (
    NetworkConfig,
    OptimizerConfig,
    PatchConfig,
    TrainConfig,
    ValidationConfig,
)
from carn.training.engine import EngineConfig
from carn.training.loop import train
from jobs import train as job_module
from jobs import train_worker
from jobs.ray_stage import ClusterError
from jobs.train import TrainJob, WorkersConfig, cli, parse, scaling_config
from tests.jobs.lab import own_lines
from tests.jobs.train_lab import TINY, metrics_rows, weights_distance, weights_hash, write_dataset

pytestmark = [pytest.mark.ray, pytest.mark.xdist_group("ray")]

STEPS = 20
SHORT = ("--steps", str(STEPS), "--validate-every", "10", "--checkpoint-every", "10")
# Per weight, after 20 updates of at most 1e-3 each. Workers' gradients are summed in another order,
# and Adam makes steps of full size of gradients that are little more than roundings.
WORKERS_TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_dataset(tmp_path_factory.mktemp("lab") / "bcsr")


@pytest.fixture
def run_cli(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """The command line in this process; returns its exit status."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    # What the job sets for its own process is not to stay in this one.
    for name in ("RAY_TRAIN_ENABLE_PRINT_PATCH", "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"):
        monkeypatch.setenv(name, "0")

    def run(*arguments: object) -> int:
        monkeypatch.setattr("sys.argv", ["train.py", *map(str, arguments)])
        return cli()

    return run


@pytest.fixture
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail as soon as the job turns to Ray."""

    def start_ray(**_: object) -> None:
        pytest.fail("the job turned to Ray")

    monkeypatch.setattr(job_module, "start_ray", start_ray)


def config(**patches: object) -> TrainConfig:
    """What the arguments TINY and SHORT say."""
    return TrainConfig(
        network=NetworkConfig(scale=2, num_blocks=1, channels=16, reduction=4),
        optimizer=OptimizerConfig(learning_rate=1e-3),
        patches=PatchConfig(batch_size=4, patch_px=32, **patches),  # type: ignore[arg-type]
        validation=ValidationConfig(validate_every=10),
        steps=STEPS,
        seed=7,
    )


ENGINE = EngineConfig(device="cpu", num_threads=1, log_every=2, checkpoint_every=10)


@pytest.fixture(scope="module")
def alone(dataset: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of the same settings by the loop alone."""
    output = tmp_path_factory.mktemp("alone")
    train(config(), dataset_uri=dataset, output=str(output), engine=ENGINE)
    return output


# ------------------------------------------------------------------------------------- it trains


@pytest.fixture(scope="module")
def trained(dataset: str, tmp_path_factory: pytest.TempPathFactory, ray_here: None) -> Path:
    """A run of two workers through Ray."""
    output = tmp_path_factory.mktemp("trained") / "run"
    more = ("--num-workers", "2", "--min-workers", "2", "--cpus-per-worker", "1")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RAY_ADDRESS", raising=False)
        patch.setattr("sys.argv", ["train.py", *_arguments(dataset, output, *more)])
        assert cli() == 0
    return output


def _arguments(dataset: str, output: str | Path, *more: str) -> tuple[str, ...]:
    return ("--dataset", dataset, "--output", str(output), *TINY, *SHORT, *more)


def test_a_run_leaves_a_checkpoint_metrics_and_a_report(trained: Path) -> None:
    best, last = (read_checkpoint(str(trained / f"{name}.json")) for name in ("best", "last"))
    assert last.step == STEPS
    assert best.step in (10, STEPS)
    assert best.metrics["best_psnr"] == pytest.approx(best.metrics["psnr"])
    assert last.training is not None
    assert last.training["optimizer"]["learning_rate"] == 1e-3
    model = load_model(best)
    assert sum(weight.numel() for weight in model.parameters()) > 1000
    rows = metrics_rows(trained)
    steps = [int(row["step"]) for row in rows]
    assert steps == list(range(2, STEPS + 1, 2))
    assert [int(row["step"]) for row in rows if row["validation_psnr"]] == [10, STEPS]
    # The loss falls: weights were learnt, not only written.
    assert float(rows[-1]["loss"]) < 0.5 * float(rows[0]["loss"])
    assert list((trained / "tensorboard").glob("events.out.tfevents.*"))
    assert "CARN" in (trained / "report.html").read_text()
    # What Ray keeps of a run is of no use to anybody afterwards.
    assert not (trained / "_ray").exists()


def test_two_workers_learn_what_one_learns(trained: Path, alone: Path) -> None:
    assert weights_distance(alone, trained) < WORKERS_TOLERANCE
    # The same losses from the first update on: each batch held the same samples.
    for one, two in zip(metrics_rows(alone), metrics_rows(trained), strict=True):
        assert two["step"] == one["step"]
        assert float(two["loss"]) == pytest.approx(float(one["loss"]), rel=1e-4), one["step"]


def test_a_finished_run_is_left_as_it_is(
    trained: Path, dataset: str, run_cli: Callable[..., int], no_ray: None, capsys
) -> None:
    def kept() -> dict[str, int]:
        files = [path for path in trained.rglob("*") if path.is_file()]
        files = [path for path in files if path.name not in ("report.html", "config.json")]
        return {str(path): path.stat().st_mtime_ns for path in files}

    before = kept()
    assert run_cli(*_arguments(dataset, trained)) == 0
    assert kept() == before
    # It still says what the run came to.
    assert f"after {STEPS} updates" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (DivergedError(7, ("t1", "t2"), "/o/checkpoints/step-00000005"), 1),
        (DatasetError("/d/tiles/x.parquet is damaged"), 2),
        (ValueError("patch_px=80 is larger than tile t1"), 2),
    ],
)
def test_what_a_worker_gave_up_for_is_what_the_job_says(
    dataset: str,
    tmp_path: Path,
    ray_here: None,
    run_cli: Callable[..., int],
    capsys,
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
    status: int,
) -> None:
    class Trainer:
        """A run whose only worker gives up, and whose next attempt ends at once."""

        def __init__(self, _: object, *, train_loop_config: dict[str, Any], **__: object) -> None:
            self._monitor = train_loop_config["task"].monitor

        def fit(self) -> None:
            # Through another process and back, as it is.
            ray.get(self._monitor.give_up.remote(error))

    monkeypatch.setattr(train_worker, "TorchTrainer", Trainer)
    assert run_cli(*_arguments(dataset, tmp_path)) == status
    assert _line(capsys.readouterr().err) == f"train: {error}"


@pytest.mark.slow
def test_a_diverged_run_says_where(
    dataset: str, tmp_path: Path, ray_here: None, run_cli: Callable[..., int], capsys
) -> None:
    more = ("--learning-rate", "1e30", "--checkpoint-every", "1", "--steps", "6")
    assert run_cli(*_arguments(dataset, tmp_path, *more)) == 1
    said = _line(capsys.readouterr().err)
    assert "loss of update 2 is not a finite number" in said
    assert "checkpoints/step-00000001." in said
    assert re.search(r"cut from train\d_\d+_0, train", said)
    assert "--learning-rate" in said
    # No attempt after it trains on.
    assert not (tmp_path / "checkpoints" / "step-00000002").exists()


def test_streamed_from_and_to_an_object_store(
    ray_here_s3: str, dataset: str, tmp_path: Path, run_cli: Callable[..., int]
) -> None:
    remote = write_dataset(f"{ray_here_s3}/bcsr")
    output = f"{ray_here_s3}/run"
    windowed = ("--order", "windowed", "--samples-per-tile", "2")
    more = ("--data", "stream", *windowed, "--num-workers", "1")
    assert run_cli(*_arguments(remote, output, *more)) == 0
    # The same samples out of memory, on a local disk: to the last bit.
    plain = config(order="windowed", samples_per_tile=2)
    train(plain, dataset_uri=dataset, output=str(tmp_path), engine=ENGINE)
    assert weights_hash(output) == weights_hash(tmp_path)
    keys = [item.uri.removeprefix(f"{output}/") for item in storage.list_objects(output)]
    assert {"metrics.csv", "report.html", "best.json", "last.json", "config.json"} <= set(keys)
    assert any(key.startswith("tensorboard/events.out.tfevents.") for key in keys)
    assert not [key for key in keys if key.startswith("_ray/")]


@pytest.mark.slow
def test_a_stream_does_not_go_on_without_a_part_of_it(
    ray_here: None, tmp_path: Path, run_cli: Callable[..., int], capfd
) -> None:
    uri = write_dataset(tmp_path / "bcsr", num_tiles=(40, 2, 0))
    (shard,) = (tmp_path / "bcsr" / "tiles").glob("train-*")
    content = bytearray(shard.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 200] = bytes(200)
    shard.write_bytes(content)
    windowed = ("--order", "windowed", "--samples-per-tile", "2", "--data", "stream")
    assert run_cli(*_arguments(uri, tmp_path / "run", *windowed, "--num-workers", "1")) == 2
    last = own_lines(capfd.readouterr().err)[-1]
    assert last.startswith("train: ")
    assert "is damaged" in last
    assert shard.name in last


def test_a_cache_that_is_too_small_is_said_with_a_way_out(
    dataset: str,
    tmp_path: Path,
    run_cli: Callable[..., int],
    monkeypatch: pytest.MonkeyPatch,
    capfd,
) -> None:
    # In this process: workers took their environment from the Ray that started them.
    def small(job: TrainJob, *_: object) -> None:
        monkeypatch.setenv("CARN_CACHE_GB", "0.00001")
        monkeypatch.setenv("CARN_CACHE_DIR", str(tmp_path / "cache"))
        train(job.train, dataset_uri=job.dataset, output=job.output_uri, engine=job.engine)

    monkeypatch.setattr(job_module, "run_on_ray", small)
    assert run_cli(*_arguments(dataset, tmp_path / "run")) == 2
    last = own_lines(capfd.readouterr().err)[-1]
    assert "CARN_CACHE_GB" in last
    assert "--data stream --order windowed" in last


# ------------------------------------------------------------------------------ what is asked for


def test_options_go_before_a_file_and_a_file_before_a_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    path = tmp_path / "best.yaml"
    path.write_text("network: {model: edsr}\nlearning_rate: 1e-3\nbatch_size: 4\n")
    job = parse(["--dataset", "/d", "--recipe", "own", "--config", str(path), "--batch-size", "8"])
    assert job.train.network.model == "edsr"
    assert job.train.patches.patch_px == 96
    assert job.train.optimizer.learning_rate == 1e-3
    assert job.train.patches.batch_size == 8
    assert job.output_uri.endswith("runs/edsr-x2-seed1")


def test_settings_may_stand_below_config(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"code_version": "1", "config": {"batch_size": 4}}')
    job = parse(["--dataset", "/d", "--config", str(tmp_path / "config.json")])
    assert job.train.patches.batch_size == 4
    job = parse(["--dataset", "/d", "--config", "carn/models/shipped/carn-x2.yaml"])
    assert job.train.optimizer.ema_decay == 0.999


# ------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("blocks: 4", "'blocks' is no setting of training"),
        ("steps: [", "is not YAML"),
        ("- steps", "must hold settings by name"),
        ("steps: soon", "steps='soon' is not of type int"),
        ("alpha: -1", "alpha=-1.0 must be"),
    ],
)
def test_a_file_of_other_things(
    refused: Callable[..., str], dataset: str, tmp_path: Path, content: str, expected: str
) -> None:
    (tmp_path / "bad.yaml").write_text(content)
    more = ("--config", tmp_path / "bad.yaml")
    assert expected in refused(*_arguments(dataset, tmp_path / "run", *more))


def _line(said: str) -> str:
    """The one line on stderr that is the job's, beside what Ray passes on of its workers."""
    own = own_lines(said)
    (line,) = [line for line in own if line.startswith("train: ")]
    assert own[-1] == line
    assert "Traceback" not in "".join(own)
    return line


@pytest.fixture
def refused(run_cli: Callable[..., int], no_ray: None, capsys) -> Callable[..., str]:
    """Run with what cannot go well; returns what is said of it: a line, or tyro's box."""

    def run(*arguments: object) -> str:
        try:
            status = run_cli(*arguments)
        except SystemExit as ended:
            status = ended.code
        captured = capsys.readouterr()
        assert status == 2
        assert captured.out == ""
        said = captured.err.strip()
        assert "Traceback" not in said
        if not said.startswith("train: "):
            # The box is as wide as the terminal; the sentence in it is what matters.
            assert "Value error" in said
            return " ".join(re.sub(r"[│╭╮╰╯─]|-{5,}", " ", said).split())
        assert len(said.splitlines()) == 1, said
        return said

    return run


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--patch-px", "80"), ("patch_px=80", "64 x 64", "--patch-px 64")),
        (("--patch-px", "33"), ("patch_px=33", "scale=2")),
        (("--scale", "5"), ("scale=5", "2, 3, 4, 8")),
        (("--alpha", "-0.5"), ("alpha=-0.5",)),
        (("--beta", "nan"), ("beta=nan",)),
        (("--gamma", "inf"), ("gamma=inf",)),
        (("--alpha", "0", "--beta", "0", "--gamma", "0"), ("alpha, beta and gamma",)),
        (("--learning-rate", "0"), ("learning_rate=0",)),
        (("--steps", "0"), ("steps=0",)),
        (("--batch-size", "0"), ("batch_size=0",)),
        (("--num-workers", "0"), ("num_workers=0",)),
        (("--num-workers", "5"), ("5 workers", "batch of 4", "--batch-size")),
        (("--num-workers", "2", "--min-workers", "3"), ("min_workers=3", "num_workers=2")),
        (("--data", "stream"), ("--data stream", "--order windowed")),
        (("--model", "bicubic", "--num-blocks", "None"), ("bicubic", "nothing to train")),
        (("--model", "srcnn"), ("srcnn", "num_blocks")),
        (("--max-failures", "-2"), ("max_failures=-2",)),
        (("--ema-decay", "1"), ("ema_decay=1",)),
    ],
)
def test_settings_that_cannot_be_meant(
    dataset: str,
    tmp_path: Path,
    refused: Callable[..., str],
    arguments: tuple[str, ...],
    expected: tuple[str, ...],
) -> None:
    output = tmp_path / "run"
    said = refused(*_arguments(dataset, output, *arguments))
    for part in expected:
        assert part in said
    assert not output.exists(), "something was left behind"


def test_a_dataset_that_is_none(tmp_path: Path, refused: Callable[..., str]) -> None:
    missing = tmp_path / "nowhere"
    said = refused(*_arguments(str(missing), tmp_path / "run"))
    assert str(missing) in said
    assert "build_bcsr.py" in said
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "manifest.json").write_text('{"something": "else"}')
    said = refused(*_arguments(str(tmp_path / "foreign"), tmp_path / "run"))
    assert "foreign/manifest.json is not the manifest of a bcSR dataset" in said
    assert not (tmp_path / "run").exists()


def test_a_dataset_without_training_tiles(tmp_path: Path, refused: Callable[..., str]) -> None:
    uri = write_dataset(tmp_path / "bcsr", num_tiles=(0, 3, 1))
    said = refused(*_arguments(uri, tmp_path / "run"))
    assert f"{uri} has no training tiles" in said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "changed"),
    [
        (("--model", "rcan", "--reduction", "4"), "network.model"),
        (("--scale", "4"), "network.scale"),
        (("--seed", "8"), "seed"),
        (("--alpha", "0.7"), "loss.alpha"),
        (("--steps", "10", "--schedule", "cosine"), "optimizer.schedule"),
    ],
)
def test_an_output_of_other_settings(
    alone: Path,
    dataset: str,
    refused: Callable[..., str],
    arguments: tuple[str, ...],
    changed: str,
) -> None:
    before = {path: path.stat().st_mtime_ns for path in alone.rglob("*")}
    said = refused(*_arguments(dataset, alone, *arguments))
    for part in (str(alone), changed, "--output", "--overwrite"):
        assert part in said
    assert {path: path.stat().st_mtime_ns for path in alone.rglob("*")} == before


def test_an_output_of_another_dataset(
    alone: Path, tmp_path: Path, dataset: str, refused: Callable[..., str]
) -> None:
    other = write_dataset(tmp_path / "bcsr", seed=5)
    said = refused(*_arguments(other, alone))
    for part in (str(alone), dataset, "another dataset", "--overwrite"):
        assert part in said


def test_an_output_that_cannot_be_written(
    tmp_path: Path, dataset: str, refused: Callable[..., str]
) -> None:
    (tmp_path / "file").write_text("in the way")
    assert str(tmp_path / "file") in refused(*_arguments(dataset, tmp_path / "file" / "run"))
    if os.geteuid() != 0:  # root writes anywhere
        (tmp_path / "shut").mkdir(mode=0o500)
        assert str(tmp_path / "shut") in refused(*_arguments(dataset, tmp_path / "shut" / "run"))


def test_an_output_in_the_dataset(dataset: str, refused: Callable[..., str]) -> None:
    for output in (dataset, f"{dataset}/run"):
        assert "lies in the dataset" in refused(*_arguments(dataset, output))


def test_no_output_on_a_cluster(
    dataset: str, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    said = refused("--dataset", dataset, *TINY)
    assert "--output" in said


# ---------------------------------------------------------------------------- workers and CPUs


def _pretend(monkeypatch: pytest.MonkeyPatch, *nodes: tuple[float, float]) -> None:
    """A cluster of nodes of so many CPUs and GPUs."""
    listed = [
        {"Alive": True, "Resources": {"CPU": cpus} | ({"GPU": gpus} if gpus else {})}
        for cpus, gpus in nodes
    ]
    dead = {"Alive": False, "Resources": {"CPU": 64.0, "GPU": 8.0}}
    monkeypatch.setattr(ray, "nodes", lambda: [*listed, dead])


@pytest.fixture
def scaling(monkeypatch: pytest.MonkeyPatch) -> Callable[..., ray.train.ScalingConfig]:
    """The workers of a job on a made-up cluster."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)

    def of(
        *nodes: tuple[float, float],
        engine: EngineConfig | None = None,
        **workers: object,
    ) -> ray.train.ScalingConfig:
        _pretend(monkeypatch, *nodes)
        order = "windowed" if engine and engine.data == "stream" else "shuffled"
        job = TrainJob(
            dataset="/d",
            output="/o",
            train=TrainConfig(patches=PatchConfig(batch_size=16, order=order)),  # type: ignore[arg-type]
            engine=engine or EngineConfig(),
            workers=WorkersConfig(**workers),  # type: ignore[arg-type]
        )
        return scaling_config(job)

    return of


def test_workers_follow_the_cluster(scaling: Callable[..., ray.train.ScalingConfig]) -> None:
    on_cpus = scaling((8, 0))
    assert (on_cpus.num_workers, on_cpus.use_gpu) == (1, False)
    assert on_cpus.resources_per_worker == {"CPU": 8}
    on_gpus = scaling((32, 4))
    assert (on_gpus.num_workers, on_gpus.use_gpu) == ((1, 4), True)
    assert on_gpus.resources_per_worker == {"CPU": 8, "GPU": 1}
    # No worker without a sample, and none of a GPU that is not wanted.
    assert scaling((64, 32)).num_workers == (1, 16)
    assert not scaling((32, 4), engine=EngineConfig(device="cpu")).use_gpu
    assert scaling((32, 4), num_workers=3, min_workers=3).num_workers == 3
    assert scaling((8, 0), num_workers=2, cpus_per_worker=0.5).resources_per_worker == {"CPU": 0.5}


def test_a_worker_fits_its_node(scaling: Callable[..., ray.train.ScalingConfig]) -> None:
    assert scaling((4, 0), (4, 0)).resources_per_worker == {"CPU": 4}
    assert scaling((4, 0), (4, 0), num_workers=3).resources_per_worker == {"CPU": 2}
    # A head without a GPU lends its CPUs to nobody who needs one.
    on_gpus = scaling((8, 0), (4, 1), (4, 1))
    assert (on_gpus.num_workers, on_gpus.resources_per_worker) == ((1, 2), {"CPU": 4, "GPU": 1})


def test_a_stream_leaves_a_cpu_to_those_who_read_it(
    scaling: Callable[..., ray.train.ScalingConfig],
) -> None:
    stream = EngineConfig(data="stream")
    assert scaling((8, 0), engine=stream).resources_per_worker == {"CPU": 7}
    assert scaling((8, 0), engine=stream, num_workers=2).resources_per_worker == {"CPU": 3}
    # On every node: the others may be lost.
    on_two = scaling((2, 0), (2, 0), engine=stream, num_workers=2)
    assert on_two.resources_per_worker == {"CPU": 1}
    # Workers that hold every CPU would wait for ever for tiles that nobody can read.
    for cpus, wanted in ((2, {"num_workers": 2}), (1, {}), (4, {"cpus_per_worker": 4})):
        with pytest.raises(ClusterError, match="stream"):
            scaling((cpus, 0), engine=stream, **wanted)


@pytest.mark.parametrize(
    ("cluster", "engine", "workers", "expected"),
    [
        ((8, 0), EngineConfig(device="cuda"), {}, "cluster has none; use --device cpu"),
        ((8, 2), EngineConfig(), {"num_workers": 3}, "3 workers need a GPU each.* has 2"),
        ((2, 0), EngineConfig(), {"num_workers": 3}, "3 workers of 1 CPUs .* nodes have 2 CPUs"),
        ((2, 0), EngineConfig(), {"cpus_per_worker": 3}, "1 workers of 3 CPUs .* have 2 CPUs"),
    ],
)
def test_workers_that_the_cluster_cannot_hold(
    scaling: Callable[..., ray.train.ScalingConfig],
    cluster: tuple[float, float],
    engine: EngineConfig,
    workers: dict[str, int],
    expected: str,
) -> None:
    with pytest.raises(ClusterError, match=expected):
        scaling(cluster, engine=engine, **workers)


def test_batches_are_normalized_by_one_worker_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    _pretend(monkeypatch, (8, 0))
    job = TrainJob(
        dataset="/d",
        output="/o",
        train=TrainConfig(network=NetworkConfig(model="srgan")),
        workers=WorkersConfig(num_workers=2),
    )
    with pytest.raises(ClusterError, match="--num-workers 1"):
        scaling_config(job)


def test_a_gpu_that_is_not_there_is_said_in_one_line(
    dataset: str,
    tmp_path: Path,
    ray_here: None,
    run_cli: Callable[..., int],
    monkeypatch: pytest.MonkeyPatch,
    capsys,
) -> None:
    _pretend(monkeypatch, (2, 0))
    assert run_cli(*_arguments(dataset, tmp_path, "--device", "cuda")) == 2
    assert "--device cpu" in _line(capsys.readouterr().err)
