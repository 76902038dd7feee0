"""The OpenAPI document of the service: what is read, with the ranges that are held to, and every answer there is."""

from typing import Any

import iret
from iret.serve.asks import MOST_LABELS, NUMBERS
from iret.serve.inference_protocol import LARGEST, MOST_SIGNS, OUTPUTS, VERSION

JSON = "application/json"
ERRORS = {
    400: "No image, or no valid body",
    401: "The key is missing or wrong",
    404: "Nothing at this path, or another model",
    405: "The path does not take this method",
    408: "The body did not come in time",
    413: "The body or the image is too large",
    415: "A body of another type",
    422: "A setting of another kind or out of its range; the sentence names it",
    429: "The house is full; Retry-After says when to try again, in seconds",
    500: "The server failed, or the image ended several workers",
    503: "The server is shutting down, no worker is ready, or there is no memory left",
    504: "No answer in time",
}
PHOTO = (  # one green pixel
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAIAAACQd1PeAAAADElEQVR4nGOIqrABAAI+AQ+BViQyAAAAAElFTkSuQmCC"
)
RETRY = {"Retry-After": {"schema": {"type": "integer", "minimum": 1}, "required": True}}
WORK = (400, 401, 408, 413, 415, 422, 429, 500, 503, 504)


def write_openapi(model: dict[str, Any]) -> dict[str, Any]:
    """For what `GET /v1/model` tells of the model."""
    return {
        "openapi": "3.1.0",
        "info": {
            "title": f"iret serve: {model['name']}",
            "version": iret.__version__,
            "description": "A vision transformer whose cost is a dial, turned per request.",
        },
        "paths": _own_paths(model) | _protocol_paths(model),
        "components": {
            "schemas": _schemas(model),
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer"},
                "key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
            },
        },
        "security": [{}, {"bearer": []}, {"key": []}],
    }


# ---- paths


def _own_paths(model: dict[str, Any]) -> dict[str, Any]:
    settings = _settings()
    form = {
        "type": "object",
        "required": ["image"],
        "properties": {"image": {"type": "string", "format": "binary"}, **settings},
        "additionalProperties": False,
    }
    body = {
        "type": "object",
        "required": ["image"],
        "properties": {"image": {"type": "string", "contentEncoding": "base64", "minLength": 1}, **settings},
        "additionalProperties": False,
    }
    photo = {"schema": {"type": "string", "format": "binary"}}
    predict = {
        "operationId": "predict",
        "summary": "Label one photo within a budget",
        "description": "At most one of budget, ms, joules and battery_percent; each setting once, in the query or in the body.",
        "parameters": [
            {
                "name": name,
                "in": "query",
                "required": False,
                "schema": schema,
                "description": schema.get("description", ""),
            }
            for name, schema in settings.items()
        ],
        "requestBody": {
            "required": True,
            "content": {
                "image/jpeg": photo,
                "image/png": photo,
                "application/octet-stream": photo,
                "multipart/form-data": {"schema": form},
                JSON: {
                    "schema": body,
                    "examples": {"photo": {"value": {"image": PHOTO, "budget": 1.0, "trace": True}}},
                },
            },
        },
        "responses": _answers("Prediction", *WORK),
    }
    return {
        "/v1/predict": {"post": predict},
        "/v1/model": {"get": _get("model", "The model, its trade-off and the limits", "Model", 401)},
        "/health/live": {"get": _get("live", "Whether the process is alive", "Live") | {"security": [{}]}},
        "/health/ready": {"get": _get("ready", "Whether to send requests here", "Ready", 503) | {"security": [{}]}},
        "/metrics": {
            "get": {
                "operationId": "metrics",
                "summary": "For Prometheus",
                "responses": {"200": {"description": "Text", "content": {"text/plain": {"schema": {"type": "string"}}}}}
                | _errors(401),
            }
        },
        "/openapi.json": {"get": _get("openapi", "This document", "Anything", 401)},
    }


