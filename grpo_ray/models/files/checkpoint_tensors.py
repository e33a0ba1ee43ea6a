"""Checks that a checkpoint's tensors are those of the model that its config.json describes: all there, of its shapes, and numbers
that can be trained."""

from __future__ import annotations

import logging
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from grpo_ray.errors import ConfigError, first_line
from grpo_ray.files import read_json
from grpo_ray.models.files.model_files import WEIGHTS

log = logging.getLogger(__name__)

_SCORING = ("ForSequenceClassification", "ForTokenClassification", "RewardModel")
_SCORES = ("score.", "v_head.", "value_head.", "classifier.")
"""The beginnings of the names of output layers of reward models and critics."""
_UNPACKED = {
    "mxfp4": 'quantization_config=transformers.Mxfp4Config(dequantize=True), dtype="bfloat16"',
    "fp8": 'quantization_config=transformers.FineGrainedFP8Config(dequantize=True), dtype="bfloat16"',
}
"""What Transformers reads the weights of such a checkpoint with, as usual numbers."""
_PACKED = {"U8", "I8", "I16", "U16", "I32", "U32", "F4", "F8_E4M3", "F8_E5M2", "F8_E8M0"}
_SHOWN = 5


def check_trainable(config: Any, path: str, *, reward_model: bool) -> None:
    """Check by its config and the headers of its files that a checkpoint is a language model, in numbers that can be trained.

    Raises:
        ConfigError: it is quantised, or a reward model where a policy is to be trained; says what to do.
    """
    for part in (config, config.get_text_config()):
        quantised = getattr(part, "quantization_config", None)
        if quantised:
            options = quantised if isinstance(quantised, Mapping) else quantised.to_dict()
            raise _quantised(path, str(options.get("quant_method", "quantised")))
    scoring = next((a for a in config.architectures or () if a.endswith(_SCORING)), None)
    if scoring and not reward_model:
        raise _scores(path, scoring)
    _check_numbers(path)


def check_loaded(info: Mapping[str, Any], path: str, *, reward_model: bool) -> None:
    """Check what Transformers says of a model that it has loaded. Surplus tensors are logged.

    Args:
        info: its `output_loading_info`, of a load with `ignore_mismatched_sizes`.

    Raises:
        ConfigError: tensors are missing, or of another shape; names them.
    """
    missing = set(info["missing_keys"]) - ({"score.weight"} if reward_model else set())
    surplus = sorted(info["unexpected_keys"])
    if not reward_model and any(name.startswith(_SCORES) for name in surplus):
        raise _scores(path, f"it has {_some(name for name in surplus if name.startswith(_SCORES))}")
    if missing:
        raise ConfigError(
            f"model.path {path} lacks {len(missing)} of the tensors of its model, which would be random: {_some(missing)}; "
            f"{_MEND}{_also(surplus)}"
        )
    if info["mismatched_keys"]:
        odd = (f"{name} is {list(got)}, not {list(want)}" for name, got, want in info["mismatched_keys"])
        raise ConfigError(
            f"model.path {path} has tensors of other shapes than its config.json says: {_some(odd)}; {_MEND}"
        )
    # A reward model begins as a language model, whose output layer it does not need.
    surplus = [name for name in surplus if not reward_model or not name.startswith("lm_head.")]
    if surplus:
        log.warning(
            "model.path %s has %d tensors that its model lacks; they are left out: %s",
            path,
            len(surplus),
            _some(surplus),
        )


_MEND = "download the model again, or mend its config.json, which may be another model's"


def read_model(cls: Any, path: str, *, reward_model: bool, **options: Any) -> Any:
    """The model of a folder or hub name, all of whose weights are the checkpoint's.

    Args:
        cls: a class of Transformers, or one of its auto classes.
        reward_model: whether it is to become one: then its output layer may be missing.
        options: the further ones of `from_pretrained`.

    Returns:
        The model and the names of the tensors that are missing: those of a reward model's output layer.

    Raises:
        ConfigError: see `check_loaded`.
    """
    options |= {"output_loading_info": True, "ignore_mismatched_sizes": True, "use_safetensors": True}
    with _converted(path):
        hf, info = cls.from_pretrained(path, **options)
    check_loaded(info, path, reward_model=reward_model)
    return hf, info["missing_keys"]


