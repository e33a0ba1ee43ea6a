"""Preference data: rows of TRL's forms become pairs, and pairs a batch; the reference is asked once and kept."""

from __future__ import annotations

import asyncio
import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from grpo_ray.config.data import DataConfig
from grpo_ray.config.loading import build
from grpo_ray.config.supervised import DpoConfig, RewardModelConfig
from grpo_ray.data.cursor import Cursor
from grpo_ray.data.preferences import load_pairs, pair_batch
from grpo_ray.data.templates import make_template
from grpo_ray.errors import ConfigError, DataError
from grpo_ray.loop.supervised import DirectPreferences, Preferences, load_task
from grpo_ray.loop.supervised_data import check_padding
from grpo_ray.types import TrainBatch
from tests.families import family_tokenizer

ASK = [{"role": "user", "content": "1+1?"}]


def says(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


FORMS: dict[str, dict[str, Any]] = {
    "messages": {"prompt": ASK, "chosen": says("2"), "rejected": says("it is 3")},
    "text of a chat": {"prompt": "1+1?", "chosen": "2", "rejected": "it is 3"},
    "conversations": {"chosen": ASK + says("2"), "rejected": ASK + says("it is 3")},
}


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_model)


def write(path: Path, rows: list[dict[str, Any]]) -> DataConfig:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return DataConfig.model_validate({"train": {"path": str(path)}})


@pytest.mark.parametrize("form", FORMS)
def test_the_forms_of_trl_give_the_same_pair(form: str, tokenizer: Any, tmp_path: Path) -> None:
    data = write(tmp_path / "pairs.jsonl", [FORMS[form]])
    (pair,) = load_pairs(data, tokenizer, seed=1, max_length=60).train
    assert tokenizer.decode(pair.prompt_ids) == "<bos><|user|>1+1?<|assistant|>"
    assert [tokenizer.decode(ids) for ids in pair.answers] == ["2<eos>", "it is 3<eos>"]
    assert pair.target == 0.0


def test_long_pairs_and_those_of_held_out_prompts_are_left_out_and_counted(tokenizer: Any, tmp_path: Path) -> None:
    rows = [{"prompt": f"{i}?", "chosen": "a" * i, "rejected": "b", "margin": i} for i in range(1, 9)]
    held = tmp_path / "held.jsonl"
    held.write_text(json.dumps({"prompt": "2?", "chosen": "x", "rejected": "y"}) + "\n")
    data = write(tmp_path / "pairs.jsonl", rows)
    data = DataConfig.model_validate(data.model_dump() | {"eval": {"path": str(held)}})
    sets = load_pairs(data, tokenizer, seed=1, max_length=5 + 6 + 1, use_margin=False)
    assert (sets.train.report.num_rows, sets.train.report.num_too_long, sets.train.report.num_in_eval) == (8, 2, 1)
    assert [len(p.answers[0]) - 1 for p in sets.train] == [1, 3, 4, 5, 6]
    assert len(sets.eval[""]) == 1
    with_margin = DataConfig.model_validate({"train": {"path": str(tmp_path / "pairs.jsonl")}})
    margins = load_pairs(with_margin, tokenizer, seed=1, max_length=99, use_margin=True).train
    assert [p.target for p in margins] == [float(i) for i in range(1, 9)]


@pytest.mark.parametrize(
    ("row", "options", "words"),
    [
        ({"prompt": "a", "chosen": "b"}, {}, r"line 1: no column 'rejected'; a pair has prompt, chosen and rejected"),
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, {}, "chosen and rejected are the same text"),
        ({"chosen": "b", "rejected": "c"}, {}, "no column 'prompt', and chosen and rejected are no conversations"),
        ({"prompt": "a", "chosen": ASK, "rejected": "c"}, {}, "expected 'chosen' to be text or one assistant message"),
        (
            {"prompt": "a", "chosen": "b", "rejected": "c"},
            {"use_margin": True},
            "a number in column 'margin', got None",
        ),
        ({"prompt": "a", "completion": "b"}, {"labelled": True}, "a number in column 'label', got None"),
    ],
)
def test_a_row_that_is_no_pair_is_named(
    row: dict[str, Any], options: dict[str, Any], words: str, tokenizer: Any, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=words):
        load_pairs(write(tmp_path / "pairs.jsonl", [row]), tokenizer, seed=1, max_length=60, **options)


