import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from carn.degradation.bicubic import degrade
from carn.metrics import psnr
from carn.models.checkpoint import write_checkpoint
from carn.slides.slide import Rgb
from carn.upscaling.accuracy import compare, main
from carn.upscaling.engine import EngineConfig, make_engine, reference_engine
from tests.upscaling.networks import batch_of, network, tissue, window_of


def giving(*results: np.ndarray) -> Any:
    """Stands for an engine that gives these."""
    left = iter(results)
    return SimpleNamespace(upscale_float=lambda _window: next(left), self_ensemble=False)


WINDOW: Rgb = np.zeros((1, 1, 3), dtype=np.uint8)


def test_equal_results() -> None:
    sr = np.random.default_rng(0).random((4, 5, 3), dtype=np.float32)
    found = compare(giving(sr), giving(sr), [WINDOW], hr=[np.zeros((4, 5, 3), dtype=np.uint8)])
    assert found.psnr_db == found.psnr_uint8_db == math.inf
    assert (found.max_difference, found.share_changed, found.hr_change_db) == (0, 0, 0)


def test_known_differences() -> None:
    base = np.full((10, 10, 3), 100 / 255, dtype=np.float32)
    other = base.copy()
    other[0, :3, 0] += 0.3 / 255  # rounded away
    other[1, 0] += 3.4 / 255
    hr = np.full((10, 10, 3), 101, dtype=np.uint8)
    # Two windows, of which one is equal: all px count alike.
    found = compare(giving(base, other), giving(base, base), [WINDOW] * 2, hr=[hr, hr])
    number = 2 * 300
    errors = (3 * 0.3**2 + 3 * 3.4**2) / number
    assert found.psnr_db == pytest.approx(10 * math.log10(255**2 / errors), abs=1e-3)
    assert found.psnr_uint8_db == pytest.approx(10 * math.log10(255**2 * number / 27), abs=1e-6)
    assert found.max_difference == 3
    assert found.share_changed == 3 / number
    change = 10 * math.log10(number / (number - 3 + 3 * 4))
    assert found.hr_change_db == pytest.approx(change, abs=1e-6)


def test_what_leaves_the_range_is_clamped_first() -> None:
    sr = np.ones((2, 2, 3), dtype=np.float32)
    assert compare(giving(sr * 1.5), giving(sr), [WINDOW]).psnr_db == math.inf
    assert compare(giving(sr * -1), giving(sr * 0), [WINDOW]).hr_change_db is None


def test_psnr_is_that_of_the_pixels() -> None:
    model = network("edsr")
    engine = make_engine(model, EngineConfig(device="cpu", precision="bf16"))
    reference = reference_engine(model)
    hr = tissue(80)
    lr = degrade(hr, scale=2)
    window = window_of(lr, 0, 0, 40, 40, halo_px=engine.halo_px)
    found = compare(engine, reference, [window], hr=[hr])
    ours, theirs, wanted = (
        (batch_of(pixels) * 255).round().byte()
        for pixels in (engine.upscale(window), reference.upscale(window), hr)
    )
    assert found.psnr_uint8_db == pytest.approx(float(psnr(ours, theirs)), abs=1e-6)
    change = float(psnr(ours, wanted) - psnr(theirs, wanted))
    assert found.hr_change_db == pytest.approx(change, abs=1e-6)


def test_what_cannot_be_compared_is_named() -> None:
    sr = np.zeros((4, 4, 3), dtype=np.float32)
    with pytest.raises(ValueError, match="no windows"):
        compare(giving(), giving(), [])
    with pytest.raises(ValueError, match="HR is"):
        compare(giving(sr), giving(sr), [WINDOW], hr=[np.zeros((3, 4, 3), dtype=np.uint8)])
    with pytest.raises(ValueError, match="shorter"):
        compare(giving(sr), giving(sr), [WINDOW], hr=[])


@pytest.mark.parametrize(("name", "rows"), [("carn", 4), ("swdnet", 2), ("srgan", 2)])
def test_the_command_prints_a_row_for_each_engine(
    name: Any, rows: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_checkpoint(
        str(tmp_path / "model"),
        model=network(name),
        model_name=name,
        training=None,
        step=None,
        dataset=None,
        metrics={},
    )
    Image.fromarray(tissue(97)).save(tmp_path / "hr.png")
    images = (str(tmp_path / "hr.png"),) * 2
    assert main(str(tmp_path / "model"), images, side_px=32) == 0
    header, *lines = capsys.readouterr().out.splitlines()
    assert "dB to fp32" in header
    assert len(lines) == rows
    precisions = [line.split(",")[0] for line in lines]
    assert precisions == sorted(precisions, reverse=True)
    for line in lines:
        exact_db = float(line.split()[-5])
        assert exact_db > (110 if line.startswith("fp32") else 60)
