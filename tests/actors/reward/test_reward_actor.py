"""Reward workers: whatever a function does, its sample gets a typed result in time and the next sample is scored."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import numpy as np
import psutil
import pytest

from actors.reward.answers import decode
from actors.reward.family import TAG
from actors.reward.pipe import EndedError
from actors.reward.process import ScoringProcess
from grpo_ray.config.reward import FailurePolicy, RewardConfig, RewardFunctionConfig
from grpo_ray.errors import RewardError, WorkerError
from grpo_ray.rewards.functions.function import ScoreInputs
from grpo_ray.types import Sample, SampleInfo, Score, ScoreRequest, ScoreStatus, Step, Track, VersionSpan

if TYPE_CHECKING:
    from actors.reward.pool import RewardPool

T = TypeVar("T")
Start = Callable[..., ScoringProcess]
TIMEOUT_S = 1.0
HAS_F = "def f(completions): ..."
KILLED_ON_IMPORT = """
import os, signal
from pathlib import Path
deaths = Path(os.environ["DEATHS"])
left = int(deaths.read_text())
deaths.write_text(str(left - 1))
if left > 0:
    os.kill(os.getpid(), signal.SIGKILL)

def f(completions, **kwargs):
    return [1.0] * len(completions)
"""
HANGS_WHEN_TOLD = """
import os, time
from pathlib import Path
imports = Path(os.environ["IMPORTS"])
told = imports.read_text()
imports.write_text(told[1:])
if told.startswith("h"):
    time.sleep(600)

def f(completions, **kwargs):
    if "bad" in completions:
        time.sleep(600)
    return [1.0] * len(completions)
"""
"""Each letter of the file is an import: `h` hangs."""
FUNCTIONS = '''
import ctypes, os, re, signal, subprocess, sys, time

def _each(completions, misbehave):
    """1.0 for a good completion; `bad` ones misbehave."""
    return [misbehave() if c == "bad" else 1.0 for c in completions]

def raises(completions, **kwargs):
    def bad(): raise ValueError("no digits in it\\nsecond line")
    return _each(completions, bad)

def too_few(completions, **kwargs):
    return [] if "bad" in completions else [1.0] * len(completions)

def not_a_number(completions, **kwargs):
    return _each(completions, lambda: float("nan"))

def infinite(completions, **kwargs):
    return _each(completions, lambda: float("inf"))

def text(completions, **kwargs):
    return _each(completions, lambda: "0.5")

def hangs_in_python(completions, **kwargs):
    def bad():
        while True: pass
    return _each(completions, bad)

def hangs_and_catches_everything(completions, **kwargs):
    def bad():
        for s in (signal.SIGTERM, signal.SIGINT, signal.SIGALRM): signal.signal(s, signal.SIG_IGN)
        while True:
            try: time.sleep(1)
            except BaseException: pass
    return _each(completions, bad)

def hangs_in_c(completions, **kwargs):
    return _each(completions, lambda: re.match(r"(a+)+$", "a" * 64 + "b"))

def forks_and_both_return(completions, **kwargs):
    os.fork()
    return [float(c) for c in completions]

def leaves_children_and_hangs(completions, pids, **kwargs):
    def bad():
        child = os.fork()
        if child == 0:
            os.setsid()
            if os.fork() == 0: time.sleep(600)
            os._exit(0)
        os.waitpid(child, 0)
        subprocess.Popen(["sleep", "600"], start_new_session=True)
        time.sleep(600)
    return _each(completions, bad)

def leaves_an_orphan_and_exits(completions, **kwargs):
    def bad():
        if os.fork() == 0:
            os.setsid()
            time.sleep(600)
        os._exit(3)
    return _each(completions, bad)

def leaks_a_child(completions, **kwargs):
    subprocess.Popen(["sleep", "600"])
    return [1.0] * len(completions)

def exits(completions, **kwargs):
    return _each(completions, lambda: os._exit(7))

def sys_exits(completions, **kwargs):
    return _each(completions, lambda: sys.exit(7))

def segfaults(completions, **kwargs):
    return _each(completions, lambda: ctypes.string_at(0))

held = []
def eats_memory(completions, **kwargs):
    def bad():
        while True: held.append(bytearray(16 << 20))
    return _each(completions, bad)

def prints_a_lot(completions, **kwargs):
    def bad():
        for _ in range(200): print("x" * 10_000)
        os.write(1, b"raw\\n"); os.write(2, b"raw\\n")
        return 0.5
    return _each(completions, bad)

def writes_to_every_pipe(completions, **kwargs):
    def bad():
        for fd in map(int, os.listdir("/proc/self/fd")):
            try: os.write(fd, b"not an answer\\n")
            except OSError: pass
        return 1.0
    return _each(completions, bad)

async def asynchronous(completions, **kwargs):
    import asyncio
    await asyncio.sleep(0.01)
    return [0.25] * len(completions)

tries = {}
def fails_at_first(completions, **kwargs):
    key = completions[0]
    tries[key] = tries.get(key, 0) + 1
    if tries[key] == 1: raise RuntimeError("not yet")
    return [1.0]

def environment(completions, **kwargs):
    return [float(os.environ.get(c, "0") != "0") for c in completions]

def group_rank(completions, completion_ids, **kwargs):
    best = max(len(ids) for ids in completion_ids)
    return [float(len(ids) == best) + len(completions) / 100 for ids in completion_ids]

def half_and_whole(completions, completion_ids, **kwargs):
    """A step at the middle and one at the end; a number for what is too short for two."""
    return [[(n // 2 - 1, 1.0), (n - 1, 0.25)] if n > 1 else 0.5 for n in map(len, completion_ids)]

def beyond_the_end(completions, completion_ids, **kwargs):
    return [[(len(ids), 1.0)] if c == "bad" else 1.0 for c, ids in zip(completions, completion_ids)]

def process_id(completions, **kwargs):
    return [float(os.getpid())] * len(completions)

not_a_function = 3
'''


@pytest.fixture(scope="module")
def functions(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with the user's modules."""
    folder = tmp_path_factory.mktemp("user")
    (folder / "bad_rewards.py").write_text(FUNCTIONS)
    (folder / "broken_rewards.py").write_text("def f(:\n")
    (folder / "needs_missing.py").write_text(f"import surely_not_installed\n{HAS_F}")
    (folder / "exits_on_import.py").write_text(f"import os\nos._exit(5)\n{HAS_F}")
    (folder / "killed_on_import.py").write_text(KILLED_ON_IMPORT)
    (folder / "hangs_when_told.py").write_text(HANGS_WHEN_TOLD)
    (folder / "hangs_on_import.py").write_text(f"import time\ntime.sleep(600)\n{HAS_F}")
    return str(folder)


