"""Pixels of a view: levels and resolutions chosen, borders mirrored, resampling free of seams."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from carn.errors import SlideError
from carn.slides.opening import open_slide
from carn.slides.slide import Rgb
from carn.upscaling.lr_view import InputConfig, LrView, open_view, read_mirrored
from tests.conftest import draw
from tests.upscaling.lab import DrawnSlide

WriteSlide = Callable[..., Path]
# 0.25 um per px as TIFF says it.
QUARTER_UM = {"resolution": (40_000, 40_000), "resolutionunit": "CENTIMETER"}


def cut(pixels: Rgb) -> Callable[[int, int, int, int], Rgb]:
    def read(x: int, y: int, width: int, height: int) -> Rgb:
        assert 0 <= x < x + width <= pixels.shape[1]
        assert 0 <= y < y + height <= pixels.shape[0]
        return pixels[y : y + height, x : x + width]

    return read


@settings(max_examples=60)
@given(
    extent=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    x=st.integers(-40, 40),
    y=st.integers(-40, 40),
    width=st.integers(1, 50),
    height=st.integers(1, 50),
)
def test_reads_beyond_the_border_are_numpys_reflect(
    extent: tuple[int, int], x: int, y: int, width: int, height: int
) -> None:
    pixels = draw(*extent)
    padded = np.pad(pixels, ((99, 99), (99, 99), (0, 0)), mode="reflect")
    found = read_mirrored(cut(pixels), extent=extent, box=(x, y, width, height))
    np.testing.assert_array_equal(found, padded[99 + y :, 99 + x :][:height, :width])


def test_a_view_is_level_0_with_its_mpp_and_profile(write_slide: WriteSlide) -> None:
    path = write_slide(resolution=(40_000, 50_000), resolutionunit="CENTIMETER", iccprofile=b"icc!")
    view = open_view(path, InputConfig())
    assert (view.level, view.extent, view.icc_profile) == (0, (700, 500), b"icc!")
    assert view.mpp == pytest.approx((0.25, 0.2))
    with open_slide(path) as slide:
        np.testing.assert_array_equal(
            view.read(-3, 10, 50, 40)[:, 3:], slide.read_region(0, 10, 47, 40)
        )
    view.close()


def test_another_level_has_its_own_extent_and_mpp(write_slide: WriteSlide) -> None:
    view = open_view(write_slide(**QUARTER_UM), InputConfig(level=1))
    assert view.extent == (350, 250)
    assert view.mpp == pytest.approx((0.5, 0.5))
    assert view.to_l0(10, 20) == (20, 40)
    whole = view.read(0, 0, 350, 250)
    np.testing.assert_array_equal(view.read(301, 7, 49, 100), whole[7:107, 301:])


@pytest.mark.parametrize(
    ("wanted", "level"),
    [(0.25, 0), (0.246, 0), (0.49, 0), (0.495, 1), (0.5, 1), (0.6, 1), (1.0, 2), (9.0, 2)],
)
def test_the_coarsest_level_that_is_fine_enough_is_read(
    write_slide: WriteSlide, wanted: float, level: int
) -> None:
    view = open_view(write_slide(**QUARTER_UM), InputConfig(input_mpp=wanted))
    assert view.level == level
    assert view.mpp == pytest.approx((0.25 * 2**level,) * 2)


def test_a_level_much_finer_than_asked_for_is_told(
    write_slide: WriteSlide, caplog: pytest.LogCaptureFixture
) -> None:
    open_view(write_slide(**QUARTER_UM), InputConfig(input_mpp=0.25))
    assert not caplog.records
    open_view(write_slide(**QUARTER_UM), InputConfig(input_mpp=0.4))
    assert "--resample" in caplog.text


@pytest.mark.parametrize(
    ("options", "config", "words"),
    [
        ({}, InputConfig(), "--mpp"),
        (QUARTER_UM, InputConfig(mpp=0.5), r"0\.25.*--mpp 0\.5"),
        (QUARTER_UM, InputConfig(level=3), r"levels 0\.\.2, not 3"),
        (QUARTER_UM, InputConfig(input_mpp=0.2), "coarser than --input-mpp"),
    ],
)
def test_what_a_slide_does_not_have_is_an_error(
    write_slide: WriteSlide, options: dict[str, object], config: InputConfig, words: str
) -> None:
    with pytest.raises(SlideError, match=words):
        open_view(write_slide(**options), config)


def test_a_given_mpp_serves_and_may_agree(write_slide: WriteSlide) -> None:
    assert open_view(write_slide(), InputConfig(mpp=0.3)).mpp == (0.3, 0.3)
    mpp = open_view(write_slide(**QUARTER_UM), InputConfig(mpp=0.2525)).mpp
    assert mpp == pytest.approx((0.25, 0.25))  # the slide's word


@pytest.mark.parametrize(
    "options",
    [
        {"level": 1, "input_mpp": 0.5},
        {"resample": True},
        {"mpp": 0.0},
        {"input_mpp": float("nan")},
        {"level": -1},
        {"on_damaged_tile": "skip"},
    ],
)
def test_configs_that_contradict_themselves_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=str(next(iter(options)))):
        InputConfig(**options)  # type: ignore[arg-type]


# ----------------------------------------------------------------------------------- resampling


@settings(max_examples=50)
@given(
    wanted=st.floats(0.255, 1.3),
    corner=st.tuples(st.floats(-0.2, 1.1), st.floats(-0.2, 1.1)),
    size=st.tuples(st.integers(1, 60), st.integers(1, 60)),
)
def test_resampled_pixels_do_not_depend_on_how_they_are_read(
    wanted: float, corner: tuple[float, float], size: tuple[int, int]
) -> None:
    base = draw(211, 157)
    slide = DrawnSlide(base, base[::2, ::2][:78, :105], mpp=(0.25, 0.26))
    view = LrView(slide, InputConfig(input_mpp=wanted, resample=True))
    assert view.mpp == pytest.approx((wanted, wanted))
    width, height = view.extent
    whole = view.read(-30, -30, width + 80, height + 80).astype(int)
    x, y = (round(share * side) for share, side in zip(corner, view.extent, strict=True))
    x, y = max(x, -30), max(y, -30)
    part = view.read(x, y, *size).astype(int)
    expected = whole[y + 30 :, x + 30 :][: size[1], : size[0]]
    part = part[: expected.shape[0], : expected.shape[1]]
    assert np.abs(part - expected).max(initial=0) <= 1


def test_resampling_halves_as_the_degradation_does() -> None:
    from carn.degradation.bicubic import degrade

    pixels = draw(200, 120)
    slide = DrawnSlide(pixels)
    view = LrView(slide, InputConfig(input_mpp=0.5, resample=True))
    assert (view.extent, view.downsample) == ((100, 60), (2.0, 2.0))
    found = view.read(4, 4, 92, 52).astype(int)
    assert np.abs(found - degrade(pixels, scale=2)[4:-4, 4:-4]).max() <= 1


def test_resampling_keeps_places() -> None:
    # A ramp stays a ramp: a shift of a tenth of a px would show.
    ramp = np.repeat(np.arange(240, dtype=np.uint8)[None, :, None], 30, axis=0).repeat(3, axis=2)
    view = LrView(DrawnSlide(ramp), InputConfig(input_mpp=0.4, resample=True))
    found = view.read(0, 0, *view.extent)[5, 3:-3, 0].astype(float)
    expected = (np.arange(view.extent[0]) + 0.5) * 1.6 - 0.5
    assert np.abs(found - expected[3:-3]).max() <= 0.51


def test_a_coarser_level_stands_in_at_the_same_place() -> None:
    yy, xx = np.mgrid[0:120, 0:240]
    ramp = np.stack([xx, yy, xx // 2 + yy // 2], axis=-1).astype(np.uint8)
    view = LrView(DrawnSlide(ramp, ramp[::2, ::2]), InputConfig())
    found = view.read_coarser(40, 20, 30, 50)
    assert found is not None
    assert found.shape == (50, 30, 3)
    # Every second px stands half a px left of the mean of two.
    assert np.abs(found.astype(int) - ramp[20:70, 40:70]).max() <= 2
    assert LrView(view.slide, InputConfig(level=1)).read_coarser(0, 0, 5, 5) is None


# --------------------------------------------------------------------------------- plain images


def test_plain_images_need_no_mpp(tmp_path: Path) -> None:
    pixels = draw(31, 17)
    for name in ("a.PNG", "b.bmp", "c.webp", "d.tif", "e.tiff"):
        form = {".webp": {"lossless": True}}.get(Path(name).suffix, {})
        Image.fromarray(pixels).save(tmp_path / name, **form)
        view = open_view(tmp_path / name, InputConfig())
        assert (view.extent, view.mpp, view.slide.reader) == ((31, 17), None, "image")
        np.testing.assert_array_equal(view.read(0, 0, 31, 17), pixels)
        with pytest.raises(SlideError, match="--mpp"):
            open_view(tmp_path / name, InputConfig(input_mpp=0.5))
        assert open_view(tmp_path / name, InputConfig(input_mpp=0.5, mpp=0.5)).mpp == (0.5, 0.5)


def test_a_tiff_that_is_a_slide_is_opened_as_one(write_slide: WriteSlide) -> None:
    path = write_slide(**QUARTER_UM)
    assert open_view(path, InputConfig()).slide.reader == "tiled-tiff"
    assert open_view(path, InputConfig(), is_image=True).slide.reader == "image"


def test_a_slide_that_is_cut_off_is_not_taken_for_an_image(write_slide: WriteSlide) -> None:
    path = write_slide(**QUARTER_UM, num_levels=1)
    with pytest.raises(SlideError, match="transfer it again"):
        open_view(_cut_last_tile(path), InputConfig())


def _cut_last_tile(path: Path) -> Path:
    """The slide with the last tile said to lie beyond the end of the file."""
    import tifffile

    with tifffile.TiffFile(path, mode="r+b") as tiff:
        tag = tiff.pages[0].tags["TileOffsets"]
        tag.overwrite([*tag.value[:-1], 2**31])
    return path


def test_what_is_neither_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "x.tif").write_bytes(b"no image at all")
    with pytest.raises(SlideError):
        open_view(tmp_path / "x.tif", InputConfig())
    (tmp_path / "x.svs").write_bytes(b"no image at all")
    with pytest.raises(SlideError, match="not a slide"):
        open_view(tmp_path / "x.svs", InputConfig())


def test_a_slide_of_another_px_size_is_taken_at_its_level_or_refused(
    write_slide: WriteSlide,
) -> None:
    path = write_slide(**QUARTER_UM)  # 0.25, 0.5, ... um per px
    fit = InputConfig(mpp_range=(0.4, 0.6))
    with open_view(path, fit) as view:
        assert view.level == 0  # it is warned of
    with open_view(path, replace(fit, on_odd_mpp="level")) as view:
        assert (view.level, view.mpp) == (1, pytest.approx((0.5, 0.5)))
    with pytest.raises(SlideError, match=r"has 0\.25 um per px, and the network"):
        open_view(path, replace(fit, on_odd_mpp="fail"))
    for odd in ("level", "fail"):
        with open_view(path, InputConfig(mpp_range=(0.2, 0.6), on_odd_mpp=odd)) as view:
            assert view.level == 0
    # None is within: there is nothing to bring it to.
    with open_view(path, InputConfig(mpp_range=(40, 60), on_odd_mpp="level")) as view:
        assert view.level == 0
    with pytest.raises(ValueError, match="chooses a level"):
        InputConfig(on_odd_mpp="level", input_mpp=0.5)
    with pytest.raises(ValueError, match="least, then largest"):
        InputConfig(mpp_range=(0.5, 0.4))


def test_what_was_finished_before_there_was_a_choice_is_still_what_was_asked_for() -> None:
    plain = InputConfig().settings()
    assert "mpp_range" not in plain
    assert InputConfig(mpp_range=(0.4, 0.6), on_odd_mpp="fail").settings() == plain
    assert InputConfig(mpp_range=(0.4, 0.6), on_odd_mpp="level").settings() != plain


def test_an_absurd_px_size_may_be_corrected_by_hand(write_slide: WriteSlide) -> None:
    path = write_slide(resolution=(4_000_000, 4_000_000), resolutionunit="CENTIMETER")
    with open_view(path, InputConfig(mpp=0.25)) as view:
        assert view.mpp == (0.25, 0.25)
