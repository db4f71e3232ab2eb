"""What the hardware is: frozen facts with units, about devices, the links between them, and the whole topology.
Knows nothing of how the facts were found (discovery and measuring are one file per kind beside this one)."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from ciuic_runtime.devices.errors import InvalidInput

Kind = Literal["CPU", "GPU", "SIM", "DISK"]
Basis = Literal["measured", "estimated", "unknown"]


@dataclass(frozen=True, slots=True)
class DeviceSpec:
    """One place that can hold bytes, and mostly also compute.

    Names are `[node/]kind[:index]`: `cpu`, `cpu:1`, `cuda:0`, `sim:0`, `disk`. Rates are what a stream of
    large reads or a large matrix product reaches with `threads` threads; None or missing means not known."""

    name: str
    kind: Kind
    model: str = ""  # "NVIDIA H100 80GB HBM3", "Intel(R) Xeon(R) Processor"
    memory_bytes: int = 0  # what this process may use at most, bytes
    memory_free_bytes: int | None = None  # of that, free when looked at; None: not known
    memory_bandwidth: float | None = None  # read, bytes/s, with `threads` threads
    memory_bandwidth_by_threads: Mapping[int, float] = field(default_factory=dict)  # threads -> bytes/s
    matrix_rates: Mapping[str, float] = field(default_factory=dict)  # dtype -> flop/s (op/s for int8)
    matrix_vector_rates: Mapping[str, float] = field(default_factory=dict)  # dtype -> weight bytes/s at one row
    bandwidth_by_access: Mapping[int, float] = field(default_factory=dict)  # disk: bytes per read -> bytes/s
    launch_overhead: float | None = None  # s per operator call, measured; None: not known
    matrix_launch_overhead: Mapping[str, float] = field(default_factory=dict)  # dtype -> s per small matrix product
    cores: int = 0  # cores this process may use
    threads: int = 0  # threads the rates above were measured with; 0: not applicable
    isa: tuple[str, ...] = ()  # instruction sets that matter: avx2, avx512_vnni, amx_bf16, neon, ...
    cache_bytes: Mapping[str, int] = field(default_factory=dict)  # "L2" -> bytes, summed over the cores in use
    numa_node: int | None = None
    facts: Mapping[str, str | int | float | bool] = field(default_factory=dict)  # for people: PCIe, driver, uuid
    basis: Basis = "unknown"  # of the rates
    usable: bool = True  # False: it is there, but this installation cannot compute on it
    why_not_usable: str = ""

    @property
    def simulated(self) -> bool:
        return self.kind == "SIM"

    @property
    def can_compute(self) -> bool:
        return self.kind != "DISK"


@dataclass(frozen=True, slots=True)
class Link:
    """The way from one device's memory to another's; one direction."""

    src: str
    dst: str
    bandwidth: float  # bytes/s
    latency: float = 0.0  # s
    basis: Basis = "unknown"
    domains: tuple[str, ...] = ()  # what it runs through together with other links
    bandwidth_by_size: Mapping[int, float] = field(default_factory=dict)  # bytes per transfer -> bytes/s

    def transfer_time(self, nbytes: float) -> float:
        """Seconds for one transfer that has the link, and the domains it runs through, to itself."""
        return self.latency + nbytes / self.bandwidth_at(nbytes)

    def bandwidth_at(self, nbytes: float) -> float:
        """Bytes/s of transfers of this size: straight between known sizes in log-log space, level beyond them."""
        if not self.bandwidth_by_size:
            return self.bandwidth
        sizes = sorted(self.bandwidth_by_size)
        right = min(bisect_left(sizes, nbytes), len(sizes) - 1)
        left = right - 1 if sizes[right] > nbytes and right else right
        low, high = (self.bandwidth_by_size[sizes[i]] for i in (left, right))
        if left == right:
            return high
        share = math.log(nbytes / sizes[left]) / math.log(sizes[right] / sizes[left])
        return low * math.pow(high / low, share)


@dataclass(frozen=True, slots=True)
class Domain:
    """What several links run through at once: a memory controller, a disk, a PCIe root, a network card."""

    name: str
    bandwidth: float  # bytes/s, of all transfers through it together
    basis: Basis = "unknown"


# Where no link was measured or declared: a pessimistic PCIe 3.0 x16 or memory copy, or a modest NVMe drive; labelled
# estimated.
ASSUMED_LINK_BANDWIDTH = 10e9  # bytes/s
ASSUMED_LINK_LATENCY = 20e-6  # s
ASSUMED_DISK_BANDWIDTH = 2e9  # bytes/s
ASSUMED_DISK_LATENCY = 200e-6  # s


@dataclass(frozen=True, slots=True)
class Topology:
    """All devices and links that a schedule may use. Names are unique; links name known devices and domains."""

    devices: tuple[DeviceSpec, ...]
    links: tuple[Link, ...] = ()
    domains: tuple[Domain, ...] = ()

    def __post_init__(self) -> None:
        names = [d.name for d in self.devices]
        if not names:
            raise InvalidInput("the topology has no devices; declare at least one [[device]]")
        if twice := sorted({n for n in names if names.count(n) > 1}):
            raise InvalidInput(f"device {twice[0]} is declared twice; device names must be unique")
        for link in self.links:
            if stranger := {link.src, link.dst} - set(names):
                raise InvalidInput(
                    f"link {link.src} -> {link.dst} names unknown device {min(stranger)}; there are {', '.join(names)}"
                )
        self._check_domains()

    @property
    def compute_devices(self) -> tuple[DeviceSpec, ...]:
        return tuple(d for d in self.devices if d.can_compute and d.usable)

    def device(self, name: str) -> DeviceSpec:
        for device in self.devices:
            if device.name == name:
                return device
        raise InvalidInput(f"no device named {name}; there are {', '.join(d.name for d in self.devices)}")

    def by_kind(self, kind: str) -> list[DeviceSpec]:
        return [d for d in self.devices if d.kind == kind.upper()]

    def link(self, src: str, dst: str) -> Link:
        """The declared or measured link, else an assumed one whose basis is "estimated"."""
        for link in self.links:
            if (link.src, link.dst) == (src, dst):
                return link
        if any(d.kind == "DISK" for d in self.devices if d.name in (src, dst)):
            return Link(src, dst, ASSUMED_DISK_BANDWIDTH, ASSUMED_DISK_LATENCY, "estimated")
        return Link(src, dst, ASSUMED_LINK_BANDWIDTH, ASSUMED_LINK_LATENCY, "estimated")

    def only(self, names: Iterable[str]) -> Topology:
        """The same topology with only these devices, the links among them and what those run through."""
        keep = {self.device(n).name for n in names}
        links = tuple(x for x in self.links if x.src in keep and x.dst in keep)
        through = {name for x in links for name in x.domains}
        return Topology(
            tuple(d for d in self.devices if d.name in keep), links, tuple(d for d in self.domains if d.name in through)
        )

    def _check_domains(self) -> None:
        known = [d.name for d in self.domains]
        if twice := sorted({n for n in known if known.count(n) > 1}):
            raise InvalidInput(f"domain {twice[0]} is declared twice; domain names must be unique")
        for link in self.links:
            if stranger := set(link.domains) - set(known):
                raise InvalidInput(
                    f"link {link.src} -> {link.dst} runs through unknown domain {min(stranger)}; declare it in a "
                    f"[[domain]] with name and bandwidth (there are: {', '.join(known) or 'none'})"
                )
            if len(set(link.domains)) < len(link.domains):
                raise InvalidInput(
                    f"link {link.src} -> {link.dst} names a domain twice ({', '.join(link.domains)}); once is enough"
                )
