"""What stands round the routes: the key, the count of answers, and the promise that an error is one sentence of JSON.

The routes below raise `Refusal`; whatever else they raise becomes a 500 with an id, and a traceback in the log under that id.
"""

import hmac
import logging
import os
import secrets
import time
from collections.abc import Callable

from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from iret.serve.metrics import Metrics
from iret.serve.refusal import Refusal

HEADERS = [(b"x-content-type-options", b"nosniff"), (b"referrer-policy", b"no-referrer")]

KEY = "IRET_API_KEY"  # environment variable that --api-key env reads

log = logging.getLogger("iret.serve")


class Guard:
    """An ASGI app round another."""

    def __init__(
        self, app: ASGIApp, metrics: Metrics, api_key: str | None, *, is_public: Callable[[str], bool]
    ) -> None:
        """`api_key` None: everybody is let in; `is_public` says by its path which route always is."""
        self._app, self._metrics, self._is_public = app, metrics, is_public
        self._key = None if api_key is None else api_key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1000})
            return
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        scope["app"] = self  # so that the router raises, and does not answer by itself
        began, status = time.monotonic(), 0

        async def note(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message = {**message, "headers": [*message["headers"], *HEADERS]}
            await send(message)

        try:
            self._check_key(scope)
            await self._app(scope, receive, note)
        except Exception as error:
            if status:  # half an answer is out; the server ends the connection
                raise
            await _refuse(error)(scope, receive, note)
        finally:
            route = getattr(scope.get("route"), "path", "other")
            self._metrics.requests.labels(route, status).inc()
            self._metrics.request_s.labels(route).observe(time.monotonic() - began)

    def _check_key(self, scope: Scope) -> None:
        path = scope["path"].removeprefix(scope.get("root_path", ""))  # which the routes do not look at either
        if self._key is None or self._is_public(path):
            return
        headers = dict(scope["headers"])
        given = headers.get(b"x-api-key", b"")
        scheme, _, token = headers.get(b"authorization", b"").partition(b" ")
        if scheme.lower() == b"bearer":
            given = token.strip()
        if not hmac.compare_digest(given, self._key):
            raise Refusal(401, "the key is missing or wrong; send it as Authorization: Bearer KEY, or as x-api-key.")


def read_key(word: str | None) -> str | None:
    """The key that clients must show, "env" being the environment's; None: none.

    Raises:
        ValueError: a key that a header cannot hold.
    """
    key = os.environ.get(KEY, "") if word == "env" else word
    if key is not None and not (key and key.isascii() and key.isprintable() and " " not in key):
        raise ValueError(
            f"the API key of --api-key is empty or holds a space or an unusual sign; set it in {KEY} and pass --api-key env."
        )
    return key


def _refuse(error: Exception) -> JSONResponse:
    if isinstance(error, Refusal):
        headers = {} if error.retry_after_s is None else {"Retry-After": str(error.retry_after_s)}
        if error.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        if error.status in (408, 503):
            headers["Connection"] = "close"  # it is slow, or another server is to be asked
        return JSONResponse({"error": error.sentence}, error.status, headers)
    if isinstance(error, HTTPException):
        sentences = {404: "there is nothing at this path; /openapi.json lists what there is.",
                     405: "this path does not take this method; /openapi.json lists what it takes."}  # fmt: skip
        sentence = sentences.get(error.status_code, str(error.detail))
        return JSONResponse({"error": sentence}, error.status_code, dict(error.headers or {}))
    number = secrets.token_hex(4)
    log.error("error %s", number, exc_info=error)
    return JSONResponse({"error": f"the server failed; its log says why under {number}."}, 500)
