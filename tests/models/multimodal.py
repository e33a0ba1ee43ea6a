"""Small random multimodal models, of Transformers' own configs."""

from __future__ import annotations

import re
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from grpo_ray.models.multimodal import whole_class
from tests.models.small import OF_KIND, SIZES

_TOWER: dict[str, Any] = {
    **{name: size for name, size in SIZES.items() if not name.endswith("token_id") and name != "vocab_size"},
    **dict.fromkeys(("embed_dim", "out_hidden_size", "vision_output_dim", "projector_input_dim"), 64),
    **dict.fromkeys(("projector_output_dim",), 64),
    **dict.fromkeys(("num_position_embeddings", "patch_size", "global_head_dim"), 16),
    "depth": 2,
    "num_heads": 4,
    "image_size": 32,
    "fullatt_block_indexes": [1],
    "deepstack_visual_indexes": [0],
}
_IDS = 16
_ROPE_IN_SECTIONS = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}


def multimodal_config(kind: str, larger: Mapping[str, Any] | None = None, **text: Any) -> Any:
    """The config of a small model.

    Args:
        larger: sizes of its language model in place of the usual ones, where it has them.
        text: options that its language model has to have.
    """
    usual = CONFIG_MAPPING[kind]()
    parts = {}
    for name in usual.sub_configs:
        part = getattr(usual, name, None) or (usual.sub_configs[name]() if name == "vision_config" else None)
        if part is None:
            continue
        is_text = part is usual.get_text_config()
        known = {*vars(part), *part.attribute_map}
        options = {n: size for n, size in (SIZES | dict(larger or {}) if is_text else _TOWER).items() if n in known}
        if is_text:
            options |= OF_KIND.get(part.model_type, {}) | text
        if "qk_rope_head_dim" in known:
            # It follows from the parts of a head.
            options.pop("head_dim", None)
        if is_text and re.search("vl|glm", part.model_type):
            options["rope_parameters"] = _ROPE_IN_SECTIONS
        # The last ones are those of images and the like, which the texts that are compared lack.
        options |= {
            n: options[n] + _IDS for n in ("vocab_size", "vocab_size_per_layer_input") if is_text and n in options
        }
        parts[name] = options | {"model_type": part.model_type}
    first = (SIZES | dict(larger or {}))["vocab_size"]
    ids = [name for name, value in vars(usual).items() if "token" in name and isinstance(value, int)]
    return CONFIG_MAPPING[kind](**parts, **{name: first + number % _IDS for number, name in enumerate(ids)})


def multimodal_model(config: Any, seed: int = 0) -> Any:
    """The whole of this config in fp32, with weights large enough that its tokens matter to each other."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        whole = whole_class(config, "it")(deepcopy(config))
    with torch.no_grad():
        for name, param in whole.named_parameters():
            if param.ndim >= 2 and not any(part in name for part in ("A_log", "conv", "dt_")):
                param.mul_(3)
    return whole.eval()


def write_multimodal(folder: Path, kind: str, *, as_on_hub: bool = True) -> Any:
    """Write a small model in the layout of the hub, or in that of its class; returns it."""
    whole = multimodal_model(multimodal_config(kind))
    whole.save_pretrained(folder, save_original_format=as_on_hub)
    return whole
