"""No answer, and no row, is code to the verifiers of reasoning-gym."""

from __future__ import annotations

import copy
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import reasoning_gym as library
from reasoning_gym.factory import DATASETS

from grpo_ray.config.reward import RewardFunctionConfig
from grpo_ray.rewards.functions.function import RewardFunction, ScoreInputs
from grpo_ray.rewards.functions.scoring import call_reward
from grpo_ray.rewards.table import resolve
from grpo_ray.types import RewardScore, ScoreStatus

TASKS = sorted(set(DATASETS) - {"composite"})
"""`composite` is made of others and takes no configuration of its own here."""
EVALUATING = (
    *("spiral_matrix", "string_insertion", "binary_matrix", "n_queens", "puzzle24", "countdown"),
    *("simple_integration", "intermediate_integration", "polynomial_multiplication"),
)


@pytest.fixture(scope="module")
def reward() -> RewardFunction:
    return resolve(RewardFunctionConfig(name="reasoning_gym"), load=True)


@pytest.fixture(scope="module")
def datasets() -> dict[str, Any]:
    return {task: library.create_dataset(task, seed=1, size=1) for task in TASKS}


@pytest.fixture(scope="module")
def entries(datasets: dict[str, Any]) -> dict[str, Any]:
    return {task: dataset[0] for task, dataset in datasets.items()}


@pytest.fixture
def canary(tmp_path: Path) -> Iterator[tuple[Path, int]]:
    """A file that is not to be made, and the port of a server that is not to be called."""
    tmp_path.chmod(0o777)
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0)
        yield tmp_path / "canary", server.getsockname()[1]
        with pytest.raises(BlockingIOError):
            server.accept()
    assert list(tmp_path.iterdir()) == []


def score(reward: RewardFunction, rows: list[tuple[str, Any, Any]]) -> list[RewardScore]:
    columns = {"reasoning_gym_task": [t for t, _, _ in rows], "reasoning_gym_entry": [e for _, _, e in rows]}
    return call_reward(reward, ScoreInputs(["p"] * len(rows), [a for _, a, _ in rows], [[1]] * len(rows), columns))


def attacks(file: Path, port: int) -> list[str]:
    shell = f"__import__('os').system('echo > {file}; echo > /dev/tcp/127.0.0.1/{port}')"
    call = f"__import__('socket').create_connection(('127.0.0.1', {port}))"
    return [
        shell,
        f"[{shell}]",
        f"[[{shell}, {call}]]",
        f"exec({shell!r})",
        f"eval({shell!r})",
        f"sympify({shell!r})",
        f"open('{file}', 'w')",
        f"(lambda: {shell})()",
        f"[x for x in [{shell}]]",
        f"Symbol('x').__class__.__base__.__subclasses__()[0].__init__.__globals__['__builtins__']['exec']({shell!r})",
        f"x + {shell}",
    ]


def test_no_tasks_verifier_runs_an_answer(
    reward: RewardFunction, entries: dict[str, Any], canary: tuple[Path, int]
) -> None:
    rows = [(task, f"<answer>{attack}</answer>", entries[task]) for task in TASKS for attack in attacks(*canary)]
    results = score(reward, rows)
    assert len(results) == len(TASKS) * len(attacks(*canary)) > 1000
    assert {r.status for r in results} == {ScoreStatus.OK}
    nothing = dict(zip(TASKS, score(reward, [(task, "nothing", entries[task]) for task in TASKS]), strict=True))
    gains = [row[:2] for row, r in zip(rows, results, strict=True) if r.value >= 1.0 > nothing[row[0]].value]
    assert gains == []


@pytest.mark.usefixtures("canary")
def test_the_attacks_of_this_file_succeed_where_nothing_holds_them(entries: dict[str, Any], tmp_path: Path) -> None:
    attack = f"__import__('os').system('echo > {tmp_path / 'made'}')"
    ran = []
    for task in EVALUATING:
        answer = f"[{attack}]" if task in ("spiral_matrix", "string_insertion", "binary_matrix", "n_queens") else attack
        library.get_score_answer_fn(task)(answer, entries[task])
        if (tmp_path / "made").exists():
            ran.append(task)
            (tmp_path / "made").unlink()
    assert set(ran) >= set(EVALUATING) - {"n_queens", "string_insertion"}


