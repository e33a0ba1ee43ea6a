"""TRL's and verl's reward functions run unchanged, and columns are data: they never become options of a built-in reward."""

from __future__ import annotations

import importlib
import inspect
import json
import math
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from actors.reward.actor import build_inputs
from grpo_ray.config.reward import RewardConfig, RewardFunctionConfig
from grpo_ray.data.prompts import PromptSets
from grpo_ray.errors import RewardError
from grpo_ray.rewards.columns import check_columns, column_needs
from grpo_ray.rewards.countdown import check_row
from grpo_ray.rewards.functions.function import (
    RESERVED,
    Explained,
    RewardFunction,
    ScoreInputs,
    inspect_function,
    value_of,
)
from grpo_ray.rewards.functions.logs import MAX_COLUMNS, MAX_METRICS, MAX_VALUE_CHARS, CallLog, checked_name, plain
from grpo_ray.rewards.functions.scoring import MAX_DETAIL_CHARS, call_reward, check_values, explain, weighted_sum
from grpo_ray.rewards.functions.verl import is_verl, verl_function
from grpo_ray.rewards.table import BUILTINS, columns_of, described, resolve
from grpo_ray.telemetry.metrics import logged_metrics
from grpo_ray.types import LoggedMetric, RewardScore, SampleInfo, Score, ScoreRequest, ScoreStatus, Step, TrainerState

STATE = TrainerState.at(5, 10, prompts_per_step=4, num_prompts=16)


def example(name: str, **args: Any) -> RewardFunction:
    return resolve(RewardFunctionConfig(name=f"tests.reward_examples.{name}", args=args))


def told(completions: list[str], prompts: list[Any] | None = None, **columns: list[Any]) -> ScoreInputs:
    return ScoreInputs(
        prompts or ["p"] * len(completions), completions, [[1] * len(c) for c in completions], columns, trainer=STATE
    )


def said(function: RewardFunction, inputs: ScoreInputs) -> list[float | None]:
    scores = call_reward(function, inputs)
    assert not any(s.status.failed for s in scores), scores[0].detail
    return [s.value if s.status is ScoreStatus.OK else None for s in scores]


def chat(*texts: str) -> list[Any]:
    return [[{"role": "assistant", "content": t}] for t in texts]


# ---- TRL


@pytest.mark.parametrize(
    ("name", "completions", "columns", "expected"),
    [
        ("length_reward", ["a", "bcd"], {}, [1.0, 3.0]),
        ("ground_truth_reward", [r"so \boxed{1}", "no"], {"ground_truth": ["1", "1"]}, [1.0, 0.0]),
        ("generated_reward", ["ab", ""], {}, [2.0, 0.0]),
        ("only_ids", ["ab", ""], {}, [2.0, 0.0]),
        ("math_task_reward", ["3", "x", "3"], {"task": ["math", "math", "code"]}, [1.0, -1.0, None]),
        ("slow_reward", ["2+2=4", "5"], {}, [1.0, 0.0]),
        ("rank_reward", ["long one", "s", "mid"], {}, [0.0, 1.0, 0.5]),
        ("scheduled_reward", ["12345", "123456"], {}, [1.0, 0.0]),
        ("chat_format_reward", chat("<think>a</think><answer>b</answer>", "b"), {}, [1.0, 0.0]),
        ("tenth", ["abc"], {}, [pytest.approx(0.3)]),
    ],
)
def test_trls_documented_functions_run_unchanged(
    name: str, completions: list[Any], columns: dict[str, list[Any]], expected: list[Any]
) -> None:
    assert said(example(name), told(completions, **columns)) == expected


def test_trls_own_functions_and_makers_run_by_their_path() -> None:
    accuracy = resolve(RewardFunctionConfig(name="trl.rewards.accuracy_reward", package="trl"))
    (right, wrong) = call_reward(accuracy, told(chat(r"\boxed{\frac{1}{3}}", r"\boxed{2}"), solution=["1/3", "1/3"]))
    assert (right.value, wrong.value) == (1.0, 0.0)
    assert [column for column, _ in right.extra] == ["solution", "gold_parsed", "answer_parsed"]
    assert said(
        resolve(RewardFunctionConfig(name="trl.rewards.think_format_reward", package="trl")), told(chat("x"))
    ) == [0.0]
    overlong = RewardFunctionConfig(
        name="trl.rewards.get_soft_overlong_punishment",
        package="trl",
        args={"max_completion_len": 10, "soft_punish_cache": 5},
    )
    assert said(resolve(overlong), told(["1234", "12345678", "123456789012"])) == pytest.approx([0.0, -0.6, -1.0])


def test_classes_and_makers_are_called_once_with_args() -> None:
    assert said(example("Scaled", scale=2.0), told(["abc"])) == [6.0]
    assert said(example("make_bonus", bonus=0.25), told(["abc"])) == [0.25]
    with pytest.raises(RewardError, match="a class whose instances can't be called; give it a method __call__"):
        example("NotCallable")
    with pytest.raises(RewardError, match=r"can't be made with args \{'scael': 2\}: TypeError"):
        example("Scaled", scael=2)


