"""What keeps a run from working and needs no engine is found by `check`, in seconds, with the cause and the mend."""

from __future__ import annotations

import ast
import contextlib
import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from rich.table import Table
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from grpo_ray.config.learner import Forward
from grpo_ray.config.model import LoraConfig, ModelConfig, TinyModelConfig
from grpo_ray.config.rollout import RolloutConfig
from grpo_ray.config.supervised import SftConfig
from grpo_ray.data.prompts import load_demonstrations, load_prompts
from grpo_ray.data.templates import make_template
from grpo_ray.errors import ConfigError, DataError, GrpoRayError, ResourceError
from grpo_ray.loop.stops import template_end
from grpo_ray.models.attention import PACKED
from grpo_ray.models.files.loading import check_model_path, context_length, load_config, load_tokenizer, vocab_size
from grpo_ray.models.files.model_files import num_elements
from grpo_ray.models.files.tiny import build_tiny_model
from grpo_ray.models.memory.kv_cache import check_gpu_shares, check_kv_cache
from grpo_ray.models.trainable import check_adapters, skeleton, with_forward
from launch.check.command import check_recipe
from launch.console import headed, plain_console
from launch.pipeline.stages import load_plan
from launch.run.live import LiveView
from launch.run.machine import check_checkpoint_path, check_folder, check_machine, unset_variables
from launch.run.recipe import check_kind, kind_of, load_recipe
from tests.cpu_time import cpu_below
from tests.models.train_table import write_model
from tests.recipes import run_config

ROOT = Path(__file__).parents[3]
TINY = TinyModelConfig(hidden_size=64, num_layers=2, num_heads=2, num_kv_heads=1)
LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    build_tiny_model(folder, TINY)
    return folder


@pytest.fixture
def model(tiny: Path, tmp_path: Path) -> Path:
    """A copy to be broken."""
    folder = tmp_path / "model"
    folder.mkdir()
    for file in tiny.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


FORWARDS: tuple[Forward, ...] = ("auto", "packed", "plain")


def small_config(kind: str) -> Any:
    """Transformers' default config of this kind, with two layers."""
    config = CONFIG_MAPPING[kind]()
    text = config.get_text_config()
    for name in LAYERS:
        if getattr(text, name, None):
            setattr(text, name, 2)
    # Of some it follows from their number.
    with contextlib.suppress(AttributeError):
        text.layer_types = text.layer_types[:2]
    return config


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("mllama", "more than a language model .*text_config, vision_config.*no language model.*'mllama_text_model'"),
        ("hunyuan_v1_dense", "Transformers makes no hunyuan_v1_dense of its config.json"),
        ("bert", "BertLMHeadModel attends to what comes after a token, too"),
    ],
)
def test_a_model_that_the_learner_would_refuse_is_told_by_its_config(kind: str, expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        skeleton(small_config(kind), ModelConfig(path="m"))


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("falcon", "attention of its own, beside Transformers' interface"),
        ("gptj", "attention of its own, beside Transformers' interface"),
        ("bloom", "do not use Transformers' attention interface"),
        ("mamba", "over which packed sequences would see each other"),
        ("llama4_text", "layers of chunked_attention"),
    ],
)
def test_a_model_that_does_not_pack_goes_the_plain_way_unless_that_is_ruled_out(kind: str, expected: str) -> None:
    config, model = small_config(kind), ModelConfig(path="m")
    hf, reason = with_forward(config, model, "auto")
    assert expected in reason
    assert all(p.device.type == "meta" for p in hf.parameters())
    with pytest.raises(ConfigError, match=f"{expected}.*not supported with learner.forward packed; use auto"):
        skeleton(config, model, forward="packed")
    with pytest.raises(ConfigError, match=f"{expected}.*; use learner.sequence_parallel_size 1"):
        skeleton(config, model, slices=2)


def test_positions_that_depend_on_the_longest_sequence_are_refused_on_the_plain_path(tiny: Path) -> None:
    config, model = load_config(str(tiny), trust_remote_code=False), ModelConfig(path=str(tiny))
    config.rope_parameters = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    assert with_forward(config, model, "packed")[1] == ""
    with pytest.raises(ConfigError, match="padded to the longest it would have the dynamic positions"):
        with_forward(config, model, "plain")


