"""How sharp and noisy slides are, on images that the estimates were not calibrated on."""

import csv
import dataclasses
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tifffile
import yaml
from PIL import Image
from scipy import ndimage

from carn.degradation import __main__ as program
from carn.degradation import describe as module
from carn.degradation.config import DegradationConfig
from carn.degradation.describe import (
    CALIBRATION,
    MAX_NOISE_LEVELS,
    Estimate,
    PixelEstimates,
    SlideDescription,
    calibrate,
    describe_slide,
    describe_windows,
)
from carn.degradation.jpeg import through_jpeg
from carn.degradation.scanner import Degradation, apply
from carn.errors import MissingObjectError, SlideError
from carn.slides.compression import Compression, JpegQuality
from tests.conftest import Bucket, draw

STORED = [None, (60, "4:2:0"), (75, "4:2:2"), (90, "4:4:4")]


def glass(noise: float, *, level: int = 235, side: int = 256, seed: int = 0) -> np.ndarray:
    """Empty glass under a lamp that is not quite even, with noise as Degradation adds it."""
    hr = np.full((2 * side, 2 * side, 3), level, dtype=np.float32)
    hr -= np.linspace(0, 6, 2 * side)[:, None, None]
    way = Degradation(noise_levels=noise, mean_weight=1.0)
    return apply(hr.round().astype(np.uint8), way, scale=2, rng=np.random.default_rng(seed))