def _protocol_paths(model: dict[str, Any]) -> dict[str, Any]:
    name = {"name": "name", "in": "path", "required": True, "schema": {"type": "string", "enum": [model["name"]]}}
    version = {"name": "version", "in": "path", "required": True, "schema": {"type": "string", "enum": [VERSION]}}
    infer = {
        "summary": "Logits of a batch, each image at its own budget",
        "requestBody": {
            "required": True,
            "content": {
                JSON: {
                    "schema": {"$ref": "#/components/schemas/Inference"},
                    "examples": {"photos": {"value": _example(model)}},
                }
            },
        },
        "responses": _answers("Inferred", 404, *WORK),
    }
    health: dict[str, Any] = {"security": [{}]}
    return {
        "/v2": {"get": _get("server", "The server", "Server", 401)},
        "/v2/health/live": {"get": _get("live_v2", "Whether the process is alive", "Live") | health},
        "/v2/health/ready": {"get": _get("ready_v2", "Whether to send requests here", "Ready", 503) | health},
        **_model_paths("/v2/models/{name}", infer, "", [name]),
        **_model_paths("/v2/models/{name}/versions/{version}", infer, "_version", [name, version]),
    }


def _model_paths(path: str, infer: dict[str, Any], suffix: str, named: list[dict[str, Any]]) -> dict[str, Any]:
    """What there is of a model, and of a version of it."""
    tensors = _get(f"tensors{suffix}", "Inputs and outputs", "Tensors", 401, 404)
    ready = _get(f"ready_model{suffix}", "Whether the model is ready", "ModelReady", 401, 404, 503)
    parameters = {"parameters": named}
    return {
        path: {"get": tensors | parameters},
        f"{path}/ready": {"get": ready | parameters},
        f"{path}/infer": {"post": infer | {"operationId": f"infer{suffix}"} | parameters},
    }


def _example(model: dict[str, Any]) -> dict[str, Any]:
    """Two photos, each at its budget."""
    cheapest = model["points"][-1]["share"] if model["points"] else 1.0
    tensor = {"name": "image", "datatype": "BYTES", "shape": [2], "data": [PHOTO, PHOTO]}
    return {"id": "two", "parameters": {"budget": [1.0, cheapest]}, "inputs": [tensor]}


def _get(name: str, summary: str, schema: str, *errors: int) -> dict[str, Any]:
    return {"operationId": name, "summary": summary, "responses": _answers(schema, *errors)}


def _answers(schema: str, *errors: int) -> dict[str, Any]:
    return {
        "200": {
            "description": "As asked",
            "content": {JSON: {"schema": {"$ref": f"#/components/schemas/{schema}"}}},
        }
    } | _errors(*errors)


def _errors(*statuses: int) -> dict[str, Any]:
    content = {JSON: {"schema": {"$ref": "#/components/schemas/Error"}}}
    return {
        str(status): {"description": ERRORS[status], "content": content}
        | ({"headers": RETRY} if status in (429, 503) else {})
        for status in statuses
    }


# ---- schemas


def _settings() -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, allowed in NUMBERS.items():
        low = {"minimum" if allowed.has_low else "exclusiveMinimum": allowed.low}
        found[name] = {"type": "number", **low, "maximum": allowed.high, "description": allowed.what}
    found["top"] = {"type": "integer", "minimum": 1, "maximum": MOST_LABELS, "description": "labels in the answer"}
    found["trace"] = {"type": "boolean", "description": "also say what was looked at"}
    return found


def _object(required: str = "*", **properties: Any) -> dict[str, Any]:
    """Of these properties alone; `required` names some of them, "*" all."""
    names = list(properties) if required == "*" else required.split()
    return {"type": "object", "required": names, "properties": properties, "additionalProperties": False}


def _open(**properties: Any) -> dict[str, Any]:
    """Of these properties, all required, and whatever else a client of the protocol sends; it is not looked at."""
    return {"type": "object", "required": list(properties), "properties": properties}


def _list(items: dict[str, Any], length: int | None = None) -> dict[str, Any]:
    bounds = {} if length is None else {"minItems": length, "maxItems": length}
    return {"type": "array", "items": items, **bounds}


