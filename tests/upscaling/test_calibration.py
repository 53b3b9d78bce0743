"""Sampled windows stand for the slide's tissue; poolings are those of the whole."""

import logging
import math
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

from carn.errors import CarnError, DamagedTileError
from carn.slides.slide import Rgb
from carn.upscaling.calibration import Calibration, calibrate, sample_windows
from carn.upscaling.engine import Engine, EngineConfig, make_engine, reference_engine
from carn.upscaling.lr_view import InputConfig, LrView
from carn.upscaling.pooling import Pooling, pool_over
from carn.upscaling.windows import TissueCells
from tests.conftest import draw
from tests.upscaling.lab import DrawnSlide, small_carn, small_edsr, view_of


def slide_view(pixels: Rgb, **options: object) -> LrView:
    return LrView(DrawnSlide(pixels, **options), InputConfig())  # type: ignore[arg-type]


def tissue_of(mask: np.ndarray, extent: tuple[int, int]) -> TissueCells:
    return TissueCells(cells=TissueCells.everywhere(extent).cells, extent=extent, mask=mask)


def places_of(windows: list[Rgb], halo: int) -> list[tuple[int, int]]:
    """Where windows of `addresses` begin."""
    corners = [window[halo, halo].astype(int) for window in windows]
    return [(red + 256 * (blue // 16), green + 256 * (blue % 16)) for red, green, blue in corners]


def addresses(width: int, height: int) -> Rgb:
    """Each px of a picture of up to 4096 px says where it is."""
    y, x = np.mgrid[0:height, 0:width]
    return np.stack([x % 256, y % 256, x // 256 * 16 + y // 256], axis=-1).astype(np.uint8)


def test_a_small_view_is_taken_whole() -> None:
    pixels = draw(130, 70)
    view = view_of(pixels)
    tissue = TissueCells.everywhere(view.extent)
    (window,), (weight,) = sample_windows(view, tissue, halo_px=12, seed=1)
    np.testing.assert_array_equal(
        window, np.pad(pixels, ((12, 12), (12, 12), (0, 0)), mode="reflect")
    )
    assert weight.shape == (70, 130)
    assert weight.all()


def test_windows_lie_on_tissue_at_multiples_of_4_and_are_spread_over_it() -> None:
    width, height = 3000, 2000
    mask = np.zeros((200, 300), dtype=bool)
    mask[20:60, 30:90] = True  # x 300..900, y 200..600
    mask[150:190, 200:280] = True  # x 2000..2800, y 1500..1900; 4/7 of the tissue
    view = slide_view(addresses(width, height))
    windows, weights = sample_windows(
        view, tissue_of(mask, view.extent), halo_px=8, seed=3, num_windows=28
    )
    assert {window.shape for window in windows} == {(144, 144, 3)}
    places = places_of(windows, 8)
    assert len(set(places)) == len(places) == 28
    in_first = 0
    for (x, y), window, weight in zip(places, windows, weights, strict=True):
        assert x % 4 == y % 4 == 0
        np.testing.assert_array_equal(window[8:-8, 8:-8], view.read(x, y, 128, 128))
        expected = mask.repeat(10, axis=0).repeat(10, axis=1)[y : y + 128, x : x + 128]
        np.testing.assert_array_equal(weight, expected)
        assert weight.any()
        in_first += x < 1000
    assert in_first == pytest.approx(12, abs=1)


def test_the_same_seed_gives_the_same_windows() -> None:
    view = slide_view(addresses(2000, 1600))
    tissue = TissueCells.everywhere(view.extent)

    def places(seed: int) -> list[tuple[int, int]]:
        windows, _ = sample_windows(view, tissue, halo_px=4, seed=seed, num_windows=6)
        return places_of(windows, 4)

    assert places(1) == places(1)
    assert places(1) != places(2)


def test_windows_beyond_a_narrow_view_do_not_count_there() -> None:
    view = slide_view(draw(60, 900))
    windows, weights = sample_windows(
        view, TissueCells.everywhere((60, 900)), halo_px=4, seed=1, num_windows=5, max_whole_px=0
    )
    for window, weight in zip(windows, weights, strict=True):
        assert window.shape == (136, 136, 3)
        assert weight[:, :60].all()
        assert not weight[:, 60:].any()


def test_damaged_places_are_left_out_unless_there_is_nothing_else() -> None:
    pixels = addresses(2000, 1600)
    tissue = TissueCells.everywhere((2000, 1600))
    view = slide_view(pixels, bad=((0, 0, 1000, 1600),))
    windows, _ = sample_windows(view, tissue, halo_px=4, seed=1, num_windows=12)
    assert 2 <= len(windows) <= 8
    assert all(x >= 1000 for x, _ in places_of(windows, 4))
    view = slide_view(pixels, bad=((0, 0, 2000, 1600),))
    with pytest.raises(DamagedTileError):
        sample_windows(view, tissue, halo_px=4, seed=1, num_windows=3)
    # A small view with damage is sampled where it reads.
    view = slide_view(addresses(600, 500), bad=((0, 0, 20, 20),))
    windows, _ = sample_windows(
        view, TissueCells.everywhere((600, 500)), halo_px=4, seed=1, num_windows=9
    )
    assert len(windows) > 1


# ----------------------------------------------------------------------------------- calibrate


def test_the_means_of_a_small_image_are_those_of_the_whole() -> None:
    pixels = draw(97, 66)
    model = small_carn(2)
    engine = reference_engine(model)
    found = calibrate(view_of(pixels), model, engine)
    halo = engine.halo_px
    padded = np.pad(pixels, ((halo, halo), (halo, halo), (0, 0)), mode="reflect")
    expected = pool_over(model, [padded], halo_px=halo)
    assert found.pooling is not None
    for name, mean in expected.means.items():
        torch.testing.assert_close(found.pooling.means[name], mean)
    assert math.isinf(found.accuracy_db)  # the reference, against itself


def test_the_engine_is_left_with_the_pooling_and_measured() -> None:
    pixels = draw(200, 180)
    model = small_carn(2)
    view = view_of(pixels)
    engine = make_engine(model, EngineConfig(precision="fp32", device="cpu"))
    found = calibrate(view, model, engine)
    assert found.accuracy_db > 90
    window = view.read(0, 0, 64 + 2 * engine.halo_px, 64 + 2 * engine.halo_px)
    frozen = engine.upscale(window)
    engine.set_pooling(None)
    assert (engine.upscale(window) != frozen).any()
    engine.set_pooling(found.pooling)
    np.testing.assert_array_equal(engine.upscale(window), frozen)


def test_a_self_ensemble_is_measured_against_one() -> None:
    model = small_carn(2)
    settings = EngineConfig(precision="fp32", device="cpu", self_ensemble=True)
    engine = make_engine(model, settings)
    found = calibrate(view_of(draw(200, 180)), model, engine)
    assert found.accuracy_db > 90


def test_an_engine_that_is_wrong_is_found_out() -> None:
    class Wrong:
        def __init__(self, engine: Engine) -> None:
            self.engine = engine
            self.halo_px = engine.halo_px
            self.self_ensemble = engine.self_ensemble
            self.set_pooling = engine.set_pooling

        def upscale(self, window: Rgb) -> Rgb:
            return np.minimum(self.engine.upscale(window), 254) + np.uint8(1)

        def upscale_float(self, window: Rgb) -> NDArray[np.float32]:
            return self.engine.upscale_float(window) + np.float32(1 / 255)

    model = small_edsr(2)
    wrong = Wrong(reference_engine(model))
    found = calibrate(view_of(draw(150, 150)), model, wrong)  # type: ignore[arg-type]
    assert found.accuracy_db == pytest.approx(10 * math.log10(255**2), abs=1.5)
    assert found.pooling is None


def test_a_sample_of_a_slide_is_near_the_means_of_the_whole() -> None:
    pixels = draw(700, 500)
    view = slide_view(pixels)
    model = small_carn(2, num_blocks=1)
    engine = reference_engine(model)
    whole = calibrate(view, model, engine, num_probes=0).pooling
    windows, weights = sample_windows(
        view,
        TissueCells.everywhere(view.extent),
        halo_px=engine.halo_px,
        seed=1,
        side_px=64,
        num_windows=48,
        max_whole_px=0,
    )
    sampled = pool_over(model, windows, halo_px=engine.halo_px, weights=weights)
    assert whole is not None
    for name, mean in whole.means.items():
        difference = (sampled.means[name] - mean).abs().max() / mean.abs().max()
        assert difference < 0.12


def test_a_network_that_does_not_pool_or_is_not_to_has_no_pooling() -> None:
    view = view_of(draw(60, 50))
    model = small_edsr(2)
    found = calibrate(view, model, reference_engine(model), num_probes=0)
    assert found.pooling is None
    assert math.isnan(found.accuracy_db)
    carn = small_carn(2)
    assert calibrate(view, carn, reference_engine(carn), pools=False).pooling is None


def short_of_memory(model: nn.Module, limit_px: int) -> nn.Module:
    """The network, where memory does not suffice for more px at once."""

    def refuse(_: nn.Module, args: tuple[Any, ...]) -> None:
        if args[0].shape[0] * args[0].shape[2] * args[0].shape[3] > limit_px:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    model.register_forward_pre_hook(refuse)
    return model


def test_fewer_windows_are_pooled_over_where_memory_does_not_suffice(
    caplog: pytest.LogCaptureFixture,
) -> None:
    view, model = slide_view(addresses(1700, 1600)), small_carn(2)
    engine = reference_engine(model)
    side = 64 + 2 * engine.halo_px
    tissue = TissueCells.everywhere(view.extent)
    windows, weights = sample_windows(
        view, tissue, side_px=64, num_windows=9, halo_px=engine.halo_px, seed=1, max_whole_px=0
    )
    expected = pool_over(model, windows[::4], halo_px=engine.halo_px, weights=weights[::4])
    assert len(windows[::4]) == 3
    scarce = short_of_memory(model, 3 * side**2)
    with caplog.at_level(logging.WARNING):
        found = calibrate(view, scarce, engine, side_px=64, num_windows=9)
    assert found.pooling is not None
    for name, mean in expected.means.items():
        torch.testing.assert_close(found.pooling.means[name], mean)
    assert math.isinf(found.accuracy_db)
    (record,) = caplog.records
    assert record.getMessage().endswith("pooling over 9 windows: going on with 3")


def test_a_view_that_is_too_large_to_be_taken_whole_is_sampled(
    caplog: pytest.LogCaptureFixture,
) -> None:
    view, model = view_of(draw(300, 260)), small_carn(2)
    engine = reference_engine(model)
    scarce = short_of_memory(model, 5 * (64 + 2 * engine.halo_px) ** 2)
    with caplog.at_level(logging.WARNING):
        found = calibrate(view, scarce, engine, side_px=64, num_windows=8)
    assert found.pooling is not None
    whole, fewer = (record.getMessage() for record in caplog.records)
    assert "over all of drawn: sampling it" in whole
    assert fewer.endswith("going on with 4")


def test_what_the_engine_is_tried_on_is_cut_where_memory_does_not_suffice() -> None:
    view, model = view_of(draw(300, 260)), small_edsr(2)
    engine = reference_engine(short_of_memory(model, 100**2))
    found = calibrate(view, model, engine, side_px=128)
    assert math.isinf(found.accuracy_db)
    assert engine.window_px == 64


def test_memory_for_one_window_must_suffice() -> None:
    view, model = view_of(draw(300, 260)), short_of_memory(small_carn(2), 100)
    with pytest.raises(CarnError, match=r"one window of 64 .* give the process more memory"):
        calibrate(view, model, reference_engine(model), side_px=64)


def test_other_errors_of_pooling_are_not_taken_for_want_of_memory() -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("illegal memory access")

    model = small_carn(2)
    model.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="illegal"):
        calibrate(view_of(draw(100, 100)), model, reference_engine(model))


def test_calibrations_go_through_bytes() -> None:
    pooling = Pooling({"a.b": torch.rand(1, 5, 1, 1)})
    found = Calibration.from_bytes(Calibration(pooling=pooling, accuracy_db=71.25).to_bytes())
    assert found.accuracy_db == 71.25
    assert found.pooling is not None
    torch.testing.assert_close(dict(found.pooling.means), dict(pooling.means))
    empty = Calibration.from_bytes(Calibration(pooling=None, accuracy_db=math.inf).to_bytes())
    assert (empty.pooling, empty.accuracy_db) == (None, math.inf)
    with pytest.raises(CarnError):
        Calibration.from_bytes(b"123")
    with pytest.raises(CarnError):
        Calibration.from_bytes(Calibration(pooling=pooling, accuracy_db=1.0).to_bytes()[:-30])
