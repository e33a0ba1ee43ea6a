"""A reference model that follows the policy, under any ZeRO stage; it is then a part of the checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from actors.learner_state import BUCKET_BYTES, gather, gathered, writing
from grpo_ray.errors import CheckpointError
from grpo_ray.named_weights import buckets, named_weights

_FILE = "reference.safetensors"


@torch.no_grad()
def follow(reference: nn.Module, policy: nn.Module, tau: float) -> None:
    """reference = tau x policy + (1 - tau) x reference; all ranks together.

    1 is DeepSeek-R1's replacement (2501.12948), less a Polyak average.

    Args:
        reference: frozen, of the same architecture and dtype as the policy.
        policy: `engine.module`.
        tau: in (0, 1].
    """
    own = {w.name: w.param for w in named_weights(reference)}
    for bucket in buckets(named_weights(policy), BUCKET_BYTES):
        sources, targets = [w.param for w in bucket], [own[w.name] for w in bucket]
        with gathered(sources), gathered(targets, writer=0):
            for source, target in zip(sources, targets, strict=True):
                target.lerp_(source.to(target.dtype), tau)


def save(reference: Any, folder: Path) -> None:
    """Write the reference's weights under Hugging Face names; all ranks together, rank 0 writes.

    Raises:
        CheckpointError: the write failed.
    """
    weights = gather(reference.hf)
    if dist.get_rank() == 0:
        with writing(folder):
            save_file(weights, folder / _FILE)


@torch.no_grad()
def load(reference: Any, folder: Path) -> None:
    """Back to what `save` wrote, bitwise; all ranks together.

    Raises:
        CheckpointError: the checkpoint holds no reference.
    """
    try:
        with safe_open(folder / _FILE, "pt") as file:
            for bucket in buckets(named_weights(reference.hf), BUCKET_BYTES):
                with gathered([w.param for w in bucket], writer=0):
                    for weight in bucket:
                        weight.param.copy_(file.get_tensor(weight.name))
    except (OSError, SafetensorError) as e:
        raise CheckpointError(
            f"{folder / _FILE} can't be read ({e}): the run was saved with algorithm.ref_refresh_steps 0, set that back, or "
            "the checkpoint is incomplete"
        ) from None
