"""One OME-Zarr 0.5 from many workers: a shard per block and level, the root's metadata last.

Arrays are (c, y, x) uint8; a chunk is one channel of a tile, a shard all channels of a block. White
chunks are left out: readers find the fill value. Until the root's `zarr.json` is there, a reader
finds no image.

Source: https://ngff.openmicroscopy.org/0.5/; https://zarr-specs.readthedocs.io/en/latest/v3/
"""

import base64
import hashlib
import json
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.codecs import BloscCodec
from zarr.storage import MemoryStore

from carn import storage
from carn.errors import MissingObjectError
from carn.slides.encoding import block_levels, halved
from carn.slides.slide import Rgb
from carn.slides.slide_output import (
    BACKGROUND,
    CONCURRENCY,
    NOTICE,
    SPEC,
    Finished,
    OutputSpec,
    Record,
    SlideOutput,
    ahead,
    has_more_levels,
    level_extents,
    level_mpp,
    num_block_levels,
    num_tiles,
    pack_record,
    unpack_record,
)
from carn.slides.top_levels import level_strips
from carn.storage import ObjectStat

# On tissue within 4 % of the size of level 5, in a third of its time.
COMPRESSOR = BloscCodec(cname="zstd", clevel=1, shuffle="bitshuffle")
METADATA = "zarr.json"
_CHANNELS = (("Red", "FF0000"), ("Green", "00FF00"), ("Blue", "0000FF"))
_STARTED, _COMMIT = "started.json", "commit.npz"


