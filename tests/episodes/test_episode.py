"""The turns of an episode, over a scripted model and a scripted environment: tokens, budgets, ends."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest

from grpo_ray.episodes.calls import ToolCall, Turn, read_hermes
from grpo_ray.episodes.contract import Stepped
from grpo_ray.episodes.episode import UNKNOWN, Budgets, Generated, Played, Rules, play
from grpo_ray.types import Step, VersionSpan

PROMPT = [1, 2, 3]
END = 9


@dataclass
class Model:
    """Writes these texts, a token for each character and one that ends the turn; or what fits."""

    texts: list[str]
    seen: list[tuple[list[int], int, int]] = field(default_factory=list)

    async def __call__(self, token_ids: Sequence[int], max_tokens: int, seed: int, turn: int) -> Generated:
        self.seen.append((list(token_ids), max_tokens, seed))
        ids = [*(100 + ord(c) for c in self.texts[turn - 1]), END]
        cut = ids[:max_tokens]
        spans = (VersionSpan(turn, 0, len(cut)),)
        reason = "stop" if cut == ids else "length"
        return Generated(cut, [-float(turn)] * len(cut), spans, reason, self.texts[turn - 1][: len(cut)])


@dataclass
class World:
    """Answers each call with its arguments, and each action with `ok`, until `done_after` of them."""

    done_after: int = 100
    reward: float | None = 1.0
    answer: str = "ok"
    heard: list[Any] = field(default_factory=list)

    async def call(self, call: ToolCall) -> tuple[str, bool]:
        self.heard.append(call)
        return f"{call.name}!", call.name == "wrong"

    async def step(self, action: str) -> Stepped:
        self.heard.append(action)
        done = len(self.heard) >= self.done_after
        return Stepped([{"role": "user", "content": self.answer}], self.reward, done)


def suffix(messages: list[dict[str, Any]], calls: tuple[ToolCall, ...], last: int) -> list[int]:
    """Two tokens, whatever is said."""
    return [50, 51]


def played(
    texts: list[str],
    world: World,
    *,
    tools: bool = False,
    max_tokens: int = 100,
    max_length: int = 1000,
    **budgets: Any,
) -> tuple[Played, Model]:
    model, out = Model(texts), Played(list(PROMPT))
    limits = Budgets(max_tokens, max_length, **budgets)
    rules = Rules(limits, not tools, frozenset({"f", "g"}), read_hermes, suffix)
    asyncio.run(play(out, world, model, rules, seed=7))
    return out, model


def sampled(out: Played) -> list[bool]:
    covered = [False] * len(out.token_ids)
    for span in out.versions:
        covered[span.start : span.end] = [True] * (span.end - span.start)
    return covered


def test_the_prompt_of_each_turn_is_every_id_before_it_and_the_suffix() -> None:
    out, model = played(["ab", "c", "d"], World(done_after=3))
    first, second, third = (ids for ids, _, _ in model.seen)
    assert first == PROMPT
    assert second == [*PROMPT, 197, 198, END, 50, 51]
    assert third == [*second, 199, END, 50, 51]
    assert [*PROMPT, *out.token_ids] == [*third, 200, END]
    assert out.finish_reason == "environment_done"
    assert out.versions == [VersionSpan(1, 0, 3), VersionSpan(2, 5, 7), VersionSpan(3, 9, 11)]
    assert sampled(out) == [lp != 0 for lp in out.logprobs]
    assert [m["role"] for m in out.messages] == ["assistant", "user", "assistant", "user", "assistant"]
    assert out.steps == [Step(2, 1.0), Step(6, 1.0), Step(10, 1.0)]


def test_every_turn_draws_by_a_seed_of_its_own_and_a_second_draw_by_the_same() -> None:
    seeds = [[seed for _, _, seed in played(["a"] * 4, World(done_after=4))[1].seen] for _ in range(2)]
    assert len(set(seeds[0])) == 4
    assert seeds[0] == seeds[1]


@pytest.mark.parametrize(
    ("max_tokens", "num_turns", "num_tokens", "reason"),
    [
        (1, 1, 1, "length"),  # The first turn is cut.
        (2, 1, 2, "length"),  # It is whole and fills the budget: nothing may follow.
        (3, 1, 2, "length"),  # The suffix would not fit.
        (4, 1, 2, "length"),  # The suffix would fill it, and no token of the model's would follow.
        (5, 2, 5, "length"),  # One token more.
        (6, 2, 6, "environment_done"),  # Done and full at once.
    ],
)
def test_the_budget_of_tokens_bounds_the_whole_episode(
    max_tokens: int, num_turns: int, num_tokens: int, reason: str
) -> None:
    world = World(done_after=2)
    out, model = played(["a", "b", "c"], world, max_tokens=max_tokens)
    assert (out.num_turns, len(out.token_ids), out.finish_reason) == (num_turns, num_tokens, reason)
    assert all(asked > 0 for _, asked, _ in model.seen)
    assert sampled(out)[-1]
    assert len(out.messages) == 2 * num_turns - 1


def test_no_turn_and_no_step_follows_one_that_was_cut() -> None:
    world = World()
    out, model = played(["abc", "d"], world, max_turn_tokens=2)
    assert (out.finish_reason, len(model.seen), world.heard) == ("length", 1, [])
    assert len(out.token_ids) == 2


def test_what_the_engine_can_hold_bounds_it_too_and_is_told_apart() -> None:
    out, _ = played(["a", "b", "c"], World(), max_length=len(PROMPT) + 5)
    assert (out.finish_reason, len(out.token_ids)) == ("context_overflow", 5)
    out, model = played(["a"], World(), max_length=len(PROMPT))
    assert (out.finish_reason, out.token_ids, model.seen) == ("context_overflow", [], [])


@pytest.mark.parametrize("limit", [1, 2])
def test_the_last_turn_that_is_allowed_is_played_and_nothing_follows_it(limit: int) -> None:
    world = World()
    out, _ = played(["a"] * 5, world, max_turns=limit)
    assert (out.finish_reason, out.num_turns, len(world.heard)) == ("max_turns", limit, limit)
    assert sampled(out)[-1]


def call(*names: str) -> str:
    return "".join(f'<tool_call>{{"name": "{name}", "arguments": {{}}}}</tool_call>' for name in names)


def test_all_calls_of_a_turn_are_answered_in_their_order() -> None:
    world = World()
    out, _ = played([f"x {call('g', 'f', 'wrong')}", "done"], world, tools=True, max_tokens=1000)
    assert [c.name for c in world.heard] == ["g", "f", "wrong"]
    assistant, *answers, last = out.messages
    assert [c["function"]["name"] for c in assistant["tool_calls"]] == ["g", "f", "wrong"]
    assert assistant["content"] == "x"
    assert answers == [{"role": "tool", "name": n, "content": f"{n}!"} for n in ("g", "f", "wrong")]
    assert last == {"role": "assistant", "content": "done"}
    assert out.finish_reason == "stop"
    assert (dict(out.calls), out.num_errors) == ({"g": 1, "f": 1, UNKNOWN: 1}, 1)


@pytest.mark.parametrize(
    ("limit", "num_heard", "reason"), [(0, 0, "max_tool_calls"), (1, 1, "max_tool_calls"), (3, 3, "stop")]
)
def test_a_turn_over_the_budget_of_calls_is_the_last_and_is_not_answered(
    limit: int, num_heard: int, reason: str
) -> None:
    world = World()
    out, _ = played([call("f"), call("f", "g"), "done"], world, tools=True, max_tokens=1000, max_tool_calls=limit)
    assert (len(world.heard), out.finish_reason) == (num_heard, reason)
    assert sampled(out)[-1]


def test_a_call_that_can_not_be_read_ends_the_episode() -> None:
    out, _ = played(['<tool_call>{"name": </tool_call>', "more"], World(), tools=True, max_tokens=1000)
    assert (out.finish_reason, out.num_turns) == ("parse_error", 1)


def test_a_long_answer_is_cut_and_says_so() -> None:
    out, _ = played(["a", "b"], World(done_after=2, answer="x" * 50), max_result_chars=10)
    assert out.messages[1]["content"] == "x" * 10 + "\n[cut: 40 of 50 characters are left out]"


@pytest.mark.parametrize(
    ("text", "turn"),
    [
        ("plain", Turn("plain")),
        ('<tool_call>{"name": "f"}</tool_call>', Turn("", (ToolCall("f", {}),))),
        ('<tool_call>{"name": "f", "arguments": null}</tool_call>', Turn("", (ToolCall("f", None),))),
        ('<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}</tool_call>', Turn("", (ToolCall("f", {"a": 1}),))),
        ('<tool_call>{"arguments": {}}</tool_call>', Turn("", (ToolCall("", {}),))),
        ('ok <tool_call>\n{"name": "f", "arguments": [1]}\n', Turn("ok", (ToolCall("f", [1]),))),
        ("<tool_call>[]</tool_call>", Turn("<tool_call>[]</tool_call>", broken=True)),
        ("<tool_call></tool_call>", Turn("<tool_call></tool_call>", broken=True)),
    ],
)  # fmt: skip
def test_hermes_calls_are_read_one_by_one(text: str, turn: Turn) -> None:
    assert read_hermes(text) == turn


@pytest.mark.parametrize("depth", [1, 100, 101, 900, 100_000])
def test_a_call_too_deep_to_be_sent_to_a_tool_is_none(depth: int) -> None:
    nested = '{"a":' * depth + "1" + "}" * depth
    turn = read_hermes(f'<tool_call>{{"name": "f", "arguments": {nested}}}</tool_call>')
    assert turn.broken == (depth > 100)
    assert len(turn.calls) == (depth <= 100)


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [(None, ""), ({}, ""), ([1], "a list"), ("x", "a text"), (3, "a number"), (True, "true or false")],
)
def test_arguments_that_are_no_object_are_told_to_the_model(arguments: Any, problem: str) -> None:
    told = ToolCall("f", arguments).problem
    assert told == (f"the arguments of f are {problem}, expected an object" if problem else "")
    assert ToolCall("f", arguments).message["function"]["arguments"] == (
        arguments if isinstance(arguments, dict) else {}
    )


def test_rewards_of_steps_are_summed_unless_they_are_trained_one_by_one() -> None:
    out, _ = played(["a", "b"], World(done_after=2, reward=0.5))
    summed, stepped = out.reward_of_steps("G", as_steps=False), out.reward_of_steps("G", as_steps=True)
    assert summed is not None
    assert stepped is not None
    assert (summed.value, summed.steps) == (1.0, ())
    assert (stepped.value, stepped.steps) == (1.0, (Step(1, 0.5), Step(5, 0.5)))
