"""The user's rules: what patterns mean, how devices share, and that every error names its rule."""

from __future__ import annotations

import random
import re
from collections import Counter
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest
from machines import CPU_AND_GPU, DISK, device, machine, model, random_machine, random_model, toy_graph, toy_task

from ciuic_runtime.devices.errors import InvalidInput, OutOfMemory
from ciuic_runtime.devices.spec import Topology
from ciuic_runtime.schedulers.draft import ScheduleDraft
from ciuic_runtime.schedulers.graph import TaskGraph
from ciuic_runtime.schedulers.placement import Placement, Rule
from ciuic_runtime.schedulers.workload import Workload

MODEL = model()
SMALL = Workload(8, 8)


def put(*args: Any, **kwargs: Any) -> Placement:
    return Placement().put(*args, **kwargs)


def names(placement: Placement, where: str, graph: TaskGraph = MODEL) -> list[str]:
    found = placement.resolve(graph, CPU_AND_GPU, SMALL)
    return [row for row, name in found.items() if name == where]


@pytest.mark.parametrize(
    ("pattern", "matches", "others"),
    [
        ("layers.3", ["layers.3.mlp", "layers.3.experts.7"], ["layers.30.mlp", "embedding"]),
        ("layers.*.experts", ["layers.3.experts.0", "layers.60.experts.255"], ["layers.3.shared_experts"]),
        ("layers.*.experts.*", ["layers.3.experts.0"], ["layers.3.mlp"]),
        ("layers.9-11.mlp", ["layers.9.mlp", "layers.10.mlp", "layers.11.mlp"], ["layers.8.mlp", "layers.110.mlp"]),
        ("layers.*.experts.0-3", ["layers.5.experts.3"], ["layers.5.experts.4", "layers.5.experts.30"]),
        ("layers.*.*_norm", ["layers.0.mlp_norm"], ["final_norm", "layers.0.mlp"]),
        ("*", ["embedding", "layers.3.mlp"], []),
        ("layers.1+2", [], ["layers.12", "layers.112"]),
    ],
)
def test_patterns(pattern: str, matches: list[str], others: list[str]) -> None:
    rule = Rule(pattern, ("cpu",))
    assert [rule.matches(name) for name in matches] == [True] * len(matches)
    assert [rule.matches(name) for name in others] == [False] * len(others)


def test_a_later_rule_overrides_an_earlier_one() -> None:
    placement = put("layers.*", "cpu").put("layers.1-2.experts", "cuda:0").put("layers.1.experts.3", "cpu")
    on_gpu = names(placement, "cuda:0")
    assert on_gpu == [f"layers.{n}.experts.{e}" for n in (1, 2) for e in range(8) if (n, e) != (1, 3)]
    assert "layers.1.experts.3" in names(placement, "cpu")
    assert "embedding" not in placement.resolve(MODEL, CPU_AND_GPU, SMALL)


def test_devices_by_pattern() -> None:
    machines = machine(device("cpu:0"), device("cpu:1"), device("node1/cuda:0"), device("node1/cuda:1"))

    def where(on: str) -> set[str]:
        return set(put("head", on).put("embedding", on).resolve(MODEL, machines, SMALL).values())

    assert where("cpu") == where("cpu:0") == {"cpu:0"}  # both have room on the first
    assert where("node1/*") == {"node1/cuda:0"}
    with pytest.raises(
        InvalidInput, match=r"'head on cuda' names device cuda; devices that can compute are cpu:0, cpu"
    ):
        where("cuda")


def room_for(graph: TaskGraph, *rows: str) -> int:
    """Memory in which exactly these rows fit, with working memory and cache."""
    draft = ScheduleDraft(graph, machine(device("cpu")), SMALL)
    return int(graph.working_bytes(1, 8, 16)) + int(sum(draft.row_need(row, "cpu") for row in rows)) + 1


def test_by_order_fills_one_device_after_the_other() -> None:
    rows = [row for row in MODEL.rows if ".experts." in row]
    topology = machine(device("cuda:0", memory=room_for(MODEL, *rows[:5])), device("cpu"))
    found = put("layers.*.experts", ["cuda:0", "cpu"]).resolve(MODEL, topology, SMALL)
    assert list(found.values()) == ["cuda:0"] * 5 + ["cpu"] * 11


