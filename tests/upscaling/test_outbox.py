"""What an output folder says of each slide, and what is swept from it."""

import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from carn import storage, uploads
from carn.claims import claim
from carn.slides.slide_output import OutputSpec, SlideFormat, open_output
from carn.upscaling import outbox
from carn.upscaling.lr_view import InputConfig
from carn.upscaling.outbox import (
    SlideClaims,
    judge,
    mark_done,
    sweep_abandoned,
    sweep_stale,
)
from carn.upscaling.task import PixelConfig, SlideTask, key_of
from tests.conftest import Bucket, FaultyS3, draw


def make_task(output: Path | str, **changes: object) -> SlideTask:
    fields: dict[str, object] = {
        "name": "case/One",
        "uri": "/inbox/case/One.svs",
        "identity": "etag:1:2",
        "is_image": False,
        "checkpoint": "/runs/carn",
        "checkpoint_hash": "sha256:abc",
        "model": "carn",
        "scale": 2,
        "halo_px": 36,
        "input": InputConfig(),
        "pixels": PixelConfig(),
        "precision": "auto",
        "format": SlideFormat(tile_px=16),
        "output": str(output),
        "block_px": 64,
        "code_version": "0.1.0+src.1",
    }
    return SlideTask(**(fields | changes))  # type: ignore[arg-type]


def spec_of(task: SlideTask) -> OutputSpec:
    return OutputSpec(
        uri=task.output_uri,
        work_uri=task.work_uri,
        extent=(100, 64),
        block_px=64,
        mpp=(0.25, 0.25),
        provenance=task.provenance(),
        format=task.format,
    )


def make_slide(task: SlideTask, *, keep_work: bool = False) -> None:
    """A finished slide at the task's place, without a note of it."""
    output = open_output(spec_of(task))
    output.begin()
    pixels = draw(100, 64)
    output.write_block(0, np.ascontiguousarray(pixels[:, :64]), facts={})
    output.write_block(1, np.ascontiguousarray(pixels[:, 64:]), facts={})
    output.finish(icc_profile=None, keep_work=keep_work)


def test_digests_part_what_differs_in_pixels_and_nothing_else() -> None:
    task = make_task("/out")
    same = [
        replace(task, block_px=128),
        replace(task, code_version="0.1.0+src.2"),
        replace(task, uri="/elsewhere/One.svs"),
    ]
    other = [
        replace(task, identity="etag:2:2"),
        replace(task, checkpoint_hash="sha256:def"),
        replace(task, input=InputConfig(level=1)),
        replace(task, pixels=PixelConfig(pooling="block")),
        replace(task, format=SlideFormat(tile_px=16, quality=80)),
        replace(task, precision="fp32"),
        replace(task, self_ensemble=True),
    ]
    assert {item.digest for item in same} == {task.digest}
    assert len({item.digest for item in (task, *other)}) == len(other) + 1
    # Blocks of two sizes, or of two programs, must never meet in one slide.
    assert len({item.work_uri for item in (task, *same)}) == 3


def test_a_self_ensemble_is_part_of_what_a_slide_says_of_its_making() -> None:
    task = make_task("/out")
    assert replace(task, self_ensemble=True).provenance()["settings"]["self_ensemble"] is True
    # As in slides that were finished before there was a choice.
    assert "self_ensemble" not in task.provenance()["settings"]


def test_a_finished_slide_is_not_skipped_for_a_self_ensemble(tmp_path: Path) -> None:
    task = make_task(tmp_path)
    make_slide(task)
    other = replace(task, self_ensemble=True)
    ((status, reason),) = judge([other], overwrite=False)
    assert status == "conflict"
    assert reason is not None
    assert "other settings" in reason
    assert judge([other], overwrite=True) == [("todo", None)]
    assert judge([task], overwrite=False) == [("skipped", None)]


def test_a_task_travels_as_text() -> None:
    task = make_task("/out", input=InputConfig(input_mpp=0.5, resample=True))
    assert SlideTask.from_json(task.to_json()) == task


def test_nothing_there_is_to_be_done(tmp_path: Path) -> None:
    assert judge([make_task(tmp_path)], overwrite=False) == [("todo", None)]


def test_a_finished_slide_is_skipped_and_then_known_without_opening_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = make_task(tmp_path)
    make_slide(task)
    assert judge([task], overwrite=False) == [("skipped", None)]
    monkeypatch.setattr(outbox, "read_provenance", lambda uri: pytest.fail(f"opened {uri}"))
    assert judge([task], overwrite=True) == [("skipped", None)]


def test_on_an_object_store(s3: Bucket) -> None:
    task = make_task(s3.uri("sr"))
    make_slide(task)
    assert judge([task], overwrite=False) == [("skipped", None)]
    assert [key for key in s3.list_keys() if "/_work/" in key] == []


