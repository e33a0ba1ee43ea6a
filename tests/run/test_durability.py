"""What is on the disk is there whole: the calls that make it so come in their order, and one that fails half-way leaves no half."""

from __future__ import annotations

import errno
import hashlib
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fsspec
import pytest

from grpo_ray.data.decontaminate import write_jsonl
from grpo_ray.errors import DataError
from grpo_ray.files import write_whole
from grpo_ray.run.checkpoint_store import Store
from grpo_ray.run.manifest import FileSum, digest_of
from grpo_ray.run.rollout_log import distinct_refs, rollout_path, write_rollouts
from tests.batches import batch_of
from tests.run.test_replay import odd_groups

Call = tuple[str, str, int]
"""What, on which path, and how many bytes the file had then; of a rename its new path, and 0."""


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Call]:
    """Every fsync, rename and removal of this process, as it is called."""
    made: list[Call] = []
    fsync, replace, unlink = os.fsync, os.replace, os.unlink

    def noted_fsync(descriptor: int) -> None:
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        made.append(("fsync", path, 0 if os.path.isdir(path) else os.fstat(descriptor).st_size))
        fsync(descriptor)

    def noted_replace(source: Any, target: Any, **kwargs: Any) -> None:
        made.append(("rename", str(target), 0))
        replace(source, target, **kwargs)

    def noted_unlink(path: Any, **kwargs: Any) -> None:
        made.append(("unlink", str(path), 0))
        unlink(path, **kwargs)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "replace", noted_replace)
    monkeypatch.setattr(os, "rename", noted_replace)
    monkeypatch.setattr(os, "unlink", noted_unlink)
    return made


