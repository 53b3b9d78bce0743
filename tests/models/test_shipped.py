"""Networks that come with the project: found by name from anywhere, whole, and as good as said."""

import fnmatch
import hashlib
import os
import re
import shutil
import tomllib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from carn.degradation.bicubic import degrade
from carn.degradation.conditions import CONDITIONS, apply_condition
from carn.errors import CarnError, CheckpointError, DatasetError
from carn.evaluation.study import find_entrants
from carn.metrics import psnr, to_uint8
from carn.models import shipped
from carn.models.bicubic import Bicubic, BicubicConfig
from carn.models.checkpoint import (
    Checkpoint,
    checkpoint_hash,
    checkpoint_uri,
    load_model,
    read_checkpoint,
    write_checkpoint,
)
from carn.models.shipped import __main__ as program
from carn.models.shipped import recipe as recipes
from carn.models.shipped import shipped_for, shipped_names
from carn.models.shipped.recipe import (
    Recipe,
    fetch_images,
    find_images,
    halved,
    pack,
    prepare_images,
    published_at,
    read_recipe,
    varied,
)
from carn.training.config import TrainConfig, resolve
from carn.training.recipes import recipe as training_recipe
from carn.training.recipes import with_values
from tests.conftest import SHARED_DATA
from tests.models.test_checkpoint import flip, small_carn

NAMES = shipped_names()
ROOT = Path(__file__).parents[2]


