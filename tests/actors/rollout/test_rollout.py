"""Two real vLLM engines behind the pool, against Transformers as the reference."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import psutil
import pytest
import ray
import torch

from actors.rollout.pool import RolloutPool
from grpo_ray.batch.truncation import keep_mask
from grpo_ray.config.loading import build
from grpo_ray.config.schema import RunConfig
from grpo_ray.errors import DataError, DeadlineError, WorkerError
from grpo_ray.types import Sample, SampleInfo, SampleRequest, SamplingParams, Truncation

pytestmark = pytest.mark.timeout(600)
T = TypeVar("T")
SAMPLE_S = 12.0
SAMPLING = SamplingParams(temperature=0.7, top_p=1.0, top_k=0, min_p=0.0, max_tokens=24)
ALL = Truncation()
GREEDY = replace(SAMPLING, temperature=0.0)
LONG = replace(SAMPLING, max_tokens=200)
ROLLOUT = {"num_actors": 2, "max_completion_length": 200, "max_num_seqs": 32, "kv_cache_gb": 0.05}


def run_config(model: Path | str, /, **overrides: Any) -> RunConfig:
    data = {
        "model": {"path": str(model), "dtype": "float32"},
        "data": {"train": {"path": "unused.jsonl"}, "max_prompt_length": 56},
        "rollout": ROLLOUT,
        "reward": {"functions": [{"name": "accuracy"}]},
        "deadlines": {"start_s": 150, "sample_s": SAMPLE_S},
        **overrides,
    }
    return build(RunConfig, data, "test")


def prompt(number: int) -> list[int]:
    return [10 + (5 + number * 7 + k * 3) % 80 for k in range(20)]


def requests(count: int, params: SamplingParams, seed: int = 0) -> list[SampleRequest]:
    return [SampleRequest(f"p{i}", 0, prompt(i), seed + i, params) for i in range(count)]


@dataclass
class Bench:
    """A pool, and the event loop that it lives in."""

    runner: asyncio.Runner
    pool: RolloutPool

    def run(self, work: Coroutine[Any, Any, T], timeout_s: float = 100) -> T:
        async def limited() -> T:
            return await asyncio.wait_for(work, timeout_s)

        return self.runner.run(limited())

    def draw(self, wanted: list[SampleRequest], timeout_s: float = 100) -> tuple[list[SampleInfo], list[Sample]]:
        async def all_of_them() -> list[SampleInfo]:
            return await asyncio.gather(*(self.pool.generate(r) for r in wanted))

        infos = self.run(all_of_them(), timeout_s)
        return infos, [ray.get(i.ref, timeout=10)[i.row] for i in infos]


@pytest.fixture(scope="module")
def shared(local_ray: None, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    run_dir = str(tmp_path_factory.mktemp("run"))
    # Short enough for sockets, which pytest's own folders are not after a thousand runs on a machine.
    with asyncio.Runner() as runner, tempfile.TemporaryDirectory() as temporary:
        config = run_config(tiny_model, rollout=ROLLOUT | {"env": {"TMPDIR": temporary}})
        pool = runner.run(RolloutPool.create(config, str(tiny_model), run_dir, has_gpus=False))
        assert [len(list(folder.glob("*-*-*-*-*"))) for folder in Path(temporary).glob("grpo-ray-*")] == [3, 3], (
            "vLLM's sockets"
        )
        yield Bench(runner, pool)
        runner.run(pool.close())


@pytest.fixture
def bench(shared: Bench) -> Bench:
    """The module's pool with both of its engines, also after a test that ended one."""

    async def whole() -> None:
        while len(shared.pool.engines()) < 2:
            await asyncio.sleep(0.1)

    shared.run(whole())
    return shared


@pytest.fixture(scope="module")
def reference(tiny_model: Path) -> Any:
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    return AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()


def reference_logprobs(
    model: Any, sample: Sample, temperature: float, truncation: Truncation = ALL
) -> np.ndarray[Any, Any]:
    """[T] of the sample's tokens under a Transformers model."""
    tokens = torch.tensor(np.concatenate([sample.prompt_token_ids, sample.token_ids])[None], dtype=torch.long)
    with torch.no_grad():
        logits = model(tokens).logits[0].float() / temperature
    at = len(sample.prompt_token_ids) - 1
    completion = tokens[0, at + 1 :]
    logits = logits[at : at + len(completion)]
    kept = logits.masked_fill(~keep_mask(logits, completion, truncation), -torch.inf)
    return kept.log_softmax(-1).gather(1, completion[:, None])[:, 0].numpy()


