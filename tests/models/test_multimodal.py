"""The text part of multimodal checkpoints: taken out, computed as in the whole, and written back into it."""

from __future__ import annotations

import json
import re
from copy import deepcopy
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
)

from actors.learner.build import _make, _read, load_hf
from actors.learner.shards import Skeleton
from actors.learner.state import gather
from grpo_ray.batch.pack import pack
from grpo_ray.batch.sequence import Alone
from grpo_ray.config.model import LoraConfig, ModelConfig
from grpo_ray.errors import ConfigError
from grpo_ray.models.lora import adapter_tensors, inject
from grpo_ray.models.multimodal import is_multimodal, text_part, whole_of
from grpo_ray.models.multimodal_export import write_whole
from grpo_ray.models.named_weights import named_weights
from grpo_ray.models.trainable import skeleton
from tests.models.multimodal import multimodal_config, multimodal_model, write_multimodal
from tests.models.table import MAX_NATS, as_a_learner_has_it, loop_logprobs, make_items
from tests.models.test_checkpoint_tensors import spec_of

CPU = torch.device("cpu")
FAMILIES = {
    "gemma3": "packed",
    "gemma4": "packed",
    "mistral3": "packed",
    "qwen2_5_vl": "packed",
    "qwen3_vl": "packed",
    "qwen3_vl_moe": "packed",
    "llama4": "plain",
    "qwen3_5": "plain",
}
"""model_type -> its way. Qwen's text models have no causal class of their own; Llama 4 has one inside the whole."""
MTP = "mtp.proj.weight"


def of_folder(folder: Path, *, plain: bool = False) -> Any:
    spec = spec_of(folder, 0)
    forward = "plain" if plain else "auto"
    return load_hf(
        replace(spec, learner=spec.learner.model_copy(update={"forward": forward})), CPU, Alone(), trained=True
    )


def checked(folder: Path, **options: Any) -> tuple[Any, str]:
    return skeleton(AutoConfig.from_pretrained(folder), ModelConfig(path=str(folder)), **options)


def changed(folder: Path, change: Any) -> Path:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, {"format": "pt"})
    return folder


def export(hf: Any, source: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Tensor]:
    monkeypatch.setattr("torch.distributed.get_rank", lambda: 0)
    whole = whole_of(hf)
    assert whole is not None
    write_whole(whole, gather(hf), str(source), folder, torch.float32)
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("as_on_hub", [True, False])
@pytest.mark.parametrize(("kind", "way"), FAMILIES.items())
def test_a_text_model_computes_what_the_whole_does(kind: str, way: str, as_on_hub: bool, tmp_path: Path) -> None:
    whole = write_multimodal(tmp_path, kind, as_on_hub=as_on_hub)
    _, reason = checked(tmp_path)
    assert ("plain" if reason else "packed") == way
    model = as_a_learner_has_it(of_folder(tmp_path, plain=bool(reason)), plain=bool(reason))
    items = make_items()
    with torch.no_grad():
        got_C, _ = model(pack(items, share_prompts=not model.plain, padded=model.plain), 1.0)
        assert (got_C - loop_logprobs(whole, items)).abs().max() < MAX_NATS


@pytest.mark.parametrize("kind", FAMILIES)
def test_what_is_trained_and_sent_are_the_text_models_weights_under_the_names_of_the_whole(
    kind: str, tmp_path: Path
) -> None:
    params = dict(write_multimodal(tmp_path, kind).named_parameters())
    hf = of_folder(tmp_path)
    sent = {weight.name: weight.value() for weight in named_weights(hf)}
    assert all(torch.equal(value, params[name]) for name, value in sent.items())
    towers = {name for name in params if "vision" in name or "visual" in name or "multi_modal_projector" in name}
    assert sent.keys() == params.keys() - towers
    assert len(list(hf.parameters())) == len(sent)


