"""report.html of a pipeline: what it says, and that nothing a model wrote gets out of its place."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from grpo_ray.pipeline.measure import measure
from grpo_ray.pipeline.plan import Plan
from grpo_ray.pipeline.record import Cost, Record, StageRecord
from grpo_ray.pipeline.report import write_pipeline_report
from tests.pipeline.test_pipeline import plan_of
from tests.samples import row, sample_folder

HOSTILE = "<think></script><script>alert(1)</script></think><img src=x onerror=alert(2)>"


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    return plan_of({"dir": str(tmp_path), "seed": 1})


def finish(plan: Plan, record: Record, right: dict[str, float]) -> None:
    """Base and zero are measured, a mix is made."""
    for name, value in right.items():
        rows = [
            row(f"eval/0/{i}", 0, f"{HOSTILE} of {name}", question=f"question {i}", rewards={"accuracy": ("ok", value)})
            for i in range(4)
        ]
        sample_folder(plan.output(f"{name}-eval", "samples"), rows)
        metrics = measure(rows, accuracy="accuracy", threshold=1.0, by="source")
        record.put(name, StageRecord(plan.stage(name).kind, "d", done=True, cost=Cost(61.0, 1234, 2)))
        record.put(f"{name}-eval", StageRecord("eval", "d", done=True, metrics=metrics, cost=Cost(10.0, 100, 1)))
    details = {
        "num_rows": 8,
        "composition": {"greet": 2, "samples/add": 6},
        "left_out": {"loop": 3},
        "num_samples": 20,
        "num_chosen": 6,
        "num_contaminated": 1,
    }
    record.put("mix", StageRecord("data", "d", done=True, metrics={"num_rows": 8.0}, details=details))


def text_of(page: str) -> str:
    return " ".join(re.sub(r"<[^>]+>", " ", page.partition("<main>")[2].partition("</main>")[0]).split())


def test_it_tells_what_each_stage_did_and_what_it_cost(plan: Plan) -> None:
    plan.folder.mkdir()
    record = Record.open(plan.folder)
    finish(plan, record, {"base": 0.0, "zero": 1.0})
    text = text_of(write_pipeline_report(plan, record).read_text())
    assert "accuracy 0.0% ± 0.0 100.0% ± 0.0" in text
    assert "zero train done 1m01s 1,234 2" in text
    assert "accuracy 1, base has 0" in text
    assert "samples/add 6 75%" in text
    assert "left out: loop 3" in text
    assert "6 of 20 samples were chosen, 1 rows share words with a test set" in text
    assert "cold sft to come" in text
    assert text.count("question 0") == 1
    assert "of base" in text
    assert "of zero" in text


def test_what_a_model_wrote_is_shown_and_never_obeyed(plan: Plan) -> None:
    plan.folder.mkdir()
    record = Record.open(plan.folder)
    finish(plan, record, {"base": 0.0, "zero": 1.0})
    page = write_pipeline_report(plan, record).read_text()
    assert "<img src=x" not in page
    assert "<script>alert" not in page
    assert "&lt;img src=x onerror=alert(2)&gt;" in page


def test_it_is_written_before_anything_is_done(plan: Plan) -> None:
    plan.folder.mkdir()
    record = Record.open(plan.folder)
    record.put("base", StageRecord("sft", "d"))
    text = text_of(write_pipeline_report(plan, record).read_text())
    assert "No model has been measured yet" in text
    assert "base sft begun" in text
    record.put("base", replace(record.stages["base"], done=True))
    assert "1 of 8 stages are done" in text_of(write_pipeline_report(plan, record).read_text())
