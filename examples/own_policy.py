"""A scheduling policy of one's own: a function that joins the planner's candidates and is judged with them.

python examples/own_policy.py
"""

from pathlib import Path

import ciuic_runtime as ciuic
from ciuic_runtime.schedulers import ScheduleDraft


@ciuic.policy("attention on the fastest")
def attention_on_the_fastest(graph: ciuic.TaskGraph, topology: ciuic.Topology, cost: ciuic.CostModel) -> ciuic.Schedule:
    """Attention and what is small goes to the fastest device, routed experts to the one with the most memory."""
    fastest = max(topology.compute_devices, key=cost.bandwidth).name
    largest = max(topology.compute_devices, key=lambda d: d.memory_bytes).name
    draft = ScheduleDraft(graph, topology, cost.workload)
    for task in graph:
        draft.place(task, largest if task.kind == "experts" else fastest)
    return draft.freeze("attention on the fastest")


if __name__ == "__main__":
    hw = ciuic.DeviceManager.from_toml(Path(__file__).with_name("two_gpus.toml"))
    print(ciuic.plan(ciuic.Model("deepseek-v2-lite"), hw))
