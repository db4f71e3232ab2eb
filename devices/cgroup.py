"""What the control groups (v1 and v2) around this process leave it: memory and CPU time, the least over all parents.
Knows the kernel's files only; which of it matters to a device is decided in cpu.py."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

N = TypeVar("N", int, float)
PROC_SELF = Path("/proc/self")
NO_LIMIT = 2**60  # bytes; v1 writes "none" as the largest page-aligned int64


@dataclass(frozen=True, slots=True)
class CgroupLimits:
    memory_bytes: int | None = None  # None: not limited
    memory_free_bytes: int | None = None  # of the tightest group; page cache counts as free
    cpus: float | None = None  # CPU seconds per second


def read_limits(proc_self: Path = PROC_SELF) -> CgroupLimits:
    """The limits in force on the process whose /proc folder this is; no limits where cgroups cannot be read."""
    memory, free, cpus = [], [], []
    for folder in _folders(proc_self, "memory"):
        limit, left = _memory(folder)
        memory.append(limit)
        free.append(left)
    for folder in _folders(proc_self, "cpu"):
        cpus.append(_cpus(folder))
    return CgroupLimits(_least(memory), _least(free), _least(cpus))


def _folders(proc_self: Path, controller: str) -> Iterator[Path]:
    """The process's group and all its parents, in the v1 hierarchy of `controller` and in the v2 one."""
    mounts = _mounts(proc_self / "mountinfo")
    for line in _text(proc_self / "cgroup").splitlines():
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        key = "v2" if number == "0" and not controllers else controller
        if key != "v2" and controller not in controllers.split(","):
            continue
        for mount_point, mount_root in mounts.get(key, []):
            yield from _upwards(mount_point, _below(path, mount_root))


def _mounts(mountinfo: Path) -> dict[str, list[tuple[Path, str]]]:
    """Controller name (or "v2") -> where it is mounted, and which group is the root of that mount."""
    mounts: dict[str, list[tuple[Path, str]]] = {}
    for line in _text(mountinfo).splitlines():
        left, _, right = line.partition(" - ")
        fields, kind = left.split(), right.split()
        if len(fields) < 5 or len(kind) < 3 or kind[0] not in ("cgroup", "cgroup2"):
            continue
        place = (Path(_unescape(fields[4])), _unescape(fields[3]))
        for key in ["v2"] if kind[0] == "cgroup2" else kind[2].split(","):
            mounts.setdefault(key, []).append(place)
    return mounts


def _below(path: str, mount_root: str) -> str:
    """The group's path inside the mount; a container sees the host's path but mounts only its own group."""
    if mount_root != "/" and (path == mount_root or path.startswith(mount_root + "/")):
        return path[len(mount_root) :]
    return path


def _upwards(mount_point: Path, path: str) -> Iterator[Path]:
    parts = [p for p in path.split("/") if p and p != ".."]
    for depth in range(len(parts), -1, -1):
        yield mount_point.joinpath(*parts[:depth])


def _memory(folder: Path) -> tuple[int | None, int | None]:
    """This group's own limit and what is free below it, bytes."""
    limits = [_size(folder / name) for name in ("memory.max", "memory.high", "memory.limit_in_bytes")]
    limit = _least(limits)
    used = _size(folder / "memory.current") or _size(folder / "memory.usage_in_bytes")
    if limit is None:
        return None, None
    reclaimable = _page_cache(folder / "memory.stat")
    return limit, min(limit, max(0, limit - max(0, (used or 0) - reclaimable)))


def _page_cache(stat: Path) -> int:
    """File pages that the kernel can drop, bytes; v1's total_ figures include the groups below, v2's always do."""
    figures = dict(line.split() for line in _text(stat).splitlines() if len(line.split()) == 2)
    prefix = "total_" if "total_inactive_file" in figures else ""
    return sum(int(figures.get(f"{prefix}{kind}", 0)) for kind in ("active_file", "inactive_file"))


def _cpus(folder: Path) -> float | None:
    v2 = _text(folder / "cpu.max").split()
    quota, period = v2 if len(v2) == 2 else (_text(folder / f"cpu.cfs_{x}_us").strip() for x in ("quota", "period"))
    if not quota.isdigit() or not period.isdigit() or int(period) == 0:  # "max", "-1", or no such file
        return None
    return int(quota) / int(period)


def _size(file: Path) -> int | None:
    text = _text(file).strip()
    return int(text) if text.isdigit() and int(text) < NO_LIMIT else None


def _least(values: list[N | None]) -> N | None:
    return min((v for v in values if v is not None), default=None)


def _text(file: Path) -> str:
    """The file's text, "" where it is not there or may not be read: every one of these files is optional."""
    try:
        return file.read_text(errors="replace")
    except OSError:
        return ""


def _unescape(field: str) -> str:
    return field.replace("\\040", " ").replace("\\011", "\t").replace("\\134", "\\")
