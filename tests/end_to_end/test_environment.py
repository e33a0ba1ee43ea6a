"""A whole run where everything around it is hostile: the names of files beside the recipe, TMPDIR, HOME, a proxy."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.end_to_end.runs import LIMIT_S, RECIPE, ROOT

HIDING = ("actors", "launch", "grpo_ray", "random", "types", "queue", "statistics", "ray", "torch", "vllm", "yaml")
REWARD = """
def length(completions, **columns):
    return [float(len(c if isinstance(c, str) else c[-1]["content"])) for c in completions]
"""
SCRIPT = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import grpo_ray_cli
sys.path.remove({str(ROOT)!r})
grpo_ray_cli.main()
"""


@pytest.mark.slow
def test_a_run_ends_well_in_a_folder_and_an_environment_of_traps(tmp_path: Path) -> None:
    folder = tmp_path / "work"
    (folder / "datasets").mkdir(parents=True)
    (folder / "datasets" / "__init__.py").write_text("raise RuntimeError('the user\\'s datasets')\n")
    for name in HIDING:
        (folder / f"{name}.py").write_text(f"raise RuntimeError('the user\\'s {name}')\n")
    (folder / "my_rewards.py").write_text(REWARD)
    (folder / "grpo-ray.py").write_text(SCRIPT)
    reward = {"functions": [{"name": "my_rewards.length"}], "num_cpus": 0}
    data = {k: v for k, v in RECIPE["data"].items() if k != "eval"}
    recipe = RECIPE | {"reward": reward, "data": data, "num_steps": 2, "name": "trapped"}
    (folder / "tiny.yaml").write_text(yaml.safe_dump(recipe))
    deep = tmp_path / ("l" * 100)
    deep.mkdir()
    dead = "http://127.0.0.1:9"
    hostile = {
        "HOME": "/proc/nowhere",
        "TMPDIR": str(deep),
        "XDG_CACHE_HOME": "/proc/nowhere",
        **dict.fromkeys(("http_proxy", "HTTP_PROXY", "https_proxy", "ALL_PROXY", "grpc_proxy"), dead),
        "CUDA_VISIBLE_DEVICES": "nonsense",
        "OMP_NUM_THREADS": "abc",
        "LC_ALL": "xx_YY",
        "COLUMNS": "150",
    }
    kept = {k: v for k, v in os.environ.items() if not k.startswith("RAY_") and k not in ("PYTHONPATH", "no_proxy")}
    done = subprocess.run(
        [sys.executable, "-P", "grpo-ray.py", "train", "tiny.yaml"],
        cwd=folder,
        env=kept | hostile,
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "TMPDIR" in done.stderr
    assert "HOME" in done.stderr
    steps = [json.loads(line) for line in (folder / "runs" / "trapped" / "metrics.jsonl").read_text().splitlines()]
    assert len(steps) == 2
    assert not list(deep.iterdir())
