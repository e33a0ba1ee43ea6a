"""Estimates of memory against what was measured, and what is made of them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from grpo_ray.config.loading import build
from grpo_ray.config.model import ModelConfig
from grpo_ray.config.schema import RunConfig
from grpo_ray.config.supervised import SftConfig
from grpo_ray.models.files.loading import load_config
from grpo_ray.models.files.tiny import tiny_config
from grpo_ray.models.memory.estimate import (
    GIB,
    LEARNER_BASE,
    ModelFacts,
    adapter_params,
    engine_memory,
    facts_of,
    known_facts,
    learner_memory,
    route_memory,
)
from grpo_ray.models.memory.fit import fit_memory, fits, parts_of, too_large
from grpo_ray.models.trainable import skeleton
from tests.recipes import run_config

SMOLLM2 = ModelFacts(134_515_008, 30, 576, 576, 1536, 49_152)
FOUR_LAYERS = ModelFacts(42_472_512, 4, 576, 576, 1536, 49_152)
"""The same with four layers instead of thirty."""
DTYPES = ("float32", "bfloat16")
BIG = ModelFacts(7_615_616_512, 28, 3584, 3584, 18_944, 152_064)


def config(*overrides: str, tokens: int = 1024, micro_batches: int = 2) -> RunConfig:
    """A step of so many micro-batches of so many tokens, samples of 128."""
    samples = tokens * micro_batches // 128
    groups = max(1, samples // 2)
    return run_config(
        "model.dtype=float32",
        "data.max_prompt_length=64",
        "rollout.max_completion_length=64",
        "rollout.num_generations=2",
        f"prompts_per_step={groups}",
        f"learner.micro_batch_tokens={tokens}",
        "learner.overlap=false",
        *overrides,
    )


@pytest.mark.parametrize(
    ("facts", "overrides", "tokens", "micro_batches", "measured_gib"),
    [
        (SMOLLM2, (), 1024, 2, 6.40),
        (FOUR_LAYERS, (), 1024, 2, 1.92),
        (FOUR_LAYERS, (), 256, 1, 1.36),
        (FOUR_LAYERS, (), 4096, 1, 2.34),
        (FOUR_LAYERS, ("model.gradient_checkpointing=true",), 4096, 1, 1.63),
        (FOUR_LAYERS, ("algorithm.beta=0.1",), 1024, 1, 1.69),
        (FOUR_LAYERS, ("model.lora={}",), 1024, 1, 0.82),
    ],
)
def test_estimates_are_within_a_fifth_of_what_was_measured(
    facts: ModelFacts, overrides: tuple[str, ...], tokens: int, micro_batches: int, measured_gib: float
) -> None:
    memory = learner_memory(facts, config(*overrides, tokens=tokens, micro_batches=micro_batches), on_gpu=False)
    assert (memory.total - memory.base) / GIB == pytest.approx(measured_gib, rel=0.2)


def test_states_are_those_of_the_paper() -> None:
    """16 bytes a parameter in fp32 and 14 in bf16, the gradient aside."""
    n = SMOLLM2.num_params
    whole = learner_memory(SMOLLM2, config(), on_gpu=True)
    assert (whole.weights, whole.optimizer, whole.base) == (4 * n, 12 * n, 0)
    half = learner_memory(SMOLLM2, config("model.dtype=bfloat16"), on_gpu=True)
    assert (half.weights, half.optimizer) == (2 * n, 12 * n)
    none = learner_memory(SMOLLM2, config("learner.zero_stage=0"), on_gpu=True)
    assert (none.weights, none.gradients, none.optimizer) == (4 * n, 4 * n, 8 * n)


@pytest.mark.parametrize(("stage", "optimizer", "gradients"), [(1, 3, 1 + 2), (2, 3, 2 + 0.5)])
def test_stages_split_over_the_learners(stage: int, optimizer: float, gradients: float) -> None:
    """Buckets of the whole gradient, two of them at stage 2; the accumulated gradient, and the one that is added to it."""
    four = config("learner.num_actors=4", f"learner.zero_stage={stage}", micro_batches=16)
    memory = learner_memory(SMOLLM2, four, on_gpu=True)
    n = SMOLLM2.num_params
    assert memory.optimizer == pytest.approx(optimizer * n, rel=1e-6)
    assert memory.gradients == pytest.approx(4 * gradients * n, rel=1e-6)
    assert memory.weights == 4 * n


def test_stage_3_splits_the_weights_and_gathers_them_for_a_while() -> None:
    eight = config("learner.num_actors=8", "learner.zero_stage=3", micro_batches=16)
    memory = learner_memory(BIG, eight, on_gpu=True)
    assert memory.weights == 4 * BIG.num_params // 8 + 4 * 1_000_000_000
    assert memory.optimizer == 12 * BIG.num_params // 8


def test_offloaded_states_are_not_on_the_gpu_and_stay_in_memory_without_one() -> None:
    off = config("learner.offload_optimizer=true")
    assert learner_memory(SMOLLM2, off, on_gpu=True).optimizer == 0
    assert learner_memory(SMOLLM2, off, on_gpu=False).optimizer == 12 * SMOLLM2.num_params


def test_a_critic_is_trained_as_the_policy_is() -> None:
    alone, both = (learner_memory(SMOLLM2, config(*o), on_gpu=True) for o in ((), ("algorithm=ppo",)))
    assert both.reference - alone.reference == alone.weights + alone.gradients + alone.optimizer


def test_a_micro_batch_is_no_larger_than_the_step() -> None:
    small, large = config(tokens=1024, micro_batches=1), config("learner.micro_batch_tokens=8192", micro_batches=1)
    of_small, of_large = (learner_memory(SMOLLM2, c, on_gpu=True).activations for c in (small, large))
    assert of_small == of_large
    sliced = config("learner.num_actors=2", "learner.sequence_parallel_size=2", micro_batches=1)
    assert learner_memory(SMOLLM2, sliced, on_gpu=True).activations * 2 == of_small


def test_adapters_of_all_linear_layers_are_counted() -> None:
    lora = config("model.lora={r: 8}").model.lora
    assert lora is not None
    assert adapter_params(FOUR_LAYERS, lora) == 8 * 4 * (4 * (576 + 576) + 3 * (576 + 1536))


def test_an_engine_holds_its_cache_and_more_than_its_weights_where_it_gets_new_ones() -> None:
    bf16 = config("model.dtype=bfloat16")
    for synced, times in ((True, 3), (False, 1)):
        parts = engine_memory(SMOLLM2, bf16, 2.5, synced=synced)
        assert (parts["weights"], parts["KV cache"]) == (times * 2 * SMOLLM2.num_params, int(2.5 * GIB))


def test_weights_are_once_more_in_memory_on_their_way_unless_adapters_or_none_are_sent() -> None:
    sent = "weights on their way to the engines"
    parts = {part.what: part.each for part in parts_of(SMOLLM2, config(), "grpo")}
    assert parts[sent] == 4 * SMOLLM2.num_params
    for run, kind in ((config("model.lora={transfer: adapter}"), "grpo"), (config(), "eval"), (config(), "sample")):
        less = {part.what: part.each for part in parts_of(SMOLLM2, run, kind)}
        assert sent not in less
        assert parts["rollout"] - less["rollout"] == 2 * 4 * SMOLLM2.num_params


@pytest.mark.parametrize(("kind", "measured_gib"), [("grpo", 3.32), ("eval", 2.09)])
def test_an_engine_and_what_a_run_has_beside_it_are_as_measured(kind: str, measured_gib: float) -> None:
    """SmolLM2-135M in fp32 on two cores: proportional shares of the processes' memory, before and after two weight syncs."""
    parts = {part.what: part.each / GIB for part in parts_of(SMOLLM2, config(), kind)}
    assert parts["rollout"] == pytest.approx(measured_gib, rel=0.2)
    assert parts["the controller"] == pytest.approx(0.65, rel=0.2)
    assert parts["Ray"] == pytest.approx(0.46, rel=0.2)
    assert parts["reward"] == pytest.approx(0.145, abs=0.1)


