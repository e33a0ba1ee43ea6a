"""A learner's states go to the host and come back: real DeepSpeed engines of every stage, dtype and kind of offloading."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from actors.learner import offload
from actors.learner.offload import HostMemory
from grpo_ray.config.model import TinyModelConfig
from grpo_ray.models.files.tiny import build_tiny_model
from tests.actors.learner.test_learner import make_config

pytestmark = [pytest.mark.timeout(300), pytest.mark.long]
PIECE_BYTES = 1 << 12
CASES: dict[str, tuple[str, int, dict[str, Any]]] = {
    "fp32-0": ("float32", 0, {}),
    "fp32-1": ("float32", 1, {}),
    "fp32-3": ("float32", 3, {}),
    "bf16-1": ("bfloat16", 1, {}),
    "bf16-2": ("bfloat16", 2, {}),
    "bf16-3": ("bfloat16", 3, {}),
    "bf16-1-optimizer": ("bfloat16", 1, {"offload_optimizer": True}),
    "bf16-2-optimizer": ("bfloat16", 2, {"offload_optimizer": True}),
    "bf16-3-optimizer": ("bfloat16", 3, {"offload_optimizer": True}),
    "bf16-3-params": ("bfloat16", 3, {"offload_optimizer": True, "offload_params": True}),
}


QUICK = ("bf16-1", "bf16-3-optimizer")
EACH = [pytest.param(case, marks=() if case in QUICK else pytest.mark.slow) for case in CASES]


@pytest.fixture(scope="module")
def observed(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, Any]]:
    """What the learner of a case did; those of the quick cases in one process, the others in another."""

    @cache
    def of_all(cases: tuple[str, ...]) -> dict[str, dict[str, Any]]:
        return observe(cases, tmp_path_factory.mktemp("offload"))

    return lambda case: of_all(QUICK if case in QUICK else tuple(c for c in CASES if c not in QUICK))[case]


def observe(cases: tuple[str, ...], folder: Path) -> dict[str, dict[str, Any]]:
    tiny = TinyModelConfig(hidden_size=64, num_layers=2, num_heads=2, num_kv_heads=1, vocab_size=512, context=64)
    build_tiny_model(folder, tiny)
    configs = {
        name: make_config(
            folder,
            ranks=1,
            stage=stage,
            model={"dtype": dtype},
            learner=options | {"learning_rate": 1e-2, "adam_eps": 1e-8},
            algorithm={"beta": 0.1},
        ).model_dump_json()
        for name, (dtype, stage, options) in ((case, CASES[case]) for case in cases)
    }
    env = os.environ | {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.actors.learner.offloaded", json.dumps(configs), str(folder)],
        env=env | {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    result: dict[str, dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return result


@pytest.mark.parametrize("case", EACH)
def test_states_that_went_to_the_host_and_back_change_no_bit(
    case: str, observed: Callable[[str], dict[str, Any]]
) -> None:
    seen = observed(case)
    assert seen["moved"], "the second step changes the weights"
    assert (seen["sent_weights_are_whole"], seen["back"], seen["same_step"]) == (True, True, True)
    assert seen["held_after"] == seen["held"]


@pytest.mark.parametrize("case", EACH)
def test_nothing_of_a_learner_is_left_on_the_device(case: str, observed: Callable[[str], dict[str, Any]]) -> None:
    seen = observed(case)
    assert seen["left"] < 0.01 * seen["held"]
    assert seen["held_with_weights"] < 1.01 * seen["weights"] + 0.01 * seen["held"]


def test_stage_1_in_bf16_is_the_optimizer_that_deepspeed_itself_does_not_move(
    observed: Callable[[str], dict[str, Any]],
) -> None:
    assert observed("bf16-1")["optimizer"] == "BF16_Optimizer"


def test_views_of_a_storage_are_right_again_and_zeros_and_large_tensors_come_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(offload, "PIECE_BYTES", PIECE_BYTES)
    memory = HostMemory(torch.device("cpu"))
    flat, zeros = torch.arange(100.0), torch.zeros(1000)
    large = torch.arange(PIECE_BYTES // 8 + 3)
    view, before, odd = flat[10:20], large.clone(), torch.ones(13, dtype=torch.uint8)
    memory.take([view, zeros, large, odd], keep=[odd[3:5]])
    assert memory.num_bytes == 400 + 4000 + large.nbytes
    assert [t.untyped_storage().nbytes() for t in (flat, zeros, large, odd)] == [0, 0, 0, 13]
    memory.take([view, odd])
    assert memory.num_bytes == 400 + 4000 + large.nbytes + 13
    memory.give_back()
    assert memory.num_bytes == 0
    assert view.tolist() == list(range(10, 20))
    assert flat.sum() == 4950
    assert torch.equal(large, before)
    assert not zeros.any()
    assert odd.tolist() == [1] * 13


def test_pinned_memory_is_kept_for_the_next_turn_and_no_piece_is_much_larger_than_what_it_holds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(offload, "PIECE_BYTES", PIECE_BYTES)
    memory = HostMemory(torch.device("cpu"))
    tensor = torch.arange(PIECE_BYTES // 8 + 5)
    memory.take([tensor])
    pieces = {p.data_ptr() for _, _, own in memory._away for p in own or ()}
    assert sum(len(p) for _, _, own in memory._away for p in own or ()) < 1.2 * tensor.element_size() * len(tensor)
    memory.give_back()
    tensor += 1
    memory.take([tensor])
    assert {p.data_ptr() for _, _, own in memory._away for p in own or ()} == pieces
    memory.give_back()
    assert tensor[-1] == len(tensor)
