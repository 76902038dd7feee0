"""The routes: predictions, the model, health, metrics, the Open Inference Protocol, and the page."""

import asyncio
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import BaseRoute, Mount, Route, Router
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp

import iret
from iret.serve import bodies, inference_protocol
from iret.serve.answers import write_answer
from iret.serve.asks import Ask
from iret.serve.computer import SOURCES, Result
from iret.serve.guard import Guard
from iret.serve.metrics import TEXT
from iret.serve.openapi import write_openapi
from iret.serve.refusal import Refusal
from iret.serve.service import Service

PAGE = Path(__file__).parent / "page"
PHOTOS = Path(iret.__file__).parent / "photos"
MODELS = ("/v2/models/{name}", "/v2/models/{name}/versions/{version}")
PUBLIC = ("/health/", "/v2/health/", "/page/")
FRESH = {"Cache-Control": "no-cache"}  # asked for again: after an upgrade a browser mixes no two versions


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
    ]
    for model in MODELS:
        routes += [
            Route(model, handlers.tensors),
            Route(f"{model}/ready", handlers.ready_model),
            Route(f"{model}/infer", handlers.infer, methods=["POST"]),
        ]
    if (page / "index.html").is_file():
        examples = StaticFiles(directory=PHOTOS)
        routes += [
            Route("/", handlers.index),
            Mount("/page/photos", examples),
            Mount("/page", FreshFiles(directory=page)),
        ]
    router = Router(routes, redirect_slashes=False)
    return Guard(
        router, service.metrics, api_key, is_public=lambda path: path == "/" or path.startswith(PUBLIC)
    )  # fmt: skip


class FreshFiles(StaticFiles):
    def file_response(self, *args: Any, **options: Any) -> Response:
        response = super().file_response(*args, **options)
        response.headers.update(FRESH)
        return response


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
            # No name for the body: it would be held, beside the image in it, until the answer.
            image, ask = await bodies.read_prediction(request, await bodies.read_body(request, service.limits))
            [(result, queue_s)] = await self._answer(request, [(image, ask)], arrived_s)
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
        self._service.check_ready()
        return JSONResponse({"ready": True})

    async def metrics(self, request: Request) -> Response:
        return Response(self._service.metrics.text(), headers={"Content-Type": TEXT})

    async def openapi(self, request: Request) -> Response:
        return JSONResponse(write_openapi(self._model))

    async def index(self, request: Request) -> Response:
        headers = FRESH | {"Content-Security-Policy": "frame-ancestors 'self'"}
        return FileResponse(self._page / "index.html", headers=headers)

    # ---- the Open Inference Protocol

    async def server(self, request: Request) -> Response:
        return JSONResponse({"name": "iret", "version": iret.__version__, "extensions": []})

    async def tensors(self, request: Request) -> Response:
        self._check_model(request)
        return JSONResponse(inference_protocol.describe_tensors(self._model))

    async def ready_model(self, request: Request) -> Response:
        self._check_model(request)
        self._service.check_ready()
        return JSONResponse({"name": self._model["name"], "ready": True})

    async def infer(self, request: Request) -> Response:
        arrived_s = time.monotonic()
        service = self._service
        self._check_model(request)
        bodies.check_json(request)
        with service.admit() as places:
            raw = bodies.read_object(await bodies.read_body(request, service.limits))
            places.take(inference_protocol.count_images(raw))
            asked = inference_protocol.read_inference(raw, self._model)
            del raw  # lists and texts many times as large as the arrays made of them
            found = await self._answer(request, asked.images, arrived_s)
            return JSONResponse(inference_protocol.write_outputs(asked, self._model, [result for result, _ in found]))

    def _check_model(self, request: Request) -> None:
        named, version = request.path_params["name"], request.path_params.get("version", inference_protocol.VERSION)
        if (named, version) != (self._model["name"], inference_protocol.VERSION):
            raise Refusal(404, f"there is no such model; {self._model['name']!r} is served, in version 1.")

    # ---- both

    async def _answer(
        self, request: Request, images: Sequence[tuple[bytes | np.ndarray, Ask]], arrived_s: float
    ) -> list[tuple[Result, float]]:
        """`Service.answer`, given up when the client is gone: nobody is computed for, and a place becomes free."""
        answer = asyncio.ensure_future(self._service.answer(images, arrived_s))
        gone = asyncio.ensure_future(_until_gone(request))
        try:
            await asyncio.wait({answer, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not answer.done():
                raise Refusal(400, "the connection ended before the answer.")
            return answer.result()
        finally:
            for task in (answer, gone):
                task.cancel()
            await asyncio.gather(answer, gone, return_exceptions=True)


async def _until_gone(request: Request) -> None:
    """The body was read before."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
