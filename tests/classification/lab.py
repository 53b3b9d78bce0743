"""Labelled datasets small enough to learn in a test, checkpoints, and a lab's configuration."""

import hashlib
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from scipy import ndimage

from carn import storage
from carn.bcsr.codec import encode
from carn.bcsr.dataset import write_manifest
from carn.bcsr.schema import SPLITS
from carn.bcsr.shards import shard_bytes, shard_uri
from carn.classification.config import ClassifierConfig, CropConfig, StudyConfig
from carn.models.carn import CarnConfig
from carn.models.checkpoint import write_checkpoint
from carn.models.edsr import EdsrConfig
from carn.models.table import build_model

SIDE_PX = 70
CROP_PX = 32
# 2 x 2 crops of 32 px fit a tile of 70 px.
CROPS_PER_TILE = 4
PCAM_COUNTS = {"train": 40, "valid": 8, "test": 12}


def draw_tissue(side_px: int, *, is_tumor: bool, seed: int) -> np.ndarray:
    """(side, side, 3) uint8: nuclei, which are dense and large in tumour."""
    rng = np.random.default_rng(seed)
    nuclei = rng.random((side_px, side_px)) < (0.02 if is_tumor else 0.004)
    blurred = ndimage.gaussian_filter(nuclei.astype(float), 2.2 if is_tumor else 1.4)
    depth = np.clip(blurred / 0.03, 0, 1)[..., None]
    pixels = (1 - depth) * (215, 160, 200) + depth * (110, 70, 140)
    return np.clip(pixels + rng.normal(0, 8, pixels.shape), 0, 255).astype(np.uint8)


def write_labelled(
    uri: str | Path,
    *,
    num_tiles: tuple[int, int, int] = (12, 4, 8),
    side_px: int = SIDE_PX,
    labels: tuple[str, ...] = ("normal", "tumor"),
    tiles_per_slide: int = 2,
) -> str:
    """A finished bcSR dataset whose tiles are tumour and normal in turn; returns its URI."""
    uri, shards = str(uri), []
    for split, count in zip(SPLITS, num_tiles, strict=True):
        rows, images = [], []
        for number in range(count):
            label = labels[number % len(labels)]
            seed = 1000 * SPLITS.index(split) + number
            pixels = draw_tissue(side_px, is_tumor=label == "tumor", seed=seed)
            slide = f"{split}_{number // tiles_per_slide}"
            red, green, blue = pixels.mean((0, 1)).tolist()
            rows.append(
                {"tile_id": f"{slide}_{64 * number}_0", "slide": slide, "uri": f"/s/{slide}.tif"}
                | {"x_l0": 64 * number, "y_l0": 0, "width_px": side_px, "height_px": side_px}
                | {"label": label, "inside_fraction": 1.0, "white_fraction": 0.0}
                | {"mean_r": red, "mean_g": green, "mean_b": blue}
                | {"mpp_x": 0.25, "mpp_y": 0.25, "distance": 1.0, "rank": number}
                | {"split": split, "encoding": "png"}
            )
            images.append(encode(pixels, "png"))
        if rows:
            content = shard_bytes(rows, images)
            name = f"{split}-00000-{hashlib.sha256(content).hexdigest()[:12]}.parquet"
            storage.write_bytes(shard_uri(uri, name), content)
            shards.append({"name": name, "split": split, "num_tiles": count})
    counts = dict(zip(SPLITS, num_tiles, strict=True))
    write_manifest(uri, {"channel_means": [0.7, 0.5, 0.6], "splits": counts, "shards": shards})
    return uri


def write_pcam(folder: Path, *, has_slides: bool = True) -> Path:
    """PCam's six files by their published schema, and the tables of slides."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, count in PCAM_COUNTS.items():
        label = np.arange(count) % 2
        images = [
            draw_tissue(96, is_tumor=bool(kind), seed=7000 + number)
            for number, kind in enumerate(label)
        ]
        stem = f"camelyonpatch_level_2_split_{split}"
        with h5py.File(folder / f"{stem}_x.h5", "w") as file:
            file["x"] = np.stack(images)
        with h5py.File(folder / f"{stem}_y.h5", "w") as file:
            file["y"] = label.reshape(-1, 1, 1, 1).astype(np.uint8)
        if has_slides:
            lines = [",coord_y,coord_x,tumor_patch,center_tumor_patch,wsi"]
            lines += [
                f"{n},{n},{n},{bool(t)},{bool(t)},{split}_{n // 4}" for n, t in enumerate(label)
            ]
            (folder / f"{stem}_meta.csv").write_text("\n".join(lines) + "\n")
    return folder


def write_model(uri: str | Path, *, name: str = "carn", scale: int = 2, seed: int = 0) -> str:
    """A checkpoint of a tiny network with random weights; returns its URI."""
    configs: dict[str, Any] = {
        "carn": CarnConfig(num_blocks=1, channels=8, reduction=2),
        "edsr": EdsrConfig(num_blocks=1, channels=8),
    }
    torch.manual_seed(seed)
    model = build_model(name, scale=scale, config=configs[name])  # type: ignore[arg-type]
    write_checkpoint(
        str(uri), model=model, model_name=name, training=None, step=1, dataset=None, metrics={}
    )
    return str(uri)


def tiny_classifier(**changes: Any) -> ClassifierConfig:
    fields: dict[str, Any] = {"depth": 18, "epochs": 2, "batch_size": 8}
    return ClassifierConfig(**(fields | changes))


def tiny_study(output: str | Path, **changes: Any) -> StudyConfig:
    fields: dict[str, Any] = {
        "dataset": None,
        "pcam": None,
        "models": (),
        "output": str(output),
        "crops": CropConfig(crop_px=CROP_PX),
        "classifier": tiny_classifier(),
        "device": "cpu",
        "num_threads": 1,
    }
    return StudyConfig(**(fields | changes))
