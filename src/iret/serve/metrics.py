"""What Prometheus reads at /metrics. Joules are estimates from counted work, and say so in their name."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from iret.serve.computer import Result

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
TEXT = "text/plain; version=0.0.4; charset=utf-8"  # of what `Metrics.text` gives


class Metrics:
    """One registry a service, so that two in one process do not count for each other."""

    def __init__(self) -> None:
        self._registry = own = CollectorRegistry()
        self.requests = Counter("iret_requests", "Requests by route and status", ("route", "status"), registry=own)
        self.request_s = Histogram(
            "iret_request_seconds", "From the request to its answer", ("route",), buckets=SECONDS, registry=own
        )
        self.queue_s = Histogram(
            "iret_queue_seconds", "What an image waited for a worker", buckets=SECONDS, registry=own
        )
        self.batch = Histogram(
            "iret_batch_images", "Images computed together", buckets=(1, 2, 4, 8, 16, 32, 64), registry=own
        )
        self.images = Counter("iret_images", "Images answered, by the stage whose head did", ("stage",), registry=own)
        self.tokens = Counter("iret_tokens_kept", "Patches computed, by stage", ("stage",), registry=own)
        self.macs = Counter("iret_macs", "Multiply-accumulates spent on images", registry=own)
        self.joules = Counter("iret_estimated_joules", "Joules by counted work, an estimate", registry=own)
        self.open = Gauge("iret_open_images", "Images accepted and not yet answered", registry=own)
        self.queue = Gauge("iret_queue_images", "Of these, those that wait for a worker", registry=own)
        self.workers = Gauge("iret_workers", "Workers that are ready", registry=own)
        self.restarts = Counter(
            "iret_worker_restarts", "Workers that were started in place of one that ended", registry=own
        )

    def note(self, result: Result, queue_s: float) -> None:
        """One image was answered."""
        self.queue_s.observe(queue_s)
        self.images.labels(result.exit_stage).inc()
        for stage, tokens in enumerate(result.tokens):
            self.tokens.labels(stage).inc(tokens)
        self.macs.inc(result.macs)
        self.joules.inc(result.joules)

    def text(self) -> bytes:
        """Prometheus' text format."""
        return generate_latest(self._registry)
