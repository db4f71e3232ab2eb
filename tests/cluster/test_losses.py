"""Stages and nodes that are lost while a model runs: every request gets the tokens that it would have had, nothing
hangs, and nothing is left behind."""

from __future__ import annotations

import asyncio
import faulthandler
import os
import random
import re
import shutil
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest
from raylets import put_back

import ciuic_runtime as ciuic
from ciuic_runtime.cluster import runner as running
from ciuic_runtime.cluster import seats
from ciuic_runtime.cluster.host import CHANCES
from ciuic_runtime.cluster.runner import PlacedStage, RayRunner
from ciuic_runtime.cluster.stage_worker import StagePlan
from ciuic_runtime.devices.errors import CiuicError, InvalidInput, OutOfMemory
from ciuic_runtime.devices.ray_nodes import NODE_ID, machine_of, nodes_of
from ciuic_runtime.devices.ray_session import join
from ciuic_runtime.devices.spec import Topology
from ciuic_runtime.engine.engine import StageLost
from ciuic_runtime.engine.service import EngineService, Submission
from ciuic_runtime.models.batch import Chunk
from ciuic_runtime.ops.native import kernels

pytestmark = pytest.mark.skipif(kernels() is None, reason="the native kernels are not built here")

PROMPTS = [[5, 250, 17, 99, 3, 3, 42] * 12, [7], list(range(60, 100)), [77] * 65, [9, 8], [250] * 3]
PARAMS = [
    ciuic.SamplingParams(max_tokens=40 + 8 * i, ignore_eos=True, logprobs=2, temperature=1.0 * (i % 2), seed=i)
    for i in range(len(PROMPTS))
]
TOKENS = sum(p.max_tokens for p in PARAMS)
SETTINGS: dict[str, Any] = {"max_model_len": 192, "max_num_seqs": 6, "threads": 1}


def outcome(outputs: list[Any]) -> list[Any]:
    return [(o.token_ids, o.logprobs, o.finish_reason) for o in outputs]


@pytest.fixture(scope="module")
def expected(tiny_int4: Path, here: Topology) -> list[Any]:
    with ciuic.LLM(tiny_int4, devices=here, **SETTINGS) as llm:
        return outcome(llm.generate(PROMPTS, PARAMS))


@pytest.fixture(autouse=True)
def watchdog(request: pytest.FixtureRequest) -> Iterator[None]:
    """What hangs fails, and says where."""
    seconds = 1500 if request.node.get_closest_marker("slow") else 90

    def bark(*_: object) -> None:
        faulthandler.dump_traceback()
        raise AssertionError(f"not at its end after {seconds} s")

    before = signal.signal(signal.SIGALRM, bark)
    signal.alarm(seconds)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


class Processes:
    """All that this process started since, and what they started, whenever it was looked."""

    def __init__(self) -> None:
        self.shared_memory = set(os.listdir("/dev/shm"))
        self.before = set(psutil.Process().children())  # of the cluster that other tests use
        self.seen: set[psutil.Process] = set()

    def look(self) -> None:
        for process in set(psutil.Process().children()) - self.before:
            self.seen |= {process, *process.children(recursive=True)}

    def check_gone(self) -> None:
        _, left = psutil.wait_procs(self.seen, timeout=20)
        assert not [p for p in left if p.is_running()], "processes are left"
        new = set(os.listdir("/dev/shm")) - self.shared_memory
        ours = [f for f in new if "plasma" in f or any(str(p.pid) in f for p in self.seen)]
        assert not ours, "shared memory is left"


@contextmanager
def nothing_left() -> Iterator[Processes]:
    processes = Processes()
    yield processes
    processes.check_gone()


def open_here(model: Path, here: Topology, **settings: Any) -> ciuic.LLM:
    return ciuic.LLM(model, devices=here, executor="ray", **{**SETTINGS, **settings})


def check_ended(pids: list[int]) -> None:
    _, left = psutil.wait_procs([psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)], timeout=20)
    assert not left, "stages are left"


