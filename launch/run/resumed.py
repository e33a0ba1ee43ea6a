"""`grpo-ray resume RUN key=value ..`: which options a run may change when it resumes, and what that does to its learning rate.

A resumed run is the same experiment: what has been trained would have been different under another model, other data,
another loss or another batch. The options for how long, where, how fast and how safely it trains may change.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

from pydantic import BaseModel

from grpo_ray.config.common import keys_in_order
from grpo_ray.config.effects import without_effect
from grpo_ray.config.loading import build, deep_merge, load_yaml, parse_overrides, to_yaml
from grpo_ray.config.schema import RunConfig
from grpo_ray.config.supervised import SftConfig
from grpo_ray.errors import ConfigError
from grpo_ray.files import write_whole
from grpo_ray.run.ended import read_ended
from grpo_ray.run.ledger import Ledger
from grpo_ray.run.run_dir import RunDir
from launch.run.recipe import COMMANDS

Config = TypeVar("Config", bound=RunConfig | SftConfig)
_PLACES = ("num_actors", "num_cpus", "num_gpus", "resources", "labels", "env", "num_threads")
_SCALE = ("min_actors", "max_actors")
MAY_CHANGE = frozenset(
    [
        *("num_steps", "num_epochs", "deadlines", "tracking", "weights", "cluster"),
        *(f"checkpoint.{name}" for name in ("every_steps", "every_minutes", "keep", "export")),
        *(f"eval.{name}" for name in ("every_steps", "num_samples", "temperature", "top_p", "accuracy", "threshold")),
        *(f"rollout.{name}" for name in (*_PLACES, *_SCALE, "tensor_parallel_size", "max_num_seqs", "kv_cache_gb")),
        *(
            f"rollout.{name}"
            for name in ("gpu_memory_utilization", "enforce_eager", "max_num_batched_tokens", "engine")
        ),
        *("rollout.data_parallel_size", "rollout.speculative", "learner.deepspeed", "model.compile"),
        *(f"reward.{name}" for name in (*_PLACES[:-1], *_SCALE, "timeout_s", "memory_gb", "on_failure")),
        *(
            f"learner.{name}"
            for name in (*_PLACES, "zero_stage", "offload_optimizer", "offload_params", "max_restarts")
        ),
        *(
            f"learner.{name}"
            for name in ("micro_batch_tokens", "forward", "packing", "share_prompts", "skip_no_signal", "overlap")
        ),
        *("learner.sequence_parallel_size", "learner.logprob_chunk_tokens", "model.gradient_checkpointing"),
    ]
)
"""The options that may change, and the sections of which every option may."""
_NOTE = "# changed by resume after step "
_ELSEWHERE = {
    "name": "it is the name of the run's folder: rename that, or begin another run",
    "dir": "it is where the run's folder is: move that, and resume it by its new path",
    "checkpoint.path": "the checkpoints to go on from are there: move them and change it in config.yaml",
}
_REASON = (
    "the steps that are done were trained with {old}, and a run is one experiment: begin a new run from its model "
    "(model.path={run}/hf), in which everything may change"
)


def changed_config(
    schema: type[Config], run: RunDir, overrides: list[str]
) -> tuple[Config, dict[str, tuple[Any, Any]]]:
    """The run's config with these overrides, and what they change: dotted key -> (before, now).

    Raises:
        ConfigError: an override changes an option that has to stay.
    """
    before = load_yaml(run.config)
    old = build(schema, before, str(run.config))
    source = f"{run.config} with {' '.join(overrides)}"
    new = build(schema, deep_merge(before, parse_overrides(overrides)), source)
    changes = dict(differences(old, new))
    lines = [
        f"  - {key}: {_ELSEWHERE.get(key) or _REASON.format(old=_told(was), run=run.path)}"
        for key, (was, _) in changes.items()
        if not _may_change(key)
    ]
    if lines:
        raise ConfigError(f"{run.path} can't go on with {' '.join(overrides)}:\n" + "\n".join(lines))
    return new, changes


def check_length(run: RunDir, config: RunConfig | SftConfig, step: int | None) -> None:
    """Raise ConfigError when the run has done more steps, or epochs, than it is to have."""
    if config.num_steps is not None and step is not None and config.num_steps < step:
        raise ConfigError(
            f"num_steps={config.num_steps}: {run.path} has done {step} steps already; give more than that"
        )
    ended = read_ended(run.path)
    if config.num_steps is None and ended is not None and ended.step >= ended.total_steps:
        steps, epochs, _ = ended.length
        if steps is None and config.num_epochs < epochs:
            raise ConfigError(
                f"num_epochs={config.num_epochs:g}: {run.path} has done {epochs:g} epochs already; give more than that"
            )


def check_changes(config: RunConfig | SftConfig, kind: str, changes: Iterable[str]) -> None:
    """Raise ConfigError when one of these options has no effect in the resumed run.

    Args:
        kind: the kind of run.
        changes: the dotted keys of the options.
    """
    idle = without_effect(config, COMMANDS[kind])
    lines = [f"  - {key}: {idle[key]}" for key in changes if key in idle]
    if lines:
        raise ConfigError("these changes would do nothing:\n" + "\n".join(lines))


def record_changes(run: RunDir, config: RunConfig | SftConfig, changes: dict[str, tuple[Any, Any]], step: int) -> None:
    """Record the changes in config.yaml, with a line on each at its top, and in the ledger of a run that has one."""
    old_lines = run.config.read_text(encoding="utf-8").splitlines()
    kept = [line for line in old_lines if line.startswith(_NOTE)]
    new = [f"{_NOTE}{step}: {key} {was!r} -> {now!r}" for key, (was, now) in changes.items()]
    write_whole(run.config, ("\n".join([*kept, *new]) + "\n" + to_yaml(config)).encode())
    if run.ledger.is_file():
        ledger = Ledger(run.ledger)
        ledger.changed(step, changes)
        ledger.close()


def about_schedule(old: RunConfig | SftConfig, new: RunConfig | SftConfig, step: int) -> str | None:
    """The effect of a longer or shorter run on a learning rate whose schedule ends with it; None: nothing."""
    kind = new.learner.lr_scheduler_type
    lengths = [(c.num_steps, c.num_epochs) for c in (old, new)]
    if kind == "constant" or lengths[0] == lengths[1]:
        return None
    length = f"{new.num_steps} steps" if new.num_steps is not None else f"{new.num_epochs:g} epochs"
    return (
        f"learner.lr_scheduler_type {kind} ends with the run: from step {step + 1} on the learning rate is the one that a run of "
        f"{length} has there, not a continuation of the curve until now"
    )


def differences(old: BaseModel, new: BaseModel, prefix: str = "") -> Iterator[tuple[str, tuple[Any, Any]]]:
    """The dotted keys whose values differ."""
    for name in keys_in_order(type(old)):
        a, b = getattr(old, name), getattr(new, name)
        if a == b:
            continue
        if isinstance(a, BaseModel) and isinstance(b, BaseModel) and type(a) is type(b):
            yield from differences(a, b, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", (a, b)


def _may_change(key: str) -> bool:
    parts = key.split(".")
    return any(".".join(parts[: n + 1]) in MAY_CHANGE for n in range(len(parts)))


def _told(value: Any) -> str:
    if isinstance(value, BaseModel):
        return "what it says now"
    return "none" if value is None else repr(value) if isinstance(value, str) else str(value)