def test_order_passes_over_devices_without_room() -> None:
    small = [device(name, memory=4096) for name in ("cuda:0", "cuda:1")]
    found = put("head", ["cuda:0", "cuda:1", "cpu"]).resolve(MODEL, machine(*small, device("cpu")), SMALL)
    assert found == {"head": "cpu"}


def test_order_does_not_go_back_to_a_full_device() -> None:
    """A small norm after the first page that did not fit follows it, and no value crosses for it."""
    room = MODEL.rows["layers.0.mlp_norm"].nbytes
    assert room * 4 < min(MODEL.rows[f"layers.0.{name}"].nbytes for name in ("attention", "mlp"))
    rows = ["layers.0.attention_norm", "layers.0.attention"]
    topology = machine(device("cuda:0", memory=room_for(MODEL, *rows) + room), device("cpu"))
    found = put("layers.0", ["cuda:0", "cpu"]).resolve(MODEL, topology, SMALL)
    assert list(found.values()) == ["cuda:0", "cuda:0", "cuda:0", "cpu"]  # norm, attention, norm, mlp
    topology = machine(device("cuda:0", memory=room_for(MODEL, rows[0]) + room), device("cpu"))
    found = put("layers.0", ["cuda:0", "cpu"]).resolve(MODEL, topology, SMALL)
    assert list(found.values()) == ["cuda:0", "cpu", "cpu", "cpu"]


def test_order_leaves_room_for_the_cache() -> None:
    """Attention brings its cache with it: a long context moves layers to the next device."""
    memory = room_for(MODEL, *(f"layers.{n}.attention" for n in range(3)))
    topology = machine(device("cuda:0", memory=memory), device("cpu"))
    placement = put("layers.*.attention", ["cuda:0", "cpu"])
    assert set(placement.resolve(MODEL, topology, SMALL).values()) == {"cuda:0"}
    assert "cpu" in placement.resolve(MODEL, topology, Workload(8, 120)).values()


def test_by_popularity() -> None:
    graph = toy_graph(
        *(
            replace(task, popularity=(0.1, 0.5, 0.05, 0.9, 0.1, 0.2, 0.1, 0.05)) if task.num_experts else task
            for task in model(num_hidden_layers=2)
        )
    )
    topology = machine(device("cuda:0", memory=3 * graph.rows["layers.1.experts.0"].nbytes), device("cpu"))
    found = put("layers.*.experts", ["cuda:0", "cpu"], by="popularity").resolve(graph, topology, SMALL)
    assert [row for row, name in found.items() if name == "cuda:0"] == [f"layers.1.experts.{e}" for e in (3, 1, 5)]


def test_by_share() -> None:
    found = put("layers.1.experts", ["cuda:0", "cpu"], shares=[3, 1]).resolve(MODEL, CPU_AND_GPU, SMALL)
    assert list(found.values()) == ["cuda:0"] * 6 + ["cpu"] * 2
    found = put("layers.1.experts", ["cuda:0", "cpu"], shares=[0, 1]).resolve(MODEL, CPU_AND_GPU, SMALL)
    assert set(found.values()) == {"cpu"}


def test_share_that_cannot_fit_names_the_rule() -> None:
    topology = machine(device("cuda:0", memory=room_for(MODEL, "layers.1.experts.0")), device("cpu"))
    with pytest.raises(
        OutOfMemory,
        match=r"'layers.1.experts on cuda:0, cpu' cannot fit: .* so .*iB on cuda:0 are lacking; shares = .* would fit$",
    ):
        put("layers.1.experts", ["cuda:0", "cpu"], shares=[3, 1]).resolve(MODEL, topology, SMALL)


def test_a_rule_that_cannot_fit_gives_the_figures() -> None:
    topology = machine(device("cuda:0", memory=room_for(MODEL, "layers.1.experts.0")), device("cpu"))
    with pytest.raises(
        OutOfMemory,
        match=r"'layers.1 on cuda:0' cannot fit: it needs .*iB with the cache; .* there is .*iB on cuda:0, so",
    ):
        put("layers.1", "cuda:0").resolve(MODEL, topology, SMALL)


