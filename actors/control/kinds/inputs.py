"""The model and the prompts of a run, read by its controller, which reports what is odd about them. Data are read while the
workers start; an error in them ends the start."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from actors.cluster import has_gpus
from actors.control.context import RunContext
from actors.control.learning import import_learning
from actors.rollout.cpu_limits import check_cpu_limits
from grpo_ray.config.effects import about_context, check_context
from grpo_ray.config.schema import RunConfig
from grpo_ray.config.supervised import SftConfig
from grpo_ray.data.prompts import PromptDataset, PromptSets, load_eval_prompts, load_prompts, trained_on
from grpo_ray.data.tokenized import LoadReport
from grpo_ray.errors import DataError
from grpo_ray.loop.stops import stops_of_run
from grpo_ray.models.files.loading import context_length, load_config, load_tokenizer, prepare_model
from grpo_ray.rewards.columns import check_columns, check_sets, eval_sets_told
from grpo_ray.run.manifest import digest_of


async def resolve_model(context: RunContext, config: RunConfig | SftConfig) -> str:
    """The model's folder or its name on the hub; a tiny model is created first."""
    context.phase("model")
    return await asyncio.to_thread(prepare_model, config.model, context.run.path)


async def begin_learning(context: RunContext, config: RunConfig | SftConfig) -> None:
    """Import what the controller needs of torch, and warn of a CPU that is slow in the run's dtype."""
    context.phase("importing", "torch and Transformers")
    await import_learning(config.deadlines.start_s)
    from grpo_ray.models.attention import cpu_has_bf16

    if config.model.dtype == "bfloat16" and not has_gpus() and not cpu_has_bf16():
        context.warn(
            "this CPU has no bfloat16 instructions and takes 50 times as long without; use model.dtype=float32"
        )


def digest_model(model: str) -> str:
    """The digest of a folder's files; empty for a name on the hub."""
    return digest_of(Path(model)) if Path(model).is_dir() else ""


def without_training(config: RunConfig) -> RunConfig:
    """The config where nothing is trained: an exported model has its adapters merged in, and engines need no room for any; nobody
    takes the experts that its tokens took."""
    model = config.model.model_copy(update={"lora": None})
    rollout = config.rollout.model_copy(update={"keep_routing": False})
    return config.model_copy(update={"model": model, "rollout": rollout})


async def load_run_prompts(context: RunContext, config: RunConfig, model: str) -> PromptSets:
    """The prompts of `data.train` and `data.eval`."""
    tokenizer, max_context = await _load_tokenizer(context, config, model)
    prompts = await asyncio.to_thread(load_prompts, config.data, tokenizer, seed=config.seed, max_context=max_context)
    report_left_out(context, prompts.train.report)
    told = about_context(config, max_context, max(len(prompt.token_ids) for prompt in prompts.train))
    if told is not None:
        context.warn(told)
    for note in check_columns(context.needs, prompts, train=True, evaluation=context.kind != "sample"):
        context.inform(note)
    return prompts


async def load_held_out_prompts(context: RunContext, config: RunConfig, model: str) -> dict[str, PromptDataset]:
    """The prompts of `data.eval` alone. Those that are also trained on are kept, with a report, since nothing is trained here."""
    tokenizer, max_context = await _load_tokenizer(context, config, model)
    held_out = await asyncio.to_thread(
        load_eval_prompts, config.data, tokenizer, seed=config.seed, max_context=max_context
    )
    for name, prompts in held_out.items():
        if prompts.report.num_too_long:
            report_left_out(context, prompts.report)
        told = about_context(config, max_context, max(len(prompt.token_ids) for prompt in prompts))
        if told is not None:
            context.warn(f"{name}: {told}" if name else told)
    for note in check_sets(context.needs, eval_sets_told(held_out)):
        context.inform(note)
    await _warn_of_trained_prompts(context, config, tokenizer, held_out)
    return held_out


def report_left_out(context: RunContext, report: LoadReport) -> None:
    """Report rows of the data that are not used."""
    if report.num_too_long:
        context.warn(f"{report.num_too_long} of {report.num_rows} rows are too long and were left out")
    if report.num_in_eval:
        context.inform(f"{report.num_in_eval} of {report.num_rows} rows are also in data.eval and were left out")


async def _warn_of_trained_prompts(
    context: RunContext, config: RunConfig, tokenizer: Any, held_out: dict[str, PromptDataset]
) -> None:
    try:
        shared = await asyncio.to_thread(trained_on, config.data, tokenizer, held_out, seed=config.seed)
    except DataError as e:
        context.warn(f"whether prompts of data.eval are also in data.train is not known: {e}")
        return
    if shared:
        total = sum(len(prompts) for prompts in held_out.values())
        context.warn(
            f"{shared} of {total} prompts of data.eval are also in data.train: for a model that was trained on them this is "
            "no held-out accuracy (training leaves them out, unless data.exclude_eval is off or data.eval was another)"
        )


async def _load_tokenizer(context: RunContext, config: RunConfig, model: str) -> tuple[Any, int]:
    """The tokenizer, and the model's context length in tokens."""
    await begin_learning(context, config)
    context.phase("data")
    code = config.model.trust_remote_code
    model_config = await asyncio.to_thread(load_config, model, trust_remote_code=code)
    if not has_gpus():
        check_cpu_limits(model_config, config.model)
    max_context = context_length(model_config)
    tokenizer = await asyncio.to_thread(load_tokenizer, model, trust_remote_code=code)
    stops_of_run(config, tokenizer, model)
    check_context(config, max_context)
    return tokenizer, max_context
