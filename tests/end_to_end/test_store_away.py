"""A whole run whose checkpoints go to a server that speaks S3, which is away for a minute of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from grpo_ray.run.run_dir import RunDir
from tests.end_to_end.runs import LIMIT_S, end_all, finish, launch, metrics, run, train, write_recipe
from tests.s3 import S3, forget_clients

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3 * LIMIT_S)]
STEPS = 200


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[S3]:
    server = S3()
    server.start()
    for name, value in server.env.items():
        monkeypatch.setenv(name, value)
    server.make_bucket("bucket")
    forget_clients()
    yield server
    end_all()
    server.stop()


def until(true: Callable[[], bool], say: str) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not true():
        assert time.monotonic() < deadline, say
        time.sleep(0.1)


def steps(run_dir: Path) -> int:
    return len(metrics(run_dir)) if (run_dir / "metrics.jsonl").exists() else 0


def test_a_run_whose_store_is_away_for_a_minute_loses_nothing(s3: S3, tmp_path: Path) -> None:
    args, run_dir = train(
        write_recipe(tmp_path),
        "away",
        f"num_steps={STEPS}",
        "checkpoint.path=s3://bucket/runs",
        "checkpoint.every_steps=5",
    )
    store = RunDir(run_dir).with_checkpoints("s3://bucket/runs").store
    with (tmp_path / "out").open("w") as out:
        process = launch(*args, output=out)

        def told() -> str:
            return (tmp_path / "out").read_text()

        until(lambda: steps(run_dir) >= 12 and bool(store.steps()) and store.steps()[-1] > 0, "no checkpoint came")
        s3.stop()
        before = steps(run_dir)
        time.sleep(60)
        assert process.poll() is None, told()
        assert steps(run_dir) > before + 5, "training went on"
        s3.start()
        code, _ = finish(process)
    assert code == 0, told()
    assert [int(m["step"]) for m in metrics(run_dir)] == list(range(1, STEPS + 1))
    assert store.steps() == [STEPS - 5, STEPS] or store.steps()[-1] == STEPS
    assert RunDir(run_dir).with_checkpoints("s3://bucket/runs").latest_valid_step(print) == STEPS
    assert not (run_dir / "checkpoints").exists()
    text = told()
    assert "can't be sent" in text
    assert "answers again" in text
    assert "Traceback" not in text


def test_a_run_whose_store_stays_away_ends_with_one_message_and_goes_on_where_it_was(s3: S3, tmp_path: Path) -> None:
    overrides = [
        "num_steps=4000",
        "checkpoint.path=s3://bucket/runs",
        "checkpoint.every_steps=5",
        "deadlines.store_s=15",
    ]
    args, run_dir = train(write_recipe(tmp_path), "gone", *overrides)
    store = RunDir(run_dir).with_checkpoints("s3://bucket/runs").store
    process = launch(*args)
    until(lambda: steps(run_dir) >= 7 and bool(store.steps()), "no checkpoint came")
    s3.stop()
    code, output = finish(process)
    assert code == 1, output
    assert "Traceback" not in output
    assert "15 s (deadlines.store_s)" in output
    assert len(output.splitlines()) < 60
    last = steps(run_dir)
    s3.start()
    assert store.steps()[-1] < last
    config = run_dir / "config.yaml"
    config.write_text(config.read_text().replace("num_steps: 4000", f"num_steps: {last + 2}"))
    code, output = run("resume", str(run_dir))
    assert code == 0, output
    assert f"after step {last}" in output
    assert [int(m["step"]) for m in metrics(run_dir)] == list(range(1, last + 3))
    assert store.steps()[-1] == last + 2
    assert not (run_dir / "superseded").exists()


def test_a_start_without_the_bucket_or_without_keys_is_refused_in_one_line(s3: S3, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path)
    for command in ("train", "check"):
        code, output = run(command, str(recipe), f"dir={tmp_path}", "name=x", "checkpoint.path=s3://nowhere/runs")
        assert code == 1, output
        assert "bucket does not exist" in output
        assert len(output.splitlines()) < 4, output
    assert s3.buckets() == ["bucket"]
