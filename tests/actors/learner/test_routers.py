"""Real DeepSpeed ranks train a mixture of experts: the loss of its routers is the same however a step is computed, and experts that
come with samples are taken."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

from actors.learner.group import LearnerGroup
from grpo_ray.errors import WorkerError
from grpo_ray.types import TrainBatch
from tests.actors.learner.test_learner import exported, make_batch, make_config, moved_apart, run, start
from tests.models.small import small_config, small_model

pytestmark = [pytest.mark.usefixtures("local_ray"), pytest.mark.timeout(300), pytest.mark.long]
COEF = 0.05
ALL = 1000
"""Tokens: the whole batch in a micro-batch."""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("moe") / "model"
    small_model(small_config("qwen3_moe", vocab_size=256)).save_pretrained(folder)  # type: ignore[operator]
    return folder


def batch() -> TrainBatch:
    """Groups of which one has no signal at all."""
    made = make_batch()
    return replace(made, samples=[replace(s, advantage=0.0) if s.group == 0 else s for s in made.samples])


def own_loss(checkpoint: Path) -> float:
    """The mean of Transformers' loss over the samples that are trained."""
    from transformers import AutoModelForCausalLM

    hf = AutoModelForCausalLM.from_pretrained(checkpoint)
    losses = []
    for sample in (s.ref[s.row] for s in batch().samples if s.loss_mask):
        ids = np.concatenate([sample.prompt_token_ids, sample.token_ids[:-1]]).astype(np.int64)
        logits = hf(input_ids=torch.from_numpy(ids)[None], use_cache=False, output_router_logits=True).router_logits
        losses.append(load_balancing_loss_func(logits, 4, 2))
    return float(sum(losses) / len(losses))


def step(
    checkpoint: Path, folder: Path, *, parts: bool = False, **options: Any
) -> tuple[dict[str, float], dict[str, Tensor]]:
    """The metrics and the weights of one step."""
    ranks, stage = options.pop("ranks"), options.pop("stage")
    learner = {"router_aux_loss_coef": COEF} | options
    checkpointing = bool(learner.pop("checkpointing", False))
    model = {"gradient_checkpointing": checkpointing}
    group = start(make_config(checkpoint, ranks=ranks, stage=stage, learner=learner, model=model), folder)
    try:
        whole = batch()
        if parts:
            for number in (0, 1):
                run(group.accumulate(replace(whole, samples=[s for s in whole.samples if s.group == number])))
        return run(group.update(whole)).metrics, exported(group, folder / "weights")
    finally:
        run(group.close())


@pytest.fixture(scope="module")
def plain(local_ray: None, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    options: dict[str, Any] = {"micro_batch_tokens": ALL, "share_prompts": False}
    return step(checkpoint, tmp_path_factory.mktemp("plain"), ranks=1, stage=0, **options)


def test_the_loss_of_a_step_is_the_mean_of_transformers_and_reaches_samples_without_signal(
    plain: Any, checkpoint: Path
) -> None:
    metrics, _ = plain
    assert metrics["loss/router"] == pytest.approx(COEF * own_loss(checkpoint), rel=1e-4)
    trained = [s for s in batch().samples if s.loss_mask]
    assert metrics["tokens/trained"] == sum(s.num_tokens for s in trained)
    assert metrics["router/load_max"] > 1
    assert 0 < metrics["router/load_entropy"] < 1


@pytest.mark.parametrize(
    "options",
    [
        pytest.param(
            {"ranks": 2, "stage": 2, "micro_batch_tokens": 100, "checkpointing": True}, id="two-ranks-checkpointing"
        ),
        pytest.param({"ranks": 1, "stage": 2, "micro_batch_tokens": 50, "parts": True}, id="parts"),
        pytest.param(
            {"ranks": 2, "stage": 1, "micro_batch_tokens": ALL, "forward": "plain"}, id="plain", marks=pytest.mark.slow
        ),
    ],
)
def test_the_loss_of_the_routers_takes_the_same_step_however_it_is_computed(
    plain: Any, checkpoint: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    want, weights = plain
    metrics, got = step(checkpoint, tmp_path, **options)
    assert metrics["loss/router"] == pytest.approx(want["loss/router"], rel=1e-4)
    assert metrics["grad_norm"] == pytest.approx(want["grad_norm"], rel=1e-4)
    assert moved_apart(got, weights, load_file(checkpoint / "model.safetensors")) < 1e-4


def test_experts_that_come_with_samples_are_taken_and_a_sample_without_any_is_refused(
    checkpoint: Path, tmp_path: Path, groups: list[LearnerGroup]
) -> None:
    config = make_config(checkpoint, ranks=1, stage=1)
    rollout = config.rollout.model_copy(update={"keep_routing": True})
    group = start(config.model_copy(update={"rollout": rollout}), tmp_path)
    groups.append(group)
    with pytest.raises(WorkerError, match=r"sample test/0/\d\[\d\] of step 1 came without the experts"):
        run(group.update(batch()))


def test_a_learner_refuses_what_a_dense_model_does_not_have(tiny_model: Path, tmp_path: Path) -> None:
    config = make_config(tiny_model, ranks=1, stage=1, learner={"router_aux_loss_coef": 0.1})
    with pytest.raises(Exception, match=r"learner\.router_aux_loss_coef: \w+ is no mixture of experts"):
        start(config, tmp_path)
