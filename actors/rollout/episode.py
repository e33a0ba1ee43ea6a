"""Episodes of one rollout engine: a request -> an environment -> its turns -> a sample with its rewards.

    acquire -> reset -> prompt -> [generate -> answer] x turns -> rewards -> release
       ^                                  |
       +--- once more: it failed ---------+

The environment stays alive until its rewards are computed, which is the last thing that is asked of it.
"""

from __future__ import annotations

import asyncio
import json
import math
import pickle
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np

from actors.environment.client import EnvironmentClient, EnvironmentSession
from actors.rollout.completions import Completions
from actors.rollout.tool_parser import reader
from grpo_ray.config.environment import COLUMN, EnvironmentConfig
from grpo_ray.config.schema import RunConfig
from grpo_ray.data.templates import TOOLS, make_template
from grpo_ray.data.thinking import opens_thinking
from grpo_ray.episodes.calls import ToolCall, no_calls, shortened
from grpo_ray.episodes.described import Described
from grpo_ray.episodes.episode import (
    Budgets,
    EnvironmentFailedError,
    Generate,
    Message,
    Played,
    Rules,
    play,
)
from grpo_ray.episodes.suffix import TEMPLATE, TurnSuffixes
from grpo_ray.episodes.templates import episode_template, with_template
from grpo_ray.errors import ConfigError, DataError
from grpo_ray.rewards.functions.function import ScoreInputs
from grpo_ray.types import (
    Episode,
    EpisodeFigures,
    EpisodeStart,
    RewardScore,
    Sample,
    SampleRequest,
    ScoreStatus,
    Step,
)

SUFFIXES = 1024
"""The suffixes that are kept: a text game says the same few things again and again, and a template takes a millisecond."""
DRAWS = 2
"""An episode whose environment fails is drawn again once."""


@dataclass(frozen=True)
class EpisodeOptions:
    """What an engine has to know of a run's episodes."""

    environment: EnvironmentConfig
    template: str
    system: str | None
    template_kwargs: dict[str, Any]
    max_prompt_length: int
    rewards_steps: bool
    """Whether each step of a text game is rewarded by itself (`algorithm.advantage: process`)."""

    @property
    def chat_template_kwargs(self) -> dict[str, Any]:
        """The arguments of the chat template, with the name of the one of several that is used."""
        name = self.template.partition(":")[2]
        return {**self.template_kwargs, **({TEMPLATE: name} if name else {})}

    @classmethod
    def of(cls, config: RunConfig) -> EpisodeOptions | None:
        """The options of a run; None: it has no environment."""
        if config.environment is None:
            return None
        data = config.data
        return cls(
            config.environment,
            data.template,
            data.system,
            dict(data.chat_template_kwargs),
            data.max_prompt_length,
            config.algorithm.advantage == "process",
        )


@dataclass
class _Attempt:
    """One attempt at an episode, as far as it came."""

    played: Played
    title: str
    scores: list[RewardScore] = field(default_factory=list)
    failure: RewardScore | None = None


