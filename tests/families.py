"""Tokenizers with the chat templates of families of models: their control tokens, how a turn ends, who opens the thinking."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}"
    "<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
PHI3 = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content | trim }}<|eot_id|>"
    "{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
LLAMA2 = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token }}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }} {{ eos_token }}{% endif %}{% endfor %}"
)
R1_DISTILL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}<|Assistant|>{{ m.content.split('</think>')[-1] }}"
    "{{ eos_token }}{% else %}<|User|>{{ m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|Assistant|><think>\n{% endif %}"
)
_QWEN_THINKS = (
    "{% if tools %}<|im_start|>system\n{% for t in tools %}{{ t | tojson }}{% endfor %}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and loop.last %}"
    "{% set parts = m.content.split('</think>') %}<think>\n"
    "{{ parts[0].split('<think>')[-1].strip('\n') if parts | length > 1 else '' }}\n</think>\n\n{{ parts[-1].lstrip('\n') }}"
    "{% else %}{{ m.content.split('</think>')[-1] }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
)
QWEN3 = _QWEN_THINKS + (
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
QWEN35 = _QWEN_THINKS + (
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n"
    "{% else %}<think>\n{% endif %}{% endif %}"
)
NO_END = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"


@dataclass(frozen=True)
class Family:
    template: str | None
    eos: str
    end: str
    """Ends an assistant's turn."""
    tokens: tuple[str, ...]
    """Special, besides eos."""
    bos: str | None = None
    tags_special: bool = False


TAGS = ("<think>", "</think>", "<answer>", "</answer>")
FAMILIES = {
    "qwen base": Family(CHATML, "<|endoftext|>", "<|im_end|>", ("<|im_start|>", "<|im_end|>")),
    "qwen": Family(CHATML, "<|im_end|>", "<|im_end|>", ("<|im_start|>", "<|endoftext|>")),
    "gemma": Family(GEMMA, "<eos>", "<end_of_turn>", ("<start_of_turn>", "<end_of_turn>"), "<bos>"),
    "phi3": Family(PHI3, "<|endoftext|>", "<|end|>", ("<|user|>", "<|assistant|>", "<|end|>")),
    "llama3": Family(
        LLAMA3,
        "<|end_of_text|>",
        "<|eot_id|>",
        ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        "<|begin_of_text|>",
    ),
    "llama2": Family(LLAMA2, "</s>", "</s>", (), "<s>"),
    "r1 distill": Family(R1_DISTILL, "<|eos|>", "<|eos|>", ("<|User|>", "<|Assistant|>"), "<|bos|>"),
    "qwen3": Family(QWEN3, "<|im_end|>", "<|im_end|>", ("<|im_start|>", "<|endoftext|>"), tags_special=True),
    "qwen3.5": Family(QWEN35, "<|im_end|>", "<|im_end|>", ("<|im_start|>", "<|endoftext|>"), tags_special=True),
    "no end": Family(NO_END, "<|endoftext|>", "<|endoftext|>", ()),
}


@cache
def family_tokenizer(name: str, *, adds_bos: bool = False, adds_eos: bool = False) -> Any:
    """Byte-level BPE without merges: one token a character, beside those of the family."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    family = FAMILIES[name]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([t for t in (family.bos, family.eos, *family.tokens) if t])
    made.add_tokens([AddedToken(t, normalized=False, special=family.tags_special) for t in TAGS])
    around = [family.bos if adds_bos else None, "$A", family.eos if adds_eos else None]
    if adds_bos or adds_eos:
        made.post_processor = processors.TemplateProcessing(
            single=" ".join(p for p in around if p),
            special_tokens=[(t, made.token_to_id(t)) for t in around if t and t != "$A"],
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token=family.bos, eos_token=family.eos, chat_template=family.template
    )
