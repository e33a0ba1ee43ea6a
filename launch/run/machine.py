"""What a run needs of the machine that it is started on, checked before anything is started: packages, folders, variables."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from actors.cluster import joins
from grpo_ray.config.reward import KEY_VARIABLE
from grpo_ray.config.rollout import check_without_gpus
from grpo_ray.config.schema import RunConfig
from grpo_ray.config.supervised import SftConfig
from grpo_ray.errors import ConfigError, ResourceError, first_line
from grpo_ray.machine import total_memory
from grpo_ray.models.memory.kv_cache import check_gpu_shares, check_kv_cache
from grpo_ray.run.checkpoint_store import is_url
from grpo_ray.secrets import REFERENCE
from grpo_ray.telemetry.tracking import check_packages

_GIB = 1 << 30


def check_machine(config: RunConfig | SftConfig, *, on_other_gpus: bool = False) -> None:
    """Check that this machine has what the run needs.

    Args:
        on_other_gpus: it is planned for GPUs that this machine need not have.

    Raises:
        ConfigError: a package is not installed, or a folder can't be written to.
        ResourceError: a disk is full, or a cache is larger than memory.
    """
    check_folder(config.dir, "dir")
    if config.checkpoint.path is not None:
        check_checkpoint_path(config.checkpoint.path)
    if joins(config):
        # Only the nodes of a cluster know what they have.
        return
    check_packages(config.tracking)
    if isinstance(config, RunConfig):
        check_gpu_shares(config)
        if not on_other_gpus and not _asks_for_gpus(config):
            check_without_gpus(config.rollout)
            check_kv_cache(config.rollout, total_memory(), config.rollout.num_actors, weights_on_disk(config))


def check_folder(path: str, option: str, needed: int = 0) -> None:
    """Check that a folder can be written to and has room.

    Args:
        path: the folder, which exists or will be created.
        option: the option that names it.
        needed: the bytes that have to be free.

    Raises:
        ConfigError: the path is not a folder, or can't be written to.
        ResourceError: its disk has less room.
    """
    folder = Path(path).expanduser().absolute()
    there = next(p for p in (folder, *folder.parents) if p.exists() or p.is_symlink())
    if not there.is_dir():
        broken = there.is_symlink() and not there.exists()
        what = "a link to nothing" if broken else "a file"
        raise ConfigError(f"{option} {path}: {there} is {what}, and a folder is meant; name another folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ConfigError(
            f"{option} {path}: {there} can't be written to by this user; name another folder, {option}=.."
        )
    free = shutil.disk_usage(there).free
    if free < max(needed, 1 << 20):
        wanted = f", and a checkpoint takes about {needed / _GIB:.1f}" if needed else ""
        raise ResourceError(
            f"{option} {path}: its disk has {free / _GIB:.2f} GiB left{wanted}; make room, or name a folder elsewhere, {option}=.."
        )


def check_checkpoint_path(path: str) -> None:
    """Check `checkpoint.path`. Raises ConfigError: fsspec does not support this kind of URL, or the folder can't be written to."""
    if not is_url(path):
        check_folder(path, "checkpoint.path")
        return
    from fsspec.registry import get_filesystem_class

    scheme, _, bucket = path.partition("://")
    if not bucket.strip("/"):
        raise ConfigError(f"checkpoint.path {path} names no bucket; write {scheme}://BUCKET/FOLDER")
    try:
        get_filesystem_class(scheme)
    except (ImportError, ValueError) as e:
        raise ConfigError(
            f"checkpoint.path {path}: fsspec can't reach {scheme}:// here ({first_line(e)}); install its package, or use "
            "a folder"
        ) from None


def unset_variables(config: RunConfig | SftConfig) -> Iterator[str]:
    """A line for each environment variable that the recipe names and this machine does not have."""
    if joins(config):
        return
    envs = {"learner": config.learner.env}
    if isinstance(config, RunConfig):
        envs |= {"rollout": config.rollout.env, "reward": config.reward.env}
        envs |= {"environment": config.environment.env} if config.environment is not None else {}
    for role, env in envs.items():
        for name, value in env.items():
            if REFERENCE.fullmatch(value) and value[2:-1] not in os.environ:
                yield (
                    f"{role}.env.{name} takes {value}, and {value[2:-1]} is not set here: it will be empty; export it before the "
                    "start"
                )
    if config.tracking.wandb and not _knows_wandb():
        yield (
            "tracking.wandb finds no key (WANDB_API_KEY, or `wandb login`), so the run goes on without it; or set "
            "WANDB_MODE=offline"
        )
    if isinstance(config, RunConfig):
        judges = [f.title for f in config.reward.functions if f.name == "judge"]
        if judges and KEY_VARIABLE not in os.environ and KEY_VARIABLE not in config.reward.env:
            yield f"reward {judges[0]!r} asks its endpoint without a key: {KEY_VARIABLE} is not set here, nor in reward.env"


def _knows_wandb() -> bool:
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_MODE") in ("offline", "disabled"):
        return True
    netrc = Path(os.environ.get("NETRC") or Path.home() / ".netrc")
    try:
        return "wandb" in netrc.read_text()
    except (OSError, UnicodeDecodeError):
        return False


def _asks_for_gpus(config: RunConfig) -> bool:
    """Whether the config asks for GPUs, or takes them where there are some."""
    return bool(config.rollout.num_gpus) or (config.rollout.num_gpus is None and os.path.exists("/dev/nvidiactl"))


def weights_on_disk(config: RunConfig) -> int:
    """The bytes of the weights that an engine holds, as far as files here show."""
    folder = Path(config.model.path or "")
    if config.model.path is None or not folder.is_dir():
        return 0
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))
