"""Everything on one device whose memory is too small for it: pages come from disk when they are needed.
What every pass needs has its home in memory as far as it fits, first things first; routed experts share the rest.
Of a table that can be read by rows (the embedding), a pass reads its tokens' rows: experts make more of the memory."""

from __future__ import annotations

from dataclasses import replace

from ciuic_runtime.devices.spec import Topology
from ciuic_runtime.schedulers.assignment import Paging
from ciuic_runtime.schedulers.cost import CostModel
from ciuic_runtime.schedulers.draft import NOTHING, Fixed
from ciuic_runtime.schedulers.graph import TaskGraph
from ciuic_runtime.schedulers.memory import capacity
from ciuic_runtime.schedulers.policies.trivial import all_on
from ciuic_runtime.schedulers.schedule import Schedule

LEFT_FREE = 1 / 16  # of the memory, where the user named no budget: for the interpreter and other processes


def paged_on(
    graph: TaskGraph, topology: Topology, cost: CostModel, fixed: Fixed = NOTHING, *, device: str, disk: str,
    budgeted: bool = True, stored: Fixed = NOTHING,
) -> Schedule:  # fmt: skip
    """`budgeted`: the device's memory is what the user allows, all of which can be used. `stored`: rows that the user's
    rules have on the disk, whether there is room or not."""
    work, spec = cost.workload, topology.device(device)
    room = capacity(spec) if budgeted else int(capacity(spec) * (1 - LEFT_FREE))
    other = graph.working_bytes(work.batch, work.prompt_tokens, work.context)
    other += graph.kv_bytes_per_token * work.cache_tokens
    cache_bytes = max(0, min(int(room - other), graph.nbytes))
    left, stays = cache_bytes, set()
    for task in graph:
        for page in () if task.num_experts or task.name in stored else task.pages:
            if page.name not in stays and not page.row_nbytes and page.nbytes <= left:
                left -= page.nbytes
                stays.add(page.name)
    whole = all_on(graph, topology, cost, fixed, device=device)
    rows = tuple(
        row if graph.rows[row.task].name in stays or row.device != device else replace(row, home=disk)
        for row in whole.assignments
    )
    paging = Paging(device, disk, cache_bytes)
    return replace(whole, assignments=rows, policy=f"all on {device}, paged from {disk}", paging=paging)
