"""Where the model comes from, and what can be known of it before it is loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grpo_ray.config import ModelConfig
from grpo_ray.errors import ConfigError
from grpo_ray.tiny import build_tiny_model

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def prepare_model(config: ModelConfig, run_dir: Path) -> str:
    """The folder or hub name that engine and learner load; makes the tiny model when that is asked for.

    Raises:
        ConfigError: the folder does not exist or holds no model.
    """
    if config.tiny is not None:
        folder = run_dir / "model"
        if not (folder / "config.json").is_file():
            build_tiny_model(folder, config.tiny)
        return str(folder)
    assert config.path is not None
    check_model_path(config.path)
    path = Path(config.path)
    return str(path.resolve()) if path.is_dir() else config.path


def check_model_path(path: str) -> None:
    """Raises ConfigError for a folder that is not there or holds no model. Names on the hub are left to the download."""
    folder = Path(path)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ConfigError(f"model.path {path} is a folder without config.json, so no Hugging Face model")
        return
    looks_local = path.startswith((".", "/", "~")) or path.count("/") != 1
    if folder.is_file() or (looks_local and "/" in path):
        raise ConfigError(
            f"model.path {path} does not exist; give a folder with a Hugging Face model, or a name on the hub"
        )


def known_context(config: ModelConfig) -> int | None:
    """What `context_length` says, where it can be told without Transformers: of tiny models and of folders."""
    if config.tiny is not None:
        return config.tiny.context
    try:
        found = json.loads((Path(config.path or "") / "config.json").read_bytes())
        text = found.get("text_config") or found
        length = text.get("max_position_embeddings")
    except (OSError, ValueError, AttributeError):
        return None
    return length if isinstance(length, int) else None


def load_config(path: str, *, trust_remote_code: bool) -> Any:
    """The model's config.json as Transformers reads it.

    Raises:
        ConfigError: neither a folder nor to be had from the hub.
    """
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as e:
        raise ConfigError(
            f"model.path {path} can't be loaded: it is no folder here, and the hub did not give it "
            f"({str(e).strip().splitlines()[0]})"
        ) from None


def load_tokenizer(path: str, *, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as e:
        raise ConfigError(
            f"model.path {path} has no tokenizer that can be loaded ({str(e).strip().splitlines()[0]})"
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
    """Rows of the output layer, at times more than the tokenizer has tokens."""
    text = getattr(model_config, "text_config", None) or model_config
    return int(text.vocab_size)


def context_length(model_config: Any) -> int:
    """Tokens that the model was made for."""
    text = getattr(model_config, "text_config", None) or model_config
    return int(text.max_position_embeddings)
