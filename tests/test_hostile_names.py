"""Names from outside lead nowhere but to what they name: not out of folders, not into logs."""

import logging
import os
import stat
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from carn import node_cache, storage
from carn.errors import CacheError, CarnError, MissingObjectError, StorageError, UriError
from carn.log_lines import OneLineArguments, on_one_line
from carn.slides.node_cache import fetch
from carn.upscaling import inputs
from carn.upscaling.inputs import find_inputs
from tests.fuzzing import examples, only_own_errors

# ---------------------------------------------------------------------------------- what is named


@pytest.mark.parametrize("name", ["a\nb.tif", "a\0", "s3://b/a\r", "file:///a%00b", "\x1b[2J"])
def test_names_with_control_characters_are_refused(name: str) -> None:
    with pytest.raises(UriError, match="control characters") as caught:
        storage.normalize(name)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("name", ["é.tif", "a b.tif", "a%00b.tif", "a'$(x);`y`.tif", "\udc80.tif"])
def test_odd_names_are_names(name: str) -> None:
    assert storage.normalize(f"/folder/{name}") == f"/folder/{name}"


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        *((path, True) for path in ("a/b", "a", "..a/b..")),
        *((path, False) for path in ("..", "a/../b", "/a", "a//b", "./a", "a/.", "")),
    ],
)
def test_what_stays_below_a_folder(path: str, expected: bool) -> None:
    assert storage.is_below(path) is expected


def test_what_is_too_large_is_not_read(tmp_path: Path, stub_s3: Any) -> None:
    (tmp_path / "a").write_bytes(bytes(100))
    assert len(storage.read_bytes(str(tmp_path / "a"), max_bytes=100)) == 100
    with pytest.raises(StorageError, match="has 100 bytes; at most 99"):
        storage.read_bytes(str(tmp_path / "a"), max_bytes=99)
    with pytest.raises(StorageError, match="at most 99"):
        storage.content_hash(str(tmp_path / "a"), max_bytes=99)


# ------------------------------------------------------------------------- slides and their names


def test_a_key_that_leads_out_of_its_folder_is_no_output_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    keys = ["inbox/a.tif", "inbox/../../etc/b.tif", "inbox/_state/d.tif"]
    keys += ["inbox/_work/e.tif", "inbox/new\nline.tif"]
    found = [storage.ObjectStat(uri=f"s3://bucket/{key}", size=9, etag="1") for key in keys]
    monkeypatch.setattr(storage, "list_objects", lambda _: found)
    monkeypatch.setattr(storage, "is_file", lambda _: False)
    monkeypatch.setattr(storage, "stat", lambda _: found[0])
    items = {storage.name_of(item.uri): item for item in find_inputs(["s3://bucket/inbox"])}
    assert items["a.tif"].problem is None
    for name in ("b.tif", "new\nline.tif"):
        assert "no path below the output" in (items[name].problem or "")
    for name in ("d.tif", "e.tif"):
        assert "the program's own" in (items[name].problem or "")
    globbed = find_inputs(["s3://bucket/inbox/*/*/*/*.tif"])
    assert all(item.problem for item in globbed)


def test_a_name_that_is_no_text_is_a_problem(tmp_path: Path) -> None:
    for name in (b"a.tif", b"b\xff.tif"):
        Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + name)).write_bytes(b"")
    good, bad = find_inputs([str(tmp_path)])
    assert good.problem is None
    assert "is no UTF-8 text; rename it" in (bad.problem or "")
    assert (bad.problem or "").isprintable()