def test_a_tied_page_needs_room_once() -> None:
    tied = model(tie_word_embeddings=True)
    topology = machine(device("cpu", memory=room_for(tied, "embedding")))
    assert put("embedding", "cpu").put("head", "cpu").resolve(tied, topology, SMALL) == {
        "embedding": "cpu",
        "head": "cpu",
    }


def test_rules_that_do_nothing_are_errors() -> None:
    with pytest.raises(
        InvalidInput, match=r"'layers.7.mlp on cpu' matches nothing in \S+; names are like embedding, la"
    ):
        put("layers.7.mlp", "cpu").resolve(MODEL, CPU_AND_GPU)
    placement = put("layers.1", "cpu").put("layers.0-1", "cuda:0").put("head", "cpu").put("layers.*", "cpu")
    with pytest.raises(InvalidInput) as error:
        placement.resolve(MODEL, CPU_AND_GPU)
    assert str(error.value) == (
        "placement rule 'layers.1 on cpu' is wholly overridden by 'layers.0-1 on cuda:0' and 'layers.* on cpu'; "
        "remove it or reorder them"
    )


@pytest.mark.parametrize(
    ("on", "message"),
    [
        ("disk", r'names disk, which cannot compute; to store weights there write store = "disk"; devices .* cpu; '),
        ("DISK", r'names DISK, which cannot compute; to store weights there write store = "disk"; devices .* cpu; '),
        ("cuda:0", r"names device cuda:0, which is not usable \(no driver\); devices that can compute are cpu; "),
        ("GPU", r"names kind GPU, which is not usable \(no driver\); devices that can compute are cpu; kinds CPU$"),
        ("SIM", "names kind SIM; devices that can compute are cpu; kinds CPU$"),
        ("gpu", "names device gpu; devices that can compute are cpu; kinds CPU$"),
    ],
)
def test_a_rule_that_names_no_device_says_what_there_is(on: str, message: str) -> None:
    topology = machine(device("cpu"), device("cuda:0", usable=False, why_not_usable="no driver"), DISK)
    with pytest.raises(InvalidInput, match=f"^placement rule 'head on {on}' {message}"):
        put("head", on).resolve(MODEL, topology)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("", "cpu"), "pattern '' is empty"),
        (("layers..mlp", "cpu"), "'layers..mlp' is empty or has an empty part"),
        (("layers.9-3", "cpu"), "9-3 is not a range such as 30-60"),
        (("head", ""), "must name at least one device"),
        (("head", []), "must name at least one device"),
        (("head", 5), "'on' must be a name or a list of names"),
        ((7, "cpu"), "pattern 7 is empty"),
        (("head", "cpu", "chance"), "by 'chance' is not one of order, popularity, share"),
        (("head", "cpu", "share"), "give both or neither"),
        (("head", "cpu", "order", [1]), "give both or neither"),
        (("head", "cpu", "share", [1, 2]), r"shares \[1, 2\] must be one number >= 0 for each of cpu"),
        (("head", "cpu", "share", [-1]), r"shares \[-1\] must be"),
        (("head", "cpu", "share", [0]), r"shares \[0\] must be"),
        (("head", "cpu", "share", [float("nan")]), r"shares \[nan\] must be"),
        (("head", "cpu", "share", ["x"]), r"shares \['x'\] must be"),
        (("head", "cpu", "share", "x"), r"shares \['x'\] must be"),
        (("head", "cpu", "share", [True]), r"shares \[True\] must be"),
        (("head", "cpu", "share", [float("inf")]), r"shares \[inf\] must be"),
        (("head", "cpu", "share", [10**400]), r"shares \[1000.*\] must be"),
        (("head", "cpu", ""), "by '' is not one of"),
        (("head", "cpu", None, (), 5), "'store' is 5; it must name one disk"),
        (("head", "cpu", None, (), ["disk"]), r"'store' is \['disk'\]; it must name one disk"),
    ],
)
def test_bad_rules(args: tuple[Any, ...], message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        put(*args)


def test_shares_need_single_devices() -> None:
    with pytest.raises(InvalidInput, match=r"with shares, \* must name one device, not cpu, cuda:0"):
        put("layers.*", "*", shares=[1]).resolve(MODEL, CPU_AND_GPU)
    with pytest.raises(InvalidInput, match=r"with shares, a device can be named once; it has cpu, cpu"):
        put("layers.*", ["cpu", "CPU"], shares=[1, 1]).resolve(MODEL, CPU_AND_GPU)


def test_from_toml(tmp_path: Path) -> None:
    file = tmp_path / "rules.toml"
    file.write_text(
        '[[put]]\npattern = "layers.*.experts"\non = ["cuda:0", "cpu"]\nby = "share"\nshares = [1, 3.5]\n'
        '[[put]]\npattern = "head"\non = "cpu"\n'
    )
    assert Placement.from_toml(file) == put("layers.*.experts", ["cuda:0", "cpu"], shares=[1, 3.5]).put("head", "cpu")
    file.write_text('[[put]]\npattern = "head"\non = "CPU"\nstore = "disk"\n')
    assert Placement.from_toml(file) == put("head", "CPU", store="disk")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[[put]", "is not TOML"),
        ("", r"has no rules; write \[\[put\]\] tables"),
        ("# nothing yet\n", "has no rules"),
        ("put = []", "has no rules"),
        ("\xff", "is not UTF-8 text"),
        ("x = " + "[" * 5000, "is not TOML"),
        ("x = 1", "unknown key 'x'; rules"),
        ("'' = 1", "unknown key ''; rules"),
        ("[[puts]]", r"unknown key 'puts', did you mean put\?; rules are \[\[put\]\] tables"),
        ("put = 5", r"put is 5; rules are \[\[put\]\] tables"),
        ("put = [5]", "rule 1: a rule has pattern, on"),
        ('[[put]]\npattern = "head"', "rule 1: on is missing; a rule has pattern, on"),
        ('[[put]]\non = "cpu"', "rule 1: pattern is missing; a rule has pattern, on"),
        ('[[put]]\npattern = "head"\non = "cpu"\nwhere = 1', "rule 1: unknown key 'where'; a rule has pattern, on"),
        ('[[put]]\npatern = "head"\non = "cpu"', r"rule 1: unknown key 'patern', did you mean pattern\?; a rule has"),
        ('[[put]]\npattern = "head"\non = "cpu"\nstored = "disk"', r"unknown key 'stored', did you mean store\?"),
        ('[[put]]\npattern = "head"\non = "cpu"\nstore = 1', "rule 1: .*'store' is 1; it must name one disk"),
        ('[[put]]\npattern = "head"\non = "cpu"\nshares = [nan]', r"rule 1: .*shares \[nan\] must be one number"),
        ('[[put]]\npattern = "head"\non = "cpu"\nshares = [-0.5]', r"rule 1: .*shares \[-0.5\] must be one number"),
        ('[[put]]\npattern = "head"\non = "cpu"\nshares = [inf]', r"rule 1: .*shares \[inf\] must be one number"),
        ('[[put]]\npattern = "head"\non = "cpu"\nshares = [1, 2]', r"rule 1: .*shares \[1, 2\] must be one number"),
        ('[[put]]\npattern = "head"\non = "cpu"\n[[put]]\npattern = 3\non = "cpu"', "rule 2: placement pattern 3"),
        ('[[put]]\npattern = "head"\non = 1979-05-27', "rule 1: .*'on' must be a name"),
        ('[[put]]\npattern = "head"\non = "cpu"\nshares = 3', "rule 1: .*'shares' a list of numbers"),
        ('[[put]]\npattern = "head"\non = "cpu"\nby = ["order"]', "rule 1: .*is not one of order"),
    ],
)
def test_bad_toml_is_one_line_that_names_the_place(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "rules.toml"
    file.write_text(text, encoding="latin-1")
    with pytest.raises(InvalidInput, match=message) as error:
        Placement.from_toml(file)
    assert str(file) in str(error.value)
    assert "\n" not in str(error.value)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=r"cannot read placement .*No such file"):
        Placement.from_toml(tmp_path / "none.toml")
    with pytest.raises(InvalidInput, match=r"cannot read placement .*Is a directory"):
        Placement.from_toml(tmp_path)
    with pytest.raises(InvalidInput, match=r"placement a\\x00b .*null byte"):
        Placement.from_toml("a\0b")


