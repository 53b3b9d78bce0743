"""Blocks together are the one pass over the whole, whatever their size; damage stays local."""

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from carn.degradation.bicubic import SCALES
from carn.errors import CarnError, DamagedTileError
from carn.models import ModelName
from carn.models.bicubic import Bicubic, BicubicConfig, enlarge_bicubic
from carn.slides.slide import Rgb
from carn.upscaling import blocks, consistency
from carn.upscaling.blocks import (
    BlockResult,
    Damaged,
    LrBlock,
    block_consistency,
    block_region,
    num_blocks,
    read_block,
    upscale_block,
)
from carn.upscaling.calibration import calibrate
from carn.upscaling.engine import Engine, EngineConfig, make_engine, reference_engine
from carn.upscaling.lr_view import Box, InputConfig, LrView, open_view
from carn.upscaling.windows import CELL_PX, TissueCells
from tests.conftest import draw
from tests.upscaling.lab import DrawnSlide, small_carn, small_edsr, view_of, whole
from tests.upscaling.networks import network


def bicubic(scale: int) -> nn.Module:
    return Bicubic(BicubicConfig(), scale=scale).eval()


def upscale_all(
    view: LrView,
    engine: Engine,
    *,
    block_px: int,
    tissue: TissueCells | None = None,
    on_damage: Damaged = "fail",
) -> tuple[Rgb, list[BlockResult]]:
    """A view in blocks, joined, and the blocks' results."""
    scale = engine.scale
    extent = (view.extent[0] * scale, view.extent[1] * scale)
    sr = np.zeros((extent[1], extent[0], 3), dtype=np.uint8)
    results = []
    for index in range(math.prod(num_blocks(extent, block_px=block_px))):
        region = block_region(
            extent, block_px=block_px, index=index, scale=scale, halo_px=engine.halo_px
        )
        made = upscale_block(read_block(view, region, on_damage=on_damage), engine, tissue=tissue)
        sr[region.y0 : region.y1, region.x0 : region.x1] = made.pixels
        results.append(made)
    return sr, results


def steps(one: Rgb, other: Rgb) -> int:
    """The largest difference in grey levels."""
    assert one.shape == other.shape
    return int(np.abs(one.astype(int) - other).max())


class Repeating(Engine):
    """Stands for an engine: every LR px becomes scale x scale px of its colour."""

    def __init__(self, *, scale: int, halo_px: int = 4, window_px: int = 1024) -> None:
        self.scale, self.halo_px, self.window_px = scale, halo_px, window_px
        self.device = torch.device("cpu")
        self.seen: list[tuple[int, ...]] = []

    def upscale(self, window: Rgb) -> Rgb:
        self.seen.append(window.shape)
        inner = window[self.halo_px : -self.halo_px, self.halo_px : -self.halo_px]
        return inner.repeat(self.scale, axis=0).repeat(self.scale, axis=1)

    def upscale_many(self, windows: Iterable[Rgb]) -> Iterator[Rgb]:
        return map(self.upscale, windows)


# ------------------------------------------------------------------------------------- regions

extents = st.tuples(st.integers(1, 700), st.integers(1, 700))


@given(
    extent=extents,
    scale=st.sampled_from(SCALES),
    block_px=st.integers(60, 900),
    halo=st.sampled_from([0, 4, 36]),
)
def test_regions_share_out_every_px_once(
    extent: tuple[int, int], scale: int, block_px: int, halo: int
) -> None:
    extent_sr = (extent[0] * scale, extent[1] * scale)
    columns, rows = num_blocks(extent_sr, block_px=block_px)
    counts: dict[str, Counter[tuple[int, int]]] = {"x": Counter(), "y": Counter()}
    own_px, sr_px = 0, 0
    for index in range(columns * rows):
        region = block_region(extent_sr, block_px=block_px, index=index, scale=scale, halo_px=halo)
        counts["x"][region.x0, region.x1] += 1
        counts["y"][region.y0, region.y1] += 1
        own_px += region.own[2] * region.own[3]
        sr_px += region.sr_box[2] * region.sr_box[3]
        # The px below the block, and the context, and no more than the alignment besides.
        x, y, width, height = region.inner
        assert x % 4 == y % 4 == region.x % 4 == region.y % 4 == 0
        assert x * scale <= region.x0 < (x + 4) * scale
        assert region.x1 <= (x + width) * scale < region.x1 + scale
        assert region.y1 <= (y + height) * scale < region.y1 + scale
        assert region.margin_px >= max(halo, 4)
        assert x + width <= extent[0]
        assert (region.x, region.width) == (x - region.margin_px, width + 2 * region.margin_px)
    assert own_px == extent[0] * extent[1]
    assert sr_px == extent_sr[0] * extent_sr[1]
    for axis, number, side in (("x", columns, extent_sr[0]), ("y", rows, extent_sr[1])):
        spans = sorted(counts[axis])
        assert len(spans) == number
        assert [start for start, _ in spans] == list(range(0, side, block_px))
        assert [stop for _, stop in spans][:-1] == [start for start, _ in spans][1:]
        assert spans[-1][1] == side


