"""The terminal view: plain aligned lines in a log, a picture in a terminal, and nothing that a terminal would obey."""

from __future__ import annotations

import io
import math
import re
from pathlib import Path

import pytest

from grpo_ray.plain_terminal import clean
from grpo_ray.telemetry.events import CheckpointEvent, EndEvent, EvalEvent, Event, MessageEvent, PhaseEvent, StepEvent
from grpo_ray.telemetry.measures import Estimate
from grpo_ray.terminal import PlainConsole
from launch.run.live import LiveView, sparkline, step_line


def step(number: int, total: int = 12, extra: dict[str, float] | None = None) -> StepEvent:
    metrics = {
        "reward/mean": number / 10,
        "completions/mean_length": 60.25,
        "throughput/tokens_per_s": 3054.4,
        "grad_norm": 0.5,
        "mismatch/mean_abs": 1.3e-6,
        "time/step": 2.0,
        "time/rollout": 1.5,
        "time/update": 0.5,
    }
    return StepEvent(number, total, metrics | (extra or {}))


def plain(*events: Event) -> list[str]:
    out = io.StringIO()
    with LiveView(12, Path("runs/x"), console=PlainConsole(file=out, width=80, force_terminal=False)) as view:
        for event in events:
            view.handle(event)
    return out.getvalue().splitlines()