def test_logprobs_are_those_of_transformers_at_the_sampling_temperature(bench: Bench, reference: Any) -> None:
    infos, samples = bench.draw(requests(16, SAMPLING))
    for info, sample in zip(infos, samples, strict=True):
        assert info.num_tokens == len(sample.token_ids) == len(sample.logprobs) > 0
        assert [(v.version, v.start, v.end) for v in sample.versions] == [(0, 0, info.num_tokens)]
        np.testing.assert_allclose(sample.logprobs, reference_logprobs(reference, sample, 0.7), atol=1e-5)
    assert any(np.abs(s.logprobs - reference_logprobs(reference, s, 1.0)).max() > 0.01 for s in samples)


@pytest.mark.parametrize(
    "truncation",
    [Truncation(0.9, 20, 0.1), Truncation(top_p=0.9), Truncation(top_k=20), Truncation(min_p=0.1)],
    ids=str,
)
def test_truncated_sampling_reports_probabilities_over_the_sets_that_the_learner_makes(
    bench: Bench, reference: Any, truncation: Truncation
) -> None:
    params = replace(SAMPLING, **asdict(truncation))
    _, samples = bench.draw(requests(8, params))
    got = np.concatenate([s.logprobs for s in samples])
    want = np.concatenate([reference_logprobs(reference, s, 0.7, truncation) for s in samples])
    np.testing.assert_allclose(got, want, atol=1e-5)
    assert np.abs(got - np.concatenate([reference_logprobs(reference, s, 0.7) for s in samples])).mean() > 1e-3


def test_samples_keep_prompt_ids_and_text_is_decoded_from_the_tokens(bench: Bench, tiny_model: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    wanted = requests(4, SAMPLING)
    for request, sample in zip(wanted, bench.draw(wanted)[1], strict=True):
        assert sample.prompt_token_ids.tolist() == request.prompt_token_ids
        ended = sample.token_ids[-1] == tokenizer.eos_token_id
        assert sample.text == tokenizer.decode(sample.token_ids[: len(sample.token_ids) - ended].tolist())
        assert sample.finish_reason == ("stop" if ended else "length")


def test_greedy_is_the_argmax_of_transformers(bench: Bench, reference: Any) -> None:
    for sample in bench.draw(requests(4, GREEDY))[1]:
        tokens = torch.tensor(np.concatenate([sample.prompt_token_ids, sample.token_ids])[None], dtype=torch.long)
        with torch.no_grad():
            best = reference(tokens).logits[0].argmax(-1)
        assert best[len(sample.prompt_token_ids) - 1 : -1].tolist() == sample.token_ids.tolist()


def test_a_stop_string_ends_the_sample_and_stays_in_it(bench: Bench) -> None:
    (_, (whole,)) = bench.draw(requests(1, GREEDY))
    stop = whole.text[5:7]
    (_, (cut,)) = bench.draw(requests(1, replace(GREEDY, stop=(stop,))))
    assert cut.finish_reason == "stop"
    assert cut.text == whole.text[: whole.text.index(stop) + len(stop)]
    assert whole.token_ids[: len(cut.token_ids)].tolist() == cut.token_ids.tolist()


def test_a_special_token_is_written_down_and_ends_a_sample_as_text_or_by_its_number(
    bench: Bench, tiny_model: Path
) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    (_, drawn) = bench.draw(requests(16, LONG))
    special = {int(i): str(t.content) for i, t in tokenizer.added_tokens_decoder.items() if t.special}
    places = [
        (r, s, k)
        for r, s in zip(requests(16, LONG), drawn, strict=True)
        for k, i in enumerate(s.token_ids.tolist())
        if i in special and i != tokenizer.eos_token_id and k > 1 and i not in s.token_ids[:k]
    ]
    request, whole, place = places[0]
    token = int(whole.token_ids[place])
    assert special[token] in whole.text
    before = tokenizer.decode(whole.token_ids[:place].tolist())
    within = before[-1] + special[token]
    for params, left in (
        ({"stop": (special[token],)}, before),
        ({"stop": (within,)}, before + special[token]),
        ({"stop_token_ids": (token,)}, before),
    ):
        (_, (cut,)) = bench.draw([replace(request, params=replace(LONG, **params))])
        assert cut.finish_reason == "stop"
        assert cut.token_ids.tolist() == whole.token_ids[: place + 1].tolist()
        assert len(cut.logprobs) == place + 1
        assert cut.text == left


def test_same_seeds_draw_the_same_tokens_in_any_order_on_any_engine(bench: Bench) -> None:
    wanted = requests(24, SAMPLING, seed=100)
    infos, samples = bench.draw(wanted)
    again, repeated = bench.draw([*requests(2, SAMPLING, seed=7), *reversed(wanted)])
    again, repeated = again[:1:-1], repeated[:1:-1]
    assert all(a.worker != b.worker for a, b in zip(infos, again, strict=True))
    for a, b in zip(samples, repeated, strict=True):
        assert a.token_ids.tolist() == b.token_ids.tolist()
        np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-6)
    (_, others) = bench.draw(requests(24, SAMPLING, seed=500))
    assert sum(a.token_ids.tolist() != b.token_ids.tolist() for a, b in zip(samples, others, strict=True)) >= 20


