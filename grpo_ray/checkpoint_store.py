"""Where checkpoints are: a folder, or an object store by fsspec. A checkpoint is whole when its manifest is there.

folder        filled aside as `.step-000040.tmp`, every file and folder synced, then renamed
object store  has no rename: filled in place, each file by way of a temporary folder, the manifest last

store.begin(40) -> Place -> workers fill parts of it, each a folder of its own -> store.commit(place, sums)
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

from grpo_ray import manifest
from grpo_ray.errors import CheckpointError
from grpo_ray.files import readable_as_asked, sync_folder
from grpo_ray.manifest import FileSum, Sums

SET_ASIDE = "manifest.broken.json"
"""The name of a manifest that was found to be wrong: what lies beside it is no checkpoint any more, and is left to look at."""


def is_url(path: str) -> bool:
    return "://" in path


@dataclass(frozen=True)
class Place:
    """The folder of one checkpoint, being written or read; the same for every worker, wherever it runs."""

    url: str
    """A local path, or what fsspec takes."""

    @property
    def scratch(self) -> Path:
        """Where the room is that a worker needs to write its part."""
        return Path(tempfile.gettempdir()) if is_url(self.url) else Path(self.url)

    def path(self, name: str) -> str:
        return f"{self.url}/{name}"

    def open(self, name: str) -> BinaryIO:
        """Raises OSError when it is not there."""
        if is_url(self.url):
            return cast(BinaryIO, _filesystem(self.url).open(self.path(name), "rb"))
        return Path(self.path(name)).open("rb")

    @contextmanager
    def filling(self, part: str) -> Iterator[tuple[Path, dict[str, FileSum]]]:
        """A local folder to write in. When it ends everything in it is in the store to stay, and the dictionary says what.

        Args:
            part: path inside the checkpoint; nobody else writes there.
        """
        sums: dict[str, FileSum] = {}
        if not is_url(self.url):
            folder = Path(self.path(part))
            folder.mkdir(parents=True)
            yield folder, sums
            readable_as_asked(folder)
            sums |= manifest.sums_below(folder, part)
            sync_tree(folder)
            return
        filesystem = _filesystem(self.url)
        with tempfile.TemporaryDirectory(prefix="grpo-ray-") as temporary:
            folder = Path(temporary)
            yield folder, sums
            sums |= manifest.sums_below(folder, part)
            for name in sums:
                filesystem.makedirs(os.path.dirname(self.path(name)), exist_ok=True)
                filesystem.put_file(str(folder / name.removeprefix(f"{part}/")), self.path(name))

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

    place: Place
    folder: Path

    def local(self, name: str) -> Path:
        """Raises CheckpointError when it can't be had."""
        path = self.folder / name
        if path.is_file():
            return path
        try:
            if not is_url(self.place.url):
                raise FileNotFoundError("no such file")
            path.parent.mkdir(parents=True, exist_ok=True)
            _filesystem(self.place.url).get_file(self.place.path(name), str(path))
        except OSError as e:
            raise CheckpointError(f"{self.place.path(name)} can't be read ({e})") from None
        return path


@dataclass(frozen=True)
class Store:
    """All checkpoints of a run."""

    url: str

    def place(self, step: int) -> Place:
        return Place(f"{self.url}/{_name(step)}")

    def steps(self) -> list[int]:
        """Steps with a manifest, ascending."""
        return self._steps_with(manifest.NAME)

    def _steps_with(self, name: str = "") -> list[int]:
        """Steps with a file of that name; without one, all that there is something of."""
        pattern = f"step-*/{name}".rstrip("/")
        if is_url(self.url):
            filesystem = _filesystem(self.url)
            filesystem.invalidate_cache()
            found = [str(p).rstrip("/") for p in filesystem.glob(f"{self.url}/{pattern}")]
        else:
            found = [str(p) for p in Path(self.url).glob(pattern)]
        return sorted({_step(p.split("/")[-1 - pattern.count("/")]) for p in found})

    # Writing.

    def begin(self, step: int) -> Place:
        """An empty place for this step. What saves that were cut off have left is removed."""
        if is_url(self.url):
            kept = {*self.steps(), *self._steps_with(SET_ASIDE)} - {step}
            for cut_off in set(self._steps_with()) - kept:
                self._remove_remote(cut_off)
            return self.place(step)
        root = Path(self.url)
        root.mkdir(parents=True, exist_ok=True)
        for left in root.glob(".step-*.tmp"):
            shutil.rmtree(left, ignore_errors=True)
        aside = root / f".{_name(step)}.tmp"
        aside.mkdir()
        return Place(str(aside))

    def commit(self, place: Place, step: int, sums: Sums, *, keep: int) -> Place:
        """Make it whole; then remove older ones than the newest `keep`. From the manifest on it is there, before it is not."""
        data = manifest.to_json(step, sums)
        if is_url(self.url):
            _filesystem(self.url).pipe_file(place.path(manifest.NAME), data)
            final = place
        else:
            final = self._rename(place, step, data)
        for old in self.steps()[:-keep]:
            self._remove(old)
        return final

    def _rename(self, place: Place, step: int, data: bytes) -> Place:
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
        return Place(str(final))

    def discard(self, place: Place) -> None:
        """Nothing is left of a save that failed."""
        if is_url(self.url):
            self._remove_remote(_step(place.url.split("/")[-1]))
        else:
            shutil.rmtree(place.url, ignore_errors=True)

    def _remove(self, step: int) -> None:
        """Never half of it under its name."""
        if is_url(self.url):
            self._remove_remote(step)
            return
        gone = Path(self.url) / f".{_name(step)}.old.tmp"
        os.replace(self.place(step).url, gone)
        shutil.rmtree(gone, ignore_errors=True)

    def _remove_remote(self, step: int) -> None:
        filesystem, place = _filesystem(self.url), self.place(step)
        for path in (place.path(manifest.NAME), place.url):
            if filesystem.exists(path):
                filesystem.rm(path, recursive=True)

    # Reading.

    def first_wrong(self, step: int) -> str | None:
        """What is wrong with this checkpoint, every byte of it read; None: nothing."""
        place = self.place(step)
        try:
            with place.open(manifest.NAME) as file:
                sums = manifest.from_json(file.read(), step)
        except (OSError, ValueError) as e:
            return f"{manifest.NAME} {e}"
        return manifest.first_wrong(sums, place.open)

    def set_aside(self, step: int) -> None:
        """It is no checkpoint any more; its files stay."""
        place = self.place(step)
        if is_url(self.url):
            _filesystem(self.url).mv(place.path(manifest.NAME), place.path(SET_ASIDE))
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


def _step(name: str) -> int:
    return int(name.removeprefix("step-"))


def _filesystem(url: str) -> Any:
    """Raises CheckpointError when fsspec has nothing for that protocol."""
    from fsspec.core import url_to_fs

    try:
        filesystem, _ = url_to_fs(url)
    except (ImportError, ValueError) as e:
        raise CheckpointError(f"checkpoint.path {url}: {e}; install the fsspec package of that store") from None
    return filesystem
