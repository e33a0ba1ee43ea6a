"""Check of one sampled answer against the filters: the reason why it is not kept, or None."""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass
from typing import Any

from grpo_ray.data.thinking import begun, opens_thinking
from grpo_ray.datagen.filters.config import FilterConfig
from grpo_ray.rewards.answers.parts import part_of
from grpo_ray.rewards.language_consistency import script_of, words_of
from grpo_ray.rewards.r1_format import match_r1
from grpo_ray.types import ScoreStatus

_THINK = re.compile(r"\s*<think>.*?</think>(?P<answer>.*)", re.DOTALL)
_FORMULA_START = re.compile(r"\$|\\[(\[]|```|\\[a-zA-Z]+")
_FORMULA_ENDS = {"$": "$", r"\(": r"\)", r"\[": r"\]", "```": "```"}
_UNSPACED_RANGES = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff"
_WORD = re.compile(rf"[{_UNSPACED_RANGES}]|[^\W{_UNSPACED_RANGES}]+|[^\w\s]")
LOOP_CHARS = 2000
"""The number of characters at the end that are searched for a repeated piece."""
MIN_LOOP_CHARS = 24
"""The least length of a repeated piece; a shorter tail (`...`, `=====`) is no loop."""
MIN_LINE_CHARS = 8
MIN_FOREIGN = 2


@dataclass(frozen=True)
class Trace:
    """The properties of an answer that the filters check."""

    prompt: str
    completion: str
    finish_reason: str
    num_tokens: int
    scores: dict[str, tuple[str, float | None]]
    """The (status, value) by reward function."""


def trace_of(row: dict[str, Any]) -> Trace:
    """The trace of a row of `read_samples`."""
    return Trace(
        prompt="\n".join(str(m["content"]) for m in row["messages"]),
        completion=completion_of(row),
        finish_reason=row["finish_reason"],
        num_tokens=num_sampled_of(row),
        scores={part["name"]: (part["status"], part["value"]) for part in row["rewards"]},
    )


def num_sampled_of(row: dict[str, Any]) -> int:
    """The number of tokens that the model wrote; files of earlier versions have no column for it, and nothing else in an answer."""
    known = row.get("num_sampled")
    return len(row["completion_ids"]) if known is None else int(known)


def completion_of(row: dict[str, Any]) -> str:
    """The completion of a row of `read_samples`; it starts with `<think>` also where the prompt's template wrote that."""
    completion: str = row["completion"]
    return begun(completion) if opens_thinking(row["prompt"]) else completion


def first_fault(trace: Trace, config: FilterConfig) -> str | None:
    """The reason why this answer is not kept, in a word or two that reports count by; None if it is kept."""
    if config.finished and trace.finish_reason != "stop":
        return "cut off"
    if (wrong := _score_fault(trace, config)) is not None:
        return wrong
    reasoning = part_of(trace.completion, "reasoning")
    if config.form is not None and not _has_form(trace.completion, config.form):
        return "form"
    if len(reasoning.strip()) < config.min_reasoning_chars:
        return "too short"
    if config.max_tokens is not None and trace.num_tokens > config.max_tokens:
        return "too long"
    if not config.code_blocks and "```" in reasoning:
        return "code block"
    if config.max_foreign_words is not None and foreign(trace.prompt, trace.completion) > config.max_foreign_words:
        return "mixed scripts"
    if config.max_loop is not None and loops(reasoning, config.max_loop):
        return "loop"
    if config.max_repeated is not None and repeated(reasoning, config.repeat_ngram) > config.max_repeated:
        return "repetition"
    limit = config.max_paragraph_chars
    if limit is not None and any(len(line) > limit for line in reasoning.splitlines()):
        return "long paragraph"
    return None


def _score_fault(trace: Trace, config: FilterConfig) -> str | None:
    for name, least in config.min_scores.items():
        status, value = trace.scores.get(name, ("missing", None))
        if status == ScoreStatus.NOT_APPLICABLE:
            continue
        if value is None:
            return f"{name}: {status}"
        if value < least:
            return name
    return None


def _has_form(completion: str, form: str) -> bool:
    """Whether the completion has this form and its answer is not empty, which the rewards of these forms do not check."""
    if form == "r1":
        found = match_r1(completion)
        return found is not None and bool(found["answer"].strip())
    once = completion.count("<think>") == completion.count("</think>") == 1
    thought = _THINK.fullmatch(completion) if once else None
    return thought is not None and bool(thought["answer"].strip())


def foreign(prompt: str, completion: str) -> float:
    """The fraction of the completion's words in another script than most of the prompt's; formulas, code and single letters are
    no words, and a word of the prompt is never foreign. In scripts without spaces each character is a word."""
    asked = words_by_script(prompt)
    said = words_by_script(completion)
    home = max(asked, key=lambda script: len(asked[script]), default="")
    known = {word.lower() for words in asked.values() for word in words}
    total = sum(len(words) for words in said.values())
    strange = sum(word.lower() not in known for script, words in said.items() if script != home for word in words)
    return strange / total if home and strange >= MIN_FOREIGN else 0.0


def words_by_script(text: str) -> dict[str, list[str]]:
    """Words by script: `LATIN`, `CJK`, `CYRILLIC`, ..; kana counts as CJK, since Japanese is written with both."""
    out: dict[str, list[str]] = {}
    for word in words_of(without_formulas(text)):
        script = script_of(word)
        out.setdefault("CJK" if script in ("HIRAGANA", "KATAKANA") else script, []).append(word)
    return out


def without_formulas(text: str) -> str:
    """The text with a space in place of each formula, LaTeX command and code block; an unclosed mark stays."""
    kept, at, search_from = [], 0, 0
    unclosed: set[str] = set()
    while start := _FORMULA_START.search(text, search_from):
        mark = start[0]
        closing = _FORMULA_ENDS.get(mark)
        end = -1 if mark in unclosed else start.end() if closing is None else text.find(closing, start.end())
        if end < 0:
            unclosed.add(mark)
            search_from = start.start() + 1
            continue
        kept += [text[at : start.start()], " "]
        at = search_from = end + len(closing or "")
    return "".join([*kept, text[at:]])


def repeated(text: str, n: int) -> float:
    """The fraction of the runs of n words that occurred before; signs are words, as are characters of scripts without spaces."""
    words = _WORD.findall(text.lower())
    runs = list(zip(*(words[i:] for i in range(n)), strict=False))
    return 1 - len(set(runs)) / len(runs) if runs else 0.0


def loops(text: str, limit: int) -> bool:
    """Whether the same line, or the same piece of text at the end, occurs more than `limit` times in a row."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    run = 1
    for before, line in itertools.pairwise(lines):
        run = run + 1 if line == before and len(line) >= MIN_LINE_CHARS else 1
        if run > limit:
            return True
    end = " " + " ".join(text[-LOOP_CHARS:].split())
    return any(_ends_with_copies(end, period, limit + 1) for period in range(1, len(end) // (limit + 1) + 1))


def _ends_with_copies(text: str, period: int, copies: int) -> bool:
    size = period * copies
    if size < MIN_LOOP_CHARS:
        copies = -(-MIN_LOOP_CHARS // period)
        size = period * copies
    piece = text[-period:]
    # Digits and dashes in a row are a number, or a line.
    return len(text) >= size and any(c.isalpha() for c in piece) and text[-size:] == piece * copies