@contextmanager
def small_files(num_bytes: int) -> Iterator[None]:
    """Writes beyond so many bytes of a file fail, as on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_a_file_is_written_beside_its_place_synced_renamed_and_its_folder_synced(
    tmp_path: Path, calls: list[Call]
) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(b"before")
    write_whole(path, b"after!!")
    aside = str(tmp_path / "a.json.new")
    assert calls == [("fsync", aside, 7), ("rename", str(path), 0), ("fsync", str(tmp_path), 0)]
    assert path.read_bytes() == b"after!!"


def test_a_file_of_samples_and_one_of_rollouts_are_written_the_same_way(tmp_path: Path, calls: list[Call]) -> None:
    groups = odd_groups()
    path = write_rollouts(tmp_path, 8, groups, batch_of(groups, 7), distinct_refs(groups), run_seed=1)
    size = path.stat().st_size
    assert calls == [("fsync", f"{path}.new", size), ("rename", str(path), 0), ("fsync", str(tmp_path), 0)]
    calls.clear()
    write_jsonl(tmp_path / "clean.jsonl", [{"a": 1}])
    aside = str(tmp_path / "clean.jsonl.new")
    assert calls[:2] == [("fsync", aside, 9), ("rename", str(tmp_path / "clean.jsonl"), 0)]


def test_a_write_that_fails_half_way_leaves_what_was_there_and_nothing_else(tmp_path: Path) -> None:
    groups = odd_groups()
    whole, rollouts = tmp_path / "whole.json", rollout_path(tmp_path, 8)
    lines = tmp_path / "lines.jsonl"
    for path in (whole, rollouts, lines):
        path.write_bytes(b"before")
    before = names(tmp_path)
    with small_files(512):
        with pytest.raises(OSError, match="File too large"):
            write_whole(whole, b"x" * 2000)
        with pytest.raises(OSError, match="File too large"):
            write_rollouts(tmp_path, 8, groups, batch_of(groups, 7), distinct_refs(groups), run_seed=1)
        with pytest.raises(DataError, match=r"lines\.jsonl can't be written"):
            write_jsonl(lines, [{"a": "x" * 2000}])
    assert {path.read_bytes() for path in (whole, rollouts, lines)} == {b"before"}
    assert names(tmp_path) == before


def test_a_disk_that_takes_the_bytes_and_does_not_keep_them_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lost(descriptor: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    path = tmp_path / "a.json"
    path.write_bytes(b"before")
    monkeypatch.setattr(os, "fsync", lost)
    with pytest.raises(OSError, match="Input/output"):
        write_whole(path, b"after")
    assert (path.read_bytes(), names(tmp_path)) == (b"before", ["a.json"])


def save(store: Store, step: int, keep: int = 2) -> Path:
    """A checkpoint of two ranks, one with a folder of its own in its folder."""
    place = store.begin(step)
    sums: dict[str, FileSum] = {}
    for part, file in (("learner/rank-0", "weights"), ("learner/rank-1", "deep/er/weights"), ("loop", "loop.json")):
        with place.filling(part) as (folder, of_part):
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            (folder / file).write_bytes(b"x" * (100 + step))
        sums |= of_part
    return Path(store.commit(place, step, sums, keep=keep).url)


def test_every_file_and_folder_of_a_checkpoint_is_synced_before_its_name_is_there(
    tmp_path: Path, calls: list[Call]
) -> None:
    root = tmp_path / "checkpoints"
    store = Store(str(root))
    aside, final = root / ".step-000007.tmp", root / "step-000007"
    save(store, 7)
    renamed = calls.index(("rename", str(final), 0))
    synced = {path: (n, size) for n, (what, path, size) in enumerate(calls[:renamed]) if what == "fsync"}

    def order(path: Path) -> int:
        """Of the last time that it was synced."""
        return synced[str(aside / path.relative_to(final))][0]

    files = [p for p in final.rglob("*") if p.is_file()]
    assert len(files) == 4
    for file in files:
        assert synced[str(aside / file.relative_to(final))][1] == file.stat().st_size, f"{file} was synced whole"
        assert order(file) < order(file.parent), f"{file} is in its folder to stay"
    for folder in (p for p in final.rglob("*") if p.is_dir()):
        assert order(folder) < order(folder.parent), f"{folder} is in its own"
    manifest = final / "manifest.json"
    assert order(manifest) > max(order(file) for file in files if file != manifest), "the manifest comes last"
    assert order(final) == renamed - 1, "with what is in it"
    assert calls[renamed + 1 :] == [("fsync", str(root), 0)]


def test_an_old_checkpoint_is_removed_after_the_new_one_is_there_to_stay(tmp_path: Path, calls: list[Call]) -> None:
    store = Store(str(tmp_path))
    save(store, 1, keep=1)
    calls.clear()
    save(store, 2, keep=1)
    there = calls.index(("rename", str(tmp_path / "step-000002"), 0))
    assert calls[there + 1] == ("fsync", str(tmp_path), 0)
    assert calls[there + 2] == ("rename", str(tmp_path / ".step-000001.old.tmp"), 0)
    assert {what for what, *_ in calls[there + 3 :]} == {"unlink"}
    assert "unlink" not in {what for what, *_ in calls[:there]}


@pytest.mark.parametrize("after", range(4))
def test_a_removal_that_fails_half_way_leaves_no_half_a_checkpoint_and_is_finished_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    store = Store(str(tmp_path))
    save(store, 1, keep=1)
    unlink, removed = os.unlink, list[Any]()

    def breaks(path: Any, **kwargs: Any) -> None:
        if len(removed) == after:
            raise OSError(errno.EIO, "Input/output error")
        removed.append(path)
        unlink(path, **kwargs)

    monkeypatch.setattr(os, "unlink", breaks)
    save(store, 2, keep=1)
    assert len(removed) == after
    assert (store.steps(), store.first_wrong(2)) == ([2], None)
    assert names(tmp_path) == [".step-000001.old.tmp", "step-000002"]
    monkeypatch.setattr(os, "unlink", unlink)
    save(store, 3, keep=1)
    assert names(tmp_path) == ["step-000003"]


def test_of_a_checkpoint_in_an_object_store_the_manifest_goes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """A removal that is cut off leaves something without a manifest, which is no checkpoint."""
    from fsspec.implementations.memory import MemoryFileSystem

    filesystem = fsspec.filesystem("memory")
    url = "memory://durable/run"
    # One on either side of the manifest's name, for a store that removes them in order.
    for name in ("manifest.json", "learner/rank-0/weights", "loop/loop.json", "zero/weights"):
        filesystem.pipe_file(f"{url}/step-000001/{name}", b"x")
    store = Store(url)
    assert store.steps() == [1]
    seen: list[list[int]] = []
    one_by_one = MemoryFileSystem._rm

    def noted(self: MemoryFileSystem, path: str) -> None:
        one_by_one(self, path)
        seen.append(store.steps())

    monkeypatch.setattr(MemoryFileSystem, "_rm", noted)
    monkeypatch.setattr(MemoryFileSystem, "rm_file", noted)
    try:
        store._remove_remote(1)
        assert len(seen) >= 3
        assert seen == [[]] * len(seen), "it is none as soon as anything of it is gone"
        assert not filesystem.exists(f"{url}/step-000001/learner/rank-0/weights")
    finally:
        monkeypatch.undo()
        if filesystem.exists("memory://durable"):
            filesystem.rm("memory://durable", recursive=True)


def test_the_digest_of_a_folder_is_of_the_names_and_bytes_below_it(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    files = {"./a.json": b"{}", "./b/c.bin": bytes(range(256))}
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    lines = "".join(f"{hashlib.sha256(data).hexdigest()}  {name}\n" for name, data in files.items())
    assert digest_of(tmp_path) == hashlib.sha256(lines.encode()).hexdigest()
    assert digest_of(tmp_path / "b" / "c.bin") == hashlib.sha256(bytes(range(256))).hexdigest()
