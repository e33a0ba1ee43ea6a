"""What `make mutants` keeps between its runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest


def test_mistakes_in_a_module_that_was_renamed_are_forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.mutants.survivors import forget_gone, read_mutants

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
