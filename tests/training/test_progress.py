"""What a person sees: lines in a log, a bar on a terminal."""

import dataclasses
import logging
from typing import Any

import pytest

from carn.training import progress as progress_module
from carn.training.loop import TrainResult
from carn.training.progress import ProgressView

RESULT = TrainResult(
    output="/run",
    step=4,
    psnr=30.5,
    ssim=0.9,
    best_step=4,
    bicubic_psnr=30.0,
    bicubic_ssim=0.88,
)


def event(kind: str, step: int, **numbers: Any) -> dict[str, Any]:
    return {"kind": kind, "step": step, "steps": 4, "num_workers": 1} | numbers


def begin(step: int = 0, **numbers: Any) -> dict[str, Any]:
    return event("begin", step, **{"bicubic_psnr": 30.0} | numbers)


def update(step: int, **numbers: Any) -> dict[str, Any]:
    facts = {"loss": 12.34567, "learning_rate": 1e-4, "images_per_s": 41.6}
    return event("step", step, **facts | {"elapsed_s": 20.0 * step} | numbers)


def validation(step: int, psnr: float) -> dict[str, Any]:
    return event("validation", step, validation_psnr=psnr, validation_ssim=0.87654)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that the view's clock says; the last is changed by the test."""
    now = [1000.0]

    class Time:
        monotonic = staticmethod(lambda: now[0])

    monkeypatch.setattr(progress_module, "time", Time)
    return now


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> Any:
    caplog.set_level(logging.INFO, logger=progress_module.__name__)
    return lambda: [record.getMessage() for record in caplog.records]


def test_lines_of_a_log(clock: list[float], lines: Any) -> None:
    view = ProgressView(is_terminal=False)
    assert view.result is None
    view(begin())
    clock[0] += 20
    view(update(1, l1=2.5, ssim=0.75, elapsed_s=20.0))
    view(validation(1, 30.25))
    clock[0] += 20
    view(update(2, elapsed_s=40.0))
    view(validation(2, 29.75))
    view(event("checkpoint", 2))
    view.close()
    assert lines() == [
        "training from update 0 to 4 on 1 worker; bicubic 30.00 dB",
        "update 1 of 4: loss 12.35, l1 2.5, ssim 0.75, 42 images/s, 01:00 left",
        "validation after update 1: PSNR 30.25 dB (+0.25 dB over bicubic), SSIM 0.8765, "
        "the best so far",
        "update 2 of 4: loss 12.35, PSNR 30.25 dB, 42 images/s, 00:40 left",
        "validation after update 2: PSNR 29.75 dB (-0.25 dB over bicubic), SSIM 0.8765",
    ]


def test_lines_keep_their_distance_but_the_last_one_comes(clock: list[float], lines: Any) -> None:
    view = ProgressView(is_terminal=False)
    view(begin())
    for step in (1, 2, 3, 4):
        clock[0] += 1
        view(update(step, elapsed_s=float(step)))
    found = [line.split(":")[0] for line in lines()[1:]]
    assert found == ["update 1 of 4", "update 4 of 4"]


def test_the_time_left_counts_from_where_the_run_is_taken_up(
    clock: list[float], lines: Any
) -> None:
    view = ProgressView(is_terminal=False)
    view(begin(2, num_workers=3))
    clock[0] += 30
    view(update(3, elapsed_s=30.0))
    assert lines()[0] == "training from update 2 to 4 on 3 workers; bicubic 30.00 dB"
    assert lines()[1].endswith("00:30 left")


def test_without_validation_tiles_nothing_is_compared(clock: list[float], lines: Any) -> None:
    view = ProgressView(is_terminal=False)
    view(event("begin", 0))
    view(validation(1, 30.0))
    assert lines() == [
        "training from update 0 to 4 on 1 worker",
        "validation after update 1: PSNR 30.00 dB, SSIM 0.8765, the best so far",
    ]


def test_a_bar_on_a_terminal(capsys: pytest.CaptureFixture[str], lines: Any) -> None:
    view = ProgressView(is_terminal=True)
    view(begin(1))
    view(update(2, l1=2.5))
    view(validation(2, 30.25))
    view(update(4))
    view.close()
    view.close()  # as often as one likes
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "validation after update 2: PSNR 30.25 dB (+0.25 dB over bicubic)" in shown.err
    bar = shown.err.split("\r")[-1]
    assert "100%" in bar
    assert "4/4" in bar
    assert "loss 12.35, PSNR 30.25 dB, 42 images/s" in bar
    assert bar.endswith("\n")
    # What is said before there is a bar is said to the log.
    assert [line for line in lines() if "validation" in line] == []


def test_a_run_that_is_taken_up_gets_a_bar_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    view = ProgressView(is_terminal=True)
    view(begin())
    view(update(1))
    view(begin(1))
    view(update(4))
    view.close()
    assert "4/4" in capsys.readouterr().err


@pytest.mark.parametrize("is_terminal", [True, False])
def test_the_result_is_known_when_the_run_has_ended(is_terminal: bool) -> None:
    view = ProgressView(is_terminal=is_terminal)
    view(begin())
    assert view.result is None
    view({"kind": "end", **dataclasses.asdict(RESULT)})
    assert view.result == RESULT
    view.close()


def test_a_terminal_is_recognized(monkeypatch: pytest.MonkeyPatch) -> None:
    for answer in (True, False):
        monkeypatch.setattr("sys.stderr.isatty", lambda answer=answer: answer, raising=False)
        assert ProgressView()._is_terminal is answer


def test_events_that_it_does_not_know_are_passed_over(lines: Any) -> None:
    ProgressView(is_terminal=False)(event("weather", 1))
    assert lines() == []


def test_the_best_of_an_earlier_part_is_remembered(clock: list[float], lines: Any) -> None:
    view = ProgressView(is_terminal=False)
    view(begin(2, best_psnr=31.0))
    view(validation(3, 30.5))
    view(validation(4, 31.5))
    assert [line.endswith("the best so far") for line in lines()[1:]] == [False, True]
