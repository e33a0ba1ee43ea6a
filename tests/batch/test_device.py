"""Arrays of a micro-batch on their device, and losses that make no tensor on the host."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from grpo_ray.algorithm.objectives import GrpoObjective
from grpo_ray.batch.device import on_device
from tests.naive_losses import make_batch
from tests.packed import algorithm, micro_batch


class FromHost(TorchDispatchMode):
    """Counts the tensors that are made of Python numbers: on a GPU the host waits for the copy of each."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten.lift_fresh.default
        return func(*args, **kwargs or {})


def test_an_array_becomes_a_tensor_of_the_same_memory_on_a_cpu() -> None:
    array = np.arange(5, dtype=np.int32)
    tensor = on_device(array, torch.device("cpu"))
    assert tensor.data_ptr() == array.ctypes.data
    assert tensor.tolist() == [0, 1, 2, 3, 4]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_an_array_is_copied_to_a_gpu_whole() -> None:
    array = np.arange(1 << 20, dtype=np.int64)
    assert torch.equal(on_device(array, torch.device("cuda")).cpu(), torch.from_numpy(array))


@pytest.mark.parametrize("loss", ["grpo", "sapo", "cispo"])
def test_a_loss_copies_no_number_to_its_device(loss: str) -> None:
    batch = make_batch(1)
    members = list(range(len(batch.lengths)))
    objective = GrpoObjective(algorithm(loss, importance_sampling="token_truncate", beta=0.1))
    data = micro_batch(batch, members, objective, with_ref=True)
    theta, entropy = (torch.cat([rows[i] for i in members]) for rows in (batch.theta, batch.entropy))
    with FromHost() as made:
        torch.zeros(1).new_tensor(3.0)
        assert made.count == 1, "such a copy is seen"
        objective.loss(data, theta, entropy)
    assert made.count == 1
