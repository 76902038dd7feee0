"""The Open Inference Protocol over the same service: tensors and photos in, each image at its own budget."""

import base64
import json
import sys
import tracemalloc
from pathlib import Path

import httpx
import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))
from pretend import FULL, PretendSession, photo
from test_app import ask, make_service, talk

from iret.serve.computer import Computer
from iret.serve.inference_protocol import read_inference
from iret.serve.refusal import Refusal
from iret.serve.service import Service

PHOTO = photo()


def tensors_of(answer: httpx.Response) -> list[str]:
    return [each["name"] for each in answer.json()["outputs"]]


def send(body: str, service: Service | None = None) -> httpx.Response:
    headers = {"Content-Type": "application/json"}
    return ask("POST", "/v2/models/pretend/infer", service, content=body.encode(), headers=headers)


def infer(service: Service | None = None, **changes) -> httpx.Response:
    tensor = {"name": "image", "datatype": "FP32", "shape": [2, 3, 16, 16], "data": [0.5] * 1536}
    body = {"id": "7", "parameters": {"budget": [0.25, 1]}, "inputs": [tensor]} | changes
    return send(json.dumps(body), service)  # unlike the client's own, which cannot say half a surrogate pair


def tensor(**changes) -> list[dict]:
    return [{"name": "image", "datatype": "FP32", "shape": [1, 3, 16, 16], "data": [0.5] * 768} | changes]


