import itertools
import logging
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from carn.errors import CarnError
from carn.models import ModelName
from carn.slides.slide import Rgb
from carn.upscaling import engine as module_under_test
from carn.upscaling import precision
from carn.upscaling.accuracy import OFFERED_DB, compare
from carn.upscaling.engine import (
    Engine,
    EngineConfig,
    is_out_of_memory,
    make_engine,
    reference_engine,
)
from carn.upscaling.pooling import frozen, pool_over
from tests.upscaling.networks import POOLING, SMALL, batch_of, network, tissue, window_of

ROOT = Path(__file__).parents[2]
CPU = EngineConfig(device="cpu")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def config(**settings: Any) -> EngineConfig:
    return EngineConfig(**{"device": "cpu", **settings})


def largest_difference(one: Rgb, other: Rgb) -> int:
    assert one.shape == other.shape
    return int(np.abs(one.astype(int) - other.astype(int)).max())


def engines_of(name: ModelName, *, scale: int = 2, **settings: Any) -> tuple[Engine, Engine]:
    """An engine and the reference of a small network, frozen at the same means where it pools."""
    model = network(name, scale=scale)
    engine, reference = make_engine(model, config(**settings)), reference_engine(model)
    pooling = pool_over(model, [tissue(64)], halo_px=8) if name in POOLING else None
    engine.set_pooling(pooling)
    reference.set_pooling(pooling)
    return engine, reference


@pytest.mark.parametrize("is_folded", [True, False])
@pytest.mark.parametrize("name", SMALL)
def test_float32_engines_give_the_references_pixels(name: ModelName, is_folded: bool) -> None:
    engine, reference = engines_of(name, precision="fp32", fold=is_folded)
    window = window_of(tissue(), 40, 100, 30, 41, halo_px=engine.halo_px)
    found = compare(engine, reference, [window])
    assert found.psnr_db > 110
    assert largest_difference(engine.upscale(window), reference.upscale(window)) <= 1


@pytest.mark.parametrize(
    ("name", "scale"),
    [("carn", 2), ("carn", 3), ("carn", 8), ("edsr", 2), ("rdn", 2), ("rcan", 2), ("swdnet", 3)],
)
def test_bf16_is_within_what_is_offered(name: ModelName, scale: int) -> None:
    engine, reference = engines_of(name, scale=scale, precision="bf16")
    window = window_of(tissue(), 40, 100, 30, 41, halo_px=engine.halo_px)
    found = compare(engine, reference, [window])
    assert OFFERED_DB < found.psnr_db < 110  # and it is bf16


def test_what_results_are_a_sum_of_stays_in_float32() -> None:
    engine, _ = engines_of("carn", precision="bf16")
    program = engine._program()
    kinds = {name: item.dtype for name, item in program.named_parameters()}
    assert {kinds[name] for name in kinds if name.startswith("body.")} == {torch.bfloat16}
    ends = [name for name in kinds if not name.startswith("body.")]
    assert {name.split(".")[0] for name in ends} == {"head", "tail"}
    assert {kinds[name] for name in ends} == {torch.float32}


def test_the_reference_is_the_model() -> None:
    for name in SMALL:
        model = network(name, scale=3)
        reference = reference_engine(model)
        halo_px = reference.halo_px
        assert halo_px % 4 == 0
        assert 0 <= halo_px - model.receptive_radius_px < 4
        window = window_of(tissue(), 8, 4, 21, 10, halo_px=halo_px)
        with torch.inference_mode():
            sr = model(batch_of(window))[0, :, 3 * halo_px : -3 * halo_px].permute(1, 2, 0)
        sr = sr[:, 3 * halo_px : -3 * halo_px]
        levels = (sr.clamp(0, 1) * 255).round().to(torch.uint8).numpy()
        np.testing.assert_array_equal(reference.upscale(window), levels)
        np.testing.assert_allclose(reference.upscale_float(window), sr.numpy(), atol=1e-6)


@pytest.fixture(scope="module")
def carn_engine() -> Engine:
    return engines_of("carn", scale=3)[0]


@given(height=st.integers(1, 24), width=st.integers(1, 24))
@settings(max_examples=12)
def test_windows_of_any_size(carn_engine: Engine, height: int, width: int) -> None:
    window = window_of(tissue(64), 0, 0, width, height, halo_px=carn_engine.halo_px)
    sr = carn_engine.upscale(window)
    assert sr.shape == (3 * height, 3 * width, 3)
    assert sr.dtype == np.uint8
    assert sr.flags.c_contiguous


