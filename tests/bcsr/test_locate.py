"""Names of slides, their annotations, and tiles found on the slide itself."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from carn.bcsr.annotations import EXCLUDED_GROUPS, TUMOR_GROUPS
from carn.bcsr.locate import (
    LOCATED,
    UNLABELED,
    find_annotations,
    locate_by_annotation,
    locate_grid,
    name_slides,
)
from carn.errors import CoordinateError, MissingObjectError, SlideError

# ------------------------------------------------------------------------------------------ names


@pytest.mark.parametrize(
    ("uris", "names"),
    [
        (["/d/Tumor_001.tif", "/d/Normal_1.svs"], ["Tumor_001", "Normal_1"]),
        (["s3://b/x/a.tif", "s3://b/y/a.tif", "s3://b/y/c.tif"], ["x/a", "y/a", "c"]),
        (["/d/1/x/a.tif", "/d/2/x/a.tif", "/d/x/b.tif"], ["1/x/a", "2/x/a", "b"]),
        (["/d/e/f/a.svs", "/d/e/f/a.tif"], ["d/e/f/a.svs", "d/e/f/a.tif"]),
        ([], []),
    ],
)
def test_a_name_is_the_stem_with_as_many_folders_as_tell_it_apart(
    uris: list[str], names: list[str]
) -> None:
    assert name_slides(uris) == dict(zip(uris, names, strict=True))


parts = st.sampled_from(["a", "b", "x", "a.svs"])
paths = st.builds(
    lambda root, folders, stem, suffix: root + "/".join([*folders, stem + suffix]),
    st.sampled_from(["/", "/d/", "s3://bucket/", "s3://a/"]),
    st.lists(parts, max_size=5),
    parts,
    st.sampled_from([".tif", ".svs"]),
)


@given(st.lists(paths, unique=True, max_size=12))
@example(["s3://b/a.svs", "s3://b/a.tif"])
@example(["/a.svs", "/a.tif", "/a/a.tif", "/a/a/a.tif"])
def test_names_are_distinct_and_do_not_depend_on_the_order(uris: list[str]) -> None:
    names = name_slides(uris)
    assert list(names) == uris
    assert len(set(names.values())) == len(uris)
    assert name_slides(uris[::-1]) == names


def test_annotations_are_found_by_stem_at_any_depth(tmp_path: Path) -> None:
    for name in ("Tumor_001.xml", "deep/er/Tumor_002.JSON", "notes.txt", ".hidden.xml"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}")
    names = {"/s/Tumor_001.tif": "Tumor_001", "/s/Tumor_002.svs": "other", "/s/x.tif": "x"}
    assert find_annotations(str(tmp_path), names) == {
        "Tumor_001": str(tmp_path / "Tumor_001.xml"),
        "other": str(tmp_path / "deep/er/Tumor_002.JSON"),
    }
    assert find_annotations(str(tmp_path / "nothing here"), names) == {}


def test_annotations_that_fit_two_slides_or_come_twice_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.xml").write_text("<x/>")
    with pytest.raises(CoordinateError, match=r"/1/a.tif and /2/a.tif"):
        find_annotations(str(tmp_path), {"/1/a.tif": "1/a", "/2/a.tif": "2/a"})
    (tmp_path / "a.json").write_text("{}")
    with pytest.raises(CoordinateError, match=r"a.json and .*a.xml are both of the slide 'a'"):
        find_annotations(str(tmp_path), {"/1/a.tif": "a"})


# ------------------------------------------------------------------------------------------ places


@pytest.fixture
def island(write_slide) -> Path:
    """Glass of 768 x 640 px with tissue on [128, 512) x [192, 448)."""
    pixels = np.full((640, 768, 3), 243, dtype=np.uint8)
    pixels[192:448, 128:512] = (180, 60, 140)
    return write_slide(pixels=pixels, subsampling="444")


def corners(table: Any) -> list[tuple[int, int]]:
    return list(zip(table["x_l0"].to_pylist(), table["y_l0"].to_pylist(), strict=True))


def test_a_grid_lies_on_the_tissue(island: Path) -> None:
    table = locate_grid("name", str(island), tile_px=128, min_tissue=0.9)
    assert table.schema == LOCATED
    # y 192 cuts the second row of the grid, [128, 256), and 448 the fourth in halves.
    assert corners(table) == [(x, 256) for x in (128, 256, 384)]
    assert set(table["slide"].to_pylist()) == {"name"}
    assert set(table["uri"].to_pylist()) == {str(island)}
    assert set(table["label"].to_pylist()) == {UNLABELED}


def test_less_tissue_asked_for_gives_the_tiles_at_its_edge(island: Path) -> None:
    table = locate_grid("name", str(island), tile_px=128, min_tissue=0.4)
    assert corners(table) == [(x, y) for y in (128, 256, 384) for x in (128, 256, 384)]


def test_an_empty_slide_has_no_grid(write_slide) -> None:
    path = write_slide(pixels=np.full((300, 300, 3), 243, dtype=np.uint8))
    table = locate_grid("name", str(path), tile_px=64, min_tissue=0.1)
    assert table.schema == LOCATED
    assert len(table) == 0


def test_points_by_annotation_carry_the_slide(island: Path, tmp_path: Path) -> None:
    annotation = tmp_path / "slide.json"
    outline = [[200, 250], [300, 250], [300, 350], [200, 350]]
    tumor = {"name": "t", "vertices": outline}
    annotation.write_text(json.dumps({"positive": [tumor], "negative": []}))
    wish: dict[str, Any] = {"tile_px": 64, "points_per_label": 5, "seed": 1}
    wish |= {"tumor_groups": TUMOR_GROUPS, "excluded_groups": EXCLUDED_GROUPS}
    table = locate_by_annotation("name", str(island), str(annotation), **wish)
    assert table.schema == LOCATED
    assert set(table["uri"].to_pylist()) == {str(island)}
    labels = table["label"].to_pylist()
    assert (labels.count("tumor"), labels.count("normal")) == (5, 5)
    for (x, y), label in zip(corners(table), labels, strict=True):
        is_inside = 200 <= x + 32 <= 300 and 250 <= y + 32 <= 350
        assert is_inside == (label == "tumor")
    assert table.equals(locate_by_annotation("name", str(island), str(annotation), **wish))

    without = locate_by_annotation("name", str(island), None, **wish)
    assert set(without["label"].to_pylist()) == {"normal"}

    annotation.write_text("neither")
    with pytest.raises(CoordinateError, match=r"slide\.json"):
        locate_by_annotation("name", str(island), str(annotation), **wish)


def test_a_slide_that_does_not_open_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(MissingObjectError):
        locate_grid("name", str(tmp_path / "gone.tif"), tile_px=64, min_tissue=0.1)
    (tmp_path / "bad.tif").write_bytes(b"bad")
    with pytest.raises(SlideError):
        locate_grid("name", str(tmp_path / "bad.tif"), tile_px=64, min_tissue=0.1)
