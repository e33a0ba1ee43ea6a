"""Which way weights go, by who is on which GPU."""

from __future__ import annotations

from typing import Any

import pytest

from actors.weights.sync import resolve_backend
from grpo_ray.config.common import DeadlineConfig
from grpo_ray.config.schema import RunConfig
from grpo_ray.errors import ConfigError
from tests.recipes import run_config

HALVES = ("rollout.num_gpus=0.5", "learner.num_gpus=0.5")


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ((), "nccl"),
        (("rollout.num_gpus=2", "rollout.tensor_parallel_size=2"), "nccl"),
        (("cluster.placement=colocated",), "ipc"),
        (("cluster.placement=colocated", *HALVES), "ipc"),
        (HALVES, "ipc"),
        ((*HALVES, "weights.backend=ipc"), "ipc"),
        (("rollout.num_gpus=0.5", "weights.backend=nccl"), "nccl"),
        (("weights.backend=gloo",), "gloo"),
    ],
)
def test_weights_go_by_ipc_only_where_every_engine_is_on_the_gpu_of_a_learner(
    overrides: tuple[str, ...], expected: str
) -> None:
    assert resolve_backend(config(*overrides), has_gpus=True) == expected


@pytest.mark.parametrize(
    ("overrides", "culprit"),
    [
        (("rollout.num_gpus=0.5",), "it is not certain which of them share a GPU"),
        (("learner.num_gpus=0.9", "rollout.num_gpus=0.2"), "it is not certain"),
        ((*HALVES, "rollout.num_actors=2"), "with 2 engines and 1 learners it is not certain"),
        (("weights.backend=ipc",), "ipc.*GPUs of their own"),
        (("weights.backend=nccl", "cluster.placement=colocated"), "nccl.*share each"),
        (("weights.backend=nccl", *HALVES), "nccl.*share each"),
    ],
)
def test_ways_that_weights_cannot_go_are_refused(overrides: tuple[str, ...], culprit: str) -> None:
    with pytest.raises(ConfigError, match=culprit):
        resolve_backend(config(*overrides), has_gpus=True)


def test_without_gpus_parts_of_them_do_not_matter() -> None:
    assert resolve_backend(config("rollout.num_gpus=0.5"), has_gpus=False) == "gloo"
    with pytest.raises(ConfigError, match="the cluster has none"):
        resolve_backend(config("weights.backend=ipc", *HALVES), has_gpus=False)


def test_a_sync_has_a_minute_on_gpus_where_an_engine_that_hangs_holds_all_others() -> None:
    assert DeadlineConfig().of_sync(has_gpus=True) == 60
    assert DeadlineConfig().of_sync(has_gpus=False) == 300
    assert {DeadlineConfig(sync_s=7.0).of_sync(has_gpus=g) for g in (True, False)} == {7.0}


def config(*overrides: Any) -> RunConfig:
    return run_config("rollout.num_actors=1", *overrides)