def config_of(folder: str, *names: str, retries: int = 0, **options: Any) -> RewardConfig:
    entries = tuple(RewardFunctionConfig(name=n if "." in n else f"bad_rewards.{n}") for n in names)
    settings: dict[str, Any] = {
        "unit": "sample",
        "timeout_s": TIMEOUT_S,
        "memory_gb": 0.15,
        "env": {"PYTHONPATH": folder},
        **options,
    }
    return RewardConfig(functions=entries, on_failure=FailurePolicy(retries=retries), **settings)


def one(completion: str, **columns: object) -> ScoreInputs:
    return ScoreInputs(["p"], [completion], [[1, 2, 3]], {k: [v] for k, v in columns.items()})


@pytest.fixture
def started(functions: str) -> Iterator[Start]:
    """Start scoring processes; all of them end with the test."""
    processes: list[ScoringProcess] = []

    def start(*names: str, **options: Any) -> ScoringProcess:
        process = ScoringProcess(config_of(functions, *names, **options), start_timeout_s=60)
        processes.append(process)
        process.start()
        return process

    yield start
    for process in processes:
        process.kill()


def marked(tag: str) -> list[int]:
    """Living processes with this scorer's mark."""
    found = []
    for p in psutil.process_iter():
        try:
            if p.status() != psutil.STATUS_ZOMBIE and p.environ().get(TAG) == tag:
                found.append(p.pid)
        except (psutil.Error, OSError):
            continue
    return found


def gone(living: Callable[[], Iterable[int]], seconds: float = 10.0) -> bool:
    """A process that was killed takes a moment to die."""
    deadline = time.monotonic() + seconds
    while any(living()) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not any(living())


