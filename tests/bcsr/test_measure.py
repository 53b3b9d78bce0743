"""Tiles become numbers, and what cannot be read becomes rows that say why."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image

from carn import storage
from carn.bcsr import measure
from carn.bcsr.measure import (
    TilePlace,
    failed_rows,
    measure_image,
    measure_pixels,
    measure_slide,
    read_tiles,
)
from carn.bcsr.schema import MEASURED
from carn.errors import (
    AccessDeniedError,
    CarnError,
    DamagedTileError,
    MissingObjectError,
    SlideError,
    StorageError,
)
from carn.slides import open_slide

NUMBERS = ("inside_fraction", "white_fraction", "mean_r", "mean_g", "mean_b")
WriteSlide = Callable[..., Path]


def place(x: int, y: int, side: int = 64, label: str = "tumor") -> TilePlace:
    return TilePlace(x_l0=x, y_l0=y, width_px=side, height_px=side, label=label)


def rows_of(path: Path | str, places: list[TilePlace], **options: Any) -> list[dict[str, Any]]:
    wish = {"grey_threshold": 224, "identity": "the identity"} | options
    table = measure_slide("a slide", str(path), places, **wish)
    assert table.schema == MEASURED
    return table.to_pylist()


# ---------------------------------------------------------------------------------------- pixels


def grey_of(pixels: np.ndarray) -> np.ndarray:
    """Pillow's rounding of ITU-R 601 luma, in integers."""
    red, green, blue = (pixels[..., c].astype(np.int64) for c in range(3))
    return (19595 * red + 38470 * green + 7471 * blue + 32768) >> 16


images = st.tuples(st.integers(1, 40), st.integers(1, 40), st.just(3)).flatmap(
    lambda shape: (
        arrays(np.uint8, shape, elements=st.integers(200, 255))
        | arrays(np.uint8, shape, elements=st.integers(0, 255))
    )
)


