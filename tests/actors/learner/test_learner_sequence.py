"""Ranks that share their micro-batches, against whole sequences: attention by itself, one step, and what is trained beside.

Every loss is in test_invariance.py.
"""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import ray
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed import distributed_c10d

from actors.learner.group import LearnerGroup
from actors.learner.sequence import HeadAttention
from grpo_ray.batch.plan import plan_batch
from grpo_ray.config.model import TinyModelConfig
from grpo_ray.errors import ConfigError, NonFiniteError
from grpo_ray.models.attention import PackedLayout, packed_attention
from grpo_ray.models.files.tiny import build_tiny_model
from grpo_ray.types import TrainBatch, VersionSpan
from tests.actors.learner.saved import load, save
from tests.actors.learner.test_learner import (
    TEMPERATURE,
    assert_one_step_equals_plain_pytorch,
    exported,
    make_batch,
    make_config,
    moved_apart,
    plain_ppo,
    plain_step,
    plain_updates,
    run,
    start,
    watch,
)

pytestmark = [pytest.mark.usefixtures("local_ray"), pytest.mark.timeout(300), pytest.mark.long]
BUDGET = 150


@pytest.fixture(scope="module")
def four_heads(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two key heads: with two ranks none is repeated, with four each is."""
    config = TinyModelConfig(hidden_size=128, num_layers=2, num_heads=4, num_kv_heads=2, context=256, seed=3)
    return build_tiny_model(tmp_path_factory.mktemp("four") / "model", config)


def on_all(group: LearnerGroup, function: Any, *args: Any) -> list[Any]:
    return ray.get([a.__ray_call__.remote(function, *args) for a in group._actors], timeout=60)


def listening_addresses(actor: Any) -> set[str]:
    connections = psutil.Process().net_connections("inet")
    return {c.laddr.ip for c in connections if c.status == psutil.CONN_LISTEN}


def grad_of(x: Tensor) -> Tensor:
    assert x.grad is not None
    return x.grad


def attention_apart(actor: Any, heads: int, key_heads: int, window: int | None) -> float:
    """The largest difference of output and gradients between this rank's slice and the whole, float64."""
    torch.manual_seed(0)
    lengths, ranks = [3, 5, 5, 9, 2], actor._ranks
    layout = PackedLayout.of(lengths, [(k,) for k in range(len(lengths))])
    options: dict[str, Any] = {"packed_layout": layout, "sliding_window": window}
    shapes = [(1, number, sum(lengths), 8) for number in (heads, key_heads, key_heads)]
    whole = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes]
    q, k, v = whole
    want, _ = packed_attention(nn.Module(), q, k, v, None, **options)
    n = sum(lengths) // ranks.size
    own = slice(ranks.rank * n, (ranks.rank + 1) * n)
    parts = [x.detach()[:, :, own].requires_grad_() for x in whole]
    q, k, v = parts
    got, _ = HeadAttention(packed_attention, ranks)(nn.Module(), q, k, v, None, **options)
    grad = torch.randn_like(want)
    want.backward(grad)
    got.backward(grad[:, own])
    pairs = [(got, want[:, own]), *((grad_of(p), grad_of(w)[:, :, own]) for p, w in zip(parts, whole, strict=True))]
    return max(float((a - b).abs().max()) for a, b in pairs)