def test_toy_graphs_can_be_placed() -> None:
    graph = toy_graph(toy_task("a"), toy_task("b", after=("a",)))
    assert put("b", "cuda:0").resolve(graph, CPU_AND_GPU) == {"b": "cuda:0"}


# Kinds


def test_a_kind_is_all_usable_devices_of_that_kind_the_fastest_memory_first() -> None:
    size = room_for(MODEL, "layers.1.experts.0")
    topology = machine(
        device("cuda:0", memory=size, bandwidth=3e11),
        device("cpu"),
        device("cuda:1", memory=size, bandwidth=9e11),
        device("cuda:2", memory=size, bandwidth=9e12, usable=False),
        device("node1/cuda:0", memory=size, memory_bandwidth=None),
    )
    rows = ["layers.1.experts.0", "layers.1.experts.1", "layers.2.experts.0", "layers.2.experts.1"]
    assert room_for(MODEL, *rows[:2]) > size, "one fits each"
    placement = put("layers.1-2.experts.0-1", ["GPU", "CPU"])
    assert placement.resolve(MODEL, topology, SMALL) == dict(
        zip(rows, ["cuda:1", "cuda:0", "node1/cuda:0", "cpu"], strict=True)
    )


# What is stored elsewhere


def test_weights_are_stored_on_a_disk_where_a_rule_says_so() -> None:
    topology = machine(device("cpu"), device("cuda:0"), DISK)
    placement = (
        put("layers.*.experts", "CPU", store="disk")
        .put("layers.2.experts.0-5", "cpu")  # overrides where weights are stored too
        .put("head", "cuda:0")
    )
    found = placement.resolve(MODEL, topology, SMALL)
    assert {row for row, name in found.items() if name == "cpu"} == {r for r in MODEL.rows if ".experts." in r}
    assert placement.homes(MODEL, topology) == dict.fromkeys(
        [*(f"layers.1.experts.{e}" for e in range(8)), "layers.2.experts.6", "layers.2.experts.7"], "disk"
    )
    assert put("head", "cpu").homes(MODEL, topology) == {}


