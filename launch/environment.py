"""The effects of the environment on Ray, vLLM and torch, checked before they start: problems are fixed and reported, or else named.

Every command that starts or joins a cluster calls `prepare` before it imports Ray, and so does `check`.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import warnings
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path

from actors.caches import CACHES, use_private_caches
from actors.folders import LONGEST_FOLDER, PREFIX, make_short, too_long, unmakeable, unusable
from actors.private import TEMPORARY, make_private, use_private_temporary_files
from grpo_ray import json_text
from grpo_ray.errors import ConfigError, ResourceError
from grpo_ray.plain_terminal import say
from grpo_ray.secrets import is_secret_name
from launch import interrupts

SPILLING = "RAY_object_spilling_directory"
TOKEN, TOKEN_PATH = "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"
CERTIFICATES = ("RAY_TLS_SERVER_CERT", "RAY_TLS_SERVER_KEY", "RAY_TLS_CA_CERT")
WRITTEN = tuple(cache.variable for cache in CACHES)
"""The folders that libraries write to, and create when they are missing."""
HUBS = ("HF_HOME", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "TRANSFORMERS_CACHE")
"""The folders of models, which may well be read-only."""

_made: Path | None = None


def prepare() -> None:
    """Fix this process's environment, which its cluster inherits; report on stderr what was fixed.

    Raises:
        ConfigError: a library does not survive a variable; the message names it.
        ResourceError: no folder is suitable for temporary files.
    """
    for note in (*_temporary(), *_home(), *_caches(), *use_private_caches(), *_warnings()):
        say(f"note: {note}", error=True)
    check_variables()


def _own() -> Path:
    """This process's private folder, removed at its end."""
    global _made
    if _made is None:
        _made = make_short()
        if _made is None:
            raise ResourceError(
                "there is no place for temporary files: none of /tmp, /var/tmp, /dev/shm and XDG_RUNTIME_DIR can be written to; "
                "set TMPDIR to a folder on this machine that can, with a path of at most "
                f"{LONGEST_FOLDER} characters"
            )
        interrupts.at_end(partial(shutil.rmtree, _made, ignore_errors=True))
    return _made


def _temporary() -> list[str]:
    notes = []
    for name in TEMPORARY:
        folder = os.environ.get(name)
        if folder is None:
            continue
        reason = unusable(folder)
        if reason is None and not too_long(folder):
            continue
        own = str(_own())
        if reason is None:
            # There is room there, for all that is not a socket.
            os.environ.setdefault(SPILLING, str(make_private(Path(folder))))
            reason = (
                f"has {len(os.fsencode(folder))} characters, and the sockets of Ray and vLLM allow {LONGEST_FOLDER}"
            )
        notes.append(f"{name}={folder} {reason}: temporary files of this run are in {own}")
        os.environ[name] = own
    if "TMPDIR" not in os.environ and unusable("/tmp") is not None:
        # Ray looks nowhere else.
        os.environ["TMPDIR"] = str(_own())
        notes.append(f"/tmp {unusable('/tmp')}: temporary files of this run are in {_own()}")
    return notes + _closed()


def _closed() -> list[str]:
    """Keep temporary files, and what Ray spills, where no other user of the machine can read or change them."""
    notes = []
    wanted = os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp"
    folder = use_private_temporary_files()
    if folder.name != f"{PREFIX}{os.getuid()}" and str(folder) != wanted:
        interrupts.at_end(partial(shutil.rmtree, folder, ignore_errors=True))
        notes.append(f"another user holds {wanted}/{PREFIX}{os.getuid()}: temporary files of this run are in {folder}")
    spilled = os.environ.get(SPILLING)
    if spilled and os.path.isdir(spilled):
        os.environ[SPILLING] = str(make_private(Path(spilled)))
    return notes


def _home() -> list[str]:
    """Fix the home, where Ray keeps its token and libraries what they compile."""
    told = os.environ.get("HOME")
    if not told:
        try:
            told = os.environ["HOME"] = str(Path("~").expanduser())
        except RuntimeError:
            told = "~"
    reason = unusable(told)
    if reason is None:
        return []
    home = _own() / "home"
    home.mkdir(mode=0o700, exist_ok=True)
    for name, path in (
        ("HF_HOME", Path(told, ".cache", "huggingface")),
        (TOKEN_PATH, Path(told, ".ray", "auth_token")),
    ):
        # A file that can be read there still counts.
        if os.access(path, os.R_OK):
            os.environ.setdefault(name, str(path))
    os.environ["HOME"] = str(home)
    return [f"HOME={told} {reason}: what libraries keep there, Ray's token too, is in {home} until this command ends"]


