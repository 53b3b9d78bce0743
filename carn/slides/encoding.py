"""A block of a slide as the tiles of its pyramid levels, each encoded once, and the block smaller.

A block is a square of tile_px * 2**k px on the slide's grid, so its share of level l is a square of
whole tiles for l = 0..k: no tile is made of two blocks. Blocks at the slide's border are smaller.
"""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor
from dataclasses import dataclass

import imagecodecs
import numpy as np
import simplejpeg
from numpy.typing import NDArray

from carn.slides.slide import Rgb
from carn.slides.slide_output import SlideFormat, num_tiles

# What stands for "not all px of this tile are one colour" among colours 0xRRGGBB.
NOT_FLAT = -1
# libdeflate's default level; on tissue, level 1 is no faster and 9 no smaller (both within 2 %).
DEFLATE_LEVEL = 6
# Pixels that are halved at once: a tile of 512 px, whose sums (3 MB in all) stay in a core's cache,
# and of which numpy's overhead per call is a few percent.
HALVED_PX = 1 << 18

Encode = Callable[[Rgb], bytes]


@dataclass(frozen=True, kw_only=True)
class EncodedTiles:
    """The tiles of one level of a block, row by row.

    Attributes:
        streams: the encoded tiles, b"" for those of one colour.
        lengths: (rows, columns) uint32, bytes of each stream.
        flat: (rows, columns) int32, the colour 0xRRGGBB of a tile of one colour, else NOT_FLAT.
    """

    streams: tuple[bytes, ...]
    lengths: NDArray[np.uint32]
    flat: NDArray[np.int32]


@dataclass(frozen=True, kw_only=True)
class EncodedBlock:
    """What a block adds to a slide.

    Attributes:
        payload: the streams of all its tiles, finest level first, row by row.
        lengths, flat: of each level, as in `EncodedTiles`.
        piece: the block on the first level that is not made here, (H, W, 3) uint8 RGB; None where
            the slide has no such level.
    """

    payload: bytes
    lengths: tuple[NDArray[np.uint32], ...]
    flat: tuple[NDArray[np.int32], ...]
    piece: Rgb | None


def encode_block(
    pixels: Rgb,
    *,
    num_levels: int,
    has_more_levels: bool,
    form: SlideFormat,
    pool: Executor | None = None,
) -> EncodedBlock:
    """The tiles of a block on levels 0..num_levels - 1, and the block on level num_levels.

    Each level is the mean of 2 x 2 px of the one before, as `carn.slides.pyramid` makes it; odd
    sides round up. Tiles at the border are filled up by repeating the edge px.

    Args:
        pixels: (H, W, 3) uint8 RGB, the block on level 0. A block with neighbours on its right or
            below must be tile_px * 2**(num_levels - 1) px or a multiple of it that way.
        num_levels: how many levels to encode, at least 1.
        has_more_levels: whether the slide has levels beyond, so that `piece` is wanted.
        form: how tiles are encoded.
        pool: threads to spread the tiles over (halving and both codecs release the GIL).
    """
    encode = tile_encoder(form)
    levels = []
    for number in range(num_levels):
        is_halved = has_more_levels or number + 1 < num_levels
        tiles, smaller = _encode_level(
            pixels, encode=encode, tile_px=form.tile_px, is_halved=is_halved, pool=pool
        )
        levels.append(tiles)
        if smaller is not None:
            pixels = smaller
    return EncodedBlock(
        payload=b"".join(stream for level in levels for stream in level.streams),
        lengths=tuple(level.lengths for level in levels),
        flat=tuple(level.flat for level in levels),
        piece=pixels if has_more_levels else None,
    )


def encode_tiles(pixels: Rgb, *, form: SlideFormat, pool: Executor | None = None) -> EncodedTiles:
    """The tiles of (H, W, 3) uint8 RGB."""
    tiles, _ = _encode_level(
        pixels, encode=tile_encoder(form), tile_px=form.tile_px, is_halved=False, pool=pool
    )
    return tiles


