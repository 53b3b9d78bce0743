"""Which inputs are found, and what they are called."""

from collections.abc import Callable
from pathlib import Path

import pytest

from carn import storage
from carn.errors import CarnError, MissingObjectError
from carn.upscaling.inputs import find_inputs
from tests.conftest import Bucket, FaultyS3


@pytest.fixture
def inbox(tmp_path: Path, write_slide: Callable[..., Path]) -> Path:
    for name in ("a/One.svs", "b/Two.tif", "b/deep/Three.tif"):
        write_slide(f"inbox/{name}", extent=(64, 48), num_levels=1, tile_px=16)
    (tmp_path / "inbox" / "b" / "notes.txt").write_text("not a slide")
    return tmp_path / "inbox"


def test_a_folder_gives_its_slides_named_by_their_place_in_it(inbox: Path) -> None:
    found = find_inputs([str(inbox)])
    assert [item.name for item in found] == ["a/One", "b/Two", "b/deep/Three"]
    for item in found:
        assert item.identity == storage.identity(item.uri)
        assert item.size_bytes == Path(item.uri).stat().st_size
        assert item.problem is None


def test_a_single_file_takes_its_own_name(inbox: Path) -> None:
    (item,) = find_inputs([str(inbox / "b" / "deep" / "Three.tif")])
    assert item.name == "Three"


def test_a_glob_names_each_folder_on_the_way(inbox: Path) -> None:
    assert [item.name for item in find_inputs([f"{inbox}/*/T*.tif"])] == ["b/Two"]
    assert [item.name for item in find_inputs([f"{inbox}/?/d*/*"])] == ["b/deep/Three"]
    with pytest.raises(MissingObjectError, match=r"matches nothing that ends with one of \.tif"):
        find_inputs([f"{inbox}/*.ndpi"])


def test_a_glob_on_an_object_store(inbox: Path, s3: Bucket) -> None:
    s3.put("in/2026-01/a.tif", inbox / "b" / "Two.tif")
    s3.put("in/2025-12/b.tif", inbox / "b" / "Two.tif")
    (item,) = find_inputs([s3.uri("in/2026-*/*.tif")])
    assert (item.name, item.uri) == ("2026-01/a", s3.uri("in/2026-01/a.tif"))
    assert item.identity.startswith("etag:")


def test_what_an_object_store_lists_is_not_asked_for_again(
    inbox: Path, faulty_s3: FaultyS3
) -> None:
    for number in range(3):
        faulty_s3.bucket.put(f"in/{number}.tif", inbox / "b" / "Two.tif")
        faulty_s3.bucket.put(f"pictures/{number}.png", b"x")
    uri = faulty_s3.bucket.uri
    found = find_inputs([uri("in"), uri("in/*.tif")], [uri("pictures")])
    assert faulty_s3.faults.counts == {"ListObjects": 3}
    assert len(found) == 6
    for item in found:
        assert (item.problem is None) == (not item.is_image)  # the names are those of the slides
        assert item.identity == storage.identity(item.uri)
        assert item.size_bytes == storage.stat(item.uri).size


def test_one_slide_named_twice_is_one(inbox: Path) -> None:
    assert len(find_inputs([str(inbox), str(inbox / "b")])) == 3


def test_manifests(inbox: Path, tmp_path: Path) -> None:
    lines = tmp_path / "night.txt"
    lines.write_text(f"# tonight\n{inbox}/a/One.svs  # urgent\n\n{inbox}/b/Two.tif\n")
    assert [item.name for item in find_inputs([str(lines)])] == ["One", "Two"]
    odd = inbox / "a" / "Slide #3.svs"
    (inbox / "a" / "One.svs").rename(odd)
    lines.write_text(f"  # tonight\n{odd}\n{odd} # again\n")
    assert [item.name for item in find_inputs([str(lines)])] == ["Slide #3"]
    odd.rename(inbox / "a" / "One.svs")
    table = tmp_path / "night.csv"
    table.write_text(f"uri,mpp,name\n{inbox}/a/One.svs,0.5,cases/first\n{inbox}/b/Two.tif,,\n")
    first, second = find_inputs([str(table)])
    assert (first.name, first.mpp_um) == ("Two", None)
    assert (second.name, second.mpp_um) == ("cases/first", 0.5)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("slide,mpp\nx.svs,1\n", "needs uri"),
        ("uri,mpp\nx.svs,half\n", "entry 1"),
        ("uri,name\nx.svs,../up\n", "no path below the output"),
    ],
)
def test_a_manifest_that_is_none(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "night.csv").write_text(text)
    with pytest.raises(CarnError, match=says):
        find_inputs([str(tmp_path / "night.csv")])


def test_what_cannot_be_read_is_an_input_with_a_problem(inbox: Path, tmp_path: Path) -> None:
    lines = tmp_path / "night.txt"
    lines.write_text(f"{inbox}/a/One.svs\n{inbox}/a/Gone.svs\n")
    gone, one = find_inputs([str(lines)])
    assert gone.problem is not None
    assert "no such file" in gone.problem
    assert one.problem is None


def test_two_of_one_name_cannot_both_have_it(inbox: Path, write_slide: Callable[..., Path]) -> None:
    write_slide("inbox/a/One.tif", extent=(64, 48), num_levels=1, tile_px=16)
    first, second = [item for item in find_inputs([str(inbox)]) if item.name == "a/One"]
    assert first.problem is None
    assert second.problem is not None
    assert first.uri in second.problem


def test_images(inbox: Path, tmp_path: Path) -> None:
    from PIL import Image

    (tmp_path / "images").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "images" / "x.png")
    found = find_inputs([str(inbox)], [str(tmp_path / "images")])
    assert [(item.name, item.is_image) for item in found if item.is_image] == [("x", True)]
    with pytest.raises(MissingObjectError, match="no images"):
        find_inputs([], [str(inbox / "a")])


def test_a_folder_with_no_slide_in_it_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "notes.json").write_text("{}")
    with pytest.raises(MissingObjectError, match="none that is named as a slide"):
        find_inputs([str(tmp_path / "in")])


def test_an_empty_folder_among_others_is_no_error(inbox: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert len(find_inputs([str(inbox), str(tmp_path / "empty")])) == 3
    with pytest.raises(MissingObjectError):
        find_inputs([str(tmp_path / "empty")])
