"""metrics.csv and TensorBoard's files, on a disk and on an object store."""

import math
from pathlib import Path
from typing import Any

import pytest
from tensorboardX.proto.event_pb2 import Event

from carn.training.recording import Recorder, read_metrics

ROWS = [
    {"step": 2.0, "seconds": 0.125, "learning_rate": 1e-4, "images_per_s": 31.4, "loss": 0.1 + 0.2},
    {"step": 4.0, "seconds": 0.25, "learning_rate": 5e-5, "images_per_s": 29.0, "loss": 1e-300},
    {"step": 6.0, "seconds": 1 / 3, "learning_rate": 5e-5, "images_per_s": 1e9, "loss": math.pi},
]
SCORES = {"validation_psnr": 31.123456789012345, "validation_ssim": 0.98765432101234567}


def record(uri: str, rows: list[dict[str, float]], *, first_step: int = 0) -> Recorder:
    recorder = Recorder(uri, first_step=first_step)
    for row in rows:
        recorder.add(row)
    recorder.close()
    return recorder


def board_scalars(contents: list[bytes]) -> dict[tuple[str, int], float]:
    """The scalars of event files, as TensorBoard would show them: later ones purge earlier ones.

    A record is its length in 8 bytes, 4 of checksum, itself, 4 of checksum.
    """
    found: dict[tuple[str, int], float] = {}
    for content in contents:
        position = 0
        while position < len(content):
            length = int.from_bytes(content[position : position + 8], "little")
            event = Event.FromString(content[position + 12 : position + 12 + length])
            position += 16 + length
            if event.HasField("session_log") and event.session_log.status == 1:
                found = {key: value for key, value in found.items() if key[1] < event.step}
            for value in event.summary.value:
                found[value.tag, event.step] = value.simple_value
    return found


def test_rows_come_back_to_the_bit(tmp_path: Path) -> None:
    record(str(tmp_path), [*ROWS, {"step": 6.0} | SCORES])
    assert read_metrics(str(tmp_path)) == [*ROWS[:2], ROWS[2] | SCORES]


def test_the_table_is_for_people_too(tmp_path: Path) -> None:
    record(str(tmp_path), [ROWS[0] | {"ssim": 0.5, "l1": 2.0}, {"step": 2.0} | SCORES, ROWS[1]])
    header, first, second = (tmp_path / "metrics.csv").read_text().splitlines()
    assert header == (
        "step,seconds,learning_rate,images_per_s,l1,loss,ssim,validation_psnr,validation_ssim"
    )
    assert first.startswith("2,0.125,0.0001,31.4,2.0,0.30000000000000004,0.5,31.12345678901234")
    assert second == "4,0.25,5e-05,29.0,,1e-300,,,"


def test_where_nothing_was_recorded_there_are_no_rows(tmp_path: Path) -> None:
    assert read_metrics(str(tmp_path)) == []
    recorder = Recorder(str(tmp_path), first_step=0)
    assert recorder.rows == []
    assert recorder.seconds == 0.0


def test_rows_after_the_step_that_is_resumed_from_are_dropped(tmp_path: Path) -> None:
    record(str(tmp_path), ROWS)
    recorder = Recorder(str(tmp_path), first_step=4)
    assert recorder.rows == ROWS[:2]
    assert recorder.seconds == 0.25
    recorder.add({"step": 5.0, "seconds": 0.5, "loss": 7.0})
    recorder.close()
    assert [row["step"] for row in read_metrics(str(tmp_path))] == [2, 4, 5]


def test_nothing_is_written_before_it_is_flushed(tmp_path: Path) -> None:
    recorder = Recorder(str(tmp_path), first_step=0)
    recorder.add(ROWS[0])
    assert read_metrics(str(tmp_path)) == []
    recorder.flush()
    assert read_metrics(str(tmp_path)) == ROWS[:1]
    recorder.add(ROWS[1])
    recorder.close()
    assert read_metrics(str(tmp_path)) == ROWS[:2]


def test_tensorboard_shows_the_same_and_forgets_what_was_repeated(tmp_path: Path) -> None:
    record(str(tmp_path), [*ROWS, {"step": 6.0} | SCORES])
    record(str(tmp_path), [ROWS[2] | {"step": 5.0, "loss": 7.0}], first_step=4)
    files = sorted((tmp_path / "tensorboard").iterdir(), key=lambda path: path.suffix)
    found = board_scalars([path.read_bytes() for path in files[:1]])
    assert found["train/loss", 2] == pytest.approx(0.3)
    assert found["run/learning_rate", 4] == pytest.approx(5e-5)
    assert found["validation/psnr", 6] == pytest.approx(SCORES["validation_psnr"])
    assert found["validation/ssim", 6] == pytest.approx(SCORES["validation_ssim"])
    assert not any(name.endswith(("/step", "/seconds")) for name, _ in found)
    found = board_scalars([path.read_bytes() for path in files])
    assert sorted(step for name, step in found if name == "train/loss") == [2, 4, 5]


def test_on_an_object_store_the_files_are_sent_whole(s3: Any, tmp_path: Path) -> None:
    uri = s3.uri("runs/a")
    recorder = Recorder(uri, first_step=0)
    recorder.add(ROWS[0])
    recorder.flush()
    (key,) = (key for key in s3.list_keys() if "tensorboard" in key)
    assert board_scalars([s3.get(key)])["train/loss", 2] == pytest.approx(0.3)
    recorder.add(ROWS[1])
    recorder.close()
    assert sorted(s3.list_keys()) == ["runs/a/metrics.csv", key]
    assert read_metrics(uri) == ROWS[:2]
    assert ("train/loss", 4) in board_scalars([s3.get(key)])
    # And the next part of the run beside them.
    record(uri, ROWS[2:], first_step=4)
    assert read_metrics(uri) == ROWS
    contents = [s3.get(key) for key in s3.list_keys() if "tensorboard" in key]
    assert len(contents) == 2


def test_an_object_store_s_files_leave_the_node(
    s3: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    record(s3.uri("a"), ROWS)
    assert list(tmp_path.iterdir()) == []


def test_without_tensorboard_the_table_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "tensorboardX", None)
    record(str(tmp_path), ROWS)
    assert read_metrics(str(tmp_path)) == ROWS
    assert not (tmp_path / "tensorboard").exists()