def test_two_ranks_share_every_micro_batch_and_step_like_plain_pytorch(
    tiny_model: Path,
    tmp_path: Path,
    groups: list[LearnerGroup],
) -> None:
    learner = {"sequence_parallel_size": 2, "micro_batch_tokens": BUDGET}
    config = make_config(tiny_model, ranks=2, stage=3, learner=learner)
    group = assert_one_step_equals_plain_pytorch(config, tiny_model, tmp_path, groups)

    for heads, key_heads, window in ((4, 2, None), (4, 1, 4), (6, 3, None), (2, 2, 4)):
        assert max(on_all(group, attention_apart, heads, key_heads, window)) < 1e-12, (heads, key_heads, window)
    timeouts = on_all(group, lambda a: a._ranks.group._get_backend(torch.device("cpu")).options._timeout)
    assert timeouts == [timedelta(seconds=60)] * 2
    # The first is Ray's own.
    assert on_all(group, listening_addresses) == [{"::", "127.0.0.1"}] * 2
    assert on_all(group, lambda a: distributed_c10d._tensor_to_object.__module__) == ["actors.rendezvous"] * 2

    # Each body has half of the tokens, rounded up, and the same ones as its neighbour.
    on_all(group, watch)
    batch = make_batch(seed=1)
    members = [s for s in batch.samples if s.loss_mask]
    lengths = [s.num_prompt_tokens + s.num_tokens for s in members]
    (plan,) = plan_batch(
        lengths, [s.group for s in members], num_ranks=1, num_mini_batches=1, micro_batch_tokens=BUDGET
    )
    sizes = [sum(lengths[i] - 1 for i in micro) for micro in plan.ranks[0]]
    assert len(sizes) > 1
    assert any(size % 2 for size in sizes)
    metrics = run(group.update(batch)).metrics
    assert on_all(group, lambda a: a.seen) == [[-(-size // 2) for size in sizes]] * 2
    assert metrics["tokens/processed"] == sum(sizes)
    assert metrics["update/imbalance"] == 1

    # A rank whose slice has no target takes part, and adds to the gradient what the other's targets ask of it.
    one = batch.samples[0]
    token: dict[str, Any] = {"token_ids": np.array([9]), "logprobs": np.zeros(1), "versions": (VersionSpan(2, 0, 1),)}
    rows = [replace(one.ref[one.row], prompt_token_ids=np.arange(10, 17), **token)]
    single = TrainBatch(3, [replace(one, ref=rows, row=0, num_prompt_tokens=7, num_tokens=1)], TEMPERATURE)
    exported(group, tmp_path / "before")
    _, want_norm, _ = plain_step(tmp_path / "before", single)
    assert run(group.update(single)).metrics["grad_norm"] == pytest.approx(want_norm, rel=1e-5)

    bad = batch.samples[4]
    broken = [replace(s, advantage=float("nan")) if s is bad else s for s in batch.samples]
    with pytest.raises(NonFiniteError, match=rf"the loss of sample {bad.prompt_id}\[{bad.index}\]"):
        run(group.update(TrainBatch(4, broken, TEMPERATURE)))
    assert run(group.update(make_batch(seed=2))).metrics["grad_norm"] > 0


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "size", "stage"), [(2, 2, 2), (4, 4, 3), (4, 2, 1)])
def test_key_heads_shared_or_repeated_step_like_plain_pytorch(
    ranks: int,
    size: int,
    stage: int,
    four_heads: Path,
    tmp_path: Path,
    groups: list[LearnerGroup],
) -> None:
    config = make_config(four_heads, ranks=ranks, stage=stage, learner={"sequence_parallel_size": size})
    assert_one_step_equals_plain_pytorch(config, four_heads, tmp_path, groups)


@pytest.mark.slow
def test_old_and_reference_log_probabilities_go_the_same_way(
    tiny_model: Path,
    tmp_path: Path,
    groups: list[LearnerGroup],
) -> None:
    algorithm = {"num_iterations": 2, "num_mini_batches": 2, "beta": 0.04, "loss": "dapo"}
    learner = {"learning_rate": 0.3, "sequence_parallel_size": 2}
    group = start(make_config(tiny_model, ranks=4, stage=3, algorithm=algorithm, learner=learner), tmp_path)
    groups.append(group)
    got = run(group.update(make_batch())).metrics
    for name, value in plain_updates(tiny_model, make_batch(), lr=0.3, beta=0.04).items():
        assert got[name] == pytest.approx(value, rel=2e-3, abs=2e-5), name


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "stage"), [(2, 3), (4, 2)])
def test_the_critic_shares_its_micro_batches_too(
    ranks: int,
    stage: int,
    tiny_model: Path,
    tmp_path: Path,
    groups: list[LearnerGroup],
) -> None:
    algorithm = {"preset": "ppo", "num_mini_batches": 1, "gamma": 0.98, "lam": 0.9}
    learner = {"sequence_parallel_size": 2}
    critic = {"learning_rate": 0.3}
    config = make_config(tiny_model, ranks=ranks, stage=stage, algorithm=algorithm, critic=critic, learner=learner)
    group = start(config, tmp_path)
    groups.append(group)
    for plain in plain_ppo(tiny_model, make_batch(), updates=2, beta=0.0):
        metrics = run(group.update(make_batch())).metrics
        for name, value in plain.items():
            assert metrics[name] == pytest.approx(value, rel=2e-4, abs=1e-6), name


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "tolerance"),
    [({"lora": {"r": 4, "alpha": 8}, "gradient_checkpointing": True}, 1e-4), ({"dtype": "bfloat16"}, 2e-2)],
    ids=["adapters", "bfloat16"],
)
def test_adapters_and_bf16_step_as_on_one_rank_and_the_checkpoint_is_free_of_the_slices(
    model: dict[str, Any],
    tolerance: float,
    tiny_model: Path,
    tmp_path: Path,
    groups: list[LearnerGroup],
) -> None:
    results, saved = [], tmp_path / "saved"
    saved.mkdir()
    for ranks, size in ((1, 1), (2, 2), (2, 1)):
        learner = {"sequence_parallel_size": size}
        config = make_config(
            tiny_model, ranks=ranks, stage=3, model=model, learner=learner, algorithm={"beta": 0.1, "loss": "dapo"}
        )
        group = start(config, tmp_path)
        groups.append(group)
        if (ranks, size) == (2, 1):
            run(load(group, saved))
        else:
            run(group.update(make_batch()))
        if (ranks, size) == (2, 2):
            run(save(group, saved))
        metrics = run(group.update(make_batch(seed=1, step=1))).metrics
        results.append((metrics, exported(group, tmp_path / f"hf-{ranks}-{size}")))
        run(group.close())
    origin = load_file(tiny_model / "model.safetensors")
    (want, want_weights), *others = results
    assert want["kl/ref"] > 1e-6
    for metrics, weights in others:
        for name in ("grad_norm", "kl/ref", "loss/policy", "entropy"):
            assert metrics[name] == pytest.approx(want[name], rel=tolerance, abs=1e-5), name
        assert moved_apart(weights, want_weights, origin) < tolerance


@pytest.mark.slow
def test_heads_that_can_not_be_shared_are_told_at_the_start(tiny_model: Path, tmp_path: Path) -> None:
    config = make_config(tiny_model, ranks=3, stage=2, learner={"sequence_parallel_size": 3})
    with pytest.raises(
        ConfigError, match=r"2 attention heads, .*sequence_parallel_size 3 does not divide; use one of 1, 2"
    ):
        start(config, tmp_path)
