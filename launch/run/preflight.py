"""The checks that take no time, and should fail before a cluster is started."""

from __future__ import annotations

from collections.abc import Iterator

from actors.learner.deepspeed_schema import check_deepspeed
from actors.rollout.vllm_schema import check_engine
from grpo_ray.algorithm.users import check_users
from grpo_ray.config.schema import RunConfig, check_correction
from grpo_ray.config.supervised import SftConfig
from grpo_ray.models.files.loading import check_model_path
from grpo_ray.rewards.table import resolve
from launch.run.code_folder import use_code_of
from launch.run.effects import tell_of_hub
from launch.run.foreign_code import check_code
from launch.run.machine import check_machine


def preflight(
    config: RunConfig | SftConfig, *, imports: bool = True, trains: bool = True, on_other_gpus: bool = False
) -> None:
    """Check the model's folder, what is needed of this machine, and the recipe's functions.

    Args:
        imports: False: the recipe's own code is not run.
        trains: False: the loss and the advantage are not used, and neither imported nor looked for.
        on_other_gpus: see `check_machine`.
    """
    use_code_of(config)
    check_deepspeed(config.learner)
    if isinstance(config, RunConfig):
        check_engine(config.rollout)
        if trains:
            check_correction(config)
    for path in _models(config):
        check_model_path(path)
    check_machine(config, on_other_gpus=on_other_gpus)
    tell_of_hub(config)
    if isinstance(config, RunConfig):
        for function in config.reward.functions:
            resolve(function, imports=imports)
    check_code(config, trains=trains)
    if isinstance(config, RunConfig) and trains and imports:
        check_users(config.algorithm, imports=True)


def _models(config: RunConfig | SftConfig) -> Iterator[str]:
    """The paths of the models that the run loads."""
    draft = config.rollout.speculative.model if isinstance(config, RunConfig) and config.rollout.speculative else None
    yield from (path for path in (config.model.path, draft) if path is not None)