def test_a_tensor_of_two_images_gets_two_answers_each_at_its_budget():
    answer = infer()
    assert answer.status_code == 200
    told = answer.json()
    assert (told["id"], told["model_name"]) == ("7", "pretend")
    logits, macs, exits = told["outputs"]
    assert (logits["shape"], logits["datatype"], logits["data"]) == ([2, 3], "FP32", [0.5, 0.0, 1.0] * 2)
    assert (macs["datatype"], macs["data"]) == ("INT64", [FULL // 4, FULL])
    assert exits["data"] == [2, 2]


def test_photos_and_nested_lists_are_read_and_outputs_chosen():
    bytes_ = {"name": "image", "datatype": "BYTES", "shape": [1], "data": [base64.b64encode(PHOTO).decode()]}
    answer = infer(inputs=[bytes_], parameters={"budget": 0.5}, outputs=[{"name": "macs"}]).json()
    assert [each["name"] for each in answer["outputs"]] == ["macs"]
    assert answer["outputs"][0]["data"] == [FULL // 2]
    nested = np.full((1, 3, 16, 16), 0.5).tolist()
    assert infer(inputs=tensor(data=nested), parameters={}).json()["outputs"][0]["data"] == [0.5, 0.0, 1.0]


@pytest.mark.parametrize(
    ("status", "sentence", "changes"),
    [
        (422, "inputs is a list of one tensor", {"inputs": []}),
        (422, "its name is 'image'", {"inputs": tensor(name="x")}),
        (422, "datatype 'FP16'", {"inputs": tensor(datatype="FP16")}),
        (422, "shape [1, 3, 16, 17] does not fit", {"inputs": tensor(shape=[1, 3, 16, 17])}),
        (422, "shape of the input", {"inputs": tensor(shape=[0, 3, 16, 16])}),
        (422, "shape of the input", {"inputs": tensor(shape="x")}),
        (422, "is not 768 numbers", {"inputs": tensor(data=[0.5] * 767)}),
        (422, "is not 768 numbers", {"inputs": tensor(data=["a"] * 768)}),
        (422, "is not 768 numbers", {"inputs": tensor(data=[[0.5], [0.5, 0.5]])}),
        (422, "missing or no list", {"inputs": tensor(data=None)}),
        (422, "beyond 1e+06", {"inputs": tensor(data=[1e300] * 768)}),
        (422, "beyond 1e+06", {"inputs": tensor(data=[10**400] + [0.5] * 767)}),
        (422, "beyond 1e+06", {"inputs": tensor(data=[3e38, -3e38] * 384)}),  # their sum is 0
        (422, "is not 768 numbers", {"inputs": tensor(data=[0.5] * 767 + ["0.5"])}),
        (422, "is not 768 numbers", {"inputs": tensor(data=[0.5] * 767 + [True])}),
        (422, "is not 768 numbers", {"inputs": tensor(data=[0.5] * 767 + [None])}),
        (422, "is not 768 numbers", {"inputs": tensor(data=[[[[0.5] * 16] * 16] * 2 + [[0.5] * 16]])}),
        (422, "of a tensor are not read", {"inputs": tensor(parameters={"binary_data": True})}),
        (422, "of a tensor are not read", {"outputs": [{"name": "macs", "parameters": {"binary_data": True}}]}),
        (422, "'junk' is no member", {"junk": [1]}),
        (422, "more than 32 JSON objects", {"junk": [{}] * 32}),
        (422, "no text of at most 200 printable signs", {"id": "x" * 201}),
        (422, "no text of at most 200 printable signs", {"id": "\ud800"}),
        (422, "budget lists 1 numbers for 2 images", {"parameters": {"budget": [0.5]}}),
        (422, "'top' is no setting", {"parameters": {"top": 3}}),
        (422, "parameters is an object", {"parameters": 3}),
        (422, "outputs is a list", {"outputs": [{"name": "probabilities"}]}),
        (422, "outputs is a list", {"outputs": {}}),
        (422, "id=7 is no text", {"id": 7}),
        (422, "5 images in one request are more than the limit of 4", {"inputs": tensor(shape=[5, 3, 16, 16])}),
        (400, "not valid base64", {"inputs": tensor(datatype="BYTES", shape=[1], data=["!"])}),
    ],
    ids=lambda value: "" if isinstance(value, dict) else str(value),
)  # fmt: skip
def test_a_request_that_does_not_fit_the_protocol_is_refused(status, sentence, changes):
    answer = infer(**({"parameters": {}} | changes if "parameters" not in changes else changes))
    assert answer.status_code == status
    assert sentence in answer.json()["error"]


def test_a_text_among_the_numbers_does_not_take_its_length_for_each():
    raw = {"inputs": tensor(data=["x" * 10_000] + [1] * 767)}
    model = {"channels": 3, "img_size": [16, 16]}
    tracemalloc.start()
    try:
        with pytest.raises(Refusal, match="is not 768 numbers"):
            read_inference(raw, model)
        assert tracemalloc.get_traced_memory()[1] < 1_000_000  # 30 MB, as an array of texts
    finally:
        tracemalloc.stop()


def test_what_is_optional_may_be_null_and_json_may_be_said_to_be_json():
    answer = infer(id=None, parameters=None, outputs=None)
    assert (answer.status_code, "id" in answer.json()) == (200, False)
    assert tensors_of(answer) == ["logits", "macs", "exit_stage"]
    plain = {"parameters": {"binary_data": False}}
    answer = infer(inputs=tensor(**plain), parameters={}, outputs=[{"name": "macs", **plain}])
    assert (answer.status_code, tensors_of(answer)) == (200, ["macs"])


def test_one_bad_image_refuses_the_request_and_leaves_the_house_empty():
    service = make_service(Computer(PretendSession(), max_pixels=10_000))
    data = [0.5] * 768 + [1000.0] * 768
    answer = infer(service, inputs=tensor(shape=[2, 3, 16, 16], data=data))
    assert (answer.status_code, service.num_open) == (500, 0)


def test_the_protocol_s_other_routes():
    async def scene(client):
        paths = ("", "/health/live", "/health/ready", "/models/pretend", "/models/pretend/ready", "/models/other")
        return [await client.get(f"/v2{path}") for path in paths]

    server, live, ready, model, model_ready, other = talk(scene)
    assert server.json().keys() == {"name", "version", "extensions"}
    assert (live.status_code, ready.status_code, model_ready.json()["ready"]) == (200, 200, True)
    assert model.json()["inputs"] == [{"name": "image", "datatype": "FP32", "shape": [-1, 3, 16, 16]}]
    assert (other.status_code, "'pretend'" in other.json()["error"]) == (404, True)
    one, two = (f"/v2/models/pretend/versions/{version}" for version in (1, 2))
    assert (ask("GET", one).json(), ask("GET", f"{one}/ready").status_code) == (model.json(), 200)
    assert ask("POST", f"{one}/infer", json={"inputs": tensor()}).json()["model_version"] == "1"
    assert [ask("GET", f"{two}{path}").status_code for path in ("", "/ready")] == [404, 404]
    headers = {"Content-Type": "text/plain"}
    assert ask("POST", "/v2/models/pretend/infer", content=json.dumps({}), headers=headers).status_code == 415
