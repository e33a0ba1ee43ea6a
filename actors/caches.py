"""The folders where libraries keep what they compile or download and later execute: only those where no other user could have put
it."""

from __future__ import annotations

import os
from collections.abc import MutableMapping
from dataclasses import dataclass
from pathlib import Path

from actors.folders import unmakeable
from actors.private import private_folder, why_open

OURS = "~/.cache/grpo-ray"
"""The folder that replaces those that are open to other users."""


@dataclass(frozen=True)
class Cache:
    """A folder that a library writes to, creates when it is missing, and executes or unpickles files from."""

    variable: str
    default: str | None
    """The folder when the variable is unset; None: in the folder for temporary files, or beside the library itself."""
    inside: str = ""
    """The path that the library appends to the variable's value."""


CACHES = (
    Cache("XDG_CACHE_HOME", "~/.cache"),
    Cache("XDG_CONFIG_HOME", "~/.config"),
    Cache("VLLM_CACHE_ROOT", "$XDG_CACHE_HOME/vllm"),
    Cache("VLLM_CONFIG_ROOT", "$XDG_CONFIG_HOME/vllm"),
    Cache("TORCH_HOME", "$XDG_CACHE_HOME/torch"),
    Cache("TORCHINDUCTOR_CACHE_DIR", None),
    Cache("TORCH_EXTENSIONS_DIR", "$XDG_CACHE_HOME/torch_extensions"),
    Cache("PYTORCH_KERNEL_CACHE_PATH", "$XDG_CACHE_HOME/torch/kernels"),
    Cache("TRITON_HOME", "~", ".triton"),
    Cache("TRITON_CACHE_DIR", None),
    Cache("TRITON_DUMP_DIR", None),
    Cache("TRITON_OVERRIDE_DIR", None),
    Cache("NUMBA_CACHE_DIR", None),
    Cache("MPLCONFIGDIR", "$XDG_CONFIG_HOME/matplotlib"),
    Cache("CUDA_CACHE_PATH", "~/.nv/ComputeCache"),
    Cache("FLASHINFER_WORKSPACE_BASE", "~", ".cache/flashinfer"),
    Cache("DG_JIT_CACHE_DIR", "~/.deep_gemm"),
    Cache("TILELANG_CACHE_DIR", "~/.tilelang"),
    Cache("CUTE_DSL_CACHE_DIR", None),
    Cache("HF_MODULES_CACHE", "$HF_HOME/modules"),
    Cache("HF_DATASETS_CACHE", "$HF_HOME/datasets"),
    Cache("PYTHONPYCACHEPREFIX", None),
)
"""The caches, in an order in which each one's default is known."""
HOME_OF_HUB = "$XDG_CACHE_HOME/huggingface"


def use_private_caches(env: MutableMapping[str, str] = os.environ) -> list[str]:
    """Move the compiled code of this process, and of those that it starts, out of folders that other users could change.

    Returns:
        A line for each folder that is replaced.
    """
    notes = []
    places = {"HF_HOME": HOME_OF_HUB}
    for cache in CACHES:
        told = env.get(cache.variable)
        value = told or cache.default
        if value is None:
            continue
        folder = _filled(value, env, places)
        if (reason := why_open(Path(folder, cache.inside))) is None:
            places[cache.variable] = value
            continue
        own = str(own_cache(cache.variable.lower(), env))
        notes.append(f"{cache.variable}={folder} is not used, for {reason}: {own} takes its place")
        env[cache.variable] = own
    return notes


def own_cache(name: str, env: MutableMapping[str, str] = os.environ) -> Path:
    """A folder of this name that no other user can reach, created if missing: in the home, else among the temporary files."""
    home = env.get("HOME") or "~"
    ours = Path(OURS.replace("~", home, 1)).expanduser()
    if why_open(ours) is not None or unmakeable(str(ours)) is not None:
        ours = private_folder() / "caches"
    folder = ours / name
    # Closed, so that the umask under which libraries create files in it does not matter.
    ours.mkdir(mode=0o700, parents=True, exist_ok=True)
    ours.chmod(0o700)
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder


def _filled(value: str, env: MutableMapping[str, str], places: dict[str, str]) -> str:
    """The value with the variable at its beginning, and the home, filled in."""
    while value.startswith("$"):
        name, _, rest = value[1:].partition("/")
        value = f"{env.get(name) or places[name]}/{rest}"
    home = env.get("HOME")
    return value.replace("~", home, 1) if home and value.startswith("~") and value[1:2] in ("", "/") else value
