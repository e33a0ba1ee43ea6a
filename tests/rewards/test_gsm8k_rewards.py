"""`accuracy` on every gold answer of GSM8K: each is worth 1, and 0 after its number is changed."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from grpo_ray.config.reward import RewardFunctionConfig
from grpo_ray.rewards.functions.function import ScoreInputs
from grpo_ray.rewards.table import resolve
from tests.scoring import score_samples

FOLDER = Path(os.environ.get("GRPO_RAY_GSM8K", Path(__file__).parents[2] / "../shared/data/gsm8k"))
pytestmark = pytest.mark.skipif(
    not (FOLDER / "train.jsonl").exists(),
    reason="no GSM8K: set GRPO_RAY_GSM8K to a folder with train.jsonl and test.jsonl",
)
ACCURACY = resolve(RewardFunctionConfig(name="accuracy"))


@pytest.fixture(scope="module")
def golds() -> list[str]:
    lines = [line for name in ("train", "test") for line in (FOLDER / f"{name}.jsonl").read_text().splitlines()]
    return [json.loads(line)["answer"] for line in lines]


def values(completions: list[str], golds: list[str]) -> list[float]:
    columns = {"answer": golds}
    scores = score_samples([ACCURACY], ScoreInputs(["q"] * len(golds), completions, [[0]] * len(golds), columns))
    assert {s.status.value for s in scores} == {"ok"}
    return [s.value for s in scores]


def number_of(gold: str) -> str:
    return gold.rpartition("####")[2].strip()


def changed(gold: str) -> str:
    """The same text with another number at its end."""
    reasoning, _, number = gold.rpartition("####")
    return f"{reasoning}#### {int(number.replace(',', '')) + 1:,}"


def wrong(expected: float, got: list[float], golds: list[str]) -> list[str]:
    return [gold[-60:] for gold, value in zip(golds, got, strict=True) if value != expected]


@pytest.mark.timeout(300)
def test_each_gold_answer_is_right(golds: list[str]) -> None:
    assert len(golds) == 8792
    assert wrong(1.0, values(golds, golds), golds) == []


@pytest.mark.timeout(300)
def test_each_gold_answer_is_wrong_once_its_number_is_changed(golds: list[str]) -> None:
    assert wrong(0.0, values([changed(g) for g in golds], golds), golds) == []


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    "form", ["\\boxed{{{}}}", "So the answer is {}.", "<think>1 + 1 = 2</think>\n<answer>{}</answer>", "{}", "${}$"]
)
def test_other_forms_of_the_answer_count_as_much(golds: list[str], form: str) -> None:
    some = golds[::29]
    assert wrong(1.0, values([form.format(number_of(g)) for g in some], some), some) == []
    assert wrong(0.0, values([form.format(number_of(changed(g))) for g in some], some), some) == []
