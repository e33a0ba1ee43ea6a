"""Memory on GPUs against a review's figures for real models on H100s, and what is proposed for what does not fit."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from actors.machines import Machine, Node
from grpo_ray.config.schema import RunConfig
from grpo_ray.config.supervised import SftConfig
from grpo_ray.errors import ConfigError
from grpo_ray.models.memory.estimate import GIB, ModelFacts, chunk_rows, facts_of, learner_memory
from grpo_ray.models.memory.gpu_fit import (
    ASLEEP,
    CONTEXT,
    Cache,
    cache_of,
    fit_micro_batch,
    fits_gpus,
    host_memory,
    learner_need,
    needs,
    proposal,
)
from launch.check.gpu import named_gpus
from launch.pipeline.stages import load_plan
from launch.run.gpus import named_gpu, parse_gpus, smallest
from launch.run.placement import fitted
from launch.run.recipe import load_recipe
from tests.recipes import run_config

QWEN_05B = ModelFacts(494_032_768, 24, 896, 896, 4864, 151_936, 128)
QWEN_15B = ModelFacts(1_543_714_304, 28, 1536, 1536, 8960, 151_936, 256)
QWEN_3B = ModelFacts(3_085_938_688, 36, 2048, 2048, 11_008, 151_936, 256)
QWEN_7B = ModelFacts(7_615_616_512, 28, 3584, 3584, 18_944, 152_064, 512)
QWEN3_8B = ModelFacts(8_190_735_360, 36, 4096, 4096, 12_288, 151_936, 1024)
QWEN_32B = ModelFacts(32_763_876_352, 64, 5120, 5120, 27_648, 152_064, 1024)
H100 = parse_gpus("h100")[1].memory


def typical(*overrides: str, learner: str = "num_actors: 8, zero_stage: 2, micro_batch_tokens: 9216") -> RunConfig:
    """Eight H100s that sample and learn in turns, 512 prompts x 8 samples of 8,192 tokens."""
    return run_config(
        "data.max_prompt_length=1024",
        "prompts_per_step=512",
        "rollout={num_actors: 8, num_generations: 8, max_completion_length: 8192}",
        f"learner={{{learner}}}",
        "cluster.placement=colocated",
        *overrides,
    )


@pytest.mark.parametrize(
    ("facts", "megabytes"), [(QWEN_7B, 6.7), (QWEN_05B, 1.47), (QWEN_15B, 3.1)], ids=["7B", "0.5B", "1.5B"]
)
def test_a_token_keeps_as_much_without_checkpointing_as_the_review_says(facts: ModelFacts, megabytes: float) -> None:
    assert 2 * facts.num_layers * facts.per_layer_on_gpu / 1e6 == pytest.approx(megabytes, rel=0.1)


@pytest.mark.parametrize(("overrides", "gib"), [((), 42.0), (("algorithm.beta=0.001",), 56.0)])
def test_a_7b_learner_of_eight_takes_what_the_review_says(overrides: tuple[str, ...], gib: float) -> None:
    need = learner_need(QWEN_7B, typical(*overrides), H100)
    assert (need.needed - CONTEXT - ASLEEP) / GIB == pytest.approx(gib, rel=0.1)
    assert need.fits
    parts = need.parts
    share = 4 * QWEN_7B.num_params // 8
    assert (parts["weights"] + parts["optimizer"] + share) / GIB == pytest.approx(28.5, rel=0.02)
    head = 6 * QWEN_7B.vocab * QWEN_7B.hidden
    assert head / GIB == pytest.approx((2.2 + 1.1) * 1e9 / GIB, rel=0.02)


def test_what_the_review_calls_out_of_memory_is_refused_with_the_override_that_mends_it() -> None:
    off = typical("model.gradient_checkpointing=false")
    need = learner_need(QWEN_7B, off, H100)
    assert need.parts["activations"] / GIB == pytest.approx(58, rel=0.1)
    assert not need.fits
    assert proposal(QWEN_7B, off, "grpo", H100) == {"model.gradient_checkpointing": True}
    assert not fits_gpus(QWEN_32B, typical(), "grpo", H100)


def test_the_half_b_recipe_without_checkpointing_does_not_fit_24_gb_as_the_review_says() -> None:
    plain = load_recipe(RunConfig, "gsm8k_qwen2.5_0.5b", ["model.gradient_checkpointing=false"])
    found = learner_memory(QWEN_05B, plain, on_gpu=True)
    assert found.activations / 1e9 == pytest.approx(24, rel=0.1)
    states = found.weights + found.optimizer + found.reference + 4 * QWEN_05B.num_params
    assert states / 1e9 == pytest.approx(9.9, rel=0.1)
    memory = parse_gpus("24GB")[1].memory
    assert not fits_gpus(QWEN_05B, plain, "grpo", memory)
    assert proposal(QWEN_05B, plain, "grpo", memory) == {"model.gradient_checkpointing": True}


def test_the_bench_of_one_gpu_takes_18_bytes_a_parameter_and_fitted_an_h200_alone_without_checkpointing() -> None:
    bench = load_recipe(RunConfig, "tests/bench/gpu.yaml", ["learner.zero_stage=1"])
    off = load_recipe(RunConfig, "tests/bench/gpu.yaml", ["learner.zero_stage=1", "model.gradient_checkpointing=false"])
    found = learner_memory(QWEN_15B, off, on_gpu=True)
    states = found.weights + found.optimizer + 4 * QWEN_15B.num_params
    assert states / 1e9 == pytest.approx(28, rel=0.1)
    assert found.activations / 1e9 == pytest.approx(51, rel=0.1)
    h200 = parse_gpus("h200")[1].memory
    assert [fits_gpus(QWEN_15B, off, "grpo", m) for m in (H100, h200)] == [False, True]
    assert fits_gpus(QWEN_15B, bench, "grpo", parse_gpus("40GB")[1].memory)


@pytest.mark.parametrize(
    ("facts", "bytes_a_token", "million_tokens", "samples"),
    [(QWEN_7B, 57_344, 0.9, 100), (QWEN3_8B, 147_456, 0.35, 39)],
    ids=["7B", "8B"],
)
def test_an_engine_s_cache_holds_as_many_samples_of_full_length_as_the_review_says(
    facts: ModelFacts, bytes_a_token: int, million_tokens: float, samples: float
) -> None:
    cache = cache_of(facts, typical(), H100)
    assert cache.per_token == bytes_a_token
    assert cache.room / cache.per_token / 1e6 == pytest.approx(million_tokens, rel=0.1)
    assert cache.samples == pytest.approx(samples, rel=0.1)


def test_tensor_parallel_engines_split_weights_and_keys() -> None:
    alone, two = (cache_of(QWEN_32B, run_config(f"rollout.tensor_parallel_size={n}"), H100) for n in (1, 2))
    assert two.per_token * 2 == alone.per_token
    assert two.room - alone.room == QWEN_32B.num_params


@pytest.mark.parametrize(("heads", "gpus", "part"), [(4, 2, 2), (4, 4, 4), (4, 8, 4), (1, 8, 1), (8, 8, 8)])
def test_gpus_beyond_the_key_heads_of_a_model_keep_copies_of_them(heads: int, gpus: int, part: int) -> None:
    facts = replace(QWEN_7B, key_heads=heads)
    of_gpu = cache_of(facts, run_config(f"rollout.tensor_parallel_size={gpus}"), H100).per_token
    assert of_gpu == cache_of(QWEN_7B, run_config(), H100).per_token // part


@pytest.mark.parametrize("dtype", ["fp8", "fp8_e4m3", "fp8_e5m2"])
def test_a_cache_in_fp8_holds_one_byte_an_element_whatever_the_model_computes_in(dtype: str) -> None:
    corrected = "algorithm.importance_sampling=token_truncate"
    for model in ("bfloat16", "float32"):
        cache = cache_of(QWEN_7B, typical(f"rollout.kv_cache_dtype={dtype}", corrected, f"model.dtype={model}"), H100)
        assert cache.per_token == QWEN_7B.kv_per_token
    halved = cache_of(QWEN_7B, typical(f"rollout.kv_cache_dtype={dtype}", corrected), H100)
    assert halved.samples == pytest.approx(2 * cache_of(QWEN_7B, typical(), H100).samples, rel=1e-6)


QWEN3_30B_A3B = ModelFacts(30_532_122_624, 48, 2048, 4096, 768 * 8, 151_936, 512, 4, 128 * 3 * 2048 * 768 * 48)


def test_copies_of_the_attention_layers_have_a_cache_each_and_share_the_experts() -> None:
    def cache(facts: ModelFacts, tensor: int, data: int) -> Cache:
        sizes = f"tensor_parallel_size: {tensor}, data_parallel_size: {data}"
        return cache_of(facts, run_config(f"rollout={{{sizes}}}"), H100)

    alone, two = cache(QWEN_7B, 1, 1), cache(QWEN_7B, 1, 2)
    assert (two.room, two.per_token) == (alone.room, alone.per_token)
    assert two.samples == 2 * alone.samples
    facts, whole = QWEN3_30B_A3B, cache(QWEN3_30B_A3B, 1, 1)
    copies, spread = cache(facts, 2, 4), cache(facts, 8, 1)
    rest = 2 * (facts.num_params - facts.experts)
    assert copies.room - whole.room == pytest.approx(2 * facts.experts * 7 / 8 + rest / 2, rel=1e-6)
    assert spread.room - copies.room == pytest.approx(rest / 2 - rest / 8, rel=1e-6)
    assert copies.samples > 4 * whole.samples


@pytest.mark.parametrize(
    ("config", "experts"),
    [
        ({"num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768}, 128 * 768),
        ({"n_routed_experts": 64, "num_experts_per_tok": 6, "moe_intermediate_size": 1408}, 64 * 1408),
        ({"num_local_experts": 8, "num_experts_per_tok": 2}, 8 * 6144),
        ({"num_experts": None}, 0),
        ({}, 0),
    ],
)
def test_the_weights_of_experts_are_counted_from_a_config(config: dict[str, Any], experts: int) -> None:
    shape = {"hidden_size": 2048, "num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4}
    found = facts_of(SimpleNamespace(**shape, head_dim=128, intermediate_size=6144, vocab_size=9, **config), 1 << 40)
    assert found.experts == 3 * 2048 * 48 * experts
    assert (found.kv, found.key_heads) == (512, 4)


def test_host_memory_of_a_node_is_what_the_review_says_and_does_not_grow_with_ranks_at_stage_3() -> None:
    assert 0.4e12 <= sum(host_memory(QWEN_7B, typical("algorithm.beta=0.001"), "grpo").values()) <= 0.55e12
    loading = [
        host_memory(QWEN_32B, run_config(f"learner={{num_actors: {n}, zero_stage: 3}}", "prompts_per_step=64"), "grpo")[
            "loading"
        ]
        for n in (1, 4, 8, 64)
    ]
    assert loading == [int(1.2 * 2 * QWEN_32B.num_params)] * 4
    whole = host_memory(QWEN_7B, run_config("learner={num_actors: 8, zero_stage: 2}"), "grpo")["loading"]
    assert whole == 8 * 2 * QWEN_7B.num_params


FP32 = ("model.dtype=float32", "model.gradient_checkpointing=false")
PROPOSALS = [
    (QWEN_7B, typical(*FP32, learner="num_actors: 8, zero_stage: 0, micro_batch_tokens: 9216")),
    (QWEN_7B, typical(learner="num_actors: 8, zero_stage: 1, micro_batch_tokens: 65536")),
    (QWEN_32B, typical()),
    (QWEN_32B, run_config("learner={num_actors: 8, zero_stage: 3}", "prompts_per_step=64")),
    (QWEN_7B, run_config("learner={num_actors: 1}")),
]


@pytest.mark.parametrize(("facts", "config"), PROPOSALS, ids=range(len(PROPOSALS)))
@pytest.mark.parametrize("gpu", ["h100", "a100-40gb", "l40s"])
def test_what_is_proposed_is_valid_fits_and_is_needed(facts: ModelFacts, config: RunConfig, gpu: str) -> None:
    memory = parse_gpus(gpu)[1].memory
    found = proposal(facts, config, "grpo", memory)

    def would_fit(options: dict[str, Any]) -> bool:
        data = config.model_dump(mode="json")
        for key, value in options.items():
            section, _, name = key.partition(".")
            data[section][name] = value
        try:
            return fits_gpus(facts, RunConfig.model_validate(data), "grpo", int(0.9 * memory))
        except ValueError:
            return False

    assert found
    assert would_fit(found)
    for key in found:
        assert not would_fit({k: v for k, v in found.items() if k != key}), key


def test_engines_over_several_gpus_are_proposed_with_as_many_as_share_the_learners_gpus() -> None:
    config = typical("rollout.num_actors=16", learner="num_actors: 16, zero_stage: 3, micro_batch_tokens: 9216")
    found = proposal(QWEN_32B, config, "grpo", H100)
    assert found["rollout.num_actors"] * found["rollout.tensor_parallel_size"] == 16
    assert "cluster.placement" not in found


def test_nothing_is_proposed_where_nothing_helps() -> None:
    assert proposal(QWEN_32B, run_config(), "grpo", 8 * GIB) == {}


def test_a_micro_batch_is_chosen_for_the_gpu_and_holds_one_sample() -> None:
    def tokens(gpu: str, longest: int = 1024, learner: str = "num_actors: 8, zero_stage: 3") -> int:
        config = run_config(
            f"rollout.max_completion_length={longest - 512}", f"learner={{{learner}}}", "prompts_per_step=4096"
        )
        return fit_micro_batch(QWEN_7B, config, parse_gpus(gpu)[1].memory).learner.micro_batch_tokens

    assert [tokens(gpu) for gpu in ("h200", "h100", "a100-40gb")] == [32_768, 32_768, 16_384]
    assert tokens("l4", longest=20_000) == 20_000
    assert tokens("h200", longest=40_000) == 40_000
    small = run_config("learner={num_actors: 8, zero_stage: 3}", "prompts_per_step=4096")
    assert learner_need(QWEN_7B, fit_micro_batch(QWEN_7B, small, H100), H100).fits


def test_chunks_of_logits_are_larger_on_gpus_with_more_memory() -> None:
    rows = {gpu: chunk_rows(152_064, on_gpu=True, memory=parse_gpus(gpu)[1].memory) for gpu in ("l4", "h100", "h200")}
    assert rows["h100"] == 2048
    assert 256 <= rows["l4"] < 1024
    assert rows["h200"] > 3500
    assert chunk_rows(32_000, on_gpu=True, memory=H100) == 8192
    assert chunk_rows(152_064, on_gpu=False) == 110


# Recipes.

SHIPPED = [
    ("countdown_qwen2.5_3b", QWEN_3B, "4x80GB"),
    ("gsm8k_qwen2.5_0.5b", QWEN_05B, "2x24GB"),
    ("gsm8k_qwen2.5_0.5b", QWEN_05B, "2xl4"),
    ("r1_zero_7b", QWEN_7B, "16x80GB"),
    ("tests/bench/gpu.yaml", QWEN_15B, "1x40GB"),
]


@pytest.mark.parametrize(("recipe", "facts", "gpus"), SHIPPED)
def test_a_recipe_fits_the_gpus_that_it_names(recipe: str, facts: ModelFacts, gpus: str) -> None:
    config = load_recipe(RunConfig, recipe, [])
    check_fits(facts, config, "grpo", gpus)


def test_every_stage_of_r1_fits_two_nodes_of_eight_gpus_of_80_gb() -> None:
    plan = load_plan("r1_7b", [])
    for stage in plan.stages:
        config = plan.config_of(stage)
        if isinstance(config, RunConfig | SftConfig):
            check_fits(QWEN_15B if stage.name == "distilled" else QWEN_7B, config, str(stage.spec.run), "16x80GB")


def check_fits(facts: ModelFacts, config: RunConfig | SftConfig, kind: str, gpus: str) -> None:
    offered = named_gpus(gpus, config)
    assert offered.machine.gpu_memory is not None
    found, _ = fitted(config, offered.machine, offered.told, kind)
    for need in needs(facts, found, kind, offered.machine.gpu_memory):
        assert need.fits, str(need)
    if isinstance(found, RunConfig):
        assert cache_of(facts, found, offered.machine.gpu_memory).samples > 32


# Names.


@pytest.mark.parametrize(
    ("text", "number", "gib"),
    [
        ("h100", None, 79.6),
        ("8xH100", 8, 79.6),
        ("2 x NVIDIA GeForce RTX 4090", 2, 24.0),
        ("4090", None, 24.0),
        ("a100-40gb", None, 40.0),
        ("A100-80G", None, 80.0),
        ("80GB", None, 79.2),
        ("16x80gb", 16, 79.2),
        ("79.5GiB", None, 79.5),
        ("t4", None, 15.0),
    ],
)
def test_gpus_have_the_names_that_people_drivers_and_ray_give_them(text: str, number: int | None, gib: float) -> None:
    found, gpu = parse_gpus(text)
    assert found == number
    assert gpu.memory / GIB == pytest.approx(gib, rel=0.01)


@pytest.mark.parametrize("text", ["h1000", "0xh100", "", "-80GB", "0GB", "8x", "80TB"])
def test_unknown_gpus_are_refused_with_those_that_are_known(text: str) -> None:
    with pytest.raises(ConfigError, match="--gpu"):
        parse_gpus(text)


def test_of_several_kinds_the_smallest_counts_and_only_if_all_are_known() -> None:
    assert smallest(["H100", "A100-40G", "L4"]) == named_gpu("l4")
    assert smallest(["H100", "TPU-V4"]) is None
    assert smallest([]) is None


# Checkpointing.


def test_checkpointing_is_on_for_gpus_and_off_for_cpus_unless_it_is_named() -> None:
    open_, on, off = (
        run_config(*o).model
        for o in ((), ("model.gradient_checkpointing=true",), ("model.gradient_checkpointing=false",))
    )
    assert [m.checkpoints(on_gpu=True) for m in (open_, on, off)] == [True, True, False]
    assert [m.checkpoints(on_gpu=False) for m in (open_, on, off)] == [False, True, False]


@pytest.mark.parametrize(("gpus", "expected", "tokens"), [("1xh100", True, 32_768), (None, False, 8192)])
def test_a_run_s_config_says_whether_it_checkpoints_and_how_large_micro_batches_are(
    gpus: str | None, expected: bool, tokens: int
) -> None:
    config = run_config("learner.micro_batch_tokens=auto", "rollout.max_completion_length=128")
    assert config.model.gradient_checkpointing == "auto"
    machine = named_gpus(gpus, config).machine if gpus else Machine((Node(8),), cores=8)
    found, chosen = fitted(config, machine, "here", "grpo")
    assert found.model.gradient_checkpointing is expected
    assert ("model.gradient_checkpointing" in chosen) is expected
    assert (found.learner.micro_batch_tokens, found.learner.micro_batch_is_open) == (tokens, False)
