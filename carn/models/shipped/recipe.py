"""How a network that comes with the project came about, and the way to make it again.

A recipe (`<name>.yaml` beside this file) says from which images, each by its SHA-256 and where it
was published (or that they are those of another recipe), by which settings, and what came of it.
Images are found by content, so they may lie in any folders and have any names.
"""

import hashlib
import shutil
import tempfile
import urllib.parse
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import yaml
from jaxtyping import UInt8
from PIL import Image
from skimage.color import colorconv

from carn import storage
from carn.errors import CheckpointError, DatasetError
from carn.models.checkpoint import (
    Checkpoint,
    checkpoint_hash,
    load_model,
    read_checkpoint,
    write_checkpoint,
)
from carn.models.shipped import FOLDER
from carn.web import fetch

Split = Literal["train", "validation", "test"]

# `build_bcsr.py --split numbered` takes the last images by name for testing, and for validation
# those before them.
_ORDER: Mapping[Split, int] = {"train": 1, "validation": 2, "test": 3}
# Colours of other pairs of stains: haematoxylin and DAB, fast red and fast blue, methyl green and
# DAB, haematoxylin and AEC, haematoxylin and PAS.
_STAINS = tuple(
    getattr(colorconv, f"rgb_from_{name}") for name in ("hdx", "rbd", "gdx", "hax", "hpx")
)
# No image of a recipe is near it; a folder may hold slides as well, which need not be hashed.
MAX_IMAGE_BYTES = 64 << 20


