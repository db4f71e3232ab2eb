"""Choosing: exact rules, budgets, candidates that never lose to a trivial plan, and policies that users write."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
from machines import CPU_AND_GPU, DENSE, DISK, KIB, device, machine, model

from ciuic_runtime.devices.errors import InvalidInput, OutOfMemory
from ciuic_runtime.devices.spec import Link, Topology
from ciuic_runtime.schedulers import scheduler as scheduler_module
from ciuic_runtime.schedulers.calibration import Calibration
from ciuic_runtime.schedulers.cost import CostModel
from ciuic_runtime.schedulers.draft import ScheduleDraft
from ciuic_runtime.schedulers.graph import TaskGraph
from ciuic_runtime.schedulers.memory import memory_need
from ciuic_runtime.schedulers.placement import Placement
from ciuic_runtime.schedulers.policies.trivial import all_on, fastest_first, groups, split_by_speed
from ciuic_runtime.schedulers.predict import predict
from ciuic_runtime.schedulers.schedule import Schedule
from ciuic_runtime.schedulers.scheduler import TaskScheduler, forget_policy, policy
from ciuic_runtime.schedulers.workload import Workload

MODEL = model()
WORK = Workload(20, 10)


@pytest.fixture(autouse=True)
def _no_policies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduler_module, "_registered", {})


def planner(topology: Topology | None = CPU_AND_GPU, **more: Any) -> TaskScheduler:
    return TaskScheduler(topology, workload=more.pop("workload", WORK), **more)


def devices_of(schedule: Schedule, layer: int) -> set[str]:
    return {row.device for row in schedule.assignments if row.task.startswith(f"layers.{layer}.")}


# Exact rules


def test_add_task_takes_one_at_a_time() -> None:
    with pytest.raises(InvalidInput, match="one layer or task at a time, not a tuple"):
        planner(CPU_AND_GPU).add_task(MODEL.layers[:2], "cpu")  # type: ignore[arg-type]


def test_add_task_is_an_exact_rule() -> None:
    scheduler = planner()
    for layer in MODEL.layers:
        scheduler.add_task(layer, "cuda:0")
    scheduler.add_task(MODEL.layers[1], "cpu")  # a later call overrides
    scheduler.add_task(MODEL.task("layers.1.attention"), "cuda:0")
    scheduler.add_task(MODEL.task("layers.2.experts"), CPU_AND_GPU.device("cpu"))
    schedule = scheduler.schedule()
    assert devices_of(schedule, 0) == {"cuda:0"}
    assert schedule.rows["layers.1.mlp_norm"].device == "cpu"
    assert schedule.rows["layers.1.attention"].device == "cuda:0"
    assert set(schedule.expert_devices(MODEL.task("layers.2.experts"))) == {"cpu"}
    assert schedule.policy.endswith(", rules applied")


def test_devices_named_by_add_task_are_the_topology() -> None:
    """The design card's use: no topology, devices as the manager lists them."""
    cpu, gpu = CPU_AND_GPU.devices
    scheduler = planner(None)
    for layer in MODEL.layers[:2]:
        scheduler.add_task(layer, gpu)
    for layer in MODEL.layers[2:]:
        scheduler.add_task(layer, cpu)
    for name in ("embedding", "final_norm", "head"):
        scheduler.add_task(MODEL.task(name), cpu)
    schedule = scheduler.schedule()
    assert schedule.policy == "by hand"
    assert [devices_of(schedule, n) for n in range(3)] == [{"cuda:0"}, {"cuda:0"}, {"cpu"}]
    assert [c.name for c in schedule.candidates] == ["by hand"]  # nothing was left to choose
    assert schedule.predicted is not None
    with pytest.raises(InvalidInput, match="no devices are known; pass a topology"):
        planner(None).schedule(MODEL)


