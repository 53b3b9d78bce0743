"""The nightly job on a Ray of this machine: what it makes, skips, reports and goes on with."""

import hashlib
import io
import json
import os
import sys
import time
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import openslide
import pyarrow as pa
import pytest
import tifffile
import tyro

from carn import storage
from carn.errors import CheckpointError, StorageError
from carn.report.sr_records import SlideSummary
from carn.slides import open_slide
from carn.slides.slide_output import SlideFormat
from carn.upscaling.engine import EngineConfig
from carn.upscaling.lr_view import InputConfig
from carn.upscaling.outbox import SlideClaims
from carn.upscaling.task import SlidePlan
from jobs import sr_night, super_resolve
from jobs.ray_stage import StageRunner
from jobs.sr_config import RunConfig, SuperResolveJob, parse_deadline
from jobs.sr_night import Night, check_checkpoint
from jobs.sr_stages import INSPECTED, finish_unit
from jobs.super_resolve import main
from tests.conftest import Bucket, FaultyS3
from tests.jobs.lab import draw_slide
from tests.jobs.sr_lab import draw_inbox, last_summary, make_sr_job, write_model

pytestmark = [pytest.mark.ray, pytest.mark.xdist_group("ray-slides")]


@pytest.fixture
def lab(tmp_path: Path, ray_here: None) -> Path:
    draw_inbox(tmp_path / "inbox")
    write_model(str(tmp_path / "model"))
    return tmp_path


def statuses(output: Path) -> dict[str, str]:
    return {slide["name"]: slide["status"] for slide in last_summary(output)["slides"]}


