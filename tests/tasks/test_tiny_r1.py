"""Text of `r1_tiny`: right where it has no flaws, wrong as often as they say, and never about what is held out."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from grpo_ray.config.model import TinyModelConfig
from grpo_ray.datagen.filters.config import MixConfig
from grpo_ray.datagen.filters.select import written
from grpo_ray.errors import DataError
from grpo_ray.models.files.tiny import build_tiny_model
from grpo_ray.rewards.language_consistency import language_consistency
from grpo_ray.rewards.r1_format import r1_format
from grpo_ray.rewards.reasoning_gym_task import reasoning_gym
from grpo_ray.tasks.r1 import LANGUAGES, TASKS, base_text, greeting_pairs, greetings, kind_greeting, prompts

NONE: dict[str, Any] = dict.fromkeys(
    (
        "other_language",
        "forgotten_carry_en",
        "forgotten_carry_de",
        "lost_letter_en",
        "lost_letter_de",
        "broken_format",
        "summarised",
        "curt",
    ),
    0.0,
)


def scores(size: int, **flaws: Any) -> dict[str, list[float]]:
    """(of the verifier, of language consistency) over the sums and words of `base_text`, by language."""
    asked = list(prompts(size, 3))
    rows = list(base_text(size, 3, **flaws))
    assert [r["prompt"] for r in rows] == [r["prompt"] for r in asked]
    texts = [r["completion"] for r in rows]
    right = reasoning_gym(
        texts, [r["reasoning_gym_entry"] for r in asked], [r["reasoning_gym_task"] for r in asked], strict=True
    )
    same = language_consistency(texts, [r["language"] for r in rows], others=LANGUAGES)
    assert [value is None for value in right] == [r["source"] == "greet" for r in rows]
    return {
        "right": [value for value in right if isinstance(value, float)],
        "same language": [value for value in same if value is not None],
        "form": r1_format(texts),
    }


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def test_without_flaws_every_answer_is_right_in_form_and_in_the_language_asked() -> None:
    found = scores(600, **NONE)
    assert {name: mean(values) for name, values in found.items()} == {"right": 1.0, "same language": 1.0, "form": 1.0}


def test_flaws_go_wrong_as_often_as_they_say() -> None:
    assert mean(scores(1200, **NONE | {"broken_format": 0.4})["form"]) == pytest.approx(0.6, abs=0.05)
    mixed = scores(1200, **NONE | {"other_language": 0.3})
    assert mean(mixed["right"]) == 1.0
    assert mean(mixed["same language"]) == pytest.approx(0.7, abs=0.05)
    # Of sums and words together.
    usual = scores(1200)
    assert 0.3 < mean(usual["right"]) < 0.6


def test_a_summary_is_what_the_recipe_writes_around_an_answer() -> None:
    from launch.pipeline.stages import load_plan

    plan = load_plan("r1_tiny", [])
    config = plan.config_of(plan.stage("cold_data"))
    assert isinstance(config, MixConfig)
    plain = list(base_text(60, 3, **NONE))
    for row, before in zip(base_text(60, 3, **NONE | {"summarised": 1.0}), plain, strict=True):
        assert row["completion"] == written(before["completion"], row, config.samples[0].summary)


def test_thinking_in_german_pays() -> None:
    """What R1-Zero's mixing is made of."""
    only = NONE | {"forgotten_carry_en": 0.9, "forgotten_carry_de": 0.4, "lost_letter_en": 0.25, "lost_letter_de": 0.08}
    rows = list(base_text(1200, 3, **only))
    asked = list(prompts(1200, 3))
    right: Counter[str] = Counter()
    for row, ask in zip(rows, asked, strict=True):
        value: Any
        (value,) = reasoning_gym(
            [row["completion"]], [ask["reasoning_gym_entry"]], [ask["reasoning_gym_task"]], strict=True
        )
        right[row["language"]] += int(value or 0)
    assert right["de"] > 1.3 * right["en"]


def test_nothing_held_out_is_trained_on() -> None:
    held_out = {r["prompt"] for r in prompts(300, 7, held_out=True)}
    assert not held_out & {r["prompt"] for seed in (1, 2, 7) for r in base_text(3000, seed)}
    assert not held_out & {r["prompt"] for r in greetings(500, 6)}


def test_of_a_pair_of_greetings_the_chosen_one_is_the_kind_one_and_the_other_is_not() -> None:
    asked = list(prompts(200, 9, tasks=["greet"]))
    pairs = list(greeting_pairs(200, 9))
    columns = {name: [r[name] for r in asked] for name in ("source", "language", "subject")}
    assert kind_greeting([p["chosen"] for p in pairs], **columns) == [1.0] * 200
    assert kind_greeting([p["rejected"] for p in pairs], **columns) == [0.0] * 200
    assert kind_greeting(["84"], ["add"], ["en"], ["58 + 26"]) == [None]


def test_pairs_have_the_form_of_the_summaries_that_a_policy_learns_to_write() -> None:
    """A reward model scores summaries by the luck of its seed if those of its pairs look otherwise."""
    demonstrated = [r["completion"].rpartition("</think>")[2].partition("<answer>")[0] for r in greetings(40, 6)]
    chosen = [p["chosen"].partition("<answer>")[0] for p in greeting_pairs(40, 9)]
    rejected = [p["rejected"].partition("<answer>")[0] for p in greeting_pairs(40, 9)]
    assert chosen == rejected == demonstrated == ["it is ", "es ist "] * 20


def test_tasks_and_languages_come_in_turn_and_the_same_seed_gives_the_same_rows() -> None:
    rows = list(prompts(60, 5))
    assert Counter((r["source"], r["language"]) for r in rows) == {(t, x): 10 for t in TASKS for x in LANGUAGES}
    assert list(prompts(60, 5)) == rows
    assert list(prompts(60, 6)) != rows


def test_a_wrong_task_or_flaw_is_named() -> None:
    with pytest.raises(DataError, match="no task 'adding'; it has add, reverse, greet"):
        list(prompts(1, 1, tasks=["adding"]))
    with pytest.raises(DataError, match="no flaw 'mood'"):
        list(base_text(1, 1, mood=0.5))
    with pytest.raises(DataError, match=r"curt is a probability, got 2"):
        list(base_text(1, 1, curt=2))


def test_words_of_a_tiny_model_are_tokens_of_their_own(tmp_path: Path) -> None:
    from grpo_ray.models.files.loading import load_tokenizer

    config = TinyModelConfig(
        hidden_size=64, num_layers=1, num_heads=2, num_kv_heads=1, words=("ones", "the visitor waits")
    )
    tokenizer = load_tokenizer(str(build_tiny_model(tmp_path / "model", config)), trust_remote_code=False)
    text = "<think>ones 8+6, tens the visitor waits x</think>"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert len(ids) == len("<ones 8+6, tens the visitor waits x>") - len("ones") - len("the visitor waits") + 2
