"""Options that are passed through to vLLM and DeepSpeed: what they are checked against, without importing either."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from actors.class_fields import Fields, fields_of
from actors.learner.deepspeed_schema import check_deepspeed
from actors.rollout.vllm_schema import check_engine
from grpo_ray.config.effects import without_gpu
from grpo_ray.config.learner import (
    DEEPSPEED_OPTIONS,
    DEEPSPEED_PASSED,
    ZERO_1_2,
    ZERO_3,
    ZERO_UNUSED,
)
from grpo_ray.config.loading import to_yaml
from grpo_ray.config.rollout import ENGINE_FIXED, ENGINE_ON_GPUS, ENGINE_OPTIONS, check_without_gpus
from grpo_ray.config.schema import RunConfig, check_correction
from grpo_ray.errors import ConfigError
from grpo_ray.run.run_dir import RunDir
from launch.check.command import check_recipe
from launch.check.model import learners_model
from launch.run.machine import check_machine
from launch.run.resumed import changed_config
from tests.recipes import run_config


def engine_fields() -> Fields:
    found = fields_of("vllm", "engine.arg_utils", "EngineArgs", "AsyncEngineArgs")
    assert found is not None
    return found


def checked(*overrides: str) -> RunConfig:
    config = run_config(*overrides)
    check_engine(config.rollout)
    check_deepspeed(config.learner)
    return config


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("rollout.engine.enable_prefix_cachin=false", "no such option; did you mean enable_prefix_caching?"),
        ("rollout.engine.block_size=large", r"takes int, None there \(got 'large'\)"),
        ("rollout.engine.block_size=true", r"takes int, None there"),
        ("rollout.engine.scheduling_policy=lifo", "takes 'fcfs', 'priority' there"),
        ("rollout.engine.max_num_seqs=4", r"follows rollout\.max_num_seqs here"),
        ("rollout.engine={gpu_memory_utilization: 0.5}", r"follows rollout\.gpu_memory_utilization here"),
        ("rollout.engine.hf_overrides={}", "the learner would train another model"),
        ("rollout.engine.data_parallel_rank=1", "an engine is one actor"),
        ("rollout.engine.enable_expert_parallel=true", r"raise\s+rollout\.tensor_parallel_size"),
        ("learner.deepspeed.zero_optimisation={}", r"would do nothing here; did you mean zero_optimization\?"),
        ("learner.deepspeed.zero_optimization.reduce_bucket_sise=9", r"did you mean reduce_bucket_size\?"),
        ("learner.deepspeed.zero_optimization.reduce_bucket_size=0.5", "takes int there"),
        ("learner.deepspeed.zero_optimization.stage=1", r"follows learner\.zero_stage here"),
        ("learner.deepspeed.gradient_clipping=1", r"follows learner\.max_grad_norm here"),
        ("learner.deepspeed.optimizer={type: Adam}", r"follows learner\.learning_rate"),
        ("learner.deepspeed.zero_optimization.load_from_fp32_weights=false", "would do nothing here"),
        ("learner.deepspeed.zero_optimization.stage3_max_live_parameters=9", r"with learner\.zero_stage 2; it needs 3"),
        ("learner.deepspeed.comms_logger.enabeld=true", r"did you mean enabled\?"),
        ("learner.deepspeed.zero_optimization=3", "is a mapping"),
    ],
)  # fmt: skip
def test_an_option_that_vllm_or_deepspeed_does_not_have_or_that_is_ours_is_refused(
    override: str, expected: str
) -> None:
    with pytest.raises(ConfigError, match=expected):
        checked(override)


@pytest.mark.parametrize(("stage", "option"), [(0, "reduce_bucket_size"), (3, "round_robin_gradients")])
def test_an_option_of_another_zero_stage_is_refused(stage: int, option: str) -> None:
    with pytest.raises(ConfigError, match=f"{option} does nothing with learner.zero_stage {stage}; it needs 1 or"):
        run_config(
            f"learner.zero_stage={stage}", f"learner.deepspeed.zero_optimization.{option}=1", "model.dtype=float32"
        )


def test_what_they_have_is_taken_as_it_is_given() -> None:
    config = checked(
        "rollout.engine={enable_prefix_caching: false, block_size: 64, compilation_config: {cudagraph_mode: NONE}}",
        "learner.zero_stage=3",
        "learner.deepspeed.zero_optimization={reduce_bucket_size: 5e7, stage3_prefetch_bucket_size: 9, overlap_comm: true}",
        "learner.deepspeed.communication_data_type=fp32",
    )
    assert config.rollout.engine["compilation_config"] == {"cudagraph_mode": "NONE"}
    assert config.rollout.engine["block_size"] == 64
    assert config.learner.deepspeed["zero_optimization"]["reduce_bucket_size"] == 5e7


def test_check_refuses_unknown_options_before_it_looks_at_data() -> None:
    for override in ("rollout.engine.blok_size=32", "learner.deepspeed.zero_optimization.reduce_bucket_sise=9"):
        with pytest.raises(ConfigError, match=r"no such option; did you mean"):
            check_recipe("smoke", [override])


def test_the_schemas_of_vllm_and_deepspeed_are_read_without_importing_either() -> None:
    code = (
        "import sys; from actors.rollout.vllm_schema import check_engine; "
        "from actors.learner.deepspeed_schema import check_deepspeed; "
        "from grpo_ray.config.rollout import RolloutConfig; from grpo_ray.config.learner import LearnerConfig; "
        "check_engine(RolloutConfig(engine={'block_size': 64})); "
        "check_deepspeed(LearnerConfig(deepspeed={'zero_optimization': {'reduce_bucket_size': 9}})); "
        "print(sorted({'torch', 'vllm', 'deepspeed', 'ray', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip() == "[]"


def test_every_option_that_is_ours_is_one_of_theirs_by_that_name() -> None:
    named = {*ENGINE_OPTIONS, *ENGINE_FIXED, *ENGINE_ON_GPUS}
    assert named <= set(engine_fields())
    zero = fields_of("deepspeed", "runtime.zero.config", "DeepSpeedZeroConfig")
    assert zero is not None
    theirs = {name.removeprefix("stage3_") for name in zero}
    sections = {name.partition(".")[2] for name in DEEPSPEED_OPTIONS if name.startswith("zero_optimization.")}
    assert {name.removeprefix("stage3_") for name in ZERO_UNUSED} | ZERO_3 | ZERO_1_2 | sections <= theirs
    assert not set(DEEPSPEED_PASSED) & DEEPSPEED_OPTIONS.keys()


def test_a_package_that_is_not_installed_here_has_no_fields() -> None:
    assert fields_of("no_such_package", "engine", "Options") is None
    assert fields_of("vllm", "no_such_module", "Options") is None


@pytest.mark.parametrize("option", ["quantization=fp8", "kv_cache_dtype=fp8"])
def test_training_on_samples_of_a_rounded_policy_needs_a_correction(option: str) -> None:
    with pytest.raises(ConfigError, match=rf"rollout\.{option.replace('=', ' ')}.*algorithm\.importance_sampling"):
        check_correction(run_config(f"rollout.{option}"))
    for mend in ("importance_sampling=token_truncate", "old_logprobs=rollout"):
        check_correction(run_config(f"rollout.{option}", f"algorithm.{mend}"))
    check_correction(run_config())


def test_what_only_gpus_can_do_is_told_or_refused_where_there_is_none() -> None:
    config = run_config("rollout.engine={async_scheduling: false, block_size: 64}")
    assert without_gpu(config) == {"rollout.engine": "on CPUs vLLM goes without async_scheduling"}
    for option in ("quantization=fp8", "kv_cache_dtype=fp8", "speculative={num_tokens: 3}"):
        with pytest.raises(ConfigError, match=rf"rollout\.{option.partition('=')[0]}.* needs a GPU"):
            check_machine(run_config(f"rollout.{option}", "rollout.num_gpus=0"))
    with pytest.raises(ConfigError, match=r"no GPU to spread experts over; use more engines"):
        check_machine(run_config("rollout.data_parallel_size=2", "rollout.num_gpus=0"))
    for option in ("quantization=fp8", "data_parallel_size=2"):
        check_machine(run_config(f"rollout.{option}", "rollout.num_gpus=1"))


def test_a_draft_is_a_model_or_n_grams() -> None:
    assert run_config("rollout.speculative.num_tokens=4").rollout.speculative is not None
    for override, expected in (
        ("{method: ngram, model: x}", "takes no model"),
        ("{method: eagle}", "needs rollout.speculative.model"),
    ):
        with pytest.raises(ConfigError, match=expected):
            run_config(f"rollout.speculative={override}")


def test_compiled_layers_need_weights_that_stay_whole() -> None:
    run_config("model.compile=true")
    with pytest.raises(ConfigError, match=r"model\.compile needs learner\.zero_stage 2 or less"):
        run_config("model.compile=true", "learner.zero_stage=3")


def test_a_resumed_run_may_take_other_options_of_the_engines(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    run.config.write_text(to_yaml(run_config("num_steps=3")))
    override = "rollout.engine.enable_prefix_caching=false"
    config, changes = changed_config(RunConfig, run, [override])
    assert config.rollout.engine == {"enable_prefix_caching": False}
    assert list(changes) == ["rollout.engine"]
    with pytest.raises(ConfigError, match=r"rollout\.kv_cache_dtype"):
        changed_config(RunConfig, run, ["rollout.kv_cache_dtype=fp8"])


@pytest.mark.parametrize(
    ("overrides", "why"),
    [
        (["rollout.speculative={}"], r"does not go with rollout\.speculative: a draft's tokens"),
        (["model.compile=true"], r"does not go with model\.compile: it makes one program"),
        (
            ["learner.num_actors=2", "learner.sequence_parallel_size=2"],
            r"sequence_parallel_size 2: a learner has a slice",
        ),
        (["rollout.engine.enable_return_routed_experts=true"], r"follows rollout\.keep_routing here"),
    ],
)
def test_what_does_not_go_with_kept_routes_is_refused_with_the_reason(overrides: list[str], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        run_config("rollout.keep_routing=true", *overrides)


@pytest.mark.parametrize(
    ("override", "why"),
    [
        ("rollout.engine.enable_prefix_caching=true", "of a prompt that is cached no experts are known"),
        ("rollout.enforce_eager=false", "a compiled layer tells nothing"),
        ("rollout.tensor_parallel_size=2", "the experts are told within one process"),
    ],
)
def test_what_does_not_go_with_kept_routes_on_cpus_is_refused_there(override: str, why: str) -> None:
    check_without_gpus(run_config("rollout.keep_routing=true").rollout)
    check_without_gpus(run_config("rollout.keep_routing=true", "rollout.engine.enable_prefix_caching=false").rollout)
    with pytest.raises(ConfigError, match=why):
        check_without_gpus(run_config("rollout.keep_routing=true", override).rollout)


@pytest.mark.parametrize(
    ("overrides", "why"),
    [
        (["learner.num_actors=2", "learner.sequence_parallel_size=2"], "counts the experts of whole sequences"),
        (["model.compile=true"], "looks at routers while they compute"),
    ],
)
def test_what_does_not_go_with_the_loss_of_routers_is_refused_with_the_reason(overrides: list[str], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        run_config("learner.router_aux_loss_coef=0.01", *overrides)


@pytest.mark.parametrize("override", ["learner.router_aux_loss_coef=0.01", "rollout.keep_routing=true"])
def test_the_check_refuses_routers_that_a_model_does_not_have(override: str) -> None:
    config = run_config("model={tiny: {}}", override)
    with (
        learners_model(config, on_gpu=False) as model,
        pytest.raises(ConfigError, match=override.split("=")[0] + r": \w+ForCausalLM is no mixture of experts"),
    ):
        model()