def test_a_model_that_packs_goes_the_plain_way_if_it_is_told_to(tiny: Path) -> None:
    config, model = load_config(str(tiny), trust_remote_code=False), ModelConfig(path=str(tiny))
    auto, packed, plain = (with_forward(config, model, forward) for forward in FORWARDS)
    assert [auto[1], packed[1], plain[1]] == ["", "", "learner.forward is plain"]
    models: list[Any] = [auto[0], packed[0], plain[0]]
    assert [hf.config._attn_implementation for hf in models] == [PACKED, PACKED, "sdpa"]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"hidden_size": 0}, "ZeroDivisionError"),
        ({"intermediate_size": -5}, "negative dimension"),
        ({"vocab_size": -1}, "negative dimension"),
        ({"hidden_size": "x"}, "hidden_size'?: .*str"),
        ({"num_hidden_layers": -1}, "validate_layer_type'?: .*layer"),
    ],
)
def test_a_config_that_no_model_can_be_made_of_is_refused_with_the_cause(
    tiny: Path, tmp_path: Path, change: dict[str, Any], expected: str
) -> None:
    written = json.loads((tiny / "config.json").read_text()) | change
    (tmp_path / "config.json").write_text(json.dumps(written))
    with pytest.raises(ConfigError, match=expected):
        skeleton(load_config(str(tmp_path), trust_remote_code=False), ModelConfig(path=str(tmp_path)))


def test_a_skeleton_has_the_size_of_the_model_and_no_memory(tiny: Path) -> None:
    hf, _ = skeleton(load_config(str(tiny), trust_remote_code=False), ModelConfig(path=str(tiny)))
    tensors = json.loads((tiny / "model.safetensors").read_bytes()[8:].split(b"}}")[0] + b"}}")
    held = sum(
        (t["data_offsets"][1] - t["data_offsets"][0]) // 4 for name, t in tensors.items() if name != "__metadata__"
    )
    assert sum(p.numel() for p in hf.parameters()) == held
    assert all(p.device.type == "meta" for p in hf.parameters())


def test_adapters_and_slices_are_tried_on_the_skeleton(tiny: Path) -> None:
    config = load_config(str(tiny), trust_remote_code=False)
    model = ModelConfig(path=str(tiny), lora=LoraConfig(r=4, target_modules=("nope",)))
    with pytest.raises(ConfigError, match="fits no layer"):
        check_adapters(skeleton(config, model)[0], model)
    with pytest.raises(ConfigError, match="use one of 1, 2"):
        skeleton(config, ModelConfig(path=str(tiny)), slices=3)


@pytest.mark.slow
@pytest.mark.parametrize("kind", MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
def test_every_causal_model_of_transformers_is_made_or_refused_with_a_reason(kind: str) -> None:
    try:
        config = small_config(kind)
    except Exception as e:
        pytest.skip(f"Transformers' own default does not validate: {e}")
    for look in (context_length, vocab_size, lambda c: skeleton(c, ModelConfig(path="m"))):
        with contextlib.suppress(ConfigError):
            assert look(config)


def test_a_context_is_found_under_each_of_its_names_and_its_lack_is_told() -> None:
    assert context_length(small_config("gpt2")) == 1024
    assert context_length(small_config("mpt")) == 2048
    assert context_length(SimpleNamespace(text_config=SimpleNamespace(max_position_embeddings=7))) == 7
    with pytest.raises(
        ConfigError, match=r"'bloom'.* does not say how large its context is: no max_position_embeddings"
    ):
        context_length(small_config("bloom"))


def _cut(keep: int) -> Callable[[Path], None]:
    def cut(model: Path) -> None:
        weights = model / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:keep])

    return cut


def _remove(*files: Path) -> None:
    for file in files:
        file.unlink()


def _index(model: Path, shard: str) -> None:
    (model / "model.safetensors").rename(model / "a.safetensors")
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": "a.safetensors", "y": shard}}))


BROKEN: list[tuple[Callable[[Path], Any], str]] = [
    (
        lambda m: (m / "model.safetensors").unlink(),
        "has no weights: model.safetensors, whole or in parts, is not there",
    ),
    (_cut(0), "no whole safetensors file"),
    (_cut(5), "no whole safetensors file"),
    (_cut(40), "no whole safetensors file"),
    (_cut(100_000), "file not fully covered"),
    (lambda m: (m / "model.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\n"), "git lfs pull"),
    (lambda m: (m / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"[]"), "no whole safetensors file"),
    (lambda m: _index(m, "b.safetensors"), "1 of its 2 files of weights are missing: b.safetensors"),
    (lambda m: (m / "config.json").write_text("{"), "config.json can't be read"),
    (lambda m: _remove(*m.glob("token*")), "has no tokenizer"),
    (lambda m: (m / "model.safetensors").rename(m / "adapter_config.json").write_text("{}"), "merge that"),
]


