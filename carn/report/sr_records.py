"""What a run of super-resolution leaves behind in writing: `summary.json`, as dataclasses; and what
it says of each slide in one line of `slides.jsonl` and of its log.

Reading is strict: a name too many, a name too few or a value of another kind is an error that names
the place. JSON has no infinity (the PSNR of equal pictures): it is written as the text "inf".
"""

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import NoneType, UnionType
from typing import Any, Literal, Self, TypeVar, get_args, get_origin, get_type_hints

import numpy as np

Status = Literal["done", "skipped", "failed", "unfinished", "claimed", "conflict"]
PictureKind = Literal["lr", "sr", "crop", "consistency", "seam"]
Record = TypeVar("Record")

# Raised when a field of SlideLine goes or changes its meaning; a new one does not.
LINE_VERSION = 1

STAGES = ("read_s", "infer_s", "encode_s", "upload_s", "wait_s")


@dataclass(frozen=True, kw_only=True)
class DamagedPlace:
    """A place of a slide that could not be decoded, and was filled from a coarser level.

    Attributes:
        x_l0, y_l0: its top-left corner in level-0 px of the input.
        width, height: its size in level-0 px.
        reason: what is wrong with it.
    """

    x_l0: int
    y_l0: int
    width: int
    height: int
    reason: str


@dataclass(frozen=True, kw_only=True)
class LowPlace:
    """A place where SR, made smaller again, is not its LR.

    Attributes:
        x_l0, y_l0: its top-left corner in level-0 px of the input.
        width, height: its size in level-0 px.
        db: PSNR of SR made smaller there, to LR.
    """

    x_l0: int
    y_l0: int
    width: int
    height: int
    db: float


@dataclass(frozen=True, kw_only=True)
class ConsistencySummary:
    """How well SR, made smaller again, agrees with LR: PSNR of cells, in dB of 255.

    Attributes:
        median_db, min_db: over the cells of the slide.
        share_below: part of the cells below the threshold, 0..1.
        threshold_db: what counts as low.
        low: places below the threshold, of which the worst may stand for all.
        range_db: what the two ends of the heat map's palette mean; by default, those of
            `carn.upscaling.consistency.heat_map_png`.
    """

    median_db: float
    min_db: float
    share_below: float
    threshold_db: float
    low: tuple[LowPlace, ...]
    range_db: tuple[float, float] = (20.0, 60.0)


@dataclass(frozen=True, kw_only=True)
class Seam:
    """How much neighbouring SR px differ, by their distance from a border; see `seam_profile`.

    Attributes:
        distance_px: SR px from the border between blocks, 0 across it.
        step: mean |difference| at each distance, in grey levels 0..255.
        baseline: the same, away from the border.

    Raises:
        ValueError: distances and steps are not of one length.
    """

    distance_px: tuple[int, ...]
    step: tuple[float, ...]
    baseline: float

    def __post_init__(self) -> None:
        if len(self.step) != len(self.distance_px):
            raise ValueError(
                f"seam: {len(self.step)} values of step at {len(self.distance_px)} distances; "
                "give one for each"
            )


