"""The validation of everything that can be checked without loading a model; it prints the plan of a run."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.table import Table

from actors.addresses import OPTION, read_address
from actors.cluster import connect, joins
from actors.machines import Machine
from actors.named_clusters import is_named
from actors.placement_defaults import used
from actors.rollout.cpu_limits import check_cpu_limits
from grpo_ray.config.algorithm import AlgorithmConfig
from grpo_ray.config.effects import about_context, check_context, without_gpu
from grpo_ray.config.schema import RunConfig
from grpo_ray.config.supervised import SftConfig
from grpo_ray.data.epochs import describe
from grpo_ray.data.thinking import opens_thinking
from grpo_ray.errors import GrpoRayError
from grpo_ray.loop.stops import describe_end, find_stops, template_end
from grpo_ray.models.files.loading import check_ids, context_length, vocab_size
from grpo_ray.models.memory.estimate import BF16, FP32, facts_of, gib, learner_memory
from grpo_ray.models.memory.fit import parts_of
from grpo_ray.models.memory.kv_cache import check_one_sample
from grpo_ray.rewards.table import BUILTINS
from grpo_ray.run.checkpoint_store import Store, is_url
from grpo_ray.run.run_dir import RunDir
from launch.check.golds import gold_rows
from launch.check.gpu import Gpus, check_gpus, gpu_rows, named_gpus, stage_rows
from launch.check.model import LearnersModel, ModelFiles, keep_torch_out, learners_model
from launch.check.rewards import called
from launch.console import headed, plain_console
from launch.named_clusters import check_cluster
from launch.program import runnable
from launch.run.effects import check_effects, told
from launch.run.foreign_code import (
    RUN_CODE,
    foreign_algorithm,
    foreign_environments,
    foreign_model,
    foreign_rewards,
    foreign_rows,
)
from launch.run.machine import unset_variables
from launch.run.placement import chosen_told, fitted, machine_of, offers_told, where
from launch.run.preflight import preflight
from launch.run.recipe import (
    COMMANDS,
    SCHEMAS,
    check_kind,
    find_recipe,
    is_pipeline,
    kind_of,
    load_recipe,
    recipe_names,
    run_folder,
)

console = plain_console()
_REST = "its other parts are neither trained nor sampled with, and exported as they are"
STORE_S = 5.0
"""The seconds that the check waits for an object store."""


def check_recipe(
    recipe: str,
    overrides: list[str],
    as_kind: str | None = None,
    *,
    gpu: str | None = None,
    run_code: bool = False,
    makes_models: bool = True,
) -> None:
    """Validate a recipe and print the plan of its run.

    Args:
        as_kind: a name of `check_kind`; None: the recipe's own.
        gpu: the GPUs to plan for, e.g. `8xh100`; None: what there is.
        run_code: import and call the recipe's own code, too.
        makes_models: whether this process may create models later; otherwise it does not import torch.

    Raises:
        GrpoRayError: for the first problem that would keep the run from working.
    """
    if is_pipeline(find_recipe(recipe)):
        from launch.pipeline.stages import run_pipeline

        run_pipeline(recipe, overrides, None, None, dry_run=True, run_code=run_code, on_other_gpus=gpu is not None)
        for stage, line in stage_rows(recipe, overrides, gpu) if gpu else ():
            console.print(f"gpu      stage {stage}: {line}", soft_wrap=True)
        _print_ok("pipeline", recipe, overrides)
        return
    kind = kind_of(find_recipe(recipe), overrides) if as_kind is None else check_kind(as_kind)
    config = load_recipe(SCHEMAS[kind], recipe, overrides)
    folder = run_folder(config, recipe)
    check_cluster(config.cluster.address, overrides)
    preflight(config, imports=run_code, on_other_gpus=gpu is not None)
    check_effects(config, COMMANDS[kind], [])
    code = _Foreign(config, run=run_code)
    if (place := config.checkpoint.path) is not None and is_url(place):
        Store(place.rstrip("/"), patience_s=STORE_S).steps()
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    with console.status("reading model config and data ..."):
        unnamed = [] if gpu else _unnamed(config)
        gpus = named_gpus(gpu, config) if gpu else None
        machine, place = _place(config, gpus, known=not unnamed)
        offered = machine.offers
        found, chosen = fitted(config, machine, place, kind, may_grow=bool(unnamed or gpus), strict=gpus is None)
        idle = told(without_gpu(config)) if not offered.get("GPU") else []
        if not makes_models and not config.model.trust_remote_code and config.model.tiny is None:
            keep_torch_out()
        for name, text in [
            *code.rows(),
            *([] if code.of_model else _rows_of_model(config, found, kind, machine, place, code)),
            *_cluster_rows(found, machine, place, kind, chosen),
            *(("warning", line) for line in [*unnamed, *idle, *unset_variables(config), *_taken(folder)]),
        ]:
            table.add_row(name, text)
    console.print(table)
    _print_ok(COMMANDS[kind], recipe, overrides)


class _Foreign:
    """The recipe's own code, which is not run here."""

    def __init__(self, config: RunConfig | SftConfig, *, run: bool) -> None:
        # Found also where it is run: what is not a recipe's to name is refused.
        found = (
            [*foreign_algorithm(config), *foreign_rewards(config), *foreign_environments(config)],
            [*foreign_rows(config)],
            [*foreign_model(config)],
        )
        self.run = run
        self.of_rewards, self.of_data, self.of_model = ([], [], []) if run else found

    def rows(self) -> Iterator[tuple[str, str]]:
        for line in (*self.of_rewards, *self.of_data, *self.of_model):
            yield ("code", f"{line}: read, not run")
        if self.of_data or self.of_model:
            what = "the model and the data" if self.of_model else "the data"
            yield ("", f"so nothing is said of {what}; if you trust that code, {RUN_CODE} runs it")


