"""The files of the user's folder that `submit` uploads: what git tracks and what the recipe names, and never what looks like a
key."""

from __future__ import annotations

import base64
import fnmatch
import os
import re
import subprocess
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from grpo_ray.config.schema import RunConfig
from grpo_ray.config.supervised import SftConfig
from grpo_ray.errors import ConfigError

OUTPUTS = ("build", "dist", "node_modules", "runs", "wandb", "mlruns")
"""The names of folders, at any depth, of which only what the recipe names is shipped."""
NEVER = (".*", "__pycache__", "*.pyc", "*.egg-info")
"""Names, at any depth, that are never shipped: keys and tokens lie in hidden files. A folder with a pyvenv.cfg is left out too."""
LEFT_OUT = (*NEVER, *OUTPUTS)
SECRET_FILES = (
    *(
        "*.pem",
        "*.key",
        "*.p12",
        "*.pfx",
        "*.p8",
        "*.ppk",
        "*.jks",
        "*.bks",
        "*.keystore",
        "*.kdb",
        "*.kdbx",
        "*.gpg",
        "*.age",
    ),
    *(
        "id_rsa*",
        "id_dsa*",
        "id_ecdsa*",
        "id_ed25519*",
        "identity",
        "authorized_keys",
        "known_hosts",
        "*.ovpn",
        "*.pkcs12",
    ),
    *("*[-_.]id_rsa*", "*[-_.]id_dsa*", "*[-_.]id_ecdsa*", "*[-_.]id_ed25519*", "*private[-_]key*", "*privatekey*"),
    *("*.env", "*.env.*", "env.local", "*.envrc", "*netrc", "*pypirc", "*.npmrc", "*.boto", "*.htpasswd", "*pgpass*"),
    *("kubeconfig*", "*.kubeconfig", "*.tfstate", "*.tfstate.*", "*.tfvars", "*.tfvars.json", "*.asc", "wallet.dat"),
    *(
        "credentials",
        "credentials.*",
        "*credentials*.json",
        "*credentials*.csv",
        "*service[-_]account*",
        "*serviceaccount*",
    ),
    *("client[-_]secret*", "secret", "secrets", "secret.*", "secrets.*", "*.secret", "*.secrets", "*[-_]secrets.*"),
    *("secret[-_]key*", "*firebase[-_]adminsdk*", "*dockerconfigjson", "*dockercfg", "vault[-_]pass*", "*.vault"),
    *(
        "token",
        "token.*",
        "*.token",
        "*[-_]token",
        "*[-_]token.txt",
        "*[-_]token.json",
        "*[-_]token.y*ml",
        "*[-_]token.toml",
    ),
    *(
        "access[-_]token*",
        "refresh[-_]token*",
        "auth.json",
        "shadow",
        "passwd",
        "password",
        "password.*",
        "passwords.*",
    ),
    *("*[-_]key.txt", "*[-_]key.json", "*[-_]keys.csv", "api[-_]key*", "rootkey*", "*accesskey*", "*access[-_]key*"),
    *("apikey*", "accesstoken*", "*.pem.*", "*.pkcs8", "*.der", "*.keytab", "env.prod*", "env.dev*", "env.stag*"),
    *("kube[-_.]config*", "kaggle.json", "rclone.conf", "wg[0-9]*.conf", "cookies", "cookies.*"),
)
"""The names of files that hold keys, in any case; code (`token.py`) is exempt."""
SECRET_FOLDERS = (
    "secret",
    "secrets",
    "credential",
    "credentials",
    "passwords",
    "ssh",
    "gnupg",
    "private[-_]keys",
    "api[-_]keys",
)
"""The names of folders of which nothing is shipped, in any case and hidden or not, except for data that the recipe names."""
_COPY = re.compile(r"(\.(bak|backup|old|orig|save|copy|\d{1,8})|~)+$")
DATA = (".jsonl", ".ndjson", ".parquet", ".arrow")
"""The suffixes of data sets, which may be named like keys where the recipe names them."""
KINDS = (
    *(".py", ".pyi", ".yaml", ".yml", ".toml", ".jinja", ".jinja2", ".j2", ".md"),
    *(".jsonl", ".ndjson", ".parquet", ".json", ".csv", ".txt", ".arrow", ".safetensors", ".model"),
)
"""The suffixes of files that are shipped from a folder without git."""
GIT_S = 60.0
CHUNK_BYTES = 1 << 20
LONGEST_KEY = 16 << 10
"""The most that is scanned of one private key; this much of a chunk is scanned again with the next."""
_MARKS = (b"PRIVATE KEY", b"Private-Lines: ", b"AGE-SECRET-KEY-1", b"PrivateKey")
_ENCODED_MARKS = {
    b"UFJJVkFURSBLRV": b"-----BEGIN ",
    b"SVZBVEUgS0VZ": b"-----BEGIN PR",
    b"UklWQVRFIEtFW": b"-----BEGIN P",
}
"""`PRIVATE KEY` in base64, from where a group of three bytes begins -> the text before it."""
_BETWEEN = rb"(?:\s|\\+[nrtu]|\\|000[adAD]|%0[adAD]|&\#x?(?:10|13|[adAD]);|<br ?/?>|[\"'`+,;|>\#*])"
_PRIVATE_KEY = re.compile(
    rb"(?:-{4,5} ?BEGIN [A-Z0-9 ]{0,40}PRIVATE KEY(?: BLOCK)? ?-{4,5}|Private-Lines: [0-9]{1,4})"
    + _BETWEEN
    + rb"{0,64}(?:[A-Za-z-]{2,30}: [^\r\n\\]{0,200}"
    + _BETWEEN
    + rb"{1,64}){0,8}(?P<body>[A-Za-z0-9+/]{40,}={0,2})"
)
_AGE_KEY = re.compile(rb"AGE-SECRET-KEY-1[A-Z0-9]{40,}")
_WIREGUARD_KEY = re.compile(rb"(?m)^[ \t]*PrivateKey[ \t]*=[ \t]*[A-Za-z0-9+/]{43}=")
_NO_BREAKS = bytes.maketrans(b"-_", b"+/"), b" \t\r\n"
"""Base64 for URLs as base64, without line breaks."""
_ENCODED = re.compile(rb"[A-Za-z0-9+/]{60,12000}")
_LEAST_SIGNS = 12
"""The least number of different characters in the body of a key; a placeholder has fewer."""