@dataclass(frozen=True, kw_only=True)
class LrSummary:
    """What was found out about the pixels of the input.

    Attributes:
        compression: how they are stored, by the file's own headers, in words.
        blur_px: the blur that HR of a 40x slide would need to be as soft: the estimate and the ends
            of its interval, HR px; None where it was not estimated.
        numbers: what an adaptive network took the LR for (`carn.degradation.numbers`); empty for
            other networks.
        is_told: these were said by hand (`--lr-like`), not estimated.
        notes: what was decided against the file's own word.
    """

    compression: str
    blur_px: tuple[float, float, float] | None = None
    numbers: Mapping[str, float] = field(default_factory=dict)
    is_told: bool = False
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class SlideSummary:
    """What became of one slide.

    Attributes:
        name: as people call it.
        uri, output_uri: what was read, and what was written or would have been.
        status: "skipped" was there already; "unfinished" goes on in the next run; "claimed" is
            in the hands of another run; "conflict" would have overwritten what was made from
            something else.
        reason: why it is neither done nor skipped, or why it was skipped.
        lr_extent: (width, height) in LR px.
        mpp_in, mpp_out: (x, y) um per px of LR and of SR.
        scale: SR px per LR px; None for a slide that the run did not come to.
        num_blocks, num_blocks_resumed: blocks in all, and those that an earlier run had written.
        num_inferred_px, num_background_px: LR px that went through the network, and those that
            were enlarged as background.
        damage: places filled from a coarser level.
        engine: how the network was run.
        accuracy_db: PSNR of the engine to the network in fp32, on windows of this slide.
        consistency: SR against LR; None when it was not measured.
        size_bytes, num_parts: of the output.
        seconds: from the first block to the commit.
        seam: steps at the borders of blocks; measured on few slides.
        lr: what the input's pixels are like.
        warnings: in what they are unlike what the network was trained on, by name and number.
        pictures: file name in `pictures/`, by what it shows. "seam" has a border between two blocks
            in its middle.
    """

    name: str
    uri: str
    status: Status
    output_uri: str | None = None
    reason: str | None = None
    lr_extent: tuple[int, int] | None = None
    mpp_in: tuple[float, float] | None = None
    mpp_out: tuple[float, float] | None = None
    scale: int | None = None
    num_blocks: int = 0
    num_blocks_resumed: int = 0
    num_inferred_px: int = 0
    num_background_px: int = 0
    damage: tuple[DamagedPlace, ...] = ()
    engine: str = ""
    accuracy_db: float | None = None
    consistency: ConsistencySummary | None = None
    size_bytes: int | None = None
    num_parts: int | None = None
    seconds: float | None = None
    seam: Seam | None = None
    lr: LrSummary | None = None
    warnings: tuple[str, ...] = ()
    pictures: Mapping[PictureKind, str] = field(default_factory=dict)

    def to_json(self) -> str:
        """As text; `from_json` gives an equal slide."""
        return _to_text(self)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """The slide of such a text.

        Raises:
            ValueError: it is no JSON, or does not say exactly what it must.
        """
        return _from_text(text, cls)


