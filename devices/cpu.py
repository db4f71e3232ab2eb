"""The processors of this machine, one device per NUMA node: what of them this process may use, and computing there.
Knows /proc, /sys and the cgroups' limits; how fast they are is measured in measure.py."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from ciuic_runtime.devices.backend import DEFAULT_STREAM, Event, Ledger, MemoryUse, copy_bytes, host_buffer
from ciuic_runtime.devices.cgroup import CgroupLimits, read_limits
from ciuic_runtime.devices.spec import DeviceSpec

if TYPE_CHECKING:
    import torch

T = TypeVar("T")

# The kernel's flag -> our name, in the order they are shown; what a kernel of ours or of torch can choose by.
_ISA = {
    "avx2": "avx2", "f16c": "f16c", "avx_vnni": "avx_vnni",
    "avx512f": "avx512f", "avx512bw": "avx512bw", "avx512_vnni": "avx512_vnni", "avx512_bf16": "avx512_bf16",
    "avx512_fp16": "avx512_fp16", "amx_int8": "amx_int8", "amx_bf16": "amx_bf16", "amx_fp16": "amx_fp16",
    "asimd": "neon", "asimddp": "dotprod", "i8mm": "i8mm", "bf16": "bf16", "sve": "sve", "sve2": "sve2", "sme": "sme",
}  # fmt: skip
_ARM_PARTS = {
    ("0x41", "0xd0c"): "Neoverse N1", ("0x41", "0xd40"): "Neoverse V1", ("0x41", "0xd49"): "Neoverse N2",
    ("0x41", "0xd4f"): "Neoverse V2", ("0x41", "0xd84"): "Neoverse V3", ("0x41", "0xd8e"): "Neoverse N3",
    ("0x41", "0xd0b"): "Cortex-A76", ("0xc0", "0xac3"): "Ampere-1",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Node:
    number: int | None  # None: the system does not say
    cpus: tuple[int, ...]  # of them, those this process may run on
    memory_bytes: int
    available_bytes: int


def discover_cpus(
    proc: Path = Path("/proc"),
    sys: Path = Path("/sys"),
    affinity: frozenset[int] | None = None,
    limits: CgroupLimits | None = None,
) -> list[DeviceSpec]:
    """One device per NUMA node that this process may run on; rates are left out."""
    affinity = affinity if affinity is not None else _affinity()
    limits = limits if limits is not None else read_limits(proc / "self")
    processors = [p for p in _processors(proc / "cpuinfo") if int(p["processor"]) in affinity]
    nodes = _nodes(proc, sys, affinity)
    return [_spec(i, nodes, processors, limits, sys) for i in range(len(nodes))]


def _spec(
    index: int, nodes: list[_Node], processors: list[dict[str, str]], limits: CgroupLimits, sys: Path
) -> DeviceSpec:
    node = nodes[index]
    cores = _cores(node, nodes, limits)
    memory, free = _memory(node, nodes, limits)
    facts: dict[str, str | int | float | bool] = {"allowed_cpus": _cpu_list_text(node.cpus)}
    if limits.cpus is not None:
        facts["cgroup_cpus"] = limits.cpus
    if limits.memory_bytes is not None:
        facts["cgroup_memory_bytes"] = limits.memory_bytes
    return DeviceSpec(
        name="cpu" if len(nodes) == 1 else f"cpu:{index}",
        kind="CPU",
        model=_model(processors),
        memory_bytes=memory,
        memory_free_bytes=free,
        cores=cores,
        isa=_instruction_sets(processors),
        cache_bytes=_caches(sys, node.cpus),
        numa_node=node.number,
        facts=facts,
    )


def _cores(node: _Node, nodes: list[_Node], limits: CgroupLimits) -> int:
    """Cores in use; a CPU quota is shared out by node and rounded down: more threads are stopped mid-kernel."""
    everywhere = sum(len(n.cpus) for n in nodes)
    if limits.cpus is None or limits.cpus >= everywhere:
        return len(node.cpus)
    return max(1, int(limits.cpus * len(node.cpus) / everywhere))


def _memory(node: _Node, nodes: list[_Node], limits: CgroupLimits) -> tuple[int, int]:
    """What this process may use at most on this node, and what of it is free; a cgroup's limit is shared by size."""
    total = sum(n.memory_bytes for n in nodes)
    share = node.memory_bytes / total if total else 1.0
    memory, free = node.memory_bytes, node.available_bytes
    if limits.memory_bytes is not None:
        memory = min(memory, int(share * limits.memory_bytes))
    if limits.memory_free_bytes is not None:
        free = min(free, int(share * limits.memory_free_bytes))
    return memory, min(free, memory)


