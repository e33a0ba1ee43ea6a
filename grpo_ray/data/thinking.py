"""Reasoning that the prompt's template has opened: its text ends in `<think>`, so that the model writes none (DeepSeek-R1's
distilled models, Qwen3.5)."""

from __future__ import annotations

OPEN, CLOSE = "<think>", "</think>"


def opens_thinking(prompt: str) -> bool:
    """Does the templated prompt end in `<think>`, white space aside?"""
    return prompt.rstrip().endswith(OPEN)


def begun(completion: str) -> str:
    """A completion that goes on from `<think>`, with it."""
    return OPEN + completion


def without_opening(prompt: str, answer: str) -> str:
    """What of a written answer is left to write behind the prompt, if that has opened the reasoning: `<think>` is there already,
    and so is the white space behind it."""
    written = answer.lstrip()
    if not opens_thinking(prompt) or not written.startswith(OPEN):
        return answer
    return written.removeprefix(OPEN).removeprefix(prompt[len(prompt.rstrip()) :])
