"""Forward and backward of samples of given lengths, with random tokens: packed as the learner does it, and plainly padded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

ROWS = 64
"""Of a padded micro-batch."""


def packed_pass(
    model: Any, prompt_length: int, lengths: Sequence[int], micro_batch_tokens: int = 4096, group_size: int = 1
) -> None:
    """`model` is a `PolicyModel`; `lengths` are of prompt and completion, so many of a group after each other."""
    import numpy as np

    from grpo_ray.batch.pack import PackItem, pack
    from grpo_ray.batch.plan import plan_batch

    rng = np.random.default_rng(0)
    groups = [i // group_size for i in range(len(lengths))]
    prompts = [rng.integers(8, 200, prompt_length) for _ in range(groups[-1] + 1)]
    (plan,) = plan_batch(
        lengths,
        groups,
        num_ranks=1,
        num_mini_batches=1,
        micro_batch_tokens=micro_batch_tokens,
        prompts_S=[prompt_length] * len(lengths) if group_size > 1 else None,
    )
    for micro in plan.ranks[0]:
        items = [
            PackItem(
                prompts[groups[i]],
                rng.integers(8, 200, lengths[i] - prompt_length),
                np.zeros(lengths[i] - prompt_length, np.float32),
                1,
                1,
                i,
            )
            for i in micro
        ]
        model(pack(items, share_prompts=group_size > 1), 1.0)[0].sum().backward()


def padded_pass(hf: Any, prompt_length: int, lengths: Sequence[int]) -> None:
    """`hf` is Transformers' own model: padded rows, and a log-softmax over all logits of the completions."""
    import torch

    for start in range(0, len(lengths), ROWS):
        part = lengths[start : start + ROWS]
        ids = torch.randint(8, 200, (len(part), max(part)))
        mask = torch.arange(max(part))[None] < torch.tensor(part)[:, None]
        logits = hf(input_ids=ids, attention_mask=mask.long(), use_cache=False).logits[:, prompt_length - 1 : -1]
        logp = logits.float().log_softmax(-1).gather(-1, ids[:, prompt_length:, None])[..., 0]
        (logp * mask[:, prompt_length:]).sum().backward()


def policy(path: str, chunk: int) -> Any:
    """The model of a folder as the learner holds it, on a CPU in fp32."""
    import torch
    from transformers import AutoModelForCausalLM

    from grpo_ray.models.attention import choose_attention
    from grpo_ray.models.linear import use_faster_products
    from grpo_ray.models.policy import PolicyModel

    attention = choose_attention("auto", torch.device("cpu"))
    hf = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation=attention)
    use_faster_products(hf)
    return PolicyModel(hf, chunk=chunk).train()
