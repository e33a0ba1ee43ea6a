"""What `submit` ships."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from grpo_ray.errors import ConfigError
from launch.package import PACKAGES, stage

ROOT = Path(__file__).parent.parent


def make(folder: Path, *names: str, size: int = 1) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x" * size)


def names(folder: Path) -> set[str]:
    return {
        str(p.relative_to(folder))
        for p in folder.rglob("*")
        if p.is_file() and p.relative_to(folder).parts[0] not in PACKAGES
    }


@pytest.fixture
def user(tmp_path: Path) -> Path:
    (tmp_path / "user").mkdir()
    return tmp_path / "user"


def test_code_and_data_are_shipped_and_keys_runs_and_environments_are_not(user: Path, tmp_path: Path) -> None:
    wanted = {"my.yaml", "my_rewards.py", "data/train.jsonl", "pkg/deep/a.py", "ignored.jsonl"}
    make(user, *wanted)
    make(
        user,
        "runs/a/hf/model.safetensors",
        ".env",
        ".git/config",
        "pkg/.netrc",
        "pkg/__pycache__/a.pyc",
        "x.pem",
        "sub/id_rsa",
    )
    make(user, "env/pyvenv.cfg", "env/lib/torch.py", "big/b.bin")
    (user / ".gitignore").write_text("ignored.jsonl\n")
    size = stage(user, tmp_path / "staged", ["big"])
    assert names(tmp_path / "staged") == wanted
    assert size == len(wanted)


def test_a_folder_too_large_is_refused_by_the_names_of_what_is_large_and_nothing_is_copied(
    user: Path, tmp_path: Path
) -> None:
    make(user, "small.py", size=10)
    make(user, "data/a.bin", "data/b.bin", size=2000)
    with pytest.raises(ConfigError, match=r"largest: data .*--exclude NAME"):
        stage(user, tmp_path / "staged", limit_bytes=4000)
    assert not (tmp_path / "staged").exists()
    stage(user, tmp_path / "staged", ["*.bin"], limit_bytes=4000)
    assert names(tmp_path / "staged") == {"small.py"}


def test_a_package_that_would_hide_ours_is_refused(user: Path, tmp_path: Path) -> None:
    make(user, "actors/mine.py")
    with pytest.raises(ConfigError, match="would hide grpo-ray's own package actors"):
        stage(user, tmp_path / "staged")


def test_a_link_to_a_folder_outside_is_not_followed(user: Path, tmp_path: Path) -> None:
    make(tmp_path / "outside", "secret.txt")
    (user / "link").symlink_to(tmp_path / "outside")
    (user / "loop").symlink_to(user)
    make(user, "a.py")
    stage(user, tmp_path / "staged")
    assert names(tmp_path / "staged") == {"a.py"}


def test_what_is_shipped_runs_by_itself(user: Path, tmp_path: Path) -> None:
    """Our packages come along whole: recipes, the report's template, and all of one root."""
    make(user, "a.py")
    staged = tmp_path / "staged"
    stage(user, staged)
    for package in PACKAGES:
        tracked = subprocess.run(
            ["git", "ls-files", package], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout.split()
        assert [name for name in tracked if not (staged / name).is_file()] == []
    code = "import actors, grpo_ray.report, launch.recipe as r; print(r.__file__, r.recipe_names())"
    told = subprocess.run(
        [sys.executable, "-c", code],
        cwd=staged,
        env={"PATH": ""},
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    ).stdout
    assert told.startswith(str(staged))
    assert "smoke_sft" in told
