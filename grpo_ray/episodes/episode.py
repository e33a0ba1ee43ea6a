"""One episode, over Protocols: turns of the model and of its environment, in one sequence of tokens.

    prompt -> [generate -> read -> the environment answers -> suffix] x turns -> rewards

Ids go in and ids come out: the prompt of each turn is all ids before it and those of the suffix, so nothing that the model wrote is
ever decoded and encoded again. What no version covers is the environment's.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from typing import Any, Protocol

from grpo_ray.episodes.calls import ReadCalls, ToolCall, shortened
from grpo_ray.episodes.calls import Turn as ReadTurn
from grpo_ray.episodes.contract import Stepped
from grpo_ray.seeds import sample_seed
from grpo_ray.types import EpisodeFigures, RewardScore, Sample, ScoreStatus, Step, VersionSpan

UNKNOWN = "(unknown)"
"""The name under which calls of tools that do not exist are counted: the model makes them up."""
Content = str | list[Any]
Message = dict[str, Any]


class EnvironmentFailedError(Exception):
    """An environment that did not do its part: a status, never a reward."""

    def __init__(self, status: ScoreStatus, detail: str) -> None:
        super().__init__(detail)
        self.status = status
        self.detail = detail


@dataclass(frozen=True)
class Generated:
    """What the model wrote in one turn."""

    token_ids: list[int]
    logprobs: list[float]
    versions: tuple[VersionSpan, ...]
    """Spans that cover the turn's own tokens."""
    finish_reason: str
    """`stop` or `length`."""
    text: str

    @classmethod
    def of(cls, sample: Sample) -> Generated:
        """The turn that a whole completion is."""
        return cls(
            sample.token_ids.tolist(), sample.logprobs.tolist(), sample.versions, sample.finish_reason, sample.text
        )


class Generate(Protocol):
    async def __call__(self, token_ids: Sequence[int], max_tokens: int, seed: int, turn: int) -> Generated:
        """Sample one turn after these tokens."""
        ...


class Session(Protocol):
    """One live environment, for one episode. Every method ends within its deadline, or raises EnvironmentFailedError."""

    async def call(self, call: ToolCall) -> tuple[Content, bool]:
        """Answer one call: the content of the tool's message, and whether it is an error."""
        ...

    async def step(self, action: str) -> Stepped:
        """Play one action of a text game."""
        ...


@dataclass(frozen=True)
class Budgets:
    """What bounds an episode."""

    max_tokens: int
    """The tokens of the whole episode after its prompt, the environment's included."""
    max_length: int
    """The tokens that the engine can hold, prompt included."""
    max_turns: int | None = None
    max_tool_calls: int | None = None
    max_turn_tokens: int | None = None
    max_result_chars: int | None = None


@dataclass
class Played:
    """What has been played of an episode."""

    prompt_token_ids: list[int]
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    """The log-probability of each token that was sampled, 0 at the environment's."""
    versions: list[VersionSpan] = field(default_factory=list)
    messages: list[Message] = field(default_factory=list)
    finish_reason: str = ""
    steps: list[Step] = field(default_factory=list)
    """The rewards of a text game's steps, each at the end of the turn that took it."""
    num_turns: int = 0
    calls: Counter[str] = field(default_factory=Counter)
    num_errors: int = 0
    seconds: float = 0.0
    """The time that the environment took."""

    def add_turn(self, turn: Generated) -> None:
        start = len(self.token_ids)
        self.versions += [replace(v, start=v.start + start, end=v.end + start) for v in turn.versions]
        self.token_ids += turn.token_ids
        self.logprobs += turn.logprobs
        self.num_turns += 1

    def add_suffix(self, ids: Sequence[int], messages: Sequence[Message]) -> None:
        self.token_ids += ids
        self.logprobs += [0.0] * len(ids)
        self.messages += messages

    def figures(self, failures: Sequence[str] = ()) -> EpisodeFigures:
        return EpisodeFigures(
            self.num_turns, tuple(sorted(self.calls.items())), self.num_errors, self.seconds, tuple(failures)
        )

    def reward_of_steps(self, name: str, *, as_steps: bool) -> RewardScore | None:
        """The reward of a text game: the sum over its steps. None: no step had one.

        Args:
            as_steps: whether the steps are rewarded one by one (`algorithm.advantage: process`).
        """
        if not self.steps:
            return None
        value = sum(step.value for step in self.steps)
        return RewardScore(name, ScoreStatus.OK, value, steps=tuple(self.steps) if as_steps else ())


