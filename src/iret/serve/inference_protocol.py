"""The Open Inference Protocol, version 2, over JSON: what its clients send and get. `parameters` holds the settings.

Source: https://github.com/kserve/open-inference-protocol, specification/protocol/inference_rest.md.
Beside it: a tensor of datatype BYTES holds photos in base64, and `parameters.budget` may be a list, one an image.
"""

import math
from typing import Any

import numpy as np

from iret.serve.asks import NUMBERS, Ask, make_ask, read_settings
from iret.serve.bodies import decode_image
from iret.serve.computer import Result
from iret.serve.refusal import Refusal

SETTINGS = tuple(NUMBERS)
OUTPUTS = ("logits", "macs", "exit_stage")


def describe_tensors(model: dict[str, Any]) -> dict[str, Any]:
    """Metadata of the model."""
    return {
        "name": model["name"],
        "versions": ["1"],
        "platform": f"iret_{model['engine']}",
        "inputs": [{"name": "image", "datatype": "FP32", "shape": [-1, model["channels"], *model["img_size"]]}],
        "outputs": [
            {"name": "logits", "datatype": "FP32", "shape": [-1, model["classes"]]},
            {"name": "macs", "datatype": "INT64", "shape": [-1]},
            {"name": "exit_stage", "datatype": "INT64", "shape": [-1]},
        ],
    }


def count_images(raw: dict[str, Any]) -> int:
    """How many the request says it holds, before they are looked at; raises `Refusal`."""
    shape = _tensor(raw).get("shape")
    if (
        not isinstance(shape, list)
        or not shape
        or not all(type(each) is int and 0 < each < 2**31 for each in shape)
        or len(shape) not in (1, 4)
    ):
        raise Refusal(422, "shape of the input is [B] for photos or [B, C, Y, X] for FP32, of whole numbers above 0.")
    return shape[0]


def read_inputs(raw: dict[str, Any], model: dict[str, Any]) -> list[tuple[bytes | np.ndarray, Ask]]:
    """Images and their settings; raises `Refusal`."""
    tensor = _tensor(raw)
    batch = count_images(raw)
    asks = _read_settings(raw.get("parameters", {}), batch)
    _read_wanted(raw)
    data, kind = tensor.get("data"), tensor.get("datatype")
    if not isinstance(data, list):
        raise Refusal(422, "data of the input is missing or no list; binary tensors are not read.")
    images: list[Any]
    if kind == "BYTES":
        if tensor["shape"] != [batch] or len(data) != batch:
            raise Refusal(422, f"data holds {len(data)} photos, but shape is {tensor['shape']}.")
        images = [decode_image(photo) for photo in data]
    elif kind == "FP32":
        images = list(_read_floats(data, tensor["shape"], [batch, model["channels"], *model["img_size"]]))
    else:
        raise Refusal(422, f"datatype {str(kind)[:20]!r} of the input is not read; send FP32 or BYTES.")
    return list(zip(images, asks, strict=True))


def write_outputs(raw: dict[str, Any], model: dict[str, Any], results: list[Result]) -> dict[str, Any]:
    """The answer to a request that was read."""
    batch = len(results)
    found: dict[str, tuple[str, list[int], list[Any]]] = {
        "logits": (
            "FP32",
            [batch, model["classes"]],
            [float(value) for result in results for value in result.logits],
        ),
        "macs": ("INT64", [batch], [result.macs for result in results]),
        "exit_stage": ("INT64", [batch], [result.exit_stage for result in results]),
    }
    named = {"id": raw["id"]} if "id" in raw else {}
    return {
        "model_name": model["name"],
        "model_version": "1",
        **named,
        "outputs": [
            dict(zip(("name", "datatype", "shape", "data"), (name, *found[name]), strict=True))
            for name in _read_wanted(raw)
        ],
    }


def _tensor(raw: dict[str, Any]) -> dict[str, Any]:
    inputs = raw.get("inputs")
    if not isinstance(inputs, list) or len(inputs) != 1 or not isinstance(inputs[0], dict):
        raise Refusal(422, "inputs is a list of one tensor, named 'image'.")
    if inputs[0].get("name") != "image":
        raise Refusal(422, f"the input is named {str(inputs[0].get('name'))[:40]!r}; its name is 'image'.")
    if not isinstance(raw.get("id", ""), str):
        raise Refusal(422, "id is a text.")
    return inputs[0]


def _read_settings(parameters: object, batch: int) -> list[Ask]:
    """One an image."""
    if not isinstance(parameters, dict):
        raise Refusal(422, 'parameters is an object of settings, e.g. {"budget": 0.4}.')
    budgets = parameters.get("budget")
    if not isinstance(budgets, list):
        return [_read_one(parameters)] * batch
    if len(budgets) != batch:
        raise Refusal(422, f"budget lists {len(budgets)} numbers for {batch} images; give one each.")
    return [_read_one(parameters | {"budget": budget}) for budget in budgets]


def _read_one(parameters: dict[str, Any]) -> Ask:
    return make_ask(read_settings(parameters, is_text=False, names=SETTINGS))


def _read_floats(data: list[Any], shape: list[int], wanted: list[int]) -> np.ndarray:
    if shape != wanted:
        raise Refusal(422, f"shape {shape} does not fit; this model takes {['B', *wanted[1:]]}, normalised.")
    try:
        numbers = np.asarray(data)
    except ValueError as error:
        raise Refusal(422, "data of the input is ragged; give numbers, flat or nested as shape says.") from error
    if numbers.dtype.kind not in "fiu" or numbers.shape not in ((math.prod(shape),), tuple(shape)):
        raise Refusal(422, f"data of the input is not {math.prod(shape)} numbers, flat or nested as shape says.")
    with np.errstate(over="ignore"):
        floats = np.ascontiguousarray(numbers.reshape(shape), dtype=np.float32)
    if not np.isfinite(floats).all():
        raise Refusal(422, "data of the input holds NaN, infinite or huge values.")
    return floats


def _read_wanted(raw: dict[str, Any]) -> list[str]:
    """Names of the outputs asked for; all, if none is."""
    wanted = raw.get("outputs", [])
    if not isinstance(wanted, list) or not all(
        isinstance(each, dict) and each.get("name") in OUTPUTS for each in wanted
    ):
        raise Refusal(422, f"outputs is a list of tensors named {', '.join(OUTPUTS)}.")
    return [each["name"] for each in wanted] or list(OUTPUTS)
