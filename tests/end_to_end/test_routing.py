"""A whole run of a mixture of experts in bf16 whose learner takes the experts that the engines took."""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as pq
import pytest

from grpo_ray.config.model import TinyModelConfig
from grpo_ray.models.files.tiny import make_tokenizer
from tests.bench.routing import write_model
from tests.end_to_end.runs import LIMIT_S, NUM_STEPS, metrics, run, train, write_recipe

pytestmark = [pytest.mark.timeout(3 * LIMIT_S), pytest.mark.slow]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_recipe(tmp_path_factory.mktemp("recipe"))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Qwen3-MoE with a tiny model's tokens."""
    folder = tmp_path_factory.mktemp("moe")
    make_tokenizer(TinyModelConfig()).save_pretrained(folder)
    write_model("qwen3_moe", str(folder), "bfloat16")
    return folder


def overrides(model: Path, *, keeps: bool) -> list[str]:
    return [
        "model.tiny=null",
        f"model.path={model}",
        "model.dtype=bfloat16",
        f"rollout.keep_routing={str(keeps).lower()}",
        "learner.router_aux_loss_coef=0.01",
        "algorithm.max_staleness=1",
    ]


def test_a_run_that_keeps_routes_has_less_mismatch_and_is_replayed(recipe: Path, model: Path) -> None:
    found = {}
    for keeps in (False, True):
        args, folder = train(recipe, f"keeps-{keeps}", *overrides(model, keeps=keeps))
        code, output = run(*args)
        assert code == 0, output
        found[keeps] = metrics(folder)
    own, kept = ([m["mismatch/kl"] for m in found[keeps]] for keeps in (False, True))
    assert len(kept) == NUM_STEPS
    assert sum(kept) < sum(own) / 3
    assert all(m["loss/router"] > 0.01 * 4 * 0.9 and m["router/load_max"] > 1 for m in found[True])
    assert "routes" in pq.read_schema(folder / "rollouts" / "step-000001.parquet").names
    code, output = run("replay", str(folder), "--step", "1")
    assert code == 0, output
