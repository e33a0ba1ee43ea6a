"""The tokenizer of a tiny model without Transformers, whose import takes two seconds: for `grpo-ray check`."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from functools import cached_property
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE

from grpo_ray.config.model import TinyModelConfig
from grpo_ray.models.files.tiny import CHAT_TEMPLATE, SPECIAL_TOKENS, added_words, make_tokenizer, tiny_vocab

_PIECES = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""Qwen2's pattern that splits a text into pieces."""


class TinyTokenizer:
    """The part of Transformers' tokenizer interface that `check` needs; anything else is delegated to Transformers' own."""

    chat_template = CHAT_TEMPLATE
    name_or_path = ""
    pad_token, eos_token, bos_token, unk_token = SPECIAL_TOKENS[:4]
    pad_token_id, eos_token_id, bos_token_id, unk_token_id = range(4)

    def __init__(self, config: TinyModelConfig) -> None:
        self._config = config
        self.backend = _backend(config)
        self.apply_chat_template = _Template(self)

    def __call__(self, texts: str | Sequence[str], *, add_special_tokens: bool = True, **_: Any) -> dict[str, Any]:
        if isinstance(texts, str):
            return {"input_ids": self.backend.encode(texts, add_special_tokens=add_special_tokens).ids}
        found = self.backend.encode_batch(list(texts), add_special_tokens=add_special_tokens)
        return {"input_ids": [each.ids for each in found]}

    def __len__(self) -> int:
        return int(self.backend.get_vocab_size())

    @property
    def added_tokens_decoder(self) -> dict[int, AddedToken]:
        return dict(self.backend.get_added_tokens_decoder())

    def convert_ids_to_tokens(self, token_id: int) -> str | None:
        return self.backend.id_to_token(token_id)

    @cached_property
    def whole(self) -> Any:
        """The tokenizer of Transformers itself."""
        return make_tokenizer(self._config)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.whole, name)


class _Template:
    """The chat template, written in Python; with options Transformers applies it."""

    def __init__(self, tokenizer: TinyTokenizer) -> None:
        self._tokenizer = tokenizer

    def __call__(
        self, messages: list[dict[str, Any]], *, add_generation_prompt: bool, tokenize: bool, **options: Any
    ) -> Any:
        if options or tokenize or any(m.get("tool_calls") for m in messages):
            return self._tokenizer.whole.apply_chat_template(
                messages, add_generation_prompt=add_generation_prompt, tokenize=tokenize, **options
            )
        turns = [f"<|{m['role']}|>{m['content']}{'<eos>' * (m['role'] == 'assistant')}" for m in messages]
        return "".join(["<bos>", *turns, "<|assistant|>" * add_generation_prompt])

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self._tokenizer.whole.apply_chat_template)


def _backend(config: TinyModelConfig) -> Tokenizer:
    out = Tokenizer(BPE(tiny_vocab(), [], continuing_subword_prefix="", end_of_word_suffix=""))
    out.normalizer, out.decoder = normalizers.NFC(), decoders.ByteLevel()
    pieces = pre_tokenizers.Split(Regex(_PIECES), "isolated", invert=False)
    out.pre_tokenizer = pre_tokenizers.Sequence(
        [pieces, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    out.post_processor = processors.TemplateProcessing(single="$A:0", pair="$A:0 $B:1", special_tokens=[])
    out.add_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    out.add_tokens(added_words(config))
    return out