def test_of_what_is_stored_on_a_disk_one_page_at_a_time_and_the_cache_need_room() -> None:
    experts = [row for row in MODEL.rows if ".experts." in row]
    topology = machine(device("cpu", memory=room_for(MODEL, experts[0])), DISK)
    assert put("layers.*.experts", "cpu", store="disk").resolve(MODEL, topology, SMALL) == dict.fromkeys(experts, "cpu")
    topology = machine(device("cpu", memory=room_for(MODEL, experts[0]) - 2), DISK)
    with pytest.raises(OutOfMemory, match=r"experts on cpu, stored on disk' cannot fit: it needs 12 KiB with"):
        put("layers.*.experts", "cpu", store="disk").resolve(MODEL, topology, SMALL)
    every = room_for(MODEL, *(f"layers.{n}.attention" for n in range(3)))
    attention = put("layers.*.attention", "cpu", store="disk")
    assert attention.resolve(MODEL, machine(device("cpu", memory=every), DISK), SMALL)
    with pytest.raises(OutOfMemory):  # the cache of a long context stays in memory
        attention.resolve(MODEL, machine(device("cpu", memory=every), DISK), Workload(8, 4000))


@pytest.mark.parametrize(
    ("store", "message"),
    [
        ("disk", r"which is not here; disks here: none; name one, or leave 'store' out to keep weights where"),
        ("cpu", r"which is a CPU, not a disk; disks here: none; name one"),
        ("DISK", r"which is not here; disks here: none"),
    ],
)
def test_a_store_that_is_no_disk_of_the_topology(store: str, message: str) -> None:
    placement = put("embedding", "cpu").put("head", "cpu", store=store)
    for ask in (placement.resolve, placement.homes):
        with pytest.raises(
            InvalidInput, match=f"^placement rule 'head on cpu, stored on {store}' stores on {store}, {message}"
        ):
            ask(MODEL, CPU_AND_GPU)


