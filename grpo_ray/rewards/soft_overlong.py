"""A penalty for answers that come near the length limit."""

from __future__ import annotations

from grpo_ray.errors import RewardError


def soft_overlong(completion_ids: list[list[int]], max_length: int, cache_length: int) -> list[float]:
    """0 up to `max_length - cache_length` tokens, then falling linearly to -1 at `max_length`, -1 beyond.

        R(T) = 0                                            T <= L_max - L_cache
               ((L_max - L_cache) - T) / L_cache            L_max - L_cache < T <= L_max
               -1                                           T > L_max

    Range [-1, 0]. Source: DAPO (2503.14476), equation 13.

    Raises:
        RewardError: `cache_length` is not in 1 .. max_length.
    """
    if not 0 < cache_length <= max_length:
        raise RewardError(
            f"reward 'soft_overlong': cache_length is {cache_length}, expected 1 to max_length ({max_length}); "
            "it is the stretch before the limit in which the fee grows"
        )
    free = max_length - cache_length
    return [min(0.0, max(-1.0, (free - len(ids)) / cache_length)) for ids in completion_ids]
