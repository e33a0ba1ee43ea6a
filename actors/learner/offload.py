"""A learner's states moved out of the device's memory and back, so that a rollout engine can have it.

What moves is storages, not tensors: a storage on the device shrinks to nothing and later grows to what it was. Whatever views
DeepSpeed has of it (a parameter is a part of a flat group, a gradient of a buffer) are right again without being told, under any
ZeRO stage and dtype. What DeepSpeed itself keeps in the host's memory is on no device and stays where it is.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

PIECE_BYTES = 256 << 20
"""The largest piece of pinned memory. PyTorch rounds each up to a power of two: one of 20 GiB would take 32."""
SHARD_NAMES = ("ds_tensor", "ds_secondary_tensor")
"""The attributes of a parameter under ZeRO-3 that hold this rank's part of it."""
_WALKED = ("deepspeed.", "torch.optim.")
"""The modules of classes whose attributes may hold a learner's states."""


class HostMemory:
    """The contents of a device's storages that are in the host's memory meanwhile, where they are pinned, and stay so from turn
    to turn: pinning takes longer than copying."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._away: list[tuple[torch.UntypedStorage, int, list[Tensor] | None]] = []
        """The storages that gave up their memory, with their size and their contents in pieces; no pieces: all zeros; None: they
        come back with any contents."""
        self._free: dict[int, list[Tensor]] = {}
        """The pieces that hold nothing, by their size."""

    def take(self, tensors: Iterable[Tensor], keep: Iterable[Tensor] = (), spent: Iterable[Tensor] = ()) -> None:
        """Move the contents of these tensors here, but for what shares its storage with one to `keep`; nobody reads the contents
        of what is `spent`."""
        kept, dropped = {_key(t) for t in keep}, {_key(t) for t in spent}
        storages = {_key(t): t.untyped_storage() for t in tensors if t.device.type == self._device.type}
        leaving = {k: s for k, s in storages.items() if k not in kept and s.nbytes() and s.resizable()}
        for key, storage in leaving.items():
            contents = None if key in dropped else self._copied(_bytes(storage))
            self._away.append((storage, storage.nbytes(), contents))
        self._synchronize()
        for storage in leaving.values():
            storage.resize_(0)
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def give_back(self) -> None:
        """Move everything back."""
        for storage, num_bytes, pieces in self._away:
            storage.resize_(num_bytes)
            whole = _bytes(storage)
            if pieces == []:
                whole.zero_()
            for part, piece in zip(whole.split(PIECE_BYTES), pieces or (), strict=bool(pieces)):
                part.copy_(piece[: len(part)], non_blocking=True)
        self._synchronize()
        for _, _, pieces in self._away:
            for piece in pieces or ():
                self._free.setdefault(len(piece), []).append(piece)
        self._away = []

    @property
    def num_bytes(self) -> int:
        """The bytes that the device is spared at present."""
        return sum(num_bytes for _, num_bytes, _ in self._away)

    def _copied(self, whole: Tensor) -> list[Tensor]:
        """Copies of a storage's contents; none if it is all zeros, as gradients are between two steps."""
        if not _any(whole):
            return []
        pieces = []
        for part in whole.split(PIECE_BYTES):
            pieces.append(piece := self._piece(len(part)))
            piece[: len(part)].copy_(part, non_blocking=True)
        return pieces

    def _piece(self, num_bytes: int) -> Tensor:
        size = 1 << (num_bytes - 1).bit_length()
        if free := self._free.get(size):
            return free.pop()
        return torch.empty(size, dtype=torch.uint8, pin_memory=self._device.type == "cuda")

    def _synchronize(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize()


def offload(memory: HostMemory, engines: Sequence[Any], models: Sequence[nn.Module], keep: Iterable[Tensor]) -> None:
    """Free a device of DeepSpeed's engines, and of models that are not trained, but for what to `keep`."""
    everything = chain(*map(states, engines), *map(weights, models))
    memory.take(everything, keep, chain.from_iterable(map(spent, engines)))


def weights(module: nn.Module) -> Iterator[Tensor]:
    """What a module computes with: parameters, this rank's parts of them under ZeRO-3, and buffers."""
    for param in module.parameters():
        yield param
        yield from (shard for name in SHARD_NAMES if isinstance(shard := getattr(param, name, None), Tensor))
    yield from module.buffers()


def states(engine: Any) -> Iterator[Tensor]:
    """Everything that a DeepSpeed engine has on the device: weights, gradients, and whatever its optimizer holds."""
    yield from weights(engine.module)
    yield from (p.grad for p in engine.module.parameters() if p.grad is not None)
    yield from _reached(engine.optimizer)


def spent(engine: Any) -> Iterator[Tensor]:
    """The buffers in which gradients were reduced, between two steps: with ZeRO-3 they are there all the time."""
    for bucket in getattr(engine.optimizer, "ipg_buckets", {}).values():
        if not bucket.elements and isinstance(bucket.buffer, Tensor):
            yield bucket.buffer


def _reached(root: Any) -> Iterator[Tensor]:
    """The tensors in the attributes of an optimizer, and in those of what it is made of."""
    seen, waiting = set(), [root]
    while waiting:
        value = waiting.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, dict):
            waiting += value.values()
        elif isinstance(value, list | tuple | set):
            waiting += value
        elif not isinstance(value, type | nn.Module) and type(value).__module__.startswith(_WALKED):
            waiting += getattr(value, "__dict__", {}).values()


def _key(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _bytes(storage: torch.UntypedStorage) -> Tensor:
    """[num_bytes] a view of a whole storage."""
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def _any(whole: Tensor) -> bool:
    """Whether any byte is not 0."""
    words = len(whole) // 8 * 8
    return bool(whole[:words].view(torch.int64).any() or whole[words:].any())
