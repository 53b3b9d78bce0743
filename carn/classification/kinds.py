"""The kinds of pictures that are compared: GT, LR, bicubic, and the SR of each model."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from carn.classification.crops import CropIndex
from carn.degradation.bicubic import crop_to_multiple, degrade
from carn.metrics import to_uint8
from carn.models.bicubic import Bicubic, BicubicConfig
from carn.models.checkpoint import Checkpoint, load_model, read_checkpoint
from carn.models.table import MODELS
from carn.slides.slide import Rgb

GT = "gt"
LR = "lr"
BICUBIC = "bicubic"

# LR px that a model gets at a time: one tile of the paper's at x2, or a hundred images of PCam.
BATCH_PX = 512 * 512


@dataclass(frozen=True, kw_only=True)
class Kind:
    """A row of the comparison.

    Attributes:
        key: its name in files: `gt`, `lr`, `bicubic`, or a model with the start of its hash.
        title: its name in print.
        model_name: key of MODELS; None for GT and LR.
        checkpoint: of a trained model, else None.
    """

    key: str
    title: str
    model_name: str | None = None
    checkpoint: Checkpoint | None = None

    @property
    def is_learnt(self) -> bool:
        """Whether its pictures are of a trained model, and so take long to make."""
        return self.checkpoint is not None

    def make_model(self, *, scale: int, device: torch.device) -> nn.Module | None:
        """What makes SR of LR; None for GT and LR.

        Raises:
            CheckpointError, StorageError: as `carn.models.checkpoint.load_model`.
        """
        if self.checkpoint is not None:
            return load_model(self.checkpoint, device=device, expect_scale=scale)
        if self.model_name is not None:
            return Bicubic(BicubicConfig(), scale=scale).to(device).eval()
        return None


def find_kinds(models: Sequence[str], *, scale: int) -> tuple[Kind, ...]:
    """GT, LR, bicubic, then the models in the order that they are given.

    Raises:
        CheckpointError: a checkpoint is not whole, or of another scale.
        ValueError: two names mean the same weights.
        AccessDeniedError, StorageError: storage does not let one be read.
    """
    from carn.errors import CheckpointError

    checkpoints = [read_checkpoint(uri) for uri in models]
    for uri, checkpoint in zip(models, checkpoints, strict=True):
        if checkpoint.scale != scale:
            raise CheckpointError(
                f"{uri} super-resolves x{checkpoint.scale}, and x{scale} is compared; leave it "
                "out, or compare the models of one scale by --scale"
            )
    keys = [f"{c.model_name}-{c.weights_sha256[:8]}" for c in checkpoints]
    for key, count in Counter(keys).items():
        if count > 1:
            same = [uri for uri, other in zip(models, keys, strict=True) if other == key]
            raise ValueError(f"--models {' '.join(same)} are the same weights; name them once")
    num_named = Counter(checkpoint.model_name for checkpoint in checkpoints)
    learnt = [
        Kind(
            key=key,
            title=MODELS[c.model_name].title  # type: ignore[index]
            + (f" {c.weights_sha256[:8]}" if num_named[c.model_name] > 1 else ""),
            model_name=c.model_name,
            checkpoint=c,
        )
        for key, c in zip(keys, checkpoints, strict=True)
    ]
    bicubic = MODELS["bicubic"].title
    return (
        Kind(key=GT, title="GT"),
        Kind(key=LR, title="LR"),
        Kind(key=BICUBIC, title=bicubic, model_name="bicubic"),
        *learnt,
    )


def make_pictures(
    tiles: Sequence[Rgb],
    *,
    kind: Kind,
    model: nn.Module | None,
    scale: int,
    device: torch.device,
) -> Iterator[Rgb]:
    """The pictures of a kind of HR tiles, (H, W, 3) uint8; LR is 1 / scale as wide and high.

    SR is made of the LR of the whole tile, in float32 and rounded, as the paper does; HR is cropped
    to a multiple of the scale.
    """
    if model is None:
        make = crop_to_multiple if kind.key == GT else _degraded
        yield from (make(tile, scale) for tile in tiles)
        return
    for batch in _batches([_degraded(tile, scale) for tile in tiles]):
        lr = torch.from_numpy(np.stack(batch)).to(device).permute(0, 3, 1, 2).float().div_(255)
        with torch.inference_mode():
            sr = to_uint8(model(lr))
        yield from sr.permute(0, 2, 3, 1).cpu().numpy()


def cut_crops(
    pictures: Iterator[Rgb],
    *,
    index: CropIndex,
    tiles: Sequence[int],
    kind: Kind,
    scale: int,
    crop_px: int,
) -> npt.NDArray[np.uint8]:
    """(n, side, side, 3) crops of pictures; of LR their side is `crop_px / scale`.

    Args:
        pictures: of the tiles, in their order.
        index: the crops of these tiles, in the same order.
        tiles: numbers of the tiles in the split.
        kind: of the pictures.
        scale: SR factor.
        crop_px: side of a crop, px of HR.
    """
    shrink = scale if kind.key == LR else 1
    side = crop_px // shrink
    crops = np.empty((len(index), side, side, 3), np.uint8)
    for number, picture in zip(tiles, pictures, strict=True):
        for row in np.flatnonzero(index.tile == number):
            x, y = index.x_px[row] // shrink, index.y_px[row] // shrink
            crops[row] = picture[y : y + side, x : x + side]
    return crops


def _degraded(tile: Rgb, scale: int) -> Rgb:
    return degrade(tile, scale=scale)


def _batches(images: Sequence[Rgb]) -> Iterator[list[Rgb]]:
    """Neighbours of one size, as many as a model gets at a time."""
    batch: list[Rgb] = []
    for image in images:
        is_full = (len(batch) + 1) * image.shape[0] * image.shape[1] > BATCH_PX
        if batch and (is_full or image.shape != batch[0].shape):
            yield batch
            batch = []
        batch.append(image)
    if batch:
        yield batch
