"""Adapters from real DeepSpeed learners into two real vLLM engines (`model.lora.transfer: adapter`)."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import ray
import torch

from actors.learner.group import LearnerGroup
from actors.rollout.adapters import AdapterOptions, EngineAdapters, lora_args
from actors.rollout.pool import RolloutPool
from actors.weights.adapter_sync import AdapterReport, RayAdapterSync
from grpo_ray.config.model import MAX_ADAPTER_RANK, LoraConfig
from grpo_ray.config.schema import RunConfig
from grpo_ray.errors import WorkerError
from grpo_ray.models.lora import adapter_checksum
from grpo_ray.types import Sample, SampleInfo, SampleRequest, TrainBatch, TrainSample, Truncation
from tests.actors.learner.saved import export
from tests.actors.rollout.test_rollout import GREEDY, LONG, SAMPLING, Bench, reference_logprobs, run_config

pytestmark = pytest.mark.timeout(600)
SYNC_S = 60.0
PROMPT = [10 + (k * 3) % 80 for k in range(50)]
"""Longer than a block of the prefix cache, so that its beginning is found there again."""


CUT = replace(SAMPLING, top_p=0.9, top_k=20, min_p=0.1)
"""The learner has to renormalise over the tokens that these leave."""


def requests(count: int, params: Any = SAMPLING) -> list[SampleRequest]:
    return [SampleRequest("p0", i, PROMPT, i, params) for i in range(count)]


def adapter_config(model: Path, folder: Path, **learner: Any) -> RunConfig:
    return run_config(
        model,
        model={
            "path": str(model),
            "dtype": "float32",
            "lora": {"r": 4, "alpha": 12, "transfer": "adapter"},
        },
        rollout={
            "num_actors": 2,
            "max_completion_length": 200,
            "max_num_seqs": 32,
            "kv_cache_gb": 0.05,
            "env": {"TMPDIR": str(folder)},
        },
        learner={"learning_rate": 0.02, "num_threads": 1, **learner},
        algorithm={"max_staleness": 1},
        deadlines={"start_s": 280, "sample_s": 280, "sync_s": SYNC_S},
    )


class Setting:
    """Pool and learner; and each version's policy as a plain model, by way of the learner's export."""

    def __init__(self, bench: Bench, learner: LearnerGroup, folder: Path) -> None:
        self.bench = bench
        self.learner = learner
        self.sync = RayAdapterSync(bench.pool, learner, timeout_s=SYNC_S)
        self.folder = folder
        self.version = 0
        self.models: dict[int, Any] = {}

    def update(self) -> float:
        """One update on fresh samples; mean |log-probability of sampler - of learner|."""
        infos, _ = self.bench.draw(requests(8, CUT))
        samples = [
            TrainSample(
                i.ref, i.row, i.prompt_id, i.index, i.num_prompt_tokens, i.num_tokens, 0, advantage=(-1.0) ** i.index
            )
            for i in infos
        ]
        report = self.bench.run(
            self.learner.update(TrainBatch(self.version + 1, samples, CUT.temperature, Truncation(0.9, 20, 0.1)))
        )
        self.version += 1
        return report.metrics["mismatch/mean_abs"]

    def next_version(self) -> int:
        """The learner has it then, the engines not yet."""
        from transformers import AutoModelForCausalLM

        self.update()
        exported = self.folder / f"hf-{self.version}"
        exported.mkdir()
        self.bench.run(export(self.learner, exported))
        self.models[self.version] = AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float32).eval()
        return self.version

    async def both_engines(self) -> None:
        while len(self.bench.pool.engines()) < 2:
            await asyncio.sleep(0.1)

    def assert_sampled_by_their_versions(self, samples: list[Sample]) -> None:
        for sample in samples:
            (span,) = sample.versions
            assert (span.start, span.end) == (0, len(sample.token_ids))
            expected = reference_logprobs(self.models[span.version], sample, SAMPLING.temperature)
            np.testing.assert_allclose(sample.logprobs, expected, atol=2e-5)

    def in_actors(self, look: Any) -> list[Any]:
        """`look(actor)` inside of each rollout actor."""
        return ray.get([t.handle.__ray_call__.remote(look) for t in self.bench.pool.engines()], timeout=30)


def greedy(model: Any, count: int) -> list[int]:
    with torch.no_grad():
        ids = model.generate(torch.tensor([PROMPT]), max_new_tokens=count, do_sample=False)
    continuation: list[int] = ids[0, len(PROMPT) :].tolist()
    return continuation


@pytest.fixture(scope="module")
def setting(local_ray: None, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Setting]:
    torch.set_num_threads(1)
    run_dir, scratch = tmp_path_factory.mktemp("run"), tmp_path_factory.mktemp("scratch")
    config = adapter_config(tiny_model, scratch)

    async def start() -> tuple[RolloutPool, LearnerGroup]:
        return await asyncio.gather(
            RolloutPool.create(config, str(tiny_model), str(run_dir), has_gpus=False),
            LearnerGroup.create(config, str(tiny_model), str(run_dir)),
        )

    with asyncio.Runner() as runner:
        pool, learner = runner.run(start())
        yield Setting(Bench(runner, pool), learner, run_dir)
        runner.run(learner.close())
        runner.run(pool.close())
    assert not list(scratch.glob("grpo-ray-*")), "nothing is left behind"


@pytest.mark.slow
def test_before_the_first_sync_the_bare_model_samples_as_version_0(setting: Setting, tiny_model: Path) -> None:
    from transformers import AutoModelForCausalLM

    setting.models[0] = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()
    _, samples = setting.bench.draw(requests(8))
    setting.assert_sampled_by_their_versions(samples)
    assert {v.version for s in samples for v in s.versions} == {0}


@pytest.mark.slow
def test_after_a_sync_both_engines_sample_as_the_exported_model_and_as_the_learner(setting: Setting) -> None:
    version = setting.next_version()
    report = setting.bench.run(setting.sync.sync(version))
    adapter = setting.folder / f"hf-{version}" / "lora" / "adapter_model.safetensors"
    assert (report.version, report.num_engines) == (version, 2)
    assert report.num_bytes == adapter.stat().st_size
    assert report.checksum == adapter_checksum(adapter.read_bytes())
    assert 0 < report.pause_seconds <= report.seconds
    infos, samples = setting.bench.draw(requests(16))
    assert {i.worker for i in infos} == {"rollout-0", "rollout-1"}
    assert {i.min_version for i in infos} == {version}
    setting.assert_sampled_by_their_versions(samples)
    for sample in setting.bench.draw(requests(4, GREEDY))[1]:
        assert sample.token_ids.tolist() == greedy(setting.models[version], len(sample.token_ids))
    assert setting.update() < 1e-5


@pytest.mark.slow
def test_no_version_is_answered_from_the_prefix_cache_of_another(setting: Setting) -> None:
    drawn = []
    for _ in range(2):
        setting.bench.run(setting.sync.sync(setting.next_version()))
        # The second half finds in the cache what the first left there.
        drawn.append(setting.bench.draw(requests(8))[1] + setting.bench.draw(requests(8))[1])
        setting.assert_sampled_by_their_versions(drawn[-1])
    first, second = drawn
    assert {v.version for s in first for v in s.versions} != {v.version for s in second for v in s.versions}
    assert max(abs(a.logprobs[0] - b.logprobs[0]) for a, b in zip(first, second, strict=True)) > 0.01


@pytest.mark.slow
def test_samples_in_flight_finish_under_the_adapter_that_they_began_with(setting: Setting) -> None:
    old = setting.next_version()
    setting.bench.run(setting.sync.sync(old))
    new = setting.next_version()

    async def sync_in_flight() -> list[SampleInfo]:
        tasks = [asyncio.ensure_future(setting.bench.pool.generate(r)) for r in requests(120, LONG)]
        await asyncio.sleep(0.3)
        await setting.sync.sync(new)
        assert sum(not t.done() for t in tasks) > 40
        return await asyncio.gather(*tasks)

    infos = setting.bench.run(sync_in_flight())
    samples = [ray.get(i.ref, timeout=10)[i.row] for i in infos]
    assert {i.min_version for i in infos} == {old, new}
    setting.assert_sampled_by_their_versions(samples)
    held = setting.in_actors(lambda actor: [(a.version, a.num_users) for a in actor._adapters._held])
    assert held == [[(new, 0)], [(new, 0)]], "an adapter that nobody uses is dropped"


@pytest.mark.slow
def test_an_engine_killed_during_a_sync_is_left_out_and_comes_back_with_the_adapter(setting: Setting) -> None:
    version = setting.next_version()

    async def kill_and_sync() -> int:
        os.kill(setting.bench.pool.pids()["rollout-0"]["core_pid"], signal.SIGKILL)
        return (await setting.sync.sync(version)).num_engines

    assert setting.bench.run(kill_and_sync()) == 1
    # The learner goes on: what a restarted engine gets is the version that the others have.
    setting.next_version()

    async def until_both_sample() -> list[SampleInfo]:
        await setting.both_engines()
        infos: list[SampleInfo] = []
        while "rollout-0" not in {i.worker for i in infos}:
            infos = await asyncio.gather(*(setting.bench.pool.generate(r) for r in requests(40, LONG)))
        return infos

    infos = setting.bench.run(until_both_sample(), timeout_s=250)
    assert {i.min_version for i in infos} == {version}
    setting.assert_sampled_by_their_versions([ray.get(i.ref, timeout=10)[i.row] for i in infos])


@pytest.mark.slow
def test_an_adapter_that_no_engine_takes_ends_the_sync_with_the_reason(setting: Setting) -> None:
    class Garbled:
        """The learner, with a checksum that is not the adapter's."""

        async def put_adapter(self) -> AdapterReport:
            return replace(await setting.learner.put_adapter(), checksum="0" * 16)

    sync = RayAdapterSync(setting.bench.pool, Garbled(), timeout_s=SYNC_S)
    sync.TRIES = 1
    lives = {t.name: t.incarnation for t in setting.bench.pool.engines()}
    try:
        with pytest.raises(
            WorkerError, match=r"reached no engine in 1 tries; the last: rollout-\d failed in load_adapter"
        ):
            setting.bench.run(sync.sync(setting.version))
    finally:
        setting.bench.pool.on_stale = setting.sync.sync_stale
    version = setting.bench.pool.version
    infos, samples = setting.bench.draw(requests(8), timeout_s=280)
    assert {t.name: t.incarnation for t in setting.bench.pool.engines()} != lives
    assert {i.min_version for i in infos} == {version}, "restarted engines get the version that the samplers had"
    setting.assert_sampled_by_their_versions(samples)


