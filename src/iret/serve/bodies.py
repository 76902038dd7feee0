"""From a request to images and settings: raw photos, forms, JSON. Everything is bounded before it is read.

Raises `Refusal` throughout.
"""

import asyncio
import base64
import binascii
import json
import logging
from collections.abc import AsyncGenerator, Callable
from typing import Any

from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect, Request

from iret.serve.asks import Ask, make_ask, merge, read_settings
from iret.serve.refusal import Refusal
from iret.serve.service import Limits

FORM_FIELDS = 16
MOST_OBJECTS = 32  # in one JSON body: of small ones, a megabyte would become twenty
RAW = "application/octet-stream"

logging.getLogger("python_multipart").setLevel(logging.ERROR)  # it warns of every damaged form, and clients make those


async def read_body(request: Request, limits: Limits) -> bytes:
    """413 for more than the limit, by its length if it is stated and while it comes; 408 where it does not come."""
    stated = request.headers.get("content-length", "0")
    if not stated.isdecimal():
        raise Refusal(400, "Content-Length is no number.")
    if int(stated) > limits.body_bytes:
        raise _too_large(limits)
    if request.headers.get("content-encoding", "identity") != "identity":
        raise Refusal(415, "compressed bodies are not read; send it without Content-Encoding.")
    chunks: list[bytes] = []
    size = 0
    try:
        async with asyncio.timeout(limits.timeout_s):
            async for chunk in request.stream():
                size += len(chunk)
                if size > limits.body_bytes:
                    raise _too_large(limits)
                chunks.append(chunk)
    except TimeoutError as error:
        raise Refusal(408, f"the body did not come within {limits.timeout_s:g} s.") from error
    except ClientDisconnect as error:
        raise Refusal(400, "the connection ended before the body did.") from error
    return b"".join(chunks)


async def read_prediction(request: Request, body: bytes) -> tuple[bytes, Ask]:
    """The photo of a `POST /v1/predict` and its settings, which may stand in the query whatever the body is."""
    kind = _kind(request)
    settings = read_settings(_once(request.query_params.multi_items()), is_text=True)
    if kind.startswith("image/") or kind == RAW:
        if not body:
            raise Refusal(400, "the body is empty; it should be the bytes of an image.")
        return body, make_ask(settings)
    if kind == "multipart/form-data":
        fields = await _read_form(request, body)
        image = fields.pop("image", None)
        if not isinstance(image, bytes) or not image:
            raise Refusal(400, "the form has no file in its field 'image'.")
        return image, make_ask(merge(settings, read_settings(fields, is_text=True)))
    if kind == "application/json":
        raw = read_object(body)
        image = decode_image(raw.pop("image", None))
        return image, make_ask(merge(settings, read_settings(raw, is_text=False)))
    raise Refusal(
        415,
        f"Content-Type {kind[:40]!r} is not read; send image/jpeg or the like, multipart/form-data or application/json.",
    )


def read_object(body: bytes) -> dict[str, Any]:
    """400 for what is not one JSON object; 422 for a member given twice, and for too many objects within."""
    try:
        raw = json.loads(body, object_pairs_hook=_counted())
    except Refusal:
        raise
    except (ValueError, RecursionError) as error:
        raise Refusal(400, "the body is not valid JSON.") from error
    if not isinstance(raw, dict):
        raise Refusal(400, f"the body is a JSON {type(raw).__name__}; it should be an object.")
    return raw


def check_json(request: Request) -> None:
    """415 unless the body says that it is JSON."""
    kind = _kind(request)
    if kind != "application/json":
        raise Refusal(415, f"Content-Type {kind[:40]!r} is not read here; send application/json.")


def decode_image(text: object) -> bytes:
    """Base64, also as a data URL; 400 if it is none."""
    if not isinstance(text, str) or not text:
        raise Refusal(400, "'image' is missing or no text; it should be a photo in base64.")
    try:
        return base64.b64decode(text.partition(",")[2] if text.startswith("data:") else text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise Refusal(400, "'image' is not valid base64.") from error


def _kind(request: Request) -> str:
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


def _too_large(limits: Limits) -> Refusal:
    return Refusal(413, f"the body has more than the limit of {limits.body_bytes} bytes; send a smaller image.")


def _counted() -> Callable[[list[tuple[str, Any]]], dict[str, Any]]:
    """`_once` for the objects of one body, as long as they are few."""
    count = 0

    def make(items: list[tuple[str, Any]]) -> dict[str, Any]:
        nonlocal count
        count += 1
        if count > MOST_OBJECTS:
            raise Refusal(422, f"the body holds more than {MOST_OBJECTS} JSON objects; send no more than is asked for.")
        return _once(items)

    return make


def _once(items: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(items)
    if len(fields) < len(items):
        raise Refusal(422, "a setting was given twice; give each once.")
    return fields


async def _read_form(request: Request, body: bytes) -> dict[str, Any]:
    """Fields as text, files as bytes, all in memory: a read-only disk is no reason to fail."""

    async def whole() -> AsyncGenerator[bytes, None]:
        yield body

    parser = MultiPartParser(request.headers, whole(), max_files=1, max_fields=FORM_FIELDS, max_part_size=len(body) + 1)
    parser.spool_max_size = len(body) + 1
    try:
        form = await parser.parse()
    except (MultiPartException, KeyError, ValueError, AttributeError) as error:
        raise Refusal(400, "the form is not valid multipart/form-data.") from error
    try:
        fields = _once(form.multi_items())
        return {name: await value.read() if isinstance(value, UploadFile) else value for name, value in fields.items()}
    finally:
        await form.close()
