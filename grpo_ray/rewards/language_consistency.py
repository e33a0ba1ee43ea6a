"""The reward for reasoning in the language of the prompt.

A word is what a reader would call one: letters between other signs. In a script without spaces (Chinese, Japanese, Thai) each
character is one. Numbers, single letters (`x`), LaTeX commands, tags and code blocks are no words.

The script decides a word's language, and among languages that share one, simplemma's dictionary:

    another script than the target's                      no
    the target has no dictionary (zh, ja, ko, th, ..)     yes
    the target's dictionary does not know it              no
    it does, and none of `others` does                    yes
    both know it (`die`, `in`, `also`)                    as the nearest unambiguous word, yes if there is none

The rule uses dictionaries, since a single word is too short for a statistical identifier: py3langid identifies `so the sum is` as
German, Lingua `is` as French.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import groupby
from typing import Any

from grpo_ray.data.plain_text import nfkc
from grpo_ray.errors import RewardError
from grpo_ray.rewards.answers.parts import Part, part_of
from grpo_ray.rewards.functions.function import Completions, text_of

_NO_WORDS = re.compile(r"```.*?(?:```|$)|\\[A-Za-z]+|</?[A-Za-z_]+>", re.DOTALL)
_UNSPACED = frozenset({"CJK", "HIRAGANA", "KATAKANA", "BOPOMOFO", "THAI", "LAO", "KHMER", "MYANMAR"})
_BY_SCRIPT_ALONE = {
    "zh": frozenset({"CJK", "BOPOMOFO"}),
    "ja": frozenset({"CJK", "HIRAGANA", "KATAKANA"}),
    "ko": frozenset({"HANGUL"}),
    "th": frozenset({"THAI"}),
    "am": frozenset({"ETHIOPIC"}),
    "bn": frozenset({"BENGALI"}),
    "gu": frozenset({"GUJARATI"}),
    "km": frozenset({"KHMER"}),
    "kn": frozenset({"KANNADA"}),
    "lo": frozenset({"LAO"}),
    "my": frozenset({"MYANMAR"}),
    "pa": frozenset({"GURMUKHI"}),
    "si": frozenset({"SINHALA"}),
    "ta": frozenset({"TAMIL"}),
    "te": frozenset({"TELUGU"}),
    # These share theirs with languages that they can't be distinguished from: Hindi; Arabic and Persian.
    "mr": frozenset({"DEVANAGARI"}),
    "ne": frozenset({"DEVANAGARI"}),
    "ur": frozenset({"ARABIC"}),
}
_SCRIPTS = {
    **_BY_SCRIPT_ALONE,
    **dict.fromkeys(("bg", "mk", "ru", "uk"), frozenset({"CYRILLIC"})),
    **dict.fromkeys(("el", "grc"), frozenset({"GREEK"})),
    "hbs": frozenset({"LATIN", "CYRILLIC"}),
    "ar": frozenset({"ARABIC"}),
    "fa": frozenset({"ARABIC"}),
    "he": frozenset({"HEBREW"}),
    "hi": frozenset({"DEVANAGARI"}),
    "hy": frozenset({"ARMENIAN"}),
    "ka": frozenset({"GEORGIAN"}),
    "ml": frozenset({"MALAYALAM"}),
}
_LATIN = frozenset({"LATIN"})


def language_consistency(
    completions: Completions,
    language: str | list[str],
    others: Sequence[str] = ("en",),
    part: Part = "reasoning",
) -> list[float | None]:
    """Words of the target language / all words of the reasoning; None for one without words. See the module docstring for the rule.

    `language` is a column, or one for all in `args`: `en`, `de`, `zh`, .. (ISO 639-1). `others` are the languages that might be
    mixed in; only those that share the target's script matter.

    Range [0, 1]. Source: DeepSeek-R1 (2501.12948), section 2.3.2.

    Raises:
        RewardError: a language is unknown.
    """
    languages = [language] * len(completions) if isinstance(language, str) else language
    return [
        _share(part_of(text_of(c), part), target, tuple(others))
        for c, target in zip(completions, languages, strict=True)
    ]


def check_languages(args: dict[str, Any]) -> None:
    """Check that the languages in `args` are known; `language` is one if it is given there."""
    if "language" in args:
        _check(args["language"])
    for name in _languages(args):
        _check(name)


def load_dictionaries(args: dict[str, Any]) -> None:
    """Load the dictionaries, a second or two each, which would otherwise count against the first sample's deadline."""
    for name in _languages(args):
        if name not in _BY_SCRIPT_ALONE:
            _knows("a", name)


