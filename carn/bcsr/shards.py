"""The dataset's shards: Parquet files of losslessly encoded tiles, written whole or not at all.

A shard's name holds a hash of everything that decides its content. A shard that is there is
therefore the right one, and a build that runs again skips it.
"""

import hashlib
import io
import json
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from carn import storage
from carn.bcsr.codec import Encoding, encode
from carn.bcsr.measure import TilePlace, read_tiles
from carn.bcsr.schema import SPLITS, TILES
from carn.errors import CarnError, SlideError
from carn.slides import cached_slide, open_image
from carn.version import code_version

# Rows a reader must hold to get at one tile: 16 tiles of 1024 px are about 20 MB encoded.
ROWS_PER_GROUP = 16

# A guard round the reading of one slide; entering may raise a CarnError instead (see the job).
Attempt = Callable[[str], AbstractContextManager[None]]


@dataclass(frozen=True, kw_only=True)
class ShardPlan:
    """One shard to write.

    Attributes:
        name: its file name below `tiles/`.
        split: the split all its tiles are of.
        rows: the columns of TILES but for `image`, as dicts, plus `reader`; in order.
    """

    name: str
    split: str
    rows: list[dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class ShardResult:
    """What became of a planned shard.

    Attributes:
        name: the plan's name.
        num_bytes: size of the shard; 0 when it was not written.
        failures: (slide, uri, x_l0, y_l0, reason) of each tile that could not be read; when there
            is one, the shard was not written.
    """

    name: str
    num_bytes: int
    failures: list[tuple[str, str, int, int, str]]


def plan_shards(selected: pa.Table, *, encoding: Encoding, tiles_per_shard: int) -> list[ShardPlan]:
    """The shards of a dataset, by split, then slide by slide, so that few slides feed a shard.

    Args:
        selected: rows with the columns of SELECTED; those whose status is a split are planned.
        encoding: of the tiles.
        tiles_per_shard: the most rows of a shard.
    """
    plans = []
    columns = [name for name in TILES.names if name in selected.column_names]
    for split in SPLITS:
        of_split = sorted(
            selected.filter(pc.equal(selected["status"], split)).to_pylist(),
            key=lambda row: (row["slide"], row["y_l0"], row["x_l0"], row["label"]),
        )
        for start in range(0, len(of_split), tiles_per_shard):
            planned = [
                {name: row[name] for name in columns}
                | {
                    "tile_id": tile_id(row),
                    "split": split,
                    "encoding": encoding,
                    "reader": row["reader"],
                    "slide_identity": row["slide_identity"],
                }
                for row in of_split[start : start + tiles_per_shard]
            ]
            content = json.dumps([code_version(), planned], sort_keys=True)
            digest = hashlib.sha256(content.encode()).hexdigest()[:12]
            name = f"{split}-{start // tiles_per_shard:05d}-{digest}.parquet"
            plans.append(ShardPlan(name=name, split=split, rows=planned))
    return plans


def tile_id(row: dict[str, Any]) -> str:
    """The name of a tile, unique in its dataset: `<slide>_<x_l0>_<y_l0>`."""
    return f"{row['slide']}_{row['x_l0']}_{row['y_l0']}"


def shard_uri(dataset_uri: str, name: str) -> str:
    """Where a shard is, or will be."""
    return storage.join(dataset_uri, "tiles", name)


def write_shard(dataset_uri: str, plan: ShardPlan, *, attempt: Attempt) -> ShardResult:
    """Read a shard's tiles, encode them and write the shard, unless it is there already.

    Args:
        dataset_uri: the dataset's folder or prefix.
        plan: what to write.
        attempt: entered round the reading of each slide.

    Raises:
        StorageError: the shard cannot be written.
    """
    uri = shard_uri(dataset_uri, plan.name)
    if storage.is_file(uri):
        return ShardResult(name=plan.name, num_bytes=storage.stat(uri).size, failures=[])
    images: list[bytes] = []
    failures: list[tuple[str, str, int, int, str]] = []
    for slide_uri, group in groupby(plan.rows, key=lambda row: str(row["uri"])):
        rows = list(group)
        try:
            # Other shards may hold tiles of this slide, and be written at the same time.
            with attempt(f"{plan.name}|{slide_uri}"):
                _encode_slide(slide_uri, rows, images, failures)
        except CarnError as error:
            failures += [_failure(row, error) for row in rows]
    if failures:
        return ShardResult(name=plan.name, num_bytes=0, failures=failures)
    content = shard_bytes(plan.rows, images)
    storage.write_bytes(uri, content)
    return ShardResult(name=plan.name, num_bytes=len(content), failures=[])


def _encode_slide(
    uri: str,
    rows: Sequence[dict[str, Any]],
    images: list[bytes],
    failures: list[tuple[str, str, int, int, str]],
) -> None:
    identity = storage.identity(uri)
    if identity != rows[0]["slide_identity"]:
        raise SlideError(uri, "was replaced between measuring and writing; build again")
    slide = (
        open_image(uri) if rows[0]["reader"] == "image" else cached_slide(uri, identity=identity)
    )
    places = [
        TilePlace(**{name: row[name] for name in TilePlace.__dataclass_fields__}) for row in rows
    ]
    for row, pixels in zip(rows, read_tiles(slide, places), strict=True):
        if isinstance(pixels, CarnError):
            failures.append(_failure(row, pixels))
        else:
            images.append(encode(pixels, row["encoding"]))


def _failure(row: dict[str, Any], error: CarnError) -> tuple[str, str, int, int, str]:
    reason = getattr(error, "reason", None) or str(error)
    return row["slide"], row["uri"], row["x_l0"], row["y_l0"], reason


def shard_bytes(rows: Sequence[dict[str, Any]], images: Sequence[bytes]) -> bytes:
    """The Parquet file of some tiles: same rows and images, same bytes.

    Args:
        rows: the columns of TILES but for `image`.
        images: the encoded pixels of each row.
    """
    table = pa.Table.from_pylist(
        [row | {"image": image} for row, image in zip(rows, images, strict=True)], schema=TILES
    )
    buffer = io.BytesIO()
    pq.write_table(
        table,
        buffer,
        row_group_size=ROWS_PER_GROUP,
        # The images are compressed already.
        compression={name: "none" if name == "image" else "zstd" for name in TILES.names},
        use_dictionary=[name for name in TILES.names if name != "image"],
        write_statistics=[name for name in TILES.names if name != "image"],
        # JPEG XL holds no checksum: a flipped bit would decode to wrong pixels.
        write_page_checksum=True,
    )
    return buffer.getvalue()