class Episodes:
    """Plays the episodes of an engine. All methods belong to one event loop."""

    def __init__(self, options: EpisodeOptions, completions: Completions, max_length: int) -> None:
        """`max_length`: the tokens that the engine holds of one sample, prompt included."""
        self._completions = completions
        self._ends = completions.ends
        self._options = options
        self._config = options.environment
        self._tokenizer = with_template(completions.tokenizer, options.environment.template)
        self._max_length = max_length
        self._template = make_template(options.template, self._tokenizer, options.system, options.template_kwargs)
        self._rules: dict[tuple[str, int], Rules] = {}
        self.client = EnvironmentClient(completions.name)

    async def draw(self, request: SampleRequest, generate: Generate) -> tuple[Sample, EpisodeFigures]:
        """The sample of one episode, with its rewards, or why there are none; `generate` samples one turn."""
        assert request.episode is not None
        failures: list[str] = []
        for _ in range(DRAWS):
            attempt = await self._attempt(request, request.episode, generate)
            if attempt.failure is None:
                break
            failures.append(attempt.failure.status.value)
        played = attempt.played
        sample = Sample(
            prompt_id=request.prompt_id,
            index=request.index,
            prompt_token_ids=np.asarray(played.prompt_token_ids, dtype=np.int32),
            token_ids=np.asarray(played.token_ids, dtype=np.int32),
            logprobs=np.asarray(played.logprobs, dtype=np.float32),
            versions=tuple(played.versions),
            finish_reason=played.finish_reason,
            text=self._completions.read(played.token_ids, request.params),
            episode=Episode(tuple(played.messages), tuple(attempt.scores), attempt.failure),
        )
        return sample, played.figures(failures)

    async def _attempt(self, request: SampleRequest, start: EpisodeStart, generate: Generate) -> _Attempt:
        columns = start.prompt.columns
        environment = str(columns.get(COLUMN)) if self._config.classes else ""
        attempt = _Attempt(Played(list(request.prompt_token_ids)), environment or "environment")
        limit_s = self._config.episode_timeout_s
        try:
            session = await self.client.acquire()
            try:
                async with asyncio.timeout(limit_s):
                    await self._play(attempt, environment, session, request, start, generate)
            finally:
                self.client.release(session)
        except TimeoutError:
            what = f"the episode did not end within {limit_s:g} s; raise environment.episode_timeout_s, or lower its budgets"
            attempt.failure = _failure(attempt.title, ScoreStatus.TIMEOUT, what)
        except EnvironmentFailedError as e:
            attempt.failure = _failure(attempt.title, e.status, e.detail)
        if attempt.failure is not None:
            attempt.played.finish_reason = "environment_failed"
        return attempt

    async def _play(
        self,
        attempt: _Attempt,
        environment: str,
        session: EnvironmentSession,
        request: SampleRequest,
        start: EpisodeStart,
        generate: Generate,
    ) -> None:
        prompt = start.prompt
        asked = prompt.asked if prompt.asked is not None else (prompt.messages or prompt.text)
        row = pickle.dumps({**prompt.columns, "prompt": asked})
        observation = await session.begin(environment, row, start.seed)
        described = self.client.described(environment)
        assert described is not None, environment
        attempt.title = described.title or attempt.title
        played = attempt.played
        played.prompt_token_ids = self._prompt_ids(request, start, observation, described)
        await play(played, session, generate, self._rules_of(environment, described, request), request.seed)
        opened = opens_thinking(prompt.text)
        inputs = ScoreInputs(
            [asked],
            [list(played.messages)],
            [list(played.token_ids)],
            {name: [value] for name, value in prompt.columns.items()},
            [start.step],
            [opened],
            start.trainer,
            environments=[],
        )
        ended = await session.end(pickle.dumps(inputs), len(played.token_ids))
        own = self._own_reward(played, described, ended.reward)
        attempt.scores = [*([own] if own is not None else []), *ended.scores]

    def _own_reward(self, played: Played, described: Described, reward: float | None) -> RewardScore | None:
        """The environment's reward: of a text game the sum over its steps, and what it gives at the end."""
        name = described.title
        if not described.is_game:
            if not described.rewards:
                return None
            if reward is None:
                return RewardScore(name, ScoreStatus.NOT_APPLICABLE, math.nan)
            return RewardScore(name, ScoreStatus.OK, reward)
        if reward is not None:
            played.steps.append(Step(len(played.token_ids) - 1, reward))
        found = played.reward_of_steps(name, as_steps=self._options.rewards_steps)
        return found or RewardScore(name, ScoreStatus.OK, 0.0)

    def _prompt_ids(
        self, request: SampleRequest, start: EpisodeStart, observation: Any, described: Described
    ) -> list[int]:
        if observation in (None, "") and not described.schemas and self._config.template is None:
            return list(request.prompt_token_ids)
        messages = begun(start.prompt.messages or [], observation, self._config.max_result_chars)
        tools = {TOOLS: list(described.schemas)} if described.schemas else {}
        try:
            rendered = self._template(messages, {**start.prompt.columns, **tools})
        except DataError as e:
            raise EnvironmentFailedError(ScoreStatus.ERROR, f"the environment's observation: {e}") from None
        ids = self._tokenizer(rendered.text, add_special_tokens=rendered.add_special_tokens)["input_ids"]
        limit = self._options.max_prompt_length
        if len(ids) > limit:
            raise EnvironmentFailedError(
                ScoreStatus.ERROR,
                f"with its environment's tools and first text the prompt is {len(ids)} tokens, more than data.max_prompt_length "
                f"({limit}); raise it, or shorten them",
            )
        return list(ids)

    def _rules_of(self, environment: str, described: Described, request: SampleRequest) -> Rules:
        key = (environment, request.params.max_tokens)
        if key not in self._rules:
            self._rules[key] = self._new_rules(described, request.params.max_tokens)
        return self._rules[key]

    def _new_rules(self, described: Described, max_tokens: int) -> Rules:
        c, schemas = self._config, list(described.schemas) or None
        role = "user" if described.is_game else "tool"
        kwargs = self._options.chat_template_kwargs
        found = episode_template(self._tokenizer, c.template, schemas, kwargs, roles=(role,))
        suffixes = TurnSuffixes(self._tokenizer, found.text, schemas, kwargs)

        @lru_cache(maxsize=SUFFIXES)
        def after(messages: str, calls: tuple[str, ...]) -> list[int]:
            return suffixes.after(json.loads(messages), calls=calls)

        def suffix(messages: list[Message], calls: tuple[ToolCall, ...], last: int) -> list[int]:
            try:
                ids = after(json.dumps(messages), tuple(call.name for call in calls))
            except (ConfigError, DataError) as e:
                raise EnvironmentFailedError(ScoreStatus.ERROR, f"what the environment said: {e}") from None
            # A turn that another stop ended lacks what the template ends one with.
            return ids if last in self._ends else [suffixes.end_id, *ids]

        tools = frozenset(schema["function"]["name"] for schema in described.schemas)
        return Rules(
            Budgets(max_tokens, self._max_length, c.max_turns, c.max_tool_calls, c.max_turn_tokens, c.max_result_chars),
            described.is_game,
            tools,
            reader(c.tool_parser, self._tokenizer, described.schemas) if tools else no_calls,
            suffix,
        )


def begun(messages: list[Message], observation: Any, max_chars: int | None) -> list[Message]:
    """The conversation with what `reset` gave: text and content blocks are appended to the last message, messages take its
    place."""
    if observation is None or not messages:
        return messages
    if isinstance(observation, list) and observation and all(isinstance(m, dict) and "role" in m for m in observation):
        system = [m for m in messages[:1] if m["role"] == "system" and observation[0]["role"] != "system"]
        return [*system, *observation]
    *before, last = messages
    content = last["content"]
    if isinstance(observation, list):
        blocks = content if isinstance(content, list) else [{"type": "text", "text": content}]
        return [*before, {**last, "content": [*blocks, *observation]}]
    text = shortened(str(observation), max_chars)
    if isinstance(content, list):
        return [*before, {**last, "content": [*content, {"type": "text", "text": text}]}]
    return [*before, {**last, "content": f"{content}{text}"}]


def _failure(name: str, status: ScoreStatus, detail: str) -> RewardScore:
    return RewardScore(name, status, math.nan, detail)
