"""Refuse TIFFs whose pixels are not 8-bit colours of light through tissue, by what they are."""

from collections.abc import Sequence
from typing import Any

import tifffile

from carn.errors import SlideError

_UNSIGNED = 1  # TIFF 6.0, SampleFormat
# TIFF 6.0, ExtraSamples: alpha, of either kind.
_ALPHA = (tifffile.EXTRASAMPLE.ASSOCALPHA, tifffile.EXTRASAMPLE.UNASSALPHA)
_COLOUR_SAMPLES = {
    tifffile.PHOTOMETRIC.RGB: 3,
    tifffile.PHOTOMETRIC.YCBCR: 3,
    tifffile.PHOTOMETRIC.CIELAB: 3,
    tifffile.PHOTOMETRIC.SEPARATED: 4,
}
_WAY_OUT = "export it anew as 8-bit RGB"


def check_is_brightfield(pages: Sequence[Any], uri: str) -> None:
    """Refuse what readers would take for 8-bit RGB and show wrong.

    Args:
        pages: level 0 first, and all other directories of the file.

    Raises:
        SlideError: samples of more than 8 bits or no whole numbers, channels beside the colours, or
            colours as grey images of their own.
    """
    first = pages[0]
    bits = _all_of(first.bitspersample)
    formats = _all_of(first.sampleformat)
    if any(form not in (_UNSIGNED, 4) for form in formats):  # 4: undefined, which writers mean so
        names = ", ".join(sorted({_format_name(form) for form in formats}))
        raise SlideError(uri, f"holds samples that are {names}, no brightness; {_WAY_OUT}")
    if max(bits) > 8:
        raise SlideError(uri, f"holds samples of {max(bits)} bits; {_WAY_OUT}")
    colours = _COLOUR_SAMPLES.get(first.photometric)
    extra = [sample for sample in first.extrasamples if sample not in _ALPHA]
    if colours is not None and (extra or first.samplesperpixel > colours + 1):
        raise SlideError(
            uri,
            f"holds {first.samplesperpixel} channels, of which {colours} are colours; {_WAY_OUT}",
        )
    if first.samplesperpixel == 1 and (number := _num_planes(pages)) > 1:
        raise SlideError(
            uri,
            f"holds {number} grey images of one size, as fluorescence or colours one by one; "
            f"{_WAY_OUT}",
        )


def _num_planes(pages: Sequence[Any]) -> int:
    """Grey images as large as the first; of a pyramid only one is."""
    first = pages[0]
    size = (first.imagewidth, first.imagelength)
    return sum(
        page.samplesperpixel == 1
        and (page.imagewidth, page.imagelength) == size
        and not page.subfiletype & 4  # a mask
        for page in pages
    )


def _all_of(value: Any) -> tuple[int, ...]:
    return tuple(map(int, value)) if isinstance(value, tuple) else (int(value),)


def _format_name(form: int) -> str:
    return {2: "signed numbers", 3: "floating-point numbers"}.get(form, f"of SampleFormat {form}")
