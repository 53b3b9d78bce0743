"""What is counted, by which names; and the line of a slide. The last tests run on Ray."""

import dataclasses
import json
import logging
import math
import re
import time
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from carn.report.sr_records import (
    LINE_VERSION,
    STAGES,
    ConsistencySummary,
    SlideLine,
    SlideSummary,
    Status,
)
from jobs import metrics, super_resolve
from jobs.build_bcsr import _counted
from jobs.metrics import METRICS, Meters, TrainingMeters, meters, watch_s3
from jobs.sr_board import Board
from jobs.sr_pipeline import _Clock, _count
from jobs.sr_tally import slide_logger
from jobs.super_resolve import JsonLines, _begin_log
from tests.conftest import Bucket
from tests.jobs.sr_lab import draw_inbox, last_summary, make_sr_job, write_model

DOCS = Path(__file__).parents[2] / "docs" / "observability.md"


class Recorder:
    """Stands in for Ray's metrics: what was recorded, by name and labels."""

    def __init__(self) -> None:
        self.values: dict[tuple[str, ...], float] = {}

    def counter(self, name: str, _help: str, keys: tuple[str, ...]) -> Any:
        return _Instrument(self, name, keys, is_counter=True)

    def gauge(self, name: str, _help: str, keys: tuple[str, ...]) -> Any:
        return _Instrument(self, name, keys, is_counter=False)

    def of(self, name: str) -> dict[tuple[str, ...], float]:
        return {key[1:]: value for key, value in self.values.items() if key[0] == name}


class _Instrument:
    def __init__(
        self, recorder: Recorder, name: str, keys: tuple[str, ...], *, is_counter: bool
    ) -> None:
        self._recorder, self._name, self._keys = recorder, name, keys
        self._is_counter = is_counter

    def inc(self, value: float, tags: dict[str, str]) -> None:
        assert self._is_counter
        assert value > 0
        key = (self._name, *(tags[name] for name in self._keys))
        self._recorder.values[key] = self._recorder.values.get(key, 0.0) + value

    def set(self, value: float, tags: dict[str, str]) -> None:
        assert not self._is_counter
        self._recorder.values[self._name, *(tags[name] for name in self._keys)] = value


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Recorder]:
    """A process's fresh meters, with Ray there."""
    found = Recorder()
    monkeypatch.setattr(metrics.metrics, "Counter", found.counter)
    monkeypatch.setattr(metrics.metrics, "Gauge", found.gauge)
    monkeypatch.setattr("ray.is_initialized", lambda: True)
    monkeypatch.setattr(metrics, "GAUGE_EVERY_S", 0.01)
    fresh = Meters()
    for name in ("metrics", "sr_pipeline", "sr_night", "build_bcsr"):
        monkeypatch.setattr(f"jobs.{name}.meters", lambda: fresh)
    yield found
    fresh.close()


# -------------------------------------------------------------------------------- the table


def test_names_are_prefixed_unique_and_say_their_unit() -> None:
    for name, spec in METRICS.items():
        assert name == spec.name
        assert re.fullmatch(r"carn_(sr|bcsr|stage|train|s3)_[a-z0-9_]+", name)
        assert spec.exported_name == f"ray_{name}"
        assert name.endswith("_total") == (spec.kind == "counter")
        assert spec.help.endswith(".")
        assert spec.help[0].isupper()
        for word in ("second", "byte"):
            if f"{word}s" in name:
                assert re.search(rf"_{word}s(_total)?$", name)


def test_labels_are_few_and_none_is_a_name() -> None:
    for spec in METRICS.values():
        assert len(spec.labels) <= 2
        assert not {"slide", "file", "uri", "host", "node", "run", "run_id"} & spec.labels.keys()
        assert math.prod(max(1, len(values)) for values in spec.labels.values()) <= 8
    assert set(METRICS["carn_sr_slides_total"].labels["status"]) == set(Status.__args__)
    stages = {f"{name}_s" for name in METRICS["carn_sr_stage_seconds_total"].labels["stage"]}
    assert stages == set(STAGES)


