"""The schema: every bad input is refused with a message that names it and the mend."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from grpo_ray.config.aliases import ALIASES, suggestion
from grpo_ray.config.common import keys_in_order
from grpo_ray.config.loading import all_keys, build, deep_merge, load_yaml, parse_overrides, to_yaml
from grpo_ray.config.presets import PRESETS
from grpo_ray.config.schema import RunConfig
from grpo_ray.config.supervised import DpoConfig, RewardModelConfig, SftConfig
from grpo_ray.errors import ConfigError
from grpo_ray.models.memory.fit import unfitted_micro_batch
from tests.recipes import RL

MINIMAL: dict[str, Any] = {
    "model": {"tiny": {}},
    "data": {"train": {"path": "rows.jsonl"}},
    "reward": {"functions": [{"name": "accuracy"}]},
}


def make(*overrides: str) -> RunConfig:
    return build(RunConfig, deep_merge(MINIMAL, parse_overrides(list(overrides))), "recipe test")


def test_overrides_reach_their_place_with_their_type() -> None:
    config = make(
        "learner.zero_stage=3", "learner.learning_rate=1e-5", "rollout.stop=['</answer>']", "model.dtype=float32"
    )
    assert config.learner.zero_stage == 3
    assert config.learner.learning_rate == 1e-5
    assert config.rollout.stop == ("</answer>",)


def test_scientific_notation_in_a_recipe_is_a_number(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump(MINIMAL) + "learner: {learning_rate: 3e-6}\n")
    assert build(RunConfig, load_yaml(path), "r").learner.learning_rate == 3e-6


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("learner.zero_stge=3", "learner.zero_stge: unknown key; did you mean learner.zero_stage?"),
        ("learning_rate=1e-5", "did you mean learner.learning_rate?"),
        ("rollout.num_generations=1", "a group of one has no baseline"),
        ("learner.zero_stage=5", "learner.zero_stage"),
        ("rollout.num_actors=0", "rollout.num_actors"),
        ("model.path=somewhere", "exactly one of model.path and model.tiny"),
        ("reward.functions=[]", "reward.functions is empty"),
        ("eval.accuracy=other", "none of reward.functions"),
        ("learner.zero_stage=0", "no fp32 master weights"),
        ("learner.micro_batch_tokens=600", "can't hold one sample of up to 1024 tokens"),
        ("algorithm.num_mini_batches=64", "a mini-batch holds at least one group"),
        ("algorithm.loss=cispo algorithm.epsilon_high=5", "whose cap is algorithm.cispo_max_ratio"),
        ("algorithm.loss=sapo algorithm.epsilon_low=0.1", "sapo, which has no clip"),
        ("algorithm.cispo_max_ratio=3", "is of loss cispo and does nothing with grpo"),
        ("algorithm.sapo_temperature_neg=2", "is of loss sapo"),
        ("algorithm.loss=gspo algorithm.dual_clip_c=3", "loss gspo has none: take it out"),
        ("algorithm.loss=cispo algorithm.dual_clip_c=3", "loss cispo has none: take it out"),
        ("algorithm.dual_clip_c=1.1", "undoes the clip"),
        ("algorithm.dual_clip_c=1", "algorithm.dual_clip_c"),
        ("algorithm.kl_estimator=k2", "does nothing with beta 0"),
        ("algorithm.ref_refresh_steps=10", "does nothing with beta 0"),
        ("algorithm.beta=0.1 algorithm.ref_polyak_tau=0.1", "needs algorithm.ref_refresh_steps"),
        (
            "algorithm.beta=0.1 algorithm.ref_refresh_steps=1 algorithm.ref_polyak_tau=0.1",
            "steps that model.dtype bfloat16 rounds away",
        ),
        ("algorithm.beta=0.1 algorithm.ref_refresh_steps=5 model.lora={}", "without its adapters is the reference"),
        (
            "model.lora.transfer=adapter model.lora.r=513",
            "through adapters of at most 512; lower it, or use model.lora.transfer merged",
        ),
        (
            "model.lora.transfer=adapter weights.bucket_mb=8",
            "sending the whole model, which model.lora.transfer adapter never",
        ),
        ("algorithm.importance_sampling_clip_max=3", "without algorithm.importance_sampling"),
        ("algorithm.loss=gspo algorithm.importance_sampling=token_mask", "use geometric_mask, sequence_truncate"),
        ("algorithm.old_logprobs=rollout algorithm.importance_sampling=token_mask", "use old_logprobs recompute"),
        ("algorithm.old_logprobs=rollout algorithm.geometric_mask=[0.9,1.1]", "algorithm.geometric_mask compares"),
        ("algorithm.geometric_mask=[1.1,1.2]", "must hold 1"),
        ("algorithm.importance_sampling=token_mask algorithm.importance_sampling_clip_min=2", "must hold 1"),
        ("algorithm.kl_in=reward", "algorithm.kl_in does nothing with beta 0"),
        ("algorithm.kl_in=rewards", "algorithm.kl_in"),
        ("algorithm.beta=0.1 algorithm.kl_in=reward algorithm.kl_estimator=k3+", "use k1 (the papers'), k2 or k3"),
        (
            "algorithm=v3_2 algorithm.kl_in=reward algorithm.kl_estimator=k3_unbiased",
            "differs from k3 in its gradient alone",
        ),
        (
            "algorithm.beta=0.1 algorithm.kl_in=reward algorithm.advantage=process",
            "compares those of steps; use kl_in loss",
        ),
        ("algorithm.advantage=process algorithm.loss=gspo", "process gives every token its own advantage"),
        ("algorithm=rloo algorithm.advantage=process", "loss grpo_sequence has one ratio for the whole sequence"),
        ("algorithm.advantage=process algorithm.lam=0.9", "is of GAE and does nothing with advantage process"),
        ("algorithm.max_sampling_rounds=3", "set dynamic_sampling: true"),
        ("algorithm=dappo", "'dappo' is not known; did you mean dapo?"),
        ("learner.num_actors=300", "more than the 256 samples"),
        ("learner.offload_params=true", "needs zero_stage 3"),
        (
            "learner.num_actors=3 learner.sequence_parallel_size=2",
            "learner.num_actors (3) is not a multiple of learner.sequence_parallel_size (2)",
        ),
        (
            "learner.num_actors=2 learner.sequence_parallel_size=2 learner.forward=plain",
            "sequence_parallel_size 2 cuts them into slices; use sequence_parallel_size 1, or forward packed",
        ),
        ("learner.num_actors=600 learner.sequence_parallel_size=2", "more than the 256 samples"),
    ],
)
def test_bad_values_are_named_with_the_mend(override: str, expected: str) -> None:
    with pytest.raises(ConfigError) as e:
        make(*override.split())
    assert expected in str(e.value)


def test_fine_tuning_has_no_samplers_to_send_adapters_to() -> None:
    with pytest.raises(ConfigError, match="fine-tuning has no samplers: take it out"):
        build(SftConfig, {"model": {"tiny": {}, "lora": {"transfer": "adapter"}}, "data": MINIMAL["data"]}, "r")


def test_every_problem_is_reported_at_once() -> None:
    with pytest.raises(ConfigError) as e:
        make("learner.zero_stge=3", "rollout.top_p=2", "seed=x")
    assert str(e.value).count("\n  - ") == 3


@pytest.mark.parametrize("item", ["learner.zero_stage", "=3", "a.b=[1"])
def test_a_malformed_override_is_named(item: str) -> None:
    with pytest.raises(ConfigError, match=r"override"):
        parse_overrides([item])


def test_a_resolved_config_reads_back_as_itself() -> None:
    config = make("rollout.top_p=0.9", "reward.functions=[{name: accuracy, weight: 0.5, args: {a: 1}}]")
    again = build(RunConfig, yaml.safe_load(to_yaml(config)), "again")
    assert again == config


def test_held_out_data_are_one_source_or_several_by_name() -> None:
    assert make().data.eval_sets == {}
    assert list(make("data.eval.path=a.jsonl").data.eval_sets) == [""]
    several = make("data.eval={math: {path: a.jsonl}, aime: {path: b.jsonl, limit: 3}}")
    assert {name: s.path for name, s in several.data.eval_sets.items()} == {"math": "a.jsonl", "aime": "b.jsonl"}
    assert build(RunConfig, yaml.safe_load(to_yaml(several)), "again") == several


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("data.eval={pth: a.jsonl}", "data.eval.pth: unknown key; did you mean data.eval.path?"),
        ("data.eval={math: {pth: a.jsonl}}", "data.eval.math.pth: unknown key; did you mean data.eval.math.path?"),
        ("data.eval={a/b: {path: a.jsonl}}", "data.eval.a/b"),
        ("data.eval=3", "data.eval"),
    ],
)
def test_bad_held_out_data_are_named_without_the_schemas_own_words(override: str, expected: str) -> None:
    with pytest.raises(ConfigError) as e:
        make(override)
    assert expected in str(e.value)
    assert "<" not in str(e.value)


def test_a_checkpoint_path_that_ends_with_each_worker_is_refused() -> None:
    assert make("checkpoint.path=s3://bucket/runs").checkpoint.path == "s3://bucket/runs"
    with pytest.raises(ConfigError, match="every worker has a memory of its own"):
        make("checkpoint.path=memory://x")


def test_every_key_of_the_schema_can_be_overridden_by_its_dotted_name() -> None:
    keys = all_keys(RunConfig)
    assert {"learner.zero_stage", "reward.on_failure.retries", "data.train.path"} <= set(keys)
    assert len(keys) == len(set(keys))


@pytest.mark.parametrize("name", list(PRESETS))
def test_a_preset_sets_its_values_and_reads_back_as_itself(name: str) -> None:
    config = make(f"algorithm={name}")
    assert config.algorithm.preset == name
    for key, value in PRESETS[name].items():
        assert getattr(config.algorithm, key) == value
    assert build(RunConfig, yaml.safe_load(to_yaml(config)), "again") == config


def test_the_presets_hold_the_papers_numbers() -> None:
    def values(name: str, *keys: str) -> tuple[Any, ...]:
        return tuple(getattr(make(f"algorithm={name}").algorithm, key) for key in keys)

    assert values("grpo", "beta", "epsilon_low", "epsilon_high") == (0.04, 0.2, 0.2)
    assert values("r1", "beta", "epsilon_high", "ref_refresh_steps", "loss") == (0.001, 10, 400, "grpo_sequence")
    assert values("dapo", "epsilon_low", "epsilon_high", "beta", "dynamic_sampling") == (0.2, 0.28, 0, True)
    assert values("gspo", "epsilon_low", "epsilon_high") == (3e-4, 4e-4)
    assert values("gmpo", "epsilon_low", "epsilon_high") == (0.4, 0.4)
    assert values("icepop", "importance_sampling_clip_min", "importance_sampling_clip_max") == (0.5, 5.0)
    assert values("sapo", "sapo_temperature_pos", "sapo_temperature_neg") == (1.0, 1.05)
    assert values("v3_2", "kl_estimator", "advantage") == ("k3_unbiased", "dr_grpo")


def test_what_is_given_goes_over_the_preset_in_any_order() -> None:
    for overrides in (
        ("algorithm=dapo", "algorithm.epsilon_high=0.3"),
        ("algorithm.epsilon_high=0.3", "algorithm=dapo"),
        ("algorithm={preset: dapo, epsilon_high: 0.3}",),
    ):
        a = make(*overrides).algorithm
        assert (a.loss, a.epsilon_low, a.epsilon_high) == ("dapo", 0.2, 0.3)


def test_a_recipes_preset_can_be_overridden_key_by_key_and_whole() -> None:
    recipe = MINIMAL | {"algorithm": "dapo"}
    merged = deep_merge(recipe, parse_overrides(["algorithm.epsilon_high=0.3"]))
    assert build(RunConfig, merged, "r").algorithm.epsilon_high == 0.3
    recipe = MINIMAL | {"algorithm": {"beta": 0.04, "epsilon_high": 0.5}}
    merged = deep_merge(recipe, parse_overrides(["algorithm=dapo", "algorithm.epsilon_low=0.1"]))
    a = build(RunConfig, merged, "r").algorithm
    assert (a.beta, a.epsilon_low, a.epsilon_high) == (0, 0.1, 0.28)


def test_what_belongs_to_a_presets_loss_or_reference_goes_with_it() -> None:
    a = make("algorithm=dapo", "algorithm.loss=gspo").algorithm
    assert (a.epsilon_low, a.epsilon_high, a.dynamic_sampling) == (3e-4, 4e-4, True)
    assert make("algorithm=dapo", "algorithm.loss=cispo").algorithm.cispo_max_ratio == 5
    a = make("algorithm=r1", "algorithm.beta=0").algorithm
    assert (a.ref_refresh_steps, a.epsilon_high) == (0, 10)


def test_losses_and_corrections_bring_their_usual_bounds() -> None:
    assert make("algorithm.loss=gspo").algorithm.epsilon_low == 3e-4
    assert make("algorithm.loss=gspo", "algorithm.epsilon_low=0.1").algorithm.epsilon_low == 0.1
    a = make("algorithm.importance_sampling=token_truncate").algorithm
    assert (a.importance_sampling_clip_min, a.importance_sampling_clip_max) == (0, 2)
    a = make("algorithm.importance_sampling=token_mask", "algorithm.importance_sampling_clip_max=3").algorithm
    assert (a.importance_sampling_clip_min, a.importance_sampling_clip_max) == (0.5, 3)


def test_sft_refuses_a_micro_batch_that_holds_no_example() -> None:
    learner = {"micro_batch_tokens": 8192}
    data = {"model": {"tiny": {}}, "data": {"train": {"path": "x"}}, "max_length": 20000, "learner": learner}
    with pytest.raises(ConfigError, match="max_length"):
        build(SftConfig, data, "r")


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["algorithm.max_staleness=0"], (None, 2.0)),
        (["algorithm.max_staleness=1"], ("token_truncate", 2.0)),
        (["algorithm=gspo", "algorithm.max_staleness=1"], ("sequence_truncate", 3.0)),
        (["algorithm.max_staleness=2"], ("token_truncate", 2.0)),
        (["algorithm=gspo", "algorithm.max_staleness=2"], ("sequence_truncate", 3.0)),
        (["algorithm.max_staleness=2", "algorithm.importance_sampling=token_mask"], ("token_mask", 5.0)),
        (["algorithm.max_staleness=2", "algorithm.importance_sampling=null"], (None, 2.0)),
        (["algorithm.max_staleness=2", "algorithm.old_logprobs=rollout"], (None, 2.0)),
        ([], (None, 2.0)),
    ],
)
def test_sampling_ahead_is_corrected_unless_it_is_said_how(
    overrides: list[str], expected: tuple[str | None, float]
) -> None:
    a = make(*overrides).algorithm
    assert (a.importance_sampling, a.importance_sampling_clip_max) == expected


@pytest.mark.parametrize(
    ("algorithm", "estimator"),
    [
        ("{preset: rloo, beta: 0.05, kl_in: reward}", "k1"),
        ("{preset: ppo, beta: 0.05, kl_in: reward}", "k1"),
        ("{preset: grpo, kl_in: reward}", "k1"),
        ("{preset: v3_2, kl_in: reward}", "k1"),
        ("{beta: 0.05, kl_in: reward, kl_estimator: k3}", "k3"),
        ("{beta: 0.05, kl_in: loss}", "k3"),
        ("reinforce_pp", "k2"),
    ],
)
def test_a_kl_in_the_reward_is_the_papers_k1_unless_another_is_given(algorithm: str, estimator: str) -> None:
    config = make(f"algorithm={algorithm}")
    assert config.algorithm.kl_estimator == estimator
    assert build(RunConfig, yaml.safe_load(to_yaml(config)), "again") == config


ALL_KEYS = {key for schema in (RunConfig, SftConfig, DpoConfig, RewardModelConfig) for key in all_keys(schema)}


@pytest.mark.parametrize("name", ALIASES)
def test_a_name_of_another_project_leads_to_an_option_that_is_there(name: str) -> None:
    targets, _ = ALIASES[name]
    assert set(targets) <= ALL_KEYS
    assert name not in ALL_KEYS or targets[0] != name


@pytest.mark.parametrize("schema", [RunConfig, SftConfig, DpoConfig, RewardModelConfig])
def test_every_option_of_a_whole_run_has_its_place_in_what_is_printed(schema: type[RunConfig | SftConfig]) -> None:
    assert sorted(keys_in_order(schema)) == sorted(schema.model_fields)


def test_a_recipe_is_printed_in_one_order_whether_its_options_are_shared_or_its_own() -> None:
    printed = [line.partition(":")[0] for line in to_yaml(make()).splitlines() if line[:1].isalpha()]
    assert printed[5:10] == ["num_epochs", "prompts_per_step", "model", "data", "rollout"]
    assert printed[-3:] == ["sample", "tracking", "cluster"]


@pytest.mark.parametrize(
    ("schema", "key", "expected"),
    [
        (RunConfig, "rollout.n", "rollout.n is called rollout.num_generations here"),
        (RunConfig, "actor_rollout_ref.rollout.n", "is called rollout.num_generations here"),
        (RunConfig, "rollout.max_tokens", "is called rollout.max_completion_length here"),
        (RunConfig, "learner.lr", "learner.lr is called learner.learning_rate here"),
        (RunConfig, "actor_rollout_ref.actor.optim.lr", "is called learner.learning_rate here"),
        (RunConfig, "critic.optim.lr", "is called critic.learning_rate here"),
        (RunConfig, "data.train_batch_size", "is called prompts_per_step here (prompts"),
        (SftConfig, "per_device_train_batch_size", "is called examples_per_step here"),
        (RunConfig, "algorithm.adv_estimator", "is called algorithm.advantage here (or algorithm: NAME"),
        (RunConfig, "trainer.total_epochs", "is called num_epochs here"),
        (RunConfig, "actor_rollout_ref.rollout.val_kwargs.n", "is called eval.num_samples here"),
        (RunConfig, "beta", "is called algorithm.beta here"),
        (DpoConfig, "beta", "is called dpo.beta here"),
        (DpoConfig, "loss_type", "is called dpo.loss here"),
        (RunConfig, "num_generations", "did you mean rollout.num_generations?"),
        (RunConfig, "data.num_generation", "did you mean rollout.num_generations?"),
        (RunConfig, "rollout.temprature", "did you mean rollout.temperature?"),
        (RunConfig, "reward.temperature", "an option of this name is rollout.temperature, eval.temperature"),
        (RunConfig, "actor_rollout_ref.model.path", "is called model.path here"),
        (RunConfig, "actor_rollout_ref.rollout.temperature", "is called rollout.temperature here"),
        (RunConfig, "actor_rollout_ref.rollout.val_kwargs.temperature", "is called eval.temperature here"),
        (RunConfig, "actor_rollout_ref.actor.optim.betas", "is called learner.adam_betas here"),
        (RunConfig, "algorithm.rollout_correction.rollout_rs", "is called algorithm.geometric_mask here"),
        (
            RunConfig,
            "actor_rollout_ref.rollout.name",
            "there is no option for actor_rollout_ref.rollout.name here: engines",
        ),
        (RunConfig, "use_vllm", "here: it is so of itself: all samples are vLLM's"),
        (RunConfig, "algorithm.kl_ctrl.type", "a KL's weight is constant"),
        (RunConfig, "trainer.resume_mode", "`grpo-ray resume RUN` goes on"),
        (RunConfig, "resume_from_checkpoint", "`grpo-ray resume RUN` goes on"),
        (SftConfig, "max_seq_length", "is called max_length here"),
        (DpoConfig, "--chosen_key", "is called data.train.columns here: {chosen: NAME}"),
        (RunConfig, "learning_rat", "did you mean learner.learning_rate?"),
        (RunConfig, "learner.zerostage", "did you mean learner.zero_stage?"),
        (RunConfig, "--n_samples_per_prompt", "is called rollout.num_generations here"),
        (RunConfig, "--micro-train-batch-size", "is called learner.micro_batch_tokens here (tokens, not samples)"),
    ],
)
def test_an_unknown_key_is_answered_with_what_it_is_called_here(
    schema: type[RunConfig | SftConfig], key: str, expected: str
) -> None:
    section = getattr(schema.model_fields.get(key.split(".")[0]), "annotation", schema)
    siblings = list(getattr(section, "model_fields", schema.model_fields))
    assert expected in suggestion(key, all_keys(schema), siblings)


@pytest.mark.parametrize(
    "key",
    [
        *("rollout.xyz", "learner.gradient", "foo", "rollout.ne", "eval.k"),
        *(
            "entropy_coef_min",
            "entropy_coef_max",
            "optim_target_modules",
            "gradient_checkpointing_kwargs",
            "vespo_k_pos",
        ),
    ],
)
def test_what_is_like_nothing_is_not_guessed_at(key: str) -> None:
    assert suggestion(key, all_keys(RunConfig), ["env", "max_actors", "num_actors"]).startswith("known here: env")


def test_a_section_of_another_command_is_not_taken_for_an_option() -> None:
    with pytest.raises(ConfigError, match="rollout: unknown key; known here: name, dir"):
        build(SftConfig, {"model": {"tiny": {}}, "data": MINIMAL["data"], "rollout": {"num_actors": 1}}, "test")


def test_a_section_of_another_project_is_answered_key_by_key() -> None:
    with pytest.raises(ConfigError) as told:
        make("actor_rollout_ref.rollout.n=8", "actor_rollout_ref.actor.optim.lr=1e-6", "trainer.total_epochs=2")
    lines = str(told.value).splitlines()[1:]
    assert [line.split(":")[0].strip(" -") for line in lines] == [
        "actor_rollout_ref.rollout.n",
        "actor_rollout_ref.actor.optim.lr",
        "trainer.total_epochs",
    ]
    assert all(" is called " in line for line in lines)


@pytest.mark.parametrize("schema", [RunConfig, SftConfig])
def test_a_micro_batch_that_is_left_open_may_hold_less_than_a_sample_until_it_is_chosen(schema: type) -> None:
    long = {"rollout": {"max_completion_length": 20_000}} if schema is RunConfig else {"max_length": 20_000}
    base = {**RL, **long} if schema is RunConfig else {"model": {"tiny": {}}, "data": {"train": {"path": "x"}}, **long}
    for learner in ({}, {"micro_batch_tokens": "auto"}):
        config: Any = build(schema, {**base, "learner": learner}, "r")
        assert config.learner.micro_batch_is_open
        assert unfitted_micro_batch(config).learner.micro_batch_tokens >= 20_000
    with pytest.raises(ConfigError, match="micro_batch_tokens"):
        build(schema, {**base, "learner": {"micro_batch_tokens": "most"}}, "r")
