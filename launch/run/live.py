"""The view of a run in a terminal: a picture that is redrawn, or a plain line every ten seconds where there is no
terminal.

step 43/60  ━━━━━━━━━━━━━━━━━━╸━━━━━━━━  2.76 s a step  47s left  2m03s
sampling 11/16
reward          1.061  ▁▂▃▃▄▅▅▆▇▇█
...
████████████████████████████████████████
■ rollout 54%   ■ update 41%   ■ sync 4%
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rich.console import ConsoleOptions, Group, RenderResult
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from grpo_ray.plain_terminal import clean, one_line
from grpo_ray.telemetry.catalogue import LOSSES, ROLES
from grpo_ray.telemetry.events import CheckpointEvent, EndEvent, EvalEvent, Event, MessageEvent, PhaseEvent, StepEvent
from grpo_ray.telemetry.metrics import duration
from grpo_ray.terminal import PlainConsole
from launch.console import plain_console
from launch.program import runnable

REFRESHES_A_SECOND = 4
HISTORY = 400
"""The number of steps in the small curves."""
STEP_LINE_S = 10.0
"""The time between lines without a terminal: of quicker steps only the last one has a line."""
ETA_STEPS = 15
"""The number of last steps whose median, times the steps left, is the time left: one slow step does not move it."""

ROWS: tuple[tuple[str, tuple[str, ...], str], ...] = (
    ("reward", ("reward/mean",), ".3f"),
    ("held-out accuracy", ("eval/accuracy",), ".1%"),
    ("pairs in order", ("pairs/accuracy",), ".1%"),
    ("loss", LOSSES, ".4f"),
    ("completion length", ("completions/mean_length",), ",.1f"),
    ("turns", ("environment/turns",), ".1f"),
    ("tokens/s", ("throughput/tokens_per_s",), ",.0f"),
    ("gradient norm", ("grad_norm",), ".3g"),
    ("mismatch", ("mismatch/mean_abs",), ".1e"),
)
"""(label, metrics of which the first available one is shown, format)."""

DOING = {
    "rollout": "sampling",
    "reward": "scoring",
    "update": "learning",
    "sync": "sending weights",
    "eval": "evaluating",
    "checkpoint": "saving",
    "scale": "scaling",
    "log": "writing",
}
"""The phases inside the loop, in words. Any other phase is part of starting up."""

STEPPING = ("rollout", "update")
"""The phases of a step."""

COLORS = dict(
    zip(ROLES, ("blue", "magenta", "yellow", "green", "cyan", "bright_black", "red", "bright_blue"), strict=True)
)
LEVELS = {"warning": "yellow", "error": "bold red"}
BARS = "▁▂▃▄▅▆▇█"


class LiveView:
    """Draws the events of one run. It is a context manager, so that the terminal is restored whatever happens."""

    def __init__(
        self,
        total_steps: int | None = None,
        run_dir: Path | None = None,
        began: float | None = None,
        console: PlainConsole | None = None,
        *,
        no_steps: bool = False,
    ) -> None:
        """
        Args:
            total_steps: None until the first step reports it.
            no_steps: there will be none, so the view shows the progress of its phases.
            run_dir: the run's folder, whose name is the title.
            began: `time.monotonic()` at the start, for the time shown; None: now.
        """
        self.console = console or plain_console()
        self._title = run_dir.name if run_dir else ""
        self._began = time.monotonic() if began is None else began
        self._state = _State(total_steps, no_steps)
        self._told = ("", "")
        self._untold, self._told_step_at = "", -STEP_LINE_S
        self._live: Live | None = None
        if self.console.is_terminal:
            self._live = Live(self, console=self.console, refresh_per_second=REFRESHES_A_SECOND)

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self._state.doing = ""
        if self._live is not None:
            self._live.stop()

    def handle(self, event: Event) -> None:
        """Handle an event. It never raises for an unknown metric, phase or level."""
        self._state.take(event)
        match event:
            case PhaseEvent():
                self._phase(event)
            case StepEvent():
                if self._live is None:
                    self._untold = step_line(event, self._state.seconds_left())
                    now = time.monotonic()
                    if now - self._told_step_at >= STEP_LINE_S or event.step == event.total_steps:
                        self._tell_step(now)
            case EvalEvent():
                self._print(eval_line(event), "green")
            case CheckpointEvent():
                self._print(f"step {event.step}: checkpoint in {event.seconds:.1f} s, {event.path}", "dim")
            case MessageEvent():
                prefix = f"{event.level}: " if event.level in LEVELS else ""
                self._print(prefix + event.text, LEVELS.get(event.level, ""))
            case EndEvent():
                self._tell_step(time.monotonic())
                # The command that started the run reports why it failed.
                why = "" if event.text in ("", event.status) or event.status == "failed" else f": {event.text}"
                took = duration(time.monotonic() - self._began)
                self._print(f"{event.status} after {took}{why}", _end_style(event.status))

    @property
    def in_steps(self) -> bool:
        """Whether a step is in progress or has been done."""
        return not self._state.no_steps and self._state.in_steps

    def note(self, text: str) -> None:
        """Print a line of the launcher's own."""
        self._print(text, "yellow")

    def _tell_step(self, now: float) -> None:
        """Print the last step's line, unless it was printed."""
        if self._untold:
            self._print(self._untold)
            self._untold, self._told_step_at = "", now

    def _phase(self, event: PhaseEvent) -> None:
        told = (event.phase, event.detail)
        if event.phase in DOING:
            if not self._state.no_steps or not event.total:
                return
            told = (event.phase, f"{10 * event.done // event.total}")
        if self._live is None and told != self._told:
            self._told = told
            what = (
                self._state.doing if event.phase in DOING else f"{event.phase}{': ' * bool(event.detail)}{event.detail}"
            )
            self._print(f"[{time.monotonic() - self._began:6.1f} s] {what}")

    def _print(self, text: str, style: str = "") -> None:
        self.console.print(Text(clean(runnable(text)), style=style), soft_wrap=True)

    def __rich_console__(self, console: Any, options: ConsoleOptions) -> RenderResult:
        yield _picture(self._state, self._title, time.monotonic() - self._began, options.max_width)