def sha256_of(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_slides_come_out_at_twice_the_resolution_and_once_only(
    lab: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = lab / "sr"
    assert main(make_sr_job(lab, out)) == 0
    for name in ("Case_1", "Case_2"):
        with openslide.OpenSlide(out / f"{name}.tif") as slide:
            assert slide.dimensions == (600, 440)
            assert float(slide.properties["openslide.mpp-x"]) == pytest.approx(0.125, rel=1e-4)
        notes = json.loads((out / f"{name}.json").read_text())
        assert notes["model"] == "carn"
        assert (out / f"{name}.consistency.png").read_bytes().startswith(b"\x89PNG")
        with open_slide(out / f"{name}.tif") as sr, open_slide(lab / f"inbox/{name}.tif") as lr:
            # An untrained network is near bicubic enlargement neither in tone nor in detail; its
            # place is what is looked at here: white glass stays on the right.
            assert sr.extent == (2 * lr.extent[0], 2 * lr.extent[1])
    summary = last_summary(out)
    assert [slide["status"] for slide in summary["slides"]] == ["done", "done"]
    assert all(slide["num_blocks"] == 6 for slide in summary["slides"])
    assert all(summary["stages"][f"{name}_s"] > 0 for name in ("read", "infer", "encode", "upload"))
    assert "2 slides super-resolved" in capsys.readouterr().out
    # Nothing of the work is left, and nothing is done again.
    assert not (out / "_work").exists() or not storage.list_objects(str(out / "_work"))
    before = {name: sha256_of(out / f"{name}.tif") for name in ("Case_1", "Case_2")}
    monkeypatch.setattr(sr_night, "start_ray", lambda: pytest.fail("Ray was started"))
    assert main(make_sr_job(lab, out)) == 0
    assert statuses(out) == {"Case_1": "skipped", "Case_2": "skipped"}
    assert {name: sha256_of(out / f"{name}.tif") for name in before} == before


def test_a_bad_slide_does_not_end_the_night(lab: Path) -> None:
    whole = (lab / "inbox" / "Case_1.tif").read_bytes()
    (lab / "inbox" / "Bad.tif").write_bytes(whole[: len(whole) // 2])
    (lab / "inbox" / "Empty.svs").write_bytes(b"")
    (lab / "inbox" / "None.ndpi").write_bytes(b"not a slide at all")
    assert main(make_sr_job(lab, lab / "sr")) == 1
    found = statuses(lab / "sr")
    assert found == {
        "Bad": "failed",
        "Case_1": "done",
        "Case_2": "done",
        "Empty": "failed",
        "None": "failed",
    }
    reasons = {slide["name"]: slide["reason"] for slide in last_summary(lab / "sr")["slides"]}
    assert "truncated" in reasons["Bad"]
    assert "empty file" in reasons["Empty"]
    job = make_sr_job(lab, lab / "sr", run={"on_bad_slide": "skip"})
    assert main(job) == 0


@pytest.fixture
def damaged(lab: Path) -> Path:
    """Case_1 with one JPEG tile overwritten."""
    path = lab / "inbox" / "Case_1.tif"
    with tifffile.TiffFile(path) as tiff:
        page = tiff.pages[0]
        offset, length = page.dataoffsets[0], page.databytecounts[0]
    content = bytearray(path.read_bytes())
    content[offset + 2 : offset + length - 2] = os.urandom(length - 4)
    path.write_bytes(content)
    return lab


def test_a_damaged_tile_fails_its_slide_alone(damaged: Path) -> None:
    assert main(make_sr_job(damaged, damaged / "sr")) == 1
    assert statuses(damaged / "sr") == {"Case_1": "failed", "Case_2": "done"}
    assert not (damaged / "sr" / "Case_1.tif").exists()


@pytest.mark.slow
def test_a_damaged_tile_can_be_enlarged_and_is_listed(damaged: Path) -> None:
    job = make_sr_job(damaged, damaged / "sr", input=InputConfig(on_damaged_tile="upsample"))
    assert main(job) == 0
    (slide, _) = last_summary(damaged / "sr")["slides"]
    assert slide["damage"]
    assert slide["damage"][0]["x_l0"] == 0
    assert json.loads((damaged / "sr" / "Case_1.json").read_text())["damage"] == slide["damage"]


def test_a_slide_without_mpp_says_what_to_do(lab: Path) -> None:
    from carn.slides.pyramid import write_pyramid

    with open_slide(lab / "inbox" / "Case_1.tif") as slide:
        pixels = slide.read_region(0, 0, 128, 96)
    for path in (lab / "inbox").iterdir():
        path.unlink()
    write_pyramid(lab / "inbox" / "Plain.tif", pixels, mpp_um=None, tile_px=64)
    assert main(make_sr_job(lab, lab / "sr")) == 1
    (slide,) = last_summary(lab / "sr")["slides"]
    assert "--mpp" in slide["reason"]
    assert main(make_sr_job(lab, lab / "sr", input=InputConfig(mpp=0.5))) == 0
    (slide,) = last_summary(lab / "sr")["slides"]
    assert slide["mpp_out"] == [0.25, 0.25]


def test_another_checkpoint_does_not_replace_what_is_there_unless_told_to(lab: Path) -> None:
    assert main(make_sr_job(lab, lab / "sr", run={"limit": 1})) == 0
    before = sha256_of(lab / "sr" / "Case_1.tif")
    write_model(str(lab / "other"), seed=1)
    job = make_sr_job(lab, lab / "sr", checkpoint=str(lab / "other"), slides=one(lab))
    assert main(job) == 1
    (slide,) = last_summary(lab / "sr")["slides"]
    assert slide["status"] == "conflict"
    assert "another checkpoint" in slide["reason"]
    assert sha256_of(lab / "sr" / "Case_1.tif") == before
    job = make_sr_job(
        lab,
        lab / "sr",
        checkpoint=str(lab / "other"),
        slides=one(lab),
        run={"overwrite": True},
    )
    assert main(job) == 0
    assert sha256_of(lab / "sr" / "Case_1.tif") != before
    # What was finished with the first checkpoint is no longer taken for finished.
    assert main(make_sr_job(lab, lab / "sr", slides=one(lab))) == 1


@pytest.mark.slow
def test_self_ensemble_reaches_workers_notes_and_report_and_parts_slides(
    lab: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = lab / "sr"
    engine = EngineConfig(device="cpu", num_threads=1, self_ensemble=True)
    assert main(make_sr_job(lab, out, slides=one(lab), engine=engine)) == 0
    notes = json.loads((out / "Case_1.json").read_text())
    assert notes["settings"]["self_ensemble"] is True
    assert "self-ensemble" in notes["engine"]
    assert last_summary(out)["self_ensemble"] is True
    before = sha256_of(out / "Case_1.tif")
    # Of runs that begin in one second the newest is not known by its name: what they print is.
    assert main(make_sr_job(lab, out, slides=one(lab), engine=engine)) == 0
    assert "0 slides super-resolved, 1 done before" in capsys.readouterr().out
    assert main(make_sr_job(lab, out, slides=one(lab))) == 1
    assert "was made from other settings" in capsys.readouterr().out
    assert sha256_of(out / "Case_1.tif") == before
    assert main(make_sr_job(lab, out, slides=one(lab), run={"overwrite": True})) == 0
    assert "self-ensemble" not in json.loads((out / "Case_1.json").read_text())["engine"]
    assert sha256_of(out / "Case_1.tif") != before


def test_self_ensemble_is_asked_for_on_the_command_line() -> None:
    words = ["--slides", "inbox", "--output", "sr"]
    for more, is_asked in (([], False), (["--self-ensemble"], True)):
        job = tyro.cli(SuperResolveJob, args=[*words, *more], config=(tyro.conf.OmitArgPrefixes,))
        assert job.engine.self_ensemble is is_asked


def one(lab: Path) -> tuple[str, ...]:
    return (str(lab / "inbox" / "Case_1.tif"),)


def test_limit_and_dry_run(lab: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(make_sr_job(lab, lab / "sr", run={"dry_run": True})) == 0
    said = capsys.readouterr().out
    assert "2 slides to do" in said
    assert "300 x 220 px -> 600 x 440 px" in said
    assert not (lab / "sr").exists()
    assert main(make_sr_job(lab, lab / "sr", run={"limit": 1})) == 0
    assert statuses(lab / "sr") == {"Case_1": "done", "Case_2": "unfinished"}


@pytest.mark.slow
def test_a_stopped_run_goes_on_and_ends_in_the_same_bytes(
    lab: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(make_sr_job(lab, lab / "whole")) == 0
    blocks: list[int] = []
    take = Night._take

    def counted(self: Night, wave: Any, slide: int, block: int, facts: dict[str, Any]) -> None:
        blocks.append(block)
        take(self, wave, slide, block, facts)

    def stop_after_two(self: Night) -> bool:
        if len(blocks) >= 2:
            self.stopped = "deadline"
        return self.stopped is not None

    with monkeypatch.context() as patch:
        patch.setattr(Night, "_take", counted)
        patch.setattr(Night, "_must_stop", stop_after_two)
        assert main(make_sr_job(lab, lab / "sr")) == 0
    first = last_summary(lab / "sr")
    assert first["is_stopped"] == "deadline"
    # Blocks at hand are finished, and by then the first slide may be; the last is not.
    assert first["slides"][-1]["status"] == "unfinished"
    assert not (lab / "sr" / "Case_2.tif").exists()
    assert main(make_sr_job(lab, lab / "sr")) == 0
    second = last_summary(lab / "sr")
    assert second["slides"][-1]["status"] == "done"
    for name in ("Case_1.tif", "Case_2.tif"):
        assert sha256_of(lab / "sr" / name) == sha256_of(lab / "whole" / name)


@pytest.mark.slow
def test_reading_apart_gives_the_same_bytes(lab: Path) -> None:
    assert main(make_sr_job(lab, lab / "fused", slides=one(lab))) == 0
    job = make_sr_job(
        lab,
        lab / "split",
        slides=one(lab),
        cluster={"pipeline": "split", "blocks_per_task": 2},
    )
    assert main(job) == 0
    assert sha256_of(lab / "split" / "Case_1.tif") == sha256_of(lab / "fused" / "Case_1.tif")


def test_what_another_run_is_at_is_left_to_it(lab: Path) -> None:
    with SlideClaims(str(lab / "sr"), owner="other", lease_s=600) as others:
        assert others.take("Case_1")
        assert main(make_sr_job(lab, lab / "sr")) == 0
    assert statuses(lab / "sr") == {"Case_1": "claimed", "Case_2": "done"}


@pytest.mark.slow
def test_results_are_never_taken_for_input_nor_put_in_its_place(lab: Path) -> None:
    out = lab / "inbox" / "sr"
    glob = (str(lab / "inbox" / "*.tif"), f"{out}/*.tif")
    job = make_sr_job(lab, out, slides=(str(lab / "inbox" / "*_1.tif"),))
    assert main(job) == 0
    # What lies below the output and was made by this job is not found again.
    assert main(make_sr_job(lab, out, slides=glob, run={"limit": 1})) == 0
    assert set(statuses(out)) == {"Case_1", "Case_2"}
    before = sha256_of(lab / "inbox" / "Case_1.tif")
    job = make_sr_job(lab, lab / "inbox", slides=one(lab), run={"overwrite": True})
    assert main(job) == 1
    assert sha256_of(lab / "inbox" / "Case_1.tif") == before
    (slide,) = last_summary(lab / "inbox")["slides"]
    assert "which is an input" in slide["reason"]


def test_a_run_that_breaks_says_what_it_has_done(
    lab: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_arguments: Any, **_options: Any) -> Any:
        raise RuntimeError("the cluster is gone")

    monkeypatch.setattr(sr_night, "run_blocks", broken)
    assert main(make_sr_job(lab, lab / "sr")) == 1
    assert "the cluster is gone" in capsys.readouterr().out
    assert "the cluster is gone" in last_summary(lab / "sr")["is_stopped"]


def test_storage_that_is_down_ends_the_run_instead_of_every_slide(
    lab: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    draw_inbox(lab / "inbox", num_slides=4)
    down = {"reason": "s3://lab/x: the object store cannot be reached", "is_storage": True}
    write = storage.write_bytes

    def refused(uri: str, content: bytes) -> None:
        if uri.endswith("/begun"):
            raise StorageError(uri, "the object store cannot be reached")
        write(uri, content)

    def run_blocks(*_arguments: Any, **_options: Any) -> Any:
        monkeypatch.setattr(storage, "write_bytes", refused)
        yield 0, 0, dict(down)
        for slide in range(1, 4):  # what actors answer once the board says stop
            yield slide, 0, {"verdict": "stopped"}

    monkeypatch.setattr(sr_night, "run_blocks", run_blocks)
    assert main(make_sr_job(lab, lab / "sr", run={"outage_minutes": 0.0})) == 1
    assert "stopped: " in capsys.readouterr().out
    assert list(statuses(lab / "sr").values()) == ["failed", *["unfinished"] * 3]


@pytest.fixture
def short_outage(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The output refuses the second and the third probe; lists the probes."""
    write = storage.write_bytes
    probes: list[str] = []

    def refused_twice(uri: str, content: bytes) -> None:
        if uri.endswith("/begun"):
            probes.append(uri)
            if 1 < len(probes) <= 3:  # the first is made when the run begins
                raise StorageError(uri, "the object store cannot be reached")
        write(uri, content)

    monkeypatch.setattr(storage, "write_bytes", refused_twice)
    monkeypatch.setattr(sr_night, "PROBE_S", 0.01)
    return probes


@pytest.mark.slow
def test_what_an_outage_failed_is_done_again(
    lab: Path, monkeypatch: pytest.MonkeyPatch, short_outage: list[str]
) -> None:
    down = {"reason": "s3://lab/x: the object store cannot be reached", "is_storage": True}
    make = sr_night.run_blocks

    def run_blocks(plans: Any, blocks: Any, **options: Any) -> Any:
        monkeypatch.setattr(sr_night, "run_blocks", make)
        yield 0, 0, dict(down)
        yield from make(plans, [block for block in blocks if block[0] != 0], **options)

    monkeypatch.setattr(sr_night, "run_blocks", run_blocks)
    # At the limit of slides, what was begun is still brought to its end.
    assert main(make_sr_job(lab, lab / "sr", run={"limit": 2})) == 0
    assert len(short_outage) == 4
    assert statuses(lab / "sr") == {"Case_1": "done", "Case_2": "done"}


@pytest.mark.slow
def test_a_slide_that_could_not_be_inspected_in_an_outage_is_looked_at_again(
    lab: Path, monkeypatch: pytest.MonkeyPatch, short_outage: list[str]
) -> None:
    run = StageRunner.run
    looks: list[int] = []

    def first_is_refused(self: StageRunner, stage: str, work: Any, units: Any) -> Any:
        looks.append(len(units))
        if len(looks) == 1:
            row = {"name": "Case_1", "reason": "s3://lab/x: cannot be reached", "is_storage": True}
            yield pa.Table.from_pylist([row], schema=INSPECTED)
            units = units[1:]
        yield from run(self, stage, work, units)

    monkeypatch.setattr(StageRunner, "run", first_is_refused)
    assert main(make_sr_job(lab, lab / "sr")) == 0
    assert looks == [2, 1]
    assert len(short_outage) == 4
    assert statuses(lab / "sr") == {"Case_1": "done", "Case_2": "done"}


@pytest.mark.slow
def test_a_deadline_long_past_waits_for_nothing(lab: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Slides that are being finished when the deadline comes, by an actor that never answers.
    soon = (datetime.now().astimezone() + timedelta(seconds=10)).isoformat()
    monkeypatch.setattr(sr_night, "GRACE_S", 1.0)
    monkeypatch.setattr("jobs.sr_stages.Finishing.collect", lambda *_, **__: iter(()))
    started = time.monotonic()
    assert main(make_sr_job(lab, lab / "sr", run={"deadline": soon})) == 0
    assert time.monotonic() - started < 60
    assert last_summary(lab / "sr")["is_stopped"] == "deadline"
    assert set(statuses(lab / "sr").values()) == {"unfinished"}
    monkeypatch.undo()
    assert main(make_sr_job(lab, lab / "sr")) == 0
    assert set(statuses(lab / "sr").values()) == {"done"}


@pytest.mark.slow
def test_a_slide_that_storage_fails_alone_does_not_end_the_run(
    lab: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run_blocks(*_arguments: Any, **_options: Any) -> Any:
        for slide in range(2):
            yield slide, 0, {"reason": "s3://lab/x: no such object", "is_storage": True}

    monkeypatch.setattr(sr_night, "run_blocks", run_blocks)
    assert main(make_sr_job(lab, lab / "sr")) == 1
    assert statuses(lab / "sr") == {"Case_1": "failed", "Case_2": "failed"}


@pytest.mark.slow
def test_a_slide_that_was_finished_unheard_is_not_finished_again(lab: Path) -> None:
    plans: dict[str, SlidePlan] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            Night, "_finished", lambda self, wave, plan, _: plans.update({plan.task.name: plan})
        )
        main(make_sr_job(lab, lab / "sr", slides=one(lab)))
    made = sha256_of(lab / "sr" / "Case_1.tif")
    outcome = finish_unit(plans["Case_1"].to_json(), 30.0, has_pictures=True)
    found = SlideSummary.from_json(outcome["summary"])
    assert found.status == "done"
    assert found.consistency is not None
    assert found.num_inferred_px + found.num_background_px == 600 * 440 // 4
    assert found.size_bytes == (lab / "sr" / "Case_1.tif").stat().st_size
    assert sha256_of(lab / "sr" / "Case_1.tif") == made


def test_images_and_zarr(lab: Path) -> None:
    from PIL import Image

    with open_slide(lab / "inbox" / "Case_1.tif") as slide:
        Image.fromarray(slide.read_region(0, 0, 100, 75)).save(lab / "crop.png")
    job = make_sr_job(
        lab,
        lab / "sr",
        slides=(),
        images=(str(lab / "crop.png"),),
        format=SlideFormat(container="ome-zarr", tile_px=64),
    )
    assert main(job) == 0
    import zarr

    level = zarr.open_group(lab / "sr" / "crop.ome.zarr", mode="r")["0"]
    assert level.shape[-2:] == (150, 200)
    assert main(job) == 0
    assert statuses(lab / "sr") == {"crop": "skipped"}


def test_on_an_object_store(lab: Path, ray_here_s3: str) -> None:
    for path in (lab / "inbox").iterdir():
        storage.write_bytes(f"{ray_here_s3}/in/{path.name}", path.read_bytes())
    job = make_sr_job(lab, f"{ray_here_s3}/sr", slides=(f"{ray_here_s3}/in/Case_*.tif",))
    assert main(job) == 0
    # Reading apart has a test of its own, a slow one; here it takes no time.
    apart = {"pipeline": "split", "blocks_per_task": 2}
    assert main(make_sr_job(lab, lab / "sr", cluster=apart)) == 0
    for name in ("Case_1.tif", "Case_2.tif"):
        # The files differ in what they say of their input: an ETag here, a hash there.
        with (
            tifffile.TiffFile(io.BytesIO(storage.read_bytes(f"{ray_here_s3}/sr/{name}"))) as remote,
            tifffile.TiffFile(lab / "sr" / name) as local,
        ):
            assert np.array_equal(remote.asarray(), local.asarray())
    assert main(job) == 0


# ------------------------------------------------------------------------------- before it begins


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--checkpoint", "{lab}/nowhere"], "no finished checkpoint"),
        (["--scale", "4"], "super-resolves x2"),
        (["--slides", "{lab}/empty"], "no file here"),
        (["--slides", "s3://no-such-bucket-here/in"], "no such bucket"),
        (["--output", "{lab}/inbox/sr"], "lies in"),
        (["--block-px", "1000"], "power of two"),
        (["--deadline", "tonight"], "neither a time of day"),
        (["--deadline", "2001-01-01T06:00"], "has passed"),
    ],
)
def test_what_cannot_begin_says_why_in_one_line(
    tmp_path: Path,
    s3: Bucket,
    arguments: list[str],
    says: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    del s3  # a server for those who ask one
    draw_inbox(tmp_path / "inbox", num_slides=1)
    write_model(str(tmp_path / "model"))
    (tmp_path / "empty").mkdir()
    given = {
        "--slides": f"{tmp_path}/inbox",
        "--checkpoint": f"{tmp_path}/model",
        "--output": f"{tmp_path}/sr",
    }
    texts = [text.format(lab=tmp_path) for text in arguments]
    given |= dict(zip(texts[::2], texts[1::2], strict=True))
    monkeypatch.setattr(
        sys, "argv", ["super_resolve", *(x for item in given.items() for x in item)]
    )
    monkeypatch.setattr(sr_night, "start_ray", lambda: pytest.fail("Ray was started"))
    try:
        status = super_resolve.cli()
    except SystemExit as error:  # tyro's own way out
        status = int(error.code or 0)
    assert status == 2
    captured = capsys.readouterr()
    said = " ".join((captured.err + captured.out).replace("│", " ").split())
    assert says in said
    assert not (tmp_path / "sr").exists()


@pytest.fixture
def refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[[str], str]:
    """Run the job over slides on an object store; returns the one line that it ends with."""
    write_model(str(tmp_path / "model"))
    slide = draw_inbox(tmp_path / "inbox", num_slides=1) / "Case_1.tif"

    def run(root: str) -> str:
        arguments = ("--slides", f"{root}/in", "--output", f"{root}/sr")
        monkeypatch.setattr(
            sys, "argv", ["super_resolve", *arguments, "--checkpoint", f"{tmp_path}/model"]
        )
        monkeypatch.setattr(sr_night, "start_ray", lambda: pytest.fail("Ray was started"))
        assert super_resolve.cli() == 2
        said = capsys.readouterr().err
        assert os.environ["AWS_SECRET_ACCESS_KEY"] not in said
        (line,) = [line for line in said.splitlines() if line.startswith("super_resolve: ")]
        return line

    run.slide = slide.read_bytes()  # type: ignore[attr-defined]
    return run


@pytest.mark.parametrize(
    ("status", "code", "operation", "says"),
    [
        (403, "InvalidAccessKeyId", ".*", "access denied (InvalidAccessKeyId): check AWS_ACCESS"),
        (400, "ExpiredToken", ".*", "the credentials have expired (ExpiredToken): renew them"),
        (403, "AccessDenied", "PutObject", "sr/_state/begun: access denied (AccessDenied)"),
    ],
    ids=["wrong", "expired", "read-only"],
)
def test_credentials_that_do_not_do_are_said_before_the_work(
    faulty_s3: FaultyS3, refused: Any, status: int, code: str, operation: str, says: str
) -> None:
    faulty_s3.bucket.put("in/Case_1.tif", refused.slide)
    faulty_s3.faults.add("refuse", operation, times=1000, status=status, code=code)
    assert says in refused(faulty_s3.bucket.uri())


@pytest.mark.skipif(
    "CARN_TEST_S3_READER" not in os.environ, reason="moto knows no rights; see tests/ceph.py"
)
def test_keys_that_may_only_read(s3: Bucket, refused: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    s3.put("in/Case_1.tif", refused.slide)
    s3.client.put_bucket_policy(
        Bucket=s3.name,
        Policy=json.dumps(
            {
                "Version": "2012-10-17",
                "Statement": {
                    "Effect": "Allow",
                    "Principal": {"AWS": ["arn:aws:iam:::user/reader"]},
                    "Action": ["s3:GetObject", "s3:ListBucket", "s3:PutObject"],
                    "Resource": [f"arn:aws:s3:::{s3.name}", f"arn:aws:s3:::{s3.name}/*"],
                },
            }
        ),
    )
    key, secret = os.environ["CARN_TEST_S3_READER"].split(":")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", key)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", secret)
    assert "sr/_state/begun: access denied" in refused(s3.uri())


def test_a_checkpoint_is_tried_before_anything_is_started(tmp_path: Path) -> None:
    draw_slide(tmp_path / "inbox.tif", 1, width=64, height=64)
    uri = write_model(str(tmp_path / "model"))
    weights = Path(uri) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"\0\0\0\1")
    job = make_sr_job(tmp_path, tmp_path / "sr", slides=(str(tmp_path / "inbox.tif"),))
    with pytest.raises(CheckpointError, match="damaged"):
        main(job)


def test_a_night_with_nothing_to_do_tidies_up(tmp_path: Path) -> None:
    out = str(tmp_path / "sr")
    write_model(str(tmp_path / "model"))
    storage.write_bytes(f"{out}/_work/gone/0123456789abcdef/cells.npz", b"")
    for abandon_days, num_left in ((1.0, 1), (1e-9, 0)):
        job = make_sr_job(tmp_path, out, run={"abandon_days": abandon_days})
        checkpoint, halo_px = check_checkpoint(job)
        night = Night(job, checkpoint=checkpoint, halo_px=halo_px, output=out)
        night.begin()
        night.work()
        assert len(storage.list_objects(f"{out}/_work")) == num_left


@pytest.mark.parametrize(
    ("roots", "output", "is_refused"),
    [
        # Folders and prefixes, however they are spelled.
        ({"slides": "/d"}, "/d", True),
        ({"slides": "/d/"}, "/d/sr/", True),
        ({"images": "/d"}, "/d/sr", True),
        ({"images": "/d/x/.."}, "/d/sr", True),
        ({"slides": "/d"}, "/x/../d/sr", True),
        ({"slides": "file:///d"}, "/d/sr", True),
        ({"slides": "s3://lab/in"}, "s3://lab/in/sr", True),
        ({"slides": "s3://lab"}, "s3://lab/sr", True),
        ({"slides": "s3://lab/in"}, "s3://lab/in-sr", False),
        ({"slides": "/d/in"}, "/d", False),
        ({"slides": "/d/One.svs"}, "/d", False),
        # Globs of images find the maps beside the results, or the pictures of reports.
        ({"images": "/d/*.png"}, "/d", True),
        ({"images": "/d/*"}, "/d", True),
        ({"images": "/d/tile_?*"}, "/d", True),
        ({"images": "/d/*.PNG"}, "/d", True),
        ({"images": "/d/*/*.png"}, "/d", True),
        ({"images": "/d/*/*.png"}, "/d/sr", True),
        ({"images": "/d/s[r]/*g"}, "/d/sr", True),
        ({"images": "/x/../d/*.png"}, "/d", True),
        ({"images": "s3://lab/*/*.png"}, "s3://lab/sr", True),
        ({"images": "/d/*/*/*/*.jpg"}, "/d", True),
        # These do not.
        ({"images": "/d/*.png"}, "/d/sr", False),
        ({"images": "/d/*/*.png"}, "/e", False),
        ({"images": "/d/x[12]/*.png"}, "/d/sr", False),
        ({"images": "/d/in/*.png"}, "/d", False),
        ({"images": "/d/*.jpg"}, "/d", False),
        ({"images": "/d/*.tif"}, "/d", False),
        ({"images": "/d/*/one.png"}, "/d", False),
        ({"images": "s3://lab/in-*/*.png"}, "s3://lab/sr", False),
        # Slides say of themselves that they are results.
        ({"slides": "/d/*.tif"}, "/d", False),
        ({"slides": "/d/*/*.svs"}, "/d/sr", False),
    ],
)
def test_results_are_not_to_become_input(
    roots: dict[str, str], output: str, is_refused: bool
) -> None:
    given = {name: (root,) for name, root in roots.items()}
    (root,) = roots.values()
    if not is_refused:
        SuperResolveJob(checkpoint="/model", output=output, **given)
        return
    with pytest.raises(ValueError, match="take its results for input") as caught:
        SuperResolveJob(checkpoint="/model", output=output, **given)
    assert f"lies in {root}" in str(caught.value)


def test_links_do_not_hide_that_results_become_input(tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "d")
    for root in (f"{tmp_path}/d", f"{tmp_path}/d/*.png"):
        with pytest.raises(ValueError, match="lies in"):
            SuperResolveJob(checkpoint="/model", output=f"{tmp_path}/link", images=(root,))


def test_deadlines() -> None:
    now = datetime.fromisoformat("2026-11-24T22:30:00+01:00")
    assert parse_deadline("06:00", now=now).isoformat() == "2026-11-25T06:00:00+01:00"
    assert parse_deadline("23:00", now=now).isoformat() == "2026-11-24T23:00:00+01:00"
    moment = parse_deadline("2026-11-26T01:30", now=now)
    assert moment.isoformat() == "2026-11-26T01:30:00+01:00"


def test_run_settings_are_checked() -> None:
    with pytest.raises(ValueError, match="limit=0"):
        RunConfig(limit=0)
    with pytest.raises(ValueError, match="progress_s"):
        RunConfig(progress_s=0)
