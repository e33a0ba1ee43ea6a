"""A reward's own function is described by its source as by importing it, whatever its parameters are."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path
from typing import Any

import pytest

from grpo_ray.config.reward import RewardFunctionConfig
from grpo_ray.errors import RewardError
from grpo_ray.rewards.functions.by_source import _call_of, _with_parameters
from grpo_ray.rewards.functions.function import RewardFunction
from grpo_ray.rewards.table import described

PARAMETERS = [
    "",
    "completions",
    "completions, level",
    "completions, level, k=1",
    "completions, /, level, k=1",
    "completions, level=0, /, k=1",
    "completions, *, level, k=2",
    "completions, *, level=1, k",
    "completions, *rest",
    "completions, *rest, level, k=2",
    "completions, **columns",
    "completions, level, *rest, k=1, **columns",
    "*, completions, **columns",
    "prompts, completions, completion_ids, trainer_state, log_extra, log_metric, level",
    "data_source, solution_str, ground_truth, extra_info=None",
    "solution_str, ground_truth, k",
    "data_sources, solution_strs, ground_truths, extra_infos, **kwargs",
]
KEYWORDS = [{}, {"k": 2}, {"size": 3}]


def shape(call: Any) -> list[tuple[str, Any, bool]]:
    return [(p.name, p.kind, p.default is p.empty) for p in inspect.signature(call).parameters.values()]


def made(source: str, name: str) -> Any:
    namespace: dict[str, Any] = {}
    exec(source, namespace)
    return namespace[name]


@pytest.mark.parametrize("parameters", PARAMETERS)
def test_parameters_of_a_source_are_those_of_the_function(parameters: str) -> None:
    source = f"def reward({parameters}): ..."
    (node,) = ast.parse(source).body
    assert isinstance(node, ast.FunctionDef)
    assert shape(_with_parameters(node)) == shape(made(source, "reward"))


@pytest.mark.parametrize("kind", ["def", "async def"])
@pytest.mark.parametrize("parameters", ["self", "self, /", *(f"self, {p}" for p in PARAMETERS if p)])
def test_parameters_of_a_class_are_those_of_its_instances_call(parameters: str, kind: str) -> None:
    source = f"class Reward:\n    def __init__(self, k=1): ...\n    {kind} __call__({parameters}): ..."
    (node,) = ast.parse(source).body
    assert isinstance(node, ast.ClassDef)
    call = _call_of("reward", node)
    assert isinstance(call, ast.AsyncFunctionDef if kind == "async def" else ast.FunctionDef)
    assert shape(_with_parameters(call)) == shape(made(source, "Reward")())


def test_a_class_that_cannot_be_called_is_refused_unless_it_may_inherit_a_call() -> None:
    alone, heir = ast.parse("class Alone:\n    def score(self): ...\nclass Heir(Alone): ...").body
    assert isinstance(alone, ast.ClassDef)
    assert isinstance(heir, ast.ClassDef)
    with pytest.raises(RewardError, match="reward 'mine' is a class whose instances can't be called; give it a method"):
        _call_of("mine", alone)
    assert _call_of("mine", heir) is None


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def told(config: RewardFunctionConfig, *, imports: bool) -> tuple[Any, ...] | str:
    try:
        f = described(config, imports=imports)
    except RewardError as e:
        return str(e)
    return f.name, f.weight, f.args, f.accepts, set(f.required), f.per_sample


@pytest.mark.parametrize("args", KEYWORDS)
@pytest.mark.parametrize("form", ["def", "async def", "class"])
def test_what_a_recipe_gives_is_accepted_or_refused_by_the_source_as_by_importing(
    args: dict[str, Any], form: str, here: Path
) -> None:
    lines = []
    for i, parameters in enumerate(PARAMETERS[1:]):
        if form == "class":
            lines.append(f"class Reward{i}:\n    def __init__(self, k=1, size=2): ...")
            lines.append(f"    def __call__(self, {parameters}): return [1.0]")
        else:
            lines.append(f"{form} Reward{i}({parameters}): return [1.0]")
    (here / f"shown_{form[:3]}.py").write_text("\n".join(lines))
    for i in range(len(PARAMETERS) - 1):
        config = RewardFunctionConfig(name=f"shown_{form[:3]}.py:Reward{i}", args=args, weight=0.5, label=f"r{i}")
        assert told(config, imports=False) == told(config, imports=True), PARAMETERS[i + 1]


MAKERS = """
def maker(size=3): return lambda completions, **columns: [size]
def rest(*sizes): return lambda completions, **columns: [sizes]
made = maker(4)
class Heir(dict): ...
def reward(completions): return [1.0]
"""


@pytest.mark.parametrize("name", ["maker", "rest", "made", "Heir"])
def test_of_what_only_running_the_code_would_tell_nothing_is_assumed(name: str, here: Path) -> None:
    (here / "makers.py").write_text(MAKERS)
    args: dict[str, Any] = {"size": 2} if name == "maker" else {}
    found = described(
        RewardFunctionConfig(name=f"makers.py:{name}", args=args, weight=0.5, label="mine"), imports=False
    )
    assert found == RewardFunction("mine", found.call, 0.5)


@pytest.mark.parametrize("name", ["maker", "rest", "made", "Heir", "reward"])
def test_a_reward_that_is_described_by_its_source_is_not_called(name: str, here: Path) -> None:
    (here / "makers.py").write_text(MAKERS)
    found = described(RewardFunctionConfig(name=f"makers.py:{name}"), imports=False)
    with pytest.raises(AssertionError, match="not imported can't be called"):
        found.call(completions=["x"])