def test_logits_in_fp32_take_a_copy_of_a_bf16_head_on_cpus() -> None:
    of = {
        d: [learner_memory(SMOLLM2, config(f"model.dtype={d}"), on_gpu=g).logits for g in (True, False)] for d in DTYPES
    }
    chunks = [learner_memory(SMOLLM2, config("model.lora={}"), on_gpu=g).logits for g in (True, False)]
    head = 4 * SMOLLM2.vocab * SMOLLM2.hidden
    assert of["float32"] == [chunks[0] + 2 * head, chunks[1] + 2 * head]
    # A GPU multiplies in bf16 and needs the gradient in it beside its sum in fp32; a CPU makes a copy of the head.
    assert of["bfloat16"] == [chunks[0] + head + head // 2, chunks[1] + 3 * head]


def test_facts_come_from_files_as_from_transformers(tiny_model: Path) -> None:
    known = known_facts(run_config(f"model={{path: {tiny_model}, tiny: null}}").model)
    read = load_config(str(tiny_model), trust_remote_code=False)
    held, _ = skeleton(read, ModelConfig(path=str(tiny_model)))
    assert known == facts_of(read, sum(p.numel() for p in held.parameters()))


def test_facts_of_older_kinds_and_of_no_model(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(
        json.dumps({"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 100, "n_inner": None})
    )
    save_file({"a": np.zeros((3, 4)), "b": np.zeros(5)}, tmp_path / "model-1.safetensors")
    there = run_config(f"model={{path: {tmp_path}, tiny: null}}").model
    assert known_facts(there) == ModelFacts(17, 2, 64, 64, 256, 100)
    (tmp_path / "model-1.safetensors").write_bytes(b"torn")
    assert known_facts(there) is None
    assert known_facts(run_config("model={path: org/name, tiny: null}").model) is None


@pytest.mark.parametrize("options", ["{hidden_size: 128, vocab_size: 512}", "{num_layers: 1, words: [one, <think>]}"])
def test_tiny_models_are_counted_without_being_made(tmp_path: Path, options: str) -> None:
    config = run_config(f"model.tiny={options}").model
    assert config.tiny is not None
    read = tiny_config(config.tiny)
    held, _ = skeleton(read, ModelConfig(path=str(tmp_path)))
    assert known_facts(config) == facts_of(read, sum(p.numel() for p in held.parameters()))


RECIPE: dict[str, Any] = {
    "model": {"path": "x", "dtype": "float32"},
    "data": {"train": {"path": "x"}},
    "reward": {"functions": [{"name": "accuracy"}]},
}


def _fitted(free_gib: float, kind: str = "grpo", **learner: Any) -> RunConfig:
    run = build(RunConfig, RECIPE | ({"learner": learner} if learner else {}), "test")
    return fit_memory(SMOLLM2, run, kind, int(free_gib * GIB), engines_are_open=True)


def test_micro_batches_are_as_large_as_memory_lets_them_be() -> None:
    assert [_fitted(free).learner.micro_batch_tokens for free in (64, 20, 16, 12, 1)] == [8192, 4096, 2048, 1024, 1024]
    assert _fitted(20, micro_batch_tokens=8192).learner.micro_batch_tokens == 8192
    assert _fitted(1, kind="eval").learner.micro_batch_tokens == 8192


def test_engines_are_fewer_where_memory_is_short() -> None:
    run = build(RunConfig, RECIPE | {"rollout": {"num_actors": 8}}, "test")
    assert fit_memory(SMOLLM2, run, "grpo", 64 * GIB, engines_are_open=True).rollout.num_actors == 8
    less = fit_memory(SMOLLM2, run, "grpo", 16 * GIB, engines_are_open=True)
    assert less.rollout.num_actors < 8
    assert fits(SMOLLM2, less, "grpo", 16 * GIB)
    assert fit_memory(SMOLLM2, run, "grpo", 16 * GIB, engines_are_open=False).rollout.num_actors == 8


def test_what_does_not_fit_is_told_by_part_with_what_lowers_it() -> None:
    assert too_large(SMOLLM2, _fitted(64), "grpo", 64 * GIB) is None
    told = too_large(BIG, _fitted(64), "grpo", 64 * GIB)
    assert told is not None
    assert "\n" not in told
    for word in ("64.00 GiB are free", "learner", "model.gradient_checkpointing", "model.lora", "rollout", "reward"):
        assert word in told
    assert told.index("learner") < told.index("rollout")
    assert too_large(BIG, _fitted(64), "eval", 64 * GIB) is None


def test_a_supervised_run_is_a_learner_and_what_drives_it() -> None:
    sft = build(SftConfig, {"model": {"path": "x"}, "data": {"train": {"path": "x"}}}, "test")
    parts = {part.what: part for part in parts_of(SMOLLM2, sft, "sft")}
    assert set(parts) == {"learner", "the controller", "Ray"}
    assert parts["learner"].each == learner_memory(SMOLLM2, sft, on_gpu=False).total > LEARNER_BASE


def test_the_experts_of_samples_under_way_are_counted_where_they_are_kept() -> None:
    facts = replace(FOUR_LAYERS, route_bytes=4 * 8)
    asked = config("rollout.keep_routing=true", "prompts_per_step=1000")
    without, kept = (next(p for p in parts_of(facts, c, "train") if p.what == "Ray").each for c in (config(), asked))
    assert kept - without == 1000 * 2 * 128 * 4 * 8
    assert route_memory(facts, config()) == 0


@pytest.mark.parametrize(("experts", "each"), [(16, 1), (257, 2)])
def test_a_token_takes_a_byte_for_each_layer_and_expert_or_two_where_a_byte_does_not_do(
    experts: int, each: int
) -> None:
    sizes = {"hidden_size": 64, "num_hidden_layers": 3, "num_experts_per_tok": 4, "vocab_size": 9}
    assert facts_of(SimpleNamespace(**sizes, num_experts=experts), 1000).route_bytes == 3 * 4 * each
    assert facts_of(SimpleNamespace(**sizes), 1000).route_bytes == 0
