"""Heads of BigTIFFs, read by tifffile; tiles are somebody else's."""

import io
import json

import numpy as np
import pytest
import tifffile

from carn.slides.slide_output import NOTICE, OutputSpec, SlideFormat, level_extents, num_tiles
from carn.slides.tiff_head import LevelTables, head_bytes, make_head


def spec_of(
    extent: tuple[int, int] = (5000, 3001),
    *,
    mpp: tuple[float, float] | None = (0.125, 0.1217),
    **form: object,
) -> OutputSpec:
    return OutputSpec(
        uri="slide.tif",
        work_uri="work",
        extent=extent,
        block_px=1024,
        mpp=mpp,
        provenance={"checkpoint": "sha256:1234", "scanner": "Häckel", "scale": 2},
        format=SlideFormat(**{"tile_px": 128, **form}),
    )


def tables_of(spec: OutputSpec) -> list[LevelTables]:
    rng = np.random.default_rng(0)
    sizes = [
        np.prod(num_tiles(extent, spec.format.tile_px)) for extent in level_extents(spec.extent)
    ]
    return [
        LevelTables(
            offsets=rng.integers(2**33, 2**40, size, dtype=np.uint64),
            byte_counts=rng.integers(1, 2**32, size, dtype=np.uint32),
        )
        for size in sizes
    ]


def test_every_level_says_what_it_is_and_where() -> None:
    spec = spec_of()
    tables = tables_of(spec)
    head = make_head(spec, tables=tables, icc_profile=b"profile of 19 bytes")
    assert len(head) == head_bytes(spec, icc_profile=b"profile of 19 bytes")
    with tifffile.TiffFile(io.BytesIO(head)) as tiff:
        assert tiff.is_bigtiff
        assert [(page.imagewidth, page.imagelength) for page in tiff.pages] == [
            (5000, 3001),
            (2500, 1501),
            (1250, 751),
            (625, 376),
        ]
        for level, (page, table) in enumerate(zip(tiff.pages, tables, strict=True)):
            assert np.array_equal(page.dataoffsets, table.offsets)
            assert np.array_equal(page.databytecounts, table.byte_counts)
            assert page.subfiletype == (0 if level == 0 else 1)
            assert not page.subifds
            assert page.tags[34675].value == b"profile of 19 bytes"
            assert page.tags["ResolutionUnit"].value == 3
            for tag, mpp in (("XResolution", 0.125), ("YResolution", 0.1217)):
                num, den = page.tags[tag].value
                assert 10_000 * den / num == pytest.approx(mpp * 2**level, rel=1e-9)
            assert page.tags["YCbCrSubSampling"].value == (2, 2)
            assert (page.compression, page.photometric) == (7, 6)


def test_level_0_describes_the_slide_in_ascii() -> None:
    spec = spec_of()
    head = make_head(spec, tables=tables_of(spec), icc_profile=None)
    with tifffile.TiffFile(io.BytesIO(head)) as tiff:
        says = json.loads(tiff.pages[0].description)
        assert says == {
            "notice": NOTICE,
            "mpp_um": [0.125, 0.1217],
            "provenance": spec.provenance,
        }
        assert "not for primary diagnosis" in NOTICE
        assert tiff.pages[0].description.isascii()
        assert all("ImageDescription" not in page.tags for page in tiff.pages[1:])
        assert all(34675 not in page.tags for page in tiff.pages)


@pytest.mark.parametrize(("subsampling", "factors"), [("422", (2, 1)), ("444", (1, 1))])
def test_subsampling_is_named(subsampling: str, factors: tuple[int, int]) -> None:
    spec = spec_of(subsampling=subsampling)
    head = make_head(spec, tables=tables_of(spec), icc_profile=None)
    with tifffile.TiffFile(io.BytesIO(head)) as tiff:
        assert tiff.pages[0].tags["YCbCrSubSampling"].value == factors


def test_lossless_is_rgb_with_the_predictor() -> None:
    spec = spec_of(compression="lossless")
    head = make_head(spec, tables=tables_of(spec), icc_profile=None)
    with tifffile.TiffFile(io.BytesIO(head)) as tiff:
        page = tiff.pages[-1]
        assert (page.compression, page.photometric, page.predictor) == (8, 2, 2)
        assert "YCbCrSubSampling" not in page.tags


def test_without_mpp_no_resolution_is_claimed() -> None:
    spec = spec_of(mpp=None)
    head = make_head(spec, tables=tables_of(spec), icc_profile=None)
    with tifffile.TiffFile(io.BytesIO(head)) as tiff:
        for page in tiff.pages:
            assert not {"XResolution", "YResolution", "ResolutionUnit"} & {
                tag.name for tag in page.tags
            }


def test_one_tile_and_one_level_fit_into_the_entries() -> None:
    spec = spec_of((1, 1))
    table = LevelTables(offsets=np.array([2**40], np.uint64), byte_counts=np.array([7], np.uint32))
    head = make_head(spec, tables=[table], icc_profile=None)
    with tifffile.TiffFile(io.BytesIO(head)) as tiff:
        assert len(tiff.pages) == 1
        assert (tiff.pages[0].dataoffsets, tiff.pages[0].databytecounts) == ((2**40,), (7,))


@pytest.mark.parametrize("mpp", [0.0002, 1 / 3, 9999.0])
def test_any_resolution_is_a_fraction_of_32_bits(mpp: float) -> None:
    spec = spec_of(mpp=(mpp, mpp))
    head = make_head(spec, tables=tables_of(spec), icc_profile=None)
    with tifffile.TiffFile(io.BytesIO(head)) as tiff:
        num, den = tiff.pages[0].tags["XResolution"].value
        assert 10_000 * den / num == pytest.approx(mpp, rel=1e-6)


def test_tables_of_another_slide_are_refused() -> None:
    spec = spec_of()
    with pytest.raises(ValueError, match="4 levels"):
        make_head(spec, tables=tables_of(spec)[:3], icc_profile=None)
    with pytest.raises(ValueError, match="level 0"):
        make_head(spec, tables=tables_of(spec_of((5000, 2000))), icc_profile=None)
