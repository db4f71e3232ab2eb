"""What people type becomes what the public API takes: hardware, placements, budgets.
Knows no option by name but those that its messages quote."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ciuic_runtime.cli.output import say
from ciuic_runtime.devices.errors import InvalidInput
from ciuic_runtime.devices.units import parse_bytes

if TYPE_CHECKING:
    from ciuic_runtime.devices.manager import DeviceManager
    from ciuic_runtime.schedulers.placement import Placement


def hardware(file: Path | None, measure: str = "cached", path: Path | None = None) -> DeviceManager:
    from ciuic_runtime.devices.manager import DeviceManager

    if file is not None:
        return DeviceManager.from_toml(file)
    return DeviceManager(path, measure, progress=say)


def cluster_hardware(address: str, insecure: bool) -> DeviceManager:
    from ciuic_runtime.devices.manager import DeviceManager

    return DeviceManager.from_ray(address, insecure=insecure, progress=say)


def placement_of(file: Path | None) -> Placement | None:
    from ciuic_runtime.schedulers.placement import Placement

    return Placement.from_toml(file) if file else None


def budgets_of(text: str | None) -> dict[str, int]:
    """ "cpu=16GiB,cuda:0=20GiB" by device."""
    budgets = {}
    for part in text.split(",") if text else []:
        name, equals, size = part.partition("=")
        if not equals or not name.strip():
            raise InvalidInput(f"--memory {text!r}: {part!r} is not DEVICE=SIZE, such as cpu=16GiB")
        budgets[name.strip()] = parse_bytes(size)
    return budgets
