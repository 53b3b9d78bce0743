"""Read um per px of level 0 out of the header of a TIFF, in all the ways that programs write it."""

import re
import struct
from typing import Any
from xml.etree.ElementTree import Element, ParseError

import tifffile

from carn.plain_xml import parse_xml
from carn.slides.slide import plausible_mpp

Mpp = tuple[float | None, float | None]

# How a TIFF begins: byte order, and 42, or 43 of a BigTIFF.
TIFF_HEADS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
# What tifffile's slips over a damaged directory come out as: whatever Python raised.
DIRECTORY_ERRORS = (
    *(ValueError, LookupError, TypeError, ArithmeticError, AttributeError, AssertionError),
    *(RuntimeError, MemoryError, struct.error),
)

# Um of each unit of length of OME-XML that a microscope might state px in.
# Source: https://www.openmicroscopy.org/Schemas/Documentation/Generated/OME-2016-06/ome_xsd.html,
# UnitsLength; um is the default.
_OME_UNITS = {
    **{"m": 1e6, "dm": 1e5, "cm": 1e4, "mm": 1e3, "nm": 1e-3, "pm": 1e-6, "Å": 1e-4, "in": 25_400},
    # The micro sign, the Greek letter, and what ASCII-minded programs write.
    **dict.fromkeys(("\u00b5m", "\u03bcm", "um"), 1.0),
}
# TIFF 6.0, ResolutionUnit: inch, which is the default, and centimetre. 1 is no unit of length.
_UM_PER_UNIT = {2: 25_400.0, 3: 10_000.0}
_INCH = 2
# A number as people of all countries write it: 0.5, 0,5, 5e-1.
_NUMBER = r"[+-]?(?:\d+(?:[.,]\d*)?|[.,]\d+)(?:[eE][+-]?\d+)?"


def tiff_mpp(tiff: tifffile.TiffFile, page: Any) -> tuple[Mpp, str]:
    """Um per px (x, y) of the page that is level 0, and where it stands.

    What a vendor's description or OME-XML says counts before the resolution tags, which many
    programs fill with a printer's dots per inch.

    Args:
        tiff: the open file.
        page: of level 0.

    Returns:
        None for each axis of which nothing plausible is said; `the ImageDescription`, `OME-XML` or
        `the resolution tags`.
    """
    description = page.description or ""
    if description.startswith("Aperio"):
        mpp = plausible_mpp(aperio_number(description, "MPP"))
        return (mpp, mpp), "the ImageDescription"
    if tiff.is_philips:
        return _philips_mpp(description), "the ImageDescription"
    if (said := ome_mpp(tiff.pages.first.description or "")) != (None, None):
        return said, "OME-XML"
    tags = (_resolution_mpp(page, "XResolution"), _resolution_mpp(page, "YResolution"))
    return tags, "the resolution tags"


def aperio_number(description: str, name: str) -> float | None:
    """A number out of "...|AppMag = 20|MPP = 0.4990|..."; None where there is none."""
    found = re.search(rf"\|\s*{name}\s*=\s*({_NUMBER})\s*(?:\||$)", description)
    return _decimal(found.group(1)) if found else None


def ome_mpp(description: str) -> Mpp:
    """What OME-XML says of the first image's pixels; None for each axis that it says nothing of."""
    if "PhysicalSizeX" not in description:
        return None, None
    root = _parsed(description)
    for pixels in root.iter() if root is not None else ():
        if pixels.tag.rpartition("}")[2] == "Pixels":
            return _ome_axis(pixels, "X"), _ome_axis(pixels, "Y")
    return None, None


def _ome_axis(pixels: Element, axis: str) -> float | None:
    size = _decimal(pixels.get(f"PhysicalSize{axis}", ""))
    unit = _OME_UNITS.get(pixels.get(f"PhysicalSize{axis}Unit", "um"))
    return None if size is None or unit is None else plausible_mpp(size * unit)


def _philips_mpp(description: str) -> Mpp:
    """The least DICOM_PIXEL_SPACING ("0.000243" "0.000243", mm per px, row first) is level 0's.

    Macro and label state theirs as well, which are coarser, and may stand before it.
    """
    root = _parsed(description)
    found = []
    for attribute in root.iter("Attribute") if root is not None else ():
        if attribute.get("Name") == "DICOM_PIXEL_SPACING":
            numbers = [_decimal(text) for text in re.findall(_NUMBER, attribute.text or "")]
            row, column = numbers if len(numbers) == 2 else (None, None)
            if row is not None and column is not None:
                mpp = plausible_mpp(column * 1000), plausible_mpp(row * 1000)
                found += [mpp] if None not in mpp else []
    return min(found, default=(None, None))


def _resolution_mpp(page: Any, tag: str) -> float | None:
    fraction = page.tags.valueof(tag)
    um_per_unit = _UM_PER_UNIT.get(int(page.tags.valueof("ResolutionUnit", _INCH)))
    if not fraction or um_per_unit is None or not fraction[0] or not fraction[1]:
        return None
    return plausible_mpp(um_per_unit * fraction[1] / fraction[0])


def _parsed(text: str) -> Element | None:
    try:
        return parse_xml(text)
    except (ParseError, ValueError, LookupError):
        return None


def _decimal(text: str) -> float | None:
    try:
        return float(text.strip().replace(",", "."))
    except ValueError:
        return None
