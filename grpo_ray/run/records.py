"""Records of a run's steps, and how they are kept when the run resumes from an earlier step: nothing is overwritten.

    runs/NAME/superseded/1/     records that the first such restart superseded; 2/ the second, ..
        metrics.jsonl           lines of the steps after the one that it resumed from
        rollouts/               their files
        ledger.jsonl            their groups, one a line
        trace.json              their events

The folder is written under another name, then renamed, and only then are the records in the run's folder cut: if it is killed at
any moment, each record is in one of the two places, or in both.
"""

from __future__ import annotations

import filecmp
import json
import os
import shutil
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path

from grpo_ray.errors import CheckpointError
from grpo_ray.files import ASIDE, sync_folder, write_whole
from grpo_ray.run.checkpoint_store import sync_tree
from grpo_ray.run.ledger import Ledger, last_trained
from grpo_ray.run.rollout_log import rollout_steps
from grpo_ray.run.run_dir import RunDir
from grpo_ray.telemetry.trace_file import read_trace, step_of, write_trace
from grpo_ray.telemetry.tracking import lines_after, read_metrics


def step_to_resume(run: RunDir, tell: Callable[[str], None]) -> int | None:
    """The step to resume from, as `RunDir.latest_valid_step`; None if nothing has been recorded yet, so that it may start anew.

    Raises:
        CheckpointError: steps are recorded and there is no complete checkpoint.
    """
    step = run.latest_valid_step(tell)
    if step is None and (recorded := last_step(run)) > 0:
        raise CheckpointError(
            f"{run.path} can't go on: it has recorded {recorded} step{'s' * (recorded > 1)}, and there is no checkpoint in "
            f"{run.store.url}. Mount that folder or put the checkpoints back there (checkpoint.path in {run.config} says where "
            f"they are), or begin another run with the same settings, `grpo-ray train {run.config} name=...`. Nothing was changed"
        )
    return step


def last_step(run: RunDir) -> int:
    """The latest recorded step; 0 if there is none."""
    found = [line["step"] for line in read_metrics(run.metrics)] + list(rollout_steps(run.rollouts))
    if run.ledger.is_file():
        found.append(last_trained(run.ledger))
    return max(found, default=0)


def set_aside(run: RunDir, step: int | None) -> Path | None:
    """Keep the records of the steps after `step`, before they are removed.

    Args:
        step: the step of the checkpoint that the run resumes from. None: it starts anew.

    Returns:
        The folder that has them now; None if there were none.
    """
    root = run.superseded
    numbers = [int(p.name) for p in root.glob("*") if p.name.isdecimal()]
    newest = root / str(max(numbers, default=0))
    new = root / f"{max(numbers, default=0) + 1}{ASIDE}"
    shutil.rmtree(new, ignore_errors=True)
    after = -1 if step is None else step
    try:
        for name, lines in (("metrics.jsonl", lines_after(run.metrics, after)), ("ledger.jsonl", _rows(run, step))):
            _write_lines(new / name, lines, newest / name)
        _link(new / "rollouts", [p for n, p in rollout_steps(run.rollouts).items() if n > after], newest / "rollouts")
        if new.is_dir():
            _keep_events(new / "trace.json", run.trace, after)
            sync_tree(new)
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise
    if not new.is_dir():
        return None
    kept = new.with_suffix("")
    new.rename(kept)
    sync_folder(root)
    return kept


def _rows(run: RunDir, step: int | None) -> list[bytes]:
    """Rows of groups that were trained or dropped after `step`, except those that the checkpoint restores."""
    if not run.ledger.is_file():
        return []
    given_back = set() if step is None else {row["dispatch_order"] for row in run.load_state(step).get("dropped", [])}
    ledger = Ledger(run.ledger)
    rows = [row for row in ledger.after(step or 0) if row.dispatch_order not in given_back]
    ledger.close()
    return [json.dumps(asdict(row)).encode() + b"\n" for row in rows]


def _write_lines(path: Path, lines: Iterable[bytes], before: Path) -> None:
    """Write the lines except those in `before`, where an earlier restart kept them before it was killed, without cutting them
    off."""
    kept = set(before.read_bytes().splitlines(keepends=True)) if before.is_file() else set()
    if new := [line for line in lines if line not in kept]:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, b"".join(new))


def _link(folder: Path, files: Iterable[Path], before: Path) -> None:
    """Hard-link the files under another name; copies where a disk does not support that."""
    for file in files:
        if (before / file.name).is_file() and filecmp.cmp(file, before / file.name, shallow=False):
            continue
        folder.mkdir(parents=True, exist_ok=True)
        try:
            os.link(file, folder / file.name)
        except OSError:
            shutil.copyfile(file, folder / file.name)


def _keep_events(path: Path, trace: Path, after: int) -> None:
    """Keep the events of later steps, and the names of the workers."""
    events = list(read_trace(trace))
    if any(step_of(event) > after for event in events):
        write_trace(path, [e for e in events if step_of(e) > after or e["ph"] == "M"])