@dataclass
class Shipped:
    """What is uploaded of a folder."""

    files: dict[Path, int] = field(default_factory=dict)
    """Relative path -> bytes."""
    left_out: dict[Path, str] = field(default_factory=dict)
    """What somebody may look for there -> why it is left out."""

    @property
    def size(self) -> int:
        return sum(self.files.values())


def choose(
    folder: Path, named: Iterable[Path] = (), include: Sequence[str] = (), exclude: Sequence[str] = ()
) -> Shipped:
    """The files of a folder to upload, and those left out.

    Args:
        folder: the user's folder.
        named: files and folders below it that the recipe names.
        include: names or relative paths of more files, * allowed.
        exclude: likewise, what not to ship.

    Raises:
        ConfigError: a link leads out of the folder, or a file holds a private key.
    """
    out = Shipped()
    left_out = (*LEFT_OUT, *exclude)
    tracked = _tracked(folder)
    wanted = {Path(os.path.abspath(path)) for path in named}
    outputs = _named_outputs(folder, wanted, (*NEVER, *exclude), out)
    for file in dict.fromkeys([*_below(folder, left_out, out), *outputs]):
        here = folder / file
        by_recipe = any(here == path or here.is_relative_to(path) for path in wanted)
        chosen = (
            (file in tracked if tracked is not None else file.suffix.lower() in KINDS)
            or by_recipe
            or matches(file, include)
        )
        if not chosen:
            if tracked is not None:
                out.left_out[file] = "git does not track it"
        elif _is_secret_path(here, folder) and not (by_recipe and file.suffix.lower() in DATA):
            out.left_out[file] = (
                "its name is that of a key or a password; if it is neither, rename it (data that the recipe names are shipped "
                f"under any name as {', '.join(DATA)})"
            )
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


def _named_outputs(folder: Path, wanted: Iterable[Path], never: Sequence[str], out: Shipped) -> Iterator[Path]:
    """What the recipe names below folders of OUTPUTS, and nothing beside it."""
    for path in sorted(wanted):
        inside = path.relative_to(folder) if path.is_relative_to(folder) else Path()
        if len(inside.parts) < 2 or not matches(inside.parent, OUTPUTS) or matches(inside, never):
            continue
        if path.is_file():
            yield inside
        elif path.is_dir() and not path.is_symlink():
            yield from (inside / file for file in _below(path, never, out))