@given(pixels=images, threshold=st.integers(0, 255))
@example(pixels=np.full((3, 5, 3), 255, np.uint8), threshold=224)
@example(pixels=np.zeros((5, 3, 3), np.uint8), threshold=0)
@example(pixels=np.full((1, 1, 3), 225, np.uint8), threshold=225)
def test_numbers_are_those_of_numpy(pixels: np.ndarray, threshold: int) -> None:
    numbers = measure_pixels(pixels, grey_threshold=threshold)
    assert numbers.white_fraction == pytest.approx((grey_of(pixels) > threshold).mean(), abs=1e-12)
    means = pixels.reshape(-1, 3).astype(np.int64).sum(axis=0) / (pixels.size // 3)
    np.testing.assert_allclose(numbers.mean, means, rtol=1e-12)


@pytest.mark.parametrize(("grey", "white"), [(223, 0.0), (224, 0.0), (225, 1.0), (255, 1.0)])
def test_grey_above_224_is_white(grey: int, white: float) -> None:
    pixels = np.full((16, 24, 3), grey, dtype=np.uint8)
    assert measure_pixels(pixels, grey_threshold=224).white_fraction == white


def test_a_colour_is_white_by_its_luma_not_by_its_mean() -> None:
    # Luma 224.56 rounds to 225; the mean of its channels is below 224.
    pixels = np.full((4, 4, 3), (226, 236, 162), dtype=np.uint8)
    assert grey_of(pixels)[0, 0] == 225
    assert pixels.mean() < 224
    assert measure_pixels(pixels, grey_threshold=224).white_fraction == 1.0


def test_sums_of_the_largest_tiles_do_not_overflow() -> None:
    pixels = np.full((8192, 1030, 3), 255, dtype=np.uint8)
    pixels[0] = 0
    numbers = measure_pixels(pixels, grey_threshold=224)
    assert numbers.mean == (pytest.approx(255 * 8191 / 8192, rel=1e-12),) * 3
    assert numbers.white_fraction == pytest.approx(8191 / 8192, rel=1e-12)


# ---------------------------------------------------------------------------------------- slides


def test_a_good_slide(write_slide: WriteSlide) -> None:
    path = write_slide(resolution=(4e4, 2e4), resolutionunit="CENTIMETER")
    places = [place(128, 0, 100), place(3, 260, 64, "normal"), place(0, 0, 64)]
    rows = rows_of(path, places)
    with open_slide(path) as slide:
        for row, wanted in zip(rows, places, strict=True):
            assert (row["x_l0"], row["y_l0"]) == (wanted.x_l0, wanted.y_l0)
            assert (row["width_px"], row["height_px"]) == (wanted.width_px,) * 2
            assert row["label"] == wanted.label
            pixels = slide.read_region(wanted.x_l0, wanted.y_l0, wanted.width_px, wanted.height_px)
            assert row["white_fraction"] == (grey_of(pixels) > 224).mean()
            means = [row[name] for name in ("mean_r", "mean_g", "mean_b")]
            np.testing.assert_allclose(means, pixels.reshape(-1, 3).mean(axis=0))
    for row in rows:
        assert (row["slide"], row["uri"]) == ("a slide", str(path))
        assert (row["slide_width_l0"], row["slide_height_l0"]) == (700, 500)
        assert row["mpp_x"] == pytest.approx(0.25)
        assert row["mpp_y"] == pytest.approx(0.5)
        assert row["reader"] == "tiled-tiff"
        assert row["slide_identity"] == "the identity"
        assert row["inside_fraction"] == 1.0
        assert row["reason"] is row["failed_scope"] is None
        assert row["is_transient"] is False


def test_the_threshold_is_the_one_asked_for(write_slide: WriteSlide) -> None:
    path = write_slide()
    whites = [
        rows_of(path, [place(0, 0, 256)], grey_threshold=threshold)[0]["white_fraction"]
        for threshold in (0, 120, 255)
    ]
    assert whites[0] > whites[1] > whites[2] == 0.0


def test_a_damaged_tile_fails_alone(write_slide: WriteSlide, damage_tile: Any) -> None:
    path = write_slide()
    damage_tile(path, 1)  # x 128..255, y 0..127
    rows = rows_of(path, [place(0, 0), place(120, 0), place(300, 0), place(140, 130)])
    assert [row["reason"] is None for row in rows] == [True, False, True, True]
    failed = rows[1]
    assert "does not start as a JPEG" in failed["reason"]
    assert str(path) not in failed["reason"]  # it has its own column
    assert failed["failed_scope"] == "tile"
    assert failed["is_transient"] is False
    assert [failed[name] for name in NUMBERS] == [None] * 5
    assert (failed["slide_width_l0"], failed["reader"]) == (700, "tiled-tiff")


@pytest.mark.parametrize("content", [None, b"", b"no slide at all"])
def test_a_slide_that_does_not_open_fails_whole(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "slide.tif"
    if content is not None:
        path.write_bytes(content)
    places = [place(5, 6, 7, "normal"), place(1, 2)]
    rows = rows_of(path, places)
    assert [(row["x_l0"], row["y_l0"], row["label"]) for row in rows] == [
        (5, 6, "normal"),
        (1, 2, "tumor"),
    ]
    for row in rows:
        assert row["reason"]
        assert row["failed_scope"] == "slide"
        # A missing file is storage's answer; what is no slide stays none.
        assert row["is_transient"] is (content is None)
        assert [row[name] for name in (*NUMBERS, "reader", "slide_width_l0")] == [None] * 7


@pytest.mark.parametrize("corner", [(700, 0), (0, 500), (-64, 10), (10, -64), (9000, 9000)])
def test_a_tile_off_the_slide_is_a_failure(
    write_slide: WriteSlide, corner: tuple[int, int]
) -> None:
    rows = rows_of(write_slide(), [place(*corner), place(0, 0)])
    assert "off the slide" in rows[0]["reason"]
    assert "700 x 500" in rows[0]["reason"]
    assert rows[0]["failed_scope"] == "tile"
    assert rows[0]["is_transient"] is False
    assert [rows[0][name] for name in NUMBERS] == [None] * 5
    assert rows[1]["reason"] is None


@pytest.mark.parametrize(
    ("corner", "inside"),
    [((636, 436), 1.0), ((668, 0), 0.5), ((-16, -32), 0.375), ((699, 499), 1 / 64**2)],
)
def test_a_tile_over_the_border_is_white_beyond_it(
    write_slide: WriteSlide, corner: tuple[int, int], inside: float
) -> None:
    path = write_slide(pixels=np.zeros((500, 700, 3), dtype=np.uint8))
    (row,) = rows_of(path, [place(*corner)])
    assert row["reason"] is None
    assert row["inside_fraction"] == pytest.approx(inside)
    assert row["white_fraction"] == pytest.approx(1 - inside)
    assert row["mean_g"] == pytest.approx(255 * (1 - inside), abs=1e-9)


def test_read_tiles_gives_pixels_and_errors_in_order(
    write_slide: WriteSlide, damage_tile: Any
) -> None:
    path = write_slide()
    damage_tile(path, 0)
    with open_slide(path) as slide:
        good, bad, also_good = read_tiles(slide, [place(200, 200), place(0, 0), place(400, 9)])
        np.testing.assert_array_equal(good, slide.read_region(200, 200, 64, 64))
        np.testing.assert_array_equal(also_good, slide.read_region(400, 9, 64, 64))
    assert isinstance(bad, DamagedTileError)


def test_tiles_of_a_remote_slide_are_read_ahead_and_keep_their_order(
    write_slide: WriteSlide, s3: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_slide()
    uri = s3.put("slides/slide.tif", path)
    # Groups must not end where their number is no multiple of the read-ahead.
    monkeypatch.setattr(measure, "REMOTE_READ_AHEAD", 3)
    places = [place(x, y) for y in (0, 130, 400) for x in (600, 10, 300)][:8]
    remote, local = rows_of(uri, places), rows_of(path, places)
    assert [row | {"uri": str(path)} for row in remote] == local


def test_storage_that_fails_under_a_read_is_transient(
    write_slide: WriteSlide, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_slide()

    class Failing:
        def __init__(self, source: Any) -> None:
            self.source, self.uri, self.size = source, source.uri, source.size
            self.close = source.close

        def read_ranges(self, ranges: Any) -> list[bytes]:
            raise StorageError(self.uri, "the wire is cut")

    slide = measure.cached_slide(str(path), identity="the identity")
    monkeypatch.setattr(slide, "_source", Failing(slide._source))
    (row,) = rows_of(path, [place(0, 0)])
    assert (row["reason"], row["failed_scope"]) == ("the wire is cut", "tile")
    assert row["is_transient"] is True


PLACED = "damaged tile on level 0 at level-0 px (1, 2): bad tile"


@pytest.mark.parametrize(
    ("error", "is_transient", "reason"),
    [
        (StorageError("u", "gone"), True, "gone"),
        (MissingObjectError("u", "no file"), True, "no file"),
        (AccessDeniedError("u", "denied"), True, "denied"),
        (SlideError("u", "bad"), False, "bad"),
        (DamagedTileError("u", "bad tile", 0, 1, 2), False, PLACED),
        (CarnError("it died"), True, "it died"),
        (KeyError("oops"), True, "unexpected KeyError: 'oops'"),
    ],
)
@pytest.mark.parametrize("scope", ["slide", "tile"])
def test_failed_rows_say_why_and_whether_to_try_again(
    error: Exception, is_transient: bool, reason: str, scope: str
) -> None:
    table = failed_rows(
        "name", "u", [place(1, 2, 3), place(4, 5, 6)], identity="id", error=error, scope=scope
    )
    assert table.schema == MEASURED
    for row in table.to_pylist():
        assert (row["reason"], row["is_transient"]) == (reason, is_transient)
        assert (row["failed_scope"], row["slide_identity"]) == (scope, "id")
    assert table["width_px"].to_pylist() == [3, 6]


# ---------------------------------------------------------------------------------------- images


def test_an_image_is_one_tile(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (30, 50, 3), dtype=np.uint8)
    path = tmp_path / "image.png"
    Image.fromarray(pixels).save(path)
    table = measure_image("name", str(path), label="x", grey_threshold=224, identity="id")
    assert table.schema == MEASURED
    (row,) = table.to_pylist()
    place_of = [row[name] for name in ("x_l0", "y_l0", "width_px", "height_px")]
    assert place_of == [0, 0, 50, 30]
    assert row["white_fraction"] == (grey_of(pixels) > 224).mean()
    assert row["mean_b"] == pytest.approx(pixels[..., 2].mean())
    assert (row["inside_fraction"], row["reader"], row["label"]) == (1.0, "image", "x")
    assert (row["slide_width_l0"], row["slide_height_l0"]) == (50, 30)
    assert row["mpp_x"] is row["reason"] is None


def test_an_image_that_does_not_open_is_a_failure(tmp_path: Path) -> None:
    path = tmp_path / "image.png"
    path.write_bytes(b"\x89PNG\r\n\x1a\nand no more")
    (row,) = measure_image("n", str(path), label="x", grey_threshold=224, identity="").to_pylist()
    assert row["reason"]
    assert row["failed_scope"] == "slide"
    assert row["is_transient"] is False


def test_a_real_slide(shared_data: Path) -> None:
    path = shared_data / "slides" / "CMU-1-Small-Region.svs"
    if not path.exists():
        pytest.skip(f"{path.name} is not among the real samples")
    rows = rows_of(path, [place(0, 0, 512), place(1000, 2000, 1024)])
    with open_slide(path) as slide:
        pixels = slide.read_region(1000, 2000, 1024, 1024)
    assert rows[1]["white_fraction"] == (grey_of(pixels) > 224).mean()
    assert storage.identity(str(path))
    assert rows[0]["mpp_x"] == pytest.approx(0.499)
