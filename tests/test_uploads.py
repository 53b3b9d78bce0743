"""Objects written in parts: the same protocol on a local folder and on an object store."""

import base64
import hashlib
import io
import os
import pickle
import shutil
import signal
import subprocess
import sys
import textwrap
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from carn import s3 as s3_connection
from carn import storage, uploads
from carn.errors import (
    ExtraPartError,
    MissingObjectError,
    StalePartError,
    StorageError,
    UploadGoneError,
)
from carn.uploads import MIN_PART_BYTES, Part

REPOSITORY = Path(__file__).parents[1]
LARGE = MIN_PART_BYTES


def large(letter: str) -> bytes:
    """Content that S3 takes as a part that is not the last."""
    return letter.encode() * LARGE


def is_joined(uri: str, contents: Sequence[bytes]) -> bool:
    """Without a comparison that would print megabytes."""
    return bool(storage.read_bytes(uri) == b"".join(contents))


# -------------------------------------------------------------------------------------- protocol


def test_parts_become_one_object_in_the_order_of_their_numbers(root: str) -> None:
    uri = storage.join(root, "deep", "slide é.tif")
    upload_id = uploads.begin(uri)
    contents = {7: large("a"), 2: large("b") + b"x", 10_000: b"the end"}
    parts = [
        uploads.put_part(uri, upload_id, number, contents[number]) for number in (7, 10_000, 2)
    ]
    assert [part.etag for part in parts] == [
        hashlib.md5(contents[part.number]).hexdigest() for part in parts
    ]
    assert uploads.list_parts(uri, upload_id) == {part.number: part for part in parts}
    assert not storage.is_file(uri)
    assert storage.list_objects(root) == []

    done = uploads.complete(uri, upload_id, parts)
    assert done == storage.stat(uri)
    assert is_joined(uri, [contents[2], contents[7], contents[10_000]])
    assert [found.uri for found in storage.list_objects(root)] == [uri]
    assert uploads.list_uploads(root) == []
    for call in (
        lambda: uploads.list_parts(uri, upload_id),
        lambda: uploads.put_part(uri, upload_id, 1, b"late"),
    ):
        with pytest.raises(UploadGoneError, match=rf"slide é\.tif: the upload {upload_id}.*begin"):
            call()


def test_an_uploaded_object_replaces_the_old_one_in_one_step(root: str) -> None:
    uri = storage.join(root, "a.tif")
    storage.write_bytes(uri, b"old")
    upload_id = uploads.begin(uri)
    part = uploads.put_part(uri, upload_id, 1, b"new content")
    assert storage.read_bytes(uri) == b"old"
    uploads.complete(uri, upload_id, [part])
    assert storage.read_bytes(uri) == b"new content"


def test_joined_files_have_the_usual_mode_and_leave_nothing(tmp_path: Path) -> None:
    (tmp_path / "usual").touch()
    uri = str(tmp_path / "ours")
    upload_id = uploads.begin(uri)
    uploads.complete(uri, upload_id, [uploads.put_part(uri, upload_id, 1, b"x")])
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "usual").stat().st_mode
    assert {path.name for path in tmp_path.iterdir()} == {"usual", "ours"}


def test_a_part_written_again_takes_the_place_of_the_first(root: str) -> None:
    uri = storage.join(root, "a.tif")
    upload_id = uploads.begin(uri)
    first = uploads.put_part(uri, upload_id, 1, b"first attempt")
    again = uploads.put_part(uri, upload_id, 1, b"second")
    assert uploads.list_parts(uri, upload_id) == {1: again}
    with pytest.raises(StalePartError, match=r"a\.tif: parts 1 are missing or were replaced"):
        uploads.complete(uri, upload_id, [first])
    uploads.complete(uri, upload_id, [again])
    assert storage.read_bytes(uri) == b"second"


def test_parts_that_are_not_given_are_left_out(root: str) -> None:
    uri = storage.join(root, "a.tif")
    upload_id = uploads.begin(uri)
    one, _, three = (
        uploads.put_part(uri, upload_id, number, large("abc"[number - 1])) for number in (1, 2, 3)
    )
    if storage.is_s3(root) and "CARN_TEST_S3_ENDPOINT" in os.environ:
        # Ceph joins all or none.
        with pytest.raises(
            ExtraPartError, match="has parts 2 besides those to be joined"
        ) as caught:
            uploads.complete(uri, upload_id, [three, one])
        assert caught.value.numbers == (2,)
        assert sorted(uploads.list_parts(uri, upload_id)) == [1, 2, 3]
        uploads.abort(uri, upload_id)
    else:
        uploads.complete(uri, upload_id, [three, one])
        assert is_joined(uri, [large("a"), large("c")])


