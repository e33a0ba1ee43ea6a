"""The chat templates of families of models, as TRL ships them (Apache 2.0), each with a tokenizer that has its control tokens.

The tokenizer merges letters into words, so that what is decoded and encoded again is other tokens than were sampled.
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any

import trl

FOLDER = Path(trl.__file__).parent / "chat_templates"
_CONTROL = re.compile(r"<([|\uff5c])[^|\uff5c<> ]{1,40}\1>|<(?:start|end)_of_turn>|\[gMASK\]|<sop>")
_TAGS = ("<think>", "</think>", "<tool_call>", "</tool_call>")
_WORDS = ["the number is five and the answer is seven, search for it: guess once more"] * 3

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": f"{name} something.",
            "parameters": {"type": "object", "properties": {"text": {"type": "string"}}, "required": ["text"]},
        },
    }
    for name in ("search", "guess")
]


@cache
def tokenizer_of(file: str, end: str, *, end_takes_blanks: bool = False) -> Any:
    """A byte-level BPE of a few words and the template's control tokens, `end` among them; tokens of tools are not special, as in
    most families.

    Args:
        end_takes_blanks: whether `end` takes the white space after it, as in Phi-3.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    template = (FOLDER / f"{file}.jinja").read_text(encoding="utf-8")
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    made.train_from_iterator(_WORDS, trainer)
    control = dict.fromkeys(m.group() for m in _CONTROL.finditer(template))
    special = [t for t in ("<bos>", "<eos>", *control) if "tool" not in t and t != end]
    made.add_special_tokens([*special, AddedToken(end, rstrip=end_takes_blanks, normalized=False)])
    made.add_tokens([AddedToken(t, normalized=False) for t in (*_TAGS, *(t for t in control if "tool" in t))])
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<bos>", eos_token="<eos>", chat_template=template)
