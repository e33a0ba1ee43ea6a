"""The text model of a multimodal checkpoint: a causal language model made of the whole's own modules.

The whole class is loaded, so that every layout of tensors that Transformers knows is, and its language model and output layer are
put into the class of its `text_config`; its towers are let go. Names lead back: engines and exports have those of the whole.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from grpo_ray.errors import ConfigError, kind_and_line

_WHOLE = "grpo_whole"
_CLOSE = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""Nats by which the same modules, called by two classes, may differ."""
_NUM_TOKENS = 12


@dataclass(frozen=True)
class Whole:
    """The multimodal model that a text model was taken from."""

    cls: Any
    config: Any
    prefixes: tuple[tuple[str, str], ...]
    """The beginning of names in the text model, and in the whole."""

    def name(self, own: str) -> str:
        """The name in the whole of a parameter or buffer of the text model."""
        for mine, theirs in self.prefixes:
            if own.startswith(mine):
                return theirs + own.removeprefix(mine)
        raise ValueError(f"{own} is no part of {self.cls.__name__}")

    def own_name(self, theirs: str) -> str | None:
        """The name in the text model; None for a part that it lacks."""
        found = next(((mine, prefix) for mine, prefix in self.prefixes if theirs.startswith(prefix)), None)
        return None if found is None else found[0] + theirs.removeprefix(found[1])

    def empty(self) -> Any:
        """The whole without memory."""
        return empty_whole(self.cls, self.config)


def whole_of(hf: nn.Module) -> Whole | None:
    """What a model was taken from; None for one that is a whole checkpoint."""
    found: Whole | None = vars(hf).get(_WHOLE)
    return found


def name_in_whole(hf: nn.Module, name: str) -> str:
    """The name of a model's parameter or buffer in its checkpoint, as Transformers' class of that has it."""
    whole = whole_of(hf)
    return name if whole is None else whole.name(name)


def is_multimodal(config: Any) -> bool:
    """Whether a config is one of more than a language model."""
    return config.get_text_config() is not config


def whole_class(config: Any, path: str, *, reward_model: bool = False) -> Any:
    """Transformers' class of a multimodal checkpoint; None for one that is a language model.

    Raises:
        ConfigError: its text model can't be taken out; says why.
    """
    from transformers import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

    if not is_multimodal(config):
        return None
    if reward_model:
        raise _refused(config, path, "reward models are made of language models alone")
    found = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING.get(type(config), None)
    cls = found[0] if isinstance(found, tuple | list) else found
    named = list(config.architectures or ())
    if cls is None or (named and cls.__name__ not in named):
        made = f"of the class {', '.join(named)}" if named else "without a class of its own"
        raise _refused(config, path, f"it is {made}, and its text model is taken out of {_name(cls)} alone")
    try:
        _text_class(config.get_text_config())
    except ValueError as e:
        raise _refused(config, path, str(e)) from None
    return cls


def empty_whole(cls: Any, config: Any) -> Any:
    """A multimodal model without memory, made from its config."""
    from copy import deepcopy

    with torch.device("meta"):
        return cls(deepcopy(config))


def text_part(whole: Any, path: str, attention: str | None = None) -> Any:
    """The causal language model inside a multimodal model, of its modules, with its own attention or this one.

    Raises:
        ConfigError: it has none, or none that computes of a text what the whole does.
    """
    config = whole.config.get_text_config()
    try:
        with torch.device("meta"):
            hf = _text_class(config)(config)
        prefixes = _take(whole, hf)
        hf.__dict__[_WHOLE] = Whole(type(whole), whole.config, prefixes)
        if whole.device.type != "meta":
            _check_same(whole, hf)
    except ValueError as e:
        raise _refused(whole.config, path, str(e)) from None
    hf.generation_config = whole.generation_config
    hf.train(whole.training)
    if attention is not None:
        hf.set_attn_implementation(attention)
    return hf


def _take(whole: Any, hf: Any) -> tuple[tuple[str, str], ...]:
    """Put the modules of the whole into a text model; returns how their names begin in both."""
    names = _names(whole, hf)
    for mine, theirs in names.items():
        setattr(hf, mine, whole.get_submodule(theirs))
    own = {id(p) for p in whole.parameters()}
    lost = [name for name, param in hf.named_parameters() if id(param) not in own]
    if lost:
        raise ValueError(f"{type(whole).__name__} lacks {', '.join(lost[:3])}, of which its text model has {len(lost)}")
    return tuple((f"{mine}.", f"{theirs}.") for mine, theirs in names.items())


