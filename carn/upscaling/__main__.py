"""Super-resolve plain images on one machine.

python -m carn.upscaling tiles/ region.tif --checkpoint runs/carn-x2 --output sr/
"""

import logging
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Annotated

import tyro
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from carn.errors import CarnError
from carn.log_lines import start_logging
from carn.upscaling.images import UpscaleImages, upscale_images

logger = logging.getLogger("carn.upscaling")


def main(
    images: tyro.conf.Positional[tuple[str, ...]],
    config: Annotated[UpscaleImages, tyro.conf.arg(name="")],
) -> int:
    """Super-resolve plain images: PNG, JPEG, TIFF, ... in, PNG out as <stem>_x<scale>.png.

    Exit status: 0 when every image is there, 1 when one failed, 2 when nothing could begin.

    Args:
        images: files, or folders or prefixes with images in them; local or s3://.
        config: how.
    """

    def shown(uris: Sequence[str]) -> Iterator[str]:
        # No bar where nobody looks: in a log file it is one line of noise a second.
        yield from tqdm(uris, unit="image", disable=None)

    try:
        if not images:
            raise CarnError("no images were named")
        with logging_redirect_tqdm():
            outcomes = Counter(upscale_images(images, config, progress=shown).values())
    except (CarnError, ValueError) as error:
        logger.error("%s", error)
        return 2
    logger.info(
        "%s", ", ".join(f"{outcomes[name]} {name}" for name in ("written", "skipped", "failed"))
    )
    return 1 if outcomes["failed"] else 0


if __name__ == "__main__":
    start_logging(line_format="%(message)s")
    sys.exit(tyro.cli(main, prog="python -m carn.upscaling", config=(tyro.conf.OmitArgPrefixes,)))
