"""Crops before there are pixels: which there are, of which tile and slide, and of which class."""

from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt

from carn.errors import DatasetError
from carn.slides.slide import Rgb

Split = Literal["train", "validation", "test"]

# The labels of coordinate lists, by the number that stands for them.
CLASSES = ("normal", "tumor")


@dataclass(frozen=True, kw_only=True, eq=False)
class CropIndex:
    """Crops of the tiles of a split, in the order of tiles and then of rows in them.

    Attributes:
        tile: (n,) number of the tile in the split.
        x_px, y_px: (n,) top-left corner in the tile, px of HR.
        label: (n,) 1 for tumour, 0 for normal.
        tile_ids: by number of the tile.
        slides: by number of the tile, what is taken for independent of the others.
    """

    tile: npt.NDArray[np.int64]
    x_px: npt.NDArray[np.int64]
    y_px: npt.NDArray[np.int64]
    label: npt.NDArray[np.int64]
    tile_ids: tuple[str, ...]
    slides: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.tile)

    def take(self, rows: npt.NDArray[np.int64]) -> "CropIndex":
        """Some of the crops; tiles keep their numbers."""
        return CropIndex(
            tile=self.tile[rows],
            x_px=self.x_px[rows],
            y_px=self.y_px[rows],
            label=self.label[rows],
            tile_ids=self.tile_ids,
            slides=self.slides,
        )

    def slide_of_crops(self) -> list[str]:
        """The slide of each crop."""
        return [self.slides[tile] for tile in self.tile]

    def class_counts(self) -> dict[str, int]:
        """Crops of each class."""
        return {name: int((self.label == code).sum()) for code, name in enumerate(CLASSES)}


class Corpus(Protocol):
    """Labelled pictures: tiles of bcSR, or PCam."""

    @property
    def name(self) -> str:
        """As it stands in the names of files: letters and digits."""

    @property
    def title(self) -> str:
        """As it stands in print."""

    @property
    def uri(self) -> str:
        """Where it is."""

    @property
    def digest(self) -> str:
        """A hash of what it holds."""

    @property
    def crop_px(self) -> int:
        """Side of a crop, px of HR."""

    def index(self, split: Split) -> CropIndex:
        """All crops of a split; none where the corpus has no such split."""

    def groups(self, split: Split) -> list[tuple[int, int]]:
        """First tile and number of tiles of each part that is read at a stroke, in order."""

    def read(self, split: Split, group: int) -> list[Rgb]:
        """The tiles of a group, (H, W, 3) uint8."""


def cut_grid(width_px: int, height_px: int, *, crop_px: int) -> npt.NDArray[np.int64]:
    """(n, 2) top-left corners x, y of the crops that fit side by side, row by row from the top.

    A tile of 1024 px gives 8 x 8 crops of 128 px (paper, section on Table 5); what is left at the
    right and at the bottom of other tiles is not used.
    """
    x = np.arange(width_px // crop_px, dtype=np.int64) * crop_px
    y = np.arange(height_px // crop_px, dtype=np.int64) * crop_px
    return np.stack([np.tile(x, len(y)), np.repeat(y, len(x))], axis=1)


def draw_subset(
    index: CropIndex, *, max_tiles: int | None, max_crops: int | None, seed: int
) -> CropIndex:
    """Crops of at most so many tiles, at most so many; without replacement, in their order."""
    rng = np.random.default_rng(seed)
    tiles = np.unique(index.tile)
    if max_tiles is not None and max_tiles < len(tiles):
        kept = rng.choice(tiles, max_tiles, replace=False)
        index = index.take(np.flatnonzero(np.isin(index.tile, kept)))
    if max_crops is not None and max_crops < len(index):
        index = index.take(np.sort(rng.choice(len(index), max_crops, replace=False)))
    return index


def check_index(index: CropIndex, *, uri: str, split: str) -> None:
    """Find out whether a split can be learnt from or tested on.

    Raises:
        DatasetError: it has no crop, or crops of one class only.
    """
    if not len(index):
        raise DatasetError(
            f"{uri} has no crop in its {split} split, which is needed; build it with more "
            "tiles, or take a smaller --crop-px"
        )
    lacking = [name for name, count in index.class_counts().items() if not count]
    if lacking:
        raise DatasetError(
            f"{uri} has no {lacking[0]} crop in its {split} split: there is nothing to tell apart. "
            "Build it from positions of both classes, or take more with --max-tiles or --max-crops"
        )