def test_missing_and_changed_parts_are_named_and_nothing_is_lost(root: str) -> None:
    uri = storage.join(root, "a.tif")
    upload_id = uploads.begin(uri)
    good = uploads.put_part(uri, upload_id, 1, large("g"))
    other_tag = Part(number=2, etag=hashlib.md5(b"other").hexdigest(), size=3)
    two = uploads.put_part(uri, upload_id, 2, large("t"))
    three = uploads.put_part(uri, upload_id, 3, b"three")
    other_size = Part(number=3, etag=three.etag, size=4)
    never = Part(number=9, etag="0" * 32, size=1)
    with pytest.raises(StalePartError) as caught:
        uploads.complete(uri, upload_id, [good, other_tag, other_size, never])
    assert caught.value.numbers == (2, 3, 9)
    assert not storage.is_file(uri)
    assert sorted(uploads.list_parts(uri, upload_id)) == [1, 2, 3]
    uploads.complete(uri, upload_id, [good, two, three])
    assert is_joined(uri, [large("g"), large("t"), b"three"])


def test_wrong_numbers_are_refused(root: str) -> None:
    uri = storage.join(root, "a.tif")
    upload_id = uploads.begin(uri)
    for number in (0, 10_001):
        with pytest.raises(ValueError, match=rf"part number {number} of .*1 to 10,000"):
            uploads.put_part(uri, upload_id, number, b"x")
    part = uploads.put_part(uri, upload_id, 1, b"x")
    for parts in ([], [part, part]):
        with pytest.raises(ValueError, match="at least one part, and one of each number"):
            uploads.complete(uri, upload_id, parts)
    uploads.abort(uri, upload_id)


def test_an_aborted_upload_is_gone_and_two_of_one_name_do_not_meet(root: str) -> None:
    uri = storage.join(root, "a.tif")
    one, other = uploads.begin(uri), uploads.begin(uri)
    assert one != other
    uploads.put_part(uri, one, 1, b"one")
    part = uploads.put_part(uri, other, 1, b"other")
    uploads.abort(uri, one)
    uploads.abort(uri, one)
    with pytest.raises(UploadGoneError):
        uploads.list_parts(uri, one)
    with pytest.raises(UploadGoneError):
        uploads.put_part(uri, one, 2, b"late")
    with pytest.raises(UploadGoneError):
        uploads.complete(uri, one, [part])
    uploads.complete(uri, other, [part])
    assert storage.read_bytes(uri) == b"other"


def test_completing_again_finds_it_done_and_other_parts_do_not_count(root: str) -> None:
    uri = storage.join(root, "a.tif")
    upload_id = uploads.begin(uri)
    parts = [
        uploads.put_part(uri, upload_id, 1, large("a")),
        uploads.put_part(uri, upload_id, 2, b"end"),
    ]
    done = uploads.complete(uri, upload_id, parts)
    assert uploads.complete(uri, upload_id, parts) == done
    other = Part(number=2, etag=hashlib.md5(b"END").hexdigest(), size=3)
    with pytest.raises(UploadGoneError):
        uploads.complete(uri, upload_id, [parts[0], other])
    storage.delete([uri])
    with pytest.raises(UploadGoneError):
        uploads.complete(uri, upload_id, parts)


def test_uploads_under_way_are_found_below_a_prefix(root: str) -> None:
    before = datetime.now(UTC) - timedelta(seconds=2)
    names = ["run/a.tif", "run/deep/b é.tif", "run2/c.tif"]
    ids = {storage.join(root, name): uploads.begin(storage.join(root, name)) for name in names}
    storage.write_bytes(storage.join(root, "run/whole.tif"), b"x")
    found = uploads.list_uploads(storage.join(root, "run"))
    below = [storage.join(root, name) for name in names[:2]]
    assert {upload.uri: upload.upload_id for upload in found} == {uri: ids[uri] for uri in below}
    assert uploads.list_uploads(storage.join(root, "run/")) == found
    assert {upload.uri for upload in uploads.list_uploads(root)} == ids.keys()
    assert uploads.list_uploads(storage.join(root, "nowhere")) == []
    for upload in found:
        assert upload.started.tzinfo == UTC
        if not storage.is_s3(root) or "CARN_TEST_S3_ENDPOINT" in os.environ:
            # moto began every upload in 2010
            assert before < upload.started < datetime.now(UTC) + timedelta(seconds=2)
    for uri, upload_id in ids.items():
        uploads.abort(uri, upload_id)
    assert uploads.list_uploads(root) == []


