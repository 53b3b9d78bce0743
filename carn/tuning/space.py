"""Search spaces: which settings of training a sweep tries, read from YAML and checked beforehand.

A space file:

    title: Reduction of the channel attention
    question: How far should CARN squeeze its channels?
    settings: {model: carn, scale: 2}       # of every trial
    points:                                 # settings that belong together
      - {channels: 64, reduction: 8}
    search:                                 # settings that are varied, each with each
      batch_size: [8, 16]
      learning_rate: {low: 1.0e-5, high: 1.0e-3, log: true}
      loss_weights: {simplex: [alpha, beta, gamma], step: 0.2, include: [[0.8, 0.1, 0.1]]}
    seeds: [1, 7, 11]
    figure: {kind: lines, x: reduction, group: channels}
    published: [{channels: 64, reduction: 8, psnr_db: 40.367}]

Names are those of the settings of training, as in the files of `train.py --config`.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_origin

import numpy as np
import yaml

from carn import storage
from carn.training.config import TrainConfig, resolve
from carn.training.recipes import field_places, with_values

Value = float | int | str | bool
Point = dict[str, Value]
FigureKind = Literal["ternary", "lines", "parallel"]

KEYS = (*("title", "question", "settings", "points", "search", "seeds", "figure", "published"),)
# A grid beyond this is a slip of the pen.
MAX_POINTS = 10_000
# Points that are drawn to find out whether a space without a grid holds impossible ones.
NUM_PROBES = 256
WEIGHTS = ("alpha", "beta", "gamma")
# Digits that weights are rounded to: enough to tell points apart, few enough to read.
WEIGHT_DIGITS = 4


@dataclass(frozen=True, kw_only=True)
class Choices:
    """A setting that takes one of several values."""

    name: str
    values: tuple[Value, ...]


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A setting between two bounds, which both belong to it; whole numbers when both are."""

    name: str
    low: float
    high: float
    is_log: bool

    @property
    def is_whole(self) -> bool:
        """Whether only whole numbers are meant."""
        return isinstance(self.low, int) and isinstance(self.high, int)


@dataclass(frozen=True, kw_only=True)
class Simplex:
    """Weights that are not negative and sum to one.

    Attributes:
        names: of the settings.
        step: distance of a grid's points; None where no grid is meant.
        include: further points of a grid.
    """

    names: tuple[str, ...]
    step: float | None
    include: tuple[tuple[float, ...], ...]


Axis = Choices | Interval | Simplex


@dataclass(frozen=True, kw_only=True)
class Figure:
    """How a sweep is drawn: `x` and `group` name settings, for lines."""

    kind: FigureKind = "parallel"
    x: str | None = None
    group: str | None = None


