"""One reward worker: it fetches the texts, has them scored in a process that it can kill, and sums up.

ScoreRequest -> (ray.get) Sample -> ScoreInputs -> [scoring process] -> RewardScore -> Score
"""

from __future__ import annotations

import asyncio
import math
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import ray

from actors.reward.episodes import brought, completion_of, episode_of, failed_score, with_brought
from actors.reward.processes import ScoringProcesses
from actors.runtime import own_process, use_batch_scheduling
from grpo_ray.config.reward import RewardConfig
from grpo_ray.data.thinking import opens_thinking
from grpo_ray.errors import RewardError
from grpo_ray.rewards.functions.function import NOT_COLUMNS, Conversation, ScoreInputs
from grpo_ray.types import RewardScore, Sample, Score, ScoreRequest, ScoreStatus

FETCH_TIMEOUT_S = 60.0


class RewardActor:
    """A reward worker, made into a Ray actor by `RewardPool`. `start` has to be called first."""

    def __init__(
        self, config: RewardConfig, run_dir: str, name: str, start_timeout_s: float, with_environments: bool = False
    ) -> None:
        self._config = config
        self._names = [f.title for f in config.functions]
        self._weights = [f.weight for f in config.functions]
        self._log = own_process(run_dir, name)
        use_batch_scheduling()
        self._process = ScoringProcesses(config, start_timeout_s, with_environments=with_environments)
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="scoring")
        self._turn = asyncio.Lock()

    async def start(self) -> int:
        """Import every reward function; returns this actor's process id.

        Raises:
            RewardError: naming the function that can't be imported.
        """
        try:
            await self._on_thread(self._process.start)
        except RewardError as e:
            raise RewardError(f"{e} (log: {self._log})") from None
        return os.getpid()

    async def score(self, groups: list[list[ScoreRequest]]) -> list[list[Score]]:
        """Score each list of requests: by `reward.unit` sample by sample, each list in one call, or all of them.

        A failing function, or a sample whose object is lost, is a `Score` with that status.

        Raises:
            RewardError: the scoring process can't be started again.
        """
        texts = await self._fetch([request for group in groups for request in group])
        async with self._turn:
            scores: list[list[Score]] = await self._on_thread(self._score, groups, texts)
            return scores

    async def ping(self) -> None:
        """Answer at any time: scoring has a thread of its own."""

    async def stop(self) -> None:
        """Kill the scoring process and all that it started, also in the middle of a call."""
        self._process.stop()
        async with self._turn:
            await self._on_thread(self._process.kill)

    async def _on_thread(self, function: Any, *args: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._thread, function, *args)

    async def _fetch(self, requests: Sequence[ScoreRequest]) -> dict[int, list[Sample] | str]:
        """id of the reference -> its samples, or why they are unavailable. Each object is fetched once."""
        refs = {id(r.sample.ref): r.sample.ref for r in requests}
        unique = {ref: ref for ref in refs.values() if isinstance(ref, ray.ObjectRef)}
        fetched = dict(zip(unique, await asyncio.gather(*(_get(ref) for ref in unique)), strict=True))
        return {key: fetched[ref] if isinstance(ref, ray.ObjectRef) else ref for key, ref in refs.items()}

    def _score(self, groups: list[list[ScoreRequest]], texts: dict[int, list[Sample] | str]) -> list[list[Score]]:
        whole = [self._process.takes_whole(f) for f in range(len(self._weights))]
        units = _units(groups, self._config.unit if any(whole) else "sample")
        lost = [_first_loss(unit, texts) for unit in units]
        live = [[] if loss else self._live(unit, texts) for unit, loss in zip(units, lost, strict=True)]
        called = [self._called(requests, texts) for requests in live]
        calls = [
            (f, build_inputs(part, texts, templated=self._config.functions[f].built_in))
            for functions, requests in zip(called, live, strict=True)
            for f in functions
            for part in ([requests] if whole[f] else [[request] for request in requests])
        ]
        results = (result for call in self._process.run(calls) for result in call)
        scores: list[Score] = []
        for u, unit in enumerate(units):
            if lost[u]:
                scores += [Score(ScoreStatus.CRASHED, math.nan, (), lost[u]) for _ in unit]
                continue
            parts = {self._names[f]: iter([next(results) for _ in live[u]]) for f in called[u]}
            scores += [self._summed(request, texts, parts) for request in unit]
        rest = iter(scores)
        return [[next(rest) for _ in group] for group in groups]

    def _live(self, unit: list[ScoreRequest], texts: dict[int, list[Sample] | str]) -> list[ScoreRequest]:
        """The samples that functions are called with: not those whose environment failed."""
        return [request for request in unit if failed_score(_sample(request, texts)) is None]

    def _called(self, requests: list[ScoreRequest], texts: dict[int, list[Sample] | str]) -> list[int]:
        """The functions that these samples do not bring the results of."""
        if not requests:
            return []
        there = brought(_sample(requests[0], texts))
        return [f for f, name in enumerate(self._names) if name not in there]

    def _summed(
        self, request: ScoreRequest, texts: dict[int, list[Sample] | str], parts: dict[str, Iterator[RewardScore]]
    ) -> Score:
        sample = _sample(request, texts)
        if (failed := failed_score(sample)) is not None:
            return failed
        computed = {name: next(results) for name, results in parts.items()}
        return with_brought(self._names, self._weights, computed, sample, request.sample.num_tokens)


