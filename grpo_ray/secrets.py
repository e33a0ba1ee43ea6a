"""Protection of keys and tokens: recipes cannot hold them, and a run's output does not show them.

A recipe becomes config.yaml, goes to trackers and shows in Ray's dashboard. It names a secret as `${NAME}`, and Ray fills in the
value where the worker starts.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import unquote

_NAMED = (
    "AUTH|AUTHORIZATION|(PASS|PASSWORD|PASSWD|PASSPHRASE|PWD|SECRET|CREDENTIAL|TOKEN)S?|API_?KEYS?|ACCOUNT_?KEY|ACCESS_?KEY(_ID)?|"
    "(PRIVATE|SECRET|SHARED|SIGNING|ENCRYPTION|MASTER|SERVICE|CLIENT)_?KEY|PAT|(CONNECTION|CONN)_?STR(ING)?|SAS(_URL)?|COOKIES?|JWT|"
    "BEARER|NETRC"
)
SECRET_NAME = re.compile(
    rf"((^|_)({_NAMED})|[A-Z0-9]_KEY|[A-Z0-9]{{2,}}(PASSWORD|PASSWD|PASSPHRASE|SECRET|TOKEN|APIKEY))$"
)
_SECRET_OPTION = re.compile(rf"((^|_)({_NAMED})|[A-Z0-9]{{2,}}(PASSWORD|PASSWD|PASSPHRASE|SECRET|APIKEY))$")
"""The name of a recipe's option for a secret: other keys belong to data sets."""
_ANY_TOKEN = re.compile(r"TOKENS?$")
_SURE_TOKEN = re.compile(
    r"(^|_)(API|ACCESS|AUTH|BEARER|BOT|REFRESH|SESSION|SECRET|SERVICE|PERSONAL|ADMIN|HF|HUB|GITHUB|GITLAB|SLACK|VAULT|WANDB)_?TOKENS?$"
)
"""Names of tokens that are certainly secrets; other tokens may be words of a text."""
_SUFFIX = re.compile(
    r"(?<!^PASS)_?(\d{1,4}|V\d|(?<=_)(OLD|NEW|PROD|PRODUCTION|DEV|TEST|STAGING|LIVE|BACKUP|PRIMARY|SECONDARY|MAIN|VALUE|[A-Z]))$"
)
"""The suffix of one of several secrets: api_key_1, token2, password_prod."""
_BESIDE = re.compile(
    r"^(USER|USER_?NAME|LOGIN|NAME|EMAIL|ACCOUNT|TYPE|KIND|METHOD|SCHEME|MODE|PROVIDER|PROFILE|HOST|PORT|URL|URI|ENDPOINT|REGION|"
    r"SCOPES?|AUDIENCE|ISSUER|(CLIENT_)?ID|PROJECT|DATABASE|BUCKET|FILE|PATH|ENV|VARIABLE|HEADER|PREFIX)$"
)
"""Keys beside a secret in a mapping whose name reveals it."""
_IDENTIFIER = re.compile(r"[A-Za-z]+(?:[_.-]+[A-Za-z]+|[_.-]*v?\d{1,3}(?![A-Za-z0-9]))*")
_NO_SECRETS = re.compile(
    r"^(OLD)?PWD$|^(PAD|EOS|BOS|UNK|SEP|CLS|MASK|STOP|START|END|BEGIN|SPECIAL|IMAGE|THINK|NEW|MAX|MIN|NUM|LAST|FIRST)(_[A-Z]+)*_TOKENS?$"
    r"|(^|_)(MAX|MIN|NUM|PER|STOP|COMPLETION|PROMPT|BATCH|NEW|OF)_TOKENS$|^PASS_?\d+$|(^|_)(PRIMARY|FOREIGN|SORT)_KEY$|^KEY$|^GPG_KEY$"
)
REFERENCE = re.compile(r"\$\{\w+\}")
TOKEN_BYTES = 32
MIN_LENGTH = 8
"""The least length of a secret; shorter values are taken for words: `true`, `token`."""
HIDDEN = "[hidden]"
_NO_VALUE = re.compile(
    r"|[01]|(?i:true|false|yes|no|on|off|none|null|default|auto)|[~.]?/[\w.-]+(?:/[\w.-]+)*\.\w{1,8}|~?/[\w.-]+(?:/[\w.-]+)+"
)
"""Values of a variable named like a secret that are none: a switch, or the path of a file."""
_WORDS = ("none", "default", "auto", "None", "True", "False", "null", "true", "false", HIDDEN)
_VALUE = re.compile(
    r"(?<![A-Za-z0-9])(?:sk|rk|pk)-[A-Za-z0-9_-]{16,}|(?<![A-Za-z0-9])(?:gh[oprsu]_[A-Za-z0-9]{20,}|github_pat_\w{20,}|glpat-[\w-]{16,})"
    r"|(?<![A-Za-z0-9])(?:AKIA|ASIA)[A-Z0-9]{16}(?![A-Za-z0-9])|(?<![A-Za-z0-9])hf_[A-Za-z0-9]{20,}"
    r"|(?<![A-Za-z0-9])xox[abeoprs]-[\w-]{10,}"
    r"|(?<![A-Za-z0-9])AIza[\w-]{30,}|(?<![A-Za-z0-9])(?:nvapi|gsk|npm|pypi|dckr_pat|wandb_v1)[-_][\w-]{24,}"
    r"|(?<![A-Za-z0-9])(?:sk|rk)_live_\w{16,}|(?<![A-Za-z0-9])(?:whsec_|shpat_|r8_|hvs\.|ya29\.|xai-|SG\.)[\w.-]{20,}"
    r"|(?i:\b(?:Bearer|Basic)\s+(?=[^\s\d]{0,200}\d)[\w.~+/=-]{16,})"
    r"|(?<![\w-])eyJ[\w-]{8,}+\.[\w-]{8,}+\.[\w-]*+"
    r"|-----BEGIN [A-Z ]{0,40}PRIVATE KEY(?: BLOCK)?-----(?:[^-]{0,20000}+-----END [A-Z ]{0,40}-----)?"
    r"|(?i:\b(?:AccountKey|SharedAccessKey|SharedAccessSignature)=[^;\s]{8,})"
)
"""Keys that are recognised by their form, wherever they are."""
_SCHEME = re.compile(r"^(?i:Bearer|Basic|Token|ApiKey)\s+")
"""The scheme of a header `Authorization`."""
_URL_USER = re.compile(
    r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]{0,30}+://)(?P<user>[^\s/?#@:]{0,200}+:(?!\d{1,5}(?:[/?#]|$))[^\s@\"']{1,500}+"
    r"(?:@[^\s@/\"']{1,200}(?=@))*)(?=@)"
)
_URL_LONE_USER = re.compile(
    r"(?<![A-Za-z0-9+.-])(?P<scheme>(?!(?:abfs|wasb)s?:)[A-Za-z][A-Za-z0-9+.-]{0,30}+://)(?P<user>[^\s/?#@:]{20,500}+)(?=@)"
)
_QUERY = re.compile(r"(?P<name>[?&;#][\w.~%-]{1,64}=)(?P<value>[^&;#\s\"']{6,})")
_QUERY_NAMES = re.compile(r"(^|_)(KEY|SIG|SIGNATURE|CODE)$")
_ASSIGNED = re.compile(
    r"(?<![\w.-])(?P<name>[A-Za-z][\w.-]{1,100}+)(?P<by>[\"']?\s{0,3}[=:]\s{0,3}[\"']?)(?P<value>[^\s,;(){}\[\]\"'&]{4,}|\$\{\w+\})"
)