class _State:
    """What the picture shows, apart from how."""

    def __init__(self, total_steps: int | None, no_steps: bool) -> None:
        self.no_steps = no_steps
        self.step = 0
        self.total_steps = total_steps or 0
        self.doing = "starting"
        self.in_steps = False
        self.counted = (0, 0)
        """(done, total) of the phase in progress."""
        self.history: dict[str, deque[float]] = {label: deque(maxlen=HISTORY) for label, _, _ in ROWS}
        self.last: dict[str, float] = {}
        self._eval_name: str | None = None
        self._step_seconds: deque[float] = deque(maxlen=ETA_STEPS)
        self._step_ended: float | None = None

    def take(self, event: Event) -> None:
        match event:
            case PhaseEvent():
                self.counted = (event.done, event.total)
                self.in_steps = self.in_steps or event.phase in STEPPING
                count = f" {event.done}/{event.total}" if event.total else ""
                words = DOING.get(event.phase, event.phase)
                self.doing = f"{words}{count}" + (f": {event.detail}" if event.detail else "")
            case StepEvent():
                self.in_steps = True
                self._take_step(event)
            case EvalEvent():
                # One curve: that of the first set, where there are several.
                self._eval_name = event.name if self._eval_name is None else self._eval_name
                if event.name == self._eval_name and event.accuracy is not None:
                    self.history["held-out accuracy"].append(event.accuracy)
            case EndEvent():
                self.doing = ""

    def _take_step(self, event: StepEvent) -> None:
        self.step, self.total_steps, self.last = event.step, event.total_steps, event.metrics
        for label, names, _ in ROWS:
            value = first_of(event.metrics, names)
            if value is not None:
                self.history[label].append(value)
        seconds = event.metrics.get("time/step")
        now = time.monotonic()
        if seconds is None and self._step_ended is not None:
            seconds = now - self._step_ended
        self._step_ended = now
        if seconds is not None:
            self._step_seconds.append(seconds)

    def seconds_a_step(self) -> float | None:
        return statistics.median(self._step_seconds) if self._step_seconds else None

    def seconds_left(self) -> float | None:
        each = self.seconds_a_step()
        return None if each is None else each * max(0, self.total_steps - self.step)


def eval_line(event: EvalEvent) -> str:
    """`step 40: held-out accuracy 61.0% ± 2.1 (800 samples), pass@8 80.5% ± 3.0, cons@8 66.0% ± 3.3`; the samples to which it does
    not apply are listed beside those that it averages."""
    on = f" on {event.name}" if event.name else ""
    aside = f", {event.not_applicable} not applicable" if event.not_applicable else ""
    accuracy = "none" if event.accuracy is None else _percent(event.accuracy, event.standard_error)
    figures = [f"held-out accuracy{on} {accuracy} ({event.n} samples{aside})"]
    figures += [f"{measure} {_percent(e.mean, e.standard_error)}" for measure, e in event.measures.items()]
    return f"step {event.step}: {', '.join(figures)}"


def _percent(mean: float, standard_error: float) -> str:
    return f"{mean:.1%} ± {100 * standard_error:.1f}"


