"""A finished bcSR dataset on storage: its manifest, its shards, its tiles.

The manifest is written last and names every shard: a folder without one is no dataset yet.
"""

import io
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from carn import storage
from carn.bcsr.codec import decode
from carn.bcsr.schema import SPLITS, TILES
from carn.bcsr.shards import ROWS_PER_GROUP, shard_uri
from carn.errors import DatasetError, MissingObjectError
from carn.slides.slide import Rgb

MANIFEST = "manifest.json"
# Of a manifest: some 100,000 slides and shards.
MAX_MANIFEST_BYTES = 256 * 1024 * 1024
# What of a tile's row it takes to decode it.
_DECODED_BY = ("tile_id", "width_px", "height_px", "encoding", "image")
FORMAT = "bcsr"
FORMAT_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class TileGroup:
    """Neighbouring tiles of a shard, the least that can be read without the rest of it.

    Attributes:
        uri: the shard.
        index: the row group in it.
        first: index of its first tile in the split.
        count: its tiles.
    """

    uri: str
    index: int
    first: int
    count: int


@dataclass(frozen=True, kw_only=True)
class BcsrDataset:
    """A dataset that was built whole.

    Attributes:
        uri: its folder or prefix.
        manifest: config, counts, channel means, overlaps, inputs and shards, as the build wrote it.
    """

    uri: str
    manifest: dict[str, Any]

    @property
    def channel_means(self) -> tuple[float, float, float]:
        """Mean RGB of the training tiles, 0..1."""
        red, green, blue = self.manifest["channel_means"]
        return red, green, blue

    @property
    def mpp_range(self) -> tuple[float, float] | None:
        """Least and largest um per px of its slides; None where none says it."""
        said = [row.get("mpp_x") for row in self.manifest.get("inputs", ())]
        known = [mpp for mpp in said if mpp is not None]
        return (min(known), max(known)) if known else None

    def num_tiles(self, split: str) -> int:
        """Tiles of a split."""
        return int(self.manifest["splits"][_known(split)])

    def table(self, split: str) -> pa.Table:
        """All columns of TILES but the images, for the tiles of a split, in their order.

        Raises:
            DatasetError: a shard is damaged.
        """
        names = [name for name in TILES.names if name != "image"]
        tables = []
        for shard in self._shards_of(split):
            with _open_shard(shard_uri(self.uri, shard["name"])) as parquet:
                tables.append(parquet.read(columns=names))
        return pa.concat_tables([pa.schema(TILES.field(n) for n in names).empty_table(), *tables])

    def tiles(self, split: str) -> Iterator[tuple[dict[str, Any], Rgb]]:
        """Each tile of a split: its row (TILES without `image`) and its (H, W, 3) uint8 pixels.

        Raises:
            DatasetError: a shard or a tile in it is damaged.
        """
        for uri, content in self._shards(split):
            yield from shard_tiles(content, uri=uri)

    def groups(self, split: str) -> list[TileGroup]:
        """The tiles of a split in the groups that are read at a stroke, in their order."""
        groups, first = [], 0
        for shard in self._shards_of(split):
            uri, num_tiles = shard_uri(self.uri, shard["name"]), int(shard["num_tiles"])
            for start in range(0, num_tiles, ROWS_PER_GROUP):
                count = min(ROWS_PER_GROUP, num_tiles - start)
                index = start // ROWS_PER_GROUP
                groups.append(TileGroup(uri=uri, index=index, first=first, count=count))
                first += count
        return groups

    def _shards_of(self, split: str) -> list[dict[str, Any]]:
        known = _known(split)
        return [shard for shard in self.manifest["shards"] if shard["split"] == known]

    def _shards(self, split: str) -> Iterator[tuple[str, bytes]]:
        for shard in self._shards_of(split):
            uri = shard_uri(self.uri, shard["name"])
            yield uri, storage.read_bytes(uri)


def shard_tiles(content: bytes, *, uri: str) -> Iterator[tuple[dict[str, Any], Rgb]]:
    """The rows and pixels of a shard's bytes, a tile at a time; `uri` names it in errors.

    Raises:
        DatasetError: the shard or a tile in it is damaged.
    """
    with _shard_errors(uri):
        batches = _open_parquet(content).iter_batches(batch_size=1)
    while True:
        with _shard_errors(uri):
            batch = next(batches, None)
        if batch is None:
            return
        (row,) = batch.to_pylist()
        image = row.pop("image")
        yield row, _decoded(row | {"image": image}, uri=uri)


def group_tiles(group: TileGroup) -> list[Rgb]:
    """The (H, W, 3) uint8 pixels of a group's tiles; see `named_tiles`."""
    return [pixels for _, pixels in named_tiles(group)]