def drawn(width: int, *events: Event) -> list[str]:
    """The last picture of a terminal of this width, as text."""
    console = PlainConsole(
        file=io.StringIO(), width=width, height=40, force_terminal=True, color_system=None, legacy_windows=False
    )
    view = LiveView(12, Path("runs/smoke"), console=console)
    for event in events:
        view._state.take(event)
    out = io.StringIO()
    PlainConsole(file=out, width=width, color_system=None).print(view)
    return out.getvalue().splitlines()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What time it is for the live view, in its only entry."""
    now = [1000.0]
    monkeypatch.setattr("launch.run.live.time.monotonic", lambda: now[0])
    return now


def test_steps_of_a_moment_share_a_line_and_the_last_one_has_its_own(clock: list[float]) -> None:
    out = io.StringIO()
    with LiveView(600, console=PlainConsole(file=out, width=80, force_terminal=False)) as view:
        for number in range(1, 451):
            clock[0] += 0.125
            view.handle(step(number, 600))
        view.handle(EndEvent("SIGINT", ""))
    numbers = [int(line.split()[1].partition("/")[0]) for line in out.getvalue().splitlines()[:-1]]
    assert numbers == [1, 81, 161, 241, 321, 401, 450]


def test_steps_of_ten_seconds_have_a_line_each(clock: list[float]) -> None:
    out = io.StringIO()
    with LiveView(12, console=PlainConsole(file=out, width=80, force_terminal=False)) as view:
        for number in range(1, 13):
            clock[0] += 10.0
            view.handle(step(number))
    assert len(out.getvalue().splitlines()) == 12


def test_a_log_gets_aligned_lines(clock: list[float]) -> None:
    out = io.StringIO()
    with LiveView(12, console=PlainConsole(file=out, width=80, force_terminal=False)) as view:
        for number in (1, 2, 12):
            view.handle(step(number))
            clock[0] += 10.0
    lines = out.getvalue().splitlines()
    assert lines[0] == (
        "step  1/12  reward  0.100  length   60.2  tok/s   3054  grad      0.5  mismatch 1.3e-06  sec   2.00  left 22s"
    )
    assert lines[2].startswith("step 12/12  reward  1.200  ")
    assert len({line.index("left") for line in lines}) == 1
    assert lines[2].endswith("left 0.0s")


def test_a_run_without_steps_tells_how_far_it_is() -> None:
    out = io.StringIO()
    with LiveView(console=PlainConsole(file=out, width=80, force_terminal=False), no_steps=True) as view:
        for done in range(0, 401, 4):
            view.handle(PhaseEvent("rollout", "", done, 400))
    lines = out.getvalue().splitlines()
    assert [line.split("] ")[1] for line in lines] == [f"sampling {n}/400" for n in range(0, 401, 40)]


def test_an_evaluation_that_applies_to_nothing_has_a_line_and_no_place_in_the_curve() -> None:
    none = EvalEvent(0, None, 0, 0.0, not_applicable=8)
    assert plain(none) == ["step 0: held-out accuracy none (0 samples, 8 not applicable)"]
    assert not any("held-out accuracy" in line and "▁" in line for line in drawn(100, step(1), none))


def test_a_log_gets_start_up_evaluation_checkpoint_and_end() -> None:
    lines = plain(
        PhaseEvent("start", "rollout-0"),
        PhaseEvent("start", "rollout-0"),
        PhaseEvent("start", "learner-0"),
        PhaseEvent("rollout", "", 3, 32),
        PhaseEvent("eval", "", 7, 200),
        EvalEvent(0, 0.375, 200, 0.034),
        EvalEvent(0, 0.25, 800, 0.021, "aime", {"pass@4": Estimate(0.5, 0.03), "cons@4": Estimate(0.3, 0.04)}),
        CheckpointEvent(10, "runs/x/checkpoints/step-10", 0.61),
        MessageEvent("warning", "sampler and learner disagree"),
        MessageEvent("info", "2 groups will be sampled again"),
        EndEvent("finished", ""),
        EndEvent("failed", "or raise it"),
    )
    assert [re.sub(r"\d+\.\d s\]", "T]", line) for line in lines[:2]] == [
        "[   T] start: rollout-0",
        "[   T] start: learner-0",
    ]
    assert lines[2:7] == [
        "step 0: held-out accuracy 37.5% ± 3.4 (200 samples)",
        "step 0: held-out accuracy on aime 25.0% ± 2.1 (800 samples), pass@4 50.0% ± 3.0, cons@4 30.0% ± 4.0",
        "step 10: checkpoint in 0.6 s, runs/x/checkpoints/step-10",
        "warning: sampler and learner disagree",
        "2 groups will be sampled again",
    ]
    assert re.fullmatch(r"finished after \d+\.\ds", lines[7])
    # Why is told by the error that follows.
    assert re.fullmatch(r"failed after \d+\.\ds", lines[8])
    assert len(lines) == 9


@pytest.mark.parametrize("terminal", [False, True])
def test_what_a_model_wrote_commands_no_terminal(terminal: bool) -> None:
    out = io.StringIO()
    hostile = "\x1b[2J\x1b]0;owned\x07 \x9b31m [bold red]not markup[/] \u202e"
    console = PlainConsole(file=out, width=80, force_terminal=terminal, color_system=None)
    with LiveView(12, Path("runs/x"), console=console) as view:
        view.handle(PhaseEvent("start", hostile))
        view.handle(MessageEvent("error", hostile))
        view.note(hostile)
    text = out.getvalue()
    assert "[bold red]not markup[/]" in text
    assert not any(bad in text for bad in ("\x1b[2J", "\x1b]0", "\x07", "\x9b", "\u202e"))
    if not terminal:
        assert clean(text) == text


def test_the_time_left_is_the_median_step_times_the_steps_left() -> None:
    slow = [step(1), step(2), step(3, extra={"time/step": 500.0})]
    assert plain(*slow, EndEvent("finished", ""))[-2].endswith("left 18s")
    assert step_line(step(12), None).endswith("sec   2.00")


def test_a_step_without_its_seconds_is_timed_by_its_arrival(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("launch.run.live.time.monotonic", lambda: now)
    events = [StepEvent(n, 12, {"loss/sft": 2.5}) for n in (1, 2)]
    out = io.StringIO()
    with LiveView(12, None, console=PlainConsole(file=out, width=80)) as view:
        view.handle(events[0])
        now += 0.25
        view.handle(events[1])
        view.handle(EndEvent("finished", ""))
    first, second, _ = out.getvalue().splitlines()
    assert first == "step  1/12  loss  2.5000"
    assert second == "step  2/12  loss  2.5000  left 2.5s"


@pytest.mark.parametrize("width", [40, 80, 140])
def test_the_picture_fits_its_terminal(width: int) -> None:
    lines = drawn(
        width, PhaseEvent("rollout", "", 11, 32), *[step(n) for n in range(1, 7)], EvalEvent(6, 0.5, 200, 0.03)
    )
    assert max(len(line) for line in lines) <= width
    text = "\n".join(lines)
    assert "step 6/12" in text
    assert "12s left" in text
    if width >= 80:
        assert re.search(r"reward +0\.600 +▁▂▄▅▇█", text)
        assert re.search(r"held-out accuracy +50\.0% +▁", text)
        assert re.search(r"mismatch +1\.3e-06", text)


def test_the_bar_shows_where_the_time_of_the_last_step_went() -> None:
    lines = drawn(80, step(1), step(2, extra={"time/rollout": 0.5, "time/update": 1.5}))
    assert "█" * 80 in lines
    assert "■ rollout 25%   ■ update 75%" in lines[-1]


def test_the_picture_says_what_is_under_way() -> None:
    assert any("sampling 11/32" in line for line in drawn(80, PhaseEvent("rollout", "", 11, 32)))
    assert any("engine: rollout-1" in line for line in drawn(80, PhaseEvent("engine", "rollout-1")))


def test_figures_that_are_no_numbers_or_absent_are_passed_over() -> None:
    odd = StepEvent(1, 12, {"reward/mean": math.nan, "grad_norm": math.inf, "nobody/knows": 1.0})
    assert plain(odd)[0].startswith("step  1/12  grad      inf")
    assert not any("reward" in line for line in drawn(80, odd))


def test_the_terminal_is_given_back_when_the_run_fails() -> None:
    out = io.StringIO()

    def fail() -> None:
        with LiveView(12, None, console=PlainConsole(file=out, width=80, force_terminal=True)) as view:
            view.handle(step(1))
            raise KeyError("boom")

    with pytest.raises(KeyError, match="boom"):
        fail()
    assert out.getvalue().count("\x1b[?25h") >= 1  # the cursor is shown again


def test_sparkline_spans_the_history() -> None:
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7], 8) == "▁▂▃▄▅▆▇█"
    assert sparkline([0, 0, 7, 7], 2) == "▁█"
    assert sparkline([3.0, 3.0], 8) == "▁▁"
    assert sparkline([], 8) == ""
    assert len(sparkline([float(i) for i in range(1000)], 37)) == 37
