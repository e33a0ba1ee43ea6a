"""`grpo-ray check` without torch: as the command runs it, in a process that has imported nothing else."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import BertConfig

from grpo_ray.errors import ConfigError
from launch.check import model

ROOT = Path(__file__).parents[3]
NUM_ROWS = 200_000
MAX_MB = 280
SCRIPT = """
import json, sys
from grpo_ray.errors import ConfigError
from launch.check.command import check_recipe

def check(recipe, *overrides):
    try:
        check_recipe(recipe, overrides, makes_models=False)
        refused = None
    except ConfigError as e:
        refused = str(e)
    large = {"torch", "transformers", "ray", "deepspeed", "datasets", "accelerate", "plotly", "pandas", "sympy"}
    imported = sorted(large & set(sys.modules))
    with open("/proc/self/status") as file:
        peak = next(int(line.split()[1]) / 1024 for line in file if line.startswith("VmHWM"))
    print(json.dumps({"refused": refused, "imported": imported, "peak_mb": peak}))

check("grpo.yaml")
check("sft.yaml")
for path in ("good", "bert"):
    check("grpo.yaml", "model.tiny=null", "data.train.limit=100", f"model.path={path}")
"""
SHARED = """
model: {tiny: {hidden_size: 64, num_layers: 2, num_heads: 2, num_kv_heads: 1, context: 256}, dtype: float32}
learner: {num_cpus: 0.5}
num_steps: 2
"""
GRPO = f"""{SHARED}
data: {{train: {{path: rows.jsonl}}, max_prompt_length: 200}}
reward: {{functions: [{{name: accuracy}}], num_cpus: 0}}
rollout: {{num_cpus: 0.5, max_completion_length: 16}}
prompts_per_step: 4
"""
SFT = f"""{SHARED}
data: {{train: {{path: rows.jsonl, columns: {{completion: answer}}}}}}
max_length: 200
"""


@pytest.fixture(scope="module")
def checked(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> tuple[list[dict[str, Any]], str]:
    """What is said of each check (many rows with a tiny model, for GRPO and for SFT; a model in a folder; one that can't be
    trained), and the output."""
    folder = tmp_path_factory.mktemp("checked")
    (folder / "grpo.yaml").write_text(GRPO)
    (folder / "sft.yaml").write_text(SFT)
    with (folder / "rows.jsonl").open("w") as file:
        file.writelines(
            json.dumps({"prompt": f"{i} + {i % 7} =" + " " * 100, "answer": str(i + i % 7)}) + "\n"
            for i in range(NUM_ROWS)
        )
    (folder / "good").symlink_to(tiny_model)
    (folder / "bert").mkdir()
    for each in tiny_model.iterdir():
        (folder / "bert" / each.name).write_bytes(each.read_bytes())
    BertConfig(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=2, vocab_size=320, max_position_embeddings=256
    ).save_pretrained(folder / "bert")
    env = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "300"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], cwd=folder, env=env, capture_output=True, text=True, timeout=300
    )
    said = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(said) == 4, done.stdout + done.stderr
    return said, done.stdout


@pytest.mark.long
def test_a_check_of_many_rows_imports_nothing_large_and_needs_little_memory(
    checked: tuple[list[dict[str, Any]], str],
) -> None:
    said, output = checked
    assert output.count(f"1,000 of {NUM_ROWS:,} rows") == 2
    for of_one in said[:2]:
        assert of_one["refused"] is None
        assert of_one["imported"] == []
        assert of_one["peak_mb"] < MAX_MB


@pytest.mark.long
def test_another_process_tells_whether_a_model_can_be_trained(checked: tuple[list[dict[str, Any]], str]) -> None:
    said, output = checked
    assert said[2]["refused"] is None
    assert "0.1 M parameters" in output
    assert "attends to what comes after a token, too" in said[3]["refused"]
    assert said[3]["imported"] == ["transformers"]


def test_a_process_that_does_not_answer_is_told_and_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model, "QUESTION_S", 0.1)
    with subprocess.Popen(["sleep", "600"], stdout=subprocess.PIPE, text=True) as child:
        try:
            with pytest.raises(ConfigError, match=r"was not done in 0\.1 s: is the hub slow"):
                model._told(child)
        finally:
            child.kill()
