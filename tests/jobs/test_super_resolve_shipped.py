"""The nightly job without a checkpoint: the network that comes with the project does it."""

import json
from pathlib import Path

import pytest

from carn.errors import CheckpointError
from carn.models.checkpoint import checkpoint_hash
from carn.slides import open_slide
from jobs import super_resolve
from jobs.sr_night import check_checkpoint
from jobs.super_resolve import main
from tests.jobs.lab import draw_slide
from tests.jobs.sr_lab import last_summary, make_sr_job

pytestmark = [pytest.mark.ray, pytest.mark.xdist_group("ray-slides")]


def test_no_checkpoint_is_needed(tmp_path: Path, ray_here: None) -> None:
    (tmp_path / "inbox").mkdir()
    draw_slide(tmp_path / "inbox" / "Case_1.tif", 1, width=150, height=110)
    out = tmp_path / "sr"
    assert main(make_sr_job(tmp_path, out, checkpoint=None)) == 0
    notes = json.loads((out / "Case_1.json").read_text())
    assert notes["checkpoint_hash"] == checkpoint_hash("carn-x2")
    with open_slide(out / "Case_1.tif") as sr:
        assert sr.extent == (300, 220)
    assert last_summary(out)["checkpoint"] == "shipped:carn-x2"


def test_the_scale_says_which(tmp_path: Path) -> None:
    for scale, taken in ((None, 2), (2, 2), (4, 4)):
        checkpoint, halo_px = check_checkpoint(
            make_sr_job(tmp_path, tmp_path / "sr", checkpoint=None, scale=scale)
        )
        assert (checkpoint.uri, checkpoint.scale) == (f"shipped:carn-x{taken}", taken)
        assert halo_px == 36
    with pytest.raises(CheckpointError, match="no network for x3 comes with the project"):
        check_checkpoint(make_sr_job(tmp_path, tmp_path / "sr", checkpoint=None, scale=3))


def test_a_name_is_told_from_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "carn-x2").mkdir()
    (tmp_path / "inbox").mkdir()
    monkeypatch.setattr(
        "sys.argv",
        ["super_resolve", "--slides", "inbox", "--output", "sr", "--checkpoint", "carn-x2"],
    )
    assert super_resolve.cli() == 2
    assert "say ./carn-x2 for what is here" in capsys.readouterr().err
