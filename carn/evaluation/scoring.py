"""PSNR, SSIM and LPIPS of a model on whole tiles, one row a tile."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal, get_args

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from torch.nn import functional

from carn.degradation.bicubic import crop_to_multiple
from carn.degradation.conditions import apply_condition
from carn.degradation.scanner import BICUBIC, Degradation
from carn.errors import CarnError
from carn.evaluation.lpips import Lpips
from carn.metrics import convention, psnr, ssim, to_uint8
from carn.slides.slide import Rgb
from carn.upscaling.engine import is_out_of_memory

# How LR is made of an HR tile. `aligned`: of HR cropped to a multiple of the scale, so that each LR
# px covers scale x scale HR px. `misaligned`: of the whole tile, shrunk to floor(side / scale) px,
# so that SR drifts from HR by up to a px where the sides do not divide; the paper's at x3.
Protocol = Literal["aligned", "misaligned"]

SCORES = pa.schema(
    [
        ("tile_id", pa.string()),
        ("slide", pa.string()),
        ("label", pa.string()),
        ("width_px", pa.int32()),  # of the HR pixels that are compared
        ("height_px", pa.int32()),
        ("psnr_db", pa.float64()),  # RGB, no border cropped; infinite where SR equals HR
        ("ssim", pa.float64()),
        ("psnr_y_db", pa.float64()),  # Y channel, `scale` px cropped on each side
        ("ssim_y", pa.float64()),
        ("lpips", pa.float64()),  # null where no weights were given
    ]
)


def pair(
    hr: Rgb, *, scale: int, protocol: Protocol, way: Degradation = BICUBIC, tile: str = ""
) -> tuple[Rgb, Rgb]:
    """LR of a tile, and the part of the tile that its SR is compared with.

    Where both sides are multiples of the scale the two protocols are the same.
    That the CARN paper's x3 is `misaligned` is inferred: of its Table 2, only this explains how
    little x3 lies above x4. Source: https://doi.org/10.7717/peerj-cs.1196.

    Args:
        hr: (H, W, 3) uint8.
        scale: 2, 3, 4 or 8.
        protocol: see Protocol.
        way: how LR is made of HR that is cropped; by default bicubic interpolation.
        tile: its name, which noise is drawn by.

    Returns:
        LR (H // scale, W // scale, 3) and HR (scale * h, scale * w, 3), uint8.

    Raises:
        ValueError: another scale or protocol, `misaligned` and anything but bicubic interpolation,
            a tile that is not RGB or smaller than one LR px.
    """
    if protocol not in get_args(Protocol):
        raise ValueError(f"protocol={protocol!r} is not one of {', '.join(get_args(Protocol))}")
    if protocol == "misaligned" and way != BICUBIC:
        raise ValueError(
            "protocol='misaligned' goes with bicubic interpolation alone; use 'aligned'"
        )
    if hr.dtype != np.uint8 or hr.shape[2:] != (3,):
        # An alpha channel that is the same in SR and HR would count as one more that is right.
        raise ValueError(f"HR must be (H, W, 3) uint8, not {hr.shape} {hr.dtype}; make it RGB")
    cropped = crop_to_multiple(hr, scale)
    lr = apply_condition(cropped, way, scale=scale, tile=tile)
    if protocol == "aligned" or cropped.shape == hr.shape:
        return lr, cropped
    # As `degrade`, but for the crop.
    pixels = torch.from_numpy(np.array(hr, dtype=np.float32)).permute(2, 0, 1)[None]
    small = functional.interpolate(
        pixels, size=lr.shape[:2], mode="bicubic", align_corners=False, antialias=True
    )
    lr = small.round_().clamp_(0, 255).to(torch.uint8)[0].permute(1, 2, 0).numpy()
    return np.ascontiguousarray(lr), cropped


def score_tile(
    model: nn.Module,
    row: Mapping[str, Any],
    hr: Rgb,
    *,
    scale: int,
    protocol: Protocol,
    way: Degradation = BICUBIC,
    lpips: Lpips | None = None,
) -> dict[str, Any]:
    """The scores of a model on one tile: a row of SCORES.

    `psnr_db` and `ssim` are the CARN paper's: RGB, no border. `psnr_y_db` and `ssim_y` are those
    that the EDSR family reports on Set5 and its kin: Y of BT.601, `scale` px cropped on each side.
    Source: https://doi.org/10.7717/peerj-cs.1196; PSNR of Y by `calc_psnr` of EDSR's authors,
    https://github.com/sanghyun-son/EDSR-PyTorch, SSIM of Y by `calculate_ssim` of
    https://github.com/XPixelGroup/BasicSR.

    Args:
        model: as `super_resolve` takes it.
        row: of the tile; `tile_id` and `slide` are needed, `label` may be missing.
        hr: (H, W, 3) uint8, the whole tile.
        scale: 2, 3, 4 or 8, the model's.
        protocol: how LR is made, see Protocol.
        way: likewise, see `pair`.
        lpips: computes `lpips`, which is None without.

    Raises:
        ValueError: as `pair` and `super_resolve`; a tile that is too small for a metric.
        CarnError: memory does not suffice.
    """
    name = str(row["tile_id"])
    try:
        lr, target = pair(hr, scale=scale, protocol=protocol, way=way, tile=name)
    except ValueError as error:
        raise ValueError(f"tile {name}: {error}") from error
    sr = super_resolve(model, lr, scale=scale, name=name)
    goal = _batch(target, sr.device)
    try:
        with full_precision(sr.device):
            distance = None if lpips is None else lpips.to(sr.device).distance(sr, goal).item()
        scores = {
            "psnr_db": psnr(sr, goal).item(),
            "ssim": ssim(sr, goal).item(),
            "psnr_y_db": psnr(sr, goal, shave_px=scale, channel="y").item(),
            "ssim_y": ssim(sr, goal, shave_px=scale, channel="y").item(),
            "lpips": distance,
        }
    except ValueError as error:
        raise ValueError(f"tile {name}: {error}") from error
    return {
        "tile_id": name,
        "slide": row["slide"],
        "label": row.get("label"),
        "width_px": target.shape[1],
        "height_px": target.shape[0],
        **scores,
    }


def score_tiles(
    model: nn.Module,
    tiles: Iterable[tuple[Mapping[str, Any], Rgb]],
    *,
    scale: int,
    protocol: Protocol,
    way: Degradation = BICUBIC,
    lpips: Lpips | None = None,
) -> pa.Table:
    """The scores of a model on tiles, in their order: a table of SCORES; see `score_tile`.

    Args:
        model: as `super_resolve` takes it.
        tiles: rows and pixels, as `BcsrDataset.tiles` gives them.
        scale: 2, 3, 4 or 8, the model's.
        protocol: how LR is made, see Protocol.
        way: likewise, see `pair`.
        lpips: computes `lpips`, which is null without.

    Raises:
        ValueError, CarnError: as `score_tile`.
    """
    lpips = lpips and lpips.to(device_of(model))
    rows = [
        score_tile(model, row, hr, scale=scale, protocol=protocol, way=way, lpips=lpips)
        for row, hr in tiles
    ]
    return pa.Table.from_pylist(rows, schema=SCORES)


def conventions(*, scale: int) -> tuple[str, str]:
    """How `psnr_db` and `ssim`, and how `psnr_y_db` and `ssim_y` come about, a sentence each."""
    return convention(), convention(shave_px=scale, channel="y")


def super_resolve(model: nn.Module, lr: Rgb, *, scale: int, name: str) -> UInt8[Tensor, "1 3 H W"]:
    """SR of a whole LR image in one forward pass, in float32 (no TF32), rounded to 8 bits.

    One pass, since a network with global pooling, such as CARN, sees all of the image it is given.

    Args:
        model: takes LR (1, 3, h, w) on 0..1, on whatever device it is; it computes in evaluation
            mode and is left in the mode it was in.
        lr: (h, w, 3) uint8.
        scale: what the model has to be made for.
        name: of the tile, for errors.

    Raises:
        ValueError: the model is made for another scale, or gives what is no number.
        CarnError: memory does not suffice for the image at once.
    """
    device = device_of(model)
    try:
        with _evaluating(model), torch.inference_mode(), full_precision(device):
            # Past torch.compile, which would compile anew for every size of tile.
            sr: Float[Tensor, "1 3 H W"] = model.forward(_batch(lr, device).float().div_(255))
            is_finite = bool(sr.isfinite().all())
            pixels = to_uint8(sr)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise CarnError(
            f"tile {name}: the memory of {device} does not suffice for {type(model).__name__} on "
            f"all of its {lr.shape[1]} x {lr.shape[0]} LR px at once, as scores need it; give the "
            "process more memory, run fewer of them beside each other, move the model to another "
            "device, or build the dataset with smaller tiles"
        ) from error
    if pixels.shape[-2:] != (lr.shape[0] * scale, lr.shape[1] * scale):
        raise ValueError(
            f"tile {name}: {type(model).__name__} makes {lr.shape[1]} x {lr.shape[0]} LR px "
            f"{pixels.shape[-1]} x {pixels.shape[-2]}, which is not x{scale}; give it the scale it "
            "was made for"
        )
    if not is_finite:
        raise ValueError(
            f"tile {name}: {type(model).__name__} gives values that are no numbers; its training "
            "diverged, choose an earlier checkpoint"
        )
    return pixels


def device_of(model: nn.Module) -> torch.device:
    """Where a model's parameters are; the CPU for a model without any."""
    parameter = next(model.parameters(), None)
    return torch.device("cpu") if parameter is None else parameter.device


def full_precision(
    device: torch.device, *, benchmark: bool = False
) -> AbstractContextManager[object]:
    """Convolutions in full float32: by default cuDNN rounds to TF32, 10 bits of the mantissa.

    Args:
        device: where they are computed.
        benchmark: let cuDNN try its algorithms, which pays off over many images of one size.
    """
    if device.type == "cpu":
        return nullcontext()
    flags = torch.backends.cudnn.flags
    return flags(enabled=True, benchmark=benchmark, allow_tf32=False)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def _batch(image: Rgb, device: torch.device) -> UInt8[Tensor, "1 3 h w"]:
    # A copy: torch takes no read-only arrays.
    pixels = torch.from_numpy(np.array(image)).to(device)
    return pixels.permute(2, 0, 1)[None]
