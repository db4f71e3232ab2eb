"""What every backend promises, whichever device is behind it: the same programs give the same bytes."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from ciuic_runtime.devices.backend import Backend, MemoryFault
from ciuic_runtime.devices.backends import open_backend
from ciuic_runtime.devices.errors import InvalidInput, OutOfMemory
from ciuic_runtime.devices.spec import DeviceSpec

MIB = 1 << 20
SPECS = {
    "cpu": DeviceSpec("cpu", "CPU", memory_bytes=8 * MIB),
    "sim": DeviceSpec("sim:0", "SIM", memory_bytes=8 * MIB),
    "cuda": DeviceSpec("cuda:0", "GPU", memory_bytes=8 * MIB),
}


@pytest.fixture(params=["cpu", "sim", pytest.param("cuda", marks=pytest.mark.gpu)])
def backend(request: pytest.FixtureRequest) -> Backend:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("torch finds no GPU here")
    return open_backend(SPECS[request.param])


def pattern(nbytes: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, (nbytes,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def on_device(backend: Backend, host: torch.Tensor) -> torch.Tensor:
    """A buffer with the host tensor's bytes, ready for every stream."""
    buffer = backend.allocate(host.nbytes)
    backend.copy(buffer, host)
    backend.synchronize()
    return buffer.view(host.dtype).view(host.shape)


def on_host(backend: Backend, tensor: torch.Tensor) -> torch.Tensor:
    host = torch.empty(tensor.shape, dtype=tensor.dtype)
    backend.copy(host, tensor)
    backend.synchronize()
    return host


def test_it_is_a_backend(backend: Backend) -> None:
    assert isinstance(backend, Backend)
    assert backend.allocate(16).device.type == backend.torch_device.type
    assert backend.host_memory == (backend.spec.kind == "CPU")


@pytest.mark.parametrize("nbytes", [1, 63, 4096, 100_000])
def test_a_buffer_is_aligned_bytes_at_a_fixed_address(backend: Backend, nbytes: int) -> None:
    buffers = [backend.allocate(nbytes) for _ in range(3)]
    for buffer in buffers:
        assert (buffer.dtype, buffer.shape) == (torch.uint8, (nbytes,))
        assert buffer.data_ptr() % 64 == 0
    addresses = sorted(b.data_ptr() for b in buffers)
    assert all(a + nbytes <= b for a, b in pairwise(addresses))


def test_bytes_come_back_as_they_went(backend: Backend) -> None:
    host = pattern(100_000)
    assert torch.equal(on_host(backend, on_device(backend, host)), host)


def test_slices_and_other_types_are_copied_as_bytes(backend: Backend) -> None:
    buffer = on_device(backend, torch.zeros(1024, dtype=torch.uint8))
    values = torch.tensor([float("nan"), -0.0, 1.5, 3e38])
    backend.copy(buffer[64:80], values)
    backend.synchronize()
    back = on_host(backend, buffer)
    assert torch.equal(back[64:80], values.view(torch.uint8))
    assert not back[:64].any()
    assert not back[80:].any()


def test_sizes_must_agree(backend: Backend) -> None:
    with pytest.raises(ValueError, match="copy of 8 bytes into 16 bytes"):
        backend.copy(backend.allocate(16), torch.zeros(8, dtype=torch.uint8))


def test_a_launch_returns_what_the_function_returns(backend: Backend) -> None:
    x = on_device(backend, torch.arange(12, dtype=torch.float32).view(3, 4))
    y = backend.launch(torch.mul, x, 2, reads=[x])
    largest, where = backend.launch(lambda t: t.max(dim=1), y, reads=[y])
    assert backend.launch(lambda: "done") == "done"
    assert on_host(backend, largest).tolist() == [6, 14, 22]
    assert on_host(backend, where).tolist() == [3, 3, 3]


def test_results_can_be_written_in_place(backend: Backend) -> None:
    x = on_device(backend, torch.ones(8))
    y = backend.launch(torch.add, x, 1, reads=[x])
    backend.launch(lambda: y.mul_(x + 4), reads=[x], writes=[y])
    assert on_host(backend, y).tolist() == [10.0] * 8


def test_an_event_orders_two_streams(backend: Backend) -> None:
    host, out = pattern(100_000), torch.empty(100_000, dtype=torch.uint8)
    buffer = backend.allocate(host.nbytes)
    backend.copy(buffer, host, stream="copy")
    ready = backend.record("copy")
    backend.wait(ready, "compute")
    doubled = backend.launch(torch.add, buffer, buffer, stream="compute", reads=[buffer])
    done = backend.record("compute")
    backend.wait(done, "copy")
    backend.copy(out, doubled, stream="copy")
    back = backend.record("copy")
    backend.synchronize(back)
    assert torch.equal(out, host + host)
    assert (ready.stream, done.stream) == ("copy", "compute")


def test_time_passes_between_events(backend: Backend) -> None:
    x = on_device(backend, torch.ones(1000))
    first = backend.record()
    backend.launch(torch.add, x, 1, reads=[x], cost_s=1e-3)
    second = backend.record()
    backend.synchronize()
    assert backend.elapsed(first, second) > 0
    assert backend.elapsed(first, second) == pytest.approx(-backend.elapsed(second, first))


def test_events_belong_to_their_backend(backend: Backend) -> None:
    other = open_backend(SPECS["sim" if backend.spec.kind == "CPU" else "cpu"])
    with pytest.raises(TypeError, match="recorded"):
        backend.wait(other.record())


def test_memory_is_counted(backend: Backend) -> None:
    first, second = backend.allocate(MIB), backend.allocate(2 * MIB)
    backend.free(first)
    use = backend.memory()
    assert (use.used, use.peak, use.capacity, use.free) == (2 * MIB, 3 * MIB, 8 * MIB, 6 * MIB)
    backend.free(second)
    assert backend.memory().used == 0


def test_the_capacity_holds_and_says_its_figures(backend: Backend) -> None:
    held = backend.allocate(6 * MIB)
    with pytest.raises(OutOfMemory, match=r"3 MiB asked for on .*2 MiB free of 8 MiB") as caught:
        backend.allocate(3 * MIB)
    assert (caught.value.need, caught.value.free, caught.value.capacity) == (3 * MIB, 2 * MIB, 8 * MIB)
    backend.free(held)
    assert backend.allocate(8 * MIB).numel() == 8 * MIB


def test_wrong_frees_and_empty_buffers_are_refused(backend: Backend) -> None:
    buffer = backend.allocate(1024)
    with pytest.raises(MemoryFault):
        backend.free(buffer[512:])
    with pytest.raises(MemoryFault):
        backend.free(torch.zeros(1024, dtype=torch.uint8, device=backend.torch_device))
    backend.free(buffer)
    with pytest.raises(MemoryFault):
        backend.free(buffer)
    with pytest.raises(InvalidInput, match="0 bytes"):
        backend.allocate(0)


def test_disks_and_unusable_devices_do_not_open() -> None:
    with pytest.raises(InvalidInput, match="disk is a DISK, which cannot compute"):
        open_backend(DeviceSpec("disk", "DISK"))
    with pytest.raises(InvalidInput, match="it fell off the bus"):
        open_backend(DeviceSpec("cuda:0", "GPU", usable=False, why_not_usable="it fell off the bus"))


def test_memory_without_a_known_size_is_not_limited() -> None:
    backend = open_backend(DeviceSpec("cpu", "CPU"))
    assert backend.allocate(MIB).numel() == backend.memory().used
