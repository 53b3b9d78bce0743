"""Slides as people's programs write them: each comes right, or is refused by name."""

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from PIL import Image

from carn.errors import SlideError
from carn.slides import open_slide
from carn.slides.dicom import DICOM_COLOURS_NOTE
from carn.slides.level_check import is_of_slide
from tests.conftest import draw

WriteSlide = Callable[..., Path]
OME = (
    '<?xml version="1.0"?><OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06">'
    '<Image ID="Image:0"><Pixels {sizes}/></Image><Image ID="Image:1">'
    '<Pixels PhysicalSizeX="9" PhysicalSizeY="9"/></Image></OME>'
)
PHILIPS = (
    '<?xml version="1.0" encoding="UTF-8" ?><DataObject ObjectType="DPUfsImport">{spacings}'
    "</DataObject>"
)
SPACING = '<Attribute Name="DICOM_PIXEL_SPACING" Group="0x0028">{}</Attribute>'


# -------------------------------------------------------------------------------------- um per px


@pytest.mark.parametrize(
    ("description", "mpp"),
    [
        ("Aperio Image|AppMag = 20|MPP = 0.4990", 0.499),
        ("Aperio Image|AppMag = 20|MPP = 0,500000|x = 1", 0.5),
        ("Aperio Image|MPP = 5e-1|x = 1", 0.5),
        ("Aperio Image|MPP = half|x = 1", None),
        ("Aperio Image|MPP = 0|x = 1", None),
    ],
)
def test_aperio_says_its_px_size_in_the_numbers_of_any_country(
    description: str, mpp: float | None, write_slide: WriteSlide
) -> None:
    with open_slide(write_slide(description=description, name="slide.svs")) as slide:
        assert slide.mpp == pytest.approx(mpp)


@pytest.mark.parametrize(
    ("sizes", "mpp"),
    [
        ('PhysicalSizeX="0.5" PhysicalSizeY="0.25"', (0.5, 0.25)),
        ('PhysicalSizeX="0.5" PhysicalSizeXUnit="\u00b5m" PhysicalSizeY="0.5"', (0.5, 0.5)),
        (
            'PhysicalSizeX="500" PhysicalSizeXUnit="nm" '
            'PhysicalSizeY="0.0005" PhysicalSizeYUnit="mm"',
            (0.5, 0.5),
        ),
        ('PhysicalSizeX="0,5" PhysicalSizeY="0,5"', (0.5, 0.5)),
        # No unit of length, or none that is known: what the tags say stays.
        (
            'PhysicalSizeX="1" PhysicalSizeXUnit="pixel" '
            'PhysicalSizeY="1" PhysicalSizeYUnit="pixel"',
            (2.0, 2.0),
        ),
        ('SizeX="3"', (2.0, 2.0)),
    ],
)
def test_ome_xml_says_the_px_size_of_its_first_image(
    sizes: str, mpp: tuple[float, float], write_slide: WriteSlide
) -> None:
    path = write_slide(
        description=OME.format(sizes=sizes).encode(),
        resolution=(5000, 5000),
        resolutionunit="CENTIMETER",
    )
    with open_slide(path) as slide:
        found = slide.properties
        assert (found.mpp_x, found.mpp_y) == pytest.approx(mpp)
        assert bool(slide.notes) is (mpp != (2.0, 2.0))


@pytest.mark.parametrize(
    ("said", "mpp"),
    [
        (('"0.000243" "0.000250"',), (0.25, 0.243)),
        (('"0,000243" "0,000250"',), (0.25, 0.243)),
        (('"0.0315" "0.0315"', '"0.000243" "0.000250"'), (0.25, 0.243)),
        (('"0.000243"',), (None, None)),
        (("",), (None, None)),
    ],
)
def test_philips_least_spacing_is_that_of_level_0(
    said: tuple[str, ...], mpp: tuple[float | None, float | None], write_slide: WriteSlide
) -> None:
    spacings = "".join(SPACING.format(text.replace('"', "&quot;")) for text in said)
    path = write_slide(description=PHILIPS.format(spacings=spacings), software="Philips DP v1.0")
    with open_slide(path) as slide:
        assert slide.properties.vendor == "philips"
        assert (slide.properties.mpp_x, slide.properties.mpp_y) == pytest.approx(mpp)


def test_a_resolution_without_a_unit_is_by_inch(write_slide: WriteSlide) -> None:
    path = write_slide(resolution=(50_800, 50_800), resolutionunit="INCH")
    with tifffile.TiffFile(path, mode="r+b") as tiff:
        # A private tag in its place: the unit is not there any more.
        tag = tiff.pages[0].tags["ResolutionUnit"]
        tiff.filehandle.seek(tag.offset)
        tiff.filehandle.write((65000).to_bytes(2, "little"))
    with open_slide(path) as slide:
        assert slide.mpp == pytest.approx(0.5)


# ------------------------------------------------------------------------------- what is no slide