def test_work_is_shared_evenly_and_counted(bench: Bench) -> None:
    bench.pool.take_stats()
    bench.pool.take_tracks()
    infos, samples = bench.draw(requests(32, SAMPLING))
    assert sorted(i.worker for i in infos) == ["rollout-0"] * 16 + ["rollout-1"] * 16
    stats = bench.pool.take_stats()
    assert stats["rollout/0/samples"] + stats["rollout/1/samples"] == 32
    assert stats["rollout/0/tokens"] + stats["rollout/1/tokens"] == sum(len(s.token_ids) for s in samples)
    assert 0 < stats["rollout/0/busy"] <= 1
    for number, track in enumerate(bench.pool.take_tracks()):
        assert track.worker == f"rollout-{number}"
        assert {s.name for s in track.spans} == {"sampling"}
        assert sum(s.seconds for s in track.spans) == pytest.approx(stats[f"rollout/{number}/busy_s"], abs=1e-3)
    again = bench.pool.take_stats()
    assert again["rollout/0/samples"] == again["rollout/0/busy_s"] == 0


def test_what_moves_samples_gives_way_to_what_draws_them(bench: Bench) -> None:
    def policies(pid: int) -> set[int]:
        return {os.sched_getscheduler(int(thread)) for thread in os.listdir(f"/proc/{pid}/task")}

    bench.draw(requests(2, SAMPLING))
    for pids in bench.pool.pids().values():
        assert policies(pids["core_pid"]) == {os.SCHED_OTHER}
        assert os.sched_getscheduler(pids["pid"]) == os.SCHED_BATCH
        assert policies(pids["pid"]) == {os.SCHED_BATCH}


def test_more_samples_than_places_all_come_back_once(bench: Bench) -> None:
    wanted = requests(300, replace(SAMPLING, max_tokens=4))
    infos, samples = bench.draw(wanted)
    assert [i.prompt_id for i in infos] == [s.prompt_id for s in samples] == [r.prompt_id for r in wanted]
    assert bench.pool.num_unfinished == 0


def test_a_refused_prompt_is_named_and_harms_no_other(bench: Bench) -> None:
    good = requests(4, SAMPLING)
    too_long = SampleRequest("too-long", 3, [11] * 400, 1, SAMPLING)

    async def both() -> list[SampleInfo | BaseException]:
        return await asyncio.gather(*(bench.pool.generate(r) for r in [*good, too_long]), return_exceptions=True)

    *fine, refused = bench.run(both())
    assert all(isinstance(i, SampleInfo) for i in fine)
    assert isinstance(refused, DataError)
    assert "too-long" in str(refused)
    assert "400" in str(refused)


def test_a_cancelled_sample_leaves_the_engine(bench: Bench) -> None:
    async def cancel() -> list[float]:
        tasks = [asyncio.ensure_future(bench.pool.generate(r)) for r in requests(60, LONG)]
        await asyncio.sleep(0.1)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.sleep(0.3)
        first = [(await e.handle.stats.remote())["busy_s"] for e in bench.pool.engines()]
        await asyncio.sleep(0.3)
        return [(await e.handle.stats.remote())["busy_s"] - s for e, s in zip(bench.pool.engines(), first, strict=True)]

    assert bench.run(cancel()) == [0.0, 0.0]
    assert bench.pool.num_unfinished == 0


@pytest.mark.long
def test_a_hung_engine_ends_in_a_deadline_that_names_it(bench: Bench) -> None:
    cores = [pids["core_pid"] for pids in bench.pool.pids().values()]
    for pid in cores:
        os.kill(pid, signal.SIGSTOP)
    try:
        with pytest.raises(
            DeadlineError, match=r"rollout-\d did not finish sample 0 of prompt p0 .*deadlines.sample_s"
        ):
            bench.draw(requests(1, SAMPLING), timeout_s=SAMPLE_S + 20)
    finally:
        for pid in cores:
            os.kill(pid, signal.SIGCONT)
    assert len(bench.draw(requests(4, SAMPLING))[1]) == 4


