"""From a run's folder to its page: of a finished run, one under way, and none at all."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from carn.bcsr.dataset import open_dataset
from carn.errors import DatasetError, RunError
from carn.metrics import psnr
from carn.models.checkpoint import load_model, read_checkpoint
from carn.report.train_summary import NUM_CROPS, _busiest, _spread, write_report
from carn.training.tiles import load_tiles
from tests.conftest import Bucket
from tests.report.test_bcsr_report import Page
from tests.training.lab import Killed, kill_at, run, tiny_config, write_dataset


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset, and a run on it that is over; with a node's cache of their own."""
    root = tmp_path_factory.mktemp("lab")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CARN_CACHE_DIR", str(root / "cache"))
        write_dataset(str(root / "bcsr"))
        run(tiny_config(), str(root / "bcsr"), root / "run")
    return root


@pytest.fixture(autouse=True)
def cache(lab: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CARN_CACHE_DIR", str(lab / "cache"))


def read(page: Path) -> Page:
    parser = Page()
    parser.feed(page.read_text())
    return parser


def test_the_page_of_a_finished_run(lab: Path) -> None:
    summary = write_report(str(lab / "run"))
    page = (lab / "run" / "report.html").read_text()
    best = read_checkpoint(str(lab / "run" / "best.json"))
    for part in ("CARN", "x2", str(lab / "run"), str(lab / "bcsr"), "6 of 6", "0 h 00 min"):
        assert part in page, part
    assert best.weights_sha256[:16] in page
    # Every validation tile with its numbers, and crops of some.
    for number in range(4):
        assert f"validation_{number}" in page
    assert page.count("dB over bicubic on the tile") == NUM_CROPS
    # Everything is in it: the page is read where there is no network.
    assert not re.search(r'(src|href)="(?!data:|#)', page)
    assert summary.splitlines()[-1] == f"  report {lab / 'run' / 'report.html'}"
    assert f"after {best.step} updates" in summary


def test_the_numbers_are_those_of_the_best_checkpoint(lab: Path) -> None:
    summary = write_report(str(lab / "run"))
    best = read_checkpoint(str(lab / "run" / "best.json"))
    found = re.search(r"validation PSNR ([\d.]+) dB \(([+-][\d.]+) dB over bicubic\)", summary)
    assert found is not None
    assert float(found[1]) == pytest.approx(best.metrics["best_psnr"], abs=0.006)
    # Counted here by other means: the middle 32 px of each tile, by the network itself.
    store = load_tiles(open_dataset(str(lab / "bcsr")), split="validation", scale=2)
    model = load_model(best).eval()
    scores = []
    for index in range(len(store.tile_ids)):
        lr, hr = store.pair(index)
        top, left = (lr.shape[0] - 16) // 2, (lr.shape[1] - 16) // 2
        part = lr[top : top + 16, left : left + 16]
        target = hr[2 * top : 2 * top + 32, 2 * left : 2 * left + 32]
        pixels = torch.from_numpy(part.copy()).permute(2, 0, 1)[None].float() / 255
        with torch.inference_mode():
            sr = (model(pixels).clamp(0, 1) * 255).round().to(torch.uint8)
        expected = torch.from_numpy(target.copy()).permute(2, 0, 1)[None]
        scores.append(float(psnr(sr, expected)))
    assert float(found[1]) == pytest.approx(np.mean(scores), abs=0.02)


def test_the_same_run_gives_the_same_page(lab: Path) -> None:
    write_report(str(lab / "run"))
    before = (lab / "run" / "report.html").read_bytes()
    write_report(str(lab / "run"))
    assert (lab / "run" / "report.html").read_bytes() == before


def test_a_run_under_way(lab: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    with pytest.raises(Killed):
        run(tiny_config(), str(lab / "bcsr"), output, on_event=kill_at(1))
    with pytest.raises(RunError, match="has no checkpoint yet"):
        write_report(str(output))
    assert not (output / "report.html").exists()
    # A checkpoint after update 2, and no validation yet.
    with pytest.raises(Killed):
        run(tiny_config(), str(lab / "bcsr"), output, on_event=kill_at(3))
    # Nobody knows a better one.
    assert (output / "best.json").read_text() == (output / "last.json").read_text()
    assert "after 2 updates" in write_report(str(output))
    assert "2 of 6" in (output / "report.html").read_text()
    # Writing the page does not disturb the run.
    run(tiny_config(), str(lab / "bcsr"), output)
    assert "6 of 6" in (write_report(str(output)) and (output / "report.html").read_text())


def test_a_dataset_without_validation_tiles(tmp_path: Path) -> None:
    write_dataset(str(tmp_path / "bcsr"), validation=(), seed=3)
    run(tiny_config(), str(tmp_path / "bcsr"), tmp_path / "run")
    summary = write_report(str(tmp_path / "run"))
    assert "PSNR" not in summary
    assert "after 6 updates" in summary
    assert "The dataset has no validation tiles." in (tmp_path / "run/report.html").read_text()


def test_tiles_smaller_than_a_crop_of_the_page(tmp_path: Path) -> None:
    sides = [(40, 36)] * 5
    write_dataset(str(tmp_path / "bcsr"), train=sides, validation=sides[:1], seed=4)
    run(tiny_config(scale=3), str(tmp_path / "bcsr"), tmp_path / "run")
    write_report(str(tmp_path / "run"))
    assert "validation_0" in (tmp_path / "run" / "report.html").read_text()


def test_a_run_in_an_object_store(lab: Path, s3: Bucket) -> None:
    run(tiny_config(), str(lab / "bcsr"), s3.uri("run"))
    summary = write_report(s3.uri("run"))
    assert s3.uri("run/report.html") in summary
    assert b"6 of 6" in s3.get("run/report.html")


def test_what_is_no_run(lab: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError, match=f"{tmp_path} holds no training run: config.json"):
        write_report(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"of": "another program"}))
    with pytest.raises(RunError, match=r"config\.json is not of a training run"):
        write_report(str(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_a_run_whose_dataset_is_gone(tmp_path: Path) -> None:
    write_dataset(str(tmp_path / "bcsr"), seed=6)
    run(tiny_config(steps=2), str(tmp_path / "bcsr"), tmp_path / "run")
    (tmp_path / "bcsr").rename(tmp_path / "elsewhere")
    with pytest.raises(DatasetError, match=str(tmp_path / "bcsr")):
        write_report(str(tmp_path / "run"))


def test_from_the_command_line(lab: Path, tmp_path: Path) -> None:
    def command(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "carn.report.train_summary", *arguments],
            capture_output=True,
            text=True,
            check=False,
        )

    done = command(str(lab / "run"))
    assert (done.returncode, done.stdout.count("report.html")) == (0, 1), done.stderr
    failed = command(str(tmp_path))
    assert failed.returncode == 1
    assert failed.stderr.strip() == (
        f"train_summary: {tmp_path} holds no training run: config.json is missing"
    )


@given(st.lists(st.floats(-5, 5), min_size=1, max_size=40))
def test_crops_are_of_the_worst_the_best_and_between(gains: list[float]) -> None:
    chosen = _spread(np.array(gains))
    assert len(chosen) == len(set(chosen)) == min(NUM_CROPS, len(gains))
    values = [gains[index] for index in chosen]
    assert values == sorted(values)
    assert values[0] == min(gains)
    if len(gains) > 1:
        assert values[-1] == max(gains)


@given(
    st.integers(24, 90),
    st.integers(24, 90),
    st.sampled_from([2, 3, 4]),
    st.integers(0, 2**16),
)
def test_a_crop_lies_on_the_tile_and_on_lr_pixels(
    width: int, height: int, scale: int, seed: int
) -> None:
    side = 24
    width, height = width // scale * scale, height // scale * scale
    hr = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    top, left = _busiest(hr, side=side, scale=scale)
    assert top % scale == left % scale == 0
    assert 0 <= top <= height - side
    assert 0 <= left <= width - side


def test_a_crop_shows_the_part_with_structure() -> None:
    hr = np.full((96, 96, 3), 200, dtype=np.uint8)
    hr[60:84, 48:72] = np.random.default_rng(0).integers(0, 255, (24, 24, 3))
    top, left = _busiest(hr, side=24, scale=2)
    assert 36 < top < 84
    assert 24 < left < 72
