"""The OpenAPI document describes what is really answered and really refused. schemathesis: tests/serve/test_serve_soak.py."""

import base64
import sys
from pathlib import Path

import pytest
from jsonschema import Draft202012Validator

sys.path.insert(0, str(Path(__file__).parent))
from pretend import PretendSession, photo
from test_app import PNG, make_service, talk

from iret.serve.app import build_app
from iret.serve.asks import NUMBERS
from iret.serve.computer import Computer

CASES = [
    ("GET", "/v1/model", {}),
    ("GET", "/health/live", {}),
    ("GET", "/health/ready", {}),
    ("GET", "/openapi.json", {}),
    ("GET", "/v2", {}),
    ("GET", "/v2/health/live", {}),
    ("GET", "/v2/health/ready", {}),
    ("GET", "/v2/models/pretend", {}),
    ("GET", "/v2/models/pretend/ready", {}),
    ("GET", "/v2/models/other", {}),
    ("GET", "/v2/models/pretend/versions/1", {}),
    ("GET", "/v2/models/pretend/versions/1/ready", {}),
    ("POST", "/v1/predict?trace=true", {"content": photo(), "headers": PNG}),
    ("POST", "/v1/predict?deadline_ms=1&trace=true", {"content": photo(), "headers": PNG}),
    ("POST", "/v1/predict", {"content": b"x", "headers": PNG}),
    ("POST", "/v1/predict?budget=9", {"content": photo(), "headers": PNG}),
    ("POST", "/v1/predict", {"content": photo()}),
    ("POST", "/v1/predict", {"content": bytes(30_000), "headers": PNG}),
    ("POST", "/v1/predict", {"json": {"image": base64.b64encode(photo()).decode(), "budget": 0.5}}),
    (
        "POST",
        "/v2/models/pretend/infer",
        {"json": {"inputs": [{"name": "image", "datatype": "FP32", "shape": [1, 3, 16, 16], "data": [0.5] * 768}]}},
    ),
    ("POST", "/v2/models/pretend/infer", {"json": {}}),
]


def test_every_answer_is_one_that_the_document_describes():
    async def scene(client):
        document = (await client.get("/openapi.json")).json()
        return document, [await client.request(method, path, **what) for method, path, what in CASES]

    document, answers = talk(scene)
    for (method, path, _), answer in zip(CASES, answers, strict=True):
        route = (
            path.partition("?")[0]
            .replace("/models/pretend", "/models/{name}")
            .replace("/models/other", "/models/{name}")
            .replace("/versions/1", "/versions/{version}")
        )
        described = document["paths"][route][method.lower()]["responses"][str(answer.status_code)]
        schema = described["content"]["application/json"]["schema"]
        Draft202012Validator(schema | {"components": document["components"]}).validate(answer.json())


def test_the_examples_work_as_they_stand():
    async def scene(client):
        paths = (await client.get("/openapi.json")).json()["paths"]
        answers = []
        for path in ("/v1/predict", "/v2/models/{name}/infer"):
            [example] = paths[path]["post"]["requestBody"]["content"]["application/json"]["examples"].values()
            answers.append(await client.post(path.replace("{name}", "pretend"), json=example["value"]))
        return answers

    assert [answer.status_code for answer in talk(scene)] == [200, 200]


def test_a_model_without_points_or_labels_is_described_too():
    session = PretendSession(None)
    session.labels = None

    async def scene(client):
        return [(await client.get(path)).json() for path in ("/openapi.json", "/v1/model")]

    document, model = talk(scene, make_service(Computer(session, max_pixels=100)))
    schema = {"$ref": "#/components/schemas/Model", "components": document["components"]}
    Draft202012Validator(schema).validate(model)
    assert not Draft202012Validator(schema).is_valid(model | {"more": 1})


def test_every_route_and_setting_is_described():
    app = build_app(make_service())
    routes = {route.path for route in app._app.routes if route.path not in ("/", "/page", "/page/photos")}
    document = talk(lambda client: client.get("/openapi.json")).json()
    assert set(document["paths"]) == routes
    predict = document["paths"]["/v1/predict"]["post"]
    names = {parameter["name"]: parameter["schema"] for parameter in predict["parameters"]}
    assert set(names) == {*NUMBERS, "top", "trace"}
    for name, allowed in NUMBERS.items():
        assert names[name]["maximum"] == allowed.high
        assert names[name].get("minimum", names[name].get("exclusiveMinimum")) == allowed.low
    for kind in ("application/json", "multipart/form-data"):
        assert set(predict["requestBody"]["content"][kind]["schema"]["properties"]) == {"image", *names}
    Draft202012Validator.check_schema(document["components"]["schemas"]["Inference"])


@pytest.mark.parametrize("budget", [0.4, [0.4, 0.5]])
def test_a_budget_of_the_protocol_is_a_number_or_a_list(budget):
    document = talk(lambda client: client.get("/openapi.json")).json()
    schema = {"$ref": "#/components/schemas/Inference", "components": document["components"]}
    tensor = {"name": "image", "datatype": "BYTES", "shape": [1], "data": ["aaaa"]}
    Draft202012Validator(schema).validate({"inputs": [tensor], "parameters": {"budget": budget}})
    assert not Draft202012Validator(schema).is_valid({"inputs": [tensor], "parameters": {"budget": 2}})