@pytest.mark.parametrize(
    ("name", "status", "words"),
    [
        ("raises", ScoreStatus.ERROR, "ValueError: no digits in it (bad_rewards.py:"),
        ("too_few", ScoreStatus.ERROR, "returned 0 values, expected 1"),
        ("not_a_number", ScoreStatus.ERROR, "returned nan, expected a finite number"),
        ("infinite", ScoreStatus.ERROR, "returned inf"),
        ("text", ScoreStatus.ERROR, "returned '0.5'"),
        ("beyond_the_end", ScoreStatus.ERROR, "step 0 ends at 3, expected the index of a token from 0 to 2"),
        ("hangs_in_python", ScoreStatus.TIMEOUT, "did not return within 1 s"),
        ("hangs_and_catches_everything", ScoreStatus.TIMEOUT, "did not return within 1 s"),
        ("hangs_in_c", ScoreStatus.TIMEOUT, "did not return within 1 s"),
        ("exits", ScoreStatus.CRASHED, "ended with exit code 7"),
        ("leaves_an_orphan_and_exits", ScoreStatus.CRASHED, "ended with exit code 3"),
        ("sys_exits", ScoreStatus.ERROR, "SystemExit: 7"),
        ("segfaults", ScoreStatus.CRASHED, "was killed by SIGSEGV"),
        ("eats_memory", ScoreStatus.ERROR, "MemoryError"),
        ("writes_to_every_pipe", ScoreStatus.CRASHED, "wrote something that is no answer"),
    ],
)
@pytest.mark.timeout(300)
def test_a_bad_call_gets_a_typed_result_in_time_and_its_neighbours_are_scored(
    started: Start, name: str, status: ScoreStatus, words: str
) -> None:
    process = started(name)
    start = time.monotonic()
    before, bad, after = process.run([(0, one("good")), (0, one("bad")), (0, one("good"))])
    assert time.monotonic() - start < TIMEOUT_S + 120
    assert (before[0].status, before[0].value) == (ScoreStatus.OK, 1.0)
    assert bad[0].status is status
    assert np.isnan(bad[0].value)
    assert words in bad[0].detail
    assert name in bad[0].detail or status is ScoreStatus.ERROR
    assert (after[0].status, after[0].value) == (ScoreStatus.OK, 1.0)


@pytest.mark.timeout(300)
def test_output_does_not_disturb_the_protocol(started: Start) -> None:
    process = started("prints_a_lot")
    results = process.run([(0, one("bad")), (0, one("good")), (0, one("bad")), (0, one("good"))])
    assert [r[0].value for r in results] == [0.5, 1.0, 0.5, 1.0]
    assert process.restarts == 0


@pytest.mark.timeout(300)
def test_a_forked_copy_of_the_process_does_not_answer_in_its_name(started: Start) -> None:
    process = started("forks_and_both_return")
    for numbers in ([1.0, 2.0, 3.0, 4.0], [5.0, 6.0]):
        results = process.run([(0, one(str(n))) for n in numbers])
        assert [r[0].value for r in results] == numbers
    assert process.restarts == 0


@pytest.mark.timeout(300)
def test_an_async_function_is_awaited(started: Start) -> None:
    results = started("asynchronous").run([(0, one("x"))] * 3)
    assert [r[0].value for r in results] == [0.25] * 3


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", ["leaves_children_and_hangs", "leaves_an_orphan_and_exits"])
def test_children_die_with_the_scoring_process_even_in_sessions_of_their_own(started: Start, name: str) -> None:
    process = started(name)
    (result,) = process.run([(0, one("bad", pids=0))])
    assert result[0].status.failed
    assert gone(lambda: marked(process._tag))


@pytest.mark.timeout(300)
def test_a_process_that_collects_children_is_replaced(started: Start) -> None:
    process = started("leaks_a_child")
    results = process.run([(0, one("x"))] * 60)
    assert [r[0].value for r in results] == [1.0] * 60
    assert process.restarts >= 1
    assert len(marked(process._tag)) < 60
    process.kill()
    assert gone(lambda: marked(process._tag))


@pytest.mark.timeout(300)
def test_a_failed_call_is_tried_again_with_the_same_sample(started: Start) -> None:
    assert started("fails_at_first", retries=1).run([(0, one("a"))])[0][0].value == 1.0
    assert started("fails_at_first", retries=0).run([(0, one("a"))])[0][0].status is ScoreStatus.ERROR


@pytest.mark.timeout(300)
def test_one_process_serves_all_calls(started: Start) -> None:
    process = started("process_id")
    pids = {r[0].value for r in process.run([(0, one("x"))] * 20)}
    assert pids == {process.pid}


@pytest.mark.timeout(300)
def test_the_environment_is_scrubbed_but_for_the_recipes(functions: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "secret")
    config = config_of(functions, "environment", env={"PYTHONPATH": functions, "MINE": "1"})
    process = ScoringProcess(config, 60)
    process.start()
    try:
        results = process.run([(0, one("WANDB_API_KEY")), (0, one("MINE")), (0, one("PATH"))])
    finally:
        process.kill()
    assert [r[0].value for r in results] == [0.0, 1.0, 1.0]


