"""What `grpo-ray eval` leaves, and what samples are worth together."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from grpo_ray.config.loading import build, load_yaml
from grpo_ray.config.schema import RunConfig
from grpo_ray.data.prompts import load_eval_prompts, load_prompts, trained_on
from grpo_ray.errors import ConfigError, DataError
from grpo_ray.loop.evaluate import evaluate
from grpo_ray.loop.roles import InMemory
from grpo_ray.loop.sampling import about_answers, write_answers
from grpo_ray.models.files.loading import load_tokenizer
from grpo_ray.run.eval_record import answers_folder, new_record, set_figures, step_of, write_figures
from grpo_ray.run.sample_files import read_samples
from grpo_ray.telemetry.sample_figures import figures_in, figures_of
from grpo_ray.types import RewardScore, Score, ScoreRequest, ScoreStatus
from launch.run.jobs import _record_place
from tests.loop.test_sampling import Engine

ROWS = 5


class Judge:
    """Of row 0 nothing is known; even first tokens are right. `form` is always a half."""

    async def score(self, requests: Sequence[ScoreRequest]) -> list[Score]:
        await asyncio.sleep(0)
        return [self._one(r) for r in requests]

    def _one(self, request: ScoreRequest) -> Score:
        form = RewardScore("form", ScoreStatus.OK, 0.5)
        if request.sample.prompt_id.endswith("/0"):
            parts = (RewardScore("even", ScoreStatus.NOT_APPLICABLE, math.nan), form)
            return Score(ScoreStatus.OK, 0.5, parts)
        value = float(request.sample.ref[0].token_ids[0] % 2 == 0)
        return Score(ScoreStatus.OK, value + 0.5, (RewardScore("even", ScoreStatus.OK, value), form))

    def take_tracks(self) -> list[Any]:
        return []


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"{i} + 1 =", "answer": i + 1}) + "\n" for i in range(ROWS)))
    data = {
        "model": {"path": "there", "dtype": "float32"},
        "data": {"train": {"path": str(path)}, "eval": {"path": str(path)}, "template": "raw", "max_prompt_length": 64},
        "rollout": {"max_completion_length": 16},
        "reward": {"functions": [{"name": "even"}, {"name": "form"}]},
        "eval": {"num_samples": 2, "temperature": 1.0},
    }
    return build(RunConfig, data, "test")


def test_every_answer_of_an_evaluation_is_written_with_its_scores(
    config: RunConfig, tiny_model: Path, tmp_path: Path
) -> None:
    tokenizer = load_tokenizer(str(tiny_model), trust_remote_code=False)
    prompts = load_eval_prompts(config.data, tokenizer, seed=1)[""]
    record = new_record(tmp_path / "evals", "run-step-000040", config)

    async def work() -> None:
        result = await evaluate(list(prompts), Engine(), Judge(), None, config)
        folder = answers_folder(record, "")
        figures = await write_answers(
            folder, about_answers(config, prompts, "there", "ab"), prompts, result, InMemory()
        )
        write_figures(record, config, "ab", {"": set_figures(result, figures)}, 1.25)
        assert result.accuracy is not None
        rows = list(read_samples(folder))
        assert [row["prompt_id"] for row in rows] == [f"eval-rows/0/{i}" for i in range(ROWS) for _ in range(2)]
        assert [row["index"] for row in rows] == [0, 1] * ROWS
        assert rows[0]["columns"]["answer"] == 1
        even = [int(row["completion_ids"][0]) % 2 == 0 for row in rows]
        told = [next(p["value"] for p in row["rewards"] if p["name"] == "even") for row in rows]
        assert told[:2] == [None, None]
        assert told[2:] == [float(e) for e in even[2:]]
        one = json.loads((record / "figures.json").read_text())["sets"][""]
        assert one["measures"]["pass@1"]["mean"] == pytest.approx(result.accuracy.mean)
        assert one["rewards"]["even"] == {
            "mean": pytest.approx(sum(even[2:]) / 8),
            "num_scored": 8,
            "num_not_applicable": 2,
            "num_failed": 0,
        }
        assert one["rewards"]["form"]["mean"] == 0.5
        assert one["reward"]["mean"] == pytest.approx(result.mean_reward)
        assert one["mean_length"] == pytest.approx(result.mean_length)

    asyncio.run(work())
    assert build(RunConfig, load_yaml(record / "settings.yaml"), "test") == config


def test_no_record_is_written_over(config: RunConfig, tmp_path: Path) -> None:
    names = [new_record(tmp_path, "run", config).name for _ in range(3)]
    assert names == ["run", "run-2", "run-3"]


def test_a_record_that_can_not_be_written_is_told(config: RunConfig, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="dir="):
        new_record(tmp_path / "file" / "evals", "run", config)


def test_the_record_names_the_checkpoint_that_is_measured(config: RunConfig, tmp_path: Path) -> None:
    hf = tmp_path / "run" / "checkpoints" / "step-000040" / "hf"
    hf.mkdir(parents=True)
    (tmp_path / "run" / "hf").symlink_to("checkpoints/step-000040/hf")
    assert step_of(tmp_path / "run" / "hf") == 40
    assert step_of(tmp_path / "elsewhere" / "hf") is None
    measured = config.model_copy(update={"model": config.model.model_copy(update={"path": str(hf)})})
    record = tmp_path / "record"
    record.mkdir()
    write_figures(record, measured, "ab", {}, 1.0)
    told = json.loads((record / "figures.json").read_text())
    assert (told["step"], told["model"], told["model_sha256"]) == (40, str(hf), "ab")
    (tmp_path / "run" / "config.yaml").write_text("")
    assert _record_place(tmp_path / "run", measured, []) == (tmp_path / "run" / "evals", "run-step-000040")
    moved = measured.model_copy(update={"dir": "other"})
    assert _record_place(tmp_path / "run", moved, ["dir=other"]) == (Path("other/evals"), "run-step-000040")
    assert _record_place(Path("my recipe.yaml"), config, []) == (Path("runs/evals"), "my-recipe")


def test_an_evaluation_keeps_prompts_that_are_trained_on_and_training_does_not(
    config: RunConfig, tiny_model: Path
) -> None:
    tokenizer = load_tokenizer(str(tiny_model), trust_remote_code=False)
    held_out = load_eval_prompts(config.data, tokenizer, seed=1)
    assert len(held_out[""]) == ROWS
    assert trained_on(config.data, tokenizer, held_out, seed=1) == ROWS
    with pytest.raises(DataError, match="none of its 5 rows is left"):
        load_prompts(config.data, tokenizer, seed=1)


def test_samples_without_a_reward_have_no_part_in_its_mean() -> None:
    def row(status: str, value: float | None, *parts: tuple[str, str, float | None]) -> dict[str, Any]:
        rewards = [{"name": n, "status": s, "value": v} for n, s, v in parts]
        return {"reward": value, "reward_status": status, "rewards": rewards, "num_sampled": 4}

    figures = figures_of(
        [
            row("ok", 1.5, ("a", "ok", 1.0), ("b", "ok", 0.5)),
            row("ok", 0.25, ("a", "not_applicable", None), ("b", "ok", 0.25)),
            row("timeout", None, ("a", "ok", 0.0), ("b", "timeout", None)),
            row("not_applicable", None, ("a", "not_applicable", None), ("b", "not_applicable", None)),
        ]
    )
    assert (figures.reward.mean, figures.num_samples, figures.mean_length) == (0.875, 4, 4)
    assert str(figures) == (
        "mean reward 0.875 over 2 (1 not applicable, 1 failed) samples: a 0.5 over 2 (2 not applicable); "
        "b 0.375 over 2 (1 not applicable, 1 failed)"
    )


def test_samples_that_have_no_reward_at_all_have_no_mean(tmp_path: Path) -> None:
    assert figures_in(tmp_path).reward.mean is None
    assert str(figures_in(tmp_path)) == "mean reward none over 0 samples"