def _rows_of_model(
    config: RunConfig | SftConfig,
    found: RunConfig | SftConfig,
    kind: str,
    machine: Machine,
    place: str,
    code: _Foreign,
) -> list[tuple[str, str]]:
    """The plan's lines on the model.

    Args:
        found: the config with the options chosen for this machine.

    Raises:
        ResourceError: it does not fit the machine's GPUs.
    """
    on_gpu = machine.offers.get("GPU", 0) > 0
    files = ModelFiles(config.model)
    with learners_model(config, on_gpu=on_gpu) as learners:
        try:
            context = _context(config, files.config, on_gpu=on_gpu)
            of_data = [] if code.of_data else _data_rows(config, files, imports=code.run)
        except GrpoRayError:
            # A model that can't be trained may be why.
            learners()
            raise
        of_model = _model_rows(found, files.config, learners(), kind, machine, place)
    return [*of_model, *of_data, *_step_rows(config, context, imports=code.run)]


def _taken(folder: Path) -> Iterator[str]:
    if RunDir.is_taken(folder):
        yield f"there is a run {folder} already, and none is overwritten: give another name=.., or resume that one"


def _print_ok(command: str, recipe: str, overrides: list[str]) -> None:
    """Print the command that was checked, to be copied to a shell."""
    words = shlex.join(["grpo-ray", command, recipe, *overrides])
    console.print(headed("ok", "green", f"     {runnable(words)}"), soft_wrap=True)


def _context(config: RunConfig | SftConfig, model_config: Any, *, on_gpu: bool) -> int:
    """The model's context length.

    Raises:
        ConfigError: the longest sample does not fit it, or engines on CPUs can't sample the model.
        ResourceError: the longest sample does not fit the cache.
    """
    context = context_length(model_config)
    check_context(config, context)
    if isinstance(config, RunConfig) and not on_gpu:
        longest = config.data.max_prompt_length + config.rollout.max_completion_length
        width = BF16 if config.model.dtype == "bfloat16" else FP32
        check_one_sample(config.rollout, model_config, min(longest, context), width)
        check_cpu_limits(model_config, config.model)
    return context


