"""Values by the types of the schema: text where it has text, a number where it has a number.

Typed("1e-3")     an override, as typed      str -> "1e-3"     float -> 0.001     Any -> 0.001
FloatText(0.001)  unquoted in a file         str -> "1e-3"     float -> 0.001     Any -> 0.001
"1e-3"            quoted in a file           str -> "1e-3"     float -> refused   Any -> "1e-3"
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, Discriminator

from grpo_ray.config.yaml import WORDS, FloatText, IntText, Word, quoted_text, read_flow, read_scalar, shortened
from grpo_ray.errors import ConfigError


class Typed(str):
    """The text after `=` of an override."""

    __slots__ = ()


Problems = dict[str, str]
"""Dotted key -> the problem with its value."""


def with_types(schema: Any, value: Any, problems: Problems, key: str = "") -> Any:
    """The value, with every scalar converted to the type that this annotation, or model, has there.

    What fits nowhere stays as it is: validation reports it. `problems` collects what validation would accept but should not:
    quoted numbers, bools for numbers.
    """
    members = _members(schema, value)
    if isinstance(value, Typed):
        try:
            value = _from_text(members, value)
        except ConfigError as e:
            problems[key] = str(e)
            return value
        members = _members(schema, value)
    if isinstance(value, dict):
        return _dict(members, value, problems, key)
    if isinstance(value, list | tuple):
        return _list(members, value, problems, key)
    return _scalar(members, value, problems, key)


def _members(schema: Any, value: Any) -> list[Any]:
    """The members of a union that the value may have; for other annotations the annotation itself."""
    if get_origin(schema) is Annotated:
        inner, *metadata = get_args(schema)
        choose = next((m.discriminator for m in metadata if isinstance(m, Discriminator)), None)
        if callable(choose):
            return _tagged(inner, choose, value)
        return _members(inner, value)
    if get_origin(schema) in (Union, UnionType):
        return [member for part in get_args(schema) for member in _members(part, value)]
    return [schema]


def _tagged(union: Any, choose: Callable[[Any], Hashable], value: Any) -> list[Any]:
    if isinstance(value, Typed):
        value = read_flow(value) if value.lstrip()[:1] == "{" else None
    tag = choose(value)
    for part in get_args(union):
        member, *metadata = get_args(part)
        if any(getattr(m, "tag", None) == tag for m in metadata):
            return [member]
    return []


def _from_text(members: list[Any], text: Typed) -> Any:
    """The value of typed text. Raises ConfigError for text that begins like a list, a mapping or a quotation and is none."""
    bare = text.strip()
    if str in members:
        if bare in ("", "null") and NoneType in members:
            return None
        if (found := _collection(members, bare)) is not None:
            return found
        quoted = quoted_text(bare)
        return str(text) if quoted is None else quoted
    if bare[:1] in ("[", "{"):
        return read_flow(bare)
    quoted = quoted_text(bare)
    if quoted is not None:
        return quoted
    try:
        found = read_scalar(bare)
    except ValueError as e:
        raise ConfigError(f"{shortened(bare)} {e}") from None
    return str(text) if type(found) is str and Any in members else found


def _collection(members: list[Any], text: str) -> Any:
    """The typed list or mapping, if text or a collection is allowed. `{answer}`, a mapping without values, is text."""
    kinds = {get_origin(m) for m in members}
    if not ((text[:1] == "[" and kinds & {tuple, list}) or (text[:1] == "{" and dict in kinds)):
        return None
    try:
        found = read_flow(text)
    except ConfigError:
        return None
    return None if isinstance(found, dict) and None in found.values() else found


def _is_model(member: Any) -> bool:
    return isinstance(member, type) and issubclass(member, BaseModel)


def _dict(members: list[Any], value: dict[Any, Any], problems: Problems, key: str) -> dict[Any, Any]:
    prefix = f"{key}." if key else ""
    model = next((m for m in members if _is_model(m)), None)
    if model is not None:
        fields = model.model_fields
        return {
            name: with_types(_annotation(fields[name]) if name in fields else Any, v, problems, f"{prefix}{name}")
            for name, v in value.items()
        }
    of = next((get_args(m)[1] for m in members if get_origin(m) is dict), Any)
    return {name: with_types(of, v, problems, f"{prefix}{name}") for name, v in value.items()}


def _annotation(field: Any) -> Any:
    """The annotation of a field, with the metadata that pydantic has taken off it."""
    return Annotated[(field.annotation, *field.metadata)] if field.metadata else field.annotation


def _list(members: list[Any], value: Any, problems: Problems, key: str) -> list[Any]:
    args = next((get_args(m) for m in members if get_origin(m) in (tuple, list)), (Any, ...))
    same = len(args) == 1 or args[1] is ...
    of = [args[0]] * len(value) if same else [*args, *[Any] * len(value)]
    return [with_types(kind, v, problems, f"{key}.{i}") for i, (kind, v) in enumerate(zip(of, value, strict=False))]


def _scalar(members: list[Any], value: Any, problems: Problems, key: str) -> Any:
    kinds = {m for m in members if isinstance(m, type)}
    choices = {choice for member in members if get_origin(member) is Literal for choice in get_args(member)}
    if isinstance(value, str) and value in choices:
        return str(value)
    # Beside true and false, or numbers, a word that may be chosen makes no text of other values.
    kinds = kinds if kinds & {int, float, bool} else kinds | {type(choice) for choice in choices}
    number = bool(kinds & {int, float})
    if isinstance(value, IntText | FloatText):
        if str in kinds and not number:
            return value.text
        return int(value) if isinstance(value, IntText) else float(value)
    if isinstance(value, Word):
        return WORDS[value.lower()] if bool in kinds else str(value)
    if isinstance(value, bool) and bool not in kinds and Any not in members:
        if str in kinds:
            problems[key] = f"{value} is not text; write it in quotes, '{str(value).lower()}', if the text is meant"
        elif number:
            problems[key] = f"{value} is not a number"
    elif isinstance(value, str) and str not in kinds and Any not in members:
        if number and _is_number(value):
            digits = value.lstrip("+-")
            padded = len(digits) > 1 and digits[0] == "0" and digits.isdecimal()
            mend = "; take the leading 0 off" if padded else "; take the quotes off" * _is_quoted(value)
            problems[key] = f"{value!r} is text, and a number is meant{mend}"
        elif bool in kinds and not number:
            problems[key] = f"{value!r} is text, and true or false is meant" + "; take the quotes off" * _is_bool(value)
    return value


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _is_quoted(number: str) -> bool:
    """Whether a text was quoted, since it would be a number without quotes. (Others are one to Python alone: inf, 1e1_0.)"""
    try:
        return not isinstance(read_scalar(number), str)
    except ValueError:
        return True


def _is_bool(text: str) -> bool:
    return text.lower() in {"true", "false", *WORDS}
