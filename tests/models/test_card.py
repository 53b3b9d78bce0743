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
from carn.degradation.conditions import CONDITIONS, apply_condition
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


def test_several_conditions_are_columns() -> None:
    """Of each, PSNR of bicubic interpolation and gains over it; mean over the images."""
    worse = [
        row | {"condition": "jpeg80-420", "psnr_db": row["psnr_db"] - 4 - (row["key"] == "carn")}
        for row in rows_of()
    ]
    plain = [row | {"condition": "bicubic"} for row in rows_of()]
    # The order is the evaluation's.
    scores = read_scores([*plain, *worse], "carn-x2")
    assert scores_table(scores).splitlines() == [
        "| source | images | network | bicubic | jpeg80-420 |",
        "|---|---|---|---|---|",
        "| test lab-a | 3 | bicubic, PSNR in dB | 30.00 | 26.00 |",
        "| test lab-a | 3 | carn-x2, gain in dB | +3.00 | +2.00 |",
        "| test lab-a | 3 | edsr, gain in dB | +2.00 | +2.00 |",
        "| validation field | 1 | bicubic, PSNR in dB | 35.00 | 31.00 |",
        "| validation field | 1 | carn-x2, gain in dB | +0.50 | -0.50 |",
        "| validation field | 1 | edsr, gain in dB | +0.00 | +0.00 |",
    ]
    turned = scores_table(read_scores([*worse, *plain], "carn-x2"))
    assert turned.startswith("| source | images | network | jpeg80-420 | bicubic |")
    # One condition is the table as it was, whatever it is called.
    assert scores_table(read_scores(plain, "carn-x2")) == scores_table(
        read_scores(rows_of(), "carn-x2")
    )
    kept = [row for row in worse if row["key"] != "bicubic"]
    with pytest.raises(DatasetError, match="no scores of bicubic under jpeg80-420"):
        read_scores([*plain, *kept], "carn-x2")


def test_the_typical_image_is_the_conditions() -> None:
    other = {"3_test_lab-a_one": 2.0, "3_test_lab-a_two": 0.5, "3_test_lab-a_three": 0.0}
    rows = [row | {"condition": "bicubic"} for row in rows_of()] + [
        row | {"condition": "mean", "psnr_db": other[row["slide"]] if row["key"] == "carn" else 0.0}
        for row in rows_of()
        if row["slide"] in other
    ]
    scores = read_scores(rows, "carn-x2")
    typical = typical_images(scores, "carn-x2", condition="mean")
    assert typical == {"test lab-a": "3_test_lab-a_two"}
    assert typical_images(scores, "carn-x2")["test lab-a"] == "3_test_lab-a_one"


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


def test_crops_of_another_condition(images: Path) -> None:
    name, condition = "carn-x2", "scanned-jpeg80"
    way = CONDITIONS[condition]
    scores = read_scores(
        [row | {"condition": c} for c in ("bicubic", condition) for row in rows_of(name)], name
    )
    plain = np.asarray(crops_figure(name, images, scores))
    figure = np.asarray(crops_figure(name, images, scores, condition=condition, way=way))
    assert figure.shape == plain.shape
    with Image.open(images / "test" / "lab-a" / "3_test_lab-a_one.png") as opened:
        hr = np.asarray(opened)[:132, :134]
    # The very LR that was scored: noise is drawn by the tile's name.
    lr = apply_condition(hr, way, scale=2, tile="3_test_lab-a_one_0_0")
    batch = torch.from_numpy(lr.copy()).permute(2, 0, 1)[None] / 255
    with torch.inference_mode():
        network = to_uint8(load_model(name)(batch))[0].permute(1, 2, 0).numpy()
    y, x = most_detailed(hr)
    side, gap, title = CROP_PX * ZOOM, 8, 22
    for column, pixels in ((1, network), (2, hr)):
        left = gap + column * (side + gap)
        shown = figure[2 * title : 2 * title + side : ZOOM, left : left + side : ZOOM]
        np.testing.assert_array_equal(shown, pixels[y : y + CROP_PX, x : x + CROP_PX])
    assert (figure[:title, : side + gap] != plain[:title, : side + gap]).any()  # it says so
    with pytest.raises(DatasetError, match="no scores of carn-x2 under mean; name one of bicubic,"):
        crops_figure(name, images, scores, condition="mean", way=CONDITIONS["mean"])


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


def test_conditions_on_the_command_line(
    images: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    rows = [row | {"condition": c} for c in ("bicubic", "mean", "mine") for row in rows_of()]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "scores.parquet")
    (tmp_path / "mine.yaml").write_text("mine: {blur_px: 2}")
    (tmp_path / "two.yaml").write_text("mine: {blur_px: 2}\nother: {blur_px: 3}")
    words = ["shipped", "card", "carn-x2", "--images", str(images), "--evaluation", str(tmp_path)]
    drawn = {}
    for condition in ("bicubic", "mean", str(tmp_path / "mine.yaml")):
        figure = tmp_path / "figure.png"
        monkeypatch.setattr("sys.argv", [*words, "--figure", f"{figure}", "--condition", condition])
        assert program.cli() == 0
        assert "| source | images | network | bicubic | mean | mine |" in capsys.readouterr().out
        drawn[condition] = figure.read_bytes()
    assert len(set(drawn.values())) == 3
    for condition, said in (
        ("jpeg80-420", "no scores of carn-x2 under jpeg80-420; name one of bicubic, mean, mine"),
        ("jpeg", "'jpeg' is not one of"),
        (str(tmp_path / "two.yaml"), "two.yaml is mine, other; the crops show one"),
    ):
        monkeypatch.setattr("sys.argv", [*words, "--figure", f"{figure}", "--condition", condition])
        assert program.cli() == 2
        assert said in capsys.readouterr().err
