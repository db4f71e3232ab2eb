"""Processes seen from outside, as Linux tells: the memory of one, the processor time of one and of all the others."""

from __future__ import annotations

import os
import re
import subprocess
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes."""

    peak: int  # VmHWM: the most that was resident at once, mapped files included
    resident: int
    anonymous: int  # of what is resident: not backed by a file
    huge: int  # of the anonymous: in huge pages


def memory_of(pid: int) -> Memory:
    status, smaps = (Path(f"/proc/{pid}/{name}").read_text() for name in ("status", "smaps_rollup"))
    peak, resident, anonymous = (_kib(status, key) for key in ("VmHWM", "VmRSS", "RssAnon"))
    return Memory(peak, resident, anonymous, _kib(smaps, "AnonHugePages"))


def _kib(text: str, key: str) -> int:
    found = re.search(rf"^{key}:\s+(\d+) kB", text, re.MULTILINE)
    return int(found[1]) * 1024 if found else 0


def cpu_seconds(pid: int) -> float:
    """User and system time of all its threads."""
    after_name = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(after_name[11]) + int(after_name[12])) / os.sysconf("SC_CLK_TCK")


class Meter:
    """Whose the processors were since it was made: shares of all of them, from 0 to 1."""

    def __init__(self, ours: Iterable[int] = ()) -> None:
        """`ours` are processes that live throughout; this one counts as ours too, and so do those that it started and
        waited for meanwhile."""
        self._ours = tuple(ours)
        self._begin, self._then = time.monotonic(), self._now()

    def stolen_and_others(self) -> tuple[float, float]:
        """What the host took away from this virtual machine, and what other processes in it used."""
        all_cores = (time.monotonic() - self._begin) * (os.cpu_count() or 1)
        stolen, busy, own = (now - then for now, then in zip(self._now(), self._then, strict=True))
        return (stolen / all_cores, max(0.0, busy - own) / all_cores) if all_cores > 0 else (0.0, 0.0)

    def _now(self) -> tuple[float, float, float]:
        """Seconds stolen, busy, and ours."""
        ticks = [int(x) for x in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]]
        user, nice, system, _, _, irq, softirq, stolen = ticks[:8]
        spent = os.times()
        own = (
            spent.user + spent.system + spent.children_user + spent.children_system + sum(map(cpu_seconds, self._ours))
        )
        tick = os.sysconf("SC_CLK_TCK")
        return stolen / tick, (user + nice + system + irq + softirq) / tick, own


@dataclass(frozen=True, slots=True)
class Finished:
    output: str
    errors: str
    peak: int  # bytes, VmHWM
    seconds: float
    cpu_seconds: float


def run_watched(command: list[str]) -> Finished:
    """Runs a program to its end and watches it; raises SystemExit with its last words if it fails."""
    begin = time.monotonic()
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    seen = [0, 0.0]
    watcher = threading.Thread(target=_watch, args=(child, seen), daemon=True)
    watcher.start()
    output, errors = child.communicate()
    watcher.join()
    if child.returncode:
        last = "\n".join(errors.splitlines()[-15:])
        raise SystemExit(f"{Path(command[0]).name} ended with code {child.returncode}:\n{last}")
    return Finished(output, errors, int(seen[0]), time.monotonic() - begin, seen[1])


def _watch(child: subprocess.Popen[str], seen: list[float]) -> None:
    while child.poll() is None:
        try:
            seen[0] = max(seen[0], memory_of(child.pid).peak)
            seen[1] = cpu_seconds(child.pid)
        except (OSError, IndexError):  # it has just ended
            return
        time.sleep(0.2)
