"""Recorded routing: what routers chose, token by token, however it was computed; kept in a file, and refused where the
file is not what was written."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from configs import TINY_V3
from safetensors.numpy import save
from safetensors.torch import save as save_torch

from ciuic_runtime import LLM, Model, SamplingParams
from ciuic_runtime.devices.errors import InvalidInput
from ciuic_runtime.devices.spec import Topology
from ciuic_runtime.engine.engine import Engine
from ciuic_runtime.engine.routing import RoutingRecorder, read_routing, write_routing
from ciuic_runtime.models.random_checkpoint import write_random_checkpoint
from ciuic_runtime.ops.native import kernels
from ciuic_runtime.schedulers.replay import Routing, with_popularity

PROMPTS = [[5, 250, 17, 99, 3, 42, 200, 7, 31], [9, 8, 7]]
LAYERS, EXPERTS, K = (1, 2, 3), 8, 3  # of the tiny DeepSeek-V3
native = pytest.mark.skipif(kernels() is None, reason="the native kernels are not built here")


def recorded(model: Path, here: Topology, tokens: int = 6, **settings: Any) -> Routing:
    with LLM(model, devices=here, max_model_len=128, **({"max_num_seqs": 1, "threads": 1} | settings)) as llm:
        recorder = llm.record_routing()
        llm.generate(PROMPTS, SamplingParams(max_tokens=tokens, ignore_eos=True))
        return recorder.routing()


@pytest.fixture(scope="module")
def routing(tiny_v3: Path, here: Topology) -> Routing:
    """Two prompts, one after the other, in float32."""
    return recorded(tiny_v3, here, dtype="float32")


def same(a: Routing, b: Routing) -> bool:
    arrays = np.array_equal(a.ids, b.ids) and np.array_equal(a.step, b.step)
    return arrays and replace(a, ids=b.ids, step=b.step) == b


def rows(routing: Routing) -> list[bytes]:
    """Tokens' experts, in whatever order they were computed."""
    return sorted(np.sort(ids, axis=-1).tobytes() for ids in routing.ids)


# What is recorded


def test_every_token_that_was_computed_has_its_experts_in_every_layer(routing: Routing) -> None:
    assert (routing.layers, routing.num_experts) == (LAYERS, EXPERTS)
    assert routing.ids.shape == (len(PROMPTS[0]) + len(PROMPTS[1]) + 2 * 5, 3, K)
    assert routing.ids.min() >= 0
    assert routing.ids.max() < EXPERTS
    assert all(len(set(ids)) == K for token in routing.ids.tolist() for ids in token), "each expert once"
    sizes = np.bincount(routing.step).tolist()
    assert sizes == [9, 1, 1, 1, 1, 1, 3, 1, 1, 1, 1, 1], "tokens of each pass"


def test_sizes_are_those_of_the_models_pages(routing: Routing, tiny_v3: Path) -> None:
    graph = Model(tiny_v3, "float32").graph
    assert routing.expert_nbytes == graph.pages["layers.2.experts.5"].nbytes
    assert routing.other_nbytes + 3 * EXPERTS * routing.expert_nbytes == graph.nbytes


@native
def test_chunks_company_and_paging_change_the_passes_and_no_tokens_experts(tiny_int4: Path, here: Topology) -> None:
    plain = recorded(tiny_int4, here)
    for settings in (
        {"prefill_chunk": 4},
        {"max_num_seqs": 2},
        {"threads": 2, "paged": False},
        {"kernels": "portable"},
    ):
        found = recorded(tiny_int4, here, **settings)
        assert (rows(found) == rows(plain)) or "kernels" in settings
        assert found.tokens == plain.tokens
    graph = Model(tiny_int4).graph
    need = graph.working_bytes(1, 96, 128) + graph.kv_bytes_per_token * 128
    assert same(recorded(tiny_int4, here, memory={"cpu": int(need + graph.nbytes / 3)}), plain)


@native
def test_what_was_recorded_is_what_was_taken_from_memory(tiny_int4: Path, here: Topology) -> None:
    with LLM(tiny_int4, devices=here, max_model_len=128, max_num_seqs=1) as llm:
        llm.memory.set_budget("cpu", llm.memory.reserved + llm.memory.minimum)
        recorder, before = llm.record_routing(), routed_uses(llm)
        llm.generate(PROMPTS, SamplingParams(max_tokens=6, ignore_eos=True))
        hits, misses = (now - then for now, then in zip(routed_uses(llm), before, strict=True))
        assert hits + misses == sum(len(used) for _, _, used in recorder.routing().uses())
        assert misses > 0


def routed_uses(llm: LLM) -> tuple[int, int]:
    counts = llm.memory.state.counts
    return counts.routed_hits, counts.routed_misses


