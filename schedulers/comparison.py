"""Plan against actual: what a schedule forecast beside what a trace shows.
Knows no cost model; the forecast is what the schedule recorded when it was made."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from ciuic_runtime.schedulers.graph import Phase

if TYPE_CHECKING:
    from ciuic_runtime.schedulers.schedule import Schedule
    from ciuic_runtime.schedulers.trace import Trace


@dataclass(frozen=True, slots=True)
class Compared:
    """One figure twice. `error` is actual / forecast - 1: positive where the forecast was too low."""

    forecast: float | None
    actual: float | None

    @property
    def error(self) -> float | None:
        return self.actual / self.forecast - 1 if self.actual is not None and self.forecast else None

    def to_dict(self) -> dict[str, float | None]:
        return {**asdict(self), "error": self.error}


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
        lines = [f"{'':34}{'forecast':>12}{'actual':>12}{'actual/forecast':>18}"]
        lines.append(_line("prefill tokens/s", self.prefill_tokens_per_s, 1))
        lines.append(_line("decode tokens/s", self.decode_tokens_per_s, 1))
        for phase, kinds in self.seconds_per_token.items():
            lines += [_line(f"{phase} {kind} us/token", c, 1e6) for kind, c in kinds.items()]
        return "\n".join(lines)


def compare(trace: Trace, schedule: Schedule) -> Comparison:
    predicted = schedule.predicted
    return Comparison(
        Compared(predicted.prefill_tokens_per_s if predicted else None, trace.tokens_per_s("prefill")),
        Compared(predicted.decode_tokens_per_s if predicted else None, trace.tokens_per_s("decode")),
        {phase: _by_kind(trace, schedule, phase) for phase in ("prefill", "decode")},
    )


def _by_kind(trace: Trace, schedule: Schedule, phase: Phase) -> dict[str, Compared]:
    forecast = schedule.predicted.seconds_per_token.get(phase, {}) if schedule.predicted else {}
    tokens = trace.tokens(phase)
    if not tokens:
        return {}
    actual = {kind: s / tokens for kind, s in trace.seconds_by_kind(phase).items()}
    return {kind: Compared(forecast.get(kind), actual.get(kind)) for kind in dict.fromkeys((*forecast, *actual))}


def _line(name: str, c: Compared, scale: float) -> str:
    cells = [f"{value * scale:.4g}" if value is not None else "-" for value in (c.forecast, c.actual)]
    ratio = f"{1 + c.error:.2f}" if c.error is not None else "-"
    return f"{name:34}{cells[0]:>12}{cells[1]:>12}{ratio:>18}"