@dataclass(frozen=True, kw_only=True)
class Space:
    """What a sweep tries.

    Attributes:
        name: of the file, without its ending.
        title, question: in words.
        settings: of every trial.
        points: settings that belong together; one empty point where there are none.
        axes: what is varied, each with each and with each point.
        seeds: each point is trained with.
        figure: how it is drawn.
        published: points of the paper, each with its `psnr_db`.
    """

    name: str
    title: str
    question: str
    settings: Point = field(default_factory=dict)
    points: tuple[Point, ...] = ({},)
    axes: tuple[Axis, ...] = ()
    seeds: tuple[int, ...] = (1,)
    figure: Figure = field(default_factory=Figure)
    published: tuple[dict[str, Value], ...] = ()

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the settings that differ between points, in the order of the file."""
        names = [name for point in self.points for name in point]
        for axis in self.axes:
            names += axis.names if isinstance(axis, Simplex) else (axis.name,)
        return tuple(dict.fromkeys(names))

    @property
    def is_countable(self) -> bool:
        """Whether a grid can go through it."""
        return not any(
            isinstance(axis, Interval) or (isinstance(axis, Simplex) and axis.step is None)
            for axis in self.axes
        )

    def grid(self) -> list[Point]:
        """Every point.

        Raises:
            ValueError: a setting has bounds only, or there are too many points.
        """
        if not self.is_countable:
            raise ValueError(
                f"{self.name}: a grid needs values, or the step of a simplex; give these in the "
                "space, or search it with --strategy random or optuna"
            )
        if self._num_points > MAX_POINTS:
            raise ValueError(
                f"{self.name}: a grid of {self._num_points:,} points is more than "
                f"{MAX_POINTS:,}; take fewer values, or --strategy random or optuna"
            )
        choices = [list(self.points), *(_values(axis) for axis in self.axes)]
        return [_joined(parts) for parts in itertools.product(*choices)]

    @property
    def _num_points(self) -> int:
        return len(self.points) * math.prod(len(_values(axis)) for axis in self.axes)

    def draw(self, count: int, *, seed: int) -> list[Point]:
        """Points drawn independently: the same ones for a seed, the first ones for a lower count.

        Values and points are equally likely, intervals are uniform (of the logarithm, where that
        is said), weights uniform on their simplex (Dirichlet's distribution at ones).
        """
        drawn = []
        for number in range(count):
            rng = np.random.default_rng((seed, number))
            parts = [dict(self.points[rng.integers(len(self.points))])]
            parts += [_drawn(axis, rng) for axis in self.axes]
            drawn.append(_joined(parts))
        return drawn

    def start(self, recipe: TrainConfig) -> TrainConfig:
        """A recipe with what this space says of all trials.

        Raises:
            ValueError: a setting is impossible.
        """
        try:
            return with_values(recipe, self.settings)
        except ValueError as error:
            raise ValueError(f"{self.name}: {error}") from error

    def config(self, point: Point, *, base: TrainConfig, seed: int) -> TrainConfig:
        """The settings of a trial.

        Args:
            point: of this space.
            base: what all trials share, as `start` makes it, or changed since.
            seed: of the run.

        Raises:
            ValueError: they are impossible; the error names the point.
        """
        try:
            config = with_values(base, {**point, "seed": seed})
            weights = [getattr(config.loss, name) for name in WEIGHTS]
            is_weighted = any(name in point or name in self.settings for name in WEIGHTS)
            if is_weighted and abs(sum(weights) - 1) > 1e-6:
                raise ValueError(
                    f"alpha + beta + gamma must be 1, as in the paper (another sum is another "
                    f"learning rate), and are {' + '.join(f'{weight:g}' for weight in weights)}"
                )
            # Parts check themselves; what they must be together is found here. The mean of the
            # tiles changes no shape.
            config.network.model_config((0.5, 0.5, 0.5))
            return resolve(config)
        except ValueError as error:
            raise ValueError(f"{self.name}: {label_of(point) or 'settings'}: {error}") from error

    def check(
        self, base: TrainConfig, *, points: Sequence[Point] | None = None
    ) -> list[TrainConfig]:
        """Find impossible points before anything is started.

        Args:
            base: what all trials share.
            points: that will be tried; None for all, or where they cannot be counted, the ends of
                every interval and some within.

        Returns:
            What was found possible.

        Raises:
            ValueError: naming the first impossible point.
        """
        if points is None:
            if self.is_countable and self._num_points <= MAX_POINTS:
                points = self.grid()
            else:
                points = [*self._extremes(), *self.draw(NUM_PROBES, seed=0)]
        return [self.config(point, base=base, seed=self.seeds[0]) for point in points]

    @property
    def shares(self) -> dict[str, Axis]:
        """What a search that suggests numbers varies, by name: weights by free shares of 0..1."""
        axes: dict[str, Axis] = {}
        if len(self.points) > 1:
            numbers = tuple(range(len(self.points)))
            axes["point"] = Choices(name="point", values=numbers)
        for axis in self.axes:
            if isinstance(axis, Simplex):
                for name in axis.names:
                    share = f"{name} share"
                    axes[share] = Interval(name=share, low=0.0, high=1.0, is_log=False)
            else:
                axes[axis.name] = axis
        return axes

    def point_of(self, suggestion: Mapping[str, Any]) -> Point:
        """The point that values by the names of `shares` mean."""
        parts = [dict(self.points[int(suggestion.get("point", 0))])]
        for axis in self.axes:
            if isinstance(axis, Simplex):
                given = [float(suggestion[f"{name} share"]) for name in axis.names]
                parts.append(weights_of_shares(axis, given))
            else:
                parts.append({axis.name: suggestion[axis.name]})
        return _joined(parts)

    def _extremes(self) -> list[Point]:
        """Points with the bounds of each interval, and corners of each simplex."""
        ends: list[list[Point]] = [list(self.points)]
        for axis in self.axes:
            if isinstance(axis, Interval):
                ends.append([{axis.name: axis.low}, {axis.name: axis.high}])
            elif isinstance(axis, Simplex) and axis.step is None:
                corners = np.eye(len(axis.names)).tolist()
                ends.append([dict(zip(axis.names, c, strict=True)) for c in corners])
            else:
                ends.append(_values(axis))
        # One after another: all of them together may be very many.
        first = [choices[0] for choices in ends]
        return [
            _joined([*first[:at], choice, *first[at + 1 :]])
            for at, choices in enumerate(ends)
            for choice in choices
        ]


def label_of(point: Mapping[str, Any]) -> str:
    """A point in words: `reduction=8, channels=64`."""
    return ", ".join(f"{name}={value}" for name, value in point.items())


def read_space(uri: str) -> Space:
    """The space of a YAML file.

    Raises:
        ValueError: it is no YAML, or says what no space does.
        StorageError: it cannot be read.
    """
    name = storage.name_of(storage.normalize(uri)).rsplit(".", 1)[0]
    try:
        content = yaml.safe_load(storage.read_bytes(storage.normalize(uri)))
    except yaml.YAMLError as error:
        raise ValueError(f"{uri} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{uri} must hold a space: {', '.join(KEYS)}")
    return parse_space(content, name=name)


def parse_space(content: Mapping[str, Any], *, name: str) -> Space:
    """A space from what YAML holds.

    Raises:
        ValueError: an unknown key or setting, or a value of the wrong kind.
    """
    if unknown := content.keys() - set(KEYS):
        raise ValueError(f"{name}: {_quoted(unknown)} is no part of a space; there are {KEYS}")
    search = content.get("search", {})
    if not isinstance(search, dict):
        raise ValueError(f"{name}: search must hold what is varied by name, as {{steps: [10, 20]}}")
    points = content.get("points", [{}])
    if not isinstance(points, list) or not points:
        raise ValueError(f"{name}: points must be a list of settings, such as - {{reduction: 8}}")
    parsed = tuple(_mapping(point, f"{name}: points") for point in points)
    if len({frozenset(point) for point in parsed}) > 1:
        raise ValueError(f"{name}: points must all have the same settings")
    space = Space(
        name=name,
        title=str(content.get("title", name)),
        question=str(content.get("question", "")),
        settings=_mapping(content.get("settings", {}), f"{name}: settings", has_lists=True),
        points=parsed,
        axes=tuple(_axis(str(key), value, name) for key, value in search.items()),
        seeds=_seeds(content.get("seeds", [1]), name),
        figure=_figure(content.get("figure", {}), name),
        published=_published(content.get("published", []), name),
    )
    _check_names(space)
    return space


def _check_names(space: Space) -> None:
    known = field_places().keys() - {"seed"}
    varied = [name for axis in space.axes for name in _names(axis)]
    for name in [*space.settings, *space.points[0], *varied]:
        if name not in known:
            hint = "; say seeds" if name == "seed" else f"; there are {', '.join(sorted(known))}"
            raise ValueError(f"{space.name}: {name!r} is no setting that can be searched{hint}")
    given = [*space.settings, *space.points[0], *varied]
    if twice := {name for name in given if given.count(name) > 1}:
        raise ValueError(f"{space.name}: {_quoted(twice)} is said twice")
    if not space.columns:
        raise ValueError(f"{space.name}: nothing is searched; give points or search")
    for drawn in (space.figure.x, space.figure.group):
        if drawn is not None and drawn not in space.columns:
            raise ValueError(f"{space.name}: the figure's {drawn!r} is not searched")
    if space.figure.kind == "lines" and space.figure.x is None:
        raise ValueError(f"{space.name}: a figure of lines needs its x")
    if space.figure.kind == "ternary" and not any(
        isinstance(axis, Simplex) and len(axis.names) == 3 for axis in space.axes
    ):
        raise ValueError(f"{space.name}: a ternary figure needs a simplex of three settings")
    for point in space.published:
        if "psnr_db" not in point or point.keys() - {"psnr_db", *space.columns}:
            raise ValueError(
                f"{space.name}: published points hold psnr_db and of {', '.join(space.columns)}"
            )


def _axis(key: str, value: Any, name: str) -> Axis:
    if isinstance(value, list):
        if not value:
            raise ValueError(f"{name}: {key} has no values")
        if len({repr(item) for item in value}) < len(value):
            raise ValueError(f"{name}: {key} has a value twice")
        return Choices(name=key, values=tuple(value))
    if not isinstance(value, dict):
        raise ValueError(
            f"{name}: {key} must be a list of values, {{low, high, log}} or {{simplex, step, "
            "include}"
        )
    return _simplex(key, value, name) if "simplex" in value else _interval(key, value, name)


def _interval(key: str, value: dict[str, Any], name: str) -> Interval:
    if value.keys() - {"low", "high", "log"} or not {"low", "high"} <= value.keys():
        raise ValueError(f"{name}: {key} must have low and high, and may have log: true")
    low, high, is_log = value["low"], value["high"], value.get("log", False)
    numbers = [item for item in (low, high) if isinstance(item, int | float)]
    if len(numbers) < 2 or not all(map(math.isfinite, numbers)) or not low < high:
        # YAML takes 1e-5 for text: numbers with an exponent want a point, 1.0e-5.
        raise ValueError(f"{name}: {key} must have numbers low < high (1.0e-5, not 1e-5)")
    if is_log and low <= 0:
        raise ValueError(f"{name}: {key} has a logarithmic scale, so low={low} must be positive")
    return Interval(name=key, low=low, high=high, is_log=bool(is_log))


def _simplex(key: str, value: dict[str, Any], name: str) -> Simplex:
    if value.keys() - {"simplex", "step", "include"}:
        raise ValueError(f"{name}: {key} must have simplex, and may have step and include")
    names, step = value["simplex"], value.get("step")
    if not isinstance(names, list) or len(names) < 2 or len(set(map(str, names))) < len(names):
        raise ValueError(f"{name}: {key} must name two or more settings")
    if step is not None:
        parts = 1 / step if isinstance(step, int | float) and 0 < step <= 1 else 0.0
        if parts < 1 or abs(parts - round(parts)) > 1e-9 * parts:
            raise ValueError(f"{name}: {key} has step={step}, which must divide 1, as 0.1 does")
    given = value.get("include", [])
    if not isinstance(given, list) or not all(_is_numbers(point) for point in given):
        raise ValueError(f"{name}: {key} must include points, as [[0.8, 0.1, 0.1]]")
    include = tuple(tuple(map(float, point)) for point in given)
    for point in include:
        if len(point) != len(names) or min(point) < 0 or abs(sum(point) - 1) > 1e-6:
            raise ValueError(
                f"{name}: {key} includes {list(point)}, which is off the simplex: give "
                f"{len(names)} numbers that are not negative and sum to 1"
            )
    return Simplex(names=tuple(map(str, names)), step=step, include=include)


def _seeds(value: Any, name: str) -> tuple[int, ...]:
    if (
        not isinstance(value, list)
        or not value
        or not all(isinstance(seed, int) and seed >= 0 for seed in value)
        or len(set(value)) < len(value)
    ):
        raise ValueError(f"{name}: seeds must be a list of different whole numbers from 0")
    return tuple(value)


def _figure(value: Any, name: str) -> Figure:
    kinds = FigureKind.__args__  # type: ignore[attr-defined]
    if not isinstance(value, dict) or value.keys() - {"kind", "x", "group"}:
        raise ValueError(f"{name}: figure must have kind, and may have x and group")
    if value.get("kind", "parallel") not in kinds:
        raise ValueError(f"{name}: figure's kind must be one of {', '.join(kinds)}")
    return Figure(**value)


def _published(value: Any, name: str) -> tuple[dict[str, Value], ...]:
    if not isinstance(value, list):
        raise ValueError(f"{name}: published must be a list of settings with their psnr_db")
    points = tuple(_mapping(point, f"{name}: published") for point in value)
    for point in points:
        if not _is_numbers([point.get("psnr_db", 0.0)]):
            raise ValueError(f"{name}: published psnr_db={point['psnr_db']!r} must be a number")
    return points


def _is_numbers(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(item, int | float) and not isinstance(item, bool) for item in value
    )


def _mapping(value: Any, where: str, *, has_lists: bool = False) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{where} must hold settings by name, as {{steps: 1000}}")
    places = field_places()
    for name, item in value.items():
        # A range, such as that of JPEG's quality, is one value; in points it could not be told.
        is_range = has_lists and get_origin(places.get(str(name), ("", None))[1]) is tuple
        if isinstance(item, dict) or (isinstance(item, list) and not is_range):
            raise ValueError(f"{where}: {name} must be one value; what is varied stands in search")
    return {str(name): item for name, item in value.items()}


def _names(axis: Axis) -> tuple[str, ...]:
    return axis.names if isinstance(axis, Simplex) else (axis.name,)


def _values(axis: Axis) -> list[Point]:
    """The points of an axis that has them."""
    if isinstance(axis, Choices):
        return [{axis.name: value} for value in axis.values]
    assert isinstance(axis, Simplex)
    assert axis.step is not None
    parts = round(1 / axis.step)
    weights = [
        tuple(round(n / parts, 12) for n in counts)
        for counts in itertools.product(range(parts + 1), repeat=len(axis.names))
        if sum(counts) == parts
    ]
    weights += [point for point in axis.include if point not in weights]
    return [dict(zip(axis.names, point, strict=True)) for point in weights]


def _drawn(axis: Axis, rng: np.random.Generator) -> Point:
    if isinstance(axis, Choices):
        return {axis.name: axis.values[int(rng.integers(len(axis.values)))]}
    if isinstance(axis, Interval):
        return {axis.name: _within(axis, float(rng.random()))}
    return _weights(axis, rng.dirichlet(np.ones(len(axis.names))).tolist())


def _within(axis: Interval, share: float) -> float | int:
    """The value at a share 0..1 of an interval."""
    if axis.is_log:
        value = math.exp(math.log(axis.low) + share * (math.log(axis.high) - math.log(axis.low)))
    else:
        value = axis.low + share * (axis.high - axis.low)
    value = min(max(value, axis.low), axis.high)
    return round(value) if axis.is_whole else float(f"{value:.6g}")


def _weights(axis: Simplex, weights: Sequence[float]) -> Point:
    """Weights rounded so that they still sum to one."""
    rounded = [round(weight, WEIGHT_DIGITS) for weight in weights]
    largest = rounded.index(max(rounded))
    rest = math.fsum(value for at, value in enumerate(rounded) if at != largest)
    rounded[largest] = round(1 - rest, WEIGHT_DIGITS)
    return dict(zip(axis.names, rounded, strict=True))


def weights_of_shares(axis: Simplex, shares: Sequence[float]) -> Point:
    """Weights from numbers in 0..1 that a search varies freely, uniform where those are.

    Exponential variates over their sum are uniform on the simplex. Source: L. Devroye,
    "Non-Uniform Random Variate Generation", 1986, chapter XI, theorem 4.1.
    """
    variates = [-math.log(min(max(share, 1e-9), 1 - 1e-9)) for share in shares]
    return _weights(axis, [variate / math.fsum(variates) for variate in variates])


def _joined(parts: Sequence[Point]) -> Point:
    return {name: value for part in parts for name, value in part.items()}


def _quoted(names: Any) -> str:
    return ", ".join(repr(name) for name in sorted(names))