def test_a_batch_holds_the_answers_side_by_side_and_the_references_of_each(tokenizer: Any, tmp_path: Path) -> None:
    rows = [FORMS["text of a chat"], {"prompt": "x", "chosen": "yes", "rejected": "n"}]
    pairs = list(load_pairs(write(tmp_path / "pairs.jsonl", rows), tokenizer, seed=1, max_length=60).train)
    batch = pair_batch(3, pairs[::-1], {0: [-1.0, -2.0], 1: [-3.0, -4.0]})
    assert [(s.group, s.index, s.num_tokens) for s in batch.samples] == [(0, 0, 4), (0, 1, 2), (1, 0, 2), (1, 1, 8)]
    assert [s.ref_logps for s in batch.samples] == [-3.0, -4.0, -1.0, -2.0]
    assert not any(s.ref[s.row].logprobs.any() for s in batch.samples), "nothing was sampled"
    read = pair_batch(1, pairs, read_last=True)
    assert [s.num_tokens for s in read.samples] == [3, 9, 5, 3]
    assert all(s.ref[s.row].token_ids[-1] == tokenizer.eos_token_id for s in read.samples)


class Learner:
    """Says of a sample how many tokens it has, less its place in its pair."""

    def __init__(self) -> None:
        self.asked = 0

    async def values(self, batch: TrainBatch) -> list[float]:
        self.asked += len(batch.samples)
        return [float(-s.num_tokens - self.asked * s.index) for s in batch.samples]


def sets(tokenizer: Any, folder: Path, num: int) -> Any:
    held = folder / "held.jsonl"
    held.write_text(json.dumps({"prompt": "held", "chosen": "xx", "rejected": "y"}) + "\n")
    rows = [{"prompt": f"{i}?", "chosen": "a" * (i + 1), "rejected": "b" * (i + 2)} for i in range(num)]
    data = write(folder / "pairs.jsonl", rows)
    data = DataConfig.model_validate(data.model_dump() | {"eval": {"path": str(held)}})
    return load_pairs(data, tokenizer, seed=1, max_length=60)


def test_the_reference_is_asked_for_the_pairs_to_come_and_kept_for_a_run_that_goes_on(
    tokenizer: Any, tmp_path: Path
) -> None:
    learner, task = Learner(), DirectPreferences(sets(tokenizer, tmp_path, 6))
    asyncio.run(task.prepare(learner, tmp_path, Cursor(task.dataset, seed=1), 4))
    assert learner.asked == 2 * (4 + 1)
    assert len(task.references) == 4
    first = Cursor(task.dataset, seed=1).next()
    assert task.references[first.index][0] == -len(first.answers[0])
    batch = task.batch(1, [first])
    assert batch.samples[0].ref_logps == -len(first.answers[0])

    again = DirectPreferences(sets(tokenizer, tmp_path, 6))
    asyncio.run(again.prepare(learner, tmp_path, Cursor(again.dataset, seed=1), 4))
    assert learner.asked == 2 * (4 + 1)
    assert again.references == task.references
    # The held-out answers as the model has them now, less as it had them: rejected ones fell by 2 more.
    assert asyncio.run(again.measure(learner)) == {"eval/accuracy": 1.0, "eval/margin": 2.0}

    longer = DirectPreferences(sets(tokenizer, tmp_path, 6))
    asyncio.run(longer.prepare(Learner(), tmp_path, Cursor(longer.dataset, seed=1), 600))
    assert sorted(longer.references) == [0, 1, 2, 3, 4, 5], "a run that was made longer needs more of them"

    other = DirectPreferences(sets(tokenizer, tmp_path, 5))
    with pytest.raises(ConfigError, match=r"reference.safetensors is of other pairs"):
        asyncio.run(other.prepare(learner, tmp_path, Cursor(other.dataset, seed=1), 4))


def test_a_reward_model_is_measured_by_the_pairs_that_it_gets_right(tokenizer: Any, tmp_path: Path) -> None:
    task = Preferences(sets(tokenizer, tmp_path, 3))
    assert task.measures
    # Four tokens (xx, its end, and that end read) against three and 2 more for the second of its pair.
    assert asyncio.run(task.measure(Learner())) == {"eval/accuracy": 1.0, "eval/margin": 1.0}


def recipe(**more: Any) -> dict[str, Any]:
    return {
        "model": {"tiny": {}, "dtype": "float32"},
        "data": {"train": {"path": "x.jsonl"}},
        "max_length": 100,
        "learner": {"micro_batch_tokens": 200},
        **more,
    }


