"""What travels when tiles of a large remote slide are read: those tiles, and little more."""

import io
import itertools
from typing import Any

import imagecodecs
import numpy as np
import pytest
import tifffile

from carn.errors import StorageError
from carn.slides import open_slide

TILE_PX = 512
TILES_ACROSS = 104
REGIONS = [(1000, 700), (20_300, 9_100), (40_001, 33_333), (7, 51_000), (31_111, 44_444)]
REGION_PX = 1024


class SparseSlide:
    """A slide of 1 GB that is never written: its header, then few tiles over and over.

    Attributes:
        tiles: decoded pixels of the tiles that repeat; tile n of the grid is number n % len.
        stride: bytes from a tile's start to the next one's.
        lengths: bytes of each repeating tile.
    """

    def __init__(self, header: bytes, streams: list[bytes], stride: int) -> None:
        self.header = header
        self.stride = stride
        self.lengths = [len(stream) for stream in streams]
        self.tiles = [imagecodecs.jpeg8_decode(stream) for stream in streams]
        self._round = b"".join(stream.ljust(stride, b"\0") for stream in streams)
        self._len = len(header) + TILES_ACROSS**2 * stride

    def __len__(self) -> int:
        return self._len

    def __getitem__(self, asked: slice) -> bytes:
        start, end = asked.start, asked.stop
        head = self.header[start:end]
        start, end = (max(0, at - len(self.header)) for at in (start, end))
        if start == end:
            return head
        period = len(self._round)
        first = start // period
        repeated = self._round * (-(-end // period) - first)
        return head + repeated[start - first * period : end - first * period]


@pytest.fixture(scope="module")
def slide() -> SparseSlide:
    """104 x 104 tiles of about 90 KB: noise compresses badly."""
    rng = np.random.default_rng(5)
    streams = []
    for _ in range(5):
        coarse = rng.integers(0, 255, (64, 64, 3), np.uint8).repeat(8, 0).repeat(8, 1)
        grain = rng.normal(0, 14, coarse.shape)
        tile = np.clip(coarse + grain, 0, 255).astype(np.uint8)
        streams.append(imagecodecs.jpeg8_encode(tile, level=85, subsampling="420"))
    # A writer aligns tiles; the gap is below what is worth a request of its own.
    stride = -(-max(map(len, streams)) // 4096) * 4096
    return SparseSlide(header_for(streams, stride), streams, stride)


def header_for(streams: list[bytes], stride: int) -> bytes:
    side = TILES_ACROSS * TILE_PX
    count = TILES_ACROSS**2
    buffer = io.BytesIO()
    with tifffile.TiffWriter(buffer, bigtiff=True) as writer:
        writer.write(
            (b"\xff\xd8" for _ in range(count)),
            shape=(side, side, 3),
            dtype=np.uint8,
            tile=(TILE_PX, TILE_PX),
            photometric="rgb",
            compression="jpeg",
            metadata=None,
            resolution=(40_000, 40_000),
            resolutionunit="CENTIMETER",
        )
    buffer.seek(0)
    with tifffile.TiffFile(buffer) as tiff:
        tags = tiff.pages[0].tags
        start = -(-tags["TileByteCounts"].valueoffset // 4096) * 4096 + 4096 + count * 16
        offsets, counts = tags["TileOffsets"], tags["TileByteCounts"]
        places = (offsets.valueoffset, counts.valueoffset)
        kinds = (offsets.dtype, counts.dtype)
        ends = max(places) + count * 8
    assert ends <= start
    header = bytearray(buffer.getvalue()[:ends].ljust(start, b"\0"))
    values = (
        [start + n * stride for n in range(count)],
        [len(streams[n % len(streams)]) for n in range(count)],
    )
    for place, kind, numbers in zip(places, kinds, values, strict=True):
        packed = np.asarray(numbers, dtype={16: "<u8", 4: "<u4", 3: "<u2"}[int(kind)]).tobytes()
        header[place : place + len(packed)] = packed
    return bytes(header)


def expected_region(slide: SparseSlide, x: int, y: int) -> tuple[np.ndarray, list[int]]:
    """Pixels of a region, and the bytes of each tile it touches."""
    columns = range(x // TILE_PX, (x + REGION_PX - 1) // TILE_PX + 1)
    rows = range(y // TILE_PX, (y + REGION_PX - 1) // TILE_PX + 1)
    numbers = {(row, column): row * TILES_ACROSS + column for row in rows for column in columns}
    kinds = {place: number % len(slide.tiles) for place, number in numbers.items()}
    whole = np.vstack([np.hstack([slide.tiles[kinds[row, c]] for c in columns]) for row in rows])
    left, top = x - columns[0] * TILE_PX, y - rows[0] * TILE_PX
    lengths = [slide.lengths[kinds[place]] for place in itertools.product(rows, columns)]
    return whole[top : top + REGION_PX, left : left + REGION_PX], lengths


def test_only_the_tiles_that_are_touched_travel(stub_s3: Any, slide: SparseSlide) -> None:
    assert len(slide) > 0.9e9
    stub_s3.objects["bucket/large.tif"] = slide
    stub_s3.delay_s = 0.02
    with open_slide("s3://bucket/large.tif") as opened:
        assert opened.extent == (TILES_ACROSS * TILE_PX,) * 2
        assert opened.mpp == pytest.approx(0.25)
        num_opening = stub_s3.count("GET")
        assert num_opening <= 12
        touched = []
        for x, y in REGIONS:
            expected, lengths = expected_region(slide, x, y)
            np.testing.assert_array_equal(opened.read_region(x, y, REGION_PX, REGION_PX), expected)
            touched += lengths
    assert len(touched) >= 36
    assert stub_s3.body_bytes <= 1.25 * sum(touched) + 1_000_000
    # A row of neighbouring tiles is one request, and the rows are asked for together.
    assert stub_s3.count("GET") - num_opening == sum(
        (y + REGION_PX - 1) // TILE_PX - y // TILE_PX + 1 for _, y in REGIONS
    )
    assert stub_s3.most_at_once > 1


def test_opening_moves_the_header_alone(stub_s3: Any, slide: SparseSlide) -> None:
    stub_s3.objects["bucket/large.tif"] = slide
    with open_slide("s3://bucket/large.tif"):
        assert stub_s3.body_bytes < 300_000


def test_a_region_read_again_next_door_shares_its_border_tiles(
    stub_s3: Any, slide: SparseSlide
) -> None:
    stub_s3.objects["bucket/large.tif"] = slide
    with open_slide("s3://bucket/large.tif") as opened:
        opened.read_region(256, 256, 512, 512)
        before = stub_s3.body_bytes
        opened.read_region(256, 256, 512, 512)
        assert stub_s3.body_bytes == before


def test_a_broken_connection_under_a_read_is_healed(stub_s3: Any, slide: SparseSlide) -> None:
    stub_s3.objects["bucket/large.tif"] = slide
    with open_slide("s3://bucket/large.tif") as opened:
        stub_s3.num_cuts = 3
        expected, _ = expected_region(slide, 3000, 3000)
        found = opened.read_region(3000, 3000, REGION_PX, REGION_PX)
    np.testing.assert_array_equal(found, expected)


def test_an_object_replaced_under_an_open_slide_is_an_error(s3: Any, write_slide: Any) -> None:
    s3.put("a.tif", write_slide("one.tif", extent=(600, 400), seed=1).read_bytes())
    with open_slide(s3.uri("a.tif")) as opened:
        opened.read_region(0, 0, 64, 64)
        s3.put("a.tif", write_slide("two.tif", extent=(600, 400), seed=2).read_bytes())
        with pytest.raises(StorageError, match="was replaced"):
            opened.read_region(500, 300, 64, 64)
