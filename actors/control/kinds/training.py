"""What runs that train have in common: trackers, records of earlier attempts, and the loop from restore to end."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from actors.control.context import RunContext
from actors.control.notices import handle_preemption, watch_notices
from actors.control.ray_metrics import RayMetrics
from actors.control.workers import Workers
from actors.runtime import settle_garbage_collector
from grpo_ray.config.schema import RunConfig
from grpo_ray.config.supervised import SftConfig
from grpo_ray.loop.sft_loop import SftLoop
from grpo_ray.names import run_name
from grpo_ray.run.records import last_step, set_aside
from grpo_ray.telemetry.tracking import Tracker, make_trackers

if TYPE_CHECKING:
    from grpo_ray.loop.train_loop import TrainLoop


async def keep_records(context: RunContext) -> None:
    """Set aside the records of steps that will be repeated, before they are taken back."""
    last = await asyncio.to_thread(last_step, context.run)
    folder = await asyncio.to_thread(set_aside, context.run, context.resume_step)
    if folder is not None:
        start = context.resume_step or 0
        what = f"steps {start + 1} to {last} will be done again; " if last > start else ""
        context.inform(f"{what}what was recorded after step {start} is in {folder} now")


def open_trackers(context: RunContext, config: RunConfig | SftConfig, workers: Workers) -> list[Tracker]:
    """The trackers of this run; those of a run that begins again forget what was logged before."""
    resume_step = -1 if context.resume_step is None else context.resume_step
    out = make_trackers(config.tracking, context.run.path, resume_step, config.model_dump(mode="json"))
    if config.tracking.prometheus:
        out.append(RayMetrics(run_name(context.run.path), workers.live))
    return out


async def run_loop(context: RunContext, loop: TrainLoop | SftLoop[Any]) -> str:
    """Restore the loop, and run it to its end while notices of nodes that go away are handled. Returns why it ended."""
    context.loop = loop
    if context.stop_reason is not None:
        loop.stop(context.stop_reason)
    if context.resume_step is not None:
        context.phase("restoring", f"step {context.resume_step}")
        await loop.restore(context.resume_step)
    settle_garbage_collector(loop.config.samples_under_way if isinstance(loop.config, RunConfig) else 0)

    def warn_of_failure(watching: asyncio.Task[None]) -> None:
        if not watching.cancelled() and (error := watching.exception()) is not None:
            context.warn(f"notices of nodes that are taken away are not heard any more: {error}")

    watching = asyncio.create_task(watch_notices(lambda notice: context.warn(handle_preemption(notice, loop))))
    watching.add_done_callback(warn_of_failure)
    try:
        return await loop.run()
    finally:
        watching.cancel()
