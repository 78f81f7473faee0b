"""Figures for Prometheus, in a registry of the app's own."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from ..adapters.mix import names_of
from ..engine.stats import EngineStats

if TYPE_CHECKING:
    from ..adapters.mix import AdapterSpec
    from ..outputs import RequestOutput

BASE, MIX = "(base)", "(mix)"  # labels that no adapter can be called
GAUGES = ("running", "waiting")  # of EngineStats; all others count
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5)


class Metrics:
    """What was asked, by adapter, and what the engine has counted."""

    def __init__(self, model: str) -> None:
        self.registry = CollectorRegistry()
        self._engine = _EngineCollector()
        self.registry.register(self._engine)
        labels = ["adapter"]
        self._requests = Counter(
            "multilora_requests",
            "Answers that ended, by their reason.",
            [*labels, "finish_reason"],
            registry=self.registry,
        )
        self._prompt = Counter(
            "multilora_adapter_prompt_tokens",
            "Tokens of prompts, also those from the prefix cache.",
            labels,
            registry=self.registry,
        )
        self._generated = Counter(
            "multilora_adapter_generated_tokens", "New tokens.", labels, registry=self.registry
        )
        self._first = Histogram(
            "multilora_time_to_first_token_seconds",
            "From a request's arrival in the engine to its first token.",
            labels,
            buckets=SECONDS,
            registry=self.registry,
        )
        self._gap = Histogram(
            "multilora_inter_token_seconds",
            "Between two outputs of a stream.",
            labels,
            buckets=TOKEN_SECONDS,
            registry=self.registry,
        )
        self._mean = Histogram(
            "multilora_time_per_output_token_seconds",
            "Mean time between two tokens of a request, from its first to its last.",
            labels,
            buckets=TOKEN_SECONDS,
            registry=self.registry,
        )
        info = Gauge(
            "multilora_model", "The base that is served.", ["name"], registry=self.registry
        )
        info.labels(model).set(1)

    def gap(self, adapter: AdapterSpec, seconds: float) -> None:
        """Between two outputs of a stream."""
        self._gap.labels(label_of(adapter)).observe(seconds)

    def ended(self, output: RequestOutput, reasons: Iterable[str], num_tokens: int) -> None:
        """Counts a request that has ended: why each answer did, and all their new tokens."""
        label, reasons = label_of(output.adapter), list(reasons)
        for reason in reasons:
            self._requests.labels(label, reason).inc()
        self._prompt.labels(label).inc(len(output.prompt_token_ids))
        self._generated.labels(label).inc(num_tokens)
        times = output.metrics
        if times is None or not times.first_token_ts:
            return
        self._first.labels(label).observe(times.first_token_latency)
        per_answer = num_tokens / max(len(reasons), 1)
        if per_answer > 1:
            seconds = times.last_token_ts - times.first_token_ts
            self._mean.labels(label).observe(max(seconds, 0.0) / (per_answer - 1))

    def forget(self, adapter: str) -> None:
        """Drops the series of an adapter that was unloaded: names come and go."""
        for metric in (self._prompt, self._generated, self._first, self._gap, self._mean):
            metric.remove_by_labels({"adapter": adapter})
        self._requests.remove_by_labels({"adapter": adapter})

    def text(self, stats: EngineStats) -> bytes:
        """All of it, in Prometheus' text form."""
        self._engine.stats = stats
        return generate_latest(self.registry)


def label_of(adapter: AdapterSpec) -> str:
    """The base, an adapter's name, or any mix: mixes and versions are too many to tell apart."""
    names = names_of(adapter)
    return BASE if not names else names[0] if len(names) == 1 else MIX


class _EngineCollector:
    """The engine's counters as they were when somebody asked last."""

    def __init__(self) -> None:
        self.stats: EngineStats | None = None

    def collect(self) -> Iterable[Metric]:
        for field in fields(EngineStats) if self.stats is not None else ():
            name = f"multilora_engine_{field.name}"
            kind = GaugeMetricFamily if field.name in GAUGES else CounterMetricFamily
            yield kind(name, f"EngineStats.{field.name}", value=getattr(self.stats, field.name))
