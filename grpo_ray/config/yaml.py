"""YAML as authors of recipes read it: scalars by YAML 1.2's rules, no duplicate key, nothing that grows without bound.

Unlike in YAML 1.1, which PyYAML implements, `1e-6` is a number; `no`, `on` and `yes` are text (and mean what they say if the
schema has a bool); `012`, `12:30` and `2024-01-02` are text. `1_000` stays a number. Quoted text is always text, and keys are text.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
from pathlib import Path
from typing import Any

import yaml
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from grpo_ray.errors import ConfigError, first_line

MAX_BYTES = 1 << 18
"""The largest file that is read: PyYAML takes ten seconds per MB, and recipes have a few KB."""
MAX_NODES = 10_000
"""The largest number of nodes of a document, each alias counted as what it stands for."""
MAX_DEPTH = 100
MAX_DIGITS = 400

_INT = re.compile(r"[-+]?(0|[1-9][0-9]*(_[0-9]+)*)")
_BASED = re.compile(r"0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(
    r"[-+]?(\.[0-9]+|(0|[1-9][0-9]*(_[0-9]+)*)\.[0-9]*|(0|[1-9][0-9]*)(?=[eE]))([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"
)
_INF_NAN = re.compile(r"\.(inf|nan)", re.IGNORECASE)
_NULLS = ("", "~", "null", "Null", "NULL")
_TRUE, _FALSE = ("true", "True", "TRUE"), ("false", "False", "FALSE")
WORDS = {"yes": True, "on": True, "y": True, "no": False, "off": False, "n": False}
"""The words that YAML 1.1 and the schema read as a bool, besides true and false, in lower case."""


class IntText(int):
    """An integer of a file that remembers its spelling."""

    text: str


class FloatText(float):
    """A float of a file that remembers its spelling: `1e-3` for an environment variable is the text 1e-3."""

    text: str


class Word(str):
    """Unquoted text that is one of WORDS: a bool where the schema has one."""

    __slots__ = ()


def read_scalar(text: str) -> Any:
    """Unquoted text as None, a bool, IntText, FloatText, Word or str. Raises ValueError for a number beyond all bounds."""
    if text in _NULLS:
        return None
    if text in _TRUE or text in _FALSE:
        return text in _TRUE
    if text.lower() in WORDS:
        return Word(text)
    if _INT.fullmatch(text) or _BASED.fullmatch(text):
        if len(text) > MAX_DIGITS:
            raise ValueError("has too many digits for a number")
        whole = IntText(text, 0) if _BASED.fullmatch(text) else IntText(text)
        whole.text = text
        return whole
    if _FLOAT.fullmatch(text):
        number = FloatText(_INF_NAN.sub(r"\1", text.replace("_", "")))
        number.text = text
        if math.isinf(number) and not _INF_NAN.search(text):
            raise ValueError("is beyond what a float can hold")
        return number
    return text


_CUT = re.compile(r"[ \t]+#[^\s!]")
"""A `#` after white space that continues a text: `system: Put the answer after #### on the last line`, `system: #1 rule`. A comment
has a space after it."""
_UNWRITTEN = "?"
"""The tag of a node that is written without one."""
_TAGS = "tag:yaml.org,2002:"


class _Loader(yaml.SafeLoader):
    """Composes nodes; `_Reader` interprets them."""

    num_nodes = 0

    def resolve(self, _kind: Any, _value: Any, _implicit: Any) -> str:
        return _UNWRITTEN

    def compose_node(self, parent: Node | None, index: Any) -> Node | None:
        self.num_nodes += 1
        if self.num_nodes > MAX_NODES:
            raise yaml.MarkedYAMLError(problem=f"more than {MAX_NODES:,} values", problem_mark=self.get_mark())
        return super().compose_node(parent, index)

    def fetch_flow_collection_start(self, token: Any) -> None:
        if self.flow_level > MAX_DEPTH:
            raise yaml.MarkedYAMLError(
                problem=f"more than {MAX_DEPTH} brackets inside each other", problem_mark=self.get_mark()
            )
        super().fetch_flow_collection_start(token)

    def add_indent(self, column: int) -> bool:
        if len(self.indents) > MAX_DEPTH:
            raise yaml.MarkedYAMLError(
                problem=f"more than {MAX_DEPTH} lists and mappings inside each other", problem_mark=self.get_mark()
            )
        return bool(super().add_indent(column))


class _FlowLoader(_Loader):
    """The loader of overrides, in which ` #` begins no comment."""

    def scan_to_next_token(self) -> None:
        while self.peek() in " \r\n\ufeff":
            self.forward()


class _Reader:
    """Converts nodes to values. Raises ConfigError with the line."""

    def __init__(self, source: str, text: str, *, lines: bool) -> None:
        self._source = source
        self._text = text
        self._lines = lines
        self._values: dict[int, Any] = {}
        self._sizes: dict[int, int] = {}
        self._open: set[int] = set()

    def read(self, node: Node | None) -> Any:
        if node is None:
            return None
        self._size(node)
        return self._value(node)

    def _size(self, node: Node) -> int:
        """The number of values in a node, each alias counted as what it stands for."""
        known = self._sizes.get(id(node))
        if known is not None:
            return known
        if id(node) in self._open:
            raise ConfigError(f"{self._at(node)}: an alias inside of what it stands for; take it out")
        self._open.add(id(node))
        size = 1
        if isinstance(node, SequenceNode):
            size += sum(self._size(child) for child in node.value)
        elif isinstance(node, MappingNode):
            size += sum(self._size(key) + self._size(value) for key, value in node.value)
        if size > MAX_NODES:
            raise ConfigError(
                f"{self._at(node)}: its aliases (`*name`) stand for more than {MAX_NODES:,} values; write out less"
            )
        self._open.discard(id(node))
        self._sizes[id(node)] = size
        return size

    def _value(self, node: Node) -> Any:
        if id(node) not in self._values:
            match node:
                case ScalarNode():
                    self._values[id(node)] = self._scalar(node)
                case SequenceNode():
                    self._check_tag(node, "seq")
                    self._values[id(node)] = [self._value(child) for child in node.value]
                case MappingNode():
                    self._check_tag(node, "map")
                    self._values[id(node)] = self._mapping(node)
        return self._values[id(node)]

    def _scalar(self, node: ScalarNode) -> Any:
        self._check_tag(node, "str")
        text = self._text_of(node)
        if node.style is not None or node.tag != _UNWRITTEN:
            return text
        if (not text or " " in text) and _CUT.match(self._text, node.end_mark.index):
            raise ConfigError(
                f"{self._at(node)}: what follows `#` is a comment, and this looks like text that it cuts; put the text in quotes, "
                "or a space behind the `#`"
            )
        try:
            return read_scalar(text)
        except ValueError as e:
            start = self._text.rfind("\n", 0, node.start_mark.index) + 1
            line = self._text[start : node.end_mark.index].strip()
            raise ConfigError(f"{self._at(node)}: {shortened(line)} {e}") from None

    def _text_of(self, node: ScalarNode) -> str:
        try:
            return joined(str(node.value))
        except ValueError:
            raise ConfigError(
                f"{self._at(node)}: an escape \\ud800 to \\udfff is half of a character; write it out"
            ) from None

    def _mapping(self, node: MappingNode) -> dict[str, Any]:
        own: dict[str, Any] = {}
        merged: dict[str, Any] = {}
        first: dict[str, Node] = {}
        for key_node, value_node in node.value:
            if not isinstance(key_node, ScalarNode):
                raise ConfigError(f"{self._at(key_node)}: a key has to be text, not a list or a mapping")
            key = self._text_of(key_node)
            if key in first:
                raise ConfigError(self._twice(key, first[key], key_node))
            first[key] = key_node
            if key == "<<" and key_node.style is None:
                merged = self._merge(value_node)
            else:
                own[key] = self._value(value_node)
        return merged | own

    def _merge(self, node: Node) -> dict[str, Any]:
        """The values that `<<: *name` or `<<: [*first, *second]` merges in; of several, the earlier one takes precedence."""
        parts = node.value if isinstance(node, SequenceNode) else [node]
        out: dict[str, Any] = {}
        for part in reversed(parts):
            if not isinstance(part, MappingNode):
                raise ConfigError(f"{self._at(part)}: `<<` takes a mapping's alias (`<<: *name`), or a list of them")
            out |= self._value(part)
        return out

    def _check_tag(self, node: Node, kind: str) -> None:
        if node.tag not in (_UNWRITTEN, f"{_TAGS}{kind}"):
            raise ConfigError(f"{self._at(node)}: the tag {node.tag.replace(_TAGS, '!!')} can't be used; leave it out")

    def _twice(self, key: str, first: Node, second: Node) -> str:
        if not self._lines:
            return f"{self._source}: {key!r} is given twice; leave one of them out"
        return (
            f"{self._source}: {key!r} is given twice, in line {first.start_mark.line + 1} and in line "
            f"{second.start_mark.line + 1}; leave one of them out, or make them one"
        )

    def _at(self, node: Node) -> str:
        return f"{self._source}, line {node.start_mark.line + 1}" if self._lines else self._source


def _compose(text: str, loader_type: type[_Loader]) -> Node | None:
    loader = loader_type(text)
    try:
        return loader.get_single_node()
    finally:
        loader.dispose()


def load_yaml(path: Path) -> dict[str, Any]:
    """The content of a recipe or a config.yaml. Numbers are IntText and FloatText until a schema has converted them.

    Raises:
        ConfigError: the file can't be read (with the line), or has a key twice (with both lines).
    """
    try:
        raw = path.read_bytes()
    except OSError as e:
        raise ConfigError(f"{path}: can't be read: {e.strerror}") from None
    if len(raw) > MAX_BYTES:
        raise ConfigError(
            f"{path}: {len(raw):,} bytes, and a recipe has at most {MAX_BYTES:,}; is this the right file?"
        )
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        line = raw.count(b"\n", 0, e.start) + 1
        raise ConfigError(f"{path}, line {line}: not UTF-8 text ({e.reason}); save the file as UTF-8") from None
    try:
        data = _Reader(str(path), text, lines=True).read(_compose(text, _Loader))
    except yaml.YAMLError as e:
        raise ConfigError(f"{path}{_explained(e, text)}") from None
    except RecursionError:
        raise ConfigError(f"{path}: lists and mappings inside each other, hundreds deep; write out less") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: expected a mapping at the top, got {type(data).__name__}")
    return data


def read_flow(text: str) -> Any:
    """The value of an override where the schema has no text: a scalar, `[a, b]` or `{key: value}`, as in a file but without
    comments.

    Raises:
        ConfigError: the text is malformed; says how.
    """
    try:
        return _Reader("the value", text, lines=False).read(_compose(text, _FlowLoader))
    except yaml.YAMLError as e:
        problem = first_line(getattr(e, "problem", None) or e)
        hint = "; quote text that holds #, : or brackets" if text[:1] in "[{" else ""
        raise ConfigError(f"the value is not YAML ({problem}){hint}") from None
    except RecursionError:
        raise ConfigError("the value has lists and mappings inside each other, hundreds deep") from None


def shortened(text: str) -> str:
    return text if len(text) <= 40 else f"{text[:40]}.."


def joined(text: str) -> str:
    """The text with JSON's surrogate pairs, `\\ud83d\\ude00`, joined into characters. Raises ValueError for a lone surrogate."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16")


