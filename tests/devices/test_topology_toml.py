"""A topology survives TOML to the last bit, and a file that says something impossible gets one line that helps."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ciuic_runtime.devices.errors import InvalidInput
from ciuic_runtime.devices.manager import DeviceManager
from ciuic_runtime.devices.spec import DeviceSpec, Domain, Link, Topology
from ciuic_runtime.devices.toml import topology_from_toml, topology_to_toml

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
rates = st.floats(1e6, 1e15)
dtypes = st.sampled_from(["float32", "bfloat16", "int8"])
names = st.sampled_from(
    [("cpu", "CPU"), ("cpu:1", "CPU"), ("cuda:0", "GPU"), ("node1/cuda:0", "GPU"), ("sim:0", "SIM")]
)
facts = st.one_of(texts, st.booleans(), st.integers(-(2**60), 2**60), st.floats(allow_nan=False, allow_infinity=False))


@st.composite
def devices(draw: st.DrawFn) -> DeviceSpec:
    name, kind = draw(names)
    return DeviceSpec(
        name=name,
        kind=kind,  # type: ignore[arg-type]
        model=draw(texts),
        memory_bytes=draw(st.integers(4096, 2**60)),
        memory_free_bytes=draw(st.none() | st.integers(0, 2**60)),
        memory_bandwidth=draw(st.none() | rates),
        memory_bandwidth_by_threads=draw(st.dictionaries(st.integers(1, 999), rates, max_size=3)),
        matrix_rates=draw(st.dictionaries(dtypes, rates)),
        matrix_vector_rates=draw(st.dictionaries(dtypes, rates)),
        bandwidth_by_access=draw(st.dictionaries(st.integers(1, 10**9), rates, max_size=3)),
        launch_overhead=draw(st.none() | st.floats(0, 1)),
        matrix_launch_overhead=draw(st.dictionaries(dtypes, st.floats(0, 1))),
        cores=draw(st.integers(0, 512)),
        threads=draw(st.integers(0, 512)),
        isa=tuple(draw(st.lists(texts, max_size=3))),
        cache_bytes=draw(st.dictionaries(texts, st.integers(1, 2**40), max_size=2)),
        numa_node=draw(st.none() | st.integers(0, 8)),
        facts=draw(st.dictionaries(texts, facts, max_size=3)),
        basis=draw(st.sampled_from(["measured", "estimated", "unknown"])),
        usable=draw(st.booleans()),
        why_not_usable=draw(texts),
    )


@st.composite
def topologies(draw: st.DrawFn) -> Topology:
    found = draw(st.lists(devices(), min_size=1, max_size=4, unique_by=lambda d: d.name))
    ways = [(a.name, b.name) for a in found for b in found if a is not b]
    chosen = draw(st.lists(st.sampled_from(ways), unique=True, max_size=4)) if ways else []
    bases = st.sampled_from(["measured", "estimated", "unknown"])
    shared = st.text("abcdefgh .:-", min_size=1, max_size=9).filter(lambda name: name == name.strip())
    known = draw(st.lists(shared, unique=True, max_size=3))
    domains = tuple(Domain(name, draw(rates), draw(bases)) for name in known)
    through = st.lists(st.sampled_from(known), unique=True).map(tuple) if known else st.just(())
    sizes = st.dictionaries(st.integers(1, 10**12), rates, max_size=3)
    links = tuple(
        Link(a, b, draw(rates), draw(st.floats(0, 1)), draw(bases), draw(through), draw(sizes)) for a, b in chosen
    )
    return Topology(tuple(found), links, domains)


@settings(deadline=None, max_examples=40)
@given(topologies())
def test_round_trip_is_exact(topology: Topology) -> None:
    back = topology_from_toml(topology_to_toml(topology), "test.toml")
    assert back == topology
    assert repr(back) == repr(topology)  # also types: 1 == 1.0 == True


CPU_TABLE = '[[device]]\nname = "cpu"\nkind = "CPU"\nmemory_bytes = "16GiB"\n'


def read(text: str) -> Topology:
    return topology_from_toml(text, "rig.toml")


def test_a_written_file() -> None:
    text = (
        CPU_TABLE
        + """