def test_what_a_function_logs_comes_back_with_its_scores() -> None:
    scores = call_reward(example("logging_reward"), told(["it is 4", "", "4"], answer=["4", "4", "4"]))
    assert [s.value for s in scores] == [1.0, 0.0, 1.0]
    assert [dict(s.extra) for s in scores][1] == {"golden_answer": "4", "extracted_answer": "[none]"}
    more = call_reward(example("logging_reward"), told(["5"], answer=["4"]))
    whole = [Score(ScoreStatus.OK, 0.0, (s,)) for s in [*scores, *more]]
    assert logged_metrics(whole) == {"logged/accuracy": pytest.approx((2 / 3 + 0.0) / 2)}


def test_a_hint_is_given_to_who_takes_a_text_for_a_conversation() -> None:
    (score,) = call_reward(example("chat_format_reward"), told(["<think>"]))
    assert score.status is ScoreStatus.ERROR
    assert "completions are text where the row's prompt is text" in score.detail


def test_trainer_state_knows_how_far_training_is_and_names_what_it_has_not() -> None:
    assert (STATE.global_step, STATE.max_steps, STATE.epoch, STATE.num_train_epochs) == (5, 10, 1.25, 3)
    with pytest.raises(AttributeError, match="no 'log_history' here; it has global_step, max_steps, epoch"):
        _ = STATE.log_history
    (score,) = call_reward(example("scheduled_reward"), ScoreInputs(["p"], ["a"], [[1]]))
    assert score.status is ScoreStatus.ERROR
    assert "nothing is trained by `sample` and `eval`" in score.detail


def request(text: str, **fields: Any) -> ScoreRequest:
    info = SampleInfo("d/0/0", 0, 1, len(text), 0, "stop", "w", [text], 0)
    return ScoreRequest(info, **{"prompt_text": "<user>1+1?<assistant>", "messages": None, "columns": {}, **fields})


def test_string_prompts_stay_strings_under_a_chat_template_but_for_built_ins() -> None:
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "1+1?"}]
    one = request("2", messages=messages, asked="1+1?", trainer=STATE)
    texts: dict[int, Any] = {id(one.sample.ref): one.sample.ref}
    seen = build_inputs([one], texts)
    assert (seen.prompts, seen.completions, seen.trainer) == (["1+1?"], ["2"], STATE)
    templated = build_inputs([one], texts, templated=True)
    assert (templated.prompts, templated.completions) == ([messages], chat("2"))
    raw = request("2", prompt_text="R1: 1+1?", asked="1+1?")
    assert build_inputs([raw], {id(raw.sample.ref): "2"}).prompts == ["1+1?"]
    asked = [{"role": "user", "content": "1+1?"}]
    talk = request("2", messages=messages, asked=asked)
    seen = build_inputs([talk], {id(talk.sample.ref): "2"})
    assert (seen.prompts, seen.completions) == ([asked], chat("2"))


# ---- what can't be used


NAMED = "A function of yours is named package.module.function or file.py:function"


@pytest.mark.parametrize(
    ("name", "args", "expected"),
    [
        ("accuracyy", {}, f"no reward is called 'accuracyy'; did you mean 'accuracy'? {NAMED}"),
        ("zzzz", {}, f"no reward is called 'zzzz'; built in: {', '.join(BUILTINS)}; {NAMED}"),
        (
            "mine_of_here.godo",
            {},
            "reward 'mine_of_here.godo': module 'mine_of_here' has no 'godo'; did you mean 'good'?",
        ),
        (
            "mine_of_here.zzz",
            {},
            "reward 'mine_of_here.zzz': module 'mine_of_here' has no 'zzz'; it has Picky, Silent, compute_score, good",
        ),
        ("bare_of_here.f", {}, "reward 'bare_of_here.f': module 'bare_of_here' has no 'f'; it has no functions"),
        ("mine_of_here.VALUE", {}, "reward 'mine_of_here.VALUE': 'VALUE' is a int, expected a function"),
        (
            "none_of_here.f",
            {},
            "reward 'none_of_here.f': there is no module 'none_of_here' in HERE or on PYTHONPATH; start the run from the folder "
            "that holds it, or install it",
        ),
        (
            "bare_of_here.none.f",
            {},
            "reward 'bare_of_here.none.f': there is no module 'bare_of_here.none' in HERE or on PYTHONPATH; functions are named "
            "package.module.function",
        ),
        (
            "needs_of_here.f",
            {},
            "reward 'needs_of_here.f': its module 'needs_of_here' imports 'not_installed_here', which is not installed "
            "(No module named 'not_installed_here')",
        ),
        ("raises_of_here.f", {}, "reward 'raises_of_here.f': importing 'raises_of_here' failed with ValueError"),
        ("exits_of_here.f", {}, "reward 'exits_of_here.f': importing 'exits_of_here' failed with SystemExit: 3"),
        (
            "mine_of_here.Silent",
            {},
            "reward 'mine_of_here.Silent' is a class whose instances can't be called; give it a method "
            "__call__(self, completions, **columns)",
        ),
        ("mine_of_here.Picky", {}, "reward 'mine_of_here.Picky' can't be made with args {}: ValueError"),
        (
            "mine_of_here.Picky",
            {"why": "no\nmore"},
            "reward 'mine_of_here.Picky' can't be made with args {'why': 'no\\nmore'}: ValueError: no",
        ),
        (
            "exact_match",
            {"answer": "4"},
            "reward 'exact_match' takes 'answer' from the data, a value for each row, and not from args; map a column to it: "
            "data.train.columns: {answer: NAME}",
        ),
        (
            "mine_of_here.compute_score",
            {"tokenizer": 1, "ground_truth": "4"},
            "reward 'mine_of_here.compute_score': args can't hold 'ground_truth', which every call gets from the sample; "
            "remove it",
        ),
        (
            "mine_of_here.compute_score",
            {},
            "reward 'mine_of_here.compute_score' requires 'tokenizer', which verl does not pass; give it in args, or give that "
            "parameter a default",
        ),
    ],
)
def test_what_is_wrong_with_a_named_reward_is_told_with_the_mend(
    name: str, args: dict[str, Any], expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {
        "bare_of_here": "",
        "needs_of_here": "import not_installed_here\ndef f(completions): ...",
        "raises_of_here": "raise ValueError\ndef f(completions): ...",
        "exits_of_here": "raise SystemExit(3)\ndef f(completions): ...",
        "mine_of_here": """
VALUE = 3
def good(completions):
    return [1.0] * len(completions)
def compute_score(data_source, solution_str, ground_truth, tokenizer):
    return 1.0
class Silent:
    pass
class Picky:
    def __init__(self, why=None):
        raise ValueError(*([] if why is None else [why]))
    def __call__(self, completions):
        return []
""",
    }
    for module, text in files.items():
        (tmp_path / f"{module}.py").write_text(text)
        monkeypatch.delitem(sys.modules, module, raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if not p.startswith(str(tmp_path.parent))])
    importlib.invalidate_caches()
    with pytest.raises(RewardError) as e:
        resolve(RewardFunctionConfig(name=name, args=args))
    assert str(e.value) == expected.replace("HERE", str(tmp_path))