def named_tiles(group: TileGroup) -> list[tuple[str, Rgb]]:
    """Read `tile_id` and (H, W, 3) uint8 pixels of a group's tiles, and no more of their shard.

    Raises:
        DatasetError: the shard or a tile in it is damaged, or holds other tiles than it should.
    """
    with _open_shard(group.uri) as parquet:
        rows = parquet.read_row_group(group.index, columns=list(_DECODED_BY))
    if len(rows) != group.count:
        raise DatasetError(
            f"{group.uri}: part {group.index} holds {len(rows)} tiles, not {group.count}; "
            "build the dataset again with --overwrite"
        )
    return [(row["tile_id"], _decoded(row, uri=group.uri)) for row in rows.to_pylist()]


def _decoded(row: dict[str, Any], *, uri: str) -> Rgb:
    try:
        extent = row["width_px"], row["height_px"]
        return decode(row["image"], row["encoding"], extent=extent)
    except (ValueError, TypeError) as error:
        raise DatasetError(f"{uri}: tile {row['tile_id']}: {error}") from error


@contextmanager
def _open_shard(uri: str) -> Iterator[pq.ParquetFile]:
    source = storage.open_source(uri)
    try:
        with _shard_errors(uri):
            yield pq.ParquetFile(
                pa.PythonFile(_SourceFile(source), mode="r"),
                page_checksum_verification=True,
                pre_buffer=True,
            )
    finally:
        source.close()


class _SourceFile(io.RawIOBase):
    """A byte source as the file that Arrow reads from."""

    def __init__(self, source: storage.ByteSource) -> None:
        self._source = source
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._source.size}
        self._position = start[whence] + offset
        return self._position

    def read(self, size: int = -1) -> bytes:
        length = self._source.size - self._position if size < 0 else size
        (content,) = self._source.read_ranges([(self._position, max(0, length))])
        self._position += len(content)
        return content


def _open_parquet(content: bytes) -> pq.ParquetFile:
    return pq.ParquetFile(io.BytesIO(content), page_checksum_verification=True)


@contextmanager
def _shard_errors(uri: str) -> Iterator[None]:
    try:
        yield
    # Arrow raises ArrowInvalid (a ValueError) or OSError, by what of the file is damaged.
    except (pa.ArrowException, OSError) as error:
        raise DatasetError(
            f"{uri} is damaged ({error}); remove it and build the dataset again with --overwrite, "
            "which writes what is missing"
        ) from error


def read_manifest(uri: str) -> dict[str, Any] | None:
    """The manifest of a dataset, or None where there is none (yet).

    Raises:
        DatasetError: the manifest is of something else, or of a newer format.
    """
    try:
        content = storage.read_bytes(storage.join(uri, MANIFEST), max_bytes=MAX_MANIFEST_BYTES)
    except MissingObjectError:
        return None
    try:
        manifest: dict[str, Any] = json.loads(content)
        found = manifest["format"], manifest["format_version"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DatasetError(f"{uri}/{MANIFEST} is not the manifest of a bcSR dataset") from error
    if found != (FORMAT, FORMAT_VERSION):
        raise DatasetError(
            f"{uri} holds {found[0]} of format version {found[1]}; this version of carn reads "
            f"{FORMAT} of version {FORMAT_VERSION}"
        )
    return manifest


def open_dataset(uri: str) -> BcsrDataset:
    """Open a finished dataset.

    Raises:
        DatasetError: there is none, or it is unfinished or of another format.
        AccessDeniedError, StorageError: storage does not let it be read.
    """
    uri = storage.normalize(uri)
    manifest = read_manifest(uri)
    if manifest is None:
        raise DatasetError(
            f"{uri} holds no finished bcSR dataset ({MANIFEST} is missing); build it with "
            "jobs/build_bcsr.py, which completes what an interrupted run began"
        )
    try:
        is_whole = all(_is_shard(shard) for shard in manifest["shards"]) and all(
            int(manifest["splits"][split]) >= 0 for split in SPLITS
        )
    except (KeyError, TypeError, ValueError):
        is_whole = False
    if not is_whole:
        raise DatasetError(
            f"{uri}/{MANIFEST} does not name its shards and splits as a build writes them; build "
            "the dataset again with --overwrite"
        )
    return BcsrDataset(uri=uri, manifest=manifest)


def _is_shard(shard: dict[str, Any]) -> bool:
    # A name with a slash could be of a file anywhere.
    is_name = re.fullmatch(r"[\w-]+\.parquet", shard["name"], re.ASCII) is not None
    return is_name and shard["split"] in SPLITS and int(shard["num_tiles"]) >= 0


def write_manifest(uri: str, manifest: dict[str, Any]) -> None:
    """Commit a dataset: from now on it exists, and is this."""
    content = {"format": FORMAT, "format_version": FORMAT_VERSION, **manifest}
    text = json.dumps(content, indent=1, sort_keys=True, ensure_ascii=False)
    storage.write_bytes(storage.join(uri, MANIFEST), text.encode() + b"\n")


def _known(split: str) -> str:
    if split not in SPLITS:
        raise ValueError(f"{split!r} is no split; there are {', '.join(SPLITS)}")
    return split
