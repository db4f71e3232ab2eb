"""Limits read from trees of control groups as kernels lay them out, built in a temporary folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from ciuic_runtime.devices.cgroup import CgroupLimits, read_limits

GIB = 1 << 30
V1_NONE = "9223372036854771712"


class Tree:
    """A /proc/self and the cgroup mounts that its mountinfo names."""

    def __init__(self, folder: Path) -> None:
        self.proc, self.root = folder / "proc self", folder / "sys fs"
        self.proc.mkdir()

    def process_in(self, *lines: str) -> None:
        (self.proc / "cgroup").write_text("\n".join(lines) + "\n")

    def mounted(self, *mounts: tuple[str, str, str, str]) -> None:
        """Each (folder, root of the mount, type, options)."""
        text = "21 1 8:1 / / rw - ext4 /dev/sda1 rw\n"
        for folder, root, kind, options in mounts:
            place = str(self.root / folder).replace(" ", "\\040")
            text += f"33 25 0:29 {root} {place} rw,nosuid shared:9 - {kind} {kind} {options}\n"
        (self.proc / "mountinfo").write_text(text)

    def group(self, path: str, **files: object) -> None:
        folder = self.root / path
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            (folder / name.replace("__", ".")).write_text(f"{content}\n")

    def limits(self) -> CgroupLimits:
        return read_limits(self.proc)


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    return Tree(tmp_path)


@pytest.fixture
def v2(tree: Tree) -> Tree:
    tree.process_in("0::/user.slice/job")
    tree.mounted((".", "/", "cgroup2", "rw"))
    tree.group("user.slice/job")
    return tree


@pytest.fixture
def v1(tree: Tree) -> Tree:
    tree.process_in("4:memory:/batch/job", "2:cpu,cpuacct:/batch/job", "0::/")
    tree.mounted(
        ("memory", "/", "cgroup", "rw,memory"),
        ("cpu,cpuacct", "/", "cgroup", "rw,cpu,cpuacct"),
        ("unified", "/", "cgroup2", "rw"),
    )
    tree.group("unified")
    return tree


def test_v2_without_limits(v2: Tree) -> None:
    v2.group("user.slice/job", memory__max="max", memory__current=5 * GIB, cpu__max="max 100000")
    assert v2.limits() == CgroupLimits(None, None, None)


def test_v2_counts_page_cache_as_free(v2: Tree) -> None:
    stat = f"anon {GIB}\nfile {5 * GIB}\nactive_file {GIB}\ninactive_file {2 * GIB}\nshmem {2 * GIB}"
    v2.group("user.slice/job", memory__max=8 * GIB, memory__current=6 * GIB, memory__stat=stat)
    assert v2.limits() == CgroupLimits(8 * GIB, 8 * GIB - (6 - 3) * GIB, None)


def test_v2_takes_the_least_over_all_parents(v2: Tree) -> None:
    v2.group("user.slice/job", memory__max=8 * GIB, memory__current=GIB, cpu__max="800000 100000")
    v2.group("user.slice", memory__max=16 * GIB, memory__current=15 * GIB, cpu__max="150000 100000")
    assert v2.limits() == CgroupLimits(8 * GIB, GIB, 1.5)


def test_v2_high_is_a_limit_too(v2: Tree) -> None:
    v2.group("user.slice/job", memory__max=8 * GIB, memory__high=3 * GIB, memory__current=0)
    assert v2.limits().memory_bytes == 3 * GIB


def test_v1_without_limits(v1: Tree) -> None:
    v1.group("memory/batch/job", memory__limit_in_bytes=V1_NONE, memory__usage_in_bytes=GIB)
    v1.group("cpu,cpuacct/batch/job", cpu__cfs_quota_us=-1, cpu__cfs_period_us=100000)
    assert v1.limits() == CgroupLimits(None, None, None)


def test_v1_limits_of_the_parent_hold(v1: Tree) -> None:
    stat = f"inactive_file 1\ntotal_active_file {GIB}\ntotal_inactive_file {GIB}"
    v1.group("memory/batch/job", memory__limit_in_bytes=V1_NONE)
    v1.group("memory/batch", memory__limit_in_bytes=6 * GIB, memory__usage_in_bytes=5 * GIB, memory__stat=stat)
    v1.group("cpu,cpuacct/batch/job", cpu__cfs_quota_us=250000, cpu__cfs_period_us=100000)
    v1.group("cpu,cpuacct", cpu__cfs_quota_us=-1, cpu__cfs_period_us=100000)
    assert v1.limits() == CgroupLimits(6 * GIB, 3 * GIB, 2.5)


def test_a_container_sees_the_hosts_path_but_mounts_its_own_group(tree: Tree) -> None:
    tree.process_in("4:memory:/docker/abc/inner")
    tree.mounted(("memory", "/docker/abc", "cgroup", "rw,memory"))
    tree.group("memory", memory__limit_in_bytes=4 * GIB)
    tree.group("memory/inner", memory__limit_in_bytes=2 * GIB)
    assert tree.limits().memory_bytes == 2 * GIB


def test_a_group_that_is_not_mounted_leaves_the_ones_that_are(tree: Tree) -> None:
    tree.process_in("4:memory:/kubepods/pod1")
    tree.mounted(("memory", "/", "cgroup", "rw,memory"))
    tree.group("memory", memory__limit_in_bytes=4 * GIB)
    assert tree.limits().memory_bytes == 4 * GIB


def test_the_tighter_of_v1_and_v2_wins(v1: Tree) -> None:
    v1.process_in("4:memory:/batch", "0::/batch")
    v1.group("memory/batch", memory__limit_in_bytes=6 * GIB)
    v1.group("unified/batch", memory__max=5 * GIB)
    assert v1.limits().memory_bytes == 5 * GIB


def test_usage_beyond_the_limit_leaves_nothing(v2: Tree) -> None:
    v2.group("user.slice/job", memory__max=GIB, memory__current=2 * GIB)
    assert v2.limits().memory_free_bytes == 0


def test_no_cgroups_no_limits(tmp_path: Path) -> None:
    assert read_limits(tmp_path / "nothing") == CgroupLimits(None, None, None)