def test_regions_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match=r"0\.\.5"):
        block_region((300, 200), block_px=100, index=6, scale=2, halo_px=4)
    with pytest.raises(ValueError, match="halo_px=6"):
        block_region((300, 200), block_px=100, index=0, scale=2, halo_px=6)


# ------------------------------------------------------------------------------ blocks and wholes


@settings(max_examples=30)
@given(
    extent=st.tuples(st.integers(1, 600), st.integers(1, 330)),
    scale=st.sampled_from(SCALES),
    block_px=st.integers(400, 1500),
    window_px=st.sampled_from([256, 512]),
    halo_px=st.sampled_from([4, 64]),  # with the larger one, windows hold unwanted cells
    share=st.sampled_from([0.0, 0.5, 1.0]),
)
def test_every_sr_px_is_written_once_and_where_it_belongs(
    extent: tuple[int, int], scale: int, block_px: int, window_px: int, halo_px: int, share: float
) -> None:
    pixels = draw(*extent)
    engine = Repeating(scale=scale, halo_px=halo_px, window_px=window_px)
    tissue = TissueCells.everywhere(extent)
    tissue.cells[:] = np.random.default_rng(block_px).random(tissue.cells.shape) < share
    num_written = 0
    paste = blocks._Making.paste

    def counting(self: blocks._Making, box: Box, sr: Rgb) -> None:
        nonlocal num_written
        assert sr.shape == (box[3] * scale, box[2] * scale, 3)
        kept, self.sr = self.sr, np.zeros_like(self.sr)
        paste(self, box, np.ones_like(sr))
        num_written += int(self.sr[..., 0].sum())
        self.sr = kept
        paste(self, box, sr)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks._Making, "paste", counting)
        sr, results = upscale_all(view_of(pixels), engine, block_px=block_px, tissue=tissue)
    assert num_written == sr.shape[0] * sr.shape[1]
    assert sum(r.num_inferred_px + r.num_background_px for r in results) == extent[0] * extent[1]
    expected = pixels.repeat(scale, axis=0).repeat(scale, axis=1)
    inferred = tissue.cells.repeat(CELL_PX * scale, axis=0).repeat(CELL_PX * scale, axis=1)
    inferred = inferred[: expected.shape[0], : expected.shape[1]]
    # Cells far from tissue hold the same picture, enlarged: nothing stays unwritten.
    assert np.abs(sr.astype(int) - expected).mean() < 20
    np.testing.assert_array_equal(sr[inferred], expected[inferred])
    if extent != (1, 1):  # which is flat
        assert sum(r.num_inferred_px for r in results) == inferred.sum() // scale**2


