"""The prompts of `tests.bench.gpu` on a machine without reasoning-gym: sums."""

from __future__ import annotations


def rows() -> list[dict[str, str]]:
    return [
        {"prompt": f"{i % 97} + {i % 89} + {i % 83} =", "answer": str(i % 97 + i % 89 + i % 83)} for i in range(4096)
    ]
