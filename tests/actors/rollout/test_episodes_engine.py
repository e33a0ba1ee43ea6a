"""Episodes by a real engine, with real environment workers, against Transformers as the reference."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch

from actors.environment.pool import EnvironmentPool
from actors.rollout.pool import RolloutPool
from grpo_ray.config.loading import build
from grpo_ray.config.schema import RunConfig
from grpo_ray.loop.requests import requests_of
from grpo_ray.models.files.loading import load_tokenizer
from grpo_ray.types import Prompt, Sample, SampleInfo, SamplingParams

pytestmark = [pytest.mark.timeout(600), pytest.mark.long]
GAMES = Path(__file__).parents[1] / "environment" / "games.py"
PARAMS = SamplingParams(1.0, 1.0, 0, 0.0, 190, stop_token_ids=tuple(range(40, 140)))
"""Many tokens end a turn, since a random model hardly ever writes the one that does."""
ROUNDS = 12


@dataclass
class Play:
    runner: asyncio.Runner
    config: RunConfig
    pool: RolloutPool
    environments: EnvironmentPool
    tokenizer: Any

    def draw(self, count: int, prompt_id: str = "rows/0/0") -> tuple[list[SampleInfo], list[Sample]]:
        messages = [{"role": "user", "content": "go"}]
        text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        wanted = requests_of(Prompt(prompt_id, ids, text, messages, {}, "go"), range(count), self.config, PARAMS)

        async def all_of_them() -> list[SampleInfo]:
            async with asyncio.timeout(200):
                return await asyncio.gather(*(self.pool.generate(r) for r in wanted))

        infos = self.runner.run(all_of_them())
        return infos, [ray.get(i.ref, timeout=10)[i.row] for i in infos]


@pytest.fixture(scope="module")
def play(local_ray: None, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Play]:
    run_dir = str(tmp_path_factory.mktemp("run"))
    data = {
        "model": {"path": str(tiny_model), "dtype": "float32"},
        "data": {"train": {"path": "unused.jsonl"}, "template": "chat", "max_prompt_length": 56},
        "rollout": {"num_actors": 1, "max_completion_length": 190, "max_num_seqs": 32, "kv_cache_gb": 0.05},
        "environment": {
            "name": f"{GAMES}:Rounds",
            "args": {"rounds": ROUNDS},
            "max_turn_tokens": 6,
            "num_cpus": 0,
            "num_envs": 8,
            "envs_per_process": 8,
        },
        "deadlines": {"start_s": 150},
    }
    config = build(RunConfig, data, "test")
    assert config.environment is not None
    with asyncio.Runner() as runner:
        environments = runner.run(EnvironmentPool.create(config.environment, (), run_dir, start_timeout_s=150))
        pool = runner.run(RolloutPool.create(config, str(tiny_model), run_dir, has_gpus=False))
        pool.use_environments(environments.members)
        environments.on_change = pool.use_environments
        yield Play(runner, config, pool, environments, load_tokenizer(str(tiny_model), trust_remote_code=False))
        runner.run(pool.close())
        runner.run(environments.close())


def test_every_sampled_token_of_an_episode_has_the_log_probability_of_the_whole_sequence(
    play: Play, tiny_model: Path
) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()
    infos, samples = play.draw(8)
    assert max(info.episode.num_turns for info in infos if info.episode is not None) > 1
    for sample in samples:
        tokens = torch.tensor(np.concatenate([sample.prompt_token_ids, sample.token_ids])[None], dtype=torch.long)
        with torch.no_grad():
            logps = model(tokens).logits[0].float().log_softmax(-1)
        at = len(sample.prompt_token_ids) - 1
        own = logps[at:-1].gather(1, tokens[0, at + 1 :, None])[:, 0].numpy()
        for span in sample.versions:
            places = slice(span.start, span.end)
            assert np.abs(own[places] - sample.logprobs[places]).max() < 1e-5


def test_the_samples_of_a_rerun_are_the_same_and_those_of_a_group_are_not(play: Play) -> None:
    first, again = (play.draw(4, "rows/0/1")[1] for _ in range(2))
    assert [s.token_ids.tolist() for s in first] == [s.token_ids.tolist() for s in again]
    assert len({tuple(s.token_ids.tolist()) for s in first}) > 1


def test_a_worker_that_is_killed_costs_no_episode(play: Play) -> None:
    (pid,) = play.environments.pids.values()
    os.kill(pid, signal.SIGKILL)
    infos, samples = play.draw(4, "rows/0/2")
    assert all(s.episode is not None and s.episode.failure is None for s in samples)
    assert all(info.episode is not None for info in infos)
