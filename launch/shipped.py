"""Which files of the user's folder `submit` uploads: what git tracks and what the recipe names, and never what looks like a key."""

from __future__ import annotations

import fnmatch
import os
import re
import subprocess
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from grpo_ray.config import RunConfig
from grpo_ray.config_supervised import SftConfig
from grpo_ray.errors import ConfigError

LEFT_OUT = (
    *(".*", "__pycache__", "*.pyc", "*.egg-info", "build", "dist", "node_modules"),
    *("runs", "wandb", "mlruns"),
)
"""Patterns of names, at any depth. Hidden files are where keys and tokens lie. A folder with a pyvenv.cfg is left out too."""
SECRET_FILES = (
    *("*.pem", "*.key", "*.p12", "*.pfx", "*.p8", "*.ppk", "*.jks", "*.keystore", "*.kdbx", "*.gpg", "*.age", "*.ovpn"),
    *("id_rsa*", "id_dsa*", "id_ecdsa*", "id_ed25519*", "identity", "authorized_keys", "known_hosts"),
    *("*.env", "*.env.*", "env.local", "*.envrc", "*netrc", "*pypirc", "*.npmrc", "*.boto", "*.htpasswd", "*.pgpass"),
    *("kubeconfig*", "*.kubeconfig", "*.tfstate", "*.tfstate.*", "*.tfvars", "*.asc", "wallet.dat", "shadow", "passwd"),
    *(
        "credentials",
        "credentials.*",
        "*credentials*.json",
        "*service[-_]account*",
        "*serviceaccount*",
        "client[-_]secret*",
    ),
    *(
        "secret",
        "secrets",
        "secret.*",
        "secrets.*",
        "*.secret",
        "*.secrets",
        "*[-_]secrets.*",
        "token",
        "token.*",
        "*.token",
    ),
    *(
        "*[-_]token",
        "*[-_]token.txt",
        "auth.json",
        "password",
        "password.*",
        "passwords.txt",
        "*[-_]key.txt",
        "api[-_]key*",
    ),
)
"""Names of what holds keys, in any case; code (`token.py`) is not meant."""
KINDS = (
    *(".py", ".pyi", ".yaml", ".yml", ".toml", ".jinja", ".jinja2", ".j2", ".md"),
    *(".jsonl", ".ndjson", ".parquet", ".json", ".csv", ".txt", ".arrow", ".safetensors", ".model"),
)
"""Of files that are shipped from a folder that git does not know."""
GIT_S = 60.0
SCANNED_BYTES = 8 << 20
"""Of a file, at its beginning and at its end, where a private key is looked for."""
_PRIVATE_KEY = re.compile(
    rb"-----BEGIN [A-Z ]{0,40}PRIVATE KEY(?: BLOCK)?-----(?:\r?\n|\\n|\\r\\n)[A-Za-z0-9+/=:\-, \r\n\\]{40,}"
)


@dataclass
class Shipped:
    """What is uploaded of a folder."""

    files: dict[Path, int] = field(default_factory=dict)
    """Relative path -> bytes."""
    left_out: dict[Path, str] = field(default_factory=dict)
    """What somebody may look for there -> why it is not."""

    @property
    def size(self) -> int:
        return sum(self.files.values())


def choose(
    folder: Path, named: Iterable[Path] = (), include: Sequence[str] = (), exclude: Sequence[str] = ()
) -> Shipped:
    """
    Args:
        folder: of the user.
        named: files and folders below it that the recipe names.
        include: names or relative paths of more, * allowed.
        exclude: likewise, of what is not to be shipped.

    Raises:
        ConfigError: a link leads out of the folder, or a file holds a private key.
    """
    out = Shipped()
    left_out = (*LEFT_OUT, *exclude)
    tracked = _tracked(folder)
    wanted = {Path(os.path.abspath(path)) for path in named}
    for file in _below(folder, left_out, out):
        here = folder / file
        chosen = (
            (file in tracked if tracked is not None else file.suffix.lower() in KINDS)
            or any(here == path or here.is_relative_to(path) for path in wanted)
            or matches(file, include)
        )
        if not chosen:
            if tracked is not None:
                out.left_out[file] = "git does not track it"
        elif is_secret(file.name) or is_secret(here.resolve().name):
            out.left_out[file] = "its name is that of a key or a password"
        elif _leads_to_what_stays(here, folder, left_out):
            out.left_out[file] = "a link to what is not shipped"
        elif not here.resolve().is_relative_to(folder.resolve()):
            raise ConfigError(
                f"{here} is a link to {here.resolve()}, outside of the folder that is shipped: put a copy there, or leave it out "
                f"with --exclude {file}"
            )
        elif holds_private_key(here):
            raise ConfigError(f"{here} holds a private key, and would be uploaded: take it away, or --exclude {file}")
        else:
            out.files[file] = here.stat().st_size
    return out