@pytest.mark.parametrize(("damage", "expected"), BROKEN)
def test_a_models_folder_that_is_not_whole_is_told(model: Path, damage: Callable[[Path], Any], expected: str) -> None:
    check_model_path(str(model))
    damage(model)
    with pytest.raises(ConfigError, match=expected):
        check_model_path(str(model))


def test_weights_in_whole_parts_are_whole(model: Path) -> None:
    _index(model, "a.safetensors")
    check_model_path(str(model))


def test_a_tokenizer_or_a_config_that_is_broken_is_told(model: Path) -> None:
    (model / "tokenizer.json").write_text('{"version": "1.0"}')
    with pytest.raises(ConfigError, match="no tokenizer that can be loaded"):
        load_tokenizer(str(model), trust_remote_code=False)
    (model / "config.json").write_text('{"model_type": "qwen2", "num_attention_heads": "x"}')
    with pytest.raises(ConfigError, match="makes nothing of its config"):
        load_config(str(model), trust_remote_code=False)


def test_a_cache_larger_than_memory_is_refused_in_one_line_with_what_fits() -> None:
    gib = 1 << 30
    check_kv_cache(RolloutConfig(kv_cache_gb=8.4), 10 * gib, 1)
    with pytest.raises(
        ResourceError, match=r"kv_cache_gb is 200.*10\.0 GiB of memory; lower it to 8\.5 at most"
    ) as told:
        check_kv_cache(RolloutConfig(kv_cache_gb=200), 10 * gib, 1)
    assert "\n" not in str(told.value)
    with pytest.raises(ResourceError, match=r"each of 2 engines on it has, beside 1\.0 GiB of weights.* 3\.2 at most"):
        check_kv_cache(RolloutConfig(kv_cache_gb=4), 10 * gib, 2, weights=gib)
    with pytest.raises(ResourceError, match="not even the weights fit"):
        check_kv_cache(RolloutConfig(), 10 * gib, 2, weights=5 * gib)


def test_engines_that_share_a_gpu_have_shares_that_fit() -> None:
    config = run_config("rollout.num_gpus=0.5", "rollout.num_actors=2", "rollout.gpu_memory_utilization=0.4")
    check_gpu_shares(config)
    with pytest.raises(ResourceError, match=r"2 engines on a GPU.*lower that to 0\.47"):
        check_gpu_shares(run_config("rollout.num_gpus=0.5", "rollout.num_actors=2"))


@pytest.mark.parametrize("package", ["wandb", "mlflow"])
def test_a_trackers_missing_package_is_told(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=rf"package {package} is not installed; pip install grpo-ray\[{package}\]"):
        check_machine(run_config(f"tracking.{package}=true"))


def test_folders_that_a_run_can_not_write_to_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_folder(str(tmp_path / "new" / "runs"), "dir")
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="file is a file, and a folder is meant"):
        check_folder(str(tmp_path / "file" / "runs"), "dir")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="a link to nothing"):
        check_folder(str(tmp_path / "link"), "dir")
    with pytest.raises(ConfigError, match="fsspec can't reach nosuch:// here"):
        check_checkpoint_path("nosuch://bucket/runs")
    monkeypatch.setattr("os.access", lambda path, mode: False)
    with pytest.raises(ConfigError, match=r"can't be written to by this user; name another folder, checkpoint\.path="):
        check_checkpoint_path(str(tmp_path / "store"))


def test_a_full_disk_is_told_with_what_is_left(tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match=r"GiB left, and a checkpoint takes about 1048576\.0"):
        check_folder(str(tmp_path), "dir", needed=1 << 50)


def test_variables_that_a_recipe_names_and_nobody_set_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SET_TOKEN", "x")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    config = run_config(
        "rollout.env={HF_TOKEN: '${SET_TOKEN}'}",
        "learner.env={HF_TOKEN: '${UNSET_TOKEN}', PLAIN: x}",
        "reward.functions=[{name: judge, args: {model: m}, workers: {timeout_s: 90}}]",
    )
    token, key = unset_variables(config)
    assert "learner.env.HF_TOKEN takes ${UNSET_TOKEN}" in token
    assert "OPENAI_API_KEY is not set" in key


def _jsonl(folder: Path, *lines: str) -> str:
    file = folder / "rows.jsonl"
    file.write_text("".join(line + "\n" for line in lines))
    return str(file)


GOOD = '{"prompt": "1 + 1", "completion": "2", "answer": "2"}'


