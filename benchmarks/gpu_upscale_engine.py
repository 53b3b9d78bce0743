"""What a GPU makes of super-resolving: the engine at x2, x4 and x8 against a roofline.

NOT RUN ON A GPU YET: on a machine without one, all of this but CUDA itself (capture, streams,
pinned copies) was run by the smoke path below. Take its first figures with that in mind.

CARN in the paper's configuration with fresh weights; windows of 1024 LR px and their halo. Needs
torch, numpy and jaxtyping; simplejpeg where it is there.

Rows:
  eager bf16     the plain network under autocast, channels_last, pixels on the device
  on device      the engine's captured program: folded, bytes in, bytes out, all on the device
  end to end     `upscale_many`: bytes of the host to bytes of the host, copies beside computing

Rates are LR MP/s of all px that are inferred, halos included; `useful` leaves the halos out.

What is predicted for an H200 (790 TFLOP/s bf16, 4.3 TB/s), in ms per LR MP, and why:
  roofline       3.4, 3.6 and 4.3 at x2, x4, x8: arithmetic of the folded network plus its traffic,
                 one after the other; 8.7, 13.2 and 31 for eager, which passes over every activation
                 once more for each bias, ReLU, gate and sum, and multiplies behind the upsampler
  on device >= 0.35 of its roofline: products of 64 channels reach half of the peak at best, and
                 ReLUs and sums are passes of their own here
  on_device_over_eager >= 1.8, 2.5 and 5
  end to end >= 0.9 of on device at x2 and x4. At x8 an LR MP is 201 MB of SR: 4 to 8 ms at 25 to 50
                 GB/s, as much as it takes to compute
  cores          at x2 and 290 LR MP/s: 1.2 SR GP/s are 3 cores that encode JPEG

Every round runs every row; a figure is the median of the rounds. Without CUDA it says so and tries
the same functions with a tiny network on the CPU (`--cpu-smoke` does so anywhere).

Examples:
  python benchmarks/gpu_upscale_engine.py
  python benchmarks/gpu_upscale_engine.py --full
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

# `python benchmarks/gpu_upscale_engine.py` puts benchmarks/ on the path, not the folder above it.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from torch import Tensor

from carn.models.carn import Carn, CarnConfig
from carn.slides.slide import Rgb
from carn.upscaling.engine import Engine, EngineConfig, make_engine
from carn.upscaling.pooling import pool_over

# Milliseconds per LR megapixel on an H200 at 790 TFLOP/s and 4.3 TB/s: eager, folded.
ROOFLINE_MS = {2: (8.7, 3.4), 4: (13.2, 3.6), 8: (31.0, 4.3)}
SIDE_PX = 1024
SEED = 7

Work = Callable[[], Any]


def draw(side_px: int) -> Rgb:
    """(side, side, 3): coarse blots, finer ones on them, and grain."""
    rng = np.random.default_rng(SEED)
    pixels = np.full((side_px, side_px, 3), 170.0)
    for blot_px, height in ((32, 40), (8, 25), (1, 5)):
        coarse = rng.normal(0, height, (side_px // blot_px + 1, side_px // blot_px + 1, 3))
        pixels += coarse.repeat(blot_px, 0).repeat(blot_px, 1)[:side_px, :side_px]
    drawn: Rgb = np.clip(pixels, 0, 255).astype(np.uint8)
    return drawn


def make_rows(
    config: CarnConfig, *, scale: int, side_px: int, device: str, num_windows: int
) -> tuple[Engine, dict[str, Work]]:
    """The engine, and for each row what super-resolves `num_windows` windows."""
    torch.manual_seed(SEED)
    model = Carn(config, scale=scale).eval()
    engine = make_engine(model, EngineConfig(device=device, precision="bf16"))  # type: ignore[arg-type]
    halo = engine.halo_px
    window = draw(side_px + 2 * halo)
    engine.set_pooling(pool_over(model, [window[: 64 + 2 * halo, : 64 + 2 * halo]], halo_px=halo))
    pixels = torch.from_numpy(window).to(engine.device)
    plain = Carn(config, scale=scale).eval().to(engine.device)
    plain.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def eager() -> Tensor:
        lr = pixels.permute(2, 0, 1)[None].float() / 255
        with torch.inference_mode(), torch.autocast(engine.device.type, dtype=torch.bfloat16):
            sr: Tensor = plain(lr)
        return sr.float().clamp(0, 1).mul(255).round().to(torch.uint8)

    rows: dict[str, Work] = {
        "eager bf16": lambda: [eager() for _ in range(num_windows)][-1],
        "on device": lambda: [engine._computed(pixels) for _ in range(num_windows)][-1],
        "end to end": lambda: sum(
            len(sr) for sr in engine.upscale_many(window for _ in range(num_windows))
        ),
    }
    return engine, rows


def seconds_of(work: Work, device: torch.device) -> float:
    """Wall-clock time of some work, the device's part included."""
    _wait(device)
    start = time.perf_counter()
    work()
    _wait(device)
    return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure(
    config: CarnConfig, *, scale: int, side_px: int, device: str, num_windows: int, num_rounds: int
) -> dict[str, Any]:
    """The figures of one scale."""
    engine, rows = make_rows(
        config, scale=scale, side_px=side_px, device=device, num_windows=num_windows
    )
    seconds: dict[str, list[float]] = {name: [] for name in rows}
    for work in rows.values():
        work()
    names = list(rows)
    for _ in range(num_rounds):
        for name in names:
            seconds[name].append(seconds_of(rows[name], engine.device))
        names.reverse()
    lr_mpx = num_windows * (side_px + 2 * engine.halo_px) ** 2 / 1e6
    median = {name: statistics.median(values) for name, values in seconds.items()}
    eager_ms, folded_ms = ROOFLINE_MS[scale]
    bound_s = {"eager bf16": eager_ms / 1e3, "on device": folded_ms / 1e3}
    useful = side_px**2 / (side_px + 2 * engine.halo_px) ** 2
    return {
        "lr_mpx_per_s": {name: lr_mpx / value for name, value in median.items()},
        "useful_lr_mpx_per_s": useful * lr_mpx / median["end to end"],
        "ms_per_lr_mpx": {name: value / lr_mpx * 1e3 for name, value in median.items()},
        "share_of_roofline": {
            name: bound * lr_mpx / median[name] for name, bound in bound_s.items()
        },
        "on_device_over_eager": median["eager bf16"] / median["on device"],
        "end_to_end_over_on_device": median["on device"] / median["end to end"],
        "spread": {name: (max(v) - min(v)) / median[name] for name, v in seconds.items()},
    }