def _leads_to_what_stays(here: Path, folder: Path, left_out: Sequence[str]) -> bool:
    real, root = here.resolve(), folder.resolve()
    return real.is_relative_to(root) and matches(real.relative_to(root), left_out)


def named_by(config: RunConfig | SftConfig, folder: Path) -> list[Path]:
    """Files and folders below `folder` that a recipe names: data, models, templates, files and modules of rewards."""
    found = []
    for text in _texts(config.model_dump(mode="json")):
        path = text.rpartition(".py:")[0] + ".py" if ".py:" in text else text.removeprefix("python:")
        modules = (
            [Path(*path.split(".")[:n]) for n in range(1, path.count(".") + 1)] if re.fullmatch(r"[\w.]+", path) else []
        )
        for candidate in (Path(path), *modules, *(m.with_suffix(".py") for m in modules)):
            here = Path(os.path.abspath(folder / candidate))
            if here != folder and here.is_relative_to(folder) and len(str(candidate)) < 1024 and here.exists():
                found.append(here)
    return found


def _texts(node: Any) -> Iterator[str]:
    match node:
        case dict():
            for value in node.values():
                yield from _texts(value)
        case list():
            for value in node:
                yield from _texts(value)
        case str() if node and "\0" not in node:
            yield node


def is_secret(name: str) -> bool:
    """Is this file where keys are kept, by its name?"""
    lower = name.lower()
    return not lower.endswith((".py", ".pyi")) and any(fnmatch.fnmatchcase(lower, pattern) for pattern in SECRET_FILES)


def holds_private_key(file: Path) -> bool:
    with file.open("rb") as opened:
        text = opened.read(SCANNED_BYTES)
        if (size := file.stat().st_size) > SCANNED_BYTES:
            opened.seek(max(SCANNED_BYTES, size - SCANNED_BYTES))
            text += opened.read(SCANNED_BYTES)
    return _PRIVATE_KEY.search(text) is not None


def matches(path: Path, patterns: Sequence[str]) -> bool:
    """Is it, or a folder that it lies in, called so?"""
    whole = [path, *path.parents][:-1]
    return any(
        fnmatch.fnmatchcase(text, pattern.rstrip("/").removeprefix("./"))
        for pattern in patterns
        for part in whole
        for text in (part.name, part.as_posix())
    )


def shipped(folder: Path, left_out: Sequence[str]) -> Iterator[Path]:
    """The files below, relative; links to folders are not followed."""
    yield from _below(folder, left_out, Shipped())


def _below(folder: Path, left_out: Sequence[str], out: Shipped) -> Iterator[Path]:
    for where, folders, files in os.walk(folder):
        inside = Path(where).relative_to(folder)
        kept = []
        for name in sorted(folders):
            if Path(where, name).is_symlink():
                out.left_out[inside / name] = "a link to a folder"
            elif not matches(inside / name, left_out) and not Path(where, name, "pyvenv.cfg").is_file():
                kept.append(name)
        folders[:] = kept
        for name in sorted(files):
            if not matches(inside / name, left_out) and Path(where, name).is_file():
                yield inside / name


def _tracked(folder: Path) -> set[Path] | None:
    """What git tracks of a folder; None: it is none of git's. Nothing that the repository configures is run."""
    command = ["git", "-c", "core.fsmonitor=false", "-c", "core.hooksPath=/dev/null", "ls-files", "-z", "--cached"]
    quiet = {k: v for k, v in os.environ.items() if not k.startswith("GIT_")} | {"GIT_OPTIONAL_LOCKS": "0"}
    try:
        done = subprocess.run(command, cwd=folder, env=quiet, capture_output=True, timeout=GIT_S, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    if done.returncode:
        return None
    return {Path(os.fsdecode(name)) for name in done.stdout.split(b"\0") if name}