def _model_rows(
    config: RunConfig | SftConfig, model_config: Any, learners: LearnersModel, kind: str, machine: Machine, place: str
) -> list[tuple[str, str]]:
    params = learners.num_params
    facts, on_gpu = facts_of(model_config, params), machine.offers.get("GPU", 0) > 0
    memory = learner_memory(facts, config, on_gpu=on_gpu, gpu_memory=machine.gpu_memory)
    parts = ", ".join(f"{what} {gib(n)}" for what, n in memory.parts.items() if n)
    source = config.model.path or "tiny, made on the spot"
    rows = [
        (
            "model",
            f"{source}: {params / 1e6:,.1f} M parameters, {config.model.dtype}, context {context_length(model_config)}",
        ),
        *([("", f"the text model of {learners.whole}: {_REST}")] if learners.whole else []),
        *([("", f"the plain way, a sequence a row: {learners.plain}")] if learners.plain else []),
        ("memory", f"each learner {gib(memory.total)} in its largest step ({parts})"),
    ]
    if not on_gpu:
        every = parts_of(facts, config, kind)
        rows.append(("", f"in all {gib(sum(part.total for part in every))}: {', '.join(map(str, every))}"))
    elif machine.gpu_memory is not None:
        check_gpus(facts, config, kind, machine.gpu_memory, place)
        rows.extend(gpu_rows(facts, config, kind, machine.gpu_memory))
    return rows


def _data_rows(config: RunConfig | SftConfig, files: ModelFiles, *, imports: bool) -> list[tuple[str, str]]:
    from grpo_ray.data.prompts import SftDataset, load_prompts
    from grpo_ray.data.templates import make_template
    from grpo_ray.rewards.columns import check_columns, column_needs
    from launch.check.environment import environment_rows
    from launch.check.large import facts_of, longest_prompt, num_in_eval, of_all_rows, overview_rows
    from launch.check.overview import Sampler, key_of

    tokenizer = files.tokenizer
    sampler = Sampler()
    overview_key = key_of(config.data.train)
    if isinstance(config, SftConfig):
        from grpo_ray.loop.supervised_data import load_examples

        examples = load_examples(config, tokenizer, sampler.read)
        looked_at = (examples if isinstance(examples, SftDataset) else examples.train).report
        report = of_all_rows(looked_at, sampler.overviews.get(overview_key))
        return [
            ("data", f"{config.data.train.told}: {report.num_kept} of {report.num_rows} examples"),
            *overview_rows(config, sampler),
            ("length", describe(config, report.num_kept)),
            ("ends", describe_end(tokenizer, config.data.template)),
        ]
    end, rollout = template_end(tokenizer, config.data.template), config.rollout
    num_tokens = vocab_size(files.config)
    stops = find_stops(tokenizer, files.eos_ids, end, num_tokens, rollout.stop, rollout.stop_token_ids)
    context = context_length(files.config)
    prompts = load_prompts(config.data, tokenizer, seed=config.seed, max_context=context, read=sampler.read)
    overview = sampler.overviews.get(overview_key)
    report = of_all_rows(prompts.train.report, overview, num_in_eval(config, sampler, prompts))
    left_out = (
        f" ({report.num_too_long} too long, {report.num_in_eval} also in data.eval)"
        if report.num_kept < report.num_rows
        else ""
    )
    rows = [
        ("data", f"{config.data.train.told}: {report.num_kept} of {report.num_rows} prompts{left_out}"),
        *overview_rows(config, sampler),
        ("length", describe(config, report.num_kept)),
    ]
    for name, source in config.data.eval_sets.items():
        what = f"{name}, {source.told}" if name else source.told
        held_out = of_all_rows(prompts.eval[name].report, sampler.overviews.get(key_of(source)))
        rows.append(("held out", f"{what}: {held_out.num_kept} prompts x {config.eval.num_samples}"))
    check_ids((p.token_ids for p in prompts.train), files.name, num_tokens)
    longest = max(len(prompt.token_ids) for prompt in prompts.train)
    if overview is not None:
        limit = min(config.data.max_prompt_length, context - 1)
        template = make_template(config.data.template, tokenizer, config.data.system, config.data.chat_template_kwargs)
        longest = longest_prompt(config, sampler, template, tokenizer, limit, longest)
    if (warning := about_context(config, context, longest)) is not None:
        rows.append(("warning", warning))
    environment = config.environment is not None
    needs, facts = column_needs(config.reward, imports=imports, environment=environment), facts_of(config, sampler)
    rows += environment_rows(config, tokenizer, imports=imports)
    rows += [("columns", note) for note in check_columns(needs, prompts, train=True, evaluation=True, facts=facts)]
    first = prompts.train.item(0, 0)
    rows.extend(gold_rows(config, prompts, facts))
    rows.append(("prompt", repr(first.text if len(first.text) < 300 else first.text[:297] + "...")))
    if opens_thinking(first.text):
        rows.append(
            ("thinking", "the template opens <think>: rewards, filters and demonstrations take it as the answer's")
        )
    rows.append(("ends", f"a sample ends at {stops.describe(tokenizer)}"))
    return rows


