"""A run of `grpo-ray eval`: accuracy on held-out prompts, and the completions behind it."""

from __future__ import annotations

import asyncio
import time
from functools import partial

from actors.control.context import RunContext
from actors.control.kinds.inputs import digest_model, load_held_out_prompts, resolve_model, without_training
from actors.control.ray_samples import RaySamples
from actors.control.workers import Workers
from grpo_ray.config.schema import RunConfig
from grpo_ray.loop.evaluate import eval_event, evaluate
from grpo_ray.loop.sampling import about_answers, write_answers
from grpo_ray.run.eval_record import answers_folder, set_figures, write_figures


async def run_evaluate(context: RunContext, config: RunConfig) -> str:
    """Measure every evaluation set, and write completions and accuracies into the run's folder."""
    config = without_training(config)
    model = await resolve_model(context, config)
    async with Workers(config, context.run, model, context.phase, context.warn) as workers:
        async with asyncio.TaskGroup() as tasks:
            loading = tasks.create_task(load_held_out_prompts(context, config, model))
            hashing = tasks.create_task(asyncio.to_thread(digest_model, model))
            sampling = tasks.create_task(workers.start_sampler())
            scoring = tasks.create_task(workers.start_scorer())
            voting = tasks.create_task(workers.start_voter())
        began = time.monotonic()
        sets = {}
        for name, prompts in loading.result().items():
            result = await evaluate(
                list(prompts),
                sampling.result(),
                scoring.result(),
                voting.result(),
                config,
                progress=partial(context.phase, "eval", name),
            )
            about = about_answers(config, prompts, config.model.path or "tiny", hashing.result())
            figures = await write_answers(answers_folder(context.run.path, name), about, prompts, result, RaySamples())
            sets[name] = set_figures(result, figures)
            context.emit(eval_event(0, name, result))
            context.inform(f"{name}: {figures}" if name else str(figures))
            if result.warning is not None:
                context.warn(result.warning)
        seconds = time.monotonic() - began
        await asyncio.to_thread(write_figures, context.run.path, config, hashing.result(), sets, seconds)
    return "finished"
