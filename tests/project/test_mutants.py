"""What `make mutants` keeps between its runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.mutants.survivors import Equivalents, _without, forget_gone, read_mutants

EQUIVALENTS = Path(__file__).parents[1] / "mutants" / "equivalent.yaml"


def test_mistakes_in_a_module_that_was_renamed_are_forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("kept", "renamed"):
        copy = tmp_path / "mutants" / "grpo_ray" / f"{name}.py"
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.touch()
        found = {"exit_code_by_key": {f"grpo_ray.{name}.x_f__mutmut_1": 1}}
        copy.with_name(f"{name}.py.meta").write_text(json.dumps(found))
    (tmp_path / "grpo_ray").mkdir()
    (tmp_path / "grpo_ray" / "kept.py").touch()
    forget_gone()
    assert [mutant.name for mutant in read_mutants()] == ["grpo_ray.kept.x_f__mutmut_1"]
    assert sorted(p.name for p in (tmp_path / "mutants" / "grpo_ray").iterdir()) == ["kept.py", "kept.py.meta"]


def test_what_a_kind_is_about_is_left_out_wherever_it_stands_in_a_line() -> None:
    kind = r",?\s*strict=\w+"
    for was, becomes in (
        ("return list(zip(a, b, strict=True))", "return list(zip(a, b, ))"),
        ("for x in zip(a, b, strict=True):", "for x in zip(a, b, ):"),
        ("kept = [f(x) for x in zip(a, b, strict=True)]", "kept = [f(x) for x in zip(a, b, strict=False)]"),
    ):
        assert _without(kind, was) == _without(kind, becomes)
    assert _without(kind, "zip(a, b, strict=True)[0]") != _without(kind, "zip(a, c, )[0]")


def test_every_mistake_that_is_listed_is_of_a_line_that_is_there() -> None:
    root = Path(__file__).parents[2]
    for where, was, becomes in Equivalents.read(EQUIVALENTS).single:
        module = where.split(".")
        files = [root.joinpath(*module[:n]).with_suffix(".py") for n in range(1, len(module))]
        text = next(file for file in files if file.is_file()).read_text()
        assert any(line.strip() == was for line in text.splitlines()), f"{where}: {was}"
        assert was != becomes
