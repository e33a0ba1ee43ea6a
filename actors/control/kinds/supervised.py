"""Runs of `grpo-ray sft`, `dpo` and `reward-model`: the learner alone, over demonstrations or pairs."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import TYPE_CHECKING, Any

from actors.control.context import RunContext
from actors.control.kinds.inputs import begin_learning, report_left_out, resolve_model
from actors.control.kinds.training import keep_records, open_trackers, run_loop
from actors.control.recovery import outlive_learners
from actors.control.workers import Workers
from grpo_ray.config.supervised import DpoConfig, SftConfig
from grpo_ray.data.cursor import Cursor
from grpo_ray.data.epochs import run_length
from grpo_ray.loop.sft_loop import SftLoop
from grpo_ray.models.files.loading import load_tokenizer

if TYPE_CHECKING:
    from actors.learner.group import LearnerGroup
    from grpo_ray.loop.supervised import Task


async def run_supervised(context: RunContext, config: SftConfig) -> str:
    """Fine-tune; learner ranks that are lost are restarted."""
    model = await resolve_model(context, config)
    async with Workers(config, context.run, model, context.phase, context.warn) as workers:
        async with asyncio.TaskGroup() as tasks:
            loading = tasks.create_task(_load_task(context, config, model))
            starting = tasks.create_task(_start_learner(config, workers, loading))
        task, learner = loading.result(), starting.result()
        length = run_length(config, len(task.dataset))

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


async def _load_task(context: RunContext, config: SftConfig, model: str) -> Task:
    await begin_learning(context, config)
    from grpo_ray.loop.supervised import load_task

    context.phase("data")
    tokenizer = await asyncio.to_thread(load_tokenizer, model, trust_remote_code=config.model.trust_remote_code)
    task = await asyncio.to_thread(load_task, config, tokenizer)
    report_left_out(context, task.dataset.report)
    return task


async def _start_learner(config: SftConfig, workers: Workers, loading: asyncio.Task[Task]) -> LearnerGroup:
    """Start the learner; the data are awaited first only if the config does not give the number of steps."""
    num_steps = config.num_steps or run_length(config, len((await loading).dataset)).num_steps
    return await workers.start_learner(num_steps)