@dataclass(frozen=True, kw_only=True)
class SlideLine:
    """What became of one slide, as one line of JSON for programs that collect logs.

    Numbers that are not known, or not finite (the PSNR of equal pictures), are null, so that each
    field is of one kind in all lines. docs/observability.md has the same list.

    Attributes:
        time: ISO 8601, when the slide reached this state.
        run_id: of the run; the folder below `runs/`.
        slide: its name, which may say whose it is: lines are for those who run the job.
        status, reason: as in SlideSummary.
        model, scale: of the network; SR px per LR px.
        lr_extent, sr_extent: (width, height) in px; null for a slide that was not opened.
        num_blocks, num_blocks_resumed, num_inferred_px, num_background_px: as in SlideSummary.
        num_damaged: places that were filled from a coarser level.
        seconds: from the first block to the commit; null where that was not reached.
        read_s, infer_s, encode_s, upload_s, wait_s: seconds that this run's actors together spent
            on its blocks; they may run side by side.
        bytes_in: size of the input file as it was listed.
        bytes_out: size of the finished slide.
        consistency_median_db, consistency_min_db: of SR made small again against LR.
        consistency_share_below: part of the cells below the threshold, 0..1.
        accuracy_db: PSNR of the engine to the network in fp32.
        retries: times that a block was begun again because its process had died, and that the slide
            was taken up again because parts of it were gone.
        compression: how the input is stored, in words; null for a slide that was not opened.
        warnings: in what the input is unlike what the network was trained on.
        event, version: "slide" and LINE_VERSION, to tell these lines from others.
    """

    time: str
    run_id: str
    slide: str
    status: Status
    reason: str | None
    model: str
    scale: int | None
    lr_extent: tuple[int, int] | None
    sr_extent: tuple[int, int] | None
    num_blocks: int
    num_blocks_resumed: int
    num_inferred_px: int
    num_background_px: int
    num_damaged: int
    seconds: float | None
    read_s: float
    infer_s: float
    encode_s: float
    upload_s: float
    wait_s: float
    bytes_in: int | None
    bytes_out: int | None
    consistency_median_db: float | None
    consistency_min_db: float | None
    consistency_share_below: float | None
    accuracy_db: float | None
    retries: int
    compression: str | None
    warnings: tuple[str, ...]
    event: Literal["slide"] = "slide"
    version: int = LINE_VERSION

    @classmethod
    def of(
        cls,
        slide: SlideSummary,
        *,
        time: str,
        run_id: str,
        model: str,
        stages: Mapping[str, float],
        bytes_in: int | None,
        retries: int,
    ) -> Self:
        """The line of a slide.

        Args:
            slide: what became of it.
            time, run_id, model, bytes_in, retries: as the fields.
            stages: seconds in each of STAGES; one that is not there took none.
        """
        extent, scale, agreement = slide.lr_extent, slide.scale, slide.consistency
        read_s, infer_s, encode_s, upload_s, wait_s = (
            round(stages.get(name, 0.0), 3) for name in STAGES
        )
        return cls(
            time=time,
            run_id=run_id,
            slide=slide.name,
            status=slide.status,
            reason=slide.reason,
            model=model,
            scale=scale,
            lr_extent=extent,
            sr_extent=(extent[0] * scale, extent[1] * scale) if extent and scale else None,
            num_blocks=slide.num_blocks,
            num_blocks_resumed=slide.num_blocks_resumed,
            num_inferred_px=slide.num_inferred_px,
            num_background_px=slide.num_background_px,
            num_damaged=len(slide.damage),
            seconds=_known(slide.seconds),
            read_s=read_s,
            infer_s=infer_s,
            encode_s=encode_s,
            upload_s=upload_s,
            wait_s=wait_s,
            bytes_in=bytes_in,
            bytes_out=slide.size_bytes,
            consistency_median_db=_known(agreement.median_db if agreement else None),
            consistency_min_db=_known(agreement.min_db if agreement else None),
            consistency_share_below=_known(agreement.share_below if agreement else None),
            accuracy_db=_known(slide.accuracy_db),
            retries=retries,
            compression=slide.lr.compression if slide.lr else None,
            warnings=slide.warnings,
        )

    def to_json(self) -> str:
        """As one line of ASCII, without its end."""
        return json.dumps(vars(self), allow_nan=False)

    def __str__(self) -> str:
        """As `to_json`: a logger that nobody listens to need not make the text."""
        return self.to_json()


def _known(value: float | None) -> float | None:
    return round(value, 3) if value is not None and math.isfinite(value) else None


@dataclass(frozen=True, kw_only=True)
class Pace:
    """Throughput over the run.

    Attributes:
        seconds: since the start of the run, each larger than the one before.
        lr_mpx_per_s: LR Mpx made in each second, round that time.

    Raises:
        ValueError: the two are not of one length.
    """

    seconds: tuple[float, ...]
    lr_mpx_per_s: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.seconds) != len(self.lr_mpx_per_s):
            raise ValueError(
                f"pace: {len(self.lr_mpx_per_s)} rates at {len(self.seconds)} times; give one for "
                "each"
            )


@dataclass(frozen=True, kw_only=True)
class RunSummary:
    """What one run of super-resolution did.

    Attributes:
        run_id: its name, fit for a file name.
        started, ended: ISO 8601.
        checkpoint, checkpoint_hash: URI of the weights, and what identifies their content.
        model: architecture.
        scale: SR px per LR px.
        output: folder or prefix of the slides.
        code_version: of this package.
        is_stopped: what ended the run before its slides did ("deadline", "interrupted"); None when
            nothing did.
        num_listed: slides that were asked for, of which some may not be in `slides`.
        slides: those that the run came to, in the order of the list.
        stages: seconds that all actors together spent in each of `STAGES`, which may run side by
            side; a stage that is not there took none.
        busy_share: part of their time that the inference actors inferred, 0..1.
        num_actors: inference actors.
        lr_mpx_per_s: LR Mpx in each second of the run.
        config: the resolved configuration, nested dicts of plain values.
        pace: throughput over the run; None when it was not recorded.
        self_ensemble: whether pixels are means over eight flips and turns.
    """

    run_id: str
    started: str
    ended: str
    checkpoint: str
    checkpoint_hash: str
    model: str
    scale: int
    output: str
    code_version: str
    is_stopped: str | None
    num_listed: int
    slides: tuple[SlideSummary, ...]
    stages: Mapping[str, float]
    busy_share: float | None
    num_actors: int
    lr_mpx_per_s: float | None
    config: Mapping[str, Any]
    pace: Pace | None = None
    self_ensemble: bool = False

    def to_json(self) -> str:
        """As text; `from_json` gives an equal run.

        Raises:
            ValueError: a number is not a number.
            TypeError: a value of `config` is none of JSON's.
        """
        return _to_text(self)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """The run of such a text.

        Raises:
            ValueError: it is no JSON, or does not say exactly what it must.
        """
        return _from_text(text, cls)


