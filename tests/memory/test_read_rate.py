"""The disk as paging will find it: the pages of a packed folder, read by the reader that paging uses."""

from __future__ import annotations

from pathlib import Path

import pytest

from ciuic_runtime.devices.spec import DeviceSpec, Topology
from ciuic_runtime.memory.read_rate import PageStream, read_rate
from ciuic_runtime.ops.native import kernels
from ciuic_runtime.planning import with_disk
from ciuic_runtime.schedulers.passes import READ_TAKES

pytestmark = pytest.mark.skipif(kernels() is None, reason="pages are read by a compiled part, which is not built here")


def test_pages_are_read_as_long_as_more_are_wanted(tiny_int4: Path) -> None:
    stream = PageStream(tiny_int4)
    wanted = iter([True] * 40)
    done = stream.run(lambda: next(wanted, False))
    assert done
    assert done % stream.nbytes == 0
    assert stream.run(lambda: False) == 0
    stream.close()


def test_a_packed_folder_has_a_rate_and_nothing_else_does(tiny_int4: Path, tiny_v3: Path) -> None:
    rate = read_rate(tiny_int4)
    assert rate is not None
    assert 1e5 < rate.bandwidth < 1e12
    assert rate.taken == 0.0, "too little to look at for long enough"
    assert read_rate(tiny_v3) is None
    assert read_rate(tiny_v3 / "config.json") is None


def test_plans_take_the_disk_as_it_is_for_them(tiny_int4: Path) -> None:
    topology = with_disk(Topology((DeviceSpec("cpu", "CPU", memory_bytes=1 << 30),)), tiny_int4)
    [disk] = topology.by_kind("DISK")
    assert topology.link("disk", "cpu").bandwidth == disk.memory_bandwidth
    assert disk.basis == "measured"
    assert READ_TAKES in disk.facts


def test_what_reading_takes_from_those_who_read_memory(tiny_int4: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ciuic_runtime.memory.read_rate.LEAST_SECONDS", 0.0)
    rate = read_rate(tiny_int4)
    assert rate is not None
    assert 0 <= rate.taken * rate.bandwidth < 10  # of the time, at the disk's full rate