def write(path: Path, pixels: np.ndarray, **options: Any) -> Path:
    tifffile.imwrite(path, pixels, tile=(64, 64), **options)
    return path


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda p: write(p, draw(99, 70).astype(np.uint16) << 4, photometric="rgb"), "of 16 bits"),
        (lambda p: write(p, draw(99, 70) / np.float32(255), photometric="rgb"), "floating-point"),
        (
            lambda p: write(p, draw(99, 70).astype(np.int8), photometric="rgb"),
            "signed numbers",
        ),
        (
            lambda p: write(
                p,
                np.dstack([draw(99, 70), draw(99, 70)[..., 0]]),
                photometric="rgb",
                extrasamples=["unspecified"],
            ),
            "holds 4 channels, of which 3 are colours",
        ),
        (
            lambda p: write(
                p, np.dstack([draw(99, 70)] * 2)[..., :5], photometric="rgb", planarconfig="contig"
            ),
            "holds 5 channels",
        ),
        (
            lambda p: write(p, draw(99, 70).transpose(2, 0, 1), photometric="minisblack"),
            "holds 3 grey images of one size",
        ),
    ],
)
def test_what_is_not_8_bit_colour_is_refused_at_opening(
    make: Callable[[Path], Path], says: str, tmp_path: Path
) -> None:
    with pytest.raises(SlideError, match=says) as refused:
        open_slide(make(tmp_path / "odd.tif"))
    assert "export it anew as 8-bit RGB" in str(refused.value)


@pytest.mark.parametrize("alpha", ["unassalpha", "assocalpha"])
def test_transparency_is_no_channel_too_many(alpha: str, tmp_path: Path) -> None:
    opaque = np.dstack([draw(99, 70), np.full((70, 99), 255, np.uint8)])
    path = write(tmp_path / "a.tif", opaque, photometric="rgb", extrasamples=[alpha])
    with open_slide(path) as slide:
        np.testing.assert_array_equal(slide.read_region(0, 0, 99, 70), draw(99, 70))


# ------------------------------------------------------------------------------------- the levels


def pages(path: Path, *images: np.ndarray, marks: tuple[int, ...] = ()) -> Path:
    with tifffile.TiffWriter(path) as writer:
        for number, image in enumerate(images):
            writer.write(
                image,
                tile=(64, 64),
                photometric="rgb",
                compression="jpeg",
                subfiletype=marks[number] if marks else 0,
                resolution=(20_000, 20_000),
                resolutionunit="CENTIMETER",
                metadata=None,
            )
    return path


def small(image: np.ndarray, factor: float) -> np.ndarray:
    size = (round(image.shape[1] / factor), round(image.shape[0] / factor))
    return np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BOX))


