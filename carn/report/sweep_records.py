"""What the page of a sweep shows, as plain values: points, failures, the paper's results."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from carn.report.plots import Curve

Value = float | int | str
State = Literal["done", "running", "failed"]
FigureKind = Literal["ternary", "lines", "parallel"]


@dataclass(frozen=True, kw_only=True)
class Point:
    """One combination of settings, its trials with different seeds taken together.

    Attributes:
        values: by name of the swept setting.
        psnr_db, psnr_std: dB, mean and spread over the seeds; the spread is None where there are
            not two. Not a number where there is no score.
        ssim, ssim_std: likewise.
        num_seeds, seeds: of the trials.
        seconds: of one trial, mean over the seeds.
        params: trainable parameters.
        flops: of one LR image.
        stopped_early: whether a trial was ended before its last update, for others were better.
        state: "running" as long as a seed is missing.
    """

    values: Mapping[str, Value]
    psnr_db: float
    psnr_std: float | None
    ssim: float
    ssim_std: float | None
    num_seeds: int
    seeds: tuple[int, ...]
    seconds: float
    params: int
    flops: int
    stopped_early: bool
    state: State


@dataclass(frozen=True, kw_only=True)
class Failure:
    """A trial that ended with an error.

    Attributes:
        trial: its name.
        values: by name of the swept setting.
        seed: of the trial.
        reason: the last line of the error.
    """

    trial: str
    values: Mapping[str, Value]
    seed: int
    reason: str


@dataclass(frozen=True, kw_only=True)
class PaperPoint:
    """What the paper reports for a combination of settings; `psnr_db` is on its own data."""

    values: Mapping[str, Value]
    psnr_db: float


@dataclass(frozen=True, kw_only=True, eq=False)
class SweepReport:
    """All that the page shows.

    Attributes:
        title: heading of the page and name of its window.
        space_name: of the search space.
        question: what the sweep is to answer, a sentence.
        dataset_uri: what is trained and validated on.
        code_version: of the code that trained.
        seconds: from the first trial to the last, or until now.
        machine: that it ran on.
        metric_name: what `psnr_db` of the points is, with its split: "validation PSNR, dB".
        columns: names of the swept settings; their order is that of the table and the plots.
        points: in any order.
        failures: trials that ended with an error.
        best: place of the winner in `points`, None where there is none yet.
        figure: "ternary" for three weights of which only the shares matter, "lines" for PSNR over
            column `x`, "parallel" for anything else.
        x: the column of the level axis of "lines".
        group: the column whose values get a line each, or None.
        paper: the paper's results for the same question.
        curves: PSNR over updates of chosen trials, the form of the paper's Figure 6.
        notes: what the caller has to say of it all, on top of the page.
    """

    title: str
    space_name: str
    question: str
    dataset_uri: str
    code_version: str
    seconds: float
    machine: str
    metric_name: str
    columns: tuple[str, ...]
    points: tuple[Point, ...]
    failures: tuple[Failure, ...]
    best: int | None
    figure: FigureKind
    x: str | None
    group: str | None
    paper: tuple[PaperPoint, ...]
    curves: tuple[Curve, ...]
    notes: tuple[str, ...]