MODELS: dict[str, Callable[[int], nn.Module]] = {
    "bicubic": bicubic,
    "edsr": small_edsr,
    "carn": small_carn,
}


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("name", MODELS)
def test_blocks_are_one_pass_over_the_whole(name: str, scale: int) -> None:
    model = MODELS[name](scale)
    # A block and one px, odd sides, single px.
    side = -(-64 // scale)
    for extent in ((1, 1), (1, side + 1), (2 * side + 1, 1), (2 * side - 1, side + 1)):
        pixels = draw(*extent)
        view = view_of(pixels)
        engine = reference_engine(model)
        frozen = _with_frozen(model, view, engine)
        expected = whole(frozen, pixels, halo_px=engine.halo_px)
        for block_px in (64, 1000):
            sr, _ = upscale_all(view, engine, block_px=block_px)
            assert steps(sr, expected) <= 1, (extent, block_px)
    assert expected.std() > 10  # a picture, and no constant


@settings(max_examples=12)
@given(
    extent_sr=st.tuples(st.integers(8, 200), st.integers(8, 150)),
    scale=st.sampled_from(SCALES),
    block_px=st.integers(64, 250),
    name=st.sampled_from(sorted(MODELS)),
)
def test_blocks_of_any_size_are_one_pass_over_the_whole(
    extent_sr: tuple[int, int], scale: int, block_px: int, name: str
) -> None:
    model = MODELS[name](scale)
    pixels = draw(extent_sr[0] // scale, extent_sr[1] // scale, seed=3)
    view, engine = view_of(pixels), reference_engine(model)
    expected = whole(_with_frozen(model, view, engine), pixels, halo_px=engine.halo_px)
    sr, _ = upscale_all(view, engine, block_px=block_px)
    assert steps(sr, expected) <= 1


def _with_frozen(model: nn.Module, view: LrView, engine: Engine) -> nn.Module:
    from carn.upscaling.pooling import frozen

    pooling = calibrate(view, model, engine, num_probes=0).pooling
    return model if pooling is None else frozen(model, pooling)


def test_windows_on_the_cells_are_one_pass_too_and_the_engine_of_production() -> None:
    # Several cells and windows a block, and a fast engine instead of the reference.
    pixels = draw(530, 300)
    model = small_carn(2)
    view = view_of(pixels)
    engine = make_engine(model, EngineConfig(window_px=512, precision="fp32", device="cpu"))
    frozen = _with_frozen(model, view, engine)
    expected = whole(frozen, pixels, halo_px=engine.halo_px)
    for block_px in (1060, 700):
        sr, results = upscale_all(view, engine, block_px=block_px)
        assert steps(sr, expected) <= 1
        assert sum(r.num_inferred_px for r in results) == 530 * 300


@pytest.mark.parametrize("name", ["carn", "edsr", pytest.param("swdnet", marks=pytest.mark.slow)])
def test_blocks_of_a_self_ensemble_agree_wherever_they_are_cut(name: ModelName) -> None:
    # Sides that the grid does not divide: flips begin at the end.
    pixels = draw(75, 51)
    view, model = view_of(pixels), network(name, scale=3)
    settings = EngineConfig(precision="fp32", device="cpu", self_ensemble=True)
    engine = make_engine(model, settings)
    calibrate(view, model, engine, num_probes=0)
    whole_sr, _ = upscale_all(view, engine, block_px=1000)
    sr, _ = upscale_all(view, engine, block_px=100)
    assert steps(sr, whole_sr) <= 1
    engine = reference_engine(model)
    calibrate(view, model, engine, num_probes=0)
    plain, _ = upscale_all(view, engine, block_px=1000)
    assert steps(plain, whole_sr) > 0


def test_pooling_of_its_own_makes_blocks_disagree() -> None:
    # What the test above would find, were the poolings not frozen.
    pixels = draw(101, 75)
    pixels[:, 50:] //= 2
    model = small_carn(2)
    engine = reference_engine(model)
    sr, _ = upscale_all(view_of(pixels), engine, block_px=64)
    assert steps(sr, whole(model, pixels, halo_px=engine.halo_px)) > 1


# ---------------------------------------------------------------------------------- background


def test_background_is_enlarged_without_seams_and_tissue_is_inferred() -> None:
    pixels = draw(800, 530)
    tissue = TissueCells.everywhere((800, 530))
    tissue.cells[:] = False
    tissue.cells[:2, 1] = True
    tissue.cells[2, 3] = True
    model = small_edsr(2)
    engine = reference_engine(model)
    lr = torch.from_numpy(pixels).permute(2, 0, 1)[None].float()
    padded = torch.nn.functional.pad(lr, (4, 4, 4, 4), mode="reflect")
    enlarged = enlarge_bicubic(padded, scale=2)[0, :, 8:-8, 8:-8].clamp(0, 255).round()
    expected = enlarged.to(torch.uint8).permute(1, 2, 0).numpy()
    inferred = whole(model, pixels, halo_px=engine.halo_px)
    is_tissue = tissue.cells.repeat(512, axis=0).repeat(512, axis=1)[:1060, :1600]
    kept = []
    for block_px in (1600, 700):
        sr, results = upscale_all(view_of(pixels), engine, block_px=block_px, tissue=tissue)
        assert steps(sr[is_tissue], inferred[is_tissue]) <= 1
        # Rounded between two passes: rarely by two levels off what is rounded once.
        assert steps(sr[~is_tissue], expected[~is_tissue]) <= 2
        assert (np.abs(sr[~is_tissue].astype(int) - expected[~is_tissue]) > 1).mean() < 0.01
        assert sum(r.num_inferred_px for r in results) == is_tissue.sum() // 4
        kept.append(sr)
    assert steps(*kept) <= 1


def test_large_windows_do_not_infer_what_lies_between() -> None:
    # Of four cells three are tissue: one window of four is cheaper, and the fourth stays enlarged.
    tissue = TissueCells.everywhere((512, 512))
    tissue.cells[1, 1] = False
    engine = Repeating(scale=2, halo_px=64)
    pixels = draw(512, 512)
    sr, (made,) = upscale_all(view_of(pixels), engine, block_px=4096, tissue=tissue)
    assert engine.seen == [(640, 640, 3)]
    assert made.num_inferred_px == 3 * 256**2
    assert (sr[::2, ::2] == pixels).all(axis=2)[:256].all()
    assert not (sr[::2, ::2] == pixels).all(axis=2)[256:, 256:].all()


def test_flat_cells_get_what_the_network_makes_of_their_colour() -> None:
    pixels = draw(600, 260)
    pixels[:, 256 - 40 :] = (250, 251, 249)
    model = small_edsr(3)
    engine = reference_engine(model)
    sr, (made,) = upscale_all(view_of(pixels), engine, block_px=4096)
    assert made.num_background_px == (600 - 256) * 260
    expected = whole(model, pixels, halo_px=engine.halo_px)
    assert steps(sr, expected) <= 1
    assert steps(sr[:, 768:], np.full_like(sr[:, 768:], 250)) > 1  # it is not exact, as none is


def test_a_blank_background_costs_no_network() -> None:
    tissue = TissueCells.everywhere((600, 600))
    tissue.cells[:] = False
    engine = Repeating(scale=2)
    pixels = np.full((600, 600, 3), 243, dtype=np.uint8)
    sr, _ = upscale_all(view_of(pixels), engine, block_px=512, tissue=tissue)
    assert (sr == 243).all()
    assert not engine.seen


def test_what_does_not_fit_is_refused() -> None:
    view = view_of(draw(40, 30))
    region = block_region((80, 60), block_px=64, index=0, scale=2, halo_px=8)
    read = read_block(view, region)
    with pytest.raises(ValueError, match="wants 12"):
        upscale_block(read, Repeating(scale=2, halo_px=12))
    with pytest.raises(ValueError, match="makes x3"):
        upscale_block(read, Repeating(scale=3))
    with pytest.raises(ValueError, match="tissue cells"):
        upscale_block(read, Repeating(scale=2), tissue=TissueCells.everywhere((41, 30)))
    other = block_region((80, 62), block_px=64, index=0, scale=2, halo_px=8)
    with pytest.raises(ValueError, match="80, 62"):
        read_block(view, other)


# -------------------------------------------------------------------------------------- damage


def damaged_view(*bad: tuple[int, int, int, int], num_levels: int = 2) -> LrView:
    base = draw(900, 700)
    levels = [base, base[::2, ::2]][:num_levels]
    return LrView(DrawnSlide(*levels, bad=bad), InputConfig())


def test_damage_fails_unless_it_may_pass() -> None:
    view = damaged_view((300, 260, 128, 128))
    with pytest.raises(DamagedTileError):
        upscale_all(view, Repeating(scale=2), block_px=4096)
    # Other blocks do not notice.
    region = block_region((1800, 1400), block_px=400, index=0, scale=2, halo_px=4)
    np.testing.assert_array_equal(
        read_block(view, region).pixels, view.read(region.x, region.y, region.width, region.height)
    )


@pytest.mark.parametrize("block_px", [4096, 600])
def test_damage_is_enlarged_from_the_coarser_level_and_listed(block_px: int) -> None:
    box = (300, 260, 60, 120)
    view = damaged_view(box)
    base = view.slide.pixels[0]  # type: ignore[attr-defined]
    sr, results = upscale_all(view, Repeating(scale=2), block_px=block_px, on_damage="upsample")
    listed = [damage for made in results for damage in made.damage]
    # On the grid of 128 px: 256..384 x 256..384, cut where a block ends at 300 LR px.
    covered = np.zeros((700, 900), dtype=int)
    for damage in listed:
        assert "enlarged from a coarser level" in damage.reason
        assert "torn" in damage.reason
        place = np.s_[
            damage.y_l0 : damage.y_l0 + damage.height, damage.x_l0 : damage.x_l0 + damage.width
        ]
        covered[place] += 1
    assert covered.max() == 1
    assert covered[260:380, 300:360].all()
    assert covered.sum() <= 128 * 128
    assert len(listed) == (1 if block_px == 4096 else 4) or covered.sum() < 128 * 128
    # The cell of 256..512 is enlarged; everything else is inferred from true pixels.
    expected = base.repeat(2, axis=0).repeat(2, axis=1)
    clean = np.ones(sr.shape[:2], dtype=bool)
    clean[512:1024, 512:1024] = False
    np.testing.assert_array_equal(sr[clean], expected[clean])
    assert sum(made.num_background_px for made in results) == 256 * 256
    # The stand-in is at the right place: closer than anything shifted by a few px would be.
    damaged = sr[2 * 270 : 2 * 370, 2 * 305 : 2 * 355].astype(int)
    true = expected[2 * 270 : 2 * 370, 2 * 305 : 2 * 355]
    shifted = expected[2 * 274 : 2 * 374, 2 * 309 : 2 * 359]
    assert np.abs(damaged - true).mean() < np.abs(damaged - shifted).mean()


def test_damage_without_a_coarser_level_is_white() -> None:
    view = damaged_view((0, 0, 10, 10), (890, 690, 10, 10), num_levels=1)
    sr, (made,) = upscale_all(view, Repeating(scale=2), block_px=4096, on_damage="upsample")
    assert (sr[:240, :240] == 255).all()
    assert {(d.x_l0, d.y_l0, d.width, d.height) for d in made.damage} == {
        (0, 0, 128, 128),
        (768, 640, 132, 60),  # two squares of the grid, one reason
    }
    assert all("filled with white" in damage.reason for damage in made.damage)


def test_damage_of_the_coarser_level_too_passes_to_the_next() -> None:
    base = np.full((512, 512, 3), 200, dtype=np.uint8)
    slide = DrawnSlide(
        base, base[::2, ::2], base[::4, ::4] - 50, bad=((0, 0, 512, 512),), bad_levels=(0, 1)
    )
    region = block_region((1024, 1024), block_px=4096, index=0, scale=2, halo_px=8)
    read = read_block(LrView(slide, InputConfig()), region, on_damage="upsample")
    assert (read.pixels == 150).all()


def test_damage_of_a_file(write_slide: Callable[..., Path]) -> None:
    import tifffile

    path = write_slide(extent=(600, 400), resolution=(40_000, 40_000), resolutionunit="CENTIMETER")
    with tifffile.TiffFile(path) as tiff:
        page = tiff.pages[0]
        offset, length = page.dataoffsets[7], page.databytecounts[7]  # row 1, column 2 of 5
    with path.open("r+b") as file:
        file.seek(offset + 2)
        file.write(b"\0" * (length - 2))
    with open_view(path, InputConfig()) as view:
        with pytest.raises(DamagedTileError):
            upscale_all(view, Repeating(scale=2), block_px=4096)
        _, (made,) = upscale_all(view, Repeating(scale=2), block_px=4096, on_damage="upsample")
    (damage,) = made.damage
    assert (damage.x_l0, damage.y_l0, damage.width, damage.height) == (256, 128, 128, 128)


# ---------------------------------------------------------------------------------------- bytes


def test_blocks_go_through_bytes() -> None:
    view = damaged_view((300, 260, 128, 128))
    region = block_region((1800, 1400), block_px=900, index=0, scale=2, halo_px=8)
    read = read_block(view, region, on_damage="upsample")
    found = LrBlock.from_bytes(read.to_bytes())
    assert found.region == read.region
    assert found.damage == read.damage
    assert found.damaged == read.damaged
    assert len(found.damage) >= 1
    np.testing.assert_array_equal(found.pixels, read.pixels)
    for content in (b"", b"ab", read.to_bytes()[:-1], b"\0\0\0\0" + read.to_bytes()):
        with pytest.raises(CarnError, match="read it again"):
            LrBlock.from_bytes(content)


def test_results_carry_the_consistency_of_their_cells() -> None:
    pixels = draw(300, 200)
    view = view_of(pixels)
    sr, results = upscale_all(view, Repeating(scale=2), block_px=256)
    extent_sr = (600, 400)
    parts = []
    for index, made in enumerate(results):
        region = block_region(extent_sr, block_px=256, index=index, scale=2, halo_px=4)
        errors = block_consistency(read_block(view, region, on_damage="fail"), made.pixels)
        parts.append((region.sr_box, errors))
    joined = consistency.join(parts, extent_sr=extent_sr, scale=2)
    assert joined.shape == (4, 5)
    whole_map = consistency.consistency(
        sr, pixels, sr_box=(0, 0, *extent_sr), lr_corner=(0, 0), extent_sr=extent_sr, scale=2
    )
    np.testing.assert_allclose(joined, whole_map, rtol=0.25)


def test_facts_of_damage_are_json_values() -> None:
    view = damaged_view((300, 260, 128, 128))
    _, (made,) = upscale_all(view, Repeating(scale=2), block_px=4096, on_damage="upsample")
    assert all(
        type(value) in (int, str)
        for damage in made.damage
        for value in dataclasses.asdict(damage).values()
    )
