"""The tasks of `make bench-versus`: how long their answers are, what scores, and that no part shares a problem with another."""

from __future__ import annotations

import math
import random
import re
from itertools import pairwise
from pathlib import Path
from statistics import mean, median, stdev

import pytest

from grpo_ray.config.model import TinyModelConfig
from grpo_ray.models.files.tiny import build_tiny_model
from tests.bench.addition import TASKS, Flaws, correct, demonstrations, right_completions, rows, well_formed
from tests.bench.versus_steps import StepLog, read_steps, step_seconds

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def lengths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[int]]:
    """Tokens of the right completions of each task, the end of the sequence included."""
    from transformers import AutoTokenizer

    path = build_tiny_model(
        tmp_path_factory.mktemp("model"), TinyModelConfig(hidden_size=64, num_heads=2, num_layers=1)
    )
    tokenizer = AutoTokenizer.from_pretrained(path)
    return {
        task: [len(ids) + 1 for ids in tokenizer(right_completions(task), add_special_tokens=False).input_ids]
        for task in TASKS
    }


def test_even_answers_are_all_of_one_length(lengths: dict[str, list[int]]) -> None:
    assert (min(lengths["even"]), max(lengths["even"])) == (62, 63)


def test_heavy_answers_are_log_normal_with_a_mean_of_80_tokens(lengths: dict[str, list[int]]) -> None:
    tokens = lengths["heavy"]
    assert min(tokens) == 21
    assert 450 < max(tokens) <= 504
    assert mean(tokens) == pytest.approx(80, abs=4)
    assert median(tokens) == pytest.approx(56, abs=5)
    logs = [math.log(t) for t in tokens]
    assert stdev(logs) == pytest.approx(0.72, abs=0.05)
    # The longest 1% are four times the mean: what a batch waits for.
    assert sorted(tokens)[-len(tokens) // 100] > 4 * mean(tokens)


@pytest.mark.parametrize("task", TASKS)
def test_right_completions_score_and_fit_the_limits(task: str, lengths: dict[str, list[int]]) -> None:
    train = rows(task, "train")
    texts = right_completions(task)
    assert correct(texts, [row["answer"] for row in train]) == [1.0] * len(train)
    assert max(lengths[task]) <= TASKS[task].max_completion_length
    assert len({len(row["prompt"]) for row in train}) == 1
    assert len(train[0]["prompt"]) + len("bua") <= TASKS[task].max_prompt_length
    spoilt = [text + "0" for text in texts]
    assert well_formed(spoilt) == [0.0] * len(texts)
    assert correct(texts, [f"{int(row['answer']) + 1}" for row in train]) == [0.0] * len(texts)


@pytest.mark.parametrize("task", TASKS)
def test_a_score_is_the_same_for_a_conversation(task: str) -> None:
    text, answer = right_completions(task)[0], rows(task, "train")[0]["answer"]
    assert correct([[{"role": "assistant", "content": text}]], [answer]) == correct([text], [answer]) == [1.0]


@pytest.mark.parametrize("task", TASKS)
def test_no_problem_is_in_two_parts(task: str) -> None:
    parts = [
        {row["prompt"] for row in part} for part in (demonstrations(task), rows(task, "train"), rows(task, "held_out"))
    ]
    assert [len(part) for part in parts] == [20_000, 4_096, 512]
    assert len(set.union(*parts)) == sum(map(len, parts))


@pytest.mark.parametrize(("task", "share"), [("even", 0.36), ("heavy", 0.31)])
def test_demonstrations_are_right_as_often_as_their_flaws_let_them(task: str, share: float) -> None:
    shown = list(demonstrations(task))
    answers = []
    for row in shown:
        first, *others = map(int, re.findall(r"\d+", row["prompt"]))
        total = first + math.prod(others)
        answers.append(str(total) if task == "even" else f"{total % 1000:03d}")
    scores = correct([row["completion"] for row in shown], answers)
    assert mean(scores) == pytest.approx(share, abs=0.02)


def test_a_forgotten_carry_is_wrong_in_the_working_and_in_the_answer() -> None:
    always = Flaws(forgotten_carry=1.0)
    even, heavy = TASKS["even"], TASKS["heavy"]
    assert even.demonstrate((537, 248), always, random.Random(1)).startswith("[think]7+8+0=15,3+4+1=07,")
    assert heavy.demonstrate((348, 7, 2), always, random.Random(1)) == (
        "<think>02:345,01:342</think><answer>342</answer>"
    )


def test_a_steps_seconds_leave_out_evaluations_and_checkpoints(tmp_path: Path) -> None:
    log = StepLog(tmp_path / "steps.jsonl")
    for step, (ended, apart) in enumerate([(10.0, {}), (12.0, {"time/eval": 5.0}), (19.5, {"time/checkpoint": 1.0})]):
        log.step(step + 1, tokens=7, ended=ended, **apart)
    log.step(4, tokens=7, ended=22.0)
    lines = read_steps(tmp_path / "steps.jsonl")
    assert step_seconds(lines) == [2.0, 2.5, 1.5]
    assert all(a["step"] + 1 == b["step"] for a, b in pairwise(lines))
