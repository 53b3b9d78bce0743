"""PCam as published: HDF5 files of 96-px images with labels, and a table of their slides.

Source: Veeling et al. 2018, https://arxiv.org/abs/1806.03962; https://github.com/basveeling/pcam,
files at https://zenodo.org/records/2546921 (CC0). An image is tumour when its middle 32 px hold any
tumour.
"""

import csv
import hashlib
import io
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from carn import storage
from carn.bcsr.build import group_of
from carn.classification.crops import CropIndex, Split
from carn.errors import DatasetError, MissingObjectError
from carn.slides.slide import Rgb

IMAGE_PX = 96
# Images that are read at a stroke: 7 MB.
IMAGES_PER_GROUP = 256
# Of a split: PCam's largest has 262,144 images.
MAX_IMAGES = 1 << 22
# Of a table that names slides: 100 bytes for each of so many images.
MAX_META_BYTES = 512 * 1024 * 1024
# Bytes that are unpacked to get at one image.
MAX_CHUNK_BYTES = 1 << 30
# Filters that come with HDF5 (its filter numbers): gzip, shuffle, Fletcher's checksum. Others are
# programs that HDF5 would look for on the disk.
KNOWN_FILTERS = (1, 2, 3)
# Bytes of one request where HDF5 asks for a few.
READ_AHEAD_BYTES = 1 << 20

_SPLIT_NAMES = {"train": "train", "validation": "valid", "test": "test"}
_PUBLISHED = (
    "PCam is published at https://github.com/basveeling/pcam and "
    "https://zenodo.org/records/2546921 (CC0)"
)


@dataclass(frozen=True, kw_only=True)
class PcamCorpus:
    """A `carn.classification.crops.Corpus` of PCam's files, each image a tile of one crop.

    Attributes:
        uri: the folder or prefix.
        has_slides: whether the tables that name each image's slide are there for all splits.
        group_regex: what of a slide's name tells what is independent.
    """

    uri: str
    digest: str
    has_slides: bool
    group_regex: str | None
    crop_px: int = IMAGE_PX
    name: str = "pcam"
    title: str = "PCam"

    def index(self, split: Split) -> CropIndex:
        """All images of a split.

        Raises:
            DatasetError: labels or the table of slides are damaged.
        """
        label = read_labels(self.uri, split)
        count = len(label)
        ids = tuple(f"{_SPLIT_NAMES[split]}-{number:06d}" for number in range(count))
        slides = ids
        if self.has_slides:
            names = _read_slides(self.uri, split, count=count)
            slides = tuple(group_of(name, self.group_regex) for name in names)
        return CropIndex(
            tile=np.arange(count),
            x_px=np.zeros(count, np.int64),
            y_px=np.zeros(count, np.int64),
            label=label,
            tile_ids=ids,
            slides=slides,
        )

    def groups(self, split: Split) -> list[tuple[int, int]]:
        """First image and number of images of each part that is read at a stroke."""
        count = _num_images(self.uri, split)
        starts = range(0, count, IMAGES_PER_GROUP)
        return [(start, min(IMAGES_PER_GROUP, count - start)) for start in starts]

    def read(self, split: Split, group: int) -> list[Rgb]:
        """The images of a group.

        Raises:
            DatasetError: the file is damaged.
        """
        start = group * IMAGES_PER_GROUP
        with _open(self.uri, split, "x") as images:
            block = np.asarray(images[start : start + IMAGES_PER_GROUP])
        return list(block)


def open_pcam(uri: str, *, group_regex: str | None = None) -> PcamCorpus:
    """The corpus of a folder or prefix that holds PCam's six files, unpacked.

    Raises:
        DatasetError: a file is missing, packed, or not of PCam's form.
        AccessDeniedError, StorageError: storage does not let it be read.
    """
    uri = storage.normalize(uri)
    identities = {}
    for split in _SPLIT_NAMES:
        for part in ("x", "y"):
            name = _file(split, part)
            identities[name] = _identity(uri, name)
    for split in _SPLIT_NAMES:
        _check(uri, split)  # type: ignore[arg-type]
    metas = [storage.join(uri, _meta(split)) for split in _SPLIT_NAMES]
    has_slides = all(storage.is_file(meta) for meta in metas)
    if has_slides:
        identities |= {storage.name_of(meta): storage.identity(meta) for meta in metas}
    digest = hashlib.sha256(json.dumps(identities, sort_keys=True).encode()).hexdigest()[:32]
    return PcamCorpus(uri=uri, digest=digest, has_slides=has_slides, group_regex=group_regex)


def read_labels(uri: str, split: Split) -> np.ndarray[Any, np.dtype[np.int64]]:
    """(n,) 1 for tumour, 0 for normal, of a split.

    Raises:
        DatasetError: the file is damaged, or holds other labels.
    """
    with _open(uri, split, "y") as labels:
        if labels.size > MAX_IMAGES or labels.dtype.kind not in "biu":
            name = _file(split, "y")
            raise DatasetError(f"{uri}/{name} holds no labels of up to {MAX_IMAGES} images")
        found = np.asarray(labels).reshape(-1).astype(np.int64)
    if not np.isin(found, (0, 1)).all():
        name = _file(split, "y")
        raise DatasetError(f"{uri}/{name} holds other labels than 0 and 1; fetch it anew")
    return found


