"""A function of TRL's signature and one of verl's, each in a run of its own, unchanged."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from grpo_ray.run.rollout_log import read_rollouts, rollout_steps
from tests.end_to_end.runs import LIMIT_S, metrics, run, train, write_recipe

pytestmark = [pytest.mark.timeout(2 * LIMIT_S), pytest.mark.slow]
EXAMPLES = "tests.reward_examples."


def test_trls_function_ranks_its_group_knows_the_step_and_logs(tmp_path: Path) -> None:
    args, run_dir = train(
        write_recipe(tmp_path), "trl", f"reward.functions=[{{name: {EXAMPLES}ranked_digits}}]", "num_steps=2"
    )
    code, output = run(*args, "data.template=chat")
    assert code == 0, output
    lines = metrics(run_dir)
    assert all(0 <= line["logged/share"] <= 1 for line in lines)
    assert all("reward/failed" not in line or line["reward/failed"] == 0 for line in lines)
    for step, path in rollout_steps(run_dir / "rollouts").items():
        rows = read_rollouts(path)
        extras = [json.loads(row["rewards"][0]["extra"]) for row in rows]
        assert {(e["seen"], e["step"]) for e in extras} == {(4, step - 1)}
        for group in {row["group"] for row in rows}:
            assert min(row["reward"] for row in rows if row["group"] == group) == 0.0


def test_verls_function_runs_on_verls_data(tmp_path: Path) -> None:
    rows = [
        {
            "data_source": "digits",
            "prompt": [{"role": "user", "content": f"{i}+1?"}],
            "ability": "math",
            "reward_model": {"style": "rule", "ground_truth": str(i + 1)},
            "extra_info": {"split": "train", "index": i},
        }
        for i in range(16)
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "train.parquet")
    functions = f"reward.functions=[{{name: {EXAMPLES}digits_score}}]"
    args, run_dir = train(
        write_recipe(tmp_path), "verl", functions, "num_steps=2", "data.eval=null", "data.template=chat"
    )
    code, output = run(*args, f"data.train={{path: {tmp_path}/train.parquet, args: {{}}}}")
    assert code == 0, output
    (path, *_) = rollout_steps(run_dir / "rollouts").values()
    for row in read_rollouts(path):
        extra = json.loads(row["rewards"][0]["extra"])
        assert (row["reward_status"], extra["pred"]) == ("ok", row["completion"][-3:])
    assert all(0 <= line["logged/acc"] <= 1 for line in metrics(run_dir))
    code, output = run(
        *args,
        f"data.train={{path: {tmp_path}/train.parquet, args: {{}}, columns: {{source: reward_model}}}}",
        "name=bad",
    )
    assert code == 1, output
    assert "needs the column 'reward_model.ground_truth' or 'ground_truth' or 'answer'" in " ".join(output.split())
    assert "Traceback" not in output
