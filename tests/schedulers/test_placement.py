"""The user's rules: what patterns mean, how devices share, and that every error names its rule."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from machines import CPU_AND_GPU, DISK, device, machine, model, toy_graph, toy_task

from ciuic_runtime.devices.errors import InvalidInput, OutOfMemory
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
        OutOfMemory, match=r"'layers.1.experts on cuda:0, cpu' cannot fit: its share on cuda:0 is .* too"
    ):
        put("layers.1.experts", ["cuda:0", "cpu"], shares=[3, 1]).resolve(MODEL, topology, SMALL)


def test_a_rule_that_cannot_fit_gives_the_figures() -> None:
    topology = machine(device("cuda:0", memory=room_for(MODEL, "layers.1.experts.0")), device("cpu"))
    with pytest.raises(
        OutOfMemory, match=r"'layers.1 on cuda:0' cannot fit: layers.1.\w+ needs .*iB.* left .*iB on cuda:0; name"
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


def test_a_rule_cannot_name_a_disk() -> None:
    with pytest.raises(InvalidInput, match=r"'head on disk' names device disk; devices that can compute are cpu$"):
        put("head", "disk").resolve(MODEL, machine(device("cpu"), DISK))


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
    ],
)
def test_bad_rules(args: tuple[Any, ...], message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        put(*args)


def test_shares_need_single_devices() -> None:
    with pytest.raises(InvalidInput, match=r"with shares, \* must name one device, not cpu, cuda:0"):
        put("layers.*", "*", shares=[1]).resolve(MODEL, CPU_AND_GPU)


def test_from_toml(tmp_path: Path) -> None:
    file = tmp_path / "rules.toml"
    file.write_text(
        '[[put]]\npattern = "layers.*.experts"\non = ["cuda:0", "cpu"]\nby = "share"\nshares = [1, 3.5]\n'
        '[[put]]\npattern = "head"\non = "cpu"\n'
    )
    assert Placement.from_toml(file) == put("layers.*.experts", ["cuda:0", "cpu"], shares=[1, 3.5]).put("head", "cpu")
    file.write_text("")
    assert Placement.from_toml(file) == Placement()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[[put]", "is not TOML"),
        ("\xff", "is not TOML"),
        ("x = 1", "unknown key x"),
        ("put = 5", r"put is 5; rules are \[\[put\]\] tables"),
        ("put = [5]", "rule 1: a rule has pattern, on"),
        ('[[put]]\npattern = "head"', "rule 1: a rule has pattern, on"),
        ('[[put]]\npattern = "head"\non = "cpu"\nwhere = 1', "rule 1: a rule has pattern, on"),
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


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=r"cannot read placement .*No such file"):
        Placement.from_toml(tmp_path / "none.toml")


def test_toy_graphs_can_be_placed() -> None:
    graph = toy_graph(toy_task("a"), toy_task("b", after=("a",)))
    assert put("b", "cuda:0").resolve(graph, CPU_AND_GPU) == {"b": "cuda:0"}