# What does not fit


def test_two_rules_that_cannot_fit_together_are_both_named() -> None:
    topology = machine(device("cuda:0", memory=room_for(MODEL, "layers.1.experts.0", "head")))
    placement = put("layers.1.experts.0-1", "cuda:0").put("head", "cuda:0")
    with pytest.raises(OutOfMemory) as error:
        placement.resolve(MODEL, topology, SMALL)
    assert str(error.value) == (
        "placement rules 'head on cuda:0' (40 KiB) and 'layers.1.experts.0-1 on cuda:0' (24 KiB) cannot fit together "
        "with the cache; beside working memory there is 52 KiB on cuda:0, so 12 KiB on cuda:0 are lacking; "
        "give it that much more memory, or leave it out"
    )
    for rule in placement.rules:
        Placement((rule,)).resolve(MODEL, topology, SMALL)


def test_rules_that_leave_no_choice_take_their_room_first() -> None:
    """An earlier rule with several devices does not take what a later one with one device needs."""
    topology = machine(device("cuda:0", memory=room_for(MODEL, "layers.1.experts.0", "head")), device("cpu"))
    found = put("layers.1.experts", ["cuda:0", "cpu"]).put("head", "cuda:0").resolve(MODEL, topology, SMALL)
    assert [row for row, name in found.items() if name == "cuda:0"] == ["head", "layers.1.experts.0"]


def lacking(placement: Placement, topology: Topology) -> OutOfMemory:
    with pytest.raises(OutOfMemory) as error:
        placement.resolve(MODEL, topology, SMALL)
    assert "\n" not in str(error.value)
    return error.value


def test_what_is_said_to_be_lacking_is_enough_and_not_a_byte_too_much() -> None:
    for rows in range(1, 12):
        memory = room_for(MODEL, *list(MODEL.rows)[:rows])
        error = lacking(put("*", "cpu"), machine(device("cpu", memory=memory)))
        memory += error.need - error.free
        assert put("*", "cpu").resolve(MODEL, machine(device("cpu", memory=memory)), SMALL)
        lacking(put("*", "cpu"), machine(device("cpu", memory=memory - 1)))


def test_the_remedy_is_another_device_that_has_the_room() -> None:
    topology = machine(
        device("cuda:0", memory=room_for(MODEL, "layers.1.mlp_norm")), device("cpu"), device("cuda:1", 8192)
    )
    error = lacking(put("layers.1", "cuda:0"), topology)
    assert re.search(r"; add cpu to its devices \(.*iB are left there\)$", str(error))
    assert put("layers.1", ["cuda:0", "cpu"]).resolve(MODEL, topology, SMALL)


def test_the_remedy_is_shares_that_fit() -> None:
    experts = [f"layers.1.experts.{e}" for e in range(3)]
    topology = machine(device("cuda:0", memory=room_for(MODEL, *experts)), device("cpu"))
    error = lacking(put("layers.1.experts", ["cuda:0", "cpu"], shares=[1, 1]), topology)
    found = re.search(r"; shares = \[(\d+), (\d+)\] would fit$", str(error))
    assert found
    shares = [int(share) for share in found.groups()]
    assert sum(shares) == 100
    placed = put("layers.1.experts", ["cuda:0", "cpu"], shares=shares).resolve(MODEL, topology, SMALL)
    assert list(placed.values()).count("cuda:0") == 3, "no further from the shares asked for than it must"


def test_the_remedy_is_fewer_tasks_or_a_disk() -> None:
    rows = [f"layers.1.experts.{e}" for e in range(5)]
    placement = put("layers.1.experts", "cpu")
    for where, message in (((), ""), ((DISK,), 'store = "disk", or ')):
        topology = machine(device("cpu", memory=room_for(MODEL, *rows)), *where)
        error = lacking(placement, topology)
        assert f"more memory, or {message}leave out its last 3 of 8 tasks, from layers.1.experts.5 on" in str(error)
    assert len(put("layers.1.experts.0-4", "cpu").resolve(MODEL, topology, SMALL)) == 5
    assert len(put("layers.1.experts", "cpu", store="disk").resolve(MODEL, topology, SMALL)) == 8


