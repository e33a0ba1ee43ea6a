"""Rewards and filters read what a model wrote: 32,000 signs in the worst order take none of them more than a second."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest

from grpo_ray.filters.config import FilterConfig
from grpo_ray.filters.trace import Trace, first_fault, foreign, loops, repeated
from grpo_ray.rewards.code import find_program
from grpo_ray.rewards.countdown import countdown
from grpo_ray.rewards.exact_match import exact_match
from grpo_ray.rewards.instruction_checks import CHECKS
from grpo_ray.rewards.instructions import instructions
from grpo_ray.rewards.language_consistency import language_consistency
from grpo_ray.rewards.parts import part_of
from grpo_ray.rewards.r1_format import r1_format
from grpo_ray.rewards.repetition_penalty import repetition_penalty
from grpo_ray.rewards.soft_overlong import soft_overlong
from grpo_ray.rewards.think_format import think_format
from grpo_ray.rewards.votes import text_votes

SIZE = 32_000
PIECES = [
    *(".", " ", "*", "<", ">", "[", "]", "-", "\n", "`", "$", "#", "=", '"', "'", "1", "a", "A", "\\", "(", ",", "\t"),
    *(
        "* ",
        "\n*",
        "\n-",
        "- \n",
        "<<",
        "<<a",
        "[a",
        "**a",
        "\\(",
        "\\[",
        "\\a",
        "$a",
        "```",
        "```\n",
        "a. ",
        "A.",
        "?!",
    ),
    *(
        "a\n",
        "a\n\n",
        "\n\n",
        "***",
        "******",
        " ***",
        "<think>",
        "</think>",
        "<answer>",
        "</answer>",
        "</think><answer>",
    ),
    *(
        "<a",
        "a'",
        "Section ",
        "P.",
        "p. ",
        "\u4e2d",
        "\u3002",
        "\u0301",
        "\u0315\u0300",
        "\ufdfa",
        "\u200b",
        "don't ",
        "1+",
    ),
]
ENDS = [("", ""), ("<think>", ""), ("<think>", "</answer>"), ("```", "x"), ("", "\n\\("), ("<<", ">"), ("a ", " b")]
TEXTS = [before + (piece * SIZE)[:SIZE] + after for piece in PIECES for before, after in ENDS]
FEW_TEXTS = [
    (piece * SIZE)[:SIZE]
    for piece in ("\\(", "\\[a", "$a ", "`", "```\n", "<a", "a'", "\n", "\u0301", "\u0315\u0300", "\u4e2d", "x. ")
]
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
PLAIN = [id for id in CHECKS if id not in LIBRARIES]
FILTER = FilterConfig(max_foreign_words=1.0, max_loop=None, max_repeated=None, code_blocks=True)


def judged(text: str, form: Any) -> str | None:
    return first_fault(Trace("How?", text, "stop", 9, {}), FILTER.model_copy(update={"form": form}))


READERS: dict[str, Callable[[str], Any]] = {
    "r1_format": lambda t: r1_format([t]),
    "r1_format, prefilled": lambda t: r1_format([t], prefilled=True),
    "think_format": lambda t: think_format([t]),
    "countdown": lambda t: countdown([t], [1], [[1]]),
    "exact_match": lambda t: exact_match([t], ["a"]),
    "find_program": lambda t: find_program(t, ("python", "py")),
    "language_consistency": lambda t: language_consistency([t], "zh", part="all"),
    "part_of": lambda t: (part_of(t, "reasoning"), part_of(t, "summary")),
    "text_votes": lambda t: text_votes([t, t]),
    "repetition_penalty": lambda t: repetition_penalty([[ord(c) for c in t]], ngram_size=40),
    "soft_overlong": lambda t: soft_overlong([[0] * len(t)], 100, 10),
    "filter of r1": lambda t: judged(t, "r1"),
    "filter of think": lambda t: judged(t, "think"),
    "foreign": lambda t: foreign("How?", t),
    "loops": lambda t: loops(t, 4),
    "repeated": lambda t: repeated(t, 6),
    "instructions": lambda t: instructions([t], [PLAIN], [[ARGUMENTS.get(id) for id in PLAIN]], [""]),
}


COUNTERS = ("language_consistency", "foreign", "loops", "repeated", "repetition_penalty", "soft_overlong")
"""They look at each sign or word: slower, and with less to go wrong."""


@pytest.mark.timeout(300)
@pytest.mark.parametrize("reader", READERS)
def test_no_text_takes_a_second(reader: str) -> None:
    whole = TEXTS if reader != "instructions" else TEXTS[:: len(ENDS)]
    for text in FEW_TEXTS if reader in COUNTERS else whole:
        start = time.process_time()
        READERS[reader](text)
        assert time.process_time() - start < 5, f"{text[:20]!r} .. {text[-9:]!r}"


@pytest.mark.timeout(300)
@pytest.mark.parametrize("id", LIBRARIES)
def test_libraries_take_time_in_proportion_to_the_text(id: str) -> None:
    CHECKS[id]("A text.", **LIBRARIES[id])
    for text in [
        piece * (SIZE // len(piece))
        for piece in (". ", "a. ", "A.", "..  ", "?!", '"', "(", "\n", "\u0315\u0300", "a@")
    ]:
        start = time.process_time()
        CHECKS[id](text, **LIBRARIES[id])
        assert time.process_time() - start < 15, f"{text[:20]!r}"


def test_tags_within_tags_are_no_form() -> None:
    start = time.process_time()
    assert r1_format(
        ["<think>" + "</think><answer>" * 8_000, "<think>" + "</think> <answer>" * 8_000 + "</answer>"]
    ) == [0.0, 0.0]
    assert time.process_time() - start < 5