def _names(whole: Any, hf: Any) -> dict[str, str]:
    """The names of the text model's children -> those of the same modules in the whole."""
    inside = [name for name, module in whole.named_modules() if type(module) is type(hf)]
    if len(inside) == 1:
        return {name: f"{inside[0]}.{name}" for name, _ in hf.named_children()}
    head, own_head = whole.get_output_embeddings(), hf.get_output_embeddings()
    if hf.base_model is hf or not isinstance(head, nn.Linear):
        raise ValueError(f"{type(whole).__name__} has no language model with a linear output layer")
    own = next(name for name, module in hf.named_children() if module is own_head)
    return {hf.base_model_prefix: _body_name(whole, type(hf.base_model)), own: _name_of(whole, head)}


def _body_name(whole: nn.Module, body: type) -> str:
    found: list[str] = [name for name, module in whole.named_modules() if type(module) is body]
    if len(found) != 1:
        raise ValueError(
            f"{type(whole).__name__} has {len(found)} language models of the class {body.__name__}, not one"
        )
    return found[0]


def _name_of(whole: nn.Module, module: nn.Module) -> str:
    name: str = next(name for name, found in whole.named_modules() if found is module)
    return name


def _text_class(config: Any) -> Any:
    """Transformers' causal language model of a `text_config`, or else its body below an output layer."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING

    found = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if found is not None:
        return found
    body = MODEL_MAPPING.get(type(config), None)
    if body is None:
        raise ValueError(f"Transformers has no language model of its text_config (model_type {config.model_type!r})")
    return _with_head(body)


def _with_head(body: Any) -> Any:
    """A causal language model of a body that has no such class: an output layer above it, and nothing between."""
    from transformers import GenerationMixin, PreTrainedModel
    from transformers.modeling_outputs import CausalLMOutputWithPast

    base: Any = next(c for c in body.__mro__[1:] if issubclass(c, PreTrainedModel))

    class TextForCausalLM(base, GenerationMixin):
        config_class = body.config_class
        base_model_prefix = "model"

        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.model = body(config)
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
            self.post_init()

        def forward(self, input_ids: Tensor, **options: Any) -> Any:
            hidden = self.model(input_ids=input_ids, **options).last_hidden_state
            return CausalLMOutputWithPast(logits=self.lm_head(hidden))

    # Transformers looks into the module of a class for what that can do.
    TextForCausalLM.__module__ = body.__module__
    TextForCausalLM.__name__ = TextForCausalLM.__qualname__ = f"{body.__name__.removesuffix('Model')}ForCausalLM"
    return TextForCausalLM


@torch.no_grad()
def _check_same(whole: Any, hf: Any) -> None:
    """Raises ValueError where the whole computes something else of a text than the text model does."""
    ids = _tokens(whole.config).to(whole.device)
    training = whole.training
    for model in (whole, hf):
        model.eval()
    try:
        want, got = (model(input_ids=ids, use_cache=False).logits.float().log_softmax(-1) for model in (whole, hf))
    # A stranger's forward may fail in any way without an image.
    except Exception as e:
        raise ValueError(f"{type(whole).__name__} computes nothing of a text alone ({kind_and_line(e)})") from None
    finally:
        whole.train(training)
    nats = float((want - got).abs().max())
    if not nats <= _CLOSE.get(whole.dtype, 1e-4):
        raise ValueError(
            f"{type(whole).__name__} computes something else of a text than {type(hf).__name__}, with the same weights: "
            f"log-probabilities are off by {nats:.2g} nats"
        )


def _tokens(config: Any) -> Tensor:
    """[1, T] tokens that mean nothing special."""
    text = config.get_text_config()
    special = {i for part in (config, text) for name, i in vars(part).items() if "token" in name and isinstance(i, int)}
    usual = [i for i in range(min(text.vocab_size, 4096)) if i not in special]
    order = torch.randperm(len(usual), generator=torch.Generator().manual_seed(0))
    return torch.tensor([[usual[int(i)] for i in order[:_NUM_TOKENS]]])


def _refused(config: Any, path: str, why: str) -> ConfigError:
    text = config.get_text_config()
    parts = ", ".join(sorted(name for name in config.sub_configs if getattr(config, name, None)))
    return ConfigError(
        f"model.path {path}: {config.model_type} is more than a language model (its config has {parts or text.model_type}), "
        f"and its text model can't be trained: {why}; take a checkpoint of the text model alone (model_type {text.model_type!r})"
    )


def _name(cls: Any) -> str:
    return "a class that Transformers has for such models" if cls is None else cls.__name__