def test_a_pass_that_did_not_come_to_its_end_is_left_out(tiny_v3: Path) -> None:
    recorder = RoutingRecorder(Model(tiny_v3).graph)
    with pytest.raises(InvalidInput, match="no pass came to its end"):
        recorder.routing()
    for layer in (1, 2):
        recorder.record(layer, torch.tensor([[0, 1, 2], [3, 4, 5]]))
    for layer in LAYERS:
        recorder.record(layer, torch.tensor([[layer, 6, 7]]))
    for layer in (1, 2):
        recorder.record(layer, torch.tensor([[0, 1, 2], [3, 4, 5]]))
    found = recorder.routing()
    assert found.ids.tolist() == [[[1, 6, 7], [2, 6, 7], [3, 6, 7]]]
    assert found.step.tolist() == [0]


def test_a_model_without_routed_experts_has_nothing_to_record(tmp_path: Path) -> None:
    config = {"model_type": "llama", "vocab_size": 300, "hidden_size": 64, "intermediate_size": 64,
              "num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1,
              "max_position_embeddings": 64}  # fmt: skip
    with pytest.raises(InvalidInput, match="has no routed experts"):
        RoutingRecorder(Model(write_random_checkpoint(config, tmp_path / "dense")).graph)


def test_popularity_is_expected_uses_per_token(routing: Routing, tiny_v3: Path) -> None:
    liked = routing.popularity()
    assert liked.shape == (3, EXPERTS)
    assert liked.sum(axis=1) == pytest.approx([K] * 3)
    first, second = routing.halves()
    assert first.tokens + second.tokens == routing.tokens
    assert first.step.max() < second.step.min(), "no pass is in both"
    whole = first.popularity() * first.tokens + second.popularity() * second.tokens
    assert whole == pytest.approx(liked * routing.tokens)
    graph = with_popularity(Model(tiny_v3).graph, routing)
    for i, layer in enumerate(LAYERS):
        assert graph.by_name[f"layers.{layer}.experts"].popularity == pytest.approx(tuple(liked[i]))


@pytest.mark.parametrize("changes", [{"num_hidden_layers": 3}, {"n_routed_experts": 16}, {"first_k_dense_replace": 2}])
def test_a_recording_of_another_model_is_refused(
    changes: dict[str, int], routing: Routing, tmp_path: Path, here: Topology
) -> None:
    write_routing(routing, tmp_path / "routing")
    other = write_random_checkpoint(TINY_V3 | changes, tmp_path / "other")
    with pytest.raises(InvalidInput, match=r"the recording is of tiny-v3, whose layers .* are not those of other"):
        LLM(other, devices=here, routing=tmp_path / "routing")


# What is kept


def test_a_recording_is_read_as_it_was_written(routing: Routing, tmp_path: Path) -> None:
    write_routing(routing, tmp_path / "routing")
    assert same(read_routing(tmp_path / "routing"), routing)


ABOUT = {"version": 1, "model": "m", "layers": [1, 2], "num_experts": 4, "expert_nbytes": 10, "other_nbytes": 0}
IDS = np.array([[[0, 1], [2, 3]]] * 10, dtype=np.int32)
STEP = np.arange(10, dtype=np.int32)
DAMAGED: list[dict[str, Any]] = [
    {"about": "[1]"}, {"about": "{"}, {"about": '"a"'}, {"about": "0"}, {"about": "[" * 100_000}, {"version": 2},
    {"layers": None}, {"layers": []}, {"layers": [1]}, {"layers": "ab"}, {"model": ...},
    {"num_experts": 3}, {"num_experts": 0}, {"num_experts": -4}, {"num_experts": None}, {"num_experts": "x"},
    {"num_experts": float("nan")}, {"num_experts": float("inf")}, {"expert_nbytes": 0},
    {"expert_nbytes": float("inf")}, {"other_nbytes": -1}, {"ids": -IDS - 1}, {"ids": IDS + 2}, {"ids": IDS[0]},
    {"ids": IDS[:, :, :0]}, {"ids": IDS[:5]}, {"ids": IDS.astype(np.int64) + 2**40},
    {"ids": IDS.astype(np.float32) * np.float32("nan")}, {"ids": None}, {"step": STEP[::-1]},
    {"step": STEP[::-1].astype(np.uint8)}, {"step": np.stack([STEP, STEP], axis=1)}, {"step": STEP[:9]},
    {"step": np.array(3)}, {"step": STEP * np.float32("nan")}, {"step": STEP.astype(np.int64) << 33}, {"step": None},
    {"ids": IDS[:0], "step": STEP[:0]},
]  # fmt: skip


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("changes", DAMAGED, ids=lambda c: ", ".join(f"{k} {str(v)[:20]!r}" for k, v in c.items()))
def test_a_damaged_recording_is_refused_in_one_line(changes: dict[str, Any], tmp_path: Path) -> None:
    given = {"ids": IDS, "step": STEP, "about": None, **changes}
    about = {k: v for k, v in {**ABOUT, **changes}.items() if k in ABOUT and v is not ...}
    tensors = {k: np.ascontiguousarray(given[k]) for k in ("ids", "step") if given[k] is not None}
    (tmp_path / "routing").write_bytes(save(tensors, {"ciuic_routing": given["about"] or json.dumps(about)}))
    with pytest.raises(InvalidInput, match=r"is not a recording of routing|is damaged") as refused:
        read_routing(tmp_path / "routing")
    assert "\n" not in str(refused.value)


