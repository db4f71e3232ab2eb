"""CPU discovery from files as Linux shows them on an x86 server, a two-socket one and an ARM one."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ciuic_runtime.devices.cgroup import CgroupLimits
from ciuic_runtime.devices.cpu import discover_cpus, parse_cpu_list
from ciuic_runtime.devices.spec import DeviceSpec

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
NO_LIMITS = CgroupLimits()
XEON_FLAGS = (
    "fpu vme sse2 ht avx f16c hypervisor avx2 avx512f avx512dq avx512bw avx512vl avx_vnni avx512_bf16 "
    "avx512_vnni avx512_fp16 amx_bf16 amx_tile amx_int8"
)
XEON = """processor\t: {cpu}
vendor_id\t: GenuineIntel
model name\t: Intel(R) Xeon(R) Platinum 8480+
cache size\t: 107520 KB
flags\t\t: {flags}

"""
NEOVERSE = """processor\t: {cpu}
BogoMIPS\t: 2000.00
Features\t: fp asimd evtstrm aes sha2 crc32 atomics fphp asimdhp asimddp sve sve2 i8mm bf16
CPU implementer\t: 0x41
CPU architecture: 8
CPU part\t: {part}

"""


class Machine:
    """A /proc and a /sys in a temporary folder."""

    def __init__(self, folder: Path) -> None:
        self.proc, self.sys = folder / "proc", folder / "sys"
        self.proc.mkdir()

    def cpuinfo(self, text: str) -> None:
        (self.proc / "cpuinfo").write_text(text)

    def meminfo(self, total: int, available: int) -> None:
        text = f"MemTotal:       {total // KIB} kB\nMemFree:  1 kB\nMemAvailable:   {available // KIB} kB\n"
        (self.proc / "meminfo").write_text(text + "HugePages_Total:       0\n")

    def node(self, number: int, cpus: str, total: int = GIB, free: int = GIB) -> None:
        node = self.sys / f"devices/system/node/node{number}"
        node.mkdir(parents=True)
        (node / "cpulist").write_text(f"{cpus}\n")
        lines = {"MemTotal": total, "MemFree": free, "Active(file)": GIB, "Inactive(file)": GIB}
        (node / "meminfo").write_text("".join(f"Node {number} {k}:  {v // KIB} kB\n" for k, v in lines.items()))

    def cache(self, cpu: int, index: int, level: int, kind: str, size: str, shared: str) -> None:
        folder = self.sys / f"devices/system/cpu/cpu{cpu}/cache/index{index}"
        folder.mkdir(parents=True)
        for name, value in {"level": level, "type": kind, "size": size, "shared_cpu_list": shared}.items():
            (folder / name).write_text(f"{value}\n")

    def discover(self, cpus: str, limits: CgroupLimits = NO_LIMITS) -> list[DeviceSpec]:
        return discover_cpus(self.proc, self.sys, parse_cpu_list(cpus), limits)


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


@pytest.fixture
def xeon(machine: Machine) -> Machine:
    machine.cpuinfo("".join(XEON.format(cpu=i, flags=XEON_FLAGS) for i in range(4)))
    machine.meminfo(64 * GIB, 60 * GIB)
    machine.node(0, "0-3")
    return machine


@pytest.fixture
def two_sockets(machine: Machine) -> Machine:
    machine.cpuinfo("".join(XEON.format(cpu=i, flags=XEON_FLAGS) for i in range(8)))
    machine.meminfo(96 * GIB, 80 * GIB)
    machine.node(0, "0-3", 64 * GIB, 50 * GIB)
    machine.node(1, "4-7", 32 * GIB, 10 * GIB)
    return machine


def test_one_node_is_called_cpu(xeon: Machine) -> None:
    (cpu,) = xeon.discover("0-3")
    assert (cpu.name, cpu.kind, cpu.model) == ("cpu", "CPU", "Intel(R) Xeon(R) Platinum 8480+")
    assert (cpu.cores, cpu.numa_node, cpu.memory_bytes, cpu.memory_free_bytes) == (4, 0, 64 * GIB, 60 * GIB)
    assert cpu.isa == (
        "avx2", "f16c", "avx_vnni", "avx512f", "avx512bw", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_int8",
        "amx_bf16",
    )  # fmt: skip
    assert cpu.basis == "unknown"
    assert dict(cpu.facts) == {"allowed_cpus": "0-3"}


def test_only_the_cores_in_the_affinity_count(xeon: Machine) -> None:
    (cpu,) = xeon.discover("0,2-3")
    assert (cpu.cores, cpu.facts["allowed_cpus"]) == (3, "0,2-3")


def test_only_instructions_that_every_core_has_count(machine: Machine) -> None:
    machine.cpuinfo(XEON.format(cpu=0, flags="avx2 avx_vnni") + XEON.format(cpu=1, flags="avx2"))
    machine.meminfo(GIB, GIB)
    assert machine.discover("0-1")[0].isa == ("avx2",)
    assert machine.discover("0")[0].isa == ("avx2", "avx_vnni")


@pytest.mark.parametrize(("quota", "cores"), [(0.5, 1), (2.5, 2), (4.0, 4), (64.0, 4)])
def test_a_cpu_quota_limits_the_cores(xeon: Machine, quota: float, cores: int) -> None:
    (cpu,) = xeon.discover("0-3", CgroupLimits(cpus=quota))
    assert (cpu.cores, cpu.facts["cgroup_cpus"]) == (cores, quota)


def test_a_cgroup_limits_the_memory(xeon: Machine) -> None:
    (cpu,) = xeon.discover("0-3", CgroupLimits(memory_bytes=16 * GIB, memory_free_bytes=3 * GIB))
    assert (cpu.memory_bytes, cpu.memory_free_bytes) == (16 * GIB, 3 * GIB)
    assert cpu.facts["cgroup_memory_bytes"] == 16 * GIB


def test_no_more_is_free_than_is_allowed(xeon: Machine) -> None:
    assert xeon.discover("0-3", CgroupLimits(memory_bytes=16 * GIB))[0].memory_free_bytes == 16 * GIB


def test_a_full_host_limits_what_is_free(xeon: Machine) -> None:
    xeon.meminfo(64 * GIB, 2 * GIB)
    (cpu,) = xeon.discover("0-3", CgroupLimits(memory_bytes=16 * GIB, memory_free_bytes=16 * GIB))
    assert cpu.memory_free_bytes == 2 * GIB


def test_two_nodes_are_two_devices(two_sockets: Machine) -> None:
    first, second = two_sockets.discover("0-7")
    assert [(d.name, d.numa_node, d.cores, d.memory_bytes) for d in (first, second)] == [
        ("cpu:0", 0, 4, 64 * GIB),
        ("cpu:1", 1, 4, 32 * GIB),
    ]
    assert (first.memory_free_bytes, second.memory_free_bytes) == (52 * GIB, 12 * GIB)  # with the page cache
    assert second.facts["allowed_cpus"] == "4-7"


def test_a_process_bound_to_one_node_sees_one_device(two_sockets: Machine) -> None:
    (cpu,) = two_sockets.discover("4-7")
    assert (cpu.name, cpu.numa_node, cpu.cores) == ("cpu", 1, 4)


def test_limits_are_shared_out_over_nodes(two_sockets: Machine) -> None:
    limits = CgroupLimits(memory_bytes=24 * GIB, memory_free_bytes=12 * GIB, cpus=5.0)
    first, second = two_sockets.discover("0-7", limits)
    assert (first.memory_bytes, second.memory_bytes) == (16 * GIB, 8 * GIB)
    assert (first.memory_free_bytes, second.memory_free_bytes) == (8 * GIB, 4 * GIB)
    assert (first.cores, second.cores) == (2, 2)


def test_caches_are_summed_once_each(xeon: Machine) -> None:
    for cpu in range(4):
        xeon.cache(cpu, 0, 1, "Data", "48K", f"{cpu}")
        xeon.cache(cpu, 1, 1, "Instruction", "32K", f"{cpu}")
        xeon.cache(cpu, 2, 2, "Unified", "2048K", f"{cpu // 2 * 2}-{cpu // 2 * 2 + 1}")
        xeon.cache(cpu, 3, 3, "Unified", "107520K", "0-3")
    assert dict(xeon.discover("0-3")[0].cache_bytes) == {"L1d": 4 * 48 * KIB, "L2": 4 * MIB, "L3": 105 * MIB}
    assert xeon.discover("0")[0].cache_bytes["L2"] == 2 * MIB


def test_arm(machine: Machine) -> None:
    machine.cpuinfo("".join(NEOVERSE.format(cpu=i, part="0xd4f") for i in range(2)))
    machine.meminfo(GIB, GIB)
    (cpu,) = machine.discover("0-1")
    assert (cpu.model, cpu.isa) == ("Neoverse V2", ("neon", "dotprod", "i8mm", "bf16", "sve", "sve2"))
    machine.cpuinfo(NEOVERSE.format(cpu=0, part="0xfff"))
    assert machine.discover("0")[0].model == "ARM implementer 0x41 part 0xfff"


def test_a_system_that_shows_nothing_still_has_a_cpu(tmp_path: Path) -> None:
    (cpu,) = discover_cpus(tmp_path, tmp_path, frozenset({0, 1}), NO_LIMITS)
    assert (cpu.name, cpu.cores, cpu.numa_node, cpu.isa) == ("cpu", 2, None, ())
    assert cpu.memory_bytes > 0


def test_this_machine() -> None:
    cpus = discover_cpus()
    assert 1 <= sum(c.cores for c in cpus) <= (os.cpu_count() or 1)
    for cpu in cpus:
        assert cpu.memory_free_bytes is not None
        assert 0 < cpu.memory_free_bytes <= cpu.memory_bytes


def test_cpu_lists() -> None:
    assert parse_cpu_list("0-2,8,10-11") == {0, 1, 2, 8, 10, 11}
    assert parse_cpu_list("") == frozenset()
