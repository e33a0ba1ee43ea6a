"""Slices of a micro-batch: together the whole, equally long, each with its own targets; and which models can't be sliced."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM

from grpo_ray.batch.pack import PackItem, pack
from grpo_ray.batch.sequence import check_model, slice_of
from grpo_ray.errors import ConfigError

SIZES = st.lists(st.tuples(st.integers(1, 12), st.integers(1, 20)), max_size=6)


@settings(deadline=None)
@given(sizes=SIZES, padded=st.booleans(), ranks=st.integers(1, 5))
def test_slices_end_to_end_are_the_micro_batch_and_its_filling(
    sizes: list[tuple[int, int]], padded: bool, ranks: int
) -> None:
    rng = np.random.default_rng(0)
    items = [
        PackItem(rng.integers(1, 99, n), rng.integers(1, 99, t), np.zeros(t, np.float32), 1.0, 1.0, i)
        for i, (n, t) in enumerate(sizes)
    ]
    batch = pack(items, padded=padded)
    slices = [slice_of(batch, r, ranks) for r in range(ranks)]
    tokens = len(batch.input_ids)
    n = -(-tokens // ranks)
    fill = n * ranks - tokens
    assert [len(s.input_ids) for s in slices] == [len(s.position_ids) for s in slices] == [n] * ranks
    assert np.array_equal(np.concatenate([s.input_ids for s in slices])[:tokens], batch.input_ids)
    positions = np.concatenate([s.position_ids for s in slices])
    assert np.array_equal(positions, [*batch.position_ids, *range(fill)])
    assert np.array_equal(np.concatenate([s.targets for s in slices]), batch.targets)
    rows = np.concatenate([s.target_rows + r * n for r, s in enumerate(slices)])
    assert np.array_equal(rows, batch.target_rows)
    for s in slices:
        assert ((s.target_rows >= 0) & (s.target_rows < n)).all()
        assert s.counts == tuple(len(other.targets) for other in slices)
        # The filling is a sequence of its own, which sees nothing and is seen by nobody.
        assert s.lengths == [*batch.lengths, *[fill] * (fill > 0)]
        assert s.sequences == [(k,) for k in range(len(s.lengths))]


def model(kind: str, **values: Any) -> Any:
    small = {"hidden_size": 56, "intermediate_size": 32, "num_hidden_layers": 2, "vocab_size": 50}
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **small | values))


HEADS: dict[str, Any] = {"num_attention_heads": 14, "num_key_value_heads": 2}


@pytest.mark.parametrize("size", [2, 7, 14])
def test_heads_that_the_ranks_share_evenly_are_enough_whatever_the_key_heads(size: int) -> None:
    check_model(model("qwen2", **HEADS), size)


@pytest.mark.parametrize(
    ("kind", "values", "size", "expected"),
    [
        (
            "qwen2",
            HEADS,
            4,
            "Qwen2ForCausalLM has 14 attention heads, .*_size 4 does not divide; use one of 1, 2, 7, 14",
        ),
        ("qwen2", HEADS, 28, "14 attention heads"),
        (
            "llama",
            {**HEADS, "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            2,
            "dynamic positions, .*; use learner.sequence_parallel_size 1$",
        ),
    ],
)
def test_a_model_that_slices_would_change_is_refused(
    kind: str, values: dict[str, Any], size: int, expected: str
) -> None:
    with pytest.raises(ConfigError, match=expected):
        check_model(model(kind, **values), size)


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_positions_of_one_kind_of_layer_that_depend_on_a_length_are_refused_by_name(kind: str) -> None:
    hf = model("llama", **HEADS)
    hf.config.rope_parameters = {"full_attention": {"rope_type": kind}, "sliding_attention": {"rope_type": "default"}}
    with pytest.raises(ConfigError, match=f"LlamaForCausalLM has {kind} positions"):
        check_model(hf, 2)


def test_a_model_without_rotary_positions_can_be_sliced() -> None:
    check_model(model("gpt2", n_embd=56, n_head=14, n_layer=2), 7)
