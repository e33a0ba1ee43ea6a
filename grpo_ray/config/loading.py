"""Conversion from YAML and `key=value` to a config, and back; errors name the key that was probably meant."""

from __future__ import annotations

from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from grpo_ray.config.aliases import called_here, suggestion
from grpo_ray.config.base import Strict
from grpo_ray.config.common import keys_in_order
from grpo_ray.config.typed import Problems, Typed, with_types
from grpo_ray.config.yaml import MAX_DEPTH, dump_yaml, load_yaml, read_flow
from grpo_ray.errors import ConfigError
from grpo_ray.secrets import hide_secrets, secrets_in

__all__ = ["all_keys", "build", "deep_merge", "load_yaml", "parse_overrides", "to_yaml"]

C = TypeVar("C", bound=Strict)
_CLOSING = {"[": "]", "{": "}"}


def parse_overrides(items: list[str]) -> dict[str, Any]:
    """A nested dict of the overrides `["learner.zero_stage=3", "data.system=Answer after ####."]`, with values as typed: `Typed`.

    The schema decides what a value means. Text is taken as it is, including ` #`; if it is quoted as a whole, in YAML's or JSON's
    way, the quotes are removed. `null`, or nothing, is None if an option may be None. Numbers, bools, `[a, b]` and `{key: value}`
    are as in a file, without comments. A mapping is merged over the recipe's; `{}` empties it. Of a repeated key the last counts.

    Raises:
        ConfigError: an item is no override, or would undo another.
    """
    out: dict[str, Any] = {}
    given: dict[str, str] = {}
    for item in items:
        key, eq, value = item.partition("=")
        key = key.strip()
        if not eq or not all(key.split(".")):
            raise ConfigError(f"override {item!r} is not of the form key=value, e.g. learner.zero_stage=3")
        if key.count(".") > MAX_DEPTH:
            raise ConfigError(f"override {key[:40]!r}..: there are no sections more than {MAX_DEPTH} deep")
        if any("\ud800" <= c <= "\udfff" for c in item):
            raise ConfigError(f"override {item!r} is not UTF-8 text")
        opening = value.strip()[:1]
        if opening in _CLOSING and _CLOSING[opening] not in value:
            raise ConfigError(
                f"override {item!r}: a {opening!r} is never closed; if it is text, put it in quotes: {key}='\"{value}\"'"
            )
        if key.rpartition(".")[2] == "algorithm" and opening != "{":
            key += ".preset"
        inside = next((v for k, v in given.items() if k.startswith(f"{key}.")), None)
        if inside is not None:
            raise ConfigError(
                f"override {item!r} would undo {inside!r}, which was given before it; leave one of them out"
            )
        given[key] = item
        _put(out, key.split("."), Typed(value), item)
    return out


def _put(node: dict[str, Any], path: list[str], value: Typed, item: str) -> None:
    *parents, last = path
    for part in parents:
        below = node.setdefault(part, {})
        if isinstance(below, Typed):
            below = node[part] = _opened(below)
        if not isinstance(below, dict):
            raise ConfigError(f"override {item!r}: {part!r} was already given a plain value")
        node = below
    node[last] = value


def _opened(value: Any) -> Any:
    """A typed mapping as a dict; everything else unchanged."""
    if not isinstance(value, Typed) or value.strip()[:1] != "{":
        return value
    try:
        found = read_flow(value.strip())
    except ConfigError:
        return value
    return found if isinstance(found, dict) else value


def deep_merge(base: dict[str, Any], top: dict[str, Any]) -> dict[str, Any]:
    """`top` merged over `base`: dicts merge, everything else is replaced. A section for which `top` names a preset is replaced too:
    what `base` says there belongs to another algorithm. An empty dict inside `top` empties what `base` has there."""
    out = dict(base)
    for key, value in top.items():
        old = out.get(key)
        if key == "algorithm" and isinstance(old, str):
            old = {"preset": old}
        if isinstance(old, dict):
            value = _opened(value)
            if isinstance(value, dict) and value and "preset" not in value:
                value = deep_merge(old, value)
        out[key] = value
    return out


