"""report.html: its numbers are the run's, and nothing that a model wrote becomes markup."""

from __future__ import annotations

import json
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from plotly.offline import get_plotlyjs

from grpo_ray.report.charts import POINTS_SHOWN, metric_charts, time_charts, time_shares
from grpo_ray.report.page import first_middle_last, write_report
from grpo_ray.report.timeline import timeline_chart
from grpo_ray.run.rollout_log import distinct_refs, write_rollouts
from grpo_ray.telemetry.messages import MessageLog
from grpo_ray.telemetry.timeline import Timeline
from grpo_ray.telemetry.tracking import JsonlTracker
from grpo_ray.types import (
    Group,
    Prompt,
    RewardScore,
    Sample,
    SampleInfo,
    Score,
    ScoreStatus,
    TimeSpan,
    Track,
    VersionSpan,
)
from tests.batches import batch_of

HOSTILE = '</script><script>alert(1)</script><img src=x onerror=alert(2)>{{ 7 * 7 }}\n\tkept   spaces & "quotes" \''


class Page(HTMLParser):
    """What a browser would see: elements, text, the contents of scripts."""

    def __init__(self, path: Path) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text: list[str] = []
        self.scripts: list[str] = []
        self.pres: list[str] = []
        self._inside: list[str] = []
        self.feed(path.read_text())
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        self._inside.append(tag)
        if tag in ("script", "pre"):
            (self.scripts if tag == "script" else self.pres).append("")

    def handle_endtag(self, tag: str) -> None:
        while self._inside and self._inside.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        inside = self._inside[-1] if self._inside else ""
        if inside == "script":
            self.scripts[-1] += data
        elif inside == "pre":
            self.pres[-1] += data
        elif inside != "style":
            self.text.append(data.strip())

    @property
    def data(self) -> list[dict[str, Any]]:
        charts: list[dict[str, Any]] = json.loads(self.scripts[0])
        return charts


def log_steps(run: Path, steps: int, extra: dict[str, float] | None = None) -> None:
    tracker = JsonlTracker(run / "metrics.jsonl")
    tracker.log(0, {"eval/accuracy": 0.25, "eval/standard_error": 0.02, "time/eval": 4.0})
    for step in range(1, steps + 1):
        line = {
            "reward/mean": step / 10,
            "time/step": 2.0,
            "time/rollout": 1.25,
            "time/update": 0.5,
            "time/other": 0.25,
            "throughput/tokens_per_s": 500.0,
            "throughput/samples_per_s": 32.0,
            "grad_norm": 1.5,
        }
        tracker.log(step, line | (extra or {}))
    if steps:
        tracker.log(
            steps, {"eval/accuracy": 0.875, "eval/standard_error": 0.01, "time/eval": 6.0, "time/checkpoint": 2.0}
        )
    tracker.close()


def write_step(run: Path, step: int, rewards: list[list[float]], text: str = "answer") -> None:
    groups = []
    for number, values in enumerate(rewards):
        prompt = Prompt(f"set/{step}/{number}", [1], f"prompt {number} of step {step}", None, {})
        ref = [
            Sample(
                prompt.id,
                i,
                np.array([1], np.int32),
                np.array([5, 6], np.int32),
                np.array([-0.5, -0.25], np.float32),
                (VersionSpan(step - 1, 0, 2),),
                "stop",
                f"{text} {number}.{i}",
            )
            for i in range(len(values))
        ]
        infos = [SampleInfo(prompt.id, i, 1, 2, step - 1, "stop", "rollout-0", ref, i) for i in range(len(values))]
        scores = [
            Score(ScoreStatus.OK, v, (RewardScore("accuracy", ScoreStatus.OK, v),))
            if v == v
            else Score(
                ScoreStatus.TIMEOUT,
                v,
                (RewardScore("accuracy", ScoreStatus.TIMEOUT, v, detail='" onmouseover="alert(3)'),),
            )
            for v in values
        ]
        groups.append(Group(prompt, number, step - 1, infos, scores, [v - 0.5 for v in values]))
    write_rollouts(run / "rollouts", step, groups, batch_of(groups, step - 1), distinct_refs(groups), run_seed=1)


