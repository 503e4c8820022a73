"""What a monitor reads, in Prometheus' format."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.metrics_core import GaugeMetricFamily
from prometheus_client.registry import Collector

from fusedpeft.serve.engine import Engine, Request

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)


class Metrics:
    """Of one engine, in a registry of its own."""

    def __init__(self, engine: Engine) -> None:
        self.registry = CollectorRegistry()
        own = {"namespace": "fusedpeft", "registry": self.registry}
        self.requests = Counter(
            "requests", "Requests by adapter and by how they ended.", ("adapter", "finish"), **own
        )
        self.tokens = Counter("tokens", "Tokens read and written.", ("kind",), **own)
        self.first = Histogram(
            "first_token_seconds", "From handing in to the first token.", buckets=_SECONDS, **own
        )
        self.each = Histogram(
            "token_seconds",
            "A request's mean time a token after the first.",
            buckets=_SECONDS,
            **own,
        )
        for name, what, value in (
            ("running", "Requests that decode.", lambda: engine.running),
            ("waiting", "Requests that wait.", lambda: engine.waiting),
        ):
            Gauge(name, what, **own).set_function(value)
        self.registry.register(_Pool(engine))

    def ended(self, request: Request) -> None:
        self.requests.labels(request.adapter or "", request.finish).inc()
        self.tokens.labels("prompt").inc(len(request.ids) if request.tokens else 0)
        self.tokens.labels("generated").inc(len(request.tokens))
        if request.tokens:
            self.first.observe(request.first - request.began)
        if (more := len(request.tokens) - 1) > 0:
            self.each.observe((request.ended - request.first) / more)

    def text(self) -> bytes:
        return generate_latest(self.registry)


class _Pool(Collector):
    """The pool, asked once for each look at it."""

    def __init__(self, engine: Engine) -> None:
        self.pool = engine.pool

    def describe(self) -> tuple:
        return ()

    def collect(self) -> tuple[GaugeMetricFamily, ...]:
        stats = self.pool.stats()
        slots = GaugeMetricFamily("fusedpeft_slots", "Slots of the pool.", labels=["state"])
        for state in ("free", "loading", "live", "retired", "held"):
            slots.add_metric([state], stats[state])
        held = GaugeMetricFamily("fusedpeft_adapter_bytes", "Memory of adapters.", labels=["where"])
        for where in ("device", "host"):
            held.add_metric([where], stats[f"{where}_bytes"])
        return slots, held
