"""Config -> a learner's optimizer and its schedule."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from grpo_ray.config.learner import LearnerConfig
from grpo_ray.errors import ConfigError


def adamw(model: nn.Module, learner: LearnerConfig, learning_rate: float) -> torch.optim.AdamW:
    """AdamW over the parameters that are trained, with the betas, epsilon and weight decay of `learner`."""
    return torch.optim.AdamW(
        parameter_groups(model, learner.weight_decay),
        lr=learning_rate,
        betas=learner.adam_betas,
        eps=learner.adam_eps,
        fused=True,
    )


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """The parameter groups: matrices with weight decay; norms and biases without."""
    params: list[Any] = [p for p in model.parameters() if p.requires_grad]
    if weight_decay == 0:
        return [{"params": params, "weight_decay": 0.0}]
    matrices = {p: len(getattr(p, "ds_shape", p.shape)) >= 2 for p in params}
    groups = [([p for p in params if matrices[p] is kind], d) for kind, d in ((True, weight_decay), (False, 0.0))]
    return [{"params": members, "weight_decay": decay} for members, decay in groups if members]


def make_schedule(optimizer: torch.optim.Optimizer, learner: LearnerConfig, num_steps: int | None) -> Any:
    """The learning-rate schedule over optimizer steps.

    Raises:
        ConfigError: the schedule has an end, and the number of steps is unknown.
    """
    from transformers import get_scheduler

    kind = learner.lr_scheduler_type
    if kind != "constant" and num_steps is None:
        raise ConfigError(f"learner.lr_scheduler_type {kind} needs to know its end: give num_steps")
    if kind == "constant" and learner.warmup_steps:
        return get_scheduler("constant_with_warmup", optimizer, num_warmup_steps=learner.warmup_steps)
    return get_scheduler(
        kind,
        optimizer,
        num_warmup_steps=learner.warmup_steps,
        num_training_steps=num_steps,
        scheduler_specific_kwargs={"min_lr_rate": learner.min_lr_ratio} if kind == "cosine_with_min_lr" else None,
    )