def test_add_task_overrides_placement() -> None:
    scheduler = planner(placement=Placement().put("layers.*", "cpu"))
    scheduler.add_task(MODEL.layers[1], "cuda:0")
    schedule = scheduler.schedule()
    assert [devices_of(schedule, n) for n in range(3)] == [{"cpu"}, {"cuda:0"}, {"cpu"}]


def test_add_task_errors() -> None:
    scheduler = planner()
    with pytest.raises(InvalidInput, match=r"needs its graph: add_task\(task, device, graph=model.graph\)"):
        scheduler.add_task(MODEL.task("head"), "cpu")
    scheduler.add_task(MODEL.task("head"), "cpu", graph=MODEL)
    with pytest.raises(InvalidInput, match=r"already has tasks of deepseek_v3 .*use another one for llama"):
        scheduler.add_task(model(DENSE).layers[0], "cpu")
    with pytest.raises(InvalidInput, match="already has tasks of deepseek_v3"):
        scheduler.schedule(model(DENSE))
    with pytest.raises(InvalidInput, match="has no such task head; take tasks from its graph"):
        scheduler.add_task(model(vocab_size=400).task("head"), "cpu")
    with pytest.raises(InvalidInput, match="nothing to schedule"):
        planner().schedule()


def test_an_equal_graph_is_the_same_graph() -> None:
    from machines import MOE

    from ciuic_runtime.models.config import read_config
    from ciuic_runtime.models.graph import build_graph

    again = build_graph.__wrapped__(read_config(MOE))
    assert again is not MODEL
    scheduler = planner()
    scheduler.add_task(MODEL.layers[0], "cpu")
    scheduler.add_task(again.layers[1], "cpu")
    scheduler.schedule(again).validate(MODEL)


def test_devices_that_are_not_there_or_cannot_compute() -> None:
    scheduler = planner(machine(device("cpu"), DISK))
    scheduler.add_task(MODEL.layers[0], "cuda:0")
    with pytest.raises(InvalidInput, match="no device named cuda:0; there are cpu, disk"):
        scheduler.schedule()
    scheduler.add_task(MODEL.layers[0], "disk")
    with pytest.raises(InvalidInput, match="add_task: disk cannot compute; devices that can are cpu") as error:
        scheduler.schedule()
    assert not isinstance(error.value, OutOfMemory)
    broken = device("cuda:0", usable=False, why_not_usable="no driver")
    with pytest.raises(InvalidInput, match=r"no device here can compute \(cuda:0: no driver; disk: DISK\)"):
        planner(machine(broken, DISK)).schedule(MODEL)


# Budgets


def test_budgets() -> None:
    need = memory_need(all_on(MODEL, CPU_AND_GPU, CostModel(CPU_AND_GPU, workload=WORK), device="cpu"), MODEL, WORK)
    whole = need["cpu"].total
    assert planner().schedule(MODEL).devices_used() == ("cuda:0",)
    assert planner(memory={"cuda:0": whole}).schedule(MODEL).devices_used() == ("cuda:0",)
    tight = planner(memory={"cuda:0": whole - 1, "cpu": "512MiB"}).schedule(MODEL)
    assert "cpu" in tight.devices_used()
    assert tight.predicted is not None
    assert tight.predicted.memory_bytes.get("cuda:0", 0) <= whole - 1
    for budget, message in (
        ({"cuda:0": "2GiB"}, r"--memory cuda:0=2 GiB is more than can be used there \(1 GiB\); ask for less"),
        ({"cuda:3": "1GiB"}, "no device named cuda:3"),
        ({"cpu": "plenty"}, "'plenty' is not a size"),
    ):
        with pytest.raises(InvalidInput, match=message):
            planner(memory=budget).schedule(MODEL)


