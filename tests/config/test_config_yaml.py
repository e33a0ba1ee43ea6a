"""Files and overrides: text stays text, numbers are numbers, nothing is cut, doubled or read without bound."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_ray.config.base import Strict
from grpo_ray.config.data import DataConfig, DataSource
from grpo_ray.config.loading import all_keys, build, deep_merge, load_yaml, parse_overrides, to_yaml
from grpo_ray.config.schema import RunConfig
from grpo_ray.config.supervised import DpoConfig, RewardModelConfig, SftConfig
from grpo_ray.config.typed import with_types
from grpo_ray.datagen.filters.config import MixConfig, PairsConfig, PromptsConfig
from grpo_ray.errors import ConfigError
from grpo_ray.pipeline.config import PipelineConfig
from launch.pipeline.stages import load_plan
from launch.run.recipe import load_recipe
from tests.cpu_time import cpu_below

SCHEMAS: list[type[Strict]] = [
    RunConfig,
    SftConfig,
    DpoConfig,
    RewardModelConfig,
    PipelineConfig,
    MixConfig,
    PairsConfig,
    PromptsConfig,
]
MINIMAL: dict[str, Any] = {
    "model": {"tiny": {}},
    "data": {"train": {"path": "rows.jsonl", "columns": {"prompt": "question"}}},
    "reward": {"functions": [{"name": "accuracy"}]},
}
NASTY = [
    "Put the answer after #### on the last line.",
    "#1 rule",
    "a: b",
    "- a",
    "yes",
    "NO",
    "1e-3",
    "12e4567",
    "012",
    "0x1F",
    "true",
    "~",
    "2024-01-02",
    "12:30",
    "[INST] be brief [/INST]",
    "{answer}",
    "& * ! % @ ` |",
    " two  spaces ",
    "it's",
    'say "x"',
    "a\nb\ttab",
    "a\\nb",
    "x=y=z",
    "${NAME} $HOME",
    "é 数 🙂",
]


def make(*overrides: str) -> RunConfig:
    return build(RunConfig, deep_merge(MINIMAL, parse_overrides(list(overrides))), "recipe test")


def read(folder: Path, text: str | bytes, *overrides: str) -> RunConfig:
    path = folder / "recipe.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return load_recipe(RunConfig, str(path), list(overrides))


def kinds_of(annotation: Any) -> set[type]:
    """What plain values an option takes."""
    origin = get_origin(annotation)
    if origin is Annotated:
        return kinds_of(get_args(annotation)[0])
    if origin is Literal:
        return {Literal}
    if origin is Union or str(origin) == "<class 'types.UnionType'>":
        return set().union(*map(kinds_of, get_args(annotation)))
    return {annotation} if annotation in (str, int, float, bool, Any) else set()


def options() -> list[tuple[type[Strict], str, set[type]]]:
    """All that an override can name: (schema, dotted key, what it takes)."""
    found = []
    for schema in SCHEMAS:
        for key in all_keys(schema):
            node: Any = schema
            path = []
            for part in key.split("."):
                if node is None:
                    break
                field = node.model_fields[part]
                path += (
                    [part, "any_name"] if get_origin(field.annotation) is dict and key[-len(part) :] != part else [part]
                )
                parts = walk(field.annotation)
                inner = [m for m in parts if hasattr(m, "model_fields")]
                node = inner[0] if inner and tuple not in [get_origin(each) for each in parts] else None
            else:
                found.append((schema, ".".join(path), kinds_of(field.annotation)))
    return found


def walk(annotation: Any) -> list[Any]:
    return [annotation, *(m for part in get_args(annotation) for m in walk(part))]


def value_at(schema: type[Strict], override: str) -> tuple[Any, dict[str, str]]:
    problems: dict[str, str] = {}
    node = with_types(schema, parse_overrides([override]), problems)
    for part in override.partition("=")[0].split("."):
        node = node[part]
    return node, problems


def test_every_text_option_takes_an_override_as_it_was_typed() -> None:
    texts = [(schema, key) for schema, key, kinds in options() if str in kinds]
    assert {"data.system", "model.path", "name", "data.train.split"} <= {key for _, key in texts}
    for schema, key in texts:
        for text in NASTY:
            quoted = (
                '"' + text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n").replace("\t", "\\t") + '"'
            )
            single = "'" + text.replace("'", "''") + "'"
            assert value_at(schema, f"{key}={text}") == (text, {}), key
            assert value_at(schema, f"{key}={quoted}") == (text, {}), key
            if "\n" not in text:
                assert value_at(schema, f"{key}={single}") == (text, {}), key


def test_every_number_and_bool_takes_an_unquoted_override_and_refuses_a_quoted_one() -> None:
    checked = 0
    for schema, key, kinds in options():
        if str in kinds or Any in kinds or not kinds & {int, float, bool}:
            continue
        checked += 1
        text, value = ("true", True) if bool in kinds else ("3", 3)
        assert value_at(schema, f"{key}={text}") == (value, {}), key
        assert value_at(schema, f"{key}= {text} ") == (value, {}), key
        for quote in ("'", '"'):
            _, problems = value_at(schema, f"{key}={quote}{text}{quote}")
            assert "take the quotes off" in problems[key]
        _, problems = value_at(schema, f"{key}={'3' if bool in kinds else 'true'}")
        assert bool in kinds or "is not a number" in problems[key]
    assert checked > 150


def test_choices_are_the_same_quoted_or_not() -> None:
    for schema, key, kinds in options():
        if kinds == {Literal}:
            assert value_at(schema, f"{key}=gloo") == value_at(schema, f"{key}='gloo'") == ("gloo", {}), key


@pytest.mark.parametrize(
    ("override", "get", "expected"),
    [
        ("data.system=null", lambda c: c.data.system, None),
        ("data.system=", lambda c: c.data.system, None),
        ('data.system="null"', lambda c: c.data.system, "null"),
        ("data.system=''", lambda c: c.data.system, ""),
        ('data.system="a" or "b"', lambda c: c.data.system, '"a" or "b"'),
        ("learner.learning_rate=1e-5", lambda c: c.learner.learning_rate, 1e-5),
        ("num_steps=1e3", lambda c: c.num_steps, 1000),
        ("num_steps=1_000", lambda c: c.num_steps, 1000),
        ("data.shuffle=off", lambda c: c.data.shuffle, False),
        ("rollout.env={X: 1e-3, Y: 012, Z: no}", lambda c: c.rollout.env, {"X": "1e-3", "Y": "012", "Z": "no"}),
        ("rollout.env.X=1e-3", lambda c: c.rollout.env, {"X": "1e-3"}),
        ("rollout.env.X=true", lambda c: c.rollout.env, {"X": "true"}),
        ("rollout.env.HF_TOKEN=${HF_TOKEN}", lambda c: c.rollout.env, {"HF_TOKEN": "${HF_TOKEN}"}),
        ("rollout.stop=[1, yes, '</answer>', \"a, b\"]", lambda c: c.rollout.stop, ("1", "yes", "</answer>", "a, b")),
        ("data.train.args={a: 1e-3, b: '1e-3', c: no}", lambda c: c.data.train.args, {"a": 0.001, "b": "1e-3", "c": "no"}),
        ("data.train.args.a=1e-3", lambda c: c.data.train.args["a"], 0.001),
        ("data.train.args.a='1e-3'", lambda c: c.data.train.args["a"], "1e-3"),
        ("data.train.args.a=Use # and: all", lambda c: c.data.train.args["a"], "Use # and: all"),
        ("data.train.args.a=[1, {b: 007}]", lambda c: c.data.train.args["a"], [1, {"b": "007"}]),
        ("data.train.columns={}", lambda c: c.data.train.columns, {}),
        ("data.train.columns={answer: a}", lambda c: c.data.train.columns, {"prompt": "question", "answer": "a"}),
        ("data.train.columns={1: a}", lambda c: c.data.train.columns["1"], "a"),
        ("model.lora={r: 8}", lambda c: c.model.lora.r, 8),
        ("model.lora={target_modules: [q_proj, v_proj]}", lambda c: c.model.lora.target_modules, ("q_proj", "v_proj")),
    ],
)  # fmt: skip
def test_what_an_override_means_is_the_schemas_to_say(
    override: str, get: Callable[[RunConfig], Any], expected: Any
) -> None:
    assert get(make(override)) == expected


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["num_steps='3'"], "num_steps: '3' is text, and a number is meant; take the quotes off"),
        (["num_steps=true"], "num_steps: True is not a number"),
        (["num_steps=3 # steps"], "num_steps"),
        (["num_steps=012"], "take the leading 0 off"),
        (["num_steps='0'"], "take the quotes off"),
        (["num_steps=-012"], "take the leading 0 off"),
        (["rollout.stop=</answer>"], "rollout.stop: a list is meant, [..] (got '</answer>')"),
        (["data.train=a.jsonl"], "data.train: a mapping is meant, {path: ..} (got 'a.jsonl')"),
        (["data.eval=a.jsonl"], "data.eval: a mapping is meant, {path: ..} (got 'a.jsonl')"),
        (["rollout=null"], "rollout: a mapping is meant, {num_actors: ..} (got None)"),
        (["data.train.columns=question"], "data.train.columns: a mapping is meant, {..} (got 'question')"),
        (["num_steps=12:30"], "num_steps"),
        (["num_steps=1e400"], "num_steps"),
        (["learner.learning_rate=.nan"], "learner.learning_rate"),
        (["learner.learning_rate=.inf"], "learner.learning_rate"),
        (["seed=" + "9" * 5000], "too many digits"),
        (["learner.packing='yes'"], "true or false is meant; take the quotes off"),
        (["rollout.stop=[a #b]"], "quote text that holds #"),
        (["rollout.env={X: true}"], "write it in quotes, 'true'"),
        (["rollout.env={X: 1, X: 2}"], "'X' is given twice"),
        (["data.eval.limit=3", "data.eval={path: a}"], "would undo 'data.eval.limit=3'"),
        (["rollout..stop=[a]"], "not of the form key=value"),
        (["data.system=\udcff"], "not UTF-8"),
        (["data.system=[never closed"], "put it in quotes"),
        (["rollout.stop=" + "[" * 5000 + "]"], "brackets inside each other"),
        (["dir=~nobody-of-this-name/runs"], "no user"),
    ],
)  # fmt: skip
def test_overrides_that_would_be_misread_are_refused(overrides: list[str], expected: str) -> None:
    with pytest.raises(ConfigError) as e:
        make(*overrides)
    assert expected in str(e.value)


def test_of_an_override_that_is_given_twice_the_last_counts_and_it_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = "data: {train: {path: a}}\n" + REST
    assert read(tmp_path, text, "num_steps=3", "num_steps=4").num_steps == 4
    assert "num_steps is given more than once; num_steps=4 counts" in capsys.readouterr().err
    assert read(tmp_path, text, "data.eval={path: a, limit: 3}", "data.eval.limit=4").data.eval == DataSource(
        path="a", limit=4
    )
    assert capsys.readouterr().err == ""


REST = "model: {tiny: {}}\nreward: {functions: [{name: accuracy}]}\n"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("seed: 1\nnum_steps: 2\nseed: 3\n", "recipe.yaml: 'seed' is given twice, in line 1 and in line 3"),
        ("rollout:\n  top_k: 1\nseed: 1\nrollout:\n  top_p: 1\n", "'rollout' is given twice, in line 1 and in line 4"),
        ("learner:\n  learning_rate: 1\n  zero_stage: 1\n  'learning_rate': 2\n", "in line 2 and in line 4"),
        ("data: {train: {path: a, args: {x: {k: 1, k: 2}}}}\n", "'k' is given twice"),
        ("num_steps: '3'\n", "num_steps: '3' is text"),
        ("num_steps: 1e400\n", "num_steps"),
        ("data:\n\ttrain: x\n", "line 2, column 1: not valid YAML"),
        ("data:\n\ttrain: x\n", "indent with spaces"),
        (b"seed: 1\n# caf\xe9\n", "line 2: not UTF-8 text"),
        (b"seed: 1\nname: a\x07\n", "line 2: not valid YAML: the character #x0007"),
        ("seed: 1\n---\nseed: 2\n", "line 2"),
        ("", "expected a mapping"),
        ("? [a, b]\n: 1\n", "line 1: a key has to be text"),
        ("dir: !!python/name:os.system\n", "line 1: the tag"),
        ("rollout: {env: {X: ${X}}}\n", "quote text that holds brackets"),
        ("data:\n  system: Put the answer after #### on the last line\n", "line 2: what follows `#` is a comment"),
        ("data:\n  system: #1 rule\n", "line 2: what follows `#` is a comment"),
        ("a: &a [*a]\n", "line 1: an alias inside of what it stands for"),
        ("a: " + "[" * 3000, "more than 100 brackets"),
    ],
)  # fmt: skip
def test_files_that_would_be_misread_are_refused_with_their_line(tmp_path: Path, text: str, expected: str) -> None:
    with pytest.raises(ConfigError) as e:
        read(tmp_path, text)
    assert expected in str(e.value)


@pytest.mark.parametrize("merge", ["[{}]", "{{<<: [{}]}}"])
def test_aliases_that_stand_for_millions_of_values_are_refused_at_once(tmp_path: Path, merge: str) -> None:
    lines = ["a0: &a0 {x: [1, 2, 3]}" if "<<" in merge else "a0: &a0 [1, 2, 3]"]
    lines += [f"a{i}: &a{i} {merge.format(', '.join([f'*a{i - 1}'] * 9))}" for i in range(1, 30)]
    with cpu_below(10), pytest.raises(ConfigError, match="stand for more than"):
        read(tmp_path, "\n".join(lines))


def test_quoted_text_of_a_file_stays_text_and_unquoted_numbers_keep_how_they_are_written(tmp_path: Path) -> None:
    config = read(
        tmp_path,
        "name: '12e4567'\ndir: 1e-3\nlearner: {learning_rate: 1e-6, packing: no}\n"
        "data: {system: NO, train: {path: 2024-01-02, args: {a: '1e-3', b: 1e-3, c: 012, d: on, e: 1_000}}}\n"
        "rollout: {env: {A: '1e-3', B: 1e-3, C: 0x10, D: 1.0, E: off}}\n" + REST,
    )
    assert (config.name, config.dir, config.data.system) == ("12e4567", "1e-3", "NO")
    assert (config.learner.learning_rate, config.learner.packing, config.data.train.path) == (1e-6, False, "2024-01-02")
    assert config.data.train.args == {"a": "1e-3", "b": 0.001, "c": "012", "d": "on", "e": 1000}
    assert config.rollout.env == {"A": "1e-3", "B": "1e-3", "C": "0x10", "D": "1.0", "E": "off"}
    assert all(type(v) in (str, float, int) for v in config.data.train.args.values())


def test_a_file_with_a_byte_order_mark_and_windows_line_ends_is_read(tmp_path: Path) -> None:
    text = "seed: 3 # ours\r\ndata: {train: {path: a.jsonl}}\r\n" + REST
    assert read(tmp_path, b"\xef\xbb\xbf" + text.encode()).seed == 3


def test_anchors_and_merge_keys_are_shared_sections(tmp_path: Path) -> None:
    text = "rollout: &r {top_k: 4, top_p: 0.5}\ndata: {train: {path: a, args: {<<: *r, top_k: 5}}}\n" + REST
    assert read(tmp_path, text).data.train.args == {"top_k": 5, "top_p": 0.5}


def test_the_home_is_put_in_place_of_a_tilde(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    config = make(
        "dir=~/runs",
        "model={path: ~/m, tiny: null}",
        "data.train.path=~/a.jsonl",
        "data.eval={x: {path: ~/b.jsonl}}",
        "data.template=~/t.jinja",
        "checkpoint.path=~/c",
        "reward.functions=[{name: reward_model, args: {path: ~/rm}}]",
    )
    assert config.dir == f"{tmp_path}/runs"
    assert config.model.path == f"{tmp_path}/m"
    assert config.data.train.path == f"{tmp_path}/a.jsonl"
    assert config.data.eval_sets["x"].path == f"{tmp_path}/b.jsonl"
    assert config.checkpoint.path == f"{tmp_path}/c"
    assert config.data.template == f"{tmp_path}/t.jinja"
    assert config.reward.functions[0].args["path"] == f"{tmp_path}/rm"
    elsewhere = build(RunConfig, deep_merge(MINIMAL, parse_overrides(["dir=~/runs"])), "r", keep_home=True)
    assert elsewhere.dir == "~/runs"


def load_yaml_text(folder: Path, text: str) -> dict[str, Any]:
    path = folder / "written.yaml"
    path.write_text(text, encoding="utf-8")
    return load_yaml(path)


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.sampled_from(NASTY)
    | st.text(st.characters(codec="utf-8"), max_size=20),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(NASTY) | st.text(st.characters(codec="utf-8"), max_size=8), inner, max_size=3)
    ),
    max_leaves=8,
)
texts = st.sampled_from(NASTY) | st.text(st.characters(codec="utf-8"), max_size=40)


@pytest.mark.parametrize("text", ["inf", "nan", "1e1_0", "\uff11\uff10"])
def test_what_was_typed_without_quotes_is_not_told_to_take_them_off(text: str) -> None:
    with pytest.raises(ConfigError) as e:
        make(f"learner.learning_rate={text}")
    assert f"learner.learning_rate: {text!r} is text, and a number is meant" in str(e.value)
    assert "quotes" not in str(e.value)


def test_the_escapes_of_json_are_one_character_and_half_of_one_is_refused(tmp_path: Path) -> None:
    text = json.dumps({"system": "\U0001f600", "train": {"path": "a", "args": {"\U0001f600": ["\U0001f600"]}}})
    assert "\\ud83d" in text
    config = build(DataConfig, load_yaml_text(tmp_path, text), "r")
    assert (config.system, config.train.args) == ("\U0001f600", {"\U0001f600": ["\U0001f600"]})
    assert make('rollout.stop=["\\ud83d\\ude00"]').rollout.stop == ("\U0001f600",)
    with pytest.raises(ConfigError, match=r"line 2.*half of a character"):
        load_yaml_text(tmp_path, 'seed: 1\nname: "\\ud83d"\n')
    with pytest.raises(ConfigError, match="half of a character"):
        make('data.system="\\udcff"')


def test_a_next_line_character_reads_back_as_itself(tmp_path: Path) -> None:
    config = build(DataConfig, {"system": "a\x85b", "train": {"path": "a.jsonl", "args": {"k\x85": "\x85"}}}, "r")
    assert build(DataConfig, load_yaml_text(tmp_path, to_yaml(config)), "again") == config


@settings(max_examples=40, deadline=None)
@given(
    system=texts,
    args=st.dictionaries(texts, json_values, max_size=3),
    columns=st.dictionaries(texts, texts, max_size=2),
)
def test_any_config_reads_back_from_its_yaml_as_itself(
    tmp_path_factory: pytest.TempPathFactory, system: str, args: dict[str, Any], columns: dict[str, str]
) -> None:
    data = {"system": system, "train": {"path": "a.jsonl", "args": args, "columns": columns}}
    config = build(DataConfig, data, "first")
    again = build(DataConfig, load_yaml_text(tmp_path_factory.getbasetemp(), to_yaml(config)), "again")
    assert again == config
    assert repr(again) == repr(config)


@settings(max_examples=40, deadline=None)
@given(text=texts)
def test_any_text_reaches_an_option_in_the_quotes_of_json(text: str) -> None:
    overrides = parse_overrides([f"system={json.dumps(text)}", "train.path=a.jsonl"])
    assert build(DataConfig, overrides, "r").system == text


def test_a_stages_options_are_text_and_numbers_as_those_of_a_run(tmp_path: Path) -> None:
    path = tmp_path / "stages.yaml"
    path.write_text(
        "common: {sft: {learner: {env: {X: 1e-3}}}}\n"
        "stages: {a: {kind: sft, config: {model: {tiny: {}}, data: {train: {path: a.jsonl, columns: {prompt: q}}}}}}\n"
    )
    changes = ["data.system=after ####: #1", "num_steps=1e1", "data.train.columns={}"]
    plan = load_plan(str(path), [f"stages.a.config.{change}" for change in changes])
    config = plan.config_of(plan.stage("a"))
    assert isinstance(config, SftConfig)
    assert (config.data.system, config.num_steps, config.data.train.columns) == ("after ####: #1", 10, {})
    assert config.learner.env == {"X": "1e-3"}
    with pytest.raises(ConfigError, match="take the quotes off"):
        load_plan(str(path), ["stages.a.config.num_steps='3'"])