@pytest.mark.timeout(300)
def test_a_cheap_score_takes_less_than_a_millisecond_of_both_processes(functions: str) -> None:
    process = ScoringProcess(config_of(functions, "group_rank"), 60)
    process.start()
    try:
        x = ScoreInputs(["p"], ["word " * 50], [list(range(60))], {"answer": ["4"]})
        rates = []
        for _ in range(3):
            start = time.process_time() + cpu_s(process.pid)
            results = process.run([(0, x)] * 2000)
            rates.append(len(results) / (time.process_time() + cpu_s(process.pid) - start))
    finally:
        process.kill()
    # On a quiet machine it is a third of one.
    assert max(rates) >= 1000


def cpu_s(pid: int | None) -> float:
    times = psutil.Process(pid).cpu_times()
    return float(times.user + times.system)


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("bad_rewards.rises", "did you mean 'raises'?"),
        ("bad_rewards.not_a_function", "is a int, expected a function"),
        ("no_such_module_here.f", "there is no module 'no_such_module_here'"),
        ("broken_rewards.f", "SyntaxError"),
        ("needs_missing.f", "imports 'surely_not_installed', which is not installed"),
        ("exits_on_import.f", "ended with exit code 5 while importing reward 'exits_on_import.f'"),
    ],
)
def test_a_function_that_cannot_be_imported_is_named_at_the_start(functions: str, path: str, words: str) -> None:
    process = ScoringProcess(config_of(functions, path), 60)
    with pytest.raises(RewardError) as error:
        process.start()
    assert path in str(error.value)
    assert words in str(error.value)
    assert process.pid is None


@pytest.mark.timeout(300)
def test_a_process_that_is_killed_while_it_imports_is_started_again_a_few_times(functions: str, tmp_path: Path) -> None:
    deaths = tmp_path / "deaths"
    config = config_of(functions, "killed_on_import.f", env={"PYTHONPATH": functions, "DEATHS": str(deaths)})
    deaths.write_text("2")
    process = ScoringProcess(config, 60)
    process.start()
    assert [s.value for (s,) in process.run([(0, one("x"))])] == [1.0]
    process.kill()
    deaths.write_text("100")
    with pytest.raises(RewardError, match=r"was killed by SIGKILL while importing reward 'killed_on_import\.f'"):
        process.start()
    assert deaths.read_text() == "97"
    assert gone(lambda: marked(process._tag))


