"""Seeds that depend on the sample alone, not on when or where it is made."""

from __future__ import annotations

import hashlib


def sample_seed(run_seed: int, prompt_id: str, index: int) -> int:
    """A seed in [0, 2**31) for one sample of one prompt: the same after a resume, on another engine, in another order."""
    digest = hashlib.blake2b(f"{run_seed}/{prompt_id}/{index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") % 2**31


def group_seed(run_seed: int, prompt_id: str) -> int:
    """The seed of what all samples of one prompt share: the beginning of its environment's episodes."""
    return sample_seed(run_seed, f"{prompt_id}/reset", -1)
