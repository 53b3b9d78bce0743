"""The demo's slides are slides, and its lists are lists."""

from pathlib import Path

import numpy as np
import openslide
import pytest
from scipy import ndimage

from carn import demo
from carn.bcsr.coordinates import ncrf_label, read_ncrf_list
from carn.slides import open_slide
from carn.slides.tissue import find_tissue

EXTENT = (1024, 768)


@pytest.fixture(autouse=True, scope="module")
def small() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "NUM_SLIDES", 1)
        patch.setattr(demo, "EXTENT_PX", EXTENT)
        yield


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, small: None) -> Path:
    folder = tmp_path_factory.mktemp("demo") / "below"
    demo.make_demo(folder)
    return folder


def test_there_are_slides_and_lists(made: Path) -> None:
    names = sorted(str(path.relative_to(made)) for path in made.rglob("*") if path.is_file())
    assert names == ["normal.txt", "slides/Demo_001.tif", "tumor.txt"]


def test_a_slide_opens_everywhere_with_its_mpp(made: Path) -> None:
    path = made / "slides" / "Demo_001.tif"
    with openslide.OpenSlide(str(path)) as peer:
        assert peer.dimensions == EXTENT
        assert float(peer.properties[openslide.PROPERTY_NAME_MPP_X]) == pytest.approx(0.25)
        assert float(peer.properties[openslide.PROPERTY_NAME_MPP_Y]) == pytest.approx(0.25)
    with open_slide(path) as slide:
        assert slide.reader == "tiled-tiff"
        assert slide.mpp == pytest.approx(0.25)
        # Islands on glass: some of it is tissue, some is not.
        assert 0.1 < find_tissue(slide).mask.mean() < 0.98


@pytest.mark.parametrize("label", ["tumor", "normal"])
def test_a_list_is_read_as_ncrfs(made: Path, label: str) -> None:
    uri = str(made / f"{label}.txt")
    assert ncrf_label(uri) == label
    table = read_ncrf_list(uri, label=label, tile_px=512)
    assert 1 <= len(table) <= demo.POINTS_PER_CLASS
    assert set(table["slide"].to_pylist()) == {"Demo_001"}
    # Tiles of 512 px round a centre lie on the slide whole.
    x, y = table["x_l0"].to_numpy(), table["y_l0"].to_numpy()
    assert x.min() >= 0
    assert y.min() >= 0
    assert x.max() <= EXTENT[0] - 512
    assert y.max() <= EXTENT[1] - 512


def test_the_tumour_is_stained_darker_and_points_lie_on_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def even(_rng: object, height: int, width: int) -> np.ndarray:
        return np.full((height, width, 3), 0.5, dtype=np.float32)

    monkeypatch.setattr(demo, "_tissue_field", even)
    pixels, is_tumor = demo.make_slide(1)
    assert pixels.shape == (EXTENT[1], EXTENT[0], 3)
    assert pixels.dtype == np.uint8
    assert is_tumor.shape == (EXTENT[1] // 16, EXTENT[0] // 16)
    grey = pixels.mean(axis=2).reshape(EXTENT[1] // 16, 16, -1, 16).mean(axis=(1, 3))
    away_from_it = ~ndimage.binary_dilation(is_tumor, iterations=8)
    assert grey[is_tumor].min() < grey[away_from_it].min() - 10
    centres = demo.draw_centres(np.random.default_rng(0), is_tumor, count=20, margin_px=128)
    assert is_tumor[centres[:, 1] // 16, centres[:, 0] // 16].all()


def test_centres_keep_their_distance_and_are_distinct() -> None:
    mask = np.ones((40, 60), dtype=np.bool_)
    centres = demo.draw_centres(np.random.default_rng(0), mask, count=10_000, margin_px=160)
    assert len(centres) == 20 * 40 == len(np.unique(centres // 16, axis=0))
    assert centres.min(axis=0).tolist() >= [160, 160]
    assert (centres < [960 - 160, 640 - 160]).all()
    none = demo.draw_centres(np.random.default_rng(0), ~mask, count=5, margin_px=160)
    assert none.shape == (0, 2)


def test_a_seed_makes_one_slide() -> None:
    pixels, mask = demo.make_slide(3)
    again, mask_again = demo.make_slide(3)
    np.testing.assert_array_equal(pixels, again)
    np.testing.assert_array_equal(mask, mask_again)
    assert (demo.make_slide(4)[0] != pixels).mean() > 0.2


def test_a_demo_is_the_same_elsewhere(made: Path, tmp_path: Path) -> None:
    demo.make_demo(tmp_path)
    for path in made.rglob("*.*"):
        assert path.read_bytes() == (tmp_path / path.relative_to(made)).read_bytes()


def test_what_is_there_stays(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "make_slide", lambda _: pytest.fail("a slide was made"))
    before = {path: path.stat().st_mtime_ns for path in made.rglob("*")}
    demo.make_demo(made)
    assert {path: path.stat().st_mtime_ns for path in made.rglob("*")} == before


def test_a_demo_that_was_cut_off_is_made_whole(made: Path, tmp_path: Path) -> None:
    (tmp_path / "slides").mkdir()
    (tmp_path / "slides" / "Demo_001.tif").write_bytes(b"half a slide")
    demo.make_demo(tmp_path)
    name = "slides/Demo_001.tif"
    assert (tmp_path / name).read_bytes() == (made / name).read_bytes()