def test_many_slides_are_judged_by_what_a_few_requests_list(
    faulty_s3: FaultyS3, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = faulty_s3.bucket.uri("sr")
    tasks = [make_task(output, name=f"{number}") for number in range(2 * outbox.NUM_THREADS)]
    for task in tasks[:3]:
        storage.write_bytes(task.committed_uri, b"a slide")
    for task in tasks[:2]:
        mark_done(task)
    storage.write_bytes(tasks[1].committed_uri, b"another slide")
    monkeypatch.setattr(outbox, "read_provenance", lambda _uri: None)
    faulty_s3.faults.clear()
    verdicts = ["skipped", *["conflict"] * 2, *["todo"] * (len(tasks) - 3)]
    assert [status for status, _ in judge(tasks, overwrite=False)] == verdicts
    assert faulty_s3.faults.counts == {"ListObjects": 2}
    # Not where there is far more than is asked for.
    monkeypatch.setattr(outbox, "OBJECTS_A_SLIDE", storage.PAGE)
    assert [status for status, _ in judge(tasks, overwrite=False)] == verdicts
    assert faulty_s3.faults.counts == {"ListObjects": 3, "HeadObject": len(tasks)}


def test_a_committed_slide_whose_notes_were_not_made_is_not_through(tmp_path: Path) -> None:
    task = make_task(tmp_path)
    make_slide(task, keep_work=True)
    assert judge([task], overwrite=False) == [("todo", None)]
    # What is left to do does not include its blocks.
    output = open_output(spec_of(task))
    output.begin()
    assert output.done_blocks() == {0, 1}
    before = Path(task.output_uri).read_bytes()
    output.finish(icc_profile=None)
    assert Path(task.output_uri).read_bytes() == before


def test_a_note_of_a_slide_that_is_gone_does_not_count(tmp_path: Path) -> None:
    task = make_task(tmp_path)
    make_slide(task)
    outbox.mark_done(task)
    Path(task.output_uri).unlink()
    assert judge([task], overwrite=False) == [("todo", None)]


def test_a_note_of_a_slide_that_was_replaced_does_not_count(tmp_path: Path) -> None:
    task = make_task(tmp_path)
    make_slide(task)
    outbox.mark_done(task)
    Path(task.output_uri).write_bytes(b"somebody's thesis")
    ((status, _),) = judge([task], overwrite=False)
    assert status == "conflict"


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"identity": "etag:2:2"}, "another input"),
        ({"checkpoint_hash": "sha256:def"}, "another checkpoint"),
        ({"pixels": PixelConfig(seed=2)}, "other settings"),
    ],
)
def test_a_slide_made_otherwise_is_in_the_way(
    tmp_path: Path, changes: dict[str, object], says: str
) -> None:
    make_slide(make_task(tmp_path))
    task = make_task(tmp_path, **changes)
    ((status, reason),) = judge([task], overwrite=False)
    assert status == "conflict"
    assert reason is not None
    assert says in reason
    assert "--overwrite" in reason
    assert judge([task], overwrite=True) == [("todo", None)]


def test_what_is_not_ours_is_in_the_way(tmp_path: Path) -> None:
    task = make_task(tmp_path)
    storage.write_bytes(task.output_uri, b"somebody's thesis")
    ((status, reason),) = judge([task], overwrite=False)
    assert status == "conflict"
    assert reason is not None
    assert "not made by this program" in reason


def test_a_zarr_of_another_program_is_in_the_way(tmp_path: Path) -> None:
    task = make_task(tmp_path, format=SlideFormat(container="ome-zarr", tile_px=16))
    storage.write_bytes(storage.join(task.output_uri, "0", "0", "0"), b"a chunk of version 0.4")
    ((status, _),) = judge([task], overwrite=False)
    assert status == "conflict"
    assert judge([task], overwrite=True) == [("todo", None)]
    # What an unfinished run of ours has left there is not.
    storage.write_bytes(storage.join(task.work_uri, "started.json"), b"{}")
    assert judge([task], overwrite=False) == [("todo", None)]


def test_overwritten_slides_are_no_longer_noted_as_the_old_ones(tmp_path: Path) -> None:
    old, new = make_task(tmp_path), make_task(tmp_path, identity="etag:2:2")
    make_slide(old)
    outbox.mark_done(old)
    assert judge([old], overwrite=False) == [("skipped", None)]
    outbox.unmark(new)
    assert storage.list_objects(str(tmp_path / "_state")) == []


def test_stale_work_is_swept_with_its_upload(tmp_path: Path) -> None:
    stale, task = make_task(tmp_path, identity="etag:0:0"), make_task(tmp_path)
    for each in (stale, task):
        open_output(spec_of(each)).begin()
    assert len(uploads.list_uploads(str(tmp_path))) == 2
    sweep_stale(task)
    (left,) = uploads.list_uploads(str(tmp_path))
    begun = storage.join(task.work_uri, "upload-000001.json")
    assert left.upload_id == json.loads(storage.read_bytes(begun))["upload_id"]
    assert not storage.list_objects(stale.work_uri)


