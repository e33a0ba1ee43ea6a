"""What the verifiers of reasoning-gym may evaluate, in this process: literals, arithmetic, and SymPy's own names."""

from __future__ import annotations

import builtins
import importlib
from types import ModuleType
from typing import Any

import pytest
import reasoning_gym
import sympy


@pytest.fixture
def verifier(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module, which replaces `eval` where it is loaded, without that; `renewed` counts how often limits were reset."""
    monkeypatch.setattr(builtins, "eval", builtins.eval)
    module = importlib.import_module("grpo_ray.rewards.reasoning_gym_verifier")
    module._scorer.cache_clear()
    monkeypatch.setattr(module, "renewed", [], raising=False)
    monkeypatch.setattr(module, "renew", lambda: module.renewed.append(1), raising=False)
    return module


@pytest.mark.parametrize(
    ("source", "value"),
    [
        (" 3 ", 3),
        ("[1, (2, 'x'), {3}, {4: None}]", [1, (2, "x"), {3}, {4: None}]),
        ("(1 + 2) * 3 - 4 / 8 + 7 // 2 + 7 % 4", 14.5),
        ("2 ** 10", 1024),
        ("2 ** -2", 0.25),
        ("1 ** 4096", 1),
        ("3 + 4097", 4100),
        ("3 * (2 ** 5)", 96),
        ("(2 ** 3) ** 2", 64),
        ("not 1 < 2 or -3 == ~2 and +1 != 5", True),
        ("0x10 | 3 ^ 1 & 7 << 2 >> 1", 0x10 | 3 ^ 1 & 7 << 2 >> 1),
    ],
)
def test_literals_and_arithmetic_have_their_value(verifier: ModuleType, source: str, value: Any) -> None:
    assert verifier.evaluate(source) == value


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("x.y", "Attribute is not evaluated here"),
        ("[1][0]", "Subscript is not evaluated here"),
        ("[i for i in (1, 2)]", "ListComp is not evaluated here"),
        ("lambda: 1", "Lambda is not evaluated here"),
        ("f'{1}'", "JoinedStr is not evaluated here"),
        ("(lambda: 1)()", "Call is not evaluated here"),
        ("(x := 3)", "NamedExpr is not evaluated here"),
        ("sqrt(**{})", "keyword is not evaluated here"),
        ("print('x')", "only SymPy's names are evaluated here"),
        ("__import__('os')", "only SymPy's names are evaluated here"),
        ("x", "only SymPy's names are evaluated here"),
        ("2 ** 4097", "a power as high as this is not evaluated here"),
        ("2 ** -4096.5", "a power as high as this is not evaluated here"),
        ("1 + 2 ** (3 ** 4)", "a power as high as this is not evaluated here"),
        ("2 ** [9 ** 9]", "a power as high as this is not evaluated here"),
    ],
)
def test_what_is_neither_is_refused_with_its_kind(verifier: ModuleType, source: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        verifier.evaluate(source, {"sqrt": sympy.sqrt})


def test_a_statement_and_what_is_no_text_are_refused(verifier: ModuleType) -> None:
    with pytest.raises(SyntaxError):
        verifier.evaluate("x = 1")
    for source in (5, None, b"1", compile("1", "x", "eval")):
        with pytest.raises(ValueError, match="only text is evaluated here"):
            verifier.evaluate(source)


def test_names_are_the_callers_and_local_ones_come_first(verifier: ModuleType) -> None:
    x, y = sympy.symbols("x y")
    assert verifier.evaluate("x + 1", {"x": x}) == x + 1
    assert verifier.evaluate("x + 1", {"x": x}, {"x": y}) == y + 1
    assert verifier.evaluate("x + y", {"x": x}, {"y": y}) == x + y
    assert verifier.evaluate("sqrt(Integer(4)) + sin(0)", vars(sympy)) == 2
    assert verifier.evaluate("Symbol('z', positive=True)", vars(sympy)) == sympy.Symbol("z", positive=True)


@pytest.mark.parametrize(
    "value",
    [*sympy.symbols("x y"), sympy.pi, 3, 0.5, sympy.Symbol, sympy.Integer, sympy.sqrt, sympy.Max, abs, pow, round],
)
def test_sympys_expressions_classes_and_functions_are_harmless(verifier: ModuleType, value: Any) -> None:
    assert verifier._harmless(value) is value


@pytest.mark.parametrize(
    "value", [eval, open, sympy.sympify, sympy.parse_expr, object, type, int, str, "text", None, sympy]
)
def test_everything_else_is_refused(verifier: ModuleType, value: Any) -> None:
    with pytest.raises(ValueError, match="only SymPy's names are evaluated here"):
        verifier._harmless(value)


def test_an_answer_has_its_tasks_score(verifier: ModuleType) -> None:
    entry = reasoning_gym.create_dataset("chain_sum", seed=1, size=1)[0]
    assert verifier.verify("chain_sum", entry["answer"], entry) == ["score", 1.0]
    kind, wrong = verifier.verify("chain_sum", "no number", entry)
    assert (kind, wrong < 1.0, type(wrong)) == ("score", True, float)
    assert verifier.renewed == [1]


def test_an_error_names_the_task_the_row_or_the_answer(verifier: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    kind, said = verifier.verify("no_such_task", "1", {})
    assert kind == "task"
    assert "no_such_task" in said
    kind, said = verifier.verify("chain_sum", "1", {})
    assert (kind, said) == ("row", "KeyError: 'answer'")

    def score(answer: str, entry: Any) -> float:
        if answer == "long":
            raise ValueError("x" * 500)
        return float(answer)

    monkeypatch.setattr(verifier, "_scorer", lambda task: score)
    assert verifier.verify("t", "2.5", {"answer": "1"}) == ["score", 2.5]
    assert verifier.verify("t", "nan", {"answer": "1"}) == ["answer", "ValueError: a score of nan"]
    assert verifier.verify("t", "inf", {"answer": "nan"}) == ["row", "ValueError: a score of inf"]
    assert verifier.verify("t", "long", {"answer": 1}) == ["answer", f"ValueError: {'x' * 288}"]


def test_memory_that_is_used_up_is_nobodys_error_here(verifier: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    def score(answer: str, entry: Any) -> float:
        raise MemoryError

    monkeypatch.setattr(verifier, "_scorer", lambda task: score)
    with pytest.raises(MemoryError):
        verifier.verify("t", "1", {"answer": "1"})
