"""An iterator over a data set that is seeded, endless, and resumed exactly."""

from __future__ import annotations

from typing import Any, Generic, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from grpo_ray.errors import DataError

T_co = TypeVar("T_co", covariant=True)


class Indexed(Protocol[T_co]):
    """A data set that a cursor iterates over."""

    @property
    def fingerprint(self) -> str: ...
    def __len__(self) -> int: ...
    def item(self, index: int, epoch: int) -> T_co: ...


class Cursor(Generic[T_co]):
    """Iterator that yields every item once per epoch, epoch after epoch, each epoch in its own seeded order.

    The order of an epoch sorts the items by words of PCG64's raw stream, which NumPy keeps stable over versions and
    platforms (its `permutation` is not).
    """

    def __init__(self, dataset: Indexed[T_co], *, seed: int, shuffle: bool = True) -> None:
        self._dataset = dataset
        self._seed = seed
        self._shuffle = shuffle
        self.epoch = 0
        self.position = 0
        """The number of items taken in this epoch."""
        self._order = self._order_of(0)

    def __len__(self) -> int:
        """The number of items of one epoch."""
        return len(self._dataset)

    @property
    def num_taken(self) -> int:
        """The number of items taken since the start of the run."""
        return self.epoch * len(self._dataset) + self.position

    def next(self) -> T_co:
        """The next item; its id contains the epoch."""
        if self.position == len(self._dataset):
            self.epoch += 1
            self.position = 0
            self._order = self._order_of(self.epoch)
        index = int(self._order[self.position])
        self.position += 1
        return self._dataset.item(index, self.epoch)

    def state_dict(self) -> dict[str, Any]:
        """The position as a small JSON-ready dict."""
        return {
            "epoch": self.epoch,
            "position": self.position,
            "seed": self._seed,
            "shuffle": self._shuffle,
            "size": len(self._dataset),
            "fingerprint": self._dataset.fingerprint,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue exactly where `state` was taken.

        Raises:
            DataError: the data, their seed or their order are not those of the saved run.
        """
        mine = self.state_dict()
        differs = [k for k in ("seed", "shuffle", "size", "fingerprint") if state[k] != mine[k]]
        if differs:
            found = "; ".join(f"{k} was {state[k]}, is {mine[k]}" for k in differs)
            raise DataError(
                f"the training data are not those of the saved run ({found}): resuming would skip or repeat prompts. "
                "Restore the data, data.* and seed as they were, or start a new run from the exported model"
            )
        self.epoch = int(state["epoch"])
        self.position = int(state["position"])
        self._order = self._order_of(self.epoch)

    def _order_of(self, epoch: int) -> NDArray[np.int64]:
        if not self._shuffle:
            return np.arange(len(self._dataset), dtype=np.int64)
        words = np.random.PCG64(np.random.SeedSequence([self._seed % (1 << 64), epoch])).random_raw(len(self._dataset))
        return np.argsort(words, kind="stable").astype(np.int64)
