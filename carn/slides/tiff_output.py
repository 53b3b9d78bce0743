"""One pyramidal BigTIFF from many workers: a multipart upload whose parts are the blocks.

A block's tiles of all levels go up as one part, whose number is the block's; what is too small for
a part waits in the work folder. The last step makes the top of the pyramid and the head, joins what
was small, and completes the upload, which is the commit. In the file come: head, tiles of one
colour (each once), top levels, small blocks until part 1 is large enough, the large blocks, the
other small ones. So its bytes do not depend on who wrote what when.
"""

import hashlib
import io
import json
import re
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from carn import storage, uploads
from carn.errors import (
    ExtraPartError,
    MissingObjectError,
    StalePartError,
    UnfinishedError,
    UploadGoneError,
)
from carn.slides.encoding import NOT_FLAT, EncodedTiles, encode_block, encode_tiles, flat_tile
from carn.slides.slide import Rgb
from carn.slides.slide_output import (
    CONCURRENCY,
    SPEC,
    Finished,
    OutputSpec,
    Record,
    SlideOutput,
    block_box,
    has_more_levels,
    level_extents,
    num_block_levels,
    num_tiles,
)
from carn.slides.tiff_head import LevelTables, head_bytes, make_head
from carn.slides.top_levels import level_strips
from carn.storage import ObjectStat
from carn.uploads import Part

# The most blocks of a slide. With parts for the head and for small blocks, of which a part takes
# two at least, this stays below uploads.MAX_PARTS.
MAX_BLOCKS = 6000
HEAD_PART = 1
FIRST_BLOCK_PART = 2

_UPLOAD = re.compile(r"upload-(\d{6})\.json")
_COMMIT = "commit.npz"


@dataclass(frozen=True, kw_only=True)
class _Block:
    """A record of this format.

    Attributes:
        size: bytes of the payload.
        etag: of its part; "" where it is no part.
        sha256: of the payload that waits in the work folder; "" where there is none.
        lengths, flat: of its tiles, in the order of the payload.
    """

    size: int
    etag: str
    sha256: str
    lengths: NDArray[np.uint32]
    flat: NDArray[np.int32]


@dataclass(frozen=True, kw_only=True)
class _Layout:
    """Where everything comes to lie.

    Attributes:
        with_head: small blocks that part 1 takes.
        padding: zeros that end part 1.
        large: blocks that are parts of their own.
        groups: the other small blocks, as they are joined.
        block_offsets: (num_blocks,) uint64.
    """

    with_head: list[int]
    padding: int
    large: list[int]
    groups: list[list[int]]
    block_offsets: NDArray[np.uint64]


@dataclass(frozen=True, kw_only=True)
class _Commit:
    """What is about to be committed: enough to do it again, or to find that it was done."""

    upload_id: str
    parts: tuple[Part, ...]
    thumbnail: Rgb