def test_tidying_up_leaves_uploads_alone(tmp_path: Path) -> None:
    uri = str(tmp_path / "run" / "a.tif")
    empty, begun = uploads.begin(uri), uploads.begin(uri)
    part = uploads.put_part(uri, begun, 1, b"x")
    storage.delete_unfinished(str(tmp_path))
    storage.delete_below(str(tmp_path / "run"))
    assert uploads.list_parts(uri, empty) == {}
    uploads.complete(uri, begun, [part])
    assert [found.upload_id for found in uploads.list_uploads(str(tmp_path))] == [empty]


@settings(max_examples=25)
@given(
    steps=st.lists(st.tuples(st.integers(1, 6), st.binary(max_size=40)), min_size=1, max_size=15),
    dropped=st.sets(st.integers(1, 6)),
)
def test_any_order_of_writing_gives_the_last_of_each_number(
    tmp_path_factory: pytest.TempPathFactory,
    steps: list[tuple[int, bytes]],
    dropped: set[int],
) -> None:
    uri = str(tmp_path_factory.mktemp("any") / "a.bin")
    upload_id = uploads.begin(uri)
    last = {
        number: (uploads.put_part(uri, upload_id, number, content), content)
        for number, content in steps
    }
    assert uploads.list_parts(uri, upload_id) == {number: last[number][0] for number in last}
    kept = sorted(last.keys() - dropped)
    if kept:
        uploads.complete(uri, upload_id, [last[number][0] for number in reversed(kept)])
        assert storage.read_bytes(uri) == b"".join(last[number][1] for number in kept)


def test_many_writers_at_once(root: str) -> None:
    uri = storage.join(root, "a.tif")
    upload_id = uploads.begin(uri)
    contents = [large(letter) for letter in "abcdef"]

    def put(number: int) -> Part:
        return uploads.put_part(uri, upload_id, number, contents[number - 1])

    with ThreadPoolExecutor(6) as pool:
        parts = list(pool.map(put, [1, 2, 3, 4, 5, 6, 3]))
    uploads.complete(uri, upload_id, parts[:6])
    assert is_joined(uri, contents)


# -------------------------------------------------------------------------------- local folders


def test_what_a_killed_completion_leaves_is_completed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = str(tmp_path / "a.bin")
    upload_id = uploads.begin(uri)
    parts = [uploads.put_part(uri, upload_id, number, b"ab"[number - 1 :]) for number in (1, 2)]
    folder = next(tmp_path.iterdir())
    # Killed while the part files were being removed, after the file had its name.
    with monkeypatch.context() as patch:
        patch.setattr(uploads, "abort", lambda *_: (folder / "00001" / "x").exists())
        uploads.complete(uri, upload_id, parts)
    next(folder.iterdir()).unlink()
    assert uploads.complete(uri, upload_id, parts).size == 3
    assert [path.name for path in tmp_path.iterdir()] == ["a.bin"]


def test_a_killed_process_leaves_its_parts(tmp_path: Path) -> None:
    uri = str(tmp_path / "a.bin")
    script = f"""
        import time
        from carn import storage, uploads
        upload_id = uploads.begin({uri!r})
        uploads.put_part({uri!r}, upload_id, 1, b"one")
        storage.write_durably = lambda *_: (print(upload_id, flush=True), time.sleep(60))
        uploads.put_part({uri!r}, upload_id, 2, b"two")
    """
    writer = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script)], stdout=subprocess.PIPE, cwd=REPOSITORY
    )
    assert writer.stdout is not None
    upload_id = writer.stdout.readline().decode().strip()
    writer.send_signal(signal.SIGKILL)
    writer.wait()
    writer.stdout.close()
    assert [found.upload_id for found in uploads.list_uploads(str(tmp_path))] == [upload_id]
    parts = uploads.list_parts(uri, upload_id)
    assert list(parts) == [1]
    two = uploads.put_part(uri, upload_id, 2, b"two")
    uploads.complete(uri, upload_id, [parts[1], two])
    assert storage.read_bytes(uri) == b"onetwo"
    assert [path.name for path in tmp_path.iterdir()] == ["a.bin"]


