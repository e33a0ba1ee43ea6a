"""How a rollout engine leaves a transfer that broke in the middle: whoever waits inside NCCL for a process that is gone waits for
ever, and hears nothing that is said to it.

So the actor says it by a file in its own folder. Each of its vLLM workers has a thread to look for it while it receives, which ends
the communicator, and with it the waiting. While the group is being formed there is no communicator to end: there the worker looks,
and another thread waits in NCCL.
"""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

LOOK_S = 0.1
T = TypeVar("T")


class LeftError(RuntimeError):
    """The transfer was left before it was over."""


class Group:
    """A communicator that can be ended while another thread waits in it."""

    def __init__(self, communicator: Any) -> None:
        self._communicator = communicator
        self._ended = threading.Event()
        self.world_size: int = communicator.world_size

    @property
    def has_ended(self) -> bool:
        return self._ended.is_set()

    def broadcast(self, tensor: Tensor, src: int, stream: Any = None) -> None:
        if self.has_ended:
            raise LeftError("the weight transfer was ended")
        self._communicator.broadcast(tensor, src=src, stream=stream)

    def destroy(self) -> None:
        """End it: what is under way in it ends, and nothing begins any more. NCCL itself returns after 5 s at the latest."""
        if not self._ended.is_set():
            self._ended.set()
            self._communicator.destroy()


def beside(work: Callable[[], T]) -> Future[T]:
    """The result of `work` in a thread that this process does not wait for when it ends."""
    result: Future[T] = Future()

    def run() -> None:
        try:
            result.set_result(work())
        except BaseException as e:
            result.set_exception(e)

    threading.Thread(target=run, name="weights", daemon=True).start()
    return result


def leave_file() -> Path:
    """The file by which the actor of this process, or of the one that started it, says that a transfer is over. The folder is the
    actor's own; see `runtime.own_scratch`."""
    return Path(tempfile.gettempdir()) / "leave-weight-transfer"


@contextmanager
def told_to_leave() -> Iterator[None]:
    """Inside, the vLLM workers of this actor leave the transfer that they are in."""
    leave_file().touch()
    try:
        yield
    finally:
        leave_file().unlink(missing_ok=True)


def formed(form: Callable[[], T]) -> T:
    """What `form` returns, unless the actor says that this transfer is to be left: NCCL waits without end for a process that died
    before it joined, and has no communicator yet that could be ended. The thread that waits in it is left behind.

    Raises:
        LeftError: it was left.
    """
    forming = beside(form)
    while not wait([forming], LOOK_S).done:
        if leave_file().exists():
            raise LeftError("the weight transfer was left while its group was being formed")
    return forming.result()


@contextmanager
def until_left(end: Callable[[], None]) -> Iterator[None]:
    """Inside, `end` is called by another thread when the actor says that this transfer is to be left."""
    over = threading.Event()

    def look() -> None:
        while not over.wait(LOOK_S):
            if leave_file().exists():
                end()
                return

    thread = threading.Thread(target=look, name="leaving", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def forget_half_loaded(model: torch.nn.Module) -> None:
    """Drop what a transfer that was left has brought of layers that were not complete: the next one brings them whole, and vLLM
    would count both."""
    from vllm.model_executor.model_loader.reload.layerwise import LAYERWISE_INFO, LOADING_LAYERS

    for layer in model.modules():
        info = LAYERWISE_INFO.get(layer)
        if info is not None and info.can_load():
            info.loaded_weights.clear()
            info.load_numel = 0
    LOADING_LAYERS.clear()