def test_every_tasks_own_answer_is_worth_what_its_verifier_says(
    reward: RewardFunction, datasets: dict[str, Any], entries: dict[str, Any]
) -> None:
    rows = [(task, str(entries[task]["answer"]), entries[task]) for task in TASKS]
    expected = [datasets[task].score_answer(answer, entry) for task, answer, entry in rows]
    assert [r.value for r in score(reward, rows)] == expected
    assert sum(expected) > 100


@pytest.mark.parametrize("name", ["oracle_answer", "entry['answer']", "answer", "self", "oracle_answer.split()"])
def test_an_answer_cannot_name_what_its_verifier_knows(
    reward: RewardFunction, entries: dict[str, Any], name: str
) -> None:
    results = score(reward, [(task, name, entries[task]) for task in EVALUATING])
    assert all(r.status is ScoreStatus.OK and r.value < 0.5 for r in results), results


def test_immediate_future_may_be_literals_arithmetic_and_formulas(
    reward: RewardFunction, entries: dict[str, Any]
) -> None:
    countdown, integral, spiral = (
        copy.deepcopy(entries[t]) for t in ("countdown", "simple_integration", "spiral_matrix")
    )
    listed = str(entries["spiral_matrix"]["answer"].split())
    integral["metadata"] |= {"integrand": "2*cos(x) + sqrt(4)", "variable": "x"}
    rows = [
        ("countdown", entries["countdown"]["answer"], countdown),
        ("simple_integration", "2*sin(x) + 2*x + C", integral),
        ("simple_integration", "2*sin(x) + 3*x + C", integral),
        ("spiral_matrix", listed, spiral),
    ]
    results = score(reward, rows)
    assert [r.value for r in results] == [1.0, 1.0, results[2].value, 0.1]
    assert results[2].value < 0.1


def test_an_answer_that_computes_without_end_is_wrong_and_the_next_ones_are_scored(
    reward: RewardFunction, entries: dict[str, Any]
) -> None:
    hostile = [
        "9**9**9**9",
        "2**(9**9)",
        "factorial(9**9)",
        "(" * 30_000,
        "-" * 32_000 + "1",
        "[" * 32_000 + "]" * 32_000,
        "9" * 32_000,
        "\0",
        "\ud800",
        "1e999999999",
    ]
    right = ("countdown", entries["countdown"]["answer"], entries["countdown"])
    rows = [right, *((t, h, entries[t]) for h in hostile for t in ("countdown", "spiral_matrix")), right]
    results = score(reward, rows)
    assert [r.status for r in results] == [ScoreStatus.OK] * len(rows), [r for r in results if r.status != "ok"]
    assert [results[0].value, results[-1].value] == [1.0, 1.0]
    assert max(r.value for r in results[1:-1]) < 0.5


# ---- rows


def test_no_field_of_a_row_is_run(reward: RewardFunction, entries: dict[str, Any], canary: tuple[Path, int]) -> None:
    rows = []
    for attack in attacks(*canary):
        sorting, bits = copy.deepcopy(entries["number_sorting"]), copy.deepcopy(entries["bitwise_arithmetic"])
        sorting["answer"] = attack
        bits["metadata"]["problem"] = attack
        rows += [("number_sorting", "['1']", sorting), ("bitwise_arithmetic", "0x1", bits)]
        for task in EVALUATING:
            entry = copy.deepcopy(entries[task])
            entry["metadata"] = dict.fromkeys(entry["metadata"], attack)
            rows.append((task, "1", entry))
            rows.append((task, "1", {**entries[task], "answer": attack}))
    assert len(score(reward, rows)) == len(rows)


@pytest.mark.parametrize("task", ["no_such_task", "os.system", "../../etc/passwd", "", 5, ["chain_sum"], {}])
def test_a_column_that_names_no_task_fails_its_row_alone(
    reward: RewardFunction, entries: dict[str, Any], task: Any
) -> None:
    right = ("countdown", entries["countdown"]["answer"], entries["countdown"])
    results = score(reward, [right, (task, "1", entries["countdown"]), right])
    assert [r.status for r in results] == [ScoreStatus.OK, ScoreStatus.ERROR, ScoreStatus.OK]
    assert "see column reasoning_gym_task" in results[1].detail


@pytest.mark.parametrize("entry", [{}, {"answer": None}, [], "x", 5, {"answer": object()}])
def test_a_row_that_cannot_be_scored_is_an_error_of_the_row(reward: RewardFunction, entry: Any) -> None:
    (result,) = score(reward, [("chain_sum", "1", entry)])
    assert result.status is ScoreStatus.ERROR
    assert "see column reasoning_gym_entry" in result.detail