@pytest.mark.parametrize(
    ("schema", "more", "words"),
    [
        (DpoConfig, {"max_length": 101}, r"can't hold the two answers of a pair .* raise it to 202"),
        (RewardModelConfig, {"max_length": 101}, "can't hold the two answers"),
        (RewardModelConfig, {"reward_model": {"loss": "bce", "use_margin": True}}, "use_margin is about pairs"),
        (RewardModelConfig, {"model": {"tiny": {}, "dtype": "float32", "lora": {"r": 4}}}, "train it whole"),
    ],
)
def test_what_cannot_work_is_refused(schema: Any, more: dict[str, Any], words: str) -> None:
    build(schema, recipe(), "r")
    with pytest.raises(ConfigError, match=words):
        build(schema, recipe(**more), "r")


def test_single_answers_need_no_room_for_two() -> None:
    build(RewardModelConfig, recipe(max_length=200, reward_model={"loss": "mse"}), "r")


def test_a_reward_model_needs_a_padding_token_of_its_own(tokenizer: Any, tiny_model: Path) -> None:
    check_padding(tokenizer)
    other = AutoTokenizer.from_pretrained(tiny_model)
    other.pad_token = other.eos_token
    with pytest.raises(ConfigError, match="has its end-of-sequence token '<eos>' for it"):
        check_padding(other)
    ends_turns = make_template("chat", family_tokenizer("llama3")).end
    other = copy.copy(family_tokenizer("llama3"))
    other.pad_token = "<|eot_id|>"
    with pytest.raises(ConfigError, match=r"'<\|eot_id\|>' for it, which ends every answer"):
        check_padding(other, ends_turns)
    other.pad_token = other.eos_token
    check_padding(other, ends_turns)


def test_a_labelled_answer_is_one_sample(tokenizer: Any, tmp_path: Path) -> None:
    write(tmp_path / "x.jsonl", [{"prompt": "a", "completion": "bc", "label": True}])
    raw = recipe(reward_model={"loss": "bce"}, data={"train": {"path": str(tmp_path / "x.jsonl")}})
    task = load_task(build(RewardModelConfig, raw, "r"), tokenizer)
    assert isinstance(task, Preferences)
    batch = task.batch(1, list(task.dataset))
    assert [(s.num_tokens, s.target) for s in batch.samples] == [(4, 1.0)]
    assert not task.measures


@pytest.mark.parametrize(
    ("loss", "label", "target"),
    [
        ("bce", True, 1.0),
        ("bce", 0, 0.0),
        ("bce", 0.25, 0.25),
        ("bce", 0.75, 0.75),
        ("mse", 7, 7.0),
        ("mse", -2.5, -2.5),
    ],
)
def test_a_label_is_the_number_that_the_row_has(
    loss: str, label: Any, target: float, tokenizer: Any, tmp_path: Path
) -> None:
    write(tmp_path / "x.jsonl", [{"prompt": "a", "completion": "bc", "label": label}])
    raw = recipe(reward_model={"loss": loss}, data={"train": {"path": str(tmp_path / "x.jsonl")}})
    task: Any = load_task(build(RewardModelConfig, raw, "r"), tokenizer)
    assert [s.target for s in task.batch(1, list(task.dataset)).samples] == [target]


@pytest.mark.parametrize(
    ("loss", "label", "words"),
    [
        (
            "bce",
            1.5,
            r"line 2: the label is 1\.5, and reward_model.loss bce takes labels from 0 to 1; scale them, or use mse",
        ),
        ("bce", -1, "line 2: the label is -1, "),
        ("bce", math.nan, "line 2: not usable JSON: NaN is no number"),
        ("mse", math.inf, "line 2: not usable JSON: Infinity is no number"),
        ("mse", "good", "expected a number in column 'label', got 'good'"),
        ("mse", None, "expected a number in column 'label', got None"),
    ],
)
def test_a_label_that_can_not_be_learned_is_named_with_its_line(
    loss: str, label: Any, words: str, tokenizer: Any, tmp_path: Path
) -> None:
    rows = [{"prompt": "a", "completion": "bc", "label": value} for value in (1, label)]
    write(tmp_path / "x.jsonl", rows)
    raw = recipe(reward_model={"loss": loss}, data={"train": {"path": str(tmp_path / "x.jsonl")}})
    with pytest.raises(DataError, match=words):
        load_task(build(RewardModelConfig, raw, "r"), tokenizer)
