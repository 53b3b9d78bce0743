"""OME-Zarr 0.4 and 0.5 as slides: 8-bit RGB, a folder or prefix, chunk by chunk.

Source: https://ngff.openmicroscopy.org/0.4/ and https://ngff.openmicroscopy.org/0.5/. That a chunk
which is not there has the fill value, is Zarr's rule: what a folder has lost cannot be told.
"""

import asyncio
import base64
import binascii
import functools
import warnings
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import zarr
from zarr.abc.store import (
    ByteRequest,
    OffsetByteRequest,
    RangeByteRequest,
    Store,
    SuffixByteRequest,
)
from zarr.core.buffer import Buffer, BufferPrototype

from carn import storage
from carn.errors import CarnError, MissingObjectError, SlideError
from carn.slides.slide import (
    Level,
    Rgb,
    Slide,
    SlideProperties,
    level_downsamples,
    plausible_mpp,
)

# Um of the units that UDUNITS-2 names and microscopes use.
_UM = {"nanometer": 1e-3, "micrometer": 1.0, "millimeter": 1e3, "centimeter": 1e4, "meter": 1e6}
_RGB_COLOURS = ("FF0000", "00FF00", "0000FF")
# Chunks and shards that are open at once.
_MAX_OPEN = 64
_WAY_OUT = "export it anew as 8-bit RGB"
FIRST_OF_COLLECTION_NOTE = "the first image, 0, of a collection, as bioformats2raw writes slides"


class OmeZarrSlide(Slide):
    """An OME-Zarr. Opened by `carn.slides.open_slide`."""

    reader = "ome-zarr"

    def __init__(self, uri: str) -> None:
        """Read the metadata of a folder or prefix.

        Raises:
            SlideError: not an OME-Zarr of one image, or not 8-bit RGB.
            StorageError: it cannot be read.
        """
        self._store = _ReadStore(uri)
        attributes: Mapping[str, Any] = dict(self._opened(uri, "").attrs)
        ome = attributes.get("ome", attributes)
        folder = ""
        notes: tuple[str, ...] = ()
        if "multiscales" not in ome and "bioformats2raw.layout" in ome:
            # A slide as bioformats2raw writes it: first the slide, then its label and macro image.
            folder, notes = "0/", (FIRST_OF_COLLECTION_NOTE,)
            attributes = dict(self._opened(uri, "0").attrs)
            ome = attributes.get("ome", attributes)
        if "multiscales" not in ome:
            raise SlideError(uri, _why_no_image(ome))
        try:
            multiscale = ome["multiscales"][0]
            axes = [axis["name"] for axis in multiscale["axes"]]
            paths = [f"{folder}{dataset['path']}" for dataset in multiscale["datasets"]]
            mpps = _mpp(multiscale, axes)
            colours = [str(c.get("color", "")) for c in ome.get("omero", {}).get("channels", [])]
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise SlideError(uri, f"has metadata that are not OME-Zarr's ({error!r})") from error
        arrays = [self._opened(uri, path) for path in paths]
        if not arrays or not all(isinstance(array, zarr.Array) for array in arrays):
            raise SlideError(uri, "names levels that are no arrays")
        self._arrays = arrays
        self._axes = tuple(axes)
        for array in arrays:
            self._check_is_rgb(uri, array, colours)
        places = axes.index("x"), axes.index("y")
        extents = [(int(array.shape[places[0]]), int(array.shape[places[1]])) for array in arrays]
        super().__init__(
            uri,
            levels=tuple(
                Level(width_px=width, height_px=height, downsample=downsample)
                for (width, height), downsample in zip(
                    extents, _downsamples(uri, extents), strict=True
                )
            ),
            properties=SlideProperties(
                mpp_x=plausible_mpp(mpps[0]),
                mpp_y=plausible_mpp(mpps[1]),
                vendor="ome-zarr",
                icc_profile=_icc_profile(attributes),
                notes=notes,
            ),
        )

    def _opened(self, uri: str, path: str) -> Any:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of codecs without a specification, for one
                return zarr.open(self._store, path=path, mode="r")
        except CarnError:
            raise
        # Whatever the library came upon in metadata that may be anybody's.
        except Exception as error:
            what = f"its array {path!r}" if path else "it"
            raise SlideError(uri, f"is no OME-Zarr: {what} cannot be opened ({error})") from error

    def _check_is_rgb(self, uri: str, array: Any, colours: Sequence[str]) -> None:
        axes = self._axes
        sizes = dict(zip(axes, array.shape, strict=False))
        if len(axes) != array.ndim or not {"y", "x"} <= sizes.keys() or len(sizes) != len(axes):
            raise SlideError(uri, f"has axes {', '.join(axes)} of an array of {array.ndim}")
        if array.dtype != np.uint8:
            raise SlideError(uri, f"holds px of {array.dtype}; {_WAY_OUT}")
        if sizes.get("c", 1) != 3:
            raise SlideError(uri, f"holds {sizes.get('c', 1)} channels, no RGB; {_WAY_OUT}")
        deep = [name for name in axes if name not in ("c", "y", "x") and sizes[name] != 1]
        if deep:
            raise SlideError(
                uri, f"holds {sizes[deep[0]]} images along {deep[0]!r}; export one of them"
            )
        if len(colours) == 3 and all(colours) and _upper(colours) != _RGB_COLOURS:
            raise SlideError(
                uri,
                f"holds channels shown as {', '.join(colours)}, as of fluorescence; {_WAY_OUT}",
            )

    def _read_level(self, x: int, y: int, width: int, height: int, *, level: int) -> Rgb:
        boxes = {"x": slice(x, x + width), "y": slice(y, y + height), "c": slice(None)}
        index = tuple(boxes.get(name, 0) for name in self._axes)
        try:
            pixels = np.asarray(self._arrays[level][index])
        except CarnError:
            raise
        # A codec may say anything of what is damaged.
        except Exception as error:
            raise self._damaged(f"Zarr says {str(error)!r}", x, y, level=level) from error
        kept = [name for name in self._axes if name in boxes]
        order = [kept.index(name) for name in ("y", "x", "c")]
        return np.ascontiguousarray(pixels.transpose(order))

    def close(self) -> None:
        self._store.forget()


