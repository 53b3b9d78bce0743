"""Classification as a job: a run through Ray, what it refuses, and that kills cost nothing."""

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from carn import storage
from carn.classification.loop import ClassifierDivergedError
from carn.errors import DatasetError
from jobs import classify as job_module
from jobs.classify import ClassifyJob, WorkersConfig, cli, describe, parse
from tests.classification.lab import CROP_PX, write_labelled, write_model, write_pcam
from tests.jobs.lab import ROOT, own_lines
from tests.jobs.train_lab import environment_of, finish, kill_tree, wait_for

pytestmark = [pytest.mark.ray, pytest.mark.xdist_group("ray")]

# A ResNet that is trained in seconds.
TINY = (
    *("--crop-px", str(CROP_PX), "--depth", "18", "--batch-size", "8", "--device", "cpu"),
    *("--cpus-per-worker", "1"),
)


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_labelled(tmp_path_factory.mktemp("lab") / "bcsr")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_model(tmp_path_factory.mktemp("lab") / "carn")


@pytest.fixture
def run_cli(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., int]:
    """The command line in this process; returns its exit status."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("CARN_CACHE_DIR", str(tmp_path / "cache"))
    # What the job sets for its own process is not to stay in this one.
    for name in ("RAY_TRAIN_ENABLE_PRINT_PATCH", "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"):
        monkeypatch.setenv(name, "0")

    def run(*arguments: object) -> int:
        monkeypatch.setattr("sys.argv", ["classify.py", *map(str, arguments)])
        return cli()

    return run


@pytest.fixture
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail as soon as the job turns to Ray."""

    def start_ray(**_: object) -> None:
        pytest.fail("the job turned to Ray")

    monkeypatch.setattr(job_module, "start_ray", start_ray)


def arguments(labelled: str, output: Path, *more: str) -> tuple[str, ...]:
    return ("--dataset", labelled, "--output", str(output), *TINY, *more)


# --------------------------------------------------------------------------------------- it runs


def test_a_run_leaves_a_table_a_summary_and_a_page(
    labelled: str, model: str, tmp_path: Path, ray_here: None, run_cli, capsys, monkeypatch
) -> None:
    output = tmp_path / "out"
    command = arguments(labelled, output, "--models", model, "--epochs", "1")
    assert run_cli(*command) == 0
    said = own_lines(capsys.readouterr().out)
    assert any(
        re.fullmatch(r"bcSR, CARN: accuracy \d+\.\d\d % \(.*\), AUC 0\.\d{4}", x) for x in said
    )
    table = (output / "table.csv").read_bytes()
    assert table.decode().count("\n") == 5
    assert '"num_workers_of_last_run": 1' in (output / "summary.json").read_text()
    assert "CARN" in (output / "report.html").read_text()
    # The same command again finds nothing to do, and needs no Ray for it.
    monkeypatch.setattr(job_module, "start_ray", lambda **_: pytest.fail("the job turned to Ray"))
    assert run_cli(*command) == 0
    assert own_lines(capsys.readouterr().out) == said
    assert (output / "table.csv").read_bytes() == table
    # Other settings are refused.
    assert run_cli(*command, "--seed", "3") == 2
    assert "other settings (seed)" in capsys.readouterr().err


@pytest.mark.slow
def test_two_workers_share_the_work(
    labelled: str, model: str, tmp_path: Path, ray_here: None, run_cli
) -> None:
    output, pcam = tmp_path / "out", write_pcam(tmp_path / "pcam")
    more = ("--models", model, "--epochs", "1", "--num-workers", "2", "--pcam", str(pcam))
    assert run_cli(*arguments(labelled, output, "--train-on", "each", *more)) == 0
    assert (output / "table.csv").read_text().count("\n") == 9
    assert '"num_workers_of_last_run": 2' in (output / "summary.json").read_text()


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (ClassifierDivergedError("the classifier's loss in epoch 2 is not a finite number"), 1),
        (DatasetError("/d/tiles/x.parquet is damaged"), 2),
    ],
)
def test_what_a_worker_gave_up_for_is_what_the_job_says(
    labelled: str, tmp_path: Path, ray_here: None, run_cli, capsys, monkeypatch, error, status: int
) -> None:
    import ray

    class Trainer:
        """A run whose only worker gives up, and whose next attempt ends at once."""

        def __init__(self, _: object, *, train_loop_config: dict, **__: object) -> None:
            self._monitor = train_loop_config["monitor"]

        def fit(self) -> None:
            # Through another process and back, as it is.
            ray.get(self._monitor.give_up.remote(error))

    monkeypatch.setattr(job_module, "TorchTrainer", Trainer)
    assert run_cli(*arguments(labelled, tmp_path / "out")) == status
    (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("classify: ")]
    assert line == f"classify: {error}"


# ------------------------------------------------------------------------------- what it refuses


