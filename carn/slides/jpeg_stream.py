"""What a JPEG stream says of its own colours, before it is decoded.

Source: ITU-T T.81, annex B, for markers and the frame header; T.871 for JFIF, whose colours are
YCbCr; T.872, section 6.5.3, for the Adobe marker. Without either, the rules are those of libjpeg
(jdapimin.c, `default_decompress_parms`).
"""

from typing import Literal

Colours = Literal["rgb", "ycbcr"]

SOI, EOI, SOS = b"\xff\xd8", b"\xff\xd9", b"\xff\xda"
# Of a stream, for the colours it says it has: markers up to the frame header.
COLOURS_READ_BYTES = 16 * 1024
# Headers are within the first of these, an ICC profile of some MB left out.
_MAX_SEGMENTS = 1000
_JFIF, _ADOBE = b"JFIF\0", b"Adobe"
_APP0, _APP14 = 0xE0, 0xEE
# Frame headers: SOF0 to SOF15, of which DHT, JPG and DAC are none.
_FRAMES = tuple(marker for marker in range(0xC0, 0xD0) if marker not in (0xC4, 0xC8, 0xCC))
# What the transform of an Adobe marker means, of three components.
_TRANSFORMS: dict[int, Colours] = {0: "rgb", 1: "ycbcr"}


def stream_colours(stream: bytes) -> Colours | None:
    """The colours of a stream of three components as it says them itself; None where it does not.

    Args:
        stream: from SOI on; its head is enough. Shared tables of a TIFF are one, too.
    """
    says, frame = _told(stream)
    by_frame = None if frame is None else _of_frame(frame)
    # Whatever a marker says, nobody halves the green of RGB.
    return by_frame if by_frame == "ycbcr" or says is None else says


def _told(part: bytes) -> tuple[Colours | None, bytes | None]:
    """What application markers say, and the frame header."""
    says: Colours | None = None
    position = len(SOI)
    for _ in range(_MAX_SEGMENTS):
        if part[position : position + 1] != b"\xff" or position + 4 > len(part):
            break
        marker = part[position + 1]
        if marker == 0xFF:  # fill
            position += 1
            continue
        length = int.from_bytes(part[position + 2 : position + 4], "big")
        content = part[position + 4 : position + 2 + length]
        if marker in _FRAMES:
            return says, content
        if marker == SOS[1] or marker == EOI[1]:
            break
        if marker == _APP0 and content.startswith(_JFIF):
            says = "ycbcr"
        elif marker == _APP14 and content.startswith(_ADOBE) and len(content) >= 12:
            says = _TRANSFORMS.get(content[11], says)
        position += 2 + length
    return says, None


def _of_frame(frame: bytes) -> Colours | None:
    """Colours by the components' subsampling and names."""
    if len(frame) < 15 or frame[5] != 3:
        return None
    identifiers = tuple(frame[6 + 3 * number] for number in range(3))
    factors = [frame[7 + 3 * number] for number in range(3)]
    if factors[0] != factors[1]:
        return "ycbcr"
    return "rgb" if identifiers == tuple(b"RGB") else None