def tissue(seed: int) -> np.ndarray:
    """Coarse coloured blotches: they survive being made smaller."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(40, 255, (12, 16, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((1024, 768), Image.Resampling.BICUBIC))


def test_a_second_section_is_no_level(tmp_path: Path) -> None:
    one, other = tissue(0), tissue(1)
    # Of the same shape, but no whole factor smaller, and not said to be reduced.
    with open_slide(pages(tmp_path / "a.tif", one, small(other, 3.15))) as slide:
        assert len(slide.levels) == 1
    # Where it has all the marks of a level, its pixels tell.
    marked = pages(tmp_path / "b.tif", one, small(other, 2), small(one, 4), marks=(0, 1, 1))
    with open_slide(marked) as slide:
        assert len(slide.levels) == 3
        picture = slide.thumbnail(512)
        assert np.abs(picture.astype(int) - small(one, 2)).mean() < 6
        assert slide.notes == ("level 1 is not this slide made smaller, and is left out",)
        slide.check_level(2)
        with pytest.raises(SlideError, match="a level 1 that is not level 0 made smaller"):
            slide.check_level(1)


def test_the_largest_page_is_level_0_wherever_it_stands(tmp_path: Path) -> None:
    one = tissue(0)
    ascending = pages(tmp_path / "a.tif", small(one, 4), small(one, 2), one, marks=(1, 1, 0))
    with open_slide(ascending) as slide:
        assert slide.extent == (1024, 768)
        assert [level.downsample for level in slide.levels] == [1, 2, 4]
        slide.check_level(1)
        slide.check_level(2)


@pytest.mark.parametrize("factor", [2, 4, 3.5])
def test_levels_of_any_factor_that_say_so_are_levels(factor: float, tmp_path: Path) -> None:
    one = tissue(2)
    path = pages(tmp_path / "a.tif", one, small(one, factor), marks=(0, 1))
    with open_slide(path) as slide:
        assert slide.levels[1].downsample == pytest.approx(factor, rel=0.01)
        slide.check_level(1)


def test_a_picture_is_known_by_what_it_shows() -> None:
    one, other = tissue(3), tissue(4)

    def read(x: int, y: int, width: int, height: int) -> np.ndarray:
        return one[y : y + height, x : x + width]

    extent = (1024, 768)
    picture = small(one, 8)
    assert is_of_slide(picture, read, extent=extent)
    brighter = np.clip(picture.astype(int) * 0.8 + 50, 0, 255).astype(np.uint8)
    assert is_of_slide(brighter, read, extent=extent)
    shifted = np.roll(picture, 1, axis=1)
    assert is_of_slide(shifted, read, extent=extent)
    assert not is_of_slide(small(other, 8), read, extent=extent)
    assert not is_of_slide(picture[::-1], read, extent=extent)
    # What the picture lacks is seen, too.
    half = picture.copy()
    half[:, 40:] = 255
    assert not is_of_slide(half, read, extent=extent)


# ------------------------------------------------------------------------------------ real files

TRUTH = "truth_400x300.png"
RIGHT_DB = 34.0


@pytest.mark.parametrize(
    ("name", "mpp"),
    [
        ("ascending.tif", 0.5),
        ("comma.svs", 0.5),
        ("jp2k.ome.tif", 0.5),
        ("stray_bytes.tif", 0.5),
        ("tag_rgb_stream_ycc.tif", 0.5),
        ("unit_missing.tif", 0.5),
        ("xml_only.ome.tif", 0.5),
    ],
)
def test_odd_files_come_right(name: str, mpp: float, shared_data: Path) -> None:
    folder = shared_data / "slides" / "odd"
    truth = np.asarray(Image.open(folder / TRUTH).convert("RGB")).astype(float)
    with open_slide(folder / name) as slide:
        assert slide.extent == (400, 300)
        assert slide.mpp == pytest.approx(mpp)
        error = ((slide.read_region(0, 0, 400, 300) - truth) ** 2).mean()
    assert error < 255**2 / 10 ** (RIGHT_DB / 10)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("grey_planes.ome.tif", "3 grey images"),
        ("rgb_plus_channel.tif", "4 channels"),
        ("twelve_of_16_bits.tif", "of 16 bits"),
    ],
)
def test_odd_files_that_are_no_brightfield_are_refused(
    name: str, says: str, shared_data: Path
) -> None:
    with pytest.raises(SlideError, match=says):
        open_slide(shared_data / "slides" / "odd" / name)


@pytest.mark.parametrize(
    ("name", "downsamples"),
    [
        ("two_sections.tif", [1]),
        ("zero_length_reduced.svs", [1, 4, 16]),
        ("padded_dicom/l0.dcm", [1, 2, 4]),
    ],
)
def test_levels_of_odd_files_are_those_of_the_slide(
    name: str, downsamples: list[float], shared_data: Path
) -> None:
    with open_slide(shared_data / "slides" / "odd" / name) as slide:
        assert [level.downsample for level in slide.levels] == downsamples
        for level in range(len(slide.levels)):
            slide.check_level(level)


@pytest.mark.parametrize("name", ["hamamatsu_test3_DAPI.ndpi", "hamamatsu_test3_TRITC.ndpi"])
def test_hamamatsu_opens(name: str, shared_data: Path) -> None:
    with open_slide(shared_data / "slides" / "formats" / name) as slide:
        assert slide.reader == "openslide"
        assert slide.properties.vendor == "hamamatsu"
        assert slide.mpp == pytest.approx(0.228, abs=0.001)


# -------------------------------------------------------------------------------- colours of DICOM


def with_photometric(content: bytes, name: bytes) -> bytes:
    """A DICOM file's bytes with another PhotometricInterpretation."""
    at = content.index(b"\x28\x00\x04\x00CS") + 6
    length = int.from_bytes(content[at : at + 2], "little")
    padded = name + b" " * (len(name) % 2)
    return content[:at] + struct.pack("<H", len(padded)) + padded + content[at + 2 + length :]


def test_dicom_that_says_rgb_of_ycbcr_comes_right(shared_data: Path, tmp_path: Path) -> None:
    real = shared_data / "slides" / "odd" / "padded_dicom"
    for number, source in enumerate(sorted(real.iterdir())):
        # Without a suffix, as archives have them.
        changed = with_photometric(source.read_bytes(), b"RGB")
        (tmp_path / f"IM{number:04}").write_bytes(changed)
    with open_slide(real / "l0.dcm") as right, open_slide(tmp_path / "IM0001") as found:
        assert found.notes == (DICOM_COLOURS_NOTE,)
        assert right.notes == ()
        for level, size in enumerate(right.levels):
            region = (0, 0, size.width_px, size.height_px)
            expected = right.read_region(*region, level=level).astype(int)
            assert abs(found.read_region(*region, level=level) - expected).max() <= 1


def test_dicom_that_says_ycbcr_of_rgb_is_refused(shared_data: Path, tmp_path: Path) -> None:
    real = shared_data / "slides" / "edge" / "dicom_boxes" / "boxes_0.dcm"
    with open_slide(real) as slide:
        assert slide.notes == ()
    path = tmp_path / "level.dcm"
    path.write_bytes(with_photometric(real.read_bytes(), b"YBR_FULL_422"))
    with pytest.raises(SlideError, match="YBR_FULL_422, but its JPEG streams are RGB"):
        open_slide(path)