@pytest.mark.parametrize("as_on_hub", [True, False])
@pytest.mark.parametrize("kind", FAMILIES)
def test_an_untrained_export_is_its_source_bit_for_bit(
    kind: str, as_on_hub: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "source"
    write_multimodal(source, kind, as_on_hub=as_on_hub)
    # Tensors that the class does not know, of another dtype.
    changed(source, lambda t: t.update({MTP: torch.ones(2, 2, dtype=torch.bfloat16)}))
    got, want = (
        export(of_folder(source), source, tmp_path / "export", monkeypatch),
        load_file(source / "model.safetensors"),
    )
    assert got.keys() == want.keys()
    assert all(got[name].dtype == want[name].dtype and torch.equal(got[name], want[name]) for name in want)


@pytest.mark.parametrize("kind", ["gemma3", "qwen3_5", "llama4", "qwen3_vl_moe"])
def test_a_trained_export_is_loaded_whole(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, folder = tmp_path / "source", tmp_path / "export"
    before = dict(write_multimodal(source, kind).named_parameters())
    (source / "preprocessor_config.json").write_text("{}")
    hf = of_folder(source)
    with torch.no_grad():
        for param in hf.parameters():
            param.add_(1)
    export(hf, source, folder, monkeypatch)
    loaded, info = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
    assert not any(info[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    trained = {weight.name for weight in named_weights(hf)}
    for name, param in loaded.named_parameters():
        assert torch.equal(param, before[name] + 1 if name in trained else before[name]), name
    assert (folder / "preprocessor_config.json").read_text() == "{}"
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == [type(loaded).__name__]
    if type(loaded.config) in MODEL_FOR_CAUSAL_LM_MAPPING:
        text, items = AutoModelForCausalLM.from_pretrained(folder), make_items()
        with torch.no_grad():
            assert torch.equal(loop_logprobs(text.eval(), items), loop_logprobs(loaded.eval(), items))


def test_files_that_are_not_in_the_index_are_no_part_of_an_export(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Mistral's checkpoints have all weights a second time, in the layout of its own programs."""
    source = tmp_path / "source"
    whole = write_multimodal(source, "mistral3")
    want = load_file(source / "model.safetensors")
    (source / "model.safetensors").unlink()
    whole.save_pretrained(source, max_shard_size="300KB")
    assert len(list(source.glob("model-*.safetensors"))) > 1
    save_file({"layers.0.attention.wq.weight": torch.ones(2, 2)}, source / "consolidated.safetensors")
    assert export(of_folder(source), source, tmp_path / "export", monkeypatch).keys() == want.keys()


def test_an_export_without_the_files_of_its_source_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "source"
    write_multimodal(source, "gemma3")
    hf = of_folder(source)
    (source / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="source, whose other tensors belong to the export"):
        export(hf, source, tmp_path / "export", monkeypatch)


@pytest.mark.parametrize("kind", ["gemma3", "llama4"])
def test_a_text_model_is_sharded_as_others_are(kind: str, tmp_path: Path) -> None:
    write_multimodal(tmp_path, kind)
    spec, config = spec_of(tmp_path, 3), AutoConfig.from_pretrained(tmp_path)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        made = Skeleton(partial(_make, spec, config, None), partial(_read, spec, config, None), torch.float32)
    finally:
        dist.destroy_process_group()
    assert made.fits
    assert {w.name for w in named_weights(made.hf)} == {w.name for w in named_weights(of_folder(tmp_path))}


def test_adapters_are_named_as_in_the_whole(tmp_path: Path) -> None:
    write_multimodal(tmp_path, "gemma3")
    hf = of_folder(tmp_path)
    inject(hf, LoraConfig(r=2, target_modules=("q_proj",)))
    assert "base_model.model.model.language_model.layers.0.self_attn.q_proj.lora_A.weight" in adapter_tensors(hf)
    assert "model.language_model.layers.0.self_attn.q_proj.weight" in {weight.name for weight in named_weights(hf)}


@pytest.mark.parametrize("way", [checked, of_folder])
def test_an_unknown_layout_is_refused_by_the_names_of_its_tensors(way: Any, tmp_path: Path) -> None:
    write_multimodal(tmp_path, "gemma3")

    def rename(tensors: dict[str, Tensor]) -> None:
        for name in [n for n in tensors if n.startswith("language_model.")]:
            tensors[name.replace("language_model.", "llm.", 1)] = tensors.pop(name)

    changed(tmp_path, rename)
    with pytest.raises(
        ConfigError, match=r"lacks \d+ of the tensors .*model\.language_model\..*it has \d+ that .*llm\."
    ):
        way(tmp_path)


@pytest.mark.parametrize("way", [checked, of_folder])
def test_a_lost_tensor_of_the_text_model_is_named(way: Any, tmp_path: Path) -> None:
    write_multimodal(tmp_path, "mistral3")
    lost = "language_model.model.layers.1.self_attn.k_proj.weight"
    changed(tmp_path, lambda tensors: tensors.pop(lost))
    with pytest.raises(ConfigError, match=re.escape("model.language_model.layers.1.self_attn.k_proj.weight")):
        way(tmp_path)


def test_a_whole_that_computes_something_else_than_its_text_model_is_refused(tmp_path: Path) -> None:
    """Cohere's own text class scales its logits, and the whole does not."""
    write_multimodal(tmp_path, "cohere2_vision")
    with pytest.raises(
        ConfigError, match="Cohere2VisionForConditionalGeneration computes something else of a text than"
    ):
        of_folder(tmp_path)


def test_a_whole_that_needs_an_image_is_refused() -> None:
    class Blind(type(multimodal_model(multimodal_config("gemma3")))):  # type: ignore[misc]
        def forward(self, *_: Any, **__: Any) -> Any:
            raise ValueError("you must give an image")

    with pytest.raises(ConfigError, match=r"Blind computes nothing of a text alone .*you must give an image"):
        text_part(Blind(multimodal_config("gemma3")), "it")


@pytest.mark.parametrize(
    ("architecture", "options", "expected"),
    [
        (
            "LlavaGemmaForCausalLM",
            {},
            "it is of the class LlavaGemmaForCausalLM, and its text model is taken out of Gemma3For",
        ),
        ("Gemma3ForConditionalGeneration", {"reward_model": True}, "reward models are made of language models alone"),
    ],
)
def test_another_class_and_a_reward_model_are_refused(architecture: str, options: Any, expected: str) -> None:
    config = multimodal_config("gemma3")
    config.architectures = [architecture]
    with pytest.raises(ConfigError, match=f"more than a language model .*text_config, vision_config.*{expected}"):
        skeleton(config, ModelConfig(path="it"), **options)


def test_a_text_config_without_a_language_model_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"mllama.*has no language model of its text_config"):
        skeleton(multimodal_config("mllama"), ModelConfig(path="it"))


def test_a_language_model_is_no_multimodal_one(tiny_model: Path) -> None:
    config = AutoConfig.from_pretrained(tiny_model)
    assert not is_multimodal(config)
    assert is_multimodal(multimodal_config("gemma3"))
    assert whole_of(skeleton(deepcopy(config), ModelConfig(path=str(tiny_model)))[0]) is None