class ZarrOutput(SlideOutput):
    """An OME-Zarr. Made by `carn.slides.slide_output.open_output`.

    Beginning one where another stands takes that one's root away: unlike a file, a folder cannot be
    replaced in one step.
    """

    # -------------------------------------------------------------------------------- blocks

    def begin(self) -> None:
        if self._resume_commit() is not None or storage.is_file(self._work(_STARTED)):
            return
        self._write_spec()  # shards without a root are to be known as ours
        storage.delete([self._target(METADATA)])
        storage.write_bytes(self._work(_STARTED), json.dumps({"uri": self.spec.uri}).encode())

    def done_blocks(self) -> set[int]:
        if self._resume_commit() is not None:
            return set(range(self.num_blocks))
        there = self._listed()
        records = self._read_records(sorted(self._recorded()), without=("piece",))
        return {
            record.index
            for record in records
            if record is not None and self._is_stored(record, there)
        }

    def write_block(
        self,
        index: int,
        pixels: Rgb,
        *,
        facts: Mapping[str, NDArray[Any] | float | int | str],
        seconds: dict[str, float] | None = None,
    ) -> int:
        self._check_block(index, pixels)
        num_levels = num_block_levels(self.spec)
        sizes, etags, hashes = [], [], []
        started, uploading_s = time.perf_counter(), 0.0
        level_px = pixels
        for level, level_px in enumerate(block_levels(pixels, num_levels=num_levels)):
            uri = self._target(self._shard(index, level))
            shard_px = self.spec.block_px >> level
            content = encode_shards(
                level_px, shard_px=shard_px, chunk_px=self.spec.format.tile_px
            ).get((0, 0))
            if content is None:
                storage.delete([uri])  # of an attempt whose block was not white
                sizes.append(0)
                etags.append("")
                hashes.append("")
                continue
            encoded = time.perf_counter()
            storage.write_bytes(uri, content)
            sizes.append(len(content))
            etags.append(storage.stat(uri).etag or "")
            hashes.append("" if etags[-1] else _hash_of(content))
            uploading_s += time.perf_counter() - encoded
        piece = halved(level_px) if has_more_levels(self.spec) else pixels
        arrays = {
            "sizes": np.array(sizes, np.uint64),
            "etags": np.array(etags),
            "hashes": np.array(hashes),
            "piece": piece,
        }
        self._write_record(index, arrays, facts=facts)
        if seconds is not None:
            seconds["upload_s"] = uploading_s
            seconds["encode_s"] = time.perf_counter() - started - uploading_s
        return sum(sizes)

    def _target(self, *names: str) -> str:
        return storage.join(self.spec.uri, *names)

    def _shard(self, index: int, level: int) -> str:
        columns, _ = num_tiles(self.spec.extent, self.spec.block_px)
        return f"{level}/c/0/{index // columns}/{index % columns}"

    def _listed(self) -> dict[str, ObjectStat]:
        """What is there of the slide, by its name below the root."""
        folder = self.spec.uri.rstrip("/") + "/"
        return {item.uri.removeprefix(folder): item for item in storage.list_objects(self.spec.uri)}

    def _shards_of(self, record: Record) -> Iterator[tuple[str, int, str, str]]:
        """(name, size, etag, hash) of the shards that a record speaks of."""
        known = (record.arrays[name].tolist() for name in ("sizes", "etags", "hashes"))
        for level, (size, etag, digest) in enumerate(zip(*known, strict=True)):
            if size:
                yield self._shard(record.index, level), size, etag, digest

    def _is_stored(self, record: Record, there: Mapping[str, ObjectStat]) -> bool:
        return all(
            name in there and (there[name].size, there[name].etag or "") == (size, etag)
            for name, size, etag, _ in self._shards_of(record)
        )

    def _is_unchanged(self, record: Record, there: Mapping[str, ObjectStat]) -> bool:
        """As `_is_stored`; what no etag vouches for is read for it."""
        try:
            return self._is_stored(record, there) and all(
                etag or _hash_of(storage.read_bytes(self._target(name))) == digest
                for name, _, etag, digest in self._shards_of(record)
            )
        except MissingObjectError:
            return False

    # -------------------------------------------------------------------------------- finish

    def finish(self, *, icc_profile: bytes | None, keep_work: bool = False) -> Finished:
        finished = self._resume_commit()
        if finished is None:
            if not storage.is_file(self._work(_STARTED)):
                raise self._unfinished(range(self.num_blocks))
            names, size, thumbnail = self._write_rest()
            root = root_metadata(self.spec, icc_profile=icc_profile)
            arrays = {
                "root": np.frombuffer(root, np.uint8),
                "thumbnail": thumbnail,
                "size": size + len(root),
                "num_parts": len(names) + 1,
            }
            storage.write_bytes(self._work(_COMMIT), pack_record(arrays, facts={}))
            finished = self._resume_commit()
            assert finished is not None
        # The record of the commit goes last: whoever is killed here finds that it was done.
        if not keep_work:
            self._remove_work(last=(SPEC, _COMMIT))
        return finished

    def discard(self) -> None:
        # Beginning took away any root that was there: one that is there now is this slide's.
        if storage.is_file(self._work(SPEC)) and not storage.is_file(self._target(METADATA)):
            self._delete([item.uri for item in self._listed().values()])
            storage.delete_unfinished(self.spec.uri)
            storage.delete_below(self.spec.uri)  # the folders
        self._remove_work(last=(SPEC,))

    def _resume_commit(self) -> Finished | None:
        """Write the root whose content is recorded; None where nothing is ready for that."""
        try:
            content = storage.read_bytes(self._work(_COMMIT))
        except MissingObjectError:
            return None
        arrays = unpack_record(0, content).arrays
        storage.write_bytes(self._target(METADATA), arrays["root"].tobytes())
        return Finished(
            uri=self.spec.uri,
            size=int(arrays["size"]),
            etag=storage.stat(self._target(METADATA)).etag,
            num_parts=int(arrays["num_parts"]),
            thumbnail=arrays["thumbnail"],
        )

    def _write_rest(self) -> tuple[set[str], int, Rgb]:
        """All but the root: names and bytes of all objects, and the coarsest level."""
        there = self._listed()
        sizes: dict[str, int] = {}
        first_top = num_block_levels(self.spec)
        extents = level_extents(self.spec.extent)
        num_tops = len(extents) - first_top
        smallest: list[Rgb] = []

        def seen(record: Record) -> None:
            sizes.update((name, size) for name, size, *_ in self._shards_of(record))

        def top_shards() -> Iterator[tuple[str, bytes]]:
            tile_px = self.spec.format.tile_px
            rows = [0] * len(extents)
            bands = self._bands(lambda record: self._is_unchanged(record, there), seen=seen)
            # A slide of one level has no top levels, but its pieces are the thumbnail.
            strips = level_strips(bands, num_levels=max(1, num_tops), strip_px=tile_px)
            for top, strip in strips:
                if top + 1 >= num_tops:
                    smallest.append(strip)
                if num_tops:
                    shards = encode_shards(strip, shard_px=tile_px, chunk_px=tile_px)
                    for (_, column), content in shards.items():
                        yield f"{first_top + top}/c/0/{rows[top]}/{column}", content
                    rows[top] += 1
            for level in range(len(extents)):
                yield f"{level}/{METADATA}", array_metadata(self.spec, level=level)

        def put(named: tuple[str, bytes]) -> tuple[str, int]:
            name, content = named
            storage.write_bytes(self._target(name), content)
            return name, len(content)

        with ThreadPoolExecutor(CONCURRENCY, thread_name_prefix="shards") as pool:
            for name, size in ahead(put, top_shards(), pool=pool, num=2 * CONCURRENCY):
                sizes[name] = size
        # What another slide, or another attempt at this one, left here would be read as ours.
        self._delete([there[name].uri for name in there if name not in sizes])
        folders = {name.split("/")[0] for name in there} - {name.split("/")[0] for name in sizes}
        for name in folders - {METADATA}:
            storage.delete_below(self._target(name))  # their empty remains on a local disk
        return set(sizes), sum(sizes.values()), np.concatenate(smallest)