# ------------------------------------------------------------------------------------- seams


def assert_cut_anywhere(engine: Engine, image: Rgb, *, is_frozen: bool = True) -> None:
    """Windows that overlap give the same pixels, as the whole image does."""
    side, scale, halo = 96, engine.scale, engine.halo_px
    whole = engine.upscale(window_of(image, 0, 0, side, side, halo_px=halo))
    differences = [
        largest_difference(
            engine.upscale(window_of(image, x, y, width, height, halo_px=halo)),
            whole[y * scale : (y + height) * scale, x * scale : (x + width) * scale],
        )
        for x, y, width, height in (
            (0, 0, 33, 20),
            (20, 12, 40, 51),
            (64, 28, 32, 68),
            (92, 92, 4, 4),
        )
    ]
    assert (max(differences) <= 1) == is_frozen, differences


SEAMS: list[tuple[ModelName, int]] = [("carn", 2), ("rcan", 4), ("swdnet", 3), ("rdn", 3)]


@pytest.mark.parametrize("precision_name", ["fp32", "bf16"])
@pytest.mark.parametrize(("name", "scale"), SEAMS)
def test_windows_agree_wherever_they_are_cut(
    name: ModelName, scale: int, precision_name: str
) -> None:
    engine, _ = engines_of(name, scale=scale, precision=precision_name)
    assert_cut_anywhere(engine, tissue()[200:296, 160:256])


@pytest.mark.parametrize("precision_name", ["fp32", "bf16"])
def test_windows_of_real_tissue_agree(shared_data: Path, precision_name: str) -> None:
    path = sorted((shared_data / "patches" / "monuseg_1000" / "test").glob("*.png"))[0]
    with Image.open(path) as opened:
        image = np.asarray(opened.convert("RGB"))[300:396, 500:596]
    engine, _ = engines_of("carn", precision=precision_name)
    assert_cut_anywhere(engine, image)


def test_windows_that_pool_for_themselves_disagree() -> None:
    engine, _ = engines_of("carn", precision="fp32")
    engine.set_pooling(None)
    assert_cut_anywhere(engine, tissue()[200:296, 160:256], is_frozen=False)


def test_larger_windows_are_cut() -> None:
    engine, reference = engines_of("carn", precision="fp32", window_px=66)
    assert engine.window_px == 64
    window = window_of(tissue(), 4, 8, 150, 70, halo_px=engine.halo_px)
    sizes = sizes_seen(engine)
    assert largest_difference(engine.upscale(window), reference.upscale(window)) <= 1
    assert max(sizes) == 64
    assert len(sizes) == 3 * 2


def sizes_seen(engine: Engine) -> list[int]:
    """The larger sides, without halo, of what the engine infers from now on at once."""
    sizes = []
    computed = engine._computed

    def seen(pixels: torch.Tensor) -> torch.Tensor:
        sizes.append(max(pixels.shape[:2]) - 2 * engine.halo_px)
        return computed(pixels)

    engine._computed = seen  # type: ignore[method-assign]
    return sizes


# ----------------------------------------------------------------------------- self-ensemble


def mean_over_eight(model: torch.nn.Module, window: Rgb, *, halo_px: int) -> torch.Tensor:
    """(h, w, 3) on 0..1 of what lies within the halo, with quarter turns in place of transposes."""
    results = []
    with torch.inference_mode():
        for number in range(8):
            lr = batch_of(window).flip(-1) if number >= 4 else batch_of(window)
            sr = torch.rot90(model(torch.rot90(lr, number, (-2, -1))), -number, (-2, -1))
            results.append(sr.flip(-1) if number >= 4 else sr)
    crop = halo_px * model.scale
    sr = torch.stack(results).mean(0)
    return sr[0, :, crop:-crop, crop:-crop].permute(1, 2, 0)


