"""Runs of `grpo-ray sft`, `dpo` and `reward-model`: learners alone, over demonstrations or pairs."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import Any

from actors.recovery import outlive_learners
from actors.run_context import RunContext
from actors.run_inputs import report_left_out, resolve_model
from actors.run_training import keep_records, open_trackers, run_loop
from actors.workers import Workers
from grpo_ray.config_supervised import DpoConfig, SftConfig
from grpo_ray.cursor import Cursor
from grpo_ray.epochs import run_length
from grpo_ray.models import load_tokenizer
from grpo_ray.sft_loop import SftLoop
from grpo_ray.supervised import load_task


async def run_supervised(context: RunContext, config: SftConfig) -> str:
    """Fine-tune; learners that are lost start again."""
    model = await resolve_model(context, config)
    context.phase("data")
    tokenizer = await asyncio.to_thread(load_tokenizer, model, trust_remote_code=config.model.trust_remote_code)
    task = await asyncio.to_thread(load_task, config, tokenizer)
    report_left_out(context, task.dataset.report)
    length = run_length(config, len(task.dataset))
    async with Workers(config, context.run, model, context.phase, context.warn) as workers:
        learner = await workers.start_learner(length.num_steps)

        async def fine_tune() -> str:
            await keep_records(context)
            trackers = open_trackers(context, config, workers)

            def cursor() -> Cursor[Any]:
                return Cursor(task.dataset, seed=config.seed, shuffle=config.data.shuffle)

            def measure() -> Awaitable[dict[str, float]]:
                return task.measure(learner)

            loop = SftLoop(
                config,
                learner,
                cursor(),
                context.run,
                trackers,
                context.emit,
                task.batch,
                measure if task.measures else None,
            )
            if isinstance(config, DpoConfig):
                context.phase("reference")
            await task.prepare(learner, context.run.path, cursor(), length.num_rows)
            try:
                return await run_loop(context, loop)
            finally:
                for tracker in trackers:
                    tracker.close()

        async def start_again() -> None:
            nonlocal learner
            await workers.close_learner()
            learner = await workers.start_learner_again()

        return await outlive_learners(context, config, workers, fine_tune, start_again)
