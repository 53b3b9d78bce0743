"""The tiles of bcSR as a corpus to classify: each crop inherits its tile's label."""

from dataclasses import dataclass

import numpy as np

from carn.bcsr.build import group_of
from carn.bcsr.dataset import BcsrDataset, group_tiles, open_dataset
from carn.classification.crops import CLASSES, CropIndex, Split, cut_grid
from carn.errors import DatasetError
from carn.slides.slide import Rgb
from carn.training.tiles import dataset_digest


@dataclass(frozen=True, kw_only=True)
class BcsrCorpus:
    """A `carn.classification.crops.Corpus` of a bcSR dataset.

    Source: paper, section on Table 5: tiles of 1024 px cut into 8 x 8 crops of 128 px.
    """

    dataset: BcsrDataset
    crop_px: int
    group_regex: str | None
    name: str = "bcsr"
    title: str = "bcSR"

    @property
    def uri(self) -> str:
        """Where it is."""
        return self.dataset.uri

    @property
    def digest(self) -> str:
        """A hash of what it holds."""
        return dataset_digest(self.dataset)

    def index(self, split: Split) -> CropIndex:
        """All crops of a split.

        Raises:
            DatasetError: a tile is labelled neither tumour nor normal.
        """
        columns = ["tile_id", "slide", "label", "width_px", "height_px"]
        rows = self.dataset.table(split).select(columns).to_pylist()
        unknown = sorted({str(row["label"]) for row in rows} - set(CLASSES))
        if unknown:
            raise DatasetError(
                f"{self.uri} has {split} tiles labelled {', '.join(unknown)}, and a classifier "
                f"needs {' or '.join(CLASSES)}; build it with --coordinates tumor*.txt normal*.txt "
                "or --annotations, or from --images in folders tumor/ and normal/"
            )
        grids = [cut_grid(r["width_px"], r["height_px"], crop_px=self.crop_px) for r in rows]
        sizes = [len(grid) for grid in grids]
        corners = np.concatenate([np.empty((0, 2), np.int64), *grids])
        labels = np.array([CLASSES.index(row["label"]) for row in rows], np.int64)
        return CropIndex(
            tile=np.repeat(np.arange(len(rows)), sizes),
            x_px=corners[:, 0],
            y_px=corners[:, 1],
            label=np.repeat(labels, sizes),
            tile_ids=tuple(row["tile_id"] for row in rows),
            slides=tuple(group_of(row["slide"], self.group_regex) for row in rows),
        )

    def groups(self, split: Split) -> list[tuple[int, int]]:
        """First tile and number of tiles of each part that is read at a stroke."""
        return [(group.first, group.count) for group in self.dataset.groups(split)]

    def read(self, split: Split, group: int) -> list[Rgb]:
        """The tiles of a group.

        Raises:
            DatasetError: a tile is damaged.
        """
        return group_tiles(self.dataset.groups(split)[group])


def open_bcsr(uri: str, *, crop_px: int, group_regex: str | None = None) -> BcsrCorpus:
    """The corpus of a finished dataset.

    Raises:
        DatasetError, StorageError: as `carn.bcsr.dataset.open_dataset`.
    """
    return BcsrCorpus(dataset=open_dataset(uri), crop_px=crop_px, group_regex=group_regex)
