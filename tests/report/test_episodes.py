"""Episodes in the rollout log and in report.html: turn by turn, the environment's text apart, and rewards at their turns."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from actors.rollout.sample import info_of
from grpo_ray.report.episodes import Turn, turns_of
from grpo_ray.report.page import write_report
from grpo_ray.run.replay import read_batch
from grpo_ray.run.rollout_log import distinct_refs, read_rollouts, write_rollouts
from grpo_ray.types import Episode, Group, Prompt, RewardScore, Sample, Score, ScoreStatus, Step, VersionSpan
from tests.batches import batch_of
from tests.report.test_report import Page, log_steps

MESSAGES: tuple[dict[str, Any], ...] = (
    {
        "role": "assistant",
        "content": "let me see",
        "tool_calls": [{"type": "function", "function": {"name": "search", "arguments": {"text": "five"}}}],
    },
    {"role": "tool", "name": "search", "content": "<b>no</b>"},
    {"role": "assistant", "content": "is it 5?"},
    {"role": "user", "content": "yes"},
)
SPANS = (VersionSpan(6, 0, 2), VersionSpan(7, 2, 3), VersionSpan(7, 5, 7))
"""The first turn was sampled over an update; tokens 3, 4 and 7 are the environment's."""


def write(folder: Path) -> Path:
    ids = np.arange(8, dtype=np.int32)
    samples = [
        Sample(
            "set/0/7",
            0,
            ids,
            ids,
            np.zeros(8, np.float32),
            SPANS,
            "environment_done",
            "t",
            episode=Episode(MESSAGES, ()),
        ),
        Sample("set/0/7", 1, ids, ids[:2], np.zeros(2, np.float32), (VersionSpan(7, 0, 2),), "stop", "a plain answer"),
    ]
    steps = (Step(2, 0.25), Step(7, 1.0))
    scores = [
        Score(ScoreStatus.OK, 1.25, (RewardScore("Game", ScoreStatus.OK, 1.25, steps=steps),), steps=steps),
        Score(ScoreStatus.OK, 0.0, (RewardScore("Game", ScoreStatus.OK, 0.0),)),
    ]
    infos = [replace(info_of(s, "rollout-0", row), ref=samples) for row, s in enumerate(samples)]
    group = Group(Prompt("set/0/7", [1], "guess", None, {}), 0, 7, infos, scores, advantages=[1.0, -1.0])
    return write_rollouts(folder, 8, [group], batch_of([group], step=7), distinct_refs([group]), run_seed=1)


def test_a_row_of_the_log_is_told_turn_by_turn_with_rewards_where_their_steps_end(tmp_path: Path) -> None:
    episode, answer = read_rollouts(write(tmp_path))
    assert turns_of(episode) == [
        Turn("model", 'let me see\nsearch({"text": "five"})', [("Game", 0.25)]),
        Turn("search", "<b>no</b>"),
        Turn("model", "is it 5?", [("Game", 1.0)]),
        Turn("environment", "yes"),
    ]
    assert turns_of(answer) == []
    assert turns_of({key: value for key, value in episode.items() if key != "turns"}) == []


def test_the_conversation_of_an_episode_is_replayed_with_its_tokens(tmp_path: Path) -> None:
    episode, answer = (s.ref[s.row] for s in read_batch(write(tmp_path)).samples)
    assert episode.episode == Episode(MESSAGES, ())
    assert answer.episode is None


def test_the_report_shows_turns_apart_and_whose_tokens_there_are(tmp_path: Path) -> None:
    log_steps(tmp_path, 8)
    write(tmp_path / "rollouts")
    page = Page(write_report(tmp_path))
    assert page.pres[1:5] == ['let me see\nsearch({"text": "five"})', "<b>no</b>", "is it 5?", "yes"]
    assert "a plain answer" in page.pres
    classes = [value for name, value in page.attributes if name == "class" and value and value.startswith("turn ")]
    assert classes == ["turn model", "turn heard", "turn model", "turn heard"]
    facts = " | ".join(page.text)
    assert "8 tokens, 5 of them the model's · environment done · policy 6, 7" in facts
    assert "2 tokens · ended by itself · policy 7" in facts
    assert "Game 0.250" in facts
