"""Make a network that comes with the project again.

python -m carn.models.shipped fetch carn-x2 --sources downloads/
python -m carn.models.shipped images carn-x2 --sources downloads/ --output images/
python -m carn.models.shipped pack carn-x2 --run runs/carn-x2 --output carn/models/shipped/carn-x2
python -m carn.models.shipped card carn-x2 --images images/ --evaluation evaluation/ --figure x.png

The first fetches the images that the recipe names, the second makes those of them that
`jobs/build_bcsr.py --images` reads, the third puts a trained network where those are that come with
the project, the fourth prints the scores and draws the crops of its card. What to run between them,
recipe and card say.
"""

import sys
from pathlib import Path

import pyarrow.parquet as pq
import tyro
from tqdm import tqdm

from carn.degradation.conditions import DEFAULT, read_conditions
from carn.errors import CarnError, DatasetError
from carn.models.checkpoint import checkpoint_hash
from carn.models.shipped.card import crops_figure, read_scores, scores_table
from carn.models.shipped.recipe import fetch_images, pack, prepare_images, read_recipe


def fetch(name: tyro.conf.Positional[str], sources: Path) -> None:
    """Fetch the images of a recipe from where they were published.

    Args:
        name: of the network.
        sources: folder to put them into; those that are there, under any names, are not fetched.
    """
    count = sum(1 for _ in tqdm(fetch_images(read_recipe(name), sources), unit="image"))
    print(f"{sources}: {count} fetched")  # noqa: T201


def images(name: tyro.conf.Positional[str], sources: Path, output: Path) -> None:
    """Make the images of a recipe.

    Args:
        name: of the network.
        sources: folder with what the recipe names, at any depth, under any names.
        output: folder for the images; must not hold any yet.
    """
    for folder, count in sorted(prepare_images(read_recipe(name), sources, output).items()):
        print(f"{output / folder}: {count}")  # noqa: T201


def pack_run(
    name: tyro.conf.Positional[str], run: str, output: Path, overwrite: bool = False
) -> None:
    """Put the best weights of a run where networks that come with the project are.

    Args:
        name: of the network.
        run: the training run, or a checkpoint of it.
        output: folder of the checkpoint.
        overwrite: replace what is there.
    """
    written = pack(run, output, name=name, overwrite=overwrite)
    digest = checkpoint_hash(written).removeprefix("sha256:")
    print(f"{output}: update {written.step}; in the recipe:\nweights_sha256: {digest}")  # noqa: T201


def card(
    name: tyro.conf.Positional[str],
    images: Path,
    evaluation: Path,
    figure: Path,
    condition: str = next(iter(DEFAULT)),
) -> None:
    """Print scores by source as the card has them, and draw its crops.

    Args:
        name: of the network.
        images: what `images` made.
        evaluation: output of `jobs/evaluate.py` over the test and validation images.
        figure: PNG file for the crops.
        condition: the way to make LR that the crops show, one of the evaluation's: a name such as
            jpeg80-420, or a .yaml file that holds one.
    """
    conditions = read_conditions((condition,))
    if len(conditions) > 1:
        raise ValueError(
            f"{condition} is {', '.join(conditions)}; the crops show one, give it alone"
        )
    ((shown, way),) = conditions.items()
    place = evaluation / "scores.parquet"
    if not place.is_file():
        raise DatasetError(f"{place} is missing; name the output of jobs/evaluate.py")
    if figure.suffix.lower() != ".png" or not figure.parent.is_dir():
        raise DatasetError(f"{figure} must be a .png in a folder that there is")
    scores = read_scores(pq.read_table(place).to_pylist(), name)
    print(scores_table(scores))  # noqa: T201
    crops = crops_figure(name, images, scores, condition=shown, way=way)
    crops.save(figure, optimize=True)


def cli() -> int:
    """Run what is asked for; returns the process's exit status."""
    try:
        tyro.extras.subcommand_cli_from_dict(
            {"fetch": fetch, "images": images, "pack": pack_run, "card": card},
            prog="python -m carn.models.shipped",
        )
    except (CarnError, ValueError) as error:
        print(f"shipped: {error}", file=sys.stderr)  # noqa: T201
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(cli())
