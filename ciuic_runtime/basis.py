"""What forecasts of a run are made with, as JSON and back: so that a saved recording can be compared with its plan, and
planned again, without the model's files or the machine. Knows what belongs to it; the file is `schedulers/`'s."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from ciuic_runtime.devices.errors import InvalidInput
from ciuic_runtime.model import Model
from ciuic_runtime.models.spec import ModelSpec
from ciuic_runtime.schedulers.calibration import Calibration
from ciuic_runtime.schedulers.forecaster import Forecaster, Pipelining
from ciuic_runtime.schedulers.reading import read_as
from ciuic_runtime.schedulers.schedule import Schedule


@dataclass(frozen=True)
class Basis:
    """`source` is what the model was called; it need not be there any more."""

    model: Model
    schedule: Schedule
    calibration: Calibration = field(default_factory=Calibration)
    pipelining: Pipelining | None = None

    @property
    def forecaster(self) -> Forecaster:
        return Forecaster(self.schedule, self.model.graph, self.calibration, self.pipelining)

    def to_dict(self) -> dict[str, Any]:
        model, graph = self.model, self.model.graph
        liked = {t.name: list(t.popularity) for t in graph if t.popularity}
        return {
            "model": {
                "source": str(model.source), "format": model.format, "prefill_chunk": model.prefill_chunk,
                "spec": asdict(model.spec), "popularity": liked,
            },
            "schedule": self.schedule.to_dict(),
            "calibration": asdict(self.calibration),
            "pipelining": asdict(self.pipelining) if self.pipelining else None,
        }  # fmt: skip

    @staticmethod
    def from_dict(data: Any, source: str) -> Basis:
        """Raises InvalidInput for anything that `to_dict` would not have written."""
        if not isinstance(data, Mapping) or data.keys() != {"model", "schedule", "calibration", "pipelining"}:
            raise InvalidInput(f"{source}: what its forecasts were made with is damaged or of another version")
        calibration = read_as(Calibration, data["calibration"], f"{source}: calibration")
        way = read_as(Pipelining | None, data["pipelining"], f"{source}: pipelining")
        schedule = Schedule.from_dict(data["schedule"], f"{source}: schedule")
        return Basis(_model(data["model"], f"{source}: model"), schedule, calibration, way)


def _model(data: Any, source: str) -> Model:
    keys = {"source": str, "format": str, "prefill_chunk": int, "spec": ModelSpec,
            "popularity": Mapping[str, tuple[float, ...]]}  # fmt: skip
    if not isinstance(data, Mapping) or data.keys() != keys.keys():
        raise InvalidInput(f"{source} must have {', '.join(keys)}")
    values = {key: read_as(kind, data[key], f"{source}: {key}") for key, kind in keys.items()}
    model = Model(values["source"], values["format"], values["spec"], values["prefill_chunk"])
    liked = values["popularity"]
    if liked:
        tasks = (replace(t, popularity=liked.get(t.name, ())) for t in model.graph)
        model.__dict__["graph"] = replace(model.graph, tasks=tuple(tasks))
    return model