def jpeg_rates() -> tuple[float, float] | None:
    """Mpx a core encodes and decodes in a second (Q90, 4:2:0); None without simplejpeg."""
    try:
        import simplejpeg
    except ImportError:
        return None
    tile = draw(1024)
    content = simplejpeg.encode_jpeg(tile, quality=90, colorsubsampling="420")
    works: tuple[Work, ...] = (
        lambda: simplejpeg.encode_jpeg(tile, quality=90, colorsubsampling="420"),
        lambda: simplejpeg.decode_jpeg(content),
    )
    rates = []
    for work in works:
        start = time.process_time()
        for _ in range(20):
            work()
        rates.append(20 * tile.shape[0] * tile.shape[1] / 1e6 / (time.process_time() - start))
    return rates[0], rates[1]


def cores_of(
    figures: dict[str, Any], *, scale: int, encode: float, decode: float
) -> dict[str, float]:
    """CPU cores that one GPU keeps busy with JPEG; LR halos are decoded with their tiles."""
    rate = figures["useful_lr_mpx_per_s"]
    return {"encode": rate * scale**2 / encode, "decode": rate / decode}


def smoke() -> None:
    """The same functions on a CPU, with a network and windows of a few px."""
    config = CarnConfig(num_blocks=1, channels=8)
    for scale in ROOFLINE_MS:
        found = measure(config, scale=scale, side_px=64, device="cpu", num_windows=2, num_rounds=1)
        cores = cores_of(found, scale=scale, encode=420, decode=250)
        print(f"smoke path on the CPU, x{scale}: {found['lr_mpx_per_s']}, cores {cores}")
    print(json.dumps({"smoke": "passed", "has_cuda": torch.cuda.is_available()}))


def main(*, is_full: bool, is_smoke: bool, encode: float, decode: float) -> None:
    """Measure, print the table and, as the last line, the figures as JSON."""
    if not torch.cuda.is_available():
        print("torch sees no CUDA device here: nothing is measured")
    if is_smoke or not torch.cuda.is_available():
        smoke()
        return
    rates = jpeg_rates()
    encode, decode = rates or (encode, decode)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    print(f"JPEG, {'measured' if rates else 'assumed'}: {encode:.0f} and {decode:.0f} Mpx/CPU-s")
    figures: dict[str, Any] = {"encode_mpx_per_s": encode, "decode_mpx_per_s": decode}
    rounds, windows = (15, 64) if is_full else (5, 16)
    for scale in ROOFLINE_MS:
        found = measure(
            CarnConfig(),
            scale=scale,
            side_px=SIDE_PX,
            device="cuda",
            num_windows=windows,
            num_rounds=rounds,
        )
        found["cores"] = cores_of(found, scale=scale, encode=encode, decode=decode)
        figures[f"x{scale}"] = found
        print(f"x{scale}{'LR MP/s':>22}{'ms/LR MP':>12}{'of roofline':>13}{'spread':>9}")
        for name, rate in found["lr_mpx_per_s"].items():
            share = found["share_of_roofline"].get(name)
            print(
                f"  {name:14}{rate:8.1f}{found['ms_per_lr_mpx'][name]:12.2f}"
                f"{'' if share is None else f'{share:.2f}':>13}{found['spread'][name]:9.2f}"
            )
        cores = found["cores"]
        print(f"  cores beside it: {cores['encode']:.1f} encode, {cores['decode']:.1f} decode")
    print(json.dumps(_rounded(figures)))


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _rounded(part) for name, part in value.items()}
    return float(f"{value:.4g}") if isinstance(value, float) else value


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--full", action="store_true", help="more rounds, of more windows")
    parser.add_argument("--cpu-smoke", action="store_true", help="only try it, on the CPU")
    parser.add_argument(
        "--encode-mpx-per-s", type=float, default=420, help="of a core, without simplejpeg"
    )
    parser.add_argument(
        "--decode-mpx-per-s", type=float, default=250, help="of a core, without simplejpeg"
    )
    options = parser.parse_args()
    main(
        is_full=options.full,
        is_smoke=options.cpu_smoke,
        encode=options.encode_mpx_per_s,
        decode=options.decode_mpx_per_s,
    )
