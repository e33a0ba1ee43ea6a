"""Language consistency, and which samples a reward is for."""

from __future__ import annotations

from typing import Any

import pytest

from grpo_ray.config.loading import build
from grpo_ray.config.reward import RewardConfig, RewardFunctionConfig
from grpo_ray.config.schema import RunConfig
from grpo_ray.errors import ConfigError, RewardError
from grpo_ray.rewards.answers.parts import part_of
from grpo_ray.rewards.functions.function import ScoreInputs
from grpo_ray.rewards.language_consistency import _knows, _settle, language_consistency, words_of
from grpo_ray.rewards.table import resolve
from grpo_ray.types import ScoreStatus
from tests.scoring import score_samples

EN = "first add the tens, then the ones; the sum is forty-two"
DE = "zuerst addieren wir die Zehner, dann die Einer; also ist die Summe zweiundvierzig"


def consistency(text: str, language: str, *others: str) -> float | None:
    (value,) = language_consistency([text], language, others=others)
    return value


@pytest.mark.parametrize(
    ("text", "language", "others", "want"),
    [
        (EN, "en", ("de",), 1.0),
        (DE, "de", ("en",), 1.0),
        # German knows `the` (a loan) and English `die`: they go with their neighbours.
        (EN, "de", ("en",), 0.0),
        (DE, "en", ("de",), 0.0),
        ("first add the Zehner then the ones so das Ergebnis ist forty two", "en", ("de",), 9 / 13),
        ("首先 add the 十位", "zh", ("en",), 4 / 6),
        ("first 首先", "en", (), 1 / 3),
        ("сначала десятки", "ru", ("en",), 1.0),
        ("ನಾನು ten ನೀನು", "kn", ("en",), 2 / 3),
        ("x = 12 + 5, \\frac{1}{2}", "en", (), None),
        ("", "de", (), None),
    ],
)
def test_the_share_of_words_in_the_target_language(
    text: str, language: str, others: tuple[str, ...], want: float | None
) -> None:
    assert consistency(text, language, *others) == (want if want is None else pytest.approx(want))


def test_only_the_reasoning_is_read_and_the_language_may_be_a_column() -> None:
    mixed = f"<think>{DE}</think><answer>the answer is forty two</answer>"
    assert language_consistency([mixed, mixed], ["de", "en"], others=("en", "de")) == [1.0, 0.0]
    (whole,) = language_consistency([mixed], "de", part="all")
    # 13 of the reasoning, and `the`, which is as near to them as to `answer`.
    assert whole == pytest.approx(14 / 18)


def test_code_commands_tags_and_variables_are_no_words() -> None:
    assert words_of("<think>let $x_1$ = \\sqrt{ab}, don't\n```python\nfor i in y: print(i)\n``` use हिन्दी</think>") == [
        "let",
        "ab",
        "don't",
        "use",
        "हिन्दी",
    ]


def test_a_language_that_is_not_known_is_refused_before_the_run() -> None:
    with pytest.raises(RewardError, match=r"no language 'xx'; known are .*de.*zh"):
        resolve(RewardFunctionConfig(name="language_consistency", args={"language": "xx"}))
    with pytest.raises(RewardError, match=r"no language \['en'\]; known are"):
        resolve(RewardFunctionConfig(name="language_consistency", args={"language": ["en"]}))


@pytest.mark.parametrize("language", [["en"], {"a": 1}, 5, None])
def test_a_rows_language_that_is_no_text_is_a_clear_error(language: Any) -> None:
    with pytest.raises(RewardError, match=r"language_consistency': no language .*; known are"):
        language_consistency(["some words of it"], [language])


@pytest.mark.parametrize(
    ("text", "part", "want"),
    [
        ("<think>a</think>b", "reasoning", "a"),
        ("<think>a</think>b", "summary", "b"),
        ("<think>a</think>\n\n b\n", "summary", " b\n"),
        ("a</think>b", "reasoning", "a"),
        ("<think>a", "summary", ""),
        ("<think>a", "reasoning", "a"),
        ("b", "summary", "b"),
        ("<think>a</think>b", "all", "<think>a</think>b"),
    ],
)
def test_the_parts_of_a_completion(text: str, part: Any, want: str) -> None:
    assert part_of(text, part) == want


# ---- which samples a reward is for


def inputs_of(completions: list[Any], steps: list[int | None] | None = None, **columns: list[Any]) -> ScoreInputs:
    return ScoreInputs(["Why?"] * len(completions), completions, [[1, 2]] * len(completions), columns, steps)