def test_there_are_two_for_each_scale() -> None:
    assert NAMES == ("carn-x2", "carn-x2-bicubic", "carn-x4", "carn-x4-bicubic")


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_enough_anywhere(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    checkpoint = read_checkpoint(name)
    assert checkpoint.uri == f"shipped:{name}"
    assert checkpoint == read_checkpoint(f"shipped:{name}") == read_checkpoint(f"shipped:{name}/")
    assert name.startswith(f"{checkpoint.model_name.removeprefix('adaptive-')}-x{checkpoint.scale}")
    model = load_model(checkpoint)
    assert tuple(model(torch.zeros(1, 3, 16, 16)).shape[2:]) == (16 * checkpoint.scale,) * 2
    if name == f"carn-x{checkpoint.scale}":
        assert shipped_for(checkpoint.scale) == checkpoint.uri


@pytest.mark.parametrize("name", NAMES)
def test_its_recipe_is_that_of_its_weights(name: str) -> None:
    checkpoint, recipe = read_checkpoint(name), read_recipe(name)
    assert checkpoint_hash(checkpoint) == f"sha256:{recipe.weights_sha256}"
    start = training_recipe("paper", model=recipe.config["model"], scale=recipe.config["scale"])
    assert checkpoint.training is not None
    trained = with_values(TrainConfig(), checkpoint.training)
    assert resolve(with_values(start, recipe.config)) == trained
    assert checkpoint.step is not None
    assert checkpoint.step <= trained.steps  # the best on validation


@pytest.mark.parametrize("name", NAMES)
def test_its_card_is_that_of_its_weights(name: str) -> None:
    card = (ROOT / "docs" / "models" / f"{name}.md").read_text()
    assert f"`{read_recipe(name).weights_sha256}`" in card
    assert f"]({name}.png)" in card
    assert (ROOT / "docs" / "models" / f"{name}.png").is_file()


@pytest.mark.parametrize("name", NAMES)
def test_it_says_nothing_of_where_it_was_made(name: str) -> None:
    assert "/" not in (shipped.FOLDER / name / "checkpoint.json").read_text()
    assert sorted(path.name for path in (shipped.FOLDER / name).iterdir()) == [
        "checkpoint.json",
        "model.safetensors",
    ]


@pytest.mark.parametrize("name", NAMES)
def test_what_a_recipe_names_is_whole(name: str) -> None:
    recipe = read_recipe(name)
    for source in recipe.sources.values():
        assert {"repository", "commit", "licence", "about"} <= source.keys()
    assert {row.split for row in recipe.images} == {"train", "validation", "test"}
    assert all(len(bytes.fromhex(row.sha256)) == 32 for row in recipe.images)
    assert len({row.sha256 for row in recipe.images}) == len(recipe.images)
    # JPEG's grid and quantization are not to be learnt as texture.
    assert all(row.halve for row in recipe.images if row.path.endswith((".jpg", ".jpeg")))


# What names a slide or a patient in the path of an image, and sources of unnamed slides that are on
# several sides; the card says so.
_SLIDE = r"(tumor|normal)_\d{3}|patient_\d{3}|Slide_\d\d|TCGA-\w\w-\w{4}"
_UNNAMED = ("tcga-cpm15-unnamed", "tcga-cpm16", "tcga-hou400")


@pytest.mark.parametrize("name", NAMES)
def test_no_slide_is_on_two_sides(name: str) -> None:
    sides: dict[str, set[str]] = {}
    for row in read_recipe(name).images:
        # A slide or patient where the name tells it; or else the source is on one side as a whole,
        # but for those whose images are each of another slide as far as can be seen.
        told = re.search(_SLIDE, row.path)
        if told or row.source not in _UNNAMED:
            sides.setdefault(told[0] if told else row.source, set()).add(row.split)
    assert len(sides) >= 10
    assert all(len(found) == 1 for found in sides.values()), sides
    assert sides["tumor_004"] == {"test"}


def test_the_package_holds_all_of_it() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    patterns = project["tool"]["setuptools"]["package-data"]["carn.models.shipped"]
    files = [
        str(path.relative_to(shipped.FOLDER))
        for path in shipped.FOLDER.rglob("*")
        if path.is_file() and path.suffix not in (".py", ".pyc")
    ]
    assert files
    for file in files:
        assert any(fnmatch.fnmatch(file, pattern) for pattern in patterns), file


# --------------------------------------------------------------------------------- which is meant


def test_a_folder_of_that_name_has_to_be_told_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_checkpoint(
        "carn-x2",
        model=small_carn(),
        model_name="carn",
        training=None,
        step=None,
        dataset=None,
        metrics={},
    )
    with pytest.raises(CheckpointError, match=r"\./carn-x2 for what is here, shipped:carn-x2"):
        read_checkpoint("carn-x2")
    own = read_checkpoint("./carn-x2")
    assert own.uri == str(tmp_path / "carn-x2")
    assert checkpoint_hash("shipped:carn-x2") != checkpoint_hash(own)
    # A worker gets what its driver made of the name, and starts in a folder of its own.
    assert checkpoint_uri("shipped:carn-x2") == "shipped:carn-x2"


def test_names_that_there_are_none_of() -> None:
    with pytest.raises(CheckpointError, match=r"shipped:nothing: .* there are shipped:carn-x2"):
        read_checkpoint("shipped:nothing")
    with pytest.raises(CheckpointError, match=r"shipped:\.\./\.\./models: "):
        read_checkpoint("shipped:../../models")
    with pytest.raises(CheckpointError, match=r"no network for x3 .*carn-x2.*--checkpoint"):
        shipped_for(3)
    with pytest.raises(
        CheckpointError, match="no recipe nothing; there are carn-x2, carn-x2-bicubic, carn-x4"
    ):
        read_recipe("nothing")


def test_a_damaged_one_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(shipped.FOLDER / "carn-x2", tmp_path / "carn-x2")
    flip(tmp_path / "carn-x2" / "model.safetensors", -5)
    monkeypatch.setattr(shipped, "FOLDER", tmp_path)
    with pytest.raises(CheckpointError, match=r"shipped:carn-x2/model\.safetensors is damaged"):
        load_model("carn-x2")


def test_an_evaluation_takes_the_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    ((entrant,), left_out) = find_entrants(["carn-x2"])
    assert not left_out
    assert entrant.checkpoint == "shipped:carn-x2"
    assert entrant.seed == 1


# ---------------------------------------------------------------------------------------- a recipe


CONFIG = {"model": "carn", "scale": 2, "steps": 5}


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], Recipe]:
    """A recipe of four images, which lie in `tmp_path / "down"` under other names."""
    rng = np.random.default_rng(0)
    (tmp_path / "down" / "deep").mkdir(parents=True)
    rows: dict[str, list[dict[str, object]]] = {"lab": [], "field": []}
    for source, split, path, more in (
        ("lab", "train", "a/one.png", {}),
        ("lab", "validation", "a/two.png", {}),
        ("field", "train", "b/three.png", {"halve": True, "cut_px": 16}),
        ("field", "test", "b/four.png", {"halve": True}),
    ):
        place = tmp_path / "down" / "deep" / f"{len(rows['lab'])}{len(rows['field'])}.bin.png"
        mode = "RGBA" if path == "a/one.png" else "RGB"
        pixels = rng.integers(0, 256, (41, 70, len(mode)), dtype=np.uint8)
        Image.fromarray(pixels, mode=None).save(place)
        digest = hashlib.sha256(place.read_bytes()).hexdigest()
        rows[source].append({"split": split, "path": path, "sha256": digest, **more})
    sources = {
        name: {"repository": f"https://example.org/{name}", "commit": "c0ffee", "images": found}
        for name, found in rows.items()
    }
    recipe = {"weights_sha256": "", "config": CONFIG, "hr_mpp": [0.25, 0.5], "sources": sources}
    text = yaml.safe_dump(recipe)
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "small.yaml").write_text(text)
    monkeypatch.setattr(recipes, "FOLDER", tmp_path / "recipes")
    return lambda: read_recipe("small")


