"""The columns of a sample in Parquet, for every file that holds samples: `rollouts/`, `samples/`, and a checkpoint's groups.

Each file lists those that it has, in its own order (`schema`); a column of one name has one type and one meaning in all of them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from grpo_ray import json_text
from grpo_ray.types import Episode, RewardScore, Sample, Score, Step, VersionSpan

ROUTES = pa.struct([("experts", pa.binary()), ("layers", pa.int32()), ("top_k", pa.int32())])
"""`Sample.routes`, its bytes in order: a column `routes` that only files of samples with routes have."""
STEPS = pa.list_(pa.struct([("end", pa.int32()), ("value", pa.float64())]))
"""Process supervision: the index of each step's last token, and its value."""

REWARD: dict[str, pa.DataType] = {
    "name": pa.string(),
    "status": pa.string(),
    "value": pa.float64(),
    "detail": pa.string(),
    "seconds": pa.float64(),
    "steps": STEPS,
    "extra": pa.string(),
}
"""The fields of one entry of `rewards`. `extra` is JSON that the function logs for the sample beside its reward, or null."""

COLUMNS: dict[str, pa.DataType] = {
    "prompt_id": pa.string(),
    "index": pa.int32(),
    "prompt": pa.string(),
    "messages": pa.string(),
    "columns": pa.string(),
    "completion": pa.string(),
    "turns": pa.string(),
    "prompt_ids": pa.list_(pa.int32()),
    "completion_ids": pa.list_(pa.int32()),
    "rollout_logprobs": pa.list_(pa.float32()),
    "versions": pa.list_(pa.struct([("version", pa.int64()), ("start", pa.int64()), ("end", pa.int64())])),
    "num_sampled": pa.int32(),
    "min_version": pa.int64(),
    "finish_reason": pa.string(),
    "worker": pa.string(),
    "seed": pa.int64(),
    "model_sha256": pa.string(),
    "reward": pa.float64(),
    "reward_status": pa.string(),
    "rewards": pa.list_(pa.struct(list(REWARD.items()))),
    "score": pa.string(),
    "order": pa.int64(),
    "dispatched_version": pa.int64(),
    "step": pa.int64(),
    "group": pa.int32(),
    "part": pa.int32(),
    "loss_mask": pa.bool_(),
    "advantage": pa.float64(),
    "advantage_steps": STEPS,
    "temperature": pa.float64(),
    "top_p": pa.float64(),
    "top_k": pa.int64(),
    "min_p": pa.float64(),
}
"""`prompt_ids` [N], `completion_ids` and `rollout_logprobs` [T]. `versions` are the spans [start, end) of the completion that a
policy sampled, `num_sampled` tokens together; the others are the environment's, and their `rollout_logprobs` 0. `turns` is JSON:
the messages of an episode after the prompt; null for a single answer.

`messages` (the prompt as a conversation, without anything that the template adds) and `columns` (the other columns of the prompt's
row) are JSON, and so is `score`, a whole `types.Score` in which a reward that is no number is NaN; in `reward`, `rewards` and
`advantage` it is null.

`reward` and `rewards` are the scores, before a KL is taken off. `group`, `loss_mask` and `part` as in `types.TrainSample`; `order`
and `dispatched_version` as in `types.Group`; `temperature`, `top_p`, `top_k` and `min_p` are those of the whole batch."""

ARRAYS = ("prompt_ids", "completion_ids", "rollout_logprobs")


def schema(names: Sequence[str], reward_fields: Sequence[str] = tuple(REWARD)) -> pa.Schema:
    """The schema of a file with these columns, in this order."""
    own = COLUMNS | {"rewards": pa.list_(pa.struct([(name, REWARD[name]) for name in reward_fields]))}
    return pa.schema([(name, own[name]) for name in names])


def table_of(rows: Sequence[Mapping[str, Any]], columns: pa.Schema) -> pa.Table:
    """The table of these rows; what a row has beside the columns is left out, but for routes."""
    if any(row.get("routes") is not None for row in rows):
        columns = columns.append(pa.field("routes", ROUTES))
    return pa.Table.from_pylist(list(rows), schema=columns)


