"""What a run will hold in memory, before anything is loaded: of each kind of worker its parts, in bytes.

The states are ZeRO's (Rajbhandari et al., 1910.02054, section 3.1): weights, fp32 masters and Adam's two moments; stage 1 splits
the last three over the learners, stage 2 the gradient too, stage 3 everything. What comes on top was measured on CPUs, with
SmolLM2-135M (tests/actors/learner/test_memory.py measures again): a backward pass fills a bucket with the whole gradient, adds a
copy of it to the accumulated one, and the step lays that out flat once more. What the allocator has had it keeps
(actors/runtime.py), so a learner at rest holds what it held in its largest step. The constants are proportional shares (PSS) of the
processes of a run of that model: pages that they share, 0.17 GiB of each, are in one of them alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from grpo_ray.config.model import LoraConfig, ModelConfig, TinyModelConfig
from grpo_ray.config.schema import RunConfig
from grpo_ray.config.supervised import DpoConfig, SftConfig
from grpo_ray.files import read_json
from grpo_ray.models.model_files import num_elements
from grpo_ray.models.tiny import num_tiny_tokens

GIB = 1 << 30
FP32, BF16 = 4, 2
LEARNER_BASE = int(0.56 * GIB)
"""Python with torch, DeepSpeed, Transformers and, for the weight sync, vLLM: on a GPU it is the host's memory."""
ENGINE_BASE = int(1.3 * GIB)
"""Of the rollout actor and vLLM's core, its own process, without weights and cache."""
REWARD_BASE = int(0.2 * GIB)
"""A reward actor and the process that scores, without a model of its own."""
CONTROLLER_BASE = int(0.65 * GIB)
"""The controller (0.42) and the command that was typed (0.23)."""
RAY_BASE = int(0.5 * GIB)
"""Ray's own processes, and the samples of a step in its object store."""
SYNCED_WEIGHTS = 3
"""Times that an engine on CPUs holds its weights, once it has got new ones: those that it samples with, those packed beside them
(actors/weights/shadow.py), and what packing has had of its heap."""
LARGEST_BUCKET = 500_000_000
"""Elements that DeepSpeed reduces at once: its `reduce_bucket_size`."""
CHUNKS = 4
"""Buffers of one chunk of logits in fp32 that exist at once: in the forward pass two, and in the backward pass two more."""


