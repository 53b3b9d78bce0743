"""Rates of the nightly job's stages, each with what it is worth and where it comes from."""

from dataclasses import dataclass
from typing import Literal

# measured: a figure of benchmarks/README.md. noted: of a docstring or of docs/scaling.md, taken
# once. predicted: by a roofline, of what has not been run. assumed: nobody's measurement. given:
# by whoever asks.
Kind = Literal["measured", "noted", "predicted", "assumed", "given"]


@dataclass(frozen=True, kw_only=True)
class Rate:
    """How fast, or how costly, something is, and how that is known.

    Attributes:
        value: in `unit`.
        unit: of the value.
        kind: what it is worth; see Kind.
        source: where it comes from.
    """

    value: float
    unit: str
    kind: Kind
    source: str


TWO_CORES = "two cores of an AMD EPYC"
# LR Mpx a second of the engine, CARN x2, on both cores.
ENGINE_TWO_CORES = 0.332
# FLOP of CARN for an LR px, gates frozen and tail folded.
MFLOP_PER_LR_PX = {2: 2.475, 4: 2.590, 8: 3.051}
# Milliseconds for an LR megapixel that arithmetic and traffic of the folded network take at least.
ROOFLINE_MS = {
    "h200": {2: 3.4, 4: 3.6, 8: 4.3},
    # An H200's tensor cores; its traffic at 3.35 in place of 4.8 TB/s.
    "h100": {2: 3.52, 4: 3.74, 8: 4.49},
}
# What benchmarks/gpu_upscale_engine.py predicts: of the roofline on the device, and of that with
# the pixels brought and taken.
ROOFLINE_SHARE, END_TO_END_SHARE = 0.35, 0.9

READ = Rate(
    value=321 * 1.048576,
    unit="Mpx/core-s",
    kind="measured",
    source=f"read_tiles.py, 321 aligned tiles of 1024 px a CPU-second, {TWO_CORES}",
)
ENCODE = Rate(
    value=239,
    unit="SR Mpx/core-s",
    kind="measured",
    source=f"encode_slide.py, four levels of JPEG Q90, {TWO_CORES}",
)
CONSISTENCY = Rate(
    value=0.025,
    unit="core-s/LR Mpx",
    kind="noted",
    source="docs/scaling.md: SR made small and held against LR, one thread",
)
ENLARGE = Rate(
    value=0.08,
    unit="core-s/LR Mpx at x2",
    kind="noted",
    source="docs/scaling.md: bicubic enlargement of what is not of one colour, one thread",
)
UPLOAD = Rate(
    value=0.017,
    unit="core-s/LR Mpx at x2",
    kind="measured",
    source="super_resolve.py: 37 ms for a block of 1 LR Mpx, server too, at 0.447 of the speed",
)
FINISH = Rate(
    value=0.64 / 12,
    unit="s/block",
    kind="measured",
    source="super_resolve.py: 1.43 s for 12 blocks at 0.447 of the speed; taken as proportional",
)
SLIDE = Rate(
    value=2 / 4.5,
    unit="core-s/slide",
    kind="measured",
    source=f"night_load.py: 4.3 to 4.8 slides of 300 x 300 px a second, {TWO_CORES}",
)
TASKS = Rate(
    value=36,
    unit="tasks/s",
    kind="measured",
    source="400 tasks of one row through Ray Data, busy two cores",
)
START = Rate(
    value=13,
    unit="s",
    kind="measured",
    source="super_resolve.py: imports and calibration, once a run",
)
ACTOR_MB = {
    "cpu": Rate(
        value=773,
        unit="MB",
        kind="measured",
        source="slide_memory.py, actor that makes blocks, slide of 50,000 px",
    ),
    "gpu": Rate(
        value=4000,
        unit="MB",
        kind="assumed",
        source="the CPU actor's, and CUDA's libraries in memory",
    ),
}
READER_MB = Rate(value=641, unit="MB", kind="assumed", source="as a CPU actor on a small slide")
DAEMONS_MB = Rate(
    value=1508, unit="MB", kind="measured", source="slide_memory.py, Ray's daemons and all else"
)
