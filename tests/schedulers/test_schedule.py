"""A schedule as people handle it: checked, measured, printed, saved, edited and read back."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from machines import CPU_AND_GPU, DISK, GIB, MIB, device, machine, model

from ciuic_runtime.devices.errors import InvalidInput, OutOfMemory
from ciuic_runtime.devices.spec import Domain, Link, Topology
from ciuic_runtime.schedulers.assignment import Assignment, Candidate, ModelSummary, Prediction
from ciuic_runtime.schedulers.draft import schedule_of
from ciuic_runtime.schedulers.memory import capacity, memory_need
from ciuic_runtime.schedulers.schedule import Schedule
from ciuic_runtime.schedulers.scheduler import TaskScheduler
from ciuic_runtime.schedulers.workload import Workload

MODEL = model()
WORK = Workload(20, 10)


def by_hand(topology: Topology = CPU_AND_GPU, **where: str) -> Schedule:
    """Everything on the CPU but what is said."""
    rows = dict.fromkeys(MODEL.rows, "cpu") | {name.replace("__", "."): at for name, at in where.items()}
    return schedule_of(MODEL, topology, WORK, rows, "by hand")


def planned() -> Schedule:
    return TaskScheduler(CPU_AND_GPU, workload=WORK).schedule(MODEL)


# Checks


def test_a_whole_schedule_is_valid() -> None:
    by_hand(layers__1__experts__3="cuda:0").validate(MODEL)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: rows[1:], "leaves embedding of .* without a device"),
        (lambda rows: rows[9:], "leaves embedding, layers.0.attention, .* and 6 more of"),
        (lambda rows: (*rows, replace(rows[0], task="layers.9.mlp")), "names layers.9.mlp, which .* does not have"),
        (lambda rows: (*rows, rows[3]), "assigns layers.0.mlp_norm twice; replicas"),
        (lambda rows: (*rows[1:], replace(rows[0], device="cuda:7", home="cuda:7")), "no device named cuda:7"),
        (
            lambda rows: (*rows[1:], replace(rows[0], home="cuda:0")),
            "embedding is stored on cuda:0 and computed on cpu",
        ),
        (
            lambda rows: (*rows[1:], replace(rows[0], device="disk", home="disk")),
            "embedding is placed on disk, which cannot compute: DISK; devices that can: cpu, cuda:0",
        ),
    ],
)
def test_validate(change: Callable[[tuple[Assignment, ...]], tuple[Assignment, ...]], message: str) -> None:
    schedule = by_hand(machine(*CPU_AND_GPU.devices, DISK))
    with pytest.raises(InvalidInput, match=message):
        replace(schedule, assignments=change(schedule.assignments)).validate(MODEL)


def test_validate_refuses_devices_that_are_not_usable() -> None:
    broken = machine(device("cpu"), device("cuda:0", usable=False, why_not_usable="torch has no CUDA"))
    with pytest.raises(InvalidInput, match="head is placed on cuda:0, which cannot compute: torch has no CUDA"):
        by_hand(broken, head="cuda:0").validate(MODEL)


def test_lookups() -> None:
    schedule = by_hand(layers__1__experts__3="cuda:0", layers__2__router="cuda:0")
    assert schedule.device_of("layers.1.experts") == "cpu"
    assert schedule.device_of("layers.2.experts") == "cuda:0"  # combined with the router
    assert schedule.expert_devices(MODEL.task("layers.1.experts")) == ("cpu",) * 3 + ("cuda:0",) + ("cpu",) * 4
    assert schedule.devices_used() == ("cpu", "cuda:0")
    assert by_hand().devices_used() == ("cpu",)
    with pytest.raises(InvalidInput, match=r"has no task layers.9.mlp"):
        schedule.device_of("layers.9.mlp")


# Memory


def test_memory_need_by_hand() -> None:
    schedule = by_hand(layers__1__attention="cuda:0", layers__2__experts__7="cuda:0")
    need = memory_need(schedule, MODEL, WORK)
    moved = MODEL.rows["layers.1.attention"].nbytes + MODEL.rows["layers.2.experts.7"].nbytes
    assert need["cuda:0"].weights == moved == schedule.weight_bytes()["cuda:0"]
    assert need["cpu"].weights == MODEL.nbytes - moved == schedule.weight_bytes()["cpu"]
    block = 64 * (32 + 8) * 2  # 30 positions take one block of 64 latents
    assert (need["cuda:0"].cache, need["cpu"].cache) == (block, 2 * block)
    assert need["cuda:0"].working == need["cpu"].working == int(MODEL.working_bytes(1, 20, 30))
    assert memory_need(schedule, MODEL, Workload(60, 5, 3))["cuda:0"].cache == 3 * 2 * block


def test_memory_is_counted_from_the_graph_not_from_the_file() -> None:
    honest = by_hand()
    lying = replace(honest, assignments=tuple(replace(row, nbytes=0) for row in honest.assignments))
    assert memory_need(lying, MODEL, WORK) == memory_need(honest, MODEL, WORK)


def test_tied_embeddings_apart_are_held_twice() -> None:
    tied = model(tie_word_embeddings=True)
    together = schedule_of(tied, CPU_AND_GPU, WORK, dict.fromkeys(tied.rows, "cpu"), "")
    apart = schedule_of(tied, CPU_AND_GPU, WORK, dict.fromkeys(tied.rows, "cpu") | {"head": "cuda:0"}, "")
    assert together.rows["head"].nbytes == 0
    assert apart.rows["head"].nbytes == 320 * 64 * 2
    assert sum(together.weight_bytes().values()) == tied.nbytes == memory_need(together, tied, WORK)["cpu"].weights
    assert sum(n.weights for n in memory_need(apart, tied, WORK).values()) == tied.nbytes + 320 * 64 * 2


def test_check_memory_to_the_byte() -> None:
    need = memory_need(by_hand(), MODEL, WORK)["cpu"].total
    by_hand(machine(device("cpu", memory=need))).check_memory(MODEL)
    with pytest.raises(OutOfMemory) as error:
        by_hand(machine(device("cpu", memory=need - 1))).check_memory(MODEL)
    assert (error.value.need, error.value.capacity) == (need, need - 1)
    with pytest.raises(OutOfMemory):
        by_hand(machine(device("cpu", memory=need))).check_memory(MODEL, Workload(200, 10))


def test_free_memory_counts() -> None:
    busy = device("cpu", memory=GIB, memory_free_bytes=MIB // 16)
    assert capacity(busy) == MIB // 16
    with pytest.raises(OutOfMemory, match=r"where 64 KiB can be used"):
        by_hand(machine(busy)).check_memory(MODEL)


def test_check_memory_says_what_and_what_to_try() -> None:
    with pytest.raises(OutOfMemory) as error:
        by_hand(machine(device("cpu", memory=4096))).check_memory(MODEL)
    text = str(error.value)
    assert "weights in bfloat16" in text
    assert "cache and" in text
    assert "for 1 x 30 tokens" in text
    assert "try a smaller model" in text
    need = memory_need(by_hand(), MODEL, WORK)["cpu"]
    with pytest.raises(OutOfMemory, match=r"try a shorter context, .* \(--memory cpu=\.\.\.\)"):
        by_hand(machine(device("cpu", memory=need.weights + 1))).check_memory(MODEL)


def test_the_device_that_lacks_most_is_named() -> None:
    small = machine(device("cpu", memory=4096), device("cuda:0", memory=4096))
    with pytest.raises(OutOfMemory, match="on cuda:0"):
        schedule_of(MODEL, small, WORK, dict.fromkeys(MODEL.rows, "cuda:0") | {"final_norm": "cpu"}, "").check_memory(
            MODEL
        )


# For people


def test_text_has_the_facts() -> None:
    links = (Link("cpu", "cuda:0", 1e11), Link("cuda:0", "cpu", 1e11))
    gpu = device("cuda:0", bandwidth=1e11, memory=MIB // 4)
    schedule = TaskScheduler(Topology((device("cpu", memory=2 * GIB), gpu, DISK), links), workload=WORK).schedule(MODEL)
    text = str(schedule)
    assert "bfloat16" in text
    assert "1 x (20 prompt + 10 new) tokens" in text
    assert "plan: fastest first; goal latency" in text
    p = schedule.predicted
    assert p is not None
    for rate in (p.decode_tokens_per_s, p.prefill_tokens_per_s, *p.range):
        assert f"{rate:.3g}" in text
    assert p.bound_by in text
    assert "forecast (estimated)" in text
    lines = {line.split()[0]: line for line in text.splitlines() if line.strip()}
    assert "256 KiB" in lines["cuda:0"]
    assert "2 GiB" in lines["cpu"]
    assert "disk" not in lines
    assert "needs" in next(line for line in text.splitlines() if line.startswith("all on cuda:0"))
    assert next(line for line in text.splitlines() if line.startswith("fastest first")).endswith("chosen")
    assert "the time" in next(line for line in text.splitlines() if line.startswith("all on cpu"))
    assert max(map(len, text.splitlines())) <= 100


def test_text_names_what_is_where() -> None:
    text = str(by_hand(layers__0__mlp="cuda:0", layers__2__experts__7="cuda:0"))
    lines = {line.split()[0]: line for line in text.splitlines() if line.strip()}
    assert lines["cuda:0"].endswith("part of layers 0, 2 (1 expert)")
    assert lines["cpu"].endswith("embedding, final_norm, head, layers 1, part of layers 0, 2 (15")  # and wrapped
    assert "183.2 k parameters, 107.4 k active per token" in text
    noted = str(replace(by_hand(), notes=("a long remark " * 20,)))
    assert noted.count("long") == 20
    assert max(map(len, noted.splitlines())) <= 100


def test_text_shows_budgets() -> None:
    text = str(TaskScheduler(CPU_AND_GPU, memory={"cuda:0": "300MiB"}, workload=WORK).schedule(MODEL))
    assert "300 MiB" in next(line for line in text.splitlines() if line.startswith("cuda:0"))


def test_text_of_a_device_that_is_not_usable() -> None:
    text = str(by_hand(machine(device("cpu"), device("cuda:0", usable=False, why_not_usable="no driver"))))
    assert "no driver" in text


def test_explain() -> None:
    schedule = planned()
    assert schedule.explain("layers.1.experts.7").startswith(
        "layers.1.experts.7: 12 KiB on cuda:0, placed by all on cuda:0"
    )
    assert "preferred over all on cpu (" in schedule.explain("layers.1")
    assert "MiB" in schedule.explain("layers") or "KiB" in schedule.explain("layers")
    assert "\n" not in schedule.explain("layers.1")
    assert "preferred" not in by_hand().explain("head")
    with pytest.raises(InvalidInput, match=r"nothing named layers.1.expert; names are like embedding, .*, head"):
        schedule.explain("layers.1.expert")


# JSON


def test_json_round_trip(tmp_path: Path) -> None:
    schedule = planned()
    assert Schedule.from_dict(json.loads(schedule.to_json())) == schedule
    file = tmp_path / "plan.json"
    schedule.to_json(file)
    assert Schedule.from_json(file) == schedule
    links = (Link("cpu", "cuda:0", 1e10, 1e-5, "measured", ("pcie",), {4096: 1e9}),)
    shared = Topology(CPU_AND_GPU.devices, links, (Domain("pcie", 2e10, "measured"),))
    assert Schedule.from_dict(json.loads(by_hand(shared).to_json())) == by_hand(shared)


def test_json_has_the_promised_fields() -> None:
    data = planned().to_dict()
    assert {"schema_version", "workload", "model", "devices", "assignments", "predicted", "candidates"} <= data.keys()
    assert data["model"].keys() == {"name", "format", "parameters", "active_parameters"}
    assert data["assignments"][0] == {"task": "embedding", "device": "cuda:0", "home": "cuda:0", "bytes": 320 * 64 * 2}
    promised = {
        "first_token_s",
        "prefill_tokens_per_s",
        "decode_tokens_per_s",
        "range",
        "bound_by",
        "memory_bytes",
        "basis",
    }
    assert promised <= data["predicted"].keys()
    assert data["candidates"][0].keys() == {
        "name", "feasible", "decode_tokens_per_s", "prefill_tokens_per_s", "why_not",
    }  # fmt: skip


def test_edited_by_hand(tmp_path: Path) -> None:
    """Moving a layer is changing `device` and `home`."""
    data = planned().to_dict()
    for row in data["assignments"]:
        if row["task"].startswith("layers.1."):
            row["device"] = row["home"] = "cpu"
    file = tmp_path / "plan.json"
    file.write_text(json.dumps(data))
    edited = Schedule.from_json(file)
    edited.validate(MODEL)
    edited.check_memory(MODEL)
    assert edited.device_of("layers.1.attention") == "cpu"
    assert edited.device_of("layers.2.attention") == "cuda:0"


def test_a_budget_of_nothing_is_saved_and_read() -> None:
    """`--memory cuda:0=0` keeps a device out; the file must still say what there is."""
    schedule = TaskScheduler(CPU_AND_GPU, memory={"cuda:0": 0}, workload=WORK).schedule(MODEL)
    assert schedule.devices_used() == ("cpu",)
    assert Schedule.from_dict(json.loads(schedule.to_json())) == schedule


def edited(*path: Any, value: Any = None, remove: bool = False) -> dict[str, Any]:
    data = copy.deepcopy(GOOD)
    at = data
    for key in path[:-1]:
        at = at[key]
    if remove:
        del at[path[-1]]
    else:
        at[path[-1]] = value
    return data


PLANNED = planned()
GOOD: dict[str, Any] = json.loads(PLANNED.to_json())


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "is not a schedule"),
        (None, "is not a schedule"),
        ({}, "is not a schedule"),
        (edited("schema_version", value=2), "schema_version 2, this version reads 1"),
        (edited("schema_version", value=None), "schema_version None"),
        (edited("goal", remove=True), "has no goal"),
        (edited("assignments", remove=True), "has no assignments"),
        (edited("extra", value=1), "unknown key extra"),
        (edited("goal", value="speed"), "goal is 'speed'; it must be one of latency"),
        (edited("goal", value=["latency"]), "goal is"),
        (edited("policy", value=3), "policy is 3; it must be a text"),
        (edited("notes", value="text"), "notes is 'text'; it must be a list"),
        (edited("notes", value=[1]), "notes 1 is 1"),
        (edited("model", "name", remove=True), "model has no name"),
        (edited("model", "size", value=1), "model: unknown key size"),
        (edited("model", "parameters", value=1.5), "model: parameters is 1.5; it must be a whole number"),
        (edited("model", value=[]), r"model is \[\]; it must be an object"),
        (edited("workload", "batch", value=0), "batch is 0; it must be a whole number from 1"),
        (edited("workload", "batch", value=True), "batch is True"),
        (
            edited("predicted", "decode_tokens_per_s", value="fast"),
            "decode_tokens_per_s is 'fast'; it must be a number",
        ),
        (edited("predicted", "decode_tokens_per_s", value=10**400), "decode_tokens_per_s is a very large number"),
        (edited("predicted", "decode_tokens_per_s", value=float("nan")), "decode_tokens_per_s is nan"),
        (edited("predicted", "range", value=[1]), "range is .*it must be a list of 2"),
        (edited("predicted", "memory_bytes", value={"cpu": "1"}), "memory_bytes: cpu is '1'"),
        (edited("predicted", "seconds_per_token", value={"decode": 1}), "seconds_per_token: decode is 1"),
        (edited("predicted", "basis", value="guess"), "basis is 'guess'; it must be one of measured"),
        (edited("candidates", 0, "feasible", value=1), "candidates 1: feasible is 1; it must be true or false"),
        (edited("candidates", 0, value=None), "candidates 1 is None"),
        (edited("assignments", value={}), "assignments is not a list"),
        (edited("assignments", 2, value=7), "assignment 3 is 7"),
        (edited("assignments", 2, "home", remove=True), "assignment 3 is .*it must have bytes, device, home, task"),
        (edited("assignments", 2, "tier", value=1), "assignment 3 is"),
        (edited("assignments", 2, "device", value="cuda:9"), "device is 'cuda:9'; there are cpu, cuda:0"),
        (edited("assignments", 2, "home", value=None), "home is None"),
        (edited("assignments", 2, "task", value=None), "task is None"),
        (edited("assignments", 2, "bytes", value=-1), "bytes is -1"),
        (edited("assignments", 2, "bytes", value=True), "bytes is True"),
        (edited("assignments", 2, "bytes", value=10**5000), "bytes is a very large number"),
        (edited("devices", value=[]), "declares no devices"),
        (edited("devices", 0, "memory_bytes", value="much"), "memory_bytes is 'much'"),
        (edited("links", value=[{"src": "cpu"}]), "link 1: dst is missing"),
    ],
)
def test_bad_json_is_one_line(data: Any, message: str) -> None:
    with pytest.raises(InvalidInput, match=message) as error:
        Schedule.from_dict(data, "schedule plan.json")
    assert "\n" not in str(error.value)
    assert str(error.value).startswith("schedule plan.json") or "workload" in str(error.value)
    assert len(str(error.value)) < 500


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, "\xff", '{"schema_version": 1' + "0" * 5000 + "}"])
def test_files_that_are_not_json(tmp_path: Path, text: str) -> None:
    file = tmp_path / "plan.json"
    file.write_text(text, encoding="latin-1")
    with pytest.raises(InvalidInput, match=r"plan\.json"):
        Schedule.from_json(file)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=r"cannot read schedule .*No such file"):
        Schedule.from_json(tmp_path / "none.json")
    with pytest.raises(InvalidInput, match=r"cannot read schedule .*Is a directory"):
        Schedule.from_json(tmp_path)


JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@st.composite
def paths(draw: st.DrawFn) -> tuple[Any, ...]:
    """The way to some place in GOOD."""
    at, path = GOOD, []
    while isinstance(at, (dict, list)) and at and (not path or draw(st.booleans())):
        key = draw(st.sampled_from(sorted(at) if isinstance(at, dict) else range(len(at))))
        path.append(key)
        at = at[key]
    return tuple(path)


@settings(max_examples=400, deadline=None)
@given(paths(), JUNK)
def test_damage_is_noticed_or_harmless(path: tuple[Any, ...], value: Any) -> None:
    """Whatever stands anywhere: read as a schedule that can be written and printed again, or refused in one line."""
    try:
        schedule = Schedule.from_dict(edited(*path, value=value))
    except InvalidInput as error:
        schedule, message = PLANNED, str(error)
    else:
        message = ""
    assert "\n" not in message
    assert Schedule.from_dict(json.loads(schedule.to_json())) == schedule
    assert str(schedule)


NUMBERS = st.floats(1e-9, 1e12)
SIZES = st.integers(0, 2**60)
TEXT = st.text(max_size=20)


@st.composite
def schedules(draw: st.DrawFn) -> Schedule:
    names = draw(
        st.lists(st.sampled_from(["cpu", "cuda:0", "sim:0", "node1/cpu"]), min_size=1, max_size=4, unique=True)
    )
    devices = [
        device(name, memory=draw(st.integers(4096, 2**50)), bandwidth=draw(st.floats(1e6, 1e14)),
               memory_free_bytes=draw(st.none() | SIZES), basis=draw(st.sampled_from(["measured", "unknown"])))
        for name in names
    ]  # fmt: skip
    rows = draw(st.lists(st.tuples(TEXT, st.sampled_from(names), st.sampled_from(names), SIZES), max_size=5))
    prediction = Prediction(
        draw(NUMBERS), draw(NUMBERS), draw(NUMBERS), (draw(NUMBERS), draw(NUMBERS)), draw(TEXT),
        draw(st.dictionaries(TEXT, SIZES, max_size=3)), draw(st.sampled_from(["measured", "estimated", "mixed"])),
        {"decode": draw(st.dictionaries(TEXT, NUMBERS, max_size=3))},
    )  # fmt: skip
    candidates = draw(
        st.lists(st.builds(Candidate, TEXT, st.booleans(), st.none() | NUMBERS, st.none() | NUMBERS, TEXT), max_size=3)
    )
    return Schedule(
        ModelSummary(draw(TEXT), "bfloat16", draw(SIZES), draw(SIZES)),
        Workload(*(draw(st.integers(1, 2**31)) for _ in range(3))),
        machine(*devices),
        tuple(Assignment(*row) for row in rows),
        draw(TEXT),
        draw(st.sampled_from(["latency", "throughput", "first-token"])),
        draw(st.none() | st.just(prediction)),
        tuple(candidates),
        tuple(draw(st.lists(TEXT, max_size=3))),
    )


@settings(max_examples=150, deadline=None)
@given(schedules())
def test_any_schedule_is_read_back_as_it_was(schedule: Schedule) -> None:
    assert Schedule.from_dict(json.loads(schedule.to_json())) == schedule
    assert schedule.model.name in str(schedule)