def test_the_documentation_lists_the_table_and_the_fields() -> None:
    text = DOCS.read_text()
    listed = re.findall(r"^\| `(carn_\w+)` \| (\w+) \| ([^|]*) \| ([^|]*) \|$", text, re.MULTILINE)
    assert {row[0] for row in listed} == set(METRICS)
    assert len(listed) == len(METRICS)
    for name, kind, labels, meaning in listed:
        spec = METRICS[name]
        assert kind == spec.kind
        assert set(re.findall(r"`(\w+)`", labels)) == set(spec.labels)
        assert meaning.strip() == spec.help
    fields = re.findall(r"^\| `(\w+)` \| (?:text|integer|number|list)", text, re.MULTILINE)
    assert fields == [entry.name for entry in dataclasses.fields(SlideLine)]


# ------------------------------------------------------------------------------- the meters


def test_what_is_counted_before_ray_is_there_is_not_lost(
    recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    counted = Meters()
    counted.add("carn_sr_slides_total", 2, status="skipped")
    counted.add("carn_sr_slides_total", status="skipped")
    counted.set("carn_sr_slides_left", 9)
    counted.set("carn_sr_slides_left", 7)
    assert not recorder.values
    monkeypatch.setattr("ray.is_initialized", lambda: True)
    counted.add("carn_sr_slides_total", status="done")
    assert recorder.of("carn_sr_slides_total") == {("skipped",): 3, ("done",): 1}
    assert recorder.of("carn_sr_slides_left") == {(): 7}
    counted.add("carn_sr_slides_total", status="done")
    counted.add("carn_sr_slides_total", 0, status="failed")
    assert recorder.of("carn_sr_slides_total") == {("skipped",): 3, ("done",): 2}


def test_gauges_are_told_again_for_ray_forgets_them(recorder: Recorder) -> None:
    metrics.meters().set("carn_sr_slides_left", 7)
    recorder.values.clear()
    deadline = time.monotonic() + 10
    while not recorder.values and time.monotonic() < deadline:
        time.sleep(0.01)
    assert recorder.of("carn_sr_slides_left") == {(): 7}
    metrics.meters().close()
    recorder.values.clear()
    time.sleep(0.05)
    assert not recorder.values


def test_what_is_not_in_the_table_is_an_error() -> None:
    counted = Meters()
    with pytest.raises(ValueError, match="no counter of the table"):
        counted.add("carn_sr_cakes_total")
    with pytest.raises(ValueError, match="no gauge of the table"):
        counted.set("carn_sr_slides_total", 1, status="done")
    with pytest.raises(ValueError, match="has the labels"):
        counted.add("carn_sr_slides_total", slide="Case_1")
    with pytest.raises(ValueError, match="must be one of"):
        counted.add("carn_sr_slides_total", status="Case_1")


def test_blocks_are_counted_by_what_became_of_them(recorder: Recorder) -> None:
    _count({"verdict": "cancelled"})
    _count({"reason": "a tile is damaged", "read_s": 0.5})
    seconds = {"read_s": 1.0, "infer_s": 4.0, "encode_s": 0.5, "upload_s": 0.25, "wait_s": 0.0}
    _count({"num_lr_px": 1000, "num_bytes": 70, **seconds})
    _count({"num_lr_px": 500, "num_bytes": 0, **seconds})
    assert recorder.of("carn_sr_blocks_total") == {("failed",): 1, ("stored",): 2}
    assert recorder.of("carn_sr_lr_pixels_total") == {(): 1500}
    assert recorder.of("carn_sr_written_bytes_total") == {(): 70}
    found = recorder.of("carn_sr_stage_seconds_total")
    assert found == {("read",): 2.5, ("infer",): 8.0, ("encode",): 1.0, ("upload",): 0.5}


def test_tiles_are_counted_as_they_are_measured(recorder: Recorder) -> None:
    def table(*reasons: str | None) -> pa.Table:
        return pa.table({"reason": pa.array(reasons, pa.string())})

    tables = [table(None, "truncated", None), table(), table("damaged")]
    counting = _counted(iter(tables))
    assert next(counting) is tables[0]
    assert recorder.of("carn_bcsr_tiles_total") == {("measured",): 2, ("failed",): 1}
    assert list(counting) == tables[1:]
    assert recorder.of("carn_bcsr_tiles_total") == {("measured",): 2, ("failed",): 2}


def test_an_actors_time_is_all_counted(recorder: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([10.0, 12.0, 17.0, 18.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(times))
    clock = _Clock("upscaler")
    for state in ("waiting", "working", "writing"):
        clock.spent(state)  # type: ignore[arg-type]
    assert recorder.of("carn_sr_actor_seconds_total") == {
        ("upscaler", "waiting"): 2.0,
        ("upscaler", "working"): 5.0,
        ("upscaler", "writing"): 1.0,
    }


def test_blocks_that_are_begun_again_are_retries_of_their_slide() -> None:
    board = Board(3)
    assert board.begin(0, 1) == "go"
    assert board.retries(0) == 0
    for _ in range(4):
        board.begin(0, 1)  # its process died; the last two times it was not begun any more
    board.begin(1, 1)
    assert (board.retries(0), board.retries(1)) == (2, 0)


def test_training_counts_the_patches_of_all_workers_from_where_it_went_on(
    recorder: Recorder,
) -> None:
    count = TrainingMeters(model="carn", scale=2, batch_size=16)
    count({"kind": "begin", "step": 100})
    count({"kind": "step", "step": 110, "loss": 0.5, "images_per_s": 80.0})
    count({"kind": "step", "step": 125, "loss": 0.25, "images_per_s": 80.0})
    count({"kind": "validation", "step": 125, "validation_psnr": 31.5})
    labels = ("carn", "2")
    assert recorder.of("carn_train_samples_total") == {labels: 25 * 16}
    assert recorder.of("carn_train_loss") == {labels: 0.25}
    assert recorder.of("carn_train_steps_done") == {labels: 125}
    assert recorder.of("carn_train_validation_psnr_db") == {labels: 31.5}


def test_requests_to_object_storage_are_counted(recorder: Recorder, s3: Bucket) -> None:
    from carn import storage

    uri = s3.uri("thing")
    watch_s3("/local/folder", "/another")
    storage.write_bytes(uri, b"x" * 1000)
    assert not recorder.values  # nobody said that there is object storage
    watch_s3("/local/folder", uri)
    watch_s3(uri)
    storage.write_bytes(uri, b"x" * 1000)
    assert storage.read_bytes(uri) == b"x" * 1000
    assert storage.stat(uri).size == 1000
    found = recorder.of("carn_s3_requests_total")
    assert found[("PutObject",)] == 1
    assert found[("GetObject",)] == 1
    assert found[("HeadObject",)] >= 1
    assert recorder.of("carn_s3_sent_bytes_total")[()] == 1000
    assert recorder.of("carn_s3_received_bytes_total")[()] == 1000


def test_counting_requests_never_stands_in_the_way(
    recorder: Recorder, s3: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_PROFILE", "nobody-has-this-one")
    watch_s3(s3.uri("thing"))
    assert not recorder.values


# -------------------------------------------------------------------------------- the lines


SLIDE = SlideSummary(
    name="ward 3/Fälle_1",
    uri="s3://lab/in/x.svs",
    status="done",
    lr_extent=(300, 220),
    scale=2,
    num_blocks=6,
    num_blocks_resumed=1,
    num_inferred_px=50_000,
    num_background_px=16_000,
    accuracy_db=math.inf,
    consistency=ConsistencySummary(
        median_db=41.23456, min_db=29.0, share_below=0.01, threshold_db=30.0, low=()
    ),
    size_bytes=123_456,
    seconds=12.3456,
)


def line_of(slide: SlideSummary, **changes: Any) -> SlideLine:
    facts: dict[str, Any] = {"time": "2026-11-27T01:02:03+01:00", "run_id": "r", "model": "carn"}
    facts |= {"stages": {"infer_s": 9.87654}, "bytes_in": 77, "retries": 1}
    return SlideLine.of(slide, **(facts | changes))


def test_a_line_is_one_line_of_json_with_every_field_of_one_kind() -> None:
    text = line_of(SLIDE).to_json()
    assert "\n" not in text
    assert text.isascii()
    found = json.loads(text)
    assert found["event"] == "slide"
    assert found["version"] == LINE_VERSION
    assert found["slide"] == "ward 3/Fälle_1"
    assert (found["lr_extent"], found["sr_extent"]) == ([300, 220], [600, 440])
    assert (found["infer_s"], found["read_s"], found["seconds"]) == (9.877, 0.0, 12.346)
    assert (found["bytes_in"], found["bytes_out"], found["retries"]) == (77, 123_456, 1)
    assert found["consistency_median_db"] == 41.235
    # No infinity in JSON, and no text where numbers are.
    assert found["accuracy_db"] is None
    assert not [value for value in found.values() if isinstance(value, dict)]


def test_a_slide_that_was_not_opened_has_a_line_too() -> None:
    slide = SlideSummary(
        name="bad\udcff\nname", uri="bad", status="failed", reason="an\nodd reason", scale=2
    )
    text = line_of(slide, stages={}, bytes_in=None, retries=0).to_json()
    assert len(text.splitlines()) == 1
    found = json.loads(text)
    assert found["reason"] == "an\nodd reason"
    for name in ("lr_extent", "sr_extent", "seconds", "bytes_in", "bytes_out", "accuracy_db"):
        assert found[name] is None
    assert "bad" not in found


def test_the_log_is_lines_of_json_where_that_is_asked_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root = logging.getLogger()
    monkeypatch.setattr(root, "handlers", [])
    monkeypatch.setattr(root, "level", root.level)
    monkeypatch.setattr(slide_logger, "propagate", True)
    monkeypatch.setattr(slide_logger, "level", slide_logger.level)
    _begin_log("json")
    super_resolve.logger.info("3 slides: %d to do", 2)
    slide_logger.info("%s", line_of(SLIDE).to_json())
    try:
        raise RuntimeError("broken")
    except RuntimeError as error:
        super_resolve.logger.error("the run ends early", exc_info=error)
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert [line.get("event") for line in lines] == [None, "slide", None]
    assert lines[0]["message"] == "3 slides: 2 to do"
    assert (lines[0]["logger"], lines[0]["level"]) == ("super_resolve", "INFO")
    assert lines[0]["time"].endswith("+00:00")
    assert "RuntimeError: broken" in lines[2]["exception"]
    _begin_log("text")
    for handler in root.handlers:
        handler.setFormatter(logging.Formatter("%(message)s"))
    slide_logger.info("%s", line_of(SLIDE).to_json())
    super_resolve.logger.info("for people")
    assert capsys.readouterr().err == "for people\n"


def test_json_lines_end_nowhere_in_the_middle() -> None:
    record = logging.LogRecord("x", logging.INFO, "", 0, "two\nlines \u2028", (), None)
    assert len(JsonLines().format(record).splitlines()) == 1


def test_meters_of_a_process_are_one() -> None:
    assert meters() is meters()


# ------------------------------------------------------------------------------ with Ray itself


def lines_of(output: Path) -> list[dict[str, Any]]:
    newest = max((output / "runs").iterdir())
    return [json.loads(line) for line in (newest / "slides.jsonl").read_text().splitlines()]


def exported(wanted: Mapping[str, str]) -> dict[str, dict[str, float]]:
    """What Ray exports of the jobs' metrics, by name and labels, once it has those wanted."""
    import ray

    (node,) = [node for node in ray.nodes() if node["Alive"]]
    url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    own = {label for spec in METRICS.values() for label in spec.labels}
    deadline = time.monotonic() + 90
    while True:
        with urllib.request.urlopen(url, timeout=10) as answer:
            text = answer.read().decode()
        found: dict[str, dict[str, float]] = {}
        for name, labels, value in re.findall(
            r"^(ray_carn_\w+)\{(.*)\} (\S+)$", text, re.MULTILINE
        ):
            key = ",".join(v for k, v in re.findall(r"(\w+)=\"([^\"]*)\"", labels) if k in own)
            values = found.setdefault(name, {})
            values[key] = values.get(key, 0.0) + float(value)
        is_there = all(labels in found.get(name, {}) for name, labels in wanted.items())
        if is_there or time.monotonic() > deadline:
            return found
        time.sleep(2)


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.xdist_group("ray-slides")
def test_a_run_tells_of_every_slide_and_ray_exports_what_it_counts(
    tmp_path: Path, ray_here: None
) -> None:
    draw_inbox(tmp_path / "inbox")
    write_model(str(tmp_path / "model"))
    (tmp_path / "inbox" / "Bad.tif").write_bytes(b"no slide at all")
    out = tmp_path / "sr"
    assert super_resolve.main(make_sr_job(tmp_path, out, run={"dry_run": True})) == 0
    assert not out.exists()
    assert super_resolve.main(make_sr_job(tmp_path, out)) == 1
    lines = {line["slide"]: line for line in lines_of(out)}
    found = {name: line["status"] for name, line in lines.items()}
    assert found == {"Bad": "failed", "Case_1": "done", "Case_2": "done"}
    summary = last_summary(out)
    for slide in summary["slides"]:
        line = lines[slide["name"]]
        assert line["run_id"] == summary["run_id"]
        for name in ("reason", "lr_extent", "num_blocks", "num_inferred_px"):
            assert line[name] == slide[name]
        if line["status"] == "done":
            assert line["bytes_in"] == (tmp_path / "inbox" / f"{slide['name']}.tif").stat().st_size
            assert line["bytes_out"] == (out / f"{slide['name']}.tif").stat().st_size
            assert line["seconds"] == pytest.approx(slide["seconds"], abs=0.001)
            assert min(line[name] for name in ("read_s", "infer_s", "encode_s")) > 0
    for stage in STAGES:
        total = sum(line[stage] for line in lines.values())
        assert total == pytest.approx(summary["stages"][stage], abs=0.01)
    # All of it again: nothing to do is told as well.
    job = make_sr_job(tmp_path, out, slides=(str(tmp_path / "inbox" / "Case_1.tif"),))
    assert super_resolve.main(job) == 0
    assert [line["status"] for line in lines_of(out)] == ["skipped"]

    # Processes report every 10 s: driver and actor each for itself.
    counted = exported(
        {"ray_carn_sr_blocks_total": "stored", "ray_carn_sr_slides_total": "skipped"}
    )
    assert counted["ray_carn_sr_blocks_total"]["stored"] >= 12
    assert counted["ray_carn_sr_slides_total"]["done"] >= 2
    assert counted["ray_carn_sr_slides_total"]["skipped"] >= 1
    assert counted["ray_carn_sr_slides_left"] == {"": 0.0}
    assert counted["ray_carn_sr_stage_seconds_total"]["infer"] > 0
    assert set(counted["ray_carn_sr_actor_seconds_total"]) <= {
        "upscaler,working",
        "upscaler,waiting",
        "upscaler,writing",
    }
    assert counted.keys() <= {spec.exported_name for spec in METRICS.values()}


@pytest.mark.ray
@pytest.mark.xdist_group("ray-slides")
def test_slides_that_were_not_begun_are_told_of(tmp_path: Path, ray_here: None) -> None:
    draw_inbox(tmp_path / "inbox")
    write_model(str(tmp_path / "model"))
    assert super_resolve.main(make_sr_job(tmp_path, tmp_path / "sr", run={"limit": 1})) == 0
    lines = lines_of(tmp_path / "sr")
    assert [(line["slide"], line["status"]) for line in lines] == [
        ("Case_1", "done"),
        ("Case_2", "unfinished"),
    ]
    assert "not begun" in lines[1]["reason"]
