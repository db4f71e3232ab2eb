"""A schedule cut into stages: runs of whole layers for one process, each a graph and a schedule of its own.
Knows nodes by the names of their devices; how stages talk to each other is the cluster's business."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ciuic_runtime.devices.errors import InvalidInput
from ciuic_runtime.devices.spec import Topology
from ciuic_runtime.schedulers.graph import Task, TaskGraph
from ciuic_runtime.schedulers.memory import node_of
from ciuic_runtime.schedulers.schedule import Schedule


@dataclass(frozen=True)
class Stage:
    """Device names are the node's own: `cpu` for what the whole schedule calls `node1/cpu`."""

    index: int
    node: str  # node1; "" for the only one
    graph: TaskGraph  # of its tasks; `given` is what comes from the stage before
    schedule: Schedule


def stages_of(schedule: Schedule, graph: TaskGraph, count: int | None = None) -> list[Stage]:
    """Layers that follow one another on a node are a stage; with a `count`, the largest is halved until there are as
    many. Raises InvalidInput where a layer is spread over nodes, or has to be cut."""
    runs = _runs(schedule, graph)
    while count is not None and len(runs) < count:
        runs = _halved(runs, count)
    if count is not None and len(runs) > count:
        raise InvalidInput(
            f"{count} stages were asked for, and the schedule has {len(runs)}: its layers go to another node so often"
        )
    given: tuple[str, ...] = ()
    stages = []
    for index, run in enumerate(runs):
        tasks = [task for piece in run for task in piece]
        node = node_of(schedule.device_of(tasks[0].name))
        part = part_of(graph, tasks, given)
        stages.append(Stage(index, node, part, _local(schedule, part, node)))
        given = (tasks[-1].name,)
    return stages


def part_of(graph: TaskGraph, tasks: Sequence[Task], given: tuple[str, ...]) -> TaskGraph:
    """Some of a graph's tasks, which need the values of `given` tasks from elsewhere."""
    return replace(graph, tasks=tuple(tasks), given=given)


def _pieces(graph: TaskGraph) -> list[list[Task]]:
    """What is never cut: the layers, with what comes before the first one and after the last one."""
    pieces: list[list[Task]] = []
    before: int | None = None
    for task in graph:
        if not pieces or (task.layer is not None and before is not None and task.layer != before):
            pieces.append([])
        pieces[-1].append(task)
        before = task.layer if task.layer is not None else before
    return pieces


def _runs(schedule: Schedule, graph: TaskGraph) -> list[list[list[Task]]]:
    runs: list[list[list[Task]]] = []
    last = ""
    for piece in _pieces(graph):
        rows = [schedule.rows[name] for task in piece for name, _ in task.rows]
        nodes = {node_of(row.device) for row in rows} | {node_of(row.home) for row in rows}
        if len(nodes) > 1:
            where = ", ".join(sorted(node or "this machine" for node in nodes))
            raise InvalidInput(
                f"{piece[0].name} to {piece[-1].name} are spread over {where}; a layer, with its experts, lies on one "
                "node (embedding with the first layer, head with the last): give them one node in the placement"
            )
        [node] = nodes
        if not runs or node != last:
            runs.append([])
        runs[-1].append(piece)
        last = node
    return runs


def _halved(runs: list[list[list[Task]]], count: int) -> list[list[list[Task]]]:
    """The run with most bytes, cut where its halves are most alike."""
    sizes = [sum(task.nbytes for piece in run for task in piece) if len(run) > 1 else -1 for run in runs]
    at = max(range(len(runs)), key=lambda i: sizes[i])
    if sizes[at] < 0:
        raise InvalidInput(f"{count} stages were asked for, and there are {sum(map(len, runs))} layers; ask for fewer")
    run, total, done = runs[at], sizes[at], 0.0
    cuts = []
    for i, piece in enumerate(run[:-1], 1):
        done += sum(task.nbytes for task in piece)
        cuts.append((abs(2 * done - total), i))
    cut = min(cuts)[1]
    return [*runs[:at], run[:cut], run[cut:], *runs[at + 1 :]]


def _local(schedule: Schedule, part: TaskGraph, node: str) -> Schedule:
    """The rows of a part, on its node's devices under their own names."""
    own = [schedule.rows[name] for name in part.rows]
    rows = tuple(replace(r, device=_bare(r.device), home=_bare(r.home)) for r in own)
    paging = schedule.paging
    if paging is not None:
        paged = sum(row.nbytes for row in schedule.assignments if row.home == paging.disk)
        mine = sum(row.nbytes for row in own if row.home == paging.disk)
        share = int(paging.cache_bytes * mine / paged) if paged else 0
        paging = (
            replace(paging, device=_bare(paging.device), disk=_bare(paging.disk), cache_bytes=share) if mine else None
        )
    return replace(
        schedule, assignments=rows, topology=local_topology(schedule.topology, node), paging=paging, predicted=None,
        candidates=(), notes=(),
    )  # fmt: skip


def local_topology(topology: Topology, node: str) -> Topology:
    """A node's devices and the links between them, under their own names."""
    devices = tuple(replace(d, name=_bare(d.name)) for d in topology.devices if node_of(d.name) == node)
    links = tuple(
        replace(x, src=_bare(x.src), dst=_bare(x.dst), domains=())
        for x in topology.links
        if node_of(x.src) == node == node_of(x.dst)
    )
    return Topology(devices, links)


def _bare(device: str) -> str:
    return device.rpartition("/")[2]
