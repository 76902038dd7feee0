"""The routes: predictions, the model, health, metrics, the Open Inference Protocol, and the page."""

import time
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import BaseRoute, Mount, Route, Router
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp

import iret
from iret.serve import bodies, inference_protocol
from iret.serve.answers import write_answer
from iret.serve.computer import SOURCES
from iret.serve.guard import Guard
from iret.serve.metrics import TEXT
from iret.serve.openapi import write_openapi
from iret.serve.refusal import Refusal
from iret.serve.service import Service

PAGE = Path(__file__).parent / "page"
PHOTOS = Path(iret.__file__).parent / "photos"
PUBLIC = ("/health/", "/v2/health/", "/page/")


def build_app(service: Service, api_key: str | None = None, page: Path = PAGE) -> ASGIApp:
    """The whole service as an ASGI app."""
    handlers = Handlers(service, page)
    routes: list[BaseRoute] = [
        Route("/v1/model", handlers.model),
        Route("/v1/predict", handlers.predict, methods=["POST"]),
        Route("/health/live", handlers.live),
        Route("/health/ready", handlers.ready),
        Route("/metrics", handlers.metrics),
        Route("/openapi.json", handlers.openapi),
        Route("/v2", handlers.server),
        Route("/v2/health/live", handlers.live),
        Route("/v2/health/ready", handlers.ready),
        Route("/v2/models/{name}", handlers.tensors),
        Route("/v2/models/{name}/ready", handlers.ready_model),
        Route("/v2/models/{name}/infer", handlers.infer, methods=["POST"]),
    ]
    if (page / "index.html").is_file():
        examples = StaticFiles(directory=PHOTOS)
        routes += [
            Route("/", handlers.index),
            Mount("/page/photos", examples),
            Mount("/page", StaticFiles(directory=page)),
        ]
    router = Router(routes, redirect_slashes=False)
    return Guard(
        router, service.metrics, api_key, is_public=lambda path: path == "/" or path.startswith(PUBLIC)
    )  # fmt: skip


class Handlers:
    """One method a route; each raises `Refusal` for what it does not answer."""

    def __init__(self, service: Service, page: Path) -> None:
        self._service, self._page = service, page
        limits = service.limits
        self._model = service.model | {
            "limits": {
                "body_bytes": limits.body_bytes,
                "pixels": limits.max_pixels,
                "queue": limits.queue,
                "timeout_s": limits.timeout_s,
            }
        }

    # ---- ours

    async def predict(self, request: Request) -> Response:
        arrived_s = time.monotonic()
        service = self._service
        with service.admit():
            body = await bodies.read_body(request, service.limits)
            image, ask = await bodies.read_prediction(request, body)
            [(result, queue_s)] = await service.answer([(image, ask)], arrived_s)
            return JSONResponse(
                write_answer(
                    self._model,
                    ask,
                    result,
                    queue_s=queue_s,
                    total_s=time.monotonic() - arrived_s,
                    joules_source=SOURCES[self._model["precision"]],
                )
            )

    async def model(self, request: Request) -> Response:
        return JSONResponse(self._model)

    async def live(self, request: Request) -> Response:
        return JSONResponse({"live": True})

    async def ready(self, request: Request) -> Response:
        return _ready(self._service, {"ready": True})

    async def metrics(self, request: Request) -> Response:
        return Response(self._service.metrics.text(), headers={"Content-Type": TEXT})

    async def openapi(self, request: Request) -> Response:
        return JSONResponse(write_openapi(self._model))

    async def index(self, request: Request) -> Response:
        return FileResponse(self._page / "index.html")

    # ---- the Open Inference Protocol

    async def server(self, request: Request) -> Response:
        return JSONResponse({"name": "iret", "version": iret.__version__, "extensions": []})

    async def tensors(self, request: Request) -> Response:
        self._check_name(request)
        return JSONResponse(inference_protocol.describe_tensors(self._model))

    async def ready_model(self, request: Request) -> Response:
        self._check_name(request)
        return _ready(self._service, {"name": self._model["name"], "ready": True})

    async def infer(self, request: Request) -> Response:
        arrived_s = time.monotonic()
        service = self._service
        self._check_name(request)
        bodies.check_json(request)
        with service.admit() as places:
            raw = bodies.read_object(await bodies.read_body(request, service.limits))
            places.take(inference_protocol.count_images(raw))
            found = await service.answer(inference_protocol.read_inputs(raw, self._model), arrived_s)
            return JSONResponse(
                inference_protocol.write_outputs(raw, self._model, [result for result, _ in found])
            )  # fmt: skip

    def _check_name(self, request: Request) -> None:
        if request.path_params["name"] != self._model["name"]:
            raise Refusal(404, f"there is no such model; the one served is {self._model['name']!r}.")


def _ready(service: Service, content: dict[str, Any]) -> Response:
    if service.is_draining:
        raise Refusal(503, "the server is shutting down; ask another one.", 1)
    if not service.is_ready():
        raise Refusal(503, "no worker is ready; one is being started.", 1)
    return JSONResponse(content)
