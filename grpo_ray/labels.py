"""Labels of a cluster's nodes, and the requirements of a kind of worker, in the syntax of Ray's `label_selector`.

{zone: a}   {zone: "!a"}   {zone: "in(a, b)"}   {zone: "!in(a, b)"}        every entry must hold
"""

from __future__ import annotations

import re
from collections.abc import Mapping

_VALUE = r"[a-zA-Z0-9](?:[a-zA-Z0-9_.-]{0,61}[a-zA-Z0-9])?"
_SELECTOR = re.compile(rf"(!?)(?:(?:in)?\(({_VALUE}(?:, ?{_VALUE})*)\)|({_VALUE}))")
_KEY = re.compile(rf"(?:{_VALUE}/)?{_VALUE}")


def check_labels(labels: dict[str, str]) -> dict[str, str]:
    """The labels, checked. Raises ValueError for those that Ray does not accept."""
    for key, selector in labels.items():
        if not _KEY.fullmatch(key):
            raise ValueError(f"{key!r} is no label's name; it reads zone or example.com/zone")
        if not _SELECTOR.fullmatch(selector):
            raise ValueError(f"{selector!r} selects no label; it reads a, !a, in(a, b) or !in(a, b)")
    return labels


def check_resources(resources: dict[str, float]) -> dict[str, float]:
    """The resources, checked. Raises ValueError for those that have an option of their own."""
    for name, option in (("CPU", "num_cpus"), ("GPU", "num_gpus")):
        if name in resources:
            raise ValueError(f"{name} is no custom resource: use {option}")
    return resources


def fits(labels: Mapping[str, str], asked: Mapping[str, str]) -> bool:
    """Whether a worker with these requirements may be placed on a node with these labels."""
    for key, selector in asked.items():
        found = _SELECTOR.fullmatch(selector)
        assert found is not None, selector
        but, several, one = found.groups()
        values = [v.strip() for v in several.split(",")] if several else [one]
        if (labels.get(key) in values) == bool(but):
            return False
    return True
