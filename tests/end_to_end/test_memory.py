"""Memory runs out for real: Ray's monitor, with a threshold a little above what a run takes, ends workers of this test's own
cluster while a process beside it presses."""

from __future__ import annotations

import json
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from tests.end_to_end.runs import LIMIT_S, finish, launch, metrics, run, train, write_recipe

pytestmark = [pytest.mark.slow, pytest.mark.timeout(6 * LIMIT_S)]

ROOM_GB, PIECE_GB, MOST_GB = 6.0, 0.5, 11.0
"""That a run may take, and what is taken from it at once, and in all."""
NUM_STEPS = 40


@pytest.fixture(autouse=True)
def a_low_threshold(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = psutil.virtual_memory()
    if memory.available < (ROOM_GB + MOST_GB) * 2**30:
        pytest.skip("this machine has too little memory to spare for it")
    in_use = 1 - memory.available / memory.total
    monkeypatch.setenv("RAY_memory_usage_threshold", f"{in_use + ROOM_GB * 2**30 / memory.total:.4f}")
    monkeypatch.setenv("RAY_memory_monitor_refresh_ms", "250")


def told(folder: Path) -> list[str]:
    path = folder / "messages.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [m["text"] for line in lines if "lack of memory" in (m := json.loads(line))["text"]]


def press(folder: Path, process: subprocess.Popen[str]) -> None:
    """Until something was ended for it."""
    before = len(told(folder))
    pieces: list[bytes] = []
    while len(told(folder)) == before and process.poll() is None:
        if len(pieces) * PIECE_GB < MOST_GB:
            pieces.append(b"x" * int(PIECE_GB * 2**30))
        time.sleep(0.5)


def test_a_run_goes_on_when_memory_ran_out_or_says_how_to(tmp_path: Path) -> None:
    args, folder = train(write_recipe(tmp_path), "short", f"num_steps={NUM_STEPS}", "checkpoint.every_steps=1")
    command, resumed = args, 0
    pressed = 0
    while True:
        process = launch(*command)
        deadline = time.monotonic() + LIMIT_S
        before = len(metrics(folder)) if (folder / "metrics.jsonl").exists() else 0
        while process.poll() is None and pressed < 4:
            assert time.monotonic() < deadline
            if (folder / "metrics.jsonl").exists() and len(metrics(folder)) > before:
                press(folder, process)
                pressed, before = pressed + 1, len(metrics(folder)) + 2
            time.sleep(0.2)
        code, output = finish(process)
        print(output)
        assert "Traceback" not in output
        assert "Object store memory usage" not in output
        if code == 0:
            break
        assert code == 1, output
        assert "for lack of memory" in output
        assert f"grpo-ray resume {folder}" in output
        resumed += 1
        assert resumed < 4
        command = ["resume", str(folder)]
    assert [m["step"] for m in metrics(folder)] == list(range(1, NUM_STEPS + 1))
    assert told(folder) or resumed
    for text in told(folder):
        assert len(text.splitlines()) <= 3
        assert "Lower " in text
    assert run("report", str(folder))[0] == 0
