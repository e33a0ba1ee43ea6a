"""Two real engines and a prompt of which each sample ends whatever engine has it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray

from actors.rollout.pool import RolloutPool
from grpo_ray.errors import PoisonedError
from grpo_ray.types import SampleInfo, SampleRequest
from tests.actors.rollout.test_rollout import LONG, Bench, prompt, requests, run_config

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def bench(local_ray: None, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    run_dir = str(tmp_path_factory.mktemp("run"))
    config = run_config(tiny_model, deadlines={"start_s": 150, "sample_s": 200})
    with asyncio.Runner() as runner:
        pool = runner.run(RolloutPool.create(config, str(tiny_model), run_dir, has_gpus=False))
        yield Bench(runner, pool)
        runner.run(pool.close())


def test_a_prompt_that_ends_every_engine_is_set_aside_and_all_others_are_drawn(bench: Bench) -> None:
    wanted = requests(40, LONG, seed=900)
    _, before = bench.draw(wanted)
    poison = [SampleRequest("poison", i, prompt(50), i, LONG) for i in range(4)]
    told: list[str] = []
    bench.pool.on_trouble = told.append

    async def kill_who_has_it() -> None:
        while True:
            for engine in bench.pool._engines.values():
                if engine.alive and any(t.request.prompt_id == "poison" for t in engine.work.values()):
                    # It may be gone already, and the pool not know it yet.
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(engine.pids["core_pid"], signal.SIGKILL)
            await asyncio.sleep(0.02)

    async def draw() -> list[SampleInfo | BaseException]:
        killing = asyncio.create_task(kill_who_has_it())
        drawn = await asyncio.gather(*(bench.pool.generate(r) for r in [*poison, *wanted]), return_exceptions=True)
        killing.cancel()
        while len(bench.pool.engines()) < 2:
            await asyncio.sleep(0.1)
        return drawn

    drawn = bench.run(draw(), timeout_s=280)
    assert [type(e) for e in drawn[:4]] == [PoisonedError] * 4, drawn[:4]
    assert "prompt poison ends rollout engines" in str(drawn[0])
    assert "2 of them on nothing else" in str(drawn[0])
    assert 4 <= len(told) <= 8, "of two engines among others, and then alone"
    after = [ray.get(i.ref, timeout=10)[i.row] for i in drawn[4:] if isinstance(i, SampleInfo)]
    assert [s.token_ids.tolist() for s in after] == [s.token_ids.tolist() for s in before]
