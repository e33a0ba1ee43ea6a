"""Checkpoints whose tensors are not those of the model are refused with their names, by their headers and as they are loaded."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForSequenceClassification

from actors.learner.build import LearnerSpec, load_hf
from actors.learner.group import _spec
from grpo_ray.batch.sequence import Alone
from grpo_ray.config.model import ModelConfig
from grpo_ray.errors import ConfigError
from grpo_ray.models.files.checkpoint_tensors import read_model
from grpo_ray.models.files.model_files import check_model_files
from grpo_ray.models.trainable import skeleton
from tests.actors.learner.test_learner import make_config
from tests.models.random_models import VOCAB, random_config, random_model

CPU = torch.device("cpu")
K_PROJ = "model.layers.1.self_attn.k_proj.weight"
Tensors = dict[str, Tensor]


def write(folder: Path, kind: str = "qwen2", **options: Any) -> Path:
    model: Any = random_model(kind, dtype=torch.float32, attention="eager", **options)
    model.save_pretrained(folder)
    return folder


def changed(folder: Path, change: Callable[[Tensors], Any]) -> Path:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, {"format": "pt"})
    return folder


def set_options(folder: Path, **options: Any) -> Path:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | options))
    return folder


def by_headers(folder: Path, *, reward_model: bool = False) -> None:
    skeleton(AutoConfig.from_pretrained(folder), ModelConfig(path=str(folder)), reward_model=reward_model)


def spec_of(folder: Path, stage: int) -> LearnerSpec:
    return _spec(make_config(folder, ranks=1, stage=stage), str(folder), str(folder), False, 10)


def whole(folder: Path) -> nn.Module:
    found: nn.Module = load_hf(spec_of(folder, 0), CPU, Alone(), trained=True)
    return found


def by_shards(folder: Path) -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        load_hf(spec_of(folder, 3), CPU, Alone(), trained=True)
    finally:
        dist.destroy_process_group()


WAYS = [by_headers, whole, by_shards]


def refused(way: Callable[[Path], Any], folder: Path, *expected: str) -> None:
    with pytest.raises(ConfigError) as told:
        way(folder)
    for part in expected:
        assert re.search(part, str(told.value)), told.value


@pytest.mark.parametrize("way", WAYS)
def test_a_missing_tensor_is_named(way: Callable[[Path], Any], tmp_path: Path) -> None:
    folder = changed(write(tmp_path), lambda t: (t.pop(K_PROJ), t.pop("lm_head.weight")))
    refused(way, folder, "lacks 2 of the tensors", re.escape(f"lm_head.weight, {K_PROJ};"), "download the model again")


@pytest.mark.parametrize("way", WAYS)
def test_a_tensor_of_another_shape_is_named(way: Callable[[Path], Any], tmp_path: Path) -> None:
    folder = changed(write(tmp_path), lambda t: t.update({K_PROJ: torch.zeros(8, 32)}))
    refused(way, folder, re.escape(f"{K_PROJ} is [8, 32], not [16, 32]"))


@pytest.mark.parametrize("way", WAYS)
def test_names_with_a_prefix_are_told_beside_those_that_are_missing(way: Callable[[Path], Any], tmp_path: Path) -> None:
    def rename(tensors: Tensors) -> None:
        for name in list(tensors):
            tensors[f"actor.{name}"] = tensors.pop(name)

    refused(way, changed(write(tmp_path), rename), "lacks 27 of the tensors", "it has 27 that the model lacks: actor.")


@pytest.mark.parametrize("way", [by_headers, whole])
def test_a_missing_expert_is_named(way: Callable[[Path], Any], tmp_path: Path) -> None:
    lost = "model.layers.0.mlp.experts.2.up_proj.weight"
    folder = changed(write(tmp_path, "qwen3_moe"), lambda t: t.pop(lost))
    refused(way, folder, f"it lacks {re.escape(lost)};")


@pytest.mark.parametrize("way", [by_headers, whole])
def test_surplus_tensors_are_told_and_left_out(
    way: Callable[[Path], Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = changed(write(tmp_path), lambda t: t.update({"mtp.proj.weight": torch.zeros(2, 2)}))
    with caplog.at_level(logging.WARNING):
        way(folder)
    assert "has 1 tensors that its model lacks; they are left out: mtp.proj.weight" in caplog.text


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("way", [by_headers, whole])
def test_a_reward_model_is_no_policy(way: Callable[[Path], Any], named: bool, tied: bool, tmp_path: Path) -> None:
    """By its config, and by its tensors where that has another class: with tied weights no language head is missing."""
    config = random_config("qwen2", num_labels=1, tie_word_embeddings=tied)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path)
    if not named:
        set_options(tmp_path, architectures=["Qwen2ForCausalLM"])
    refused(way, tmp_path, "is a reward model", "name the language model that it was made from")


def test_a_reward_model_begins_with_a_language_model_or_a_reward_model(tmp_path: Path) -> None:
    config = random_config("qwen2", num_labels=1)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path / "scores")
    for folder, missing in ((write(tmp_path / "text"), {"score.weight"}), (tmp_path / "scores", set())):
        by_headers(folder, reward_model=True)
        of_one = AutoConfig.from_pretrained(folder, num_labels=1)
        _, found = read_model(AutoModelForSequenceClassification, str(folder), reward_model=True, config=of_one)
        assert set(found) == missing


@pytest.mark.parametrize("way", [by_headers, whole])
@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"quant_method": "mxfp4"}, [r"quantised \(mxfp4\)", r"Mxfp4Config\(dequantize=True\)"]),
        ({"quant_method": "fp8"}, [r"quantised \(fp8\)", r"FineGrainedFP8Config\(dequantize=True\)"]),
        ({"quant_method": "awq", "bits": 4}, [r"quantised \(awq\)", "the one that it was made from"]),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, [r"quantised \(bitsandbytes\)"]),
    ],
)
def test_a_quantised_checkpoint_is_told_by_its_config(
    way: Callable[[Path], Any], options: dict[str, Any], expected: list[str], tmp_path: Path
) -> None:
    refused(way, set_options(write(tmp_path), quantization_config=options), *expected)


@pytest.mark.parametrize("way", [by_headers, whole])
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8, torch.uint8])
def test_a_quantised_checkpoint_is_told_by_its_tensors(
    way: Callable[[Path], Any], dtype: torch.dtype, tmp_path: Path
) -> None:
    folder = changed(write(tmp_path), lambda t: t.update({K_PROJ: t[K_PROJ].to(dtype)}))
    refused(way, folder, rf"is quantised .*{re.escape(K_PROJ)}", "can't be trained; take the model in bfloat16")


@pytest.mark.parametrize(
    ("file", "expected"),
    [
        ("pytorch_model.bin", "a pickle, which may run any code .*as safetensors: python -c .*save_pretrained"),
        ("pytorch_model.bin.index.json", "a pickle"),
        ("model-Q4_1.gguf", r"model-Q4_1.gguf, which is quantised: .*gguf_file=\"model-Q4_1.gguf\""),
    ],
)
def test_weights_in_another_format_are_refused_with_the_fix(file: str, expected: str, tmp_path: Path) -> None:
    (write(tmp_path) / "model.safetensors").unlink()
    (tmp_path / file).write_bytes(b"")
    with pytest.raises(ConfigError, match=f"has no weights: model.safetensors.*{expected}"):
        check_model_files(tmp_path)


def test_the_fix_of_a_pickle_makes_the_folder_loadable(tmp_path: Path) -> None:
    model: Any = random_model("qwen2", dtype=torch.float16, attention="eager")
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ConfigError) as told:
        check_model_files(tmp_path)
    code = str(told.value).partition('python -c "')[2].removesuffix('"')
    exec(compile(code, "fix", "exec"), {})
    got = whole(tmp_path).state_dict()
    assert all(torch.equal(got[name], value.float()) for name, value in model.state_dict().items())


@pytest.mark.parametrize("way", [by_headers, whole])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("tied", [False, True])
def test_half_precision_tied_heads_and_padded_vocabularies_load(
    way: Callable[[Path], Any], dtype: torch.dtype, tied: bool, tmp_path: Path
) -> None:
    model: Any = random_model(
        "qwen2", dtype=dtype, attention="eager", vocab_size=64, tie_word_embeddings=tied, seed=VOCAB
    )
    model.save_pretrained(tmp_path)
    loaded = way(tmp_path)
    if loaded is not None:
        assert all(torch.equal(a, b.float()) for a, b in zip(loaded.parameters(), model.parameters(), strict=True))


def _rank(rank: int, folder: str, store: str) -> None:
    dist.init_process_group("gloo", store=dist.FileStore(store, 2), rank=rank, world_size=2)
    with pytest.raises(ConfigError, match=[re.escape(K_PROJ), "first rank can't load"][rank]):
        load_hf(spec_of(Path(folder), 3), CPU, Alone(), trained=True)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_all_ranks_stop_where_the_first_finds_a_checkpoint_incomplete(tmp_path: Path) -> None:
    folder = changed(write(tmp_path), lambda t: t.pop(K_PROJ))
    torch.multiprocessing.spawn(_rank, (str(folder), str(tmp_path / "store")), nprocs=2)
