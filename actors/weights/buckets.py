"""The format of a transfer: weights cut into buckets by a plan that both ends compute, the digest that both ends compare, and the
seals that prove to the receiver that they are the sender's."""

from __future__ import annotations

import hmac
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from blake3 import blake3
from torch import Tensor
from vllm.distributed.weight_transfer.base import ParamMeta, WeightSource

_DIGEST = 8
_SEAL = 32
TRAILER = _DIGEST + 2 * _SEAL
"""The bytes at the end of each bucket: the running digest after its last tensor, the seal of that, and the seal of the whole
bucket."""
_ALIGN = 16
_MASK = (1 << 64) - 1
_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""The integer types by their bytes. Eight bytes are summed 24 times faster than four, which have to be widened first."""


class Digest:
    """A checksum of tensors in their order: their names, and the sum of each one's bit patterns read as integers.

    Sums run where the tensor lives and are fetched together, so that a GPU is not made to wait for every parameter.
    It detects corruption, loss and mix-ups; seals detect forgery.
    """

    def __init__(self) -> None:
        self._state = 0
        self._names: list[str] = []
        self._sums: list[Tensor] = []

    def add(self, name: str, tensor: Tensor) -> None:
        flat = tensor.detach().contiguous().view(-1)
        size = 8 if flat.nbytes % 8 == 0 and flat.data_ptr() % 8 == 0 else flat.element_size()
        self._names.append(name)
        self._sums.append(flat.view(_WORDS[size]).sum(dtype=torch.int64))

    def value(self) -> int:
        """The digest of everything added so far, in [0, 2**64)."""
        if self._sums:
            for name, total in zip(self._names, torch.stack(self._sums).tolist(), strict=True):
                self._state = (self._state * 1_000_003 + zlib.crc32(name.encode()) + total) & _MASK
            self._names.clear()
            self._sums.clear()
        return self._state

    def hex(self) -> str:
        return f"{self.value():016x}"


class DigestSource(WeightSource):
    """A source that digests what it hands out; `digest` is that of the pass in progress, or of the last one."""

    def __init__(self, inner: WeightSource) -> None:
        self.inner = inner
        self.digest = Digest()

    def metadata(self) -> list[ParamMeta]:
        metas: list[ParamMeta] = self.inner.metadata()
        return metas

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        self.digest = Digest()
        for name, tensor in self.inner:
            self.digest.add(name, tensor)
            yield name, tensor


@dataclass(frozen=True)
class Slot:
    """The slot of one parameter in its bucket."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    """The offset in the bucket, in bytes."""
    end: int

    def view(self, bucket: Tensor) -> Tensor:
        return bucket[self.start : self.end].view(self.dtype).view(self.shape)


@dataclass(frozen=True)
class Bucket:
    slots: tuple[Slot, ...]
    start: int
    """The offset in memory that holds all buckets one after the other, in bytes."""
    size: int
    """The size in bytes, trailer included."""

    @property
    def end(self) -> int:
        return self.start + self.size

    def __str__(self) -> str:
        return f"{self.slots[0].name} .. {self.slots[-1].name} ({self.size} bytes)"


def plan_buckets(metadata: Iterable[ParamMeta], bucket_bytes: int) -> list[Bucket]:
    """Cut the parameters into buckets of at most `bucket_bytes`, without the trailer. A larger parameter has a bucket alone."""
    plan: list[Bucket] = []
    slots: list[Slot] = []
    size = 0

    def close() -> None:
        plan.append(Bucket(tuple(slots), plan[-1].end if plan else 0, _aligned(size) + _aligned(TRAILER)))
        slots.clear()

    for meta in metadata:
        num_bytes = torch.Size(meta.shape).numel() * meta.dtype.itemsize
        if slots and size + num_bytes > bucket_bytes:
            close()
            size = 0
        slots.append(Slot(meta.name, meta.dtype, tuple(meta.shape), size, size + num_bytes))
        size = _aligned(size + num_bytes)
    if slots:
        close()
    return plan


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // _ALIGN) * _ALIGN


def set_digest(bucket: Tensor, digest: int) -> None:
    """Write the digest into the trailer."""
    bucket[-TRAILER : -2 * _SEAL] = _as_tensor(digest.to_bytes(_DIGEST, "little"))


def digest_in(bucket: Tensor) -> int:
    return int.from_bytes(bytes(bucket[-TRAILER : -2 * _SEAL].tolist()), "little")


class Sealer:
    """Makes and compares keyed hashes (BLAKE3) of one transfer's buckets: without the key one can neither change a bucket, nor
    send one that belongs to another position or an earlier transfer."""

    def __init__(self, key: bytes, transfer: int) -> None:
        self._key = key
        self._transfer = transfer

    def seal(self, bucket: Tensor, number: int, *, contents: bool) -> None:
        """Write the seals into the trailer, after the digest.

        Args:
            number: the number of the bucket in its transfer.
            contents: whether some receivers get the whole bucket, instead of reading it in the sender's memory.
        """
        bucket[-2 * _SEAL : -_SEAL] = _as_tensor(self._of(bucket[-TRAILER : -2 * _SEAL], number))
        if contents:
            bucket[-_SEAL:] = _as_tensor(self._of(bucket[:-_SEAL], number))

    def is_genuine(self, received: Tensor, number: int) -> bool:
        """Whether the seals of a whole bucket, or of a trailer alone, are right."""
        told = received[-2 * _SEAL : -_SEAL] if len(received) == TRAILER else received[-_SEAL:]
        covered = received[: -2 * _SEAL] if len(received) == TRAILER else received[:-_SEAL]
        return hmac.compare_digest(bytes(told.tolist()), self._of(covered, number))

    def _of(self, part: Tensor, number: int) -> bytes:
        place = f"{self._transfer}/{number}/{len(part)}:".encode()
        return blake3(place, key=self._key).update(part.numpy().data).digest()


def _as_tensor(data: bytes) -> Tensor:
    return torch.tensor(list(data), dtype=torch.uint8)
