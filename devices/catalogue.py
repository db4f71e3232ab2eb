"""What data sheets say of known hardware: processors, accelerators, and the links between them, found by the names
that people type. Knows no machine: nothing here was measured, and what a kernel reaches of a figure it does not say.

Tensor rates are dense (without sparsity) and, where a sheet distinguishes, with float32 accumulation. An accelerator's
bandwidth is the sheet's; that of main memory and of links is what a stream reaches of the nominal figure. A processor
can also be described by what it is made of:

    8 x DDR5-4800                                     channels x memory: bandwidth only
    8 x DDR5-4800, 32 x avx512_vnni @ 2.2 GHz         and cores x instruction set @ sustained clock: matrix rates too
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any, Protocol, TypeVar

from ciuic_runtime.devices.errors import InvalidInput
from ciuic_runtime.devices.spec import DeviceSpec, Kind, Link

_GIB = 2**30
# What a stream of reads gets of channels x transfer rate; 8 x DDR4-3200 were measured at 146 of 205 GB/s (STREAM).
DRAM_REACHES = 0.75


class _Named(Protocol):
    @property
    def name(self) -> str: ...
    @property
    def aliases(self) -> tuple[str, ...]: ...


_Entry = TypeVar("_Entry", bound=_Named)


@dataclass(frozen=True, slots=True)
class KnownDevice:
    name: str
    kind: Kind
    memory_bytes: int  # 0: whatever was plugged in
    memory_bandwidth: float  # bytes/s
    matrix_rates: Mapping[str, float]  # dtype -> nominal flop/s (op/s for int8), dense
    pcie: str = ""  # name of the link to the host
    cores: int = 0
    isa: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()  # other names, such as the driver's

    def device(self, name: str, memory_bytes: int = 0) -> DeviceSpec:
        """Such a device under a name of the topology (`cuda:0`)."""
        values = {"memory_bytes": memory_bytes or self.memory_bytes}
        return DeviceSpec(name=name, **{**self.values(), **values}, basis="estimated")

    def values(self) -> dict[str, Any]:
        """The fields of a DeviceSpec that are known."""
        known = {
            "kind": self.kind,
            "model": self.name,
            "memory_bytes": self.memory_bytes,
            "memory_bandwidth": self.memory_bandwidth,
            "matrix_rates": dict(self.matrix_rates),
            "cores": self.cores,
            "isa": self.isa,
            "facts": {"pcie": self.pcie} if self.pcie else {},
        }
        return {key: value for key, value in known.items() if value}


@dataclass(frozen=True, slots=True)
class KnownLink:
    name: str
    bandwidth: float  # bytes/s in one direction, of large copies
    latency: float  # s until the first byte, as software sees it
    aliases: tuple[str, ...] = field(default=())

    def link(self, src: str, dst: str) -> Link:
        return Link(src, dst, **self.values(), basis="estimated")

    def values(self) -> dict[str, Any]:
        """The fields of a Link that are known."""
        return {"bandwidth": self.bandwidth, "latency": self.latency}


def find_device(name: str) -> KnownDevice:
    """The one processor or accelerator that goes by this name, or that it describes."""
    return _described(name) if re.search(r"DDR\d", name, re.IGNORECASE) else _find(name, DEVICES, "hardware")


def find_link(name: str) -> KnownLink:
    """The one link that goes by this name: pcie4-x16, nvme4, ethernet-10g, infiniband-ndr."""
    return _find(name, LINKS, "links")


def memory_bandwidth(channels: int, megatransfers: int) -> float:
    """Bytes/s that a stream gets of so many 64-bit channels."""
    return DRAM_REACHES * channels * megatransfers * 1e6 * 8


def cpu_rates(cores: int, isa: str, clock: float) -> dict[str, float]:
    """Nominal matrix rates of `cores` cores with these vector units at `clock` Hz."""
    return {dtype: cores * clock * per_cycle for dtype, per_cycle in OPERATIONS_PER_CYCLE[isa].items()}


# Names


_NOISE = re.compile(
    r"\(r\)|\(tm\)|@.*|\b(nvidia|geforce|tesla|quadro|amd|intel|blackwell|workstation edition|server edition|"
    r"\d+-core|processor|cpu|gpu|graphics card)\b"
)


def _find(name: str, entries: Iterable[_Entry], what: str) -> _Entry:
    """By the whole name, an alias, or by words that only one entry has all of."""
    spelled = {_key(label): entry for entry in entries for label in (entry.name, *entry.aliases)}
    if (entry := spelled.get(_key(name))) is not None:
        return entry
    words = _words(name)
    some = {e.name: e for e in spelled.values() if words and words <= _words(e.name)}
    if len(some) == 1:
        return next(iter(some.values()))
    if some:
        raise InvalidInput(f"{_shown(name)} may be any of {', '.join(some)}; write one of them")
    labels = {_key(entry.name): entry.name for entry in spelled.values()}
    near = [spelled[key].name for key in get_close_matches(_key(name), spelled, n=5, cutoff=0.5)]
    raise InvalidInput(
        f"the catalogue has no {what} named {_shown(name)}; nearest: "
        f"{', '.join(dict.fromkeys(near or labels.values()))}; or give the figures themselves"
    )


def _words(name: str) -> set[str]:
    """RTX 4090, RTX-4090 and NVIDIA GeForce RTX 4090 -> {rtx, 4090}."""
    return set(re.findall(r"[a-z0-9.]+", _NOISE.sub(" ", name.lower())))


def _key(name: str) -> str:
    """The name without what people write in different ways: case, vendor, blanks, the .0 of a version."""
    return re.sub(r"\.0\b|[^a-z0-9.]", "", _NOISE.sub(" ", name.lower()))


def _shown(name: str) -> str:
    return repr(name if len(name) <= 60 else name[:57] + "...")


_DESCRIPTION = re.compile(
    r"(?P<channels>\d{1,3}) ?x ?(?P<memory>DDR[345])-(?P<rate>\d{3,5})"
    r"(, ?(?P<cores>\d{1,4}) ?x ?(?P<isa>\w+) ?@ ?(?P<clock>\d{1,2}(\.\d{1,3})?) ?GHz)?",
    re.IGNORECASE,
)


def _described(text: str) -> KnownDevice:
    match = _DESCRIPTION.fullmatch(" ".join(text.split()))
    isa = (match["isa"] or "").lower() if match else ""
    if not match or (isa and isa not in OPERATIONS_PER_CYCLE):
        raise InvalidInput(
            f"{_shown(text)} describes no processor; write channels x memory, as in 8 x DDR5-4800, and, for matrix "
            f"rates, cores x instruction set @ clock, as in 8 x DDR5-4800, 32 x avx512_vnni @ 2.2 GHz; "
            f"instruction sets: {', '.join(OPERATIONS_PER_CYCLE)}"
        )
    channels, rate, cores, clock = (float(match[key] or 0) for key in ("channels", "rate", "cores", "clock"))
    low, high = 1, 24
    if not low <= channels <= high or not 400 <= rate <= 20_000 or (isa and not (cores and 0.1 <= clock <= 10)):
        raise InvalidInput(
            f"{_shown(text)} is not sensible: a processor has {low} to {high} channels of 400 to 20000 MT/s and, if "
            "given, at least one core, of 0.1 to 10 GHz"
        )
    return KnownDevice(
        f"{int(channels)} x {match['memory'].upper()}-{int(rate)}" + (f", {int(cores)} cores" if isa else ""),
        "CPU",
        0,
        memory_bandwidth(int(channels), int(rate)),
        cpu_rates(int(cores), isa, clock * 1e9) if isa else {},
        cores=int(cores),
        isa=_isa(isa),
    )


def _isa(units: str) -> tuple[str, ...]:
    """What software can ask for, however wide the units behind it are."""
    return (units.removesuffix("_256"),) if units else ()


# Processors

# Operations per core and cycle: lanes x 2 (multiply, add) x units. int8 without VNNI takes three instructions
# (vpmaddubsw, vpmaddwd, vpaddd) where VNNI takes one. avx512_vnni_256: 512-bit instructions on 256-bit units (Zen 4).
OPERATIONS_PER_CYCLE: Mapping[str, Mapping[str, float]] = {
    "neon": {"float32": 16, "int8": 64},
    "avx2": {"float32": 32, "int8": 128 / 3},
    "avx_vnni": {"float32": 32, "int8": 128},
    "avx512f": {"float32": 64, "int8": 256 / 3},
    "avx512_vnni": {"float32": 64, "int8": 256},
    "avx512_vnni_256": {"float32": 32, "bfloat16": 64, "int8": 128},
    "avx512_bf16": {"float32": 64, "bfloat16": 128, "int8": 256},
    "amx_bf16": {"float32": 64, "bfloat16": 1024, "int8": 2048},
}


def _cpu(
    name: str, channels: int, rate: int, cores: int, isa: str, ghz: float, pcie: str, aliases: tuple[str, ...] = ()
) -> KnownDevice:
    """`ghz`: the base clock, which all cores hold."""
    rates = cpu_rates(cores, isa, ghz * 1e9)
    return KnownDevice(name, "CPU", 0, memory_bandwidth(channels, rate), rates, pcie, cores, _isa(isa), aliases)


_CPUS = (
    _cpu("Core i7-13700K", 2, 5600, 8, "avx_vnni", 3.4, "pcie5-x16"),  # performance cores only
    _cpu("Core i9-13900K", 2, 5600, 8, "avx_vnni", 3.0, "pcie5-x16"),
    _cpu("Core i9-14900K", 2, 5600, 8, "avx_vnni", 3.2, "pcie5-x16"),
    _cpu("Ryzen 7 5800X", 2, 3200, 8, "avx2", 3.8, "pcie4-x16"),
    _cpu("Ryzen 9 5950X", 2, 3200, 16, "avx2", 3.4, "pcie4-x16"),
    _cpu("Ryzen 7 7700X", 2, 5200, 8, "avx512_vnni_256", 4.5, "pcie5-x16"),
    _cpu("Ryzen 9 7950X", 2, 5200, 16, "avx512_vnni_256", 4.5, "pcie5-x16"),
    _cpu("Ryzen 9 9950X", 2, 5600, 16, "avx512_bf16", 4.3, "pcie5-x16"),
    _cpu("Threadripper PRO 5995WX", 8, 3200, 64, "avx2", 2.7, "pcie4-x16"),
    _cpu("Threadripper PRO 7995WX", 8, 5200, 96, "avx512_vnni_256", 2.5, "pcie5-x16"),
    _cpu("EPYC 7742", 8, 3200, 64, "avx2", 2.25, "pcie4-x16"),
    _cpu("EPYC 7763", 8, 3200, 64, "avx2", 2.45, "pcie4-x16"),
    _cpu("EPYC 9374F", 12, 4800, 32, "avx512_vnni_256", 3.85, "pcie5-x16"),
    _cpu("EPYC 9654", 12, 4800, 96, "avx512_vnni_256", 2.4, "pcie5-x16"),
    _cpu("EPYC 9755", 12, 6000, 128, "avx512_bf16", 2.7, "pcie5-x16"),
    _cpu("Xeon Platinum 8380", 8, 3200, 40, "avx512_vnni", 2.3, "pcie4-x16"),
    _cpu("Xeon Gold 6430", 8, 4400, 32, "amx_bf16", 2.1, "pcie5-x16"),
    _cpu("Xeon Gold 6454S", 8, 4800, 32, "amx_bf16", 2.2, "pcie5-x16"),
    _cpu("Xeon Platinum 8480+", 8, 4800, 56, "amx_bf16", 2.0, "pcie5-x16", ("Xeon Platinum 8480", "Xeon 8480C")),
    _cpu("Xeon 6980P", 12, 6400, 128, "amx_bf16", 2.0, "pcie5-x16"),
)


# Accelerators


def _gpu(
    name: str, gib: float, gbytes: float, pcie: str, *aliases: str, float16: float, float32: float,
    bfloat16: float = 0.0, int8: float = 0.0, float8: float = 0.0,
) -> KnownDevice:  # fmt: skip
    """`gbytes`: bandwidth in GB/s; rates in Tflop/s."""
    rates = {"float32": float32, "float16": float16, "bfloat16": bfloat16, "float8": float8, "int8": int8}
    known = {dtype: rate * 1e12 for dtype, rate in rates.items() if rate}
    return KnownDevice(name, "GPU", int(gib * _GIB), gbytes * 1e9, known, pcie, aliases=aliases)


_H100 = {"bfloat16": 989.0, "float16": 989.0, "int8": 1979.0, "float8": 1979.0, "float32": 67.0}
_A100 = {"bfloat16": 312.0, "float16": 312.0, "int8": 624.0, "float32": 19.5}
_GPUS = (
    # Data centre
    _gpu("V100 SXM2 16GB", 16, 900, "pcie3-x16", float16=125, float32=15.7),
    _gpu("V100 SXM2 32GB", 32, 900, "pcie3-x16", float16=125, float32=15.7),
    _gpu("V100 PCIe 16GB", 16, 900, "pcie3-x16", float16=112, float32=14),
    _gpu("V100 PCIe 32GB", 32, 900, "pcie3-x16", float16=112, float32=14),
    _gpu("T4", 16, 320, "pcie3-x16", float16=65, float32=8.1, int8=130),
    _gpu("A100 SXM 40GB", 40, 1555, "pcie4-x16", "A100-SXM4-40GB", **_A100),
    _gpu("A100 PCIe 40GB", 40, 1555, "pcie4-x16", "A100-PCIE-40GB", **_A100),
    _gpu("A100 SXM 80GB", 80, 2039, "pcie4-x16", "A100-SXM4-80GB", **_A100),
    _gpu("A100 PCIe 80GB", 80, 1935, "pcie4-x16", "A100 80GB PCIe", **_A100),
    _gpu("L4", 24, 300, "pcie4-x16", bfloat16=121, float16=121, int8=242, float8=242, float32=30.3),
    _gpu("L40S", 48, 864, "pcie4-x16", bfloat16=362, float16=362, int8=733, float8=733, float32=91.6),
    _gpu("H100 SXM", 80, 3350, "pcie5-x16", "H100 80GB HBM3", "H100 SXM5", "H100 SXM5 80GB", **_H100),
    _gpu("H100 PCIe", 80, 2000, "pcie5-x16", bfloat16=756, float16=756, int8=1513, float8=1513, float32=51),
    _gpu("H100 NVL", 94, 3900, "pcie5-x16", bfloat16=835, float16=835, int8=1671, float8=1671, float32=60),
    _gpu("H800", 80, 3350, "pcie5-x16", "H800 SXM", "H800 80GB HBM3", **_H100),
    _gpu("H200", 141e9 / _GIB, 4800, "pcie5-x16", "H200 SXM", "H200 141GB HBM3e", **_H100),
    _gpu("B200", 180e9 / _GIB, 8000, "pcie5-x16", bfloat16=2250, float16=2250, int8=4500, float8=4500, float32=80),
    # Workstation
    _gpu("RTX A6000", 48, 768, "pcie4-x16", bfloat16=154.8, float16=154.8, int8=309.7, float32=38.7),
    _gpu("RTX 6000 Ada", 48, 960, "pcie4-x16", bfloat16=364, float16=364, int8=728.5, float8=728.5, float32=91.1),
    _gpu("RTX PRO 6000", 96, 1792, "pcie5-x16", bfloat16=503.8, float16=503.8, int8=1007.6, float8=1007.6, float32=126),
    # Desktop
    _gpu("RTX 3060", 12, 360, "pcie4-x16", "RTX 3060 12GB", bfloat16=25.5, float16=25.5, int8=102, float32=12.7),
    _gpu("RTX 3090", 24, 936, "pcie4-x16", bfloat16=71, float16=71, int8=284, float32=35.6),
    _gpu("RTX 4080", 16, 716.8, "pcie4-x16", bfloat16=97.5, float16=97.5, int8=389.9, float8=194.9, float32=48.7),
    _gpu("RTX 4090", 24, 1008, "pcie4-x16", bfloat16=165.2, float16=165.2, int8=660.6, float8=330.3, float32=82.6),
    _gpu("RTX 5090", 32, 1792, "pcie5-x16", bfloat16=209.5, float16=209.5, int8=838, float8=419, float32=104.8),
)

DEVICES = (*_CPUS, *_GPUS)


# Links

# Bytes/s of a lane after its line code. Copies of pinned memory reach about four fifths: packet headers, credits.
_PCIE_LANE = {3: 0.985e9, 4: 1.969e9, 5: 3.938e9}
_PCIE_REACHES = 0.8
_PCIE_LATENCY = 10e-6  # s: launching a copy and hearing of its end
_ETHERNET_REACHES = 0.94  # of the wire, after Ethernet, IP and TCP headers
_ETHERNET_LATENCY = {1: 100e-6, 10: 50e-6, 25: 30e-6, 100: 20e-6, 400: 15e-6}  # Gbit/s -> s, through the kernel's TCP
_INFINIBAND = {"hdr": 200, "ndr": 400}  # Gbit/s
_NVME = {3: 3.2e9, 4: 6.5e9, 5: 12e9}  # bytes/s, large reads of a drive of that PCIe generation with 4 lanes
_NVLINK = {3: 300e9, 4: 450e9, 5: 900e9}  # bytes/s of all links of one GPU, one direction

LINKS = (
    *(
        KnownLink(f"pcie{gen}-x{lanes}", lanes * lane * _PCIE_REACHES, _PCIE_LATENCY)
        for gen, lane in _PCIE_LANE.items()
        for lanes in (16, 8, 4)
    ),
    *(KnownLink(f"nvme{gen}", rate, 100e-6, (f"NVMe PCIe {gen}", f"NVMe gen {gen}")) for gen, rate in _NVME.items()),
    *(
        KnownLink(
            f"ethernet-{gbit}g",
            gbit * 1e9 / 8 * _ETHERNET_REACHES,
            latency,
            (f"{gbit}GbE", f"{gbit}G Ethernet", f"{gbit} Gbit/s Ethernet"),
        )
        for gbit, latency in _ETHERNET_LATENCY.items()
    ),
    *(KnownLink(f"infiniband-{k}", g * 1e9 / 8 * 0.95, 2e-6, (f"IB {k}",)) for k, g in _INFINIBAND.items()),
    *(KnownLink(f"nvlink{gen}", rate * 0.85, 5e-6) for gen, rate in _NVLINK.items()),
)
