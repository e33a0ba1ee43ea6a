"""Whatever a completion says, every built-in reward scores it and every filter judges it, and none of that takes a second."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from grpo_ray.config.reward import RewardFunctionConfig
from grpo_ray.data.decontaminate import ngram_hashes
from grpo_ray.data.plain_text import nfkc
from grpo_ray.datagen.filters.config import FilterConfig
from grpo_ray.datagen.filters.select import written
from grpo_ray.datagen.filters.trace import Trace, first_fault, foreign, loops, repeated
from grpo_ray.rewards.answers import readings
from grpo_ray.rewards.answers.cpu_clock import within_cpu_s
from grpo_ray.rewards.answers.parts import part_of
from grpo_ray.rewards.code import find_program
from grpo_ray.rewards.code_tests import same_output, same_value
from grpo_ray.rewards.functions.function import ScoreInputs
from grpo_ray.rewards.functions.logs import plain
from grpo_ray.rewards.functions.scoring import call_reward
from grpo_ray.rewards.instruction_checks import CHECKS
from grpo_ray.rewards.table import BUILTINS, resolve
from grpo_ray.rewards.votes import math_votes, text_votes
from grpo_ray.types import ScoreStatus
from tests.cpu_time import cpu_s_of
from tests.hostile_texts import ALL, FORMULAS, MORE_FORMULAS, SIZE, SOME

CPU_S = 1.0
TRIES = 4
"""The quickest counts: a busy machine makes CPU time longer, and never shorter."""
ARGUMENTS: dict[str, dict[str, Any]] = {
    "keywords:existence": {"keywords": ["needle", "a.b"]},
    "keywords:forbidden_words": {"forbidden_words": ["needle", "a"]},
    "keywords:frequency": {"keyword": "a", "frequency": 9, "relation": "at least"},
    "keywords:letter_frequency": {"letter": "q", "let_frequency": 1, "let_relation": "at least"},
    "length_constraints:number_words": {"num_words": SIZE, "relation": "at least"},
    "length_constraints:number_paragraphs": {"num_paragraphs": 2},
    "length_constraints:nth_paragraph_first_word": {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "a"},
    "detectable_content:number_placeholders": {"num_placeholders": SIZE},
    "detectable_content:postscript": {"postscript_marker": "P.P.S"},
    "detectable_format:number_bullet_lists": {"num_bullets": 2},
    "detectable_format:number_highlighted_sections": {"num_highlights": SIZE},
    "detectable_format:multiple_sections": {"section_spliter": "Section", "num_sections": SIZE},
    "combination:repeat_prompt": {"prompt_to_repeat": "a"},
    "startend:end_checker": {"end_phrase": "a"},
}
LIBRARIES = {
    "language:response_language": {"language": "de"},
    "length_constraints:number_sentences": {"num_sentences": 20, "relation": "at least"},
    "change_case:capital_word_frequency": {"capital_frequency": 20, "capital_relation": "at least"},
    "change_case:english_capital": {},
    "change_case:english_lowercase": {},
}

PLAIN = [name for name in CHECKS if name not in LIBRARIES]


def reward(name: str, part: str = "all", args: dict[str, Any] | None = None, **columns: Any) -> Callable[[str], None]:
    """Scores a text by a built-in reward, for a row with these columns; fails where there is no score."""
    function = resolve(RewardFunctionConfig.model_validate({"name": name, "part": part, "args": args or {}}))
    of_row = {column: [value] for column, value in columns.items()}

    def read(text: str) -> None:
        ids = list(map(ord, text)) if function.accepts and "completion_ids" in function.accepts else [1]
        (score,) = call_reward(function, ScoreInputs(["How?"], [text], [ids], of_row))
        # A text without a word has no share of words.
        none = name == "language_consistency" and score.status is ScoreStatus.NOT_APPLICABLE
        assert none or (score.status is ScoreStatus.OK and math.isfinite(score.value)), score.detail

    return read


REWARDS: dict[str, Callable[[str], None]] = {
    "accuracy": reward("accuracy", answer="42"),
    "accuracy, a float": reward("accuracy", answer=0.5),
    "accuracy, a formula": reward("accuracy", answer="\\frac{\\sqrt{2}}{x+1}"),
    "accuracy, several": reward("accuracy", answer="1, 2, 3"),
    "accuracy, marked": reward("accuracy", answer="so #### 42"),
    "accuracy, a choice": reward("accuracy", answer="(C) 42"),
    "accuracy, words": reward("accuracy", answer="\\text{Paris}"),
    "think_format": reward("think_format"),
    "r1_format": reward("r1_format"),
    "r1_format, prefilled": reward("r1_format", args={"prefilled": True}),
    "countdown": reward("countdown", target=24, nums=[1, 2, 3, 4]),
    "countdown, floats": reward("countdown", target=24.5, nums=[1.5, 1e300]),
    "soft_overlong": reward("soft_overlong", args={"max_length": 100, "cache_length": 10}),
    "repetition_penalty": reward("repetition_penalty", args={"ngram_size": 40}),
    "exact_match": reward("exact_match", answer="a"),
    "exact_match, a float": reward("exact_match", answer=0.5),
    "language_consistency": reward("language_consistency", language="zh"),
    "language_consistency, a dictionary": reward("language_consistency", part="reasoning", language="de"),
    "instructions": reward(
        "instructions", instruction_id_list=PLAIN, kwargs=[ARGUMENTS.get(name, {}) for name in PLAIN], part="summary"
    ),
    **{
        f"instructions, {name}": reward("instructions", instruction_id_list=[name], kwargs=[arguments])
        for name, arguments in LIBRARIES.items()
    },
}
ELSEWHERE = {
    "code": "runs programs in a sandbox: tests/hostile.py",
    "judge": "asks a model: tests/rewards/test_judge.py",
    "reward_model": "asks a model",
    "reasoning_gym": "its verifiers are third-party code",
}
FILTER = FilterConfig(max_foreign_words=1.0, max_loop=None, max_repeated=None, code_blocks=True)


def judged(text: str, form: Any) -> str | None:
    return first_fault(Trace("How?", text, "stop", 9, {}), FILTER.model_copy(update={"form": form}))


READERS: dict[str, Callable[[str], Any]] = {
    "filter of r1": lambda t: judged(t, "r1"),
    "filter of think": lambda t: judged(t, "think"),
    "all filters": lambda t: first_fault(
        Trace("How?", t, "stop", 9, {}), FilterConfig(form=None, min_reasoning_chars=1)
    ),
    "foreign": lambda t: foreign("How?", t),
    "loops": lambda t: loops(t, 4),
    "repeated": lambda t: repeated(t, 6),
    "summary": lambda t: written(t, {}, "So it is {answer}."),
    "n-grams": lambda t: ngram_hashes([t], 10),
    "part_of": lambda t: (part_of(t, "reasoning"), part_of(t, "summary")),
    "text_votes": lambda t: text_votes([t, t]),
    "math_votes": lambda t: math_votes([t, "7", t], answer=["7"] * 3),
    "find_program": lambda t: find_program(t, ("python", "py")),
    "output of a program": lambda t: same_output(t.encode("utf-8", "replace"), "1.5 " * (SIZE // 4)),
    "value of a program": lambda t: same_value(t.encode("utf-8", "replace"), [1.5]),
    "log_extra": plain,
}
SLOW = (
    *(
        "language_consistency",
        "foreign",
        "loops",
        "repeated",
        "repetition_penalty",
        "soft_overlong",
        "all filters",
        "n-grams",
    ),
    *(
        "math_votes",
        "instructions",
        "output of a program",
        *(name for name in REWARDS if name.startswith(("accuracy", "instr"))),
    ),
    "language_consistency, a dictionary",
)
"""They look at each sign or word, or take in the others: a part of the texts is enough for them."""


def least_cpu_s(read: Callable[[], Any], enough_s: float, tries: int = TRIES) -> float:
    """The CPU time of a call, the least of some if the first takes too much."""
    least = math.inf
    for _ in range(tries):
        least = min(least, cpu_s_of(read))
        if least < enough_s:
            break
    return least


def check(name: str, read: Callable[[str], Any], of: Sequence[str]) -> None:
    for text in of:
        seconds = least_cpu_s(lambda: read(text), CPU_S)  # noqa: B023
        assert seconds < CPU_S, f"{name} took {seconds:.2f} s for {text[:40]!r} .. {text[-20:]!r}"


def test_every_built_in_reward_is_fed_here_or_elsewhere() -> None:
    fed = {name.partition(",")[0] for name in REWARDS}
    assert fed | set(ELSEWHERE) == set(BUILTINS)
    assert not fed & set(ELSEWHERE)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", [*REWARDS, *READERS])
def test_no_completion_chooses_to_fail_nor_takes_a_second(name: str) -> None:
    slow = name in SLOW
    texts = [*SOME[::2], *ALL[len(name) % 5 :: 47 if "," in name else 23]] if slow else ALL[len(name) % 2 :: 2]
    (REWARDS | READERS)[name]("A first text, so that libraries are loaded.")
    check(name, (REWARDS | READERS)[name], texts)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", [*REWARDS, *READERS])
def test_time_grows_with_the_length_alone(name: str) -> None:
    read = (REWARDS | READERS)[name]
    for text in SOME[:: 4 if name in SLOW else 1]:
        short = least_cpu_s(lambda: read(text), 0.0, tries=2)  # noqa: B023
        long = least_cpu_s(lambda: read(text * 4), 6 * short + 0.05)  # noqa: B023
        assert long < 8 * short + 0.2, f"{name}: {short:.3f} s, four times as long {long:.3f} s, for {text[:20]!r}"


@pytest.mark.parametrize("sign", ["\ufdfa", "\ufdfb", "\ufdfa ", "\u3316", "\u3303", "\u00bd\ufdfa", "\ufdfaa\u0301"])
def test_signs_that_stand_for_many_letters_make_little_more_of_a_text(sign: str) -> None:
    text = (sign * SIZE)[:SIZE]
    assert len(nfkc(text)) <= 1.5 * SIZE + 30
    for name in ("language_consistency", "language_consistency, a dictionary"):
        REWARDS[name]("A first text")
        assert least_cpu_s(lambda: REWARDS[name](text), CPU_S) < CPU_S  # noqa: B023


def test_a_text_with_some_such_signs_is_made_plain() -> None:
    assert (
        nfkc("\ufb03 \uff21\uff22 \u3316 and \u00bd e\u0301")
        == "ffi AB \u30ad\u30ed\u30e1\u30fc\u30c8\u30eb and 1\u20442 \u00e9"
    )
    assert nfkc("\uff21e\u0301" + "\ufdfa" * 99) == "A\u00e9" + "\ufdfa" * 99


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("gold", "formulas"),
    [
        ("accuracy", FORMULAS),
        *(
            pytest.param(gold, [*FORMULAS, *MORE_FORMULAS], marks=pytest.mark.slow)
            for gold in ("accuracy", "accuracy, a formula", "accuracy, several")
        ),
    ],
)
def test_no_formula_chooses_to_fail_nor_takes_a_second(gold: str, formulas: Sequence[str]) -> None:
    REWARDS[gold]("\\boxed{x+1}")
    check(gold, REWARDS[gold], [f"\\boxed{{{formula}}}" for formula in formulas])


def test_formulas_of_a_completion_share_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Twenty, each of which takes a fifth of a second and so less than all may."""

    def slowly(formula: str, timeout_s: float) -> tuple[Any, ...]:
        end = time.process_time() + 0.2
        within_cpu_s(timeout_s, lambda: next(i for i in iter(int, 1) if time.process_time() > end))
        return (formula,)

    REWARDS["accuracy"]("\\boxed{x+1}")
    monkeypatch.setattr(readings, "parse_formula", slowly)
    check("accuracy", REWARDS["accuracy"], ["\\boxed{" + ", ".join(f"x+{i}" for i in range(20)) + "}"])