def _languages(args: dict[str, Any]) -> set[str]:
    language = args.get("language")
    return {*args.get("others", ("en",)), *([language] if isinstance(language, str) else [])}


def words_of(text: str) -> list[str]:
    """The words of a text in order; see the module docstring for what counts."""
    plain = _NO_WORDS.sub(" ", nfkc(text))
    return [word for run in _runs(plain) for word in (run if script_of(run) in _UNSPACED else [run] * (len(run) > 1))]


def _runs(text: str) -> Iterator[str]:
    """Runs of letters of one script, with their marks and inner apostrophes (`don't`)."""
    for script, places in groupby(enumerate(_scripts(text)), key=lambda place: place[1]):
        if script:
            yield "".join(text[i] for i, _ in places)


def _scripts(text: str) -> Iterator[str]:
    """The script of each sign; marks and apostrophes have that of the letter before them, "" means no word."""
    before = ""
    for place, sign in enumerate(text):
        if sign in "'\u2019":
            within = 0 < place < len(text) - 1 and text[place - 1].isalpha() and text[place + 1].isalpha()
            before = script_of(text[place - 1]) if within else ""
        elif unicodedata.category(sign)[0] != "M":
            before = script_of(sign) if sign.isalpha() else ""
        yield before


@lru_cache(maxsize=1 << 16)
def _script_of(sign: str) -> str:
    return unicodedata.name(sign, "?").split()[0]


def script_of(word: str) -> str:
    """The script of a word's first letter: `LATIN`, `CJK`, ..."""
    return _script_of(word[0])


def _share(text: str, target: str, others: tuple[str, ...]) -> float | None:
    words = words_of(text)
    if not words:
        return None
    _check(target)
    told = [_is_of(word, target, others) for word in words]
    return sum(_settle(told)) / len(words)


def _is_of(word: str, target: str, others: tuple[str, ...]) -> bool | None:
    """Whether a word is of the target language; None if it can be of several."""
    script = script_of(word)
    if script not in _SCRIPTS.get(target, _LATIN):
        return False
    if target in _BY_SCRIPT_ALONE:
        return True
    if not _knows(word, target):
        return False
    rivals = [o for o in others if o != target and o not in _BY_SCRIPT_ALONE and script in _SCRIPTS.get(o, _LATIN)]
    return None if any(_knows(word, rival) for rival in rivals) else True


def _settle(told: Sequence[bool | None]) -> list[bool]:
    """The decisions with each None replaced by the nearest other one; of two at the same distance, the one before."""
    known = [i for i, value in enumerate(told) if value is not None]
    if not known:
        return [True] * len(told)
    out, n = [], 0
    for i, value in enumerate(told):
        while n + 1 < len(known) and abs(known[n + 1] - i) < abs(known[n] - i):
            n += 1
        out.append(bool(told[known[n]]) if value is None else value)
    return out


@lru_cache(maxsize=1 << 16)
def _knows(word: str, language: str) -> bool:
    from simplemma import is_known

    return is_known(word.replace("\u2019", "'"), lang=language)


def _check(language: object) -> None:
    if not isinstance(language, str) or language not in _supported():
        raise RewardError(
            f"reward 'language_consistency': no language {language!r:.60}; known are {', '.join(sorted(_supported()))}"
        )


@lru_cache(maxsize=1)
def _supported() -> frozenset[str]:
    from simplemma.strategies.dictionaries.dictionary_factory import SUPPORTED_LANGUAGES

    return frozenset(SUPPORTED_LANGUAGES) | frozenset(_BY_SCRIPT_ALONE)