# ------------------------------------------------------------------------------- to JSON and back


def _to_text(record: Any) -> str:
    plain = _encode(dataclasses.asdict(record), type(record).__name__)
    return json.dumps(plain, ensure_ascii=False, indent=1, allow_nan=False) + "\n"


def _encode(value: Any, place: str) -> Any:
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, Mapping):
        return {str(key): _encode(item, f"{place}.{key}") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_encode(item, f"{place}[{index}]") for index, item in enumerate(value)]
    if isinstance(value, float) and math.isnan(value):
        raise ValueError(f"{place} is not a number; leave it out (None)")
    if isinstance(value, float) and math.isinf(value):
        return "inf" if value > 0 else "-inf"
    return value


def _from_text(text: str, kind: type[Record]) -> Record:
    try:
        plain = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{kind.__name__}: no JSON ({error})") from error
    record: Record = _decode(plain, kind, kind.__name__)
    return record


def _decode(value: Any, kind: Any, place: str) -> Any:  # noqa: PLR0911 - one for each kind
    origin, arguments = get_origin(kind), get_args(kind)
    if dataclasses.is_dataclass(kind):
        return _decode_record(value, kind, place)
    if origin is UnionType:
        (inner,) = (part for part in arguments if part is not NoneType)
        return None if value is None else _decode(value, inner, place)
    if origin is tuple:
        _check(isinstance(value, list), value, "a list", place)
        kinds = [arguments[0]] * len(value) if arguments[-1] is Ellipsis else list(arguments)
        _check(len(value) == len(kinds), value, f"a list of {len(kinds)}", place)
        pairs = zip(value, kinds, strict=True)
        return tuple(_decode(item, k, f"{place}[{i}]") for i, (item, k) in enumerate(pairs))
    if origin is Literal:
        _check(value in arguments, value, f"one of {', '.join(map(repr, arguments))}", place)
        return value
    if origin is Mapping:
        _check(isinstance(value, dict), value, "an object", place)
        return {
            _decode(key, arguments[0], place): _decode(item, arguments[1], f"{place}.{key}")
            for key, item in value.items()
        }
    if kind is float:
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        _check(is_number or value in ("inf", "-inf"), value, "a number", place)
        return float(value)
    if kind is not Any:
        _check(
            type(value) is kind,
            value,
            {int: "an integer", bool: "true or false"}.get(kind, "a text"),
            place,
        )
    return value


def _decode_record(value: Any, kind: Any, place: str) -> Any:
    _check(isinstance(value, dict), value, "an object", place)
    fields = {entry.name: entry for entry in dataclasses.fields(kind)}
    if unknown := sorted(value.keys() - fields.keys()):
        raise ValueError(f"{place}: unknown {', '.join(unknown)}; another version wrote this")
    missing = [
        name
        for name, entry in fields.items()
        if name not in value
        and entry.default is dataclasses.MISSING
        and entry.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ValueError(f"{place}: {', '.join(missing)} missing; another version wrote this")
    kinds = get_type_hints(kind)
    return kind(**{n: _decode(item, kinds[n], f"{place}.{n}") for n, item in value.items()})


def _check(is_right: bool, value: Any, wanted: str, place: str) -> None:
    if not is_right:
        raise ValueError(f"{place} is {json.dumps(value)[:80]}, where {wanted} belongs")