def step_line(event: StepEvent, seconds_left: float | None) -> str:
    """One step in one line, in columns: for logs."""
    width = len(str(event.total_steps))
    columns = [f"step {event.step:>{width}}/{event.total_steps}"]
    for label, names, form in PLAIN:
        value = first_of(event.metrics, names)
        if value is not None:
            columns.append(f"{label} {format(value, form)}")
    left = f"left {duration(seconds_left)}" if seconds_left is not None else ""
    return "  ".join([*columns, left]).rstrip()


PLAIN: tuple[tuple[str, tuple[str, ...], str], ...] = (
    ("reward", ("reward/mean",), "6.3f"),
    ("loss", LOSSES, "7.4f"),
    ("pairs", ("pairs/accuracy",), "6.1%"),
    ("length", ("completions/mean_length",), "6.1f"),
    ("tok/s", ("throughput/tokens_per_s",), "6.0f"),
    ("grad", ("grad_norm",), "8.3g"),
    ("mismatch", ("mismatch/mean_abs",), "7.1e"),
    ("sec", ("time/step",), "6.2f"),
)
"""The columns of the plain line, each of a fixed width."""


def first_of(metrics: dict[str, float], names: Sequence[str]) -> float | None:
    """The first of these metrics that is available and a number."""
    return next((metrics[n] for n in names if metrics.get(n) is not None and metrics[n] == metrics[n]), None)


def sparkline(values: Sequence[float], width: int) -> str:
    """The whole history in at most `width` characters, each the mean of its share; the lowest is ▁, the highest █."""
    if not values or width < 1:
        return ""
    size = min(width, len(values))
    edges = [round(i * len(values) / size) for i in range(size + 1)]
    means = [statistics.fmean(values[a:b]) for a, b in itertools.pairwise(edges)]
    low, high = min(means), max(means)
    if high == low:
        return BARS[0] * size
    return "".join(BARS[round((m - low) / (high - low) * (len(BARS) - 1))] for m in means)


def _picture(state: _State, title: str, elapsed: float, width: int) -> Group:
    parts: list[Table | Text] = [_header(state, title, elapsed, width)]
    if state.last or any(state.history.values()):
        parts.append(_figures(state, width))
    shares = _time_bar(state.last, width)
    return Group(*parts, *shares)


def _header(state: _State, title: str, elapsed: float, width: int) -> Table:
    top = Table.grid(padding=(0, 2), expand=True)
    top.add_column(no_wrap=True)
    top.add_column(ratio=1)
    top.add_column(no_wrap=True, justify="right")
    done, total = state.counted if state.no_steps else (state.step, state.total_steps)
    count = f"{done}/{total}" if state.no_steps else f"step {done}/{total}" if total else "step 0"
    name = f"{title}  " if title and width >= 100 else ""
    each, left = state.seconds_a_step(), state.seconds_left()
    times = [
        f"{each:.2f} s a step" if each and width >= 70 else "",
        f"{duration(left)} left" if left else "",
        duration(elapsed),
    ]
    bar = ProgressBar(total=total or 1, completed=done, complete_style="blue", finished_style="green")
    top.add_row(Text(name, style="bold") + Text(count, style="bold blue"), bar, Text("  ".join(t for t in times if t)))
    if state.doing:
        doing = Text(one_line(state.doing), style="dim", no_wrap=True, overflow="ellipsis")
        outer = Table.grid(expand=True)
        outer.add_row(top)
        outer.add_row(doing)
        return outer
    return top


def _figures(state: _State, width: int) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(justify="right", no_wrap=True, min_width=9)
    table.add_column(no_wrap=True, style="blue")
    for label, _, form in ROWS:
        values = state.history[label]
        if values:
            table.add_row(
                label, Text(format(values[-1], form), style="bold"), sparkline(list(values), min(60, width - 34))
            )
    return table


def _time_bar(metrics: dict[str, float], width: int) -> list[Text]:
    """Where the time of the last step went: one bar, and its legend."""
    seconds = {role: metrics.get(f"time/{role}", 0.0) for role in ROLES}
    whole = sum(seconds.values())
    if whole <= 0:
        return []
    bar, legend = Text(no_wrap=True), Text()
    start, passed = 0, 0.0
    for role, spent in seconds.items():
        passed += spent
        end = round(passed / whole * width)
        bar.append("█" * (end - start), style=COLORS[role])
        start = end
        if spent / whole >= 0.005:
            legend.append("■ ", style=COLORS[role])
            legend.append(f"{role} {spent / whole:.0%}   ")
    return [bar, legend]


def _end_style(status: str) -> str:
    return {"finished": "bold green", "failed": "bold red"}.get(status, "bold yellow")