def test_nothing_fits_gives_the_figures() -> None:
    with pytest.raises(OutOfMemory, match=r"^deepseek_v3 needs \d+ KiB on cpu, where 100 KiB can be used") as error:
        planner(machine(device("cpu", memory=100 * KIB))).schedule(MODEL)
    assert "|" not in str(error.value)
    with pytest.raises(
        OutOfMemory, match=r"none of 3 plans fits in 50 KiB on cpu, 50 KiB on cuda:0; nearest is 'all on cpu'"
    ):
        planner(machine(device("cpu", memory=50 * KIB), device("cuda:0", memory=50 * KIB))).schedule(MODEL)


def test_rules_that_fit_by_weights_only_end_in_figures() -> None:
    """The head is not under the rule; with it the device is too full."""
    memory = MODEL.nbytes - MODEL.rows["head"].nbytes + int(MODEL.working_bytes(1, 20, 30)) + 20 * KIB
    scheduler = planner(machine(device("cpu", memory=memory)), placement=Placement().put("layers.*", "cpu"))
    with pytest.raises(OutOfMemory, match=r"weights in bfloat16, .* cache and .* working memory for 1 x 30 tokens"):
        scheduler.schedule(MODEL)


def test_policies_plan_around_the_rules() -> None:
    """Layer 2 is pinned to the GPU; what else fits there is less by as much, and the plan is feasible."""
    base = MODEL.working_bytes(1, 20, 30) + 30 * KIB
    topology = machine(
        device("cpu", memory=int(base + 0.7 * MODEL.nbytes)),
        device("cuda:0", bandwidth=1e11, memory=int(base + 0.6 * MODEL.nbytes)),
    )
    scheduler = planner(topology)
    scheduler.add_task(MODEL.layers[2], "cuda:0")
    schedule = scheduler.schedule()
    assert devices_of(schedule, 2) == {"cuda:0"}
    assert set(schedule.devices_used()) == {"cpu", "cuda:0"}
    schedule.check_memory(MODEL)


# Trivial plans


def test_fastest_first_leaves_room_for_cache_and_working_memory() -> None:
    cost = CostModel(CPU_AND_GPU, workload=Workload(200, 56))
    for share in (0.2, 0.5, 0.9):
        memory = int(share * MODEL.nbytes + MODEL.working_bytes(1, 200, 256))
        topology = machine(device("cpu"), device("cuda:0", bandwidth=1e11, memory=memory))
        schedule = fastest_first(MODEL, topology, replace(cost, topology=topology))
        schedule.check_memory(MODEL)
        assert len(schedule.devices_used()) == 2
        order = [schedule.rows[row].device for row in MODEL.rows]
        assert order == sorted(order, reverse=True)  # GPU first, then CPU, and never back


def test_split_by_speed_is_proportional() -> None:
    topology = machine(device("cpu", bandwidth=1e10), device("cuda:0", bandwidth=3e10))
    dense = model(DENSE, num_hidden_layers=40)
    weights = split_by_speed(dense, topology, CostModel(topology)).weight_bytes()
    largest = max(sum(t.nbytes for t in group) for group in groups(dense))
    assert weights["cuda:0"] == pytest.approx(0.75 * dense.nbytes, abs=largest)


def test_groups_keep_layers_together() -> None:
    found = groups(MODEL)
    assert [len(g) for g in found] == [1, 4, 6, 6, 1, 1]
    assert [t for g in found for t in g] == list(MODEL)


# Choosing


def seconds(schedule: Schedule, graph: TaskGraph = MODEL) -> float:
    p = predict(schedule, graph, CostModel(schedule.topology, graph.format, workload=schedule.workload))
    return p.first_token_s + (schedule.workload.max_tokens - 1) * schedule.workload.batch / p.decode_tokens_per_s


def test_the_fastest_trivial_plan_is_chosen() -> None:
    schedule = planner().schedule(MODEL)
    assert schedule.policy == "all on cuda:0"
    assert [c.name for c in schedule.candidates if not c.why_not] == ["all on cuda:0"]
    slow = next(c for c in schedule.candidates if c.name == "all on cpu")
    other = all_on(MODEL, schedule.topology, CostModel(schedule.topology, workload=WORK), device="cpu")
    assert slow.why_not == f"{seconds(other) / seconds(schedule):.2f}x the time"


