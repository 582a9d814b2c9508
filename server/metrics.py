"""Prometheus metrics of one server."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .engine.base import Engine
from .errors import CLIENT_GONE

API_PATHS = ("/v1/", "/tokenize", "/detokenize")


class Metrics:
    """Counts requests as they pass, and reads the engine's own figures when asked."""

    def __init__(self, engine: Callable[[], Engine | None]) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "ipissa_requests", "API requests by route and status.", ["route", "status"], registry=self.registry
        )
        self.seconds = Histogram(
            "ipissa_request_seconds", "Time from request to end of response.", ["route"], registry=self.registry
        )
        self.registry.register(_EngineCollector(engine))


class _EngineCollector(Collector):
    def __init__(self, engine: Callable[[], Engine | None]) -> None:
        self._engine = engine

    def collect(self) -> Iterator[Metric]:
        engine = self._engine()
        if engine is None:
            return
        stats = engine.stats()
        yield _gauge("ipissa_queued_requests", "Requests waiting for the engine.", stats["queued"])
        yield _gauge("ipissa_active_rows", "Sequences being generated.", stats["active_rows"])
        yield _count("ipissa_generated_tokens", "Tokens generated.", stats["generated_tokens"])
        caches: dict[str, Any] = stats["phase_cache"]
        for field, text in (("hits", "found in"), ("misses", "computed for")):
            family = CounterMetricFamily(
                f"ipissa_phase_cache_{field}", f"α whose phases were {text} the cache.", labels=["adapter"]
            )
            for name, info in caches.items():
                family.add_metric([name], getattr(info, field))
            yield family
        size = GaugeMetricFamily("ipissa_phase_cache_size", "Distinct α in the cache.", labels=["adapter"])
        for name, info in caches.items():
            size.add_metric([name], info.currsize)
        yield size


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(name, text, value=value)


def _count(name: str, text: str, value: float) -> Metric:
    return CounterMetricFamily(name, text, value=value)


class MetricsMiddleware:
    """Counts and times API requests, by the route's pattern so that labels stay few."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not scope["path"].startswith(API_PATHS):
            await self._app(scope, receive, send)
            return
        started, status = time.perf_counter(), CLIENT_GONE

        async def send_counted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, send_counted)
        except Exception:
            status = 500  # answered outside this middleware
            raise
        finally:
            route = getattr(scope.get("route"), "path", "unknown")
            self._metrics.requests.labels(route, status).inc()
            self._metrics.seconds.labels(route).observe(time.perf_counter() - started)