_CONNECTION = re.compile(
    r"(?:[;\s]*+[A-Za-z][\w.-]{0,60}+(?: [A-Za-z][\w.-]{0,60}+)*+ ?= ?(?:\{[^}]*+\}|\"[^\"]*+\"|'[^']*+'|[^;\s]*+))++[;\s]*+"
)
"""A connection string of a database: nothing but `name=value`, between semicolons or spaces."""


def is_secret_name(variable: str) -> bool:
    """Whether this environment variable holds a secret, judged by its name."""
    return _is_named(variable, SECRET_NAME)


def _is_named(name: str, pattern: re.Pattern[str]) -> bool:
    """Whether the name matches, as one of several or alone."""
    upper = _upper(name)
    return any(_NO_SECRETS.search(n) is None and pattern.search(n) is not None for n in (upper, _SUFFIX.sub("", upper)))


def _upper(name: str) -> str:
    upper = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name)
    return re.sub(r"[^A-Za-z0-9]+", "_", upper).upper().strip("_")


def check_env(env: dict[str, str]) -> dict[str, str]:
    """An `env:` of a recipe, checked. Raises ValueError for a secret that is written out."""
    for name, value in env.items():
        if REFERENCE.fullmatch(value):
            continue
        if (is_secret_name(name) and not _NO_VALUE.fullmatch(value)) or holds_secret(value) or holds_secret(name):
            raise ValueError(
                f"env.{hide_forms(name)} looks like a secret, and a recipe is written to config.yaml and shown by trackers: set it "
                f"in the environment of Ray's nodes, and write {hide_forms(name)}: ${{{hide_forms(name)}}} here"
            )
    return env


