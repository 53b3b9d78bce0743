"""Slides written block by block to storage that breaks off, loses or alters things; and to S3."""

import itertools
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from carn import storage, uploads
from carn.errors import (
    ExtraPartError,
    StalePartError,
    StorageError,
    UnfinishedError,
    UploadGoneError,
)
from carn.slides.pyramid import pyramid_levels
from carn.slides.slide import Rgb
from carn.slides.slide_output import OutputSpec, SlideFormat, open_output
from tests.slides.tiff_lab import (
    ICC,
    JPEG,
    MIN_PART_BYTES,
    cut,
    levels_by_tifffile,
    spec_of,
    turned_tissue,
    write,
    written,
)


@pytest.fixture(scope="module")
def tissue() -> Rgb:
    return turned_tissue()


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uploads, "MIN_PART_BYTES", MIN_PART_BYTES)


def test_an_object_store_holds_the_same_bytes(
    tissue: Rgb, tmp_path: Path, s3: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With parts as large as S3 wants them: blocks above and below the limit."""
    monkeypatch.setattr(uploads, "MIN_PART_BYTES", 5 * 2**20)
    rng = np.random.default_rng(0)
    pixels = np.tile(tissue, (3, 2, 1))[:4500, :2300]
    pixels[:2048, :2048] = rng.integers(0, 256, (2048, 2048, 3), np.uint8)  # 12 MB, a part
    form = SlideFormat(compression="lossless", tile_px=512)
    for folder in (str(tmp_path), s3.uri("out")):
        finished = written(spec_of(folder, pixels, form, block_px=1024), pixels)
    local = (tmp_path / "slide.tif").read_bytes()
    assert s3.get("out/slide.tif") == local
    assert s3.list_keys() == ["out/slide.tif"]
    assert finished.num_parts > 3
    assert finished.etag.endswith(f"-{finished.num_parts}")
    assert not uploads.list_uploads(s3.uri("out"))
    assert all(map(np.array_equal, levels_by_tifffile(local), pyramid_levels(pixels)))


# ------------------------------------------------------------------- interruption and damage


@pytest.fixture
def folder(root: str) -> str:
    return storage.join(root, "out")


@pytest.fixture
def unlimited_parts(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An object store that joins parts of any size, as the tests' small slides want it."""
    if storage.is_s3(folder):
        if "CARN_TEST_S3_ENDPOINT" in os.environ:
            pytest.skip("a real object store joins no parts as small as this slide's")
        monkeypatch.setattr("moto.s3.models.S3_UPLOAD_PART_MIN_SIZE", 1)


@pytest.fixture(scope="module")
def whole(tissue: Rgb, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The slide of `pixels` written without a break."""
    folder = tmp_path_factory.mktemp("whole")
    pixels = pixels_of(tissue)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(uploads, "MIN_PART_BYTES", MIN_PART_BYTES)
        return Path(written(spec_of(folder, pixels), pixels).uri).read_bytes()


NUM_BLOCKS = 10
LARGE, BLANK = {0, 4, 6}, 2


def pixels_of(tissue: Rgb) -> Rgb:
    """Two levels, 2 x 5 blocks: LARGE are parts of their own, BLANK is white, others are small."""
    pixels = tissue[:1100, :330].copy()
    pixels[256:512, :256] = 255
    return pixels


@pytest.mark.usefixtures("unlimited_parts")
def test_a_slide_is_resumed_by_another_process(tissue: Rgb, folder: str, whole: bytes) -> None:
    pixels = pixels_of(tissue)
    spec = spec_of(folder, pixels)
    assert open_output(spec).done_blocks() == set()
    first = open_output(spec)
    write(first, pixels, [0, 1, 2, 5, 7])
    second = open_output(OutputSpec.from_json(spec.to_json()))
    second.begin()
    assert second.done_blocks() == {0, 1, 2, 5, 7}
    with pytest.raises(UnfinishedError) as caught:
        second.finish(icc_profile=ICC)
    assert caught.value.blocks == (3, 4, 6, 8, 9)
    assert not storage.is_file(spec.uri)
    assert len(uploads.list_uploads(folder)) == 1
    write(second, pixels, [3, 4, 6, 8, 9])
    facts = dict(second.block_facts())
    assert list(facts) == list(range(NUM_BLOCKS))
    assert facts[4]["index"] == 4
    assert facts[4]["mean"] == 1.5
    assert facts[4]["name"] == "b4"
    assert np.array_equal(facts[4]["grid"], np.eye(2))
    second.finish(icc_profile=ICC)
    assert storage.read_bytes(spec.uri) == whole


@pytest.mark.usefixtures("unlimited_parts")
def test_what_storage_no_longer_has_is_done_again(tissue: Rgb, folder: str, whole: bytes) -> None:
    pixels = pixels_of(tissue)
    spec = spec_of(folder, pixels)
    output = open_output(spec)
    write(output, pixels)
    [upload] = uploads.list_uploads(folder)
    uploads.put_part(spec.uri, upload.upload_id, 2 + 4, bytes(30_000))  # somebody else's part
    payloads = storage.list_objects(storage.join(spec.work_uri, "payloads"))
    [small] = [item.uri for item in payloads if "/000003." in item.uri]
    storage.delete([small])
    storage.write_bytes(storage.join(spec.work_uri, "blocks", "000007.npz"), b"no record")
    others = set(range(NUM_BLOCKS)) - {3, 4, 7}
    assert output.done_blocks() == others
    with pytest.raises(UnfinishedError, match="blocks 3, 4, 7"):
        output.finish(icc_profile=ICC)
    assert {index for index, _ in output.block_facts()} == others
    write(output, pixels, [3, 4, 7])
    output.finish(icc_profile=ICC)
    assert storage.read_bytes(spec.uri) == whole


def test_a_small_block_that_was_altered_is_done_again(
    tissue: Rgb, tmp_path: Path, whole: bytes
) -> None:
    pixels = pixels_of(tissue)
    spec = spec_of(tmp_path, pixels)
    output = open_output(spec)
    write(output, pixels)
    for item in storage.list_objects(storage.join(spec.work_uri, "payloads")):
        if "/000003." in item.uri:
            storage.write_bytes(item.uri, bytes(item.size))  # as long as before
    with pytest.raises(UnfinishedError) as caught:
        output.finish(icc_profile=ICC)
    assert caught.value.blocks == (3,)
    write(output, pixels, [3])
    output.finish(icc_profile=ICC)
    assert Path(spec.uri).read_bytes() == whole


@pytest.mark.usefixtures("unlimited_parts")
def test_an_upload_that_was_aborted_begins_anew(tissue: Rgb, folder: str, whole: bytes) -> None:
    pixels = pixels_of(tissue)
    spec = spec_of(folder, pixels)
    output = open_output(spec)
    write(output, pixels)
    [upload] = uploads.list_uploads(folder)
    uploads.abort(spec.uri, upload.upload_id)
    with pytest.raises(UploadGoneError):
        output.write_block(0, cut(spec, pixels, 0), facts={})
    small = set(range(NUM_BLOCKS)) - LARGE
    assert output.done_blocks() == small
    output.begin()
    assert output.done_blocks() == small
    write(output, pixels, LARGE)
    output.finish(icc_profile=ICC)
    assert storage.read_bytes(spec.uri) == whole
    assert not uploads.list_uploads(folder)


def test_racing_workers_agree_on_one_upload(tissue: Rgb, tmp_path: Path) -> None:
    pixels = pixels_of(tissue)
    spec = spec_of(tmp_path, pixels)
    with ThreadPoolExecutor(6) as pool:
        list(pool.map(lambda _: open_output(spec).begin(), range(12)))
    assert len(uploads.list_uploads(str(tmp_path))) == 1


def test_records_of_another_spec_are_not_taken(tissue: Rgb, tmp_path: Path) -> None:
    pixels = pixels_of(tissue)
    write(open_output(spec_of(tmp_path, pixels)), pixels, [0, 5])
    other = open_output(spec_of(tmp_path, pixels, replace(JPEG, quality=50)))
    other.begin()
    assert other.done_blocks() == set()


class Killed(BaseException):
    """What a test kills a process with."""


def _calls_to_kill(patch: pytest.MonkeyPatch) -> Iterator[Callable[[], int]]:
    """Make storage die after so many writes and deletions; before and after each."""
    count = itertools.count()
    limit = [10**9]

    def dying(function: Any) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            if next(count) >= limit[0]:
                raise Killed
            result = function(*arguments, **options)
            if next(count) >= limit[0]:
                raise Killed
            return result

        return call

    for module, name in (
        (uploads, "put_part"),
        (uploads, "complete"),
        (storage, "write_bytes"),
        (storage, "delete"),
        (storage, "delete_below"),
    ):
        patch.setattr(module, name, dying(getattr(module, name)))

    def arm(number: int | None) -> int:
        nonlocal count
        done, count = next(count), itertools.count()
        limit[0] = 10**9 if number is None else number
        return done

    yield arm


def test_a_finish_that_was_killed_anywhere_is_finished_by_the_next(
    tissue: Rgb, tmp_path: Path, whole: bytes
) -> None:
    pixels = pixels_of(tissue)
    number, is_over = 0, False
    write(open_output(spec_of(tmp_path / "written", pixels)), pixels)
    while not is_over:
        # Nothing in the folder of a slide knows where it lies.
        shutil.copytree(tmp_path / "written", tmp_path / f"{number}")
        spec = spec_of(tmp_path / f"{number}", pixels)
        with pytest.MonkeyPatch.context() as patch:
            [arm] = _calls_to_kill(patch)
            arm(number)
            try:
                finished = open_output(spec).finish(icc_profile=ICC)
                is_over = True
            except Killed:
                # What it left is whole or nothing, and a worker that looks breaks nothing.
                arm(None)
                if any(path.is_file() for path in Path(spec.work_uri).rglob("*")):
                    output = open_output(spec)
                    output.begin()
                    assert output.done_blocks() == set(range(NUM_BLOCKS))
                    finished = output.finish(icc_profile=ICC)
                    assert max(finished.thumbnail.shape) == 550
        assert Path(spec.uri).read_bytes() == whole
        assert not list(tmp_path.glob(f"{number}/*/blocks/*"))
        number += 1
    assert number > 20


def test_finish_before_begin_and_after_the_end_says_so(tissue: Rgb, tmp_path: Path) -> None:
    pixels = pixels_of(tissue)
    spec = spec_of(tmp_path, pixels)
    with pytest.raises(UnfinishedError):
        open_output(spec).finish(icc_profile=None)
    with pytest.raises(UploadGoneError, match="begin"):
        open_output(spec).write_block(0, cut(spec, pixels, 0), facts={})
    assert list(tmp_path.iterdir()) == []


def test_a_part_replaced_at_the_last_moment_is_named(
    tissue: Rgb, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pixels = pixels_of(tissue)
    spec = spec_of(tmp_path, pixels)
    output = open_output(spec)
    write(output, pixels)

    def complete(uri: str, upload_id: str, parts: Any) -> Any:
        raise StalePartError(uri, (2 + 4, 2 + 0))

    monkeypatch.setattr(uploads, "complete", complete)
    with pytest.raises(UnfinishedError) as caught:
        output.finish(icc_profile=ICC)
    assert caught.value.blocks == (0, 4)
    assert output.done_blocks() == set(range(NUM_BLOCKS)) - {0, 4}


def test_a_store_that_joins_parts_too_many_or_none_is_begun_with_anew(
    tissue: Rgb, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pixels = pixels_of(tissue)
    spec = spec_of(tmp_path, pixels)
    output = open_output(spec)
    write(output, pixels)

    def complete(uri: str, upload_id: str, parts: Any) -> Any:
        raise ExtraPartError(uri, (2 + 4,))

    with monkeypatch.context() as patch:
        patch.setattr(uploads, "complete", complete)
        with pytest.raises(UnfinishedError) as caught:
            output.finish(icc_profile=ICC)
    assert caught.value.blocks == tuple(range(NUM_BLOCKS))
    assert uploads.list_uploads(str(tmp_path)) == []
    output.begin()
    assert output.done_blocks() == set()
    write(output, pixels)
    output.finish(icc_profile=ICC)


@pytest.mark.usefixtures("unlimited_parts")
def test_records_can_be_kept_beyond_the_commit(tissue: Rgb, folder: str, whole: bytes) -> None:
    pixels = pixels_of(tissue)
    spec = spec_of(folder, pixels)
    output = open_output(spec)
    write(output, pixels)
    first = output.finish(icc_profile=ICC, keep_work=True)
    assert len(dict(output.block_facts())) == NUM_BLOCKS
    again = open_output(spec).finish(icc_profile=ICC, keep_work=True)
    assert (again.size, again.etag, again.num_parts) == (first.size, first.etag, first.num_parts)
    output.discard()
    assert storage.read_bytes(spec.uri) == whole
    assert [item.uri for item in storage.list_objects(folder)] == [spec.uri]


@pytest.mark.usefixtures("unlimited_parts")
def test_discard_leaves_nothing(tissue: Rgb, folder: str) -> None:
    pixels = pixels_of(tissue)
    spec = spec_of(folder, pixels)
    output = open_output(spec)
    write(output, pixels, [0, 3])
    output.discard()
    assert not storage.list_objects(folder)
    assert not uploads.list_uploads(folder)
    output.discard()
    with pytest.raises(StorageError):
        output.write_block(0, cut(spec, pixels, 0), facts={})