def tissue(*, side: int = 256, seed: int = 0) -> np.ndarray:
    """Something pink with detail at all sizes."""
    rng = np.random.default_rng(seed)
    white = rng.normal(size=(side, side))
    detail = sum(
        size * ndimage.gaussian_filter(white, size, mode="wrap") * 12 for size in (0.5, 1, 2, 4)
    )
    stain = np.array([0.5, 1.0, 0.4])
    return np.clip(np.array([200, 140, 190]) + detail[..., None] * stain, 0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def test_images(shared_data: Path) -> list[np.ndarray]:
    """HR of 40x slides of other patients than those of the calibration."""
    table = shared_data / "PROVENANCE.tsv"
    if not table.is_file():
        pytest.skip("the real samples have no PROVENANCE.tsv")
    with table.open(newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    names = [
        row["file"]
        for row in rows
        if row["file"].startswith("patches/")
        and row["licence_class"] == "permissive"
        and not row["scale"].startswith("20x")
        and ("proposed split: test" in row["note"] or "/tumor_004_" in row["file"])
        and (shared_data / row["file"]).is_file()
    ]
    if len(names) < 20:
        pytest.skip(f"only {len(names)} of the images for tests are among the real samples")
    return [np.asarray(Image.open(shared_data / name).convert("RGB")) for name in names]


# ----------------------------------------------------------------------------- on real tissue


@pytest.mark.parametrize("blur_px", [0.0, 0.5, 0.8, 1.2])
def test_blur_is_within_its_interval(test_images: list[np.ndarray], blur_px: float) -> None:
    errors, num_within = [], 0
    for number, hr in enumerate(test_images):
        rng = np.random.default_rng([2, number])
        way = Degradation(
            blur_px=blur_px, mean_weight=float(number % 2), noise_levels=float(number % 3)
        )
        lossless = apply(hr, way, scale=2, rng=rng)
        stored = STORED[number % len(STORED)]
        lr = lossless
        if stored is not None:
            lr = through_jpeg(lossless, quality=stored[0], subsampling=stored[1])
        found = describe_windows([lr], is_lossless=stored is None).blur_px
        assert found is not None
        num_within += found.low <= blur_px <= found.high
        errors.append(blur_px**2 - found.value**2)
    # Nine of ten over all; 28 images leave some to chance.
    assert num_within >= 0.8 * len(test_images)
    assert abs(np.median(errors)) < 0.25


@pytest.mark.parametrize("noise", [0.0, 1.0, 2.0, 3.0])
def test_noise_is_within_its_interval(test_images: list[np.ndarray], noise: float) -> None:
    num_within = 0
    for number, hr in enumerate(test_images):
        way = Degradation(blur_px=(0.0, 0.6, 1.2)[number % 3], mean_weight=0.5, noise_levels=noise)
        lr = apply(hr, way, scale=2, rng=np.random.default_rng([3, number]))
        found = describe_windows([lr], is_lossless=True).noise_levels
        assert found is not None
        num_within += found.low <= noise <= found.high
    assert num_within >= 0.8 * len(test_images)


def test_estimates_tell_ways_apart(test_images: list[np.ndarray]) -> None:
    """Intervals so wide that they hold anything would pass the tests above."""

    def median(way: Degradation) -> tuple[float, float, float]:
        found = [
            describe_windows(
                [apply(hr, way, scale=2, rng=np.random.default_rng(number))], is_lossless=True
            )
            for number, hr in enumerate(test_images)
        ]
        blurs = [one.blur_px for one in found if one.blur_px is not None]
        noises = [one.noise_levels for one in found if one.noise_levels is not None]
        falls = [one.fall_db for one in found if one.fall_db is not None]
        widths = [blur.high - blur.low for blur in blurs]
        assert np.median(widths) < 0.9
        return (
            float(np.median([blur.value for blur in blurs])),
            float(np.median([noise.value for noise in noises])),
            float(np.median(falls)),
        )

    sharp = median(Degradation(mean_weight=0.5))
    soft = median(Degradation(mean_weight=0.5, blur_px=1.2))
    noisy = median(Degradation(mean_weight=0.5, noise_levels=3.0))
    assert sharp[0] < 0.5 < 1.0 < soft[0]
    assert sharp[2] + 3 < soft[2]
    assert sharp[1] < 0.8 < 2.5 < noisy[1]
    assert abs(soft[1] - sharp[1]) < 0.7


def test_sharpening_is_seen_where_it_is_strong(test_images: list[np.ndarray]) -> None:
    def share(amount: float) -> float:
        way = Degradation(mean_weight=1.0, sharpen_amount=amount)
        return float(
            np.mean(
                [
                    describe_windows(
                        [apply(hr, way, scale=2, rng=np.random.default_rng(0))]
                    ).is_sharpened
                    for hr in test_images
                ]
            )
        )

    assert share(0.0) <= 0.2
    assert share(2.0) >= 0.6


# ------------------------------------------------------------------------------------- on glass


@pytest.mark.parametrize("noise", [0.0, 1.0, 2.0, 3.0])
@pytest.mark.parametrize("level", [200, 235])
def test_flat_glass_tells_noise(noise: float, level: int) -> None:
    found = describe_windows([tissue(), glass(noise, level=level)], is_lossless=True)
    assert found.has_flat_place
    assert found.noise_levels is not None
    assert found.noise_levels.low <= noise <= found.noise_levels.high
    assert found.noise_levels.high - found.noise_levels.low < 1.3


def test_without_glass_it_is_said() -> None:
    assert not describe_windows([tissue()]).has_flat_place


def test_dust_on_glass_is_not_noise() -> None:
    window = glass(1.0)
    rng = np.random.default_rng(1)
    for y, x in rng.integers(0, 250, (40, 2)):
        window[y : y + 3, x : x + 3] = 90
    found = describe_windows([window], is_lossless=True).noise_levels
    assert found is not None
    assert found.value == pytest.approx(1.0, abs=0.5)


def test_jpeg_leaves_room_for_noise_that_it_took() -> None:
    window = through_jpeg(glass(2.0), quality=80)
    found = describe_windows([window])
    assert found.is_noise_hidden
    assert found.noise_levels is not None
    assert found.noise_levels.low <= 2.0 <= found.noise_levels.high == MAX_NOISE_LEVELS
    assert not describe_windows([glass(2.0)], is_lossless=True).is_noise_hidden


def test_glass_alone_has_no_sharpness() -> None:
    found = describe_windows([glass(1.0)])
    assert (found.blur_px, found.fall_db, found.is_sharpened) == (None, None, False)


def test_white_alone_tells_nothing() -> None:
    found = describe_windows([np.full((128, 128, 3), 255, dtype=np.uint8)])
    assert (found.blur_px, found.noise_levels, found.has_flat_place) == (None, None, False)


# ------------------------------------------------------------------------------------- contract


@pytest.mark.parametrize(
    "windows",
    [
        [],
        [np.zeros((63, 100, 3), dtype=np.uint8)],
        [np.zeros((100, 100), dtype=np.uint8)],
        [np.zeros((100, 100, 4), dtype=np.uint8)],
        [np.zeros((100, 100, 3), dtype=np.float32)],
    ],
)
def test_other_windows_are_refused(windows: list[np.ndarray]) -> None:
    with pytest.raises(ValueError, match="window"):
        describe_windows(windows)


def test_windows_are_left_as_they_are_and_order_does_not_matter() -> None:
    windows = [tissue(seed=0), tissue(seed=1), glass(1.0)]
    for window in windows:
        window.flags.writeable = False
    found, turned = describe_windows(windows), describe_windows(windows[::-1])
    assert found.blur_px is not None
    assert turned.blur_px is not None
    assert found.blur_px.value == pytest.approx(turned.blur_px.value, rel=1e-4)


def test_many_windows_take_little_time_and_memory() -> None:
    windows = [tissue(seed=number) for number in range(16)]
    describe_windows(windows)
    times = []
    for _ in range(5):
        start = time.process_time()
        describe_windows(windows)
        times.append(time.process_time() - start)
    # 30 ms on one core; a machine may be slow.
    assert min(times) < 0.2
    tracemalloc.start()
    describe_windows(windows)
    assert tracemalloc.get_traced_memory()[1] < 64e6
    tracemalloc.stop()


def test_calibration_can_be_made_again() -> None:
    images = {f"{number}.png": tissue(side=256, seed=number) for number in range(8)}
    for number in range(8):
        images[f"{number}.png"][:, :100] = glass(0.0, side=256)[:, :100]
    for number in range(4):
        images[f"{number}.png"] = tissue(side=256, seed=number)

    found = calibrate(images, num_ways=6, num_folds=2)

    assert found == calibrate(images, num_ways=6, num_folds=2)
    for name in ("blur", "colour_noise", "flat_noise"):
        line, known = getattr(found, name), getattr(CALIBRATION, name)
        assert len(line.weights) == len(known.weights)
        assert line.low <= 0 <= line.high
    lr = apply(images["0.png"], Degradation(blur_px=1.0), scale=2, rng=np.random.default_rng(0))
    blur = describe_windows([lr], calibration=found).blur_px
    assert blur is not None
    assert blur.low <= 1.0 <= blur.high


# --------------------------------------------------------------------------------------- slides


def tissue_slide(write_slide: Callable[..., Path], name: str = "a.tif", **options: object) -> Path:
    """Tissue of 512 px on the left, glass on the right."""
    pixels = np.concatenate([tissue(side=512), glass(0.0, side=512)], axis=1)
    options = {"resolution": (20_000, 20_000), "resolutionunit": "CENTIMETER", **options}
    return write_slide(name, pixels=pixels, **options)


def test_a_slide_is_described(write_slide: Callable[..., Path]) -> None:
    found = describe_slide(tissue_slide(write_slide))
    assert found.extent == (1024, 512)
    assert found.mpp == pytest.approx((0.5, 0.5))
    assert found.is_calibrated
    assert found.compression.quality is not None
    assert found.compression.quality.quality == 90
    assert found.num_windows == (4, 4)
    assert found.pixels.has_flat_place
    assert found.pixels.is_noise_hidden
    assert found.pixels.blur_px is not None


def test_levels_have_their_own_px(write_slide: Callable[..., Path]) -> None:
    found = describe_slide(tissue_slide(write_slide), level=1)
    assert found.extent == (512, 256)
    assert found.mpp == pytest.approx((1.0, 1.0))
    assert not found.is_calibrated
    assert any("calibrated for" in note for note in found.notes)


def test_lossless_slides_tell_noise(write_slide: Callable[..., Path]) -> None:
    found = describe_slide(tissue_slide(write_slide, compression="deflate"))
    assert found.compression.is_lossless
    assert not found.pixels.is_noise_hidden
    assert found.pixels.noise_levels is not None
    assert found.pixels.noise_levels.high < MAX_NOISE_LEVELS


def test_mpp_can_be_given(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    Image.fromarray(tissue()).save(path)
    assert describe_slide(path).mpp is None
    assert not describe_slide(path).is_calibrated
    assert describe_slide(path, mpp_um=0.5).is_calibrated


def test_a_damaged_place_is_left_out(
    write_slide: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    path = tissue_slide(write_slide, num_levels=1)
    whole = describe_slide(path)
    content = bytearray(path.read_bytes())
    with tifffile.TiffFile(path) as tiff:
        offset, length = tiff.pages[0].dataoffsets[0], tiff.pages[0].databytecounts[0]
    # The picture that tissue is looked for on comes from a level of its own, in real slides.
    mask = module.find_tissue(module.open_slide(path))
    content[offset : offset + length] = bytes(length)
    path.write_bytes(content)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "find_tissue", lambda _: mask)
        found = describe_slide(path)
    assert found.num_windows[0] == whole.num_windows[0] - 1
    assert "left out of the estimates" in caplog.text


def test_what_cannot_be_described_is_refused(
    tmp_path: Path, write_slide: Callable[..., Path]
) -> None:
    with pytest.raises(MissingObjectError):
        describe_slide(tmp_path / "none.tif")
    path = tissue_slide(write_slide)
    with pytest.raises(SlideError, match=r"levels 0\.\.2, not 3"):
        describe_slide(path, level=3)
    with pytest.raises(ValueError, match="num_windows=0"):
        describe_slide(path, num_windows=0)
    Image.fromarray(draw(100, 60)).save(tmp_path / "small.png")
    with pytest.raises(SlideError, match="100 x 60 px"):
        describe_slide(tmp_path / "small.png")


def test_remote_slides(s3: Bucket, write_slide: Callable[..., Path]) -> None:
    path = tissue_slide(write_slide)
    found = describe_slide(s3.put("a/b.tif", path))
    assert dataclasses.replace(found, uri="") == dataclasses.replace(describe_slide(path), uri="")


@pytest.mark.parametrize(
    ("name", "quality"),
    [("CMU-1-Small-Region.svs", 30), ("camelyon16_tumor_001_level5.tif", 80)],
)
def test_real_slides(shared_data: Path, name: str, quality: int) -> None:
    path = shared_data / "slides" / name
    if not path.is_file():
        pytest.skip(f"{name} is not among the real samples")
    found = describe_slide(path)
    assert found.compression.quality is not None
    assert found.compression.quality.quality == quality
    assert found.num_windows[0] == 16
    assert found.pixels.blur_px is not None


# -------------------------------------------------------------------------------------- program


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr("sys.argv", ["carn.degradation", *map(str, arguments)])
    return program.cli()


def test_program_describes_and_writes(
    write_slide: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    tissue_slide(write_slide, "slides/a.tif")
    tissue_slide(write_slide, "slides/b.tif", is_rgb=True)
    output = tmp_path / "scanner.yaml"

    assert run(monkeypatch, "describe", tmp_path / "slides", "--output", output) == 0

    printed = capsys.readouterr().out
    assert "1024 x 512 px on level 0, 0.5 x 0.5 um per px" in printed
    assert "quality 90 by ijg tables (exact), chroma 4:2:0" in printed
    assert "RGB, 4:4:4" in printed
    text = output.read_text()
    settings = yaml.safe_load(text)
    assert settings["degradation"] == "scanner"
    assert settings["lr_variants"] == 8
    assert settings["jpeg_share"] == 1.0
    assert settings["jpeg_quality"] == [90, 90]
    assert settings["jpeg_subsampling"] == ["4:4:4", "4:2:0"]
    assert settings["jpeg_tables"] == ["ijg"]
    config = DegradationConfig(
        **{
            key: tuple(value) if isinstance(value, list) else value
            for key, value in settings.items()
        }
    )
    assert config.sampling == "mixed"
    assert "a.tif" in text
    assert "b.tif" in text


def test_one_bad_slide_does_not_stop_others(
    write_slide: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    good = tissue_slide(write_slide, "good.tif")
    cut = tmp_path / "cut.tif"
    cut.write_bytes(good.read_bytes()[:20_000])
    output = tmp_path / "scanner.yaml"

    status = run(monkeypatch, "describe", cut, tmp_path / "none.tif", good, "--output", output)

    found = capsys.readouterr()
    assert status == 2
    assert str(good) in found.out
    complaints = found.err.splitlines()
    assert len(complaints) == 3
    assert str(cut) in complaints[0]
    assert str(tmp_path / "none.tif") in complaints[1]
    assert "2 could not be read" in complaints[2]
    assert "good.tif" in output.read_text()
    assert "cut.tif" not in output.read_text()


def test_nothing_is_overwritten_unasked(
    write_slide: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tissue_slide(write_slide)
    output = tmp_path / "scanner.yaml"
    output.write_text("mine")

    assert run(monkeypatch, "describe", path, "--output", output) == 2
    assert output.read_text() == "mine"
    assert "--overwrite" in capsys.readouterr().err
    assert run(monkeypatch, "describe", path, "--output", output, "--overwrite") == 0
    assert "jpeg_quality" in output.read_text()


def test_globs_and_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(2):
        Image.fromarray(tissue(seed=number)).save(tmp_path / f"{number}.png")
    assert run(monkeypatch, "describe", tmp_path / "*.png", tmp_path / "0.png") == 0
    printed = capsys.readouterr().out
    assert printed.count("lossless (PNG)") == 2
    assert "um per px not known" in printed


def test_remote_globs_and_output(
    s3: Bucket, write_slide: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    s3.put("lab/a.tif", tissue_slide(write_slide))
    output = s3.uri("out/scanner.yaml")
    assert run(monkeypatch, "describe", s3.uri("lab/*.tif"), "--output", output) == 0
    assert yaml.safe_load(s3.get("out/scanner.yaml"))["jpeg_quality"] == [90, 90]
    assert run(monkeypatch, "describe", s3.uri("lab/*.tif"), "--output", output) == 2


def description(
    *,
    blur: Estimate | None = None,
    noise: Estimate | None = None,
    quality: JpegQuality | None = None,
    mpp: float | None = 0.5,
    is_sharpened: bool = False,
    **compression: object,
) -> SlideDescription:
    codec = "lossless" if quality is None else "jpeg"
    values = {"codec": codec, "name": codec, "quality": quality, **compression}
    return SlideDescription(
        uri="/a.tif",
        extent=(1000, 1000),
        level=0,
        mpp=None if mpp is None else (mpp, mpp),
        vendor="generic-tiff",
        compression=Compression(**values),  # type: ignore[arg-type]
        pixels=PixelEstimates(
            fall_db=None if blur is None else 12.0,
            blur_px=blur,
            is_sharpened=is_sharpened,
            noise_levels=noise,
            is_noise_hidden=quality is not None,
            has_flat_place=False,
        ),
        num_windows=(16, 0),
    )


def jpeg(quality: int, *, tables: str = "ijg", is_exact: bool = True) -> JpegQuality:
    return JpegQuality(
        tables=tables,  # type: ignore[arg-type]
        quality=quality,
        is_exact=is_exact,
        luma_distance=0.0,
        chroma_distance=0.0,
    )


def test_ranges_cover_all_slides() -> None:
    settings = yaml.safe_load(
        program.scanner_yaml(
            [
                description(
                    blur=Estimate(value=0.5, low=0.204, high=0.7),
                    noise=Estimate(value=1.0, low=0.5, high=1.5),
                ),
                description(
                    blur=Estimate(value=0.9, low=0.6, high=1.111),
                    noise=Estimate(value=2.0, low=1.5, high=2.5),
                    quality=jpeg(70),
                    subsampling="4:1:1",
                ),
                description(
                    quality=jpeg(85, tables="robidoux", is_exact=False), subsampling="4:2:2"
                ),
                # A 40x slide: its blur is told in px of another size.
                description(blur=Estimate(value=2.0, low=1.9, high=2.1), mpp=0.25),
                description(codec="unknown"),
            ]
        )
    )
    assert settings["blur_px"] == [0.2, 1.12]
    assert settings["blur_share"] == 1.0
    assert settings["noise_levels"] == [0.5, 2.5]
    assert settings["jpeg_quality"] == [70, 85]
    assert settings["jpeg_share"] == 0.5
    assert settings["jpeg_subsampling"] == ["4:2:2", "4:2:0"]
    assert settings["jpeg_tables"] == ["ijg", "robidoux"]
    assert settings["sharpen_share"] == 0.0


def test_what_is_not_known_takes_the_defaults() -> None:
    text = program.scanner_yaml([description(codec="unknown", mpp=None)])
    settings = yaml.safe_load(text)
    defaults = DegradationConfig()
    assert tuple(settings["blur_px"]) == defaults.blur_px
    assert settings["blur_share"] == defaults.blur_share
    assert tuple(settings["noise_levels"]) == defaults.noise_levels
    assert settings["jpeg_share"] == defaults.jpeg_share
    assert "jpeg_quality" not in settings
    assert text.count("The default") >= 4


def test_sharpened_lossless_slides() -> None:
    none = Estimate(value=0.0, low=0.0, high=0.0)
    settings = yaml.safe_load(program.scanner_yaml([description(blur=none, is_sharpened=True)]))
    assert (settings["blur_px"], settings["blur_share"]) == ([0.0, 0.0], 0.0)
    assert settings["sharpen_share"] == 1.0
    assert settings["jpeg_share"] == 0.0


def test_program_calibrates(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(program, "calibrate", lambda images, num_ways: (len(images), num_ways))
    for number in range(3):
        Image.fromarray(tissue(seed=number)).save(tmp_path / f"{number}.png")
    assert run(monkeypatch, "calibrate", tmp_path, "--ways", 5) == 0
    assert capsys.readouterr().out == "CALIBRATION = (3, 5)\n"
