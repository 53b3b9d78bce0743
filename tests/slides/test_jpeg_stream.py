"""A JPEG stream says itself which colours it has, in several ways, of which the frame's counts."""

import io
from typing import Any

import pytest
import simplejpeg
from PIL import Image

from carn.slides.jpeg_stream import stream_colours
from tests.conftest import draw

PIXELS = draw(64, 48)


def pil(**options: Any) -> bytes:
    content = io.BytesIO()
    Image.fromarray(PIXELS).save(content, "JPEG", **options)
    return content.getvalue()


def without(stream: bytes, marker: int) -> bytes:
    at = stream.index(bytes((0xFF, marker)))
    return stream[:at] + stream[at + 2 + int.from_bytes(stream[at + 2 : at + 4], "big") :]


def adobe(stream: bytes, transform: int) -> bytes:
    segment = b"\xff\xee\x00\x0eAdobe\x00\x64\x00\x00\x00\x00" + bytes((transform,))
    return stream[:2] + segment + stream[2:]


JFIF = pil(subsampling="4:4:4")
PLAIN = without(JFIF, 0xE0)
HALVED = without(pil(subsampling="4:2:0"), 0xE0)
RGB = pil(keep_rgb=True)


@pytest.mark.parametrize(
    ("stream", "colours"),
    [
        (JFIF, "ycbcr"),
        (PLAIN, None),
        (HALVED, "ycbcr"),
        (RGB, "rgb"),
        (adobe(PLAIN, 0), "rgb"),
        (adobe(PLAIN, 1), "ycbcr"),
        (adobe(PLAIN, 2), None),
        # Half the chroma: no encoder does that to green and blue, whatever a marker says.
        (adobe(HALVED, 0), "ycbcr"),
        (simplejpeg.encode_jpeg(PIXELS, colorsubsampling="422"), "ycbcr"),
        (b"", None),
        (b"\xff\xd8", None),
        (b"\xff\xd8\xff\xe0\xff", None),
        (PLAIN[:30], None),
    ],
    ids=range(13),
)
def test_colours_are_those_that_the_stream_says(stream: bytes, colours: str | None) -> None:
    assert stream_colours(stream) == colours


def test_names_of_components_tell_rgb() -> None:
    stream = bytearray(PLAIN)
    frame = stream.index(b"\xff\xc0")
    assert stream[frame + 9] == 3
    for number, name in enumerate(b"RGB"):
        stream[frame + 10 + 3 * number] = name
    assert stream_colours(bytes(stream)) == "rgb"
