"""LoRA adapters (2106.09685) in a Hugging Face model, by peft.

r rank, in and out the sizes of a linear layer: W is [out, in], A [r, in], B [out, r], and the layer computes with
W + alpha/r B A.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from grpo_ray.config.model import LoraConfig
from grpo_ray.errors import ConfigError, first_line
from grpo_ray.models.multimodal import name_in_whole

ADAPTER = "default"


def inject(hf: nn.Module, lora: LoraConfig) -> None:
    """Put adapters on the model's linear layers, in place; only they are trained afterwards. B starts at zero, so the output of the
    model does not change.

    Raises:
        ConfigError: `target_modules` names no layer of this model.
    """
    import peft

    targets: Any = lora.target_modules if isinstance(lora.target_modules, str) else list(lora.target_modules)
    config = peft.LoraConfig(r=lora.r, lora_alpha=lora.alpha, target_modules=targets, task_type="CAUSAL_LM")
    try:
        peft.inject_adapter_in_model(config, hf, adapter_name=ADAPTER)
    except ValueError as e:
        raise ConfigError(f"model.lora.target_modules {lora.target_modules} fits no layer: {first_line(e)}") from None


@contextmanager
def adapters_off(hf: nn.Module) -> Iterator[None]:
    """A context in which the model is as it was before training: the reference, without a second copy in memory.

    peft's own switch is not used, since it also toggles the adapters' gradients, which the optimizer relies on.
    """
    layers: list[Any] = [m for m in hf.modules() if hasattr(m, "_disable_adapters")]
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


def adapter_tensors(hf: nn.Module) -> dict[str, nn.Parameter]:
    """The adapters' parameters under the names of peft's adapter_model.safetensors, for the whole of a multimodal checkpoint."""
    return {
        f"base_model.model.{name_in_whole(hf, name.replace(f'.{ADAPTER}.weight', '.weight'))}": p
        for name, p in hf.named_parameters()
        if ".lora_A." in name or ".lora_B." in name
    }


def adapter_bytes(tensors: dict[str, Tensor]) -> bytes:
    """The content of adapter_model.safetensors; equal tensors give equal bytes."""
    from safetensors.torch import save

    return save(tensors)


def adapter_checksum(data: bytes) -> str:
    """A checksum of `adapter_bytes`: 16 hexadecimal digits. It detects corruption and mix-ups, but not forgery."""
    return hashlib.blake2b(data, digest_size=8).hexdigest()


def write_adapter(tensors: dict[str, Tensor], lora: LoraConfig, base_model: str, folder: Path) -> None:
    """Write a folder that `peft.PeftModel.from_pretrained` and vLLM's LoRA requests load."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    targets = sorted({name.split(".")[-3] for name in tensors})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": lora.r,
        "lora_alpha": lora.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": targets,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2))
