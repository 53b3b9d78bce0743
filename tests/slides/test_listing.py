"""Which slides are below a folder or prefix."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from carn import storage
from carn.errors import CarnError, MissingObjectError
from carn.slides.listing import list_slides


@pytest.fixture
def put(root: str) -> Callable[..., list[str]]:
    """Write empty files below the root; returns their names."""

    def write(*names: str, content: bytes = b"x") -> list[str]:
        uris = [storage.join(root, name) for name in names]
        for uri in uris:
            storage.write_bytes(uri, content)
        return uris

    return write


def dicom(series: bytes) -> bytes:
    """The start of a DICOM file in explicit little endian, with a series."""
    padded = series + b"\0" * (len(series) % 2)
    uid = b"\x20\x00\x0e\x00UI" + len(padded).to_bytes(2, "little") + padded
    return bytes(128) + b"DICM" + uid


def test_slides_are_found_by_suffix_at_any_depth(root: str, put: Callable[..., list[str]]) -> None:
    names = ["b.tif", "a/B.SVS", "a/c/d.ndpi", "e.mrxs", "f.tiff", "g.scn", "h.bif"]
    expected = put(*names)
    put("e/Slidedat.ini", "e/Data0.dat", "note.txt", "tif", "a/.hidden.tif", "x.tif.part")
    assert list_slides([root]) == sorted(expected)


def test_roots_may_be_files_folders_and_repeated(root: str, put: Callable[..., list[str]]) -> None:
    a, b, c = put("x/a.tif", "x/b.tif", "y/c.tif")
    assert list_slides([a]) == [a]
    assert list_slides([storage.join(root, "x"), b, c, a]) == [a, b, c]
    assert list_slides([root + "/"]) == [a, b, c]


def test_patterns_find_what_matches(root: str, put: Callable[..., list[str]]) -> None:
    first, second, _, _ = put("a/1.svs", "a/2.SVS", "a/3.txt", "b/c/1.svs")
    assert list_slides([storage.join(root, "a/*")]) == [first, second]
    assert list_slides([storage.join(root, "*/[1-2].svs")]) == [first]
    with pytest.raises(MissingObjectError, match="matches nothing"):
        list_slides([storage.join(root, "a/*.tif")])


def test_a_folder_named_like_a_pattern_is_a_folder(tmp_path: Path) -> None:
    (tmp_path / "[old]").mkdir()
    (tmp_path / "[old]" / "1.svs").touch()
    assert list_slides([str(tmp_path / "[old]")]) == [str(tmp_path / "[old]" / "1.svs")]


def test_a_folder_named_like_a_slide_is_a_folder(root: str, put: Callable[..., list[str]]) -> None:
    (slide,) = put("run.tif/a.tif")
    assert list_slides([storage.join(root, "run.tif")]) == [slide]


def test_what_is_not_there_is_named(root: str, put: Callable[..., list[str]]) -> None:
    put("a.tif")
    for name in ("missing", "missing.tif"):
        with pytest.raises(MissingObjectError, match=f"{name}: no"):
            list_slides([root, storage.join(root, name)])


def test_a_file_that_is_no_slide_is_one_error(root: str, put: Callable[..., list[str]]) -> None:
    (uri,) = put("note.txt")
    with pytest.raises(CarnError, match=r"note\.txt"):
        list_slides([uri])


def test_a_folder_without_slides_gives_none(root: str, put: Callable[..., list[str]]) -> None:
    put("note.txt")
    assert list_slides([root]) == []


def test_a_dicom_series_is_one_slide(root: str, put: Callable[..., list[str]]) -> None:
    put("a/2.dcm", "a/3.DCM", content=dicom(b"1.2.840.1"))
    (first,) = put("a/1.dcm", content=dicom(b"1.2.840.1"))
    (other,) = put("b/1.dcm", content=dicom(b"1.2.840.10"))
    # Without a series number nothing says that two files are one slide.
    unnamed = put("c/1.dcm", "c/2.dcm", content=bytes(200))
    assert list_slides([root]) == [first, other, *unnamed]


def test_real_dicom(shared_data: Path) -> None:
    found = list_slides([str(shared_data / "slides" / "edge" / "dicom_boxes")])
    assert [Path(uri).name for uri in found] == ["boxes_0.dcm"]


@pytest.mark.parametrize("root", ["local"], indirect=True)
def test_names_come_normalized(
    put: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (uri,) = put("x/a.tif")
    monkeypatch.chdir(tmp_path)
    assert list_slides(["x"]) == [uri]
    assert list_slides([f"file://{tmp_path}/x"]) == [uri]


def test_unknown_storage_is_a_value_error(s3: Any) -> None:
    del s3
    with pytest.raises(ValueError, match="'gs' is not supported"):
        list_slides(["gs://bucket"])


def test_dicom_without_a_suffix_is_known_by_its_content(
    root: str, put: Callable[..., list[str]], caplog: pytest.LogCaptureFixture
) -> None:
    (plain,) = put("x/IM0001", content=dicom(b"1.2.3"))
    (uid,) = put("x/1.2.840.5", content=dicom(b"1.2.4"))
    put("x/same", content=dicom(b"1.2.3"))
    put("x/README", "x/notes.json", "x/1.2.9", content=b"x" * 200)
    with caplog.at_level("INFO"):
        assert list_slides([root]) == sorted([plain, uid])
    assert "3 files are left out" in caplog.text
    assert "1 .json" in caplog.text
    (alone,) = put("y/a.isyntax")  # no reader has it: better named as failed than passed over
    assert list_slides([storage.join(root, "y")]) == [alone]


def test_wildcards_in_the_name_of_an_object_are_its_own(s3: Any, tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"x")
    for key in ("in [1]/a.svs", "in 1/b.svs", "c[2].svs"):
        s3.put(key, tmp_path / "x")
    assert list_slides([s3.uri("in [1]")]) == [s3.uri("in [1]/a.svs")]
    assert list_slides([s3.uri("c[2].svs")]) == [s3.uri("c[2].svs")]
    assert list_slides([s3.uri("in [0-9]*/*.svs")]) == [s3.uri("in 1/b.svs")]
