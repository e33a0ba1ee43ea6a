"""What another user of the machine has put there, or could still change, is not used; the attacks themselves run where the tests
are root's."""

from __future__ import annotations

import os
import stat
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

import actors.private
from actors.caches import CACHES, own_cache, use_private_caches
from actors.cluster import open_folder
from actors.private import is_closed, make_private, private_folder, use_private_temporary_files, why_open
from grpo_ray.secrets import make_token, token_path
from tests.strangers import IS_ROOT, NOBODY, as_nobody, shared_folder

needs_root = pytest.mark.skipif(not IS_ROOT, reason="needs root, for a second user")
OURS = f"grpo-ray-{os.getuid()}"


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    before = dict(os.environ)
    for name in ("TMPDIR", "RAY_TMPDIR", "HF_HOME", *(cache.variable for cache in CACHES)):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(tempfile, "tempdir", None)
    yield monkeypatch
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture
def shared(environment: pytest.MonkeyPatch) -> Iterator[Path]:
    with shared_folder() as folder:
        environment.setenv("TMPDIR", str(folder))
        yield folder


def mode(path: Path) -> int:
    return stat.S_IMODE(path.lstat().st_mode)


def test_the_folder_for_temporary_files_is_its_users_alone_and_the_same_each_time(shared: Path) -> None:
    folder = private_folder()
    assert folder == shared / OURS
    assert mode(folder) == 0o700
    assert private_folder() == folder
    assert use_private_temporary_files() == folder
    assert tempfile.gettempdir() == os.environ["TMPDIR"] == str(folder)
    # Also of those that this process starts.
    assert private_folder() == folder


def test_one_that_was_open_to_others_is_not_taken(shared: Path) -> None:
    (shared / OURS).mkdir(mode=0o700)
    for open_mode in (0o744, 0o770, 0o707, 0o755, 0o777):
        (shared / OURS).chmod(open_mode)
        folder = private_folder()
        assert folder != shared / OURS
        assert is_closed(folder)


def test_a_file_is_no_folder(shared: Path) -> None:
    (shared / OURS).touch(mode=0o600)
    assert private_folder().is_dir()


def test_a_link_is_not_taken_even_to_a_folder_of_ones_own(shared: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir(mode=0o700)
    (shared / OURS).symlink_to(tmp_path / "mine")
    assert private_folder() != shared / OURS
    assert is_closed(private_folder())
    assert not list((tmp_path / "mine").iterdir())


def test_a_folder_that_nobody_else_can_enter_is_taken_as_it_is(environment: pytest.MonkeyPatch) -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as closed:
        environment.setenv("RAY_TMPDIR", closed)
        assert private_folder() == Path(closed)
        assert make_private(Path(closed)) == Path(closed)


@needs_root
@pytest.mark.parametrize("take", [Path.mkdir, lambda path: path.symlink_to("/root"), Path.touch])
def test_another_user_who_was_first_neither_gets_our_files_nor_keeps_us_from_starting(
    shared: Path, take: Callable[[Path], None]
) -> None:
    assert as_nobody(lambda: take(shared / OURS)) == "None"
    folder = private_folder()
    assert folder != shared / OURS
    assert mode(folder) == 0o700
    assert folder.stat().st_uid == os.getuid()
    assert make_private(shared) != shared / OURS


@needs_root
def test_another_user_can_neither_read_nor_replace_what_is_in_it(shared: Path) -> None:
    (private_folder() / "package").mkdir(mode=0o777)
    for path in (private_folder(), private_folder() / "package"):
        assert as_nobody(partial(os.listdir, path)) == "PermissionError"
        assert as_nobody(partial(os.rename, path, f"{path}.away")) == "PermissionError"
        assert as_nobody((path / "module.py").touch) == "PermissionError"
    assert as_nobody(lambda: (shared / "other").touch()) == "None"


def test_every_folder_on_the_way_counts() -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as top:
        os.chmod(top, 0o755)
        deep = Path(top, "a", "b", "c")
        deep.mkdir(parents=True)
        assert why_open(deep) is None
        assert why_open(deep / "not" / "yet") is None
        for folder in (deep, deep.parent, deep.parent.parent, Path(top)):
            before = mode(folder)
            folder.chmod(0o777)
            assert why_open(deep) == f"every user can write to {folder}"
            assert why_open(deep / "not" / "yet") == f"every user can write to {folder}"
            folder.chmod(before)
        deep.parent.chmod(0o700)
        deep.chmod(0o777)
        # Nobody else comes so far.
        assert why_open(deep) is None
        assert is_closed(deep)


def test_links_are_followed_to_what_is_really_used(tmp_path: Path) -> None:
    with shared_folder() as shared:
        (tmp_path / "link").symlink_to(shared / "x")
        assert why_open(tmp_path / "link") == f"every user can write to {shared}"
        (tmp_path / "up").symlink_to(f"{tmp_path}/../../../..{shared}")
        assert why_open(tmp_path / "up" / "x") == f"every user can write to {shared}"
        (tmp_path / "circle").symlink_to("circle")
        assert "leads in circles" in str(why_open(tmp_path / "circle"))


def test_a_sticky_folder_protects_what_is_ones_own_and_not_a_name_that_is_free() -> None:
    with shared_folder() as shared:
        (shared / "mine").mkdir(mode=0o755)
        assert why_open(shared / "mine") is None
        assert why_open(shared / "mine" / "later") is None
        assert why_open(shared / "later") == f"every user can write to {shared}"
        shared.chmod(0o777)
        assert why_open(shared / "mine") == f"every user can write to {shared}"


def test_a_list_of_users_who_may_write_is_not_taken_for_the_own_group(monkeypatch: pytest.MonkeyPatch) -> None:
    # The owner, the user nobody, the group, the mask and all others, as `setfacl -m u:nobody:rwx` writes them.
    entries = [(1, 7, 2**32 - 1), (2, 7, NOBODY), (4, 5, 2**32 - 1), (16, 7, 2**32 - 1), (32, 5, 2**32 - 1)]
    acl = struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in entries)
    with tempfile.TemporaryDirectory(dir="/tmp") as top:
        os.chmod(top, 0o775)
        monkeypatch.setattr(actors.private, "_own_groups", lambda: frozenset({os.stat(top).st_gid}))
        assert why_open(top) is None
        try:
            os.setxattr(top, "system.posix_acl_access", acl)
        except OSError:
            pytest.skip("no access lists in this file system")
        assert mode(Path(top)) == 0o775
        assert why_open(top) == f"users of an access list (getfacl) can write to {top}"