def test_shares_that_fit_nowhere() -> None:
    topology = machine(device("cuda:0", memory=4096), device("cpu", memory=4096))
    error = lacking(put("layers.1.experts", ["cuda:0", "cpu"], shares=[1, 1]), topology)
    assert "on cuda:0 and " in str(error)
    assert "on cpu are lacking" in str(error)
    assert str(error).endswith("give it that much more memory, or leave it out")


# Against a naive reference: the rules one after the other onto a dict


def covers(pattern: str, name: str) -> bool:
    parts, names = pattern.split("."), name.split(".")
    if len(parts) > len(names):
        return False
    for part, text in zip(parts, names, strict=False):
        low, dash, high = part.partition("-")
        if dash and low.isdecimal() and high.isdecimal():
            if not (text.isdecimal() and int(low) <= int(text) <= int(high)):
                return False
        elif not fnmatchcase(text, part):
            return False
    return True


def reference(rules: tuple[Rule, ...], graph: TaskGraph, topology: Topology) -> tuple[dict[str, str], dict[str, str]]:
    """(row -> device, row -> store); ValueError for rules that do nothing, MemoryError for what does not fit."""
    owner: dict[str, int] = {}
    for i, rule in enumerate(rules):
        matched = [row for row in graph.rows if covers(rule.pattern, row)]
        if not matched:
            raise ValueError(rule)
        owner.update(dict.fromkeys(matched, i))
    if set(owner.values()) != set(range(len(rules))):
        raise ValueError(rules)
    speed = {d.name: d.memory_bandwidth or 0 for d in topology.compute_devices}
    kinds = {"CPU": "cpu", "GPU": "cuda", "SIM": "sim"}
    free = ScheduleDraft(graph, topology, SMALL).room
    where: dict[str, str] = {}
    read: dict[str, int] = {}
    held: set[tuple[str, str]] = set()
    picks = {p.name: s for t in graph if t.popularity for p, s in zip(t.pages, t.popularity, strict=True)}
    single, several = [], []
    for i, rule in enumerate(rules):
        devices: list[str] = []
        for on in rule.on:
            if on in kinds:
                names = sorted((n for n in speed if f"{kinds[on]}" in n), key=lambda n: (-speed[n], n))
            else:
                names = [n for n in speed if n == on]
            if not names:
                raise ValueError(rule)
            devices += [n for n in names if n not in devices]
        mine = [row for row in graph.rows if owner.get(row) == i]
        if rule.by == "popularity":
            mine.sort(key=lambda row: -picks.get(row, 0))
        (single if len(devices) == 1 or rule.by == "share" else several).append((rule, devices, mine))
    for rule, devices, mine in single + several:
        at, done, total = 0, 0.0, sum(graph.rows[row].nbytes for row in mine)
        for row in mine:
            page, task = graph.rows[row], graph.by_name.get(row)
            if rule.by == "share":
                at, end = 0, rule.shares[0] / sum(rule.shares) * total
                while done + page.nbytes / 2 > end and at < len(devices) - 1:
                    at += 1
                    end += rule.shares[at] / sum(rule.shares) * total
                done += page.nbytes
            while True:
                there = devices[at]
                need = 0 if (page.name, there) in held else page.nbytes
                if rule.store:
                    need = max(0, (0 if page.row_nbytes else page.nbytes) - read.get(there, 0))
                need += (task.kv_bytes_per_token if task else 0) * SMALL.cache_tokens  # type: ignore[assignment]
                if need <= free[there] or rule.by == "share" or at == len(devices) - 1:
                    break
                at += 1
            free[there] -= need
            if rule.store:
                read[there] = max(read.get(there, 0), 0 if page.row_nbytes else page.nbytes)
            else:
                held.add((page.name, there))
            where[row] = there
        if any(free[d] < 0 for d in {where[row] for row in mine}):
            raise MemoryError(rule)
    return where, {row: rules[i].store for row, i in owner.items() if rules[i].store}


