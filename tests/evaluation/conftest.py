"""What the tests of the evaluation share: tables of made-up scores, small pieces of tissue."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from skimage import data

from carn.evaluation.scoring import SCORES


@pytest.fixture(scope="session")
def tissue() -> np.ndarray:
    """(512, 512, 3) uint8."""
    return np.asarray(data.immunohistochemistry())


@pytest.fixture
def scores() -> Callable[..., pa.Table]:
    """Make a SCORES table of psnr_db by (slide, number) or tile id, and of other columns so."""

    def make(psnr_db: dict[Any, float], **columns: dict[Any, float | None]) -> pa.Table:
        rows = []
        for key, value in psnr_db.items():
            slide, number = key if isinstance(key, tuple) else ("s", key)
            rows.append(
                {
                    **{"tile_id": f"{slide}_{number}", "slide": slide, "label": "tumor"},
                    **{"width_px": 64, "height_px": 64, "psnr_db": value, "ssim": value / 100},
                    **{"psnr_y_db": value + 1, "ssim_y": value / 50, "lpips": None},
                    **{name: values[key] for name, values in columns.items()},
                }
            )
        return pa.Table.from_pylist(rows, schema=SCORES)

    return make