@pytest.mark.timeout(300)
@pytest.mark.long
def test_a_process_that_hangs_while_it_imports_again_is_not_waited_for_as_long_as_the_first(
    functions: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("actors.start_timeout.RESTART_S", 0.0)
    imports = tmp_path / "imports"
    config = config_of(functions, "hangs_when_told.f", env={"PYTHONPATH": functions, "IMPORTS": str(imports)})
    imports.write_text("-hh-")
    process = ScoringProcess(config, 600)
    process.start()
    results = process.run([(0, one("bad")), (0, one("x"))])
    process.kill()
    assert [s.status for (s,) in results] == [ScoreStatus.TIMEOUT, ScoreStatus.OK]
    assert imports.read_text() == ""
    assert gone(lambda: marked(process._tag))


@pytest.mark.timeout(300)
def test_an_import_that_never_ends_is_named_at_its_deadline(functions: str) -> None:
    process = ScoringProcess(config_of(functions, "hangs_on_import.f"), start_timeout_s=4)
    with pytest.raises(RewardError, match=r"'hangs_on_import\.f' was not imported within 4 s"):
        process.start()
    assert gone(lambda: marked(process._tag))


@pytest.mark.timeout(300)
def test_the_scoring_process_dies_with_its_parent(functions: str) -> None:
    import subprocess
    import sys

    code = (
        "import sys, time\nfrom tests.actors.reward.test_reward_actor import config_of, one\n"
        "from actors.reward.process import ScoringProcess\n"
        "p = ScoringProcess(config_of(sys.argv[1], 'hangs_in_c', timeout_s=600.0), 60)\n"
        "p.start(); print(p.pid, flush=True)\n"
        "p.run([(0, one('bad'))])\n"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", code, functions], stdout=subprocess.PIPE, cwd=Path(__file__).parents[3], text=True
    )
    assert parent.stdout is not None
    child = psutil.Process(int(parent.stdout.readline()))
    time.sleep(0.5)
    assert child.is_running()
    parent.kill()
    parent.wait(timeout=10)
    child.wait(timeout=10)


# ---- through Ray


def requests_of(texts: list[str], ref: object = None, **columns: object) -> list[ScoreRequest]:
    samples = [
        Sample(
            prompt_id="d/0/0",
            index=i,
            prompt_token_ids=np.arange(3, dtype=np.int32),
            token_ids=np.arange(len(text), dtype=np.int32),
            logprobs=np.zeros(len(text), dtype=np.float32),
            versions=(VersionSpan(0, 0, len(text)),),
            finish_reason="stop",
            text=text,
        )
        for i, text in enumerate(texts)
    ]
    held = samples if ref is None else ref
    return [
        ScoreRequest(SampleInfo("d/0/0", i, 3, len(text), 0, "stop", "rollout-0", held, i), "p", None, dict(columns))
        for i, text in enumerate(texts)
    ]


def put(requests: list[ScoreRequest]) -> list[ScoreRequest]:
    """The same requests with their samples in the object store."""
    import dataclasses

    import ray

    ref = ray.put(requests[0].sample.ref)
    return [dataclasses.replace(r, sample=dataclasses.replace(r.sample, ref=ref)) for r in requests]


async def with_pool(config: RewardConfig, folder: Path, use: Callable[[RewardPool], Awaitable[T]], **options: Any) -> T:
    from actors.reward.pool import RewardPool

    pool = await RewardPool.create(config, str(folder), start_timeout_s=60, **options)
    try:
        return await asyncio.wait_for(use(pool), 90)
    finally:
        await pool.close()


@pytest.mark.timeout(300)
@pytest.mark.usefixtures("local_ray")
def test_the_pool_scores_samples_in_order_with_weights(functions: str, tmp_path: Path) -> None:
    entries = (
        RewardFunctionConfig(name="exact_match", weight=2.0),
        RewardFunctionConfig(name="bad_rewards.asynchronous", weight=0.5),
    )
    config = config_of(functions, "raises", num_actors=2, num_cpus=0.5).model_copy(update={"functions": entries})
    texts = [str(i % 3) for i in range(50)]

    async def use(pool: RewardPool) -> tuple[list[Score], list[Score], list[Track]]:
        whole = await pool.score(put(requests_of(texts, answer="1")))
        singles = await asyncio.gather(*(pool.score([r]) for r in put(requests_of(texts, answer="1"))))
        return whole, [s[0] for s in singles], pool.take_tracks()

    whole, singles, tracks = asyncio.run(with_pool(config, tmp_path, use))
    expected = [2.0 * (t == "1") + 0.125 for t in texts]
    assert [s.value for s in whole] == expected
    assert [s.value for s in singles] == expected
    assert [p.name for p in whole[0].parts] == ["exact_match", "bad_rewards.asynchronous"]
    assert {t.worker for t in tracks} == {"reward-0", "reward-1"}
    assert all(s.seconds > 0 for t in tracks for s in t.spans)
    assert (tmp_path / "logs" / "reward-0.log").exists()
    assert (tmp_path / "logs" / "reward-1.log").exists()


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    "said",
    [
        ["ok", 1.0, "", 0.0, [[3, 1.0]]],
        ["ok", 1.0, "", 0.0, [[1, 0.5], [1, 0.5]]],
        ["ok", 1.0, "", 0.0, [[-1, 1.0]]],
        ["ok", 1.0, "", 0.0, [[0, float("inf")]]],
        ["error", None, "", 0.0, [[0, 1.0]]],
        ["ok", 1.0, "", 0.0, [0]],
        ["ok", 1.0, "", 0.0],
    ],
)
def test_steps_that_no_completion_can_have_are_not_believed(said: list[object]) -> None:
    good = ["ok", 1.5, "", 0.0, [[0, 1.0], [2, 0.5]]]
    (score,) = decode("f", [3], {"scores": [good]})
    assert score.steps == (Step(0, 1.0), Step(2, 0.5))
    with pytest.raises(EndedError):
        decode("f", [3, 3], {"scores": [good, said]})


@pytest.mark.timeout(300)
@pytest.mark.parametrize("unit", ["sample", "group"])
@pytest.mark.usefixtures("local_ray")
def test_steps_come_through_the_pool_with_their_weights(functions: str, tmp_path: Path, unit: str) -> None:
    entries = (
        RewardFunctionConfig(name="bad_rewards.half_and_whole", weight=2.0),
        RewardFunctionConfig(name="bad_rewards.asynchronous", weight=4.0),
    )
    config = config_of(functions, "raises", num_cpus=0.5, unit=unit).model_copy(update={"functions": entries})

    async def use(pool: RewardPool) -> list[Score]:
        return await pool.score(put(requests_of(["abcdef", "z"])))

    long, short = asyncio.run(with_pool(config, tmp_path, use))
    assert long.steps == (Step(2, 2.0), Step(5, 1.5))
    assert long.parts[0].steps == (Step(2, 1.0), Step(5, 0.25))
    assert (long.value, long.parts[0].value) == (3.5, 1.25)
    assert (short.steps, short.value) == ((), 2.0)


