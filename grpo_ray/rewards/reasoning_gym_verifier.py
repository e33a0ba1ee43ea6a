"""The code inside the sandbox for the reward `reasoning_gym`, sent there as source.

Nine of its verifiers, and two more for fields of the row, evaluate text. Here `eval` accepts only literals and arithmetic, and
from SymPy also SymPy's own symbols and functions: so no part of an answer is run, and none can write its own score.
"""

from __future__ import annotations

import ast
import builtins
import math
from functools import lru_cache

import reasoning_gym
import sympy

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    def renew() -> None:
        """A hook that `inside.verify` supplies."""


_evaluate = builtins.eval
_NODES = {
    *(ast.Expression, ast.Constant, ast.List, ast.Tuple, ast.Set, ast.Dict, ast.Load),
    *(ast.BinOp, ast.UnaryOp, ast.BoolOp, ast.Compare),
    *(kind for base in (ast.operator, ast.unaryop, ast.boolop, ast.cmpop) for kind in base.__subclasses__()),
}
MAX_EXPONENT = 4096
_FUNCTIONS = {abs, pow, round, sympy.sqrt, sympy.cbrt, sympy.root, sympy.real_root, sympy.Max, sympy.Min}


def evaluate(source: Any, names: Any = None, local: Any = None) -> Any:
    """The replacement of `eval`. Names and calls are only for callers that say where names come from: SymPy's parser does."""
    if not isinstance(source, str):
        raise ValueError("only text is evaluated here")
    known: dict[str, Any] = {}
    nodes: list[ast.AST] = [tree := ast.parse(source.strip(), mode="eval")]
    for node in nodes:
        nodes += ast.iter_child_nodes(node)
        kind = type(node)
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Pow) and _is_tower(node.right):
            raise ValueError("a power as high as this is not evaluated here")
        if isinstance(node, ast.Name):
            known[node.id] = _harmless((local or {}).get(node.id, (names or {}).get(node.id)))
        elif not (kind in _NODES or (isinstance(node, ast.keyword) and node.arg) or _calls_a_name(node)):
            raise ValueError(f"{kind.__name__} is not evaluated here")
    return _evaluate(compile(tree, "answer", "eval"), {"__builtins__": {}}, known)


def _is_tower(exponent: ast.AST) -> bool:
    """Whether the exponent is a power itself, or thousands."""
    return any(
        isinstance(node, ast.Pow)
        or (isinstance(node, ast.Constant) and isinstance(node.value, int | float) and abs(node.value) > MAX_EXPONENT)
        for node in ast.walk(exponent)
    )


def _calls_a_name(node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name)


def _harmless(value: Any) -> Any:
    """The value, if it is an expression of SymPy's own, or a class or function that creates one.

    Raises:
        ValueError: the value is something else.
    """
    known = issubclass(value, sympy.Basic) if isinstance(value, type) else isinstance(value, sympy.Basic | int | float)
    if not known and value not in _FUNCTIONS:
        raise ValueError("only SymPy's names are evaluated here")
    return value


builtins.eval = evaluate


@lru_cache(maxsize=256)
def _scorer(task: str) -> Callable[[str, Any], Any]:
    found: Callable[[str, Any], Any] = reasoning_gym.get_score_answer_fn(task)
    renew()
    return found


def verify(task: str, answer: str, entry: Any) -> list[Any]:
    """The result ["score", x], or the culprit and its error: ["task", why], ["row", why], ["answer", why]."""
    try:
        score_answer = _scorer(task)
    except Exception as e:
        return ["task", _said(e)]
    try:
        return ["score", _score(score_answer, answer, entry)]
    except MemoryError:
        raise
    except BaseException as e:
        return [_culprit(score_answer, entry), _said(e)]


def _score(score_answer: Callable[[str, Any], Any], answer: str, entry: Any) -> float:
    score = float(score_answer(answer, entry))
    if not math.isfinite(score):
        raise ValueError(f"a score of {score}")
    return score


def _culprit(score_answer: Callable[[str, Any], Any], entry: Any) -> str:
    """The culprit of an error: a row whose own answer can't be scored either is no answer's fault."""
    try:
        _score(score_answer, str(entry["answer"]), entry)
    except BaseException:
        return "row"
    return "answer"


def _said(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"[:300]
