"""Whole runs that meet trouble: bad rewards, a full disk, Ctrl-C. Each ends by itself and names the culprit."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from grpo_ray.telemetry.messages import read_messages
from tests.end_to_end.runs import LIMIT_S, NUM_STEPS, finish, launch, ledger, metrics, run, train, write_recipe

REWARDS = "tests.end_to_end.rewards."
SLOW = pytest.mark.slow
pytestmark = [pytest.mark.timeout(2 * LIMIT_S), pytest.mark.long]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_recipe(tmp_path_factory.mktemp("recipe"))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        pytest.param("raises", "raises: error: KeyError: 'no such column'", marks=SLOW),
        pytest.param("too_few", "returned 0 values, expected 4, one for each completion", marks=SLOW),
        pytest.param("nan", "returned nan, expected a finite number, or None", marks=SLOW),
        pytest.param("hangs", "hangs: timeout: ", marks=SLOW),
        pytest.param("exits", "exits: crashed: ", marks=SLOW),
    ],
)
def test_a_reward_function_that_always_fails_ends_the_run_by_its_name(recipe: Path, name: str, expected: str) -> None:
    args, run_dir = train(
        recipe, name, f"reward.functions=[{{name: {REWARDS}{name}}}]", "reward.timeout_s=1", "data.eval=null"
    )
    code, output = run(*args)
    assert code == 1, output
    assert expected in output.replace("\n", " ")
    assert "reward.on_failure.abort_above" in output
    assert "Traceback" not in output
    assert not (run_dir / "metrics.jsonl").exists() or not metrics(run_dir)


@SLOW
def test_what_a_reward_function_forks_is_gone_with_it(recipe: Path) -> None:
    args, _ = train(recipe, "forks", f"reward.functions=[{{name: {REWARDS}forks}}]", "num_steps=1")
    code, output = run(*args)
    assert code == 0, output
    left = [p for p in psutil.process_iter(["cmdline"]) if "actors.reward.child" in " ".join(p.info["cmdline"] or [])]
    assert left == []


@SLOW
def test_failed_scores_drop_their_groups_and_the_batch_is_filled_with_others(recipe: Path) -> None:
    args, run_dir = train(recipe, "some", f"reward.functions=[{{name: {REWARDS}fails_on_even_sums}}]", "num_steps=2")
    code, output = run(*args, "reward.on_failure.abort_above=1", "data.eval=null")
    assert code == 0, output
    states = [(row[2], row[4]) for row in ledger(run_dir)]
    assert [s for s in states if s[0] == "trained"] == [("trained", None)] * 8
    assert ("dropped", "reward_error") in states


@SLOW
def test_a_run_whose_reward_never_applies_says_why_everywhere_and_fails(recipe: Path) -> None:
    rows = [{"prompt": f"The capital of country {i}?", "answer": "Paris"} for i in range(20)]
    for name, part in (("words", rows[:16]), ("held-out", rows[16:])):
        (recipe.parent / f"{name}.jsonl").write_text("\n".join(map(json.dumps, part)))
    args, run_dir = train(
        recipe,
        "words",
        f"data.train={{path: {recipe.parent}/words.jsonl}}",
        f"data.eval={{path: {recipe.parent}/held-out.jsonl}}",
        "reward.functions=[{name: accuracy}]",
        "algorithm.max_steps_without_signal=2",
    )
    code, output = run(*args)
    assert code == 1, output
    why = "no reward applies to any of the 16 samples, so nothing is trained: accuracy can't read the right answers of column"
    told = " ".join(output.split())
    assert f"warning: step 1: {why}" in told
    assert "held-out accuracy none (0 samples, 4 not applicable)" in told
    assert "error: there was nothing to learn from in 2 steps in a row up to step 2" in told
    assert "max_staleness" not in told, "no advice on speed"
    assert [row[2:] for row in ledger(run_dir)] == [("trained", s, "not_applicable") for s in (1, 2) for _ in range(4)]
    assert [m["grad_norm"] for m in metrics(run_dir)] == [0, 0]
    assert [m.level for m in read_messages(run_dir)] == ["warning", "warning", "error"]
    assert why.replace("'", "&#39;") in (run_dir / "report.html").read_text()
    code, output = run("resume", str(run_dir))
    assert code == 1, output
    assert "2 steps in a row up to step 4" in output


@SLOW
@pytest.mark.parametrize("stage", [0, 2])
def test_steps_whose_samples_are_all_out_of_the_loss_are_passed_over(recipe: Path, stage: int) -> None:
    """They come in parts while others are sampled, each of them with an advantage."""
    rows = [{"prompt": f"{i}+1=", "answer": str(i + 1)} for i in range(20)]
    (recipe.parent / "short.jsonl").write_text("\n".join(map(json.dumps, rows)))
    args, run_dir = train(
        recipe,
        f"cut-{stage}",
        f"data={{train: {{path: {recipe.parent}/short.jsonl}}, template: raw, max_prompt_length: 10}}",
        "rollout.max_completion_length=6",
        "rollout.temperature=0.7",
        "algorithm.mask_truncated=true",
        "learner.micro_batch_tokens=24",
        f"learner.zero_stage={stage}",
        "num_steps=3",
    )
    code, output = run(*args)
    assert "ZeroDivisionError" not in output
    assert len(metrics(run_dir)) == 3, output
    trained = [m["tokens/trained"] for m in metrics(run_dir)]
    assert code == (0 if any(trained) else 1), output
    for line in metrics(run_dir):
        assert (line["grad_norm"] == 0) == (line["tokens/trained"] == 0)
    assert "truncated" in {row[4] for row in ledger(run_dir)}


@pytest.mark.skipif(
    subprocess.run(["unshare", "-rm", "true"], capture_output=True, check=False).returncode != 0,
    reason="needs user namespaces, to mount a small disk",
)
@SLOW
def test_a_full_disk_is_told_and_the_checkpoint_before_it_stands(recipe: Path) -> None:
    args, _ = train(recipe, "full", "checkpoint.every_steps=1", "checkpoint.keep=9", "num_steps=9")
    small = recipe.parent / "full"
    small.mkdir()
    script = (
        f'mount -t tmpfs -o size=7m none {small} && {{ timeout {LIMIT_S} $0 -m launch "$@"; code=$?; '
        f"cp -r {small} {recipe.parent}/seen; exit $code; }}"
    )
    code, output = run(*args, wrapper=["unshare", "-rm", "sh", "-c", script])
    seen = recipe.parent / "seen"
    assert code == 1, output
    assert "make room" in output or "No space left" in output, output
    assert "Traceback" not in output
    steps = sorted(p.name for p in (seen / "checkpoints").iterdir())
    assert len(steps) > 0
    assert steps == [f"step-{i:06d}" for i in range(len(steps))], "nothing half-written stays"
    shutil.rmtree(seen)


def test_ctrl_c_while_it_starts_leaves_the_name_free_and_no_process(recipe: Path) -> None:
    args, run_dir = train(recipe, "early")
    process = launch(*args)
    deadline = time.monotonic() + LIMIT_S
    while not (run_dir / "logs" / "rollout-0.log").exists():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.05)
    children = psutil.Process(process.pid).children(recursive=True)
    assert children
    os.killpg(process.pid, signal.SIGINT)
    code, output = finish(process)
    assert code == 130, output
    assert "Traceback" not in output
    assert [p.name for p in run_dir.iterdir()] == ["logs"]
    _, alive = psutil.wait_procs(children, timeout=60)
    assert alive == []


@SLOW
def test_a_second_ctrl_c_ends_at_once_and_the_run_resumes(recipe: Path) -> None:
    args, run_dir = train(recipe, "twice", "checkpoint.every_steps=1")
    process = launch(*args)
    deadline = time.monotonic() + LIMIT_S
    while not (run_dir / "metrics.jsonl").exists() or len(metrics(run_dir)) < 2:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    for _ in range(2):
        os.killpg(process.pid, signal.SIGINT)
        time.sleep(0.05)
    code, output = finish(process)
    assert code == 130, output
    code, output = run("resume", str(run_dir))
    assert code == 0, output
    assert [m["step"] for m in metrics(run_dir)] == list(range(1, NUM_STEPS + 1))
    assert [row[2] for row in ledger(run_dir)] == ["trained"] * 4 * NUM_STEPS


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["data.train={path: rows.jsonl, columns: {prompt: question}}"], "question"),
        (["data.train={path: torn.jsonl, columns: {prompt: prompt}}"], "line 17"),
    ],
)
@SLOW
def test_bad_data_ends_the_start(recipe: Path, overrides: list[str], expected: str) -> None:
    rows = ['{"prompt": "1+1", "answer": "2"}'] * 20
    (recipe.parent / "rows.jsonl").write_text("\n".join(rows))
    (recipe.parent / "torn.jsonl").write_text("\n".join([*rows[:16], rows[16][:-3], *rows[17:]]))
    overrides = [o.replace("path: ", f"path: {recipe.parent}/") for o in overrides]
    args, run_dir = train(recipe, "bad-data", *overrides)
    code, output = run(*args)
    assert code == 1, output
    assert expected in output
    assert "Traceback" not in output
    assert [p.name for p in run_dir.iterdir()] == ["logs"]