def _encode_level(
    pixels: Rgb, *, encode: Encode, tile_px: int, is_halved: bool, pool: Executor | None
) -> tuple[EncodedTiles, Rgb | None]:
    height, width = pixels.shape[:2]
    columns, rows = num_tiles((width, height), tile_px)
    smaller = np.empty((-(-height // 2), -(-width // 2), 3), dtype=np.uint8) if is_halved else None

    def work(number: int) -> tuple[bytes, int]:
        y, x = number // columns * tile_px, number % columns * tile_px
        # A copy, so that encoding and halving find a tile in the cache, not strewn over the block.
        tile = np.ascontiguousarray(pixels[y : y + tile_px, x : x + tile_px])
        if smaller is not None:
            down, across = -(-tile.shape[0] // 2), -(-tile.shape[1] // 2)
            halve_into(tile, smaller[y // 2 : y // 2 + down, x // 2 : x // 2 + across])
        flat = flat_colour(tile)
        return (b"" if flat != NOT_FLAT else encode(filled_up(tile, tile_px=tile_px))), flat

    numbers = range(rows * columns)
    found: Iterable[tuple[bytes, int]]
    found = map(work, numbers) if pool is None else pool.map(work, numbers)
    streams, flat = zip(*found, strict=True)
    return (
        EncodedTiles(
            streams=streams,
            lengths=np.array([*map(len, streams)], dtype=np.uint32).reshape(rows, columns),
            flat=np.array(flat, dtype=np.int32).reshape(rows, columns),
        ),
        smaller,
    )


def tile_encoder(form: SlideFormat) -> Encode:
    """The function from (tile_px, tile_px, 3) uint8 RGB to a tile's bytes.

    JPEG: a complete stream of YCbCr, with its own tables. Lossless: each px as its difference to
    the one on its left (TIFF's predictor 2), deflated in zlib's format (TIFF's compression 8).

    Source: TIFF 6.0, section 14; Adobe Photoshop TIFF Technical Notes 2002, "ZIP compression".
    """
    if form.compression == "jpeg":
        return lambda tile: simplejpeg.encode_jpeg(
            tile, quality=form.quality, colorspace="RGB", colorsubsampling=form.subsampling
        )
    return _deflated


def _deflated(tile: Rgb) -> bytes:
    differences: Rgb = imagecodecs.delta_encode(tile, axis=-2)
    return bytes(imagecodecs.deflate_encode(differences.tobytes(), level=DEFLATE_LEVEL))


def flat_tile(colour: int, *, form: SlideFormat) -> bytes:
    """The bytes of a tile whose px all are 0xRRGGBB."""
    rgb = np.array([colour >> 16, colour >> 8 & 255, colour & 255], dtype=np.uint8)
    return tile_encoder(form)(np.tile(rgb, (form.tile_px, form.tile_px, 1)))


def flat_colour(tile: Rgb) -> int:
    """0xRRGGBB when all px are of that one colour, else NOT_FLAT."""
    first, last = tile[0, 0], tile[-1, -1]
    # Tissue is told by two px or a row; only what may be flat is looked at whole.
    if not np.array_equal(first, last) or not np.all(tile[0] == first):
        return NOT_FLAT
    values = tile.reshape(-1)
    if not np.array_equal(values[3:], values[:-3]):
        return NOT_FLAT
    red, green, blue = first.tolist()
    return int(red << 16 | green << 8 | blue)


def filled_up(tile: Rgb, *, tile_px: int) -> Rgb:
    """A border tile at its full size, its last column and row repeated."""
    height, width = tile.shape[:2]
    if (height, width) == (tile_px, tile_px):
        return tile
    return np.pad(tile, ((0, tile_px - height), (0, tile_px - width), (0, 0)), mode="edge")


# -------------------------------------------------------------------------------------- halving


def block_levels(pixels: Rgb, *, num_levels: int) -> Iterator[Rgb]:
    """The block on levels 0..num_levels - 1, each the mean of 2 x 2 px of the one before."""
    yield pixels
    for _ in range(num_levels - 1):
        pixels = halved(pixels)
        yield pixels


def halved(pixels: Rgb) -> Rgb:
    """The mean of 2 x 2 px, halves rounded up, of what there is of them at odd borders.

    Equal to PIL's `reduce(2)` and faster: that copies RGB to 4 bytes a px, and back.

    Args:
        pixels: (H, W, 3) uint8 RGB.

    Returns:
        (ceil(H / 2), ceil(W / 2), 3) uint8 RGB.
    """
    height, width = pixels.shape[:2]
    smaller = np.empty((-(-height // 2), -(-width // 2), 3), dtype=np.uint8)
    halve_into(pixels, smaller)
    return smaller


def halve_into(pixels: Rgb, smaller: Rgb) -> None:
    """`halved`, written to an array (or a part of one) of that shape."""
    height, width = pixels.shape[:2]
    num_rows = max(1, HALVED_PX // (2 * width))
    for top in range(0, height // 2, num_rows):
        rows = pixels[2 * top : 2 * min(top + num_rows, height // 2)]
        sums = np.add(rows[0::2], rows[1::2], dtype=np.uint16)
        _halve_columns(sums, smaller[top : top + len(sums)])
    if height % 2:
        # Px without a partner count twice: (2a + 2b + 2) // 4 is (a + b + 1) // 2.
        _halve_columns(pixels[-1:].astype(np.uint16) * np.uint16(2), smaller[-1:])


def _halve_columns(sums: NDArray[np.uint16], smaller: Rgb) -> None:
    """Means over 2 columns of `sums` of 2 rows."""
    num_pairs = sums.shape[1] // 2
    # Channel by channel, and interleaved last and as bytes: few strided passes, the rest in a row.
    means = np.empty((3, *smaller.shape[:2]), dtype=np.uint16)
    for channel in range(3):
        left, right = sums[:, 0 : 2 * num_pairs : 2, channel], sums[:, 1::2, channel]
        np.add(left, right, out=means[channel, :, :num_pairs])
        if sums.shape[1] % 2:
            means[channel, :, -1] = sums[:, -1, channel] * np.uint16(2)
    means += 2
    means >>= 2
    rounded = means.astype(np.uint8)
    for channel in range(3):
        smaller[..., channel] = rounded[channel]