class TiffOutput(SlideOutput):
    """A BigTIFF. Made by `carn.slides.slide_output.open_output`."""

    def __init__(self, spec: OutputSpec, *, pool: Executor | None = None) -> None:
        super().__init__(spec, pool=pool)
        if self.num_blocks > MAX_BLOCKS:
            block_px = spec.block_px
            while np.prod(num_tiles(spec.extent, block_px)) > MAX_BLOCKS:
                block_px *= 2
            raise ValueError(
                f"{spec.uri} would be {self.num_blocks:,} blocks, and a TIFF is written in at most "
                f"{MAX_BLOCKS:,}; raise block_px from {spec.block_px} to {block_px}"
            )
        self._upload_id: str | None = None

    # -------------------------------------------------------------------------------- blocks

    def begin(self) -> None:
        self._write_spec()
        while True:
            generation, upload_id = self._find_upload()
            self._upload_id = upload_id
            if upload_id is not None:
                with suppress(UploadGoneError):
                    uploads.list_parts(self.spec.uri, upload_id)
                    return
                if self._resume_commit() is not None:
                    return
            # Aborted by somebody, or none yet. Racers agree by who writes the next record first.
            upload_id = uploads.begin(self.spec.uri)
            content = json.dumps({"uri": self.spec.uri, "upload_id": upload_id}).encode()
            if storage.create_bytes(self._work(f"upload-{generation + 1:06d}.json"), content):
                self._upload_id = upload_id
                return
            uploads.abort(self.spec.uri, upload_id)

    def done_blocks(self) -> set[int]:
        if self._resume_commit() is not None:
            return set(range(self.num_blocks))
        stored = _Stored.look(self)
        records = self._read_records(sorted(self._recorded()), without=("piece", "lengths", "flat"))
        return {record.index for record in records if record is not None and stored.has(record)}

    def write_block(
        self,
        index: int,
        pixels: Rgb,
        *,
        facts: Mapping[str, NDArray[Any] | float | int | str],
        seconds: dict[str, float] | None = None,
    ) -> int:
        self._check_block(index, pixels)
        started = time.perf_counter()
        block = encode_block(
            pixels,
            num_levels=num_block_levels(self.spec),
            has_more_levels=has_more_levels(self.spec),
            form=self.spec.format,
            pool=self._pool,
        )
        encoded = time.perf_counter()
        etag, sha256 = self._store(index, block.payload)
        arrays = {
            "size": len(block.payload),
            "etag": etag,
            "sha256": sha256,
            "lengths": np.concatenate([lengths.ravel() for lengths in block.lengths]),
            "flat": np.concatenate([flat.ravel() for flat in block.flat]),
            # A slide of one level has no coarser one: it is its own thumbnail.
            "piece": pixels if block.piece is None else block.piece,
        }
        self._write_record(index, arrays, facts=facts)
        if seconds is not None:
            seconds["encode_s"] = encoded - started
            seconds["upload_s"] = time.perf_counter() - encoded
        return len(block.payload)

    def _store(self, index: int, payload: bytes) -> tuple[str, str]:
        """Put a payload where its size belongs; returns etag and SHA-256, "" where they are not."""
        if not payload:
            return "", ""
        if len(payload) < uploads.MIN_PART_BYTES:
            sha256 = hashlib.sha256(payload).hexdigest()
            storage.write_bytes(self._payload_uri(index, sha256), payload)
            return "", sha256
        try:
            part = uploads.put_part(
                self.spec.uri, self._current_upload(), FIRST_BLOCK_PART + index, payload
            )
        except UploadGoneError:
            self._upload_id = None  # another may have begun a new one
            raise
        return part.etag, ""

    def _payload_uri(self, index: int, sha256: str) -> str:
        return self._work("payloads", _payload_name(index, sha256))

    def _upload_records(self) -> list[ObjectStat]:
        return storage.list_prefix(self._work("upload-"))

    def _find_upload(self) -> tuple[int, str | None]:
        """The number and the id of the latest upload of this work folder; (0, None) without."""
        found = {}
        for item in self._upload_records():
            if match := _UPLOAD.fullmatch(storage.name_of(item.uri)):
                found[int(match[1])] = item.uri
        if not found:
            return 0, None
        generation = max(found)
        return generation, str(json.loads(storage.read_bytes(found[generation]))["upload_id"])

    def _current_upload(self) -> str:
        if self._upload_id is None:
            self._upload_id = self._find_upload()[1]
        if self._upload_id is None:
            raise UploadGoneError(self.spec.uri, "nothing is under way here; begin it first")
        return self._upload_id

    # -------------------------------------------------------------------------------- finish

    def finish(self, *, icc_profile: bytes | None, keep_work: bool = False) -> Finished:
        finished = self._resume_commit()
        if finished is None:
            if self._find_upload()[1] is None:
                raise self._unfinished(range(self.num_blocks))
            self.begin()  # where the upload was aborted, small blocks are still of use
            commit = self._prepare(icc_profile=icc_profile)
            storage.write_bytes(self._work(_COMMIT), _pack_commit(commit))
            try:
                finished = self._complete(commit)
            except (StalePartError, UploadGoneError) as error:
                storage.delete([self._work(_COMMIT)])
                blocks = {number - FIRST_BLOCK_PART for number in getattr(error, "numbers", ())}
                if blocks and blocks <= set(range(self.num_blocks)):
                    raise self._unfinished(blocks) from error
                raise
            except ExtraPartError as error:
                # A block that was a part once has come out smaller since (another processor rounds
                # otherwise), and this store gives no way to leave a part out: from the start.
                self.discard()
                raise UnfinishedError(self.spec.uri, tuple(range(self.num_blocks))) from error
        # The record of the commit goes last: whoever is killed here finds that it was done.
        if not keep_work:
            self._remove_work(last=(SPEC, _COMMIT))
        return finished

    def discard(self) -> None:
        for item in self._upload_records():
            upload_id = json.loads(storage.read_bytes(item.uri))["upload_id"]
            uploads.abort(self.spec.uri, upload_id)
        # The upload's name goes late, lest parts stay that nobody knows of.
        self._remove_work(last=(f"upload-{self._find_upload()[0]:06d}.json", SPEC))
        self._upload_id = None

    def _resume_commit(self) -> Finished | None:
        """Commit what a killed process was about to; None where that is not, or no longer, all."""
        try:
            commit = _unpack_commit(storage.read_bytes(self._work(_COMMIT)))
        except MissingObjectError:
            return None
        try:
            return self._complete(commit)
        except (StalePartError, UploadGoneError, ExtraPartError):
            storage.delete([self._work(_COMMIT)])
            return None

    def _complete(self, commit: _Commit) -> Finished:
        found = uploads.complete(self.spec.uri, commit.upload_id, commit.parts)
        return Finished(
            uri=self.spec.uri,
            size=found.size,
            etag=found.etag,
            num_parts=len(commit.parts),
            thumbnail=commit.thumbnail,
        )

    def _prepare(self, *, icc_profile: bytes | None) -> _Commit:
        """Upload all that is not there yet."""
        spec = self.spec
        stored = _Stored.look(self)
        blocks: list[_Block] = []
        tops: list[list[EncodedTiles]] = [
            [] for _ in level_extents(spec.extent)[num_block_levels(spec) :]
        ]
        smallest: list[Rgb] = []
        bands = self._bands(stored.has, seen=lambda record: blocks.append(_as_block(record)))
        # A slide of one level has no top levels, but its pieces are the thumbnail.
        strips = level_strips(bands, num_levels=max(1, len(tops)), strip_px=spec.format.tile_px)
        for level, strip in strips:
            if tops:
                tops[level].append(encode_tiles(strip, form=spec.format, pool=self._pool))
            if level + 1 >= len(tops):
                smallest.append(strip)

        colours = _colours(
            [*(block.flat for block in blocks), *(t.flat for row in tops for t in row)]
        )
        flats = {colour: flat_tile(colour, form=spec.format) for colour in colours}
        start = head_bytes(spec, icc_profile=icc_profile)
        flat_places = {}
        for colour, tile in flats.items():
            flat_places[colour] = (start, len(tile))
            start += len(tile)
        end = start + sum(len(s) for level in tops for row in level for s in row.streams)
        layout = lay_out([block.size for block in blocks], start=end)
        tables = [
            *_block_tables(spec, blocks, layout.block_offsets, flat_places),
            *_top_tables(tops, start=start, flat_places=flat_places),
        ]
        head = make_head(spec, tables=tables, icc_profile=icc_profile)
        streams = [s for level in tops for row in level for s in row.streams]
        before = b"".join([head, *flats.values(), *streams])
        assert len(before) == end
        return _Commit(
            upload_id=self._current_upload(),
            parts=self._put_rest(before, blocks=blocks, layout=layout),
            thumbnail=np.concatenate(smallest),
        )

    def _put_rest(
        self, before: bytes, *, blocks: Sequence[_Block], layout: _Layout
    ) -> tuple[Part, ...]:
        """All parts of the file: the large blocks' are there, the others are uploaded here."""
        uri, upload_id = self.spec.uri, self._current_upload()
        first_group_part = FIRST_BLOCK_PART + self.num_blocks
        lost: list[int] = []

        def joined(indexes: Iterable[int]) -> bytes:
            return b"".join(self._read_payload(index, blocks[index], lost) for index in indexes)

        def put_group(number: int) -> Part:
            content = joined(layout.groups[number])
            return uploads.put_part(uri, upload_id, first_group_part + number, content)

        with ThreadPoolExecutor(CONCURRENCY, thread_name_prefix="parts") as pool:
            groups = list(pool.map(put_group, range(len(layout.groups))))
        content = before + joined(layout.with_head) + bytes(layout.padding)
        if lost:
            raise self._unfinished(lost)
        large = [
            Part(number=FIRST_BLOCK_PART + i, etag=blocks[i].etag, size=blocks[i].size)
            for i in layout.large
        ]
        return (uploads.put_part(uri, upload_id, HEAD_PART, content), *large, *groups)

    def _read_payload(self, index: int, block: _Block, lost: list[int]) -> bytes:
        """A small block; one that is not what was recorded is noted in `lost`."""
        with suppress(MissingObjectError):
            content = storage.read_bytes(self._payload_uri(index, block.sha256))
            if hashlib.sha256(content).hexdigest() == block.sha256:
                return content
        lost.append(index)
        return bytes(block.size)