@pytest.mark.parametrize(
    "row",
    [
        r'{"prompt": "a \ud83d b", "completion": "c"}',
        r'{"prompt": [{"role": "user", "content": "\udc00"}], "completion": "c"}',
        r'{"prompt": "a", "completion": "\ud83d c"}',
    ],
)
def test_half_a_character_is_named_by_its_line(row: str, tiny: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(tiny), trust_remote_code=False)
    data = run_config(f"data.train.path={_jsonl(tmp_path, GOOD, row)}").data
    with pytest.raises(DataError, match=r"rows\.jsonl, line 2: the (prompt|answer) holds half of a character, '\\ud"):
        load_demonstrations(data, tokenizer, seed=1, max_length=64)


def test_half_a_character_in_a_column_is_the_rewards_to_read(tiny: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(tiny), trust_remote_code=False)
    rows = _jsonl(tmp_path, GOOD, r'{"prompt": "a", "stdin": "\ud83d"}')
    data = run_config(f"data.train.path={rows}").data
    assert load_prompts(data, tokenizer, seed=1).train.item(1, 0).columns["stdin"] == "\ud83d"


def test_of_several_chat_templates_one_is_chosen_by_its_name(tiny: Path) -> None:
    tokenizer = load_tokenizer(str(tiny), trust_remote_code=False)
    base = tokenizer.chat_template
    with pytest.raises(DataError, match="has one chat template, without a name; use chat"):
        make_template("chat:rag", tokenizer)
    tokenizer.chat_template = {"default": base, "rag": "R" + base}
    plain = make_template("chat", tokenizer)("x", {}).text
    assert make_template("chat:rag", tokenizer)("x", {}).text == "R" + plain
    assert template_end(tokenizer, "chat:rag") == template_end(tokenizer, "chat")
    tokenizer.chat_template = {"tool_use": base, "rag": "R" + base}
    assert make_template("chat:rag", tokenizer)("x", {}).text == "R" + plain
    for name, expected in (("chat", "data.template=chat:tool_use"), ("chat:x", "it has: tool_use, rag")):
        with pytest.raises(DataError, match=expected):
            make_template(name, tokenizer)


LITERAL = ("[/INST] x", "[b]bold[/b]", "[red]", ":smile: :x:", "a\\", "\\[b]", "[link=x]y[/link]", "[@click=f]z")


@pytest.mark.parametrize("text", LITERAL)
def test_what_users_wrote_is_printed_as_it_is(text: str) -> None:
    out = io.StringIO()
    console = plain_console(file=out, width=200)
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_row("prompt", text)
    console.print(text)
    console.print(headed("error:", "bold red", f" {text}"))
    console.print(table)
    LiveView(console=console).note(text)
    assert [line.rstrip() for line in out.getvalue().splitlines()] == [text, f"error: {text}", f"prompt  {text}", text]


def test_every_command_prints_with_a_console_that_knows_no_markup() -> None:
    """Rich's own console would take `[b]` of a prompt for bold, and end at `[/INST]`."""
    made = {
        path.relative_to(ROOT).as_posix()
        for package in ("launch", "grpo_ray", "actors")
        for path in (ROOT / package).rglob("*.py")
        if "Console(" in path.read_text()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "Console"
    }
    assert made == set(), "grpo_ray.terminal.PlainConsole is the one"


CAUSES: list[tuple[list[str], str]] = [
    (["reward.functions=[{name: user_rewards.of_level}]"], "needs the column 'level'"),
    (["reward.functions=[{name: user_rewards.NoCall}]"], "a class whose instances can't be called"),
    (["rollout.kv_cache_gb=20000"], "lower it to"),
    (["rollout.kv_cache_gb=0.00001"], "a sample of up to 256 tokens takes"),
    (["checkpoint.path=nosuch://b/runs"], "fsspec can't reach"),
    (["checkpoint.path=s3://"], "names no bucket"),
    (["name=../x"], "name"),
    (["model={path: small, tiny: null}"], "more than the 20 that the model has"),
    (["model={path: loops, tiny: null}", "data.template=chat"], "Range too big"),
    (["dir=rows.jsonl"], "is a file, and a folder is meant"),
    (["data.train.path=half.jsonl"], "half.jsonl, line 2"),
    (["data.train.path=torn.jsonl"], "torn.jsonl, line 2: not valid JSON"),
    (["data.train.path=deep.jsonl"], "deep.jsonl, line 1: not usable JSON"),
    (["data.train.path=number.jsonl"], "number.jsonl, line 1, column 'prompt': expected text"),
    (["data.train.path=folder.jsonl"], "folder.jsonl is a folder"),
    (["data.eval.path=nowhere.jsonl"], "nowhere.jsonl: no such file"),
    (["data.template=folder.jsonl"], "is a folder; name the Jinja file"),
    (["data.template=chat:rag"], "one chat template, without a name"),
    (["model={path: falcon, tiny: null}", "learner.forward=packed"], "attention of its own, beside"),
    (["model={path: mllama, tiny: null}"], "more than a language model"),
    (["model={path: cut, tiny: null}"], "no whole safetensors file"),
    (
        ["model={path: heads, tiny: null}"],
        "vLLM can't sample this qwen2 on CPUs: its attention heads have 16 dimensions",
    ),
]


