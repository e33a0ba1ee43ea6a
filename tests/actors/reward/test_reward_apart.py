"""Built-in rewards are scored without network and HOME, the user's own with both; no text and no row is code to any of them."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from actors.reward.process import ScoringProcess
from actors.reward.processes import ScoringProcesses
from grpo_ray.config.reward import RewardConfig, RewardFunctionConfig
from grpo_ray.errors import RewardError
from grpo_ray.rewards.functions.function import ScoreInputs
from grpo_ray.rewards.table import BUILTINS
from grpo_ray.types import ScoreStatus
from tests.rewards.test_reasoning_gym_reward import attacks

MINE = """
import os, socket

def reaches(completions, **kwargs):
    with socket.create_connection(("127.0.0.1", int(completions[0])), 5):
        return [float("HOME" in os.environ and "A_TOKEN" in os.environ)]
"""
ENTRY = {"question": "1 + 1", "answer": "2", "metadata": {}}
COLUMNS: dict[str, Any] = {
    "answer": "2",
    "solution": "2",
    "target": 2,
    "nums": [1, 1],
    "tests": [{"input": "", "output": "2"}],
    "language": "en",
    "reasoning_gym_entry": ENTRY,
    "reasoning_gym_task": "chain_sum",
    "instruction_id_list": ["punctuation:no_comma", "detectable_format:json_format", "language:response_language"],
    "kwargs": [{}, {}, {"language": "en"}],
}
ARGS: dict[str, dict[str, Any]] = {
    "soft_overlong": {"max_length": 100, "cache_length": 10},
    "repetition_penalty": {"ngram_size": 3},
}


def config_of(*names: str, **options: Any) -> RewardConfig:
    functions = tuple(RewardFunctionConfig(name=n, args=ARGS.get(n, {})) for n in names)
    return RewardConfig(functions=functions, **{"timeout_s": 60.0, **options})


BUILT_IN = [n for n in BUILTINS if not RewardFunctionConfig(name=n).needs_host]


@pytest.fixture
def server() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.settimeout(0)
        yield listening


@pytest.fixture(scope="module")
def built_ins() -> Iterator[ScoringProcess]:
    os.environ["A_TOKEN"] = "secret-of-the-node"
    process = ScoringProcess(config_of(*BUILT_IN, env={"A_TOKEN": "${A_TOKEN}", "MINE": "1"}), 300)
    try:
        process.start()
        yield process
    finally:
        process.kill()
        del os.environ["A_TOKEN"]


def test_all_built_ins_but_those_that_ask_a_server_or_load_a_model_are_apart() -> None:
    assert set(BUILTINS) - set(BUILT_IN) == {"judge", "reward_model"}
    assert not RewardFunctionConfig(name="reasoning_gym").needs_host
    assert RewardFunctionConfig(name="my.reward").needs_host
    assert RewardFunctionConfig(name="my.py:reward").needs_host


def test_the_process_of_built_in_rewards_has_no_network_no_home_and_no_secret(built_ins: ScoringProcess) -> None:
    assert built_ins.pid is not None
    environment = psutil.Process(built_ins.pid).environ()
    assert {"HOME", "A_TOKEN", "HF_HOME"} & set(environment) == set()
    assert environment["MINE"] == "1"
    interfaces = Path(f"/proc/{built_ins.pid}/net/dev").read_text()
    sockets = [line for line in Path(f"/proc/{built_ins.pid}/status").read_text().splitlines() if line == "Seccomp:\t2"]
    assert sockets or [line for line in interfaces.splitlines() if ":" in line and "lo:" not in line] == []
    if os.geteuid() == 0:
        assert os.readlink(f"/proc/{built_ins.pid}/ns/net") != os.readlink("/proc/self/ns/net")


def test_no_built_in_reward_runs_a_completion_or_a_row(
    built_ins: ScoringProcess, server: socket.socket, tmp_path: Path
) -> None:
    tmp_path.chmod(0o777)
    hostile = attacks(tmp_path / "canary", server.getsockname()[1])
    calls = []
    for index, _ in enumerate(BUILT_IN):
        for attack in hostile:
            text = f"<think>\n{attack}\n</think>\n<answer>{attack}</answer> \\boxed{{{attack}}}\n"
            text += f"```python\n{attack}\n```\n#### {attack}"
            calls.append((index, ScoreInputs(["p"], [text], [[1]], {k: [v] for k, v in COLUMNS.items()})))
        row = {k: [hostile[0] if isinstance(v, str) else [hostile[0]]] for k, v in COLUMNS.items()}
        calls.append(
            (
                index,
                ScoreInputs(["p"], ["2"], [[1]], {**row, "reasoning_gym_entry": [dict.fromkeys(ENTRY, hostile[0])]}),
            )
        )
    results = [result for (result,) in built_ins.run(calls)]
    of_completions = [r for i, r in enumerate(results) if (i + 1) % (len(hostile) + 1)]
    assert {r.status for r in of_completions} <= {ScoreStatus.OK, ScoreStatus.NOT_APPLICABLE}, of_completions
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(BlockingIOError):
        server.accept()


def test_the_users_own_functions_have_network_home_and_what_env_names(
    server: socket.socket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "apart_mine.py").write_text(MINE)
    monkeypatch.setenv("A_TOKEN", "secret-of-the-node")
    env = {"PYTHONPATH": str(tmp_path), "A_TOKEN": "${A_TOKEN}"}
    processes = ScoringProcesses(
        config_of("r1_format", "apart_mine.reaches", "exact_match", env=env, unit="sample"), 300
    )
    processes.start()
    try:
        port = str(server.getsockname()[1])
        inputs = ScoreInputs(["p"], [port], [[1]], {"answer": [port]})
        results = processes.run([(1, inputs), (2, inputs), (0, inputs), (1, inputs)])
        assert [r.value for (r,) in results] == [1.0, 1.0, 0.0, 1.0], results
        assert [r.name for (r,) in results] == ["apart_mine.reaches", "exact_match", "r1_format", "apart_mine.reaches"]
    finally:
        processes.kill()


LEAVE = """
import asyncio, socket
from actors.reward import apart
{}
apart.leave_network()
for family, address in ((socket.AF_INET, ("127.0.0.1", {})), (socket.AF_INET6, ("::1", 9)), (socket.AF_UNIX, "\\0{}")):
    try:
        socket.socket(family).connect(address)
    except OSError as e:
        print(type(e).__name__)
