"""Annotations state shapes, and a test that runs a function with another one fails."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import FunctionType, ModuleType
from typing import get_type_hints

import pytest
import torch
from jaxtyping import TypeCheckError

from grpo_ray.algorithm.advantages import group_advantages, kl_in_reward
from grpo_ray.algorithm.losses.policy import LossOptions, PolicyInputs, TokenLosses
from grpo_ray.batch.segments import Segments
from grpo_ray.models.logprobs import chunked_logprobs
from tests.shapes import CHECKED

ROOT = Path(__file__).parents[2]
FILES = [file for name in CHECKED for file in (ROOT / name.replace(".", "/")).rglob("*.py")] + [
    ROOT / "grpo_ray/models/logprobs.py"
]
MODULES = [
    str(file.relative_to(ROOT).with_suffix("")).replace("/", ".") for file in FILES if file.name != "__init__.py"
]
HOW = {"kind": "dr_grpo", "ddof": 1, "eps": 1e-4}


def test_rewards_of_one_dimension_are_refused() -> None:
    with pytest.raises(TypeCheckError, match="rewards_PG"):
        group_advantages(torch.zeros(6), **HOW)  # type: ignore[arg-type]


def test_a_mask_of_another_batch_is_refused() -> None:
    with pytest.raises(TypeCheckError, match="mask_PG"):
        group_advantages(torch.zeros(2, 3), mask_PG=torch.ones(3, 2, dtype=torch.bool), **HOW)  # type: ignore[arg-type]


def test_a_mask_of_numbers_is_refused() -> None:
    with pytest.raises(TypeCheckError, match="mask_BT"):
        kl_in_reward(torch.zeros(2), torch.zeros(2, 3), torch.ones(2, 3), beta=0.1)


def test_a_field_of_another_length_than_the_others_is_refused() -> None:
    segments = Segments.of(torch.zeros(4, dtype=torch.int64))
    with pytest.raises(TypeCheckError, match="advantages_N"):
        PolicyInputs(torch.zeros(4), torch.zeros(4), torch.zeros(3), segments)


def test_targets_of_another_length_than_the_hidden_states_are_refused() -> None:
    targets = torch.zeros(5, dtype=torch.int64)
    with pytest.raises(TypeCheckError, match="targets_N"):
        chunked_logprobs(torch.zeros(4, 8), torch.zeros(16, 8), None, targets, temperature=1.0, chunk=2)


def test_a_loss_of_another_shape_than_stated_is_refused() -> None:
    def wrong(x: PolicyInputs, o: LossOptions) -> TokenLosses:
        whole = x.logps_N.sum()
        return TokenLosses(whole, whole, whole, whole)

    logps_N, old_logps_N, advantages_N = torch.zeros(3, 4)
    segments = Segments.of(torch.zeros(4, dtype=torch.int64))
    with pytest.raises(TypeCheckError, match="loss_N"):
        wrong(PolicyInputs(logps_N, old_logps_N, advantages_N, segments), LossOptions(*[0.2] * 6))


def functions_of(module: ModuleType) -> Iterator[FunctionType]:
    """Those that it defines, methods and what makes dataclasses included."""
    for one in vars(module).values():
        if getattr(one, "__module__", None) == module.__name__:
            inside = list(vars(one).values()) if isinstance(one, type) else [one]
            yield from (f for f in (getattr(g, "__func__", g) for g in inside) if isinstance(f, FunctionType))


def test_no_shape_is_passed_over_since_its_names_mean_nothing() -> None:
    stated = set()
    for name in MODULES:
        for function in functions_of(import_module(name)):
            if any("[Tensor, " in str(hint) or "[NDArray[" in str(hint) for hint in function.__annotations__.values()):
                get_type_hints(function)
                stated.add(name)
    assert len(stated) == 18, stated


@pytest.mark.parametrize("name", CHECKED)
def test_a_run_imports_nothing_that_checks(name: str) -> None:
    code = f"import sys, {name}; print([m for m in ('jaxtyping', 'beartype') if m in sys.modules])"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert told.stdout.strip() == "[]"
    assert import_module(name).__name__ == name