@pytest.mark.parametrize("is_frozen", [True, False])
@pytest.mark.parametrize(
    ("name", "is_folded"),
    [*itertools.product(("carn", "edsr", "rcan"), (True, False)), ("swdnet", False)],
)
def test_self_ensemble_is_the_mean_over_eight_turns(
    name: ModelName, is_folded: bool, is_frozen: bool
) -> None:
    engine, plain = engines_of(name, precision="fp32", fold=is_folded, self_ensemble=True)
    model = network(name)
    if name in POOLING and is_frozen:
        model = frozen(model, pool_over(model, [tissue(64)], halo_px=8))
    elif not is_frozen:
        engine.set_pooling(None)
        plain.set_pooling(None)
    window = window_of(tissue(), 40, 100, 30, 41, halo_px=engine.halo_px)  # not square
    found = engine.upscale_float(window)
    expected = mean_over_eight(model, window, halo_px=engine.halo_px)
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-5)
    levels = (expected.clamp(0, 1) * 255).round().numpy()
    assert largest_difference(engine.upscale(window), levels) <= 1
    # Not what the network makes of the window as it lies.
    assert np.abs(found - plain.upscale_float(window)).max() > 1e-3


def test_self_ensemble_changes_nothing_where_turning_does_not() -> None:
    engine, plain = engines_of("bicubic", precision="fp32", self_ensemble=True)
    window = window_of(tissue(), 40, 100, 30, 41, halo_px=engine.halo_px)
    difference = np.abs(engine.upscale_float(window) - plain.upscale_float(window)).max()
    assert difference < 1e-6


def test_self_ensemble_rounds_once() -> None:
    # Each turn rounded to 8 bits would put the mean on eighths of a grey level.
    engine, _ = engines_of("edsr", precision="fp32", self_ensemble=True)
    window = window_of(tissue(), 40, 100, 32, 40, halo_px=engine.halo_px)
    eighths = engine.upscale_float(window).astype(np.float64) * 255 * 8
    assert np.abs(eighths - eighths.round()).mean() > 0.2


@pytest.mark.parametrize("precision_name", ["fp32", "bf16"])
@pytest.mark.parametrize(("name", "scale"), SEAMS)
def test_windows_of_self_ensembles_agree_wherever_they_are_cut(
    name: ModelName, scale: int, precision_name: str
) -> None:
    engine, _ = engines_of(name, scale=scale, precision=precision_name, self_ensemble=True)
    assert_cut_anywhere(engine, tissue()[200:296, 160:256])


def test_flipped_windows_have_the_grid_of_all_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    # The last window of an image ends anywhere; a flip begins there. Haar levels see that at x3.
    engine, _ = engines_of("swdnet", scale=3, precision="fp32", self_ensemble=True)
    image, halo = tissue()[200:216, 160:195], engine.halo_px
    part = engine.upscale_float(window_of(image, 8, 0, 12, 16, halo_px=halo))
    whole = engine.upscale_float(window_of(image, 0, 0, 35, 16, halo_px=halo))
    assert np.abs(part - whole[:, 24:60]).max() < 1e-5
    monkeypatch.setattr(engine, "_on_grid", lambda lr: lr)
    whole = engine.upscale_float(window_of(image, 0, 0, 35, 16, halo_px=halo))
    assert np.abs(part - whole[:, 24:60]).max() > 1e-3


def test_a_self_ensemble_is_held_against_one() -> None:
    engine, plain = engines_of("edsr", precision="fp32", self_ensemble=True)
    window = window_of(tissue(), 40, 100, 32, 40, halo_px=engine.halo_px)
    with pytest.raises(ValueError, match="self_ensemble=True of the engine is not the reference"):
        compare(engine, plain, [window])
    reference = reference_engine(network("edsr"), self_ensemble=True)
    assert compare(engine, reference, [window]).psnr_db > 110


# ----------------------------------------------------------------------------------- pooling


@pytest.mark.parametrize("precision_name", ["fp32", "bf16"])
@pytest.mark.parametrize("name", POOLING)
def test_another_pooling_takes_no_other_program(name: ModelName, precision_name: str) -> None:
    model, image = network(name), tissue()
    engine = make_engine(model, config(precision=precision_name))
    window = window_of(image, 0, 0, 40, 40, halo_px=engine.halo_px)
    first, second = (pool_over(model, [image[y:][:64, :64]], halo_px=8) for y in (0, 300))
    results = {}
    for key, pooling in (("first", first), ("second", second)):
        engine.set_pooling(pooling)
        results[key] = engine.upscale(window)
        if key == "first":
            program = engine._program()
        fresh = make_engine(model, config(precision=precision_name))
        fresh.set_pooling(pooling)
        np.testing.assert_array_equal(fresh.upscale(window), results[key])
    assert engine._program() is program
    assert largest_difference(results["first"], results["second"]) > 0
    engine.set_pooling(None)
    fresh = make_engine(model, config(precision=precision_name))
    np.testing.assert_array_equal(engine.upscale(window), fresh.upscale(window))
    engine.set_pooling(first)
    np.testing.assert_array_equal(engine.upscale(window), results["first"])
    with pytest.raises(ValueError, match="another model"):
        engine.set_pooling(pool_over(network("edsr"), [image], halo_px=8))