print(asyncio.run(asyncio.sleep(0, 7)))
from grpo_ray.sandbox.isolation import Languages
from grpo_ray.sandbox.trial import check_isolation
asyncio.run(check_isolation(Languages()))
"""


@pytest.mark.parametrize("missing", ["", "_new_network", "_no_connections"])
def test_either_way_of_leaving_the_network_is_enough(missing: str, server: socket.socket) -> None:
    """And sandboxes work in it."""
    name = f"grpo-ray-apart-{os.getpid()}"
    with socket.socket(socket.AF_UNIX) as unix:
        unix.bind(f"\0{name}")
        unix.listen()
        script = LEAVE.format(f"apart.{missing} = lambda: 'not here'" if missing else "", server.getsockname()[1], name)
        done = leave(script)
    assert done.returncode == 0, done.stderr
    *refused, seven = done.stdout.split()
    assert (len(refused), seven) == (3, "7")
    with pytest.raises(BlockingIOError):
        server.accept()


def test_where_the_network_cannot_be_left_built_in_rewards_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from actors.reward import apart

    monkeypatch.setattr(apart, "_new_network", lambda: "no namespaces")
    monkeypatch.setattr(apart, "_no_connections", lambda: "no filter")
    with pytest.raises(RewardError, match="no namespaces; no filter"):
        apart.leave_network()


def leave(script: str, *before: str) -> subprocess.CompletedProcess[str]:
    root = str(Path(__file__).parents[3])
    return subprocess.run(
        [*before, sys.executable, "-c", script],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": root},
        timeout=300,
        check=False,
    )
