"""Nodes that join a cluster while a model runs there: found, measured, and weighed, before anything is moved to them.
Knows which of Ray's nodes a plan has; the plan is changed by `host.py`, between passes."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ciuic_runtime.cluster.growth import Choice, choose
from ciuic_runtime.devices.errors import CiuicError, InvalidInput
from ciuic_runtime.devices.ray_nodes import NODE_ID, node_ids, nodes_of, with_node
from ciuic_runtime.devices.spec import Topology
from ciuic_runtime.engine.setup import Setup
from ciuic_runtime.models.checkpoint import open_checkpoint
from ciuic_runtime.ops.native import instruction_set

log = logging.getLogger("ciuic")

LOOK_SECONDS = 60.0  # for a node to open the model's files


@dataclass
class Newcomers:
    """`refused`: by Ray's id of a node, why it is not used; forgotten when people ask."""

    ray: Any
    refused: dict[str, str] = field(default_factory=dict)

    def look(
        self, now: Setup, asked: bool, used_names: Collection[str], smaller: bool,
        unfit: Callable[[str], str | None],
    ) -> Choice | None:  # fmt: skip
        """What is to be done about nodes that the plan lacks; None where there are none that can be used. Nodes that
        are gone, and that no pass has missed yet, do not count. `unfit`: by Ray's id, why a node is not used now."""
        if asked:
            self.refused.clear()
        topology, new = self._there(now.topology), list[str]()
        for name, node_id in self._unknown(now, used_names).items():
            if reason := unfit(node_id):
                self.refused[node_id] = f"{name} is not used: {reason}"
            if node_id in self.refused:
                continue
            try:
                _check_model(self.ray, now, name, node_id)
                topology = with_node(self.ray, topology, name, node_id, progress=lambda what: log.info("%s", what))
                new.append(name)
            except CiuicError as error:
                self.refused[node_id] = str(error)
                log.warning("%s joined, and is not used: %s", name, error)
        if not new:
            return None
        return choose(now, topology, set(new), smaller)

    def _there(self, topology: Topology) -> Topology:
        """The devices of nodes that are alive."""
        alive = {n["NodeID"] for n in nodes_of(self.ray)}
        return topology.only(d.name for d in topology.devices if d.facts.get(NODE_ID) in {None, *alive})

    def _unknown(self, now: Setup, used_names: Collection[str]) -> dict[str, str]:
        """Ray's ids of nodes that the plan does not know, by the names that they get."""
        known = node_ids(now.topology)
        taken = {*known, *used_names}
        free = (name for i in range(len(taken) + len(self.ray.nodes()) + 1) if (name := f"node{i}") not in taken)
        new = (n["NodeID"] for n in nodes_of(self.ray) if n["NodeID"] not in known.values())
        return dict(zip(free, new, strict=False))


def _check_model(ray: Any, now: Setup, name: str, node_id: str) -> None:
    """Raises InvalidInput where a node does not have the model, or cannot compute it as the others do."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    where = NodeAffinitySchedulingStrategy(node_id, soft=False)
    seen = ray.remote(num_cpus=0, max_retries=0)(_model_there).options(scheduling_strategy=where)
    try:
        spec = ray.get(seen.remote(str(Path(now.model.source).resolve()), now.kernels), timeout=LOOK_SECONDS)
    except ray.exceptions.RayError as error:
        cause = error.cause if isinstance(error, ray.exceptions.RayTaskError) else error
        raise InvalidInput(f"{name} cannot run the model: {cause}") from error
    if spec != repr(now.model.spec):
        raise InvalidInput(f"{name} has another model at {now.model.source}: {spec}")


def _model_there(path: str, kernels: str) -> str:
    """On a node: what the model there is."""
    instruction_set(kernels)
    checkpoint = open_checkpoint(path)
    try:
        return repr(checkpoint.spec)
    finally:
        checkpoint.close()
