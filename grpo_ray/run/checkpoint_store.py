"""Where checkpoints are: a folder, or an object store by fsspec. A checkpoint is whole when its manifest is there.

folder        filled aside as `.step-000040.tmp`, every file and folder synced, then renamed
object store  gets what is whole in a folder already, the manifest last; see delivery.py

store.begin(40) -> Place -> workers fill parts of it, each a folder of its own -> store.commit(place, sums)
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
"""The name of a manifest that was found to be wrong: what lies beside it is no checkpoint any more, and is left to look at."""


@dataclass(frozen=True)
class CheckpointLocation:
    """The folder of one checkpoint, being written or read; the same for every worker, wherever it runs."""

    url: str
    """A local path, or what fsspec takes."""
    patience_s: float = PATIENCE_S
    """For a store that does not answer."""

    def path(self, name: str) -> str:
        return f"{self.url}/{name}"

    def read(self, name: str) -> bytes:
        """Raises FileNotFoundError when it is not there, OSError or StoreError when it can't be read."""
        if is_url(self.url):
            data: bytes = self._ask("read", lambda fs: fs.cat_file(self.path(name)))
            return data
        with open_inside(Path(self.url), name) as file:
            return file.read()

    def sum(self, name: str) -> FileSum:
        """Of all its bytes. Raises as `read`."""

        def of_remote(fs: Any) -> FileSum:
            with fs.open(self.path(name), "rb") as file:
                return manifest.sum_of(file)

        if is_url(self.url):
            return self._ask("read", of_remote)
        with open_inside(Path(self.url), name) as file:
            return manifest.sum_of(file)

    def size(self, name: str) -> int:
        """Of a local file, without reading it. Raises as `read`."""
        with open_inside(Path(self.url), name) as file:
            return os.fstat(file.fileno()).st_size

    def _ask(self, what: str, call: Callable[[Any], T]) -> T:
        return ask(self.url, what, call, patience_s=self.patience_s)

    @contextmanager
    def filling(self, part: str) -> Iterator[tuple[Path, dict[str, FileSum]]]:
        """A folder to write in, of a place that is local. When it ends everything in it is on the disk to stay, and the
        dictionary says what.

        Args:
            part: path inside the checkpoint; nobody else writes there.
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
    """Files of a checkpoint as local ones; of an object store those that are asked for, until the reading ends."""

    place: CheckpointLocation
    folder: Path

    def local(self, name: str) -> Path:
        """Raises CheckpointError when it can't be had."""
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
        """In a folder."""
        return Path(self.place(step).path(manifest.NAME)).is_file()

    def steps(self) -> list[int]:
        """Steps with a manifest, ascending. Raises StoreError."""
        return self._steps_with(manifest.NAME)

    def _steps_with(self, name: str = "") -> list[int]:
        """Steps with a file of that name; without one, all that there is something of."""
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

    # Writing, into a folder.

    def begin(self, step: int) -> CheckpointLocation:
        """An empty place for this step. What saves that were cut off have left is removed."""
        assert not self.is_remote, "made in a folder, then sent"
        root = Path(self.url)
        root.mkdir(parents=True, exist_ok=True)
        for left in root.glob(".step-*.tmp"):
            shutil.rmtree(left, ignore_errors=True)
        aside = root / f".{_name(step)}.tmp"
        aside.mkdir()
        return CheckpointLocation(str(aside))

    def commit(self, place: CheckpointLocation, step: int, sums: Sums, *, keep: int | None) -> CheckpointLocation:
        """Make it whole; then remove older ones than the newest `keep`, None: keep all. From the manifest on it is there, before
        it is not."""
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
        """Nothing is left of a save that failed."""
        shutil.rmtree(place.url, ignore_errors=True)

    def remove(self, steps: Iterable[int]) -> None:
        """From a folder; never half of one under its name."""
        for step in steps:
            gone = Path(self.url) / f".{_name(step)}.old.tmp"
            os.replace(self.place(step).url, gone)
            shutil.rmtree(gone, ignore_errors=True)

    # Writing, into an object store, which has no rename.

    def send(self, source: CheckpointLocation, step: int, sent: set[str], *, beat: Callable[[], None]) -> None:
        """A whole checkpoint from a folder. Called again after a failure it goes on where it was.

        Args:
            sent: names of the files that are there; empty at first.
            beat: called whenever a part of a file has gone through; what it raises ends the sending.

        Raises:
            StoreError: the store refuses or does not answer.
            OSError: the source can't be read.
        """
        sums, place = manifest.from_json(source.read(manifest.NAME), step), self.place(step)
        if not sent:
            # What saves that were cut off have left, and an earlier one of this step: that may have other files.
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
        """Remove older ones in an object store, and set aside what is newer than `step`: it is of a future that was given up.

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
            # Already gone is as good.
            with suppress(FileNotFoundError):
                self._ask("remove an old checkpoint", partial(_remove_tree, path))

    # Reading.

    def first_wrong(self, step: int) -> str | None:
        """What is wrong with this checkpoint, every byte of it read; None: nothing. Raises StoreError when that can't be known."""
        place = self.place(step)
        try:
            sums = manifest.from_json(place.read(manifest.NAME), step)
        except (OSError, ValueError) as e:
            return f"{manifest.NAME} {e}"
        if not self.is_remote and (wrong := manifest.first_wrong_size(sums, place.size)) is not None:
            return wrong
        return manifest.first_wrong(sums, place.sum)

    def set_aside(self, step: int) -> None:
        """It is no checkpoint any more; its files stay."""
        place = self.place(step)
        if self.is_remote:
            self._ask("rename", lambda fs: fs.mv(place.path(manifest.NAME), place.path(SET_ASIDE)))
        else:
            os.replace(place.path(manifest.NAME), place.path(SET_ASIDE))

    def earlier_format(self) -> list[int]:
        """Steps that a version of grpo-ray without manifests has saved."""
        return [s for s in self._steps_with("learner/learner.json") if s not in self.steps()]


def sync_tree(folder: Path) -> None:
    """Every file and folder below, and the folder itself, on the disk to stay."""
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
    """Of a folder that is called as the checkpoint of a step is; None: it is not."""
    found = _STEP.fullmatch(name)
    return int(found[1]) if found is not None and _name(int(found[1])) == name else None


def _remove_tree(path: str, fs: Any) -> None:
    fs.rm(path, recursive=True)


def _beats(beat: Callable[[], None]) -> Any:
    """For fsspec, which tells of every part of a file that has gone through."""
    from fsspec.callbacks import Callback

    class Beats(Callback):
        def relative_update(self, inc: int = 1) -> None:
            beat()

        def absolute_update(self, value: int) -> None:
            beat()

    return Beats()
