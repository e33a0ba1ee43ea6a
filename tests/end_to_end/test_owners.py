"""Two commands on one run, and on one pipeline's stage: with the real workers, killed in the middle."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from tests.end_to_end.runs import LIMIT_S, finish, launch, ledger, metrics, run, train, write_recipe

pytestmark = [pytest.mark.slow, pytest.mark.timeout(4 * LIMIT_S)]


def wait_for(folder: Path, pattern: str) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not any(p.stat().st_size for p in folder.glob(pattern)):
        assert time.monotonic() < deadline, f"no {pattern} came in {folder}"
        time.sleep(0.1)


def test_a_run_that_is_under_way_is_not_run_twice_and_a_killed_one_goes_on(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path)
    args, folder = train(recipe, "owned", "num_steps=5000", "checkpoint.every_steps=2")
    first = launch(*args)
    wait_for(folder, "metrics.jsonl")
    for second in ([*args], ["resume", str(folder)]):
        code, output = run(*second)
        assert code == 2, output
        assert f"{os.uname().nodename} (process {first.pid}), since 2" in output
        assert "Traceback" not in output
    wait_for(folder, "checkpoints/step-*/manifest.json")
    # The command alone: its controller has to notice that, and the next one to wait for it.
    first.kill()
    first.wait()
    # It may do some more steps before it does.
    num_steps = len(metrics(folder)) + 100
    config = (folder / "config.yaml").read_text()
    assert "num_steps: 5000" in config
    (folder / "config.yaml").write_text(config.replace("num_steps: 5000", f"num_steps: {num_steps}"))
    pair = [launch("resume", str(folder)) for _ in range(2)]
    ended = [finish(p) for p in pair]
    assert sorted(code for code, _ in ended) == [0, 2], ended
    assert [m["step"] for m in metrics(folder)] == list(range(1, num_steps + 1))
    rows = ledger(folder)
    assert len({row[1] for row in rows}) == len(rows)
    assert not (folder / ".owner").exists()
