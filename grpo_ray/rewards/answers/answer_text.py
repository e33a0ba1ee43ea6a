r"""Locating the answer in a completion, as text only, without mathematics.

    completion -> after </think>, inside <answer> -> plain characters, no markdown -> #### line | \boxed | "answer is" | tail

Every step is linear in the length of the completion, which is hostile input.
"""

from __future__ import annotations

import re
import unicodedata

from grpo_ray.rewards.answers.answer_tag import answer_of

MAX_VALUE_CHARS = 500
"""The largest number of characters of a value; longer text is prose."""
_MAX_SENTENCES_CHARS = 600
_MAX_PHRASES = 20

# ---- characters

_SYMBOLS = {
    **dict.fromkeys("\u2212\u2012\u2013\u2014\ufe63", "-"),
    **dict.fromkeys("\u00a0\u2007\u2009\u202f\u3000\u2002\u2003\u2005\u2006\u2008\u200a", " "),
    **dict.fromkeys("\u200b\u200c\u200d\u2060\ufeff\u200e\u200f\u00ad", ""),
    **dict.fromkeys("\u2018\u2019", "'"),
    **dict.fromkeys("\u201c\u201d", '"'),
    "\u00d7": r"\times ",
    "\u22c5": r"\cdot ",
    "\u00b7": r"\cdot ",
    "\u00f7": "/",
    "\u2044": "/",
    "\u2215": "/",
    "\u2236": ":",
    "\u03c0": r"\pi ",
    "\u221e": r"\infty ",
    "\u00b0": r"^\circ ",
    "\u00b1": r"\pm ",
    "\u2264": r"\le ",
    "\u2265": r"\ge ",
    "\u2260": r"\ne ",
    "\u2248": r"\approx ",
    "\u222a": r"\cup ",
    "\u2229": r"\cap ",
    "\u2205": r"\emptyset ",
    "\u211d": r"\mathbb{R}",
    "\u2208": r"\in ",
    **dict.fromkeys("\u2713\u2714\u2705", ""),
    "\u066b": ".",
    "\u066c": ",",
    "\u3002": ".",
    "\u3001": ", ",
}
_SUPERSCRIPTS = dict(zip("⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺", "0123456789-+", strict=True))
_SUBSCRIPTS = dict(zip("₀₁₂₃₄₅₆₇₈₉", "0123456789", strict=True))
_NOT_ASCII = re.compile(
    rf"[{''.join(_SUPERSCRIPTS)}]+|[{''.join(_SUBSCRIPTS)}]+|√\s?(\d{{1,50}}|[A-Za-z])?|[^\x00-\x7f]"
)


def plain_characters(text: str) -> str:
    r"""The text with digits, signs and symbols of all scripts as ASCII and LaTeX: `７２` and `٧２` are 72, `x²` is x^{2}."""
    return text if text.isascii() else _NOT_ASCII.sub(_plain, text)


def _plain(match: re.Match[str]) -> str:
    found = match[0]
    char = found[0]
    if char in _SUPERSCRIPTS:
        return "^{" + "".join(_SUPERSCRIPTS[c] for c in found) + "}"
    if char in _SUBSCRIPTS:
        return "_{" + "".join(_SUBSCRIPTS[c] for c in found) + "}"
    if char == "√":
        return rf"\sqrt{{{match[1]}}}" if match[1] else r"\sqrt"
    if char in _SYMBOLS:
        return _SYMBOLS[char]
    if 0xFF01 <= ord(char) <= 0xFF5E:
        return chr(ord(char) - 0xFEE0)
    digit = unicodedata.decimal(char, None)
    if digit is not None:
        return str(digit)
    if unicodedata.category(char) == "No" and "\u2044" in (parts := unicodedata.normalize("NFKC", char)):
        return " " + parts.replace("\u2044", "/")
    return char


# ---- markup

_EMPHASIS = re.compile(r"(?<![\w)}*`])(\*{1,3}|_{1,3}|`{1,3})(?=[^\s*`_])([^*`\n]{0,300}[^\s*`\\])\1(?![\w(*`])")
_FENCE = re.compile(r"^[ \t]{0,3}(?:```|~~~)[^\n`]{0,40}$", re.MULTILINE)
_TAG = re.compile(
    r"</?(?:b|strong|i|em|u|p|br|span|div|code|mark|math|center|answer)(?:\s[^<>\n]{0,100})?/?>|</s>|<\|[^|<>\n]{1,40}\|>",
    re.IGNORECASE,
)
_OPENING = re.compile(r"\\\(|\\\)")
_DISPLAY = re.compile(r"\\\[|\\\]|\\(?:begin|end)\{(?:equation|align|gather|displaymath|math)\*?\}")


