"""`grpo-ray sample` over plain objects: what is written, and what a run that was killed goes on with."""

from __future__ import annotations

import asyncio
import json
import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from grpo_ray.config.loading import build
from grpo_ray.config.schema import RunConfig
from grpo_ray.data.prompts import PromptDataset, load_prompts
from grpo_ray.errors import DataError, LostSamplesError, PoisonedError, RewardError
from grpo_ray.loop.roles import InMemory
from grpo_ray.loop.sampling import SamplingReport, about_samples, sample_all
from grpo_ray.models.files.loading import load_tokenizer
from grpo_ray.run.sample_files import SampleFolder, read_samples
from grpo_ray.types import RewardScore, Sample, SampleInfo, SampleRequest, Score, ScoreRequest, ScoreStatus, VersionSpan

NUM_PROMPTS, K, SHARD = 22, 3, 4


class Killed(Exception):
    pass


class Engine:
    """A sample is a function of its seed; answers come in any order. `poison`: the prompts of which no sample comes."""

    def __init__(self, dies_after: int | None = None, poison: str | None = None) -> None:
        self.asked: list[tuple[str, int]] = []
        self.most_at_once = self._at_once = 0
        self._left = dies_after
        self._poison = poison

    async def generate(self, request: SampleRequest) -> SampleInfo:
        self.asked.append((request.prompt_id, request.index))
        self._at_once += 1
        self.most_at_once = max(self.most_at_once, self._at_once)
        await asyncio.sleep(random.random() / 500)
        self._at_once -= 1
        if request.prompt_id == self._poison:
            raise PoisonedError(f"prompt {request.prompt_id} ends rollout engines")
        if self._left is not None:
            self._left -= 1
            if self._left < 0:
                raise Killed
        rng = random.Random(request.seed)
        ids = np.asarray([rng.randrange(50) for _ in range(rng.randint(1, 9))], np.int32)
        sample = Sample(
            request.prompt_id,
            request.index,
            np.asarray(request.prompt_token_ids, np.int32),
            ids,
            np.zeros(len(ids), np.float32),
            (VersionSpan(0, 0, len(ids)),),
            "stop",
            " ".join(map(str, ids)),
        )
        return SampleInfo(request.prompt_id, request.index, 1, len(ids), 0, "stop", "rollout-0", [sample], 0)

    def take_stats(self) -> dict[str, float]:
        return {}

    def take_tracks(self) -> list[Any]:
        return []


class Even:
    """1 for an even first token, 0 for an odd one; fails for the prompts named."""

    def __init__(self, fails: str = "") -> None:
        self._fails = fails

    async def score(self, requests: Sequence[ScoreRequest]) -> list[Score]:
        await asyncio.sleep(0)
        return [self._one(r) for r in requests]

    def _one(self, request: ScoreRequest) -> Score:
        if self._fails and self._fails in request.sample.prompt_id:
            return Score(ScoreStatus.TIMEOUT, float("nan"), (RewardScore("even", ScoreStatus.TIMEOUT, float("nan")),))
        value = float(request.sample.ref[0].token_ids[0] % 2 == 0)
        return Score(ScoreStatus.OK, value, (RewardScore("even", ScoreStatus.OK, value, seconds=random.random()),))

    def take_tracks(self) -> list[Any]:
        return []


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"{i} + 1 =", "answer": i + 1}) + "\n" for i in range(NUM_PROMPTS)))
    data = {
        "model": {"path": "there", "dtype": "float32"},
        "data": {"train": {"path": str(path)}, "template": "raw", "max_prompt_length": 64},
        "rollout": {"max_num_seqs": 6, "max_completion_length": 16},
        "reward": {"functions": [{"name": "even"}]},
        "sample": {"num_samples": K, "shard_prompts": SHARD},
    }
    return build(RunConfig, data, "test")


@pytest.fixture(scope="module")
def prompts(config: RunConfig, tiny_model: Path) -> PromptDataset:
    tokenizer = load_tokenizer(str(tiny_model), trust_remote_code=False)
    return load_prompts(config.data, tokenizer, seed=1).train


class LosesSome(InMemory):
    """The first so many reads find that a node is gone."""

    def __init__(self, number: int) -> None:
        self._left = number

    async def fetch(self, refs: list[Any]) -> list[Sequence[Sample]]:
        if self._left:
            self._left -= 1
            raise LostSamplesError("their node died")
        return await super().fetch(refs)


