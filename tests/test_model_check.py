"""`grpo-ray check` without torch: as the command runs it, in a process that has imported nothing else."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, AutoTokenizer, BloomConfig

from grpo_ray.config_model import TinyModelConfig
from grpo_ray.errors import ConfigError
from grpo_ray.tiny import build_tiny_model, describe_tiny_model
from launch import model_check

ROOT = Path(__file__).parent.parent
NUM_ROWS = 200_000
MAX_MB = 340
SCRIPT = """
import json, sys
from grpo_ray.errors import ConfigError
from launch.check import check_recipe

def check(*overrides):
    try:
        check_recipe("r.yaml", overrides, makes_models=False)
        refused = None
    except ConfigError as e:
        refused = str(e)
    imported = sorted({"torch", "ray", "deepspeed", "datasets", "accelerate", "plotly"} & set(sys.modules))
    with open("/proc/self/status") as file:
        peak = next(int(line.split()[1]) / 1024 for line in file if line.startswith("VmHWM"))
    print(json.dumps({"refused": refused, "imported": imported, "peak_mb": peak}))

check()
for path in ("good", "bloom"):
    check("model.tiny=null", "data.train.limit=100", f"model.path={path}")
"""
RECIPE = """
model: {tiny: {hidden_size: 64, num_layers: 2, num_heads: 2, num_kv_heads: 1, context: 256}, dtype: float32}
data: {train: {path: rows.jsonl}, max_prompt_length: 200}
reward: {functions: [{name: accuracy}], num_cpus: 0}
rollout: {num_cpus: 0.5, max_completion_length: 16}
learner: {num_cpus: 0.5}
prompts_per_step: 4
num_steps: 2
"""


@pytest.fixture(scope="module")
def checked(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> tuple[list[dict[str, Any]], str]:
    """What is said of each check (many rows with a tiny model, a model in a folder, one that can't be trained), and the output."""
    folder = tmp_path_factory.mktemp("checked")
    (folder / "r.yaml").write_text(RECIPE)
    with (folder / "rows.jsonl").open("w") as file:
        file.writelines(
            json.dumps({"prompt": f"{i} + {i % 7} =" + " " * 100, "answer": str(i + i % 7)}) + "\n"
            for i in range(NUM_ROWS)
        )
    (folder / "good").symlink_to(tiny_model)
    (folder / "bloom").mkdir()
    for file in tiny_model.iterdir():
        (folder / "bloom" / file.name).write_bytes(file.read_bytes())
    BloomConfig(hidden_size=64, n_layer=2, n_head=2, vocab_size=320, seq_length=256).save_pretrained(folder / "bloom")
    env = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "300"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], cwd=folder, env=env, capture_output=True, text=True, timeout=300
    )
    said = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(said) == 3, done.stdout + done.stderr
    return said, done.stdout


def test_a_check_of_many_rows_needs_neither_torch_nor_ray_nor_much_memory(
    checked: tuple[list[dict[str, Any]], str],
) -> None:
    said, output = checked
    assert said[0]["refused"] is None
    assert f"1,000 of {NUM_ROWS:,} rows" in output
    assert said[0]["imported"] == []
    assert said[0]["peak_mb"] < MAX_MB


def test_another_process_tells_whether_a_model_can_be_trained(checked: tuple[list[dict[str, Any]], str]) -> None:
    said, output = checked
    assert said[1]["refused"] is None
    assert "0.1 M parameters" in output
    assert "do not use Transformers' attention interface" in said[2]["refused"]
    assert said[2]["imported"] == []


@pytest.mark.parametrize("options", [{}, {"words": ("one", "two"), "vocab_size": 512, "num_layers": 1}])
def test_a_tiny_model_is_described_as_it_is_made(tmp_path: Path, options: dict[str, Any]) -> None:
    config = TinyModelConfig(**{"hidden_size": 64, "num_layers": 2, "num_heads": 2, "num_kv_heads": 1, **options})
    made = build_tiny_model(tmp_path / "made", config)
    described = describe_tiny_model(tmp_path / "described", config)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        assert (described / name).read_bytes() == (made / name).read_bytes()
    configs = [AutoConfig.from_pretrained(folder).to_dict() for folder in (made, described)]
    assert {k for k in configs[0] if configs[0][k] != configs[1].get(k)} <= {"architectures", "dtype", "_name_or_path"}
    assert len(AutoTokenizer.from_pretrained(described)) == len(AutoTokenizer.from_pretrained(made))


def test_a_process_that_does_not_answer_is_told_and_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_check, "QUESTION_S", 0.1)
    with subprocess.Popen(["sleep", "600"], stdout=subprocess.PIPE, text=True) as child:
        try:
            with pytest.raises(ConfigError, match=r"was not done in 0\.1 s: is the hub slow"):
                model_check._told(child)
        finally:
            child.kill()