def _is_secret_path(here: Path, folder: Path) -> bool:
    """Whether the path, its target, or a folder on the way is named like a key."""
    real, root = here.resolve(), folder.resolve()
    ways = (here.relative_to(folder), real.relative_to(root) if real.is_relative_to(root) else Path(real.name))
    return any(
        is_secret(way.name) or _matches_any(part, SECRET_FOLDERS) for way in ways for part in way.parent.parts or ("",)
    )


def _leads_to_what_stays(here: Path, folder: Path, left_out: Sequence[str]) -> bool:
    real, root = here.resolve(), folder.resolve()
    if real == root / here.relative_to(folder):
        return False
    return real.is_relative_to(root) and matches(real.relative_to(root), left_out)


def named_by(config: RunConfig | SftConfig, folder: Path) -> list[Path]:
    """The files and folders below `folder` that a recipe reads: data, models, templates, files and modules of rewards."""
    found = []
    for text in _texts(config.model_dump(mode="json", exclude={"dir", "name", "checkpoint", "tracking"})):
        path = text.rpartition(".py:")[0] + ".py" if ".py:" in text else text.removeprefix("python:")
        dotted = re.fullmatch(r"[\w.]+", path) and not _exists(folder / path)
        modules = [Path(*path.split(".")[:n]) for n in range(1, path.count(".") + 1)] if dotted else []
        for candidate in (Path(path), *modules, *(m.with_suffix(".py") for m in modules)):
            here = Path(os.path.abspath(folder / candidate))
            if here != folder and here.is_relative_to(folder) and _exists(here):
                found.append(here)
    return found


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:
        # The text is too long for a path.
        return False


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
    """Whether a file of this name usually holds keys."""
    shown = "".join(c for c in unicodedata.normalize("NFKC", name) if unicodedata.category(c) != "Cf").strip("#")
    plain = _COPY.sub("", shown.lower())
    return not plain.endswith((".py", ".pyi")) and any(fnmatch.fnmatchcase(plain, p) for p in SECRET_FILES)


def _matches_any(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(name.lower().removeprefix("."), pattern) for pattern in patterns)


def holds_private_key(file: Path) -> bool:
    """Whether the file holds a private key anywhere: a header with a body, in any encoding of Unicode, with any line breaks, or
    anywhere in base64; or one of WireGuard's or age's."""
    before = b""
    with file.open("rb") as opened:
        while chunk := opened.read(CHUNK_BYTES):
            window = before + chunk
            # Of UTF-16 and UTF-32 only ASCII is left.
            if _is_key_in(window) or (b"\0" in window and _is_key_in(window.translate(None, b"\0"))):
                return True
            before = window[-LONGEST_KEY:]
    return False


def _is_key_in(text: bytes) -> bool:
    if any(map(_holds_body, _PRIVATE_KEY.finditer(text) if _MARKS[0] in text or _MARKS[1] in text else ())):
        return True
    if any(
        pattern.search(text)
        for mark, pattern in zip(_MARKS[2:], (_AGE_KEY, _WIREGUARD_KEY), strict=True)
        if mark in text
    ):
        return True
    return any(map(_holds_body, _encoded_keys(text.translate(*_NO_BREAKS))))


def _holds_body(key: re.Match[bytes]) -> bool:
    return len(set(key["body"])) >= _LEAST_SIGNS


def _encoded_keys(text: bytes) -> Iterator[re.Match[bytes]]:
    """The keys in base64, wherever in a longer encoded text they begin."""
    for mark, head in _ENCODED_MARKS.items():
        at = text.find(mark)
        while at >= 0:
            code = found[0] if (found := _ENCODED.match(text, at)) else b""
            yield from _PRIVATE_KEY.finditer(head + base64.b64decode(code[: len(code) // 4 * 4]))
            # What begins in the first half has been seen with enough of its body.
            at = text.find(mark, at + max(len(code) // 2, 1))


def matches(path: Path, patterns: Sequence[str]) -> bool:
    """Whether the path, or a folder that it lies in, matches."""
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
    """What git tracks of a folder; None: it is not in a repository. Nothing that the repository configures is run."""
    command = ["git", "-c", "core.fsmonitor=false", "-c", "core.hooksPath=/dev/null", "ls-files", "-z", "--cached"]
    quiet = {k: v for k, v in os.environ.items() if not k.startswith("GIT_")} | {"GIT_OPTIONAL_LOCKS": "0"}
    try:
        done = subprocess.run(command, cwd=folder, env=quiet, capture_output=True, timeout=GIT_S, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    if done.returncode:
        return None
    return {Path(os.fsdecode(name)) for name in done.stdout.split(b"\0") if name}
