"""Known hardware is found by what people call it, never by something else's name, and fills what a file leaves out."""

from __future__ import annotations

import contextlib
import math
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ciuic_runtime.devices.catalogue import (
    DEVICES,
    DRAM_REACHES,
    LINKS,
    OPERATIONS_PER_CYCLE,
    KnownDevice,
    cpu_rates,
    find_device,
    find_link,
)
from ciuic_runtime.devices.errors import InvalidInput
from ciuic_runtime.devices.spec import Link, Topology
from ciuic_runtime.devices.toml import topology_from_toml, topology_to_toml

GPUS = [d for d in DEVICES if d.kind == "GPU"]
CPUS = [d for d in DEVICES if d.kind == "CPU"]


@pytest.mark.parametrize(
    ("typed", "name"),
    [
        ("RTX 4090", "RTX 4090"),
        ("rtx4090", "RTX 4090"),
        ("4090", "RTX 4090"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("h100-sxm", "H100 SXM"),
        ("NVIDIA H100 80GB HBM3", "H100 SXM"),
        ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("NVIDIA A100-SXM4-80GB", "A100 SXM 80GB"),
        ("NVIDIA A100 80GB PCIe", "A100 PCIe 80GB"),
        ("Tesla V100-SXM2-32GB", "V100 SXM2 32GB"),
        ("Tesla T4", "T4"),
        ("A6000", "RTX A6000"),
        ("NVIDIA RTX PRO 6000 Blackwell Workstation Edition", "RTX PRO 6000"),
        ("AMD Ryzen 9 7950X 16-Core Processor", "Ryzen 9 7950X"),
        ("Intel(R) Xeon(R) Gold 6454S CPU @ 2.20GHz", "Xeon Gold 6454S"),
        ("EPYC-9374F", "EPYC 9374F"),
    ],
)
def test_names_that_people_type(typed: str, name: str) -> None:
    assert find_device(typed).name == name


@pytest.mark.parametrize(
    ("typed", "name"),
    [
        ("pcie4-x16", "pcie4-x16"),
        ("PCIe 5.0 x8", "pcie5-x8"),
        ("10GbE", "ethernet-10g"),
        ("100 Gbit/s Ethernet", "ethernet-100g"),
        ("InfiniBand NDR", "infiniband-ndr"),
        ("NVMe gen 4", "nvme4"),
    ],
)
def test_links_that_people_type(typed: str, name: str) -> None:
    assert find_link(typed).name == name


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        ("H100", "'H100' may be any of H100 SXM, H100 PCIe, H100 NVL; write one of them"),
        ("a100 80gb", "may be any of A100 SXM 80GB, A100 PCIe 80GB;"),
        ("RTX 6000", "may be any of RTX 6000 Ada, RTX PRO 6000"),
        ("RTX 4900", "no hardware named 'RTX 4900'; nearest: RTX 4090"),
        ("RTX 4090 Laptop GPU", "nearest: RTX 4090"),
        ("RTX 4090 D", "nearest: RTX 4090"),
        ("nvidia", "no hardware named 'nvidia'"),
        ("", "no hardware named ''"),
        ("x" * 1000, "..."),
        ("8 DDR5-4800", "describes no processor; write channels x memory, as in 8 x DDR5-4800"),
        ("8 x DDR5-4800, 32 x avx9 @ 2 GHz", "instruction sets: neon, avx2"),
        ("0 x DDR5-4800", "'0 x DDR5-4800' is not sensible: a processor has 1 to 24 channels"),
        ("8 x DDR5-99999", "of 400 to 20000 MT/s"),
        ("8 x DDR5-4800, 0 x avx2 @ 2 GHz", "at least one core"),
        ("8 x DDR5-4800, 8 x avx2 @ 44 GHz", "of 0.1 to 10 GHz"),
    ],
)
def test_other_names_are_refused_with_the_nearest(typed: str, message: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        find_device(typed)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_unknown_links_are_refused_with_the_nearest() -> None:
    with pytest.raises(InvalidInput, match="may be any of pcie4-x16, pcie4-x8, pcie4-x4"):
        find_link("pcie4")
    with pytest.raises(InvalidInput, match="no links named 'pcie7-x16'; nearest: pcie5-x16"):
        find_link("pcie7-x16")


@pytest.mark.parametrize("entry", [*DEVICES, *LINKS], ids=lambda e: e.name)
def test_every_label_leads_to_its_own_entry(entry: KnownDevice) -> None:
    find = find_device if entry in DEVICES else find_link
    for label in (entry.name, *entry.aliases):
        for spelling in (label, label.lower(), label.replace(" ", "-"), label.replace(" ", "")):
            assert find(spelling) is entry


@settings(deadline=None, max_examples=200)
@given(
    st.text(max_size=30) | st.from_regex(r"(RTX|H100|\d x DDR5-\d{1,6}|[0-9]{4})[ ,a-zA-Z0-9@.-]{0,20}", fullmatch=True)
)
def test_any_text_gives_an_entry_or_invalid_input(text: str) -> None:
    for find in (find_device, find_link):
        with contextlib.suppress(InvalidInput):
            assert find(text).name


def test_figures_are_sensible() -> None:
    assert len({e.name for e in (*DEVICES, *LINKS)}) == len(DEVICES) + len(LINKS)
    for gpu in GPUS:
        assert 12 <= gpu.memory_bytes / 2**30 <= 180
        assert 3e11 <= gpu.memory_bandwidth <= 8e12
        assert gpu.matrix_rates["float16"] > gpu.matrix_rates["float32"]
        assert find_link(gpu.pcie).bandwidth < gpu.memory_bandwidth
        assert gpu.matrix_rates.get("int8", math.inf) >= 1.9 * gpu.matrix_rates["float16"]
    for cpu in CPUS:
        assert 3e10 <= cpu.memory_bandwidth <= 1e12
        assert cpu.matrix_rates["int8"] > cpu.matrix_rates["float32"]
        assert cpu.cores >= 8
    for faster, slower in pairwise(find_link(f"pcie{g}-x16").bandwidth for g in (5, 4, 3)):
        assert faster == pytest.approx(2 * slower, rel=0.01)
    assert 0.9e9 < find_link("nvme4").bandwidth < find_link("pcie4-x4").bandwidth * 1.1


def test_a_described_processor_is_what_it_is_made_of() -> None:
    cpu = find_device("8x DDR5-4800, 32 x avx512_vnni @ 2.2 GHz")
    assert cpu.memory_bandwidth == DRAM_REACHES * 8 * 4800e6 * 8
    assert cpu.matrix_rates == cpu_rates(32, "avx512_vnni", 2.2e9)
    assert cpu.matrix_rates["int8"] == 32 * 2.2e9 * 256
    assert (cpu.kind, cpu.cores, cpu.isa) == ("CPU", 32, ("avx512_vnni",))
    plain = find_device("2 x ddr4-3200")
    assert (plain.memory_bandwidth, dict(plain.matrix_rates)) == (DRAM_REACHES * 51.2e9, {})
    for isa in OPERATIONS_PER_CYCLE:
        assert find_device(f"2 x DDR5-5600, 8 x {isa} @ 4 GHz").matrix_rates == cpu_rates(8, isa, 4e9)


def test_a_known_device_is_estimated() -> None:
    gpu = find_device("RTX 4090").device("cuda:1")
    assert (gpu.name, gpu.kind, gpu.model, gpu.basis) == ("cuda:1", "GPU", "RTX 4090", "estimated")
    assert (gpu.memory_bytes, gpu.memory_bandwidth) == (24 << 30, 1008e9)
    assert find_device("EPYC 9654").device("cpu", 64 << 30).memory_bytes == 64 << 30
    assert find_link("pcie4-x16").link("cpu", "cuda:0").basis == "estimated"


# In a file


def read(text: str) -> Topology:
    return topology_from_toml(text, "rig.toml")


CPU = '[[device]]\nname = "cpu"\ncatalogue = "EPYC 9374F"\nmemory_bytes = "384GiB"\n'
GPU = '[[device]]\nname = "cuda:0"\ncatalogue = "RTX 4090"\n'
LINK = '[[link]]\nsrc = "cpu"\ndst = "cuda:0"\ncatalogue = "pcie4-x16"\n'


def test_a_file_takes_from_the_catalogue_what_it_does_not_say() -> None:
    topology = read(CPU + GPU + LINK)
    cpu, gpu = topology.devices
    assert gpu == find_device("RTX 4090").device("cuda:0")
    assert cpu == find_device("EPYC 9374F").device("cpu", 384 << 30)
    assert topology.links == (find_link("pcie4-x16").link("cpu", "cuda:0"),)
    assert topology_from_toml(topology_to_toml(topology), "again.toml") == topology


def test_figures_in_the_file_win() -> None:
    more = 'memory_bytes = "20GiB"\nmemory_bandwidth = 9e11\nmatrix_rates = { int8 = 3e14 }\nmodel = "mine"\n'
    (gpu,) = read(GPU + more).devices
    known = find_device("RTX 4090")
    assert (gpu.memory_bytes, gpu.memory_bandwidth, gpu.model) == (20 << 30, 9e11, "mine")
    assert dict(gpu.matrix_rates) == {**known.matrix_rates, "int8": 3e14}
    assert gpu.basis == "estimated"
    faster = read(CPU + GPU + LINK + "bandwidth = 2.6e10\n").links
    assert faster == (Link("cpu", "cuda:0", 2.6e10, find_link("pcie4-x16").latency, "estimated"),)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (GPU.replace("4090", "4900"), "device 1 (cuda:0): catalogue: the catalogue has no hardware named 'RTX 4900'"),
        (GPU.replace('"RTX 4090"', "4090"), "device 1 (cuda:0): catalogue is 4090; allowed: a text such as"),
        (GPU + 'kind = "CPU"\n', "kind is CPU, but catalogue 'RTX 4090' is GPU"),
        (GPU + 'basis = "measured"\n', "basis is measured, but catalogue 'RTX 4090' is estimated"),
        (GPU.replace("cuda:0", "cpu"), "kind is GPU, whose names begin with cuda"),
        (CPU.partition("memory_bytes")[0], "device 1 (cpu): memory_bytes is missing"),
        (GPU + "memory_bandwidth = 2e15\n", "memory_bandwidth is 2000000000000000.0; allowed: a number of bytes/s"),
        (GPU + "memory_bandwidth = nan\n", "memory_bandwidth is nan; allowed: a number of bytes/s from 1e+06 to 1e+15"),
        (GPU + "memory_bytes = -1\n", 'memory_bytes is -1; allowed: a size such as "16GiB"'),
        (GPU + "matrix_rates = { int8 = -1e12 }\n", "matrix_rates is {'int8': -1000000000000.0}; allowed"),
        (GPU + "catalog = 1\n", "unknown key 'catalog'; allowed: name, kind"),
        (CPU + GPU + LINK.replace("pcie4", "pcie7"), "link 1: catalogue: the catalogue has no links named 'pcie7-x16'"),
        (CPU + GPU + LINK + 'basis = "measured"\n', "link 1: basis is measured, but catalogue 'pcie4-x16' is"),
        (CPU + GPU + LINK + "latency = -1\n", "link 1: latency is -1; allowed: a number of seconds"),
    ],
)
def test_bad_files_are_explained(text: str, message: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        read(text)
    assert message in str(caught.value)
    assert str(caught.value).startswith("rig.toml")
    assert "\n" not in str(caught.value)
