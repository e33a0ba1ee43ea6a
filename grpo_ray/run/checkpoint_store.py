"""Checkpoint stores: a folder, or an object store by fsspec. A checkpoint is complete when its manifest exists.

folder        written first as `.step-000040.tmp`, every file and folder synced, then renamed
object store  receives checkpoints that are complete in a folder, the manifest last; see delivery.py

store.begin(40) -> Place -> workers write its parts, each a folder of its own -> store.commit(place, sums)
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from grpo_ray.errors import CheckpointError, StoreError
from grpo_ray.files import open_inside, readable_as_asked, sync_folder
from grpo_ray.object_store import PATIENCE_S, ask, is_url, make_folder, reason
from grpo_ray.run import manifest
from grpo_ray.run.manifest import FileSum, Sums

__all__ = ["CheckpointLocation", "Reading", "Store", "is_url"]

T = TypeVar("T")
_STEP = re.compile("step-([0-9]{6,15})")
SET_ASIDE = "manifest.broken.json"
"""The name given to an invalid manifest: the files beside it are no checkpoint any more, and are kept for inspection."""


@dataclass(frozen=True)
class CheckpointLocation:
    """The folder of one checkpoint, being written or read; the same for every worker, wherever it runs."""

    url: str
    """A local path, or a URL that fsspec takes."""
    patience_s: float = PATIENCE_S
    """How long to retry while a store does not answer."""

    def path(self, name: str) -> str:
        return f"{self.url}/{name}"

    def read(self, name: str) -> bytes:
        """Read a file. Raises FileNotFoundError when it does not exist, OSError or StoreError when it cannot be read."""
        if is_url(self.url):
            data: bytes = self._ask("read", lambda fs: fs.cat_file(self.path(name)))
            return data
        with open_inside(Path(self.url), name) as file:
            return file.read()

    def sum(self, name: str) -> FileSum:
        """The size and checksum of a file, all bytes read. Raises as `read`."""

        def of_remote(fs: Any) -> FileSum:
            with fs.open(self.path(name), "rb") as file:
                return manifest.sum_of(file)

        if is_url(self.url):
            return self._ask("read", of_remote)
        with open_inside(Path(self.url), name) as file:
            return manifest.sum_of(file)

    def size(self, name: str) -> int:
        """The size of a local file, without reading it. Raises as `read`."""
        with open_inside(Path(self.url), name) as file:
            return os.fstat(file.fileno()).st_size

    def _ask(self, what: str, call: Callable[[Any], T]) -> T:
        return ask(self.url, what, call, patience_s=self.patience_s)

    @contextmanager
    def filling(self, part: str) -> Iterator[tuple[Path, dict[str, FileSum]]]:
        """A folder to write to, in a local place. On exit everything in it is synced to disk, and the dictionary lists its files.

        Args:
            part: the path inside the checkpoint; nobody else writes there.
        """
        sums: dict[str, FileSum] = {}
        folder = Path(self.path(part))
        folder.mkdir(parents=True)
        yield folder, sums
        readable_as_asked(folder)
        sums |= manifest.sums_below(folder, part)
        sync_tree(folder)

    @contextmanager
    def reading(self) -> Iterator[Reading]:
        if not is_url(self.url):
            yield Reading(self, Path(self.url))
            return
        with tempfile.TemporaryDirectory(prefix="grpo-ray-") as temporary:
            yield Reading(self, Path(temporary))


@dataclass(frozen=True)
class Reading:
    """Files of a checkpoint as local ones; those of an object store are downloaded on request, and kept until the reading ends."""

    place: CheckpointLocation
    folder: Path

    def local(self, name: str) -> Path:
        """A local path of the file. Raises CheckpointError when there is none."""
        path = self.folder / name
        try:
            if not is_url(self.place.url):
                with open_inside(self.folder, name):
                    return path
            if path.is_file():
                return path
            path.parent.mkdir(parents=True, exist_ok=True)
            self.place._ask("read", lambda fs: fs.get_file(self.place.path(name), str(path)))
        except OSError as e:
            raise CheckpointError(f"{self.place.path(name)} can't be read ({e})") from None
        return path


@dataclass(frozen=True)
class Store:
    """All checkpoints of a run."""

    url: str
    patience_s: float = PATIENCE_S

    @property
    def is_remote(self) -> bool:
        return is_url(self.url)

    def place(self, step: int) -> CheckpointLocation:
        return CheckpointLocation(f"{self.url}/{_name(step)}", self.patience_s)

    def has(self, step: int) -> bool:
        """Whether the step has a checkpoint in a folder."""
        return Path(self.place(step).path(manifest.NAME)).is_file()

    def steps(self) -> list[int]:
        """Steps with a manifest, ascending. Raises StoreError."""
        return self._steps_with(manifest.NAME)

    def _steps_with(self, name: str = "") -> list[int]:
        """Steps with a file of that name; without a name, all steps with any file."""
        pattern = f"step-*/{name}".rstrip("/")
        if self.is_remote:
            found = [str(p).rstrip("/") for p in self._list(pattern)]
        else:
            found = [str(p) for p in Path(self.url).glob(pattern)]
        names = {p.split("/")[-1 - pattern.count("/")] for p in found}
        return sorted(step for name in names if (step := step_of_name(name)) is not None)

    def _list(self, pattern: str) -> list[str]:
        try:
            found: list[str] = self._ask("list the checkpoints", lambda fs: fs.glob(f"{self.url}/{pattern}"))
        except FileNotFoundError as e:
            raise StoreError(f"can't list the checkpoints in {self.url}: {reason(e)}") from None
        return found

    def _ask(self, what: str, call: Callable[[Any], T]) -> T:
        return ask(self.url, what, call, patience_s=self.patience_s)

    # Writing to a folder

    def begin(self, step: int) -> CheckpointLocation:
        """An empty place for this step. Leftovers of interrupted saves are removed."""
        assert not self.is_remote, "made in a folder, then sent"
        root = Path(self.url)
        root.mkdir(parents=True, exist_ok=True)
        for left in root.glob(".step-*.tmp"):
            shutil.rmtree(left, ignore_errors=True)
        aside = root / f".{_name(step)}.tmp"
        aside.mkdir()
        return CheckpointLocation(str(aside))

    def commit(self, place: CheckpointLocation, step: int, sums: Sums, *, keep: int | None) -> CheckpointLocation:
        """Make the checkpoint complete, then remove all but the newest `keep`; None: keep all. It exists from the manifest on,
        not before."""
        final = self._rename(place, step, manifest.to_json(step, sums))
        if keep is not None:
            self.remove(self.steps()[:-keep])
        return final

    def _rename(self, place: CheckpointLocation, step: int, data: bytes) -> CheckpointLocation:
        aside, root = Path(place.url), Path(self.url)
        with (aside / manifest.NAME).open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        sync_folder(aside)
        final = root / _name(step)
        if final.exists():
            os.replace(final, root / f".{_name(step)}.old.tmp")
        os.replace(aside, final)
        sync_folder(root)
        shutil.rmtree(root / f".{_name(step)}.old.tmp", ignore_errors=True)
        return CheckpointLocation(str(final))

    def discard(self, place: CheckpointLocation) -> None:
        """Remove all files of a failed save."""
        shutil.rmtree(place.url, ignore_errors=True)

    def remove(self, steps: Iterable[int]) -> None:
        """Remove checkpoints from a folder; none is ever half-removed under its name."""
        for step in steps:
            gone = Path(self.url) / f".{_name(step)}.old.tmp"
            os.replace(self.place(step).url, gone)
            shutil.rmtree(gone, ignore_errors=True)

    # Writing to an object store, which has no rename

    def send(self, source: CheckpointLocation, step: int, sent: set[str], *, beat: Callable[[], None]) -> None:
        """Upload a complete checkpoint from a folder. Called again after a failure it continues where it was.

        Args:
            sent: names of the files that are uploaded; empty at first.
            beat: called after every uploaded part of a file; its exception ends the upload.

        Raises:
            StoreError: the store refuses or does not answer.
            OSError: the source can't be read.
        """
        sums, place = manifest.from_json(source.read(manifest.NAME), step), self.place(step)
        if not sent:
            # Leftovers of interrupted uploads, and of an earlier checkpoint of this step, which may have other files.
            kept = {*self.steps(), *self._steps_with(SET_ASIDE)} - {step}
            for cut_off in set(self._steps_with()) - kept:
                self._remove_remote(cut_off)
        for name in (*sums, manifest.NAME):
            if name not in sent:
                self._put(source.path(name), place.path(name), beat)
                sent.add(name)
                beat()

    def _put(self, source: str, path: str, beat: Callable[[], None]) -> None:
        def put(fs: Any) -> None:
            make_folder(fs, path)
            fs.put_file(source, path, callback=_beats(beat))
            if (size := fs.info(path)["size"]) != os.path.getsize(source):
                raise ConnectionError(f"{path} has {size} bytes there instead of {os.path.getsize(source)}")

        try:
            self._ask("write", put)
        except FileNotFoundError as e:
            raise StoreError(f"can't write in {self.url}: {reason(e)}") from None

    def keep_newest(self, number: int, step: int) -> None:
        """Remove older checkpoints in an object store, and set aside those newer than `step`, which belong to an abandoned
        continuation.

        Raises:
            StoreError: the store refuses or does not answer.
        """
        steps = self.steps()
        for newer in (s for s in steps if s > step):
            self.set_aside(newer)
        for old in [s for s in steps if s <= step][:-number]:
            self._remove_remote(old)

    def _remove_remote(self, step: int) -> None:
        place = self.place(step)
        for path in (place.path(manifest.NAME), place.url):
            # A file that is already gone is as good.
            with suppress(FileNotFoundError):
                self._ask("remove an old checkpoint", partial(_remove_tree, path))

    # Reading

    def first_wrong(self, step: int) -> str | None:
        """The first file of this checkpoint that fails its checksum, and why, with every byte read; None if all pass. Raises
        StoreError when the store cannot be read.
        """
        place = self.place(step)
        try:
            sums = manifest.from_json(place.read(manifest.NAME), step)
        except (OSError, ValueError) as e:
            return f"{manifest.NAME} {e}"
        if not self.is_remote and (wrong := manifest.first_wrong_size(sums, place.size)) is not None:
            return wrong
        return manifest.first_wrong(sums, place.sum)

    def set_aside(self, step: int) -> None:
        """Mark the checkpoint as invalid; its files stay."""
        place = self.place(step)
        if self.is_remote:
            self._ask("rename", lambda fs: fs.mv(place.path(manifest.NAME), place.path(SET_ASIDE)))
        else:
            os.replace(place.path(manifest.NAME), place.path(SET_ASIDE))

    def earlier_format(self) -> list[int]:
        """Steps saved by a version of grpo-ray without manifests."""
        return [s for s in self._steps_with("learner/learner.json") if s not in self.steps()]


def sync_tree(folder: Path) -> None:
    """Sync every file and folder below, and the folder itself, to disk."""
    for path in sorted(folder.rglob("*"), reverse=True):
        if path.is_dir():
            sync_folder(path)
            continue
        with path.open("rb") as file:
            os.fsync(file.fileno())
    sync_folder(folder)
    sync_folder(folder.parent)


def _name(step: int) -> str:
    return f"step-{step:06d}"


def step_of_name(name: str) -> int | None:
    """The step of a folder named like a checkpoint; None for other names."""
    found = _STEP.fullmatch(name)
    return int(found[1]) if found is not None and _name(int(found[1])) == name else None


def _remove_tree(path: str, fs: Any) -> None:
    fs.rm(path, recursive=True)


def _beats(beat: Callable[[], None]) -> Any:
    """Callback for fsspec, which reports every transferred part of a file."""
    from fsspec.callbacks import Callback

    class Beats(Callback):
        def relative_update(self, _inc: int = 1) -> None:
            beat()

        def absolute_update(self, _value: int) -> None:
            beat()

    return Beats()
