"""The end of an answer: the token that the template puts after an assistant's turn, which need not be the tokenizer's
end-of-sequence token (`<|im_end|>`, `<end_of_turn>`, `<|eot_id|>`, `<|end|>`)."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from grpo_ray.errors import DataError

PROBE = "GrpoRayAsksHowThisTurnEnds"
_NO_EOS = "the tokenizer has no end-of-sequence token, so that no answer could end; set its eos_token"


@dataclass(frozen=True)
class TurnEnd:
    """What follows the text of an answer."""

    id: int
    """The last token that is trained on; the rollout engine stops at it."""
    token: str
    before: str = ""
    """The text between the answer and the token (Llama 2's ` </s>`)."""
    tail: str = ""
    """All that the template writes after the answer, often with a line break after the token: no model samples that, so nothing is
    trained on it."""
    also: tuple[str, ...] = ()
    """Other end tokens that a written answer may already have."""

    def stripped(self, answer: str) -> str:
        """The answer without its own end tokens and the white space between them."""
        out = answer
        while (end := next((t for t in (self.token, *self.also) if out.rstrip().endswith(t)), None)) is not None:
            out = out.rstrip().removesuffix(end)
        return out


def end_of_text(tokenizer: Any) -> TurnEnd:
    """The end outside chat templates: the tokenizer's end-of-sequence token.

    Raises:
        DataError: the tokenizer has none.
    """
    if tokenizer.eos_token_id is None:
        raise DataError(_NO_EOS)
    return TurnEnd(int(tokenizer.eos_token_id), str(tokenizer.eos_token))


def end_of_turn(tokenizer: Any, apply: Callable[[list[dict[str, Any]]], str]) -> TurnEnd:
    """The end of an assistant's turn in a chat template, up to its first token that is no text. A template that ends a turn with
    text alone, or with nothing, gets the end-of-sequence token.

    Args:
        apply: the function that applies the template, without generation prompt.

    Raises:
        DataError: the template changes an answer, or no token could end one.
    """
    text = apply([{"role": "user", "content": "?"}, {"role": "assistant", "content": PROBE}])
    if text.count(PROBE) != 1:
        raise DataError(
            f"the tokenizer's chat template does not write an assistant's text down once, as it is (it gives {text[-200:]!r}), so "
            "that nothing tells how an answer ends; use a data.template of another kind"
        )
    behind = text.partition(PROBE)[2]
    eos = tokenizer.eos_token
    ids = control_tokens(tokenizer)
    pattern = "|".join(re.escape(t) for t in sorted(ids, key=len, reverse=True))
    found = re.search(pattern, behind) if pattern else None
    if found is None:
        end = end_of_text(tokenizer)
        return TurnEnd(end.id, end.token, behind.rstrip(), behind, (behind.strip(),) if behind.strip() else ())
    token = found.group()
    also = (eos,) if eos and eos != token else ()
    return TurnEnd(ids[token], token, behind[: found.start()], behind, also)


def control_tokens(tokenizer: Any) -> dict[str, int]:
    """Text -> id of the tokens that were added to the vocabulary, special ones among them; runs of white space are text."""
    added = {str(token.content): int(i) for i, token in tokenizer.added_tokens_decoder.items()}
    return {text: i for text, i in added.items() if text.strip()}