def test_companions_whose_keys_lead_out_of_the_cache_are_not_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CARN_CACHE_DIR", str(tmp_path / "cache"))
    there = [
        storage.ObjectStat(uri=f"s3://bucket/a/{key}", size=4, etag="1")
        for key in ("slide.mrxs", "slide/Data.dat", "slide/../../../../evil")
    ]
    monkeypatch.setattr(storage, "stat", lambda _: there[0])
    monkeypatch.setattr(storage, "list_objects", lambda _: there[1:])
    monkeypatch.setattr(storage, "download", lambda _, path: path.write_bytes(b"evil"))
    with pytest.raises(StorageError, match="leads out of its folder"):
        fetch("s3://bucket/a/slide.mrxs")
    assert not list(tmp_path.rglob("evil"))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("uri,name\n/a.tif,../../b\n", "no path below"),
        ("uri,name\n/a.tif,a/../../b\n", "no path below"),
        ("uri,name\n/a.tif,_state/done/b\n", "the program's own"),
        ("uri,name\n/a.tif,_work/b\n", "the program's own"),
        ('uri,name\n/a.tif,"new\nline"\n', "no path below"),
        ("uri,mpp\n/a.tif,nan\n", "mpp is 'nan'"),
        ("uri,mpp\n/a.tif,-1\n", "mpp is '-1'"),
        ("uri,mpp\n/a.tif,1e9\n", "mpp is '1e9'"),
        ("uri\n/a\0.tif\n", "control characters"),
        (f'uri\n"{"a" * 200_000}"\n', "is no manifest"),
    ],
)
def test_hostile_manifests_are_one_error(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "a.csv").write_text(text, newline="")
    with pytest.raises(CarnError, match=words):
        find_inputs([str(tmp_path / "a.csv")])


def test_manifests_that_are_no_text_or_too_large_are_one_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.csv").write_bytes(b"uri\n\xff\xfe\n")
    with pytest.raises(CarnError, match=r"a\.csv is no manifest"):
        find_inputs([str(tmp_path / "a.csv")])
    monkeypatch.setattr(inputs, "MAX_MANIFEST_BYTES", 5)
    with pytest.raises(StorageError, match="at most 5"):
        find_inputs([str(tmp_path / "a.csv")])


@examples(25)
@given(
    head=st.sampled_from(("", "uri\n", "uri,name\n", "uri,name,mpp\n", '"uri"\r\n', "name,uri\n")),
    body=st.text(alphabet=st.sampled_from("a/.,\"\n\r\0#\t\\é'\ud7ff 1-e:s3"), max_size=60)
    | st.text(max_size=60),
    suffix=st.sampled_from((".csv", ".txt")),
)
def test_any_manifest_is_names_or_one_error(
    tmp_path: Path, head: str, body: str, suffix: str
) -> None:
    path = tmp_path / f"a{suffix}"
    path.write_bytes((head + body).encode())
    with only_own_errors():
        for item in find_inputs([str(path)]):
            assert storage.is_below(item.name)
            assert item.name.split("/")[0] not in inputs.RESERVED


# ------------------------------------------------------------------------------------- the cache


def test_the_cache_in_the_temporary_folder_is_the_users_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CARN_CACHE_DIR", raising=False)
    monkeypatch.setattr(node_cache.tempfile, "gettempdir", lambda: str(tmp_path))
    folder, pin = node_cache.hold("a", uri="u", size=lambda: 1, fill=lambda _: None)
    pin.close()
    assert stat.S_IMODE(folder.parent.stat().st_mode) == 0o700
    # Somebody else made it first.
    mine = os.getuid()
    (tmp_path / f"carn-slides-{mine + 1}").mkdir()
    monkeypatch.setattr(node_cache.os, "getuid", lambda: mine + 1)
    with pytest.raises(CacheError, match=r"belongs to another user.*CARN_CACHE_DIR"):
        node_cache.hold("a", uri="u", size=lambda: 1, fill=lambda _: None)


# ------------------------------------------------------------------------------------------ logs


def record(message: str, *args: object) -> str:
    made = logging.LogRecord("carn", logging.INFO, "", 0, message, args, None)
    assert OneLineArguments().filter(made)
    return made.getMessage()


def test_names_in_logs_stay_on_their_line() -> None:
    evil = "a.tif: done\n12:00:00 all slides are done\x1b[2J\u202e\udc80"
    expected = r"a.tif: done\n12:00:00 all slides are done\x1b[2J\u202e\udc80"
    assert on_one_line(evil) == expected
    assert record("%s: %d", evil, 3) == f"{expected}: 3"
    assert record("%s", MissingObjectError(evil, "no such file")) == f"{expected}: no such file"
    assert record("%s", Path("b\nc")) == r"b\nc"
    # What the program itself says may take several lines.
    assert record("first\nsecond %s", "é") == "first\nsecond é"
    assert record("%(a)s", {"a": 1}) == "1"