def _caches() -> list[str]:
    notes = []
    for name in WRITTEN:
        folder = os.environ.get(name)
        if not folder:
            continue
        if (reason := unmakeable(folder)) is not None:
            os.environ[name] = str(_own() / name.lower())
            notes.append(f"{name}={folder} {reason}: {_own()} takes its place until this command ends")
    for name in HUBS:
        folder = os.environ.get(name)
        if folder and not os.access(folder, os.R_OK | os.X_OK) and (reason := unmakeable(folder)) is not None:
            os.environ[name] = str(_own() / name.lower())
            notes.append(f"{name}={folder} {reason}: {_own()} takes its place until this command ends")
    return notes


def _warnings() -> list[str]:
    """Fix the settings of warnings: every library warns of something, and none is written to be ended by it."""
    told = os.environ.get("PYTHONWARNINGS", "")
    if not any(part.strip().partition(":")[0].startswith("e") for part in told.split(",")):
        return []
    del os.environ["PYTHONWARNINGS"]
    warnings.resetwarnings()
    return [f"PYTHONWARNINGS={told} would end libraries by what they warn of: it is left out"]


class _Probe:
    """A group of variables, and the code that reads them at its import."""

    def __init__(self, names: str, code: str, harmless: Iterable[str] = ()) -> None:
        self.names = re.compile(names)
        self.code = code
        self.harmless = frozenset(harmless)

    def suspects(self) -> list[str]:
        """The variables that are set to values that may break a library."""
        return sorted(
            name
            for name, value in os.environ.items()
            if self.names.match(name) and name not in self.harmless and not _is_harmless(name, value)
        )


_ALONE = """
import importlib.util as util, os
def alone(package, file):
    spec = util.spec_from_file_location(file, os.path.join(os.path.dirname(util.find_spec(package).origin), file + ".py"))
    module = util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
"""
"""Code that imports one file of a library without the rest: what reads the environment takes no second, vLLM's import takes ten."""
_HUGGING_FACE = f"""{_ALONE}
alone("datasets", "config")
import huggingface_hub.constants, tqdm
"""
_VLLM = f"""{_ALONE}
envs = alone("vllm", "envs")
for name in envs.environment_variables:
    if name in os.environ:
        envs.environment_variables[name]()
"""
_PROBES = (
    _Probe(
        r"RAY_",
        "import ray",
        # Addresses and folders are checked by themselves; the others are names, and what Ray sets for the jobs that it starts.
        (
            *("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH", "RAY_TMPDIR", SPILLING),
            *("RAY_NAMESPACE", "RAY_IP", "RAY_CLUSTER_NAME", "RAY_CLUSTER_NAMESPACE", "RAY_NODE_TYPE_NAME"),
            *("RAY_DASHBOARD_ADDRESS", "RAY_CLOUD_INSTANCE_ID", "RAY_USAGE_STATS_EXTRA_TAGS", "RAY_OVERRIDE_RESOURCES"),
            "RAY_JOB_CONFIG_JSON_ENV_VAR",
        ),
    ),
    _Probe(r"VLLM_", _VLLM, ("VLLM_CACHE_ROOT", "VLLM_CONFIG_ROOT")),
    _Probe(r"(TORCH|PYTORCH|ATEN_|OMP_|KMP_|MKL_|GOMP_|DNNL_|ONEDNN_)", "import torch; torch.ones(2).sum()", WRITTEN),
    _Probe(
        r"(HF_|HUGGINGFACE_|TRANSFORMERS_|DATASETS_|TQDM_|USE_(TORCH|TF)|ARROW_)",
        _HUGGING_FACE,
        (*HUBS, *WRITTEN, "HF_HUB_OFFLINE", "HF_ENDPOINT", "TRANSFORMERS_OFFLINE", "HF_HUB_ENABLE_HF_TRANSFER"),
    ),
)
PROBE_S = 20.0
"""The time limit of one import, on a busy machine."""
PATIENT_S = 60.0
LATE = f"not imported within {PROBE_S:g} s"
TRIES = 12
"""The number of extra children that search for the culprit among several variables."""


