"""A pipeline's plan, record, gates, measures and estimates; nothing here starts an actor. Whole ones: tests/end_to_end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from grpo_ray.config.loading import build, deep_merge
from grpo_ray.config.schema import RunConfig
from grpo_ray.config.supervised import SftConfig
from grpo_ray.datagen.filters.config import MixConfig, PairsConfig
from grpo_ray.errors import CheckpointError, ConfigError
from grpo_ray.pipeline.config import GateConfig, PipelineConfig
from grpo_ray.pipeline.estimate import estimate, rows_known
from grpo_ray.pipeline.gates import judge
from grpo_ray.pipeline.measure import measure
from grpo_ray.pipeline.plan import Plan, make_plan
from grpo_ray.pipeline.record import Cost, Record, StageRecord, check_unchanged
from grpo_ray.run.manifest import digest_of
from grpo_ray.run.run_dir import RunDir
from tests.endpoints import endpoint, rated_pair, shown_of
from tests.samples import row, sample_folder

TINY = {"hidden_size": 64, "num_layers": 2, "num_heads": 2, "num_kv_heads": 1}
RECIPE: dict[str, Any] = {
    "seed": 7,
    "common": {
        "all": {"model": {"dtype": "float32"}},
        "train": {"data": {"train": {"path": "rows.jsonl"}}, "reward": {"functions": [{"name": "accuracy"}]}},
        "sample": {"data": {"train": {"path": "rows.jsonl"}}, "reward": {"functions": [{"name": "accuracy"}]}},
    },
    "eval": {"data": {"train": {"path": "held_out.jsonl"}}},
    "stages": {
        "base": {
            "kind": "sft",
            "config": {"model": {"tiny": {**TINY, "seed": "${seed}"}}, "data": {"train": {"path": "text.jsonl"}}},
        },
        "zero": {
            "kind": "train",
            "config": {"model": {"path": "${stages.base.model}"}, "num_steps": 10, "prompts_per_step": 4},
            "gate": [{"metric": "accuracy", "not_below": "base"}],
        },
        "traces": {"kind": "sample", "config": {"model": {"path": "${stages.zero.model}"}}},
        "mix": {"kind": "data", "config": {"samples": [{"path": "${stages.traces.samples}"}]}},
        "cold": {
            "kind": "sft",
            "config": {"model": {"path": "${stages.base.model}"}, "data": {"train": {"path": "${stages.mix.data}"}}},
        },
    },
}


def plan_of(*changes: dict[str, Any], recipe: dict[str, Any] = RECIPE) -> Plan:
    for change in changes:
        recipe = deep_merge(recipe, change)
    return make_plan(build(PipelineConfig, recipe, "test"), "r1", {"given": {"num_steps": 3}}.__getitem__)


def test_stages_come_after_what_they_need_and_are_measured_at_once() -> None:
    names = [s.name for s in plan_of().stages]
    assert names == ["base", "base-eval", "zero", "zero-eval", "traces", "mix", "cold", "cold-eval"]
    backward = {**RECIPE, "stages": dict(reversed(RECIPE["stages"].items()))}
    assert [s.name for s in plan_of(recipe=backward).stages] == names


def test_configs_are_whole_once_their_references_are_paths() -> None:
    plan = plan_of()
    base, zero, mix = (plan.config_of(plan.stage(name)) for name in ("base", "zero", "mix"))
    assert isinstance(base, SftConfig)
    assert base.model.tiny is not None
    assert (base.model.tiny.seed, base.seed, base.model.dtype) == (7, 7, "float32")
    assert isinstance(zero, RunConfig)
    assert (zero.model.path, zero.dir, zero.name) == ("runs/r1/r1.base/hf", "runs/r1", "r1.zero")
    assert isinstance(mix, MixConfig)
    assert mix.samples[0].path == "runs/r1/r1.traces/samples"
    assert mix.seed == 7
    held_out = plan.config_of(plan.stage("zero-eval"))
    assert isinstance(held_out, RunConfig)
    assert (held_out.data.train.path, held_out.model.path) == ("held_out.jsonl", "runs/r1/r1.zero/hf")


def test_the_gate_of_a_measured_stage_is_asked_of_its_measure_and_waits_for_the_other() -> None:
    plan = plan_of()
    assert plan.stage("zero").gates == ()
    assert [g.metric for g in plan.stage("zero-eval").gates] == ["accuracy"]
    assert plan.stage("zero-eval").needs == ("zero", "base-eval")
    unmeasured = plan_of({"stages": {"cold": {"eval": False, "gate": [{"metric": "loss/sft", "at_most": 2}]}}})
    assert [s.name for s in unmeasured.stages][-1] == "cold"
    assert len(unmeasured.stage("cold").gates) == 1


def test_a_stage_is_measured_in_a_way_of_its_own() -> None:
    plan = plan_of({"stages": {"zero": {"eval": {"data": {"template": "r1_zero"}}}}})
    templates = {}
    for name in ("base-eval", "zero-eval"):
        config = plan.config_of(plan.stage(name))
        assert isinstance(config, RunConfig)
        templates[name] = (config.data.template, config.data.train.path)
    assert templates == {"base-eval": ("chat", "held_out.jsonl"), "zero-eval": ("r1_zero", "held_out.jsonl")}


def test_a_recipe_lies_under_the_config_of_a_stage() -> None:
    plan = plan_of({"stages": {"zero": {"recipe": "given", "config": {"num_steps": None}}}})
    assert plan.stage("zero").data["num_steps"] is None
    del (data := json.loads(json.dumps(RECIPE)))["stages"]["zero"]["config"]["num_steps"]
    data["stages"]["zero"]["recipe"] = "given"
    assert plan_of(recipe=data).stage("zero").data["num_steps"] == 3


def test_what_builds_on_a_stage() -> None:
    plan = plan_of()
    assert plan.builds_on("zero") == {"zero", "zero-eval", "traces", "mix", "cold", "cold-eval"}
    assert plan.builds_on("mix") == {"mix", "cold", "cold-eval"}


def test_the_digest_is_of_the_config_alone() -> None:
    one, other = plan_of(), plan_of({"stages": {"zero": {"note": "x", "gate": []}}})
    assert one.stage("zero").digest == other.stage("zero").digest
    changed = plan_of({"stages": {"zero": {"config": {"num_steps": 11}}}})
    assert one.stage("zero").digest != changed.stage("zero").digest
    assert one.stage("traces").digest == changed.stage("traces").digest


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"stages": {"traces": {"config": {"model": {"path": "${stages.zeor.model}"}}}}}, "did you mean zero"),
        ({"stages": {"traces": {"config": {"model": {"path": "${stages.zero.modell}"}}}}}, "leaves model"),
        ({"stages": {"zero": {"kind": "trian"}}}, "did you mean train"),
        ({"stages": {"base": {"needs": ["cold"]}}}, "in a circle: base"),
        ({"stages": {"zero": {"needs": ["nothing"]}}}, "needs 'nothing'"),
        ({"common": {"sfft": {}}}, "common.sfft: no kind of stage; did you mean sft"),
        ({"stages": {"zero": {"gate": [{"metric": "accuracy"}]}}}, "bounds nothing"),
        ({"stages": {"zero": {"gate": [{"metric": "a", "at_least": 1, "by": 2}]}}}, "give not_below"),
        ({"stages": {"a b": {"kind": "sft"}}}, "a b"),
    ],
)
def test_a_wrong_recipe_is_refused_by_name(change: dict[str, Any], expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        plan_of(change)


def test_a_stage_whose_config_is_wrong_is_named() -> None:
    plan = plan_of({"stages": {"zero": {"config": {"num_stpes": 3}}}})
    with pytest.raises(
        ConfigError, match=r"stage zero can't be used:\n.*num_stpes: unknown key; did you mean num_steps"
    ):
        plan.config_of(plan.stage("zero"))


def test_gates() -> None:
    gates = [
        GateConfig(metric="accuracy", at_least=0.5, not_below="zero", by=0.02),
        GateConfig(metric="length", at_most=30),
    ]
    verdicts = judge(gates, {"accuracy": 0.61, "length": 31.0}, {"zero": {"accuracy": 0.625}})
    assert [v.passed for v in verdicts] == [True, True, False]
    assert verdicts[1].text == "accuracy 0.61, zero has 0.625 and it may be 0.02 less"
    assert not judge(gates[:1], {"accuracy": 0.6}, {"zero": {"accuracy": 0.625}})[1].passed
    with pytest.raises(ConfigError, match="'length', which was not measured; there are accuracy"):
        judge(gates[1:], {"accuracy": 0.6}, {})


def test_measures_are_means_over_prompts_where_a_function_applies() -> None:
    def one(prompt: str, index: int, value: float | None, source: str) -> dict[str, Any]:
        status = "not_applicable" if value is None else "ok"
        made = row(prompt, index, "abcd", rewards={"accuracy": (status, value), "form": ("ok", 0.5)})
        return {**made, "columns": {"source": source}, "finish_reason": "length" if index else "stop"}

    rows = [
        one("p/0/0", 0, 1.0, "add"),
        one("p/0/0", 1, 0.0, "add"),
        one("p/0/1", 0, 1.0, "turn"),
        one("p/0/2", 0, None, "greet"),
    ]
    figures = measure(rows, accuracy="accuracy", threshold=1.0, by="source")
    assert figures["accuracy"] == pytest.approx(0.75)
    assert figures["accuracy_error"] == pytest.approx(0.25)
    assert (figures["accuracy/add"], figures["accuracy/turn"]) == (0.5, 1.0)
    assert "accuracy/greet" not in figures
    assert figures["reward/form"] == 0.5
    assert (figures["length"], figures["cut_off"], figures["cut_off/add"]) == (4.0, 0.25, 0.5)


def test_the_record_survives_and_adds_up_the_cost(tmp_path: Path) -> None:
    record = Record.open(tmp_path)
    record.put("base", StageRecord("sft", "d", inputs={"text.jsonl": "i"}))
    assert not record.done("base")
    record.put("base", record.add_cost("base", 2.0, 100))
    record.put("base", record.add_cost("base", 3.0, 150))
    again = Record.open(tmp_path)
    assert again.stages["base"].cost == Cost(5.0, 150, 2)
    again.forget("base")
    assert Record.open(tmp_path).stages == {}
    (tmp_path / "pipeline.json").write_text('{"format": 2, "stages": {}}')
    with pytest.raises(CheckpointError, match="format 2"):
        Record.open(tmp_path)


def test_what_a_stage_left_may_not_change(tmp_path: Path) -> None:
    folder = tmp_path / "hf"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    was = digest_of(folder)
    check_unchanged(folder, was, "model of stage zero", "mend")
    (folder / "config.json").write_text("{ }")
    with pytest.raises(CheckpointError, match=r"model of stage zero .*has changed .*mend"):
        check_unchanged(folder, was, "model of stage zero", "mend")
    with pytest.raises(CheckpointError, match="not there any more"):
        check_unchanged(tmp_path / "none", was, "model of stage zero", "mend")


def test_a_stage_that_begins_does_not_go_on_from_checkpoints_of_anothers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from launch.pipeline.stages import _open_run
    from launch.run import preflight

    monkeypatch.setattr(preflight, "preflight", lambda config: None)
    plan = plan_of({"common": {"all": {"checkpoint": {"path": str(tmp_path / "store")}}}})
    stage = plan.stage("base")
    config = plan.config_of(stage)
    assert isinstance(config, SftConfig)
    folder = tmp_path / "r1" / "base"
    assert _open_run(stage, config, folder)[1] is None
    store = RunDir(folder).with_checkpoints(config.checkpoint.path).store
    with (place := store.begin(10)).filling("loop") as (loop, sums):
        (loop / "loop.json").write_text("{}")
    store.commit(place, 10, sums, keep=None)
    assert _open_run(stage, config, folder)[1] == 10
    with pytest.raises(ConfigError, match=r"stage base is to begin, and .*store/base holds checkpoints of another run"):
        _open_run(stage, config, tmp_path / "r2" / "base")
    assert not (tmp_path / "r2").exists()


def test_a_pipeline_is_no_run_and_says_how_it_goes_on(tmp_path: Path) -> None:
    (tmp_path / "pipeline.json").write_text("{}")
    with pytest.raises(ConfigError, match="is a pipeline, not a run: `grpo-ray pipeline RECIPE`"):
        RunDir.open(tmp_path)


def test_estimates_come_from_what_was_measured_as_soon_as_there_is_something(tmp_path: Path) -> None:
    plan = plan_of(
        {"dir": str(tmp_path), "assume": {"prompt_tokens": 10, "completion_tokens": 20, "start_s": 30}},
        {"assume": {"tokens_per_s": {"train": 100}}},
    )
    record = Record.open(plan.folder)
    zero = plan.stage("zero")
    config = plan.config_of(zero)
    first = estimate(zero, config, plan, record, lambda source: None)
    assert first.tokens == 10 * 4 * 8 * 30
    assert first.seconds == pytest.approx(30 + 9600 / 100)
    assert first.what == "10 steps x 4 prompts x 8 samples"
    plan.folder.mkdir()
    record.put("zero", StageRecord("train", zero.digest, done=True, cost=Cost(90.0, 6000, 1)))
    assert estimate(zero, config, plan, record, lambda source: None).seconds == pytest.approx(30 + 9600 / 100)
    record.put("zero", StageRecord("train", zero.digest, done=True, cost=Cost(50.0, 6000, 1)))
    assert estimate(zero, config, plan, record, lambda source: None).seconds == pytest.approx(30 + 9600 / 300)
    base = plan.stage("base")
    assert estimate(base, plan.config_of(base), plan, record, lambda source: 1280).tokens == 10 * 128 * 30
    assert estimate(base, plan.config_of(base), plan, record, lambda source: None).seconds is None


def test_rows_are_known_of_generators_files_and_stages(tmp_path: Path) -> None:
    from grpo_ray.config.data import DataSource

    file = tmp_path / "a.jsonl"
    file.write_text("{}\n{}\n\n{}\n")
    assert rows_known(DataSource(path=str(file)), {}) == 3
    assert rows_known(DataSource(path=str(file), limit=2), {}) == 2
    assert rows_known(DataSource(path="python:x.y", args={"size": 40}), {}) == 40
    assert rows_known(DataSource(path="somewhere/data.jsonl"), {"somewhere/data.jsonl": 9}) == 9
    assert rows_known(DataSource(path="some/name"), {}) is None


def test_a_stage_of_pairs_asks_the_judge_about_samples_of_a_prompt(tmp_path: Path) -> None:
    from launch.pipeline.stage_data import make_data

    def by_length(request: dict[str, Any], n: int) -> str:
        first, second = (min(10, len(text)) for text in shown_of(request, "response"))
        return rated_pair(request, first, second)

    rows = [row(f"p/0/{i}", j, "ab" * (j + 1), question=f"question {i}") for i in range(3) for j in range(2)]
    samples = sample_folder(tmp_path / "samples", rows)
    with endpoint(by_length) as there:
        data = {"samples": str(samples), "judge": {"model": "judge", "base_url": there.url}, "length_tolerance": 1.0}
        for _ in range(2):
            report = make_data(build(PairsConfig, data, "test"), tmp_path / "pairs.jsonl")
            assert len(there.requests) == 3 * 4
    pairs = [json.loads(line) for line in (tmp_path / "pairs.jsonl").read_text().splitlines()]
    assert {p["prompt"][0]["content"]: p["chosen"][0]["content"] for p in pairs} == {
        f"question {i}": "abab" for i in range(3)
    }
    assert (report.num_rows, report.num_samples) == (3, 6)


@pytest.mark.parametrize("name", ["r1_tiny", "r1_7b"])
def test_the_shipped_pipelines_are_whole(name: str) -> None:
    from launch.pipeline.stages import load_plan
    from launch.run.recipe import RECIPES

    plan = load_plan(name, [])
    written = yaml.safe_load((RECIPES / f"{name}.yaml").read_text())["stages"]
    assert [s.name for s in plan.stages if s.kind != "eval"] == list(written)
    assert all(stage.note for stage in plan.stages if stage.kind != "eval")


def test_r1_zero_is_the_papers_but_for_what_it_says() -> None:
    from launch.run.recipe import load_recipe

    config = load_recipe(RunConfig, "r1_zero_7b", [])
    a = config.algorithm
    assert (a.loss, a.epsilon_high, a.beta) == ("grpo_sequence", 10.0, 0.001)
    assert (config.learner.learning_rate, config.rollout.num_generations, config.rollout.temperature) == (3e-6, 16, 1.0)
    assert config.prompts_per_step * config.rollout.num_generations == 8192
    assert config.prompts_per_step // a.num_mini_batches == 32
    assert a.ref_refresh_steps * a.num_mini_batches == 400
    assert {f.name: f.weight for f in config.reward.functions} == {"accuracy": 1.0, "r1_format": 1.0}
    assert config.data.template == "r1_zero"
