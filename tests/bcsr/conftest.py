"""What the bcSR tests share: tables of made-up tiles, damage, and guards that do nothing."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import tifffile

from carn import storage
from carn.bcsr.schema import MEASURED
from carn.slides import opening


@pytest.fixture(autouse=True)
def no_open_slides() -> Iterator[None]:
    """Each test opens its slides itself: an earlier handle would outlive a change of the file."""
    opening._cached.cache_clear()
    yield
    opening._cached.cache_clear()


@pytest.fixture
def attempt() -> Callable[[str], AbstractContextManager[None]]:
    """The guard of a job that does not guard."""
    return lambda _key: nullcontext()


@pytest.fixture
def measured() -> Callable[..., pa.Table]:
    """Make a MEASURED table of dicts; what a dict leaves out is that of an ordinary tile."""

    def make(rows: list[dict[str, Any]]) -> pa.Table:
        ordinary = {
            **{"slide": "s", "x_l0": 0, "y_l0": 0, "width_px": 1024, "height_px": 1024},
            **{"label": "tumor", "inside_fraction": 1.0, "white_fraction": 0.1},
            **{"mean_r": 200.0, "mean_g": 120.0, "mean_b": 160.0, "mpp_x": 0.25, "mpp_y": 0.25},
            **{"slide_width_l0": 90_000, "slide_height_l0": 80_000, "reader": "tiled-tiff"},
            **{"slide_identity": "etag:1", "is_transient": False},
        }
        full = []
        for row in rows:
            made = ordinary | row
            made.setdefault("uri", f"/slides/{made['slide']}.tif")
            if storage.is_file(made["uri"]) and "slide_identity" not in row:
                made["slide_identity"] = storage.identity(made["uri"])
            if made.get("reason") is not None:
                numbers = ("inside_fraction", "white_fraction", "mean_r", "mean_g", "mean_b")
                made |= {"failed_scope": "tile"} | dict.fromkeys(numbers) | row
            full.append(made)
        return pa.Table.from_pylist(full, schema=MEASURED)

    return make


@pytest.fixture
def damage_tile() -> Callable[[Path, int], None]:
    """Overwrite the beginning of one JPEG tile of a slide's finest level."""

    def damage(path: Path, number: int) -> None:
        with tifffile.TiffFile(path) as tiff:
            offset = tiff.pages[0].dataoffsets[number]
        with path.open("r+b") as file:
            file.seek(offset)
            file.write(bytes(16))

    return damage