def sample_cells(sample: Sample) -> dict[str, Any]:
    """The cells of what was sampled."""
    return {
        "prompt_id": sample.prompt_id,
        "index": sample.index,
        "completion": utf8(sample.text),
        "turns": _turns(sample.episode),
        "prompt_ids": np.asarray(sample.prompt_token_ids, dtype=np.int32),
        "completion_ids": np.asarray(sample.token_ids, dtype=np.int32),
        "rollout_logprobs": np.asarray(sample.logprobs, dtype=np.float32),
        "routes": None if sample.routes is None else _route_cells(sample.routes),
        "versions": [{"version": v.version, "start": v.start, "end": v.end} for v in sample.versions],
        "num_sampled": sample.num_sampled,
        "finish_reason": sample.finish_reason,
    }


def _route_cells(routes: NDArray[np.integer]) -> dict[str, Any]:
    _, layers, top_k = routes.shape
    return {"experts": routes.tobytes(), "layers": layers, "top_k": top_k}


def _routes(cells: Mapping[str, Any] | None, num_tokens: int) -> NDArray[np.integer] | None:
    if cells is None:
        return None
    shape = (num_tokens, cells["layers"], cells["top_k"])
    return np.frombuffer(cells["experts"], f"u{len(cells['experts']) // math.prod(shape)}").reshape(shape)


def score_cells(score: Score) -> dict[str, Any]:
    """The cells of how a sample was scored."""
    return {
        "reward": number(score.value),
        "reward_status": str(score.status),
        "rewards": [
            {
                "name": p.name,
                "status": str(p.status),
                "value": number(p.value),
                "detail": utf8(p.detail),
                "seconds": p.seconds,
                "steps": step_cells(p.steps),
                "extra": _extra(p),
            }
            for p in score.parts
        ],
    }


def step_cells(steps: Sequence[Step]) -> list[dict[str, Any]]:
    return [{"end": step.end, "value": step.value} for step in steps]


def rows_and_samples(table: pa.Table) -> list[tuple[dict[str, Any], Sample]]:
    """The rows of a table that has the columns of `sample_cells`, and the sample of each, its arrays as they were."""
    rows = table.drop_columns(list(ARRAYS)).to_pylist()
    arrays = zip(*([scalar.values.to_numpy() for scalar in table[name]] for name in ARRAYS), strict=True)
    return [(row, _sample(row, *own)) for row, own in zip(rows, arrays, strict=True)]


def _sample(
    row: Mapping[str, Any],
    prompt_ids: NDArray[np.int32],
    completion_ids: NDArray[np.int32],
    logprobs: NDArray[np.float32],
) -> Sample:
    return Sample(
        prompt_id=row["prompt_id"],
        index=row["index"],
        prompt_token_ids=prompt_ids,
        token_ids=completion_ids,
        logprobs=logprobs,
        versions=tuple(VersionSpan(**span) for span in row["versions"]),
        finish_reason=row["finish_reason"],
        text=row["completion"],
        routes=_routes(row.get("routes"), len(prompt_ids) + len(completion_ids) - 1),
        episode=_episode(row.get("turns")),
    )


def _turns(episode: Episode | None) -> str | None:
    return utf8(json.dumps(episode.messages, ensure_ascii=False, default=str)) if episode is not None else None


def _episode(turns: str | None) -> Episode | None:
    """The conversation; its rewards are in the sample's score."""
    return Episode(tuple(json_text.read(turns)), ()) if turns is not None else None


def _extra(part: RewardScore) -> str | None:
    return utf8(json.dumps(dict(part.extra), ensure_ascii=False)) if part.extra else None


def number(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def utf8(text: str) -> str:
    """Valid UTF-8: a lone surrogate, which a model's bytes can decode to, is no valid text for Arrow."""
    return text.encode("utf-8", "replace").decode("utf-8")
