"""A KL in the reward: what it subtracts from each sample, over all ranks, and the advantages of the rest.

old and reference log-probabilities -> KL of every token -> summed over each sample, gathered over ranks -> rewards of the
whole batch -> group advantages (PPO's critic takes the KL of the tokens instead)
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from grpo_ray.algorithm.losses.kl import kl_of_tokens
from grpo_ray.algorithm.objectives import MicroBatchData
from grpo_ray.algorithm.train_batch import penalised_advantages
from grpo_ray.batch.sequence import SequenceRanks
from grpo_ray.config.algorithm import AlgorithmConfig
from grpo_ray.errors import NonFiniteError
from grpo_ray.types import TrainBatch


def penalise(
    mini_batches: Sequence[Sequence[MicroBatchData]],
    num_tokens_S: Sequence[int],
    batch: TrainBatch,
    algorithm: AlgorithmConfig,
    ranks: SequenceRanks,
    device: torch.device,
) -> dict[str, float]:
    """Make the advantages of rewards less beta x KL; with a critic, leave the KL of the tokens to it.

    Args:
        mini_batches: those of this rank, with old and reference log-probabilities.
        num_tokens_S: [S'] completion tokens of each sample in the mini-batches of all ranks.

    Returns:
        Metrics.

    Raises:
        NonFiniteError: see `kl_of_samples`.
    """
    micro_batches = [data for mini_batch in mini_batches for data in mini_batch]
    kl_S = kl_of_samples(micro_batches, batch, algorithm, ranks, device)
    if algorithm.advantage != "gae":
        set_advantages(micro_batches, batch, kl_S, algorithm)
    return metrics(num_tokens_S, kl_S, algorithm.beta)


@torch.no_grad()
def kl_of_samples(
    micro_batches: Sequence[MicroBatchData],
    batch: TrainBatch,
    algorithm: AlgorithmConfig,
    ranks: SequenceRanks,
    device: torch.device,
) -> Tensor:
    """Fill in `kl_C`; returns its sum over the tokens of each sample.

    Args:
        micro_batches: those of this rank, with old and reference log-probabilities.
        batch: the whole batch, of all ranks.
        ranks: the ranks that share their micro-batches with this one; the first of them counts.

    Returns:
        [S] float64, the same on every rank; 0 for samples that no rank has.

    Raises:
        NonFiniteError: on all ranks alike, naming the sample.
    """
    kl_S = torch.zeros(len(batch.samples), dtype=torch.float64, device=device)
    for data in micro_batches:
        old_logps_C = data.rollout_logps_C if algorithm.old_logprobs == "rollout" else data.old_logps_C
        assert old_logps_C is not None
        assert data.ref_logps_C is not None
        data.kl_C = kl_of_tokens(old_logps_C, data.ref_logps_C, estimator=algorithm.kl_estimator)
        if not data.packed.is_dummy and ranks.rank == 0:
            # Each sample is counted by one rank, so the sum over ranks only spreads its bits.
            kl_S[_samples(data)[data.segments.lengths_S.cumsum(0) - 1]] = data.segments.sum(data.kl_C.double())
    dist.all_reduce(kl_S)
    wrong_S = ~kl_S.isfinite()
    if wrong_S.any():
        sample = batch.samples[int(wrong_S.int().argmax())]
        raise NonFiniteError(
            f"step {batch.step}: the KL of sample {sample.prompt_id}[{sample.index}] to the reference is not a finite number; "
            "the weights were left as they are. Lower learner.learning_rate, or look at this sample"
        )
    return kl_S


def set_advantages(
    micro_batches: Sequence[MicroBatchData], batch: TrainBatch, kl_S: Tensor, algorithm: AlgorithmConfig
) -> None:
    """Fill in `advantages_C`, group advantages of R - beta sum_t KL_t; `kl_S` covers the whole batch."""
    advantages_S = penalised_advantages(batch.samples, algorithm.beta * kl_S.cpu(), algorithm).float().to(kl_S.device)
    for data in micro_batches:
        if not data.packed.is_dummy:
            data.advantages_C = advantages_S[_samples(data)]


def metrics(num_tokens_S: Sequence[int], kl_S: Tensor, beta: float) -> dict[str, float]:
    """Metrics of the samples whose KL is needed: [S'] tokens of each, and its KL."""
    if not num_tokens_S:
        return {}
    total = kl_S.sum().item()
    return {"kl/ref": total / sum(num_tokens_S), "reward/kl_penalty": beta * total / len(num_tokens_S)}


def _samples(data: MicroBatchData) -> Tensor:
    """[C] the index in the batch of each token's sample."""
    return torch.from_numpy(data.packed.samples).to(data.rollout_logps_C.device)