def test_warnings_are_shown_once_and_in_place_of_advice_on_speed(tmp_path: Path) -> None:
    slow = {"busy/rollout": 0.6, "busy/learner": 0.3, "workers/rollout": 1.0, "workers/learner": 1.0}
    log_steps(tmp_path, 5, slow)
    advice = "would overlap them"
    assert advice in write_report(tmp_path).read_text()
    log_steps(tmp_path, 5, slow | {"steps/without_signal": 5.0})
    log = MessageLog(tmp_path)
    for step in (1, 3):
        log.add(step, "warning", "all rewards are 0 <script>alert(1)</script>")
    log.add(5, "info", "only for the moment")
    log.add(5, "error", "nothing was trained")
    with (tmp_path / "messages.jsonl").open("a") as file:
        file.write('{"step": 6, "ti')
    page = Page(write_report(tmp_path))
    shown = " | ".join(t for t in page.text if t)
    told = (
        "step 1, 2 times | warning | all rewards are 0 <script>alert(1)</script> | step 5 | error | nothing was trained"
    )
    assert f"Warnings | {told}" in shown
    assert "only for the moment" not in shown
    assert advice not in shown
    MessageLog(tmp_path / "nowhere").add(1, "error", "there is no such folder")


def test_what_is_0_all_along_is_drawn() -> None:
    lines = [
        {
            "step": s,
            "eval/accuracy": 0.0,
            "reward/mean": 0.0,
            "reward/form/mean": 0.1,
            "grad_norm": 0.0,
            "mismatch/mean_abs": 0.0,
        }
        for s in (1, 2, 3)
    ]
    drawn = {c.title: (c.kind, [s["name"] for s in c.series]) for c in metric_charts(lines)}
    assert drawn == {
        "Held-out accuracy": ("percent", ["eval/accuracy"]),
        "Reward": ("", ["reward/mean", "reward/form/mean"]),
        "Gradient norm": ("", ["grad_norm"]),
        "Sampler against learner": ("", ["mismatch/mean_abs"]),
    }, "a logarithm of 0 is nothing to see"


def test_headline_figures_are_those_of_the_run(tmp_path: Path) -> None:
    log_steps(tmp_path, 5)
    (tmp_path / "config.yaml").write_text("name: my-run\nnum_steps: 8\nmodel: {path: org/model}\n")
    page = Page(write_report(tmp_path, {"trained": 40, "drop_reasons": {"reward_timeout": 3}}))
    shown = " | ".join(t for t in page.text if t)
    for expected in (
        "my-run",
        "org/model",
        "Held-out accuracy | 25.0% → 87.5% | step 0 → 5, last ± 1.0",
        "Steps | 5 | of 8 planned",
        "Samples | 320 | 64 a step",
        "Time | 22s | 2.00 s a step",  # 5 steps of 2 s, evaluations of 4 and 6 s, a checkpoint of 2 s
        "Tokens per second | 500 | 5,000 tokens",
        "rollout | 6.2s | 28%",
        "eval | 10s | 45%",
        "trained | 40 | drop reasons: reward timeout | 3",
    ):
        assert expected in shown, shown
    assert "num_steps: 8" in page.pres[-1]


def test_a_report_that_is_shown_on_a_terminal_moves_no_cursor_and_sets_no_clipboard(tmp_path: Path) -> None:
    text = "\x1b]52;c;aGk=\x07\x9b2J\u202ekept"
    log_steps(tmp_path, 1, {f"reward/{text}/mean": 0.5})
    write_step(tmp_path, 1, [[1.0, 0.0]], text=text)
    page = write_report(tmp_path, {text: text}).read_text()
    assert "kept 0.0" in page
    assert not {"\x1b", "\x07", "\x9b", "\u202e"} & set(page.replace(get_plotlyjs(), ""))


