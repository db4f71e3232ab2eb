"""A schedule over the host and a simulated device, as written and read back: carried out to the letter, the same bits
as on one device, memory and copies accounted for."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ciuic_runtime.devices.errors import OutOfMemory
from ciuic_runtime.devices.spec import Topology
from ciuic_runtime.engine.llm import LLM
from ciuic_runtime.engine.sampling import SamplingParams
from ciuic_runtime.model import Model
from ciuic_runtime.schedulers.graph import Task
from ciuic_runtime.schedulers.schedule import Schedule
from ciuic_runtime.schedulers.scheduler import TaskScheduler
from ciuic_runtime.schedulers.trace import Trace
from ciuic_runtime.schedulers.workload import Workload

PROMPTS = [[5, 250, 17, 99, 3, 3, 42] * 12, [7], list(range(60, 100))]
PARAMS = SamplingParams(max_tokens=12, ignore_eos=True)
WORK = Workload(prompt_tokens=200, max_tokens=56, batch=3)
Where = Callable[[Task], str]


def by_hand(model: Model, topology: Topology, where: Where) -> Schedule:
    scheduler = TaskScheduler(topology, workload=WORK)
    for task in model.graph:
        scheduler.add_task(task, where(task), graph=model.graph)
    return scheduler.schedule()


def saved(schedule: Schedule, folder: Path) -> Schedule:
    schedule.to_json(folder / "plan.json")
    return Schedule.from_json(folder / "plan.json")


def split_experts(schedule: Schedule, layer: int, device: str, which: Callable[[int], bool]) -> Schedule:
    """Some of a layer's routed experts on another device."""
    prefix = f"layers.{layer}.experts."
    rows = tuple(
        replace(row, device=device, home=device)
        if row.task.startswith(prefix) and which(int(row.task.removeprefix(prefix)))
        else row
        for row in schedule.assignments
    )
    return replace(schedule, assignments=rows)


def run(folder: Path, topology: Topology, schedule: Schedule | None, dtype: str) -> tuple[torch.Tensor, list, Trace]:
    with LLM(
        folder, devices=topology, schedule=schedule, dtype=dtype, max_model_len=256, max_num_seqs=3, threads=1,
        prefill_chunk=50,
    ) as llm:  # fmt: skip
        tokens = [o.token_ids for o in llm.generate(PROMPTS, PARAMS)]
        trace = llm.trace
        return llm.logits(PROMPTS[0]), tokens, trace


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def alone(request: pytest.FixtureRequest, tiny_v3: Path, here: Topology) -> tuple[str, torch.Tensor, list]:
    """What the host alone computes; in bfloat16 its weights are views of the file."""
    logits, tokens, trace = run(tiny_v3, here, None, request.param)
    assert trace.lanes == ("cpu", "host")  # tasks; sampling
    return request.param, logits, tokens


CASES: dict[str, Where] = {
    "one layer": lambda t: "sim:0" if t.layer == 2 else "cpu",
    "everything": lambda t: "sim:0",
    "the ends": lambda t: "sim:0" if t.layer is None else "cpu",
    "attention": lambda t: "sim:0" if t.kind == "attention" else "cpu",
    "experts but not their router": lambda t: "sim:0" if t.kind == "experts" else "cpu",
    "router but not its experts": lambda t: "sim:0" if t.kind == "router" else "cpu",
    "shared experts and norms": lambda t: "sim:0" if t.kind in ("shared_experts", "norm") else "cpu",
}


@pytest.mark.parametrize("case", CASES)
def test_the_same_bits_wherever_tasks_run(
    case: str, alone: tuple[str, torch.Tensor, list], tiny_v3: Path, two_devices: Topology, tmp_path: Path
) -> None:
    dtype, logits, tokens = alone
    model = Model(tiny_v3, dtype)
    schedule = saved(by_hand(model, two_devices, CASES[case]), tmp_path)
    got, got_tokens, trace = run(tiny_v3, two_devices, schedule, dtype)
    assert got_tokens == tokens
    assert torch.equal(got, logits)
    assert lanes_of(trace) == {t.name: {schedule.device_of(t.name)} | experts_on(schedule, t) for t in model.graph}


def experts_on(schedule: Schedule, task: Task) -> set[str]:
    return set(schedule.expert_devices(task)) if task.num_experts else set()


def lanes_of(trace: Trace) -> dict[str, set[str]]:
    """Where each task was computed, in every step."""
    found: dict[str, set[str]] = {}
    for event in trace.events:
        if event.kind == "compute":
            found.setdefault(event.task, set()).add(event.lane)
    return found


def test_a_moved_layer_moves_in_the_trace(tiny_v3: Path, two_devices: Topology, tmp_path: Path) -> None:
    """As the card has it: layers given to devices by hand; nothing but that layer moves, and the copies are seen."""
    model = Model(tiny_v3, "float32")
    scheduler = TaskScheduler(two_devices, workload=WORK)
    for layer in model.layers:
        scheduler.add_task(layer, two_devices.device("sim:0" if layer.name == "layers.1" else "cpu"))
    for task in model.graph:
        if task.layer is None:
            scheduler.add_task(task, "cpu")
    _, _, trace = run(tiny_v3, two_devices, saved(scheduler.schedule(), tmp_path), "float32")
    on_sim = {e.task for e in trace.events if e.lane == "sim:0"}
    assert on_sim == {t.name for t in model.layers[1].tasks}
    assert not {e.task for e in trace.events if e.lane == "cpu"} & on_sim
    copies = {(e.lane, e.task) for e in trace.events if e.kind == "copy"}
    assert copies == {("cpu -> sim:0", "layers.0.mlp"), ("sim:0 -> cpu", "layers.1.experts")}
    for event in trace.events:
        if event.kind == "copy":
            assert event.nbytes == trace.steps[event.step].tokens * model.graph.hidden_bytes_per_token
    check_lanes(trace)