def secrets_in(tree: Any, key: str = "", named: str = "") -> Iterator[str]:
    """The dotted keys of a recipe that hold a secret, judged by their names or values; `env` is left to `check_env`.

    Args:
        named: the nearest name above that reveals a secret.
    """
    match tree:
        case dict():
            for name, value in tree.items():
                inner = f"{key}.{name}".lstrip(".")
                if holds_secret(str(name)):
                    yield hide_forms(inner)
                elif name == "env" and isinstance(value, dict):
                    continue
                elif name == "columns" and isinstance(value, dict):
                    # The names of a data set's columns.
                    yield from secrets_in(list(value.values()), inner)
                else:
                    yield from secrets_in(value, inner, _telling(str(name), _name_beside(tree, str(name)), named))
        case list() | tuple():
            for i, value in enumerate(tree):
                option = str(tree[i - 1]) if i and str(tree[i - 1]).startswith("-") else ""
                yield from secrets_in(value, f"{key}.{i}", _telling(option, "", named))
        case _ if _names_secret(named, tree):
            yield key
        case str() if not REFERENCE.fullmatch(tree):
            if holds_secret(tree) or (
                tree.lstrip()[:1] in ("{", "[", "-") and _assigned(tree.lstrip(" -")) != tree.lstrip(" -")
            ):
                yield key


def _name_beside(pair: dict[Any, Any], name: str) -> str:
    """The name of a value given as `{name: NAME, value: VALUE}`."""
    return str(pair.get("name") or pair.get("key") or pair.get("header") or "") if name.lower() == "value" else ""


def _telling(name: str, beside: str, above: str) -> str:
    """The name that reveals a value as a secret: its own, that of its pair, or the one above."""
    for said in (name, beside):
        if _is_named(said, SECRET_NAME) or _upper(said) == "PWD":
            return said
    upper = _upper(name)
    return "" if _BESIDE.search(upper) or (upper != "KEY" and _NO_SECRETS.search(upper)) else above


def _names_secret(name: str, value: Any) -> bool:
    """Whether it is an option for a secret, and has a value."""
    given = str(value) if isinstance(value, str | int) and not isinstance(value, bool) else ""
    given = _SCHEME.sub("", given)
    if len(given) < 4 or REFERENCE.fullmatch(given) or any(c.isspace() or c in "<>|" for c in given) or given in _WORDS:
        return False
    if _upper(name) == "PWD":
        return not given.startswith(("/", "~", "."))
    if _is_named(name, _SECRET_OPTION):
        alone = _SUFFIX.sub("", _upper(name))
        return not _ANY_TOKEN.search(alone) or _SURE_TOKEN.search(alone) is not None or _is_random(given, 8)
    return is_secret_name(name) and _is_random(given, 16)