@pytest.mark.slow
def test_zero3_ranks_gather_what_they_hold(setting: Setting, tiny_model: Path) -> None:
    config = adapter_config(tiny_model, setting.folder, num_actors=2, zero_stage=3)
    learner = setting.bench.run(LearnerGroup.create(config, str(tiny_model), str(setting.folder)), timeout_s=200)
    one_rank = setting.learner
    setting.learner = learner
    try:
        version = setting.next_version()
        sync = RayAdapterSync(setting.bench.pool, learner, timeout_s=SYNC_S)
        setting.bench.run(sync.sync(version))
        _, samples = setting.bench.draw(requests(8))
        assert {v.version for s in samples for v in s.versions} == {version}
        setting.assert_sampled_by_their_versions(samples)
        assert setting.update() < 1e-5
    finally:
        setting.learner = one_rank
        setting.bench.run(learner.close())


@pytest.mark.slow
def test_greedy_tokens_are_those_of_an_engine_started_on_the_exported_model(setting: Setting, tmp_path: Path) -> None:
    """But for ties: where the two part, each has taken its likeliest token, and both are as likely."""
    version = setting.next_version()
    setting.bench.run(setting.sync.sync(version))
    exported = setting.folder / f"hf-{version}"
    config = run_config(exported, rollout={"num_actors": 1, "max_completion_length": 200, "kv_cache_gb": 0.05})
    pool = setting.bench.run(RolloutPool.create(config, str(exported), str(tmp_path), has_gpus=False), timeout_s=200)
    merged = Bench(setting.bench.runner, pool)
    wanted = [
        replace(r, prompt_token_ids=PROMPT[i:]) for i, r in enumerate(requests(16, replace(LONG, temperature=0.0)))
    ]
    try:
        expected = merged.draw(wanted)[1]
    finally:
        setting.bench.run(pool.close())
    same = 0
    for got, want in zip(setting.bench.draw(wanted)[1], expected, strict=True):
        together = min(len(got.token_ids), len(want.token_ids))
        apart = np.flatnonzero(got.token_ids[:together] != want.token_ids[:together])
        until = int(apart[0]) + 1 if len(apart) else together
        np.testing.assert_allclose(got.logprobs[:until], want.logprobs[:until], atol=1e-4)
        same += not len(apart) and len(got.token_ids) == len(want.token_ids)
    assert same >= 12


