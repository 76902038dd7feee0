"""The same service as a Ray Serve deployment: replicas on many machines, more of them when there is more to do.

    serve run iret.serve.ray:builder bundle=/models/pico max_replicas=4

    from ray import serve
    from iret.serve.ray import app
    serve.run(app("/models/pico", replicas=(1, 4)))

Routes, limits and answers are those of `iret serve`; a replica is service and worker in one process, and Ray's `serve.batch`
stands where the batcher did. So limits hold for each replica, images that wait are in order of arrival, deadlines or not,
and `/metrics` tells of the replica that happens to answer. A photo that takes the decoder down takes its replica down, with
all requests in it, and a computation that hangs is not killed.
"""

import asyncio
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ray import serve
from starlette.types import ASGIApp

from iret.serve.app import build_app
from iret.serve.computer import AS_STATED, Job, Result, Supply
from iret.serve.guard import read_key
from iret.serve.metrics import Metrics
from iret.serve.refusal import Refusal
from iret.serve.server import Options
from iret.serve.service import Limits, Service
from iret.serve.worker import open_computer

LIMITS: dict[str, type] = {"queue": int, "max_pixels": int, "timeout_s": float, "max_body_mb": float}
WORDS: dict[str, type] = {
    "bundle": str, "engine": str, "threads": int, "max_batch": int, "min_replicas": int, "max_replicas": int,
    "api_key": str, **LIMITS
}  # fmt: skip


@serve.deployment
@serve.ingress()
class Replica:
    """One session and the routes in front of it."""

    def __init__(self, bundle: str, engine: str | None, threads: int, options: Options, supply: Supply) -> None:
        self._options, self._metrics = options, Metrics()
        self._metrics.workers.set(1)
        self._computer = open_computer(
            Path(bundle), engine, threads, max_pixels=options.limits.max_pixels, supply=supply
        )
        self.compute.set_max_batch_size(options.max_batch)  # type: ignore[attr-defined]
        self.compute.set_batch_wait_timeout_s(options.batch_wait_s)  # type: ignore[attr-defined]

    def __serve_build_asgi_app__(self) -> ASGIApp:
        service = Service(self._submit, self._computer.describe(), self._options.limits, self._metrics)
        return build_app(service, self._options.api_key)

    async def _submit(self, job: Job, arrived_s: float, due_s: float) -> Result:
        found = await self.compute(job)
        if isinstance(found, Refusal):
            raise found
        return found

    @serve.batch
    async def compute(self, jobs: Sequence[Job]) -> list[Result | Refusal]:
        """One batch at a time, beside the event loop."""
        self._metrics.batch.observe(len(jobs))
        return await asyncio.to_thread(self._computer, jobs)


def app(
    bundle: str | Path,
    *,
    engine: str | None = None,
    threads: int = 1,
    options: Options = Options(),  # noqa: B008
    supply: Supply = AS_STATED,
    replicas: tuple[int, int] = (1, 1),
) -> serve.Application:
    """For `serve.run`. `bundle` is a folder on every machine; `replicas` at least and at most, each with `threads` cores.

    Of `options`, host, port and workers are Ray's business and not looked at.

    Raises:
        ValueError: replicas that are not 1 or more, at least before at most.
    """
    least, most = replicas
    if not 1 <= least <= most:
        raise ValueError(f"replicas={replicas} must be 1 or more, at least before at most.")
    size: dict[str, object] = {"num_replicas": least}
    if least < most:
        wanted = {"min_replicas": least, "max_replicas": most, "target_ongoing_requests": options.max_batch}
        size = {"autoscaling_config": wanted}
    return Replica.options(  # type: ignore[attr-defined]
        ray_actor_options={"num_cpus": threads},
        max_ongoing_requests=2 * options.limits.queue,  # so that the replica itself can say 429
        **size,
    ).bind(str(bundle), engine, threads, options, supply)


def builder(words: Mapping[str, str]) -> serve.Application:
    """For `serve run iret.serve.ray:builder bundle=... max_replicas=4` and Ray's configuration files.

    `api_key=env` takes the key from IRET_API_KEY, where this runs.

    Raises:
        ValueError: an unknown word, a value of another kind or out of its range.
    """
    unknown = sorted(set(words) - set(WORDS))
    if unknown or "bundle" not in words:
        raise ValueError(
            f"{', '.join(unknown) or 'no bundle'}: the words are {', '.join(WORDS)}, and bundle is needed."
        )
    read = {name: _read(name, value) for name, value in words.items()}
    least = read.get("min_replicas", 1)
    limits = {name: read[name] for name in LIMITS if name in read}
    if "max_body_mb" in limits:
        limits["body_bytes"] = round(1e6 * limits.pop("max_body_mb"))
    return app(
        read["bundle"],
        engine=read.get("engine"),
        threads=read.get("threads", 1),
        options=Options(
            max_batch=read.get("max_batch", 16), limits=Limits(**limits), api_key=read_key(read.get("api_key"))
        ),
        replicas=(least, read.get("max_replicas", least)),
    )


def _read(name: str, value: str) -> Any:
    try:
        return WORDS[name](value)
    except (ValueError, OverflowError) as error:
        raise ValueError(f"{name}={value} is no {'whole ' if WORDS[name] is int else ''}number.") from error