def test_curves_hold_the_numbers_of_metrics_jsonl(tmp_path: Path) -> None:
    log_steps(tmp_path, 3)
    charts = {c["title"]: c for c in Page(write_report(tmp_path)).data}
    (reward,) = charts["Reward"]["series"]
    assert (reward["x"], reward["y"]) == ([1, 2, 3], [0.1, 0.2, 0.3])
    (accuracy,) = charts["Held-out accuracy"]["series"]
    assert (accuracy["x"], accuracy["y"], accuracy["error"]) == ([0, 3], [0.25, 0.875], [0.02, 0.01])
    stack = {s["name"]: s["y"] for s in charts["Seconds of each step"]["series"]}
    assert stack == {
        "rollout": [0, 1.25, 1.25, 1.25],
        "update": [0, 0.5, 0.5, 0.5],
        "other": [0, 0.25, 0.25, 0.25],
        "eval": [4.0, 0, 0, 6.0],
        "checkpoint": [0, 0, 0, 2.0],
    }
    assert "Entropy" not in charts


def test_samples_show_the_best_and_the_worst_of_the_groups_with_a_spread(tmp_path: Path) -> None:
    log_steps(tmp_path, 9)
    for step in (1, 4, 6, 9):
        write_step(tmp_path, step, [[0.5, 0.5], [0.25, 1.0, float("nan"), 0.0], [0.0, 0.5]])
    page = Page(write_report(tmp_path))
    assert [t for t in page.text if t.startswith("Step ")] == ["Step 1", "Step 4", "Step 9"]
    expected = ["prompt 1 of step {0}", "answer 1.1", "answer 1.3", "prompt 2 of step {0}", "answer 2.1", "answer 2.0"]
    assert page.pres == [text.format(step) for step in (1, 4, 9) for text in expected]
    start = page.text.index("best")
    shown = [t for t in page.text[start:] if t][:5]
    assert shown == [
        "best",
        "reward 1.000",
        "advantage +0.500",
        "accuracy 1.000",
        "2 tokens · ended by itself · policy 0 · sample 1 by rollout-0",
    ]


