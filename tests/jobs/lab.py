"""A small lab for the tests of the jobs: drawn slides, and the job over them."""

import hashlib
from pathlib import Path

import numpy as np
from scipy import ndimage

from carn.bcsr.config import DrawConfig, FilterConfig, SelectConfig, StoreConfig
from carn.slides.pyramid import write_pyramid
from jobs.build_bcsr import BuildJob

ROOT = Path(__file__).resolve().parents[2]
TILE_PX = 64


def draw_slide(path: Path, seed: int, *, width: int = 640, height: int = 512) -> None:
    """A slide with structure everywhere but a white right quarter."""
    rng = np.random.default_rng(seed)
    noise = ndimage.gaussian_filter(rng.normal(size=(height, width, 3)), (3, 3, 0))
    pixels = np.clip(130 + 400 * noise + rng.uniform(-40, 40, 3), 0, 220).astype(np.uint8)
    pixels[:, -width // 4 :] = 245
    write_pyramid(path, pixels, mpp_um=0.25, tile_px=128)


def make_job(lab: Path, output: Path | str, **changes: object) -> BuildJob:
    fields: dict[str, object] = {
        "slides": (str(lab / "slides"),),
        "coordinates": (str(lab / "tumor.txt"), str(lab / "normal.txt")),
        "output": str(output),
        "draw": DrawConfig(per_class=50),
        "filter": FilterConfig(tile_px=TILE_PX),
        "select": SelectConfig(keep=60, num_test=10, num_validation=5),
        "store": StoreConfig(tiles_per_shard=16),
    }
    return BuildJob(**(fields | changes))  # type: ignore[arg-type]


def content_of(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below a folder."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def own_lines(said: str) -> list[str]:
    """The lines that are the job's own, beside what Ray passes on of its workers and daemons.

    One Ray serves all tests of a process, so what it passes on may be another test's.
    """
    return [
        line for line in said.splitlines() if line and " pid=" not in line and "(raylet" not in line
    ]