def test_killed_engine_cores_lose_no_sample_and_come_back(bench: Bench) -> None:
    wanted = requests(80, LONG)
    _, before = bench.draw(wanted)
    bench.pool.take_stats()
    bench.pool.take_tracks()

    async def kill_while_drawing() -> list[SampleInfo]:
        tasks = [asyncio.ensure_future(bench.pool.generate(r)) for r in wanted]
        await asyncio.sleep(0.15)
        assert bench.pool.num_unfinished > 20
        os.kill(bench.pool.pids()["rollout-0"]["core_pid"], signal.SIGKILL)
        infos = await asyncio.gather(*tasks)
        while len(bench.pool.engines()) < 2:
            await asyncio.sleep(0.1)
        return infos

    infos = bench.run(kill_while_drawing())
    after = [ray.get(i.ref, timeout=10)[i.row] for i in infos]
    assert [s.token_ids.tolist() for s in after] == [s.token_ids.tolist() for s in before]
    assert bench.pool.take_stats()["restarts"] == 1
    first, second = ([s.name for s in track.spans] for track in bench.pool.take_tracks())
    assert first[:2] == ["sampling", "restarting"]
    assert set(second) == {"sampling"}
    assert {i.worker for i in bench.draw(requests(8, SAMPLING))[0]} == {"rollout-0", "rollout-1"}


def test_samples_outlive_the_actor_that_drew_them(bench: Bench) -> None:
    infos, drawn = bench.draw(requests(32, LONG))
    os.kill(bench.pool.pids()["rollout-1"]["pid"], signal.SIGKILL)
    core = bench.pool.pids()["rollout-1"]["core_pid"]
    (_, moved) = bench.draw(requests(8, SAMPLING))
    assert len(moved) == 8
    again = [ray.get(i.ref, timeout=10)[i.row] for i in infos]
    assert [s.token_ids.tolist() for s in again] == [s.token_ids.tolist() for s in drawn]

    async def orphan_ends() -> None:
        while os.path.exists(f"/proc/{core}") and "Z" not in Path(f"/proc/{core}/stat").read_text().split()[2]:
            await asyncio.sleep(0.1)

    bench.run(orphan_ends(), timeout_s=10)


@pytest.mark.usefixtures("local_ray")
@pytest.mark.long
def test_a_model_without_weights_says_so_with_the_log(tiny_model: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_model, tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors"))
    config = run_config(tmp_path / "model", rollout={"num_actors": 1})
    with pytest.raises(WorkerError, match="rollout-0 does not start") as error:
        asyncio.run(RolloutPool.create(config, str(tmp_path / "model"), str(tmp_path), has_gpus=False))
    assert "does not start: RuntimeError: Cannot find any model weights" in str(error.value)


ALONE = """
import asyncio, os, sys
from pathlib import Path
from actors.rollout.actor import RolloutActor
from actors.rollout.vllm_options import rollout_env
from grpo_ray.config.rollout import RolloutConfig

async def main(model, run_dir):
    config = RolloutConfig(max_completion_length=16, max_num_seqs=4, kv_cache_gb=0.05)
    os.environ.update(rollout_env(config, on_gpu=False, backend="gloo"))
    actor = RolloutActor(config, model, "float32", 64, run_dir, 0, 1, "gloo")
    pids = await actor.ready()
    (Path(run_dir) / "core.new").write_text(str(pids["core_pid"]))
    (Path(run_dir) / "core.new").rename(Path(run_dir) / "core")
    await asyncio.sleep(600)

asyncio.run(main(*sys.argv[1:]))
"""


@pytest.mark.slow
def test_an_engine_ends_with_its_actor_when_no_raylet_is_left_to_end_it(tiny_model: Path, tmp_path: Path) -> None:
    """As after `ray stop --force`, or when a whole node's Ray is killed: its memory would never be free again."""
    (tmp_path / "logs").mkdir()
    told = tmp_path / "core"
    actor = subprocess.Popen([sys.executable, "-c", ALONE, str(tiny_model), str(tmp_path)])
    try:
        wait_until(told.exists, 120)
    finally:
        actor.kill()
        actor.wait(10)
    core = psutil.Process(int(told.read_text()))
    try:
        wait_until(lambda: not core.is_running() or core.status() == psutil.STATUS_ZOMBIE, 15)
    finally:
        if core.is_running():
            core.kill()


def wait_until(what: Callable[[], bool], timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.2)
