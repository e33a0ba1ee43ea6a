"""`grpo_ray.loop.roles.SampleStore` in Ray's object store."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import ray

from actors.runtime import within
from grpo_ray.errors import LostSamplesError
from grpo_ray.types import Sample


class RaySamples:
    """Puts lists of samples into the object store and fetches them by reference."""

    async def fetch(self, refs: list[Any]) -> list[Sequence[Sample]]:
        """Fetch the lists behind the references; raises LostSamplesError."""
        reading = asyncio.gather(*refs)
        try:
            return list(await within(reading, 60, "reading samples to write them down", "tracking.rollouts"))
        except ray.exceptions.ObjectLostError as e:
            raise LostSamplesError(f"samples can't be written down, their node died: {e}") from None

    def put(self, samples: list[Sample]) -> Any:
        return ray.put(samples)