def test_equal_plans_are_one_candidate() -> None:
    """With room for all on the GPU, "fastest first" is "all on cuda:0", and so is what the policies make."""
    assert [c.name for c in planner().schedule(MODEL).candidates] == ["all on cuda:0", "all on cpu", "split by speed"]
    assert [c.name for c in planner(machine(device("cpu"))).schedule(MODEL).candidates] == ["all on cpu"]


def test_planning_is_deterministic() -> None:
    topology = Topology(tuple(reversed(CPU_AND_GPU.devices)))
    assert planner().schedule(MODEL) == planner().schedule(MODEL)
    assert planner(topology).schedule(MODEL).assignments == planner().schedule(MODEL).assignments


def test_goals() -> None:
    """The GPU computes ten times as fast and reads half as fast: prompts want it, long answers do not."""
    topology = machine(device("cpu", rate=1e11, bandwidth=1e10), device("cuda:0", rate=1e12, bandwidth=0.5e10))
    work = Workload(512, 500)
    first = planner(topology, goal="first-token", workload=work).schedule(MODEL)
    latency = planner(topology, goal="latency", workload=work).schedule(MODEL)
    assert (first.policy, first.goal) == ("all on cuda:0", "first-token")
    assert (latency.policy, latency.goal) == ("all on cpu", "latency")
    with pytest.raises(InvalidInput, match="goal 'speed' is not one of latency, throughput, first-token"):
        planner(goal="speed").schedule(MODEL)


def test_caveats() -> None:
    short = model(max_position_embeddings=16)
    assert "20" not in " ".join(planner().schedule(MODEL).notes)
    assert "has 30 positions per sequence, deepseek_v3 was trained for 16" in planner().schedule(short).notes[0]
    placement = Placement().put("layers.*.experts", ["cuda:0", "cpu"], by="popularity")
    assert "no popularity of experts is known" in planner(placement=placement).schedule(MODEL).notes[0]


# Policies of users


def experts_on_cpu(graph: TaskGraph, topology: Topology, cost: CostModel) -> Schedule:
    draft = ScheduleDraft(graph, topology, cost.workload)
    for task in graph:
        draft.place(task, "cpu" if task.num_experts else "cuda:0")
    return draft.freeze("my own name for it")


@pytest.fixture
def only_trivial_plans(monkeypatch: pytest.MonkeyPatch) -> None:
    """Besides the user's policy."""
    monkeypatch.setattr(scheduler_module, "CORE", {})


@pytest.fixture
def tight() -> Topology:
    """Room for all but some experts on the GPU, and links that cost nothing to speak of."""
    links = (Link("cpu", "cuda:0", 1e12), Link("cuda:0", "cpu", 1e12))
    memory = int(MODEL.working_bytes(1, 20, 30) + 0.75 * MODEL.nbytes)
    return machine(device("cpu"), device("cuda:0", bandwidth=1e11, rate=1e13, memory=memory), links=links)


@pytest.mark.usefixtures("only_trivial_plans")
def test_a_policy_that_wins_by_more_than_the_error_is_chosen(tight: Topology) -> None:
    policy("mine")(experts_on_cpu)
    schedule = planner(tight, calibration=Calibration(model_error=0.01)).schedule(MODEL)
    assert schedule.policy == "mine"
    assert schedule.notes == ()
    assert schedule.rows["layers.1.experts.3"].device == "cpu"
    forget_policy("mine")
    assert planner(tight).schedule(MODEL).policy == "fastest first"