@dataclass(frozen=True, kw_only=True)
class _Stored:
    """What storage has of an output: parts by number, and the names and sizes of payloads."""

    parts: Mapping[int, Part]
    payloads: Mapping[str, int]

    @classmethod
    def look(cls, output: TiffOutput) -> "_Stored":
        parts: dict[int, Part] = {}
        with suppress(UploadGoneError):
            parts = uploads.list_parts(output.spec.uri, output._current_upload())
        found = storage.list_objects(storage.join(output.spec.work_uri, "payloads"))
        payloads = {storage.name_of(item.uri): item.size for item in found}
        return cls(parts=parts, payloads=payloads)

    def has(self, record: Record) -> bool:
        """Whether the bytes that a record speaks of are there."""
        size, etag, sha256 = (record.arrays[name].item() for name in ("size", "etag", "sha256"))
        if etag:
            number = FIRST_BLOCK_PART + record.index
            return bool(self.parts.get(number) == Part(number=number, etag=etag, size=size))
        if sha256:
            return bool(self.payloads.get(_payload_name(record.index, sha256)) == size)
        return bool(size == 0)


# --------------------------------------------------------------------------------------- layout


def lay_out(sizes: Sequence[int], *, start: int) -> _Layout:
    """Where blocks of these sizes come to lie behind `start` bytes of head and top levels."""
    least = uploads.MIN_PART_BYTES
    small = [index for index, size in enumerate(sizes) if 0 < size < least]
    large = [index for index, size in enumerate(sizes) if size >= least]
    with_head: list[int] = []
    end = start
    while small and end < least:
        with_head.append(small.pop(0))
        end += sizes[with_head[-1]]
    padding = max(0, least - end) if large else 0

    groups: list[list[int]] = []
    filled = least
    for index in small:
        if filled >= least:
            groups.append([])
            filled = 0
        groups[-1].append(index)
        filled += sizes[index]

    offsets = np.zeros(len(sizes), dtype=np.uint64)
    position = start
    for index in with_head:
        offsets[index] = position
        position += sizes[index]
    position += padding
    for index in (*large, *(index for group in groups for index in group)):
        offsets[index] = position
        position += sizes[index]
    return _Layout(
        with_head=with_head, padding=padding, large=large, groups=groups, block_offsets=offsets
    )