ZARR = SlideFormat(container="ome-zarr", tile_px=16)


def begin_slide(task: SlideTask) -> None:
    """One of two blocks of it."""
    output = open_output(spec_of(task))
    output.begin()
    output.write_block(0, np.ascontiguousarray(draw(100, 64)[:, :64]), facts={})


def sweep(root: str, *tasks: SlideTask, days: float = -1) -> None:
    with SlideClaims(root, owner="this", lease_s=600) as ours:
        sweep_abandoned(root, ours, days=days, tasks=tasks)


def left_of_work(root: str) -> list[str]:
    return [item.uri for item in storage.list_objects(storage.join(root, "_work"))]


def test_stale_work_is_swept_with_its_shards(tmp_path: Path) -> None:
    stale = make_task(tmp_path, format=ZARR, identity="etag:0:0")
    task = make_task(tmp_path, format=ZARR)
    begin_slide(stale)
    assert storage.list_objects(task.output_uri)
    sweep_stale(task)
    # Who is killed here has begun nothing, and leaves nothing that is taken for another's.
    assert not storage.list_objects(task.output_uri)
    assert judge([task], overwrite=False) == [("todo", None)]


def test_stale_work_is_told_from_all_other_wherever_the_output_lies(tmp_path: Path) -> None:
    root = tmp_path / "_work" / "sr"
    stale, task = make_task(root, identity="etag:0:0"), make_task(root)
    other = make_task(root, name="other")
    for each in (stale, task, other):
        begin_slide(each)
    sweep_stale(task)
    assert not storage.list_objects(stale.work_uri)
    assert storage.list_objects(task.work_uri)
    assert storage.list_objects(other.work_uri)


@pytest.mark.parametrize("form", [SlideFormat(tile_px=16), ZARR])
def test_abandoned_work_is_swept_with_all_that_it_wrote(root: str, form: SlideFormat) -> None:
    root = storage.join(root, "sr")
    gone = make_task(root, format=form)
    hardly = make_task(root, name="hardly begun", format=form)
    wanted = make_task(root, name="wanted", format=form)
    begin_slide(gone)
    begin_slide(wanted)
    storage.write_bytes(storage.join(hardly.work_uri, "cells.npz"), b"")
    before = len(left_of_work(root))
    sweep(root, wanted, days=1)
    assert len(left_of_work(root)) == before
    sweep(root, wanted)
    assert left_of_work(root) == [
        item.uri for item in storage.list_objects(storage.join(root, "_work", "wanted"))
    ]
    assert open_output(spec_of(wanted)).done_blocks() == {0}
    assert not storage.list_objects(gone.output_uri)
    assert [item.uri for item in uploads.list_uploads(root)] == [wanted.output_uri] * (form != ZARR)


def test_work_that_was_taken_up_again_is_not_abandoned(tmp_path: Path) -> None:
    root, task = str(tmp_path), make_task(tmp_path)
    begin_slide(task)
    for item in storage.list_objects(task.work_uri)[1:]:
        os.utime(item.uri, (0, 0))
    sweep(root, days=1)
    assert open_output(spec_of(task)).done_blocks() == {0}


def test_what_lies_in_a_work_folder_leads_to_no_other_place(tmp_path: Path) -> None:
    root = str(tmp_path / "sr")
    task, victim = make_task(root, format=ZARR), make_task(tmp_path / "other", format=ZARR)
    begin_slide(task)
    begin_slide(victim)
    place = storage.join(task.work_uri, "output.json")
    for uri in (victim.output_uri, f"{root}/../other/case/One.ome.zarr"):
        spec = replace(spec_of(task), uri=uri)
        storage.write_bytes(place, spec.to_json().encode())
        sweep_stale(make_task(root, format=ZARR, identity="etag:2:2"))
        assert not storage.list_objects(task.work_uri)
        assert open_output(spec_of(victim)).done_blocks() == {0}
    for content in (b"", b"\xff", b"[]", b"{}", b'{"mpp": 1, "extent": 2, "format": {}}'):
        storage.write_bytes(place, content)
        sweep(root)
        assert not left_of_work(root)