def length_of_text(completions: list[Any], **columns: Any) -> list[float]:
    return [float(len(c)) for c in completions]


def function(**entry: Any) -> Any:
    return resolve(RewardFunctionConfig(name=f"{__name__}.length_of_text", **entry))


def test_rewards_by_source_add_nothing_where_they_do_not_apply() -> None:
    by_source = [
        function(sources=["math", "code"], label="rules"),
        function(sources=["chat"], part="summary", weight=10.0, label="helpful"),
        function(sources=["chat"], weight=100.0, label="harmless"),
    ]
    inputs = inputs_of(["1234", "<think>ab</think>cde", "x"], source=["math", "chat", "poems"])
    math, chat, poems = score_samples(by_source, inputs)
    assert math.value == 4.0
    assert chat.value == 10.0 * 3 + 100.0 * 20
    assert poems.status is ScoreStatus.NOT_APPLICABLE
    assert [p.name for p in chat.parts] == ["rules", "helpful", "harmless"]
    assert [p.status for p in chat.parts] == [ScoreStatus.NOT_APPLICABLE, ScoreStatus.OK, ScoreStatus.OK]


def test_a_conversation_keeps_its_form_when_only_its_summary_is_seen() -> None:
    seen: list[Any] = []
    call = function(part="summary")

    def noted(completions: list[Any], **_: Any) -> list[float]:
        seen.extend(completions)
        return [0.0] * len(completions)

    object.__setattr__(call, "call", noted)
    score_samples([call], inputs_of([[{"role": "assistant", "content": "<think>a</think>b"}]]))
    assert seen == [[{"role": "assistant", "content": "b"}]]


def test_a_row_without_source_is_an_error_that_says_what_to_map() -> None:
    (score,) = score_samples([function(sources=["math"])], inputs_of(["a"]))
    assert score.status is ScoreStatus.ERROR
    assert "no column 'source'" in score.detail


def test_a_reward_of_the_last_steps_begins_there_and_evaluations_always_have_it() -> None:
    late = [function(from_step=1300, label="late"), function(label="always")]
    scores = score_samples(late, inputs_of(["abc"] * 4, steps=[0, 1299, 1300, None]))
    assert [s.value for s in scores] == [3.0, 3.0, 6.0, 6.0]
    assert [s.value for s in score_samples(late, inputs_of(["abc"]))] == [6.0]


def test_one_sample_may_fail_alone() -> None:
    call = function()
    object.__setattr__(call, "call", lambda completions, **c: [1.0, RewardError("the judge is asleep")])
    good, bad = score_samples([call], inputs_of(["a", "b"]))
    assert (good.value, bad.status, bad.detail) == (1.0, ScoreStatus.ERROR, "the judge is asleep")


def test_two_rewards_of_one_name_need_labels() -> None:
    recipe: dict[str, Any] = {
        "model": {"tiny": {}},
        "data": {"train": {"path": "x"}},
        "reward": {"functions": [{"name": "accuracy"}, {"name": "accuracy", "sources": ["math"]}]},
    }
    with pytest.raises(ConfigError, match=r"'accuracy' more than once.*give each a label"):
        build(RunConfig, recipe, "r")
    recipe["reward"]["functions"][1]["label"] = "math"
    recipe["eval"] = {"accuracy": "math"}
    config = build(RunConfig, recipe, "r")
    assert isinstance(config.reward, RewardConfig)
    assert [f.title for f in config.reward.functions] == ["accuracy", "math"]


def test_dictionaries_are_read_at_the_start_and_not_on_the_first_samples_time() -> None:
    _knows.cache_clear()
    args = {"language": "de", "others": ["en", "zh"]}
    resolve(RewardFunctionConfig(name="language_consistency", args=args), load=True)
    assert _knows.cache_info().misses == 2
    for name in ("de", "en"):
        _knows("a", name)
    assert _knows.cache_info().hits == 2


def test_words_of_two_languages_go_with_the_nearest_decided_one() -> None:
    assert _settle([None, None]) == [True, True]
    assert _settle([]) == []
    assert _settle([None, True, None, None, False, None]) == [True, True, True, False, False, False]
    assert _settle([True, None, False]) == [True, True, False]


def test_the_target_is_no_rival_of_its_own_and_neither_is_a_language_of_another_script() -> None:
    assert consistency("add \u9996", "en", "en", "zh", "ru") == 0.5