@pytest.mark.timeout(300)
@pytest.mark.usefixtures("local_ray")
def test_unit_group_gives_the_function_the_whole_group(functions: str, tmp_path: Path) -> None:
    config = config_of(functions, "group_rank", num_cpus=0.5, unit="group")
    groups = [["a", "bbb", "cc"], ["dddd", "e"]]

    async def use(pool: RewardPool) -> list[list[Score]]:
        return await asyncio.gather(*(pool.score(put(requests_of(g))) for g in groups))

    first, second = asyncio.run(with_pool(config, tmp_path, use))
    assert [s.value for s in first] == pytest.approx([0.03, 1.03, 0.03])
    assert [s.value for s in second] == pytest.approx([1.02, 0.02])


@pytest.mark.timeout(300)
@pytest.mark.usefixtures("local_ray")
def test_a_hanging_sample_fails_alone(functions: str, tmp_path: Path) -> None:
    config = config_of(functions, "hangs_in_c", num_cpus=0.5)

    async def use(pool: RewardPool) -> list[Score]:
        return await pool.score(put(requests_of(["good", "bad", "good"])))

    scores = asyncio.run(with_pool(config, tmp_path, use))
    assert [s.status for s in scores] == [ScoreStatus.OK, ScoreStatus.TIMEOUT, ScoreStatus.OK]
    assert np.isnan(scores[1].value)
    assert "hangs_in_c" in scores[1].detail


@pytest.mark.timeout(300)
@pytest.mark.usefixtures("local_ray")
def test_a_worker_killed_while_scoring_loses_nothing(functions: str, tmp_path: Path) -> None:
    """SIGKILL of the actor's own process, with calls under way; its scoring process must not outlive it either."""
    config = config_of(functions, "asynchronous", "process_id", num_actors=2, num_cpus=0.5, timeout_s=20)

    async def use(pool: RewardPool) -> tuple[list[Score], set[int]]:
        first = await pool.score(put(requests_of(["x"] * 40)))
        children = {int(s.parts[1].value) for s in first}
        work = asyncio.gather(*(pool.score(put(requests_of(["x"] * 20))) for _ in range(10)))
        await asyncio.sleep(0.3)
        victim = pool.pids["reward-0"]
        os.kill(victim, signal.SIGKILL)
        results = await work
        while pool.pids.get("reward-0", victim) == victim:
            await asyncio.sleep(0.1)
        return [s for scores in results for s in scores], children

    scores, children = asyncio.run(with_pool(config, tmp_path, use))
    assert len(scores) == 200
    assert {(s.status, s.parts[0].value, s.detail) for s in scores} == {(ScoreStatus.OK, 0.25, "")}
    assert gone(lambda: [pid for pid in children if psutil.pid_exists(pid)])


@pytest.mark.timeout(300)
@pytest.mark.usefixtures("local_ray")
@pytest.mark.long
def test_workers_that_join_and_leave_under_way_lose_nothing(functions: str, tmp_path: Path) -> None:
    config = config_of(functions, "asynchronous", "process_id", num_actors=2, num_cpus=0.5, timeout_s=20)

    async def use(pool: RewardPool) -> tuple[Any, ...]:
        answers: list[asyncio.Future[list[Score]]] = []

        async def ask_until(enough: Callable[[], bool]) -> set[int]:
            """Keep it busy; the processes that scored."""
            start = len(answers)
            while not enough():
                answers.extend(pool.score(put(requests_of(["x"] * 3))) for _ in range(4))
                await asyncio.sleep(0.05)
            done = await asyncio.gather(*answers[start:])
            return {int(s.parts[1].value) for scores in done for s in scores}

        pool.scale(4)
        await ask_until(lambda: pool.live()["alive/reward"] == 4)
        count = len(answers)
        grown = await ask_until(lambda: len(answers) > count + 100)
        pids = dict(pool.pids)
        pool.scale(1)
        left = await ask_until(lambda: pool.live()["alive/reward"] == 1)
        count = len(answers)
        alone = await ask_until(lambda: len(answers) > count + 20)
        tracks = sorted(t.worker for t in pool.take_tracks()), [t.worker for t in pool.take_tracks()]
        # What is asked for and taken back before it has started never serves.
        pool.scale(3)
        pool.scale(1)
        await asyncio.sleep(0.5)
        scores = [s for answer in answers for s in answer.result()]
        return scores, grown, left, alone, pids, dict(pool.pids), tracks, pool.live()["alive/reward"]

    scores, grown, left, alone, pids, last_pids, tracks, alive = asyncio.run(with_pool(config, tmp_path, use))
    assert {(s.status, s.parts[0].value, s.detail) for s in scores} == {(ScoreStatus.OK, 0.25, "")}
    assert (len(grown), len(alone), alive) == (4, 1, 1)
    assert alone | left <= grown
    assert set(pids) == {f"reward-{i}" for i in range(4)}
    assert last_pids == {"reward-0": pids["reward-0"]}
    assert tracks == ([f"reward-{i}" for i in range(4)], ["reward-0"])
    assert gone(lambda: [pid for pid in grown if psutil.pid_exists(pid)])


