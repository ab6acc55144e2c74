"""What the server counts, for Prometheus. Names run parallel to vLLM's, with ``moeshard:`` before them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeAlias

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

_SECONDS = (0.001, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
_SHARES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)

MEDIA_TYPE = CONTENT_TYPE_LATEST

Reading: TypeAlias = "tuple[str, str, dict[str, str], float]"
"""A gauge: name, what it is, labels, value."""


class Metrics:
    """The figures of one server, which are nobody else's."""

    def __init__(self, model: str, gauges: Callable[[], Iterable[Reading]]):
        """Begin at zero; `gauges` is asked whenever figures are read."""
        self._registry = CollectorRegistry()
        self._model = model
        self._registry.register(_Gauges(model, gauges))
        self._prompt_tokens = self._counter("prompt_tokens", "Tokens of prompts")
        self._generation_tokens = self._counter("generation_tokens", "Tokens of answers")
        self._queries = self._counter("prefix_cache_queries", "Tokens of prompts that were looked up")
        self._hits = self._counter("prefix_cache_hits", "Of them, those that were not computed again")
        self._success = self._counter("request_success", "Answers that were done", "finished_reason")
        self._failure = self._counter("request_failure", "Requests that an error answered", "status")
        self._placements = self._counter("placements", "Sessions that were placed", "node", "reason")
        self._refused = self._counter("refused", "Sessions that no node was good enough for")
        self._replacements = self._counter("replacements", "Sessions that were moved", "source", "node")
        self._missed = Histogram(
            "moeshard:missed_mass",
            "Share of routing weight that answers missed on a node",
            ["model_name", "node"],
            registry=self._registry,
            buckets=_SHARES,
        )
        self._failovers = self._counter("failovers", "Requests that moved from who failed", "node", "reason")
        self._first = self._histogram("time_to_first_token_seconds", "From request to first token", _SECONDS)
        self._between = self._histogram("inter_token_latency_seconds", "Between tokens", _SECONDS)
        self._next_token = self._between.labels(model)  # looked up once: it is asked for each token
        self._whole = self._histogram("e2e_request_latency_seconds", "From request to end", _SECONDS)
        self._probe = self._histogram("probe_seconds", "To find out where a session belongs", _SECONDS)
        self._fit = self._histogram("placement_fit", "Of the node that a session was placed on", _SHARES)

    def text(self) -> bytes:
        """Return all figures in Prometheus' text format."""
        return generate_latest(self._registry)

    def probed(self, seconds: float) -> None:
        """Count a probe."""
        self._probe.labels(self._model).observe(seconds)

    def placed(self, node: str, reason: str, fit: float | None) -> None:
        """Count a session that was placed now."""
        self._placements.labels(self._model, node, reason).inc()
        if reason == "refused":
            self._refused.labels(self._model).inc()
        elif fit is not None:
            self._fit.labels(self._model).observe(fit)

    def moved(self, source: str, node: str) -> None:
        """Count a session that was moved."""
        self._replacements.labels(self._model, source, node).inc()

    def missed(self, node: str, share: float) -> None:
        """Count what an answer missed on the node that ended it."""
        self._missed.labels(self._model, node).observe(share)

    def failed_over(self, node: str, reason: str) -> None:
        """Count a request that `node` failed and another took over."""
        self._failovers.labels(self._model, node, reason).inc()

    def failed(self, status: int) -> None:
        """Count a request that an error answered."""
        self._failure.labels(self._model, str(status)).inc()

    def first_token(self, seconds: float) -> None:
        self._first.labels(self._model).observe(seconds)

    def next_tokens(self, n: int, seconds: float) -> None:
        """Count tokens that came together, so long after those before them."""
        for _ in range(n):
            self._next_token.observe(seconds / n)

    def ended(self, seconds: float, n_prompt: int, n_cached: int, n_generated: int, reason: str) -> None:
        """Count an answer; `reason` is ``abort`` where nobody waited for its end, ``error`` where it failed."""
        self._whole.labels(self._model).observe(seconds)
        self._prompt_tokens.labels(self._model).inc(n_prompt)
        self._queries.labels(self._model).inc(n_prompt)
        self._hits.labels(self._model).inc(n_cached)
        self._generation_tokens.labels(self._model).inc(n_generated)
        self._success.labels(self._model, reason).inc()

    def _counter(self, name: str, what: str, *labels: str) -> Counter:
        counter = Counter(f"moeshard:{name}", what, ["model_name", *labels], registry=self._registry)
        if not labels:
            counter.labels(self._model)  # shown from the start
        return counter

    def _histogram(self, name: str, what: str, buckets: tuple[float, ...]) -> Histogram:
        histogram = Histogram(f"moeshard:{name}", what, ["model_name"], registry=self._registry, buckets=buckets)
        histogram.labels(self._model)
        return histogram


class _Gauges(Collector):
    """Figures that are asked for when they are read."""

    def __init__(self, model: str, read: Callable[[], Iterable[Reading]]):
        self._model, self._read = model, read

    def collect(self) -> Iterable[GaugeMetricFamily]:
        families: dict[str, GaugeMetricFamily] = {}
        for name, what, labels, value in self._read():
            names = ["model_name", *labels]
            family = families.setdefault(name, GaugeMetricFamily(f"moeshard:{name}", what, labels=names))
            family.add_metric([self._model, *labels.values()], value)
        return families.values()
