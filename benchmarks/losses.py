"""How long a run stands still when something of its cluster is lost: from the kill of a stage's process, or of a node
(its raylet, and the stage there, as when a machine loses power), to the next token.

    python benchmarks/losses.py [MODEL] [--rounds 7] [--out FILE]     MODEL: packed; else one is made for it
    python benchmarks/losses.py --quick                               a small model, one round

Two stages on two raylets of three, batch 4; when a third of the tokens are there, something is killed. Every round
compares all tokens with those of an undisturbed run. Ray's health checks are tightened (a raylet counts as lost after
1.5 s; by default after 15 s), and what of the time is Ray's notice is the rest: planning again and going on (weights
are loaded, sequences replayed) are timed by the run itself. The times do not compare anything, so no round is void."""

from __future__ import annotations

import os
import re
import secrets
import signal
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ["RAY_AUTH_MODE"] = "token"  # before Ray is imported, by whomever
os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))

from pipeline import halves, packed_model
from rounds import Report, against, common_arguments, note

import ciuic_runtime as ciuic
from ciuic_runtime.devices.ray_nodes import NODE_ID
from ciuic_runtime.devices.ray_session import import_ray

HEALTH = {
    "health_check_initial_delay_ms": 0, "health_check_period_ms": 500, "health_check_timeout_ms": 1000,
    "health_check_failure_threshold": 3,
}  # fmt: skip
NODE = {"num_cpus": 2, "object_store_memory": 100 << 20}
NODES, STAGES, BATCH, PROMPT, NEW = 3, 2, 4, 16, 60
MOST_PLANNING = 0.5  # s


@dataclass(frozen=True)
class Loss:
    next_token: float  # s since the kill
    went_on: float  # of these, since it was noticed
    planned: float  # of these, for planning again; 0 where the plan stays


class Cluster:
    """The head and two more raylets on this machine, one of which may be dead."""

    def __init__(self, model: Path) -> None:
        from ray.cluster_utils import Cluster as RayCluster

        self.ray, self.model = import_ray(), model
        head = {**NODE, "include_dashboard": False, "_system_config": HEALTH}
        self.raylets = RayCluster(initialize_head=True, head_node_args=head)
        self.mend()

    def mend(self) -> None:
        """All nodes alive."""
        for node in list(self.raylets.worker_nodes):
            if node.all_processes["raylet"][0].process.poll() is not None:
                self.raylets.remove_node(node, allow_graceful=False)
        while len(self.raylets.worker_nodes) < NODES - 1:
            self.raylets.add_node(**NODE)
        self.raylets.wait_for_nodes()

    def open(self) -> ciuic.LLM:
        """One half of the model on each of two nodes; what the head's node can do is left for later."""
        hardware = ciuic.DeviceManager.from_ray(self.raylets.address, path=self.model)
        placement = halves(self.model, hardware, "node1/cpu", "node2/cpu")
        return ciuic.LLM(
            self.model, devices=hardware, executor="ray", address=self.raylets.address, threads=1, stages=STAGES,
            placement=placement, max_model_len=PROMPT + NEW, max_num_seqs=BATCH,
        )  # fmt: skip

    def stage(self, llm: ciuic.LLM) -> Callable[[], None]:
        """Kills the last one."""
        pid = llm.engine.runner.processes()[-1]
        return lambda: os.kill(pid, signal.SIGKILL)

    def node(self, llm: ciuic.LLM) -> Callable[[], None]:
        """Kills the last stage's."""
        node_id = llm.schedule.topology.device("node2/cpu").facts[NODE_ID]
        [gone] = [n for n in self.raylets.worker_nodes if n.node_id == node_id]
        process, stage = gone.all_processes["raylet"][0].process, self.stage(llm)

        def kill() -> None:
            process.kill()
            stage()
            process.wait()

        return kill

    def close(self) -> None:
        self.ray.shutdown()
        self.raylets.shutdown()


def generate(llm: ciuic.LLM, kill: Callable[[], None] | None = None) -> tuple[list[Any], float]:
    """The tokens, and how long after the kill the first one came that was made after it: the end of the longest time
    without any. What passes on their way had made already comes before."""
    params = ciuic.SamplingParams(max_tokens=NEW, temperature=0.0, ignore_eos=True)
    outputs: dict[int, Any] = {}
    came: list[float] = []
    killed = 0.0
    for _, output in llm.stream([[5 + i] * PROMPT for i in range(BATCH)], params):
        came.append(time.perf_counter())
        outputs[output.index] = output
        if kill is not None and len(came) == NEW * BATCH // 3:
            killed = time.perf_counter()
            kill()
    after = [killed, *(t for t in came if t > killed)]
    longest = max(range(1, len(after)), key=lambda i: after[i] - after[i - 1])
    return [outputs[i].token_ids for i in range(BATCH)], after[longest] - killed


def lose(llm: ciuic.LLM, expected: list[Any], kill: Callable[[], None]) -> Loss:
    tokens, next_token = generate(llm, kill)
    assert tokens == expected, "other tokens than in an undisturbed run"
    [said] = [n for n in llm.trace.notes if "was lost" in n]
    planned, took = re.search(r"planned again in ([\d.]+) s", said), re.search(r"going on after ([\d.]+) s", said)
    assert took is not None, said
    note(f"  {next_token:.2f} s to the next token: {said}")
    return Loss(next_token, float(took[1]), float(planned[1]) if planned else 0.0)


def tell(report: Report, what: str, losses: list[Loss]) -> None:
    waited = [one.next_token for one in losses]
    median, most = statistics.median(waited), max(waited)
    noticed = statistics.median(one.next_token - one.went_on for one in losses)
    report.line(
        f"{what:8} killed: next token after {median:.2f} s (at most {most:.2f} s), of which {noticed:.2f} s until it "
        f"was noticed; {len(losses)} times, all tokens as undisturbed"
    )
    planned = [one.planned for one in losses if one.planned]
    if planned:
        report.line(f"{'':8} planned again in {against(max(planned), MOST_PLANNING, ' s', at_most=True)} at most")


def main() -> None:
    parser = common_arguments(__doc__)
    parser.add_argument("model", type=Path, nargs="?", help="packed; None: one is made")
    parser.add_argument("--quick", action="store_true", help="a small model, one round")
    args = parser.parse_args()
    rounds = 1 if args.quick else args.rounds
    with tempfile.TemporaryDirectory(prefix="ciuic-losses-") as name:
        model = args.model or packed_model(Path(name) / "packed", args.quick)
        report = Report(f"Losses in a cluster{', small model' if args.quick else ''}", args.out)
        cluster = Cluster(model)
        found: dict[str, list[Loss]] = {"a stage": [], "a node": []}
        try:
            for i in range(rounds):
                cluster.mend()
                with cluster.open() as llm:
                    note(f"round {i + 1} of {rounds}: {', '.join(s.node for s in llm.engine.runner.stages)}")
                    expected, _ = generate(llm)
                    found["a stage"].append(lose(llm, expected, cluster.stage(llm)))
                    found["a node"].append(lose(llm, expected, cluster.node(llm)))
        finally:
            cluster.close()
        nbytes = sum(f.stat().st_size for f in model.glob("*.safetensors"))
        report.line(f"{model.name}, {nbytes / 1e6:.0f} MB, {STAGES} stages on {NODES} raylets of one machine")
        for what, losses in found.items():
            tell(report, what, losses)
        report.save()


if __name__ == "__main__":
    main()