def test_what_verls_async_function_returns_beside_its_score_is_logged() -> None:
    async def compute_score(data_source: str, solution_str: str, ground_truth: str) -> dict[str, Any]:
        return {"score": float(solution_str == ground_truth), "length": len(solution_str)}

    function = verl_function("v", compute_score, 1.0, {})
    scores = call_reward(function, told(["4", "17"], data_source=["x"] * 2, ground_truth=["4"] * 2))
    assert [(s.value, s.extra) for s in scores] == [(1.0, (("length", 1),)), (0.0, (("length", 2),))]
    assert scores[0].logged == (LoggedMetric("length", 3.0, 2, 0),)


# ---- what functions return

WANTED = "expected a finite number, None for 'does not apply', or a list of (end, reward), one for each step"


@pytest.mark.parametrize(
    ("value", "told"),
    [
        ("0.5", f"'0.5', {WANTED}"),
        (float("inf"), f"inf, {WANTED}"),
        ("x" * 100, f"'{'x' * 79}, {WANTED}"),
        ([], f"[], {WANTED}: there is none"),
        ([(0, 1.0, 2)], f"[(0, 1.0, 2)], {WANTED}"),
        ([(0, "1")], f"[(0, '1')], {WANTED}"),
        *(
            (
                steps,
                f"{steps}, {WANTED}: step {number} ends at {end}, expected the index of a token from {first} to 3, the last one of "
                "this completion",
            )
            for steps, number, end, first in (
                ([(4, 1.0)], 0, 4, 0),
                ([(-1, 1.0)], 0, -1, 0),
                ([(True, 1.0)], 0, True, 0),
                ([(1.0, 1.0)], 0, 1.0, 0),
                ([(1, 1.0), (1, 2.0)], 1, 1, 2),
                ([(3, 1.0), (4, 2.0)], 1, 4, 4),
            )
        ),
    ],
)
def test_what_is_no_reward_is_told_with_what_is_expected(value: Any, told: str) -> None:
    (score,) = check_values("f", [value], [4], 2.0)
    assert (score.status, score.detail, score.seconds) == (ScoreStatus.ERROR, f"reward 'f' returned {told}", 2.0)
    assert score.value != score.value


def test_rewards_of_every_kind_are_read_each_with_its_share_of_the_time() -> None:
    values = [None, RewardError("x" * 9000), np.float32(2), [(1, 0.5), [3, 1]], Explained(0.25, "y" * 9000), True]
    scores = check_values("f", values, [4] * 6, 3.0)
    na, error, ok = ScoreStatus.NOT_APPLICABLE, ScoreStatus.ERROR, ScoreStatus.OK
    assert [s.status for s in scores] == [na, error, ok, ok, ok, ok]
    assert [s.value for s in scores[2:]] == [2.0, 1.5, 0.25, 1.0]
    assert [s.steps for s in scores] == [(), (), (), (Step(1, 0.5), Step(3, 1.0)), (), ()]
    most = MAX_DETAIL_CHARS
    assert [s.detail for s in scores] == ["", "x" * most, "", "", "y" * most, ""]
    assert [s.seconds for s in scores] == [0.5] * 6
    for wrong, told in (
        (3, "int, expected a list of 2 numbers or None"),
        ([1], "1 values, expected 2, one for each completion"),
    ):
        scores = check_values("f", wrong, [4, 4], 3.0)
        assert [(s.status, s.detail, s.seconds) for s in scores] == [(error, f"reward 'f' returned {told}", 1.5)] * 2


