"""What a server has done, as Prometheus reads it. Labels come from tables, and never from requests."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mflux.serve.engine import Engine
    from mflux.serve.jobs import Job

_SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)


class Metrics:
    """Numbers of one server, in a registry of its own."""

    def __init__(self, engine: Engine):
        from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

        self._engine = engine
        self._registry = CollectorRegistry()
        more: dict[str, Any] = {"registry": self._registry}
        self._requests = Counter("mflux_requests", "Requests answered", ["route", "status"], **more)
        self._pictures = Counter("mflux_pictures", "Images generated", ["model"], **more)
        self._stages = Histogram("mflux_stage_seconds", "Seconds of a stage", ["stage"], buckets=_SECONDS, **more)
        self._queue = Gauge("mflux_queue_jobs", "Jobs that wait or run", **more)
        self._models = Gauge("mflux_model_bytes", "Bytes of loaded models", ["model"], **more)
        self._memory = Gauge("mflux_memory_bytes", "Bytes that MLX holds", ["kind"], **more)

    def request(self, route: str, status: int) -> None:
        self._requests.labels(route, str(status)).inc()

    def stage(self, stage: str, seconds: float) -> None:
        self._stages.labels(stage).observe(seconds)
        if stage == "decode" and (job := self._engine.running) is not None:
            self._picture(job)

    def _picture(self, job: Job) -> None:
        self._pictures.labels(job.model).inc()

    @property
    def content_type(self) -> str:
        from prometheus_client import CONTENT_TYPE_LATEST

        return CONTENT_TYPE_LATEST

    def text(self) -> bytes:
        from prometheus_client import generate_latest

        from mflux.backend import mx

        self._queue.set(len(self._engine.waiting) + len(self._engine.under_way))
        loaded = self._engine.loaded()
        for model in self._engine.models:
            self._models.labels(model.id).set(loaded.get(model.id, 0))
        for kind, read in (
            ("active", mx.get_active_memory),
            ("cache", mx.get_cache_memory),
            ("peak", mx.get_peak_memory),
        ):
            self._memory.labels(kind).set(read())
        return generate_latest(self._registry)