def test_the_model_stays_as_it_is() -> None:
    model, window = network("carn"), tissue(64)
    with torch.inference_mode():
        before = model(batch_of(window))
    engine = make_engine(model, CPU)
    engine.set_pooling(pool_over(model, [window], halo_px=8))
    engine.upscale(window)
    with torch.inference_mode():
        assert torch.equal(model(batch_of(window)), before)
    assert {item.dtype for item in model.parameters()} == {torch.float32}


# ------------------------------------------------------------------------------------ memory


def refuse_above(engine: Engine, limit_px: int, *, error: Callable[[], Exception]) -> list[int]:
    """Let memory not suffice for larger windows; returns the sides that were tried."""
    tried = []
    computed = engine._computed

    def refusing(pixels: torch.Tensor) -> torch.Tensor:
        side = max(pixels.shape[:2]) - 2 * engine.halo_px
        tried.append(side)
        if side > limit_px:
            raise error()
        return computed(pixels)

    engine._computed = refusing  # type: ignore[method-assign]
    return tried


ERRORS: list[Callable[[], Exception]] = [
    lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    lambda: RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9"),
    lambda: RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes"),
    MemoryError,
]


@pytest.mark.parametrize("error", ERRORS)
def test_windows_shrink_where_memory_does_not_suffice(
    error: Callable[[], Exception], caplog: pytest.LogCaptureFixture
) -> None:
    engine, reference = engines_of("carn", precision="fp32")
    tried = refuse_above(engine, 80, error=error)
    window = window_of(tissue(), 0, 0, 200, 130, halo_px=engine.halo_px)
    with caplog.at_level(logging.WARNING):
        results = list(engine.upscale_many([window, window]))
    for sr in results:
        assert largest_difference(sr, reference.upscale(window)) <= 1
    # 200 did not fit, nor did 100: then always 64, for the second window, too.
    assert tried[:3] == [200, 100, 64]
    assert set(tried[2:]) <= {64, 36, 8, 2, 28}
    assert engine.window_px == 64
    assert len(caplog.records) == 2
    assert "windows of 200 px: going on with 100 px" in caplog.text


def test_the_smallest_windows_must_fit() -> None:
    engine, _ = engines_of("carn", precision="fp32")
    tried = refuse_above(engine, 0, error=MemoryError)
    with pytest.raises(CarnError, match=r"windows of 64 \+ 2 x .* give the process more memory"):
        engine.upscale(window_of(tissue(), 0, 0, 90, 90, halo_px=engine.halo_px))
    assert tried == [90, 64]


def test_other_errors_are_not_taken_for_want_of_memory() -> None:
    engine, _ = engines_of("carn")
    refuse_above(engine, 0, error=lambda: RuntimeError("illegal memory access"))
    with pytest.raises(RuntimeError, match="illegal"):
        engine.upscale(window_of(tissue(), 0, 0, 8, 8, halo_px=engine.halo_px))


def test_a_capture_that_ran_out_of_memory_is_known_by_its_cause() -> None:
    error = RuntimeError("operation failed due to a previous error during capture")
    assert not is_out_of_memory(error)
    error.__context__ = torch.OutOfMemoryError("CUDA out of memory")
    assert is_out_of_memory(error)


# --------------------------------------------------------------------------- many, and choices


def test_many_windows_come_in_order_and_are_taken_as_needed() -> None:
    engine, _ = engines_of("edsr", window_px=64)
    image, halo = tissue(), engine.halo_px
    boxes = [(0, 0, 20, 10), (40, 8, 5, 31), (80, 80, 70, 4)]
    made = [window_of(image, x, y, width, height, halo_px=halo) for x, y, width, height in boxes]
    taken = []

    def windows() -> Iterator[Rgb]:
        for number, window in enumerate(made):
            taken.append(number)
            window.setflags(write=False)
            yield window

    results = engine.upscale_many(windows())
    for number, window in enumerate(made):
        assert len(taken) == number
        np.testing.assert_array_equal(next(results), engine.upscale(window))
    assert list(results) == []


