"""Devices and links as a plain-text table for people.
Knows how facts are written, nothing else; what machines read is TOML or JSON."""

from __future__ import annotations

from collections.abc import Sequence

from ciuic_runtime.devices.spec import DeviceSpec, Link, Topology
from ciuic_runtime.devices.units import format_bytes, format_rate

_KINDS = {"SIM": "SIM (simulated)"}


def device_table(topology: Topology) -> str:
    """One line per device, then what cannot be used, then the links."""
    head = ("device", "kind", "model", "cores", "memory", "reads", "matrix products", "basis")
    lines = _aligned([head, *(_row(d) for d in topology.devices)])
    lines += [f"{d.name} cannot be used: {d.why_not_usable}" for d in topology.devices if not d.usable]
    if topology.links:
        lines += ["", *_aligned([("link", "bandwidth", "latency", "basis"), *(_link_row(x) for x in topology.links)])]
    return "\n".join(lines)


def _row(device: DeviceSpec) -> tuple[str, ...]:
    return (
        device.name,
        _KINDS.get(device.kind, device.kind),
        device.model or "-",
        str(device.cores or "-"),
        _memory(device),
        format_rate(device.memory_bandwidth, "B/s") if device.memory_bandwidth else "-",
        ", ".join(f"{k} {format_rate(v, 'op/s')}" for k, v in device.matrix_rates.items()) or "-",
        device.basis,
    )


def _memory(device: DeviceSpec) -> str:
    free = "" if device.memory_free_bytes is None else f", {format_bytes(device.memory_free_bytes)} free"
    return format_bytes(device.memory_bytes) + (free if device.kind != "DISK" else " free")


def _link_row(link: Link) -> tuple[str, ...]:
    return (
        f"{link.src} -> {link.dst}",
        format_rate(link.bandwidth, "B/s"),
        f"{link.latency * 1e6:.3g} us",
        link.basis,
    )


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