def test_files_that_are_something_else_are_refused(tiny_v3: Path, tmp_path: Path) -> None:
    whole = save({"ids": IDS, "step": STEP}, {"ciuic_routing": json.dumps(ABOUT)})
    (tmp_path / "good").write_bytes(whole)
    read_routing(tmp_path / "good")
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "cut").write_bytes(whole[:-5])
    (tmp_path / "text").write_text("routing")
    tensors = {"ids": torch.zeros(4, 2, 2, dtype=torch.bfloat16), "step": torch.zeros(4, dtype=torch.int32)}
    (tmp_path / "bfloat16").write_bytes(save_torch(tensors, {"ciuic_routing": json.dumps(ABOUT)}))
    for file in ("empty", "cut", "text", "bfloat16", "missing", "."):
        with pytest.raises(InvalidInput, match=r"is not a recording of routing|is damaged"):
            read_routing(tmp_path / file)
    with pytest.raises(InvalidInput, match="make one with: ciuic run MODEL --record-routing FILE"):
        read_routing(tiny_v3 / "model.safetensors")


# On the command line


def test_replay_says_what_it_found_in_a_table_and_as_json(ciuic, routing: Routing, tmp_path: Path) -> None:
    write_routing(routing, tmp_path / "routing")
    memory = f"cpu={routing.other_nbytes + 10 * routing.expert_nbytes}"
    found = ciuic("replay", tmp_path / "routing", "--memory", memory, "--json").json
    assert found.keys() >= {
        "schema_version",
        "model",
        "capacity",
        "experts",
        "chosen",
        "scores",
        "stationary",
        "belady",
    }
    assert (found["model"], found["capacity"], found["experts"]) == ("tiny-v3", 10, 24)
    for score in (*found["scores"], found["stationary"], found["belady"]):
        assert 0 <= score["hit_rate"] <= 1
        assert score["bytes_per_token"] >= 0
    rates = [score["hit_rate"] for score in found["scores"]]
    assert rates == sorted(rates, reverse=True)
    table = ciuic("replay", tmp_path / "routing", "--memory", memory)
    assert table.code == 0
    first, heading, *lines, last = table.out.splitlines()
    assert first == "tiny-v3: room for 10 of 24 experts"
    assert heading.split() == ["policy", "hit", "rate", "read", "per", "token"]
    assert len(lines) == 2 + len(rates)
    assert sum("by hindsight" in line for line in lines) == 2
    assert last.startswith(f"use: --cache-policy {found['chosen']}")


def test_replay_needs_one_memory_and_enough_of_it(ciuic, routing: Routing, tmp_path: Path) -> None:
    write_routing(routing, tmp_path / "routing")
    for memory, says in (
        (f"cpu={routing.other_nbytes}", "no room for an expert"), ("cpu=1KiB", "no room for an expert"),
        ("", "one device's memory"), ("cpu=1GiB,cpu:1=1GiB", "one device's memory"), ("much", "cpu=16GiB"),
    ):  # fmt: skip
        done = ciuic("replay", tmp_path / "routing", "--memory", memory)
        assert (done.code, done.out, done.err.count("\n")) == (2, "", 1)
        assert says in done.err
    assert "--memory" in ciuic("replay", tmp_path / "routing").err


def test_a_place_that_cannot_be_written_is_said_before_the_model_is_loaded(
    ciuic, tiny_v3: Path, here_toml: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LLM, "__init__", lambda *a, **k: pytest.fail("it was loaded"))
    done = ciuic("run", tiny_v3, "--prompt", "x", "--devices", here_toml, "--record-routing", tmp_path / "no/routing")
    assert (done.code, done.err.count("\n")) == (2, 1)
    assert "is missing or not writable" in done.err


