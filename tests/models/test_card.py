"""What model cards show: scores by source as they are, crops that nobody chose."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from carn.degradation.bicubic import degrade
from carn.errors import CheckpointError, DatasetError
from carn.metrics import to_uint8
from carn.models.bicubic import Bicubic, BicubicConfig
from carn.models.checkpoint import load_model
from carn.models.shipped import __main__ as program
from carn.models.shipped.card import (
    CROP_PX,
    ZOOM,
    crops_figure,
    most_detailed,
    read_scores,
    scores_table,
    typical_images,
)

# Images of two sources, with PSNR of bicubic interpolation, of the network, and of another.
PSNR = {
    "3_test_lab-a_one": (30.0, 33.0, 32.0),
    "3_test_lab-a_two": (31.0, 32.0, 32.0),
    "3_test_lab-a_three": (29.0, 34.0, 32.0),
    "2_validation_field_one_0_512": (35.0, 35.5, 35.0),
}


def rows_of(name: str = "carn-x2", *, other: str = "edsr") -> list[dict[str, Any]]:
    """Rows of an evaluation, in no order that helps."""
    entrants = (("bicubic", None), ("carn", f"shipped:{name}"), (other, "/runs/other"))
    rows = [
        {"key": key, "checkpoint": checkpoint, "slide": image, "tile_id": f"{image}_0_0"}
        | {"scale": int(name[-1]), "psnr_db": psnr_db, "ssim": psnr_db / 40}
        for image, values in PSNR.items()
        for (key, checkpoint), psnr_db in zip(entrants, values, strict=True)
    ]
    return rows[::-1]


def test_gains_are_over_bicubic_on_the_same_image() -> None:
    scores = read_scores(rows_of(), "carn-x2")
    assert {row.image: row.gain_db for row in scores if row.network == "carn-x2"} == {
        "3_test_lab-a_one": 3.0,
        "3_test_lab-a_two": 1.0,
        "3_test_lab-a_three": 5.0,
        "2_validation_field_one_0_512": 0.5,
    }
    assert {row.source for row in scores} == {"test lab-a", "validation field"}


def test_a_table_has_a_row_for_each_source_and_network() -> None:
    assert scores_table(read_scores(rows_of(), "carn-x2")).splitlines() == [
        "| source | images | network | PSNR, dB | SSIM | gain, dB | least to most | deviation |",
        "|---|---|---|---|---|---|---|---|",
        "| test lab-a | 3 | bicubic | 30.00 | 0.7500 |  |  |  |",
        "| test lab-a | 3 | carn-x2 | 33.00 | 0.8250 | +3.00 | +1.00 to +5.00 | 2.00 |",
        "| test lab-a | 3 | edsr | 32.00 | 0.8000 | +2.00 | +1.00 to +3.00 | 1.00 |",
        "| validation field | 1 | bicubic | 35.00 | 0.8750 |  |  |  |",
        "| validation field | 1 | carn-x2 | 35.50 | 0.8875 | +0.50 | +0.50 to +0.50 |  |",
        "| validation field | 1 | edsr | 35.00 | 0.8750 | +0.00 | +0.00 to +0.00 |  |",
    ]


def test_one_of_the_same_kind_is_another_network() -> None:
    scores = read_scores(rows_of(other="carn"), "carn-x2")
    ours = [row.psnr_db for row in scores if row.network == "carn-x2"]
    assert ours == [33.0, 34.0, 32.0, 35.5]
    assert [row.psnr_db for row in scores if row.network == "carn"] == [32.0, 32.0, 32.0, 35.0]


def test_the_typical_image_is_that_of_the_median_gain() -> None:
    assert typical_images(read_scores(rows_of(), "carn-x2"), "carn-x2") == {
        "test lab-a": "3_test_lab-a_one",
        "validation field": "2_validation_field_one_0_512",
    }


def test_what_cannot_be_a_cards_scores() -> None:
    rows = rows_of()
    with pytest.raises(DatasetError, match="Case_1 is not the name of an image that"):
        read_scores([row | {"slide": "Case_1"} for row in rows], "carn-x2")
    with pytest.raises(DatasetError, match=r"no scores of bicubic$"):
        read_scores([row for row in rows if row["key"] != "bicubic"], "carn-x2")
    with pytest.raises(DatasetError, match="no scores of bicubic and carn-x2"):
        read_scores([row for row in rows if row["key"] == "edsr"], "carn-x2")
    with pytest.raises(DatasetError, match="is of x4; carn-x2 is x2"):
        read_scores(rows_of("carn-x4"), "carn-x2")
    with pytest.raises(DatasetError, match="two networks called edsr: /runs/other and /runs/third"):
        read_scores([*rows[::-1], rows[0] | {"checkpoint": "/runs/third"}], "carn-x2")
    with pytest.raises(CheckpointError, match="carn-x9"):
        read_scores(rows, "carn-x9")


def test_the_place_shown_is_that_of_most_detail() -> None:
    rng = np.random.default_rng(0)
    pixels = np.full((300, 400, 3), 128, dtype=np.uint8)
    pixels[160:256, 240:336] = rng.integers(0, 256, (96, 96, 3))
    assert most_detailed(pixels) == (160, 240)
    # Of places alike, the first; what is just large enough has one.
    assert most_detailed(np.zeros((CROP_PX + 32, CROP_PX + 64, 3), dtype=np.uint8)) == (16, 16)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """The recipe's images, of which a figure needs one."""
    folder = tmp_path / "images" / "test" / "lab-a"
    folder.mkdir(parents=True)
    coarse = np.random.default_rng(0).integers(0, 256, (17, 17, 3), dtype=np.uint8)
    pixels = np.kron(coarse, np.ones((8, 8, 1), dtype=np.uint8))[:133, :135]
    Image.fromarray(pixels).save(folder / "3_test_lab-a_one.png")
    return tmp_path / "images"


