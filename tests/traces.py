"""Answers with reasoning, good and bad, whose label is known because of how they were made: what the filters are measured on."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from grpo_ray.datagen.filters.trace import Trace
from grpo_ray.rewards.answers.answer_tag import answer_of
from grpo_ray.rewards.language_consistency import language_consistency


@dataclass(frozen=True)
class Labelled:
    trace: Trace
    good: bool
    kind: str
    """`en, checked` or `loop of a sentence`."""


WAYS = {
    "en": (
        ["Let me work this out.", "First I look at what is asked.", "I should add the two amounts."],
        ["{a} and {b} make {c}.", "So {a} + {b} = {c}.", "Adding {b} to {a} gives {c}."],
        [
            "Wait, let me check that again: {c} - {b} is {a}, which fits.",
            "Checking: the units of {a} and {b} agree with {c}.",
        ],
        "A shop sells {a} apples on Monday and {b} on Tuesday. How many are sold in all?",
    ),
    "de": (
        ["Ich rechne das Schritt für Schritt.", "Gefragt ist die Summe.", "Zuerst sehe ich mir die Zahlen an."],
        ["{a} und {b} ergeben {c}.", "Also ist {a} + {b} = {c}.", "Zusammen sind das {c}."],
        ["Moment, ich prüfe das noch einmal: {c} - {b} ist {a}, das passt.", "Die Probe stimmt: {c} - {a} = {b}."],
        "Ein Laden verkauft am Montag {a} Äpfel und am Dienstag {b}. Wie viele sind es insgesamt?",
    ),
    "zh": (
        ["我们先看题目要求什么。", "首先把两个数字写下来。", "让我一步一步来计算。"],
        ["{a} 加 {b} 等于 {c}。", "所以总数是 {a} + {b} = {c}。", "两天一共卖出 {c} 个苹果。"],
        ["再检查一遍：{c} - {b} = {a}，没有问题。", "验算：{c} 减去 {a} 是 {b}，结果正确。"],
        "商店星期一卖了 {a} 个苹果，星期二卖了 {b} 个。一共卖了多少个？",
    ),
    "ru": (
        ["Сначала запишем оба числа.", "Нужно найти сумму двух чисел.", "Посчитаем по шагам."],
        ["{a} и {b} вместе дают {c}.", "Значит, {a} + {b} = {c}.", "Всего получается {c}."],
        ["Проверим ещё раз: {c} - {b} = {a}, всё верно.", "Проверка: {c} минус {a} равно {b}."],
        "В понедельник магазин продал {a} яблок, а во вторник {b}. Сколько всего?",
    ),
}
EXTRAS = {
    "formulas": "With \\(\\alpha = {a}\\) and $\\beta = {b}$ we get $\\alpha + \\beta = {c}$, i.e. α + β = {c} and Δ = {b}.",
    "columns": "\n".join(
        (
            "units: {a}%10 + {b}%10, write down, keep the carry",
            "tens: add the digits and the carry",
            "hundreds: add again",
        )
    ),
    "list": "1. Monday: {a}\n2. Tuesday: {b}\n3. Both days: {c}",
    "table": "| day | sold |\n| --- | --- |\n| Monday | {a} |\n| Tuesday | {b} |\n| all | {c} |",
    "dots": "{a}, {a} + 1, {a} + 2, ..., {c}. ============================",
    "counting": "10, 20, 30, 40, 50, 60, 70, 80, 90, 100 and so on, ten at a time.",
    "trying": " ".join(f"Try {i}: {{a}} + {10 * i} is not yet {{c}}." for i in range(1, 12)),
    "a quotation": 'The sign says "{a} apples, {a} apples, {a} apples!" three times over, which changes nothing.',
    "an error mended": "{a} + {b} = {a}? No, that forgets {b}. No, wait. It is {c}. Yes, {c}.",
    "patience": "Hmm. Let me check. Let me check the tens too. Good, good. So it holds.",
}


def labelled(seed: int = 1) -> list[Labelled]:
    """Of every kind several, in all languages."""
    rng = random.Random(seed)
    return [*_good(rng), *_bad(rng)]


def _numbers(rng: random.Random) -> dict[str, int]:
    a, b = rng.randint(12, 480), rng.randint(12, 480)
    return {"a": a, "b": b, "c": a + b}


def _reasoning(language: str, n: dict[str, int], rng: random.Random) -> str:
    starts, steps, checks, _ = WAYS[language]
    parts = [
        *rng.sample(starts, rng.randint(1, 3)),
        *rng.sample(steps, rng.randint(1, 3)),
        *rng.sample(checks, rng.randint(0, 2)),
    ]
    return rng.choice((" ", "\n", "\n\n")).join(parts).format(**n)


def _trace(language: str, n: dict[str, int], completion: str, finish: str = "stop", status: str = "ok") -> Trace:
    right = 1.0 if answer_of(completion) == str(n["c"]) else 0.0
    (same,) = language_consistency([completion], language, others=("en", "de"))
    scores = {
        "accuracy": (status, right if status == "ok" else None),
        "language_consistency": ("not_applicable" if same is None else "ok", same),
    }
    return Trace(WAYS[language][3].format(**n), completion, finish, len(completion) // 3, scores)


def _whole(reasoning: str, answer: object) -> str:
    return f"<think>{reasoning}</think>\n<answer>{answer}</answer>"


def _good(rng: random.Random) -> Iterator[Labelled]:
    for language in WAYS:
        for _ in range(20):
            n = _numbers(rng)
            yield Labelled(
                _trace(language, n, _whole(_reasoning(language, n, rng), n["c"])), True, f"{language}, plain"
            )
    for kind, extra in EXTRAS.items():
        for _ in range(5):
            n = _numbers(rng)
            text = f"{_reasoning('en', n, rng)}\n{extra.format(**n)}"
            yield Labelled(_trace("en", n, _whole(text, n["c"])), True, f"en, {kind}")
    for _ in range(5):
        n = _numbers(rng)
        long = "\n".join(_reasoning("en", _numbers(rng), rng) for _ in range(12)) + f"\nSo it is {n['c']}."
        yield Labelled(_trace("en", n, _whole(long, n["c"])), True, "en, many paragraphs")
        n = _numbers(rng)
        text = _reasoning("zh", n, rng) + "这里用到 GCD 的记号。"
        yield Labelled(_trace("zh", n, _whole(text, n["c"])), True, "zh, an abbreviation")
        n = _numbers(rng)
        yield Labelled(
            _trace("en", n, f"<think>{_reasoning('en', n, rng)}</think>In all it is <answer>{n['c']}</answer>."),
            True,
            "en, summary",
        )


def _bad(rng: random.Random) -> Iterator[Labelled]:
    for kind, spoil in SPOILED.items():
        for i in range(7):
            language = list(WAYS)[i % len(WAYS)]
            n = _numbers(rng)
            yield Labelled(spoil(language, n, _reasoning(language, n, rng), rng), False, kind)


def _foreign(language: str, rng: random.Random) -> str:
    other = {"en": "zh", "de": "zh", "zh": "en", "ru": "en"}[language]
    return _reasoning(other, _numbers(rng), rng)


def _neighbour(language: str) -> str:
    """Of the same script where there is one."""
    return {"en": "de", "de": "en", "zh": "en", "ru": "en"}[language]


def _unlike(language: str, n: dict[str, int], rng: random.Random) -> str:
    """Sentences that come back in another order, again and again."""
    starts, steps, checks, _ = WAYS[language]
    return " ".join(rng.choice((*starts, *steps[:1], *checks[:1])) for _ in range(70)).format(**n)


AGAIN = {
    "en": "Wait, let me check.",
    "de": "Moment, ich prüfe das.",
    "zh": "等等，让我再看看。",
    "ru": "Стоп, проверим ещё.",
}
"""What is said when nothing comes to mind."""
NUMBERED = {
    "en": " Let me check the sum again, for the {}th time.",
    "de": " Ich prüfe die Summe noch einmal, zum {}. Mal.",
    "zh": " 让我再检查一遍总数，这是第 {} 次。",
    "ru": " Проверим сумму ещё раз, в {} раз.",
}
THE = {"en": " the", "de": " und", "zh": " 的", "ru": " что"}


Spoil = Callable[[str, dict[str, int], str, random.Random], Trace]
SPOILED: dict[str, Spoil] = {
    "wrong answer": lambda w, n, t, r: _trace(w, n, _whole(t, n["c"] + r.choice((-10, -1, 1, 10, 100)))),
    "an answer to another question": lambda w, n, t, r: _trace(w, n, _whole(t, n["a"])),
    "not scored": lambda w, n, t, r: _trace(w, n, _whole(t, n["c"]), status=r.choice(("timeout", "error", "crashed"))),
    "cut off": lambda w, n, t, r: _trace(w, n, f"<think>{t * 3}"[: 40 + r.randrange(80)], finish="length"),
    "cut off behind the answer": lambda w, n, t, r: _trace(w, n, _whole(t, n["c"]) + "\n\nAlso", finish="length"),
    "no tags": lambda w, n, t, r: _trace(w, n, f"{t} {n['c']}"),
    "thinking not opened": lambda w, n, t, r: _trace(w, n, f"{t}</think><answer>{n['c']}</answer>"),
    "thinking not closed": lambda w, n, t, r: _trace(w, n, f"<think>{t}<answer>{n['c']}</answer>"),
    "thinking twice": lambda w, n, t, r: _trace(w, n, f"<think>{t}</think><think>{t}</think><answer>{n['c']}</answer>"),
    "no thought": lambda w, n, t, r: _trace(w, n, _whole(r.choice(("", " ", "\n\n")), n["c"])),
    "other scripts": lambda w, n, t, r: _trace(w, n, _whole(f"{t}\n{_foreign(w, r)}", n["c"])),
    "a phrase of another script": lambda w, n, t, r: _trace(
        w,
        n,
        _whole(
            t
            + {"zh": " so the answer must be this.", "en": " 所以答案是", "de": " 因此得到", "ru": " so the total"}[w],
            n["c"],
        ),
    ),
    "another language": lambda w, n, t, r: _trace(w, n, _whole(_reasoning(_neighbour(w), n, r), n["c"])),
    "a sentence of another language": lambda w, n, t, r: _trace(
        w, n, _whole(f"{t} {_reasoning(_neighbour(w), n, r).splitlines()[0]}", n["c"])
    ),
    "code block": lambda w, n, t, r: _trace(w, n, _whole(f"{t}\n```python\nprint({n['a']} + {n['b']})\n```", n["c"])),
    "long paragraph": lambda w, n, t, r: _trace(
        w, n, _whole(" ".join(_reasoning(w, _numbers(r), r).replace("\n", " ") for _ in range(70)), n["c"])
    ),
    "loop of a sentence": lambda w, n, t, r: _trace(w, n, _whole(t + f" {AGAIN[w]}" * r.randint(8, 30), n["c"])),
    "loop of a line": lambda w, n, t, r: _trace(
        w, n, _whole(t + f"\n{AGAIN[w]}" * r.randint(6, 20) + "\n" + t, n["c"])
    ),
    "loop of a word": lambda w, n, t, r: _trace(w, n, _whole(t + THE[w] * r.randint(20, 60), n["c"])),
    "loop that changes a number": lambda w, n, t, r: _trace(
        w, n, _whole(t + "".join(NUMBERED[w].format(i) for i in range(4, 40)), n["c"])
    ),
    "loop that ends": lambda w, n, t, r: _trace(w, n, _whole(f"{AGAIN[w]} " * r.randint(8, 20) + t, n["c"])),
    "going round": lambda w, n, t, r: _trace(w, n, _whole(f"{t}\n{_unlike(w, n, r)}", n["c"])),
}
