"""Checks that the learner can train a model, from its config alone, by a model without memory (torch's meta device)."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import numpy as np
import torch
from torch import nn

from grpo_ray.batch.pack import PackItem, pack
from grpo_ray.batch.sequence import check_model, positions_by_length, slice_of
from grpo_ray.config.learner import Forward
from grpo_ray.config.model import ModelConfig
from grpo_ray.errors import ConfigError, told
from grpo_ray.models.attention import FLASH, PACKED, check_causal, choose_attention, why_unpackable
from grpo_ray.models.files.checkpoint_tensors import check_headers, check_trainable
from grpo_ray.models.lora import inject
from grpo_ray.models.multimodal import empty_whole, text_part, whole_class, whole_of
from grpo_ray.models.policy import check_head, target_states

_OWN_ATTENTION = (
    "it has attention of its own, beside Transformers' interface, over which packed sequences would see each other"
)
MAKING = (OSError, ValueError, KeyError, AttributeError, TypeError, AssertionError, ImportError)
"""The exceptions that Transformers raises for a config that its own class can't be built from."""


def skeleton(
    model_config: Any,
    model: ModelConfig,
    *,
    reward_model: bool = False,
    slices: int = 1,
    on_gpu: bool = False,
    forward: Forward = "auto",
) -> tuple[nn.Module, str]:
    """The model that the learner would hold, without memory and without adapters, after a look at its files if they are here; and
    why it goes the plain way, or "".

    Args:
        model_config: the config as Transformers reads it.
        reward_model: whether it has one output instead of a language head.
        slices: the number of learner ranks that share a sequence.
        on_gpu: whether the learner ranks have GPUs.
        forward: `learner.forward`.

    Raises:
        ConfigError: the learner would refuse it; says why.
    """
    check_trainable(model_config, model.path or "", reward_model=reward_model)
    if model.attention == FLASH and not on_gpu:
        raise ConfigError(f"model.attention is {FLASH}, which needs GPUs, and there are none; use auto")
    if model.attention == FLASH and model.dtype == "float32":
        raise ConfigError(f"model.attention is {FLASH}, which has no float32; use auto, or model.dtype bfloat16")
    hf, reason = with_forward(model_config, model, forward, reward_model=reward_model, slices=slices)
    if not reward_model:
        try:
            check_head(hf, plain=bool(reason))
        except ValueError as e:
            raise ConfigError(f"the learner can't train model {model.path}: {told(e)}") from None
    if slices > 1:
        check_model(hf, slices)
    if model.path is not None:
        whole = whole_of(hf)
        check_headers(whole.cls if whole else type(hf), model_config, model.path, reward_model=reward_model)
    return hf, reason


def with_forward(
    model_config: Any, model: ModelConfig, forward: Forward, *, reward_model: bool = False, slices: int = 1
) -> tuple[nn.Module, str]:
    """The model without memory, and why it goes the plain way, as far as that is known without weights; "" where it packs.

    Raises:
        ConfigError: the model can't be made, or not go the way that is asked for.
    """
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    auto = AutoModelForSequenceClassification if reward_model else AutoModelForCausalLM
    whole = whole_class(model_config, model.path or "", reward_model=reward_model)

    def make(attention: str | None) -> nn.Module:
        if whole is not None:
            part: nn.Module = text_part(empty_whole(whole, model_config), model.path or "", attention)
            return part
        with torch.device("meta"):
            made: nn.Module = auto.from_config(
                deepcopy(model_config), attn_implementation=attention, trust_remote_code=model.trust_remote_code
            )
        return made

    try:
        hf, reason = _on_either_path(make, forward)
        check_causal(hf)
        kind = positions_by_length(model_config.get_text_config())
        if kind and reason:
            raise ValueError(
                f"{reason}; and padded to the longest it would have the {kind} positions of that in every sequence: not supported"
            )
        if slices > 1 and reason:
            raise ValueError(f"{reason}; use learner.sequence_parallel_size 1")
    except ConfigError:
        raise
    # A config may be a stranger's file: sizes that are 0 or below raise arithmetic errors and errors of torch.
    except Exception as e:
        raise ConfigError(f"the learner can't train model {model.path}: {why_not(e, model_config)}") from None
    return hf, reason


def _on_either_path(make: Callable[[str | None], nn.Module], forward: Forward) -> tuple[nn.Module, str]:
    if forward == "plain":
        return make(None), "learner.forward is plain"
    packed = choose_attention("sdpa", torch.device("cpu"))
    try:
        hf = make(packed)
        reason = why_unpackable(hf) or _refused_by_attention(hf)
    except KeyError as e:
        if packed not in e.args:
            raise
        hf, reason = None, _OWN_ATTENTION
    if hf is not None and not reason:
        return hf, ""
    if forward == "packed":
        raise ValueError(f"{reason}: not supported with learner.forward packed; use auto")
    return make(None), reason


def _refused_by_attention(hf: Any) -> str:
    """Why the packed attention refuses a model, tried on tensors without memory."""
    items = [
        PackItem(np.zeros(3, np.int64), np.zeros(n, np.int64), np.zeros(n, np.float32), 0.0, 0.0, 0) for n in (2, 4)
    ]
    own = slice_of(pack(items, share_prompts=True), 0, 1)
    try:
        target_states(hf.base_model, own, PACKED, torch.device("meta"))
    except ValueError as e:
        return told(e)
    # Some operations need values.
    except Exception:
        return ""
    return ""


def check_adapters(hf: nn.Module, model: ModelConfig) -> None:
    """Put adapters on the skeleton. Raises ConfigError if `model.lora.target_modules` matches no layer."""
    if model.lora is not None:
        inject(hf, model.lora)


def why_not(error: BaseException, model_config: Any) -> str:
    """The cause, in words, of an error that Transformers raised while it built a model."""
    kind = getattr(model_config, "model_type", "") or "model"
    if isinstance(error, ValueError | OSError):
        return told(error)
    return f"Transformers makes no {kind} of its config.json ({type(error).__name__}: {told(error)})"