_BULLET = re.compile(r"^[ \t]{0,8}(?:[-*+\u2022\u2192\u21d2\u2234]|=?>{1,3}|#{1,6})[ \t]+(?=\S)", re.MULTILINE)


def without_bullets(text: str) -> str:
    """The text without list and quotation marks at the beginnings of its lines: `- 72` is 72."""
    return _BULLET.sub("", text)


def without_markup(text: str) -> str:
    r"""The text without bold, code marks and HTML, with all its formulas in `$` or `$$`."""
    text = _FENCE.sub("", text)
    text = _TAG.sub(" ", text)
    for _ in range(2):
        text = _EMPHASIS.sub(r"\2", text)
    return _DISPLAY.sub("$$", _OPENING.sub("$", text))


_WRAPPED = re.compile(
    r"\$\$(?P<a>[^$]*)\$\$|\$(?P<b>[^$]*)\$|\\\((?P<c>.*)\\\)|\\\[(?P<d>.*)\\\]|`+(?P<e>[^`]*)`+|(?P<m>\*{1,3})(?P<f>[^*]+)(?P=m)"
    r'|"(?P<g>[^"]*)"|<answer>(?P<h>.*)</answer>',
    re.DOTALL,
)
_COMMAND = re.compile(
    r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mathit|mathsf|bf|mbox|hbox|boxed|fbox|operatorname)\s*\{"
)


def unwrap(text: str) -> str:
    r"""The text without wrappers of the whole: `$`, `\text{}`, `\boxed{}`, bold, quotes; without a full stop."""
    if len(text) > 4 * MAX_VALUE_CHARS:
        return text
    for _ in range(8):
        before = text
        text = text.strip().strip("\u200b")
        while text[-1:] in (".", ",", ";", ":") and not text.endswith("\\,"):
            text = text[:-1].rstrip()
        if found := _WRAPPED.fullmatch(text):
            text = next(v for k, v in found.groupdict().items() if k != "m" and v is not None)
        elif (command := _COMMAND.match(text)) and _closing(text, command.end() - 1) == len(text) - 1:
            text = text[command.end() : -1]
        elif text[:1] == "{" and _closing(text, 0) == len(text) - 1:
            text = text[1:-1]
        if text == before:
            break
    return text


def is_text_command(text: str) -> bool:
    r"""Whether the whole text is `\text{..}` or another command for words."""
    text = text.strip().strip("$").strip().rstrip(".").strip()
    command = _COMMAND.match(text)
    return command is not None and _closing(text, command.end() - 1) == len(text) - 1


def _closing(text: str, opening: int) -> int:
    """The index of the brace that closes the one at `opening`; -1 if there is none."""
    depth = 0
    for token in _BRACE.finditer(text, opening):
        if len(token[0]) == 1:
            depth += 1 if token[0] == "{" else -1
            if depth == 0:
                return token.start()
    return -1


_BRACE = re.compile(r"\\\\|\\[{}]|[{}]")

# ---- places

_NUMBER = r"\\?\$?[-+]?\\?\$?\d[\d,]*(?:\.\d+)?(?:\\?%)?"
# The whole rest of the line has to be a number: `#### Step 3` is a heading from a chatty model, not an answer.
_MARKED = re.compile(
    rf"####[ \t]*(?:\*\*|\$|`|\\boxed\{{)*[ \t]*({_NUMBER})[ \t]*(?:\*\*|\$|`|\}}|\.)*[ \t]*$", re.MULTILINE
)
_BOX = re.compile(r"\\\\|\\[{}]|\\f?boxed\s{0,3}\{|\\f?boxed\s{1,3}(?=[-\w])|[{}]")
_BARE_BOX = re.compile(r"-?\d[\d.,/]{0,30}|[A-Za-z](?![A-Za-z])")
_BETWEEN_BOXES = re.compile(r"[\s$.]{0,10}(?:,|;|,?\s{0,3}and|,?\s{0,3}or)[\s$]{0,10}", re.IGNORECASE)
_PHRASE = re.compile(
    r"\banswers?\b|\bANSWERS?\b|答案|答え|정답|\b(?:antwort|lösung|respuesta|réponse|risposta|resposta|ответ)\b",
    re.IGNORECASE,
)
_IS = re.compile(
    r"(?:\s{0,3}\([^()\n]{0,60}\))?"
    r"(?:\s+(?:to|of|for|in|on)\b[^.:\n=$]{0,120}?(?=\s(?:is|are|was|equals)\b|:))?"
    r"[\s\"'*_`]{0,9}(?::|=|\bis\b|\bare\b|\bwas\b|\b(?:would|should|must|will|can|has to) be\b|\bequals?\b|\bist\b|\bes\b|\best\b"
    r"|\bé\b|\bè\b|是|为|は|은|는)"
    r"(?:[\s\"'*_`:=-]{0,9}?(?:\b(?:equal to|given by|therefore|thus|then|hence|simply|just|also|indeed|exactly|still|"
    r"now|clearly|(?:the )?(?:option|choice|number|value))\b|[:=\"'`_]|\*+))*\s{0,9}",
    re.IGNORECASE,
)
_NEGATED = re.compile(
    r"\s{0,3}(?:\w+\s+){0,2}(?:not|isn't|wasn't|can't|cannot|couldn't|never)\b|\s{0,3}is\s?n't\b", re.IGNORECASE
)
_SENTENCE_END = re.compile(r"(?<!\\)[.!?](?=\s|$)")


