"""The memory that a run will need, before anything is loaded: for each kind of worker its parts, in bytes.

The states are ZeRO's (Rajbhandari et al., 1910.02054, section 3.1): weights, fp32 masters and Adam's two moments; stage 1 shards
the last three over the learner ranks, stage 2 the gradient too, stage 3 everything. The rest was measured on CPUs, with
SmolLM2-135M (tests/actors/learner/test_memory.py measures again): a backward pass fills a bucket with the whole gradient, adds a
copy of it to the accumulated one, and the step lays that out flat once more. The allocator keeps what it has once had
(actors/runtime.py), so an idle learner rank holds as much as in its largest step. The constants are proportional shares (PSS) of
the processes of a run of that model: pages that they share, 0.17 GiB of each, are counted in one of them alone.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from grpo_ray.config.model import LoraConfig, ModelConfig, TinyModelConfig
from grpo_ray.config.schema import RunConfig
from grpo_ray.config.supervised import DpoConfig, SftConfig
from grpo_ray.files import read_json
from grpo_ray.models.files.model_files import num_elements
from grpo_ray.models.files.tiny import num_tiny_tokens

GIB = 1 << 30
FP32, BF16 = 4, 2
LEARNER_BASE = int(0.56 * GIB)
"""The memory of Python with torch, DeepSpeed, Transformers and, for the weight sync, vLLM; on a GPU it is the host's."""
ENGINE_BASE = int(1.3 * GIB)
"""The memory of the rollout actor and vLLM's core, a process of its own, without weights and cache."""
REWARD_BASE = int(0.2 * GIB)
"""The memory of a reward worker and its scoring process, without a model of its own."""
CONTROLLER_BASE = int(0.65 * GIB)
"""The memory of the controller (0.42) and of the command that the user typed (0.23)."""
RAY_BASE = int(0.5 * GIB)
"""The memory of Ray's own processes, and of the samples of a step in its object store."""
SYNCED_WEIGHTS = 3
"""How often an engine on CPUs holds its weights after a weight sync: those that it samples with, those packed beside them
(actors/weights/shadow.py), and what packing has taken from its heap."""
LARGEST_BUCKET = 500_000_000
"""The number of elements that DeepSpeed reduces at once: its `reduce_bucket_size`."""
CHUNKS = 4
"""The number of fp32 buffers of a chunk of logits that exist at once: two in the forward pass, two more in the backward pass."""
CHUNKS_ON_GPU = 3
"""The same on a GPU, which gives those of the forward pass back."""


CHUNKS_SHARE = 16
"""The part of a GPU's memory for all buffers of a chunk: one in so many."""
ROWS_OF_GPUS = (256, 8192)
"""The fewest and the most rows of a chunk on a GPU."""
LEAST_GPU = 80 * GIB
"""The memory of a GPU whose memory is not known."""


