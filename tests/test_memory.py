import re
from pathlib import Path

import pytest

from fastorgan import memory
from fastorgan.errors import VolumeError
from fastorgan.memory import available_bytes, check_memory

MEMINFO = "MemTotal: 8000 kB\nMemFree: 10 kB\nMemAvailable:    4000 kB\nHugePages_Total: 0\n"


def machine(root: Path, **files: str) -> Path:
    """A made-up /proc and /sys; `__` in a name is a folder's end, `_dot_` a dot."""
    for name, content in files.items():
        path = root / name.replace("__", "/").replace("_dot_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return root


def test_this_machine_has_memory() -> None:
    free = available_bytes()
    assert free is not None
    assert 1 << 20 < free < 1 << 50


def test_a_machine_alone_tells_what_is_available(tmp_path: Path) -> None:
    assert available_bytes(machine(tmp_path, proc__meminfo=MEMINFO)) == 4000 * 1024


def test_nothing_known_is_none_and_refuses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert available_bytes(tmp_path) is None
    monkeypatch.setattr(memory, "available_bytes", lambda: None)
    check_memory(1 << 62, "all")


def test_the_tightest_control_group_above_counts(tmp_path: Path) -> None:
    root = machine(
        tmp_path,
        proc__meminfo=MEMINFO,
        proc__self__cgroup="0::/jobs/one\n",
        sys__fs__cgroup__jobs__one__memory_dot_max="max\n",
        sys__fs__cgroup__jobs__one__memory_dot_current="900000\n",
        sys__fs__cgroup__jobs__memory_dot_max="1000000\n",
        sys__fs__cgroup__jobs__memory_dot_current="900000\n",
        # Page cache makes room when memory is asked for.
        sys__fs__cgroup__jobs__memory_dot_stat="anon 650000\nfile 250000\n",
    )
    assert available_bytes(root) == 350_000


def test_a_container_sees_its_own_group_at_the_top(tmp_path: Path) -> None:
    root = machine(
        tmp_path,
        proc__meminfo=MEMINFO,
        # The host's path, which does not exist within.
        proc__self__cgroup="4:memory:/docker/abc\n3:cpu,cpuacct:/docker/abc\n",
        sys__fs__cgroup__memory__memory_dot_limit_in_bytes="600000\n",
        sys__fs__cgroup__memory__memory_dot_usage_in_bytes="700000\n",
        sys__fs__cgroup__memory__memory_dot_stat="cache 1\ntotal_cache 300000\n",
    )
    assert available_bytes(root) == 200_000


def test_what_does_not_fit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available_bytes", lambda: 3 << 20)
    check_memory(3 << 20, "ct.nii: 3 voxels")
    said = "ct.nii: 3 voxels need 4 MiB of memory, but only 3 MiB are free"
    with pytest.raises(VolumeError, match=rf"^{re.escape(said)}\Z"):
        check_memory(4 << 20, "ct.nii: 3 voxels")
