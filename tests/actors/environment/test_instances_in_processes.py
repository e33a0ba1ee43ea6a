"""Environments in real processes of their own: what they answer, how they end, and what is left of them."""

from __future__ import annotations

import asyncio
import os
import pickle
import signal
import time
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest

from actors.environment.hosts import Host, Hosts
from actors.environment.messages import Describe, End, Step, ToolUse
from actors.environment.process import EnvironmentProcess
from actors.reward.family import TAG
from grpo_ray.config.environment import EnvironmentConfig
from grpo_ray.config.reward import RewardFunctionConfig
from grpo_ray.episodes.calls import ToolCall
from grpo_ray.episodes.episode import EnvironmentFailedError
from grpo_ray.errors import RewardError
from grpo_ray.rewards.functions.function import ScoreInputs
from grpo_ray.types import ScoreStatus

GAMES = Path(__file__).parent / "games.py"
START_S = 120.0


def config_of(name: str, **options: Any) -> EnvironmentConfig:
    given = {"name": f"{GAMES}:{name}", "reset_timeout_s": 60, "step_timeout_s": 60, **options}
    return EnvironmentConfig.model_validate(given)


def process_of(config: EnvironmentConfig, *functions: str) -> EnvironmentProcess:
    rewards = tuple(RewardFunctionConfig(name=f"{GAMES}:{name}") for name in functions)
    return EnvironmentProcess(config, rewards, START_S)


def with_hosts(config: EnvironmentConfig, use: Callable[[Hosts], Awaitable[Any]], *functions: str) -> Any:
    """Use the places of one worker, and check that nothing of it is left."""
    tags = []

    def make() -> EnvironmentProcess:
        process = process_of(config, *functions)
        tags.append(process.tag)
        return process

    async def whole() -> Any:
        hosts = Hosts(config, make)
        try:
            return await use(hosts)
        finally:
            await hosts.close()

    out = asyncio.run(whole())
    assert not [pid for tag in tags for pid in marked(tag)]
    return out


