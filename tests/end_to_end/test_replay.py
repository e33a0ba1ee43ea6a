"""A step of a real run, repeated by the learner alone: the same bits."""

from __future__ import annotations

import re
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from tests.end_to_end.runs import LIMIT_S, metrics, run, train, write_recipe

pytestmark = [pytest.mark.timeout(5 * LIMIT_S), pytest.mark.slow]
SAME_BITS = re.compile(r"(loss/policy|grad_norm) +recorded (\S+)  replayed (\S+)  the same bits")


def files_of(run_dir: Path) -> dict[str, int]:
    """All but the logs, with the time of their last change."""
    found = [p for p in run_dir.rglob("*") if p.is_file() and "logs" not in p.parts]
    return {str(p): p.stat().st_mtime_ns for p in found}


def test_a_replayed_step_has_the_same_bits_and_a_changed_batch_has_not(tmp_path: Path) -> None:
    harder = ["algorithm.num_mini_batches=2", "algorithm.beta=0.04", "learner.lr_scheduler_type=cosine"]
    args, run_dir = train(write_recipe(tmp_path), "whole", "num_steps=4", "checkpoint.every_steps=2", *harder)
    code, output = run(*args)
    assert code == 0, output
    before = files_of(run_dir)

    for step in (1, 3):
        code, output = run("replay", str(run_dir), "--step", str(step))
        assert code == 0, output
        recorded = next(m for m in metrics(run_dir) if m["step"] == step)
        told = {name: (float(then), float(now)) for name, then, now in SAME_BITS.findall(output)}
        assert told == {name: (recorded[name],) * 2 for name in ("loss/policy", "grad_norm")}, output
        assert recorded["grad_norm"] > 0
    assert files_of(run_dir) == before, "a replay writes logs and nothing else"

    code, output = run("replay", str(run_dir), "--step", "4")
    assert code == 1, output
    assert "no checkpoint of step 3" in output
    assert "Steps that can: 1, 3;" in output

    path = run_dir / "rollouts" / "step-000003.parquet"
    table = pq.read_table(path)
    place = table.column_names.index("advantage")
    bent = pc.multiply(table["advantage"], pa.scalar(1.001))
    pq.write_table(table.set_column(place, table.schema.field(place), bent), path)
    code, output = run("replay", str(run_dir), "--step", "3")
    assert code == 1, output
    assert re.search(r"error: grad_norm .*, too large", output), output
    assert "not repeated after" in output
