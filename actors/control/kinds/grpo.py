"""A run of `grpo-ray train`: prompts -> samples -> rewards -> updates -> weights, over and over."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from actors.cluster import has_gpus, shares_devices
from actors.control.context import RunContext
from actors.control.kinds.inputs import load_run_prompts, resolve_model
from actors.control.kinds.training import keep_records, open_trackers, run_loop
from actors.control.ray_samples import RaySamples
from actors.control.recovery import outlive_learners
from actors.control.scaler import RunScaler
from actors.control.workers import Started, Workers
from grpo_ray.config.scaling import record
from grpo_ray.config.schema import RunConfig
from grpo_ray.data.cursor import Cursor
from grpo_ray.data.epochs import run_length
from grpo_ray.data.prompts import PromptSets
from grpo_ray.run.ledger import Ledger
from grpo_ray.run.rollout_log import ParquetRolloutLog, remove_after
from grpo_ray.telemetry.events import MessageEvent
from grpo_ray.types import Group, TrainBatch


async def run_grpo(context: RunContext, config: RunConfig) -> str:
    """Train; learner ranks that are lost are restarted. Returns how the run ended, as every function of a kind does."""
    model = await resolve_model(context, config)
    async with Workers(config, context.run, model, context.phase, context.warn) as workers:
        async with asyncio.TaskGroup() as tasks:
            loading = tasks.create_task(load_run_prompts(context, config, model))
            starting = tasks.create_task(workers.start_all(_num_steps(config, loading)))
        prompts, roles = loading.result(), starting.result()
        context.scaler = RunScaler(
            config,
            workers,
            lambda numbers: record(context.run.config, numbers),
            lambda level, text: context.emit(MessageEvent(level, text)),
        )

        async def train() -> str:
            return await _train(context, config, prompts, roles, workers)

        async def start_again() -> None:
            nonlocal roles
            roles = await workers.replace_learner(roles)
            if context.resume_step is None:
                await roles.weights.sync(0)

        return await outlive_learners(context, config, workers, train, start_again)


async def _num_steps(config: RunConfig, loading: asyncio.Task[PromptSets]) -> int:
    """The steps of the run, for the learning rate's schedule; the data are awaited only if the config does not give the number."""
    return config.num_steps or run_length(config, len((await loading).train)).num_steps


async def _train(context: RunContext, config: RunConfig, prompts: PromptSets, roles: Started, workers: Workers) -> str:
    from grpo_ray.loop.train_loop import Roles, TrainLoop

    await keep_records(context)
    rollout_log = _open_rollout_log(context, config)
    trackers = open_trackers(context, config, workers)
    ledger = Ledger(context.run.ledger)
    if context.resume_step is None:
        ledger.roll_back(0, 0)
    loop = TrainLoop(
        config,
        Roles(
            roles.sampler,
            roles.scorer,
            roles.learner,
            roles.weights,
            rollout_log,
            roles.voter,
            shares_devices(config, has_gpus()),
            samples=RaySamples(),
            scaler=context.scaler,
        ),
        Cursor(prompts.train, seed=config.seed, shuffle=config.data.shuffle),
        {name: list(held_out) for name, held_out in prompts.eval.items()},
        ledger,
        context.run,
        trackers,
        context.emit,
    )
    try:
        return await run_loop(context, loop)
    finally:
        await rollout_log.close()
        ledger.close()
        for tracker in trackers:
            tracker.close()


def _open_rollout_log(context: RunContext, config: RunConfig) -> ParquetRolloutLog | NoRolloutLog:
    if not config.tracking.rollouts:
        return NoRolloutLog()
    folder = context.run.rollouts
    folder.mkdir(exist_ok=True)
    remove_after(folder, context.resume_step or 0)
    return ParquetRolloutLog(folder, config.seed, RaySamples().fetch)


class NoRolloutLog:
    """A rollout log that writes nothing (`tracking.rollouts: false`)."""

    async def write(self, step: int, groups: Sequence[Group], batch: TrainBatch) -> None:
        pass

    async def close(self) -> None:
        pass
