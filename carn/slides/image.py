"""Plain images (PNG, JPEG, TIFF, ...) as slides of one level, decoded whole."""

import io
import warnings
from contextlib import suppress

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from carn import storage
from carn.errors import SlideError
from carn.slides.slide import SCANNED_MPP, Level, Rgb, Slide, SlideProperties

# Whole images are held in memory: 2^28 px are 0.8 GB of RGB, more than any tile or region export.
MAX_IMAGE_PX = 1 << 28
# Of a file: more than that many px take in any of the formats.
MAX_IMAGE_BYTES = 1 << 31
# Pillow would find out itself, and knows formats that start other programs (EPS) or that no
# microscope writes.
IMAGE_FORMATS = ("PNG", "JPEG", "TIFF", "BMP", "WEBP")
# A scan of a few bytes costs a pass over the whole image. Progressive files have about 10.
MAX_JPEG_SCANS = 100
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp")


class ImageSlide(Slide):
    """A plain image. Opened by `carn.slides.open_image`."""

    reader = "image"

    def __init__(self, uri: str) -> None:
        """Decode an image from a local path or an S3 object, transparency laid over white.

        Raises:
            SlideError: not an image, damaged, truncated, or larger than MAX_IMAGE_PX.
            StorageError: it cannot be read.
        """
        content = storage.read_bytes(uri, max_bytes=MAX_IMAGE_BYTES)
        pixels, icc_profile = _decode(uri, content)
        height, width = pixels.shape[:2]
        mpp_x, mpp_y = _tiff_mpp(content)
        super().__init__(
            uri,
            levels=(Level(width_px=width, height_px=height, downsample=1.0),),
            properties=SlideProperties(
                mpp_x=mpp_x, mpp_y=mpp_y, vendor="image", icc_profile=icc_profile
            ),
        )
        self._pixels = pixels

    def _read_level(self, x: int, y: int, width: int, height: int, *, level: int) -> Rgb:
        del level  # there is one
        return self._pixels[y : y + height, x : x + width].copy()

    def close(self) -> None:
        """Nothing is held but memory."""


def _tiff_mpp(content: bytes) -> tuple[float | None, float | None]:
    """Um per px as a TIFF says it, where it can be a scanner's; other formats tell screens' dpi."""
    # Here, for who trains on a dataset needs neither.
    import tifffile

    from carn.slides.tiff_mpp import DIRECTORY_ERRORS, TIFF_HEADS, tiff_mpp

    low, high = SCANNED_MPP
    # Of what is damaged beside its pixels, nothing is told.
    with suppress(tifffile.TiffFileError, *DIRECTORY_ERRORS):
        if content[:4] in TIFF_HEADS:
            with tifffile.TiffFile(io.BytesIO(content)) as tiff:
                (mpp_x, mpp_y), _ = tiff_mpp(tiff, tiff.pages.first)
                if mpp_x and mpp_y and low <= min(mpp_x, mpp_y) <= max(mpp_x, mpp_y) <= high:
                    return mpp_x, mpp_y
    return None, None


def _decode(uri: str, content: bytes) -> tuple[Rgb, bytes | None]:
    if not content:
        raise SlideError(uri, "is an empty file")
    try:
        with warnings.catch_warnings():
            # Our own bound is checked below; PIL's is lower and only warns. So it does of damage
            # in what is said beside the pixels.
            warnings.simplefilter("ignore")
            image: Image.Image = Image.open(io.BytesIO(content), formats=IMAGE_FORMATS)
            if image.width * image.height > MAX_IMAGE_PX:
                raise SlideError(
                    uri,
                    f"claims {image.width} x {image.height} px, more than the {MAX_IMAGE_PX} that "
                    "are read as one image; store it as a tiled, pyramidal TIFF",
                )
            if image.format in ("JPEG", "MPO") and content.count(b"\xff\xda") > MAX_JPEG_SCANS:
                raise SlideError(uri, f"holds more than {MAX_JPEG_SCANS} scans; save it anew")
            if image.mode.startswith(("I", "F")):
                raise SlideError(
                    uri, f"holds pixels of more than 8 bits (mode {image.mode}); convert it to RGB"
                )
            icc_profile = image.info.get("icc_profile")
            image = ImageOps.exif_transpose(image)
            if image.has_transparency_data:
                image = Image.alpha_composite(
                    Image.new("RGBA", image.size, "white"), image.convert("RGBA")
                )
            return np.asarray(image.convert("RGB")), icc_profile
    except UnidentifiedImageError as error:
        known = ", ".join(IMAGE_FORMATS)
        raise SlideError(uri, f"is not an image in any format that is read ({known})") from error
    except Image.DecompressionBombError as error:
        raise SlideError(uri, f"claims an absurd extent ({error})") from error
    except SlideError:
        raise
    # Whatever the format's reader came upon.
    except Exception as error:
        raise SlideError(uri, f"is damaged or truncated ({error})") from error
