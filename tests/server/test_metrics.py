"""Figures are in Prometheus's form, say what clients were given and what the engine counted, and stay few."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families
from running import Running, opened, running

import ciuic_runtime
from ciuic_runtime.devices.spec import Topology
from ciuic_runtime.engine.service import EngineService, PassInfo
from ciuic_runtime.ops.native import kernels
from ciuic_runtime.server.metrics import Metrics

Serve = Callable[..., AbstractContextManager[Running]]
Figures = dict[str, float]


def families(text: str) -> dict[str, Any]:
    return {family.name: family for family in text_string_to_metric_families(text)}


def figures(server: Running | Metrics) -> Figures:
    """By name and labels as they are written: `name{label="value"}`."""
    text = server.render().decode() if isinstance(server, Metrics) else httpx.get(f"{server.url}/metrics").text
    found: Figures = {}
    for family in families(text).values():
        for sample in family.samples:
            labels = ",".join(f'{key}="{value}"' for key, value in sample.labels.items())
            found[f"{sample.name}{{{labels}}}" if labels else sample.name] = sample.value
    return found


def change(before: Figures, after: Figures, name: str) -> float:
    return after.get(name, 0.0) - before.get(name, 0.0)


def passed(seconds: float, forecast: float | None) -> PassInfo:
    return PassInfo(seconds, forecast, prompt_tokens=0, decode_tokens=1, running=1, waiting=0)


@pytest.fixture
def metrics(tiny_chat: Path, here: Topology) -> Any:
    with opened(tiny_chat, here) as llm:
        yield Metrics(EngineService(llm))


def test_what_is_written_is_what_prometheus_reads(tiny_server: Running) -> None:
    answer = httpx.get(f"{tiny_server.url}/metrics")
    assert answer.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    found = families(answer.text)
    assert all(name.startswith("ciuic_") for name in found)
    assert all(family.documentation for family in found.values())
    kinds = {name: family.type for name, family in found.items()}
    assert kinds["ciuic_prompt_tokens"] == kinds["ciuic_preemptions"] == kinds["ciuic_passes"] == "counter"
    assert kinds["ciuic_kv_blocks"] == kinds["ciuic_requests_running"] == kinds["ciuic_requests_waiting"] == "gauge"
    for name in ("time_to_first_token_seconds", "time_per_token_seconds", "pass_seconds", "pass_forecast_error_ratio"):
        assert kinds[f"ciuic_{name}"] == "histogram"
    [build] = found["ciuic_build_info"].samples
    schedule = tiny_server.service.llm.schedule
    assert build.value == 1
    assert build.labels["version"] == ciuic_runtime.__version__
    assert (build.labels["format"], build.labels["policy"]) == ("int4", schedule.policy)
    assert not any(name.startswith("ciuic_page") for name in found), "nothing is paged here"


def test_answers_and_their_tokens_are_counted(serve: Serve) -> None:
    with serve() as server:
        ask, before = server.client.chat.completions.create, figures(server)
        said: Any = [{"role": "user", "content": "x" * 80}]
        common = {"model": server.model, "messages": said, "extra_body": {"ignore_eos": True}}
        used = [ask(**common, max_tokens=5).usage, ask(**common, max_tokens=3, n=2).usage]
        for _ in ask(**common, max_tokens=7, stream=True):
            pass
        server.client.completions.create(model=server.model, prompt="x", max_tokens=2, extra_body={"ignore_eos": True})
        with pytest.raises(openai.BadRequestError):
            ask(**common, max_tokens=10_000)
        after = figures(server)

    def grew(name: str) -> float:
        return change(before, after, f"ciuic_{name}")

    assert grew('requests_total{endpoint="chat.completions",status="200"}') == 3
    assert grew('requests_total{endpoint="completions",status="200"}') == 1
    assert grew('requests_total{endpoint="chat.completions",status="400"}') == 1
    assert grew('requests_finished_total{reason="length"}') == 4
    assert after['ciuic_requests_in_progress{endpoint="chat.completions"}'] == 0
    assert grew("time_to_first_token_seconds_count") == 4
    assert grew("time_per_token_seconds_count") == 4 + 2 * 2 + 6 + 1
    assert grew("generated_tokens_total") == 5 + 6 + 7 + 2
    prompt, cached = used[0].prompt_tokens, grew("cached_prompt_tokens_total")
    assert grew("prompt_tokens_total") == 4 * prompt + len(server.service.llm.tokenizer.encode("x"))
    assert cached >= 3 * 64, "the first block of the prompt is found again"
    assert grew("passes_total") == grew("pass_seconds_count") >= 5 + 3 + 7 + 2
    assert after["ciuic_requests_running"] == after["ciuic_requests_waiting"] == after["ciuic_kv_blocks_used"] == 0
    assert 0 < after["ciuic_kv_blocks_cached"] <= after["ciuic_kv_blocks"]


def test_while_requests_run_and_wait_it_says_so(serve: Serve) -> None:
    with serve(llm={"max_num_seqs": 1}) as server:
        body = {"model": server.model, "prompt": "x", "max_tokens": 250, "ignore_eos": True, "n": 3, "seed": 1}
        thread = threading.Thread(target=lambda: httpx.post(f"{server.url}/v1/completions", json=body, timeout=60))
        thread.start()
        seen = []
        while thread.is_alive():
            seen.append(figures(server))
        thread.join()
    assert any(
        now["ciuic_requests_running"] == 1
        and now["ciuic_requests_waiting"] == 2
        and now["ciuic_kv_blocks_used"] >= 1
        and now['ciuic_requests_in_progress{endpoint="completions"}'] == 1
        for now in seen
    )


def test_forecasts_are_compared_with_what_passes_took(metrics: Metrics) -> None:
    assert "ciuic_pass_forecast_error_median" not in figures(metrics)
    for seconds, forecast in ((0.011, 0.010), (0.005, 0.010), (0.030, 0.010), (0.010, None)):
        metrics.passed(passed(seconds, forecast))
    now = figures(metrics)
    assert now["ciuic_pass_forecast_error_median"] == pytest.approx(0.5)
    assert now["ciuic_pass_forecast_error_ratio_count"] == 3
    assert now["ciuic_pass_forecast_error_ratio_sum"] == pytest.approx(0.1 + 0.5 + 2)
    assert now['ciuic_pass_forecast_error_ratio_bucket{le="0.15"}'] == 1
    assert now["ciuic_pass_seconds_count"] == 4
    for _ in range(100):
        metrics.passed(passed(0.010, 0.010))
    assert figures(metrics)["ciuic_pass_forecast_error_median"] == 0, "of the last 100"


def test_buckets_reach_from_a_millisecond_to_a_minute(metrics: Metrics) -> None:
    for seconds in (0.0005, 0.03, 59.0, 1000.0):
        metrics.first_token(seconds)
        metrics.token(seconds)
    now = figures(metrics)
    for name in ("ciuic_time_to_first_token_seconds", "ciuic_time_per_token_seconds"):
        assert [now[f'{name}_bucket{{le="{le}"}}'] for le in ("0.001", "0.05", "30.0", "60.0", "+Inf")] == [
            1,
            2,
            2,
            3,
            4,
        ]


def test_labels_stay_few_whatever_is_asked(metrics: Metrics) -> None:
    for i in range(1000):
        metrics.request_began(f"/{i}")
        metrics.request_ended(f"/{i}", 10_000 + i, f"reason {i}")
    now = figures(metrics)
    assert now['ciuic_requests_total{endpoint="other",status="other"}'] == 1000
    assert now['ciuic_requests_finished_total{reason="other"}'] == 1000
    assert sum(name.startswith("ciuic_requests_total{") for name in now) == 1


def test_servers_of_one_process_count_for_themselves(tiny_chat: Path, here: Topology) -> None:
    with opened(tiny_chat, here) as llm:
        first, second = Metrics(EngineService(llm)), Metrics(EngineService(llm))
        first.token(1.0)
        assert figures(first)["ciuic_time_per_token_seconds_count"] == 1
        assert figures(second)["ciuic_time_per_token_seconds_count"] == 0


def test_it_is_read_while_passes_run(metrics: Metrics) -> None:
    done = threading.Event()

    def pass_on() -> None:
        while not done.is_set():
            metrics.passed(passed(0.01, 0.02))

    thread = threading.Thread(target=pass_on)
    thread.start()
    try:
        for _ in range(50):
            metrics.render()
    finally:
        done.set()
        thread.join()
    now = figures(metrics)
    assert now["ciuic_pass_seconds_count"] == now["ciuic_pass_forecast_error_ratio_count"]


@pytest.mark.skipif(kernels() is None, reason="the native kernels are not built here")
def test_where_weights_are_paged_it_says_how_that_goes(tiny_chat: Path, here: Topology) -> None:
    with opened(tiny_chat, here) as llm:
        every, reserved = sum(llm.memory.pages.values()), llm.memory.reserved
    with opened(tiny_chat, here, memory={"cpu": reserved + every // 2}) as llm, running(llm) as server:
        body = {"model": server.model, "prompt": "x", "max_tokens": 4, "ignore_eos": True}
        assert httpx.post(f"{server.url}/v1/completions", json=body, timeout=60).status_code == 200
        now = figures(server)
    assert 0 <= now["ciuic_page_cache_hit_ratio"] <= 1
    assert 0 < now["ciuic_pages_resident_bytes"] <= now["ciuic_pages_budget_bytes"] == every // 2
