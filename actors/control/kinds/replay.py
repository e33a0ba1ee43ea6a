"""A run of `grpo-ray replay`: the learner's part of one step repeated, and compared with what was recorded."""

from __future__ import annotations

import asyncio

from actors.control.context import RunContext
from actors.control.kinds.inputs import begin_learning, load_run_prompts, resolve_model
from actors.control.workers import Workers
from grpo_ray.config.scaling import rescaled
from grpo_ray.config.schema import RunConfig
from grpo_ray.data.epochs import run_length
from grpo_ray.run.replay import TOLERANCE, compare, parts_of, read_batch
from grpo_ray.run.rollout_log import rollout_path
from grpo_ray.telemetry.events import MessageEvent
from grpo_ray.telemetry.tracking import read_metrics


async def run_replay(context: RunContext, config: RunConfig) -> str:
    """Replay the step after `resume_step`; only logs are written."""
    run, resume_step = context.run, context.resume_step
    assert resume_step is not None
    step = resume_step + 1
    lines = await asyncio.to_thread(read_metrics, run.metrics)
    recorded = next((line for line in lines if line["step"] == step), {})
    if (learners := recorded.get("workers/learner")) is not None:
        # The config of that step: the run may have been scaled since, and sums would be in another order.
        config = rescaled(config, {"learner": int(learners)})
    model = await resolve_model(context, config)
    batch = await asyncio.to_thread(
        read_batch,
        rollout_path(run.rollouts, step),
        advantages_on_learner=config.algorithm.advantages_on_learner,
    )
    num_steps = config.num_steps
    if num_steps is None:
        num_steps = run_length(config, len((await load_run_prompts(context, config, model)).train)).num_steps
    else:
        await begin_learning(context, config)
    async with Workers(config, run, model, context.phase, context.warn) as workers:
        learner = await workers.start_learner(num_steps)
        if resume_step > 0:
            context.phase("restoring", f"step {resume_step}")
            await learner.load(run.place(resume_step))
        context.phase("update")
        for part in parts_of(batch):
            await learner.accumulate(part)
        report = await learner.update(batch)
    figures = compare(recorded, report.metrics, tolerance=TOLERANCE[config.model.dtype])
    for figure in figures:
        context.emit(MessageEvent("info" if figure.agrees else "error", str(figure)))
    return "finished" if all(figure.agrees for figure in figures) else "not repeated"