def _check(uri: str, split: Split) -> None:
    with _open(uri, split, "x") as images, _open(uri, split, "y") as labels:
        wanted = (len(labels), IMAGE_PX, IMAGE_PX, 3)
        is_whole = tuple(images.shape) == wanted and images.dtype == np.uint8
        if not is_whole or labels.size != len(labels) or len(labels) > MAX_IMAGES:
            raise DatasetError(
                f"{uri}: {_file(split, 'x')} holds {images.dtype} of shape {tuple(images.shape)} "
                f"and {_file(split, 'y')} labels of shape {tuple(labels.shape)}; PCam's are uint8 "
                f"of (N, {IMAGE_PX}, {IMAGE_PX}, 3) and (N, 1, 1, 1). {_PUBLISHED}"
            )


def _num_images(uri: str, split: Split) -> int:
    with _open(uri, split, "y") as labels:
        return len(labels)


def _identity(uri: str, name: str) -> str:
    try:
        return storage.identity(storage.join(uri, name))
    except MissingObjectError as error:
        if storage.is_file(storage.join(uri, f"{name}.gz")):
            raise DatasetError(
                f"{uri} holds {name}.gz, which is packed as a whole and cannot be read in parts; "
                f"unpack the files first: gunzip {name.partition('_split')[0]}_split_*.h5.gz"
            ) from error
        raise DatasetError(
            f"{uri} has no {name}. {_PUBLISHED}: six files, x and y of train, valid and test, to "
            "be unpacked with gunzip"
        ) from error


def _read_slides(uri: str, split: Split, *, count: int) -> list[str]:
    place = storage.join(uri, _meta(split))
    text = storage.read_bytes(place, max_bytes=MAX_META_BYTES).decode("utf-8", errors="replace")
    try:
        rows = list(csv.DictReader(io.StringIO(text)))
    except csv.Error:
        rows = []
    if len(rows) != count or any(not row.get("wsi") for row in rows):
        raise DatasetError(
            f"{place} does not name the slide (column wsi) of each of the {count:,} images; fetch "
            "it anew, or remove it to go without slides"
        )
    return [row["wsi"] for row in rows]


def _file(split: str, part: str) -> str:
    return f"camelyonpatch_level_2_split_{_SPLIT_NAMES[split]}_{part}.h5"


def _meta(split: str) -> str:
    return f"camelyonpatch_level_2_split_{_SPLIT_NAMES[split]}_meta.csv"


@contextmanager
def _open(uri: str, split: Split, part: str) -> Iterator[Any]:
    """The array of one of the files."""
    import h5py

    place = storage.join(uri, _file(split, part))
    source = storage.open_source(place)
    try:
        with h5py.File(io.BufferedReader(_SourceFile(source), READ_AHEAD_BYTES), "r") as file:
            yield _own_dataset(file, part)
    # What h5py raises of damage: OSError of a file, KeyError of a name, RuntimeError of a block,
    # ValueError and TypeError of what is neither.
    except (OSError, KeyError, RuntimeError, ValueError, TypeError) as error:
        reason = " ".join(str(error).split())
        raise DatasetError(f"{place} is damaged or not PCam's ({reason}). {_PUBLISHED}") from error
    finally:
        source.close()


def _own_dataset(file: Any, part: str) -> Any:
    """The array of a file, whose pixels must be in the file itself.

    HDF5 follows links to other files, and reads pixels from any file that the array names.
    """
    import h5py

    if not isinstance(file.get(part, getlink=True), h5py.HardLink):
        raise ValueError(f"{part} is a link")
    found = file[part]
    if not isinstance(found, h5py.Dataset) or found.shape is None or not found.shape:
        raise ValueError(f"{part} is no array")
    if found.external or found.is_virtual:
        raise ValueError(f"{part} lies in other files")
    if found.dtype.hasobject:
        raise ValueError(f"{part} holds no numbers")
    plist = found.id.get_create_plist()
    filters = [plist.get_filter(number)[0] for number in range(plist.get_nfilters())]
    if not set(filters) <= set(KNOWN_FILTERS):
        raise ValueError(f"{part} is packed by filters {filters}; known are {KNOWN_FILTERS}")
    chunk = math.prod(found.chunks or (1,)) * found.dtype.itemsize
    if chunk > MAX_CHUNK_BYTES:
        raise ValueError(f"{part} is packed in parts of {chunk} bytes; pack it in smaller ones")
    return found


class _SourceFile(io.RawIOBase):
    """A byte source as the file that HDF5 reads from."""

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

    def readinto(self, buffer: Any) -> int:
        length = min(len(buffer), max(0, self._source.size - self._position))
        (content,) = self._source.read_ranges([(self._position, length)])
        buffer[: len(content)] = content
        self._position += len(content)
        return len(content)