def test_precision_is_chosen_by_model_and_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    def chosen(name: ModelName, wanted: str = "auto") -> str:
        return make_engine(network(name), config(precision=wanted)).description.split(",")[0]

    monkeypatch.setattr(precision, "has_bf16", lambda _device: True)
    assert {name: chosen(name) for name in SMALL} == {
        **dict.fromkeys(("bicubic", "srcnn", "srgan", "rcan"), "fp32"),
        **dict.fromkeys(("edsr", "rdn", "swdnet", "carn", "adaptive-carn"), "bf16"),
    }
    assert chosen("rcan", "bf16") == "bf16"
    for name in ("bicubic", "srcnn", "srgan"):
        with pytest.raises(ValueError, match="loses too much in bf16; choose"):
            make_engine(network(name), config(precision="bf16"))
    monkeypatch.setattr(precision, "has_bf16", lambda _device: False)
    assert {chosen(name) for name in SMALL} == {"fp32"}


def test_bf16_without_the_processor_for_it_is_said(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module_under_test, "has_bf16", lambda _device: False)
    make_engine(network("carn"), config(precision="bf16"))
    assert "fp32 is faster here" in caplog.text


def test_the_description_says_what_was_chosen() -> None:
    threads = torch.get_num_threads()
    try:
        engine = make_engine(network("carn"), config(precision="bf16", num_threads=2))
        assert engine.description == "bf16, channels_last, folded, 2 threads"
        engine = make_engine(
            network("swdnet"), config(precision="fp32", num_threads=1, compile=True)
        )
        assert engine.description == "fp32, channels_last, compiled, 1 thread"
        assert engine.window_px == 1024
        assert reference_engine(network("carn")).description == "fp32, NCHW, 1 thread"
        engine = make_engine(network("carn"), config(precision="fp32", self_ensemble=True))
        assert engine.description == "fp32, channels_last, folded, self-ensemble, 1 thread"
    finally:
        torch.set_num_threads(threads)


def test_what_cannot_be_run_is_named() -> None:
    with pytest.raises(ValueError, match="window_px=63 must be at least 64"):
        EngineConfig(window_px=63)
    with pytest.raises(ValueError, match="num_threads=0"):
        EngineConfig(num_threads=0)
    with pytest.raises(ValueError, match="training mode"):
        make_engine(network("carn").train(), CPU)
    with pytest.raises(ValueError, match=r"Linear is no model of bicubic, .*carn"):
        reference_engine(torch.nn.Linear(2, 2))
    engine = make_engine(network("carn"), CPU)
    side = 2 * engine.halo_px
    with pytest.raises(ValueError, match=f"{side} x {side + 1} px has nothing within its halo"):
        engine.upscale(np.zeros((side + 1, side, 3), dtype=np.uint8))
    with pytest.raises(ValueError, match=r"must be \(H, W, 3\) uint8, not .* float32"):
        next(engine.upscale_many([np.zeros((90, 90, 3), dtype=np.float32)]))  # type: ignore[list-item]
    if not torch.cuda.is_available():
        with pytest.raises(CarnError, match="torch sees none"):
            make_engine(network("carn"), EngineConfig(device="cuda"))


def test_importing_takes_torch_and_numpy_alone() -> None:
    program = """
import sys
from carn.upscaling import accuracy, engine, folding, pooling, precision
heavy = {"ray", "openslide", "tifffile", "simplejpeg", "scipy", "skimage", "zarr", "boto3", "tyro",
         "safetensors", "PIL", "pytorch_msssim", "pyarrow", "imagecodecs", "pyvips"}
print(sorted(heavy & set(sys.modules)))
"""
    found = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert found.stdout.strip() == "[]"


# --------------------------------------------------------------------------------------- a GPU


class Landed:
    """Stands for a window on its way through a GPU."""

    def __init__(self, sr: torch.Tensor) -> None:
        self.sr = sr.numpy()

    def landed(self) -> Rgb:
        return self.sr


def as_on_a_gpu(engine: Engine, *, limit_px: int = 1000) -> list[str]:
    """Take the way through windows that a GPU takes, but for CUDA; returns what is done, in turn.

    Windows larger than `limit_px` find no memory.
    """
    log = []

    def launched(piece: Rgb) -> Any:
        if max(engine._interior(piece)) > limit_px:
            log.append("refused")
            return None
        log.append("launched")
        return Landed(engine._computed(torch.from_numpy(piece.copy())))

    engine._has_gpu = True
    engine._launched = launched  # type: ignore[method-assign]
    return log


WINDOWS = [(0, 0, 20, 10), (40, 8, 230, 31), (80, 80, 70, 4), (4, 4, 9, 90), (8, 8, 30, 30)]