def _colours(flats: Sequence[NDArray[np.int32]]) -> list[int]:
    """The colours of all tiles of one colour, ascending."""
    found = np.unique(np.concatenate([flat.ravel() for flat in flats]))
    return [int(colour) for colour in found if colour != NOT_FLAT]


def _block_tables(
    spec: OutputSpec,
    blocks: Sequence[_Block],
    block_offsets: NDArray[np.uint64],
    flat_places: Mapping[int, tuple[int, int]],
) -> Iterator[LevelTables]:
    """The tables of the levels that blocks hold."""
    num_levels = num_block_levels(spec)
    tile_px = spec.format.tile_px
    grids = [num_tiles(extent, tile_px) for extent in level_extents(spec.extent)[:num_levels]]
    offsets = [np.zeros((rows, columns), np.uint64) for columns, rows in grids]
    lengths = [np.zeros((rows, columns), np.uint32) for columns, rows in grids]
    flats = [np.zeros((rows, columns), np.int32) for columns, rows in grids]
    for index, block in enumerate(blocks):
        ends = np.cumsum(block.lengths, dtype=np.uint64)
        starts = block_offsets[index] + ends - block.lengths
        first = 0
        for level in range(num_levels):
            x0, y0, x1, y1 = block_box(spec, index, level=level)
            place = np.s_[y0 // tile_px : -(-y1 // tile_px), x0 // tile_px : -(-x1 // tile_px)]
            shape = offsets[level][place].shape
            own = np.s_[first : first + shape[0] * shape[1]]
            offsets[level][place] = starts[own].reshape(shape)
            lengths[level][place] = block.lengths[own].reshape(shape)
            flats[level][place] = block.flat[own].reshape(shape)
            first = own.stop
    for level in range(num_levels):
        yield _table(offsets[level], lengths[level], flats[level], flat_places)


def _top_tables(
    tops: Sequence[Sequence[EncodedTiles]],
    *,
    start: int,
    flat_places: Mapping[int, tuple[int, int]],
) -> Iterator[LevelTables]:
    """The tables of the levels made by the last step, which lie one after the other."""
    for rows in tops:
        lengths = np.concatenate([row.lengths for row in rows])
        flat = np.concatenate([row.flat for row in rows])
        ends = start + np.cumsum(lengths, dtype=np.uint64)
        yield _table(ends - lengths.ravel(), lengths, flat, flat_places)
        start = int(ends[-1])


def _table(
    offsets: NDArray[np.uint64],
    lengths: NDArray[np.uint32],
    flat: NDArray[np.int32],
    flat_places: Mapping[int, tuple[int, int]],
) -> LevelTables:
    """A level's table, in which tiles of one colour share one place."""
    offsets, lengths, flat = offsets.ravel().copy(), lengths.ravel().copy(), flat.ravel()
    for colour in np.unique(flat[flat != NOT_FLAT]).tolist():
        offsets[flat == colour], lengths[flat == colour] = flat_places[colour]
    return LevelTables(offsets=offsets, byte_counts=lengths)


# -------------------------------------------------------------------------------------- records


def _payload_name(index: int, sha256: str) -> str:
    # By content: a record never speaks of a payload that another attempt has written.
    return f"{index:06d}.{sha256[:32]}.bin"


def _as_block(record: Record) -> _Block:
    arrays = record.arrays
    return _Block(
        size=int(arrays["size"]),
        etag=str(arrays["etag"]),
        sha256=str(arrays["sha256"]),
        lengths=arrays["lengths"],
        flat=arrays["flat"],
    )


def _pack_commit(commit: _Commit) -> bytes:
    content = io.BytesIO()
    np.savez_compressed(
        content,
        allow_pickle=False,
        upload_id=np.array(commit.upload_id),
        numbers=np.array([part.number for part in commit.parts]),
        etags=np.array([part.etag for part in commit.parts]),
        sizes=np.array([part.size for part in commit.parts]),
        thumbnail=commit.thumbnail,
    )
    return content.getvalue()


def _unpack_commit(content: bytes) -> _Commit:
    with np.load(io.BytesIO(content), allow_pickle=False) as members:
        columns = (members[name].tolist() for name in ("numbers", "etags", "sizes"))
        return _Commit(
            upload_id=str(members["upload_id"]),
            parts=tuple(
                Part(number=number, etag=etag, size=size)
                for number, etag, size in zip(*columns, strict=True)
            ),
            thumbnail=members["thumbnail"],
        )