def test_hostile_text_stays_text(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(json.dumps({"name": HOSTILE, "model": {"path": HOSTILE}}))
    log_steps(tmp_path, 2, {f"reward/{HOSTILE}/mean": 0.5, f"reward/{HOSTILE}/failed": 1.0})
    write_step(tmp_path, 1, [[1.0, 0.0], [float("nan"), float("nan")]], text=HOSTILE)
    page = Page(write_report(tmp_path, {HOSTILE: HOSTILE}))
    assert page.tags.count("script") == 3
    assert "img" not in page.tags
    assert [name for name, _ in page.attributes if name.startswith("on")] == []
    assert ("title", '" onmouseover="alert(3)') in page.attributes
    assert f"{HOSTILE} 0.0" in page.pres
    assert f"{HOSTILE} 0.1" in page.pres
    names = [s["name"] for c in page.data for s in c["series"]]
    assert f"reward/{HOSTILE}/mean" in names
    assert HOSTILE in page.text


def test_the_report_needs_no_network_and_is_small_enough_to_send(tmp_path: Path) -> None:
    log_steps(tmp_path, 3)
    path = write_report(tmp_path)
    page = Page(path)
    assert [value for name, value in page.attributes if name in ("src", "href")] == []
    policy = next(v for _, v in page.attributes if v and v.startswith("default-src"))
    assert "http" not in policy
    assert 1_000_000 < path.stat().st_size < 6_000_000
    assert sorted(p.name for p in tmp_path.iterdir()) == ["metrics.jsonl", "report.html"]


@pytest.mark.parametrize("steps", [0, 1])
def test_a_run_that_hardly_began_has_a_report(tmp_path: Path, steps: int) -> None:
    if steps:
        log_steps(tmp_path, steps)
    page = Page(write_report(tmp_path))
    assert tmp_path.name in page.text
    assert page.text[page.text.index("Steps") + 2] == str(steps)


def test_an_sft_run_shows_its_loss(tmp_path: Path) -> None:
    tracker = JsonlTracker(tmp_path / "metrics.jsonl")
    for step in (1, 2):
        tracker.log(
            step, {"loss/sft": 3.0 / step, "time/step": 1.0, "time/update": 1.0, "throughput/tokens_per_s": 10.0}
        )
    tracker.close()
    page = Page(write_report(tmp_path))
    assert page.text[page.text.index("Loss") + 2] == "3.000 → 1.500"
    assert [c["title"] for c in page.data] == ["Loss", "Throughput", "Seconds of each step"]


def trace_steps(run: Path, steps: int) -> None:
    """Steps of 10 s: 6 of sampling, 3 of learning; a reward worker that works for hardly a moment, twice."""
    timeline = Timeline(run / "trace.json")
    for step in range(1, steps + 1):
        t = 1000.0 + 10 * step
        spans = {
            "controller": [("controller", ("rollout", t, t + 6), ("update", t + 6, t + 9))],
            "rollout": [("rollout-0", ("sampling", t, t + 6), ("paused", t + 9, t + 9.5))],
            "reward": [("reward-0", ("scoring", t + 3, t + 3.001), ("scoring", t + 5, t + 5.001))],
            "learner": [("learner-0", ("forward_backward", t + 6, t + 7), ("forward_backward", t + 7.001, t + 9))],
        }
        tracks = {
            role: [Track(w, tuple(TimeSpan(*s) for s in own)) for w, *own in workers] for role, workers in spans.items()
        }
        timeline.record(step, TimeSpan("step", t, t + 10), tracks)


def test_the_timeline_shows_two_steps_of_every_worker(tmp_path: Path) -> None:
    trace_steps(tmp_path, 5)
    log_steps(
        tmp_path,
        5,
        {
            "time/step": 10.0, "time/rollout": 6.0, "time/update": 3.0,
            "busy/rollout": 0.6, "busy/learner": 0.3, "workers/rollout": 1.0, "workers/learner": 1.0,
        },
    )  # fmt: skip
    page = Page(write_report(tmp_path))
    chart = next(c for c in page.data if c["kind"] == "timeline")
    assert chart["title"] == "Steps 3 and 4"
    assert chart["rows"] == ["controller", "rollout-0", "reward-0", "learner-0"]
    assert chart["marks"] == [0.0, 10.0, 20.0]
    drawn = {s["name"]: (s["y"], s["base"], s["x"]) for s in chart["series"]}
    assert drawn == {
        "rollout": (["controller"] * 2, [0.0, 10.0], [6.0, 6.0]),
        "update": (["controller"] * 2, [6.0, 16.0], [3.0, 3.0]),
        "sampling": (["rollout-0"] * 2, [0.0, 10.0], [6.0, 6.0]),
        "paused": (["rollout-0"] * 2, [9.0, 19.0], [0.5, 0.5]),
        # The gap of a millisecond is narrower than a pixel, and so are the scores.
        "forward_backward": (["learner-0"] * 2, [6.0, 16.0], [3.0, 3.0]),
    }
    shown = " | ".join(t for t in page.text if t)
    assert "rollout | 1 | 60% | 40% | learner | 1 | 30% | 70%" in shown
    assert (
        "learners idle 70% of the step, sampling is the bottleneck: algorithm.max_staleness=1 would overlap them: at most 1.7x"
        in page.text
    )


@pytest.mark.parametrize(("steps", "title"), [(1, "Step 1"), (2, "Steps 1 and 2"), (3, "Steps 2 and 3")])
def test_the_timeline_of_a_short_run(tmp_path: Path, steps: int, title: str) -> None:
    assert timeline_chart(tmp_path / "trace.json") is None
    trace_steps(tmp_path, steps)
    chart = timeline_chart(tmp_path / "trace.json")
    assert chart is not None
    assert chart.title == title


def test_a_line_of_nulls_is_no_obstacle(tmp_path: Path) -> None:
    names = ("reward/mean", "time/step", "time/rollout", "throughput/tokens_per_s", "eval/accuracy", "loss/sft")
    JsonlTracker(tmp_path / "metrics.jsonl").log(1, dict.fromkeys(names, float("nan")))
    assert "Steps" in Page(write_report(tmp_path)).text


def test_long_runs_are_thinned_and_keep_their_last_point() -> None:
    lines = [{"step": s, "reward/mean": float(s), "time/rollout": 1.0} for s in range(1, 5001)]
    (reward,) = metric_charts(lines)[0].series
    assert len(reward["x"]) <= POINTS_SHOWN
    assert (reward["x"][-1], reward["y"][-1]) == (5000, 5000.0)
    assert len(time_charts(lines)[0].series[0]["x"]) <= POINTS_SHOWN
    assert time_shares(lines)[0][2:] == (5000.0, 1.0)


def test_a_reward_of_one_function_is_drawn_once() -> None:
    lines = [{"step": s, "reward/mean": s / 2, "reward/accuracy/mean": s / 2, "staleness/mean": 0.0} for s in (1, 2)]
    assert [[s["name"] for s in c.series] for c in metric_charts(lines)] == [["reward/mean"]]


def test_the_middle_step_is_the_one_nearest_to_half_way() -> None:
    assert first_middle_last([]) == []
    assert first_middle_last([4]) == [4]
    assert first_middle_last([1, 2]) == [1, 2]
    assert first_middle_last([1, 2, 3, 30, 60]) == [1, 30, 60]


PHONE = "<style>body { width: 390px }</style>"
MEASURE = """
<script>
addEventListener("load", () => setTimeout(() => {
  const box = (e) => e.getBoundingClientRect();
  const meet = (a, b) => a.left < b.right - 1 && b.left < a.right - 1 && a.top < b.bottom - 1 && b.top < a.bottom - 1;
  const found = [...document.querySelectorAll(".plot")].map((plot) => {
    const legends = [plot.querySelector("g.legend"), plot.previousElementSibling].filter((e) => e?.matches(".legend"));
    const drawn = [...plot.querySelectorAll(".barlayer .point path, .scatterlayer .js-line")];
    const wide = Math.max(...drawn.map((d) => box(d).right)) - box(plot).left;
    return { id: plot.id, legends: legends.length, drawn: drawn.length, wide: wide,
             covered: legends.some((l) => drawn.some((d) => meet(box(l), box(d)))) };
  });
  document.body.replaceChildren(JSON.stringify(found));
}, 500));
</script>
"""


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs a browser")
def test_no_legend_covers_what_is_drawn_on_a_phone(tmp_path: Path) -> None:
    many = {f"reward/a_function_of_a_long_name_{i}/mean": i / 10 for i in range(5)}
    trace_steps(tmp_path, 5)
    log_steps(tmp_path, 5, many)
    page = write_report(tmp_path)
    head, end_of_title, rest = page.read_text().partition("</title>")
    body, end_of_body, after = rest.rpartition("</body>")
    page.write_text(head + end_of_title + PHONE + body + MEASURE + end_of_body + after)
    options = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    command = [
        "chromium",
        *options.split(),
        "--disable-component-update",
        "--disable-sync",
        "--virtual-time-budget=5000",
    ]
    command += [f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", page.as_uri()]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    charts = json.loads(dom.partition("<body>")[2].partition("</body>")[0])
    assert {"chart-timeline", "chart-time"} <= {chart["id"] for chart in charts}
    assert sum(chart["legends"] for chart in charts) >= 3
    for chart in charts:
        assert chart["drawn"] > 0
        assert not chart["covered"], chart
        assert chart["wide"] <= 390, chart
