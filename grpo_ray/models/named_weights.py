"""A model's weights as rollout engines and exports need them: Hugging Face names, tied ones once, adapters merged in."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from grpo_ray.models.lora import ADAPTER
from grpo_ray.models.multimodal import name_in_whole


@dataclass(frozen=True)
class NamedWeight:
    """One weight under its Hugging Face name; `lora` is a low-rank product to be added."""

    name: str
    param: nn.Parameter
    lora: tuple[nn.Parameter, nn.Parameter, float] | None = None
    """The matrices A and B, and alpha/r."""

    @property
    def parts(self) -> list[nn.Parameter]:
        """The parameters that must be complete before `value`: gather these under ZeRO-3."""
        return [self.param] if self.lora is None else [self.param, self.lora[0], self.lora[1]]

    @property
    def shape(self) -> torch.Size:
        """The shape of the whole weight, even if ZeRO-3 shards it."""
        return torch.Size(getattr(self.param, "ds_shape", self.param.shape))

    def value(self) -> Tensor:
        """The merged weight, without gradient, in the dtype of the parameter."""
        weight = self.param.detach()
        if self.lora is None:
            return weight
        a, b, scaling = self.lora
        product = (b.detach().float() @ a.detach().float()) * scaling
        return (weight.float() + product).to(weight.dtype)


def named_weights(hf: nn.Module) -> list[NamedWeight]:
    """Every weight that a plain Transformers model of this architecture has (a tied one once), in the module's order; those of a
    text model under their names in the multimodal checkpoint."""
    params = dict(hf.named_parameters())
    out = []
    for name, param in params.items():
        if ".lora_A." in name or ".lora_B." in name:
            continue
        if not name.endswith(".base_layer.weight"):
            out.append(NamedWeight(name_in_whole(hf, name.replace(".base_layer.", ".")), param))
            continue
        layer = name.removesuffix(".base_layer.weight")
        scaling = hf.get_submodule(layer).scaling[ADAPTER]  # type: ignore[index]
        a, b = (params[f"{layer}.{part}.{ADAPTER}.weight"] for part in ("lora_A", "lora_B"))
        out.append(NamedWeight(name_in_whole(hf, f"{layer}.weight"), param, (a, b, float(scaling))))
    return out


def buckets(weights: list[NamedWeight], max_bytes: int) -> Iterator[list[NamedWeight]]:
    """The weights in order, as many at once as fit into `max_bytes` at their size on the learner, at least one."""
    bucket: list[NamedWeight] = []
    size = 0
    for weight in weights:
        num_bytes = weight.shape.numel() * weight.param.element_size()
        if bucket and size + num_bytes > max_bytes:
            yield bucket
            bucket, size = [], 0
        bucket.append(weight)
        size += num_bytes
    if bucket:
        yield bucket