def sample(
    path: Path,
    config: RunConfig,
    prompts: PromptDataset,
    engine: Engine,
    scorer: Even | None = None,
    *,
    store: InMemory | None = None,
    told: list[tuple[int, int]] | None = None,
) -> SamplingReport:
    async def work() -> SamplingReport:
        folder = SampleFolder.open(path, about_samples(config, prompts, "there", "0" * 64))
        tell = (lambda done, total: told.append((done, total))) if told is not None else (lambda done, total: None)
        return await sample_all(prompts, engine, scorer or Even(), store or InMemory(), folder, config, tell)

    return asyncio.run(work())


def files(path: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in path.iterdir()}


def test_every_prompt_has_its_samples_in_order_with_where_they_come_from(
    config: RunConfig, prompts: PromptDataset, tmp_path: Path
) -> None:
    engine = Engine()
    report = sample(tmp_path / "samples", config, prompts, engine)
    rows = list(read_samples(tmp_path / "samples"))
    assert [(r["prompt_id"], r["index"]) for r in rows] == [(p.id, i) for p in prompts for i in range(K)]
    assert (report.num_made, report.num_before) == (NUM_PROMPTS * K, 0)
    assert report.num_tokens == sum(len(r["completion_ids"]) for r in rows)
    assert len(list((tmp_path / "samples").iterdir())) == -(-NUM_PROMPTS // SHARD)
    first = rows[0]
    assert first["messages"] == [{"role": "user", "content": "0 + 1 ="}]
    assert first["columns"] == {"answer": 1}
    assert first["model_sha256"] == "0" * 64
    assert first["completion"] == " ".join(map(str, first["completion_ids"]))
    assert first["rewards"] == [
        {
            "name": "even",
            "status": "ok",
            "value": float(first["completion_ids"][0] % 2 == 0),
            "detail": "",
            "extra": None,
        }
    ]
    assert len({r["seed"] for r in rows}) == len(rows)


def test_no_more_is_under_way_than_keeps_the_engines_full(
    config: RunConfig, prompts: PromptDataset, tmp_path: Path
) -> None:
    engine = Engine()
    sample(tmp_path / "samples", config, prompts, engine)
    assert config.rollout.max_num_seqs <= engine.most_at_once <= 2 * config.rollout.max_num_seqs


@pytest.mark.parametrize("dies_after", [0, 1, 7, 20, 40, 65])
def test_killed_and_resumed_the_files_are_those_of_a_whole_run(
    config: RunConfig, prompts: PromptDataset, tmp_path: Path, dies_after: int
) -> None:
    sample(tmp_path / "whole", config, prompts, Engine())
    broken = tmp_path / "broken"
    with pytest.raises(BaseExceptionGroup):
        sample(broken, config, prompts, Engine(dies_after))
    kept = {p.name for p in broken.glob("*.parquet")}
    (broken / "samples-000009.parquet.new").write_bytes(b"torn")
    engine = Engine()
    report = sample(broken, config, prompts, engine)
    assert files(broken) == files(tmp_path / "whole")
    assert report.num_before + report.num_made == NUM_PROMPTS * K
    assert max(Counter(engine.asked).values()) == 1
    shards = {f"samples-{n:06d}.parquet": range(n * SHARD, (n + 1) * SHARD) for n in range(6)}
    had = {prompts.item(i, 0).id for name in kept for i in shards[name] if i < NUM_PROMPTS}
    assert not had & {prompt_id for prompt_id, _ in engine.asked}


def test_a_prompt_that_ends_engines_is_named_in_its_file_and_harms_no_other(
    config: RunConfig, prompts: PromptDataset, tmp_path: Path
) -> None:
    poison = prompts.item(5, 0).id
    told: list[tuple[int, int]] = []
    sample(tmp_path / "whole", config, prompts, Engine())
    report = sample(tmp_path / "samples", config, prompts, Engine(poison=poison), told=told)
    rows = list(read_samples(tmp_path / "samples"))
    assert rows == [row for row in read_samples(tmp_path / "whole") if row["prompt_id"] != poison]
    assert report.num_made == (NUM_PROMPTS - 1) * K
    assert [one.prompt_id for one in report.left_out] == [poison]
    assert told[-1] == (NUM_PROMPTS * K, NUM_PROMPTS * K)
    notes = [pq.read_schema(file).metadata for file in sorted((tmp_path / "samples").iterdir())]
    assert [bool(note) for note in notes] == [False, True, False, False, False, False]
    assert json.loads(notes[1][b"left_out"]) == [{"prompt_id": poison, "why": f"prompt {poison} ends rollout engines"}]
    (tmp_path / "samples" / "samples-000000.parquet").unlink()
    again = sample(tmp_path / "samples", config, prompts, Engine())
    assert (again.num_before, again.num_made) == ((NUM_PROMPTS - 1 - SHARD) * K, SHARD * K)


def test_samples_that_went_with_their_node_are_drawn_again_and_are_the_same(
    config: RunConfig, prompts: PromptDataset, tmp_path: Path
) -> None:
    sample(tmp_path / "whole", config, prompts, Engine())
    told: list[tuple[int, int]] = []
    report = sample(tmp_path / "samples", config, prompts, Engine(), store=LosesSome(4), told=told)
    assert files(tmp_path / "samples") == files(tmp_path / "whole")
    assert report.num_made == NUM_PROMPTS * K
    assert max(done for done, _ in told) == told[-1][0] == NUM_PROMPTS * K
    with pytest.raises(BaseExceptionGroup) as caught:
        sample(tmp_path / "never", config, prompts, Engine(), store=LosesSome(1000))
    assert caught.group_contains(LostSamplesError)


def test_samples_of_two_kinds_are_never_mixed(config: RunConfig, prompts: PromptDataset, tmp_path: Path) -> None:
    sample(tmp_path / "samples", config, prompts, Engine())
    other = config.model_copy(update={"sample": config.sample.model_copy(update={"temperature": 0.5})})
    with pytest.raises(DataError, match=r"made with another sampling .*temperature"):
        sample(tmp_path / "samples", other, prompts, Engine())


@pytest.mark.parametrize("change", [{"weight": 0.5}, {"args": {"timeout_s": 9}}, {"name": "another"}, None])
def test_samples_of_other_rewards_are_never_mixed_either(
    config: RunConfig, prompts: PromptDataset, tmp_path: Path, change: dict[str, Any] | None
) -> None:
    """A name, a weight, an argument; or one function more."""
    sample(tmp_path / "samples", config, prompts, Engine())
    first, *others = config.reward.functions
    changed = first.model_copy(update=change) if change else first
    more = () if change else (first.model_copy(update={"label": "again"}),)
    reward = config.reward.model_copy(update={"functions": (changed, *others, *more)})
    with pytest.raises(DataError, match="holds samples made with another rewards"):
        sample(tmp_path / "samples", config.model_copy(update={"reward": reward}), prompts, Engine())


def test_a_folder_that_is_not_complete_is_not_read(config: RunConfig, prompts: PromptDataset, tmp_path: Path) -> None:
    sample(tmp_path / "samples", config, prompts, Engine())
    (tmp_path / "samples" / "samples-000002.parquet").unlink()
    with pytest.raises(DataError, match="1 of 6 files are missing, the first is number 2"):
        list(read_samples(tmp_path / "samples"))


def test_a_failed_score_is_a_status_and_too_many_end_the_run(
    config: RunConfig, prompts: PromptDataset, tmp_path: Path
) -> None:
    sample(tmp_path / "few", config, prompts, Engine(), Even(fails="/0/21"))
    last = list(read_samples(tmp_path / "few"))[-1]
    assert (last["reward"], last["reward_status"], last["rewards"][0]["value"]) == (None, "timeout", None)
    with pytest.raises(BaseExceptionGroup) as caught:
        sample(tmp_path / "many", config, prompts, Engine(), Even(fails="/0/"))
    assert caught.group_contains(RewardError, match="12 of 12 samples could not be scored")


def test_samples_that_no_reward_applies_to_are_counted_and_the_reason_is_told(
    config: RunConfig, prompts: PromptDataset, tmp_path: Path
) -> None:
    class Silent(Even):
        def _one(self, request: ScoreRequest) -> Score:
            part = RewardScore("even", ScoreStatus.NOT_APPLICABLE, float("nan"))
            odd = request.columns["answer"] % 2
            return Score(ScoreStatus.NOT_APPLICABLE, float("nan"), (part,)) if odd else super()._one(request)

    report = sample(tmp_path, config, prompts, Engine(), Silent())
    assert report.num_unscored == report.num_made // 2
    assert report.why_unscored.startswith("even returned None, 'does not apply'")


@pytest.mark.parametrize("without", [0, 1])
def test_hugging_face_reads_the_folder(config: RunConfig, prompts: PromptDataset, tmp_path: Path, without: int) -> None:
    import datasets

    sample(tmp_path / "samples", config, prompts, Engine(poison=prompts.item(5, 0).id if without else None))
    rows = datasets.load_dataset(
        "parquet", data_dir=str(tmp_path / "samples"), split="train", cache_dir=str(tmp_path / "cache")
    )
    assert len(rows) == (NUM_PROMPTS - without) * K
    assert pq.read_table(tmp_path / "samples").num_rows == (NUM_PROMPTS - without) * K
