"""Rollout/training mismatch: log-probabilities that rollout engine and learner give the same tokens under the same weights.

Tokens of older weights are excluded: the movement of the policy since then is `staleness/logp_shift`, and no fault.
"""

from __future__ import annotations

from grpo_ray.algorithm.users import has_sequence_ratio
from grpo_ray.config.schema import RunConfig

MISMATCH_BOUNDS = {"float32": 1e-3, "bfloat16": 0.1}
"""The mean |rollout_logps - old_logps| by model.dtype that rounding explains, in nats. Measured: float32 1e-6 to 3e-5; bfloat16
0.01 for small random models, 0.04 for a pretrained one of 135 M parameters. Faults (another temperature, stale or broken
weights) begin at 0.3."""


def mismatch_warning(mean_abs: float, config: RunConfig) -> str | None:
    """The warning for a step's `mismatch/mean_abs`; None if rounding explains it."""
    dtype = config.model.dtype
    bound = MISMATCH_BOUNDS[dtype]
    if mean_abs <= bound:
        return None
    return (
        f"sampler and learner disagree about tokens of the same weights: mean |log-probability difference| {mean_abs:.4f}, and "
        f"rounding in {dtype} explains {bound:g}. {_mend(config)}"
    )


def _mend(config: RunConfig) -> str:
    a = config.algorithm
    if config.model.dtype == "float32":
        return (
            "Something is wrong: they do not compute the same model. Look into logs/ for what the engine says of the model, at "
            "rollout.env and model.attention; a correction would only hide it"
        )
    if a.importance_sampling is not None:
        return (
            f"algorithm.importance_sampling {a.importance_sampling} already corrects for it; model.dtype=float32 shows whether it "
            "is rounding"
        )
    kind = "sequence_truncate" if has_sequence_ratio(a) else "token_truncate"
    recompute = "algorithm.old_logprobs=recompute " if a.old_logprobs == "rollout" else ""
    return f"{recompute}algorithm.importance_sampling={kind} corrects for it; model.dtype=float32 shows whether it is rounding"
