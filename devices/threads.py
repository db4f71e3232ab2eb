"""A topology as it is when a CPU computes with fewer threads than its rates were measured with.
Knows how rates follow from the number of threads; nothing is measured here."""

from __future__ import annotations

from dataclasses import replace

from ciuic_runtime.devices.spec import DeviceSpec, Topology


def with_threads(topology: Topology, threads: int | None) -> Topology:
    """CPU rates at the number of threads in use: bandwidth as measured with them, matrix rates in proportion (which is
    an estimate where the bandwidth had to be one too)."""
    return replace(topology, devices=tuple(_at_threads(d, threads) for d in topology.devices))


def _at_threads(device: DeviceSpec, threads: int | None) -> DeviceSpec:
    if device.kind != "CPU" or not threads or not device.threads or threads >= device.threads:
        return device
    share = threads / device.threads
    measured = device.memory_bandwidth_by_threads.get(threads)
    return replace(
        device,
        threads=threads,
        memory_bandwidth=measured or (device.memory_bandwidth or 0) * share or None,
        matrix_rates={dtype: rate * share for dtype, rate in device.matrix_rates.items()},
        matrix_vector_rates={dtype: rate * share for dtype, rate in device.matrix_vector_rates.items()},
        basis=device.basis if measured else "estimated",
    )
