"""Weights from real learners (plain torch, and DeepSpeed ZeRO-3 on two ranks) into two real vLLM engines."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import time
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch

from actors.rollout.pool import RolloutPool
from actors.weights.protocol import EngineTarget, SendReport
from actors.weights.sync import RayWeightSync
from grpo_ray.config.model import TinyModelConfig
from grpo_ray.models.files.tiny import build_tiny_model
from grpo_ray.types import Sample, SampleInfo, SyncReport
from tests.actors.rollout.test_rollout import GREEDY, LONG, SAMPLING, Bench, reference_logprobs, requests, run_config
from tests.actors.weights.test_weight_memory import holders

pytestmark = pytest.mark.timeout(600)
SYNC_S = 60.0
BUCKET_BYTES = 64 << 10


@ray.remote(num_cpus=0)
class LearnerRank:
    """What a learner actor is to a weight sync: a model, and the two methods."""

    def __init__(self, folder: str, rank: int, world_size: int, port: int, zero_stage: int) -> None:
        os.environ.update(RANK=str(rank), LOCAL_RANK="0", WORLD_SIZE=str(world_size), DS_ACCELERATOR="cpu")
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        torch.set_num_threads(1)
        from transformers import AutoModelForCausalLM

        from actors.weights.sender import WeightSender, ZeroWeightSource

        self.zero_stage = zero_stage
        self.model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        if zero_stage:
            import deepspeed
            from deepspeed.ops import __compatible_ops__ as compiled_ops

            compiled_ops["deepspeed_shm_comm"] = False
            deepspeed.init_distributed("gloo", auto_mpi_discovery=False, verbose=False)
            config = {
                "train_micro_batch_size_per_gpu": 1,
                "zero_optimization": {"stage": zero_stage, "stage3_param_persistence_threshold": 0},
                "zero_allow_untested_optimizer": True,
            }
            optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3)
            self.model = deepspeed.initialize(model=self.model, optimizer=optimizer, config=config)[0].module
        self.source = ZeroWeightSource(self.model, BUCKET_BYTES, torch.float32)
        self.sender = WeightSender(self.source, rank, "gloo", BUCKET_BYTES, SYNC_S)

    def load(self, folder: str) -> None:
        from safetensors.torch import load_file

        from actors.zero import gathered

        weights = load_file(f"{folder}/model.safetensors")
        for name, param in self.model.named_parameters():
            with gathered([param]):
                param.data.copy_(weights[name])
                if self.zero_stage == 3:
                    param.partition([param], has_been_updated=True)
                    param.all_gather([param])

    def flip_a_bit_in_the_next_bucket(self) -> None:
        from actors.weights.gloo_trainer import GlooTrainer

        fill = GlooTrainer._fill

        def corrupted(trainer: Any, *args: Any) -> torch.Tensor:
            GlooTrainer._fill = fill
            bucket = fill(trainer, *args)
            bucket[len(bucket) // 2] ^= 1
            return bucket

        GlooTrainer._fill = corrupted  # type: ignore[assignment]

    def dawdle_over_the_next_bucket(self, seconds: float) -> None:
        from actors.weights.gloo_trainer import GlooTrainer

        fill = GlooTrainer._fill

        def slow(trainer: Any, *args: Any) -> torch.Tensor:
            GlooTrainer._fill = fill
            time.sleep(seconds)
            return fill(trainer, *args)

        GlooTrainer._fill = slow  # type: ignore[assignment]

    def send_by(self, way: str) -> None:
        """`shared`: in memory. `gloo`: as if the engines were on other machines. `mixed`: as if all but the first were."""
        from actors.weights.sender import EngineClient

        num_sharing = {"shared": 2, "mixed": 1, "gloo": 0}[way]
        self.share = getattr(self, "share", EngineClient.share)
        EngineClient.share = lambda client, address: self.share(client, address)[:num_sharing]  # type: ignore[assignment]
        self.sender.close()

    def memory(self) -> tuple[int, str]:
        """Process, and name of the memory that engines share with it."""
        engine: Any = self.sender._engine
        return os.getpid(), engine._memory.address["name"] if engine._memory else ""

    def weights_connect(self, targets: list[EngineTarget], generation: int) -> None:
        self.sender.connect(targets, generation)

    def weights_send(self, version: int) -> SendReport:
        return self.sender.send(version)


class Learner:
    """All ranks as one, as `LearnerWeights` asks."""

    unsent = False

    def __init__(self, folder: Path, num_ranks: int = 1, zero_stage: int = 0) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        rank: Any = LearnerRank
        self.ranks = [rank.remote(str(folder), r, num_ranks, port, zero_stage) for r in range(num_ranks)]

    def call(self, method: str, *args: Any) -> None:
        ray.get([getattr(r, method).remote(*args) for r in self.ranks], timeout=120)

    async def connect_weights(self, targets: Sequence[EngineTarget], generation: int) -> None:
        await asyncio.gather(*[r.weights_connect.remote(list(targets), generation) for r in self.ranks])

    async def send_weights(self, version: int) -> SendReport:
        return (await asyncio.gather(*[r.weights_send.remote(version) for r in self.ranks]))[0]

    def end(self) -> None:
        for rank in self.ranks:
            ray.kill(rank)


class Setting:
    """Pool, learner, and models with other weights to sync."""

    def __init__(self, bench: Bench, learner: Learner, folders: list[Path]) -> None:
        from transformers import AutoModelForCausalLM

        self.bench = bench
        self.learner = learner
        self.sync = RayWeightSync(bench.pool, learner, timeout_s=SYNC_S)
        self.folders = folders
        self.models = [AutoModelForCausalLM.from_pretrained(f, dtype=torch.float32).eval() for f in folders]
        self.version = 0

    def next_version(self, model: int) -> int:
        self.learner.call("load", str(self.folders[model]))
        self.version += 1
        return self.version

    async def both_engines(self) -> None:
        while len(self.bench.pool.engines()) < 2:
            await asyncio.sleep(0.1)

    def assert_sampled_by(self, model: int, samples: list[Sample]) -> None:
        for sample in samples:
            expected = reference_logprobs(self.models[model], sample, SAMPLING.temperature)
            np.testing.assert_allclose(sample.logprobs, expected, atol=1e-5)


@pytest.fixture(scope="module")
def shared_setting(local_ray: None, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Setting]:
    torch.set_num_threads(1)
    tmp = tmp_path_factory.mktemp("weights")
    tiny: dict[str, Any] = {"hidden_size": 64, "num_layers": 2, "num_heads": 2, "num_kv_heads": 1, "context": 256}
    others = [build_tiny_model(tmp / str(seed), TinyModelConfig(**tiny, seed=seed)) for seed in (21, 22)]
    with asyncio.Runner() as runner:
        config = run_config(tiny_model, deadlines={"start_s": 280, "sample_s": 120, "sync_s": SYNC_S})
        learner = Learner(tiny_model)
        pool = runner.run(RolloutPool.create(config, str(tiny_model), str(tmp), has_gpus=False))
        yield Setting(Bench(runner, pool), learner, [tiny_model, *others])
        runner.run(pool.close())


@pytest.fixture
def setting(shared_setting: Setting) -> Setting:
    """With both engines alive, whatever the test before did to them."""
    shared_setting.bench.run(shared_setting.both_engines(), timeout_s=280)
    return shared_setting


def test_bucket_plans_hold_every_parameter_once_within_the_limit() -> None:
    from vllm.distributed.weight_transfer.base import ParamMeta

    from actors.weights.buckets import plan_buckets

    metadata = [ParamMeta(str(i), torch.bfloat16, (n,)) for i, n in enumerate([3, 100, 7, 999, 1, 1, 50])]
    plan = plan_buckets(metadata, 512)
    assert [s.name for bucket in plan for s in bucket.slots] == [m.name for m in metadata]
    assert all(bucket.size <= 512 + 16 or len(bucket.slots) == 1 for bucket in plan)
    assert plan[0].start == 0
    assert all(a.end <= b.start and b.start % 16 == 0 for a, b in pairwise(plan))
    for bucket in plan:
        assert all(a.end <= b.start for a, b in pairwise(bucket.slots))
        assert bucket.slots[-1].end <= bucket.size - 8
        assert all(s.start % 16 == 0 and s.end - s.start == 2 * s.shape[0] for s in bucket.slots)


def test_the_digest_sees_one_bit_and_an_exchange() -> None:
    from actors.weights.buckets import Digest

    def digest(**tensors: torch.Tensor) -> str:
        d = Digest()
        for name, tensor in tensors.items():
            d.add(name, tensor)
        return d.hex()

    a, b = torch.randn(33).bfloat16(), torch.randn(4, 5)
    flipped = b.clone()
    flipped.view(torch.int32)[2, 3] ^= 1
    assert digest(a=a, b=b) == digest(a=a.clone(), b=b.clone())
    assert len({digest(a=a, b=b), digest(a=a, b=flipped), digest(b=b, a=a), digest(a=b, b=a), digest(a=a)}) == 5


def test_after_a_sync_both_engines_sample_with_the_new_weights(setting: Setting) -> None:
    version = setting.next_version(1)
    report = setting.bench.run(setting.sync.sync(version))
    assert report.version == version
    assert report.num_engines == 2
    assert report.num_bytes == 4 * sum(p.numel() for p in setting.models[1].parameters())
    assert 0 < report.pause_seconds <= report.seconds
    infos, samples = setting.bench.draw(requests(16, SAMPLING))
    assert {i.worker for i in infos} == {"rollout-0", "rollout-1"}
    assert {i.min_version for i in infos} == {version}
    setting.assert_sampled_by(1, samples)
    for sample in setting.bench.draw(requests(6, GREEDY))[1]:
        tokens = torch.tensor(np.concatenate([sample.prompt_token_ids, sample.token_ids])[None], dtype=torch.long)
        with torch.no_grad():
            best = setting.models[1](tokens).logits[0].argmax(-1)
        assert best[len(sample.prompt_token_ids) - 1 : -1].tolist() == sample.token_ids.tolist()


@pytest.mark.parametrize("way", ["gloo", "mixed", "shared"])
def test_the_same_weights_sample_the_same_by_whichever_way_they_came_and_wherever_they_lie(
    setting: Setting, way: str
) -> None:
    setting.learner.call("send_by", way)
    setting.sync = RayWeightSync(setting.bench.pool, setting.learner, timeout_s=SYNC_S)
    seen: dict[int, list[Sample]] = {}
    # Each of them comes to lie in both sets of an engine's memory.
    for model in (1, 2, 2, 1):
        version = setting.next_version(model)
        assert setting.bench.run(setting.sync.sync(version)).num_engines == 2
        infos, samples = setting.bench.draw(requests(16, SAMPLING))
        assert {i.worker for i in infos} == {"rollout-0", "rollout-1"}
        assert {i.min_version for i in infos} == {version}
        setting.assert_sampled_by(model, samples)
        for before, sample in zip(seen.setdefault(model, samples), samples, strict=True):
            assert before.token_ids.tolist() == sample.token_ids.tolist()
            assert before.logprobs.tolist() == sample.logprobs.tolist()
    cores = [pids["core_pid"] for _, pids in sorted(setting.bench.pool.pids().items())]
    _, name = ray.get(setting.learner.ranks[0].memory.remote(), timeout=30)
    assert holders(name or "?") - {os.getpid()} >= set(cores[: {"gloo": 0, "mixed": 1, "shared": 2}[way]])
    assert bool(name) == (way != "gloo")


def test_the_checksum_is_of_the_weights(setting: Setting) -> None:
    one = setting.bench.run(setting.sync.sync(setting.next_version(1))).checksum
    two = setting.bench.run(setting.sync.sync(setting.next_version(2))).checksum
    again = setting.bench.run(setting.sync.sync(setting.next_version(1))).checksum
    assert one == again != two


def test_samples_in_flight_go_on_under_the_new_weights_and_say_where(setting: Setting) -> None:
    old = setting.next_version(1)
    setting.bench.run(setting.sync.sync(old))
    new = setting.next_version(2)

    async def sync_in_flight() -> list[SampleInfo]:
        tasks = [asyncio.ensure_future(setting.bench.pool.generate(r)) for r in requests(48, LONG)]
        await asyncio.sleep(0.2)
        await setting.sync.sync(new)
        return await asyncio.gather(*tasks)

    infos = setting.bench.run(sync_in_flight())
    samples = [ray.get(i.ref, timeout=10)[i.row] for i in infos]
    switched = [s for s in samples if len(s.versions) == 2]
    assert switched
    for sample in samples:
        assert sample.versions[0].start == 0
        assert sample.versions[-1].end == len(sample.token_ids)
        for span in sample.versions:
            model = setting.models[{old: 1, new: 2}[span.version]]
            expected = reference_logprobs(model, sample, SAMPLING.temperature)[span.start : span.end]
            np.testing.assert_allclose(sample.logprobs[span.start : span.end], expected, atol=1e-5)
    for sample in switched:
        assert [v.version for v in sample.versions] == [old, new]
        assert sample.versions[0].end == sample.versions[1].start


def test_zero3_ranks_gather_and_send_what_they_hold(setting: Setting) -> None:
    learner = Learner(setting.folders[0], num_ranks=2, zero_stage=3)
    try:
        learner.call("load", str(setting.folders[2]))
        setting.version += 1
        sync = RayWeightSync(setting.bench.pool, learner, timeout_s=SYNC_S)
        report = setting.bench.run(sync.sync(setting.version))
        assert report.num_bytes == 4 * sum(p.numel() for p in setting.models[2].parameters())
        setting.assert_sampled_by(2, setting.bench.draw(requests(8, SAMPLING))[1])
    finally:
        learner.end()
        setting.sync = RayWeightSync(setting.bench.pool, setting.learner, timeout_s=SYNC_S)
    assert report.checksum == setting.bench.run(setting.sync.sync(setting.next_version(2))).checksum


@pytest.mark.long
def test_an_engine_that_dies_before_a_sync_is_left_out_then_brought_up_to_date(setting: Setting) -> None:
    version = setting.next_version(1)

    async def kill_and_sync() -> tuple[int, list[SampleInfo]]:
        os.kill(setting.bench.pool.pids()["rollout-0"]["core_pid"], signal.SIGKILL)
        report = await setting.sync.sync(version)
        await setting.both_engines()
        infos: list[SampleInfo] = []
        while "rollout-0" not in {i.worker for i in infos}:
            infos = await asyncio.gather(*(setting.bench.pool.generate(r) for r in requests(40, LONG)))
        return report.num_engines, infos

    num_engines, infos = setting.bench.run(kill_and_sync(), timeout_s=250)
    assert num_engines == 1
    assert {i.min_version for i in infos} == {version}
    setting.assert_sampled_by(1, [ray.get(i.ref, timeout=10)[i.row] for i in infos])


def test_a_corrupted_bucket_is_refused_at_no_cost_to_the_engines_and_the_sync_goes_again(setting: Setting) -> None:
    version = setting.next_version(2)
    setting.learner.call("flip_a_bit_in_the_next_bucket")
    lives = {t.name: t.incarnation for t in setting.bench.pool.engines()}
    troubles: list[str] = []
    setting.bench.pool.on_trouble = troubles.append
    report = setting.bench.run(setting.sync.sync(version), timeout_s=280)
    assert {t.name: t.incarnation for t in setting.bench.pool.engines()} == lives
    assert [("it is refused" in t, "2 more tries" in t) for t in troubles] == [(True, True)]
    assert (report.version, report.num_engines) == (version, 2)
    infos, samples = setting.bench.draw(requests(8, SAMPLING), timeout_s=280)
    assert {i.min_version for i in infos} == {version}
    setting.assert_sampled_by(2, samples)


@pytest.mark.long
def test_an_engine_core_that_is_killed_in_mid_transfer_costs_that_engine_and_nothing_else_within_a_minute(
    setting: Setting,
) -> None:
    pool = setting.bench.pool
    setting.bench.run(setting.sync.sync(setting.next_version(1)))
    version = setting.next_version(2)
    setting.learner.call("dawdle_over_the_next_bucket", 3.0)
    lives = {t.name: t.incarnation for t in pool.engines()}
    learner = ray.get(setting.learner.ranks[0].memory.remote(), timeout=30)[0]

    async def kill_in_mid_transfer() -> tuple[SyncReport, float]:
        sync = asyncio.create_task(setting.sync.sync(version))
        await asyncio.sleep(1.0)
        assert not sync.done()
        os.kill(pool.pids()["rollout-1"]["core_pid"], signal.SIGKILL)
        killed = time.monotonic()
        return await sync, time.monotonic() - killed

    report, seconds = setting.bench.run(kill_in_mid_transfer(), timeout_s=120)
    assert (report.version, report.num_engines) == (version, 1)
    assert seconds < 60
    assert {t.incarnation for t in pool.engines() if t.name == "rollout-0"} == {lives["rollout-0"]}
    assert ray.get(setting.learner.ranks[0].memory.remote(), timeout=30)[0] == learner
    infos, samples = setting.bench.draw(requests(8, SAMPLING))
    assert {i.min_version for i in infos} == {version}
    setting.assert_sampled_by(2, samples)


def test_engines_sample_while_weights_arrive(setting: Setting) -> None:
    """The learner takes its time over the first bucket; meanwhile samples are finished with the old weights."""
    old = setting.next_version(1)
    setting.bench.run(setting.sync.sync(old))
    new = setting.next_version(2)
    setting.learner.call("dawdle_over_the_next_bucket", 3.0)

    async def sync_in_flight() -> tuple[SyncReport, list[SampleInfo]]:
        sync = asyncio.create_task(setting.sync.sync(new))
        await asyncio.sleep(0.5)
        infos = await asyncio.gather(*(setting.bench.pool.generate(r) for r in requests(8, SAMPLING)))
        assert not sync.done()
        return await sync, infos

    report, infos = setting.bench.run(sync_in_flight())
    assert {i.min_version for i in infos} == {old}
    assert report.seconds > 3.0 > 1.0 > report.pause_seconds
    setting.assert_sampled_by(1, [ray.get(i.ref, timeout=10)[i.row] for i in infos])
    setting.assert_sampled_by(2, setting.bench.draw(requests(8, SAMPLING))[1])


@pytest.mark.long
def test_a_sender_that_is_killed_in_mid_transfer_costs_no_engine_and_leaves_no_memory(setting: Setting) -> None:
    current = setting.next_version(1)
    setting.bench.run(setting.sync.sync(current))
    lives = {t.name: t.incarnation for t in setting.bench.pool.engines()}
    files = set(os.listdir("/dev/shm"))
    learner = Learner(setting.folders[2])
    sync = RayWeightSync(setting.bench.pool, learner, timeout_s=SYNC_S)
    cores = {pids["core_pid"] for pids in setting.bench.pool.pids().values()}

    async def kill_while_it_sends() -> str:
        targets = setting.bench.pool.engines()
        await sync._connect(targets)
        pid, name = await learner.ranks[0].memory.remote()
        assert holders(name) >= {*cores, pid}
        learner.call("dawdle_over_the_next_bucket", 30.0)
        sending = asyncio.create_task(sync.sync(current + 1))
        await asyncio.sleep(1.0)
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(ray.exceptions.RayActorError):
            await sending
        return name

    name = setting.bench.run(kill_while_it_sends(), timeout_s=200)
    infos, samples = setting.bench.draw(requests(8, SAMPLING))
    assert {i.min_version for i in infos} == {current}
    setting.assert_sampled_by(1, samples)
    setting.sync = RayWeightSync(setting.bench.pool, setting.learner, timeout_s=SYNC_S)
    setting.bench.run(setting.sync.sync(setting.next_version(2)))
    setting.assert_sampled_by(2, setting.bench.draw(requests(8, SAMPLING))[1])
    assert {t.name: t.incarnation for t in setting.bench.pool.engines()} == lives
    assert holders(name) == set()
    assert {f for f in set(os.listdir("/dev/shm")) - files if "grpo" in f} == set()


@pytest.mark.long
def test_an_engine_leaves_when_its_samples_are_done_and_one_that_joins_samples_with_the_current_weights(
    setting: Setting,
) -> None:
    pool = setting.bench.pool
    version = setting.next_version(1)
    setting.bench.run(setting.sync.sync(version))
    lives = {t.name: t.incarnation for t in pool.engines()}
    pool.take_tracks()
    core = pool.pids()["rollout-1"]["core_pid"]

    async def leave() -> list[SampleInfo]:
        under_way = [asyncio.ensure_future(pool.generate(r)) for r in requests(60, LONG)]
        await asyncio.sleep(0.2)
        pool.scale(1)
        later = [asyncio.ensure_future(pool.generate(r)) for r in requests(20, SAMPLING, seed=300)]
        infos = await asyncio.gather(*under_way, *later)
        while os.path.exists(f"/proc/{core}"):
            await asyncio.sleep(0.1)
        return infos

    infos = setting.bench.run(leave(), timeout_s=200)
    assert [(i.prompt_id, i.index) for i in infos] == [(f"p{i}", 0) for i in (*range(60), *range(20))]
    assert {i.worker for i in infos[:60]} == {"rollout-0", "rollout-1"}, "it finished what it had"
    assert {i.worker for i in infos[60:]} == {"rollout-0"}, "it got nothing new"
    assert [t.name for t in pool.engines()] == ["rollout-0"]
    assert [t.worker for t in pool.take_tracks()] == ["rollout-0", "rollout-1"]
    assert [t.worker for t in pool.take_tracks()] == ["rollout-0"]

    async def join() -> list[SampleInfo]:
        pool.scale(2)
        infos: list[SampleInfo] = []
        while "rollout-1" not in {i.worker for i in infos}:
            infos = await asyncio.gather(*(pool.generate(r) for r in requests(16, SAMPLING)))
        return infos

    infos = setting.bench.run(join(), timeout_s=280)
    samples = [ray.get(i.ref, timeout=10)[i.row] for i in infos]
    assert {i.min_version for i in infos} == {version}
    setting.assert_sampled_by(1, samples)
    assert pool.engines()[1].incarnation not in lives.values(), "no sync takes it for the one that left"
    version = setting.next_version(2)
    assert setting.bench.run(setting.sync.sync(version)).num_engines == 2
    infos, samples = setting.bench.draw(requests(16, SAMPLING))
    assert {i.worker for i in infos} == {"rollout-0", "rollout-1"}
    setting.assert_sampled_by(2, samples)
