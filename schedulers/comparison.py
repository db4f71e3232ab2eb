"""Plan against actual: what a schedule forecast, what the same cost model says once it is known what came, and what a
trace shows. Knows no cost model; forecast and recosted trace were made elsewhere."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from ciuic_runtime.schedulers.graph import Phase

if TYPE_CHECKING:
    from ciuic_runtime.schedulers.schedule import Schedule
    from ciuic_runtime.schedulers.trace import Trace


@dataclass(frozen=True, slots=True)
class Compared:
    """One figure, forecast and actual: `error` is actual / forecast - 1, positive where the forecast was too low.

    Recosted, with the batch and the misses that really came, the error falls into that of the workload that was assumed
    and that of the model: actual / forecast = recosted / forecast x actual / recosted."""

    forecast: float | None
    actual: float | None
    recosted: float | None = None

    @property
    def error(self) -> float | None:
        return _error(self.actual, self.forecast)

    @property
    def workload_error(self) -> float | None:
        return _error(self.recosted, self.forecast)

    @property
    def model_error(self) -> float | None:
        return _error(self.actual, self.recosted)

    def to_dict(self) -> dict[str, float | None]:
        errors = {"error": self.error, "workload_error": self.workload_error, "model_error": self.model_error}
        return {**asdict(self), **errors}


def _error(actual: float | None, expected: float | None) -> float | None:
    return actual / expected - 1 if actual is not None and expected else None


@dataclass(frozen=True)
class Comparison:
    prefill_tokens_per_s: Compared
    decode_tokens_per_s: Compared
    seconds_per_token: dict[str, dict[str, Compared]]  # phase -> kind of task -> s

    def to_dict(self) -> dict[str, Any]:
        return {
            "prefill_tokens_per_s": self.prefill_tokens_per_s.to_dict(),
            "decode_tokens_per_s": self.decode_tokens_per_s.to_dict(),
            "seconds_per_token": {
                phase: {kind: c.to_dict() for kind, c in kinds.items()}
                for phase, kinds in self.seconds_per_token.items()
            },
        }

    def __str__(self) -> str:
        lines = [f"{'':34}{'forecast':>12}{'recosted':>12}{'actual':>12}{'actual/forecast':>18}"]
        lines.append(_line("prefill tokens/s", self.prefill_tokens_per_s, 1))
        lines.append(_line("decode tokens/s", self.decode_tokens_per_s, 1))
        for phase, kinds in self.seconds_per_token.items():
            lines += [_line(f"{phase} {kind} us/token", c, 1e6) for kind, c in kinds.items()]
        return "\n".join(lines)


def compare(trace: Trace, schedule: Schedule, recosted: Trace | None = None) -> Comparison:
    predicted = schedule.predicted

    def rate(phase: Phase, forecast: float | None) -> Compared:
        return Compared(forecast, trace.tokens_per_s(phase), recosted.tokens_per_s(phase) if recosted else None)

    return Comparison(
        rate("prefill", predicted.prefill_tokens_per_s if predicted else None),
        rate("decode", predicted.decode_tokens_per_s if predicted else None),
        {phase: _by_kind(trace, schedule, recosted, phase) for phase in ("prefill", "decode")},
    )


def _by_kind(trace: Trace, schedule: Schedule, recosted: Trace | None, phase: Phase) -> dict[str, Compared]:
    if not trace.tokens(phase):
        return {}
    forecast = schedule.predicted.seconds_per_token.get(phase, {}) if schedule.predicted else {}
    actual, again = _per_token(trace, phase), _per_token(recosted, phase)
    kinds = dict.fromkeys((*forecast, *actual))
    return {kind: Compared(forecast.get(kind), actual.get(kind), again.get(kind)) for kind in kinds}


def _per_token(trace: Trace | None, phase: Phase) -> dict[str, float]:
    tokens = trace.tokens(phase) if trace else 0
    return {kind: s / tokens for kind, s in trace.seconds_by_kind(phase).items()} if trace and tokens else {}


def _line(name: str, c: Compared, scale: float) -> str:
    cells = [f"{value * scale:.4g}" if value is not None else "-" for value in (c.forecast, c.recosted, c.actual)]
    ratio = f"{1 + c.error:.2f}" if c.error is not None else "-"
    return f"{name:34}{cells[0]:>12}{cells[1]:>12}{cells[2]:>12}{ratio:>18}"