def test_steps_of_several_rewards_that_end_at_one_token_are_one_step() -> None:
    ok = ScoreStatus.OK
    parts = [
        RewardScore("a", ok, 3.0, steps=(Step(1, 1.0), Step(4, 2.0))),
        RewardScore("b", ok, 5.0),
        RewardScore("c", ScoreStatus.NOT_APPLICABLE, float("nan")),
        RewardScore("d", ok, 1.0, steps=(Step(0, 1.0),)),
    ]
    pooled = weighted_sum(parts, [1.0, 0.5, 9.0, -2.0], 5)
    assert (pooled.status, pooled.value, pooled.parts) == (ok, 3.0 + 2.5 - 2.0, tuple(parts))
    assert pooled.steps == (Step(0, -2.0), Step(1, 1.0), Step(4, 4.5))
    plain_sum = weighted_sum(parts[1:3], [0.5, 1.0], 5)
    assert (plain_sum.value, plain_sum.steps) == (2.5, ())
    none = weighted_sum(parts[2:3], [1.0], 5)
    assert (none.status, none.detail) == (parts[2].status, "no reward function applies to this sample")
    failed = weighted_sum([*parts, RewardScore("e", ScoreStatus.TIMEOUT, float("nan"), "too slow")], [1.0] * 5, 5)
    assert (failed.status, failed.detail, len(failed.parts)) == (ScoreStatus.TIMEOUT, "too slow", 5)


def test_an_error_of_a_reward_is_told_with_its_line() -> None:
    class Silent(Exception):
        def __str__(self) -> str:
            raise ValueError

    def told(error: Exception, *, inside: bool) -> str:
        def fail() -> None:
            raise error

        try:
            if inside:
                fail()
            raise error
        except Exception as e:
            return explain(e)

    line = told.__code__.co_firstlineno + 2
    assert told(ValueError("no digits\nat all"), inside=True) == (
        f"ValueError: no digits (test_reward_contract.py:{line})"
    )
    assert told(ValueError("no digits"), inside=False) == "ValueError: no digits"
    assert told(ValueError(), inside=False) == "ValueError"
    assert told(Silent(), inside=False) == "Silent: (its message can't be printed)"
    assert told(ValueError("x" * 9000), inside=False) == f"ValueError: {'x' * 9000}"[: MAX_DETAIL_CHARS - 100]


@pytest.mark.parametrize(
    ("args", "told"),
    [
        ({"scael": 2}, "takes no argument 'scael'; did you mean 'scale'?"),
        ({"zzz": 2}, "takes no argument 'zzz'; known: scale, shift"),
        ({"prompts": 2}, "args can't hold 'prompts', which every call gets from the sample; remove it"),
    ],
)
def test_args_that_a_function_does_not_take_are_told(args: dict[str, Any], told: str) -> None:
    def reward(completions: Any, scale: float, shift: float = 0.0) -> list[float]:
        return []

    with pytest.raises(RewardError) as e:
        inspect_function("f", reward, 1.0, args)
    assert str(e.value) == f"reward 'f'{':' * ('hold' in told)} {told}"
    assert inspect_function("f", reward, 1.0, {"scale": 1}).required == ()
    assert inspect_function("f", reward, 1.0, {}).required == (("scale",),)

    def positional(completions: Any, x: int, /) -> list[float]:
        return []

    with pytest.raises(RewardError) as e:
        inspect_function("f", positional, 1.0, {})
    assert str(e.value) == (
        "reward 'f' is called by keyword, but its parameter 'completions' is positional-only; drop the `/`"
    )
    with pytest.raises(RewardError, match=r"^reward 'f' takes no argument 'x'; known: none$"):
        inspect_function("f", lambda completions: [], 1.0, {"x": 1})


# ---- what functions log is bounded


def test_names_and_values_that_are_logged_have_their_bounds() -> None:
    class Nameless:
        def __str__(self) -> str:
            raise ValueError

    assert checked_name("x" * 100) == "x" * 100
    for bad in ("", "x" * 101, "a\nb", 3):
        with pytest.raises(ValueError, match=r"^expected up to 100 printable characters$"):
            checked_name(bad)
    for value in (2**53 - 1, 1 - 2**53, False, 0.5, "x" * 2000):
        assert plain(value) is value
    assert [plain(2**53), plain(-(2**53)), plain(Nameless())] == [str(2**53), str(-(2**53)), "a Nameless"]
    assert plain("x" * 2001) == "x" * 2000 + " .. (2,001 characters)"
    assert [plain(np.float32(0.5)), plain(torch.tensor(3)), plain(np.arange(2))] == [0.5, 3, "[0 1]"]


