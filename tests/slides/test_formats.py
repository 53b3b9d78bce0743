"""docs/formats.md is made of a table, and each row of the table is true."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from PIL import Image

from carn.errors import SlideError
from carn.slides import Slide, open_image, open_slide
from carn.slides.formats import FORMATS, REFUSED, tables
from tests.conftest import draw
from tests.slides.test_odd_slides import with_photometric
from tests.slides.test_zarr_slide import write_zarr

ROOT = Path(__file__).parents[2]
PIXELS = draw(300, 200)
# What JPEG, WebP and JPEG XL may change, dB; far below what wrong colours do.
LEAST_PSNR = 28.0
TILED: dict[str, Any] = {"tile": (64, 64), "photometric": "rgb", "metadata": None}

Make = Callable[[Path, Path], list[Path]]


def tiffs(*compressions: Any, **options: Any) -> Make:
    def make(folder: Path, _: Path) -> list[Path]:
        paths = []
        for number, compression in enumerate(compressions):
            path = folder / f"{number}.tif"
            tifffile.imwrite(path, PIXELS, compression=compression, **(TILED | options))
            paths.append(path)
        return paths

    return make


def predicted(folder: Path, shared: Path) -> list[Path]:
    plain = tiffs(None, "zlib", "lzw", "zstd")(folder, shared)
    (folder / "p").mkdir()
    return plain + tiffs("zlib", "lzw", "zstd", predictor=True)(folder / "p", shared)


def ome_tiff(folder: Path, _: Path) -> list[Path]:
    path = folder / "a.ome.tif"
    options = {"tile": (64, 64), "photometric": "rgb", "compression": "zlib"}
    with tifffile.TiffWriter(path, ome=True) as writer:
        writer.write(PIXELS, subifds=1, **options)
        writer.write(PIXELS[::2, ::2], subfiletype=1, **options)
    return [path]


def zarrs(folder: Path, _: Path) -> list[Path]:
    for version in ("0.4", "0.5"):
        write_zarr(folder / f"{version}.zarr", version=version)
    return sorted(folder.iterdir())


def images(folder: Path, _: Path) -> list[Path]:
    for suffix in ("png", "jpg", "bmp", "webp"):
        Image.fromarray(PIXELS).save(folder / f"a.{suffix}")
    tifffile.imwrite(folder / "a.tif", PIXELS, photometric="rgb", rowsperstrip=32)
    return sorted(folder.iterdir())


def real(*names: str) -> Make:
    return lambda _, shared: [shared / "slides" / name for name in names]


def dicom(folder: Path, shared: Path) -> list[Path]:
    (path,) = real("dicom_camelyon_jpeg/level.dcm")(folder, shared)
    shutil.copy(path, folder / "IM0001")
    kinds = ("jpeg", "jpeg2000", "raw")
    others = real(*(f"formats/gcp_wsi2dicom_{kind}.dcm" for kind in kinds))(folder, shared)
    return [path, folder / "IM0001", *others]


NO_EXAMPLE = "MRXS, SCN"
EXAMPLES: dict[str, Make] = {
    "TIFF and BigTIFF in tiles of JPEG": tiffs("jpeg"),
    "TIFF in tiles of Deflate": predicted,
    "TIFF in tiles of JPEG 2000": tiffs("jpeg2000", "webp", "jpegxl"),
    "OME-TIFF": ome_tiff,
    "OME-Zarr": zarrs,
    "SVS of JPEG 2000": real("uir-test-image-j2k.svs"),
    "DICOM": dicom,
    "NDPI": real("formats/hamamatsu_test3_DAPI.ndpi"),
    "PNG": images,
}


def of(examples: dict[str, Make], kind: str, request: pytest.FixtureRequest) -> list[Path]:
    """The example files of a kind; those that come of the real samples skip without them."""
    (make,) = [value for name, value in examples.items() if kind.startswith(name)]
    folder = request.getfixturevalue("tmp_path")
    needs_samples = "real" in make.__qualname__ or make is dicom or make in SAMPLED
    shared = request.getfixturevalue("shared_data") if needs_samples else folder
    return make(folder, shared)


@pytest.mark.parametrize("form", FORMATS, ids=lambda form: form.name.split(" ")[0])
def test_a_format_is_read_as_the_page_says(form: Any, request: pytest.FixtureRequest) -> None:
    if form.name.startswith(NO_EXAMPLE):
        assert "no example" in form.pixels
        return
    opener: Callable[[Path], Slide] = open_image if form.reader == "image" else open_slide
    for path in of(EXAMPLES, form.name, request):
        with opener(path) as slide:
            assert slide.reader == form.reader, path
            pixels = slide.read_region(0, 0, *slide.extent)
        if slide.extent == (PIXELS.shape[1], PIXELS.shape[0]):
            error = float(((pixels.astype(float) - PIXELS) ** 2).mean())
            assert 10 * np.log10(255**2 / max(error, 1e-9)) > LEAST_PSNR, path
            assert error == 0 or "stored" not in form.pixels, path


def float_tiff(folder: Path, _: Path) -> list[Path]:
    tifffile.imwrite(folder / "a.tif", PIXELS.astype(np.float32), **TILED)
    return [folder / "a.tif"]


def fluorescence(folder: Path, _: Path) -> list[Path]:
    write_zarr(folder / "a.zarr", channels=4)
    return [folder / "a.zarr"]


def rgb_called_ycbcr(folder: Path, shared: Path) -> list[Path]:
    content = (shared / "slides" / "edge" / "dicom_boxes" / "boxes_0.dcm").read_bytes()
    (folder / "a.dcm").write_bytes(with_photometric(content, b"YBR_FULL_422"))
    return [folder / "a.dcm"]


def strips(folder: Path, _: Path) -> list[Path]:
    tifffile.imwrite(folder / "a.tif", PIXELS, photometric="rgb", rowsperstrip=32)
    return [folder / "a.tif"]


def cut_off(folder: Path, shared: Path) -> list[Path]:
    (path,) = tiffs("jpeg")(folder, shared)
    with tifffile.TiffFile(path) as tiff:
        page = tiff.pages[0]
        # Directories first, as scanners' BigTIFFs have them: what is lost is pixels.
        assert page.offset < page.dataoffsets[-1]
        end = page.dataoffsets[-1] + page.databytecounts[-1]
    path.write_bytes(path.read_bytes()[: end - 100])
    return [path]


def no_slide(folder: Path, _: Path) -> list[Path]:
    (folder / "a.svs").write_bytes(b"hello")
    return [folder / "a.svs"]


SAMPLED = (rgb_called_ycbcr,)
REFUSALS: dict[str, Make] = {
    "samples of more than 8 bits": real("odd/twelve_of_16_bits.tif"),
    "floating-point": float_tiff,
    "channels beside": real("odd/rgb_plus_channel.tif"),
    "colours or channels as grey": real("odd/grey_planes.ome.tif"),
    "OME-Zarr of other channels": fluorescence,
    "DICOM that says YCbCr": rgb_called_ycbcr,
    "Akoya": real("formats/small_vectra.qptiff"),
    "CZI": real("formats/RGB-8bit.czi"),
    "TIFF in strips": strips,
    "a file that was cut off": cut_off,
    "what is no slide": no_slide,
}


@pytest.mark.parametrize(("kind", "says"), REFUSED, ids=[kind for kind, _ in REFUSED])
def test_what_is_refused_is_refused_so(
    kind: str, says: str, request: pytest.FixtureRequest
) -> None:
    for path in of(REFUSALS, kind, request):
        with pytest.raises(SlideError, match=says):
            open_slide(path)


def test_the_page_has_the_tables() -> None:
    page = (ROOT / "docs" / "formats.md").read_text()
    _, _, rest = page.partition("<!-- python -m carn.slides.formats -->\n")
    assert rest.partition("<!-- end -->")[0].strip() == tables()
