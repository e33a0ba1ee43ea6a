"""From YAML and `key=value` to a config, and back; what is wrong is told with the key that was meant."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from grpo_ray.config_base import Strict
from grpo_ray.errors import ConfigError

C = TypeVar("C", bound=Strict)


def parse_overrides(items: list[str]) -> dict[str, Any]:
    """`["learner.zero_stage=3", "reward.functions=[{name: accuracy}]"]` -> a nested dict. Values are YAML."""
    out: dict[str, Any] = {}
    for item in items:
        key, eq, value = item.partition("=")
        if not eq or not key.strip():
            raise ConfigError(f"override {item!r} is not of the form key=value, e.g. learner.zero_stage=3")
        try:
            parsed = yaml.safe_load(value) if value else None
        except yaml.YAMLError as e:
            raise ConfigError(f"override {item!r}: the value is not YAML ({str(e).splitlines()[0]})") from None
        if isinstance(parsed, str):
            parsed = _number(parsed)
        if key.strip() == "algorithm" and isinstance(parsed, str):
            key = "algorithm.preset"
        node = out
        *parents, last = key.strip().split(".")
        for part in parents:
            node = node.setdefault(part, {})
            if not isinstance(node, dict):
                raise ConfigError(f"override {item!r}: {part!r} was already given a plain value")
        node[last] = parsed
    return out


def _number(text: str) -> str | float:
    """YAML 1.1 reads `1e-6` as a string; people mean the number."""
    try:
        return float(text) if "e" in text.lower() else text
    except ValueError:
        return text


def deep_merge(base: dict[str, Any], top: dict[str, Any]) -> dict[str, Any]:
    """`top` over `base`; dicts merge, everything else is replaced. So is a section for which `top` names a preset: what
    `base` says there belongs to another algorithm.
    """
    out = dict(base)
    for key, value in top.items():
        old = out.get(key)
        if key == "algorithm" and isinstance(old, str):
            old = {"preset": old}
        if isinstance(old, dict) and isinstance(value, dict) and "preset" not in value:
            value = deep_merge(old, value)
        out[key] = value
    return out


def load_yaml(path: Path) -> dict[str, Any]:
    try:
        data = yaml.safe_load(path.read_text())
    except yaml.YAMLError as e:
        raise ConfigError(f"{path}: not valid YAML: {e}") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: expected a mapping at the top, got {type(data).__name__}")
    return _numbers(data)


def _numbers(node: Any) -> Any:
    if isinstance(node, dict):
        return {k: _numbers(v) for k, v in node.items()}
    if isinstance(node, list):
        return [_numbers(v) for v in node]
    return _number(node) if isinstance(node, str) else node


def build(schema: type[C], data: dict[str, Any], source: str) -> C:
    """Validate; every problem becomes one line that names the key.

    Raises:
        ConfigError: with all problems, and "did you mean" for unknown keys.
    """
    try:
        return schema.model_validate(data)
    except ValidationError as e:
        lines = [_explain(schema, err) for err in e.errors()]
        raise ConfigError(f"{source} can't be used:\n" + "\n".join(f"  - {line}" for line in lines)) from None


def _explain(schema: type[BaseModel], err: Any) -> str:
    loc = [str(p) for p in err["loc"] if not str(p).startswith("<")]
    key = ".".join(loc)
    if err["type"] == "extra_forbidden":
        known = _fields_at(schema, loc[:-1])
        close = difflib.get_close_matches(loc[-1], known, n=1, cutoff=0.5)
        everywhere = [p for p in all_keys(schema) if p.rsplit(".", 1)[-1] == loc[-1]]
        guess = everywhere[0] if everywhere else ".".join([*loc[:-1], close[0]]) if close else None
        hint = f"did you mean {guess}?" if guess else ""
        return f"{key}: unknown key; {hint or 'known here: ' + ', '.join(known)}"
    if err["type"] == "missing":
        return f"{key}: required"
    message = err["msg"].removeprefix("Value error, ")
    return f"{key}: {message} (got {err['input']!r})" if loc and err["type"] != "value_error" else message


def _fields_at(schema: type[BaseModel], loc: list[str]) -> list[str]:
    node: Any = schema
    for part in loc:
        field = getattr(node, "model_fields", {}).get(part)
        if field is None:
            continue
        node = _model_of(field.annotation) or node
    return list(node.model_fields)


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
    for name, field in schema.model_fields.items():
        out.append(prefix + name)
        model = _model_of(field.annotation)
        if model is not None:
            out += all_keys(model, f"{prefix}{name}.")
    return out


def to_yaml(config: Strict) -> str:
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