def marked(tag: str) -> list[int]:
    """The living processes with this mark."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.status() != psutil.STATUS_ZOMBIE and process.environ().get(TAG) == tag:
                found.append(process.pid)
        except psutil.Error:
            continue
    return found


async def begun(hosts: Hosts, seed: int = 1, environment: str = "", **row: Any) -> tuple[int, Any]:
    ticket = await hosts.acquire()
    answer = await hosts.begin(ticket, environment, pickle.dumps(row), seed)
    return ticket, answer["observation"]


async def called(hosts: Hosts, ticket: int, name: str, arguments: Any = None) -> tuple[Any, bool]:
    answer = await hosts.use(ticket, lambda place: ToolUse(place, ToolCall(name, arguments)))
    return answer["content"], answer["error"]


async def ended(hosts: Hosts, ticket: int, **columns: list[Any]) -> dict[str, Any]:
    inputs = ScoreInputs(["p"], [[{"role": "assistant", "content": "c"}]], [[1, 2]], columns, environments=[])
    return await hosts.use(ticket, lambda place: End(place, pickle.dumps(inputs)))


async def whole_episode(hosts: Hosts, ticket: int, row: dict[str, Any]) -> None:
    await hosts.begin(ticket, "", pickle.dumps(row), 1)
    await called(hosts, ticket, "act")
    await ended(hosts, ticket)


def test_a_class_of_trls_contract_runs_as_it_is() -> None:
    async def use(hosts: Hosts) -> None:
        ticket, observation = await begun(hosts, hint=" start", answer=3)
        assert observation == " start"
        assert await called(hosts, ticket, "add", {"number": 2}) == ("2", False)
        assert await called(hosts, ticket, "add_slowly", {"number": 3}) == ("5", False)
        assert await called(hosts, ticket, "double", {"number": 4}) == ("8", False)
        answer = await ended(hosts, ticket)
        assert answer["reward"] == 5.0
        assert [(name, status, value) for name, status, value, *_ in answer["scores"]] == [
            ("games.total_of", "ok", 0.5)
        ]
        await hosts.release(ticket)
        again, observation = await begun(hosts)
        assert observation is None
        assert (await ended(hosts, again))["reward"] == 0.0

    with_hosts(config_of("Counter", tools=[f"{GAMES}:double"]), use, "total_of")


@pytest.mark.parametrize(
    ("name", "arguments", "told"),
    [
        ("fail", None, '{"error": "out of luck"}'),
        ("fail", {}, '{"error": "out of luck"}'),
        ("nothing", {}, "there is no tool 'nothing'; there are: "),
        ("reset", {}, "there is no tool 'reset'"),
        ("get_reward", {}, "there is no tool 'get_reward'"),
        ("", {}, "the call names no tool"),
        ("add", None, "missing 1 required positional argument"),
        ("add", [1], "the arguments of add are a list, expected an object"),
        ("add", "1", "the arguments of add are a text, expected an object"),
        ("add", {"wrong": 1}, "unexpected keyword argument"),
        ("add", {"number": "x"}, '{"error": '),
    ],
)
def test_what_can_not_be_called_is_an_error_for_the_model_to_read(
    counter: Any, name: str, arguments: Any, told: str
) -> None:
    content, is_error = counter.call(ToolCall(name, arguments))
    assert is_error
    assert content.startswith('{"error": ')
    assert told in content


@pytest.fixture
def counter() -> Any:
    from grpo_ray.episodes.described import load_all

    instance = load_all(config_of("Counter"))[""].instance()
    instance.reset({}, 1)
    return instance


def test_games_of_three_shapes_are_played_by_their_own_methods() -> None:
    async def use(hosts: Hosts) -> dict[str, Any]:
        out = {}
        for name in ("gym", "skyrl", "arena"):
            ticket, first = await begun(hosts, environment=name, prompt="hello", answer="no way")
            steps = []
            for action in ["no way"] if name == "skyrl" else ["a", "b"]:
                answer = await hosts.use(ticket, partial(Step, action=action))
                steps.append((answer["messages"], answer["reward"], answer["done"]))
            out[name] = (first, steps, (await ended(hosts, ticket))["reward"])
            await hosts.release(ticket)
        return out

    classes = {"gym": "Guess", "skyrl": "Skyrl", "arena": "Arena"}
    config = EnvironmentConfig.model_validate(
        {"classes": {name: {"name": f"{GAMES}:{found}"} for name, found in classes.items()}, "envs_per_process": 3}
    )
    wrong = [{"role": "user", "content": "wrong"}]
    assert with_hosts(config, use) == {
        "gym": ("guess", [(wrong, 0.0, False), (wrong, 0.0, False)], None),
        "skyrl": ([{"role": "user", "content": "say it"}], [([], 1.0, True)], None),
        "arena": ("move 0", [([{"role": "user", "content": "move 1"}], None, False), ([], None, True)], 1.0),
    }


@pytest.mark.parametrize("place", ["reset", "act", "reward"])
@pytest.mark.parametrize(
    ("does", "status", "told"),
    [
        ("hang", ScoreStatus.TIMEOUT, "did not return within 1 s and was killed"),
        ("exit", ScoreStatus.CRASHED, "ended with exit code 7"),
        ("kill", ScoreStatus.CRASHED, "was killed by SIGKILL"),
    ],
)
def test_an_environment_that_hangs_or_dies_fails_alone_and_in_time(
    place: str, does: str, status: ScoreStatus, told: str
) -> None:
    """Also the next episode in its place begins, in a new process."""

    async def use(hosts: Hosts) -> float:
        other, _ = await begun(hosts)
        began = time.monotonic()
        ticket = await hosts.acquire()
        with pytest.raises(EnvironmentFailedError, match=told) as e:
            await whole_episode(hosts, ticket, {place: does})
        seconds = time.monotonic() - began
        assert e.value.status is status
        await hosts.release(ticket)
        assert await called(hosts, other, "act") == ("acted", False)
        again, observation = await begun(hosts)
        assert observation == "go"
        assert hosts.num_held == 2
        await hosts.release(again)
        await hosts.release(other)
        assert hosts.num_held == 0
        return seconds

    limits = {"reset_timeout_s": 1 if (place, does) == ("reset", "hang") else 60, "step_timeout_s": 1}
    config = config_of("Misbehaves", num_envs=2, **(limits if does == "hang" else {}))
    assert with_hosts(config, use) < 30


@pytest.mark.parametrize(
    ("place", "does", "told"),
    [("reset", "raise", "reset raised RuntimeError: broken"), ("reward", "raise", "rewards raised RuntimeError: broken"),
     ("reward", "nan", "gave nan, expected a finite number")],
)  # fmt: skip
def test_a_reset_or_a_reward_that_raises_is_a_failure_and_keeps_its_place(place: str, does: str, told: str) -> None:
    async def use(hosts: Hosts) -> None:
        for _ in range(3):
            ticket = await hosts.acquire()
            with pytest.raises(EnvironmentFailedError, match=told) as e:
                await whole_episode(hosts, ticket, {place: does})
            assert e.value.status is ScoreStatus.ERROR
            await hosts.release(ticket)
        await asyncio.gather(begun(hosts), begun(hosts))
        assert len(hosts.processes) == 2

    with_hosts(config_of("Misbehaves", num_envs=2), use)


def test_an_environment_that_eats_memory_fails_and_not_its_neighbours() -> None:
    async def use(hosts: Hosts) -> None:
        other, _ = await begun(hosts)
        ticket, _ = await begun(hosts, act="memory")
        with pytest.raises(EnvironmentFailedError, match="MemoryError"):
            await called(hosts, ticket, "act")
        assert await called(hosts, other, "act") == ("acted", False)

    with_hosts(config_of("Misbehaves", memory_gb=1), use)


def test_what_an_environment_starts_ends_with_its_worker() -> None:
    async def use(hosts: Hosts) -> None:
        ticket, _ = await begun(hosts, act="fork")
        assert await called(hosts, ticket, "act") == ("acted", False)
        assert len(marked(hosts.processes[0].tag)) == 2

    with_hosts(config_of("Misbehaves"), use)


def test_concurrent_environments_see_nothing_of_each_other_and_begin_alike_from_one_seed() -> None:
    async def use(hosts: Hosts) -> None:
        started = await asyncio.gather(*(begun(hosts, name=str(i), environment="shared") for i in range(2)))
        assert [observation for _, observation in started] == ["0", "1"]
        for ticket, _ in started:
            await hosts.release(ticket)
        drawn = [(await begun(hosts, seed, "dice"))[1] for seed in (5, 5)]
        assert drawn[0] == drawn[1]
        for ticket in list(hosts._held):
            await hosts.release(ticket)
        assert (await begun(hosts, 6, "dice"))[1] != drawn[0]

    classes = {"shared": {"name": f"{GAMES}:Shared"}, "dice": {"name": f"{GAMES}:Dice"}}
    with_hosts(EnvironmentConfig.model_validate({"classes": classes, "num_envs": 2}), use)


def test_the_answer_of_an_abandoned_episode_reaches_nobody() -> None:
    async def use(hosts: Hosts) -> None:
        ticket, _ = await begun(hosts, act="hang")
        late = asyncio.create_task(called(hosts, ticket, "act"))
        await asyncio.sleep(0.3)
        late.cancel()
        began = time.monotonic()
        await hosts.release(ticket)
        again, observation = await begun(hosts, hint="new")
        assert observation == "go"
        assert await called(hosts, again, "act") == ("acted", False)
        assert time.monotonic() - began < 30
        with pytest.raises(EnvironmentFailedError, match="the environment is gone"):
            await called(hosts, ticket, "act")

    with_hosts(config_of("Misbehaves", num_envs=1, step_timeout_s=600), use)


def test_instances_of_one_process_are_lost_together_and_told_so() -> None:
    async def use(hosts: Hosts) -> None:
        one, _ = await begun(hosts, act="exit")
        other, _ = await begun(hosts)
        assert len(hosts.processes) == 1
        with pytest.raises(EnvironmentFailedError, match="exit code 7"):
            await called(hosts, one, "act")
        with pytest.raises(EnvironmentFailedError, match=r"lost with its process.*envs_per_process"):
            await called(hosts, other, "act")

    with_hosts(config_of("Misbehaves", envs_per_process=2), use)


def test_a_place_waits_for_another_to_be_given_back() -> None:
    async def use(hosts: Hosts) -> None:
        first = await hosts.acquire()
        second = asyncio.create_task(hosts.acquire())
        await asyncio.sleep(0.05)
        assert not second.done()
        await hosts.release(first)
        assert await asyncio.wait_for(second, 5) != first

    with_hosts(config_of("Counter", num_envs=1), use)


def test_an_instance_is_closed_before_its_process_ends(tmp_path: Path) -> None:
    async def use(hosts: Hosts) -> None:
        await begun(hosts, path=str(tmp_path / "closed"))

    with_hosts(config_of("Closes"), use)
    assert (tmp_path / "closed").read_text() == "closed"


def test_a_row_of_an_unknown_environment_is_a_failure_that_names_the_others() -> None:
    async def use(hosts: Hosts) -> None:
        with pytest.raises(EnvironmentFailedError, match=r"'other', which is none of environment\.classes: mine"):
            await begun(hosts, environment="other")

    with_hosts(EnvironmentConfig.model_validate({"classes": {"mine": {"name": f"{GAMES}:Counter"}}}), use)


def test_a_class_that_can_not_be_used_is_named_at_the_start() -> None:
    process = process_of(config_of("Nowhere"))
    with pytest.raises(RewardError, match="has no 'Nowhere'"):
        process.start()
    assert process.pid is None
    assert not marked(process.tag)


def test_a_described_environment_has_the_schemas_of_its_tools_and_of_the_recipes() -> None:
    async def described() -> dict[str, Any]:
        host = Host(process_of(config_of("Counter", tools=[f"{GAMES}:double"]), "total_of", "double"), 0)
        try:
            await host.on_thread(host.process.start)
            return await host.call(Describe(), 120, "reset_timeout_s", host.process.life)
        finally:
            await host.close()

    told = asyncio.run(described())
    found = told["described"][""]
    assert (found["title"], found["interface"], found["rewards"]) == ("Counter", "tools", True)
    names = [schema["function"]["name"] for schema in found["schemas"]]
    assert names == ["double", "add", "add_slowly", "fail", "leave"]
    assert found["schemas"][1]["function"]["parameters"]["properties"]["number"]["type"] == "integer"
    assert told["functions"] == ["games.total_of"]


def test_sigkill_from_outside_is_found_at_once() -> None:
    async def use(hosts: Hosts) -> float:
        ticket, _ = await begun(hosts, act="hang")
        waiting = asyncio.create_task(called(hosts, ticket, "act"))
        await asyncio.sleep(0.3)
        began = time.monotonic()
        pid = hosts.processes[0].pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(EnvironmentFailedError, match="SIGKILL"):
            await waiting
        return time.monotonic() - began

    assert with_hosts(config_of("Misbehaves", step_timeout_s=600), use) < 10
