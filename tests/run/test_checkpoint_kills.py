"""A process that is killed while it saves, at every change that a save makes to the file system: what is left is whole."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.long

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def kill_at(tmp_path_factory: pytest.TempPathFactory) -> Path:
    library = tmp_path_factory.mktemp("kill") / "kill_at.so"
    source = ROOT / "tests" / "kills" / "kill_at.c"
    subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", library, source, "-ldl"], check=True, timeout=300)
    return library


@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
@pytest.mark.parametrize(
    "where", [pytest.param("", id="folder"), pytest.param("file://{}/bucket", id="fsspec", marks=pytest.mark.slow)]
)
def test_killed_at_any_point_of_a_save_a_run_resumes_from_a_whole_checkpoint(
    where: str, kill_at: Path, tmp_path: Path
) -> None:
    """Steps 1 and 2 are saved; step 3 is under way when the process dies."""
    env = {**os.environ, "LD_PRELOAD": str(kill_at), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", "tests.kills", str(tmp_path), where],
        env=env,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=3000,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    left = json.loads(done.stdout.splitlines()[-1])["left"]
    assert len(left) > 30, "as many changes does a save make at least"
    assert set(left) == {2, 3}
    assert left == sorted(left), "the old one until the new one is there"