def test_what_is_logged_wrongly_is_told_with_what_is_expected() -> None:
    log = CallLog("f", 2)
    for values, got in (("ab", "2 values"), ([1, 2, 3], "3 values")):
        with pytest.raises(RewardError) as e:
            log.log_extra("x", values)
        assert str(e.value) == (
            f"reward 'f': log_extra('x', ..) got {got}, expected a list of 2, one for each completion"
        )
    with pytest.raises(RewardError) as e:
        log.log_extra("y" * 200, [1, 2])
    assert str(e.value) == (
        f"reward 'f': log_extra got the name {'y' * 200!r:.80}, expected up to 100 printable characters"
    )
    with pytest.raises(RewardError) as e:
        log.log_metric("", 1.0)
    assert str(e.value) == "reward 'f': log_metric got the name '', expected up to 100 printable characters"
    log.log_metric("z", None)  # type: ignore[arg-type]
    log.log_metric("z", 2.0)
    assert log.metrics == (LoggedMetric("z", 2.0, 1, 1),)


def test_extra_columns_have_one_value_for_each_completion() -> None:
    log = CallLog("f", 2)
    log.log_extra("in_turns", [1])
    log.log_extra("in_turns", ["x" * 5000])
    (first, second) = log.extras()
    assert first == (("in_turns", 1),)
    assert MAX_VALUE_CHARS <= len(str(second[0][1])) < MAX_VALUE_CHARS + 40
    with pytest.raises(RewardError, match=r"log_extra\('in_turns', ..\) got 3 values, expected a list of 2"):
        log.log_extra("in_turns", [1])
    log.log_extra("short", [1])
    with pytest.raises(RewardError, match=r"log_extra\('short', ..\) got 1 values"):
        log.extras()


@pytest.mark.parametrize(
    ("value", "kept"),
    [
        (None, None),
        (True, True),
        (0.5, 0.5),
        (float("nan"), "nan"),
        (10**400, str(10**400)),
        ([1, {"a": 2}], "[1, {'a': 2}]"),
        ("\ud800", "\ud800"),
    ],
)
def test_extra_values_of_any_kind_are_kept_as_json_can_hold_them(value: Any, kept: Any) -> None:
    log = CallLog("f", 1)
    log.log_extra("x", [value])
    ((pair,),) = log.extras()
    assert pair == ("x", kept)
    json.dumps(dict([pair]), allow_nan=False)


def test_metrics_that_are_not_finite_are_counted_and_others_refused() -> None:
    log = CallLog("f", 1)
    for value in (1.0, 3, float("nan"), float("inf"), 1e308, 1e308):
        log.log_metric("x", value)
    (metric,) = log.metrics
    assert (metric.total, metric.num_finite, metric.num_not_finite) == (1e308, 3, 3)
    with pytest.raises(RewardError, match=r"log_metric\('y', ..\) got a str, expected a number"):
        log.log_metric("y", "good")  # type: ignore[arg-type]
    for bad in ("", "a\nb", "x" * 101, 3):
        with pytest.raises(RewardError, match="printable characters"):
            log.log_metric(bad, 1.0)  # type: ignore[arg-type]
    for i in range(MAX_METRICS - 1):
        log.log_metric(str(i), 1.0)
    with pytest.raises(RewardError, match=f"more than {MAX_METRICS} names"):
        log.log_metric("more", 1.0)
    for i in range(MAX_COLUMNS):
        log.log_extra(str(i), [1])
    with pytest.raises(RewardError, match=f"more than {MAX_COLUMNS} columns"):
        log.log_extra("more", [1])


# ---- verl

VERL_ROW: dict[str, Any] = {
    "data_source": ["openai/gsm8k"] * 2,
    "ability": ["math"] * 2,
    "reward_model": [{"style": "rule", "ground_truth": "72"}, {"style": "rule", "ground_truth": "5"}],
    "extra_info": [{"split": "train"}, None],
}


@pytest.mark.parametrize(
    ("name", "args", "expected"),
    [
        ("compute_score", {}, [1.0, 0.0]),
        ("gsm8k_score", {"format_score": 0.1}, [1.0, 0.1]),
        ("served_score", {}, [1.0, 0.0]),
        ("dict_score", {}, [1.0, -1.0]),
        ("batched_score", {}, [1.0, 0.0]),
    ],
)
def test_verls_functions_run_unchanged(name: str, args: dict[str, Any], expected: list[float]) -> None:
    completions = ["so it is 72", "so it is 72"]
    assert said(example(name, **args), told(completions, **VERL_ROW)) == expected
    assert said(example(name, **args), told(chat(*completions), **VERL_ROW)) == expected


def test_verls_ground_truth_may_be_a_column_of_its_own() -> None:
    function = example("gsm8k_score")
    for columns in ({"ground_truth": ["72"]}, {"answer": ["72"]}, {"reward_model": [None], "answer": ["72"]}):
        assert said(function, told(["72"], **columns)) == [1.0]


@pytest.mark.parametrize("held", [{"style": "rule"}, '{"ground_truth": "72"}', "72", None])
@pytest.mark.parametrize("name", ["compute_score", "batched_score"])
def test_a_row_of_verls_that_has_no_truth_fails_and_is_no_wrong_answer(name: str, held: Any) -> None:
    (part,) = call_reward(example(name), told(["72"], data_source=["gsm8k"], reward_model=[held]))
    assert part.status is ScoreStatus.ERROR
    assert "expected a mapping with 'ground_truth'" in part.detail