def write_weights(folder: Path) -> None:
    """A file with all tensors of the model of the folder's config, with holes in place of its values."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    header, end = {}, 0
    for name, tensor in model.state_dict().items():
        start, end = end, end + 4 * tensor.numel()
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)


@pytest.fixture(scope="module")
def recipe(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recipe")
    (folder / "recipe.yaml").write_text(
        yaml.safe_dump(
            {
                "model": {"tiny": TINY.model_dump(exclude_none=True), "dtype": "float32"},
                "data": {"train": {"path": "rows.jsonl"}},
                "reward": {"functions": [{"name": "accuracy"}], "num_cpus": 0},
                "cluster": {"num_cpus": 2},
            }
        )
    )
    for name, text in {
        "rows": GOOD,
        "half": GOOD + '\n{"prompt": "\\ud800", "answer": "1"}',
        "torn": GOOD + '\n{"prompt": "1',
        "deep": "[" * 100_000,
        "number": '{"prompt": 7}',
    }.items():
        (folder / f"{name}.jsonl").write_text(text)
    (folder / "folder.jsonl").mkdir()
    (folder / "user_rewards.py").write_text(
        "class NoCall: pass\n\ndef of_level(completions, level, **columns):\n    return [0.0] * len(completions)\n"
    )
    for kind in ("small", "loops", "heads"):
        (folder / kind).mkdir()
        for file in tiny.iterdir():
            (folder / kind / file.name).write_bytes(file.read_bytes())
    small = json.loads((tiny / "config.json").read_text()) | {"vocab_size": 20}
    (folder / "small" / "config.json").write_text(json.dumps(small))
    heads = json.loads((tiny / "config.json").read_text()) | {"num_attention_heads": 4}
    (folder / "heads" / "config.json").write_text(json.dumps(heads))
    (folder / "loops" / "chat_template.jinja").write_text("{% for i in range(99999999) %}{% endfor %}")
    for kind in ("falcon", "mllama", "cut"):
        (folder / kind).mkdir()
        for file in tiny.iterdir():
            (folder / kind / file.name).write_bytes(file.read_bytes()[: 50_000 if kind == "cut" else None])
        if kind != "cut":
            config = small_config(kind)
            config.update({"hidden_size": 128, "num_attention_heads": 4, "vocab_size": 320} if kind == "falcon" else {})
            config.save_pretrained(folder / kind)
    for kind in ("small", "heads", "falcon"):
        write_weights(folder / kind)
    return folder


@pytest.mark.parametrize(("overrides", "expected"), CAUSES)
def test_check_finds_each_cause_in_seconds(
    overrides: list[str], expected: str, recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(recipe)
    with cpu_below(10), pytest.raises(GrpoRayError) as told:
        check_recipe("recipe.yaml", overrides)
    assert expected in str(told.value)
    assert "\n" not in str(told.value)


def test_check_tells_why_a_model_goes_the_plain_way(
    recipe: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(recipe)
    check_recipe("recipe.yaml", ["model={path: falcon, tiny: null}"])
    assert "the plain way, a sequence a row: it has attention of its own" in " ".join(capsys.readouterr().out.split())
    check_recipe("recipe.yaml", [])
    assert "plain way" not in capsys.readouterr().out


def test_check_tells_that_the_text_model_of_a_multimodal_one_is_trained(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(recipe)
    model = write_model("smolvlm", tmp_path / "model")
    check_recipe("recipe.yaml", [f"model={{path: {model}, tiny: null}}"])
    out = " ".join(capsys.readouterr().out.split())
    assert (
        "the text model of SmolVLMForConditionalGeneration: its other parts are neither trained nor sampled with" in out
    )
    whole = sum(map(num_elements, model.glob("*.safetensors")))
    told = re.search(r"model: ([\d.]+) M parameters", out)
    assert told is not None
    assert 0 < float(told[1]) < whole / 1e6


def test_a_recipe_for_another_command_is_told_as_one(recipe: Path) -> None:
    with pytest.raises(ConfigError, match="By its sections it is a recipe for `grpo-ray train`"):
        load_recipe(SftConfig, str(recipe / "recipe.yaml"), [])


def test_check_tells_of_a_run_of_that_name(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(recipe)
    overrides = [f"dir={tmp_path}", "name=mine"]
    (tmp_path / "mine" / "logs").mkdir(parents=True)
    check_recipe("recipe.yaml", overrides)
    assert "already" not in capsys.readouterr().out
    (tmp_path / "mine" / "config.yaml").touch()
    check_recipe("recipe.yaml", overrides)
    assert "already" in capsys.readouterr().out


PAIR = '{"prompt": "1 + 1", "chosen": "2", "rejected": "3"}'


@pytest.mark.parametrize(
    ("sections", "overrides", "kind"),
    [
        ({}, [], "sft"),
        ({}, ["dpo.beta=0.2"], "dpo"),
        ({}, ["reward_model.use_margin=true"], "reward_model"),
        ({}, ["data.train.path=pairs.jsonl"], "dpo"),
        ({}, ["data.train.path=pairs.parquet"], "dpo"),
        ({}, ["data.train.columns={chosen: good, rejected: bad}"], "dpo"),
        ({}, ["data.train.path=none.jsonl"], "sft"),
        ({"reward": {"functions": [{"name": "accuracy"}]}}, ["data.train.path=pairs.jsonl"], "grpo"),
        ({"dpo": {}}, [], "dpo"),
        ({"reward_model": {}}, ["data.train.path=pairs.jsonl"], "reward_model"),
    ],
)
def test_a_recipe_is_of_the_kind_that_its_sections_its_overrides_or_its_data_tell(
    sections: dict[str, Any], overrides: list[str], kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    _jsonl(tmp_path, GOOD)
    (tmp_path / "pairs.jsonl").write_text("\n" + PAIR)
    pq.write_table(pa.Table.from_pylist([json.loads(PAIR)]), tmp_path / "pairs.parquet")
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({"data": {"train": {"path": "rows.jsonl"}}, **sections}))
    assert kind_of(tmp_path / "recipe.yaml", overrides) == kind


def test_a_kind_is_named_as_its_command_is() -> None:
    assert [check_kind(name) for name in ("train", "grpo", "reward-model", "reward_model", "dpo")] == [
        "grpo",
        "grpo",
        "reward_model",
        "reward_model",
        "dpo",
    ]
    with pytest.raises(ConfigError, match="there are train, sft, dpo, reward-model"):
        check_kind("ppo")


def test_check_takes_a_recipe_of_pairs_for_dpo(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(recipe)
    (recipe / "pairs.jsonl").write_text(PAIR)
    text = yaml.safe_load((recipe / "recipe.yaml").read_text())
    (recipe / "pairs.yaml").write_text(yaml.safe_dump({k: v for k, v in text.items() if k != "reward"}))
    check_recipe("pairs.yaml", ["data.train.path=pairs.jsonl", "dpo.beta=0.2"])
    check_recipe("pairs.yaml", ["data.train.path=pairs.jsonl", "learner.num_cpus=0.5"])
    check_recipe("pairs.yaml", ["data.train.path=rows.jsonl"], "sft")
    told = [line for line in capsys.readouterr().out.splitlines() if line.startswith("ok")]
    assert [line.split()[2] for line in told] == ["dpo", "dpo", "sft"]


def test_what_the_stages_of_a_pipeline_need_is_looked_at_before_the_first(
    recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(recipe)
    run = yaml.safe_load((recipe / "recipe.yaml").read_text())
    (recipe / "stages.yaml").write_text(yaml.safe_dump({"stages": {"zero": {"kind": "train", "config": run}}}))
    load_plan("stages.yaml", ["stages.zero.config.reward.functions=[{name: 'user_rewards.py:of_level'}]"])
    with pytest.raises(ResourceError, match="kv_cache_gb is 20000"):
        load_plan("stages.yaml", ["stages.zero.config.rollout.kv_cache_gb=20000"])
    with pytest.raises(ConfigError, match=r"there is no file none\.py"):
        load_plan("stages.yaml", ["stages.zero.config.reward.functions=[{name: 'none.py:f'}]"])
