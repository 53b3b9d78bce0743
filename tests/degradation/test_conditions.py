"""Conditions by name and from files, LR under them, and what they are in words."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from carn.degradation.bicubic import SCALES, crop_to_multiple, degrade
from carn.degradation.conditions import (
    CONDITIONS,
    DEFAULT,
    apply_condition,
    describe,
    read_conditions,
)
from carn.degradation.scanner import Degradation
from carn.degradation.variants import LrMaker


def drawn(height: int, width: int) -> np.ndarray:
    rng = np.random.default_rng(height * 1000 + width)
    coarse = rng.integers(0, 256, (height // 4 + 1, width // 4 + 1, 3), dtype=np.uint8)
    return coarse.repeat(4, axis=0).repeat(4, axis=1)[:height, :width]


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    path = tmp_path / "mine.yaml"
    path.write_text("soft: {blur_px: 1.2}\nhard:\n  jpeg_quality: 30\n  jpeg_subsampling: 4:2:2\n")
    return path


# ------------------------------------------------------------------------------------------ names


def test_names_come_in_the_order_that_is_wanted(mine: Path) -> None:
    found = read_conditions(["mean", str(mine), "bicubic"])
    assert list(found) == ["mean", "soft", "hard", "bicubic"]
    assert found["soft"] == Degradation(blur_px=1.2)
    assert found["hard"] == Degradation(jpeg_quality=30, jpeg_subsampling="4:2:2")
    assert read_conditions(["bicubic"]) == DEFAULT == {"bicubic": Degradation()}
    assert read_conditions([]) == {}


def test_all_are_those_that_are_not_named_before(mine: Path) -> None:
    assert read_conditions(["all"]) == dict(CONDITIONS)
    assert list(read_conditions(["all"])) == list(CONDITIONS)
    some = list(read_conditions(["jpeg80-420", str(mine), "all"]))
    assert some[:3] == ["jpeg80-420", "soft", "hard"]
    assert some[3:] == [name for name in CONDITIONS if name != "jpeg80-420"]
    with pytest.raises(ValueError, match="condition 'mean' is there twice"):
        read_conditions(["all", "mean"])


@pytest.mark.parametrize("said", ["4:4:4", "4:2:2", "4:2:0"])
@pytest.mark.parametrize("quote", ["", "'"])
def test_subsamplings_are_no_times_of_day(said: str, quote: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(f"mine: {{jpeg_quality: 50, jpeg_subsampling: {quote}{said}{quote}}}")
    assert read_conditions([str(path)])["mine"].jpeg_subsampling == said


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("bicubic: {jpeg_quality: 80}", "condition 'bicubic' is a name that is taken; rename it"),
        ("all: {jpeg_quality: 80}", "condition 'all' is a name that is taken"),
        ("../up: {jpeg_quality: 80}", "condition '../up': names are of letters"),
        ("soft: {blur: 1}", "condition 'soft': .* its fields are blur_px"),
        ("soft: {jpeg_quality: 0}", "condition 'soft': JPEG quality 0"),
        ("soft: {jpeg_subsampling: 4:1:1}", "condition 'soft': jpeg_subsampling=14461 is not"),
        ("soft: {jpeg_subsampling: [4, 2, 0]}", "condition 'soft': "),
        ("soft: 3", "condition 'soft'"),
        ("- soft", "must hold conditions by name"),
        ("", "must hold conditions by name"),
        ("a: [", "is not YAML"),
    ],
)
def test_files_that_hold_something_else(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "wrong.yml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        read_conditions([str(path)])
    assert str(path) in str(caught.value)


def test_names_that_are_not_known_or_said_twice(mine: Path) -> None:
    with pytest.raises(ValueError, match=r"'jpeg80' is not one of bicubic, .*, nor 'all', nor a"):
        read_conditions(["jpeg80"])
    with pytest.raises(ValueError, match="condition 'hard' is there twice"):
        read_conditions([str(mine), str(mine)])


# --------------------------------------------------------------------------------------------- LR


@given(
    scale=st.sampled_from(SCALES),
    height=st.integers(8, 70),
    width=st.integers(8, 70),
    tile=st.text(),
)
def test_bicubic_is_bit_for_bit_what_degrade_makes(
    scale: int, height: int, width: int, tile: str
) -> None:
    hr = drawn(height, width)
    lr = apply_condition(crop_to_multiple(hr, scale), Degradation(), scale=scale, tile=tile)
    np.testing.assert_array_equal(lr, degrade(hr, scale=scale))


@pytest.mark.parametrize("name", CONDITIONS)
def test_lr_depends_on_tile_and_condition_alone(name: str) -> None:
    hr, way = drawn(64, 48), CONDITIONS[name]
    lr = apply_condition(hr, way, scale=2, tile="a")
    assert (lr.shape, lr.dtype) == ((32, 24, 3), np.uint8)
    np.testing.assert_array_equal(lr, apply_condition(hr, way, scale=2, tile="a"))
    # As training's validation makes its, under whatever name and whatever comes after it.
    maker = LrMaker(conditions={name: way, "other": Degradation(noise_levels=9.0)})
    np.testing.assert_array_equal(lr, maker.make(hr, scale=2, tile="a", variant=0))
    is_noisy = way.noise_levels > 0
    assert (lr != apply_condition(hr, way, scale=2, tile="b")).any() == is_noisy
    assert (lr != degrade(hr, scale=2)).any() == (way != Degradation())


# ------------------------------------------------------------------------------------------ words


def test_ways_in_words() -> None:
    assert {name: describe(way) for name, way in CONDITIONS.items()} == {
        "bicubic": "bicubic interpolation",
        "mean": "mean over each LR px",
        "jpeg90-420": "bicubic interpolation, JPEG quality 90, 4:2:0",
        "jpeg80-420": "bicubic interpolation, JPEG quality 80, 4:2:0",
        "jpeg70-422": "bicubic interpolation, JPEG quality 70, 4:2:2",
        "mean-jpeg85-444": "mean over each LR px, JPEG quality 85, 4:4:4",
        "scanned-jpeg80": "blur of 0.8 HR px, mean over each LR px, noise of 1.5 grey levels, "
        "JPEG quality 80, 4:2:0",
        "sharpened-jpeg75": "blur of 0.8 HR px, mean over each LR px, noise of 1.5 grey levels, "
        "sharpened by 0.6 over 1 LR px, JPEG quality 75, 4:2:0",
    }
    way = Degradation(mean_weight=0.25, jpeg_quality=60, jpeg_tables="flat")
    assert describe(way) == (
        "mean over each LR px by 25%, else bicubic interpolation, JPEG quality 60, 4:2:0, flat "
        "tables"
    )


@given(
    st.builds(
        Degradation,
        blur_px=st.sampled_from((0.0, 0.5)),
        mean_weight=st.sampled_from((0.0, 0.5, 1.0)),
        noise_levels=st.sampled_from((0.0, 1.0)),
        sharpen_amount=st.sampled_from((0.0, 0.3)),
        jpeg_quality=st.sampled_from((None, 50, 90)),
    )
)
def test_words_say_what_is_done(way: Degradation) -> None:
    words = describe(way)
    assert ("blur" in words) == (way.blur_px > 0)
    assert ("mean" in words) == (way.mean_weight > 0)
    assert ("bicubic" in words) == (way.mean_weight < 1)
    assert ("noise" in words) == (way.noise_levels > 0)
    assert ("sharpened" in words) == (way.sharpen_amount > 0)
    assert ("JPEG" in words) == (way.jpeg_quality is not None)
