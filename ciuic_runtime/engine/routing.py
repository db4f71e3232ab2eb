"""Records which experts each token used, and keeps recordings as safetensors files.
Knows nothing of what they are used for: `schedulers/replay.py` scores policies by them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from ciuic_runtime.devices.errors import InvalidInput
from ciuic_runtime.devices.files import write_whole
from ciuic_runtime.schedulers.graph import TaskGraph
from ciuic_runtime.schedulers.replay import Routing

_KEY, _VERSION = "ciuic_routing", 1


class RoutingRecorder:
    """Takes expert ids layer by layer as routers make them."""

    def __init__(self, graph: TaskGraph) -> None:
        self._tasks = {t.layer: t for t in graph if t.num_experts and t.layer is not None}
        if not self._tasks:
            raise InvalidInput(f"{graph.name} has no routed experts: there is no routing to record")
        self._graph = graph
        self._layers = sorted(self._tasks)
        self._step: dict[int, np.ndarray] = {}  # layer -> ids [tokens, k] of the pass under way
        self._ids: list[np.ndarray] = []  # of each pass, [tokens, layers, k]

    def record(self, layer: int, ids: torch.Tensor) -> None:
        if layer == self._layers[0]:
            self._step.clear()  # of a pass that did not come to its end
        self._step[layer] = ids.cpu().numpy().astype(np.int32)
        if layer == self._layers[-1] and len(self._step) == len(self._layers):
            self._ids.append(np.stack([self._step[n] for n in self._layers], axis=1))
            self._step.clear()

    @property
    def anything(self) -> bool:
        return bool(self._ids)

    def routing(self) -> Routing:
        if not self._ids:
            raise InvalidInput("nothing was recorded: no pass came to its end")
        task, routed = self._tasks[self._layers[0]], sum(t.nbytes for t in self._tasks.values())
        step = np.repeat(np.arange(len(self._ids), dtype=np.int32), [len(ids) for ids in self._ids])
        return Routing(
            self._graph.name, tuple(self._layers), task.num_experts, np.concatenate(self._ids), step,
            task.pages[0].nbytes, self._graph.nbytes - routed,
        )  # fmt: skip


def write_routing(routing: Routing, path: str | Path) -> None:
    about = {
        "version": _VERSION, "model": routing.model, "layers": routing.layers, "num_experts": routing.num_experts,
        "expert_nbytes": routing.expert_nbytes, "other_nbytes": routing.other_nbytes,
    }  # fmt: skip
    tensors = {"ids": routing.ids.astype(np.int32), "step": routing.step.astype(np.int32)}
    write_whole(path, save(tensors, {_KEY: json.dumps(about)}))


def read_routing(path: str | Path) -> Routing:
    """Raises InvalidInput for anything that `write_routing` would not have written."""
    try:
        with safe_open(path, "np") as file:
            about = json.loads((file.metadata() or {}).get(_KEY, "null"))
            ids, step = (np.asarray(file.get_tensor(name) if about else ()) for name in ("ids", "step"))
    except (OSError, SafetensorError, ValueError, TypeError, RecursionError) as error:
        raise InvalidInput(f"{path} is not a recording of routing ({error}); ciuic run --record-routing") from error
    if not isinstance(about, dict) or about.get("version") != _VERSION:
        raise InvalidInput(
            f"{path} is not a recording of routing; make one with: ciuic run MODEL --record-routing FILE"
        )
    if not ids.dtype == step.dtype == np.int32:
        raise InvalidInput(f"{path} is damaged: its ids and steps are not 32-bit whole numbers; record it again")
    try:
        found = Routing(
            str(about["model"]), tuple(int(n) for n in about["layers"]), int(about["num_experts"]),
            ids, step, int(about["expert_nbytes"]), int(about["other_nbytes"]),
        )  # fmt: skip
        good = step.ndim == 1 and ids.ndim == 3 and ids.shape[1] == len(found.layers) and len(step) == len(ids) > 0
        good = good and bool((np.diff(step) >= 0).all()) and 0 <= ids.min() <= ids.max() < found.num_experts
        good = good and found.expert_nbytes > 0 and found.other_nbytes >= 0
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError):
        good = False
    if not good:
        raise InvalidInput(f"{path} is damaged: what it says of its routing does not fit together; record it again")
    return found
