"""Completions of one engine: whole answers, and the turns of episodes."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from actors.rollout.adapters import Adapter
from actors.rollout.sample import sample_of
from actors.rollout.vllm_options import sampling_params
from grpo_ray.data.turns import TurnEnd
from grpo_ray.episodes.episode import Generate, Generated
from grpo_ray.errors import WorkerError
from grpo_ray.loop.stops import Stops, find_stops
from grpo_ray.types import Sample, SampleRequest, SamplingParams

if TYPE_CHECKING:
    from vllm.outputs import RequestOutput


class Completions:
    """Samples completions with one AsyncLLM."""

    def __init__(
        self, engine: Any, tokenizer: Any, name: str, eos_ids: Sequence[int], turn_end: TurnEnd | None, vocab_size: int
    ) -> None:
        self._engine = engine
        self.tokenizer = tokenizer
        self.name = name
        """The engine's name."""
        self._eos_ids = eos_ids
        self._turn_end = turn_end
        self._vocab_size = vocab_size
        self._stops: dict[SamplingParams, Stops] = {}
        self._turns = itertools.count()
        """Numbers in the names of an episode's requests, so that none is used twice."""
        self.version = 0
        """The version of the weights that are in use."""

    @property
    def ends(self) -> frozenset[int]:
        """The tokens that end a turn."""
        return frozenset([*self._eos_ids, *([self._turn_end.id] if self._turn_end is not None else [])])

    def read(self, token_ids: Sequence[int], params: SamplingParams) -> str:
        """The text of tokens that were sampled with these parameters."""
        return self._stops_of(params).read(self.tokenizer, token_ids)

    async def complete(self, name: str, request: SampleRequest, adapter: Adapter | None) -> Sample:
        """Sample one completion; `name` is the request's in the engine.

        Raises:
            WorkerError: something else than the model ended it.
        """
        # What other weights have computed of the same prompt is not for this sample, wherever it is kept.
        prompt = {"prompt_token_ids": request.prompt_token_ids, "cache_salt": str(self.version)}
        params = sampling_params(request, self._stops_of(request.params))
        lora = adapter.request if adapter is not None else None
        final: RequestOutput | None = None
        async for output in self._engine.generate(prompt, params, name, lora_request=lora):
            final = output
        assert final is not None
        completion = final.outputs[0]
        if completion.finish_reason not in ("stop", "length"):
            raise WorkerError(f"finish_reason {completion.finish_reason}")
        version = None if adapter is None else adapter.version
        text = self.read(list(completion.token_ids), request.params)
        return sample_of(request, completion, version, text, self.name)

    def turns(self, ticket: int, request: SampleRequest, adapter: Adapter | None) -> Generate:
        """A sampler of the turns of this request's episode, all under one adapter."""

        async def generate(token_ids: Sequence[int], max_tokens: int, seed: int, turn: int) -> Generated:
            params = replace(request.params, max_tokens=max_tokens)
            asked = SampleRequest(request.prompt_id, request.index, list(token_ids), seed, params)
            return Generated.of(await self.complete(f"{ticket}.{turn}.{next(self._turns)}", asked, adapter))

        return generate

    def _stops_of(self, params: SamplingParams) -> Stops:
        # Turns differ in what is left of their budget, and in nothing that stops them.
        key = replace(params, max_tokens=1)
        if key not in self._stops:
            self._stops[key] = find_stops(
                self.tokenizer,
                self._eos_ids,
                self._turn_end,
                self._vocab_size,
                params.stop,
                params.stop_token_ids,
            )
        return self._stops[key]