def check_headers(cls: Any, config: Any, path: str, *, reward_model: bool) -> None:
    """Check a checkpoint's tensors by the headers of its files, if they are on this machine: no weight is read.

    Args:
        cls: Transformers' class of the checkpoint.

    Raises:
        ConfigError: see `check_loaded`.
    """
    import torch

    files = weight_files(path)
    if not files:
        return
    tensors = {
        name: torch.empty(shape, dtype=torch.float32, device="meta")
        for file in files
        for name, shape, _ in headers(file)
    }
    with _converted(path), _quiet():
        _, info = cls.from_pretrained(
            None,
            config=config,
            state_dict=tensors,
            device_map="meta",
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    check_loaded(info, path, reward_model=reward_model)


def weight_files(path: str) -> list[Path]:
    """The safetensors files of a folder, or those of a model of the hub that have been downloaded."""
    if Path(path).is_dir():
        return _files_in(Path(path))
    from huggingface_hub import try_to_load_from_cache

    try:
        found = try_to_load_from_cache(path, "config.json")
    except ValueError:  # no name of the hub
        return []
    return _files_in(Path(found).parent) if isinstance(found, str) else []


def _files_in(folder: Path) -> list[Path]:
    """The files that Transformers reads: others may hold the same weights under names of their own."""
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    try:
        named = set(read_json(folder / f"{WEIGHTS}.index.json")["weight_map"].values())
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        named = set()
    files = sorted(folder.glob("*.safetensors"))
    return [file for file in files if file.name in named] or files


def headers(file: Path) -> Iterator[tuple[str, list[int], str]]:
    """The name, shape and dtype of each tensor of a safetensors file. Raises SafetensorError for an incomplete file."""
    with safe_open(file, framework="numpy") as tensors:
        for name in tensors.keys():  # noqa: SIM118
            part = tensors.get_slice(name)
            yield name, part.get_shape(), part.get_dtype()


def _check_numbers(path: str) -> None:
    """Raises ConfigError for files with matrices of integers or of eight bits and less, whatever the config says."""
    try:
        packed = {
            name: kind
            for file in weight_files(path)
            for name, shape, kind in headers(file)
            # Masks of old models are matrices too.
            if kind in _PACKED and len(shape) > 1 and not name.endswith(("attn.bias", "masked_bias"))
        }
    except (OSError, SafetensorError) as e:
        raise ConfigError(f"model.path {path} has no whole safetensors files ({e}); download it again") from None
    if packed:
        raise _quantised(path, f"{'/'.join(sorted(set(packed.values())))}: {_some(packed)}")


@contextmanager
def _converted(path: str) -> Iterator[None]:
    """A context in which Transformers may fail to make the model's tensors from the checkpoint's."""
    try:
        yield
    except RuntimeError as e:
        names = [name for file in weight_files(path) for name, _, _ in headers(file)]
        lost = _gaps(names)
        why = f"it lacks {_some(lost)}" if lost else first_line(e)
        raise ConfigError(f"model.path {path}: its tensors do not make the model's: {why}; {_MEND}") from None


def _gaps(names: Iterable[str]) -> list[str]:
    """The tensors of experts that are missing: each expert of a layer has the same."""
    found: dict[tuple[str, ...], set[tuple[str, ...]]] = defaultdict(set)
    for name in names:
        pieces = re.split(r"(?<=\.)\d+(?=\.)", name)
        if len(pieces) > 1 and "expert" in pieces[-2]:
            found[tuple(pieces)].add(tuple(re.findall(r"(?<=\.)\d+(?=\.)", name)))
    lost = []
    for texts, numbers in found.items():
        everyone = {n for other, ns in found.items() if other[:-1] == texts[:-1] for n in ns}
        lost += ["".join(a + b for a, b in zip(texts, (*n, ""), strict=True)) for n in everyone - numbers]
    return sorted(lost)


@contextmanager
def _quiet() -> Iterator[None]:
    """A context in which Transformers reports no loading: nothing is loaded."""
    from transformers.utils import logging as theirs

    level, bars = theirs.get_verbosity(), theirs.is_progress_bar_enabled()
    theirs.set_verbosity_error()
    theirs.disable_progress_bar()
    try:
        yield
    finally:
        theirs.set_verbosity(level)
        if bars:
            theirs.enable_progress_bar()


def _quantised(path: str, how: str) -> ConfigError:
    read = _UNPACKED.get(how)
    mend = (
        f'or make it so: transformers.AutoModelForCausalLM.from_pretrained("{path}", {read}), without quantization_config in its '
        "config, then save_pretrained"
        if read
        else "the one that it was made from"
    )
    return ConfigError(
        f"model.path {path} is quantised ({how}), and such weights can't be trained; take the model in bfloat16, {mend}"
    )


def _scores(path: str, what: str) -> ConfigError:
    return ConfigError(
        f"model.path {path} is a reward model ({what}), not a language model, whose output layer would be random; it can be a "
        "reward (`reward_model`); here name the language model that it was made from"
    )


def _also(surplus: list[str]) -> str:
    return f" (it has {len(surplus)} that the model lacks: {_some(surplus)})" if surplus else ""


def _some(names: Iterable[str]) -> str:
    shown = sorted(names)
    return ", ".join(shown[:_SHOWN]) + f", .. ({len(shown)})" * (len(shown) > _SHOWN)