def quoted_text(text: str) -> str | None:
    """The text between the quotes, if all of `text` is one quoted scalar of YAML or JSON, else None.

    Raises:
        ConfigError: it holds a lone surrogate.
    """
    found = _quoted(text)
    try:
        return None if found is None else joined(found)
    except ValueError:
        raise ConfigError("an escape \\ud800 to \\udfff is half of a character; write it out") from None


def _quoted(text: str) -> str | None:
    if text[:1] not in ('"', "'") or len(text) < 2 or text[-1] != text[0]:
        return None
    if text[0] == '"':
        with contextlib.suppress(ValueError):
            return str(json.loads(text))
    try:
        node = _compose(text, _FlowLoader)
    except (yaml.YAMLError, RecursionError):
        return None
    return str(node.value) if isinstance(node, ScalarNode) and node.style is not None else None


def _explained(error: yaml.YAMLError, text: str) -> str:
    """The error as `, line 3, column 7: ..`, with the fix if the cause is plain."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        mark = error.problem_mark
        problem = error.problem or error.context or "?"
        hint = "; indent with spaces" if "'\\t'" in problem else ""
        hint = "; quote text that holds brackets, e.g. '${NAME}'" if "got '{'" in problem else hint
        return f", line {mark.line + 1}, column {mark.column + 1}: not valid YAML: {problem}{hint}"
    if isinstance(error, yaml.reader.ReaderError):
        line = text.count("\n", 0, error.position) + 1
        return f", line {line}: not valid YAML: the character #x{error.character:04x} can't be used in it"
    return f": not valid YAML: {error}"


class _Dumper(yaml.SafeDumper):
    """Quotes what either YAML 1.1 or `read_scalar` would read as something other than text."""

    def ignore_aliases(self, _data: Any) -> bool:
        return True


def _text(dumper: _Dumper, value: str) -> ScalarNode:
    """The node of a text, escaped if it holds a next-line character, which YAML reads as a line break."""
    return dumper.represent_scalar(f"{_TAGS}str", value, style='"' if "\x85" in value else None)


_Dumper.add_representer(str, _text)
_Dumper.add_implicit_resolver(f"{_TAGS}float", _FLOAT, list("-+.0123456789"))
_Dumper.add_implicit_resolver(f"{_TAGS}int", _BASED, ["0"])
_Dumper.add_representer(IntText, lambda dumper, value: dumper.represent_scalar(f"{_TAGS}int", value.text))
_Dumper.add_representer(FloatText, lambda dumper, value: dumper.represent_scalar(f"{_TAGS}float", value.text))
_Dumper.add_representer(Word, lambda dumper, value: dumper.represent_scalar(f"{_TAGS}bool", value))


def dump_yaml(data: Any) -> str:
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True)