def test_wrong_inputs_are_one_line_and_no_ray(
    labelled: str, tmp_path: Path, run_cli, no_ray: None, capsys
) -> None:
    output = tmp_path / "out"
    x4 = write_model(tmp_path / "x4", scale=4)
    packed = tmp_path / "packed"
    packed.mkdir()
    (packed / "camelyonpatch_level_2_split_train_x.h5.gz").write_bytes(b"")
    cases = {
        "x4, and x2 is compared": ("--dataset", labelled, "--models", x4),
        "zenodo.org/records/2546921": ("--pcam", str(tmp_path / "no-pcam")),
        "gunzip": ("--pcam", str(packed)),
        "no finished bcSR dataset": ("--dataset", str(tmp_path / "nothing")),
        "no such file": ("--dataset", labelled, "--weights", str(tmp_path / "w.pth")),
    }
    for wanted, more in cases.items():
        assert run_cli("--output", output, "--crop-px", CROP_PX, *more) == 2, wanted
        (line,) = own_lines(capsys.readouterr().err)
        assert line.startswith("classify: ")
        assert wanted in line
    assert not output.exists()


def test_settings_that_do_not_fit_are_refused_by_the_command_line(
    labelled: str, tmp_path: Path, capsys
) -> None:
    inside = storage.join(labelled, "out")
    cases = {
        "--dataset, --pcam, or both": ("--output", "o"),
        "must be a multiple of scale": ("--output", "o", "--pcam", "p", "--crop-px", "33"),
        "which is read": ("--output", inside, "--dataset", labelled),
    }
    for wanted, command in cases.items():
        with pytest.raises(SystemExit, match="2"):
            parse(command)
        assert wanted in " ".join(capsys.readouterr().err.replace("│", " ").split())


def test_the_command_line_names_every_setting() -> None:
    job = parse(
        (
            *("--output", "o", "--pcam", "p", "--models", "a", "b", "--train-on", "each"),
            *("--depth", "18", "--max-tiles", "9", "--max-crops", "99", "--precision", "bf16"),
            *("--num-workers", "3"),
        )
    )
    assert isinstance(job, ClassifyJob)
    assert (job.models, job.train_on, job.pcam) == (("a", "b"), "each", "p")
    assert (job.crops.max_tiles, job.crops.max_crops, job.crops.crop_px) == (9, 99, 128)
    assert (job.classifier.depth, job.classifier.precision) == (18, "bf16")
    assert job.workers.num_workers == 3
    # Workers start in another folder.
    study = job.study()
    assert all(Path(uri).is_absolute() for uri in (*study.models, study.output, study.pcam or ""))
    with pytest.raises(ValueError, match="num_workers=0"):
        WorkersConfig(num_workers=0)


def test_events_are_told_in_a_line() -> None:
    assert describe({"kind": "tested", "corpus": "PCam", "pictures": "LR"}) == "PCam: LR tested"
    epoch = {"kind": "epoch", "corpus": "bcSR", "trained_on": "GT", "epoch": 2, "epochs": 9}
    epoch |= {"loss": 0.25, "validation_accuracy": None, "seconds": 3.21}
    assert describe(epoch) == "bcSR: classifier of GT, epoch 2 of 9, loss 0.2500, 3.2 s"


# ------------------------------------------------------------------------------------- it is killed


def start_job(*more: str, log: Path, cache: Path) -> subprocess.Popen[bytes]:
    """The job in a process of its own, all it says in the log; it starts in the root folder."""
    with log.open("ab") as file:
        return subprocess.Popen(
            [sys.executable, str(ROOT / "jobs" / "classify.py"), *more],
            env=environment_of() | {"CARN_CACHE_DIR": str(cache)},
            cwd="/",
            stdout=file,
            stderr=subprocess.STDOUT,
        )


@pytest.mark.slow
def test_a_killed_job_ends_with_the_same_table(labelled: str, model: str, tmp_path: Path) -> None:
    more = ("--models", model, "--epochs", "6")
    wanted, output, log = tmp_path / "undisturbed", tmp_path / "out", tmp_path / "log"
    cache = tmp_path / "cache"
    command = arguments(labelled, wanted, *more)
    finish(start_job(*command, log=tmp_path / "log-0", cache=cache), log=tmp_path / "log-0")
    command = arguments(labelled, output, *more)
    folder = output / "bcsr" / "classifiers" / "gt"
    for is_so in (
        (folder / "epoch-0002.safetensors").exists,
        (output / "bcsr" / "predictions" / "gt" / "lr.parquet").exists,
    ):
        process = start_job(*command, log=log, cache=cache)
        try:
            wait_for(is_so, process, log=log)
        finally:
            kill_tree(process)
    finish(start_job(*command, log=log, cache=cache), log=log)
    assert (output / "table.csv").read_bytes() == (wanted / "table.csv").read_bytes()
    tables = [
        sorted(path.name for path in (root / "bcsr" / "predictions" / "gt").iterdir())
        for root in (output, wanted)
    ]
    assert tables[0] == tables[1]
    epochs = re.findall(r"epoch (\d) of 6", log.read_text())
    assert sorted(set(epochs)) == list("123456")
    # The first two epochs, at least, were not trained again.
    assert len(epochs) < 6 + 3