def build(schema: type[C], data: dict[str, Any], source: str, *, keep_home: bool = False) -> C:
    """The validated config; every problem becomes one line that names the key.

    Args:
        keep_home: `~` in paths is kept as it is, for another machine.

    Raises:
        ConfigError: the config is invalid; lists all problems, with "did you mean" for unknown keys.
    """
    check_secrets(data, source)
    problems: Problems = {}
    data = with_types(schema, data, problems)
    check_secrets(data, source)
    lines = [f"{key}: {problem}" for key, problem in problems.items()]
    try:
        config = schema.model_validate(data, context={"keep_home": keep_home})
    except ValidationError as e:
        lines += [line for err in e.errors() if _key_of(err) not in problems for line in _explain(schema, err)]
    if lines:
        raise ConfigError(f"{hide_secrets(source)} can't be used:\n" + "\n".join(f"  - {line}" for line in lines))
    return config


def check_secrets(data: Any, source: str) -> None:
    """Raises ConfigError for a key or a token in a recipe or in overrides, without revealing it."""
    if found := list(dict.fromkeys(secrets_in(data))):
        raise ConfigError(
            f"{hide_secrets(source)} holds what looks like a secret ({', '.join(found)}), and a recipe is written to "
            "config.yaml, shown by trackers and in reports. Take it out: set it in the environment (of Ray's nodes, for a "
            "cluster), name it in the env of the worker that needs it, e.g. reward.env: {MY_API_KEY: '${MY_API_KEY}'}, and read "
            "it there; stores and hubs find their keys in the environment, too (AWS_ACCESS_KEY_ID, HF_TOKEN)"
        )


def _key_of(err: Any) -> str:
    return ".".join(str(p) for p in err["loc"] if not str(p).startswith("<"))


def _explain(schema: type[BaseModel], err: Any) -> list[str]:
    loc = [str(p) for p in err["loc"] if not str(p).startswith("<")]
    key = ".".join(loc)
    if err["type"] == "extra_forbidden":
        known, siblings = all_keys(schema), _fields_at(schema, loc[:-1])
        inside = [leaf for leaf in _leaves(err["input"], f"{key}.") if called_here(leaf, known)]
        unknown = [key] if called_here(key, known) or not inside else inside
        # A section is never suggested for an option of similar spelling.
        places = siblings if isinstance(err["input"], dict) and unknown == [key] else known
        return [f"{k}: unknown key; {called_here(k, known) or suggestion(k, places, siblings)}" for k in unknown]
    if err["type"] == "missing":
        return [f"{key}: required"]
    message = _SHAPES.get(err["type"]) or err["msg"].removeprefix("Value error, ")
    if err["type"] == "model_type":
        message = f"a mapping is meant, {{{_fields_at(schema, loc)[0]}: ..}}"
    return [f"{key}: {message} (got {err['input']!r:.200})" if loc and err["type"] != "value_error" else message]


def _leaves(value: Any, prefix: str) -> list[str]:
    """The dotted keys of everything in a section."""
    if not isinstance(value, dict):
        return [prefix[:-1]]
    return [leaf for name, inner in value.items() for leaf in _leaves(inner, f"{prefix}{name}.")]


_SHAPES = {"tuple_type": "a list is meant, [..]", "dict_type": "a mapping is meant, {..}"}
"""Error type of pydantic -> what is expected there, without Python's words."""


def _fields_at(schema: type[BaseModel], loc: list[str]) -> list[str]:
    node: Any = schema
    for part in loc:
        field = getattr(node, "model_fields", {}).get(part)
        if field is None:
            continue
        node = _model_of(field.annotation) or node
    return keys_in_order(node)


def _model_of(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for arg in getattr(annotation, "__args__", ()):
        found = _model_of(arg)
        if found is not None:
            return found
    return None


def all_keys(schema: type[BaseModel], prefix: str = "") -> list[str]:
    """Every dotted key of the schema."""
    out = []
    for name in keys_in_order(schema):
        out.append(prefix + name)
        model = _model_of(schema.model_fields[name].annotation)
        if model is not None:
            out += all_keys(model, f"{prefix}{name}.")
    return out


def to_yaml(config: Strict) -> str:
    values = config.model_dump(mode="json")
    return dump_yaml({name: values[name] for name in keys_in_order(type(config))})
