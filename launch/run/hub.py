"""Names on the Hugging Face hub, before anything is started: is the hub within reach, or is what they name here already?

Without this, a machine without a network waits for half a minute of retries, in each process that loads something.
"""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from grpo_ray.config.data import DataSource
from grpo_ray.config.schema import RunConfig
from grpo_ray.config.supervised import SftConfig
from grpo_ray.errors import ConfigError

OFFLINE = "HF_HUB_OFFLINE"
ENDPOINT = "https://huggingface.co"
REACH_S = 3.0
PORTS = {"http": 80, "https": 443}


def check_hub(config: RunConfig | SftConfig) -> str | None:
    """Set `HF_HUB_OFFLINE` for this process and those that it starts where the hub is needed and out of reach: what was downloaded
    before is then used at once.

    Returns:
        The text to report; None: nothing.

    Raises:
        ConfigError: the model is neither here nor within reach.
    """
    model = config.model.path
    on_hub = [model] if model is not None and _is_name(model) else []
    named = [*on_hub, *(source.path for source in _sources(config) if _is_data_set(source))]
    if not named:
        return None
    why = why_away()
    if why is None:
        return None
    asked = _is_offline()
    _go_offline()
    if on_hub and not is_cached(on_hub[0]):
        raise ConfigError(
            f"model.path {on_hub[0]} is no folder here, it was not downloaded before, and the hub can't be asked: {why}. Give a "
            f"local folder, or download it where there is a network, bring ~/.cache/huggingface here and set {OFFLINE}=1"
        )
    return (
        None
        if asked
        else f"{why}: {OFFLINE}=1 from here on, so what was downloaded before is used for {', '.join(named)}"
    )


def why_away() -> str | None:
    """Why the hub is not asked here: it does not answer, or `HF_HUB_OFFLINE` is set; None: it answers."""
    return f"{OFFLINE} is set" if _is_offline() else unreachable(os.environ.get("HF_ENDPOINT") or ENDPOINT)


def _is_offline() -> bool:
    return os.environ.get(OFFLINE, "").lower() in ("1", "true", "yes", "on")


def unreachable(endpoint: str) -> str | None:
    """Why nothing answers there, or at the proxy on the way; None: something does."""
    parts = urlsplit(endpoint)
    proxy = getproxies().get(parts.scheme)
    if proxy and not proxy_bypass(parts.hostname or ""):
        parts = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
    where = (parts.hostname or "", parts.port or PORTS.get(parts.scheme, 443))
    try:
        socket.create_connection(where, timeout=REACH_S).close()
    except OSError as e:
        return f"{endpoint} is out of reach ({where[0]}:{where[1]}: {e.strerror or e})"
    return None


def _sources(config: RunConfig | SftConfig) -> list[DataSource]:
    return [config.data.train, *config.data.eval_sets.values()]


def _is_data_set(source: DataSource) -> bool:
    return not source.is_generator and not source.is_file and not Path(source.path).exists()


def _is_name(path: str) -> bool:
    return not Path(path).exists() and not path.startswith((".", "/", "~"))


def is_cached(model: str, file: str = "config.json") -> bool:
    """Whether a file of a model of the hub was downloaded before."""
    from huggingface_hub import try_to_load_from_cache

    return isinstance(try_to_load_from_cache(model, file), str)


def _go_offline() -> None:
    os.environ[OFFLINE] = "1"
    if (constants := sys.modules.get("huggingface_hub.constants")) is not None:
        # The library read it from the environment once, at its import.
        setattr(constants, OFFLINE, True)