def _step_rows(config: RunConfig | SftConfig, context: int, *, imports: bool) -> list[tuple[str, str]]:
    if isinstance(config, SftConfig):
        warning = about_context(config, context)
        return [("step", f"{config.examples_per_step} examples"), *([("warning", warning)] if warning else [])]
    a, r = config.algorithm, config.rollout
    updates = a.num_iterations * a.num_mini_batches
    own = config.environment.titles if config.environment is not None else []
    rewards = " + ".join([*(f"{f.weight:g} x {f.title}" for f in config.reward.functions), *own])
    correction = [
        f"{name} {value}"
        for name, value in (
            ("old_logprobs", a.old_logprobs if a.old_logprobs == "rollout" else None),
            ("importance_sampling", a.importance_sampling),
            ("geometric_mask", a.geometric_mask),
            ("off_policy_mask_threshold", a.off_policy_mask_threshold),
        )
        if value is not None
    ]
    return [
        (
            "step",
            f"{config.prompts_per_step} prompts x {r.num_generations} samples of up to "
            f"{min(r.max_completion_length, context - 1)} tokens, "
            f"{updates} optimizer step{'s' * (updates > 1)}",
        ),
        ("reward", rewards),
        *([("called", called(config.reward, r.num_generations, imports=imports))] if config.reward.functions else []),
        (
            "loss",
            f"{a.loss}, advantage {a.advantage}, {_bounds(a)}, beta {a.beta:g}{' in the reward' * (a.kl_in == 'reward')}, "
            f"lr {config.learner.learning_rate:g}",
        ),
        *([("correction", ", ".join(correction))] if correction else []),
        *([("sampling", f"{r.truncation}: the learner renormalises over the tokens left")] if r.truncation else []),
    ]


def _bounds(a: AlgorithmConfig) -> str:
    """What keeps the ratio near 1."""
    if a.loss == "cispo":
        return f"ratio up to {a.cispo_max_ratio:g}"
    if a.loss == "sapo":
        return f"temperatures {a.sapo_temperature_pos:g}/{a.sapo_temperature_neg:g}"
    return f"clip {a.epsilon_low:g}/{a.epsilon_high:g}" + (f", dual {a.dual_clip_c:g}" if a.dual_clip_c else "")


def _cluster_rows(
    found: RunConfig | SftConfig, machine: Machine, place: str, kind: str, chosen: dict[str, Any]
) -> list[tuple[str, str]]:
    asked = ", ".join(
        f"{d.num_actors} {d.option} x ({d.num_cpus:g} CPU{f', {d.num_gpus:g} GPU' if d.num_gpus else ''})"
        for d in used(found, kind, gpus=machine.offers.get("GPU", 0) > 0)
    )
    rows = [("cluster", f"{place} ({offers_told(machine)}): {asked}")]
    return rows + ([("chosen", f"for {place}: {said}")] if (said := chosen_told(chosen)) else [])


def _unnamed(config: RunConfig | SftConfig) -> list[str]:
    """The warnings about a cluster that the recipe names and the user does not: it is not joined here."""
    address = read_address(config.cluster.address)
    if address is None or is_named(address):
        return []
    return [
        f"{address} is named by the recipe, not by you, so it was not joined (that gives it Ray's token) and it is not known what "
        f"it offers; give {OPTION}={address.where} on the command line if it is yours"
    ]


def _place(config: RunConfig | SftConfig, gpus: Gpus | None, *, known: bool) -> tuple[Machine, str]:
    """The machine to plan for, and how it is called."""
    if gpus is not None:
        return gpus.machine, gpus.told
    return _offered(config) if known else (machine_of(config), "this machine")


def _offered(config: RunConfig | SftConfig) -> tuple[Machine, str]:
    if not joins(config):
        return machine_of(config), "this machine"
    import ray

    connect(config)
    try:
        return machine_of(config), where(config)
    finally:
        ray.shutdown()


def print_lists() -> None:
    console.print("recipes  " + ", ".join(recipe_names()))
    console.print("rewards  " + ", ".join(sorted(BUILTINS)) + ", or any function by its dotted path")