def _why_no_image(ome: Mapping[str, Any]) -> str:
    if "plate" in ome or "well" in ome:
        return "is a plate of wells, no slide"
    return "is a Zarr, but its metadata name no image (no multiscales), or it was never finished"


def _mpp(multiscale: Mapping[str, Any], axes: Sequence[str]) -> tuple[float | None, float | None]:
    units = [axis.get("unit") for axis in multiscale["axes"]]
    scales = np.ones(len(axes))
    first = multiscale["datasets"][0].get("coordinateTransformations", [])
    for transformation in (*first, *multiscale.get("coordinateTransformations", [])):
        if transformation["type"] == "scale":
            scales = scales * np.asarray(transformation["scale"], dtype=float)
    mpp_x, mpp_y = (
        float(scales[place]) * _UM[units[place]] if units[place] in _UM else None
        for place in (axes.index("x"), axes.index("y"))
    )
    return mpp_x, mpp_y


def _downsamples(uri: str, extents: list[tuple[int, int]]) -> list[float]:
    if any(min(extent) < 1 for extent in extents):
        raise SlideError(uri, "has a level without pixels")
    if extents != sorted(extents, reverse=True):
        raise SlideError(uri, "does not list its levels from the finest on")
    return level_downsamples(extents)


def _icc_profile(attributes: Mapping[str, Any]) -> bytes | None:
    """As this project stores it; OME-Zarr has no place for one."""
    try:
        return base64.b64decode(attributes["carn"]["icc_profile_base64"], validate=True) or None
    except (LookupError, TypeError, binascii.Error):
        return None


def _upper(colours: Iterable[str]) -> tuple[str, ...]:
    return tuple(colour.upper() for colour in colours)


class _ReadStore(Store):
    """What Zarr reads of a folder or prefix, through `carn.storage`, with its errors."""

    supports_writes = False
    supports_deletes = False
    supports_listing = False

    def __init__(self, root: str) -> None:
        super().__init__(read_only=True)
        self._root = root
        self._source = functools.lru_cache(maxsize=_MAX_OPEN)(self._open_source)

    def forget(self) -> None:
        """Let go of what is open."""
        self._source.cache_clear()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _ReadStore) and other._root == self._root

    __hash__ = None  # type: ignore[assignment]

    def _open_source(self, key: str) -> storage.ByteSource | None:
        name = storage.join(self._root, key)
        if not storage.is_s3(name) and not storage.is_file(name):
            return None
        try:
            return storage.open_source(name)
        except MissingObjectError:
            return None

    def _read(self, key: str, wanted: ByteRequest | None) -> bytes | None:
        source = self._source(key)
        if source is None:
            return None
        start, length = 0, source.size
        if isinstance(wanted, RangeByteRequest):
            start, length = wanted.start, wanted.end - wanted.start
        elif isinstance(wanted, OffsetByteRequest):
            start, length = wanted.offset, source.size - wanted.offset
        elif isinstance(wanted, SuffixByteRequest):
            start = max(0, source.size - wanted.suffix)
            length = source.size - start
        if length <= 0:
            return b""
        (content,) = source.read_ranges([(start, length)])
        return content

    async def get(
        self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None
    ) -> Buffer | None:
        content = await asyncio.to_thread(self._read, key, byte_range)
        return None if content is None else prototype.buffer.from_bytes(content)

    async def get_partial_values(
        self,
        prototype: BufferPrototype,
        key_ranges: Iterable[tuple[str, ByteRequest | None]],
    ) -> list[Buffer | None]:
        return list(
            await asyncio.gather(*(self.get(key, prototype, span) for key, span in key_ranges))
        )

    async def exists(self, key: str) -> bool:
        return await asyncio.to_thread(self._source, key) is not None

    async def set(self, key: str, value: Buffer) -> None:
        raise NotImplementedError

    async def delete(self, key: str) -> None:
        raise NotImplementedError

    def list(self) -> AsyncIterator[str]:
        raise NotImplementedError

    def list_prefix(self, prefix: str) -> AsyncIterator[str]:
        raise NotImplementedError

    def list_dir(self, prefix: str) -> AsyncIterator[str]:
        raise NotImplementedError
