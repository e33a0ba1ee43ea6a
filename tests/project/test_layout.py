"""The three packages belong together: one root, one environment."""

from __future__ import annotations

import ast
import tomllib
from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest

import actors
import grpo_ray
import launch
from grpo_ray.errors import ConfigError
from launch.cli import check_one_root

ROOT = Path(__file__).parents[2]


def folder_of(package: ModuleType) -> Path:
    return Path(str(package.__file__)).parent


def test_all_three_packages_come_from_this_checkout() -> None:
    assert {folder_of(p).parent for p in (grpo_ray, actors, launch)} == {ROOT}
    check_one_root()


def test_a_package_of_another_root_is_refused_by_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(actors, "__file__", str(tmp_path / "actors" / "__init__.py"))
    with pytest.raises(ConfigError, match="actors"):
        check_one_root()


def test_both_lock_files_pin_what_pyproject_asks_for() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for lock, extra in (("lock-cpu.txt", "cpu"), ("lock-gpu.txt", "gpu")):
        pins: dict[str, set[str]] = {}
        for line in (ROOT / lock).read_text().splitlines():
            # Behind a semicolon for which Python it is, where that is not the same for all.
            name, _, version = line.partition(" ; ")[0].partition("==")
            pins.setdefault(name, set()).add(version.partition("+")[0])
        for requirement in project["dependencies"] + project["optional-dependencies"][extra]:
            name, _, version = requirement.split(";")[0].strip().partition("==")
            assert pins[name.split("[")[0]] == {version}, requirement


@pytest.mark.parametrize("package", [grpo_ray, actors, launch], ids=lambda p: p.__name__)
def test_no_folder_holds_more_files_than_one_sees_at_a_glance(package: ModuleType) -> None:
    files = Counter(file.parent for file in folder_of(package).rglob("*.py"))
    assert {str(folder): n for folder, n in files.items() if n > 20} == {}


def test_a_room_says_what_it_is_for_and_imports_nothing() -> None:
    for package in (grpo_ray, actors, launch):
        root = folder_of(package)
        for file in set(root.rglob("__init__.py")) - {root / "__init__.py"}:
            tree = ast.parse(file.read_text())
            assert ast.get_docstring(tree), file
            assert not any(isinstance(node, ast.Import | ast.ImportFrom) for node in tree.body), file
