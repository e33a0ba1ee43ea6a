"""`make bench-sync`: a weight sync of 500 MB to two engines that are sampling, against plain copies of those bytes: on a machine
that does nothing else, and beside the same sampling.

python -m tests.bench.sync [--layers 11] [--engines 2] [--repeats 5]
"""

from __future__ import annotations

import argparse
import asyncio
import os
import tempfile
import time
from pathlib import Path
from statistics import median

import torch
from rich.console import Console
from rich.table import Table

from actors.cluster import connect
from actors.learner.group import LearnerGroup
from actors.rollout.pool import RolloutPool
from actors.weights.sync import RayWeightSync
from grpo_ray.config.model import TinyModelConfig
from grpo_ray.config.schema import RunConfig
from grpo_ray.models.files.tiny import build_tiny_model
from grpo_ray.types import SampleRequest, SamplingParams, SyncReport
from tests.bench.versus import OUR_ENV

LIMIT_S = 550.0
PROMPT = list(range(20, 52))
LENGTH = 400


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=11, help="of 11 M parameters each, fp32")
    parser.add_argument("--engines", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    os.environ |= OUR_ENV  # Nobody gives way to the copies.
    with tempfile.TemporaryDirectory() as folder:
        tiny = TinyModelConfig(
            hidden_size=1024, num_layers=options.layers, num_heads=8, num_kv_heads=2, context=LENGTH + 64
        )
        model = build_tiny_model(Path(folder) / "model", tiny)
        config = _config(model, options.engines)
        connect(config)
        reports, beside = asyncio.run(
            asyncio.wait_for(_syncs(config, str(model), folder, options.engines, options.repeats), LIMIT_S)
        )
    copies = _Copies(reports[0].num_bytes)
    _print(reports, [copies.two() for _ in range(options.repeats)], beside)


def _config(model: Path, engines: int) -> RunConfig:
    return RunConfig.model_validate(
        {
            "name": "bench-sync",
            "model": {"path": str(model), "dtype": "float32"},
            "data": {"train": {"path": "unused"}, "max_prompt_length": len(PROMPT)},
            "reward": {"functions": [{"name": "accuracy"}]},
            "rollout": {
                "num_actors": engines,
                "num_cpus": 0,
                "max_completion_length": LENGTH,
                "max_num_seqs": 4,
                "kv_cache_gb": 0.25,
            },
            "learner": {"num_actors": 1, "num_cpus": 0, "num_threads": 1, "zero_stage": 1},
        }
    )


async def _syncs(
    config: RunConfig, model: str, run_dir: str, engines: int, repeats: int
) -> tuple[list[SyncReport], list[float]]:
    """Reports, without that of the first one, which connects; and seconds of plain copies, one after each sync. Every engine is
    sampling throughout."""
    pool = await RolloutPool.create(config, model, run_dir, has_gpus=False)
    learner = await LearnerGroup.create(config, model, run_dir, num_steps=10)
    sync = RayWeightSync(pool, learner, config.deadlines.of_sync(has_gpus=False))
    sampling = asyncio.create_task(_keep_sampling(pool, 2 * engines))
    try:
        reports = [await sync.sync(1)]
        copies, beside = _Copies(reports[0].num_bytes), []
        for version in range(2, repeats + 2):
            await asyncio.sleep(1.0)
            reports.append(await sync.sync(version))
            await asyncio.sleep(1.0)
            beside.append(await asyncio.to_thread(copies.two))
            if sampling.done():
                sampling.result()
    finally:
        sampling.cancel()
        await asyncio.gather(sampling, return_exceptions=True)
        await learner.close()
        await pool.close()
    return reports[1:], beside


async def _keep_sampling(pool: RolloutPool, at_once: int) -> None:
    async def one_by_one(index: int) -> None:
        seed = 0
        while True:
            seed += 1
            params = SamplingParams(1.0, 1.0, -1, 0.0, LENGTH)
            await pool.generate(SampleRequest(f"{index}/{seed}", 0, PROMPT, seed, params))

    await asyncio.gather(*(one_by_one(i) for i in range(at_once)))


class _Copies:
    """Between two pieces of memory that were used before, by as many threads as there are cores."""

    def __init__(self, num_bytes: int) -> None:
        self._source, self._target = (torch.ones(num_bytes, dtype=torch.uint8) for _ in range(2))

    def two(self) -> float:
        """Seconds of copying all of it twice."""
        started = time.monotonic()
        self._target.copy_(self._source)
        self._source.copy_(self._target)
        return time.monotonic() - started


def _print(reports: list[SyncReport], copies: list[float], beside: list[float]) -> None:
    megabytes, engines = reports[0].num_bytes / 1e6, reports[0].num_engines
    columns = ("", "seconds", "least", "GB/s", "x plain", "x beside")
    out = Table(*columns, title=f"{megabytes:,.0f} MB to {engines} engines that sample")
    for name, seconds in (
        ("plain copies of the bytes, two", copies),
        ("the same beside the engines' sampling", beside),
        ("sync", [r.seconds for r in reports]),
        ("of it, sampling paused", [r.pause_seconds for r in reports]),
    ):
        middle = median(seconds)
        out.add_row(
            name,
            f"{middle:.2f}",
            f"{min(seconds):.2f}",
            f"{2 * megabytes / 1e3 / middle:.2f}",
            f"{middle / median(copies):.2f}",
            f"{middle / median(beside):.2f}",
        )
    Console().print(out)


if __name__ == "__main__":
    main()