@pytest.mark.usefixtures("only_trivial_plans")
def test_a_gain_inside_the_error_is_no_reason(tight: Topology) -> None:
    policy("mine")(experts_on_cpu)
    schedule = planner(tight, calibration=Calibration(model_error=5.0)).schedule(MODEL)
    assert schedule.policy == "fastest first"
    assert len(schedule.notes) == 1
    assert "mine is forecast" in schedule.notes[0]
    assert "within the model's error of 500%: the simpler plan (fastest first) was chosen" in schedule.notes[0]
    mine = next(c for c in schedule.candidates if c.name == "mine")
    assert mine.feasible
    assert mine.why_not.endswith("faster, within the model's error")


@pytest.mark.usefixtures("only_trivial_plans")
def test_rules_are_laid_over_a_policy(tight: Topology) -> None:
    policy("mine")(experts_on_cpu)
    placement = Placement().put("layers.1.experts.3", "cuda:0")
    schedule = planner(tight, placement=placement, calibration=Calibration(model_error=0.0)).schedule(MODEL)
    assert schedule.policy == "mine, rules applied"
    assert schedule.expert_devices(MODEL.task("layers.1.experts")) == ("cpu",) * 3 + ("cuda:0",) + ("cpu",) * 4
    assert set(schedule.expert_devices(MODEL.task("layers.2.experts"))) == {"cpu"}


def test_a_policy_equal_to_another_plan_is_still_listed() -> None:
    policy("mine")(lambda graph, topology, cost: all_on(graph, topology, cost, device="cpu"))
    mine = planner().schedule(MODEL).candidates[-1]
    assert (mine.name, mine.why_not) == ("mine", "the same plan as all on cpu")
    assert mine.decode_tokens_per_s


def raising(error: Exception) -> Any:
    def plan(graph: TaskGraph, topology: Topology, cost: CostModel) -> Schedule:
        raise error

    return plan


def half(graph: TaskGraph, topology: Topology, cost: CostModel) -> Schedule:
    schedule = all_on(graph, topology, cost, device="cpu")
    return replace(schedule, assignments=schedule.assignments[5:])


def elsewhere(graph: TaskGraph, topology: Topology, cost: CostModel) -> Schedule:
    return all_on(graph, topology, cost, device="cuda:9")


@pytest.mark.parametrize(
    ("broken", "why"),
    [
        (raising(ValueError("two\nlines")), "ValueError: two lines"),
        (raising(KeyError("x")), "KeyError: 'x'"),
        (raising(ZeroDivisionError("division by zero")), "ZeroDivisionError"),
        (raising(InvalidInput("not for MoE")), "the policy failed: not for MoE"),
        (lambda graph, topology, cost: None, "it returned NoneType, not a Schedule"),
        (half, "leaves embedding, .* without a device"),
        (elsewhere, "no device named cuda:9"),
        (lambda: None, "TypeError"),
    ],
)
def test_a_broken_policy_is_an_infeasible_candidate(broken: Any, why: str) -> None:
    policy("mine")(broken)
    schedule = planner().schedule(MODEL)
    mine = schedule.candidates[-1]
    assert (mine.name, mine.feasible) == ("mine", False)
    assert re.search(why, mine.why_not), mine.why_not
    assert "\n" not in mine.why_not
    assert schedule.policy == "all on cuda:0"


def test_a_policy_that_does_not_fit_is_infeasible() -> None:
    memory = int(MODEL.working_bytes(1, 20, 30) + 10 * KIB)
    policy("mine")(lambda graph, topology, cost: experts_on_cpu(graph, topology, cost))
    schedule = planner(machine(device("cpu"), device("cuda:0", memory=memory))).schedule(MODEL)
    mine = next(c for c in schedule.candidates if c.name == "mine")
    assert not mine.feasible
    assert "on cuda:0, where" in mine.why_not