@pytest.mark.parametrize("name", ["carn-x2", "carn-x4"])
def test_crops_stand_side_by_side(name: str, images: Path) -> None:
    scale = int(name[-1])
    scores = read_scores(rows_of(name), name)
    figure = np.asarray(crops_figure(name, images, scores))
    side, gap, title = CROP_PX * ZOOM, 8, 22
    assert figure.shape == (2 * title + side + gap, 4 * gap + 3 * side, 3)
    with Image.open(images / "test" / "lab-a" / "3_test_lab-a_one.png") as opened:
        hr = np.asarray(opened)[:132, : 135 // scale * scale]
    lr = torch.from_numpy(degrade(hr, scale=scale)).permute(2, 0, 1)[None] / 255
    y, x = most_detailed(hr)
    with torch.inference_mode():
        bicubic = to_uint8(Bicubic(BicubicConfig(), scale=scale)(lr))[0].permute(1, 2, 0).numpy()
        network = to_uint8(load_model(name)(lr))[0].permute(1, 2, 0).numpy()
    for column, pixels in enumerate((bicubic, network, hr)):
        left = gap + column * (side + gap)
        shown = figure[2 * title : 2 * title + side : ZOOM, left : left + side : ZOOM]
        np.testing.assert_array_equal(shown, pixels[y : y + CROP_PX, x : x + CROP_PX])


def test_images_that_cannot_be_shown(images: Path) -> None:
    scores = read_scores(rows_of(), "carn-x2")
    with pytest.raises(DatasetError, match="no test images"):
        crops_figure("carn-x2", images, [row for row in scores if "test" not in row.source])
    place = images / "test" / "lab-a" / "3_test_lab-a_one.png"
    Image.new("RGB", (127, 200)).save(place)
    with pytest.raises(DatasetError, match="too small for a crop of 96 px"):
        crops_figure("carn-x2", images, scores)
    place.unlink()
    with pytest.raises(DatasetError, match=r"3_test_lab-a_one\.png is missing"):
        crops_figure("carn-x2", images, scores)


def test_on_the_command_line(
    images: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ["shipped", "card", "carn-x2", "--images", str(images), "--evaluation", str(tmp_path)]
    monkeypatch.setattr("sys.argv", [*words, "--figure", str(tmp_path / "figure.png")])
    assert program.cli() == 2
    assert "scores.parquet is missing" in capsys.readouterr().err
    pq.write_table(pa.Table.from_pylist(rows_of()), tmp_path / "scores.parquet")
    assert program.cli() == 0
    assert "| test lab-a | 3 | carn-x2 | 33.00 |" in capsys.readouterr().out
    assert (tmp_path / "figure.png").is_file()
    for figure in ("figure.gif", "nowhere/figure.png"):
        monkeypatch.setattr("sys.argv", [*words, "--figure", str(tmp_path / figure)])
        assert program.cli() == 2
        assert "must be a .png in a folder that there is" in capsys.readouterr().err
