"""The simulated device finds what goes wrong only sometimes on a real one, and its clock obeys the closed forms."""

from __future__ import annotations

import gc
from collections.abc import Callable

import pytest
import torch

from ciuic_runtime.devices import races
from ciuic_runtime.devices.backend import Event, MemoryFault, RaceError
from ciuic_runtime.devices.errors import InvalidInput
from ciuic_runtime.devices.simulated import SimulatedBackend
from ciuic_runtime.devices.spec import DeviceSpec, Link, Topology

CPU = DeviceSpec("cpu", "CPU", memory_bytes=1 << 30)
SIM = DeviceSpec("sim:0", "SIM", memory_bytes=1 << 20, memory_bandwidth=2e9)
COPY_S, STEP_S = 1e-3, 0.4e-3  # s: of one page over the link, and of one layer on it
PAGE_BYTES = 4096


def open_simulated(spec: DeviceSpec = SIM) -> SimulatedBackend:
    """With a link on which one page takes COPY_S, and no latency."""
    rate = PAGE_BYTES / COPY_S
    return SimulatedBackend(spec, Topology((CPU, spec), (Link("cpu", "sim:0", rate), Link("sim:0", "cpu", rate))))


def pages(count: int) -> list[torch.Tensor]:
    return [torch.randn(PAGE_BYTES // 4, generator=torch.Generator().manual_seed(i)) for i in range(count)]


def stream_layers(device: SimulatedBackend, weights: list[torch.Tensor], slots: int = 2, bug: str = "") -> torch.Tensor:
    """Layers whose weights take turns in a few slots while earlier ones compute; `bug` leaves out one thing."""
    slot = [device.allocate(PAGE_BYTES).view(torch.float32) for _ in range(slots)]
    arrived: list[Event] = []
    used: list[Event] = []
    hidden = device.launch(torch.zeros, 8, cost_s=0.0, name="embed")
    staging = torch.empty(PAGE_BYTES // 4)

    def prefetch(layer: int) -> None:
        if layer >= slots and bug != "slot reused too early":
            device.wait(used[layer - slots], "copy")
        source = weights[layer]
        if bug == "staging buffer overwritten":
            device.host_access(staging, write=True)
            source = staging.copy_(weights[layer])
        device.copy(slot[layer % slots], source, "copy")
        arrived.append(device.record("copy"))

    for layer in range(len(weights)):
        while len(arrived) < min(layer + slots, len(weights)):
            prefetch(len(arrived))
        if bug != "compute before the copy is done":
            device.wait(arrived[layer])
        weight = slot[layer % slots]
        hidden = device.launch(
            lambda h, w: h * 0.5 + w[:8], hidden, weight, reads=[hidden, weight], cost_s=STEP_S, name=f"layer {layer}"
        )
        used.append(device.record())
    if bug == "slot freed while in use":
        device.free(slot[0].view(torch.uint8))
    result = torch.empty(8)
    device.copy(result, hidden)
    if bug != "result read before it is there":
        device.synchronize()
    device.host_access(result)
    return result


def reference(weights: list[torch.Tensor]) -> torch.Tensor:
    hidden = torch.zeros(8)
    for weight in weights:
        hidden = hidden * 0.5 + weight[:8]
    return hidden


@pytest.mark.parametrize("slots", [1, 2, 3])
def test_a_correct_program_runs_and_is_right(slots: int) -> None:
    weights = pages(7)
    assert torch.equal(stream_layers(open_simulated(), weights, slots), reference(weights))


@pytest.mark.parametrize(
    ("bug", "who", "whom"),
    [
        ("compute before the copy is done", "read by layer 0", "write by h2d copy"),
        ("slot reused too early", "write by h2d copy", "read by layer 0"),
        ("staging buffer overwritten", "write by the host", "read by h2d copy"),
        ("slot freed while in use", "free on simulated sim:0", "by "),
        ("result read before it is there", "read by the host", "write by d2h copy"),
    ],
)
def test_planted_bugs_are_found_and_both_operations_named(bug: str, who: str, whom: str) -> None:
    with pytest.raises(RaceError, match=who) as caught:
        stream_layers(open_simulated(), pages(7), bug=bug)
    assert whom in str(caught.value)
    assert "simulated" in str(caught.value)


def test_reads_may_overlap_and_so_may_different_bytes() -> None:
    device = open_simulated()
    buffer = device.allocate(512)
    device.copy(buffer, torch.zeros(512, dtype=torch.uint8))
    device.synchronize()
    device.launch(torch.sum, buffer, stream="one", reads=[buffer])
    device.launch(torch.sum, buffer, stream="two", reads=[buffer])
    device.synchronize()
    device.launch(buffer[:256].fill_, 1, stream="one", writes=[buffer[:256]])
    device.launch(buffer[256:].fill_, 2, stream="two", writes=[buffer[256:]])
    with pytest.raises(RaceError):
        device.launch(buffer[255:257].fill_, 3, stream="two", writes=[buffer[255:257]])


def test_order_is_passed_on_from_event_to_event() -> None:
    device = open_simulated()
    buffer = device.allocate(256)
    device.copy(buffer, torch.zeros(256, dtype=torch.uint8), "one")
    device.wait(device.record("one"), "two")
    device.wait(device.record("two"), "three")
    device.launch(torch.sum, buffer, stream="three", reads=[buffer])


def test_an_event_covers_only_what_came_before_it() -> None:
    device = open_simulated()
    buffer = device.allocate(256)
    early = device.record("copy")
    device.copy(buffer, torch.zeros(256, dtype=torch.uint8), "copy")
    device.wait(early)
    with pytest.raises(RaceError, match="record an event in stream copy"):
        device.launch(torch.sum, buffer, reads=[buffer])


def test_a_read_in_between_does_not_hide_the_write() -> None:
    device = open_simulated()
    buffer = device.allocate(256)
    device.copy(buffer, torch.zeros(256, dtype=torch.uint8), "copy")
    device.wait(device.record("copy"), "one")
    device.launch(torch.sum, buffer, stream="one", reads=[buffer])
    with pytest.raises(RaceError, match=r"read by sum \(stream two\) .* write by h2d copy"):
        device.launch(torch.sum, buffer, stream="two", reads=[buffer])


def test_results_of_launches_are_watched_too() -> None:
    device = open_simulated()
    made = device.launch(torch.ones, 4, stream="one", name="make")
    with pytest.raises(RaceError, match=r"read by use \(stream two\) .* write by make \(stream one\)"):
        device.launch(torch.sum, made[1:], stream="two", reads=[made[1:]], name="use")


def test_fresh_and_freed_memory_is_poisoned() -> None:
    device = open_simulated()
    buffer = device.allocate(4096)
    assert buffer.view(torch.float32).isnan().all()
    assert buffer.view(torch.bfloat16).isnan().all()
    buffer.zero_()
    device.free(buffer)
    assert (buffer == 0xFF).all()


@pytest.mark.parametrize(
    "use",
    [
        lambda device, buffer: device.copy(buffer, torch.zeros(256, dtype=torch.uint8)),
        lambda device, buffer: device.copy(torch.zeros(8, dtype=torch.uint8), buffer[8:16]),
        lambda device, buffer: device.launch(torch.sum, buffer, reads=[buffer]),
        lambda device, buffer: device.launch(buffer.zero_, writes=[buffer[100:]]),
        lambda device, buffer: device.free(buffer),
    ],
)
def test_use_after_free_and_double_free_raise(use: Callable[[SimulatedBackend, torch.Tensor], object]) -> None:
    device = open_simulated()
    buffer = device.allocate(256)
    device.free(buffer)
    with pytest.raises(MemoryFault, match="freed before"):
        use(device, buffer)


def test_freed_buffers_do_not_pile_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(races, "QUARANTINE_BYTES", 4096)
    device = open_simulated()
    for _ in range(50):
        device.free(device.allocate(1024))
    assert len(device._history._buffers) == 4


def test_results_are_forgotten_with_their_last_use() -> None:
    device = open_simulated()
    view = device.launch(torch.ones, 100)[10:20]
    assert len(device._history._others) == 1
    del view
    gc.collect()
    assert not device._history._others


def test_host_tensors_must_be_copied_first() -> None:
    device = open_simulated()
    host = torch.ones(4)
    with pytest.raises(MemoryFault, match=r"add .* touches a host tensor; copy it there first"):
        device.launch(torch.add, host, 1, reads=[host])
    with pytest.raises(MemoryFault, match="two host tensors"):
        device.copy(torch.empty(4), host)


def test_memory_is_counted_in_granules() -> None:
    device = SimulatedBackend(DeviceSpec("sim:0", "SIM", memory_bytes=1024))
    for _ in range(4):
        device.allocate(1)
    assert device.memory().used == 1024
    with pytest.raises(MemoryError, match="simulated sim:0"):
        device.allocate(1)


def test_it_needs_a_size() -> None:
    with pytest.raises(InvalidInput, match="simulated sim:0 has no memory_bytes"):
        SimulatedBackend(DeviceSpec("sim:0", "SIM"))


@pytest.mark.parametrize(
    ("step", "slots", "seconds"),
    [
        (0.4e-3, 2, 6 * COPY_S + 0.4e-3),  # copies bind: one after the other, then the last layer
        (2.0e-3, 2, COPY_S + 6 * 2.0e-3),  # layers bind: the first copy, then all of them
        (0.4e-3, 1, 6 * (COPY_S + 0.4e-3)),  # one slot: nothing overlaps
    ],
)
def test_the_clock_overlaps_copies_with_compute(step: float, slots: int, seconds: float) -> None:
    device = open_simulated()
    slot = [device.allocate(PAGE_BYTES) for _ in range(slots)]
    page, used = torch.zeros(PAGE_BYTES, dtype=torch.uint8), list[Event]()
    for layer in range(6):
        if layer >= slots:
            device.wait(used[layer - slots], "copy")
        device.copy(slot[layer % slots], page, "copy")
        device.wait(device.record("copy"))
        device.launch(lambda: None, reads=[slot[layer % slots]], cost_s=step)
        used.append(device.record())
    device.synchronize()
    assert device.now == pytest.approx(seconds)


def test_copies_share_an_engine_each_way_and_pay_latency() -> None:
    links = (Link("cpu", "sim:0", 1e6, 5e-3), Link("sim:0", "cpu", 2e6))
    device = SimulatedBackend(SIM, Topology((CPU, SIM), links))
    start = device.record("one")
    buffers, host = [device.allocate(1000) for _ in range(3)], torch.zeros(1000, dtype=torch.uint8)
    device.copy(buffers[0], host, "one")
    device.copy(buffers[1], host, "two")
    device.copy(torch.empty(1000, dtype=torch.uint8), buffers[2], "three")
    ends = [device.elapsed(start, device.record(s)) for s in ("one", "two", "three")]
    assert ends == pytest.approx([6e-3, 12e-3, 0.5e-3])


def test_a_copy_within_the_device_reads_and_writes_its_memory() -> None:
    device = open_simulated()
    first, second = device.allocate(1000), device.allocate(1000)
    start = device.record()
    device.copy(first, second)
    assert device.elapsed(start, device.record()) == pytest.approx(2 * 1000 / 2e9)


def test_issuing_costs_the_host_time() -> None:
    device = open_simulated(DeviceSpec("sim:0", "SIM", memory_bytes=4096, launch_overhead=1e-5))
    for _ in range(10):
        device.launch(lambda: None)
    assert device.now == pytest.approx(1e-4)


def test_the_same_program_takes_the_same_time() -> None:
    first, second = open_simulated(), open_simulated()
    for device in (first, second):
        stream_layers(device, pages(5))
    assert first.now == second.now > 0
    assert "simulated" in repr(first).lower()
