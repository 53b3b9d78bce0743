"""The crops of a split as one array, mapped into memory from the node's cache.

SR takes long to make, so it is kept below the study's output as well, a file for each group of
tiles: workers share the groups, and a run that was killed goes on where it was.
"""

import hashlib
import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from carn import storage
from carn.classification.crops import Corpus, CropIndex, Split
from carn.classification.kinds import LR, Kind, cut_crops, make_pictures
from carn.errors import CacheError, DatasetError
from carn.node_cache import hold
from carn.training.group import WorkerGroup
from carn.version import code_version


@dataclass(frozen=True, kw_only=True, eq=False)
class CropStore:
    """Crops with their labels.

    Attributes:
        pixels: (n, side, side, 3) uint8.
        index: which crops they are; `index.label` is what is to be learnt.
        pin: keeps the file in the node's cache.
    """

    pixels: npt.NDArray[np.uint8]
    index: CropIndex
    pin: IO[bytes] | None = None

    def __len__(self) -> int:
        return len(self.index)


@dataclass(frozen=True, kw_only=True, eq=False)
class PictureSource:
    """Makes the crops of one kind of a split, a group of tiles at a time.

    Attributes:
        corpus: where HR comes from.
        split: of the corpus.
        index: the crops that are wanted.
        kind: of picture.
        model: of the kind, on `device`.
        scale: SR factor.
        device: where the model is.
    """

    corpus: Corpus
    split: Split
    index: CropIndex
    kind: Kind
    model: nn.Module | None
    scale: int
    device: torch.device

    def wanted_groups(self) -> list[int]:
        """The groups that hold wanted crops."""
        groups = self.corpus.groups(self.split)
        return [number for number, group in enumerate(groups) if len(self._rows(group))]

    def index_of(self, group: int) -> CropIndex:
        """The wanted crops of a group."""
        return self.index.take(self._rows(self.corpus.groups(self.split)[group]))

    def crops(self, group: int) -> npt.NDArray[np.uint8]:
        """(n, side, side, 3) wanted crops of a group.

        Raises:
            DatasetError: a tile is damaged.
        """
        first, _ = self.corpus.groups(self.split)[group]
        index = self.index_of(group)
        numbers = np.unique(index.tile).tolist()
        tiles = self.corpus.read(self.split, group)
        pictures = make_pictures(
            [tiles[number - first] for number in numbers],
            kind=self.kind,
            model=self.model,
            scale=self.scale,
            device=self.device,
        )
        return cut_crops(
            pictures,
            index=index,
            tiles=numbers,
            kind=self.kind,
            scale=self.scale,
            crop_px=self.corpus.crop_px,
        )

    def side_px(self) -> int:
        """Side of a crop as it is fed to the classifier."""
        return self.corpus.crop_px // (self.scale if self.kind.key == LR else 1)

    def _rows(self, group: tuple[int, int]) -> npt.NDArray[np.int64]:
        first, count = group
        low, high = np.searchsorted(self.index.tile, [first, first + count])
        return np.arange(low, high)


def load_crops(source: PictureSource, *, work_uri: str, group: WorkerGroup) -> CropStore:
    """All wanted crops of a source; every worker of the group calls it.

    Args:
        source: what makes them.
        work_uri: folder or prefix where SR is kept between runs.
        group: the workers.

    Raises:
        CacheError: they do not fit the node's cache.
        DatasetError: a tile is damaged.
    """
    if source.kind.is_learnt:
        for number in source.wanted_groups()[group.rank :: group.world_size]:
            uri = _shard(work_uri, source, number)
            if not storage.is_file(uri):
                storage.write_bytes(uri, _npy(source.crops(number)))
        group.barrier()
    side, count = source.side_px(), len(source.index)
    num_bytes = count * side * side * 3

    def fill(folder: Path) -> None:
        path = folder / "crops.u8"
        try:
            with path.open("wb") as file:
                for block in _blocks(source, work_uri):
                    file.write(block.tobytes())
                written = file.tell()
        except OSError as error:
            reason = f"crops cannot be written to {folder} ({error.strerror})"
            raise CacheError(source.corpus.uri, reason) from error
        if written != num_bytes:
            raise DatasetError(f"{source.corpus.uri}: its {source.split} split changed meanwhile")

    folder, pin = hold(_cache_key(source), uri=source.corpus.uri, size=lambda: num_bytes, fill=fill)
    pixels = np.memmap(folder / "crops.u8", np.uint8, "r", shape=(count, side, side, 3))
    return CropStore(pixels=pixels, index=source.index, pin=pin)


def _blocks(source: PictureSource, work_uri: str) -> Iterator[npt.NDArray[np.uint8]]:
    for number in source.wanted_groups():
        if source.kind.is_learnt:
            content = storage.read_bytes(_shard(work_uri, source, number))
            yield np.load(io.BytesIO(content), allow_pickle=False)
        else:
            yield source.crops(number)


def _shard(work_uri: str, source: PictureSource, number: int) -> str:
    name = f"{source.split}-{number:05d}.npy"
    return storage.join(work_uri, "pictures", source.kind.key, name)


def _npy(crops: npt.NDArray[np.uint8]) -> bytes:
    sink = io.BytesIO()
    np.save(sink, crops)
    return sink.getvalue()


def _cache_key(source: PictureSource) -> str:
    index, corpus = source.index, source.corpus
    digest = hashlib.sha256()
    for column in (index.tile, index.x_px, index.y_px):
        digest.update(column.tobytes())
    # The code that degrades and cuts may change.
    facts = f"{corpus.digest}|{source.split}|{source.kind.key}|{corpus.crop_px}|x{source.scale}"
    digest.update(f"{facts}|{code_version()}".encode())
    return f"crops{digest.hexdigest()[:32]}"