def test_a_group_that_may_write_is_others(monkeypatch: pytest.MonkeyPatch) -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as top:
        os.chmod(top, 0o775)
        monkeypatch.setattr(actors.private, "_own_groups", lambda: frozenset({os.stat(top).st_gid}))
        assert why_open(top) is None
        monkeypatch.setattr(actors.private, "_own_groups", lambda: frozenset({12345}))
        assert "can write to" in str(why_open(top))


@needs_root
@pytest.mark.parametrize("cache", [c for c in CACHES if not c.inside], ids=lambda c: c.variable)
def test_a_cache_that_another_user_has_made_is_not_used(
    environment: pytest.MonkeyPatch, shared: Path, tmp_path: Path, cache: actors.caches.Cache
) -> None:
    environment.setenv("HOME", str(tmp_path))
    planted = shared / "planted"
    assert as_nobody(lambda: planted.mkdir(0o755)) == "None"
    environment.setenv(cache.variable, str(planted))
    (note,) = use_private_caches()
    assert note.startswith(f"{cache.variable}={planted} is not used, for {planted} belongs to nobody")
    assert Path(os.environ[cache.variable]) == tmp_path / ".cache" / "grpo-ray" / cache.variable.lower()
    assert is_closed(os.environ[cache.variable])


@pytest.mark.parametrize("cache", [c for c in CACHES if c.default], ids=lambda c: c.variable)
def test_a_default_that_others_can_write_to_is_left_too(
    environment: pytest.MonkeyPatch, shared: Path, cache: actors.caches.Cache
) -> None:
    environment.setenv("HOME", str(shared))
    use_private_caches()
    value = os.environ[cache.variable] if cache.variable in os.environ else f"{os.environ['XDG_CACHE_HOME']}/under"
    assert is_closed(value), value
    assert not value.startswith(f"{shared}/.")


def test_caches_of_ones_own_stay_where_they_are(environment: pytest.MonkeyPatch, tmp_path: Path) -> None:
    environment.setenv("HOME", str(tmp_path))
    environment.setenv("TRITON_CACHE_DIR", str(tmp_path / "later" / "triton"))
    before = dict(os.environ)
    assert use_private_caches() == []
    assert dict(os.environ) == before


def test_a_link_in_place_of_our_own_cache_opens_no_other_folder(
    environment: pytest.MonkeyPatch, shared: Path, tmp_path: Path
) -> None:
    environment.setenv("HOME", str(shared))
    (victim := tmp_path / "victim").mkdir(mode=0o755)
    (shared / ".cache").mkdir(mode=0o777)
    (shared / ".cache").chmod(0o777)
    (shared / ".cache" / "grpo-ray").symlink_to(victim)
    assert is_closed(own_cache("x"))
    assert mode(victim) == 0o755
    assert not list(victim.iterdir())


def test_a_node_that_others_started_where_every_user_can_change_its_code_is_told_when_it_is_joined() -> None:
    with shared_folder() as shared:
        session = shared / "ray" / "session_1"
        for folder in (shared / "ray", session, session / "runtime_resources"):
            folder.mkdir()
            # As Ray makes them.
            folder.chmod(0o777)
        (shared / "ray" / "session_latest").symlink_to(session)
        told = open_folder(str(shared / "ray"))
        assert f"every user can write to {shared / 'ray'}" in str(told)
        assert "start_ray.sh" in str(told)
        assert open_folder(str(private_folder())) is None


@pytest.mark.parametrize("there", ["nothing", "empty", "readable"])
def test_rays_token_is_nobody_elses_from_its_first_byte_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, there: str
) -> None:
    env = {"HOME": str(tmp_path)}
    path = token_path(env)
    if there != "nothing":
        path.parent.mkdir()
        path.write_text("" if there == "empty" else "f" * 64)
        path.chmod(0o644)
    seen: list[int] = []
    fsync = os.fsync

    def look(fd: int) -> None:
        seen.append(stat.S_IMODE(os.fstat(fd).st_mode))
        seen.extend(mode(p) for p in path.parent.iterdir() if p.stat().st_size)
        fsync(fd)

    monkeypatch.setattr(os, "fsync", look)
    before = os.umask(0)
    try:
        make_token(env)
    finally:
        os.umask(before)
    assert set(seen) == (set() if there == "readable" else {0o600})
    assert mode(path) == 0o600
    assert len(path.read_text()) == 64
    assert [p.name for p in path.parent.iterdir()] == ["auth_token"]
    token = path.read_text()
    make_token(env)
    assert path.read_text() == token
    assert there != "nothing" or mode(path.parent) == 0o700


@pytest.mark.usefixtures("shared")
def test_the_start_scripts_get_the_same_folder() -> None:
    told = subprocess.run(
        [sys.executable, "-P", "-m", "actors.private"],
        env={**os.environ, "PYTHONPATH": str(Path(actors.private.__file__).parents[1])},
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert told.stdout == f"{private_folder()}\n"
