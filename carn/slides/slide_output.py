"""Write one slide from many workers: what every output format has in common.

A slide is cut into square *blocks* on a grid that starts at (0, 0), numbered row by row. Workers
write blocks in any order, again if need be; a *record* in the work folder says of each that it is
done and how. The last step reads the records, makes the top of the pyramid and commits: until then
nobody sees a slide.
"""

import hashlib
import io
import json
import math
import re
import threading
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from typing import Any, Literal, Self, TypeVar, cast

import numpy as np
from numpy.typing import NDArray

from carn import storage
from carn.errors import MissingObjectError, UnfinishedError
from carn.slides.pyramid import SMALLEST_LEVEL_PX
from carn.slides.slide import MAX_EXTENT_PX, Rgb

# What every output says of itself, in words that a person reads.
NOTICE = "super-resolved, not for primary diagnosis"
# The colour of the px that lie beyond the slide in chunks at its border, and of chunks left out.
BACKGROUND = 255
# Objects of a work folder that are read or written at once: storage answers each in tens of ms.
CONCURRENCY = 16

# In a work folder: the OutputSpec, as JSON; there before all else of the output, and after it.
SPEC = "output.json"
# Numpy has Python parse an array's header, and Python 3.11 and 3.12 count the depth of parsers that
# run in several threads together: now and then it is off, which is a SystemError.
# Source: https://github.com/python/cpython/issues/106905
_PARSING = threading.Lock()
_RECORD = re.compile(r"(\d{6})\.npz")
_FACT = "fact."
T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True, kw_only=True)
class SlideFormat:
    """The file format of an output slide."""

    container: Literal["tiff", "ome-zarr"] = "tiff"
    """tiff: one pyramidal BigTIFF. ome-zarr: a folder in OME-Zarr 0.5, always lossless, to which
    compression, quality and subsampling do not apply."""

    compression: Literal["jpeg", "lossless"] = "jpeg"
    """Of a TIFF's tiles. lossless: Deflate, about six times the size."""

    quality: int = 90
    """JPEG quality, 1 to 100."""

    subsampling: Literal["420", "422", "444"] = "420"
    """Resolution of colour in JPEG: halved both ways, halved in width, or whole."""

    tile_px: int = 512
    """Side of a tile (in a Zarr, of a chunk), in px; a multiple of 16."""

    def __post_init__(self) -> None:
        if self.tile_px < 16 or self.tile_px % 16:
            raise ValueError(f"tile_px is {self.tile_px}; must be a multiple of 16, as TIFF says")
        if not 1 <= self.quality <= 100:
            raise ValueError(f"quality is {self.quality}; must be 1 to 100")

    def fitting(self, extent: tuple[int, int]) -> Self:
        """The same with smaller tiles, where a slide of this (width, height) px is tiny.

        libvips 8.18 refuses a TIFF ("tile size out of range") whose tiles are more than twice as
        large as the longer side, rounded up to 128 px.
        """
        largest_px = 2 * 128 * -(-max(extent) // 128)
        tile_px = self.tile_px
        while tile_px > largest_px and tile_px % 32 == 0:
            tile_px //= 2
        return replace(self, tile_px=tile_px)


@dataclass(frozen=True, kw_only=True)
class OutputSpec:
    """One output slide. Its bytes are a function of this and of the pixels alone.

    Attributes:
        uri: what it will be.
        work_uri: a folder of its own for what is half done; removed when the slide is finished.
        extent: (width, height) in px.
        block_px: side of a block, tile_px times a power of two.
        mpp: um per px in (x, y); None when it is not known, then no file claims any.
        provenance: where the slide comes from, as JSON values; it is embedded as it is, so nothing
            of a patient may be in it.
        format: how it is written.
    """

    uri: str
    work_uri: str
    extent: tuple[int, int]
    block_px: int
    mpp: tuple[float, float] | None
    provenance: Mapping[str, Any]
    format: SlideFormat = field(default_factory=SlideFormat)

    def __post_init__(self) -> None:
        if not all(1 <= side <= MAX_EXTENT_PX for side in self.extent):
            raise ValueError(f"extent is {self.extent}; both sides must be 1 to {MAX_EXTENT_PX:,}")
        factor, rest = divmod(self.block_px, self.format.tile_px)
        if rest or factor < 1 or factor & (factor - 1):
            raise ValueError(
                f"block_px is {self.block_px}; must be tile_px ({self.format.tile_px}) times a "
                "power of two, so that tiles of the levels do not straddle blocks"
            )
        if self.mpp is not None and not all(1e-4 < mpp < 1e4 for mpp in self.mpp):
            raise ValueError(f"mpp is {self.mpp}; must be um per px, or None when it is not known")
        is_zarr = self.uri.rstrip("/").endswith(".ome.zarr")
        if is_zarr != (self.format.container == "ome-zarr"):
            name = "must end on .ome.zarr" if not is_zarr else "names an OME-Zarr"
            raise ValueError(
                f"{self.uri} {name}, for format.container is {self.format.container!r}"
            )

    def to_json(self) -> str:
        """As text, for a worker elsewhere."""
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """What `to_json` wrote."""
        found = json.loads(text)
        mpp = found["mpp"]
        return cls(
            **{
                **found,
                "extent": tuple(found["extent"]),
                "mpp": None if mpp is None else tuple(mpp),
                "format": SlideFormat(**found["format"]),
            }
        )


@dataclass(frozen=True, kw_only=True)
class Finished:
    """A slide that is committed.

    Attributes:
        uri: the slide.
        size: bytes.
        etag: the object store's content tag; None for local files and folders.
        num_parts: parts (of a Zarr: objects) it was written in.
        thumbnail: (H, W, 3) uint8 RGB, the coarsest level: its longer side at most 1024.
    """

    uri: str
    size: int
    etag: str | None
    num_parts: int
    thumbnail: Rgb


# ------------------------------------------------------------------------------------- geometry


def level_extents(extent: tuple[int, int]) -> list[tuple[int, int]]:
    """(width, height) of every level, halved and rounded up until both are at most 1024."""
    extents = [extent]
    while max(extents[-1]) > SMALLEST_LEVEL_PX:
        width, height = extents[-1]
        extents.append((-(-width // 2), -(-height // 2)))
    return extents


def num_tiles(extent: tuple[int, int], tile_px: int) -> tuple[int, int]:
    """(columns, rows) of the squares that cover an extent."""
    return -(-extent[0] // tile_px), -(-extent[1] // tile_px)


def num_block_levels(spec: OutputSpec) -> int:
    """How many levels, from the finest, blocks hold whole tiles of and so are made with them.

    The coarsest level is left to the last step, unless it is the only one: it is the thumbnail.
    """
    whole = round(math.log2(spec.block_px // spec.format.tile_px)) + 1
    return max(1, min(whole, len(level_extents(spec.extent)) - 1))


def has_more_levels(spec: OutputSpec) -> bool:
    """Whether there are levels that the last step makes, from the pieces in the records."""
    return len(level_extents(spec.extent)) > num_block_levels(spec)


def block_box(spec: OutputSpec, index: int, *, level: int = 0) -> tuple[int, int, int, int]:
    """A block's [x0, x1) x [y0, y1) as (x0, y0, x1, y1), in px of a level that blocks make.

    Raises:
        ValueError: no block has this index.
    """
    columns, rows = num_tiles(spec.extent, spec.block_px)
    if not 0 <= index < columns * rows:
        raise ValueError(f"{spec.uri} has blocks 0 to {columns * rows - 1}, not {index}")
    side = spec.block_px >> level
    width, height = level_extents(spec.extent)[level]
    x, y = index % columns * side, index // columns * side
    return x, y, min(x + side, width), min(y + side, height)


def level_mpp(mpp: tuple[float, float], level: int) -> tuple[float, float]:
    """Um per px of a level: its px are exactly 2**level px of level 0 wide, whatever the rounding
    of its extent.
    """
    return mpp[0] * 2**level, mpp[1] * 2**level


# -------------------------------------------------------------------------------------- records


@dataclass(frozen=True, kw_only=True)
class Record:
    """What is known of a block that is done.

    Attributes:
        index: the block.
        arrays: what the format keeps, by name.
        facts: what the caller said of the block.
    """

    index: int
    arrays: Mapping[str, NDArray[Any]]
    facts: Mapping[str, Any]


def spec_digest(spec: OutputSpec) -> str:
    """A hash of what a block's bytes depend on: records of another output are none of this."""
    says = {"extent": spec.extent, "block_px": spec.block_px, "format": asdict(spec.format)}
    return hashlib.sha256(json.dumps(says, sort_keys=True).encode()).hexdigest()[:32]


def pack_record(arrays: Mapping[str, Any], *, facts: Mapping[str, Any]) -> bytes:
    """A record as the bytes of an .npz.

    Raises:
        ValueError: a fact that is neither a number, a text nor an array of such.
    """
    content = io.BytesIO()
    members = {name: np.asarray(value) for name, value in arrays.items()}
    members |= {_FACT + name: np.asarray(value) for name, value in facts.items()}
    for name, value in members.items():
        if value.dtype.hasobject:
            raise ValueError(f"{name.removeprefix(_FACT)} is no number, text or array of such")
    np.savez_compressed(content, allow_pickle=False, **cast(dict[str, Any], members))
    return content.getvalue()


def unpack_record(index: int, content: bytes, *, without: tuple[str, ...] = ()) -> Record:
    """What `pack_record` packed; members named in `without` are not decompressed."""
    with _PARSING, np.load(io.BytesIO(content), allow_pickle=False) as members:
        found = {name: members[name] for name in members.files if name not in without}
    facts = {
        name.removeprefix(_FACT): value.item() if value.ndim == 0 else value
        for name, value in found.items()
        if name.startswith(_FACT)
    }
    return Record(
        index=index,
        arrays={name: value for name, value in found.items() if not name.startswith(_FACT)},
        facts=facts,
    )


def ahead(
    function: Callable[[T], R], items: Iterable[T], *, pool: ThreadPoolExecutor, num: int
) -> Iterator[R]:
    """`pool.map` that runs at most `num` items ahead of whoever takes the results."""
    rest = iter(items)
    waiting = deque(pool.submit(function, item) for item in islice(rest, num))
    try:
        while waiting:
            result = waiting.popleft().result()
            waiting.extend(pool.submit(function, item) for item in islice(rest, 1))
            yield result
    finally:
        for future in waiting:
            future.cancel()


# --------------------------------------------------------------------------------------- output


class SlideOutput(ABC):
    """A slide that is being written, seen from any of its workers. Made by `open_output`.

    Attributes:
        spec: what is written.
        num_blocks: how many blocks it has.
    """

    def __init__(self, spec: OutputSpec, *, pool: Executor | None = None) -> None:
        columns, rows = num_tiles(spec.extent, spec.block_px)
        self.spec = spec
        self.num_blocks = columns * rows
        self._pool = pool
        self._digest = spec_digest(spec)

    @abstractmethod
    def begin(self) -> None:
        """Start writing, unless that has begun in this work folder and is still alive.

        Any number of workers may call it at once.

        Raises:
            AccessDeniedError, StorageError: the location cannot be written.
        """

    @abstractmethod
    def done_blocks(self) -> set[int]:
        """The blocks whose record is there and whose bytes storage still has, unchanged.

        Raises:
            AccessDeniedError, StorageError: storage cannot be read.
        """

    @abstractmethod
    def write_block(
        self,
        index: int,
        pixels: Rgb,
        *,
        facts: Mapping[str, NDArray[Any] | float | int | str],
        seconds: dict[str, float] | None = None,
    ) -> int:
        """Encode and store a block, and record it; what was there of it is replaced.

        Args:
            index: the block, row by row.
            pixels: (H, W, 3) uint8 RGB, the block's px.
            facts: what to keep with its record, for `block_facts`.
            seconds: takes up what each part of it took, as `encode_s` and `upload_s`.

        Returns:
            Bytes written of the slide (not of the record).

        Raises:
            ValueError: no such block, px of another shape or type, or facts that are no arrays.
            UploadGoneError: the slide was committed or discarded meanwhile; `begin` again.
            AccessDeniedError, StorageError: it could not be written; nothing else is lost by that.
        """

    @abstractmethod
    def finish(self, *, icc_profile: bytes | None, keep_work: bool = False) -> Finished:
        """Make the top of the pyramid, commit, and remove the work folder.

        One that was killed, anywhere, can be called again. Records may be gone by then; who needs
        them until something else is noted keeps the work folder, and calls `discard` at the end.

        Args:
            icc_profile: embedded as it is; None embeds none.
            keep_work: leave the work folder, with all records, as it is.

        Raises:
            UnfinishedError: blocks are missing, or storage no longer has what was recorded; their
                records are removed, so that they are done again.
            AccessDeniedError, StorageError: storage cannot be read or written.
        """

    @abstractmethod
    def discard(self) -> None:
        """Remove the work folder, and all that was written of a slide that is not committed.

        A slide that is committed stays.
        """

    def block_facts(self) -> Iterator[tuple[int, Mapping[str, Any]]]:
        """What `write_block` was told of each block that has a record, by index.

        The records go when the slide is finished: who wants to know asks before.
        """
        indexes = sorted(self._recorded())
        for record in self._read_records(indexes, without=("piece",)):
            if record is not None:
                yield record.index, record.facts

    # ---------------------------------------------------------------- what the formats share

    def _work(self, *names: str) -> str:
        return storage.join(self.spec.work_uri, *names)

    def _write_spec(self) -> None:
        """Say what is written from here, for who finds the folder when we are gone."""
        storage.write_bytes(self._work(SPEC), self.spec.to_json().encode())

    def _record_uri(self, index: int) -> str:
        return self._work("blocks", f"{index:06d}.npz")

    def _recorded(self) -> set[int]:
        names = (storage.name_of(item.uri) for item in storage.list_objects(self._work("blocks")))
        found = (_RECORD.fullmatch(name) for name in names)
        return {int(match[1]) for match in found if match} & set(range(self.num_blocks))

    def _check_block(self, index: int, pixels: Rgb) -> None:
        x0, y0, x1, y1 = block_box(self.spec, index)
        expected = (y1 - y0, x1 - x0, 3)
        if pixels.shape != expected or pixels.dtype != np.uint8:
            raise ValueError(
                f"block {index} of {self.spec.uri} is {expected} uint8, not {pixels.shape} "
                f"{pixels.dtype}"
            )

    def _write_record(
        self, index: int, arrays: Mapping[str, Any], *, facts: Mapping[str, Any]
    ) -> None:
        content = pack_record({**arrays, "spec": self._digest}, facts=facts)
        storage.write_bytes(self._record_uri(index), content)

    def _read_records(
        self, indexes: Iterable[int], *, without: tuple[str, ...] = ()
    ) -> Iterator[Record | None]:
        """The records in the order of `indexes`; None for those missing or of another output."""

        def read(index: int) -> Record | None:
            try:
                content = storage.read_bytes(self._record_uri(index))
            except MissingObjectError:
                return None
            with suppress(ValueError, KeyError, OSError, EOFError):  # no .npz, or a damaged one
                record = unpack_record(index, content, without=without)
                if str(record.arrays["spec"]) == self._digest:
                    return record
            return None

        with ThreadPoolExecutor(CONCURRENCY, thread_name_prefix="records") as pool:
            yield from ahead(read, indexes, pool=pool, num=2 * CONCURRENCY)

    def _bands(
        self, is_stored: Callable[[Record], bool], *, seen: Callable[[Record], None]
    ) -> Iterator[Rgb]:
        """The pieces of all blocks, a row of blocks at a time; `seen` is told of each record.

        Raises:
            UnfinishedError: in place of the end, when all records have been looked at.
        """
        columns, _ = num_tiles(self.spec.extent, self.spec.block_px)
        unfinished: list[int] = []
        pieces: list[Rgb] = []
        for index, record in enumerate(self._read_records(range(self.num_blocks))):
            if record is None or not is_stored(record):
                unfinished.append(index)
            if record is None or unfinished:
                continue
            seen(record)
            pieces.append(record.arrays["piece"])
            if len(pieces) == columns:
                yield np.concatenate(pieces, axis=1)
                pieces = []
        if unfinished:
            raise self._unfinished(unfinished)

    def _delete(self, uris: Sequence[str]) -> None:
        with ThreadPoolExecutor(CONCURRENCY, thread_name_prefix="delete") as pool:
            list(pool.map(lambda uri: storage.delete([uri]), uris))

    def _remove_work(self, *, last: Sequence[str]) -> None:
        """Remove the work folder, the objects of the names `last` after all others, in order."""
        kept = [self._work(name) for name in last]
        found = [item.uri for item in storage.list_objects(self.spec.work_uri)]
        self._delete([uri for uri in found if uri not in kept])
        storage.delete(kept)
        storage.delete_unfinished(self.spec.work_uri)
        storage.delete_below(self.spec.work_uri)  # the folders

    def _unfinished(self, blocks: Iterable[int]) -> UnfinishedError:
        """The error over these blocks, whose records are removed."""
        found = tuple(sorted(blocks))
        self._delete([self._record_uri(index) for index in found])
        return UnfinishedError(self.spec.uri, found)


def open_output(spec: OutputSpec, *, pool: Executor | None = None) -> SlideOutput:
    """The output a spec describes; nothing is written before `begin`.

    Args:
        spec: what is written.
        pool: threads that a block's tiles are encoded by; None: the calling one.

    Raises:
        ValueError: more blocks than the format holds.
    """
    # Each brings its own libraries; a worker needs one.
    if spec.format.container == "tiff":
        from carn.slides.tiff_output import TiffOutput

        return TiffOutput(spec, pool=pool)
    from carn.slides.zarr_output import ZarrOutput

    return ZarrOutput(spec, pool=pool)
