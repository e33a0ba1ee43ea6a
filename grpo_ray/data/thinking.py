"""Reasoning that the prompt's template has opened: its text ends in `<think>`, so that the model writes none (DeepSeek-R1's
distilled models, Qwen3.5)."""

from __future__ import annotations

OPEN, CLOSE = "<think>", "</think>"


def opens_thinking(prompt: str) -> bool:
    """Whether the templated prompt ends in `<think>`, ignoring white space."""
    return prompt.rstrip().endswith(OPEN)


def begun(completion: str) -> str:
    """The completion, which continues from the prompt's `<think>`, with that tag before it."""
    return OPEN + completion


def without_opening(prompt: str, answer: str) -> str:
    """The rest of a written answer to put after the prompt, if that has opened the reasoning: `<think>` is there already, and so is
    the white space after it."""
    written = answer.lstrip()
    if not opens_thinking(prompt) or not written.startswith(OPEN):
        return answer
    return written.removeprefix(OPEN).removeprefix(prompt[len(prompt.rstrip()) :])