@pytest.mark.parametrize(("limit_px", "refused"), [(1000, 0), (70, 1)])
def test_windows_under_way_come_in_order(limit_px: int, refused: int) -> None:
    engine, reference = engines_of("carn", precision="fp32", window_px=80)
    log = as_on_a_gpu(engine, limit_px=limit_px)
    image, halo = tissue(), engine.halo_px
    windows = [window_of(image, *box, halo_px=halo) for box in WINDOWS]
    results = list(engine.upscale_many(windows))
    assert len(results) == len(windows)
    for sr, window in zip(results, windows, strict=True):
        assert largest_difference(sr, reference.upscale(window)) <= 1
    # Once: pieces that were cut before are cut again without being tried.
    assert log.count("refused") == refused
    assert engine.window_px == (64 if refused else 80)


def test_up_to_three_windows_are_under_way() -> None:
    engine, _ = engines_of("carn", precision="fp32")
    log = as_on_a_gpu(engine)
    window = window_of(tissue(), 0, 0, 8, 8, halo_px=engine.halo_px)
    results = engine.upscale_many([window] * 5)
    counts = []
    for _ in results:
        counts.append(len(log))
    assert counts == [3, 4, 5, 5, 5]


def test_small_windows_are_padded_to_few_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module_under_test, "FIXED_SIDES_PX", (16, 32))
    engine, _ = engines_of("carn", precision="fp32", window_px=64)
    reference, _ = engines_of("carn", precision="fp32")
    as_on_a_gpu(engine)
    image, halo = tissue(), engine.halo_px
    for box in ((0, 0, 16, 16), (200, 180, 3, 9), (60, 0, 17, 33), (8, 8, 16, 5), (4, 4, 64, 1)):
        window = window_of(image, *box, halo_px=halo)
        assert largest_difference(engine.upscale(window), reference.upscale(window)) <= 1
    sides = {tuple(side - 2 * halo for side in key) for key in engine._graphs}
    assert sides == {(16, 16), (64, 32), (16, 64)}
    # What pools for itself must not see padding.
    engine.set_pooling(None)
    reference.set_pooling(None)
    engine._graphs.clear()
    window = window_of(image, 200, 180, 3, 9, halo_px=halo)
    np.testing.assert_array_equal(engine.upscale(window), reference.upscale(window))
    assert not engine._graphs


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize(
    "settings",
    [{}, {"cuda_graph": False}, {"precision": "fp32"}, {"self_ensemble": True}],
)
@pytest.mark.parametrize("name", ["carn", "edsr", "swdnet"])
def test_a_gpu_gives_the_references_pixels(name: ModelName, settings: dict[str, Any]) -> None:
    engine, reference = engines_of(name, device="cuda", **settings)
    image, halo = tissue(), engine.halo_px
    windows = [
        window_of(image, x, 8, width, 90, halo_px=halo) for x, width in ((0, 100), (40, 257))
    ]
    for _ in range(2):  # captured, then replayed
        for sr, window in zip(engine.upscale_many(windows), windows, strict=True):
            np.testing.assert_array_equal(sr, engine.upscale(window))
            assert largest_difference(sr, reference.upscale(window)) <= 2
    assert compare(engine, reference, windows).psnr_db > OFFERED_DB


@pytest.mark.gpu
@needs_gpu
def test_other_means_reach_what_was_captured() -> None:
    model, image = network("carn"), tissue()
    engine = make_engine(model, EngineConfig(device="cuda"))
    window = window_of(image, 0, 0, 64, 64, halo_px=engine.halo_px)
    for y in (0, 300):
        pooling = pool_over(model, [image[y:][:64, :64]], halo_px=8)
        engine.set_pooling(pooling)
        fresh = make_engine(model, EngineConfig(device="cuda"))
        fresh.set_pooling(pooling)
        np.testing.assert_array_equal(engine.upscale(window), fresh.upscale(window))


@pytest.mark.gpu
@needs_gpu
def test_a_gpu_without_memory_goes_on_with_smaller_windows() -> None:
    engine, reference = engines_of("carn", device="cuda")
    refuse_above(engine, 80, error=lambda: torch.OutOfMemoryError("CUDA out of memory"))
    window = window_of(tissue(), 0, 0, 200, 130, halo_px=engine.halo_px)
    for sr in engine.upscale_many([window, window]):
        assert largest_difference(sr, reference.upscale(window)) <= 2