def chunk_rows(vocab_size: int, *, on_gpu: bool, memory: int | None = None) -> int:
    """The number of rows of logits in a chunk. On CPUs as fit 64 MiB in fp32. On a GPU as many as fit a sixteenth of its memory,
    2,048 of a vocabulary of 152,000 on 80 GB: each chunk adds a product as large as the output layer to an fp32 sum.

    Args:
        memory: the bytes of the GPU; the same at each start, whatever is free, so that a run can be repeated.
    """
    if not on_gpu:
        return max(1, 64 * 2**20 // (FP32 * vocab_size))
    least, most = ROWS_OF_GPUS
    rows = (memory or LEAST_GPU) // CHUNKS_SHARE // (CHUNKS * FP32 * vocab_size)
    return max(least, min(most, rows // least * least))


@dataclass(frozen=True)
class ModelFacts:
    """The facts about a model that determine its memory."""

    num_params: int
    """The number of weights, tied ones counted once."""
    num_layers: int
    hidden: int
    attention: int
    """The number of heads times the size of one."""
    intermediate: int
    """The width of the MLP, summed over all experts that a token uses."""
    vocab: int
    kv: int = 0
    """The number of key heads times the size of one; 0: as many as heads."""
    key_heads: int = 0
    """The number of key heads where they are fewer than heads; 0: as many, or not known."""
    experts: int = 0
    """The number of weights that belong to experts."""
    route_bytes: int = 0
    """The bytes of the experts that a token takes, in all layers."""

    @property
    def keys(self) -> int:
        return self.kv or self.attention

    @property
    def per_layer_on_gpu(self) -> int:
        """The number of elements of the compute dtype per token that one layer keeps on a GPU: each norm its input in fp32 and two
        outputs, attention its queries and its output twice, with keys and values, the gated MLP four times its width."""
        return 8 * self.hidden + 3 * self.attention + 4 * self.keys + 4 * self.intermediate

    @property
    def kv_per_token(self) -> int:
        """The number of elements of a token in an engine's KV cache."""
        return 2 * self.num_layers * self.keys

    def kv_per_token_of(self, num_gpus: int) -> int:
        """The same on each of the GPUs over which heads are spread; where key heads are fewer, several GPUs keep the same one."""
        if not self.key_heads:
            return max(1, self.kv_per_token // num_gpus)
        return self.kv_per_token // self.key_heads * max(1, self.key_heads // num_gpus)

    @property
    def per_layer(self) -> int:
        """The number of elements per token that one layer keeps for the backward pass, as measured: seven of the two norms and
        residuals, five of the attention (queries, keys and values of all heads, its output twice), six of the gated MLP."""
        return 7 * self.hidden + 5 * self.attention + 6 * self.intermediate

    @property
    def beside_layers(self) -> int:
        """The number of elements per token besides these: the last norm, the head's input and their gradients."""
        return 6 * self.hidden


@dataclass(frozen=True)
class LearnerMemory:
    """The bytes of one learner rank, by part."""

    base: int
    """The base; 0 on a GPU, since it is in the host's memory."""
    weights: int
    gradients: int
    """The accumulated gradient, and what passes and the step allocate besides."""
    optimizer: int
    reference: int
    """The reference model and the critic."""
    activations: int
    """The activations of one micro-batch."""
    logits: int
    """The chunks of logits in fp32, the gradient of the output layer, and its copy in fp32 if the model's is in bf16."""

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


def learner_memory(
    facts: ModelFacts, config: RunConfig | SftConfig, *, on_gpu: bool, gpu_memory: int | None = None
) -> LearnerMemory:
    """The memory of one rank in its largest step.

    Args:
        gpu_memory: the bytes of its GPU, by which the chunks of logits go.
    """
    model, learner = config.model, config.learner
    ranks, stage = learner.num_actors, learner.zero_stage
    width = BF16 if model.dtype == "bfloat16" else FP32
    trained = facts.num_params if model.lora is None else adapter_params(facts, model.lora)
    n = facts.num_params
    of_weights, of_gradients, of_optimizer = (ranks if stage >= s else 1 for s in (3, 2, 1))
    bucket = min(trained, LARGEST_BUCKET)
    at_step = 0
    if stage == 0:
        gradients, states = FP32 * trained, 2 * FP32 * trained
    else:
        copies = 2 if _several(config) else 1
        gradients = width * bucket + FP32 * trained * copies // of_gradients + FP32 * trained // of_optimizer
        if on_gpu:
            gradients, at_step = _gradients_on_gpu(trained, config, width, copies)
        states = 3 * FP32 * trained // of_optimizer
    weights = width * n // of_weights
    if stage == 3:
        weights += width * min(n, 2 * LARGEST_BUCKET)
    more = _second_models(config)
    rows = learner.logprob_chunk_tokens or chunk_rows(facts.vocab, on_gpu=on_gpu, memory=gpu_memory)
    head = 0 if model.lora else 2 * FP32 * facts.vocab * facts.hidden
    if not on_gpu:
        head += _head_copy(facts, model)
    elif not model.lora:
        # The sum in fp32, and the gradient in the model's dtype that is made of it.
        head = (FP32 + width) * facts.vocab * facts.hidden
    found = LearnerMemory(
        base=0 if on_gpu else LEARNER_BASE,
        weights=0 if learner.offload_params and on_gpu else weights,
        gradients=gradients,
        optimizer=0 if learner.offload_optimizer and on_gpu else states,
        reference=more.frozen * width * n // of_weights + more.trained * (width * n + states + gradients),
        activations=activations(facts, config, width, on_gpu=on_gpu),
        logits=(CHUNKS_ON_GPU if on_gpu else CHUNKS) * FP32 * min(rows, tokens_at_once(config)) * facts.vocab + head,
    )
    if found.gradients + found.activations + found.logits >= at_step:
        return found
    return replace(found, gradients=at_step, activations=0, logits=0)


def _gradients_on_gpu(trained: int, config: RunConfig | SftConfig, width: int, copies: int) -> tuple[int, int]:
    """The bytes of gradients in the backward pass, and in the step, when activations and logits are gone: DeepSpeed then lays the
    gradient out flat once more."""
    ranks, stage = config.learner.num_actors, config.learner.zero_stage
    share = FP32 * trained // (ranks if stage >= 2 else 1)
    # Stage 2 fills one bucket while the other is reduced. In bf16 stage 1 adds to the one fp32 gradient as it goes.
    buckets = width * min(trained, LARGEST_BUCKET) * (2 if stage == 2 else 1)
    copies = 1 if stage == 1 and width == BF16 else copies
    return buckets + share * copies, buckets + share + FP32 * trained // ranks


def _head_copy(facts: ModelFacts, model: ModelConfig) -> int:
    """The bytes of the fp32 copy of a bf16 model's output layer, which CPUs need for logits in fp32."""
    return FP32 * facts.vocab * facts.hidden if model.dtype == "bfloat16" else 0


def activations(facts: ModelFacts, config: RunConfig | SftConfig, width: int, *, on_gpu: bool) -> int:
    """The bytes of activations of one micro-batch on one rank."""
    per_layer = facts.per_layer_on_gpu if on_gpu else facts.per_layer
    kept = facts.num_layers * per_layer
    if config.model.checkpoints(on_gpu=on_gpu):
        kept = facts.num_layers * facts.hidden + per_layer
    return tokens_at_once(config) * (kept + facts.beside_layers) * width // config.learner.sequence_parallel_size


def tokens_at_once(config: RunConfig | SftConfig) -> int:
    """The number of tokens of a micro-batch: at most what a step has for each of the ranks that share it."""
    return min(config.learner.micro_batch_tokens, _tokens_of_step(config))


def _tokens_of_step(config: RunConfig | SftConfig) -> int:
    """The largest number of tokens of a step for each of the ranks that have micro-batches of their own."""
    if isinstance(config, RunConfig):
        longest = config.data.max_prompt_length + config.rollout.max_completion_length
        step = config.prompts_per_step * config.rollout.num_generations * longest
    else:
        step = config.examples_per_step * config.max_length * (2 if isinstance(config, DpoConfig) else 1)
    return -(-step // config.learner.data_parallel_size)


def _several(config: RunConfig | SftConfig) -> bool:
    """Whether a step has more than one micro-batch. With `overlap` its groups come one after the other."""
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
    """The number of weights of adapters on all linear layers: two matrices of rank r for each."""
    per_layer = 4 * (facts.hidden + facts.attention) + 3 * (facts.hidden + facts.intermediate)
    return lora.r * facts.num_layers * per_layer


def engine_memory(facts: ModelFacts, config: RunConfig, kv_cache_gb: float, *, synced: bool) -> dict[str, int]:
    """The bytes of one engine on CPUs, by part.

    Args:
        synced: whether it gets new weights.
    """
    weights = weight_bytes(facts, config.model) // config.rollout.tensor_parallel_size
    return {
        "weights": (SYNCED_WEIGHTS if synced else 1) * weights,
        "KV cache": int(kv_cache_gb * GIB),
        "libraries": ENGINE_BASE,
    }


def weight_bytes(facts: ModelFacts, model: ModelConfig) -> int:
    """The bytes of all weights, in the dtype of computing and sending."""
    return (BF16 if model.dtype == "bfloat16" else FP32) * facts.num_params


def route_memory(facts: ModelFacts, config: RunConfig) -> int:
    """The bytes of the experts of all samples under way, at their full length, in Ray's object store."""
    if not config.rollout.keep_routing:
        return 0
    longest = config.data.max_prompt_length + config.rollout.max_completion_length
    return config.samples_under_way * longest * facts.route_bytes


def facts_of(config: Any, num_params: int) -> ModelFacts:
    """The facts from a config as Transformers reads it (or from a mapping of config.json's, by `_Words`)."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    hidden = int(text.hidden_size)
    heads = int(getattr(text, "num_attention_heads", 1) or 1)
    size = int(getattr(text, "head_dim", None) or hidden // heads)
    keys = int(getattr(text, "num_key_value_heads", None) or heads)
    inner = getattr(text, "moe_intermediate_size", None)
    used = int(getattr(text, "num_experts_per_tok", None) or 1)
    wide = inner if inner and used > 1 else getattr(text, "intermediate_size", None)
    layers = int(text.num_hidden_layers)
    experts = next((n for name in _EXPERTS if (n := getattr(text, name, None))), 0) if used > 1 else 0
    return ModelFacts(
        num_params=num_params,
        num_layers=layers,
        hidden=hidden,
        attention=heads * size,
        intermediate=int(wide or 4 * hidden) * used,
        vocab=int(text.vocab_size),
        kv=0 if keys == heads else keys * size,
        key_heads=0 if keys == heads else keys,
        experts=min(num_params, 3 * int(experts) * hidden * int(wide or 4 * hidden) * layers),
        route_bytes=layers * used * (1 if experts <= 256 else 2) if experts else 0,
    )


_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
"""What configs call the number of experts of a layer."""


_OTHER_NAMES = {
    "hidden_size": ("n_embd", "d_model"),
    "num_hidden_layers": ("n_layer", "n_layers", "num_layers"),
    "num_attention_heads": ("n_head", "n_heads"),
    "intermediate_size": ("n_inner", "ffn_dim"),
}


class _Words:
    """A config.json as attributes, which also knows the names of older kinds of models."""

    def __init__(self, found: dict[str, Any]) -> None:
        self._found = found.get("text_config") or found

    def __getattr__(self, name: str) -> Any:
        for known in (name, *_OTHER_NAMES.get(name, ())):
            if self._found.get(known) is not None:
                return self._found[known]
        raise AttributeError(name)


def known_facts(config: ModelConfig) -> ModelFacts | None:
    """The facts without Transformers, in milliseconds, for tiny models and for folders with safetensors; None for others."""
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
    keys = (0, 0) if kv == hidden else (kv, tiny.num_kv_heads)
    return ModelFacts(num_params, tiny.num_layers, hidden, hidden, wide, vocab, *keys)


def gib(num_bytes: float) -> str:
    return f"{num_bytes / GIB:.2f} GiB"
