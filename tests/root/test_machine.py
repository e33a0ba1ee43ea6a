"""CPUs and memory that a container leaves a process, from files as the kernel writes them."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from grpo_ray.machine import cpu_quota, free_memory, total_memory, usable_cpus


def written(folder: Path, files: dict[str, str]) -> tuple[Path, Path]:
    """(root of the control groups, what /proc/self/cgroup would say), as `files` has them by path."""
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder, folder / "membership"


def test_the_tightest_quota_up_to_the_root_counts(tmp_path: Path) -> None:
    at = written(
        tmp_path,
        {
            "membership": "0::/pod/box\n",
            "pod/box/cpu.max": "max 100000\n",
            "pod/cpu.max": "150000 100000\n",
            "cpu.max": "400000 100000\n",
        },
    )
    assert cpu_quota(*at) == 1.5


def test_quotas_of_the_first_version_are_read(tmp_path: Path) -> None:
    files = {
        "membership": "3:cpu,cpuacct:/box\n4:memory:/\n",
        "cpu/box/cpu.cfs_quota_us": "50000\n",
        "cpu/box/cpu.cfs_period_us": "100000\n",
        "cpu/cpu.cfs_quota_us": "-1\n",
        "cpu/cpu.cfs_period_us": "100000\n",
    }
    assert cpu_quota(*written(tmp_path, files)) == 0.5


@pytest.mark.parametrize("files", [{}, {"membership": "0::/\n"}, {"membership": "0::/\n", "cpu.max": "max 100000\n"}])
def test_without_a_quota_there_is_none(tmp_path: Path, files: dict[str, str]) -> None:
    assert cpu_quota(*written(tmp_path, files)) is None


def test_a_process_has_a_core_at_least(monkeypatch: pytest.MonkeyPatch) -> None:
    for quota, cores, want in ((0.5, 4, 1), (2.9, 4, 2), (8.0, 4, 4), (None, 4, 4)):
        monkeypatch.setattr("grpo_ray.machine.cpu_quota", lambda quota=quota: quota)
        monkeypatch.setattr("os.sched_getaffinity", lambda _, cores=cores: set(range(cores)))
        assert usable_cpus() == want


def test_memory_is_what_the_container_leaves(tmp_path: Path) -> None:
    second = written(
        tmp_path / "2",
        {
            "membership": "0::/box\n",
            "box/memory.max": "3000\n",
            "box/memory.current": "1000\n",
            "box/memory.stat": "anon 1\ninactive_file 200\n",
        },
    )
    assert free_memory(*second) == 2200
    assert total_memory(*second) == 3000
    first = written(
        tmp_path / "1",
        {
            "membership": "8:memory:/box\n",
            "memory/box/memory.limit_in_bytes": "9223372036854771712\n",
            "memory/box/memory.usage_in_bytes": "1000\n",
        },
    )
    assert free_memory(*first) == pytest.approx(psutil.virtual_memory().available, rel=0.2)