def test_a_run_stopped_before_its_first_pass_shows_what_there_is(
    ciuic, tiny_v3: Path, here_toml: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(self: Engine) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(Engine, "step", interrupted)
    arguments = ("run", tiny_v3, "--prompt", "x", "--devices", here_toml, "--record-routing", tmp_path / "routing")
    done = ciuic(*arguments, "--json")
    assert done.code == 130
    assert done.json["finish_reason"] == "interrupted"
    assert not (tmp_path / "routing").exists()


@native
def test_the_same_tokens_with_and_without_a_recording_of_popularity(
    ciuic, tiny_int4: Path, here_toml: Path, tmp_path: Path
) -> None:
    asked = ("run", tiny_int4, "--prompt", "Experts", "--max-tokens", 12, "--ignore-eos")
    asked += ("--devices", here_toml, "--json")
    plain = ciuic(*asked, "--record-routing", tmp_path / "routing").json
    found = read_routing(tmp_path / "routing")
    assert found.tokens == len(plain["prompt_token_ids"]) + 11
    graph = Model(tiny_int4).graph
    memory = graph.working_bytes(1, 7, 19) + graph.kv_bytes_per_token * 19 + found.other_nbytes
    for options in (("--cache-policy", "popularity", "--lookahead", 0), ("--io-threads", 1), ("--lookahead", 3)):
        limited = ("--memory", f"cpu={int(memory + 5 * found.expert_nbytes)}", "--routing", tmp_path / "routing")
        done = ciuic(*asked, *limited, *options)
        assert done.code == 0, done.out
        assert done.json["token_ids"] == plain["token_ids"]
        assert done.json["paging"]["decode"]["misses"] > 0


@native
def test_a_paged_plan_is_saved_edited_and_carried_out_to_the_letter(
    ciuic, tiny_int4: Path, here_toml: Path, tmp_path: Path
) -> None:
    graph, saved = Model(tiny_int4).graph, tmp_path / "plan.json"
    memory = f"cpu={int(graph.working_bytes(1, 8, 24) + graph.kv_bytes_per_token * 24 + graph.nbytes / 2)}"
    planned = ("--memory", memory, "--prompt-tokens", 8, "--max-tokens", 16, "--save", saved)
    plan = ciuic("plan", tiny_int4, "--devices", here_toml, *planned, "--json").json
    assert plan["predicted"]["bound_by"] == "reads from disk"
    assert plan["paging"].keys() == {"device", "disk", "cache_bytes", "policy", "lookahead"}
    assert {row["home"] for row in plan["assignments"]} == {"cpu", "disk"}
    asked = ("run", tiny_int4, "--prompt", "Experts", "--max-tokens", 16, "--ignore-eos")
    asked += ("--devices", here_toml, "--json")
    expected = ciuic(*asked).json["token_ids"]
    document = json.loads(saved.read_text())
    largest = max(page.nbytes for page in graph.pages.values())

    def edited(paging: dict[str, Any], home: str | None = None) -> Any:
        rows = [row | ({"home": home} if home else {}) for row in document["assignments"]]
        saved.write_text(json.dumps(document | {"paging": document["paging"] | paging, "assignments": rows}))
        return ciuic(*asked, "--schedule", saved)

    for paging, home in (
        ({}, None), ({"cache_bytes": largest, "lookahead": 0}, None), ({"policy": "pin", "lookahead": 60}, "disk"),
        ({"policy": "popularity"}, "cpu"),
    ):  # fmt: skip
        done = edited(paging, home)
        assert done.code == 0, (paging, home, done.out)
        assert done.json["token_ids"] == expected
        assert done.json["schedule"]["paging"] == document["paging"] | paging
    for paging, says in (
        ({"cache_bytes": largest - 1}, "one page at a time"), ({"cache_bytes": 1 << 50}, "can be used"),
        ({"policy": "best"}, "cache policy 'best'"), ({"lookahead": -1}, "lookahead"), ({"device": "sim:0"}, "disk"),
        ({"disk": "disk:7"}, "disk:7"), ({"more": 1}, "unknown key more"),
    ):  # fmt: skip
        done = edited(paging)
        assert done.code == 2, paging
        assert says in done.json["error"]["message"]


@native
def test_a_schedule_of_before_there_was_paging_is_still_read(
    ciuic, tiny_int4: Path, here_toml: Path, tmp_path: Path
) -> None:
    saved = tmp_path / "plan.json"
    ciuic("plan", tiny_int4, "--devices", here_toml, "--prompt-tokens", 8, "--max-tokens", 8, "--save", saved)
    document = json.loads(saved.read_text())
    assert document.pop("paging") is None
    saved.write_text(json.dumps(document))
    done = ciuic("run", tiny_int4, "--prompt", "Experts", "--max-tokens", 4, "--schedule", saved, "--json")
    assert done.code == 0
    assert done.json["paging"] is None
