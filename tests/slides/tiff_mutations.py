"""Small TIFF slides, damaged on purpose: in their tags, their offsets, or anywhere."""

import struct
from dataclasses import dataclass

from hypothesis import strategies as st

NUMBERS = (
    *(0, 1, 2, 3, 7, 8, 15, 16, 17, 255, 256, 4096, 8191, 8192, 8193, 65535, 65536),
    *(2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**63, 2**64 - 1),
)
TAGS = (
    *(
        254,
        256,
        257,
        258,
        259,
        262,
        266,
        270,
        273,
        277,
        278,
        279,
        282,
        284,
        296,
        305,
        317,
        322,
        323,
    ),
    *(324, 325, 330, 338, 339, 347, 530, 700, 32997, 33550, 34665, 34675, 34853, 65420),
)

# What fields that decide how pixels are taken may say, by tag: NewSubfileType, BitsPerSample,
# Compression, Photometric, FillOrder, Orientation, SamplesPerPixel, resolution and its unit,
# PlanarConfiguration, Predictor, SubIFDs, ExtraSamples, SampleFormat, YCbCr's subsampling.
SAYINGS = {
    254: (0, 1, 2, 3, 4, 5),
    258: (1, 8, 12, 16),
    259: (1, 5, 7, 8, 32773, 32946, 33003, 33005, 34712, 50000),
    262: (0, 1, 2, 3, 5, 6, 8, 32803),
    266: (1, 2),
    274: (1, 3, 6),
    277: (1, 2, 3, 4, 5),
    282: (0, 1, 72),
    284: (1, 2),
    296: (0, 1, 2, 3),
    317: (1, 2, 3),
    330: (0, 8),
    338: (0, 1, 2),
    339: (1, 2, 3, 4),
    530: (0x10001, 0x10002, 0x20001, 0x20002),
}


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Where the parts of a little-endian TIFF are.

    Attributes:
        is_big: BigTIFF.
        directories: offset of each.
        entries: offset of each tag, of all directories.
        links: offset of each number that says where the next directory is.
    """

    is_big: bool
    directories: tuple[int, ...]
    entries: tuple[int, ...]
    links: tuple[int, ...]

    @property
    def fields(self) -> dict[str, tuple[int, str]]:
        """Place within an entry, and form, of what it consists of."""
        wide = "<Q" if self.is_big else "<I"
        return {
            "code": (0, "<H"),
            "type": (2, "<H"),
            "count": (4, wide),
            "value": (12 if self.is_big else 8, wide),
        }


def layout_of(content: bytes) -> Layout:
    """Where the parts of a whole file are."""
    is_big = content[2] == 43
    wide, count_form, head, size = ("<Q", "<Q", 8, 20) if is_big else ("<I", "<H", 2, 12)
    link = 8 if is_big else 4
    directories, entries, links = [], [], [link]
    while (offset := struct.unpack_from(wide, content, link)[0]) != 0:
        directories.append(offset)
        (count,) = struct.unpack_from(count_form, content, offset)
        entries += [offset + head + number * size for number in range(count)]
        link = offset + head + count * size
        links.append(link)
    return Layout(
        is_big=is_big, directories=tuple(directories), entries=tuple(entries), links=tuple(links)
    )


@st.composite
def mutated(draw: st.DrawFn, contents: list[bytes]) -> bytes:
    """One of these files with up to four things changed."""
    whole = draw(st.sampled_from(contents))
    layout = layout_of(whole)
    content = bytearray(whole)
    for _ in range(draw(st.integers(1, 4))):
        _change(draw, content, layout)
    return bytes(content)


@st.composite
def restated(draw: st.DrawFn, contents: list[bytes]) -> bytes:
    """One of these files, of which up to three fields say something else that a file may say."""
    content = bytearray(draw(st.sampled_from(contents)))
    layout = layout_of(bytes(content))
    known = {
        entry: struct.unpack_from("<H", content, entry)[0]
        for entry in layout.entries
        if struct.unpack_from("<H", content, entry)[0] in SAYINGS
    }
    place, form = layout.fields["value"]
    for _ in range(draw(st.integers(1, 3))):
        entry = draw(st.sampled_from(sorted(known)))
        _put(content, entry + place, form, draw(st.sampled_from(SAYINGS[known[entry]])))
    return bytes(content)


def _change(draw: st.DrawFn, content: bytearray, layout: Layout) -> None:
    kind = draw(st.sampled_from(("field", "field", "field", "link", "bytes", "cut", "insert")))
    numbers = st.sampled_from((*NUMBERS, len(content), *layout.directories)) | st.integers(
        0, 2 * len(content)
    )
    if kind == "field":
        entry = draw(st.sampled_from(layout.entries))
        name = draw(st.sampled_from(sorted(layout.fields)))
        place, form = layout.fields[name]
        value = draw(st.sampled_from(TAGS) if name == "code" else numbers)
        if name == "type":
            value = draw(st.integers(0, 20))
        _put(content, entry + place, form, value)
    elif kind == "link":
        form = "<Q" if layout.is_big else "<I"
        _put(content, draw(st.sampled_from(layout.links)), form, draw(numbers))
    elif kind == "bytes":
        start = draw(st.integers(0, len(content)))
        new = draw(st.binary(min_size=1, max_size=16))
        content[start : start + len(new)] = new
    elif kind == "cut":
        del content[draw(st.integers(0, len(content))) :]
    else:
        start = draw(st.integers(0, len(content)))
        content[start:start] = draw(st.binary(min_size=1, max_size=16))


def _put(content: bytearray, place: int, form: str, value: int) -> None:
    packed = struct.pack(form, value % 256 ** struct.calcsize(form))
    if place + len(packed) <= len(content):
        content[place : place + len(packed)] = packed
