"""Which tokens tell whether sampler and learner agree, and what is said when they do not."""

from __future__ import annotations

import re
from typing import Literal

import numpy as np
import pytest
import torch
from torch import Tensor

from grpo_ray.algorithm.losses.aggregation import Normalizers
from grpo_ray.algorithm.mismatch import MISMATCH_BOUNDS, mismatch_warning
from grpo_ray.algorithm.objectives import GrpoObjective, MicroBatchData
from grpo_ray.batch.pack import PackItem, pack, tokens_of_version
from grpo_ray.config.algorithm import AlgorithmConfig
from grpo_ray.types import VersionSpan
from tests.recipes import run_config

STEP = 5


def micro_batch(versions: list[list[VersionSpan]], rollout: list[list[float]]) -> MicroBatchData:
    items = [
        PackItem(
            np.ones(2, np.int64),
            np.ones(len(own), np.int64),
            np.array(own, np.float32),
            1.0,
            0.1,
            i,
            tokens_of_version(spans, STEP, len(own)),
        )
        for i, (spans, own) in enumerate(zip(versions, rollout, strict=True))
    ]
    return MicroBatchData.of(pack(items), torch.device("cpu"))


def metrics(algorithm: AlgorithmConfig, *passes: tuple[MicroBatchData, Tensor]) -> dict[str, float]:
    objective = GrpoObjective(algorithm)
    total, largest = torch.zeros(len(objective.sum_names)), 0.0
    for data, theta in passes:
        _, sums, most = objective.loss(data, theta.clone().requires_grad_(), torch.zeros_like(theta))
        total, largest = total + sums, max(largest, most.item())
    return objective.metrics(dict(zip(objective.sum_names, total.tolist(), strict=True)), largest, 1)


def test_only_tokens_of_the_version_that_is_trained_tell_of_a_mismatch() -> None:
    """A sample under way while weights came has tokens of both versions."""
    data = micro_batch(
        [[VersionSpan(STEP - 1, 0, 2), VersionSpan(STEP, 2, 4)], [VersionSpan(STEP - 2, 0, 2)]],
        [[-1.0, -1.0, -1.0, -1.0], [-1.0, -1.0]],
    )
    got = metrics(AlgorithmConfig(), (data, torch.tensor([-1.5, -1.5, -1.01, -0.97, -3.0, 1.0])))
    assert got["mismatch/mean_abs"] == pytest.approx(0.02)
    assert got["mismatch/max_abs"] == pytest.approx(0.03)
    assert got["mismatch/kl"] == pytest.approx((np.exp(-0.01) - 1 + 0.01 + np.exp(0.03) - 1 - 0.03) / 2, rel=1e-2)
    assert got["staleness/logp_shift"] == pytest.approx((0.5 + 0.5 + 2.0 + 2.0) / 4)


def test_without_such_a_token_there_is_no_figure() -> None:
    data = micro_batch([[VersionSpan(STEP - 1, 0, 2)]], [[-1.0, -1.0]])
    got = metrics(AlgorithmConfig(), (data, torch.tensor([-1.5, -1.0])))
    assert not [name for name in got if name.startswith("mismatch")]
    assert got["staleness/logp_shift"] == pytest.approx(0.25)
    fresh = micro_batch([[VersionSpan(STEP, 0, 2)]], [[-1.0, -1.0]])
    got = metrics(AlgorithmConfig(), (fresh, torch.tensor([-1.5, -1.0])))
    assert "staleness/logp_shift" not in got
    assert got["mismatch/mean_abs"] == pytest.approx(0.25)


@pytest.mark.parametrize("old", ["rollout", "recompute"])
def test_what_the_policy_moves_within_an_update_is_no_mismatch(old: Literal["rollout", "recompute"]) -> None:
    """Two passes over a batch; `old` stays that of the first."""
    data = micro_batch([[VersionSpan(STEP, 0, 2)]], [[-1.0, -1.0]])
    algorithm = AlgorithmConfig(old_logprobs=old, num_iterations=2)
    first, second = torch.tensor([-1.01, -1.0]), torch.tensor([-4.0, -1.0])
    objective = GrpoObjective(algorithm)
    _, one, _ = objective.loss(data, first.requires_grad_(), torch.zeros(2))
    data.moved = True
    _, two, largest = objective.loss(data, second.requires_grad_(), torch.zeros(2))
    got = objective.metrics(dict(zip(objective.sum_names, (one + two).tolist(), strict=True)), largest.item(), 2)
    assert got["mismatch/mean_abs"] == pytest.approx(0.005, rel=1e-3)


def test_the_correction_is_that_of_every_token() -> None:
    data = micro_batch([[VersionSpan(STEP - 1, 0, 1), VersionSpan(STEP, 1, 2)]], [[-1.0, -1.0]])
    algorithm = AlgorithmConfig(importance_sampling="token_truncate")
    got = metrics(algorithm, (data, torch.tensor([-1.5, -1.2])))
    assert got["correction/mean_weight"] == pytest.approx((np.exp(-0.5) + np.exp(-0.2)) / 2)
    assert GrpoObjective(algorithm).weight(2, Normalizers.unit(4)) > 0
    assert Normalizers.unit(4) == Normalizers(num_sequences=1, num_tokens=1, max_completion_length=4)


@pytest.mark.parametrize(
    ("options", "mend"),
    [
        ([], "explains 0.1. algorithm.importance_sampling=token_truncate corrects for it"),
        (["algorithm.loss=gspo"], "algorithm.importance_sampling=sequence_truncate corrects for it"),
        (["algorithm.importance_sampling=token_mask"], "importance_sampling token_mask already corrects for it"),
        (["algorithm.max_staleness=1"], "importance_sampling token_truncate already corrects for it"),
        (["algorithm.old_logprobs=rollout"], "algorithm.old_logprobs=recompute algorithm.importance_sampling=token_tr"),
        (["algorithm=v3_2"], "algorithm.old_logprobs=recompute algorithm.importance_sampling=token_truncate corrects"),
        (["model.dtype=float32"], "explains 0.001. Something is wrong: they do not compute the same model"),
        (["model.dtype=float32", "algorithm.max_staleness=1"], "Something is wrong"),
    ],
)
def test_the_advice_can_be_followed(options: list[str], mend: str) -> None:
    run = run_config("model.dtype=bfloat16", *options)
    warning = mismatch_warning(0.3, run)
    assert warning is not None
    assert mend in warning
    assert run_config("model.dtype=bfloat16", *options, *re.findall(r"algorithm[.]\w+=\w+", warning))


@pytest.mark.parametrize("dtype", list(MISMATCH_BOUNDS))
def test_rounding_is_no_reason_to_warn_and_a_fault_is(dtype: str) -> None:
    """Measured: float32 up to 3e-5; a real model in bfloat16 0.043; another temperature 0.33."""
    healthy = {"float32": 3e-5, "bfloat16": 0.043}[dtype]
    assert mismatch_warning(healthy, run_config(f"model.dtype={dtype}")) is None
    assert mismatch_warning(0.33, run_config(f"model.dtype={dtype}")) is not None
