"""What does not fit is refused before loading, or reduced where the user left it open; and it is said."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import pytest

import ciuic_runtime as ciuic
from ciuic_runtime.models.config import read_config
from ciuic_runtime.planning import plan


@pytest.fixture
def weights(tiny_v3: Path) -> int:
    return ciuic.Model(tiny_v3).graph.nbytes


def limited(topology: ciuic.Topology, nbytes: int) -> ciuic.Topology:
    """The same machine with less memory."""
    small = tuple(replace(d, memory_bytes=nbytes, memory_free_bytes=None) for d in topology.devices if d.kind == "CPU")
    return ciuic.Topology(small)


def test_context_and_batch_shrink_only_where_nobody_set_them(
    tiny_v3: Path, here: ciuic.Topology, weights: int, caplog: pytest.LogCaptureFixture
) -> None:
    with ciuic.LLM(tiny_v3, devices=here) as llm:
        roomy = (llm.context, llm.max_num_seqs)
    tight = limited(here, weights + (1 << 20))
    with caplog.at_level(logging.WARNING, logger="ciuic"), ciuic.LLM(tiny_v3, devices=tight) as llm:
        assert (llm.context, llm.max_num_seqs) < roomy
        assert llm.schedule.predicted is not None
        assert llm.schedule.predicted.memory_bytes["cpu"] <= weights + (1 << 20)
        assert len(llm.generate([1, 2, 3], ciuic.SamplingParams(max_tokens=4, ignore_eos=True))[0].token_ids) == 4
    assert "reduced to what fits" in caplog.text
    with pytest.raises(ciuic.OutOfMemory, match="can be used"):
        ciuic.LLM(tiny_v3, devices=tight, max_model_len=512, max_num_seqs=64)


def test_a_model_larger_than_memory_is_refused_before_its_weights_are_read(
    tiny_v3: Path, here: ciuic.Topology, weights: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ciuic_runtime.models.safetensors_checkpoint import SafetensorsCheckpoint

    monkeypatch.setattr(SafetensorsCheckpoint, "load", lambda *a: pytest.fail("a weight was read"))
    for settings in ({"paged": False}, {"dtype": "float32"}, {"kernels": "reference"}):
        with pytest.raises(ciuic.OutOfMemory) as refused:
            ciuic.LLM(tiny_v3, devices=limited(here, weights // 2), **settings)
        assert "\n" not in str(refused.value)
        assert "cpu" in str(refused.value) or "native kernels" in str(refused.value)


def test_less_than_the_largest_page_is_refused_with_what_would_do(
    tiny_v3: Path, here: ciuic.Topology, weights: int
) -> None:
    with pytest.raises(ciuic.OutOfMemory, match=r"needs at least .* one page at a time .* would hold everything"):
        ciuic.LLM(tiny_v3, devices=limited(here, weights // 20), max_model_len=64, max_num_seqs=1)


def test_the_budget_counts_weights_cache_and_working_memory(tiny_v3: Path, here: ciuic.Topology, weights: int) -> None:
    work = ciuic.Workload(prompt_tokens=400, max_tokens=100, batch=2)
    schedule = plan(ciuic.Model(tiny_v3), here, workload=work)
    assert schedule.predicted is not None
    need = schedule.predicted.memory_bytes["cpu"]
    spec = ciuic.Model(tiny_v3).spec
    assert need >= weights + spec.kv_bytes_per_token() * 2 * 500
    plan(ciuic.Model(tiny_v3), here, workload=work, memory={"cpu": need})
    paged = plan(ciuic.Model(tiny_v3), here, workload=work, memory={"cpu": need - 1})
    assert paged.paging is not None
    assert paged.paging.cache_bytes == weights - 1
    no_disk = here.only(d.name for d in here.compute_devices)
    with pytest.raises(ciuic.OutOfMemory):
        plan(ciuic.Model(tiny_v3), no_disk, workload=work, memory={"cpu": need - 1})


def test_requests_queue_when_the_cache_is_small(tiny_v3: Path, here: ciuic.Topology) -> None:
    params = ciuic.SamplingParams(max_tokens=6, ignore_eos=True)
    prompts = [[i + 1] * (5 + i) for i in range(7)]
    with ciuic.LLM(tiny_v3, devices=here, max_model_len=64, max_num_seqs=2, dtype="float32") as llm:
        queued = llm.generate(prompts, params)
    with ciuic.LLM(tiny_v3, devices=here, max_model_len=64, max_num_seqs=1, dtype="float32") as llm:
        alone = [llm.generate(p, params)[0] for p in prompts]
    assert [o.token_ids for o in queued] == [o.token_ids for o in alone]
    assert [o.index for o in queued] == list(range(7))


@pytest.mark.parametrize("name", ["deepseek-v3.2", "deepseek-v4-flash"])
def test_models_that_are_only_counted_say_so(name: str) -> None:
    model = ciuic.Model(name)
    assert model.graph.parameters > 2e11
    assert model.spec.why_not_runnable


def test_a_checkpoint_that_cannot_be_run_is_refused(tmp_path: Path) -> None:
    import json
    from importlib import resources

    config = json.loads((resources.files("ciuic_runtime.models") / "known" / "deepseek-v3.2.json").read_text())
    assert read_config(config).why_not_runnable
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ciuic.InvalidInput) as refused:
        ciuic.LLM(tmp_path)
    assert "\n" not in str(refused.value)
