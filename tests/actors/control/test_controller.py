"""What the controller takes from outside and tells to it, without a cluster."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from actors.control import learning
from grpo_ray.errors import DeadlineError

ROOT = Path(__file__).parents[3]
# In a process of its own: a controller takes over the output of the process that it is made in.
PROGRAM = """
import asyncio, sys
from actors.control.controller_start import Controller
from grpo_ray.config.schema import RunConfig
from grpo_ray.errors import ConfigError

async def main(told):
    config = RunConfig.model_validate({"model": {"tiny": {}, "dtype": "float32"}, "data": {"train": {"path": "x"}},
                                       "reward": {"functions": [{"name": "accuracy"}]}})
    controller = Controller("sft", config, sys.argv[1], None)
    for reason in ("stopped", "a b", "x" * 200, "; rm"):
        try:
            await controller.stop(reason)
        except ConfigError:
            print("refused", file=told)
    controller._controller._context.warn("GET https://x/?key=hf_abcdefgh failed")
    await controller.run()
    events, count = await controller.events(0, 1)
    for event in events:
        print(event, file=told)
    print(count, await controller.events(count, 0.01), file=told)

asyncio.run(main(open(sys.argv[2], "w")))
"""


def test_a_controller_takes_words_for_reasons_and_tells_no_secrets(tmp_path: Path) -> None:
    env = os.environ | {"PYTHONPATH": str(ROOT), "HF_TOKEN": "hf_abcdefgh", "X_SECRET": "RunConfig"}
    subprocess.run([sys.executable, "-c", PROGRAM, tmp_path, tmp_path / "told"], env=env, check=True, timeout=120)
    lines = (tmp_path / "told").read_text().splitlines()
    assert lines[:3] == ["refused"] * 3
    assert "key=[hidden] failed" in lines[3]
    assert "no run of kind sft with a [hidden]" in lines[4]
    assert lines[5:] == ["2 ([], 2)"]
    log = (tmp_path / "logs" / "controller.log").read_text()
    assert "no run of kind sft with a [hidden]" in log


def test_a_controller_is_there_before_torch_is_imported() -> None:
    """Engines begin to start then."""
    code = "import sys, actors.control.controller; print([m for m in ('torch', 'transformers', 'pandas') if m in sys.modules])"
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    told = subprocess.run(
        [sys.executable, "-c", code], env=env, check=True, timeout=120, capture_output=True, text=True
    )
    assert told.stdout == "[]\n"


def test_an_import_of_torch_that_hangs_ends_at_the_deadline_of_a_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learning, "_import", lambda: time.sleep(1))
    with pytest.raises(DeadlineError, match=r"the import of torch .* within 0\.05 s.*deadlines\.start_s"):
        asyncio.run(learning.import_learning(0.05))
