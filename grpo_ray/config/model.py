"""The schema of `model`: its weights, precision and adapters."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import model_validator

from grpo_ray.config.base import HomePath, PositiveInt, Strict


class TinyModelConfig(Strict):
    """A randomly initialised Qwen2 with a character tokenizer, created on the spot: for laptops and tests."""

    hidden_size: PositiveInt = 256
    num_layers: PositiveInt = 4
    num_heads: PositiveInt = 4
    num_kv_heads: PositiveInt = 2
    context: PositiveInt = 256
    intermediate_size: PositiveInt | None = None
    """The width of the MLP. None: 11/4 of hidden_size."""
    words: tuple[str, ...] = ()
    """Words that are one token each, besides the characters."""
    vocab_size: PositiveInt | None = None
    """The number of rows of the embedding; those above the tokenizer's ids are never in a prompt. None: the tokenizer's, rounded up
    to 64."""
    seed: int = 1

    @model_validator(mode="after")
    def _heads(self) -> Self:
        if self.hidden_size % (32 * self.num_heads) or self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} with {self.num_heads} heads and {self.num_kv_heads} key heads: vLLM's attention "
                "on CPUs takes heads of 32, 64, .. dimensions, and key heads that divide the heads"
            )
        return self


MAX_ADAPTER_RANK = 512
"""The largest rank that vLLM supports for sampling."""


class LoraConfig(Strict):
    """Low-rank adapters, 2106.09685."""

    r: PositiveInt = 32
    alpha: PositiveInt = 64
    """The numerator of the scale alpha / r of the adapters' product."""
    target_modules: str | tuple[str, ...] = "all-linear"
    """The names of linear layers, e.g. [q_proj, v_proj]; `all-linear`: every one but the output layer."""
    transfer: Literal["merged", "adapter"] = "merged"
    """How the adapters reach the rollout engines. `merged`: each weight sync sends the whole model with the adapters merged in, and
    sampling is as fast as without them. `adapter`: a weight sync sends the adapters alone, a few MB instead of the model, and
    samples in progress finish under the version that they began with; the engines' base model never changes, so it can be
    quantised. But vLLM samples more slowly through adapters, on CPUs by far. It pays off for large models on GPUs, or on a slow
    network, where moving the model costs more than slower sampling."""

    @model_validator(mode="after")
    def _rank(self) -> Self:
        if self.transfer == "adapter" and self.r > MAX_ADAPTER_RANK:
            raise ValueError(
                f"model.lora.r is {self.r}, and vLLM samples through adapters of at most {MAX_ADAPTER_RANK}; lower it, or use "
                "model.lora.transfer merged"
            )
        return self


class ModelConfig(Strict):
    path: HomePath | None = None
    """A folder with a Hugging Face model, or a name on the hub."""
    tiny: TinyModelConfig | None = None
    """A tiny model to create instead of reading `path`."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """The precision of rollout engine and learner. The learner keeps fp32 master weights in either case."""
    attention: Literal["auto", "sdpa", "flash_attention_2"] = "auto"
    """`auto`: flash-attention 2 if there are a GPU and the package, and `dtype` is bfloat16; else `sdpa`: torch's own kernels, on
    GPUs and in bfloat16 one call for all sequences of a micro-batch."""
    gradient_checkpointing: bool | Literal["auto"] = "auto"
    """Whether activations within a layer are computed again for the backward pass instead of kept. auto: on GPUs, where they would
    be most of the memory, and not on CPUs; a run's config.yaml says which."""
    compile: bool = False
    """Whether the learner compiles the decoder's layers (torch.compile): fewer and larger operations on a GPU, after about a minute
    of compilation in the first step. Attention is left as it is."""
    lora: LoraConfig | None = None
    """Adapters to train on the frozen model. The reference model then costs no memory."""
    trust_remote_code: bool = False

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.path is None) == (self.tiny is None):
            raise ValueError("give exactly one of model.path and model.tiny")
        return self

    def checkpoints(self, *, on_gpu: bool) -> bool:
        """The value of `gradient_checkpointing` for learners on GPUs, or on CPUs."""
        return on_gpu if self.gradient_checkpointing == "auto" else self.gradient_checkpointing

    @property
    def sends_adapters(self) -> bool:
        """Whether rollout engines receive the adapters instead of merged weights."""
        return self.lora is not None and self.lora.transfer == "adapter"