def random_rule(rng: random.Random, graph: TaskGraph, topology: Topology) -> Rule:
    parts = rng.choice(list(graph.rows)).split(".")[: rng.randint(1, 4)]
    for i, part in enumerate(parts):
        if part.isdecimal() and rng.random() < 0.6:
            parts[i] = rng.choice(["*", f"{max(0, int(part) - rng.randint(0, 2))}-{int(part) + rng.randint(0, 3)}"])
        elif rng.random() < 0.15:
            parts[i] = rng.choice(["*", part[:3] + "*"])
    names = [d.name for d in topology.compute_devices]
    on = tuple(rng.sample(names, rng.randint(1, len(names))))
    store = "disk" if topology.by_kind("DISK") and rng.random() < 0.3 else ""
    if rng.random() < 0.4:
        return Rule(".".join(parts), on, "share", tuple(rng.choice([1, 2, 3.5, 10]) for _ in on), store)
    if rng.random() < 0.3:
        on = tuple(rng.sample(sorted({*on, *(d.kind for d in topology.compute_devices), "SIM"}), 2))
    return Rule(".".join(parts), on, rng.choice(["order", "popularity"]), (), store)


def compare_with_reference(seed: int) -> str:
    """The same result, or the same kind of refusal; says which."""
    rng = random.Random(seed)
    graph = random_model(rng)
    topology = random_machine(rng, int(graph.nbytes * rng.choice([0.1, 0.3, 1, 10])))
    placement = Placement(tuple(random_rule(rng, graph, topology) for _ in range(rng.randint(1, 5))))
    try:
        where, homes = reference(placement.rules, graph, topology)
    except MemoryError:
        with pytest.raises(OutOfMemory, match=r"^placement rules? '.* are lacking; .*(more memory, or|would fit|add)"):
            placement.resolve(graph, topology, SMALL)
        return "does not fit"
    except ValueError:
        with pytest.raises(InvalidInput, match=r"^placement rule '.*(matches nothing|wholly overridden|names )"):
            placement.resolve(graph, topology, SMALL)
        return "does nothing"
    assert placement.resolve(graph, topology, SMALL) == where
    assert placement.homes(graph, topology) == homes
    return "placed"


def test_random_rules_agree_with_a_naive_reference() -> None:
    outcomes = Counter(compare_with_reference(seed) for seed in range(600))
    assert min(outcomes[key] for key in ("placed", "does not fit", "does nothing")) > 60, outcomes


def remedied(rule: Rule, message: str) -> list[Rule]:
    """The rule with each change that the message says would do."""
    changed = []
    if found := re.search(r"shares = \[(.*)\] would fit", message):
        changed.append(replace(rule, shares=tuple(map(int, found[1].split(", ")))))
    if found := re.search(r"add (\S+) to its devices", message):
        changed.append(replace(rule, on=(*rule.on, found[1])))
    if found := re.search(r'store = "(\w+)"', message):
        changed.append(replace(rule, store=found[1]))
    return changed


def refusal(rule: Rule, graph: TaskGraph, topology: Topology) -> str:
    try:
        Placement((rule,)).resolve(graph, topology, SMALL)
    except InvalidInput as error:
        return str(error)
    return ""


def test_every_remedy_works() -> None:
    worked: Counter[str] = Counter()
    for seed in range(1200):
        rng = random.Random(seed)
        graph = random_model(rng)
        topology = random_machine(rng, int(graph.nbytes * rng.choice([0.1, 0.3])))
        rule = random_rule(rng, graph, topology)
        for better in remedied(rule, refusal(rule, graph, topology)):
            assert Placement((better,)).resolve(graph, topology, SMALL), f"{seed}: {rule}"
            worked["shares" if better.shares != rule.shares else "on" if better.on != rule.on else "store"] += 1
    assert min(worked[key] for key in ("shares", "on", "store")) > 5, worked


@pytest.mark.slow
def test_many_random_rules_agree_with_a_naive_reference() -> None:
    for seed in range(1000, 9000):
        compare_with_reference(seed)
