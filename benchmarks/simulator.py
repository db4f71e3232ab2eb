"""How fast the simulator is: 256 decode steps of DeepSeek-V3 in contiguous stages over 24 GPUs, one task at a time and
as a pipeline. Events are those of the trace.

    python benchmarks/simulator.py [--steps 256] [--micro-batches 1]"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

from ciuic_runtime.devices.spec import DeviceSpec, Link, Topology
from ciuic_runtime.model import Model
from ciuic_runtime.schedulers.cost import CostModel
from ciuic_runtime.schedulers.graph import Step
from ciuic_runtime.schedulers.policies.trivial import split_by_speed
from ciuic_runtime.schedulers.simulate import simulate, simulate_pipeline
from ciuic_runtime.schedulers.trace import Trace
from ciuic_runtime.schedulers.workload import Workload

NODES = 24


def topology() -> Topology:
    """Invented: 24 nodes with one 80 GB GPU each, every pair joined by a 400 Gbit/s network."""
    names = [f"node{i}/cuda:0" for i in range(NODES)]
    rates = {"bfloat16": 800e12, "int8": 1600e12}
    gpus = (DeviceSpec(n, "GPU", memory_bytes=80 << 30, memory_bandwidth=3e12, matrix_rates=rates) for n in names)
    links = (Link(a, b, 45e9, 10e-6) for a in names for b in names if a != b)
    return Topology(tuple(gpus), tuple(links))


def timed(what: str, run: Callable[[], Trace]) -> None:
    start = time.perf_counter()
    trace = run()
    seconds = time.perf_counter() - start
    rate = len(trace.events) / seconds
    print(f"{what:24} {len(trace.events):8} events   {seconds:6.3f} s   {rate / 1e3:7.0f} k events/s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=256)
    parser.add_argument("--micro-batches", type=int, default=1)
    arguments = parser.parse_args()
    work = Workload(512, arguments.steps, arguments.micro_batches)
    graph, nodes = Model("deepseek-v3", "int8").graph, topology()
    cost = CostModel(nodes, graph.format, workload=work)
    schedule = split_by_speed(graph, nodes, cost)
    schedule.check_memory(graph)
    steps = [Step.decode(work.prompt_tokens + i, work.batch) for i in range(1, arguments.steps + 1)]
    timed("one task at a time", lambda: simulate(schedule, graph, cost, steps))
    timed(f"{work.batch} micro-batches", lambda: simulate_pipeline(schedule, graph, cost, work.batch, steps))


if __name__ == "__main__":
    main()