def test_images_are_made_from_what_was_published(
    small: Callable[[], Recipe], tmp_path: Path
) -> None:
    counts = prepare_images(small(), tmp_path / "down", tmp_path / "out")
    assert counts == {"all": 5, "validation/lab": 1, "test/field": 1}
    names = sorted(path.name for path in (tmp_path / "out" / "all").iterdir())
    assert names == [
        "1_train_field_three_0_0.png",
        "1_train_field_three_0_16.png",
        "1_train_lab_one.png",
        "2_validation_lab_two.png",
        "3_test_field_four.png",
    ]
    sizes = {}
    for name in names:
        with Image.open(tmp_path / "out" / "all" / name) as image:
            assert image.mode == "RGB"
            sizes[name] = image.size
    assert sizes["1_train_lab_one.png"] == (70, 41)
    assert sizes["3_test_field_four.png"] == (35, 20)
    assert sizes["1_train_field_three_0_16.png"] == (16, 16)
    (tmp_path / "file").touch()
    for output in ("out", "file"):
        with pytest.raises(DatasetError, match="is no empty folder"):
            prepare_images(small(), tmp_path / "down", tmp_path / output)


def test_what_is_missing_is_named_with_where_it_is(
    small: Callable[[], Recipe], tmp_path: Path
) -> None:
    gone = find_images(small(), tmp_path / "down")[small().images[-1].sha256]
    gone.write_bytes(b"another")
    with pytest.raises(DatasetError) as caught:
        prepare_images(small(), tmp_path / "down", tmp_path / "out")
    row = small().images[-1]
    said = str(caught.value)
    assert "lacks 1 images of small" in said
    assert f"https://example.org/{row.source}/raw/c0ffee/{row.path}" in said
    assert f"fetch small --sources {tmp_path}/down" in said
    assert not (tmp_path / "out").exists()
    with pytest.raises(DatasetError, match="nowhere is no folder"):
        prepare_images(small(), tmp_path / "nowhere", tmp_path / "out")