def test_a_part_cut_short_on_disk_is_stale_and_the_old_file_stays(tmp_path: Path) -> None:
    uri = str(tmp_path / "a.bin")
    storage.write_bytes(uri, b"old")
    upload_id = uploads.begin(uri)
    parts = [uploads.put_part(uri, upload_id, number, b"content") for number in (1, 2)]
    file = next(tmp_path.glob("*/00002.*"))
    file.write_bytes(b"cont")
    with pytest.raises(StalePartError) as caught:
        uploads.complete(uri, upload_id, parts)
    assert caught.value.numbers == (2,)
    assert storage.read_bytes(uri) == b"old"
    assert len(list(tmp_path.iterdir())) == 2
    uploads.put_part(uri, upload_id, 2, b"content")
    uploads.complete(uri, upload_id, parts)
    assert storage.read_bytes(uri) == b"contentcontent"


def test_who_writes_while_an_upload_is_aborted_finds_it_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = str(tmp_path / "a.bin")
    upload_id = uploads.begin(uri)
    rmtree = shutil.rmtree

    def others_still_write(folder: Path) -> None:
        with pytest.raises(UploadGoneError):
            uploads.put_part(uri, upload_id, 2, b"late")
        rmtree(folder)

    monkeypatch.setattr(shutil, "rmtree", others_still_write)
    uploads.abort(uri, upload_id)
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_abort_leaves_is_found_and_aborted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = str(tmp_path / "a.bin")
    upload_id = uploads.begin(uri)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda _folder: None)
        uploads.abort(uri, upload_id)
    (left,) = uploads.list_uploads(str(tmp_path))
    assert left.uri == uri
    uploads.abort(left.uri, left.upload_id)
    assert list(tmp_path.iterdir()) == []


def test_errors_travel_between_processes() -> None:
    for error in (
        UploadGoneError("s3://b/k", "gone"),
        StalePartError("s3://b/k", (1, 2)),
        ExtraPartError("s3://b/k", tuple(range(1, 30))),
    ):
        copy = pickle.loads(pickle.dumps(error))
        assert (type(copy), str(copy)) == (type(error), str(error))
        assert vars(copy) == vars(error)


def test_a_full_disk_is_named_and_nothing_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = str(tmp_path / "a.bin")
    upload_id = uploads.begin(uri)
    part = uploads.put_part(uri, upload_id, 1, b"content")

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(StorageError, match=r"a\.bin: No space left"):
            uploads.put_part(uri, upload_id, 2, b"more")
    with monkeypatch.context() as patch:
        patch.setattr(os, "copy_file_range", full)
        patch.setattr(shutil, "copyfileobj", full)
        with pytest.raises(StorageError, match=r"a\.bin: No space left"):
            uploads.complete(uri, upload_id, [part])
    assert [len(list(path.iterdir())) for path in tmp_path.iterdir()] == [1]
    uploads.complete(uri, upload_id, [part])
    assert storage.read_bytes(uri) == b"content"


def test_file_systems_without_copies_in_the_kernel_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy_file_range = os.copy_file_range

    def stops_half_way(source: int, target: int, _count: int) -> int:
        if os.lseek(source, 0, os.SEEK_CUR) == 0:
            return copy_file_range(source, target, 3)
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(os, "copy_file_range", stops_half_way)
    uri = str(tmp_path / "a.bin")
    upload_id = uploads.begin(uri)
    contents = [b"first part", b"second part", b"", b"x"]
    parts = [
        uploads.put_part(uri, upload_id, number, content)
        for number, content in enumerate(contents, start=1)
    ]
    uploads.complete(uri, upload_id, parts)
    assert storage.read_bytes(uri) == b"".join(contents)


# ------------------------------------------------------------------------- object store's whims


def begun(faulty_s3: Any, *, num_parts: int = 2) -> tuple[str, str, list[Part], list[bytes]]:
    uri = faulty_s3.bucket.uri("run/a.tif")
    upload_id = uploads.begin(uri)
    contents = [large("abcdef"[index]) for index in range(num_parts - 1)] + [b"end"]
    parts = [
        uploads.put_part(uri, upload_id, number, content)
        for number, content in enumerate(contents, start=1)
    ]
    faulty_s3.faults.clear()
    return uri, upload_id, parts, contents


