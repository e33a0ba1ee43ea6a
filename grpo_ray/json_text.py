"""JSON from untrusted files: every defect raises a ValueError that names it, without delay.

`read` is for files of this project (NaN included), `read_strictly` for rows of data, where it refuses what Python accepts and
nobody intends: duplicate keys, NaN and infinities, numbers beyond a float, keys with a lone surrogate. (A text with one may be a
program's input; where it is to be tokenized, `tokenized.check_characters` refuses it.)
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any, NoReturn

MAX_DEPTH = 100
"""The largest depth of data, Parquet's own bound. Deeper data can be read, and not sent between processes."""
_HALF = re.compile("[\ud800-\udfff]")
_MAY_BE_HALF = re.compile(rb"\\u[dD][89a-fA-F]")


def read(data: str | bytes) -> Any:
    """Read JSON.

    Raises:
        ValueError: it is no JSON, nested too deeply, or contains a number of thousands of digits.
    """
    return _loaded(data, json.loads)


def read_strictly(data: bytes) -> Any:
    """Read JSON strictly.

    Raises:
        ValueError: as `read`, and the cases listed at the top of this file.
    """
    value = _loaded(data, lambda data: _STRICT.decode(data.decode().removeprefix("\ufeff").rstrip()))
    if data.count(b"[") + data.count(b"{") > MAX_DEPTH:
        check_depth(value)
    if _MAY_BE_HALF.search(data):
        _refuse_halves(value)
    return value


def check_depth(value: Any) -> None:
    """Raises ValueError for data that are nested more deeply than MAX_DEPTH."""
    if _depth(value) > MAX_DEPTH:
        raise ValueError(
            f"not usable JSON: it is nested too deeply, more than {MAX_DEPTH} lists and objects inside each other"
        )


def _loaded(data: str | bytes, load: Any) -> Any:
    try:
        return load(data)
    except UnicodeDecodeError as e:
        raise ValueError(f"not UTF-8 text ({e.reason} at byte {e.start})") from None
    except json.JSONDecodeError as e:
        where = f"column {e.colno}" if e.lineno == 1 else f"line {e.lineno}, column {e.colno}"
        raise ValueError(f"not valid JSON: {e.msg} at {where}") from None
    except RecursionError:
        raise ValueError("not usable JSON: it is nested too deeply") from None
    except ValueError as e:
        if "int_max_str_digits" in str(e):
            raise ValueError("not usable JSON: a number has thousands of digits; put it in quotes") from None
        raise ValueError(f"not usable JSON: {e}") from None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise ValueError(f"the key {twice[:80]!r} is given twice; leave one of them out")
    return found


def _no_number(text: str) -> NoReturn:
    raise ValueError(f"{text} is no number; write null, or put it in quotes")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(
            f"the number {text[:20]}{'..' * (len(text) > 20)} is beyond what a float can hold; put it in quotes"
        )
    return number


_STRICT = json.JSONDecoder(object_pairs_hook=_once, parse_constant=_no_number, parse_float=_finite)


def _refuse_halves(value: Any) -> None:
    for text in (key for level in _levels(value) for one in level if isinstance(one, dict) for key in one):
        if _HALF.search(text):
            raise ValueError(f"{ascii(text)[:40]} holds half of a character, and is a key; write the whole one")


def _depth(value: Any) -> int:
    """The depth of a value, 0 for a number or a text."""
    return sum(1 for _ in _levels(value)) - 1


def _levels(value: Any) -> Iterator[list[Any]]:
    """The levels of a value: itself, then its elements, then theirs, .."""
    level = [value]
    while level:
        yield level
        level = [
            inner
            for one in level
            if isinstance(one, dict | list)
            for inner in (one if isinstance(one, list) else one.values())
        ]
