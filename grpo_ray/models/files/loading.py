"""The model's location, and what is known of the model before it is loaded."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grpo_ray.config.model import ModelConfig
from grpo_ray.errors import ConfigError, kind_and_line, told
from grpo_ray.files import read_json
from grpo_ray.models.files.model_files import check_model_files
from grpo_ray.models.files.tiny import build_tiny_model

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def prepare_model(config: ModelConfig, run_dir: Path) -> str:
    """The folder or hub name that engine and learner load; creates the tiny model if the config has one.

    Raises:
        ConfigError: the folder does not exist or holds no model.
    """
    if config.tiny is not None:
        folder = run_dir / "model"
        if not (folder / "config.json").is_file():
            build_tiny_model(folder, config.tiny)
        return str(folder)
    return model_name(config)


def model_name(config: ModelConfig) -> str:
    """`model.path` in the form that is loaded: a folder as an absolute path. Raises ConfigError, see `prepare_model`."""
    assert config.path is not None
    check_model_path(config.path)
    path = Path(config.path)
    return str(path.resolve()) if path.is_dir() else config.path


def check_model_path(path: str) -> None:
    """Raises ConfigError for a folder that is missing or holds no complete model. Names on the hub are left to the download."""
    folder = Path(path)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ConfigError(f"model.path {path} is a folder without config.json, so no Hugging Face model")
        check_model_files(folder)
        return
    looks_local = path.startswith((".", "/", "~")) or path.count("/") != 1
    if folder.is_file() or (looks_local and "/" in path):
        raise ConfigError(
            f"model.path {path} does not exist; give a folder with a Hugging Face model, or a name on the hub"
        )


def known_context(config: ModelConfig) -> int | None:
    """The result of `context_length` if it is available without Transformers: for tiny models and for folders."""
    if config.tiny is not None:
        return config.tiny.context
    try:
        found = read_json(Path(config.path or "") / "config.json")
        text = found.get("text_config") or found
        length = text.get("max_position_embeddings")
    except (OSError, ValueError, AttributeError):
        return None
    return length if isinstance(length, int) else None


def load_config(path: str, *, trust_remote_code: bool) -> Any:
    """The model's config.json as Transformers reads it.

    Raises:
        ConfigError: there is no such folder, and the hub does not provide it.
    """
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    # Configs validate themselves, with errors of many kinds.
    except Exception as e:
        why = (
            "Transformers makes nothing of its config.json"
            if Path(path).is_dir()
            else ("it is no folder here, and the hub did not give it")
        )
        raise ConfigError(f"model.path {path} can't be loaded: {why} ({told(e)})") from None


def load_tokenizer(path: str, *, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    # The reader of tokenizer.json raises plain Exception, the library AttributeError and others if files are missing.
    except Exception as e:
        raise ConfigError(
            f"model.path {path} has no tokenizer that can be loaded ({kind_and_line(e)}); copy the tokenizer's files "
            "(tokenizer.json, tokenizer_config.json) into its folder"
        ) from None


def eos_ids(path: str, tokenizer: Any, *, trust_remote_code: bool) -> list[int]:
    """The tokens that end a sample of this model whatever the run's options are, as vLLM reads them: the tokenizer's, and those of
    generation_config.json (Llama 3 has three); without such a file, those of config.json."""
    from transformers import GenerationConfig

    try:
        named = GenerationConfig.from_pretrained(path).eos_token_id
    except OSError:
        config = load_config(path, trust_remote_code=trust_remote_code)
        named = GenerationConfig.from_model_config(config).eos_token_id
    several = named if isinstance(named, list) else [named]
    return [int(i) for i in dict.fromkeys([tokenizer.eos_token_id, *several]) if i is not None]


def vocab_size(model_config: Any) -> int:
    """The number of rows of the output layer, sometimes more than the tokenizer has tokens.

    Raises:
        ConfigError: the config does not say.
    """
    return _number(model_config, ("vocab_size",), "its vocabulary")


def check_ids(prompts: Iterable[Sequence[int]], model: str, size: int) -> None:
    """Raises ConfigError for a prompt's token id that the model, with `size` embeddings, has no embedding for."""
    largest = max((max(ids) for ids in prompts if ids), default=0)
    if largest >= size:
        raise ConfigError(
            f"model.path {model}: its tokenizer makes a token {largest} of a prompt, more than the {size} that the model has "
            "(vocab_size in its config.json); the tokenizer is another model's, or it was given tokens and the model was not"
        )


def context_length(model_config: Any) -> int:
    """The number of tokens that the model was made for.

    Raises:
        ConfigError: the config does not say.
    """
    return _number(model_config, _CONTEXT, "its context")


_CONTEXT = ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length", "seq_length", "n_ctx")
"""The names of this option in configs; the first one present counts."""


def _number(model_config: Any, names: tuple[str, ...], what: str) -> int:
    text = getattr(model_config, "text_config", None) or model_config
    found = next((value for name in names if isinstance(value := getattr(text, name, None), int)), None)
    if found is None:
        raise ConfigError(
            f"config.json of the model (model_type {getattr(text, 'model_type', '?')!r}) does not say how large {what} is: "
            f"no {' or '.join(names[:2])}"
        )
    return found