def test_verls_dict_is_logged_beside_its_score() -> None:
    first, second = call_reward(example("dict_score"), told(["is 72", "is 72"], **VERL_ROW))
    assert dict(first.extra) == {"acc": True, "pred": "is 72", "split": "train"}
    assert dict(second.extra) == {"acc": False, "pred": "is 72", "split": None}
    assert [(m.name, m.total, m.num_finite) for m in first.logged] == [("acc", 1.0, 2)]


def test_a_sample_that_verls_function_fails_at_fails_alone() -> None:
    columns = VERL_ROW | {"data_source": ["openai/gsm8k", "other"]}
    right, failed = call_reward(example("compute_score"), told(["72", "5"], **columns))
    assert right.value == 1.0
    assert failed.status is ScoreStatus.ERROR
    assert failed.detail.startswith("NotImplementedError: no score for other")


def test_what_verl_alone_passes_is_refused_and_can_be_given() -> None:
    with pytest.raises(
        RewardError, match="'reward_router_address', which verl's reward loop alone passes; give it in args"
    ):
        example("routed_score")
    assert said(example("routed_score", reward_router_address="x"), told(["72", "5"], **VERL_ROW)) == [0.0, 0.0]
    with pytest.raises(RewardError, match="args can't hold 'ground_truth'"):
        example("compute_score", ground_truth="72")


# ---- what functions are called with


def test_the_unit_is_the_group_as_soon_as_a_function_is_not_built_in() -> None:
    built_in, own = RewardFunctionConfig(name="accuracy"), RewardFunctionConfig(name="my.f")
    assert RewardConfig().unit == "auto"
    assert not RewardConfig(functions=(built_in,)).whole_groups
    assert RewardConfig(functions=(built_in, own)).whole_groups
    assert not RewardConfig(functions=(own,), unit="sample").whole_groups
    assert not RewardConfig(functions=(own,), unit="batch").whole_groups
    assert RewardConfig(functions=(built_in,), unit="group").whole_groups
    assert RewardConfig.model_validate(RewardConfig(functions=(own,)).model_dump()).unit == "auto"
    per_sample = {name: example(name).per_sample for name in ("rank_reward", "compute_score", "batched_score")}
    assert per_sample == {"rank_reward": False, "compute_score": True, "batched_score": False}


# ---- columns are data

OPTIONS: dict[str, dict[str, Any]] = {
    "soft_overlong": {"max_length": 10, "cache_length": 5},
    "reward_model": {"path": "a/b"},
    "judge": {"model": "m", "base_url": "http://127.0.0.1:9/v1"},
}
GOOD: dict[str, list[Any]] = {
    "answer": ["4"],
    "tests": [[{"input": "", "output": "4"}]],
    "target": [4],
    "nums": [[2, 2]],
    "language": ["en"],
    "instruction_id_list": [["punctuation:no_comma"]],
    "kwargs": [[{}]],
    "reasoning_gym_entry": [{"question": "2+2", "answer": "4", "metadata": {}}],
    "reasoning_gym_task": ["basic_arithmetic"],
}
OPTION_NAMES = sorted(
    {name for title, call in BUILTINS.items() for name in inspect.signature(call).parameters if name not in RESERVED}
    | {"weight", "sources", "part", "name", "args", "env", "self", "completion", "trainer_state", "log_metric"}
)
HOSTILE = ["/etc", False, None, 10**9, ["x"], {"a": 1}]


def builtin(name: str) -> RewardFunction:
    return described(RewardFunctionConfig(name=name, args=OPTIONS.get(name, {})))


@pytest.mark.parametrize("name", list(BUILTINS))
def test_no_column_reaches_an_option_of_a_built_in(name: str) -> None:
    function = builtin(name)
    declared = columns_of(name, OPTIONS.get(name, {})).names
    data = {k: v for k, v in GOOD.items() if k in declared}
    log = CallLog(name, 1)
    plain = function.keywords(told(["x"], **data), log)
    for column in OPTION_NAMES:
        for value in HOSTILE:
            if column not in declared:
                assert function.keywords(told(["x"], **data, **{column: [value]}), log) == plain, (column, value)


@pytest.mark.parametrize("name", [n for n in BUILTINS if n not in ("reward_model", "judge", "code")])
def test_the_score_of_a_built_in_is_the_same_with_columns_that_are_called_like_options(name: str) -> None:
    function = resolve(RewardFunctionConfig(name=name, args=OPTIONS.get(name, {})))
    declared = columns_of(name, OPTIONS.get(name, {})).names
    data = {k: v for k, v in GOOD.items() if k in declared}
    text = (
        r"<think>so it is</think><answer>2+2</answer>"
        if name == "countdown"
        else r"<think>so it is</think><answer>4</answer>"
    )
    (expected,) = said(function, told([text], **data))
    hostile = {k: [False] for k in OPTION_NAMES if k not in declared}
    assert said(function, told([text], **data, **hostile)) == [expected]