def _schemas(model: dict[str, Any]) -> dict[str, Any]:
    text, whole, number, flag = ({"type": kind} for kind in ("string", "integer", "number", "boolean"))
    share = {"type": "number", "minimum": 0, "maximum": 1}
    maybe = {"type": ["number", "null"]}
    stages, cells = model["stages"], model["grid"][0] * model["grid"][1]
    label = _object(index=whole, label={"type": ["string", "null"]}, probability=share)
    grid = _list(whole, 2)
    marks = _list(_list({"type": "integer", "enum": [0, 1]}, cells), stages)
    reached = _list({"anyOf": [label, {"type": "null"}]}, stages)
    prediction = _object(
        "model top budget macs macs_share tokens exit_stage joules time_ms batch",
        model=text,
        top=_list(label),
        budget=maybe,
        macs=whole,
        macs_share=number,
        tokens=_list(whole, stages),
        exit_stage=whole,
        joules=_object(value=number, source=text, measured=flag),
        time_ms=_object(total=number, engine=number, queue=number),
        batch=whole,
        trace=_object(grid=grid, kept=marks, refined=marks, stage_probabilities=reached),
    )
    points = _list(_object(share=share, accuracy=share, macs=whole, ms=maybe, joules=maybe))
    told = _object(
        name=text,
        labels={"anyOf": [_list(text), {"type": "null"}]},
        grid=grid,
        img_size=grid,
        channels=whole,
        classes=whole,
        stages=whole,
        full_macs=whole,
        points={"anyOf": [points, {"type": "null"}]},
        joules_source=text,
        engine=text,
        device=text,
        threads={"type": ["integer", "null"]},
        precision=text,
        preprocess={"type": "object"},
        data={"anyOf": [_object(name=text, images=whole), {"type": "null"}]},
        limits=_object(body_bytes=whole, pixels=whole, queue=whole, timeout_s=number),
    )
    return {
        "Error": _object(error=text),
        "Anything": {"type": "object"},
        "Prediction": prediction,
        "Model": told,
        "Live": _object(live=flag),
        "Ready": _object(ready=flag),
        "ModelReady": _object(name=text, ready=flag),
        "Server": _object(name=text, version=text, extensions=_list(text)),
        **_protocol_schemas(model),
    }


def _protocol_schemas(model: dict[str, Any]) -> dict[str, Any]:
    text = {"type": "string"}
    size = {"type": "integer", "minimum": 1, "maximum": model["limits"]["queue"]}
    settings = {name: schema for name, schema in _settings().items() if name in NUMBERS}
    budget = settings["budget"]
    settings["budget"] = {"anyOf": [budget, _list(budget)], "description": "one for all, or a list, one an image"}
    tensor = _object(name=text, datatype=text, shape=_list({"type": "integer"}))
    answered = _object(
        name={"enum": list(OUTPUTS)}, datatype=text, shape=_list({"type": "integer"}), data=_list({"type": "number"})
    )
    image = [model["channels"], *model["img_size"]]
    floats = _open(
        name={"const": "image"},
        datatype={"const": "FP32"},
        shape={
            "type": "array",
            "prefixItems": [size, *({"const": each} for each in image)],
            "minItems": 4,
            "maxItems": 4,
        },
        data={"type": "array", "description": f"normalised pixels, at most {LARGEST:g}, flat or nested as shape says"},
    )
    photos = _open(
        name={"const": "image"},
        datatype={"const": "BYTES"},
        shape={"type": "array", "prefixItems": [size], "minItems": 1, "maxItems": 1},
        data=_list({"type": "string", "contentEncoding": "base64", "minLength": 1}),
    )
    return {
        "Tensors": _object(name=text, versions=_list(text), platform=text, inputs=_list(tensor), outputs=_list(tensor)),
        "Inference": {
            "type": "object",
            "required": ["inputs"],
            "properties": {
                "id": {"type": ["string", "null"], "maxLength": MOST_SIGNS, "description": "printable"},
                "parameters": {"type": ["object", "null"], "properties": settings, "additionalProperties": False},
                "inputs": _list({"anyOf": [floats, photos]}, 1),
                "outputs": _list(_open(name={"enum": list(OUTPUTS)})) | {"type": ["array", "null"]},
            },
            "additionalProperties": False,
        },
        "Inferred": _object(
            "model_name model_version outputs", model_name=text, model_version=text, id=text, outputs=_list(answered)
        ),
    }
