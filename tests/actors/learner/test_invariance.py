"""One step is the same step however it is computed: for every loss, and any ranks, ZeRO stage, budget, packing, checkpointing,
prompts of a group once or for each sample, and sequences whole or in slices."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray
from safetensors.torch import load_file
from torch import Tensor

from actors.learner.group import LearnerGroup
from grpo_ray.algorithm.losses.table import POLICY_LOSSES
from grpo_ray.config.algorithm import AlgorithmConfig
from tests.actors.learner.saved import load, save
from tests.actors.learner.test_learner import exported, make_batch, make_config, moved_apart, run, start

pytestmark = [pytest.mark.usefixtures("local_ray"), pytest.mark.timeout(300), pytest.mark.long]
Results = dict[str, tuple[float, float, dict[str, Tensor]]]
SMALL = 50
"""Tokens: one sequence or so in a micro-batch."""
ALL = 1000


def step_of_every_loss(config: Any, folder: Path) -> Results:
    """Loss, gradient norm and weights after one step from the same weights. The ratio is taken to the sampler's report, which is
    noise here, so that it is not 1 and the clips cut."""
    group = start(config, folder)
    try:
        (folder / "start").mkdir()
        run(save(group, folder / "start"))
        out = {}
        for loss in POLICY_LOSSES:
            choose(group, AlgorithmConfig(loss=loss, old_logprobs="rollout"))
            metrics = run(group.update(make_batch())).metrics
            out[loss] = (metrics["loss/policy"], metrics["grad_norm"], exported(group, folder / loss))
            run(load(group, folder / "start"))
        return out
    finally:
        run(group.close())


def choose(group: LearnerGroup, algorithm: AlgorithmConfig) -> None:
    def set_on(actor: Any) -> None:
        actor._configure(replace(actor.spec, algorithm=algorithm))

    ray.get([a.__ray_call__.remote(set_on) for a in group._actors], timeout=60)


@pytest.fixture(scope="module")
def plain(local_ray: None, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Results:
    learner = {"micro_batch_tokens": ALL, "share_prompts": False}
    config = make_config(tiny_model, ranks=1, stage=0, learner=learner)
    return step_of_every_loss(config, tmp_path_factory.mktemp("plain"))


@pytest.mark.parametrize(
    ("ranks", "stage", "budget", "packing", "checkpointing", "sequence"),
    [
        pytest.param(1, 1, SMALL, True, False, 1, id="one-sequence-a-micro-batch"),
        pytest.param(2, 3, 2 * SMALL, True, True, 1, id="zero-3-checkpointing"),
        pytest.param(2, 3, 2 * SMALL, True, False, 2, id="sequence-parallel"),
        pytest.param(2, 2, 4 * SMALL, False, False, 1, id="padded", marks=pytest.mark.slow),
        pytest.param(4, 3, SMALL, True, False, 1, id="four-ranks", marks=pytest.mark.slow),
        pytest.param(2, 0, 8 * SMALL, True, True, 1, id="no-zero", marks=pytest.mark.slow),
        pytest.param(2, 1, ALL, False, True, 1, id="padded-checkpointing", marks=pytest.mark.slow),
        pytest.param(4, 1, 2 * SMALL, True, True, 2, id="sequence-parallel-checkpointing", marks=pytest.mark.slow),
        pytest.param(4, 3, 4 * SMALL, False, True, 2, id="sequence-parallel-zero-3-padded", marks=pytest.mark.slow),
        pytest.param(2, 2, ALL, False, False, 2, id="sequence-parallel-padded", marks=pytest.mark.slow),
        pytest.param(2, 0, SMALL, True, False, 2, id="sequence-parallel-no-zero", marks=pytest.mark.slow),
    ],
)
def test_every_loss_takes_the_same_step(
    plain: Results,
    tiny_model: Path,
    tmp_path: Path,
    ranks: int,
    stage: int,
    budget: int,
    packing: bool,
    checkpointing: bool,
    sequence: int,
) -> None:
    config = make_config(
        tiny_model,
        ranks=ranks,
        stage=stage,
        learner={"micro_batch_tokens": budget, "packing": packing, "sequence_parallel_size": sequence},
        model={"gradient_checkpointing": checkpointing},
    )
    origin = load_file(tiny_model / "model.safetensors")
    for loss, (value, norm, weights) in step_of_every_loss(config, tmp_path).items():
        want_value, want_norm, want_weights = plain[loss]
        assert want_norm > 1e-3, loss
        assert value == pytest.approx(want_value, rel=1e-5, abs=1e-6), loss
        assert norm == pytest.approx(want_norm, rel=1e-5), loss
        assert moved_apart(weights, want_weights, origin) < 1e-5, loss