@pytest.mark.timeout(300)
@pytest.mark.usefixtures("local_ray")
def test_a_worker_that_can_not_join_costs_the_pool_nothing(functions: str, tmp_path: Path) -> None:
    config = config_of(functions, "asynchronous", num_actors=1, num_cpus=0.5)

    async def use(pool: RewardPool) -> tuple[list[str], list[Score], dict[str, float]]:
        told: list[str] = []
        pool.on_trouble = told.append
        pool._kind.config = config.model_copy(update={"functions": (RewardFunctionConfig(name="bad_rewards.gone"),)})
        pool.scale(2)
        while not told:
            await asyncio.sleep(0.05)
        return told, await pool.score(put(requests_of(["x"] * 4))), pool.live()

    told, scores, live = asyncio.run(with_pool(config, tmp_path, use))
    assert "reward-1 was to join and does not start" in told[0]
    assert "bad_rewards.gone" in told[0]
    assert [s.value for s in scores] == [0.25] * 4
    assert live["alive/reward"] == 1


@pytest.mark.timeout(300)
@pytest.mark.usefixtures("local_ray")
def test_an_unimportable_function_fails_the_start_of_the_pool(functions: str, tmp_path: Path) -> None:
    async def use(pool: RewardPool) -> NoReturn:
        raise AssertionError("the pool started")

    with pytest.raises(RewardError, match=r"bad_rewards\.rises.*did you mean 'raises'"):
        asyncio.run(with_pool(config_of(functions, "rises", num_cpus=0.5), tmp_path, use))


@pytest.mark.timeout(300)
@pytest.mark.usefixtures("local_ray")
def test_samples_that_end_their_workers_are_an_error_for_everyone_who_waits(functions: str, tmp_path: Path) -> None:
    config = config_of(functions, "asynchronous", num_cpus=0.5)

    async def use(pool: RewardPool) -> list[list[Score] | BaseException]:
        work = asyncio.gather(*(pool.score(put(requests_of(["x"] * 50))) for _ in range(4)), return_exceptions=True)
        await asyncio.sleep(0.3)
        os.kill(pool.pids["reward-0"], signal.SIGKILL)
        outcomes = await work
        with pytest.raises(WorkerError, match="reward-0 died"):
            await pool.score(put(requests_of(["x"])))
        return outcomes

    outcomes = asyncio.run(with_pool(config, tmp_path, use, max_restarts=0))
    assert any(isinstance(o, WorkerError) and "over the same samples" in str(o) for o in outcomes)


@pytest.mark.timeout(300)
@pytest.mark.usefixtures("local_ray")
def test_closing_the_pool_answers_those_who_wait(functions: str, tmp_path: Path) -> None:
    config = config_of(functions, "hangs_in_c", num_cpus=0.5, timeout_s=600.0)

    async def use(pool: RewardPool) -> float:
        work = asyncio.ensure_future(pool.score(put(requests_of(["bad"]))))
        await asyncio.sleep(1.0)
        start = time.monotonic()
        await pool.close()
        with pytest.raises(WorkerError, match="closed"):
            await work
        return time.monotonic() - start

    assert asyncio.run(with_pool(config, tmp_path, use)) < 120


def until_lost(ref: Any) -> None:
    """An object outlives its owner until the raylet frees it."""
    import ray

    for _ in range(300):
        try:
            ray.get(ref, timeout=30)
        except ray.exceptions.OwnerDiedError:
            return
        time.sleep(0.1)
    raise AssertionError("the object is there 30 s after the death of its owner")


