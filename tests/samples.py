"""Folders of samples as `grpo-ray sample` writes them, made by hand."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from grpo_ray.run.sample_files import About, SampledPrompt, SampleFolder
from grpo_ray.types import Prompt, RewardScore, Sample, Score, ScoreStatus, VersionSpan

Rewards = dict[str, tuple[str, float | None]]


def row(
    prompt_id: str, index: int, completion: str, *, question: str = "how much?", rewards: Rewards | None = None
) -> dict[str, Any]:
    """As `read_samples` gives it."""
    given = {"accuracy": ("ok", 1.0)} if rewards is None else rewards
    return {
        "prompt_id": prompt_id,
        "index": index,
        "prompt": f"<|user|>{question}",
        "messages": [{"role": "user", "content": question}],
        "completion": completion,
        "prompt_ids": [1, 2],
        "completion_ids": list(range(len(completion))),
        "finish_reason": "stop",
        "rewards": [{"name": n, "status": s, "value": v, "detail": ""} for n, (s, v) in given.items()],
        "columns": {"source": "add", "language": "en"},
        "model_sha256": "0" * 64,
    }


def about(num_prompts: int, num_samples: int, shard_prompts: int = 16) -> About:
    return About("model", "0" * 64, "f" * 32, num_prompts, num_samples, shard_prompts, 1, {"temperature": 1.0}, [])


def drawn(rows: list[dict[str, Any]]) -> SampledPrompt:
    """All rows of one prompt."""
    first = rows[0]
    prompt = Prompt(first["prompt_id"], first["prompt_ids"], first["prompt"], first["messages"], first["columns"])
    samples = [
        Sample(
            r["prompt_id"],
            r["index"],
            np.asarray(r["prompt_ids"], np.int32),
            np.asarray(r["completion_ids"], np.int32),
            np.zeros(len(r["completion_ids"]), np.float32),
            (VersionSpan(0, 0, len(r["completion_ids"])),),
            r["finish_reason"],
            r["completion"],
        )
        for r in rows
    ]
    return SampledPrompt(prompt, first["messages"], samples, [_score(r) for r in rows])


def _score(row: dict[str, Any]) -> Score:
    parts = tuple(
        RewardScore(p["name"], ScoreStatus(p["status"]), math.nan if p["value"] is None else p["value"])
        for p in row["rewards"]
    )
    return Score(ScoreStatus.OK, 1.0, parts)


def sample_folder(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Rows of a prompt next to each other, as many of each."""
    prompts: dict[str, list[dict[str, Any]]] = {}
    for one in rows:
        prompts.setdefault(one["prompt_id"], []).append(one)
    groups = list(prompts.values())
    folder = SampleFolder.open(path, about(len(groups), len(groups[0])))
    for number in folder.missing():
        folder.write(number, [drawn(groups[i]) for i in folder.about.shard(number)])
    return path
