"""Kill a save at each of its changes to the file system, one after the other; see tests/run/test_checkpoint_kills.py.

    LD_PRELOAD=kill_at.so python -m tests.kills FOLDER WHERE     prints one JSON line

Every save, and every look at what is left, is in a process of its own, forked from this one, which only imports (also
what others would import later, each process again).
"""

from __future__ import annotations

import asyncio
import ctypes
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import fsspec.implementations.local  # noqa: F401
import numpy as np
import pandas  # noqa: F401
import pyarrow.dataset  # noqa: F401
import torch

from grpo_ray.run.checkpoint_store import CheckpointLocation, is_url
from grpo_ray.run.fragments import Fragment, even_part
from grpo_ray.run.kept_groups import read_groups, write_groups
from grpo_ray.run.learner_files import HeldModel, SavedLearner, write_rank
from grpo_ray.run.manifest import FileSum
from grpo_ray.run.run_dir import RunDir
from grpo_ray.run.saver import Saver
from grpo_ray.types import Group, Prompt, Sample, SampleInfo, Score, ScoreStatus, VersionSpan

NUMEL, RANKS = 5000, 2
LIMIT_S = 30


def weights(step: int) -> torch.Tensor:
    return torch.arange(NUMEL, dtype=torch.float32) + step


class Learner:
    """Two ranks of one parameter, and an export."""

    step = 0

    async def hold(self, place: CheckpointLocation, *, export: bool) -> None:
        pass

    async def write(self, place: CheckpointLocation) -> dict[str, FileSum]:
        return await asyncio.to_thread(self._write, place)

    def _write(self, place: CheckpointLocation) -> dict[str, FileSum]:
        out: dict[str, FileSum] = {}
        for rank in range(RANKS):
            start, numel = even_part(NUMEL, rank, RANKS)
            part = Fragment("weight", start, {"master": weights(self.step)[start : start + numel].clone()})
            out |= write_rank(place, rank, RANKS, {"policy": HeldModel([part])}, {"torch": torch.zeros(3)}, {})
        with place.filling("hf") as (folder, sums):
            (folder / "config.json").write_text(str(self.step))
        return out | sums


def save(run: RunDir, step: int) -> None:
    learner = Learner()
    learner.step = step
    saver = Saver(run, learner, keep=2, emit=lambda event: None)

    async def groups() -> Callable[[Path], None]:
        ids = np.arange(step, dtype=np.int32)
        sample = Sample(f"p/0/{step}", 0, ids, ids, ids.astype(np.float32), (VersionSpan(0, 0, step),), "stop", "x")
        info = SampleInfo(sample.prompt_id, 0, step, step, 0, "stop", "w", [sample], 0)
        group = Group(Prompt(sample.prompt_id, [], "", None, {}), step, 0, [info], [Score(ScoreStatus.OK, 1.0)])
        return lambda folder: write_groups(folder / "groups.parquet", [group], [[sample]])

    async def work() -> None:
        await saver.save(step, {"step": step}, export=True, more=groups)
        await saver.deliver()

    asyncio.run(work())


def what_is_left(run: RunDir) -> int:
    """The step that a resumed run would go on from, everything in it read."""
    step = run.latest_valid_step(lambda text: None)
    assert step is not None
    assert run.load_state(step) == {"step": step}
    with run.place(step).reading() as files:
        reader = SavedLearner.open(files).reader("policy")
        assert torch.equal(reader.read("weight", "master", 0, NUMEL), weights(step))
        assert files.local("hf/config.json").read_text() == str(step)
        (group,) = read_groups(files.local("loop/groups.parquet"))
        assert group.samples[0].token_ids.tolist() == list(range(step))
    if run.exported.is_symlink() and run.exported.is_dir():
        assert (run.exported / "config.json").read_text() in ("2", "3", "4")
    return step


def in_child(work: Callable[[], int | None]) -> tuple[bool, int]:
    """(was it killed, what it returned), of a forked process."""
    pid = os.fork()
    if pid == 0:
        signal.alarm(LIMIT_S)
        code = 255
        try:
            code = work() or 0
        finally:
            os._exit(code)
    _, status = os.waitpid(pid, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL, f"signal {os.WTERMSIG(status)}"
        return True, -1
    assert os.WEXITSTATUS(status) != 255, "see the traceback above"
    return False, os.WEXITSTATUS(status)


def main(folder: Path, where: str) -> None:
    torch.set_num_threads(1)
    library = ctypes.CDLL(os.environ["LD_PRELOAD"])
    template = folder / "template"

    def run_in(name: str) -> RunDir:
        (folder / name).mkdir(exist_ok=True)
        path = folder / name / "run"
        path.mkdir(exist_ok=True)
        return RunDir(path, where.format(folder / name) or None)

    for step in (1, 2):
        in_child(lambda step=step: save(run_in("template"), step))  # type: ignore[misc]
    left: list[int] = []
    for n in range(1, 1000):
        shutil.copytree(template, folder / "now", symlinks=True)
        run = run_in("now")

        def killed(n: int = n, run: RunDir = run) -> None:
            library.kill_at(ctypes.c_long(n))
            save(run, 3)
            library.kill_at(ctypes.c_long(0))

        was_killed, _ = in_child(killed)

        def resumed(run: RunDir = run) -> int:
            """What the killed save has left is in nobody's way."""
            step = what_is_left(run)
            save(run, 4)
            assert what_is_left(run) == 4
            return step

        left.append(in_child(resumed)[1])
        root = Path(run.store.url.removeprefix("file://"))
        # Nothing is left but checkpoints, and one whose manifest was torn, set aside.
        assert all(list(p.glob("manifest.*json")) for p in root.iterdir()), sorted(root.iterdir())
        shutil.rmtree(folder / "now")
        if not was_killed:
            break
    print(json.dumps({"left": left, "url": is_url(where)}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
