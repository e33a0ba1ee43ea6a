"""An engine and a learner that share one GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.end_to_end.runs import metrics, run, train, write_recipe

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def test_a_run_on_one_shared_gpu_ends_and_samples_agree_with_the_learner(tmp_path: Path) -> None:
    args, run_dir = train(
        write_recipe(tmp_path), "colocated", "cluster.placement=colocated", "rollout.gpu_memory_utilization=0.5"
    )
    code, output = run(*args)
    assert code == 0, output
    assert max(m["mismatch/mean_abs"] for m in metrics(run_dir)) < 0.01
