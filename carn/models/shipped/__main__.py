"""Make a network that comes with the project again.

python -m carn.models.shipped images carn-x2 --sources downloads/ --output images/
python -m carn.models.shipped pack carn-x2 --run runs/carn-x2 --output carn/models/shipped/carn-x2

The first makes the images that `jobs/build_bcsr.py --images` reads from those that the recipe
names, the second puts a trained network where those are that come with the project. What to run
between them, the recipe says.
"""

import sys
from pathlib import Path

import tyro

from carn.errors import CarnError
from carn.models.checkpoint import checkpoint_hash
from carn.models.shipped.recipe import pack, prepare_images, read_recipe


def images(name: tyro.conf.Positional[str], sources: Path, output: Path) -> None:
    """Make the images of a recipe.

    Args:
        name: of the network.
        sources: folder with what the recipe names, at any depth, under any names.
        output: folder for the images; must not hold any yet.
    """
    for folder, count in sorted(prepare_images(read_recipe(name), sources, output).items()):
        print(f"{output / folder}: {count}")  # noqa: T201


def pack_run(name: tyro.conf.Positional[str], run: str, output: Path) -> None:
    """Put the best weights of a run where networks that come with the project are.

    Args:
        name: of the network.
        run: the training run, or a checkpoint of it.
        output: folder of the checkpoint.
    """
    written = pack(run, output, name=name)
    print(f"{output}: {checkpoint_hash(written)}, update {written.step}")  # noqa: T201


if __name__ == "__main__":
    try:
        tyro.extras.subcommand_cli_from_dict(
            {"images": images, "pack": pack_run}, prog="python -m carn.models.shipped"
        )
    except CarnError as error:
        print(f"shipped: {error}", file=sys.stderr)  # noqa: T201
        sys.exit(2)