def _is_random(text: str, least: int) -> bool:
    """Whether the text is longer than that, of digits and letters, and not made of words."""
    mixed = any(map(str.isdigit, text)) and any(map(str.isalpha, text))
    return len(text) >= least and mixed and not _IDENTIFIER.fullmatch(text)


def holds_secret(text: str) -> bool:
    """Whether the text contains a key of a known form, a URL with a password, or one with a token among its parameters, or is a
    connection string with a password."""
    return hide_forms(text) != text or (_CONNECTION.fullmatch(text) is not None and _assigned(text) != text)


def hide_forms(text: str) -> str:
    """`text` without keys of known forms, and without users and tokens of URLs."""
    text = _VALUE.sub(HIDDEN, text)
    if "://" not in text:
        return text
    for pattern in (_URL_USER, _URL_LONE_USER):
        text = pattern.sub(lambda found: found["scheme"] + _unless_reference(found["user"]), text)
    return _QUERY.sub(_hide_parameter, text)


def _unless_reference(user: str) -> str:
    return user if REFERENCE.search(user) else HIDDEN


def _hide_parameter(found: re.Match[str]) -> str:
    name = unquote(found["name"])[1:-1]
    named = is_secret_name(name) or _is_named(name, _QUERY_NAMES) or name.lower() == "key"
    return f"{found['name']}{HIDDEN}" if named and not REFERENCE.match(found["value"]) else found[0]


def _assigned(text: str) -> str:
    """`text` without the values assigned to names of secrets: `password=..`, `api_key: ..`."""

    def hide(found: re.Match[str]) -> str:
        name, value = found["name"].rpartition(".")[2], found["value"]
        if value.startswith("${") or not _names_secret(name, value):
            return found[0]
        return f"{found['name']}{found['by']}{HIDDEN}"

    return _ASSIGNED.sub(hide, text)


def resolve(env: Mapping[str, str], node: Mapping[str, str]) -> dict[str, str]:
    """Values of `${NAME}` on this node, '' where it has none. Ray does the same for the processes that it starts itself."""
    return {k: node.get(v[2:-1], "") if REFERENCE.fullmatch(v) else v for k, v in env.items()}


def secret_values(env: Mapping[str, str]) -> list[str]:
    """The secrets that must not be shown: those of this environment, and Ray's token. The longest first."""
    values = {value for name, value in env.items() if is_secret_name(name) and not value.startswith(("/", "~"))}
    with contextlib.suppress(OSError, ValueError):
        values.add(token_path(env).read_text().strip())
    return sorted((v for v in values if len(v) >= MIN_LENGTH), key=len, reverse=True)


def hide_secrets(text: str, env: Mapping[str, str] = os.environ) -> str:
    """`text` without secrets, for messages and tracebacks that leave a worker or go to a terminal."""
    for value in secret_values(env):
        text = text.replace(value, HIDDEN)
    return _assigned(hide_forms(text))


def make_token(env: Mapping[str, str]) -> None:
    """Create Ray's token so that nobody else can read it at any moment: Ray's own would be readable by all until it is configured
    otherwise. An existing one is kept.
    """
    if env.get("RAY_AUTH_TOKEN"):
        return
    path = token_path(env)
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    if not path.is_file() or not path.stat().st_size:
        _write_once(path, secrets.token_hex(TOKEN_BYTES))
    if path.stat().st_uid == os.getuid():
        path.chmod(0o600)


def _write_once(path: Path, text: str) -> None:
    """Write a file at once, readable by this user alone; the file of another process that was first is kept."""
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
    """The path at which Ray keeps the token of a cluster; `RAY_AUTH_TOKEN` may hold it too."""
    return Path(env.get("RAY_AUTH_TOKEN_PATH") or Path(env.get("HOME") or Path.home(), ".ray", "auth_token"))
