"""The scores of episodes: rewards that come with the sample, functions that are called here, and environments that failed."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from actors.reward.actor import RewardActor, build_inputs
from actors.reward.by_function import RewardPools
from actors.reward.processes import ScoringProcesses
from grpo_ray.config.reward import RewardConfig
from grpo_ray.types import Episode, RewardScore, Sample, SampleInfo, Score, ScoreRequest, ScoreStatus, VersionSpan

CODE = """
def num_messages(completions, **columns):
    return [float(len(c)) for c in completions]

def beside(completions, environments):
    raise AssertionError("called without its environment")
"""
MESSAGES = (
    {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {}}}]},
    {"role": "tool", "name": "f", "content": "4"},
    {"role": "assistant", "content": "42"},
)  # fmt: skip
GAME = RewardScore("Game", ScoreStatus.OK, 2.0)
FAILURE = RewardScore("Game", ScoreStatus.TIMEOUT, math.nan, "it hung")


class Scorer(RewardActor):
    """A worker in this process."""

    def __init__(self, config: RewardConfig) -> None:
        self._config = config
        self._names = [f.title for f in config.functions]
        self._weights = [f.weight for f in config.functions]
        self._process = ScoringProcesses(config, 120.0, with_environments=True)
        self._process.start()


@pytest.fixture(scope="module")
def code(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("code") / "mine.py"
    file.write_text(CODE)
    return file


@pytest.fixture(scope="module")
def scorer(code: Path) -> Iterator[Scorer]:
    names = [{"name": f"{code}:num_messages", "weight": 0.5}, {"name": f"{code}:beside", "weight": 10.0}]
    worker = Scorer(RewardConfig.model_validate({"functions": [*names, {"name": "exact_match"}]}))
    yield worker
    worker._process.kill()


def sample_of(index: int, episode: Episode) -> Sample:
    ids = np.arange(3, dtype=np.int32)
    spans = (VersionSpan(1, 0, 3),)
    return Sample("p", index, ids, ids, np.zeros(3, np.float32), spans, "stop", "all of it", episode=episode)


def requests_of(samples: list[Sample]) -> list[ScoreRequest]:
    messages = [{"role": "user", "content": "6 x 7"}]
    infos = [SampleInfo("p", s.index, 3, 3, 1, "stop", "rollout-0", samples, i) for i, s in enumerate(samples)]
    return [ScoreRequest(info, "6 x 7", messages, {"answer": "42"}) for info in infos]


def scored(scorer: Scorer, *episodes: Episode) -> list[Score]:
    samples = [sample_of(i, episode) for i, episode in enumerate(episodes)]
    return scorer._score([requests_of(samples)], {id(samples): samples})[0]


def test_rewards_that_come_with_an_episode_are_summed_with_those_computed_here(scorer: Scorer) -> None:
    beside = RewardScore("mine.beside", ScoreStatus.OK, 0.25)
    (score,) = scored(scorer, Episode(MESSAGES, (GAME, beside)))
    assert {part.name: part.value for part in score.parts} == {
        "mine.num_messages": 3.0,
        "mine.beside": 0.25,
        "exact_match": 1.0,
        "Game": 2.0,
    }
    assert score.value == 0.5 * 3 + 10 * 0.25 + 1.0 + 2.0


def test_a_failed_environment_fails_its_sample_alone_and_is_never_a_zero(scorer: Scorer) -> None:
    good = Episode(MESSAGES, (GAME, RewardScore("mine.beside", ScoreStatus.OK, 0.0)))
    scores = scored(scorer, good, Episode(MESSAGES[:1], (), FAILURE), good)
    assert [s.status for s in scores] == [ScoreStatus.OK, ScoreStatus.TIMEOUT, ScoreStatus.OK]
    assert math.isnan(scores[1].value)
    assert scores[1].detail == "it hung"
    assert scores[0].value == scores[2].value == 4.5


def test_a_group_of_failed_environments_calls_no_function(scorer: Scorer) -> None:
    scores = scored(scorer, Episode((), (), FAILURE), Episode((), (), FAILURE))
    assert [s.status for s in scores] == [ScoreStatus.TIMEOUT] * 2


def test_functions_see_every_message_and_built_ins_the_last_answer() -> None:
    samples: Any = [sample_of(0, Episode(MESSAGES, ()))]
    texts = {id(samples): samples}
    (request,) = requests_of(samples)
    assert build_inputs([request], texts).completions == [list(MESSAGES)]
    assert build_inputs([request], texts, templated=True).completions == [[{"role": "assistant", "content": "42"}]]


def test_pools_of_functions_count_an_environments_reward_once() -> None:
    pools: Any = object.__new__(RewardPools)
    pools._titles, pools._weights = ["a", "b"], [1.0, 2.0]
    parts = {name: RewardScore(name, ScoreStatus.OK, 1.0) for name in ("a", "b")}
    of_pools = [Score(ScoreStatus.OK, 0.0, (parts[name], GAME)) for name in ("a", "b")]
    assert pools._joined(of_pools, 3).value == 1.0 + 2.0 + 2.0
    failed = Score(ScoreStatus.TIMEOUT, math.nan, (FAILURE,), "it hung")
    assert pools._joined([failed, failed], 3) is failed
