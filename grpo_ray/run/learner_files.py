"""The learner's part of a checkpoint: a folder for every rank that wrote it, readable by any number of ranks.

learner/rank-0/state.json           the number of ranks and of steps, and the extents in the files beside it
               policy.safetensors   fp32 masters and Adam's moments; so critic.safetensors, where there is one
               reference.safetensors   a reference that follows the policy
               random.safetensors   the random state of this rank
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from grpo_ray.errors import CheckpointError
from grpo_ray.files import read_json
from grpo_ray.run.checkpoint_store import CheckpointLocation, Reading
from grpo_ray.run.fragments import Fragment, FragmentReader, write_fragments
from grpo_ray.run.manifest import FileSum

_STATE = "state.json"
_RANDOM = "random.safetensors"
MAX_RANKS = 1 << 20


@dataclass(frozen=True)
class HeldModel:
    """The part of one model that one rank writes."""

    fragments: Sequence[Fragment]
    num_steps: int = 0
    """The number of steps of its optimizer."""
    num_scheduled: int = 0
    """The number of steps of its learning rate schedule."""


def write_rank(
    place: CheckpointLocation,
    rank: int,
    num_ranks: int,
    models: Mapping[str, HeldModel],
    random_state: Mapping[str, Tensor],
    facts: Mapping[str, Any],
) -> dict[str, FileSum]:
    """Write one rank's folder. `facts` are what a learner that loads it must have in common with this one."""
    with place.filling(_folder(rank)) as (folder, sums):
        state: dict[str, Any] = {"num_ranks": num_ranks, "facts": dict(facts), "models": {}}
        for name, model in models.items():
            extents = write_fragments(model.fragments, folder / f"{name}.safetensors")
            state["models"][name] = {
                "num_steps": model.num_steps,
                "num_scheduled": model.num_scheduled,
                "extents": extents,
            }
        save_file(dict(random_state), folder / _RANDOM)
        (folder / _STATE).write_text(json.dumps(state))
    return sums


@dataclass(frozen=True)
class SavedLearner:
    """The learner state of all ranks in a checkpoint."""

    files: Reading
    states: list[dict[str, Any]]
    """The content of each rank's state.json."""

    @classmethod
    def open(cls, files: Reading) -> SavedLearner:
        """Open the state. Raises CheckpointError when the checkpoint holds no learner, or not all of its ranks."""
        first = _read_state(files, 0)
        return cls(files, [first, *(_read_state(files, rank) for rank in range(1, first["num_ranks"]))])

    @property
    def facts(self) -> dict[str, Any]:
        facts: dict[str, Any] = self.states[0]["facts"]
        return facts

    def num_steps(self, model: str) -> int:
        return int(self.states[0]["models"][model]["num_steps"])

    def num_scheduled(self, model: str) -> int:
        return int(self.states[0]["models"][model]["num_scheduled"])

    def has(self, model: str) -> bool:
        return model in self.states[0]["models"]

    def reader(self, model: str) -> FragmentReader:
        extents = [state["models"][model]["extents"] for state in self.states]
        return FragmentReader(extents, partial(self._path, f"{model}.safetensors"))

    def random_state(self, rank: int) -> dict[str, Tensor] | None:
        """The random state of a rank; None if there was no such rank."""
        return load_file(self._path(_RANDOM, rank)) if rank < len(self.states) else None

    def _path(self, name: str, rank: int) -> Path:
        return self.files.local(f"{_folder(rank)}/{name}")


def _folder(rank: int) -> str:
    return f"learner/rank-{rank}"


def _read_state(files: Reading, rank: int) -> dict[str, Any]:
    try:
        state: dict[str, Any] = read_json(files.local(f"{_folder(rank)}/{_STATE}"))
        _check_state(state)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, CheckpointError) as e:
        raise CheckpointError(f"{files.place.url} holds no learner checkpoint ({e})") from None
    return state


def _check_state(state: dict[str, Any]) -> None:
    """Check the state. Raises ValueError, KeyError, TypeError or AttributeError if `write_rank` has not written it."""
    if type(state["num_ranks"]) is not int or not 1 <= state["num_ranks"] <= MAX_RANKS:
        raise ValueError(f"num_ranks is {str(state['num_ranks'])[:40]!r}")
    state["facts"].items()
    for name, model in state["models"].items():
        if not name.isidentifier():
            raise ValueError(f"it names a model {name[:40]!r}")
        for start, numel in model["extents"].values():
            if type(start) is not int or type(numel) is not int or start < 0 or numel < 0:
                raise ValueError(f"it has elements {start!r:.20} and {numel!r:.20} of {name}")