def test_images_are_fetched_that_are_not_there(
    small: Callable[[], Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    places = find_images(small(), tmp_path / "down")
    published = {
        published_at(small(), row): places[row.sha256].read_bytes() for row in small().images
    }
    asked: list[str] = []

    def fetch(url: str) -> bytes:
        asked.append(url)
        return published[url]

    monkeypatch.setattr(recipes, "fetch", fetch)
    assert len(list(fetch_images(small(), tmp_path / "new"))) == 4
    assert sorted(asked) == sorted(published)
    assert prepare_images(small(), tmp_path / "new", tmp_path / "out")["all"] == 5
    # What is there, under whatever name, is not asked for again; what was changed is refused.
    gone = places[small().images[1].sha256]
    gone.unlink()
    (row,) = [row for row in small().images if row.sha256 == small().images[1].sha256]
    assert [path.name for path in fetch_images(small(), tmp_path / "down")] == [Path(row.path).name]
    assert len(asked) == 5
    published[published_at(small(), row)] = b"another"
    next((tmp_path / "down" / row.source).rglob("*.png")).unlink()
    with pytest.raises(DatasetError, match="no longer what small was trained on"):
        list(fetch_images(small(), tmp_path / "down"))


def test_addresses_are_those_of_files() -> None:
    recipe = read_recipe("carn-x2")
    assert published_at(recipe, recipe.images[0]) == (
        "https://github.com/DIDSR/dldp/raw/00bfbe7e4d0abbaab8942ccb3505f5069c833a45/"
        "data/sample_patches_256/normal/tumor_004_37276_186047.png"
    )


def test_commands(
    small: Callable[[], Recipe],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def run(*words: object) -> int:
        monkeypatch.setattr("sys.argv", ["shipped", *map(str, words)])
        return program.cli()

    down, out = tmp_path / "down", tmp_path / "out"
    assert run("fetch", "small", "--sources", down) == 0
    assert "0 fetched" in capsys.readouterr().out
    assert run("images", "small", "--sources", down, "--output", out) == 0
    assert f"{out / 'all'}: 5" in capsys.readouterr().out
    assert run("images", "small", "--sources", down, "--output", out) == 2
    assert "is no empty folder" in capsys.readouterr().err
    run_of(tmp_path / "run")
    packed = tmp_path / "deep" / "small"
    assert run("pack", "small", "--run", tmp_path / "run", "--output", packed) == 0
    digest = checkpoint_hash(str(packed)).removeprefix("sha256:")
    assert f"weights_sha256: {digest}" in capsys.readouterr().out
    assert run("pack", "small", "--run", tmp_path / "run", "--output", packed) == 2
    assert "--overwrite" in capsys.readouterr().err
    again = ("pack", "small", "--run", tmp_path / "run", "--output", packed, "--overwrite")
    assert run(*again) == 0
    assert [path.name for path in packed.parent.iterdir()] == ["small"]


def test_halving_is_the_mean_of_four() -> None:
    pixels = np.arange(5 * 7 * 3, dtype=np.uint8).reshape(5, 7, 3)
    exact = pixels[:4, :6].astype(float).reshape(2, 2, 3, 2, 3).mean(axis=(1, 3))
    np.testing.assert_array_equal(halved(pixels), np.floor(exact + 0.5))
    assert halved(np.full((2, 2, 3), 255, dtype=np.uint8)).max() == 255


def test_copies_are_other_stains_and_other_scales_of_the_same_tissue() -> None:
    pixels = np.full((300, 260, 3), 240, dtype=np.uint8)
    pixels[100:200, 80:180] = (150, 90, 170)
    found = [varied(pixels, seed=f"image {number}", least_px=128) for number in range(24)]
    smaller = [image for image in found if image.shape != pixels.shape]
    stained = [image for image in found if image.shape == pixels.shape]
    assert len(smaller) >= 6
    assert len(stained) >= 6
    for image in smaller:
        assert min(image.shape[:2]) >= 128
        assert image.shape[0] / image.shape[1] == pytest.approx(300 / 260, rel=0.02)
    for image in stained:
        assert (image[0, 0] > 200).all()  # glass stays bright
        assert image[150, 130].mean() < image[0, 0].mean()
    assert len({image[150, 130].tobytes() for image in stained}) == len(stained)
    again = [varied(pixels, seed="image 3", least_px=128) for _ in range(2)]
    assert np.array_equal(*again)
    # Patches of 128 px must fit.
    assert (
        min(varied(pixels[:130, :130], seed=f"image {n}", least_px=128).shape[0] for n in range(9))
        >= 128
    )


def test_a_recipe_may_ask_for_copies_of_each_training_image(
    small: Callable[[], Recipe], tmp_path: Path
) -> None:
    recipe = small()
    counts = prepare_images(recipe, tmp_path / "down", tmp_path / "plain")
    copied = replace(recipe, copies=2, config={**recipe.config, "patch_px": 16})
    assert prepare_images(copied, tmp_path / "down", tmp_path / "copied")["all"] > counts["all"]
    names = {path.name for path in (tmp_path / "copied" / "all").iterdir()}
    copies = {name for name in names if "_varied_" in name}
    of_first = {name.removesuffix("_varied_0.png") for name in copies if "_varied_0" in name}
    assert len(copies) == 2 * len(of_first) > 0
    assert all(name.startswith("1_train_") for name in copies)
    assert names - copies == {path.name for path in (tmp_path / "plain" / "all").iterdir()}


def run_of(folder: Path) -> Checkpoint:
    return write_checkpoint(
        str(folder),
        model=small_carn(),
        model_name="carn",
        training={"seed": 7},
        step=5,
        dataset={"uri": "/home/somebody/bcsr", "digest": "sha256:12"},
        metrics={"psnr": 30.0},
        extra_files={"training.safetensors": b"moments"},
    )


def test_packing_keeps_the_weights_and_leaves_the_rest(
    small: Callable[[], Recipe], tmp_path: Path
) -> None:
    written = run_of(tmp_path / "run")
    packed = pack(str(tmp_path / "run"), tmp_path / "packed", name="small")
    assert checkpoint_hash(packed) == checkpoint_hash(written)
    assert (packed.training, packed.step, packed.metrics) == ({"seed": 7}, 5, {"psnr": 30.0})
    assert packed.dataset == {
        "digest": "sha256:12",
        "recipe": "small.yaml",
        "hr_mpp": [0.25, 0.5],
    }
    assert not packed.files
    assert "somebody" not in (tmp_path / "packed" / "checkpoint.json").read_text()
    assert torch.equal(
        next(load_model(packed).parameters()), next(load_model(written).parameters())
    )


def test_packing_replaces_nothing_unasked(
    small: Callable[[], Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_of(tmp_path / "run")
    packed = tmp_path / "packed"
    packed.mkdir()
    (packed / "old").touch()
    with pytest.raises(CheckpointError, match="packed is not empty"):
        pack(str(tmp_path / "run"), packed, name="small")
    with pytest.raises(CheckpointError, match="no recipe other"):
        pack(str(tmp_path / "run"), packed, name="other", overwrite=True)
    monkeypatch.setitem(CONFIG, "scale", 4)
    (tmp_path / "recipes" / "large.yaml").write_text(
        yaml.safe_dump({"weights_sha256": "", "config": CONFIG, "sources": "small"})
    )
    with pytest.raises(CheckpointError, match="is carn x2; the recipe large makes carn x4"):
        pack(str(tmp_path / "run"), packed, name="large", overwrite=True)
    with pytest.raises(CarnError):
        pack(str(tmp_path / "nothing"), packed, name="small", overwrite=True)
    # Weights that come out otherwise do not take the place of what is there.
    with monkeypatch.context() as otherwise:
        otherwise.setattr(recipes, "load_model", lambda _: small_carn(seed=1))
        with pytest.raises(CheckpointError, match="weights come out otherwise"):
            pack(str(tmp_path / "run"), packed, name="small", overwrite=True)
    assert [path.name for path in packed.iterdir()] == ["old"]
    pack(str(tmp_path / "run"), packed, name="small", overwrite=True)
    assert sorted(path.name for path in packed.iterdir()) == [
        "checkpoint.json",
        "model.safetensors",
    ]


# ------------------------------------------------------------------------------------- real tissue


# Folder that `python -m carn.models.shipped fetch carn-x2 --sources FOLDER` has filled.
RECIPE_IMAGES = "CARN_RECIPE_IMAGES"


@pytest.fixture(scope="module")
def recipe_images() -> Path:
    """The folder of the published images that recipes name."""
    folder = Path(os.environ.get(RECIPE_IMAGES) or SHARED_DATA / "patches")
    if not folder.is_dir():
        pytest.skip(
            f"the recipes' images are not here: fetch them (python -m carn.models.shipped fetch "
            f"carn-x2 --sources FOLDER), and say {RECIPE_IMAGES}=FOLDER"
        )
    return folder


def test_the_recipes_images_are_the_real_ones(recipe_images: Path) -> None:
    recipe = read_recipe("carn-x2")
    assert len(find_images(recipe, recipe_images)) == len(recipe.images)


class Trial(NamedTuple):
    """What came of one test image on bicubic LR."""

    gain_db: float
    hr_grid: float
    sr_grid: float
    bicubic_lattice: float
    sr_lattice: float


Tried = dict[str, list[Trial]]
# Images of each source that are tried where all of them would take too long.
IMAGES_PER_SOURCE = {"carn-x2": 2}


def held_out(name: str, folder: Path, *, most: int | None) -> Iterator[tuple[str, str, np.ndarray]]:
    """Source, name and pixels of the first test images of each source of a recipe."""
    recipe = read_recipe(name)
    found = find_images(recipe, folder)
    counts: Counter[str] = Counter()
    for row in recipe.images:
        if row.split != "test" or counts[row.source] == most:
            continue
        counts[row.source] += 1
        with Image.open(found[row.sha256]) as image:
            pixels = np.asarray(image.convert("RGB"))
        pixels = halved(pixels) if row.halve else pixels
        yield row.source, row.path, pixels[:256, :256]  # as large as the smallest, to save time


def upscaled(
    lr: np.ndarray, network: torch.nn.Module, *, scale: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """SR by a network and by bicubic interpolation, (1, 3, H, W) uint8."""
    bicubic = Bicubic(BicubicConfig(), scale=scale)
    batch = torch.from_numpy(lr.copy()).permute(2, 0, 1)[None] / 255
    with torch.inference_mode():
        return to_uint8(network(batch)), to_uint8(bicubic(batch))


@pytest.fixture(scope="module", params=NAMES)
def tried(request: pytest.FixtureRequest, recipe_images: Path) -> tuple[str, Tried]:
    """The name of a network, and trials of it by source."""
    name = request.param
    network = load_model(name)
    scale = read_recipe(name).config["scale"]
    results: Tried = {}
    most = IMAGES_PER_SOURCE.get(name)
    for source, _, pixels in held_out(name, recipe_images, most=most):
        hr = torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None]
        enlarged = upscaled(degrade(pixels, scale=scale), network, scale=scale)
        sr, theirs = (image[0].permute(1, 2, 0).numpy() for image in enlarged)
        trial = Trial(
            gain_db=float(psnr(enlarged[0], hr) - psnr(enlarged[1], hr)),
            hr_grid=grid_contrast(pixels, scale=scale),
            sr_grid=grid_contrast(sr, scale=scale),
            bicubic_lattice=lattice_contrast(theirs, scale=scale),
            sr_lattice=lattice_contrast(sr, scale=scale),
        )
        results.setdefault(source, []).append(trial)
    return name, results


def grid_contrast(pixels: np.ndarray, *, scale: int) -> float:
    """How much larger steps are at the worst of the places of a grid of 8 px than elsewhere.

    Each place is held against those that are whole LR pixels away from it, for enlarging makes
    steps of its own, which differ within an LR pixel.
    """
    contrasts = []
    for image in (pixels, pixels.transpose(1, 0, 2)):
        steps = np.abs(np.diff(image.astype(float), axis=1)).mean(axis=(0, 2))
        places = steps[: len(steps) // 8 * 8].reshape(-1, 8 // scale, scale).mean(axis=0)
        contrasts.append((places / places.mean(axis=0)).max())
    return float(np.mean(contrasts))


def lattice_contrast(pixels: np.ndarray, *, scale: int) -> float:
    """How much larger steps are at the worst of the places within an LR pixel than at others."""
    contrasts = []
    for image in (pixels, pixels.transpose(1, 0, 2)):
        steps = np.abs(np.diff(image.astype(float), axis=1)).mean(axis=(0, 2))
        places = steps[: len(steps) // scale * scale].reshape(-1, scale).mean(axis=0)
        contrasts.append(places.max() / places.mean())
    return float(np.mean(contrasts))


# What is asked of the mean gain on a CAMELYON16 slide that it has not seen, bicubic LR, in dB.
LEAST_GAIN_DB = {
    **{"carn-x2": 3.4, "carn-x2-bicubic": 4.5},
    **{"carn-x4": 2.2, "carn-x4-bicubic": 2.7},
}
# Under which a network has to hold, and the gain that is asked of the mean over sources, in dB.
SCANNED_GAIN_DB = [
    *(("carn-x2", "mean", 1.5), ("carn-x2", "jpeg80-420", 0.6), ("carn-x2", "scanned-jpeg80", 0.6)),
    *(("carn-x4", "mean", 0.3), ("carn-x4", "jpeg80-420", 0.2)),
]


def test_it_is_far_better_than_bicubic_on_slides_it_has_not_seen(tried: tuple[str, Tried]) -> None:
    name, results = tried
    gains = {source: [trial.gain_db for trial in found] for source, found in results.items()}
    assert len(gains) >= 4
    assert np.mean(gains["camelyon16"]) >= LEAST_GAIN_DB[name]
    assert all(min(found) > 0 for found in gains.values()), gains


@pytest.mark.parametrize(("name", "condition", "least_db"), SCANNED_GAIN_DB)
def test_it_holds_on_lr_as_scanners_make_it(
    name: str, condition: str, least_db: float, recipe_images: Path
) -> None:
    network, scale = load_model(name), int(name[-1])
    gains: dict[str, float] = {}
    for source, path, pixels in held_out(name, recipe_images, most=1):
        lr = apply_condition(pixels, CONDITIONS[condition], scale=scale, tile=path)
        hr = torch.from_numpy(pixels[: scale * lr.shape[0], : scale * lr.shape[1]].copy())
        hr = hr.permute(2, 0, 1)[None]
        sr, theirs = upscaled(lr, network, scale=scale)
        gains[source] = float(psnr(sr, hr) - psnr(theirs, hr))
    assert min(gains.values()) > 0, gains
    assert np.mean(list(gains.values())) >= least_db, gains


def test_it_has_not_learnt_the_grid_of_jpeg(tried: tuple[str, Tried]) -> None:
    """Nor that of images made half as large, 4 px wide, which at x4 is the lattice of LR pixels."""
    _, results = tried
    for source, found in results.items():
        mean = Trial(*np.mean(found, axis=0))
        assert mean.sr_grid < mean.hr_grid + 0.01, source
        # Every enlargement shows this lattice somewhat; interpolation has learnt nothing.
        assert mean.sr_lattice < mean.bicubic_lattice - 0.02, source


@pytest.mark.parametrize("scale", [2, 4])
def test_a_grid_is_seen(scale: int) -> None:
    rng = np.random.default_rng(0)
    plain = rng.integers(0, 256, (64, 64, 3)).astype(np.uint8)
    blocks = np.kron(rng.integers(0, 256, (8, 8, 3)), np.ones((8, 8, 1))).astype(np.uint8)
    assert grid_contrast(plain, scale=scale) < 1.1
    assert grid_contrast(blocks // 8 + plain // 16, scale=scale) > 1.1
    assert lattice_contrast(plain, scale=scale) < 1.1
    lattice = rng.integers(0, 256, (64, 64, 3)).repeat(scale, axis=0).repeat(scale, axis=1)
    assert lattice_contrast(lattice.astype(np.uint8), scale=scale) > 1.5