def test_a_zarr_whose_beginning_was_killed_is_no_other_programs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = (make_task(tmp_path, format=ZARR, identity=f"etag:{n}:{n}") for n in (1, 2))
    make_slide(old)
    write = storage.write_bytes

    def killed(uri: str, content: bytes) -> None:
        if uri.endswith("started.json"):
            raise KeyboardInterrupt
        write(uri, content)

    with monkeypatch.context() as patch:
        patch.setattr(storage, "write_bytes", killed)
        with pytest.raises(KeyboardInterrupt):
            open_output(spec_of(new)).begin()
    assert not storage.is_file(old.committed_uri)
    assert judge([new], overwrite=False) == [("todo", None)]
    sweep(str(tmp_path))
    assert judge([new], overwrite=False) == [("todo", None)]
    assert not storage.list_objects(old.output_uri)


def test_uploads_that_no_record_speaks_of_are_swept(root: str) -> None:
    root = storage.join(root, "sr")
    names = ("lost answer", "wanted", "claimed", "never ours")
    tasks = {name: make_task(root, name=name) for name in names}
    with SlideClaims(root, owner="earlier", lease_s=600) as earlier:
        assert all(earlier.take(name) for name in names[:-1])
    for task in tasks.values():
        uploads.begin(task.output_uri)
    begin_slide(tasks["wanted"])
    with SlideClaims(root, owner="other", lease_s=600) as others:
        assert others.take("claimed")
        sweep(root, tasks["wanted"])
    assert [upload.uri for upload in uploads.list_uploads(root)] == [
        *(tasks[name].output_uri for name in names if name not in ("lost answer", "wanted")),
        tasks["wanted"].output_uri,
    ]
    assert open_output(spec_of(tasks["wanted"])).done_blocks() == {0}
    if not storage.is_s3(root):  # moto has all uploads begun at one time, long ago
        uploads.begin(tasks["lost answer"].output_uri)
        sweep(root, days=1)
        assert len(uploads.list_uploads(root)) == 4


def test_abandoned_uploads_are_swept_but_not_wanted_claimed_or_young_ones(
    tmp_path: Path,
) -> None:
    root = str(tmp_path)
    names = ("abandoned", "wanted", "claimed")
    tasks = {name: make_task(root, name=name) for name in names}
    for task in tasks.values():
        open_output(spec_of(task)).begin()
    with (
        SlideClaims(root, owner="other", lease_s=600) as others,
        SlideClaims(root, owner="this", lease_s=600) as ours,
    ):
        assert others.take("claimed")
        sweep_abandoned(root, ours, days=1, tasks=[tasks["wanted"]])
        assert len(uploads.list_uploads(root)) == 3
        sweep_abandoned(root, ours, days=-1, tasks=[tasks["wanted"]])
    left = {storage.stem_of(upload.uri) for upload in uploads.list_uploads(root)}
    assert left == {"wanted", "claimed"}


# ---------------------------------------------------------------------------------------- claims


def test_two_runs_do_not_get_one_slide(tmp_path: Path) -> None:
    with (
        SlideClaims(str(tmp_path), owner="one", lease_s=600) as one,
        SlideClaims(str(tmp_path), owner="two", lease_s=600) as two,
    ):
        assert one.take("case/One")
        assert one.holds("case/One")
        assert not two.take("case/One")
        assert not two.holds("case/One")
        assert "run one on" in two.holder("case/One")
        one.release("case/One")
        assert two.take("case/One")


def test_the_end_of_a_run_releases_its_slides(tmp_path: Path) -> None:
    with SlideClaims(str(tmp_path), owner="one", lease_s=600) as one:
        assert one.take("x")
    with SlideClaims(str(tmp_path), owner="two", lease_s=600) as two:
        assert two.take("x")


def test_a_killed_run_of_this_machine_holds_nobody_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = storage.join(str(tmp_path), "_state", "claims")
    child = os.fork()
    if child == 0:
        claim(root, "x", owner="killed", lease_s=600)
        os._exit(0)
    os.waitpid(child, 0)
    with SlideClaims(str(tmp_path), owner="next", lease_s=600) as claims:
        monkeypatch.setattr("carn.upscaling.outbox.socket.gethostname", lambda: "another")
        assert not claims.take("x")
        monkeypatch.undo()
        assert claims.take("x")
        assert claims.holds("x")


def test_uploads_of_others_are_not_ours_to_sweep(s3: Bucket) -> None:
    other = uploads.begin(s3.uri("sr/theirs.tif"))
    with SlideClaims(s3.uri("sr"), owner="this", lease_s=600) as ours:
        sweep_abandoned(s3.uri("sr"), ours, days=-1)
    assert [found.upload_id for found in uploads.list_uploads(s3.uri("sr"))] == [other]
    uploads.abort(s3.uri("sr/theirs.tif"), other)


def test_names_become_file_names() -> None:
    assert key_of("case/One") == "case%2FOne"
    assert not key_of(".hidden").startswith(".")
    long = [key_of("\u75c5" * 60 + end) for end in "ab"]
    assert long[0] != long[1]
    assert max(map(len, long)) <= 150
    assert key_of("M\udcfcller") == "M%FCller"
