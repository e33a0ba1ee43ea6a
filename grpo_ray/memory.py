"""What a run will hold in memory, before anything is loaded. An estimate for `grpo-ray check`, not a promise.

ZeRO's accounting (Rajbhandari et al., 1910.02054, section 3.1): with mixed-precision Adam a parameter costs 2 bytes of weight,
4 of accumulated gradient here, and 12 of fp32 master, momentum and variance; stage 1 splits the last, stage 2 the gradient
too, stage 3 everything.
"""

from __future__ import annotations

from dataclasses import dataclass

from grpo_ray.config import LearnerConfig, ModelConfig


@dataclass(frozen=True)
class LearnerMemory:
    """Bytes of one learner rank."""

    weights: int
    gradients: int
    optimizer: int
    reference: int
    logits: int
    """One chunk of logits in fp32 and its gradient."""

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.reference + self.logits


def learner_memory(
    num_params: int, vocab_size: int, model: ModelConfig, learner: LearnerConfig, *, reference: bool, on_gpu: bool
) -> LearnerMemory:
    """Without activations, which depend on micro_batch_tokens and gradient_checkpointing."""
    from grpo_ray.logprobs import chunk_rows

    ranks, stage = learner.num_actors, learner.zero_stage
    width = 2 if model.dtype == "bfloat16" else 4
    master = 4 if width == 2 else 0
    split = [ranks if stage >= s else 1 for s in (3, 2, 1)]
    return LearnerMemory(
        weights=num_params * width // split[0],
        gradients=num_params * 4 // split[1],
        optimizer=0 if learner.offload_optimizer else num_params * (master + 8) // split[2],
        reference=num_params * width // split[0] if reference else 0,
        logits=2 * 4 * (learner.logprob_chunk_tokens or chunk_rows(vocab_size, on_gpu=on_gpu)) * vocab_size,
    )
