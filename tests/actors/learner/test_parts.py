"""A step whose groups come one after the other, while others are still sampled, is the step of the whole batch."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file

from actors.learner.group import LearnerGroup
from grpo_ray.algorithm.losses.table import POLICY_LOSSES
from grpo_ray.config.algorithm import AlgorithmConfig
from grpo_ray.errors import NonFiniteError, WorkerError
from grpo_ray.run.replay import parts_of
from grpo_ray.types import TrainBatch
from tests.actors.learner.saved import load, save
from tests.actors.learner.test_invariance import choose
from tests.actors.learner.test_learner import exported, make_batch, make_config, moved_apart, plain_step, run, start

pytestmark = [pytest.mark.usefixtures("local_ray"), pytest.mark.timeout(300), pytest.mark.long]
PART_OF_GROUP = {1: 0, 0: 1}
"""The second group is finished first, then the first; the others come with the batch."""
COMPARED = (
    "loss/policy",
    "loss/kl",
    "grad_norm",
    "entropy",
    "ratio/mean",
    "mismatch/mean_abs",
    "tokens/trained",
    "clip/low",
)


def in_parts(batch: TrainBatch) -> TrainBatch:
    return replace(batch, samples=[replace(s, part=PART_OF_GROUP.get(s.group)) for s in batch.samples])


def assert_nothing_moves(group: LearnerGroup, case: str) -> None:
    """In a step whose samples are all out of the loss, whether they come in parts or whole; what it leaves is as before."""
    batch = make_batch()
    out_of_it = replace(batch, samples=[replace(s, loss_mask=False) for s in batch.samples])
    empty = replace(batch, samples=[replace(s, num_tokens=0) for s in batch.samples])
    for none in (in_parts(out_of_it), out_of_it, in_parts(empty)):
        metrics = train(group, none)
        assert metrics["grad_norm"] == metrics["tokens/trained"] == metrics["update/num_steps"] == 0, case
        assert all(map(math.isfinite, metrics.values())), (case, metrics)


def train(group: LearnerGroup, batch: TrainBatch) -> dict[str, float]:
    for part in parts_of(batch):
        run(group.accumulate(part))
    return run(group.update(batch)).metrics


def flops(metrics: dict[str, float], ranks: int) -> float:
    """That the learners say they have done in an update."""
    seconds = metrics["tokens/processed"] / metrics["throughput/learner_tokens_per_s"]
    return metrics["throughput/learner_tflops"] * 1e12 * ranks * seconds


@pytest.mark.parametrize(
    ("ranks", "stage", "dtype", "tolerance"),
    [
        (2, 3, "float32", 1e-6),
        pytest.param(1, 0, "float32", 1e-6, marks=pytest.mark.slow),
        pytest.param(2, 1, "float32", 1e-6, marks=pytest.mark.slow),
        pytest.param(2, 2, "float32", 1e-6, marks=pytest.mark.slow),
        pytest.param(2, 1, "bfloat16", 1e-2, marks=pytest.mark.slow),
        pytest.param(2, 2, "bfloat16", 1e-2, marks=pytest.mark.slow),
    ],
)
def test_parts_add_up_to_the_step_of_the_whole_batch_for_every_loss(
    tiny_model: Path, tmp_path: Path, ranks: int, stage: int, dtype: str, tolerance: float
) -> None:
    # A norm that the clip cuts, which has to be taken of the gradient with all its factors; and a step that is large beside the
    # rounding of the weights.
    config = make_config(
        tiny_model,
        ranks=ranks,
        stage=stage,
        learner={"max_grad_norm": 0.05, "learning_rate": 50.0},
        model={"dtype": dtype},
        algorithm={"beta": 0.1, "old_logprobs": "rollout"},
    )
    origin = load_file(tiny_model / "model.safetensors")
    body = sum(
        weight.numel() for name, weight in origin.items() if "embed_tokens" not in name and "lm_head" not in name
    )
    group = start(config, tmp_path)
    try:
        (tmp_path / "start").mkdir()
        run(save(group, tmp_path / "start"))
        for loss in POLICY_LOSSES:
            choose(group, AlgorithmConfig(loss=loss, old_logprobs="rollout", beta=0.1))
            want = train(group, make_batch())
            want_weights = exported(group, tmp_path / f"whole-{loss}")
            run(load(group, tmp_path / "start"))
            got = train(group, in_parts(make_batch()))
            weights = exported(group, tmp_path / f"parts-{loss}")
            run(load(group, tmp_path / "start"))
            assert_nothing_moves(group, loss)
            assert want["grad_norm"] > 0.05, loss
            for name in COMPARED:
                assert got[name] == pytest.approx(want[name], rel=10 * tolerance, abs=tolerance), (loss, name)
            assert moved_apart(weights, want_weights, origin) < tolerance, loss
            again = want["tokens/shared"] - got["tokens/shared"]
            assert again != 0 or ranks == 1, "a group has its prompt on both ranks in the one plan and not in the other"
            done = flops(want, ranks)
            assert flops(got, ranks) - done == pytest.approx(8 * body * again, rel=1e-3, abs=1e-6 * done), (
                "three passes' worth of training, one of the reference"
            )
    finally:
        run(group.close())


def test_parts_that_are_not_in_the_batch_and_losses_that_are_no_number_stop_before_the_weights_move(
    tiny_model: Path, tmp_path: Path
) -> None:
    group = start(make_config(tiny_model, ranks=2, stage=2), tmp_path)
    try:
        batch = in_parts(make_batch())
        bad = batch.samples[3]
        assert bad.part == 0
        broken = replace(batch, samples=[replace(s, advantage=float("nan")) if s is bad else s for s in batch.samples])
        with pytest.raises(NonFiniteError, match=r"the loss of sample test/0/1\[0\] is not a finite number"):
            train(group, broken)
        _, want_norm, _ = plain_step(tiny_model, make_batch(seed=5))
        assert train(group, make_batch(seed=5))["grad_norm"] == pytest.approx(want_norm, rel=1e-5)
        run(group.accumulate(parts_of(batch)[0]))
        with pytest.raises(WorkerError, match="of 3 samples that came in parts, 0 are in the batch"):
            run(group.update(replace(batch, samples=[s for s in batch.samples if s.part != 0])))
    finally:
        run(group.close())