def _hash_of(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def encode_shards(pixels: Rgb, *, shard_px: int, chunk_px: int) -> dict[tuple[int, int], bytes]:
    """The shards of (H, W, 3) uint8 RGB by (row, column), without those that are white."""
    store: dict[str, Any] = {}
    height, width = pixels.shape[:2]
    array = _create(MemoryStore(store), (width, height), shard_px=shard_px, chunk_px=chunk_px)
    array[:] = pixels.transpose(2, 0, 1)
    shards = {}
    for key, content in store.items():
        if key != METADATA:
            row, column = key.split("/")[-2:]
            shards[int(row), int(column)] = content.to_bytes()
    return shards


def array_metadata(spec: OutputSpec, *, level: int) -> bytes:
    """The `zarr.json` of a level."""
    store: dict[str, Any] = {}
    tile_px = spec.format.tile_px
    is_block_level = level < num_block_levels(spec)
    _create(
        MemoryStore(store),
        level_extents(spec.extent)[level],
        shard_px=spec.block_px >> level if is_block_level else tile_px,
        chunk_px=tile_px,
    )
    content: bytes = store[METADATA].to_bytes()
    return content


def _create(
    store: MemoryStore, extent: tuple[int, int], *, shard_px: int, chunk_px: int
) -> "zarr.Array[Any]":
    return zarr.create_array(
        store,
        shape=(3, extent[1], extent[0]),
        dtype="uint8",
        chunks=(1, chunk_px, chunk_px),
        shards=(3, shard_px, shard_px),
        compressors=COMPRESSOR,
        fill_value=BACKGROUND,
        dimension_names=("c", "y", "x"),
    )


def root_metadata(spec: OutputSpec, *, icc_profile: bytes | None) -> bytes:
    """The `zarr.json` of the image: axes, scales in um, channels, and where it comes from.

    OME-Zarr knows no ICC profile: it stands, in base64, among the attributes of this project.
    """
    space = {"type": "space"} | ({} if spec.mpp is None else {"unit": "micrometer"})
    datasets = []
    for level in range(len(level_extents(spec.extent))):
        # Without MPP the scale is in level-0 px, and no unit is claimed.
        mpp_x, mpp_y = level_mpp(spec.mpp or (1.0, 1.0), level)
        scale = {"type": "scale", "scale": [1.0, mpp_y, mpp_x]}
        datasets.append({"path": f"{level}", "coordinateTransformations": [scale]})
    window = {"min": 0, "max": 255, "start": 0, "end": 255}
    channels = [
        {"label": label, "color": color, "active": True, "window": window}
        for label, color in _CHANNELS
    ]
    ome = {
        "version": "0.5",
        "multiscales": [
            {
                "axes": [{"name": "c", "type": "channel"}]
                + [{"name": axis, **space} for axis in ("y", "x")],
                "datasets": datasets,
                "type": "mean of 2 x 2 px",
            }
        ],
        "omero": {"channels": channels, "rdefs": {"model": "color"}},
    }
    own = {"notice": NOTICE, "mpp_um": spec.mpp, "provenance": spec.provenance}
    if icc_profile is not None:
        own["icc_profile_base64"] = base64.b64encode(icc_profile).decode()
    root = {
        "zarr_format": 3,
        "node_type": "group",
        "attributes": {"ome": ome, "carn": own},
    }
    return json.dumps(root, indent=2, sort_keys=True).encode()