@pytest.mark.usefixtures("no_waiting")
@pytest.mark.parametrize(
    ("kind", "times"),
    [
        *(("refuse", 3), ("refuse_after", 3), ("drop", 2), ("reset", 2), ("cut_upload", 2)),
        *(("cut_answer", 2), ("lose_answer", 2)),
    ],
)
@pytest.mark.parametrize(
    "operation", ["UploadPart", "CompleteMultipartUpload", "ListParts", "CreateMultipartUpload"]
)
def test_a_request_that_fails_for_a_while_is_sent_again(
    faulty_s3: Any, kind: Any, times: int, operation: str
) -> None:
    faults = faulty_s3.faults
    faults.add(kind, operation, times=times)
    uri = faulty_s3.bucket.uri("a.tif")
    upload_id = uploads.begin(uri)
    contents = [large("a"), b"end"]
    parts = [uploads.put_part(uri, upload_id, number, contents[number - 1]) for number in (1, 2)]
    done = uploads.complete(uri, upload_id, parts)
    assert is_joined(uri, contents)
    assert done.etag == uploads.multipart_etag(parts) == storage.stat(uri).etag
    assert faults.met == {kind: times}
    # A store that has forgotten a completed upload ends the repetitions early.
    assert faults.counts[operation] >= times + (operation != "CompleteMultipartUpload")
    for upload in uploads.list_uploads(faulty_s3.bucket.uri()):  # begun by requests unanswered
        assert operation == "CreateMultipartUpload"
        uploads.abort(upload.uri, upload.upload_id)


@pytest.mark.usefixtures("no_waiting")
def test_an_error_inside_a_good_answer_is_an_error(faulty_s3: Any) -> None:
    uri, upload_id, parts, contents = begun(faulty_s3)
    faulty_s3.faults.add("error_in_200", "CompleteMultipartUpload", times=2, code="InternalError")
    uploads.complete(uri, upload_id, parts)
    assert faulty_s3.faults.counts["CompleteMultipartUpload"] == 3
    assert is_joined(uri, contents)


@pytest.mark.usefixtures("no_waiting")
@pytest.mark.parametrize("kind", ["lose_answer", "refuse_after"])
def test_a_completion_whose_every_answer_is_lost_is_found_done_later(
    faulty_s3: Any, kind: Any
) -> None:
    uri, upload_id, parts, contents = begun(faulty_s3)
    faulty_s3.faults.add(kind, "CompleteMultipartUpload", times=100)
    with pytest.raises(StorageError):
        uploads.complete(uri, upload_id, parts)
    assert is_joined(uri, contents)
    faulty_s3.faults.clear()
    assert uploads.complete(uri, upload_id, parts) == storage.stat(uri)


