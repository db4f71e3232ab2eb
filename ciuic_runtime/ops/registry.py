"""The engine's operators and what could compute each: native kernels by instruction set, best first, torch last.
Knows what can be used here and why not, what was chosen and why; how long each takes is measured in `estimate.py`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from ciuic_runtime.ops.native import REFERENCE, instruction_set, kernels

# Best first; what each is, and what a processor needs for it.
INSTRUCTION_SETS = {
    "amx": ("tiles of 8-bit integers", "AMX-INT8 (and Linux)"),
    "avx512": ("AVX-512 with VNNI and BF16", "AVX-512 with VNNI and BF16"),
    "avx512vnni": ("AVX-512 with VNNI", "AVX-512 with VNNI"),
    "avx2": ("AVX2", "AVX2, FMA and F16C"),
    "portable": ("plain C++", "nothing special"),
}
# What the engine computes. Those inside of another have no native kernel of their own.
OPERATORS = ("embedding", "rms_norm", "linear", "mlp", "route", "experts", "combine", "attention_mla", "attention_gqa")
_CLEARLY = 1.5  # times faster; smaller differences come and go on a machine that does something else too
INSIDE = {"softmax": "route", "sigmoid": "route", "silu": "mlp and experts"}


@dataclass(frozen=True, slots=True)
class Candidate:
    """One way of computing an operator."""

    name: str  # instruction set, "reference", or the name a user's operator was registered by
    why_not: str = ""  # it cannot be used here; "" where it can
    estimate_s: float | None = None  # s, for the case that `estimate.CASE` describes; None where it is not measured

    @property
    def usable(self) -> bool:
        return not self.why_not


@dataclass(frozen=True, slots=True)
class OperatorReport:
    name: str
    chosen: str
    why: str
    candidates: tuple[Candidate, ...]

    @property
    def estimate_s(self) -> float | None:
        """Of the chosen one."""
        return next((c.estimate_s for c in self.candidates if c.name == self.chosen), None)

    def to_dict(self) -> dict[str, Any]:
        rows = [{**asdict(c), "usable": c.usable} for c in self.candidates]
        return {"name": self.name, "chosen": self.chosen, "why": self.why, "candidates": rows}


def probe(name: str) -> str:
    """Why kernels of an instruction set cannot be used here; "" where they can."""
    if name == REFERENCE:
        try:
            import torch  # noqa: F401
        except ImportError:
            return "torch is not installed"
        return ""
    module = kernels()
    if module is None:
        forbidden = os.environ.get("CIUIC_KERNELS") == REFERENCE
        return (
            "CIUIC_KERNELS=reference forbids it" if forbidden else "the kernels are not compiled in this installation"
        )
    if name in module.instruction_sets():
        return ""
    if name not in module.instruction_sets(usable=False):
        return "not compiled for this kind of processor"
    return f"this processor or system lacks {INSTRUCTION_SETS[name][1]}"


def probes() -> dict[str, str]:
    """Every candidate, best first, and why it cannot be used here."""
    return {name: probe(name) for name in (*INSTRUCTION_SETS, REFERENCE)}


def choose_kernels(wanted: str = "auto") -> tuple[str, str]:
    """The kernels that every operator of a model is taken from, and why. Raises InvalidInput for what is not here."""
    chosen = instruction_set(wanted)
    if wanted != "auto":
        return chosen, "asked for"
    if os.environ.get("CIUIC_KERNELS") not in (None, "", "auto"):
        return chosen, "CIUIC_KERNELS asks for it"
    if chosen == REFERENCE:
        return chosen, probe(next(iter(INSTRUCTION_SETS)))
    return chosen, f"{INSTRUCTION_SETS[chosen][0]}, the best that runs here"


@dataclass(frozen=True, slots=True)
class RegistryReport:
    """What `ciuic doctor` shows: the kernels that models are run with, and each operator."""

    kernels: str
    why: str
    operators: tuple[OperatorReport, ...]

    def to_dict(self) -> dict[str, Any]:
        return {"kernels": self.kernels, "operators": [r.to_dict() for r in self.operators]}

    def __str__(self) -> str:
        """A line for each operator: what was chosen, its time, the others; then what cannot be used here, and why."""
        from ciuic_runtime.ops.estimate import CASE

        names, chosen = max(len(r.name) for r in self.operators), max(len(r.chosen) for r in self.operators)
        lines = [f"operators: {self.kernels} ({self.why}); ms for {CASE}"]
        for r in self.operators:
            others = [f"{c.name} {c.estimate_s * 1e3:.3f}" for c in r.candidates if c.estimate_s and c.name != r.chosen]
            notes = "; ".join(filter(None, (", ".join(others), r.why.removeprefix(self.why).removeprefix("; "))))
            took = f"{r.estimate_s * 1e3:.3f}" if r.estimate_s else ""
            lines.append(f"{r.name:<{names}}  {r.chosen:<{chosen}}  {took:>7}  {notes}".rstrip())
        lines.append("models in float32 are computed by the reference")
        lines += [f"{name} cannot be used: {why_not}" for name, why_not in probes().items() if why_not]
        return "\n".join(lines)


def registry_report(wanted: str = "auto", threads: int | None = None) -> RegistryReport | None:
    """Every operator with its candidates, measured on that many threads (None: the cores there are), and the choice;
    None where there is no torch. A candidate that measured faster is named; it is not taken on that ground alone."""
    if probe(REFERENCE):
        return None
    chosen, why = choose_kernels(wanted)
    native = (_native(name, chosen, why, threads) for name in OPERATORS)
    inside = (OperatorReport(n, chosen, f"part of {INSIDE[n]}", tuple(_candidates({}))) for n in INSIDE)
    return RegistryReport(chosen, why, tuple(_with_own(report) for report in (*native, *inside)))


def _native(name: str, chosen: str, why: str, threads: int | None) -> OperatorReport:
    from ciuic_runtime.ops.estimate import seconds

    took = {c: seconds(name, c, threads) for c, why_not in probes().items() if not why_not}
    best = min(took, key=lambda c: took[c])
    if took[best] * _CLEARLY < took[chosen]:
        why += f"; {best} measured faster"
    return OperatorReport(name, chosen, why, tuple(_candidates(took)))


def _candidates(took: dict[str, float]) -> Iterator[Candidate]:
    return (Candidate(name, why_not, took.get(name)) for name, why_not in probes().items())


def _with_own(report: OperatorReport) -> OperatorReport:
    """The report, with the user's operator where one stands in."""
    from ciuic_runtime.ops.custom import registered_operators
    from ciuic_runtime.ops.estimate import own_seconds

    for own in registered_operators():
        if own.replaces == report.name:
            seconds, work = own_seconds(own)
            why = f"registered in place of {own.replaces}, {'checked as it runs' if own.check else 'not checked'}{work}"
            return OperatorReport(report.name, own.name, why, (Candidate(own.name, "", seconds), *report.candidates))
    return report