def chunk_rows(vocab_size: int, *, on_gpu: bool) -> int:
    """Rows of logits that fit the budget of a chunk: 64 MiB in fp32, or 256 on a GPU, whose products need to be large."""
    return max(1, (256 if on_gpu else 64) * 2**20 // (4 * vocab_size))


@dataclass(frozen=True)
class ModelFacts:
    """Of a model, what its memory follows from."""

    num_params: int
    """Tied weights once."""
    num_layers: int
    hidden: int
    attention: int
    """Heads times the size of one."""
    intermediate: int
    """Of all experts that a token meets."""
    vocab: int

    @property
    def per_layer(self) -> int:
        """Elements that one layer keeps for the backward pass, of one token, as measured: seven of the two norms and residuals,
        five of the attention (queries, keys and values of all heads, its output twice), six of the gated MLP."""
        return 7 * self.hidden + 5 * self.attention + 6 * self.intermediate

    @property
    def beside_layers(self) -> int:
        """Elements of a token beside these: the last norm, the head's input and their gradients."""
        return 6 * self.hidden


@dataclass(frozen=True)
class LearnerMemory:
    """Bytes of one learner rank."""

    base: int
    """0 on a GPU: it is in the host's memory."""
    weights: int
    gradients: int
    """The accumulated gradient, and what passes and the step make beside it."""
    optimizer: int
    reference: int
    """Of a reference model, and of the critic."""
    activations: int
    """Of one micro-batch."""
    logits: int
    """Chunks of logits in fp32, the gradient of the output layer, and its copy in fp32 where the model's is in bf16."""

    @property
    def total(self) -> int:
        return sum(self.parts.values())

    @property
    def parts(self) -> dict[str, int]:
        return {
            "weights": self.weights,
            "gradients": self.gradients,
            "optimizer": self.optimizer,
            "reference": self.reference,
            "activations": self.activations,
            "logits": self.logits,
            "libraries": self.base,
        }


def learner_memory(facts: ModelFacts, config: RunConfig | SftConfig, *, on_gpu: bool) -> LearnerMemory:
    """Of one rank in its largest step."""
    model, learner = config.model, config.learner
    ranks, stage = learner.num_actors, learner.zero_stage
    width = BF16 if model.dtype == "bfloat16" else FP32
    trained = facts.num_params if model.lora is None else adapter_params(facts, model.lora)
    n = facts.num_params
    of_weights, of_gradients, of_optimizer = (ranks if stage >= s else 1 for s in (3, 2, 1))
    bucket = min(trained, LARGEST_BUCKET)
    if stage == 0:
        gradients, states = FP32 * trained, 2 * FP32 * trained
    else:
        copies = 2 if _several(config) else 1
        gradients = width * bucket + FP32 * trained * copies // of_gradients + FP32 * trained // of_optimizer
        states = 3 * FP32 * trained // of_optimizer
    weights = width * n // of_weights
    if stage == 3:
        weights += width * min(n, 2 * LARGEST_BUCKET)
    more = _second_models(config)
    rows = learner.logprob_chunk_tokens or chunk_rows(facts.vocab, on_gpu=on_gpu)
    head = 0 if model.lora else 2 * FP32 * facts.vocab * facts.hidden
    if not on_gpu:
        head += _head_copy(facts, model)
    return LearnerMemory(
        base=0 if on_gpu else LEARNER_BASE,
        weights=0 if learner.offload_params and on_gpu else weights,
        gradients=gradients,
        optimizer=0 if learner.offload_optimizer and on_gpu else states,
        reference=more.frozen * width * n // of_weights + more.trained * (width * n + states + gradients),
        activations=activations(facts, config, width),
        logits=CHUNKS * FP32 * min(rows, tokens_at_once(config)) * facts.vocab + head,
    )


def _head_copy(facts: ModelFacts, model: ModelConfig) -> int:
    """Of the output layer of a bf16 model in fp32, which CPUs need for logits in fp32."""
    return FP32 * facts.vocab * facts.hidden if model.dtype == "bfloat16" else 0


def activations(facts: ModelFacts, config: RunConfig | SftConfig, width: int) -> int:
    """Bytes of one micro-batch, on one rank."""
    kept = facts.num_layers * facts.per_layer
    if config.model.gradient_checkpointing:
        kept = facts.num_layers * facts.hidden + facts.per_layer
    return tokens_at_once(config) * (kept + facts.beside_layers) * width // config.learner.sequence_parallel_size


def tokens_at_once(config: RunConfig | SftConfig) -> int:
    """Of a micro-batch: no more than a step has for each of those that share it."""
    return min(config.learner.micro_batch_tokens, _tokens_of_step(config))


def _tokens_of_step(config: RunConfig | SftConfig) -> int:
    """At most, for each of the learners that have micro-batches of their own."""
    if isinstance(config, RunConfig):
        longest = config.data.max_prompt_length + config.rollout.max_completion_length
        step = config.prompts_per_step * config.rollout.num_generations * longest
    else:
        step = config.examples_per_step * config.max_length * (2 if isinstance(config, DpoConfig) else 1)
    return -(-step // config.learner.data_parallel_size)


def _several(config: RunConfig | SftConfig) -> bool:
    """Does a step have more than one micro-batch? With `overlap` its groups come one after the other."""
    if isinstance(config, RunConfig) and config.learner.overlap:
        return True
    return _tokens_of_step(config) > config.learner.micro_batch_tokens


@dataclass(frozen=True)
class _Models:
    frozen: int
    trained: int


def _second_models(config: RunConfig | SftConfig) -> _Models:
    if not isinstance(config, RunConfig):
        return _Models(0, 0)
    reference = config.algorithm.beta > 0 and config.model.lora is None
    return _Models(int(reference), int(config.algorithm.advantage == "gae"))


def adapter_params(facts: ModelFacts, lora: LoraConfig) -> int:
    """Of adapters on all linear layers: two matrices of rank r for each."""
    per_layer = 4 * (facts.hidden + facts.attention) + 3 * (facts.hidden + facts.intermediate)
    return lora.r * facts.num_layers * per_layer


def engine_memory(facts: ModelFacts, config: RunConfig, kv_cache_gb: float, *, synced: bool) -> dict[str, int]:
    """Of one engine on CPUs, by part.

    Args:
        synced: it gets new weights.
    """
    weights = weight_bytes(facts, config.model) // config.rollout.tensor_parallel_size
    return {
        "weights": (SYNCED_WEIGHTS if synced else 1) * weights,
        "KV cache": int(kv_cache_gb * GIB),
        "libraries": ENGINE_BASE,
    }


def weight_bytes(facts: ModelFacts, model: ModelConfig) -> int:
    """Of all weights, as they are computed with and sent."""
    return (BF16 if model.dtype == "bfloat16" else FP32) * facts.num_params


def facts_of(config: Any, num_params: int) -> ModelFacts:
    """Of a config as Transformers reads it (or a mapping of config.json's, by `_Words`)."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    hidden = int(text.hidden_size)
    heads = int(getattr(text, "num_attention_heads", 1) or 1)
    size = int(getattr(text, "head_dim", None) or hidden // heads)
    inner = getattr(text, "moe_intermediate_size", None)
    experts = int(getattr(text, "num_experts_per_tok", None) or 1)
    wide = inner if inner and experts > 1 else getattr(text, "intermediate_size", None)
    return ModelFacts(
        num_params=num_params,
        num_layers=int(text.num_hidden_layers),
        hidden=hidden,
        attention=heads * size,
        intermediate=int(wide or 4 * hidden) * experts,
        vocab=int(text.vocab_size),
    )


_OTHER_NAMES = {
    "hidden_size": ("n_embd", "d_model"),
    "num_hidden_layers": ("n_layer", "n_layers", "num_layers"),
    "num_attention_heads": ("n_head", "n_heads"),
    "intermediate_size": ("n_inner", "ffn_dim"),
}


class _Words:
    """config.json as attributes, with the names of older kinds of models."""

    def __init__(self, found: dict[str, Any]) -> None:
        self._found = found.get("text_config") or found

    def __getattr__(self, name: str) -> Any:
        for known in (name, *_OTHER_NAMES.get(name, ())):
            if self._found.get(known) is not None:
                return self._found[known]
        raise AttributeError(name)


def known_facts(config: ModelConfig) -> ModelFacts | None:
    """Without Transformers, in milliseconds: of tiny models and of folders with safetensors. None: of others."""
    if config.tiny is not None:
        return _tiny_facts(config.tiny)
    folder = Path(config.path or "")
    try:
        found = read_json(folder / "config.json")
        return facts_of(_Words(found), sum(map(num_elements, folder.glob("model*.safetensors"))) or _nothing(folder))
    except (OSError, ValueError, AttributeError, KeyError, TypeError, SafetensorError):
        return None


def _nothing(folder: Path) -> int:
    raise ValueError(f"{folder} has no safetensors")


def _tiny_facts(tiny: TinyModelConfig) -> ModelFacts:
    hidden = tiny.hidden_size
    wide = tiny.intermediate_size or 11 * hidden // 4
    vocab = num_tiny_tokens(tiny)
    kv = hidden // tiny.num_heads * tiny.num_kv_heads
    matrices, biases, norms = 2 * hidden * (hidden + kv) + 3 * hidden * wide, hidden + 2 * kv, 2 * hidden
    num_params = (vocab + 1) * hidden + tiny.num_layers * (matrices + biases + norms)
    return ModelFacts(num_params, tiny.num_layers, hidden, hidden, wide, vocab)


def gib(num_bytes: float) -> str:
    return f"{num_bytes / GIB:.2f} GiB"