@pytest.mark.parametrize("router", ["cpu", "sim:0"])
@pytest.mark.parametrize("which", ["odd", "first", "all but one"])
def test_experts_of_a_layer_on_two_devices(
    router: str, which: str, alone: tuple[str, torch.Tensor, list], tiny_v3: Path, two_devices: Topology, tmp_path: Path
) -> None:
    dtype, logits, tokens = alone
    choose = {"odd": lambda e: e % 2 == 1, "first": lambda e: e == 0, "all but one": lambda e: e != 5}[which]
    model, other = Model(tiny_v3, dtype), {"cpu": "sim:0", "sim:0": "cpu"}[router]
    schedule = by_hand(model, two_devices, lambda t: router if t.layer == 2 else "cpu")
    schedule = saved(split_experts(schedule, 2, other, choose), tmp_path)
    got, got_tokens, trace = run(tiny_v3, two_devices, schedule, dtype)
    assert got_tokens == tokens
    assert torch.equal(got, logits)
    assert lanes_of(trace)["layers.2.experts"] == {"cpu", "sim:0"}
    check_lanes(trace)


def check_lanes(trace: Trace) -> None:
    """Events lie inside their step, and no two of a lane overlap."""
    for event in trace.events:
        step = trace.steps[event.step]
        assert step.start <= event.start <= event.end <= step.end, event
        assert event.phase == step.phase
    for lane in {e.lane for e in trace.events}:
        mine = sorted((e for e in trace.events if e.lane == lane), key=lambda e: e.start)
        for before, after in itertools.pairwise(mine):
            assert before.end <= after.start, (before, after)


def test_events_nest_and_every_task_is_there(llm: LLM) -> None:
    llm.generate(PROMPTS, PARAMS)
    trace = llm.trace
    check_lanes(trace)
    for number, step in enumerate(trace.steps):
        assert {e.task for e in trace.events if e.step == number} == {t.name for t in llm.model.graph} | {"sample"}
        assert step.end > step.start
    assert [s.phase for s in trace.steps] == ["prefill"] * 4 + ["decode"] * 11
    assert sum(s.tokens for s in trace.steps if s.phase == "prefill") == sum(map(len, PROMPTS))
    assert all(s.tokens == s.sequences == 3 for s in trace.steps if s.phase == "decode")


def test_weights_and_cache_of_the_other_device_are_accounted(tiny_v3: Path, two_devices: Topology) -> None:
    model = Model(tiny_v3, "bfloat16")
    schedule = by_hand(model, two_devices, CASES["one layer"])
    with LLM(tiny_v3, devices=two_devices, schedule=schedule, max_model_len=256, max_num_seqs=3, threads=1) as llm:
        used = llm._host.backends["sim:0"].memory().used
        peak = llm.peak_memory_bytes()
    cache = 3 * 256 * model.graph.task("layers.2.attention").kv_bytes_per_token
    expected = schedule.weight_bytes()["sim:0"] + cache
    granules = 256 * (len(model.layers[2].weights) + 1)
    assert expected <= used <= expected + granules
    assert peak["sim:0"] >= used
    assert peak["cpu"] > 1 << 20


def test_the_other_devices_memory_is_a_limit(tiny_v3: Path, two_devices: Topology) -> None:
    """Refused with the figures before anything is loaded; what a plan hides, the device itself refuses."""
    model = Model(tiny_v3, "float32")
    schedule = by_hand(model, two_devices, CASES["everything"])
    for nbytes in (model.graph.nbytes // 2, model.graph.nbytes + 1000):
        small = Topology(
            tuple(replace(d, memory_bytes=nbytes) if d.name == "sim:0" else d for d in two_devices.devices)
        )
        with pytest.raises(OutOfMemory, match="sim:0") as refused:
            LLM(tiny_v3, devices=small, schedule=schedule, max_model_len=256, max_num_seqs=3)
        assert "\n" not in str(refused.value)


def test_tied_embeddings_may_be_on_two_devices(two_devices: Topology, here: Topology, tmp_path: Path) -> None:
    from ciuic_runtime.models.random_checkpoint import write_random_checkpoint

    config = {
        "model_type": "llama", "vocab_size": 300, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256, "tie_word_embeddings": True,
    }  # fmt: skip
    folder = write_random_checkpoint(config, tmp_path / "tied")
    logits, tokens, _ = run(folder, here, None, "float32")
    schedule = by_hand(Model(folder, "float32"), two_devices, lambda t: "sim:0" if t.name == "head" else "cpu")
    got, got_tokens, trace = run(folder, two_devices, saved(schedule, tmp_path), "float32")
    assert torch.equal(got, logits)
    assert got_tokens == tokens
    assert lanes_of(trace)["head"] == {"sim:0"}
