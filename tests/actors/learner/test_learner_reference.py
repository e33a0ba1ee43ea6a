"""The reference that follows the policy, in one process without DeepSpeed: nothing is sharded."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from actors.learner import reference as learner_reference
from grpo_ray.errors import CheckpointError
from grpo_ray.run.checkpoint_store import CheckpointLocation
from grpo_ray.run.fragments import FragmentReader
from grpo_ray.run.learner_files import SavedLearner, write_rank


class Model(nn.Module):
    """Two layers with one weight, as an embedding and the output layer that is tied to it."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        embed, norm, head = nn.Linear(3, 4, bias=False), nn.LayerNorm(4), nn.Linear(3, 4, bias=False)
        head.weight = embed.weight
        nn.init.normal_(norm.weight)
        self.hf = nn.ModuleDict({"embed": embed, "norm": norm, "head": head})


@pytest.fixture
def one_rank(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("tau", [1.0, 0.25])
def test_the_reference_moves_by_tau_towards_the_policy(tau: float) -> None:
    policy, reference, before = Model(0), Model(1), Model(1)
    reference.requires_grad_(False)
    learner_reference.follow(reference, policy, tau)
    for name, value in reference.named_parameters():
        start, end = before.get_parameter(name), policy.get_parameter(name)
        torch.testing.assert_close(value, start + tau * (end - start))
        assert not value.requires_grad
        assert tau < 1 or torch.equal(value, end)


@pytest.mark.usefixtures("one_rank")
def test_it_is_saved_and_loaded_bitwise(tmp_path: Path) -> None:
    saved, other = Model(2), Model(3)
    write_rank(CheckpointLocation(str(tmp_path / "x")), 0, 1, {"reference": learner_reference.hold(saved)}, {}, {})
    with CheckpointLocation(str(tmp_path / "x")).reading() as files:
        learner_reference.load(other, SavedLearner.open(files).reader("reference"))
    assert all(torch.equal(a, b) for a, b in zip(saved.parameters(), other.parameters(), strict=True))


@pytest.mark.usefixtures("one_rank")
def test_one_of_another_model_is_refused(tmp_path: Path) -> None:
    held = learner_reference.hold(Model(2))
    extents = {f.name: (f.start, f.numel - 1) for f in held.fragments}
    with pytest.raises(CheckpointError, match=r"embed\.weight of the reference has 12 elements here and 11"):
        learner_reference.load(Model(0), FragmentReader([extents], lambda _: tmp_path))