@pytest.mark.usefixtures("only_trivial_plans")
def test_a_policy_can_be_the_only_plan_that_fits() -> None:
    """Neither device holds the model, and cut by layers it does not fit either; by experts it does."""
    experts = sum(t.nbytes for t in MODEL if t.num_experts)
    base = MODEL.working_bytes(1, 20, 30)
    topology = machine(
        device("cpu", memory=int(base + experts + KIB), bandwidth=1e11),
        device("cuda:0", memory=int(base + MODEL.nbytes - experts + 20 * KIB)),
    )
    with pytest.raises(OutOfMemory):
        planner(topology).schedule(MODEL)
    policy("mine")(experts_on_cpu)
    assert planner(topology).schedule(MODEL).policy == "mine"


@pytest.mark.parametrize("budget", [1 * KIB, 64 * KIB, 200 * KIB])
def test_what_is_said_to_be_lacking_would_do(budget: int) -> None:
    with pytest.raises(OutOfMemory, match=r"[KM]iB more there would do") as caught:
        planner(machine(device("cpu", memory=budget))).schedule(MODEL)
    enough = planner(machine(device("cpu", memory=caught.value.need))).schedule(MODEL)
    assert enough.policy == "all on cpu"
    with pytest.raises(OutOfMemory):
        planner(machine(device("cpu", memory=caught.value.need - 1))).schedule(MODEL)


def test_the_policies_join_in_where_trivial_plans_do_badly(tight: Topology) -> None:
    """Some experts do not fit on the GPU: a few of the others' tasks on the CPU cost less than whole layers there."""
    schedule = planner(tight, calibration=Calibration(model_error=0.01)).schedule(MODEL)
    assert schedule.policy == "experts by popularity"
    names = {c.name: c for c in schedule.candidates}
    assert {"tiering", "fastest first"} <= names.keys()
    assert all(c.decode_tokens_per_s for c in names.values() if c.feasible)


def test_what_streams_is_a_candidate_that_cannot_be_run() -> None:
    work = MODEL.working_bytes(1, 20, 30)
    gpu = device("cuda:0", memory=int(work + 0.5 * MODEL.nbytes), bandwidth=1e12, rate=1e14)
    topology = machine(device("cpu", bandwidth=1e8, rate=1e9), gpu, links=(Link("cpu", "cuda:0", 1e11),))
    schedule = planner(topology, calibration=Calibration(model_error=0.0)).schedule(MODEL)
    tiered = next(c for c in schedule.candidates if c.name == "tiering")
    assert not tiered.feasible
    assert "streams weights from cpu to cuda:0" in tiered.why_not
    assert all(row.home == row.device for row in schedule.assignments)


def test_rules_may_store_pages_on_a_disk() -> None:
    topology = Topology((device("cpu"), DISK))
    placement = Placement().put("layers.0.mlp", "cpu", store="disk")
    schedule = planner(topology, placement=placement).schedule(MODEL)
    assert schedule.paging is not None
    stored = {row.task for row in schedule.assignments if row.home == "disk"}
    assert "layers.0.mlp" in stored
    assert "layers.0.attention" not in stored
    schedule.check_memory(MODEL)
    with pytest.raises(InvalidInput, match=r"rules store layers.0.mlp and others on disk; pages are read .* one CPU"):
        planner(topology, placement=placement).schedule(replace(MODEL, format="float32"))


@pytest.mark.parametrize("name", ["fastest first", "split by speed", "by hand", "all on cpu", "tiering"])
def test_names_of_trivial_plans_are_taken(name: str) -> None:
    with pytest.raises(InvalidInput, match="that is the name of a built-in plan"):
        policy(name)


def test_an_interrupt_is_not_swallowed() -> None:
    policy("mine")(raising(KeyboardInterrupt()))  # type: ignore[arg-type]
    with pytest.raises(KeyboardInterrupt):
        planner().schedule(MODEL)


def test_devices_without_rates_say_what_to_do() -> None:
    with pytest.raises(InvalidInput, match=r"cpu has no known memory bandwidth.*measure it"):
        planner(machine(device("cpu", memory_bandwidth=None))).schedule(MODEL)
