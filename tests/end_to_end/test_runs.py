"""Whole runs through the command line, with the real Ray, vLLM and DeepSpeed, on a tiny model."""

from __future__ import annotations

import itertools
import json
import signal
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from tests.end_to_end.runs import LIMIT_S, NUM_STEPS, finish, launch, ledger, metrics, run, train, write_recipe
from tests.endpoints import vllm_server

pytestmark = pytest.mark.timeout(3 * LIMIT_S)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_recipe(tmp_path_factory.mktemp("recipe"))


@pytest.fixture(scope="module")
def whole_run(recipe: Path) -> Path:
    """One that is never stopped: one rollout actor, one learner, fp32."""
    args, run_dir = train(recipe, "whole")
    code, output = run(*args)
    assert code == 0, output
    return run_dir


def test_a_run_leaves_what_it_promises(whole_run: Path) -> None:
    names = {p.name for p in whole_run.iterdir()}
    assert {
        "config.yaml",
        "ledger.sqlite",
        "metrics.jsonl",
        "rollouts",
        "checkpoints",
        "report.html",
        "hf",
        "logs",
    } <= names
    assert [m["step"] for m in metrics(whole_run)] == list(range(1, NUM_STEPS + 1))
    assert len(list((whole_run / "rollouts").glob("*.parquet"))) == NUM_STEPS
    assert [row[2:4] for row in ledger(whole_run)] == [
        ("trained", s) for s in range(1, NUM_STEPS + 1) for _ in range(4)
    ]


def test_the_trace_tells_what_every_worker_did_in_every_step(whole_run: Path) -> None:
    events = json.loads((whole_run / "trace.json").read_text())
    names = {(e["pid"], e["tid"]): e["args"]["name"] for e in events if e["name"] == "thread_name"}
    assert set(names.values()) == {"controller", "steps", "rollout-0", "reward-0", "learner-0"}
    spans: dict[str, list[Any]] = {name: [] for name in names.values()}
    for e in (e for e in events if e["ph"] == "X"):
        spans[names[e["pid"], e["tid"]]].append(
            (e["name"], e["ts"] / 1e6, (e["ts"] + e["dur"]) / 1e6, e["args"]["step"])
        )
    for own in spans.values():
        assert all(a[2] <= b[1] for a, b in itertools.pairwise(sorted(own, key=lambda s: s[1])))
    assert [name for name, *_ in spans["steps"]] == [f"step {s}" for s in range(1, NUM_STEPS + 1)]
    quiet = {"paused", "hold", "save", "export"}
    paused = [b - a for name, a, b, _ in spans["rollout-0"] if name == "paused"]
    assert paused == pytest.approx([line["sync/pause_s"] for line in metrics(whole_run)], abs=5e-3)
    for line, (_, start, end, step) in zip(metrics(whole_run), spans["steps"], strict=True):
        assert end - start == pytest.approx(line["time/step"], abs=1e-5)
        within = {w: [s for s in own if s[3] == step and s[0] not in quiet] for w, own in spans.items()}
        assert {s[0] for s in within["learner-0"]} >= {"fetch", "forward_backward", "step", "weights"}
        assert all(start - 1e-3 <= a and b <= end + 1e-3 for _, a, b, _ in within["learner-0"])
        for role in ("rollout", "reward", "learner"):
            assert 0 < line[f"busy/{role}"] <= 1
            inside = sum(max(0.0, min(b, end) - max(a, start)) for _, a, b, _ in within[f"{role}-0"])
            assert line[f"busy/{role}"] * line["time/step"] == pytest.approx(inside, abs=2e-4)
        # Nobody samples while the learner learns, and the other way round.
        assert line["busy/rollout"] + line["busy/learner"] <= 1
        assert line["throughput/sampler_tokens_per_s"] > 0
        assert line["throughput/learner_tflops"] > 0
        assert "throughput/mfu" not in line
    assert "Who worked when" in (whole_run / "report.html").read_text()


def test_sampler_and_learner_agree_in_fp32(whole_run: Path) -> None:
    assert all(m["mismatch/mean_abs"] < 1e-5 for m in metrics(whole_run))


def test_the_exported_model_is_the_trained_one_in_plain_transformers(whole_run: Path) -> None:
    import pyarrow.parquet as pq
    import torch
    from transformers import AutoModelForCausalLM

    trained = AutoModelForCausalLM.from_pretrained(whole_run / "hf")
    start = AutoModelForCausalLM.from_pretrained(whole_run / "model")
    rows = pq.read_table(whole_run / "rollouts" / "step-000001.parquet").to_pylist()

    def logprobs(model: torch.nn.Module, row: dict[str, list[int]]) -> torch.Tensor:
        ids = torch.tensor([row["prompt_ids"] + row["completion_ids"]])
        with torch.no_grad():
            logits = model(ids).logits[0, len(row["prompt_ids"]) - 1 : -1]
        return logits.log_softmax(-1).gather(1, torch.tensor(row["completion_ids"])[:, None])[:, 0]

    recorded = torch.tensor(rows[0]["rollout_logprobs"])
    assert torch.allclose(logprobs(start, rows[0]), recorded, atol=2e-5)
    assert not torch.allclose(logprobs(trained, rows[0]), recorded, atol=1e-3)