@dataclass(frozen=True)
class Rules:
    """What an episode is played by."""

    budgets: Budgets
    is_game: bool
    tools: frozenset[str]
    """The names of the tools that there are."""
    read: ReadCalls
    """Takes a text of the model apart."""
    suffix: Callable[[list[Message], tuple[ToolCall, ...], int], list[int]]
    """(new messages, the calls that they answer, the last sampled token) -> the ids up to the model's next turn."""


async def play(played: Played, session: Session, generate: Generate, rules: Rules, seed: int) -> None:
    """Play an episode to its end, into `played`.

    Args:
        seed: the sample's seed; every turn has one of its own.

    Raises:
        EnvironmentFailedError: the environment did not do its part.
    """
    budgets = rules.budgets
    for turn in count(1):
        limit = _room(played, budgets)
        if limit <= 0:
            played.finish_reason = _full(played, budgets)
            return
        asked = min(limit, budgets.max_turn_tokens or limit)
        wrote = await generate(
            [*played.prompt_token_ids, *played.token_ids], asked, sample_seed(seed, "turn", turn), turn
        )
        played.add_turn(wrote)
        read = ReadTurn(wrote.text) if rules.is_game else rules.read(wrote.text)
        played.messages.append(read.message)
        if wrote.finish_reason == "length":
            cut_by_budget = asked == limit
            played.finish_reason = _full(played, budgets) if cut_by_budget else "length"
            return
        answers = await _answer(played, session, read, rules)
        if played.finish_reason:
            return
        if budgets.max_turns is not None and turn >= budgets.max_turns:
            played.finish_reason = "max_turns"
            return
        ids = rules.suffix(answers, read.calls, wrote.token_ids[-1])
        if len(ids) >= _room(played, budgets):
            # No token of the model's would follow: the episode ends as it stands.
            played.finish_reason = _full(played, budgets)
            return
        played.add_suffix(ids, answers)


async def _answer(played: Played, session: Session, read: ReadTurn, rules: Rules) -> list[Message]:
    """What the environment answers to a turn; sets `finish_reason` where that was the last one."""
    began = time.monotonic()
    try:
        if rules.is_game:
            return await _step(played, session, read.content, rules.budgets)
        return await _call(played, session, read, rules)
    finally:
        played.seconds += time.monotonic() - began


async def _step(played: Played, session: Session, action: str, budgets: Budgets) -> list[Message]:
    stepped = await session.step(action)
    if stepped.reward is not None:
        played.steps.append(Step(len(played.token_ids) - 1, stepped.reward))
    if stepped.done:
        played.finish_reason = "environment_done"
    return [_within(message, budgets) for message in stepped.messages]


async def _call(played: Played, session: Session, read: ReadTurn, rules: Rules) -> list[Message]:
    """Answer all calls of a turn in their order, or none of them."""
    budgets = rules.budgets
    if read.broken or not read.calls:
        played.finish_reason = "parse_error" if read.broken else "stop"
        return []
    if budgets.max_tool_calls is not None and played.calls.total() + len(read.calls) > budgets.max_tool_calls:
        played.finish_reason = "max_tool_calls"
        return []
    answers = []
    for call in read.calls:
        content, is_error = await session.call(call)
        played.calls[call.name if call.name in rules.tools else UNKNOWN] += 1
        played.num_errors += is_error
        answers.append(_within({"role": "tool", "name": call.name, "content": content}, budgets))
    return answers


def _within(message: Message, budgets: Budgets) -> Message:
    content = message.get("content")
    if not isinstance(content, str):
        return message
    return {**message, "content": shortened(content, budgets.max_result_chars)}


def _room(played: Played, budgets: Budgets) -> int:
    """The tokens that the episode has left."""
    used = len(played.token_ids)
    return min(budgets.max_tokens - used, budgets.max_length - len(played.prompt_token_ids) - used)


def _full(played: Played, budgets: Budgets) -> str:
    """Which of the two bounds an episode meets first."""
    by_context = budgets.max_length - len(played.prompt_token_ids) < budgets.max_tokens
    return "context_overflow" if by_context else "length"
