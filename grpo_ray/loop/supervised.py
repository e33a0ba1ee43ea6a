"""Task adapters for the supervised trainer: demonstrations (SFT), pairs (DPO, reward models), labelled answers (reward models).

Each has a dataset, a collator and held-out metrics.

dataset -> Cursor -> examples -> batch -> learner;  before the first step `prepare`, then and at the end `measure`
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import safe_open
from safetensors.torch import save

from grpo_ray.config.supervised import DpoConfig, SftConfig
from grpo_ray.data.cursor import Cursor
from grpo_ray.data.preferences import Pair, PairDataset, PairSets, pair_batch
from grpo_ray.data.prompts import SftDataset
from grpo_ray.data.sources import Read, load_table
from grpo_ray.errors import ConfigError
from grpo_ray.files import write_whole
from grpo_ray.loop.sft_loop import sft_batch
from grpo_ray.loop.supervised_data import load_examples
from grpo_ray.types import TrainBatch

REFERENCE = "reference.safetensors"
PAIRS_AT_ONCE = 256
"""The number of pairs in one call of a pass without training."""


class Valuing(Protocol):
    """The part of a learner that evaluates samples without training."""

    async def values(self, batch: TrainBatch) -> list[float]:
        """[S]: the log-probability of each sample, or its score by a reward model."""
        ...


@dataclass
class Demonstrations:
    dataset: SftDataset
    measures = False

    def batch(self, step: int, examples: Sequence[Any]) -> TrainBatch:
        return sft_batch(step, examples)

    async def prepare(self, learner: Valuing, folder: Path, cursor: Cursor[Any], num_examples: int) -> None:
        pass

    async def measure(self, _learner: Valuing) -> dict[str, float]:
        return {}


@dataclass
class Preferences:
    """Preference pairs for a reward model, which reads answers to their end and scores them."""

    sets: PairSets

    @property
    def dataset(self) -> PairDataset:
        return self.sets.train

    @property
    def measures(self) -> bool:
        """Whether there are held-out pairs."""
        return bool(self.sets.eval)

    def batch(self, step: int, examples: Sequence[Pair]) -> TrainBatch:
        return pair_batch(step, examples, read_last=True)

    async def prepare(self, learner: Valuing, folder: Path, cursor: Cursor[Pair], num_examples: int) -> None:
        pass

    async def measure(self, learner: Valuing) -> dict[str, float]:
        """Held-out figures: how often, and by how much, the chosen answer is ahead."""
        out: dict[str, float] = {}
        for name, pairs in self.sets.eval.items():
            prefix = f"eval/{name}/" if name else "eval/"
            out |= {f"{prefix}{key}": value for key, value in (await self._held_out(learner, name, pairs)).items()}
        return out

    async def _held_out(self, learner: Valuing, _name: str, pairs: PairDataset) -> dict[str, float]:
        values = torch.tensor(await self._values(learner, list(pairs), read_last=True), dtype=torch.float64)
        return held_out(values, torch.tensor([pair.target for pair in pairs], dtype=torch.float64))

    async def _values(self, learner: Valuing, pairs: Sequence[Pair], *, read_last: bool) -> list[list[float]]:
        """The one or two values of each pair."""
        out: list[list[float]] = []
        for start in range(0, len(pairs), PAIRS_AT_ONCE):
            some = pairs[start : start + PAIRS_AT_ONCE]
            told = iter(await learner.values(pair_batch(1, some, read_last=read_last)))
            out += [[next(told) for _ in pair.answers] for pair in some]
        return out


@dataclass
class DirectPreferences(Preferences):
    """Preference pairs for DPO, which predicts answers and compares them with the log-probabilities before training."""

    references: dict[int, Sequence[float]] = field(default_factory=dict)
    """The index of each pair of `dataset` -> the reference's log-probabilities of its answers."""
    held_references: dict[str, torch.Tensor] = field(default_factory=dict)
    """The name of an evaluation set -> the reference's log-probabilities [P, 2]."""

    def batch(self, step: int, examples: Sequence[Pair]) -> TrainBatch:
        return pair_batch(step, examples, self.references)

    async def prepare(self, learner: Valuing, folder: Path, cursor: Cursor[Pair], num_examples: int) -> None:
        """Compute the log-probabilities of the reference, which is the learner before its first step, for the pairs that will be
        trained on and those held out. They are kept in the run's folder for a resumed run.

        Raises:
            ConfigError: those in the folder are of other pairs.
        """
        file = folder / REFERENCE
        places = sorted({cursor.next().index for _ in range(min(num_examples, len(cursor)))})
        if not file.is_file() or not self._read(file, places):
            await self._make(file, learner, places)
            self._read(file, places)

    def _read(self, file: Path, places: Sequence[int]) -> bool:
        """Read the references; returns whether all of these pairs are in the file."""
        with safe_open(file, "pt") as saved:
            if saved.metadata() != self._fingerprints:
                raise ConfigError(f"{file} is of other pairs than the run's: restore the data, or start another run")
            values = zip(saved.get_tensor("index").tolist(), saved.get_tensor("train").tolist(), strict=True)
            self.references = dict(values)
            self.held_references = {name: saved.get_tensor(f"eval/{name}") for name in self.sets.eval}
        return set(places) <= set(self.references)

    async def _make(self, file: Path, learner: Valuing, places: Sequence[int]) -> None:
        values = await self._values(learner, [self.dataset.item(i, 0) for i in places], read_last=False)
        tensors = {"index": torch.tensor(places), "train": torch.tensor(values, dtype=torch.float64)}
        for name, pairs in self.sets.eval.items():
            told = await self._values(learner, list(pairs), read_last=False)
            tensors[f"eval/{name}"] = torch.tensor(told, dtype=torch.float64)
        write_whole(file, save(tensors, metadata=self._fingerprints))

    @property
    def _fingerprints(self) -> dict[str, str]:
        return {"train": self.dataset.fingerprint} | {f"eval/{n}": s.fingerprint for n, s in self.sets.eval.items()}

    async def _held_out(self, learner: Valuing, name: str, pairs: PairDataset) -> dict[str, float]:
        values = torch.tensor(await self._values(learner, list(pairs), read_last=False), dtype=torch.float64)
        return held_out(values - self.held_references[name], torch.zeros(len(values)))


Task = Demonstrations | Preferences


def load_task(config: SftConfig, tokenizer: Any, read: Read = load_table) -> Task:
    """Read the data of a supervised run, see `load_examples`."""
    examples = load_examples(config, tokenizer, read)
    if isinstance(examples, SftDataset):
        return Demonstrations(examples)
    return (DirectPreferences if isinstance(config, DpoConfig) else Preferences)(examples)


def held_out(values: torch.Tensor, targets: torch.Tensor) -> dict[str, float]:
    """Figures of pairs [P, 2]: how often the first is ahead, and by how much; of labelled answers [P, 1]: how far they are from
    it."""
    if values.shape[1] == 1:
        score_P = values[:, 0]
        right = ((score_P > 0) == (targets > 0.5)).double().mean()
        return {"accuracy": right.item(), "error": (score_P - targets).abs().mean().item()}
    ahead_P = values[:, 0] - values[:, 1]
    return {"accuracy": (ahead_P > 0).double().mean().item(), "margin": ahead_P.mean().item()}
