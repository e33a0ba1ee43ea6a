"""The user's consent to the cluster that a recipe names, before that cluster gets Ray's token."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import typer

from actors.addresses import OPTION, check_answers, read_address
from actors.named_clusters import check_named, is_named, note
from grpo_ray.config.common import ClusterConfig
from grpo_ray.config.loading import parse_overrides
from grpo_ray.config.typed import with_types


def check_cluster(option: str | None, overrides: Sequence[str] = ()) -> None:
    """Check that the cluster to join answers, before anything that takes time; it is shown no token.

    Args:
        option: `cluster.address`.
        overrides: what the user typed; an address among them is noted as named by the user.

    Raises:
        ConfigError: it is not an address.
        ResourceError: nothing answers there.
    """
    address = read_address(option)
    if address is None:
        return
    check_answers(address)
    if _typed(overrides) == address.where:
        note(address)


def confirm_cluster(option: str | None, overrides: Sequence[str] = ()) -> None:
    """As `check_cluster`; an address that the user did not name has to be confirmed on a terminal, once.

    Raises:
        ConfigError: the user does not confirm it, or there is no terminal.
    """
    check_cluster(option, overrides)
    address = read_address(option)
    if address is None or is_named(address):
        return
    if sys.stdin is not None and sys.stdin.isatty() and sys.stderr.isatty():
        question = (
            f"{OPTION} {address.where} is named by the recipe or the run's folder, not by you. To join that cluster gives it Ray's "
            "token, by which code runs as you, and the code of this folder. Is it yours, now and from here on?"
        )
        if typer.confirm(question, default=False, err=True):
            note(address)
    check_named(address)


def _typed(overrides: Sequence[str]) -> str | None:
    section = with_types(ClusterConfig, parse_overrides(list(overrides)).get("cluster"), {})
    address = section.get("address") if isinstance(section, dict) else None
    return None if address is None else str(address).strip()