def _units(groups: list[list[ScoreRequest]], unit: str) -> list[list[ScoreRequest]]:
    """The units: the requests that functions are called with at once."""
    if unit in ("auto", "group"):
        return groups
    single = [request for group in groups for request in group]
    return [single] if unit == "batch" else [[request] for request in single]


async def _get(ref: Any) -> list[Sample] | str:
    try:
        samples: list[Sample] = await asyncio.wait_for(ref, FETCH_TIMEOUT_S)
        return samples
    except (ray.exceptions.RayError, TimeoutError) as e:
        return f"the sample's object could not be fetched ({type(e).__name__}): its rollout actor may have died"


def _sample(request: ScoreRequest, texts: dict[int, list[Sample] | str]) -> Sample | str:
    return texts[id(request.sample.ref)][request.sample.row]


def _first_loss(unit: list[ScoreRequest], texts: dict[int, list[Sample] | str]) -> str:
    for request in unit:
        found = texts[id(request.sample.ref)]
        if isinstance(found, str):
            return f"{request.sample.prompt_id}#{request.sample.index} from {request.sample.worker}: {found}"
    return ""


def build_inputs(
    unit: Sequence[ScoreRequest], texts: dict[int, list[Sample] | str], *, templated: bool = False
) -> ScoreInputs:
    """The functions' inputs for these samples, in TRL's form: prompts as in the rows, or, for built-ins, `templated`: the
    conversations that the model was prompted with.

    A conversation that ends with an assistant message is a prefill: as in TRL, it moves from prompt to completion.
    """
    samples = [texts[id(r.sample.ref)][r.sample.row] for r in unit]
    texts_of_samples = [s.text if isinstance(s, Sample) else s for s in samples]
    ids = [s.token_ids.tolist() if isinstance(s, Sample) else [] for s in samples]
    names = {name: None for r in unit for name in r.columns if name not in NOT_COLUMNS}
    columns = {name: [r.columns.get(name) for r in unit] for name in names}
    steps = [r.step for r in unit]
    trainer = max((r.trainer for r in unit if r.trainer is not None), key=lambda t: t.global_step, default=None)
    turns = [_turns(_prompt(r, templated), text) for r, text in zip(unit, texts_of_samples, strict=True)]
    prompts, completions = [prompt for prompt, _ in turns], [completion for _, completion in turns]
    for i, sample in enumerate(samples):
        if (episode := episode_of(sample)) is not None:
            completions[i] = completion_of(episode, last_answer=templated)
    opened = [opens_thinking(r.prompt_text) for r in unit]
    return ScoreInputs(prompts, completions, ids, columns, steps, opened, trainer)


def _prompt(request: ScoreRequest, templated: bool) -> str | Conversation:
    if not templated and request.asked is not None:
        return request.asked
    return request.prompt_text if request.messages is None else request.messages


def _turns(prompt: str | Conversation, text: str) -> tuple[str | Conversation, str | Conversation]:
    return (prompt, text) if isinstance(prompt, str) else _conversation(prompt, text)


def _conversation(messages: Conversation, text: str) -> tuple[Conversation, Conversation]:
    prefilled = bool(messages) and messages[-1]["role"] == "assistant"
    prefix = str(messages[-1]["content"]) if prefilled else ""
    return (messages[:-1] if prefilled else messages), [{"role": "assistant", "content": prefix + text}]
