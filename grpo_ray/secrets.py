"""Keys and tokens stay where they are: recipes can't hold them, and what a run tells has them taken out.

A recipe becomes config.yaml, goes to trackers and shows in Ray's dashboard. It names a secret as `${NAME}`, and Ray fills in the
value where the worker starts.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
from collections.abc import Mapping
from pathlib import Path

SECRET_NAME = re.compile(
    r"(^|_)(AUTH|PASSWORD|PASSWD|SECRET|SECRETS|CREDENTIALS?|TOKEN|APIKEY|(API|ACCESS|PRIVATE|SECRET)_KEY)$",
    re.IGNORECASE,
)
REFERENCE = re.compile(r"\$\{\w+\}")
TOKEN_BYTES = 32
MIN_LENGTH = 8
"""Shorter values are taken for words: `true`, `token`."""
HIDDEN = "[hidden]"


def is_secret_name(variable: str) -> bool:
    """Does this environment variable hold a secret, by its name?"""
    return SECRET_NAME.search(variable) is not None


def check_env(env: dict[str, str]) -> dict[str, str]:
    """An `env:` of a recipe. Raises ValueError for a secret that is written out."""
    for name, value in env.items():
        if is_secret_name(name) and not REFERENCE.fullmatch(value):
            raise ValueError(
                f"env.{name} looks like a secret, and a recipe is written to config.yaml and shown by trackers: set it in the "
                f"environment of Ray's nodes, and write {name}: ${{{name}}} here"
            )
    return env


def resolve(env: Mapping[str, str], node: Mapping[str, str]) -> dict[str, str]:
    """`${NAME}` -> its value on this node, '' where it has none. Ray does the same with what it starts itself."""
    return {k: node.get(v[2:-1], "") if REFERENCE.fullmatch(v) else v for k, v in env.items()}


def secret_values(env: Mapping[str, str]) -> list[str]:
    """What must not be told: the secrets of this environment, and Ray's token. The longest first."""
    values = {value for name, value in env.items() if is_secret_name(name)}
    with contextlib.suppress(OSError):
        values.add(token_path(env).read_text().strip())
    return sorted((v for v in values if len(v) >= MIN_LENGTH), key=len, reverse=True)


def hide_secrets(text: str, env: Mapping[str, str] = os.environ) -> str:
    """`text` without them: what leaves a worker as a message or a traceback."""
    for value in secret_values(env):
        text = text.replace(value, HIDDEN)
    return text


def make_token(env: Mapping[str, str]) -> None:
    """Ray's token is there, and nobody else could read it at any moment: Ray's own would be readable by all until it is told
    otherwise. One that is there already is kept."""
    if env.get("RAY_AUTH_TOKEN"):
        return
    path = token_path(env)
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    if not path.is_file() or not path.stat().st_size:
        _write_once(path, secrets.token_hex(TOKEN_BYTES))
    if path.stat().st_uid == os.getuid():
        path.chmod(0o600)


def _write_once(path: Path, text: str) -> None:
    """All of it at once and for this user alone; another process that was first has its own kept."""
    aside = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    with open(os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    try:
        if path.is_file() and not path.stat().st_size:
            aside.replace(path)
        else:
            with contextlib.suppress(FileExistsError):
                os.link(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def token_path(env: Mapping[str, str]) -> Path:
    """Where Ray keeps the token of a cluster; also `RAY_AUTH_TOKEN` may hold it."""
    return Path(env.get("RAY_AUTH_TOKEN_PATH") or Path(env.get("HOME") or Path.home(), ".ray", "auth_token"))