@pytest.mark.parametrize(("r", "rank"), [(1, 1), (4, 8), (8, 8), (24, 32), (300, 320), (MAX_ADAPTER_RANK, 512)])
def test_engines_have_the_next_rank_that_vllm_takes(r: int, rank: int) -> None:
    from vllm.config.lora import MaxLoRARanks

    assert lora_args(AdapterOptions(LoraConfig(r=r), 2))["max_lora_rank"] == rank
    assert max(get_args(MaxLoRARanks)) == MAX_ADAPTER_RANK


@pytest.mark.parametrize(("staleness", "room"), [(0, 2), (1, 2), (3, 4)])
def test_there_is_room_for_every_version_that_samples_may_be_of(tmp_path: Path, staleness: int, room: int) -> None:
    config = adapter_config(tmp_path, tmp_path)
    algorithm = config.algorithm.model_copy(update={"max_staleness": staleness})
    options = AdapterOptions.of(config.model_copy(update={"algorithm": algorithm}))
    assert options is not None
    assert options.max_versions == room
    assert AdapterOptions.of(run_config(tmp_path)) is None


def test_an_adapter_without_room_or_with_another_checksum_is_refused_before_vllm_sees_it() -> None:
    class Untouched:
        """No engine: whatever is asked of it is an error."""

    adapters = EngineAdapters(Untouched(), AdapterOptions(LoraConfig(), 0), "base", "rollout-3")
    with pytest.raises(WorkerError, match="rollout-3 received an adapter with checksum"):
        asyncio.run(adapters.load(1, "0" * 16, b"adapter"))
    with pytest.raises(WorkerError, match=r"rollout-3 still samples .* has room for 0; version 1 came too early"):
        asyncio.run(adapters.load(1, adapter_checksum(b"adapter"), b"adapter"))