@dataclass(frozen=True, kw_only=True)
class ImageRow:
    """An image of a recipe.

    Attributes:
        source: key of the recipe's sources.
        split: what it is for.
        path: in the source's repository.
        sha256: of the file.
        halve: make it half as large by the mean of 2 x 2 px: the grid of its JPEG blocks falls to
            4 px, their quantization by half, and subsampled chroma becomes whole.
        cut_px: side of the squares that it is cut into; None to take it whole.
    """

    source: str
    split: Split
    path: str
    sha256: str
    halve: bool = False
    cut_px: int | None = None


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A recipe.

    Attributes:
        name: of the network.
        sources: where images were published, under which licence, and what they show.
        images: all of them.
        copies: how many more times each training image is there, each time in another stain or
            smaller: see `varied`.
        hr_mpp: um per px of the images, least and largest; None where it is not said. Images do not
            say it themselves.
        config: settings of `train.py` by name.
        weights_sha256: of the weights that came of it.
    """

    name: str
    sources: Mapping[str, Mapping[str, Any]]
    images: tuple[ImageRow, ...]
    copies: int
    hr_mpp: tuple[float, float] | None
    config: Mapping[str, Any]
    weights_sha256: str


def read_recipe(name: str) -> Recipe:
    """The recipe of a network that comes with the project.

    Raises:
        CheckpointError: there is none of this name.
    """
    path = FOLDER / f"{name}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(found.stem for found in FOLDER.glob("*.yaml")))
        raise CheckpointError(f"there is no recipe {name}; there are {known}")
    content = yaml.safe_load(path.read_text())
    sources, copies, hr_mpp = (
        content["sources"],
        content.get("copies", 0),
        content.get("hr_mpp"),
    )
    if isinstance(sources, str):  # those of another recipe
        other = read_recipe(sources)
        images, sources, copies = other.images, other.sources, other.copies
        hr_mpp = other.hr_mpp
    else:
        images = tuple(
            ImageRow(source=source, **row)
            for source, about in sources.items()
            for row in about.pop("images")
        )
    return Recipe(
        name=name,
        sources=sources,
        images=images,
        copies=copies,
        hr_mpp=hr_mpp and (hr_mpp[0], hr_mpp[1]),
        config=content["config"],
        weights_sha256=content["weights_sha256"],
    )


def find_images(recipe: Recipe, folder: Path) -> dict[str, Path]:
    """Where the images of a recipe are in a folder, by SHA-256.

    Raises:
        DatasetError: some are not there; each is named with where it was published.
    """
    found = _images_there(recipe, folder)
    missing = [row for row in recipe.images if row.sha256 not in found]
    if missing:
        named = "\n".join(f"  {published_at(recipe, row)}" for row in missing)
        raise DatasetError(
            f"{folder} lacks {len(missing)} images of {recipe.name}; `python -m "
            f"carn.models.shipped fetch {recipe.name} --sources {folder}` fetches them:\n{named}"
        )
    return found


def fetch_images(recipe: Recipe, folder: Path) -> Iterator[Path]:
    """Fetch those images of a recipe that are not in a folder yet; yields where each is put.

    Raises:
        DatasetError: what is published is no longer what it was.
        StorageError: the network or the disk does not answer.
    """
    there = _images_there(recipe, folder) if folder.is_dir() else {}
    for row in recipe.images:
        if row.sha256 in there:
            continue
        url = published_at(recipe, row)
        content = fetch(url)
        if hashlib.sha256(content).hexdigest() != row.sha256:
            raise DatasetError(f"{url} is no longer what {recipe.name} was trained on")
        path = folder / row.source / row.path
        storage.write_bytes(str(path), content)
        yield path


def _images_there(recipe: Recipe, folder: Path) -> dict[str, Path]:
    if not folder.is_dir():
        raise DatasetError(f"{folder} is no folder; name the one with the images")
    wanted = {row.sha256 for row in recipe.images}
    found: dict[str, Path] = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.stat().st_size <= MAX_IMAGE_BYTES:
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            if digest in wanted:
                found.setdefault(digest, path)
    return found


def prepare_images(recipe: Recipe, sources: Path, output: Path) -> dict[str, int]:
    """Make the images that `build_bcsr.py` reads, from those that were published.

    Args:
        recipe: which.
        sources: folder that has them, at any depth.
        output: gets `all/`, with training, validation and test images in this order of names, and
            `test/<source>/` and `validation/<source>/` with those of one source.

    Returns:
        Number of images in each folder, by its path below `output`.

    Raises:
        DatasetError: images are missing, or there is something in `output` already.
    """
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise DatasetError(f"{output} is no empty folder; name another")
    places = find_images(recipe, sources)
    counts: dict[str, int] = {}
    for row in recipe.images:
        folders = ["all"] if row.split == "train" else ["all", f"{row.split}/{row.source}"]
        for suffix, pixels in _pieces(read_rgb(places[row.sha256]), row):
            stem = f"{_ORDER[row.split]}_{row.split}_{row.source}_{Path(row.path).stem}{suffix}"
            made = {stem: pixels}
            for copy in range(recipe.copies if row.split == "train" else 0):
                name = f"{stem}_varied_{copy}"
                made[name] = varied(pixels, seed=name, least_px=recipe.config["patch_px"])
            for folder in folders:
                (output / folder).mkdir(parents=True, exist_ok=True)
                for name, image in made.items():
                    Image.fromarray(image).save(output / folder / f"{name}.png")
                counts[folder] = counts.get(folder, 0) + len(made)
    return counts


def pack(run: str, folder: Path, *, name: str, overwrite: bool = False) -> Checkpoint:
    """Put the best weights of a training run where networks that come with the project are.

    What is needed to go on training is left out, and so is where things lay.

    Args:
        run: the run's folder, or a checkpoint.
        folder: where to put it.
        name: of the recipe.
        overwrite: replace what is in the folder.

    Returns:
        The checkpoint that is written.

    Raises:
        CheckpointError: there is no such recipe, the run is of another network or scale than it
            says, something is in the folder already, or as `read_checkpoint`.
        AccessDeniedError, StorageError: as `read_checkpoint`.
    """
    recipe = read_recipe(name)
    config = recipe.config
    checkpoint = read_checkpoint(run)
    wanted, is_ = (config["model"], config["scale"]), (checkpoint.model_name, checkpoint.scale)
    if wanted != is_:
        raise CheckpointError(
            f"{run} is {is_[0]} x{is_[1]}; the recipe {name} makes {wanted[0]} x{wanted[1]}"
        )
    if folder.exists() and any(folder.iterdir()) and not overwrite:
        raise CheckpointError(f"{folder} is not empty; name another folder, or say --overwrite")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as place:
        written = write_checkpoint(
            f"{place}/{name}",
            model=load_model(checkpoint),
            model_name=checkpoint.model_name,
            training=checkpoint.training,
            step=checkpoint.step,
            dataset={
                "digest": (checkpoint.dataset or {}).get("digest"),
                "recipe": f"{name}.yaml",
                "hr_mpp": recipe.hr_mpp,
            },
            metrics=checkpoint.metrics,
        )
        if checkpoint_hash(written) != checkpoint_hash(checkpoint):
            raise CheckpointError(f"{run} was stored by other code: its weights come out otherwise")
        if folder.exists():
            shutil.rmtree(folder)
        Path(place, name).rename(folder)
    return read_checkpoint(str(folder))


def read_rgb(path: Path) -> UInt8[np.ndarray, "h w 3"]:
    """The pixels of an image, (H, W, 3) uint8."""
    with Image.open(path) as image:
        pixels: UInt8[np.ndarray, "h w 3"] = np.asarray(image.convert("RGB"))
        return pixels


def _pieces(
    pixels: UInt8[np.ndarray, "h w 3"], row: ImageRow
) -> Iterator[tuple[str, UInt8[np.ndarray, "h2 w2 3"]]]:
    """An image as its row has it, in pieces with what tells their names apart."""
    if row.halve:
        pixels = halved(pixels)
    if row.cut_px is None:
        yield "", pixels
        return
    side = row.cut_px
    for y in range(0, pixels.shape[0] - side + 1, side):
        for x in range(0, pixels.shape[1] - side + 1, side):
            yield f"_{y}_{x}", pixels[y : y + side, x : x + side]


def halved(pixels: UInt8[np.ndarray, "h w 3"]) -> UInt8[np.ndarray, "h2 w2 3"]:
    """Half as large, by the mean of 2 x 2 px, rounded half up; an odd row or column is left out."""
    height, width = (side // 2 * 2 for side in pixels.shape[:2])
    blocks = pixels[:height, :width].reshape(height // 2, 2, width // 2, 2, 3).astype(np.uint16)
    small: UInt8[np.ndarray, "h2 w2 3"]
    small = ((blocks.sum(axis=(1, 3), dtype=np.uint16) + 2) // 4).astype(np.uint8)
    return small


def varied(
    pixels: UInt8[np.ndarray, "h w 3"], *, seed: str, least_px: int
) -> UInt8[np.ndarray, "h2 w2 3"]:
    """Vary an image as other laboratories and magnifications do: another stain, or smaller.

    Half of the images become smaller, by a factor of 0.5 to 0.9 and one of four filters, but none
    smaller than a patch. All others, and most of these, are separated into haematoxylin, eosin and
    the rest, and put together again with other amounts: of three two in colours near their own, as
    another batch of dyes has, and one in those of another pair of stains, such as haematoxylin and
    DAB.

    Args:
        pixels: H&E on white.
        seed: what the draw depends on.
        least_px: side that is left at least, where there are as many px.
    """
    rng = np.random.default_rng(list(hashlib.sha256(seed.encode()).digest()))
    smaller = rng.random() < 0.5
    if smaller:
        height, width = pixels.shape[:2]
        factor = max(rng.uniform(0.5, 0.9), min(1.0, least_px / min(height, width)))
        size = (round(width * factor), round(height * factor))
        filters = Image.Resampling
        kernel = rng.choice([filters.BOX, filters.HAMMING, filters.BICUBIC, filters.LANCZOS])
        pixels = np.asarray(Image.fromarray(pixels).resize(size, filters(kernel)))
        if rng.random() < 0.3:
            return pixels
    density = -np.log((pixels.astype(np.float64) + 1) / 256)
    amounts = density @ colorconv.hed_from_rgb * rng.uniform(0.6, 1.5, 3)
    if rng.random() < 2 / 3:
        colours = np.clip(colorconv.rgb_from_hed + rng.normal(0, 0.06, (3, 3)), 0, None)
    else:
        colours = _STAINS[rng.integers(len(_STAINS))]
    transmitted = np.exp(-amounts @ colours)
    stained: UInt8[np.ndarray, "h2 w2 3"]
    stained = np.clip(np.rint(256 * transmitted - 1), 0, 255).astype(np.uint8)
    return stained


def published_at(recipe: Recipe, row: ImageRow) -> str:
    """The address of an image of a recipe."""
    about = recipe.sources[row.source]
    path = urllib.parse.quote(row.path)
    return storage.join(str(about["repository"]), "raw", str(about["commit"]), path)
