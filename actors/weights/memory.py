"""Memory that processes of one machine share.

It has no name in any file system, so nothing has to be cleaned up: it is freed with the last process that maps it, however
they end, and a small /dev/shm is no limit. Others open it through /proc while its creator offers it.
"""

from __future__ import annotations

import mmap
import os
import uuid
import warnings
from typing import TypedDict

import torch
from torch import Tensor

_MAPPED_NOW = mmap.MAP_SHARED | mmap.MAP_POPULATE
"""The flags that map all pages at once: one by one, at the first touch, they cost more than the copy."""


class Address(TypedDict):
    path: str
    name: str
    """A name that no other memory in the world has: a process that finds it at `path` is on the creator's machine."""
    num_bytes: int


class SharedMemory:
    """Memory whose `bytes` is uint8 [num_bytes], aligned to a page.

    Raises:
        OSError: there is not enough memory. All of it is reserved here: a writer to memory that is not gets a SIGBUS.
    """

    def __init__(self, num_bytes: int) -> None:
        name = f"grpo-ray-weights-{uuid.uuid4().hex}"
        self._fd: int | None = os.memfd_create(name, os.MFD_CLOEXEC)
        try:
            os.posix_fallocate(self._fd, 0, num_bytes)
            mapped = mmap.mmap(self._fd, num_bytes, flags=_MAPPED_NOW)
        except BaseException:
            self.withdraw()
            raise
        self.bytes = torch.frombuffer(mapped, dtype=torch.uint8)
        self.address = Address(path=f"/proc/{os.getpid()}/fd/{self._fd}", name=name, num_bytes=num_bytes)

    def withdraw(self) -> None:
        """Stop offering the memory: no process can open it any more, and those that have keep it."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None


def map_memory(address: Address) -> Tensor | None:
    """The memory at this address, to read from: uint8 [num_bytes]. None: it is another machine's, or out of reach."""
    try:
        if os.readlink(address["path"]) != f"/memfd:{address['name']} (deleted)":
            return None
        fd = os.open(address["path"], os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        mapped = mmap.mmap(fd, address["num_bytes"], flags=_MAPPED_NOW, prot=mmap.PROT_READ)
    finally:
        os.close(fd)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given buffer is not writable")
        return torch.frombuffer(mapped, dtype=torch.uint8)