def _is_harmless(name: str, value: str) -> bool:
    """Whether the value is harmless: integers are understood wherever numbers are; secrets are words."""
    return value.isascii() and (value.isdigit() or is_secret_name(name))


def check_variables() -> None:
    """Let a child try the imports that follow, where the environment holds something unusual for them.

    Raises:
        ConfigError: an import does not survive some variables, which the message names.
    """
    _check_json("RAY_JOB_CONFIG_JSON_ENV_VAR", "RAY_OVERRIDE_RESOURCES")
    if (mode := os.environ.get("RAY_AUTH_MODE", "token")) not in ("token", "disabled"):
        raise ConfigError(f"RAY_AUTH_MODE is {mode!r} in the environment; it is token or disabled")
    _check_files(mode)
    for probe in _PROBES:
        suspects = probe.suspects()
        if not suspects:
            continue
        error = _tried(probe.code, ())
        if error is None:
            continue
        culprits = [name for name in suspects if name in error]
        if not culprits:
            # Where it failed by itself, the proof that it works without them may take as long as a busy machine needs.
            patience_s = PROBE_S if error == LATE else PATIENT_S
            if _tried(probe.code, suspects, patience_s) is not None:
                # It fails for another reason, which its own message reports.
                continue
            culprits = _culprits(probe.code, suspects)
        told = ", ".join(f"{name}={os.environ[name]!r:.100}" for name in culprits)
        what = "a variable" if len(culprits) == 1 else "variables"
        raise ConfigError(
            f"{what} of the environment that the libraries do not survive: {told} ({error}); unset or correct "
            f"{'it' if len(culprits) == 1 else 'them'}"
        )


def _check_files(mode: str) -> None:
    """Raise ConfigError for a file that Ray would wait for, or exit without."""
    needed = [TOKEN_PATH] if mode == "token" and os.environ.get(TOKEN_PATH) and not os.environ.get(TOKEN) else []
    if os.environ.get("RAY_USE_TLS", "0").lower() in ("1", "true"):
        needed += CERTIFICATES
    for name in needed:
        path = os.environ.get(name)
        if not path:
            raise ConfigError(
                f"RAY_USE_TLS is set in the environment, and {name} is not: it names a file; or unset RAY_USE_TLS"
            )
        if not os.path.isfile(path) or not os.access(path, os.R_OK):
            raise ConfigError(f"{name} in the environment names no file that can be read: {path}; correct or unset it")


def blamed(text: str) -> str | None:
    """One sentence on the variables whose value an error quotes without their name; None: there are none."""
    names = [
        name
        for name, value in sorted(os.environ.items())
        if any(probe.names.match(name) for probe in _PROBES)
        and not is_secret_name(name)
        and name not in text
        and (value and repr(value) in text)
    ]
    if not names:
        return None
    told = ", ".join(f"{name}={os.environ[name]!r:.100}" for name in names)
    return f"the environment holds {told}: if that is the cause, unset or correct it"


def _check_json(*names: str) -> None:
    """Raise ConfigError for a variable that Ray would read as JSON, and can't."""
    for name in names:
        value = os.environ.get(name)
        if not value:
            continue
        try:
            read = json_text.read(value)
        except ValueError as e:
            raise ConfigError(f"{name} in the environment is no JSON ({e}): {value!r:.100}; unset it") from None
        if not isinstance(read, dict):
            raise ConfigError(f"{name} in the environment is no JSON object: {value!r:.100}; unset it")


def _culprits(code: str, suspects: Sequence[str]) -> list[str]:
    """The variables without which it works, as far as a few tries show."""
    if len(suspects) == 1 or len(suspects) > TRIES:
        return list(suspects)
    alone = [name for name in suspects if _tried(code, [s for s in suspects if s != name]) is not None]
    return alone or list(suspects)


def _tried(code: str, without: Sequence[str], limit_s: float = PROBE_S) -> str | None:
    """How this code fails in a process with this environment without some variables; None: it does not."""
    env = {k: v for k, v in os.environ.items() if k not in without}
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-c", code],
            env=env,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=limit_s,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return LATE
    if done.returncode == 0:
        return None
    lines = done.stderr.decode(errors="replace").strip().splitlines()
    if done.returncode < 0:
        return f"killed by {signal.Signals(-done.returncode).name}"
    return lines[-1][:200] if lines else f"exit code {done.returncode}"