def final_text(completion: str) -> str:
    """The text of a completion that counts: after `</think>`, in the last `<answer>`, which a stop string may have cut off."""
    text = completion.rpartition("</think>")[2]
    found = answer_of(text)
    if "</answer>" not in text and "<answer>" in text:
        found = text.rpartition("<answer>")[2].strip()
    return found


def marked_number(text: str) -> str | None:
    """The number of the last line `#### 1,234`; None if there is no such line."""
    found = _MARKED.findall(text)
    return found[-1] if found else None


def last_box(text: str) -> str | None:
    r"""The content of the last non-empty `\boxed{..}`; None if there is none.

    Boxes separated only by a comma, `and` or `or` are one answer.
    """
    boxes: list[tuple[int, int, str]] = []
    opened: list[int | None] = []
    starts: list[int] = []
    for token in _BOX.finditer(text):
        found = token[0]
        if found in ("\\\\", "\\{", "\\}"):
            continue
        if found == "}":
            if opened and (inside := opened.pop()) is not None:
                start = starts.pop()
                # The outer one of two closes later and contains the inner one.
                while boxes and boxes[-1][0] > start:
                    boxes.pop()
                if (content := text[inside : token.start()].strip()) and len(content) <= MAX_VALUE_CHARS * 4:
                    boxes.append((start, token.end(), content))
        elif found == "{":
            opened.append(None)
        elif found.endswith("{"):
            opened.append(token.end())
            starts.append(token.start())
        elif bare := _BARE_BOX.match(text, token.end()):
            boxes.append((token.start(), bare.end(), bare[0]))
    if not boxes:
        return None
    first, _, content = boxes.pop()
    while boxes and _BETWEEN_BOXES.fullmatch(text, boxes[-1][1], first):
        first, _, before = boxes.pop()
        content = f"{before} , {content}"
    return content


def ends_in_a_cut_box(text: str) -> bool:
    r"""Whether the last `\boxed{` is never closed: its beginning, `\boxed{7`, may not be all of it."""
    _, box, inside = text.rpartition("\\boxed{")
    return bool(box) and "}" not in inside


def phrases(text: str) -> list[str]:
    """The text after each `the answer is`, `Answer:` and the like, to the end of its line; the last one first."""
    places = [m.end() for m in _PHRASE.finditer(text)][-_MAX_PHRASES:]
    found = []
    for end in reversed(places):
        after = text[end : end + 2 * _MAX_SENTENCES_CHARS]
        if _NEGATED.match(after):
            continue
        found_is = _IS.match(after)
        said = after[found_is.end() :] if found_is else after[:50]
        said = said.strip("\n :*_`\"'") if found_is else said
        line = said.partition("\n\n")[0] if said.lstrip().startswith("$$") else said.partition("\n")[0]
        if line.strip() and (found_is or re.search(r"[\d$\\]", line)):
            found.append(line.strip())
    return found


def last_sentences(text: str) -> list[str]:
    """The sentences at the end of a text that may hold a value, the last one first."""
    place = max((m for m in (text.rfind(c) for c in "0123456789$") if m >= 0), default=-1)
    if place < 0:
        return []
    end = text.find("\n", place + 1)
    tail = text[max(0, place - _MAX_SENTENCES_CHARS) : place + _MAX_SENTENCES_CHARS if end < 0 else end]
    if tail.rstrip().endswith("$$"):
        return [tail]
    line = tail.rpartition("\n")[2]
    return list(reversed(sentences(line)))


def sentences(line: str) -> list[str]:
    """The sentences of a line, without their full stops."""
    return [s.strip() for s in _SENTENCE_END.split(line) if s.strip()]
