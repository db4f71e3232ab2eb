"""The commands `devices` and `doctor`: what is here.
How it is found and measured is in `devices/` and `doctor.py`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from ciuic_runtime.cli.app import app
from ciuic_runtime.cli.arguments import cluster_hardware, hardware
from ciuic_runtime.cli.options import Address, DevicesOption, Insecure, JsonOption, Kernels
from ciuic_runtime.cli.output import result


@app.command()
def devices(
    measure: Annotated[str, typer.Option("--measure", help="cached, fresh or never")] = "cached",
    path: Annotated[Path, typer.Option("--path", help="folder whose disk is looked at")] = Path("."),
    devices: DevicesOption = None,
    address: Address = None,
    insecure: Insecure = False,
    save: Annotated[Path | None, typer.Option("--save", metavar="FILE.toml", help="write the facts as TOML")] = None,
    as_json: JsonOption = False,
) -> None:
    """Show what is here, or on a cluster's nodes, and how fast it measured."""
    from ciuic_runtime.devices.toml import topology_to_dict

    hw = cluster_hardware(address, insecure) if address else hardware(devices, measure, path)
    if save:
        hw.to_toml(save)
    document = topology_to_dict(hw.topology)
    result(as_json, {"schema_version": 1, "devices": document["device"], "links": document["link"]}, lambda: str(hw))


@app.command()
def doctor(kernels: Kernels = "auto", as_json: JsonOption = False) -> None:
    """Show what is installed, which kernels are used, and what is missing."""
    from ciuic_runtime.doctor import diagnose
    from ciuic_runtime.ops.registry import registry_report
    from ciuic_runtime.show import checks_table

    checks, report = diagnose(), registry_report(kernels)
    found = report.to_dict() if report else {"kernels": None, "operators": []}  # no torch: nothing computes
    document = {"schema_version": 1, "checks": [asdict(c) for c in checks], **found}
    result(as_json, document, lambda: f"{checks_table(checks)}\n\n{report or 'operators: none without torch'}")
