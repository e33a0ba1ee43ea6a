"""Episodes of a rollout engine, with real environments in real processes; the model is scripted, and Ray is left out."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from actors.environment.actor import EnvironmentActor
from actors.environment.hosts import Hosts
from actors.environment.pool import Members
from actors.rollout.completions import Completions
from actors.rollout.episode import EpisodeOptions, Episodes, begun
from grpo_ray.config.environment import EnvironmentConfig
from grpo_ray.config.model import TinyModelConfig
from grpo_ray.config.reward import RewardFunctionConfig
from grpo_ray.episodes.described import load_all
from grpo_ray.episodes.episode import Generated
from grpo_ray.models.files.tiny import make_tokenizer
from grpo_ray.types import (
    EpisodeFigures,
    EpisodeStart,
    Prompt,
    Sample,
    SampleRequest,
    SamplingParams,
    ScoreStatus,
    VersionSpan,
)

GAMES = Path(__file__).parents[1] / "environment" / "games.py"
PARAMS = SamplingParams(1.0, 1.0, 0, 0.0, 200)
EOS = 1
LIMITS = {"reset_timeout_s": 60, "step_timeout_s": 60}


class Here(EnvironmentActor):
    """A worker in this process."""

    def __init__(self, config: EnvironmentConfig, functions: tuple[RewardFunctionConfig, ...]) -> None:
        self._config, self._functions, self._start_timeout_s, self._log = config, functions, 120.0, Path()
        self._hosts = Hosts(config, self._make)
        self._seen, self._tickets, self._watch = {}, {}, None


class Handle:
    """Calls a worker as its Ray handle does."""

    def __init__(self, worker: Any) -> None:
        self._worker = worker

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._worker, name)

        class Method:
            @staticmethod
            def remote(*args: Any) -> asyncio.Task[Any]:
                return asyncio.ensure_future(method(*args))

        return Method


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return make_tokenizer(TinyModelConfig())


def drawn(
    tokenizer: Any, environment: dict[str, Any], texts: Sequence[str], *functions: str, **columns: Any
) -> tuple[Sample, EpisodeFigures, dict[str, int]]:
    """The sample of an episode in which the model writes these texts, its figures, and what is held afterwards."""
    config = EnvironmentConfig.model_validate({**LIMITS, **environment})
    rewards = tuple(RewardFunctionConfig(name=f"{GAMES}:{name}") for name in functions)

    async def generate(token_ids: Sequence[int], max_tokens: int, seed: int, turn: int) -> Generated:
        ids = [*tokenizer(texts[turn - 1], add_special_tokens=False)["input_ids"], EOS][:max_tokens]
        spans = (VersionSpan(3, 0, len(ids)),)
        return Generated(ids, [-1.0] * len(ids), spans, "stop" if ids[-1] == EOS else "length", texts[turn - 1])

    async def whole() -> tuple[Sample, EpisodeFigures, dict[str, int]]:
        worker = Here(config, rewards)
        described = {name: asdict(loaded.described()) for name, loaded in load_all(config).items()}
        options = EpisodeOptions(config, "chat", None, {}, 100, rewards_steps=False)
        episodes = Episodes(options, Completions(None, tokenizer, "rollout-0", [EOS], None, 264), 300)
        episodes.client.use(Members((("environment-0/0", Handle(worker)),), described))
        messages = [{"role": "user", "content": "go"}]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        prompt = Prompt("rows/0/0", ids, text, messages, columns, "go")
        request = SampleRequest("rows/0/0", 2, ids, 7, PARAMS, EpisodeStart(prompt, 11))
        try:
            sample, figures = await episodes.draw(request, generate)
            await asyncio.sleep(0.1)
            return sample, figures, await worker.counts()
        finally:
            await worker.stop()

    return asyncio.run(whole())


def test_the_ids_of_a_game_are_those_of_the_whole_conversation(tokenizer: Any) -> None:
    sample, figures, counts = drawn(tokenizer, {"name": f"{GAMES}:Arena"}, ["a", "b"])
    messages = [{"role": "user", "content": "gomove 0"}, *(sample.episode.messages if sample.episode else ())]
    whole = tokenizer.apply_chat_template(messages, tokenize=False)
    assert [*sample.prompt_token_ids, *sample.token_ids] == tokenizer(whole, add_special_tokens=False)["input_ids"]
    assert [m["content"] for m in messages[1:]] == ["a", "move 1", "b"]
    assert sample.finish_reason == "environment_done"
    assert sample.num_sampled == 4
    assert sample.episode is not None
    assert [(s.name, s.value) for s in sample.episode.scores] == [("Arena", 1.0)]
    assert (figures.num_turns, figures.failures) == (2, ())
    assert counts["held"] == 0


def test_rewards_beside_the_environment_travel_with_the_sample(tokenizer: Any) -> None:
    game = {"name": f"{GAMES}:Guess"}
    sample, _, _ = drawn(tokenizer, game, [str(i) for i in range(10)])
    assert sample.episode is not None
    assert [(s.name, s.value) for s in sample.episode.scores] == [("Guess", 1.0)]


def call(name: str, question: str) -> str:
    return f'<tool_call>{{"name": {name}, "arguments": {{"question": {question}}}}}</tool_call>'


@pytest.mark.parametrize(
    ("text", "answer", "num_errors"),
    [
        (call('"ask"', '"\\ud800"'), "no \ufffd to \ufffd", 0),
        (call('"\\udfff"', '"x"'), "there is no tool '\ufffd'; there are: ask", 1),
    ],
)
def test_half_characters_of_a_tool_or_of_the_models_own_json_are_replaced_and_cost_nothing(
    tokenizer: Any, text: str, answer: str, num_errors: int
) -> None:
    sample, figures, _ = drawn(tokenizer, {"name": f"{GAMES}:Tells"}, [text, "done"], said="no \udc00")
    assert sample.episode is not None
    assert sample.episode.failure is None
    (heard,) = (m["content"] for m in sample.episode.messages if m["role"] == "tool")
    assert heard in (answer, json.dumps({"error": answer}, ensure_ascii=False))
    assert json.dumps(sample.episode.messages, ensure_ascii=False).encode("utf-8")
    assert (sample.finish_reason, figures.num_errors) == ("stop", num_errors)


def test_what_the_template_can_not_write_is_the_environments_failure_and_not_the_runs(
    tokenizer: Any, tmp_path: Path
) -> None:
    guard = "{% for m in messages %}{% if m.content is not string %}{{ raise_exception('text alone') }}{% endif %}{% endfor %}"
    template = tmp_path / "text_alone.jinja"
    template.write_text(guard + tokenizer.chat_template)
    environment = {"name": f"{GAMES}:Tells", "template": str(template)}
    sample, figures, _ = drawn(
        tokenizer, environment, [call('"ask"', '"x"'), "done"], said=[{"type": "text", "text": "y"}]
    )
    assert sample.episode is not None
    assert sample.episode.failure is not None
    assert sample.episode.failure.status is ScoreStatus.ERROR
    assert "text alone" in sample.episode.failure.detail
    assert figures.failures == ("error", "error")


@pytest.mark.parametrize(
    ("place", "does", "status"),
    [
        ("reset", "raise", "error"),
        ("reset", "exit", "crashed"),
        ("reward", "raise", "error"),
        ("reward", "nan", "error"),
    ],
)
def test_a_failed_environment_is_drawn_again_once_and_is_then_a_status_and_no_zero(
    tokenizer: Any, place: str, does: str, status: str
) -> None:
    sample, figures, counts = drawn(tokenizer, {"name": f"{GAMES}:Misbehaves"}, ["x"], **{place: does})
    assert sample.episode is not None
    assert sample.episode.failure is not None
    assert sample.episode.failure.status == status
    assert sample.episode.scores == ()
    assert sample.finish_reason == "environment_failed"
    assert figures.failures == (status, status)
    assert sample.num_sampled == (0 if place == "reset" else 2)
    assert counts["held"] == 0


def test_an_episode_that_takes_too_long_ends_at_its_deadline(tokenizer: Any) -> None:
    environment = {"name": f"{GAMES}:Misbehaves", "episode_timeout_s": 3, "reset_timeout_s": 3, "step_timeout_s": 3}
    sample, figures, counts = drawn(tokenizer, environment, ["x"], reset="hang")
    assert sample.episode is not None
    assert sample.episode.failure is not None
    assert figures.failures == ("timeout", "timeout")
    assert counts["held"] == 0


def test_a_prompt_that_gets_too_long_with_its_first_text_is_a_failure_that_says_so(tokenizer: Any) -> None:
    sample, _, _ = drawn(tokenizer, {"name": f"{GAMES}:Counter"}, ["x"], hint="long " * 40)
    assert sample.episode is not None
    assert sample.episode.failure is not None
    assert "more than data.max_prompt_length (100)" in sample.episode.failure.detail


@pytest.mark.parametrize(
    ("observation", "content"),
    [
        (None, "go"),
        (" now", "go now"),
        ([{"type": "text", "text": "now"}], [{"type": "text", "text": "go"}, {"type": "text", "text": "now"}]),
    ],
)
def test_what_reset_returns_is_appended_to_the_last_message(observation: Any, content: Any) -> None:
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "go"}]
    assert begun(messages, observation, None) == [messages[0], {"role": "user", "content": content}]
    assert messages[1]["content"] == "go"


def test_messages_of_a_reset_take_the_place_of_the_rows() -> None:
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "go"}]
    assert begun(messages, [{"role": "user", "content": "x"}], None) == [messages[0], {"role": "user", "content": "x"}]
