"""A run of `grpo-ray sample`: prompts -> scored samples in the run's folder."""

from __future__ import annotations

import asyncio
from functools import partial

from actors.control.context import RunContext
from actors.control.kinds.inputs import digest_model, load_run_prompts, resolve_model, without_training
from actors.control.ray_samples import RaySamples
from actors.control.workers import Workers
from grpo_ray.config.schema import RunConfig
from grpo_ray.loop.sampling import SamplingReport, about_samples, sample_all
from grpo_ray.run.sample_files import SampleFolder
from grpo_ray.telemetry.sample_figures import figures_in


async def run_sample(context: RunContext, config: RunConfig) -> str:
    """Sample and score what is missing in the folder of samples."""
    config = without_training(config)
    model = await resolve_model(context, config)
    async with asyncio.TaskGroup() as tasks:
        loading = tasks.create_task(load_run_prompts(context, config, model))
        hashing = tasks.create_task(asyncio.to_thread(digest_model, model))
    prompts = loading.result().train
    about = about_samples(config, prompts, config.model.path or "tiny", hashing.result())
    samples = await asyncio.to_thread(SampleFolder.open, context.run.samples, about)
    if not samples.missing():
        await _report_figures(context, samples)
        return "finished"
    async with Workers(config, context.run, model, context.phase, context.warn) as workers:
        async with asyncio.TaskGroup() as tasks:
            sampling = tasks.create_task(workers.start_sampler())
            scoring = tasks.create_task(workers.start_scorer())
        progress = partial(context.phase, "rollout", "")
        report = await sample_all(prompts, sampling.result(), scoring.result(), RaySamples(), samples, config, progress)
    await _report(context, report, samples)
    return "finished"


async def _report(context: RunContext, report: SamplingReport, samples: SampleFolder) -> None:
    speed = report.num_tokens / report.seconds
    told = f"{report.num_made} samples, {report.num_tokens} tokens in {report.seconds:.1f} s ({speed:.0f} tokens/s)"
    if report.num_before:
        told += f"; {report.num_before} samples were there already"
    context.inform(told)
    await _report_figures(context, samples)
    if report.num_unscored:
        context.warn(f"{report.num_unscored} of {report.num_made} samples have no reward, e.g.: {report.why_unscored}")
    for one in report.left_out:
        context.warn(f"without samples: {one.why}")


async def _report_figures(context: RunContext, samples: SampleFolder) -> None:
    """Report figures of all samples in the folder, those of earlier calls included."""
    context.inform(str(await asyncio.to_thread(figures_in, samples.path)))