cores = 8
matrix_rates = { float32 = 1_000_000_000_000, bfloat16 = 2e12 }

[[device]]
name = "sim:0"
kind = "SIM"
memory_bytes = "1.5 GiB"
memory_bandwidth = 1e12
basis = "measured"

[[link]]
src = "cpu"
dst = "sim:0"
bandwidth = 25e9
"""
    )
    cpu, sim = read(text).devices
    assert (cpu.memory_bytes, cpu.cores, cpu.basis) == (16 << 30, 8, "estimated")
    assert dict(cpu.matrix_rates) == {"float32": 1e12, "bfloat16": 2e12}
    assert isinstance(cpu.matrix_rates["float32"], float)
    assert (sim.memory_bytes, sim.simulated, sim.basis) == (3 << 29, True, "measured")
    assert read(text).links == (Link("cpu", "sim:0", 25e9, 0.0, "estimated"),)
    assert read(CPU_TABLE).devices[0].basis == "unknown"


def test_a_link_through_a_domain() -> None:
    line = 'domains = ["pcie0"]\nbandwidth_by_size = { 4096 = 1e8, 1048576 = 1_000_000_000 }\n'
    topology = read(TWO + LINK + line + DOMAIN)
    assert topology.domains == (Domain("pcie0", 25e9, "estimated"),)
    [link] = topology.links
    assert (link.domains, dict(link.bandwidth_by_size)) == (("pcie0",), {4096: 1e8, 1 << 20: 1e9})
    assert topology.only(["cpu", "sim:0"]) == topology
    assert topology.only(["cpu"]).domains == ()


def test_bandwidth_by_size_is_held_at_the_ends_and_straight_in_log_space_between() -> None:
    link = Link("cpu", "sim:0", 7e9, 1e-5, bandwidth_by_size={1 << 20: 4e9, 1 << 10: 1e9})
    assert [link.bandwidth_at(n) for n in (0, 1, 1 << 10, 1 << 20, 1 << 40)] == [1e9, 1e9, 1e9, 4e9, 4e9]
    assert link.bandwidth_at(1 << 15) == pytest.approx(2e9, rel=1e-12)
    assert link.transfer_time(1 << 15) == pytest.approx(1e-5 + (1 << 15) / 2e9, rel=1e-12)
    assert Link("cpu", "sim:0", 7e9, 1e-5).transfer_time(7e9) == 1 + 1e-5
    assert link.transfer_time(0) == 1e-5


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("speed = 3", "device 1 (cpu): unknown key 'speed'; allowed: name, kind, model, memory_bytes"),
        (
            "memory_bandwidth = -1e9",
            "memory_bandwidth is -1000000000.0; allowed: a number of bytes/s from 1e+06 to 1e+15",
        ),
        ("memory_bandwidth = 0", "memory_bandwidth is 0; allowed: a number of bytes/s"),
        ("memory_bandwidth = 45", "memory_bandwidth is 45; allowed: a number of bytes/s"),
        ("memory_bandwidth = nan", "memory_bandwidth is nan; allowed"),
        ("memory_bandwidth = inf", "memory_bandwidth is inf; allowed"),
        ("memory_bandwidth = 1e30", "memory_bandwidth is 1e+30; allowed"),
        ('memory_bandwidth = "fast"', "memory_bandwidth is 'fast'; allowed"),
        ("memory_bandwidth = true", "memory_bandwidth is True; allowed"),
        ("cores = 0", "cores is 0; allowed: a number of cores from 1"),
        ("cores = 2.5", "cores is 2.5; allowed"),
        ("cores = true", "cores is True; allowed"),
        (
            "matrix_rates = { fp32 = 1e12 }",
            "matrix_rates is {'fp32': 1000000000000.0}; allowed: a table of dtype (float64",
        ),
        ("matrix_rates = { float32 = 0 }", "matrix_rates is {'float32': 0}; allowed"),
        ("matrix_rates = 1e12", "matrix_rates is 1000000000000.0; allowed: a table of"),
        (
            "memory_bandwidth_by_threads = { two = 1e9 }",
            "memory_bandwidth_by_threads is {'two': 1000000000.0}; allowed",
        ),
        ("cache_bytes = { L2 = -1 }", "cache_bytes is {'L2': -1}; allowed"),
        ("launch_overhead = true", "launch_overhead is True; allowed"),
        ("launch_overhead = -1e-6", "launch_overhead is -1e-06; allowed: a number of seconds"),
        ('isa = "avx2"', "isa is 'avx2'; allowed: a list"),
        ("isa = [1]", "isa is [1]; allowed: a list"),
        ('basis = "guessed"', 'basis is \'guessed\'; allowed: "measured" or "estimated" or "unknown"'),
        ("usable = 1", "usable is 1; allowed: true or false"),
        ("model = 7", "model is 7; allowed: a text"),
        ("facts = { when = 2026-11-21 }", "facts is {'when': datetime.date(2026, 11, 21)}; allowed"),
        ("numa_node = -1", "numa_node is -1; allowed"),
    ],
)
def test_bad_values_are_named(line: str, message: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        read(CPU_TABLE + line)
    assert str(caught.value).startswith("rig.toml: device 1 (cpu): ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "size", ['"-16GiB"', '"0GiB"', '"16 XB"', "0", "-5", "16", "1e9", "nan", "true", '"2000000TiB"', "[1]"]
)
def test_bad_sizes_are_named(size: str) -> None:
    with pytest.raises(InvalidInput, match=r'memory_bytes is .*; allowed: a size such as "16GiB"'):
        read(CPU_TABLE.replace('"16GiB"', size))


LINK = '[[link]]\nsrc = "cpu"\ndst = "sim:0"\nbandwidth = 1e9\n'
DOMAIN = '[[domain]]\nname = "pcie0"\nbandwidth = 25e9\n'
TWO = CPU_TABLE + CPU_TABLE.replace('"cpu"', '"sim:0"').replace('"CPU"', '"SIM"')


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "rig.toml declares no devices"),
        ("device = 3", "device is not a list of tables; write [[device]]"),
        ("[device]\nname = 'cpu'", "device is not a list of tables"),
        ("[[devices]]\nname = 'cpu'", "unknown key 'devices'; allowed: device, link, domain"),
        ("this is not toml", "rig.toml is not TOML: "),
        (CPU_TABLE + CPU_TABLE, "rig.toml: device cpu is declared twice"),
        (CPU_TABLE.replace('name = "cpu"\n', ""), "device 1: name is missing"),
        (CPU_TABLE.replace('kind = "CPU"\n', ""), 'device 1 (cpu): kind is missing; allowed: "CPU" or "GPU"'),
        (CPU_TABLE.replace('memory_bytes = "16GiB"\n', ""), "device 1 (cpu): memory_bytes is missing"),
        (CPU_TABLE.replace('"CPU"', '"cpu"'), "kind is 'cpu'; allowed"),
        (CPU_TABLE.replace('"CPU"', '"GPU"'), "kind is GPU, whose names begin with cuda, as in cuda:0"),
        (CPU_TABLE.replace('"cpu"', '"gpu0"'), "name is 'gpu0'; allowed: a name such as"),
        (CPU_TABLE.replace('"cpu"', '"cpu:x"'), "name is 'cpu:x'; allowed"),
        (CPU_TABLE + LINK, "link cpu -> sim:0 names unknown device sim:0"),
        (TWO + LINK + LINK, "link cpu -> sim:0 is declared twice"),
        (TWO + LINK.replace("sim:0", "cpu"), "link 1: src and dst are both cpu"),
        (TWO + LINK.replace("bandwidth = 1e9", ""), "link 1: bandwidth is missing"),
        (TWO + LINK.replace("1e9", "-1e9"), "link 1: bandwidth is -1000000000.0; allowed"),
        (TWO + LINK + "latency = nan", "link 1: latency is nan; allowed: a number of seconds from 0 to 60"),
        (TWO + LINK + 'domains = "pcie0"', "link 1: domains is 'pcie0'; allowed: a list of names of [[domain]] tables"),
        (TWO + LINK + "domains = [1]", "link 1: domains is [1]; allowed: a list of names of [[domain]] tables"),
        (
            TWO + LINK + 'domains = ["pcie0"]',
            "rig.toml: link cpu -> sim:0 runs through unknown domain pcie0; declare it in a [[domain]] with name and "
            "bandwidth (there are: none)",
        ),
        (TWO + LINK + 'domains = ["nic"]\n' + DOMAIN, "unknown domain nic; declare it in a [[domain]] with name and"),
        (
            TWO + LINK + 'domains = ["pcie0", "pcie0"]\n' + DOMAIN,
            "link cpu -> sim:0 names a domain twice (pcie0, pcie0)",
        ),
        (TWO + DOMAIN + DOMAIN, "rig.toml: domain pcie0 is declared twice"),
        (TWO + DOMAIN.replace("25e9", "-25e9"), "domain 1 (pcie0): bandwidth is -25000000000.0; allowed: a number of"),
        (TWO + DOMAIN.replace("25e9", "0"), "domain 1 (pcie0): bandwidth is 0; allowed: a number of bytes/s from 1000"),
        (TWO + DOMAIN.replace("25e9", "nan"), "domain 1 (pcie0): bandwidth is nan; allowed: a number of bytes/s"),
        (TWO + DOMAIN.replace("25e9", "1e16"), "domain 1 (pcie0): bandwidth is 1e+16; allowed: a number of bytes/s"),
        (TWO + DOMAIN.replace("bandwidth = 25e9", ""), "domain 1 (pcie0): bandwidth is missing; allowed: a number of"),
        (TWO + DOMAIN.replace('name = "pcie0"', ""), "domain 1: name is missing; allowed: a name such as"),
        (TWO + DOMAIN.replace('"pcie0"', '" "'), "domain 1 ( ): name is ' '; allowed: a name such as"),
        (TWO + DOMAIN + "latency = 1", "domain 1 (pcie0): unknown key 'latency'; allowed: name, bandwidth, basis"),
        ("domain = 3\n" + TWO, "domain is not a list of tables; write [[domain]] above each one"),
        (
            TWO + LINK + "bandwidth_by_size = { 0 = 1e9 }",
            "bandwidth_by_size is {'0': 1000000000.0}; allowed: a table of",
        ),
        (TWO + LINK + "bandwidth_by_size = { 4096 = -1 }", "bandwidth_by_size is {'4096': -1}; allowed: a table of"),
        (TWO + LINK + "bandwidth_by_size = { 4096 = nan }", "bandwidth_by_size is {'4096': nan}; allowed: a table of"),
        (TWO + LINK + "bandwidth_by_size = 1e9", "bandwidth_by_size is 1000000000.0; allowed: a table of bytes per"),
        (TWO + LINK + "delay = 1", "link 1: unknown key 'delay'; allowed: src, dst, bandwidth, latency, basis"),
    ],
)
def test_bad_files_are_explained(text: str, message: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        read(text)
    assert message in str(caught.value)
    assert "rig.toml" in str(caught.value)
    assert "\n" not in str(caught.value)


json_like: Any = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=5,
)


@settings(deadline=None)
@given(st.sampled_from(["memory_bytes", "matrix_rates", "isa", "facts", "cores", "name", "kind", "basis"]), json_like)
def test_nothing_but_invalid_input_is_raised(key: str, value: object) -> None:
    from ciuic_runtime.devices import toml

    table = {"name": "cpu", "kind": "CPU", "memory_bytes": 4096, key: value}
    with contextlib.suppress(InvalidInput):
        assert toml._device(table, "rig.toml: device 1").name


def test_files(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=r"no device file .*nowhere\.toml"):
        DeviceManager.from_toml(tmp_path / "nowhere.toml")
    with pytest.raises(InvalidInput, match="cannot read device file"):
        DeviceManager.from_toml(tmp_path)
    (tmp_path / "latin.toml").write_bytes(b"model = '\xe9'")
    with pytest.raises(InvalidInput, match="cannot read device file"):
        DeviceManager.from_toml(tmp_path / "latin.toml")
    manager = DeviceManager.from_topology(read(TWO + LINK))
    text = manager.to_toml(tmp_path / "rig.toml")
    assert (tmp_path / "rig.toml").read_text() == text
    assert DeviceManager.from_toml(tmp_path / "rig.toml").topology == manager.topology
