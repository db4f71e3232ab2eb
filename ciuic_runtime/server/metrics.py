"""Figures for Prometheus: what clients ask and get, and what the engine does for them.
Knows names, units and buckets; the engine's own counts are read from it when they are asked for, and not kept here."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from statistics import median

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from prometheus_client.registry import Collector

from ciuic_runtime import __version__
from ciuic_runtime.engine.service import EngineService, PassInfo

SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 30.0, 60.0)
ERRORS = (0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1.0, 2.0, 5.0)  # 0.1: a tenth longer or shorter
RECENT_PASSES = 100

# What labels may say; everything else is "other", so that no client can make more of them.
ENDPOINTS = frozenset({"chat.completions", "completions"})
REASONS = frozenset({"stop", "length", "interrupted", "error"})


class Metrics:
    """Of one server: a process may have several. `passed` is called in the engine's thread, the rest in the event
    loop's."""

    content_type = CONTENT_TYPE_PLAIN_0_0_4

    def __init__(self, service: EngineService) -> None:
        self._registry = registry = CollectorRegistry()
        self._begun = Gauge(
            "ciuic_requests_in_progress", "Requests of clients that are being answered", ["endpoint"], registry=registry
        )
        self._ended = Counter(
            "ciuic_requests", "Answers by HTTP status; 499: the client went away", ["endpoint", "status"],
            registry=registry,
        )  # fmt: skip
        self._finished = Counter(
            "ciuic_requests_finished", "Generations by why they ended", ["reason"], registry=registry
        )
        self._first_token = Histogram(
            "ciuic_time_to_first_token_seconds", "From a request to its first token", buckets=SECONDS, registry=registry
        )
        self._token = Histogram(
            "ciuic_time_per_token_seconds", "From a token to the next one of its answer", buckets=SECONDS,
            registry=registry,
        )  # fmt: skip
        self._pass = Histogram("ciuic_pass_seconds", "Passes through the model", buckets=SECONDS, registry=registry)
        self._error = Histogram(
            "ciuic_pass_forecast_error_ratio", "|actual / forecast - 1| of passes", buckets=ERRORS, registry=registry
        )
        self._engine = EngineFigures(service)
        registry.register(self._engine)
        service.on_pass = self.passed

    def request_began(self, endpoint: str) -> None:
        self._begun.labels(_one_of(ENDPOINTS, endpoint)).inc()

    def first_token(self, seconds: float) -> None:
        self._first_token.observe(seconds)

    def token(self, seconds: float) -> None:
        self._token.observe(seconds)

    def request_ended(self, endpoint: str, status: int, finish_reason: str | None) -> None:
        """`finish_reason` None: nothing was generated to an end."""
        endpoint = _one_of(ENDPOINTS, endpoint)
        self._begun.labels(endpoint).dec()
        self._ended.labels(endpoint, status if 100 <= status < 600 else "other").inc()
        if finish_reason is not None:
            self._finished.labels(_one_of(REASONS, finish_reason)).inc()

    def passed(self, done: PassInfo) -> None:
        self._pass.observe(done.seconds)
        if done.forecast_seconds:
            error = abs(done.seconds / done.forecast_seconds - 1)
            self._error.observe(error)
            self._engine.missed(error)

    def render(self) -> bytes:
        return generate_latest(self._registry)


class EngineFigures(Collector):
    """What the engine counts itself, and how far off the last forecasts were."""

    def __init__(self, service: EngineService) -> None:
        self._service = service
        self._errors: deque[float] = deque(maxlen=RECENT_PASSES)
        self._lock = threading.Lock()  # the engine's thread writes them

    def missed(self, error: float) -> None:
        with self._lock:
            self._errors.append(error)

    def collect(self) -> Iterator[Metric]:
        stats = self._service.stats()
        for name, value, what in (
            ("requests_running", stats.running, "Generations that take part in passes"),
            ("requests_waiting", stats.waiting, "Generations that wait for their turn"),
            ("kv_blocks", stats.kv_blocks, "Blocks of the KV cache, 64 tokens each"),
            ("kv_blocks_used", stats.kv_blocks_used, "Blocks that running generations hold"),
            ("kv_blocks_cached", stats.kv_blocks_cached, "Blocks kept for prompts that begin alike; given up at need"),
            (
                "pass_forecast_error_median",
                self._median(),
                f"|actual / forecast - 1| of the last {RECENT_PASSES} passes",
            ),
            ("page_cache_hit_ratio", stats.page_hit_rate, "Weight pages that were in memory when they were needed"),
            ("pages_resident_bytes", stats.pages_bytes_resident, "Weight pages in memory"),
            ("pages_budget_bytes", stats.pages_budget_bytes, "Memory that weight pages may take"),
        ):
            if value is not None:
                yield GaugeMetricFamily(f"ciuic_{name}", what, value)
        for name, count, what in (
            ("prompt_tokens", stats.prompt_tokens, "Tokens of prompts"),
            ("cached_prompt_tokens", stats.cached_prompt_tokens, "Tokens of prompts that were found in the KV cache"),
            ("generated_tokens", stats.generated_tokens, "New tokens"),
            ("preemptions", stats.preemptions, "Times that a generation gave its blocks to others and began again"),
            ("passes", stats.passes, "Passes through the model"),
        ):
            yield CounterMetricFamily(f"ciuic_{name}", what, count)
        yield self._build()

    def _median(self) -> float | None:
        with self._lock:
            return median(self._errors) if self._errors else None

    def _build(self) -> InfoMetricFamily:
        llm = self._service.llm
        labels = {
            "version": __version__, "model": llm.model.spec.name, "format": llm.model.format,
            "policy": llm.schedule.policy,
        }  # fmt: skip
        return InfoMetricFamily("ciuic_build", "What runs here", labels)


def _one_of(known: frozenset[str], value: str) -> str:
    return value if value in known else "other"
