"""What a model may write to be scored: pieces that are repeated without end, brackets inside brackets, numbers, formulas."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator

SIZE = 32_000
"""Characters of the longest completions."""


def _one_of_each_kind() -> list[str]:
    """A character of each of Unicode's categories and directions."""
    found: dict[tuple[str, str], str] = {}
    for code in (
        *range(0x3000),
        *range(0xA000, 0xA100),
        *range(0xD7F0, 0xE010),
        *range(0xFB00, 0x10000),
        0x1F600,
        0x10FFFF,
    ):
        char = chr(code)
        found.setdefault((unicodedata.category(char), unicodedata.bidirectional(char)), char)
    return list(found.values())


CHARACTERS = sorted(
    {*map(chr, range(128)), *_one_of_each_kind(), *"\u0301\ufdfa\u4e2d\u3002\u06dd\u0345\u0130\ufb03\u2044\u221a\uff11"}
)
PIECES = [
    "* ", "\n*", "\n-", "- \n", "\n- ", "\n> ", "\n# ", "<<", "<<a", ">>", "[a", "]a", "[]", "**a", "\\(", "\\)", "\\(a",
    "\\[", "\\]", "\\a", "$a", "$a$", "$1", "$$", "$ ", "\n$", "```", "```\n", "```a\n", "\n```", "a. ", "A.", "A. ", "?!",
    "..  ", "a\n", "a\n\n", "\n\n", "\n \n", "***", "******", " ***", "*** ", "<a", "</", "a'", "'a", "don't ", "Section ",
    "Section 1", "P.", "p. ", "p.p.", "P.S.", "p.\n", "1+", "1-", "-1", "1*", "1/", "1,", "1,2", "1.", "1.1", "1 ", "1 1/1 ",
    "1,000", "1,000,", "1e", "1e9", "1e999", "0x", "0xF", "10**", "9^", "9^{", "2^2^", "\\frac", "\\frac{", "\\frac{1}{",
    "\\frac12", "\\sqrt", "\\sqrt{", "sqrt(", "\\boxed", "\\boxed{", "\\boxed{1}", "\\boxed{}", "\\boxed 1",
    "\\boxed{1} and ", "{}", "\\{", "\\left(", "(1", "(1,", "[1,", "x=", "x = ", "=1", "= ", "a=b=", "the answer is ",
    "answer ", "answer: ", "answer is not ", "answer (", "answer is **", "A or ", "A, ", "(A) ", "option A ", "A is correct ",
    "and ", "1 or ", "1, and ", "#### ", "#### 1", "#### 1\n", "\\text{", "\\text{a}", "\\text{and}", "\\quad", "\\begin{",
    "\\begin{equation}", '\\\\', "\\$", "50%", "$5 ", "5 cm ", "so ", "because ", "\\approx", "\\times 10^{", "{,}", "\\,",
    "1\\,000", "1 000 ", "1'000'", "1_000_", "a_{", "a^{", "~~~\n", "_a_", "__a__", "*a*", "**a**", "`a`", "<b>", "<b ", "<|",
    "<|a|>", '"a"', '{"a":', '["a",', "\\u", "\\ud800", "eval(", "lambda:", "not ", "--", "+-", "a.", "a@", 'f"{', "yield ",
    "0b1", "1j", "1if", "'''", "\u0315\u0300", "\u1100\u1161", "I. ", "\u202e\u05d0", "<think>", "</think>", "<answer>",
    "</answer>", "<answer></answer>", "</think><answer>", "</think> <answer>", "<think></think>",
]  # fmt: skip
AROUND = [
    *(
        ("", ""),
        ("<think>", ""),
        ("<think>", "</answer>"),
        ("<think>a</think><answer>", "</answer>"),
        ("\\boxed{", "}"),
    ),
    *(
        ("The answer is ", ""),
        ("$", "$"),
        ("#### ", ""),
        ("```python\n", "\n```"),
        ("a ", " b 1"),
        ("1", "=1"),
        ("", "\n\\("),
    ),
]
"""Before and behind a repeated piece."""
NESTED = {
    "(": ")", "[": "]", "{": "}", "\\frac{": "}{1}", "\\sqrt{": "}", "\\left(": "\\right)", "\\boxed{": "}", "-(": ")",
    "<think>": "</think>", "<answer>": "</answer>", "```\n": "\n```\n", "\\(": "\\)", '{"a":': "}", "[1,": "]", "x^{": "}",
    "\\text{": "}", "**": "**", "<b>": "</b>", "\\begin{a}": "\\end{a}", "lambda:(": ")", "<<": ">>", "f(": ")", "~(": ")",
}  # fmt: skip
"""Opened as often as it is closed again."""
NUMBERS = [
    *(
        "10**400",
        "1e400",
        "1" * 400,
        "1" * 5000,
        "-" + "9" * 4400,
        "1." + "1" * SIZE,
        "0." + "0" * SIZE + "1",
        "1" * SIZE,
    ),
    *(
        "1e-400",
        "1e" + "9" * SIZE,
        "1/" + "3" * SIZE,
        "1" * 350 + "/" + "7" * 340,
        "0/0",
        "1/0",
        "1" + "0" * 300 + ".5 \\%",
    ),
    *(
        "0x" + "f" * SIZE,
        "1_0" * 9000,
        "\u0661" * 5000,
        "-" * 199 + "1",
        "(" * 99 + "1" + ")" * 99,
        "1" * 199,
        "NaN",
        "inf",
    ),
]
FORMULAS = [
    *(
        "9**9**9",
        "9^{9^{9^9}}",
        "2^{2^{2^{2^{2^2}}}}",
        "10!!!!",
        "\\Gamma(10^{6})",
        "\\prod_{k=1}^{1000000} k",
        "(x+1)^{1000}",
    ),
    *(
        "(x+y+z+w)^{60}",
        "\\int_0^{\\infty} \\frac{\\sin(x^2)}{x^{5}+1} dx",
        "\\sqrt{" * 9 + "2" + "}" * 9,
        "(" * 19 + "1" + ")" * 19,
    ),
    ", ".join(f"(x+{i})^{{{700 + i}}}" for i in range(12)),
]
MORE_FORMULAS = [
    *(
        "100000!",
        "(10^9)!",
        "\\binom{10^9}{10^8}",
        "\\gamma(10^{100})",
        "\\zeta(10^9)",
        "\\sum_{i=1}^{10^9} i",
        "\\int x^{x} dx",
    ),
    *(
        "\\sum_{i=1}^{100000} i^{100}",
        "\\int \\frac{1}{x^{99}+1} dx",
        "\\lim_{n\\to\\infty} \\frac{n!}{n^n}",
        "\\log(0)",
    ),
    *(
        "\\frac{d}{dx} x^{x^{x^x}}",
        "(x+1)^{(x+1)^{(x+1)^{9}}}",
        "(1+\\sqrt{2})^{200}",
        "\\sqrt[1000000007]{3}",
        "2^{1000000}",
    ),
    *(
        "1.000001^{10^{9}}",
        "e^{e^{e^{e}}}",
        "\\cos(\\cos(\\cos(\\cos(1))))",
        "i^{i^{i}}",
        "\\infty-\\infty",
        "\\frac{1}{0}",
    ),
    *(
        "\\lfloor 10^{4000}\\pi \\rfloor",
        "\\left|x\\right|" * 30,
        "\\frac{x^{1000}-1}{x-1}",
        "\\prod_{p=1}^{1000}(1+x^p)",
        "1 = " * 99,
    ),
    *(
        "\\begin{pmatrix} x & y \\\\ z & w \\end{pmatrix}^{20}",
        "\\sum_{i=1}^{100}\\sum_{j=1}^{100} i^j",
        "(\\sqrt{2}+\\sqrt{3})^{99}",
    ),
    *(
        "(-\\infty,1)\\cup(1,2)\\cup(2,3)\\cup(3,4)\\cup(4,5)\\cup(5,\\infty)",
        "x!" * 20,
        "1/" * 99 + "1",
        "\\pi^{\\pi^{\\pi^{\\pi}}}",
    ),
    *(
        " or ".join(f"\\int_0^{i} x^x dx" for i in range(12)),
        "\\sin^{-1}(\\cos^{-1}(\\tan^{-1}(x)))",
        "10^{3000}+10^{2999}x",
    ),
]


def repeated(piece: str, size: int = SIZE) -> str:
    return (piece * (size // len(piece) + 1))[:size]


def nested(opening: str, closing: str, size: int = SIZE) -> str:
    depth = size // (len(opening) + len(closing))
    return opening * depth + "1" + closing * depth


def texts() -> Iterator[str]:
    """Every piece alone, and between one pair of AROUND, another one for each; what is nested; numbers."""
    for i, body in enumerate([*map(repeated, [*CHARACTERS, *PIECES]), *(nested(*pair) for pair in NESTED.items())]):
        before, behind = AROUND[i % len(AROUND)]
        yield body
        yield before + body + behind
    for number in NUMBERS:
        yield number
        yield f"<think>a</think><answer>{number}</answer>"


ALL = list(texts())
SOME = [
    repeated(piece)
    for piece in (
        "\\(",
        "$a ",
        "`",
        "```\n",
        "<a",
        "a'",
        "\n",
        "\u0301",
        "\u0315\u0300",
        "\u4e2d",
        "x. ",
        "P. ",
        "A.",
        "1,",
    )
]
"""For readers that look at every sign, and take a tenth of a second for it."""