def test_a_part_replaced_between_check_and_completion_is_stale(
    faulty_s3: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri, upload_id, parts, _ = begun(faulty_s3)
    list_parts, calls = uploads.list_parts, []

    def then_replaced(*of: str) -> dict[int, Part]:
        found = list_parts(*of)
        calls.append(of)
        if len(calls) == 1:
            uploads.put_part(uri, upload_id, 2, b"another end")
        return found

    monkeypatch.setattr(uploads, "list_parts", then_replaced)
    with pytest.raises(StalePartError) as caught:
        uploads.complete(uri, upload_id, parts)
    assert caught.value.numbers == (2,)
    assert not storage.is_file(uri)
    uploads.abort(uri, upload_id)


def test_parts_too_small_for_the_store_are_named(s3: Any) -> None:
    uri = s3.uri("a.tif")
    upload_id = uploads.begin(uri)
    parts = [uploads.put_part(uri, upload_id, number, b"small") for number in (1, 2, 3)]
    with pytest.raises(StorageError, match=r"parts \[1, 2\] are smaller than 5,242,880 bytes"):
        uploads.complete(uri, upload_id, parts)
    uploads.abort(uri, upload_id)


def test_lists_go_beyond_one_page(s3: Any) -> None:
    uris = [s3.uri(f"run/{name}.tif") for name in "abcde"]
    ids = [uploads.begin(uri) for uri in [*uris, uris[0]]]
    parts = [uploads.put_part(uris[0], ids[0], number, b"x") for number in range(1, 6)]
    events = s3_connection.s3_client().meta.events

    def two_at_a_time(params: dict[str, Any], **_: Any) -> None:
        params["MaxParts" if "UploadId" in params else "MaxUploads"] = 2

    names = [f"before-parameter-build.s3.{of}" for of in ("ListParts", "ListMultipartUploads")]
    for name in names:
        events.register(name, two_at_a_time)
    try:
        assert list(uploads.list_parts(uris[0], ids[0]).values()) == parts
        found = uploads.list_uploads(s3.uri("run"))
    finally:
        for name in names:
            events.unregister(name, two_at_a_time)
    assert sorted(upload.upload_id for upload in found) == sorted(ids)
    for upload in found:
        uploads.abort(upload.uri, upload.upload_id)


@pytest.mark.skipif("CARN_TEST_S3_ENDPOINT" not in os.environ, reason="moto looks at no MD5")
def test_content_damaged_on_its_way_is_refused(s3: Any) -> None:
    uri = s3.uri("a.tif")
    upload_id = uploads.begin(uri)
    events = s3_connection.s3_client().meta.events

    def flip(params: dict[str, Any], **_: Any) -> None:
        params["body"] = io.BytesIO(b"XX" + params["body"].read()[2:])

    events.register("before-call.s3.UploadPart", flip)
    try:
        with pytest.raises(StorageError, match="BadDigest"):
            uploads.put_part(uri, upload_id, 1, b"content")
    finally:
        events.unregister("before-call.s3.UploadPart", flip)
    assert uploads.list_parts(uri, upload_id) == {}
    uploads.abort(uri, upload_id)


def test_a_store_is_tried_for_parts_of_several_lengths(faulty_s3: Any, tmp_path: Path) -> None:
    folder = faulty_s3.bucket.uri("out")
    uploads.check_parts(folder)
    assert storage.list_objects(folder) == uploads.list_uploads(folder) == []
    # As Cloudflare's R2 answers.
    faulty_s3.faults.add(
        "refuse", "CompleteMultipartUpload", times=9, status=400, code="InvalidPart"
    )
    with pytest.raises(StorageError, match=r"only in parts of one length.*--container ome-zarr"):
        uploads.check_parts(folder)
    assert storage.list_objects(folder) == uploads.list_uploads(folder) == []
    uploads.check_parts(str(tmp_path / "none"))
    assert not (tmp_path / "none").exists()


def test_a_missing_bucket_is_named(s3: Any) -> None:
    with pytest.raises(MissingObjectError, match=r"carn-no-such-bucket.*no such bucket"):
        uploads.begin("s3://carn-no-such-bucket/a.tif")
    with pytest.raises(MissingObjectError, match="names a bucket"):
        uploads.begin(s3.uri())
    with pytest.raises(MissingObjectError, match="no such bucket"):
        uploads.list_uploads("s3://carn-no-such-bucket/x")


def test_parts_go_with_their_md5(s3: Any) -> None:
    uri = s3.uri("a.tif")
    upload_id = uploads.begin(uri)
    sent: list[str] = []
    events = s3_connection.s3_client().meta.events

    def look(params: dict[str, Any], **_: Any) -> None:
        sent.append(params["headers"]["Content-MD5"])

    events.register("before-call.s3.UploadPart", look)
    try:
        part = uploads.put_part(uri, upload_id, 1, b"content")
    finally:
        events.unregister("before-call.s3.UploadPart", look)
    assert [base64.b64decode(value).hex() for value in sent] == [part.etag]
    uploads.abort(uri, upload_id)


def test_an_answer_cut_within_its_headers_is_an_error_of_ours(s3: Any) -> None:
    uri = s3.uri("a.tif")
    upload_id = uploads.begin(uri)
    events = s3_connection.s3_client().meta.events

    def cut(parsed: dict[str, Any], **_: Any) -> None:
        parsed.pop("ETag")

    events.register("after-call.s3.UploadPart", cut)
    try:
        with pytest.raises(StorageError, match="answer to part 3 broke off; write the part again"):
            uploads.put_part(uri, upload_id, 3, b"content")
    finally:
        events.unregister("after-call.s3.UploadPart", cut)
    uploads.abort(uri, upload_id)
