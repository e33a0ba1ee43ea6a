"""A reference model that follows the policy, under any ZeRO stage; it is then part of the checkpoint."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from actors.learner.state import BUCKET_BYTES
from actors.zero import gathered
from grpo_ray.errors import CheckpointError
from grpo_ray.models.named_weights import buckets, named_weights
from grpo_ray.run.checkpoint_store import CheckpointLocation
from grpo_ray.run.fragments import Fragment, FragmentReader, even_part
from grpo_ray.run.learner_files import HeldModel, SavedLearner

_KIND = "weight"


@torch.no_grad()
def follow(reference: nn.Module, policy: nn.Module, tau: float) -> None:
    """reference = tau x policy + (1 - tau) x reference; all ranks together.

    tau = 1 is DeepSeek-R1's replacement (2501.12948), less a Polyak average.

    Args:
        reference: the frozen model, of the same architecture and dtype as the policy.
        policy: `engine.module`.
        tau: in (0, 1].
    """
    own = {w.name: w.param for w in named_weights(reference)}
    for bucket in buckets(named_weights(policy), BUCKET_BYTES):
        sources, targets = [w.param for w in bucket], [own[w.name] for w in bucket]
        with gathered(sources), gathered(targets, writer=0):
            for source, target in zip(sources, targets, strict=True):
                target.lerp_(source.to(target.dtype), tau)


@torch.no_grad()
def hold(reference: Any) -> HeldModel:
    """A copy of this rank's share of the reference's weights under Hugging Face names; all ranks together."""
    rank, num_ranks, out = dist.get_rank(), dist.get_world_size(), []
    for bucket in buckets(named_weights(reference.hf), BUCKET_BYTES):
        with gathered([w.param for w in bucket]):
            for weight in bucket:
                start, numel = even_part(weight.shape.numel(), rank, num_ranks)
                if numel:
                    share = weight.param.detach().reshape(-1)[start : start + numel]
                    out.append(Fragment(weight.name, start, {_KIND: share.to("cpu", copy=True)}))
    return HeldModel(out)


def load_saved(reference: Any, saved: SavedLearner, place: CheckpointLocation) -> None:
    """Load the reference of a checkpoint; all ranks together.

    Raises:
        CheckpointError: the checkpoint has no reference, or that of another model.
    """
    if not saved.has("reference"):
        raise CheckpointError(
            f"{place.url} holds no reference: it was saved with algorithm.ref_refresh_steps 0, set that back"
        )
    load(reference, saved.reader("reference"))


@torch.no_grad()
def load(reference: Any, saved: FragmentReader) -> None:
    """Restore the held reference, bitwise; all ranks together.

    Raises:
        CheckpointError: the held reference is of another model.
    """
    for bucket in buckets(named_weights(reference.hf), BUCKET_BYTES):
        with gathered([w.param for w in bucket], writer=0):
            for weight in bucket:
                numel = weight.shape.numel()
                if (found := saved.numel(weight.name)) != numel:
                    raise CheckpointError(
                        f"{weight.name} of the reference has {numel} elements here and {found} in the checkpoint: it is of "
                        "another model"
                    )
                weight.param.copy_(saved.read(weight.name, _KIND, 0, numel).view(weight.shape))
