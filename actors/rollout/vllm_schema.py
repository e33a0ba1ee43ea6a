"""Whether vLLM has the options of `rollout.engine`, by the source of the one that is installed: it is not imported."""

from __future__ import annotations

from actors.class_fields import fields_of
from grpo_ray.config.rollout import RolloutConfig
from grpo_ray.errors import ConfigError


def check_engine(rollout: RolloutConfig) -> None:
    """Check the options that are passed to vLLM. Without vLLM on this machine they are checked where engines start.

    Raises:
        ConfigError: vLLM has no such option, or takes no such value.
    """
    fields = fields_of("vllm", "engine.arg_utils", "EngineArgs", "AsyncEngineArgs")
    if fields is None:
        return
    fields.check(rollout.engine, "rollout.engine", "vLLM's AsyncEngineArgs")
    if rollout.engine.get("enable_expert_parallel") and rollout.engine_size == 1:
        raise ConfigError(
            "rollout.engine.enable_expert_parallel: an engine of one worker has nothing to spread its experts over; raise "
            "rollout.tensor_parallel_size or rollout.data_parallel_size"
        )
