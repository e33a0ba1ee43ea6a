"""A complete small language model created on the spot: Qwen2's architecture, random weights, one token per character.

Beyond ASCII it has one token per byte. The four tags of R1's format are one token each, as `<think>` is in DeepSeek-R1's
and Qwen3's tokenizers: spelled out they would be half of a short answer. Its chat template writes tool calls as Hermes and Qwen do.

It lets the real engine, learner and loop run on a laptop and in tests with nothing downloaded.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from grpo_ray.config.model import TinyModelConfig
from grpo_ray.files import readable_as_asked

SPECIAL_TOKENS = ("<pad>", "<eos>", "<bos>", "<unk>", "<|system|>", "<|user|>", "<|assistant|>")
NUM_BYTES = 256
TAGS = ("<think>", "</think>", "<answer>", "</answer>")
CHAT_TEMPLATE = (
    "<bos>{% for m in messages %}"
    "{% if m['role'] == 'assistant' %}<|assistant|>{% generation %}{{ m['content'] }}"
    "{% for c in m['tool_calls'] or [] %}<tool_call>"
    "{{ {'name': c['function']['name'], 'arguments': c['function']['arguments']} | tojson }}"
    "</tool_call>{% endfor %}<eos>{% endgeneration %}"
    "{% else %}<|{{ m['role'] }}|>{{ m['content'] }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def num_tiny_tokens(config: TinyModelConfig) -> int:
    """The number of rows of the embedding."""
    tokens = len(SPECIAL_TOKENS) + NUM_BYTES + len({*TAGS, *config.words})
    return config.vocab_size or (tokens + 63) // 64 * 64


def build_tiny_model(folder: Path, config: TinyModelConfig) -> Path:
    """Write model (fp32 safetensors) and tokenizer in Hugging Face's layout. The same seed gives the same bytes."""
    import torch
    from transformers import Qwen2ForCausalLM
    from transformers.utils import logging

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model = Qwen2ForCausalLM(tiny_config(config)).float()
    model.generation_config = _generation_config()
    folder.mkdir(parents=True, exist_ok=True)
    progress = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    model.save_pretrained(folder)
    make_tokenizer(config).save_pretrained(folder)
    readable_as_asked(folder)
    if progress:
        logging.enable_progress_bar()
    return folder


def tiny_vocab() -> dict[str, int]:
    """The vocabulary of tokens that are no words."""
    from tokenizers.pre_tokenizers import ByteLevel

    return {token: i for i, token in enumerate((*SPECIAL_TOKENS, *sorted(ByteLevel.alphabet())))}


def added_words(config: TinyModelConfig) -> list[Any]:
    from tokenizers import AddedToken

    # These are not special: other programs that decode for rewards skip special tokens, and have to keep these.
    return [AddedToken(tag, normalized=False, special=False) for tag in (*TAGS, *config.words)]


def make_tokenizer(config: TinyModelConfig) -> Any:
    """The tokenizer as Transformers reads it from the folder of a tiny model; see also `grpo_ray.models.files.tiny_tokenizer`."""
    from transformers import Qwen2Tokenizer

    # Byte-level BPE without a single merge: Transformers rebuilds the tokenizer of a qwen2 folder as Qwen2's own
    # (a character tokenizer of another kind would silently lose its spaces), and any text can be encoded.
    tokenizer = Qwen2Tokenizer(
        vocab=tiny_vocab(),
        merges=[],
        pad_token="<pad>",
        eos_token="<eos>",
        bos_token="<bos>",
        unk_token="<unk>",
        additional_special_tokens=list(SPECIAL_TOKENS[4:]),
        chat_template=CHAT_TEMPLATE,
        model_max_length=config.context,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.add_tokens(added_words(config))
    return tokenizer


def _ids() -> dict[str, int]:
    return {f"{name}_token_id": SPECIAL_TOKENS.index(f"<{name}>") for name in ("pad", "eos", "bos")}


def tiny_shape(config: TinyModelConfig) -> dict[str, Any]:
    """The shape options in its config.json."""
    return {
        "vocab_size": num_tiny_tokens(config),
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size or config.hidden_size * 11 // 4,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "max_position_embeddings": config.context,
    }


def tiny_config(config: TinyModelConfig) -> Any:
    """The config as Transformers reads it."""
    from transformers import Qwen2Config

    return Qwen2Config(**tiny_shape(config), tie_word_embeddings=True, **_ids())


def _generation_config() -> Any:
    from transformers import GenerationConfig

    return GenerationConfig(do_sample=True, temperature=1.0, top_k=0, top_p=1.0, **_ids())
