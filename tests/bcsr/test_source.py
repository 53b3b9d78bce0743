"""What a build starts from, and what is said before any work begins."""

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from carn.bcsr.source import find_images, find_listed, find_slides
from carn.errors import CoordinateError, StorageError


@pytest.fixture
def lab(tmp_path: Path, write_slide) -> Path:
    (tmp_path / "slides").mkdir()
    for number in (1, 2, 3):
        path = write_slide(f"S_{number}.tif", extent=(200, 150), seed=number)
        path.rename(tmp_path / "slides" / path.name)
    (tmp_path / "tumor.txt").write_text("S_1,100,70\nS_2,50,60\nGone,1,1\nGone,2,2\n")
    return tmp_path


def listed(lab: Path, **changes):
    wish = {"coordinates": [str(lab / "tumor.txt")], "csv_anchor": None, "tile_px": 64}
    return find_listed([str(lab / "slides")], **(wish | changes))


def test_lists_name_the_slides_that_are_used(lab: Path) -> None:
    source = listed(lab)
    assert list(source.names.values()) == ["S_1", "S_2"]
    assert source.missing == {"Gone": 2}
    assert source.positions.select(["slide", "x_l0", "y_l0", "label"]).to_pylist() == [
        {"slide": "S_1", "x_l0": 68, "y_l0": 38, "label": "tumor"},
        {"slide": "S_2", "x_l0": 18, "y_l0": 28, "label": "tumor"},
    ]
    assert list(source.lists) == [str(lab / "tumor.txt")]


def test_the_digest_follows_what_is_used_and_nothing_else(lab: Path, write_slide) -> None:
    before = listed(lab).digest
    assert listed(lab).digest == before
    (lab / "slides" / "S_3.tif").unlink()  # on no list
    assert listed(lab).digest == before
    text = (lab / "tumor.txt").read_text()
    (lab / "tumor.txt").write_text(text.replace("100,70", "101,70"))  # of the same size
    edited = listed(lab).digest
    assert edited != before
    write_slide("other.tif", extent=(200, 150), seed=9).rename(lab / "slides" / "S_1.tif")
    assert listed(lab).digest not in (before, edited)


def test_a_name_that_is_no_text_is_left_out_and_told(lab: Path) -> None:
    odd = os.fsencode(lab / "slides") + b"/S_\xff.tif"
    Path(os.fsdecode(odd)).write_bytes((lab / "slides" / "S_1.tif").read_bytes())
    source = find_slides([str(lab / "slides")])
    assert sorted(source.names.values()) == ["S_1", "S_2", "S_3"]
    assert source.unnameable == (f"{lab}/slides/S_\\udcff.tif",)
    assert not listed(lab).unnameable  # no list can mean it


def test_annotations_and_grids(lab: Path) -> None:
    source = find_slides([str(lab / "slides")])
    assert sorted(source.names.values()) == ["S_1", "S_2", "S_3"]
    assert source.positions is None
    (lab / "xml").mkdir()
    (lab / "xml" / "S_2.xml").write_text("<x/>")
    annotated = find_slides([str(lab / "slides")], annotations=str(lab / "xml"))
    assert annotated.annotations == {"S_2": str(lab / "xml" / "S_2.xml")}
    assert annotated.digest != source.digest
    (lab / "xml" / "S_2.xml").rename(lab / "xml" / "else.xml")
    with pytest.raises(CoordinateError, match="holds no annotation"):
        find_slides([str(lab / "slides")], annotations=str(lab / "xml"))


def test_images_of_a_folder_or_of_its_hr(tmp_path: Path) -> None:
    pixels = Image.fromarray(np.zeros((8, 8, 3), dtype=np.uint8))
    (tmp_path / "LR_bicubic").mkdir()
    pixels.save(tmp_path / "LR_bicubic" / "1x2.png")
    assert list(find_images(str(tmp_path)).names.values()) == ["1x2"]
    (tmp_path / "HR").mkdir()
    pixels.save(tmp_path / "HR" / "1.png")
    assert list(find_images(str(tmp_path)).names.values()) == ["1"]
    with pytest.raises(StorageError, match="no images here"):
        find_images(str(tmp_path / "nowhere"))