def generate(llm: ciuic.LLM, at: int, then: Callable[[], None], outputs: dict[int, Any] | None = None) -> list[Any]:
    """What `llm.generate` gives; when it has made `at` tokens, something happens. `outputs`: for those so far."""
    outputs = {} if outputs is None else outputs
    for tokens, (_, output) in enumerate(llm.stream(PROMPTS, PARAMS)):
        outputs[output.index] = output
        if tokens == at:
            then()
    return outcome([outputs[i] for i in sorted(outputs)])


def kill_soon(pid: int, seconds: float) -> Callable[[], None]:
    return threading.Timer(seconds, os.kill, (pid, signal.SIGKILL)).start


def losses(llm: ciuic.LLM) -> list[str]:
    return [note for note in llm.trace.notes if "was lost" in note]


def noted(llm: ciuic.LLM, expected: list[Any]) -> str:
    """What the trace says of a loss; where that came after the last token, it is noticed the next time."""
    while not losses(llm):
        assert outcome(llm.generate(PROMPTS, PARAMS)) == expected
    [note] = losses(llm)
    return note


def lose_stages(llm: ciuic.LLM, processes: Processes, expected: list[Any], times: int, luck: random.Random) -> None:
    """One after the other, each at a random moment of a generation."""
    for _ in range(times):
        pids = llm._host.runner.processes()
        processes.look()
        pid, at, soon = luck.choice(pids), luck.randrange(TOKENS * 3 // 4), luck.uniform(0, 0.01)
        assert generate(llm, at, kill_soon(pid, soon)) == expected
        note = noted(llm, expected)
        assert note.startswith(f"stage {pids.index(pid)} was lost: ")
        assert "; going on after " in note
        assert pid not in llm._host.runner.processes()


def test_killed_and_stuck_stages_change_no_token(
    ray: Any, tiny_int4: Path, here: Topology, expected: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    with nothing_left() as processes, open_here(tiny_int4, here, stages=3) as llm:
        lose_stages(llm, processes, expected, 3, random.Random(1))

        # What was recorded before the loss is still there, by the stages that are.
        trace = llm.trace
        assert {e.step for e in trace.events} == set(range(len(trace.steps)))
        assert llm.comparison is not None

        # A stream that is left while passes are on their way.
        stream = llm.stream(PROMPTS, PARAMS)
        for _ in range(25):
            next(stream)
        stream.close()
        assert outcome(llm.generate(PROMPTS, PARAMS)) == expected

        # Lost while nobody asks for anything, and the last stage.
        os.kill(llm._host.runner.processes()[-1], signal.SIGKILL)
        assert outcome(llm.generate(PROMPTS, PARAMS)) == expected
        assert losses(llm)[0].startswith("stage 2 was lost: ")

        # One that does not answer.
        monkeypatch.setattr(running, "LEAST_DEADLINE", 2.0)
        pid = llm._host.runner.processes()[1]
        assert generate(llm, 100, lambda: os.kill(pid, signal.SIGSTOP)) == expected
        assert losses(llm)[0].startswith("stage 1 was lost: it did not answer in ")
        assert pid not in llm._host.runner.processes()
        processes.look()


@pytest.mark.slow
def test_many_killed_stages_change_no_token(ray: Any, tiny_int4: Path, here: Topology, expected: list[Any]) -> None:
    with nothing_left() as processes, open_here(tiny_int4, here, stages=3) as llm:
        lose_stages(llm, processes, expected, 30, random.Random(2))

        # All of them at once.
        pids = llm._host.runner.processes()
        assert generate(llm, 30, lambda: [os.kill(pid, signal.SIGKILL) for pid in pids] and None) == expected
        assert all(f"stage {i} was lost" in losses(llm)[0] for i in range(3))
        processes.look()


# Nodes


def nodes(cluster: Any, here: Topology, memory: Mapping[str, int] | None = None) -> Topology:
    """The cluster's nodes with this machine's processor each, and as many bytes as are declared."""
    [cpu] = here.by_kind("CPU")
    found = {f"node{i}": node["NodeID"] for i, node in enumerate(nodes_of(join(cluster.address)))}
    most = dict.fromkeys(found, cpu.memory_bytes) | dict(memory or {})
    return Topology(
        tuple(
            replace(
                cpu, name=f"{name}/cpu", facts={**cpu.facts, NODE_ID: node_id}, memory_bytes=most[name],
                memory_free_bytes=most[name],
            )
            for name, node_id in found.items()
        )
    )  # fmt: skip


def spread(embedding: str = "node1/cpu", first: str = "node1/cpu", rest: str = "node2/cpu") -> ciuic.Placement:
    rules = ciuic.Placement().put("*", on=rest)
    for pattern, on in (("embedding", embedding), ("layers.0.*", first), ("layers.1.*", first)):
        rules = rules.put(pattern, on=on)
    return rules


def kill_node(cluster: Any, topology: Topology, node: str, workers: list[int]) -> Callable[[], None]:
    """Its raylet, when called; its workers end when they notice, which is waited for."""
    node_id = topology.device(f"{node}/cpu").facts[NODE_ID]
    [gone] = [n for n in cluster.worker_nodes if n.node_id == node_id]
    process = gone.all_processes["raylet"][0].process

    def kill() -> None:
        process.kill()
        process.wait()
        psutil.wait_procs([psutil.Process(pid) for pid in workers if psutil.pid_exists(pid)], timeout=20)

    return kill


def open_on(cluster: Any, topology: Topology, model: Path, **settings: Any) -> ciuic.LLM:
    return ciuic.LLM(
        model,
        devices=topology,
        executor="ray",
        address=cluster.address,
        **{**SETTINGS, "placement": spread(), **settings},
    )


@pytest.mark.slow
def test_a_lost_node_and_one_that_loses_too_much_are_done_without(
    cluster: Any, tiny_int4: Path, here: Topology, expected: list[Any]
) -> None:
    put_back(cluster, 4)
    topology = nodes(cluster, here)
    with open_on(cluster, topology, tiny_int4) as llm:
        assert [s.node for s in llm._host.runner.stages] == ["node1", "node2"]
        pids = llm._host.runner.processes()
        assert generate(llm, 50, kill_node(cluster, topology, "node2", pids[1:])) == expected
        [note] = losses(llm)
        assert re.fullmatch(
            "stage 1 on node2 was lost: .*, planned again in .* s without node2; going on after .* s", note
        )
        assert "node2" not in {s.node for s in llm._host.runner.stages}
        assert outcome(llm.generate(PROMPTS, PARAMS)) == expected
        assert not losses(llm)

        for _ in range(CHANCES):
            llm._host._count(StageLost(0, "node1", "it died"))  # as if it had lost so many already
        stages = [s.node for s in llm._host.runner.stages]
        pid = llm._host.runner.processes()[stages.index("node1")]
        assert generate(llm, 40, lambda: os.kill(pid, signal.SIGKILL)) == expected
        assert "planned again" in losses(llm)[0]
        assert not {"node1", "node2"} & {s.node for s in llm._host.runner.stages}
        pids = llm._host.runner.processes()
    check_ended(pids)


@pytest.mark.slow
def test_what_cannot_go_on_is_one_error(
    cluster: Any, tiny_int4: Path, here: Topology, expected: list[Any], tmp_path: Path
) -> None:
    # A stage that cannot be loaded again.
    model = shutil.copytree(tiny_int4, tmp_path / "model")
    with open_on(cluster, nodes(cluster, here), model) as llm:
        pids = llm._host.runner.processes()
        shutil.rmtree(model)
        with pytest.raises(CiuicError, match=r"^stage 1 on node2.*/model"):
            generate(llm, 20, lambda: os.kill(pids[1], signal.SIGKILL))
        with pytest.raises(CiuicError, match="open it again"):
            llm.generate(PROMPTS[0], PARAMS[0])

    # Too little memory without the node that is lost.
    with ciuic.LLM(tiny_int4, devices=here, **SETTINGS) as llm:
        need = sum(llm.schedule.predicted.memory_bytes.values())
    topology = nodes(cluster, here, {"node0": 1 << 20, "node1": int(0.85 * need), "node2": int(0.85 * need)})
    with open_on(cluster, topology, tiny_int4) as llm:
        stages = llm._host.runner.processes()
        outputs: dict[int, Any] = {}
        says = r"^stage 0 on node1 was lost: .*; what is left \(node0, node2\) cannot hold the model: "
        with pytest.raises(OutOfMemory, match=says):
            generate(llm, 60, kill_node(cluster, topology, "node1", stages[:1]), outputs)
        for index, (token_ids, logprobs, _) in enumerate(expected):
            so_far = outputs[index]
            assert 0 < len(so_far.token_ids) < len(token_ids)
            assert so_far.token_ids == token_ids[: len(so_far.token_ids)]
            assert so_far.logprobs == logprobs[: len(so_far.logprobs)]
        check_ended([*pids, *stages])


@pytest.mark.slow
def test_a_node_without_room_is_done_without_where_another_has_some(
    cluster: Any, tiny_int4: Path, here: Topology, expected: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next one that the rules name has none, which only Ray knows."""
    monkeypatch.setattr(seats, "RESERVE_SECONDS", 0.0)
    put_back(cluster, 4)
    topology = nodes(cluster, here)
    rules = ciuic.Placement().put("*", on=["node2/cpu", "node0/cpu", "node3/cpu"])
    rules = rules.put("embedding", on="node1/cpu").put("layers.0.*", on="node1/cpu")
    with open_on(cluster, topology, tiny_int4, placement=rules) as llm:
        assert [s.node for s in llm._host.runner.stages] == ["node1", "node2"]
        taken = seats.Seats(join(None))
        there = replace(llm._host.runner.stages[1], node="node0", node_id=nodes_of(join(None))[0]["NodeID"], cores=2.0)
        taken.reserve([there], ())
        pids = llm._host.runner.processes()
        assert generate(llm, 50, kill_node(cluster, topology, "node2", pids[1:])) == expected
        assert [s.node for s in llm._host.runner.stages] == ["node1", "node3"]
        assert pids[0] in llm._host.runner.processes(), "the other stage was ended"
        [note] = losses(llm)
        assert "without node0, node2; going on after" in note
        taken.close()


def test_a_machine_that_fails_again_and_again_is_known_by_its_place() -> None:
    def node(id: str, alive: bool, host: str = "laptop") -> dict[str, Any]:
        return {"NodeID": id, "Alive": alive, "NodeManagerHostname": host, "NodeManagerAddress": "10.0.0.7"}

    again = [node("a", False), node("b", True), node("c", True, "desk")]
    assert machine_of(again[:1], "a") == machine_of(again, "b") == "laptop (10.0.0.7)"
    assert machine_of(again, "c") == "desk (10.0.0.7)"
    assert machine_of([*again, node("d", True)], "b") == "b", "two at once on a machine are not one"


@pytest.mark.slow
def test_many_killed_stages_and_nodes_change_no_token(
    cluster: Any, tiny_int4: Path, here: Topology, expected: list[Any]
) -> None:
    luck, took = random.Random(3), []
    for number in range(30):
        topology = nodes(cluster, here)
        with open_on(cluster, topology, tiny_int4) as llm:
            pids = llm._host.runner.processes()
            victim, at, whole = luck.randrange(2), luck.randrange(TOKENS * 3 // 4), luck.random() < 0.5
            node = llm._host.runner.stages[victim].node
            if whole:
                happens = kill_node(cluster, topology, node, luck.choice([[], [pids[victim]]]))
            else:
                happens = kill_soon(pids[victim], luck.uniform(0, 0.01))
            assert generate(llm, at, happens) == expected, f"{number}: {node}, {whole=}"
            took.append(noted(llm, expected))
            pids += llm._host.runner.processes()
        check_ended(pids)
        if whole:
            put_back(cluster)
    assert len(took) == 30
    print("\n".join(took))


# Under load


class Alternating:
    """Lets one token follow the other; a lock, so that it cannot be sent to another process."""

    def __init__(self, tokens: tuple[int, int]) -> None:
        self.tokens, self.accepted, self.lock = tokens, [], threading.Lock()  # type: tuple[int, int], list[int], Any

    def mask(self, logits: Any) -> None:
        may = logits[self.tokens[len(self.accepted) % 2]]
        logits[:] = -np.inf
        logits[self.tokens[len(self.accepted) % 2]] = may

    def accept(self, token_id: int) -> None:
        self.accepted.append(token_id)

    @property
    def finished(self) -> bool:
        return False


@pytest.mark.slow
def test_a_stage_killed_under_load_fails_no_submission(
    ray: Any, tiny_int4: Path, here: Topology, expected: list[Any]
) -> None:
    async def tokens(submission: Submission) -> tuple[tuple[int, ...], str | None]:
        found: list[int] = []
        async for update in submission:
            found += update.token_ids
        return tuple(found), submission.request.finish_reason

    async def load(service: EngineService, pids: list[int]) -> None:
        guide = Alternating((20, 30))
        guided = service.submit(PROMPTS[1], PARAMS[0], guide=guide)
        submissions = [service.submit(PROMPTS[i], PARAMS[i]) for i in range(6) for _ in range(2)]
        tasks = [asyncio.create_task(tokens(s)) for s in (guided, *submissions)]
        for pid in pids:
            await asyncio.sleep(0.15)
            os.kill(pid, signal.SIGKILL)
        (steered, reason), *answers = await asyncio.gather(*tasks)
        assert (steered, reason, guide.accepted) == ((20, 30) * 20, "length", [20, 30] * 20)
        assert answers == [(tuple(expected[i][0]), expected[i][2]) for i in range(6) for _ in range(2)]

    with (
        nothing_left() as processes,
        open_here(tiny_int4, here, stages=2, serving=True) as llm,
    ):
        service = EngineService(llm)
        pids = llm._host.runner.processes()
        service.start()
        asyncio.run(load(service, pids))
        assert len(losses(llm)) == 2 or all(f"stage {i} was lost" in losses(llm)[0] for i in range(2))
        stats = service.stats()
        assert (stats.running, stats.waiting) == (0, 0)
        processes.look()
        service.close()


# Ray's words


class Failing:
    """Ray, with actors whose calls end as a test says: by stage, an exception, or what is answered."""

    def __init__(self, exceptions: Any) -> None:
        self.exceptions, self.ends, self.killed = exceptions, {}, 0  # type: Any, dict[int, Any], int

    def remote(self, worker: type) -> Any:
        def start(plan: StagePlan) -> Any:
            call = SimpleNamespace(remote=lambda *_: ("other", plan.index))
            run = SimpleNamespace(remote=lambda *_: ("run", plan.index))
            return SimpleNamespace(load=call, clear_trace=call, recorded=call, run=run)

        return SimpleNamespace(options=lambda **_: SimpleNamespace(remote=start))

    def get(self, ref: Any, timeout: float | None = None) -> Any:
        if isinstance(end := self._end(ref), BaseException):
            raise end
        return end

    def wait(
        self, refs: list[Any], num_returns: int = 1, timeout: float | None = None, fetch_local: bool = True
    ) -> tuple[list[Any], list[Any]]:
        ready = [r for r in refs if not isinstance(self._end(r), self.exceptions.GetTimeoutError)][:num_returns]
        return ready, [r for r in refs if r not in ready]

    def _end(self, ref: Any) -> Any:
        return self.ends.get(ref[1]) if ref[0] == "run" else []

    def nodes(self) -> list[dict[str, Any]]:
        return []

    def kill(self, actor: Any) -> None:
        self.killed += 1


def three_stages(ray: Any) -> tuple[Failing, RayRunner]:
    failing = Failing(ray.exceptions)
    plans = [StagePlan(i, "model", "int4", 64, (), (), "{}", 8, "auto", 1) for i in range(3)]
    stages = [PlacedStage(plan, f"node{i}", None, 0.0) for i, plan in enumerate(plans)]
    head: Any = SimpleNamespace(lost=False, check=lambda: None)  # that is there
    return failing, RayRunner(failing, head, stages, 2, lambda step: 0.001)


def lost_kinds(ray: Any) -> list[BaseException]:
    e = ray.exceptions
    return [
        e.ActorDiedError(), e.ActorUnavailableError("no answer", None), e.RayActorError(),
        e.ActorUnschedulableError("its node is gone"), e.TaskUnschedulableError("its node is gone"),
        e.NodeDiedError("the node is gone"), e.ObjectLostError("00", None, ""), e.OwnerDiedError("00", None, ""),
        e.ObjectReconstructionFailedError("00"), e.ObjectFetchTimedOutError("00", None, ""), e.WorkerCrashedError(),
        e.LocalRayletDiedError(), e.OutOfMemoryError("the node is short of memory"),
    ]  # fmt: skip


def wrapped(ray: Any, cause: BaseException) -> Any:
    """As `ray.get` raises it: of what waited for a call that failed, the error is wrapped in another one."""
    cause = getattr(cause, "inner", cause)
    inner = ray.exceptions.RayTaskError("run", "Traceback ...", cause)
    raised = inner.as_instanceof_cause()
    raised.inner = inner
    return raised


def test_whatever_ray_says_of_a_loss_names_the_stage_that_was_lost(ray: Any) -> None:
    for kind in lost_kinds(ray):
        for stage in range(3):
            failing, runner = three_stages(ray)
            ends = [b""] * stage + [kind]
            while len(ends) < 3:
                ends.append(wrapped(ray, ends[-1]))
            failing.ends = dict(enumerate(ends))
            with pytest.raises(StageLost) as lost:
                runner.logits([Chunk((1,), 0, (0,), prompt=True)], "prefill")
            assert (lost.value.index, lost.value.node) == (stage, f"node{stage}"), repr(kind)
            assert runner.take_stock(lost.value) == [lost.value]
            assert failing.killed == 1


def test_the_stage_that_does_not_answer_is_the_first_that_is_not_ready(ray: Any) -> None:
    failing, runner = three_stages(ray)
    late = ray.exceptions.GetTimeoutError("Get timed out")
    failing.ends = {0: b"", 1: late, 2: late}
    with pytest.raises(StageLost, match="stage 1 on node1 was lost: it did not answer in 20 s"):
        runner.logits([Chunk((1,), 0, (0,), prompt=True)], "prefill")


def test_a_mistake_in_a_stage_is_one_error_with_its_stage_and_node(ray: Any) -> None:
    e = ray.exceptions
    for kind, error, says in [
        (InvalidInput("avx2 is not here"), InvalidInput, "stage 1 on node1: avx2 is not here"),
        (OutOfMemory("too large", need=3), OutOfMemory, "stage 1 on node1: too large"),
        (ValueError("shape (3, 4)\nand more"), CiuicError, r"stage 1 on node1 failed: ValueError: shape \(3, 4\)$"),
        (MemoryError(), CiuicError, "stage 1 on node1 failed: MemoryError"),
        (e.RaySystemError("broken"), CiuicError, "stage 1 on node1 failed: RaySystemError: System error: broken"),
    ]:
        failing, runner = three_stages(ray)
        first = wrapped(ray, kind)
        failing.ends = {0: b"", 1: first, 2: wrapped(ray, first)}
        with pytest.raises(error, match=says) as raised:
            runner.logits([Chunk((1,), 0, (0,), prompt=True)], "prefill")
        assert not isinstance(raised.value, StageLost)
        with pytest.raises(error):  # the pass that failed is not in the next one's way
            runner.logits([Chunk((1,), 0, (0,), prompt=True)], "prefill")
