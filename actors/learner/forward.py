"""Which way a learner's model goes, packed or plain: chosen by its class before it is loaded, and compared with the model's own
forward once it is."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist

from actors.learner.build import LearnerSpec, can_share_prompts
from grpo_ray.batch.sequence import SequenceRanks, positions_by_length
from grpo_ray.config.learner import Forward
from grpo_ray.errors import ConfigError
from grpo_ray.models.checks.agreement import Gap, gap_of
from grpo_ray.models.checks.routers import check_routers
from grpo_ray.models.features.dropout import without_dropout
from grpo_ray.models.files.loading import load_config
from grpo_ray.models.plain import use_own_attention
from grpo_ray.models.trainable import with_forward
from grpo_ray.plain_terminal import say


def choose_forward(spec: LearnerSpec) -> LearnerSpec:
    """The spec with `learner.forward` plain where the model's class is known to pack wrongly.

    Raises:
        ConfigError: Transformers can't make the model, it can't go the way that is asked for, or its routers can't.
    """
    config = without_dropout(load_config(spec.model_path, trust_remote_code=spec.model.trust_remote_code))
    model = spec.model.model_copy(update={"path": spec.model_path})
    hf, reason = with_forward(
        config,
        model,
        spec.learner.forward,
        reward_model=spec.is_reward_model,
        slices=spec.learner.sequence_parallel_size,
    )
    check_routers(hf, loss=spec.learner.router_aux_loss_coef > 0, keeps=spec.keep_routing)
    return _going(spec, "plain", reason) if reason else spec


def settle_forward(spec: LearnerSpec, engine: Any, ranks: SequenceRanks) -> LearnerSpec:
    """The spec with the `learner.forward` by which the model of DeepSpeed's engine computes what its own forward does; all ranks
    together.

    Raises:
        ConfigError: it does so by none that may be used.
    """
    model = engine.module
    gap = _compared(spec, engine)
    if gap.closes(spec.dtype):
        return _going(spec, "plain" if model.plain else "packed")
    name, way = type(model.hf).__name__, "plain" if model.plain else "packed"
    if spec.learner.forward != "auto":
        raise ConfigError(
            f"{name} by the {way} path is not what its own forward computes ({gap}): it can't be trained{_else(way)}"
        )
    if ranks.size > 1:
        raise ConfigError(
            f"{name} in slices is not what its own forward computes ({gap}); use learner.sequence_parallel_size 1"
        )
    if kind := positions_by_length(model.hf.config.get_text_config()):
        raise ConfigError(
            f"{name} packed is not what its own forward computes ({gap}), and padded its {kind} positions would not be"
        )
    use_own_attention(model.hf)
    model.plain = True
    own_gap = _compared(spec, engine)
    if not own_gap.closes(spec.dtype):
        raise ConfigError(
            f"{name} can't be trained: the learner does not compute what its own forward does, packed ({gap}) or plain ({own_gap})"
        )
    return _going(spec, "plain", f"packed, {gap}")


def _else(way: str) -> str:
    return " so; use learner.forward auto" if way == "packed" else ""


def _going(spec: LearnerSpec, forward: Forward, reason: str = "") -> LearnerSpec:
    if reason and spec.learner.forward == "auto":
        say(f"note: the model goes the plain way, a sequence a row: {reason}", error=True)
    return replace(spec, learner=spec.learner.model_copy(update={"forward": forward}))


def _compared(spec: LearnerSpec, engine: Any) -> Gap:
    """The largest gap of any rank."""
    model = engine.module
    shares = can_share_prompts(spec, model.hf)
    gap = gap_of(model, share_prompts=shares, training=not spec.learner.dropout)
    if spec.learner.zero_stage == 3:
        # The gradient ends at the embedded tokens: what lies before them waits for its own, gathered.
        engine.optimizer.parameter_offload.release_backward_leftovers()
    found = torch.tensor([gap.values, gap.gradient, *gap.rounding], device=next(model.parameters()).device)
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    values, gradient, *rounding = found.tolist()
    return Gap(values, gradient, (rounding[0], rounding[1]), gap.error)
