"""What model cards show: scores by source as they are, crops that nobody chose."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from carn.errors import DatasetError
from carn.models.shipped.card import (
    CROP_PX,
    ZOOM,
    crops_figure,
    gains_by_source,
    most_detailed,
    scores_table,
    typical_images,
)

# Images of two sources, with PSNR of bicubic interpolation and of a network.
PSNR = {
    "3_test_lab-a_one": (30.0, 33.0),
    "3_test_lab-a_two": (31.0, 32.0),
    "3_test_lab-a_three": (29.0, 34.0),
    "2_validation_field_one_0_512": (35.0, 35.5),
}


def scores(*, scale: int = 2) -> pd.DataFrame:
    rows = [
        {"key": key, "scale": scale, "slide": slide, "tile_id": f"{slide}_0_0", "psnr_db": value}
        for slide, values in PSNR.items()
        for key, value in zip(("bicubic", "carn"), values, strict=True)
    ]
    return pd.DataFrame(rows).assign(ssim=lambda table: table.psnr_db / 40)


def test_gains_are_over_bicubic_on_the_same_image() -> None:
    gains = gains_by_source(scores().sample(frac=1, random_state=1))
    ours = gains[gains.key == "carn"].set_index("slide")
    assert ours.gain_db.to_dict() == {
        "3_test_lab-a_one": 3.0,
        "3_test_lab-a_two": 1.0,
        "3_test_lab-a_three": 5.0,
        "2_validation_field_one_0_512": 0.5,
    }
    assert set(ours.source) == {"test lab-a", "validation field"}
    assert (gains[gains.key == "bicubic"].gain_db == 0).all()


def test_a_table_has_a_row_for_each_source_and_network() -> None:
    assert scores_table(scores()).splitlines()[2:] == [
        "| test lab-a | 3 | bicubic | 30.00 | 0.7500 |  |  |  |",
        "| test lab-a | 3 | carn | 33.00 | 0.8250 | +3.00 | +1.00 to +5.00 | 2.00 |",
        "| validation field | 1 | bicubic | 35.00 | 0.8750 |  |  |  |",
        "| validation field | 1 | carn | 35.50 | 0.8875 | +0.50 | +0.50 to +0.50 |  |",
    ]


def test_the_typical_image_is_that_of_the_median_gain() -> None:
    assert typical_images(scores(), "carn") == {
        "test lab-a": "3_test_lab-a_one",
        "validation field": "2_validation_field_one_0_512",
    }
    with pytest.raises(DatasetError, match="no scores of edsr"):
        typical_images(scores(), "edsr")


def test_what_cannot_be_a_cards_scores() -> None:
    with pytest.raises(DatasetError, match="Case_1 is not the name of an image of a recipe"):
        gains_by_source(scores().assign(slide="Case_1"))
    with pytest.raises(DatasetError, match="no scores of bicubic"):
        gains_by_source(scores().query("key == 'carn'"))
    with pytest.raises(DatasetError, match="more than one scale"):
        gains_by_source(pd.concat([scores(), scores(scale=4)]))


def test_the_place_shown_is_that_of_most_detail() -> None:
    rng = np.random.default_rng(0)
    pixels = np.full((300, 400, 3), 128, dtype=np.uint8)
    pixels[160:256, 240:336] = rng.integers(0, 256, (96, 96, 3))
    assert most_detailed(pixels) == (160, 240)
    # Of places alike, the first; what is just large enough has one.
    assert most_detailed(np.zeros((CROP_PX + 32, CROP_PX + 64, 3), dtype=np.uint8)) == (16, 16)


@pytest.mark.parametrize("name", ["carn-x2", "carn-x4"])
def test_crops_stand_side_by_side(name: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    folder = tmp_path / "test" / "lab-a"
    folder.mkdir(parents=True)
    coarse = rng.integers(0, 256, (17, 17, 3), dtype=np.uint8)
    pixels = np.kron(coarse, np.ones((8, 8, 1), dtype=np.uint8))[:133, :135]
    table = scores(scale=int(name[-1]))
    with pytest.raises(DatasetError, match=r"3_test_lab-a_one\.png is missing"):
        crops_figure(name, tmp_path, table)
    Image.fromarray(pixels).save(folder / "3_test_lab-a_one.png")
    figure = np.asarray(crops_figure(name, tmp_path, table))
    side, gap = CROP_PX * ZOOM, 8
    assert figure.shape == (22 + 2 * gap + side, 4 * gap + 3 * side, 3)
    y, x = most_detailed(pixels[:132, :132])
    hr = figure[22 + gap : 22 + gap + side : ZOOM, 3 * gap + 2 * side : 3 * (gap + side) : ZOOM]
    np.testing.assert_array_equal(hr, pixels[y : y + CROP_PX, x : x + CROP_PX])
    # Both enlargements are of this place: nearer to it than to the place beside it.
    for column in (0, 1):
        left = gap + column * (side + gap)
        shown = figure[22 + gap : 22 + gap + side : ZOOM, left : left + side : ZOOM].astype(float)
        assert np.abs(shown - hr).mean() < np.abs(shown - np.roll(hr, 8, axis=1)).mean()