def _nodes(proc: Path, sys: Path, affinity: frozenset[int]) -> list[_Node]:
    """The NUMA nodes with allowed processors; one node of unknown number where the system lists none."""
    host = _meminfo(proc / "meminfo")
    total = host.get("MemTotal", 0) or _psutil_memory()[0]
    available = host.get("MemAvailable", 0) or _psutil_memory()[1]
    folders = sorted((sys / "devices/system/node").glob("node[0-9]*"), key=lambda f: int(f.name[4:]))
    used = [(f, cpus) for f in folders if (cpus := parse_cpu_list(_line(f / "cpulist")) & affinity)]
    if len(used) <= 1:
        number = int(used[0][0].name[4:]) if used else None
        return [_Node(number, tuple(sorted(used[0][1] if used else affinity)), total, available)]
    nodes = []
    for folder, cpus in used:
        own = _meminfo(folder / "meminfo")
        node_total = own.get("MemTotal", total // len(used))
        node_free = own.get("MemFree", 0) + own.get("Active(file)", 0) + own.get("Inactive(file)", 0)
        node_available = min(node_free or available, available)
        nodes.append(_Node(int(folder.name[4:]), tuple(sorted(cpus)), node_total, node_available))
    return nodes


def _meminfo(file: Path) -> dict[str, int]:
    """Field -> bytes, from /proc/meminfo ("MemTotal: 5 kB") or a node's ("Node 0 MemTotal: 5 kB")."""
    figures = {}
    for line in _lines(file):
        name, _, value = line.partition(":")
        if (words := value.split()) and words[0].isdigit():
            figures[name.split()[-1]] = int(words[0]) * (1024 if words[-1] == "kB" else 1)
    return figures


def _processors(cpuinfo: Path) -> list[dict[str, str]]:
    processors: list[dict[str, str]] = []
    for line in _lines(cpuinfo):
        key, colon, value = (part.strip() for part in line.partition(":"))
        if key == "processor" and value.isdigit():
            processors.append({})
        if colon and processors:
            processors[-1][key] = value
    return processors


def _model(processors: list[dict[str, str]]) -> str:
    first = processors[0] if processors else {}
    if name := first.get("model name") or first.get("cpu model"):
        return name
    part = (first.get("CPU implementer", ""), first.get("CPU part", ""))
    if part[1]:
        return _ARM_PARTS.get(part, f"ARM implementer {part[0]} part {part[1]}")
    import platform

    return platform.processor() or platform.machine()


def _instruction_sets(processors: list[dict[str, str]]) -> tuple[str, ...]:
    """Those that every processor in use has."""
    flags = [set((p.get("flags") or p.get("Features") or "").split()) for p in processors]
    common = set.intersection(*flags) if flags else set()
    return tuple(name for flag, name in _ISA.items() if flag in common)


def _caches(sys: Path, cpus: Sequence[int]) -> dict[str, int]:
    """Level ("L1d", "L2", "L3") -> bytes, each cache counted once."""
    seen: dict[tuple[str, str], int] = {}
    for cpu in cpus:
        for folder in sorted((sys / f"devices/system/cpu/cpu{cpu}/cache").glob("index*")):
            level, kind, size, shared = (_line(folder / x) for x in ("level", "type", "size", "shared_cpu_list"))
            if kind != "Instruction" and size.endswith("K") and size[:-1].isdigit():
                seen[f"L{level}{'d' if kind == 'Data' else ''}", shared or str(cpu)] = int(size[:-1]) * 1024
    totals: dict[str, int] = {}
    for (name, _), nbytes in sorted(seen.items()):
        totals[name] = totals.get(name, 0) + nbytes
    return totals


def _affinity() -> frozenset[int]:
    if hasattr(os, "sched_getaffinity"):
        return frozenset(os.sched_getaffinity(0))
    return frozenset(range(os.cpu_count() or 1))


def parse_cpu_list(text: str) -> frozenset[int]:
    """The numbers in a list as the kernel writes it: "0-3,8" is {0, 1, 2, 3, 8}."""
    ends = [part.partition("-") for part in text.split(",") if part]
    return frozenset(cpu for first, _, last in ends for cpu in range(int(first), int(last or first) + 1))


def _cpu_list_text(cpus: Sequence[int]) -> str:
    """As the kernel writes it: (0, 1, 2, 8) is "0-2,8"."""
    runs: list[list[int]] = []
    for cpu in sorted(cpus):
        if runs and cpu == runs[-1][-1] + 1:
            runs[-1].append(cpu)
        else:
            runs.append([cpu])
    return ",".join(str(r[0]) if len(r) == 1 else f"{r[0]}-{r[-1]}" for r in runs)


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text(errors="replace").splitlines()
    except OSError:  # not Linux, or hidden from this process: the fact is left out
        return []


def _line(file: Path) -> str:
    return next(iter(_lines(file)), "").strip()


def _psutil_memory() -> tuple[int, int]:
    import psutil  # type: ignore[import-untyped]

    memory = psutil.virtual_memory()
    return memory.total, memory.available


class HostEvent(Event):
    """When the host got there: on a CPU all work before it is done by then."""

    __slots__ = ("at",)

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self.at = time.perf_counter()  # s


class CpuBackend:
    """Computes in place on host memory, in program order: streams are names only, and waiting is never needed."""

    host_memory = True

    def __init__(self, spec: DeviceSpec) -> None:
        import torch

        self.spec = spec
        self._device = torch.device("cpu")
        self._ledger = Ledger(spec.name, spec.memory_bytes)

    @property
    def torch_device(self) -> torch.device:
        return self._device

    def allocate(self, nbytes: int) -> torch.Tensor:
        self._ledger.check(nbytes)
        try:
            return self._ledger.add(host_buffer(nbytes))
        except RuntimeError as error:  # torch's allocator was refused by the system
            raise self._ledger.out_of_memory(nbytes) from error

    def free(self, buffer: torch.Tensor) -> None:
        self._ledger.remove(buffer)

    def copy(self, dst: torch.Tensor, src: torch.Tensor, stream: str | None = None) -> None:
        copy_bytes(dst, src)

    def launch(
        self,
        fn: Callable[..., T],
        *args: Any,
        stream: str | None = None,
        reads: Sequence[torch.Tensor] = (),
        writes: Sequence[torch.Tensor] = (),
        cost_s: float = 0.0,
        name: str = "",
    ) -> T:
        return fn(*args)

    def record(self, stream: str | None = None) -> Event:
        return HostEvent(stream or DEFAULT_STREAM)

    def wait(self, event: Event, stream: str | None = None) -> None:
        _host_event(event)

    def synchronize(self, event: Event | None = None) -> None:
        if event is not None:
            _host_event(event)

    def elapsed(self, start_event: Event, end_event: Event) -> float:
        return _host_event(end_event).at - _host_event(start_event).at

    def host_access(self, tensor: torch.Tensor, write: bool = False) -> None:
        return None

    def memory(self) -> MemoryUse:
        return self._ledger.memory()


def _host_event(event: Event) -> HostEvent:
    if not isinstance(event, HostEvent):
        raise TypeError(f"{type(event).__name__} was recorded by another backend; wait for it there")
    return event
