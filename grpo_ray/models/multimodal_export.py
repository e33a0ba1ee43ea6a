"""A trained text model as the whole multimodal checkpoint that it was taken from, everything else as it was there."""

from __future__ import annotations

import shutil
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from grpo_ray.models.files.checkpoint_tensors import headers, weight_files
from grpo_ray.models.multimodal import Whole

_PROCESSORS = "*processor_config.json"


def write_whole(whole: Whole, weights: dict[str, Tensor], source: str, folder: Path, dtype: torch.dtype) -> None:
    """Write the tensors and the config of a whole checkpoint, under the names of its source.

    Args:
        weights: those of the text model, under the names that Transformers' class of the whole has.
        source: the folder or hub name of the checkpoint.
        dtype: that of the weights.

    Raises:
        FileNotFoundError: the files of the source are not here.
    """
    from huggingface_hub import save_torch_state_dict

    files = weight_files(source)
    if not files:
        raise FileNotFoundError(
            f"{source}, whose other tensors belong to the export, has no safetensors files here any more"
        )
    config = deepcopy(whole.config)
    config.architectures, config.dtype = [whole.cls.__name__], dtype
    config.get_text_config().dtype = dtype
    config.save_pretrained(folder)
    empty = whole.empty()
    tensors = _carried(files, empty, whole) | _named_as_in(files, empty, weights)
    save_torch_state_dict(tensors, folder, metadata={"format": "pt"})
    for file in {found for weights_file in files for found in weights_file.parent.glob(_PROCESSORS)}:
        shutil.copyfile(file, folder / file.name)


def _named_as_in(files: list[Path], empty: Any, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights as the hub has them, if the source does, too; else as Transformers' class has them."""
    from transformers.core_model_loading import revert_weight_conversion

    names = {name for file in files for name, _, _ in headers(file)}
    as_on_hub: dict[str, Tensor] = revert_weight_conversion(empty, dict(weights))
    return {name: t.contiguous() for name, t in (as_on_hub if names >= as_on_hub.keys() else weights).items()}


def _carried(files: list[Path], empty: Any, whole: Whole) -> dict[str, Tensor]:
    """The source's tensors that are no part of the text model."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, rename_source_key

    changes = get_model_conversion_mapping(empty)
    converters = [change for change in changes if isinstance(change, WeightConverter)]
    renamings = [change for change in changes if not isinstance(change, WeightConverter)]
    known = empty.state_dict()
    carried = {}
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118
                target, _ = rename_source_key(name, renamings, converters, empty.base_model_prefix, known)
                if whole.own_name(target) is None:
                    carried[name] = tensors.get_tensor(name)
    return carried
