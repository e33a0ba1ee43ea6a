"""Instructions whose keeping can be checked, in IFEval's words (2311.07911): its data sets, and those like it, work as they are.

A row says which by two columns: `instruction_id_list`, e.g. [length_constraints:number_words], and `kwargs`, one dict each, e.g.
[{num_words: 100, relation: at least}]. IFEval's own checker is a script over nltk, which downloads its data, and langdetect,
which is random; so the table is here. Words and sentences are told apart by plain rules, languages by `language_consistency`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from typing import Any

from grpo_ray.errors import RewardError
from grpo_ray.rewards.function import Completions, Conversation, text_of
from grpo_ray.rewards.language_consistency import language_consistency

_WORD = re.compile(r"\w+(?:['\u2019-]\w+)*")
_SENTENCE_END = re.compile(r"[.!?\u3002\uff01\uff1f]+(?=\s|$)|[\u3002\uff01\uff1f]")
_FENCE = re.compile(r"^```\w*\n(.*?)\n?```$", re.DOTALL)
_RIGHT_LANGUAGE = 0.9
"""Words of the asked language, from which a text counts as written in it: names and quotations may be others."""
_ANSWERS = ("My answer is yes.", "My answer is no.", "My answer is maybe.")


def instructions(
    completions: Completions,
    instruction_id_list: list[Sequence[str]],
    kwargs: list[Sequence[dict[str, Any] | None]],
    prompts: Completions,
    strict: bool = False,
) -> list[float | None]:
    """The part of the row's instructions that the completion keeps; `strict`: 1 if it keeps all, else 0. None without any.

    An empty completion keeps none. Use it with `part: summary` for models that think first.

    Range [0, 1]; strict: {0, 1}. Source: IFEval (2311.07911), its 25 instructions, prompt-level strict accuracy.

    Raises:
        RewardError: an instruction that is not known, or lacks an argument.
    """
    rows = zip(completions, prompts, instruction_id_list, kwargs, strict=True)
    return [_score(text_of(c).strip(), p, ids, args, strict) for c, p, ids, args in rows]


def _score(
    text: str,
    prompt: str | Conversation,
    ids: Sequence[str],
    arguments: Sequence[dict[str, Any] | None],
    strict: bool,
) -> float | None:
    if not ids:
        return None
    if len(ids) != len(arguments):
        raise RewardError(
            f"reward 'instructions': {len(ids)} instructions and {len(arguments)} kwargs; expected as many"
        )
    kept = [bool(text) and _keeps(text, id, args or {}, prompt) for id, args in zip(ids, arguments, strict=True)]
    return float(all(kept)) if strict else sum(kept) / len(kept)


def _keeps(text: str, id: str, arguments: dict[str, Any], prompt: str | Conversation) -> bool:
    check = CHECKS.get(id)
    if check is None:
        raise RewardError(f"reward 'instructions': no instruction {id!r}; known are {', '.join(CHECKS)}")
    # Arrow gives every row the arguments of all instructions, most of them null.
    given = {name: value for name, value in arguments.items() if value is not None}
    if id == "combination:repeat_prompt" and "prompt_to_repeat" not in given:
        given["prompt_to_repeat"] = prompt if isinstance(prompt, str) else prompt[-1]["content"]
    try:
        return check(text, given)
    except KeyError as e:
        raise RewardError(f"reward 'instructions': {id} lacks its argument {e.args[0]!r}; it has {given}") from None


def _compare(count: int, wanted: int, arguments: dict[str, Any], name: str = "relation") -> bool:
    match arguments.get(name, "at least"):
        case "at least":
            return count >= wanted
        case "at most":
            return count <= wanted
        case "less than":
            return count < wanted
        case other:
            raise RewardError(f"reward 'instructions': {name} is {other!r}, expected at least, at most or less than")


def _count(phrase: str, text: str) -> int:
    return len(re.findall(rf"(?<!\w){re.escape(phrase)}(?!\w)", text, re.IGNORECASE))


def _paragraphs(text: str, cut: str) -> list[str]:
    return [p for part in re.split(cut, text) if (p := part.strip())]


def _first_word(text: str, a: dict[str, Any]) -> bool:
    paragraphs = _paragraphs(text, r"\n\s*\n")
    place = int(a["nth_paragraph"])
    if len(paragraphs) != int(a["num_paragraphs"]) or not 1 <= place <= len(paragraphs):
        return False
    first = _WORD.search(paragraphs[place - 1])
    return first is not None and first[0].casefold() == str(a["first_word"]).casefold()


def _is_json(text: str, a: dict[str, Any]) -> bool:
    fenced = _FENCE.match(text)
    try:
        json.loads(fenced[1] if fenced else text)
    except (ValueError, RecursionError):
        return False
    return True


def _highlights(text: str) -> int:
    bold = re.findall(r"\*\*([^*\n]+)\*\*", text)
    plain = re.findall(r"(?<!\*)\*([^*\n]+)\*(?!\*)", text)
    return sum(bool(found.strip()) for found in bold + plain)


def _two_responses(text: str, a: dict[str, Any]) -> bool:
    parts = [p for part in text.split("******") if (p := part.strip())]
    return len(parts) == 2 and parts[0] != parts[1]


def _is_of_language(text: str, a: dict[str, Any]) -> bool:
    (share,) = language_consistency([text], str(a["language"]), part="all")
    return share is not None and share >= _RIGHT_LANGUAGE


def _of_english(text: str, case: str) -> bool:
    (share,) = language_consistency([text.lower()], "en", others=(), part="all")
    return (
        text == (text.upper() if case == "upper" else text.lower()) and share is not None and share >= _RIGHT_LANGUAGE
    )


CHECKS: dict[str, Callable[[str, dict[str, Any]], bool]] = {
    "keywords:existence": lambda t, a: all(_count(k, t) for k in a["keywords"]),
    "keywords:forbidden_words": lambda t, a: not any(_count(k, t) for k in a["forbidden_words"]),
    "keywords:frequency": lambda t, a: _compare(_count(a["keyword"], t), int(a["frequency"]), a),
    "keywords:letter_frequency": lambda t, a: _compare(
        t.casefold().count(str(a["letter"]).casefold()), int(a["let_frequency"]), a, "let_relation"
    ),
    "language:response_language": _is_of_language,
    "length_constraints:number_words": lambda t, a: _compare(len(_WORD.findall(t)), int(a["num_words"]), a),
    "length_constraints:number_sentences": lambda t, a: _compare(
        len([s for s in _SENTENCE_END.split(t) if s.strip()]), int(a["num_sentences"]), a
    ),
    "length_constraints:number_paragraphs": lambda t, a: (
        len(_paragraphs(t, r"\s?\*\*\*\s?")) == int(a["num_paragraphs"])
    ),
    "length_constraints:nth_paragraph_first_word": _first_word,
    "detectable_content:number_placeholders": lambda t, a: (
        len(re.findall(r"\[[^\[\]]*\]", t)) >= int(a["num_placeholders"])
    ),
    "detectable_content:postscript": lambda t, a: (
        re.search(rf"^\s*{re.escape(a['postscript_marker'])}", t, re.IGNORECASE | re.MULTILINE) is not None
    ),
    "detectable_format:number_bullet_lists": lambda t, a: (
        len(re.findall(r"^\s*(?:\*(?!\*)|-)\s*\S", t, re.MULTILINE)) == int(a["num_bullets"])
    ),
    "detectable_format:constrained_response": lambda t, a: any(answer in t for answer in _ANSWERS),
    "detectable_format:number_highlighted_sections": lambda t, a: _highlights(t) >= int(a["num_highlights"]),
    "detectable_format:multiple_sections": lambda t, a: (
        len(re.findall(rf"(?:^|\s){re.escape(a['section_spliter'])}\s?\d+", t)) >= int(a["num_sections"])
    ),
    "detectable_format:json_format": _is_json,
    "detectable_format:title": lambda t, a: re.search(r"<<[^\n<>]*\S[^\n<>]*>>", t) is not None,
    "combination:two_responses": _two_responses,
    "combination:repeat_prompt": lambda t, a: t.casefold().startswith(a["prompt_to_repeat"].strip().casefold()),
    "startend:end_checker": lambda t, a: t.strip('"').rstrip().casefold().endswith(a["end_phrase"].strip().casefold()),
    "startend:quotation": lambda t, a: len(t) > 1 and t[0] == t[-1] == '"',
    "change_case:capital_word_frequency": lambda t, a: _compare(
        sum(w.isupper() for w in _WORD.findall(t)), int(a["capital_frequency"]), a, "capital_relation"
    ),
    "change_case:english_capital": lambda t, a: _of_english(t, "upper"),
    "change_case:english_lowercase": lambda t, a: _of_english(t, "lower"),
    "punctuation:no_comma": lambda t, a: "," not in t,
}
