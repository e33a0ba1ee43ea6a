"""Reward functions: what they are worth, and TRL's contract."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_ray.config.reward import RewardFunctionConfig
from grpo_ray.errors import RewardError
from grpo_ray.rewards import votes
from grpo_ray.rewards.countdown import evaluate
from grpo_ray.rewards.functions.function import RewardFunction, ScoreInputs, check_environments, inspect_function
from grpo_ray.rewards.functions.scoring import call_reward
from grpo_ray.rewards.r1_format import match_r1, r1_format
from grpo_ray.rewards.repetition_penalty import repetition_penalty
from grpo_ray.rewards.soft_overlong import soft_overlong
from grpo_ray.rewards.table import BUILTINS, resolve
from grpo_ray.rewards.think_format import think_format
from grpo_ray.rewards.votes import math_votes, text_votes
from grpo_ray.types import Score, ScoreStatus, Step
from tests.cpu_time import cpu_below
from tests.scoring import score_samples


def inputs_of(completions: list[Any], ids: list[list[int]] | None = None, **columns: list[Any]) -> ScoreInputs:
    return ScoreInputs(["p"] * len(completions), completions, ids or [[1, 2, 3]] * len(completions), columns)


def values(
    name: str,
    completions: list[Any],
    ids: list[list[int]] | None = None,
    args: dict[str, Any] | None = None,
    **columns: list[Any],
) -> list[float]:
    function = resolve(RewardFunctionConfig(name=name, args=args or {}))
    return [s.value for s in score_samples([function], inputs_of(completions, ids, **columns))]


def function_of(call: Any, weight: float = 1.0, **args: Any) -> RewardFunction:
    return inspect_function(call.__name__, call, weight, args)


# ---- TRL's contract


def test_a_function_written_for_trl_gets_what_trl_gives_it() -> None:
    seen: dict[str, Any] = {}

    def trl_reward(
        prompts: list[Any], completions: list[Any], completion_ids: list[list[int]], answer: list[str], **kwargs: Any
    ) -> list[float]:
        seen.update(prompts=prompts, completions=completions, ids=completion_ids, answer=answer, rest=kwargs)
        return [float(c[0]["content"] == a) for c, a in zip(completions, answer, strict=True)]

    prompts = [[{"role": "user", "content": "1+1?"}], [{"role": "user", "content": "1+2?"}]]
    completions = [[{"role": "assistant", "content": "2"}], [{"role": "assistant", "content": "4"}]]
    columns: dict[str, list[Any]] = {"answer": ["2", "3"], "level": [1, 2], "prompt": ["not", "these"]}
    scores = score_samples([function_of(trl_reward)], ScoreInputs(prompts, completions, [[5], [6, 7]], columns))
    assert [s.value for s in scores] == [1.0, 0.0]
    assert seen == {
        "prompts": prompts,
        "completions": completions,
        "ids": [[5], [6, 7]],
        "answer": ["2", "3"],
        "rest": {"level": [1, 2]} | {name: seen["rest"][name] for name in ("trainer_state", "log_extra", "log_metric")},
    }


def test_a_function_without_kwargs_gets_only_what_it_names() -> None:
    def picky(completions: list[Any], level: list[int]) -> list[float]:
        return [float(x) for x in level]

    scores = score_samples([function_of(picky)], inputs_of(["a", "b"], level=[3, 4], other=[0, 0]))
    assert [s.value for s in scores] == [3.0, 4.0]


def test_none_means_does_not_apply_and_the_others_are_weighted() -> None:
    def even_only(completions: list[Any], n: list[int], **kwargs: Any) -> list[float | None]:
        return [1.0 if x % 2 == 0 else None for x in n]

    def always(completions: list[Any], **kwargs: Any) -> list[bool]:
        return [True] * len(completions)

    both = [function_of(even_only, weight=2.0), function_of(always, weight=0.5)]
    scores = score_samples(both, inputs_of(["a", "b"], n=[2, 3]))
    assert [s.value for s in scores] == [2.5, 0.5]
    assert [p.status for p in scores[1].parts] == [ScoreStatus.NOT_APPLICABLE, ScoreStatus.OK]
    alone = score_samples(both[:1], inputs_of(["a", "b"], n=[2, 3]))
    assert [s.status for s in alone] == [ScoreStatus.OK, ScoreStatus.NOT_APPLICABLE]
    assert math.isnan(alone[1].value)


async def slow_reward(completions: list[Any], **kwargs: Any) -> list[float]:
    import asyncio

    await asyncio.sleep(0)
    return [0.25] * len(completions)


def test_async_functions_are_awaited_also_a_second_time() -> None:
    for _ in range(2):
        assert [s.value for s in score_samples([function_of(slow_reward)], inputs_of(["a", "b"]))] == [0.25, 0.25]


@pytest.mark.parametrize(
    ("returned", "words"),
    [
        ([1.0], "returned 1 values, expected 2"),
        (None, "returned NoneType, expected a list of 2"),
        (1.0, "returned float, expected a list of 2"),
        ([1.0, "1"], "returned '1', expected a finite number"),
        ([1.0, float("nan")], "returned nan"),
        ([1.0, float("-inf")], "returned -inf"),
        ([1.0, [0.0]], "returned [0.0]"),
    ],
)
def test_a_wrong_return_value_is_an_error_and_never_a_zero(returned: Any, words: str) -> None:
    def bad(completions: list[Any], **kwargs: Any) -> Any:
        return returned

    scores = score_samples([function_of(bad)], inputs_of(["a", "b"]))
    assert scores[1].status is ScoreStatus.ERROR
    assert math.isnan(scores[1].value)
    assert "'bad'" in scores[1].detail
    assert words in scores[1].detail


def test_one_bad_value_fails_its_own_sample_only() -> None:
    def half_bad(completions: list[Any], **kwargs: Any) -> Any:
        return np.array([1.0, np.nan])

    scores = score_samples([function_of(half_bad)], inputs_of(["a", "b"]))
    assert [s.status for s in scores] == [ScoreStatus.OK, ScoreStatus.ERROR]


def test_a_failed_part_fails_the_whole_and_says_where() -> None:
    def fine(completions: list[Any], **kwargs: Any) -> Any:
        return np.ones(len(completions), dtype=np.float32)

    def raising(completions: list[Any], **kwargs: Any) -> NoReturn:
        raise KeyError("no such key\nand more")

    (score,) = score_samples([function_of(fine), function_of(raising)], inputs_of(["a"]))
    assert score.status is ScoreStatus.ERROR
    assert math.isnan(score.value)
    assert score.parts[0].value == 1.0
    assert "KeyError" in score.detail
    assert "test_rewards.py:" in score.detail


def test_a_missing_column_is_named() -> None:
    (part,) = call_reward(resolve(RewardFunctionConfig(name="countdown")), inputs_of(["1+1"], answer=["2"]))
    assert part.status is ScoreStatus.ERROR
    assert "needs the column 'target'; the row has answer;" in part.detail


# ---- finding functions


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"name": "acuracy"}, "no reward is called 'acuracy'; did you mean 'accuracy'?"),
        ({"name": "zzz"}, "built in: accuracy, think_format"),
        ({"name": "nowhere.at.all"}, "there is no module 'nowhere'"),
        ({"name": "tests.samples.drawm"}, "module 'tests.samples' has no 'drawm'; did you mean 'drawn'?"),
        ({"name": "tests.samples.math"}, "'math' is a module that"),
        ({"name": "tests.hostile.CONTAINED"}, "expected a function"),
        (
            {"name": "soft_overlong", "args": {"max_lenght": 3}},
            "takes no argument 'max_lenght'; did you mean 'max_length'?",
        ),
        ({"name": "accuracy", "args": {"completions": 3}}, "args can't hold 'completions'"),
    ],
)
def test_what_cannot_be_resolved_is_named_with_a_hint(config: dict[str, Any], words: str) -> None:
    with pytest.raises(RewardError) as error:
        resolve(RewardFunctionConfig(**config))
    assert words in str(error.value)


def test_a_function_of_the_current_folder_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_own_rewards.py").write_text("def f(completions, k, **kwargs): return [k] * len(completions)\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", ["/nonexistent"])
    function = resolve(RewardFunctionConfig(name="my_own_rewards.f", weight=3.0, args={"k": 0.5}))
    assert [s.value for s in score_samples([function], inputs_of(["a"]))] == [1.5]


def test_environments_are_refused_unless_they_have_a_default() -> None:
    def wants(completions: list[Any], environments: Any) -> list[float]:
        return [0.0]

    def may_have(completions: list[Any], environments: Any = None, **kwargs: Any) -> list[float]:
        return [0.0]

    with pytest.raises(RewardError, match="requires 'environments', and this run has none"):
        check_environments(function_of(wants))
    check_environments(function_of(may_have))
    assert call_reward(function_of(may_have), inputs_of(["a"]))[0].value == 0.0


@pytest.mark.parametrize("name", list(BUILTINS))
def test_built_in_docstrings_say_the_range(name: str) -> None:
    assert "Range" in (BUILTINS[name].__doc__ or "")


# ---- accuracy


@pytest.mark.parametrize(
    ("completion", "answer", "value"),
    [
        ("so\n#### 1,234", "reasoning\n#### 1,234", 1.0),
        ("so\n#### 1234", "reasoning\n#### 1,234", 1.0),
        ("so\n#### $1,234.00", "reasoning\n#### 1,234", 1.0),
        ("so\n#### 1235", "reasoning\n#### 1,234", 0.0),
        ("#### 5\nno, wait\n#### 6", "#### 6", 1.0),
        ("#### 6\nno, wait\n#### 5", "#### 6", 0.0),
        ("#### Step 6\nthe answer is \\boxed{7}", "#### 7", 1.0),
        ("\\boxed{7}, or was it 6", "#### 6", 0.0),
        ("the answer is -7", "#### -7", 1.0),
        ("the answer is 7", "#### -7", 0.0),
        ("\\boxed{\\frac{1}{2}}", "0.5", 1.0),
        ("\\boxed{\\frac{1}{3}}", "0.5", 0.0),
        ("<think>is it 7?</think>\n<answer>6</answer>", "#### 6", 1.0),
        ("<think>is it 6?</think>\n<answer>7</answer>", "#### 6", 0.0),
        ("<think>it is \\boxed{6}</think> I can't say", "#### 6", 0.0),
        ("I do not know", "#### 6", 0.0),
        ("", "#### 6", 0.0),
        ("anything", "", None),
        ("6", 6, 1.0),
    ],
)
def test_accuracy(completion: str, answer: Any, value: float | None) -> None:
    for form in (completion, [{"role": "assistant", "content": completion}]):
        (part,) = call_reward(resolve(RewardFunctionConfig(name="accuracy")), inputs_of([form], answer=[answer]))
        if value is None:
            assert part.status is ScoreStatus.NOT_APPLICABLE
        else:
            assert part.value == value


MATH_ANSWERS = [
    r"\left( 3, \frac{\pi}{2} \right)", r"\frac{14}{3}", r"\text{Evelyn}", r"90^\circ", r"3\sqrt{13}", "6 - 5i", r"\pi",
    "1,-2", "x=5", r"\text{(C)}", "52_8", "(3,4]", r"\frac12", r"\frac 59", r"11,\! 111,\! 111,\! 100", r"\$18.90",
    r"33\%", r"(-\infty, 2) \cup (3, \infty)", r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", "x^2-2x+1", r"5 \text{ cm}",
    r"\dfrac{1}{2}", "p - q", "-125", "13535",
]  # fmt: skip


@pytest.mark.parametrize("answer", MATH_ANSWERS)
@pytest.mark.parametrize("gold", ["{}", "${}$", "so it is $\\boxed{{{}}}$."])
def test_accuracy_reads_the_answers_of_math(answer: str, gold: str) -> None:
    forms = [rf"so \boxed{{{answer}}}.", f"The answer is ${answer}$.", f"<think>17</think> <answer>{answer}</answer>"]
    assert values("accuracy", forms, answer=[gold.format(answer)] * 3) == [1.0] * 3
    assert values("accuracy", [r"so \boxed{17}"], answer=[gold.format(answer)]) == [0.0]


# ---- votes


def test_math_votes_count_equal_values_as_one_answer() -> None:
    texts = [r"\boxed{\frac{1}{2}}", "so 0.5.", r"\boxed{3}", "no idea", "<think>3</think> $\\frac12$"]
    assert math_votes(texts, answer=["1/2"] * 5) == [0.0, 0.0, 1.0, None, 0.0]
    assert math_votes(["18 in all\n#### 1,234", "1234", "#### 12"], solution=["#### 7"] * 3) == [0.0, 0.0, 1.0]
    assert math_votes(["5", "6"]) == [0.0, 1.0]


def test_text_votes_go_by_the_answer_alone() -> None:
    texts = ["<answer>A  b</answer>", "<think>c</think>a B", "", "c"]
    assert text_votes(texts) == [0.0, 0.0, None, 1.0]


def test_accuracy_takes_the_column_solution_too_and_says_when_there_is_neither() -> None:
    assert values("accuracy", ["\\boxed{4}"], solution=["4"]) == [1.0]
    (part,) = call_reward(resolve(RewardFunctionConfig(name="accuracy")), inputs_of(["4"], gold=["4"]))
    assert "needs the column 'answer' or 'solution'; the row has gold;" in part.detail


# ---- format


@pytest.mark.parametrize(
    ("text", "think", "r1"),
    [
        ("<think>a</think><answer>b</answer>", 1.0, 1.0),
        ("<think>\na\n</think>\n<answer>\nb\n</answer>\n", 1.0, 1.0),
        ("<think>a</think>b", 1.0, 0.0),
        ("<think>a</think><answer>b</answer> and more", 1.0, 0.0),
        ("well <think>a</think><answer>b</answer>", 0.0, 0.0),
        ("<think>a<think>b</think><answer>c</answer>", 0.0, 0.0),
        ("<think>a</think><answer>b</answer><answer>c</answer>", 1.0, 0.0),
        ("<think>a</think><answer>b</think></answer>", 1.0, 0.0),
        ("<answer>b</answer><think>a</think>", 0.0, 0.0),
        ("<think>a<answer>b</answer>", 0.0, 0.0),
        ("", 0.0, 0.0),
    ],
)
def test_formats(text: str, think: float, r1: float) -> None:
    assert values("think_format", [text]) == [think]
    assert values("r1_format", [text]) == [r1]


def test_r1_format_behind_a_template_that_opens_the_thinking() -> None:
    assert values("r1_format", ["a</think><answer>b</answer>"], args={"prefilled": True}) == [1.0]


def test_exact_match() -> None:
    assert values("exact_match", [" 12\n", "12.0", "Yes"], answer=[12, 12, "yes"]) == [1.0, 0.0, 0.0]
    tagged = [
        "<think>6+6=12</think><answer>12</answer>",
        "<answer>12</answer><answer> 13 </answer>",
        "12",
        "<answer>12",
    ]
    assert values("exact_match", tagged, answer=[12] * 4, args={"in_answer_tag": True}) == [1.0, 0.0, 1.0, 0.0]
    assert values("exact_match", tagged, answer=[12] * 4) == [0.0, 0.0, 1.0, 0.0]
    assert values("exact_match", ["12", "12.0", "13", "1.5"], answer=[12.0, 12.0, 12.0, 1.5]) == [1.0, 1.0, 0.0, 1.0]


@pytest.mark.parametrize("answer", [None, float("nan"), ["12"], {"a": 1}])
def test_exact_match_is_not_for_rows_whose_answer_is_no_text(answer: Any) -> None:
    for text in ("None", "nan", "12", str(answer)):
        (part,) = call_reward(resolve(RewardFunctionConfig(name="exact_match")), inputs_of([text], answer=[answer]))
        assert part.status is ScoreStatus.NOT_APPLICABLE


# ---- countdown


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("<answer>(44 - 19) * 2 + 3</answer>", 1.0),
        ("<answer>(44 - 19) * 2 + 3 = 53</answer>", 1.0),
        ("(44 - 19) * 2 + 3", 1.0),
        ("<answer>(44 - 19) * 2 + 3 = 54</answer>", 0.0),
        ("<answer>44 + 3 + 2 * 3</answer>", 0.0),
        ("<answer>50 + 3</answer>", 0.0),
        ("<answer>(44 - 19) * 2 + 3 + 0</answer>", 0.0),
        ("<answer>44 - 19 * 2 + 3</answer>", 0.0),
        ("<answer>53</answer>", 0.0),
        ("<answer>44 / (19 - 19)</answer>", 0.0),
        ("<answer>__import__('os').getpid()</answer>", 0.0),
        ("<answer></answer>", 0.0),
        ("<answer>" + "(" * 100 + "</answer>", 0.0),
        ("<answer>44 +\x00 19</answer>", 0.0),
        ("<answer>" + "1+" * 200_000 + "1</answer>", 0.0),
    ],
)
def test_countdown(text: str, value: float) -> None:
    assert values("countdown", [text], target=[53], nums=[[19, 44, 3, 2]]) == [value]


@pytest.mark.timeout(300)
def test_countdown_refuses_powers_at_once() -> None:
    with cpu_below(10):
        assert values("countdown", ["<answer>9**9**9</answer>"], target=[1], nums=[[9, 9, 9]]) == [0.0]


def test_countdown_is_exact_in_fractions_and_pays_for_form_only_when_asked() -> None:
    assert values("countdown", ["1 / 3 * 3"], target=[1], nums=[[1, 3, 3]]) == [1.0]
    got = values("countdown", ["1 + 1", "one"], args={"format_score": 0.1}, target=[3, 3], nums=[[1, 1], [1, 1]])
    assert got == [0.1, 0.0]


@pytest.mark.parametrize("target", ["", "x", "1e999999999", float("nan"), float("inf")])
def test_countdown_says_which_target_is_no_number(target: Any) -> None:
    columns = {"target": [target], "nums": [[1, 2]]}
    (part,) = call_reward(resolve(RewardFunctionConfig(name="countdown")), inputs_of(["1 + 2"], **columns))
    assert part.status is ScoreStatus.ERROR
    assert "in column target or nums is no number" in part.detail


def test_countdown_takes_numbers_as_tables_and_texts_hold_them() -> None:
    assert values("countdown", ["1 + 2", "+1 + 2"], target=[3.0, " 3 "], nums=[[1.0, 2.0], ["1", "2"]]) == [1.0, 1.0]


TAGS = ["<think>", "</think>", "<answer>", "</answer>", "\n", "a", " "]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from(TAGS), max_size=8).map("".join))
def test_think_format_is_trls_and_r1_format_its_own_expression(text: str) -> None:
    from trl.rewards import think_format_reward

    assert think_format([text]) == think_format_reward([[{"content": text}]])
    once = all(text.count(tag) == 1 for tag in TAGS[:4])
    form = re.fullmatch(r"\s*<think>.*</think>\s*<answer>.*</answer>\s*", text, re.DOTALL)
    assert r1_format([text]) == [float(once and form is not None)]


@given(st.text(alphabet="0123456789+-*/() .=", max_size=60))
def test_countdown_never_does_more_than_arithmetic(text: str) -> None:
    try:
        value, used = evaluate(text)
    except ValueError:
        return
    assert float(value) == pytest.approx(eval(text.strip()))  # the text is the test's own
    assert len(used) >= 1


# ---- lengths


def test_soft_overlong_is_dapos_formula() -> None:
    ids = [[0] * n for n in (0, 80, 81, 90, 100, 101, 500)]
    got = values("soft_overlong", ["x"] * 7, ids, args={"max_length": 100, "cache_length": 20})
    assert got == pytest.approx([0, 0, -0.05, -0.5, -1, -1, -1])


REPEATED = [
    ([1, 2, 3, 4], 0.0),
    ([1, 2, 3, 1, 2, 3], -(1 - 3 / 4)),
    ([7] * 5, -(1 - 1 / 3)),
    ([7] * 300, -(1 - 1 / 298)),
    ([7] * 3, 0.0),
    ([1, 2], 0.0),
    ([], 0.0),
]


def test_repetition_penalty_counts_tokens_and_no_words() -> None:
    texts, ids, wanted = ["one word"] * len(REPEATED), [i for i, _ in REPEATED], [v for _, v in REPEATED]
    assert values("repetition_penalty", texts, ids) == pytest.approx(wanted, abs=1e-12)
    assert values("repetition_penalty", ["\u4e2d" * 300], [[7] * 300])[0] == pytest.approx(-0.997, abs=5e-4)
    args = {"ngram_size": 1, "max_penalty": -0.3}
    assert values("repetition_penalty", ["x"], [[7, 7, 7]], args=args) == pytest.approx([-0.2])
    assert values("repetition_penalty", ["x"], [[7, 7, 7]], args={"max_penalty": 0.0}) == [0.0]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(st.integers(0, 3), max_size=20), max_size=5), st.integers(1, 6), st.floats(-3, 0))
def test_repetition_penalty_is_trls(ids: list[list[int]], ngram_size: int, max_penalty: float) -> None:
    from trl.rewards import get_repetition_penalty_reward

    trls = get_repetition_penalty_reward(ngram_size, max_penalty)(completion_ids=ids)
    assert repetition_penalty(ids, ngram_size, max_penalty) == pytest.approx(trls, abs=1e-12)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 300), max_size=5), st.integers(1, 200), st.data())
def test_soft_overlong_is_trls(lengths: list[int], max_length: int, data: Any) -> None:
    from trl.rewards import get_soft_overlong_punishment

    cache_length = data.draw(st.integers(1, max_length))
    ids = [[0] * n for n in lengths]
    trls = get_soft_overlong_punishment(max_length, cache_length)(completion_ids=ids)
    assert soft_overlong(ids, max_length, cache_length) == pytest.approx(trls, abs=1e-12)


@pytest.mark.parametrize(
    ("name", "args"), [("repetition_penalty", {}), ("soft_overlong", {"max_length": 9, "cache_length": 3})]
)
def test_a_part_of_the_text_is_refused_where_tokens_are_counted(name: str, args: dict[str, Any]) -> None:
    with pytest.raises(
        RewardError, match=f"reward '{name}': part: reasoning has no effect.*whole completion; remove part"
    ):
        resolve(RewardFunctionConfig(name=name, args=args, part="reasoning"))


# ---- reasoning-gym


@pytest.mark.timeout(300)
def test_reasoning_gym_uses_the_tasks_own_verifier() -> None:
    import reasoning_gym

    name = "basic_arithmetic"
    entries = list(reasoning_gym.create_dataset(name, seed=3, size=8))
    right = [f"<think>hm</think><answer> {e['answer']} </answer>" for e in entries]
    wrong = [f"<answer>{e['answer']}1</answer>" for e in entries]
    columns: dict[str, Any] = {"reasoning_gym_entry": entries, "reasoning_gym_task": [name] * 8}
    assert values("reasoning_gym", right, **columns) == [1.0] * 8
    assert values("reasoning_gym", [str(e["answer"]) for e in entries], **columns) == [1.0] * 8
    assert max(values("reasoning_gym", wrong, **columns)) < 1.0
    assert values("reasoning_gym", wrong, args={"strict": True}, **columns) == [0.0] * 8


@pytest.mark.timeout(300)
@pytest.mark.long
def test_reasoning_gym_names_an_unknown_task() -> None:
    columns: dict[str, Any] = {"reasoning_gym_entry": [{}], "reasoning_gym_task": ["no_such_task"]}
    (part,) = call_reward(resolve(RewardFunctionConfig(name="reasoning_gym")), inputs_of(["x"], **columns))
    assert part.status is ScoreStatus.ERROR
    assert "no task 'no_such_task'" in part.detail


# ---- rewards of steps

FOUR_TOKENS = [[1, 2, 3, 4]]


def score_of_steps(*functions: tuple[Any, float]) -> Score:
    """Of one completion of four tokens. `functions`: what each returns for it, and its weight."""

    def returning(value: Any, weight: float) -> RewardFunction:
        def f(completions: list[Any], **columns: Any) -> list[Any]:
            return [value]

        return function_of(f, weight)

    (score,) = score_samples([returning(*f) for f in functions], inputs_of(["x"], FOUR_TOKENS))
    return score


def test_steps_come_back_as_records_and_their_sum_is_the_value() -> None:
    score = score_of_steps(([(0, 0.5), (np.int64(2), True), [3, np.float32(0.25)]], 1.0))
    assert score.steps == score.parts[0].steps == (Step(0, 0.5), Step(2, 1.0), Step(3, 0.25))
    assert score.value == score.parts[0].value == 1.75
    assert score.rewards == (0.5, 1.0, 0.25)


def test_steps_of_all_functions_are_pooled_with_their_weights_and_a_number_is_a_step_at_the_end() -> None:
    score = score_of_steps(([(1, 1.0), (3, 2.0)], 2.0), ([(0, 1.0), (1, 4.0)], 0.5), (1.0, 3.0), (None, 9.0))
    assert score.steps == (Step(0, 0.5), Step(1, 4.0), Step(3, 7.0))
    assert score.value == pytest.approx(sum(score.rewards)) == 11.5
    outcomes = score_of_steps((1.0, 3.0), (2.0, 1.0))
    assert (outcomes.steps, outcomes.rewards) == ((), (5.0,))


@pytest.mark.parametrize(
    ("returned", "words"),
    [
        ([], "for each step: there is none"),
        ([(4, 1.0)], "step 0 ends at 4, expected the index of a token from 0 to 3"),
        ([(-1, 1.0)], "step 0 ends at -1"),
        ([(1, 1.0), (1, 1.0)], "step 1 ends at 1, expected the index of a token from 2 to 3"),
        ([(2, 1.0), (1, 1.0)], "step 1 ends at 1"),
        ([(1.0, 1.0)], "step 0 ends at 1.0"),
        ([(True, 1.0)], "step 0 ends at True"),
        ([("1", 1.0)], "step 0 ends at '1'"),
        ([(1, "1")], "a list of (end, reward)"),
        ([(1, float("nan"))], "returned [(1, nan)]"),
        ([(1, 2, 3)], "returned [(1, 2, 3)]"),
        ([1, 2], "returned [1, 2]"),
    ],
)
def test_steps_that_are_none_are_an_error_that_says_why(returned: Any, words: str) -> None:
    score = score_of_steps((returned, 1.0))
    assert score.status is ScoreStatus.ERROR
    assert words in score.detail
    assert (score.steps, score.parts[0].steps) == ((), ())


def test_the_parts_of_r1s_format_are_told_apart() -> None:
    assert match_r1("<think>a\n</think> <answer> b</answer>") == {"think": "a\n", "answer": " b"}
    assert match_r1("<think></think><answer></answer>") == {"think": "", "answer": ""}


@pytest.mark.parametrize("text", ["a", "2 ** 3", "7 // 2", "True", "1.5", "f(1)", "not 1"])
def test_what_is_not_arithmetic_is_named_by_its_kind(text: str) -> None:
    with pytest.raises(ValueError, match=r"^\w+ is not arithmetic$"):
        evaluate(text)


def test_votes_need_no_gold_answer_that_can_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreadable(*_: object) -> NoReturn:
        raise RewardError("no answer")

    monkeypatch.setattr(votes, "read_gold", unreadable)
    assert math_votes(["5", "6", "so 5"], answer=["?"] * 3) == [0.0, 1.0, 0.0]
