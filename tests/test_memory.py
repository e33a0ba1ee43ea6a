"""What a learner will hold, in numbers worked out by hand."""

from __future__ import annotations

import pytest

from grpo_ray.config import LearnerConfig, ModelConfig
from grpo_ray.memory import count_parameters, learner_memory

PARAMS = 1200
"""Of which four ranks have 300 each."""


@pytest.mark.parametrize(
    ("stage", "weights", "gradients", "optimizer"),
    # 2, 4 and 12 bytes of a parameter.
    [(0, 2400, 4800, 14400), (1, 2400, 4800, 3600), (2, 2400, 1200, 3600), (3, 600, 1200, 3600)],
)
def test_zero_splits_optimizer_gradients_and_weights_one_after_the_other(
    stage: int, weights: int, gradients: int, optimizer: int
) -> None:
    learner = LearnerConfig(num_actors=4, zero_stage=stage, logprob_chunk_tokens=10)
    got = learner_memory(PARAMS, 50, ModelConfig(path="x"), learner, reference=True, on_gpu=False)
    assert (got.weights, got.gradients, got.optimizer) == (weights, gradients, optimizer)
    assert got.reference == weights, "split as the weights are"
    # Ten rows of fifty logits, of 4 bytes, and their gradient.
    assert got.logits == 4000
    assert got.total == weights + gradients + optimizer + weights + 4000


def test_in_fp32_a_parameter_is_its_own_master() -> None:
    learner = LearnerConfig(logprob_chunk_tokens=1, zero_stage=0)
    got = learner_memory(PARAMS, 50, ModelConfig(path="x", dtype="float32"), learner, reference=False, on_gpu=False)
    assert (got.weights, got.gradients, got.optimizer, got.reference) == (4800, 4800, 9600, 0)
    assert got.logits == 400


def test_an_optimizer_on_the_host_takes_none_of_it() -> None:
    learner = LearnerConfig(offload_optimizer=True, zero_stage=2)
    assert learner_memory(PARAMS, 50, ModelConfig(path="x"), learner, reference=False, on_gpu=True).optimizer == 0


@pytest.mark.parametrize(("on_gpu", "mebibytes"), [(False, 64), (True, 256)])
def test_without_a_chunk_of_its_own_the_logits_are_as_many_as_fit(on_gpu: bool, mebibytes: int) -> None:
    vocabulary = 1 << 14
    got = learner_memory(PARAMS, vocabulary, ModelConfig(path="x"), LearnerConfig(), reference=False, on_gpu=on_gpu)
    assert got.logits == 2 * mebibytes << 20


def test_parameters_are_counted_without_making_them() -> None:
    from transformers import Qwen2Config

    size, layers, vocabulary, middle = 16, 2, 50, 40
    config = Qwen2Config(
        vocab_size=vocabulary,
        hidden_size=size,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=middle,
        tie_word_embeddings=True,
    )
    attention = size * size + size + 2 * (size * size // 2 + size // 2) + size * size
    layer = attention + 3 * size * middle + 2 * size
    assert count_parameters(config) == vocabulary * size + layers * layer + size