@pytest.mark.slow
def test_vllm_serve_takes_the_exported_model_and_continues_as_transformers_does(whole_run: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    folder = str(whole_run / "hf")
    with vllm_server(whole_run / "hf", max_model_len=64) as url:
        prompt = [20, 30, 40, 50]
        body = {"model": folder, "prompt": prompt, "max_tokens": 8, "temperature": 0, "return_token_ids": True}
        request = urllib.request.Request(
            f"{url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            served = json.load(answer)["choices"][0]["token_ids"]
    model = AutoModelForCausalLM.from_pretrained(folder)
    expected = model.generate(torch.tensor([prompt]), max_new_tokens=8, do_sample=False)[0, 4:].tolist()
    assert served == expected


@pytest.mark.parametrize(
    "stop_after", [pytest.param(1, marks=pytest.mark.slow), 2, pytest.param(3, marks=pytest.mark.slow)]
)
@pytest.mark.long
def test_a_run_stopped_by_sigterm_and_resumed_equals_one_never_stopped(
    recipe: Path, whole_run: Path, stop_after: int
) -> None:
    args, run_dir = train(recipe, f"cut-{stop_after}")
    process = launch(*args)
    deadline = time.monotonic() + LIMIT_S
    while not (run_dir / "metrics.jsonl").exists() or len(metrics(run_dir)) < stop_after:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    code, output = finish(process)
    assert code == 143, output
    assert "grpo-ray resume" in output
    assert stop_after <= len(metrics(run_dir)) < NUM_STEPS
    code, output = run("resume", str(run_dir))
    assert code == 0, output
    assert_equal_runs(run_dir, whole_run)


@pytest.mark.slow
def test_a_finished_run_that_is_trained_longer_equals_one_that_was_so_long_from_the_start(
    recipe: Path, whole_run: Path
) -> None:
    args, run_dir = train(recipe, "longer", "num_steps=2")
    code, output = run(*args)
    assert code == 0, output
    assert len(metrics(run_dir)) == 2
    code, output = run("resume", str(run_dir), f"num_steps={NUM_STEPS}")
    assert code == 0, output
    assert f"num_steps: 2 -> {NUM_STEPS}" in output
    assert_equal_runs(run_dir, whole_run)


def assert_equal_runs(run_dir: Path, whole_run: Path) -> None:
    assert ledger(run_dir) == ledger(whole_run)
    for cut, never_cut in zip(metrics(run_dir), metrics(whole_run), strict=True):
        assert cut["loss/policy"] == pytest.approx(never_cut["loss/policy"], abs=1e-5)
        assert cut["reward/mean"] == never_cut["reward/mean"]
        assert cut["grad_norm"] == pytest.approx(never_cut["grad_norm"], rel=1e-5)


@pytest.mark.slow
def test_two_rollout_actors_and_two_zero_3_learners_learn_the_same(recipe: Path, whole_run: Path) -> None:
    overrides = ["rollout.num_actors=2", "learner.num_actors=2", "learner.zero_stage=3", "reward.num_actors=2"]
    args, run_dir = train(recipe, "wide", *overrides)
    code, output = run(*args)
    assert code == 0, output
    assert ledger(run_dir) == ledger(whole_run)
    for wide, narrow in zip(metrics(run_dir), metrics(whole_run), strict=True):
        assert wide["reward/mean"] == pytest.approx(narrow["reward/mean"], abs=1e-6)
        assert wide["grad_norm"] == pytest.approx(narrow["grad_norm"], rel=1e-3)
        assert wide["mismatch/mean_abs"] < 1e-5


@pytest.mark.slow
def test_a_run_that_samples_ahead_keeps_its_bound_and_trains_every_prompt_once(recipe: Path) -> None:
    args, run_dir = train(
        recipe, "ahead", "algorithm.max_staleness=2", "rollout.num_actors=2", "rollout.max_num_seqs=4"
    )
    code, output = run(*args)
    assert code == 0, output
    assert all(m["staleness/max"] <= 2 for m in metrics(run_dir))
    assert metrics(run_dir)[-1]["staleness/mean"] > 0
    assert [row[2:4] for row in ledger(run_dir)] == [("trained", s) for s in range(1, NUM_STEPS + 1) for _ in range(4)]
    # The first batch is sampled and trained by one version: there sampler and learner still agree.
    assert metrics(run_dir)[0]["mismatch/mean_abs"] < 1e-5
    assert 0.5 < metrics(run_dir)[-1]["correction/ess"] <= 1


@pytest.mark.slow
def test_samplers_and_learners_that_take_turns_train_as_those_apart(recipe: Path, whole_run: Path) -> None:
    """On CPUs nothing has to move, so what is seen here is the order of the turns and that a run ends with the same numbers."""
    args, run_dir = train(recipe, "colocated", "cluster.placement=colocated", "rollout.num_threads=1")
    code, output = run(*args)
    assert code == 0, output
    assert [m["reward/mean"] for m in metrics(run_dir)] == pytest.approx([m["reward/mean"] for m in metrics(whole_run)])
    assert [m["grad_norm"] for m in metrics(run_dir)] == pytest.approx(
        [m["grad_norm"] for m in metrics(whole_run)], rel=1e-3
    )
    assert ledger(run_dir) == ledger(whole_run)


@pytest.mark.slow
def test_a_sampler_that_leaves_tokens_out_and_the_learner_agree(recipe: Path) -> None:
    """V3.2's ratio is to the sampler's own report: full probabilities beside it would clip on-policy tokens."""
    cut = ["rollout.top_p=0.9", "rollout.top_k=20", "rollout.min_p=0.02", "rollout.temperature=0.7"]
    args, run_dir = train(
        recipe, "cut", *cut, "algorithm=v3_2", "algorithm.num_mini_batches=2", "learner.learning_rate=1e-6"
    )
    code, output = run(*args)
    assert code == 0, output
    for line in metrics(run_dir):
        assert line["mismatch/mean_abs"] < 1e-5
        assert line["clip/low"] == line["clip/high"] == 0
        assert line["correction/masked_sequences"] == 0
        assert line["ratio/mean"] == pytest.approx(1, abs=1e-3)
        assert abs(line["kl/ref"]) < 1e-4
        assert line["entropy"] < 3.0, "of 20 tokens at most"
