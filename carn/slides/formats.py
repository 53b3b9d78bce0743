"""Which slides are read, by which reader and how exactly, and which are refused: docs/formats.md.

python -m carn.slides.formats prints the tables of that page.
"""

from dataclasses import dataclass

from carn.slides.listing import SLIDE_SUFFIXES

_BY_RANGE = "what is asked for, by byte range"
_WHOLE = "the whole slide, into the node's cache"
_LOSSLESS = "those that were stored"


@dataclass(frozen=True, kw_only=True)
class SlideFormat:
    """A kind of file that is read.

    Attributes:
        name: of the kind, which tests find their example by.
        reader: as `Slide.reader`.
        travels: what object storage is asked for.
        pixels: whose pixels they are.
    """

    name: str
    reader: str
    travels: str
    pixels: str


FORMATS = (
    SlideFormat(
        name="TIFF and BigTIFF in tiles of JPEG (SVS, Philips, CAMELYON16, QuPath, libvips)",
        reader="tiled-tiff",
        travels=_BY_RANGE,
        pixels="libjpeg-turbo's; level 0 equal to OpenSlide's",
    ),
    SlideFormat(
        name="TIFF in tiles of Deflate, LZW, Zstandard or nothing, with or without predictor",
        reader="tiled-tiff",
        travels=_BY_RANGE,
        pixels=_LOSSLESS,
    ),
    SlideFormat(
        name="TIFF in tiles of JPEG 2000, WebP or JPEG XL",
        reader="tiled-tiff",
        travels=_BY_RANGE,
        pixels="OpenJPEG's, libwebp's, libjxl's",
    ),
    SlideFormat(
        name="OME-TIFF of 8-bit RGB, levels as SubIFDs or directories",
        reader="tiled-tiff",
        travels=_BY_RANGE,
        pixels="as of TIFF",
    ),
    SlideFormat(
        name="OME-Zarr 0.4 and 0.5 of 8-bit RGB, a folder or prefix named .zarr",
        reader="ome-zarr",
        travels=_BY_RANGE,
        pixels=_LOSSLESS,
    ),
    SlideFormat(
        name="SVS of JPEG 2000",
        reader="openslide",
        travels=_WHOLE,
        pixels="OpenSlide's",
    ),
    SlideFormat(
        name="DICOM, JPEG, JPEG 2000 or uncompressed, with or without .dcm",
        reader="openslide",
        travels="all files of the series, into the node's cache",
        pixels="OpenSlide's; YCbCr under a tag of RGB is converted",
    ),
    SlideFormat(
        name="NDPI",
        reader="openslide",
        travels=_WHOLE,
        pixels="OpenSlide's",
    ),
    SlideFormat(
        name="MRXS, SCN, BIF, CZI, VMS and what else OpenSlide knows",
        reader="openslide",
        travels=f"{_WHOLE}; MRXS with its folder; VMS and VMU from disks only",
        pixels="OpenSlide's; no example is tested here",
    ),
    SlideFormat(
        name="PNG, JPEG, BMP, WebP, TIFF in strips, given as images (`--images`)",
        reader="image",
        travels="the whole image",
        pixels="Pillow's",
    ),
)

# Kinds that are refused when they are opened, and what the message says of them.
REFUSED = (
    ("samples of more than 8 bits", "samples of 16 bits"),
    ("floating-point samples", "floating-point numbers"),
    ("channels beside the colours", "4 channels, of which 3 are colours"),
    ("colours or channels as grey images of their own", "grey images of one size"),
    ("OME-Zarr of other channels than RGB", "no RGB"),
    ("DICOM that says YCbCr of RGB streams", "but its JPEG streams are RGB"),
    ("Akoya's qptiff", "a vendor's own layout"),
    ("CZI of several times or scenes", "Unrecognized subblock dimension"),
    ("TIFF in strips, as a slide", "is not tiled"),
    ("a file that was cut off", "is truncated"),
    ("what is no slide", "is not a slide"),
)


def tables() -> str:
    """The tables of docs/formats.md, Markdown."""
    lines = ["| files | reader | of object storage comes | pixels |", "|---|---|---|---|"]
    lines += [f"| {f.name} | `{f.reader}` | {f.travels} | {f.pixels} |" for f in FORMATS]
    lines += ["", "| refused | the message says |", "|---|---|"]
    lines += [f"| {kind} | {says} |" for kind, says in REFUSED]
    suffixes = ", ".join(f"`{suffix}`" for suffix in SLIDE_SUFFIXES)
    lines += ["", f"Names that are looked for in folders: {suffixes}; and DICOM by its content."]
    return "\n".join(lines)


if __name__ == "__main__":
    print(tables())  # noqa: T201