@pytest.mark.timeout(300)
@pytest.mark.usefixtures("local_ray")
def test_a_lost_object_is_a_crashed_score_and_not_a_zero(functions: str, tmp_path: Path) -> None:
    import ray

    class Owner:
        def make(self, samples: Any) -> list[Any]:
            return [ray.put(samples)]

    owner = ray.remote(num_cpus=0.5)(Owner).remote()
    good = requests_of(["x"])
    ref = ray.get(owner.make.remote(good[0].sample.ref), timeout=60)[0]
    lost = requests_of(["x"], ref=ref)
    ray.kill(owner)
    until_lost(ref)

    async def use(pool: RewardPool) -> list[list[Score]]:
        return list(await asyncio.gather(pool.score(lost), pool.score(put(good))))

    gone, kept = asyncio.run(with_pool(config_of(functions, "asynchronous", num_cpus=0.5), tmp_path, use))
    assert gone[0].status is ScoreStatus.CRASHED
    assert "rollout-0" in gone[0].detail
    assert kept[0].value == 0.25


@pytest.mark.timeout(300)
@pytest.mark.usefixtures("local_ray")
def test_by_default_built_ins_and_verls_see_samples_and_trls_the_whole_group(functions: str, tmp_path: Path) -> None:
    examples = "tests.reward_examples."
    entries = (
        RewardFunctionConfig(name="exact_match"),
        RewardFunctionConfig(name=f"{examples}rank_reward"),
        RewardFunctionConfig(name=f"{examples}dict_score"),
        RewardFunctionConfig(name=f"{examples}logging_reward", weight=0.0),
        RewardFunctionConfig(name="bad_rewards.process_id", weight=0.0),
    )
    config = config_of(functions, "raises", num_cpus=0.5, unit="auto", memory_gb=4.0).model_copy(
        update={"functions": entries}
    )
    assert config.whole_groups
    columns = {"answer": "bb", "data_source": "x", "extra_info": {"split": "train"}}

    async def use(pool: RewardPool) -> tuple[list[Score], list[Score]]:
        return await asyncio.gather(
            pool.score(put(requests_of(["a", "bb", "cccc"], **columns))),
            pool.score(put(requests_of(["bb"], **columns))),
        )

    three, (alone,) = asyncio.run(with_pool(config, tmp_path, use))
    assert [[p.value for p in s.parts[:4]] for s in three] == [[0, 1.0, -1, 0], [1, 0.5, 1, 1], [0, 0.0, -1, 0]]
    assert [p.value for p in alone.parts[:4]] == [1.0, 1.0, 1.0, 1.0]
    assert dict(three[2].parts[2].extra) == {"acc": False, "pred": "cccc", "split": "train"}
    assert [[m.num_finite for m in s.parts[2].logged] for s in three] == [[1], [1], [1]]
    assert [s.parts[3].extra[1] for s in three] == [("extracted_answer", t) for t in ("a", "bb", "cccc")]
    assert [[(m.name, m.total) for m in s.parts[3].logged] for s in three] == [
        [("accuracy", pytest.approx(1 / 3))],
        [],
        [],
    ]


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("name", "status"),
    [("raises", ScoreStatus.ERROR), ("hangs_in_c", ScoreStatus.TIMEOUT), ("exits", ScoreStatus.CRASHED)],
)
def test_a_group_that_a_function_fails_at_has_a_typed_result_for_each_of_its_samples(
    started: Start, name: str, status: ScoreStatus
) -> None:
    process = started(name, unit="auto", timeout_s=0.3)
    assert process.takes_whole(0)
    group = ScoreInputs(["p"] * 3, ["good", "bad", "good"], [[1]] * 3)
    (failed, fine) = process.run([(0, group), (0, one("good"))])
    assert [s.status for s in failed] == [status] * 3
    assert [s.value for s in fine] == [1.0]
    assert status is not ScoreStatus.TIMEOUT or "did not return within 0.9 s" in failed[0].detail


@pytest.mark.parametrize(
    "logs",
    [
        [[["a", 1]] * 40, []],
        [[["x" * 200, 1]], []],
        [[], [["m", float("inf"), 1, 0]]],
        [[], [["m", 1.0, 1]]],
        [[3], []],
        [[], [["m", 1.0, 1, 0]] * 100],
    ],
)
def test_logs_that_no_function_can_have_written_are_not_believed(logs: list[object]) -> None:
    good = ["ok", 1.0, "", 0.0, [], [["a", "b"]], [["m", 1.0, 1, 0]]]
    (score,) = decode("f", [3], {"scores": [good]})
    assert (score.extra, score.logged[0].name) == ((("a", "b"),), "m")
    with pytest.raises(EndedError):
        decode("f", [3], {"scores": [["ok", 1.0, "", 0.0, [], *logs]]})