@pytest.fixture
def readable() -> Iterator[Path]:
    """A folder that the sandbox's user can read, were it mounted."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


def test_a_column_never_mounts_a_folder_into_the_sandbox(readable: Path) -> None:
    secret = readable / "secret.txt"
    secret.write_text("4")
    program = f"```python\nprint(open({str(secret)!r}).read())\n```"
    data: dict[str, Any] = {"tests": [[{"input": "", "output": "4"}]]}
    mounted = resolve(RewardFunctionConfig(name="code", args={"read_only": [str(readable)]}))
    assert said(mounted, told([program], **data)) == [1.0]
    columns: dict[str, Any] = {
        "read_only": [[str(readable)]],
        "python_path": [[str(readable)]],
        "language": ["Python"],
        "timeout_s": [100],
    }
    function = resolve(RewardFunctionConfig(name="code"))
    assert said(function, told([program], **data, **columns)) == [0.0]
    assert said(function, told(["```python\nprint(4)\n```"], **data, **columns)) == [1.0]


def test_what_only_the_data_can_say_is_refused_in_args() -> None:
    for name, args in (("accuracy", {"answer": "4"}), ("code", {"tests": []}), ("countdown", {"nums": [1]})):
        with pytest.raises(RewardError, match=r"takes '.*' from the data, a value for each row, and not from args"):
            described(RewardFunctionConfig(name=name, args=args))
    with pytest.raises(RewardError, match=r"'soft_overlong' needs args: \{max_length"):
        described(RewardFunctionConfig(name="soft_overlong"))


def test_a_language_is_an_option_or_a_column_and_args_come_first() -> None:
    german = described(RewardFunctionConfig(name="language_consistency", args={"language": "de"}))
    log = CallLog("x", 1)
    assert german.keywords(told(["x"], language=["en"]), log)["language"] == "de"
    by_row = described(RewardFunctionConfig(name="language_consistency"))
    assert by_row.keywords(told(["x"], language=["en"]), log)["language"] == ["en"]


def test_a_built_in_does_not_apply_to_a_row_whose_column_is_null() -> None:
    function = resolve(RewardFunctionConfig(name="exact_match"))
    assert said(function, told(["4", "None", "4"], answer=["4", None, "5"])) == [1.0, None, 0.0]
    accuracy = resolve(RewardFunctionConfig(name="accuracy"))
    both = told(["4", "4", "4"], answer=[None, "5", None], solution=["4", "4", None])
    assert said(accuracy, both) == [1.0, 0.0, None]


# ---- columns are checked before the run


class Rows:
    def __init__(self, *rows: dict[str, Any]) -> None:
        self.rows_of_columns = list(rows)


def checked(functions: list[dict[str, Any]], *rows: dict[str, Any], **evaluation: list[dict[str, Any]]) -> list[str]:
    reward = RewardConfig.model_validate({"functions": functions})
    held_out: dict[str, Any] = {name: Rows(*given) for name, given in evaluation.items()}
    sets = PromptSets(Rows(*rows), held_out)  # type: ignore[arg-type]
    return check_columns(column_needs(reward), sets, train=True, evaluation=True)


OWN = "tests.reward_examples."


@pytest.mark.parametrize(
    ("function", "rows", "words"),
    [
        ({"name": "accuracy"}, [{"anwser": "4"}], "needs the column 'answer' or 'solution'; data.train has anwser;"),
        ({"name": "exact_match"}, [{"anwser": "4"}], "data.train.columns: {answer: anwser}"),
        ({"name": "code"}, [{}], "needs the column 'tests'; data.train has none;"),
        ({"name": f"{OWN}ground_truth_reward"}, [{"answer": "4"}], "needs the column 'ground_truth'"),
        ({"name": f"{OWN}compute_score"}, [{"answer": "4"}], "needs the column 'data_source'"),
        (
            {"name": f"{OWN}gsm8k_score"},
            [{"reward_model": {"style": "rule"}}],
            "'reward_model.ground_truth' or 'ground_truth'",
        ),
        ({"name": "accuracy", "sources": ["math"]}, [{"answer": "4"}], "needs the column 'source'"),
        (
            {"name": "accuracy", "sources": ["b"]},
            [{"source": "a", "answer": 1}, {"source": "b", "gold": 1}],
            "needs the column",
        ),
    ],
)
def test_a_column_that_is_not_there_is_named_before_the_run(
    function: dict[str, Any], rows: list[dict[str, Any]], words: str
) -> None:
    with pytest.raises(RewardError) as error:
        checked([function], *rows)
    assert words in str(error.value)


def test_only_rows_of_a_rewards_sources_need_its_columns() -> None:
    rows: list[dict[str, Any]] = [{"source": "math", "answer": "4"}, {"source": "code", "tests": []}]
    functions = [{"name": "accuracy", "sources": ["math"]}, {"name": "code", "sources": ["code"]}]
    assert checked(functions, *rows) == []
    (note,) = checked([{"name": "accuracy", "sources": ["prose"]}], *rows)
    assert note == "reward 'accuracy' applies to no row of data.train: none is of the sources prose"


def test_what_should_be_known_of_the_columns_is_told() -> None:
    rows: list[dict[str, Any]] = [{"answer": "4", "scale": 3}, {"answer": None, "scale": 3}, {}]
    assert checked([{"name": "accuracy"}], *rows) == [
        "reward 'accuracy' does not apply to 2 of 3 rows of data.train: they have no 'answer' or 'solution'"
    ]
    assert checked([{"name": f"{OWN}logging_reward", "args": {"scale": 2}}], *rows) == [
        f"reward '{OWN}logging_reward' takes 'scale' from its args, and not the column of data.train that is called so",
        f"reward '{OWN}logging_reward' gets None for 2 of 3 rows of data.train: they have no 'answer'",
    ]


def test_the_columns_of_every_evaluation_set_are_checked() -> None:
    with pytest.raises(
        RewardError, match=r"data\.eval\.aime has answers; .* data\.eval\.aime\.columns: \{answer: answers\}"
    ):
        checked([{"name": "accuracy"}], {"answer": 1}, math=[{"solution": 1}], aime=[{"answers": 1}])


def test_scores_keep_what_was_logged_in_a_checkpoint() -> None:
    from dataclasses import asdict

    from grpo_ray.run.kept_groups import _score

    scores = call_reward(example("logging_reward"), told(["4", "5"], answer=["4", "4"]))
    whole = Score(ScoreStatus.OK, 1.0, (scores[0],))
    assert _score(json.loads(json.dumps(asdict(whole)))) == whole
    old = {"name": "f", "status": "ok", "value": 1.0, "detail": "", "seconds": 0.0, "steps": []}
    saved = {"status": "ok", "value": 1.0, "parts": [old], "detail": "", "steps": []}
    assert _score(saved).parts == (RewardScore("f", ScoreStatus.OK, 1.0),)


# ---- what is said and named


def test_sets_that_are_not_used_are_not_checked_and_a_single_one_is_named_by_its_option() -> None:
    needs = column_needs(RewardConfig.model_validate({"functions": [{"name": "accuracy"}]}))
    wrong, right = Rows({"answers": 1}), Rows({"answer": 1})
    sets = PromptSets(wrong, {"": right})  # type: ignore[arg-type, dict-item]
    assert check_columns(needs, sets, train=False, evaluation=True) == []
    assert check_columns(needs, PromptSets(right, {"": wrong}), train=True, evaluation=False) == []  # type: ignore[arg-type, dict-item]
    with pytest.raises(RewardError, match=r"data\.train has answers;"):
        check_columns(needs, sets, train=True, evaluation=False)
    with pytest.raises(RewardError, match=r"data\.eval has answers; .* data\.eval\.columns: \{answer: answers\}"):
        check_columns(needs, PromptSets(right, {"": wrong}), train=True, evaluation=True)  # type: ignore[arg-type, dict-item]


@pytest.mark.parametrize(
    "row", [{"target": "x", "nums": [1]}, {"target": 3, "nums": [1, "x"]}, {"target": 3, "nums": math.inf}]
)
def test_a_row_of_countdown_without_numbers_is_named_before_the_run(row: dict[str, Any]) -> None:
    with pytest.raises(RewardError, match="in column target or nums is no number"):
        check_row(row)


@pytest.mark.parametrize(
    "row", [{"target": 3, "nums": [1, "2"]}, {"target": 3, "nums": 3}, {"target": "x"}, {"nums": ["x"]}]
)
def test_a_row_of_countdown_that_can_be_scored_or_does_not_apply_is_none_at_fault(row: dict[str, Any]) -> None:
    check_row(row)


def test_an_entry_of_a_column_is_named_behind_the_first_point() -> None:
    row = {"a": {"b.c": 1, "b": 2}, "d.e": 3, "f": 4}
    assert [value_of(row, name) for name in ("a.b.c", "a.b", "d.e", "f", "f.g", "h.i")] == [1, 2, 3, 4, None, None]


def test_a_function_that_runs_out_of_memory_is_told_how_much_it_may_take() -> None:
    def greedy(completions: list[str]) -> list[float]:
        raise MemoryError("no more")

    (part,) = call_reward(inspect_function("greedy", greedy, 1.0, {}), told(["x"]))
    assert part.detail.endswith(
        "; a scoring process may take reward.memory_gb: raise that, or let the function take less"
    )


def test_verls_functions_are_known_by_their_signature_and_keep_the_recipes_name() -> None:
    assert is_verl(example("compute_score").call) is False
    assert is_verl(min) is False
    assert is_verl(lambda solution_str, completions: 0.0) is False
    assert is_verl(lambda solution_strs: [0.0] * len(solution_strs)) is True
    named = verl_function("mine", lambda solution_str: 1.0, 0.5, {})
    assert (named.name, named.weight, named.required, named.per_sample) == ("mine", 0.5, (), True)
    assert said(named, told(["a", "b"])) == [1.0, 1.0]


@pytest.mark.parametrize(("returned", "has"), [({}, "nothing"), ({"acc": 1, 2: 3}, "acc, 2")])
def test_verls_dict_without_a_score_is_told_with_what_it_has(returned: dict[Any, Any], has: str) -> None:
    (part,) = call_reward(verl_function("mine", lambda solution_str: returned, 1.0, {}), told(["a"]))
    assert part.status is ScoreStatus.ERROR
    assert f"it returned a dict without 'score'; it has {has}" in part.detail
