"""Checks that the files of a model's folder are complete, by their names, and for safetensors files by that library."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from grpo_ray.errors import ConfigError, first_line
from grpo_ray.files import check_inside, open_regular, read_json

WEIGHTS = "model.safetensors"
PICKLE = "pytorch_model.bin"
TOKENIZERS = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
_LFS = b"version https://git-lfs"


def check_model_files(folder: Path) -> None:
    """Check for all parts of a Hugging Face model: a config, complete weights, a tokenizer.

    Raises:
        ConfigError: a part is missing or broken; names it.
    """
    _json(folder / "config.json")
    for file in _weights(folder):
        _check_whole(file)
    if not any((folder / name).is_file() for name in TOKENIZERS) and not list(folder.glob("*.tiktoken")):
        raise ConfigError(
            f"model.path {folder} has no tokenizer: none of {', '.join(TOKENIZERS[:4])} is there; copy the tokenizer's files "
            "into it"
        )


def _weights(folder: Path) -> list[Path]:
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    index = folder / f"{WEIGHTS}.index.json"
    if not index.is_file():
        raise ConfigError(
            f"model.path {folder} has no weights: {WEIGHTS}, whole or in parts, is not there{_instead(folder)}"
        )
    named = _json(index).get("weight_map")
    if not isinstance(named, dict) or not all(isinstance(shard, str) for shard in named.values()):
        raise ConfigError(f"{index} has no weight_map from tensors to files; download the model again")
    shards = sorted(set(named.values()))
    try:
        for shard in shards:
            check_inside(shard)
    except ValueError as e:
        raise ConfigError(f"{index} {e}; download the model again") from None
    lost = [shard for shard in shards if not (folder / shard).is_file()]
    if lost:
        raise ConfigError(
            f"model.path {folder}: {len(lost)} of its {len(shards)} files of weights are missing: {', '.join(lost[:3])}"
            f"{', ..' * (len(lost) > 3)}; download the model again"
        )
    return [folder / shard for shard in shards]


def _instead(folder: Path) -> str:
    """What a folder without safetensors files has in their place, and what to do, in words."""
    if (folder / "adapter_config.json").is_file():
        return "; it holds a LoRA adapter: merge that into its base model first (peft's merge_and_unload)"
    gguf = next(iter(sorted(folder.glob("*.gguf"))), None)
    if gguf is not None:
        return (
            f"; it holds {gguf.name}, which is quantised: take the model that it was made from, or read it with Transformers' "
            f'from_pretrained("{folder}", gguf_file="{gguf.name}"), and save_pretrained'
        )
    if (folder / PICKLE).is_file() or (folder / f"{PICKLE}.index.json").is_file():
        return (
            f"; it holds {PICKLE}, a pickle, which may run any code when it is read. If you trust it, write it as safetensors: "
            f'python -c "from transformers import AutoModelForCausalLM as M; '
            f"M.from_pretrained('{folder}', dtype='auto').save_pretrained('{folder}')\""
        )
    return ""


def _json(file: Path) -> dict[str, Any]:
    try:
        # Links are followed: the hub's cache consists of them.
        found = read_json(file)
    except (OSError, ValueError) as e:
        raise ConfigError(f"{file} can't be read ({first_line(e)})") from None
    if not isinstance(found, dict):
        raise ConfigError(f"{file}: expected a mapping, got {type(found).__name__}")
    return found


def _check_whole(file: Path) -> None:
    """Check that a safetensors file is complete: its header states each tensor's end, and the library opens no file of another
    size."""
    try:
        with open_regular(file) as f:
            if f.read(len(_LFS)) == _LFS:
                raise ConfigError(f"{file} is a pointer of Git LFS, not the weights; fetch them: git lfs pull")
        if file.suffix == ".safetensors":
            num_elements(file)
    except (OSError, SafetensorError) as e:
        raise ConfigError(f"{file} is no whole safetensors file ({e}); download it again") from None


def num_elements(file: Path) -> int:
    """The number of elements of all tensors of a safetensors file, by its header. Raises SafetensorError for an incomplete file."""
    with safe_open(file, framework="numpy") as tensors:
        return sum(math.prod(tensors.get_slice(name).get_shape()) for name in tensors.keys())  # noqa: SIM118
