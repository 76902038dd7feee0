"""The Open Inference Protocol, version 2, over JSON: what its clients send and get. `parameters` holds the settings.

Source: https://github.com/kserve/open-inference-protocol, specification/protocol/inference_rest.md.
Beside it: a tensor of datatype BYTES holds photos in base64, and `parameters.budget` may be a list, one an image.
"""

import math
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np

from iret.serve.asks import NUMBERS, Ask, make_ask, read_settings, show
from iret.serve.bodies import decode_image
from iret.serve.computer import Result
from iret.serve.refusal import Refusal

SETTINGS = tuple(NUMBERS)
OUTPUTS = ("logits", "macs", "exit_stage")
MEMBERS = ("id", "parameters", "inputs", "outputs")  # of a request
VERSION = "1"
MOST_SIGNS = 200  # of an id
LARGEST = 1e6  # a normalised pixel is below 10; above some 1e18 the model's sums are infinite


@dataclass(frozen=True)
class Inference:
    """A request that was read: no more of it than is computed and echoed, since it is held until the answer."""

    images: list[tuple[bytes | np.ndarray, Ask]]
    wanted: list[str]  # names of outputs
    id: str | None


def describe_tensors(model: dict[str, Any]) -> dict[str, Any]:
    """Metadata of the model."""
    return {
        "name": model["name"],
        "versions": [VERSION],
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


def read_inference(raw: dict[str, Any], model: dict[str, Any]) -> Inference:
    """Of the images that `count_images` counted; raises `Refusal`."""
    tensor = _tensor(raw)
    batch = tensor["shape"][0]
    for name in raw.keys() - set(MEMBERS):
        raise Refusal(422, f"{show(name)} is no member of a request; they are {', '.join(MEMBERS)}.")
    asks, wanted, named = _read_settings(raw.get("parameters"), batch), _read_wanted(raw), _read_id(raw)
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
        raise Refusal(422, f"datatype {show(kind)} of the input is not read; send FP32 or BYTES.")
    return Inference(list(zip(images, asks, strict=True)), wanted, named)


def write_outputs(asked: Inference, model: dict[str, Any], results: list[Result]) -> dict[str, Any]:
    """The answer."""
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
    named = {} if asked.id is None else {"id": asked.id}
    return {
        "model_name": model["name"],
        "model_version": VERSION,
        **named,
        "outputs": [
            dict(zip(("name", "datatype", "shape", "data"), (name, *found[name]), strict=True)) for name in asked.wanted
        ],
    }


def _tensor(raw: dict[str, Any]) -> dict[str, Any]:
    inputs = raw.get("inputs")
    if not isinstance(inputs, list) or len(inputs) != 1 or not isinstance(inputs[0], dict):
        raise Refusal(422, "inputs is a list of one tensor, named 'image'.")
    if inputs[0].get("name") != "image":
        raise Refusal(422, f"the input is named {show(inputs[0].get('name'))}; its name is 'image'.")
    _check_parameters(inputs[0])
    return inputs[0]


def _check_parameters(tensor: dict[str, Any]) -> None:
    """Of one tensor: none but what says that there is nothing unusual about it."""
    parameters = tensor.get("parameters")
    if parameters not in (None, {}, {"binary_data": False}):
        raise Refusal(422, f"parameters={show(parameters)} of a tensor are not read; settings go beside inputs.")


def _read_id(raw: dict[str, Any]) -> str | None:
    named = raw.get("id")
    # Half of a surrogate pair, which JSON can spell and no answer can, is not printable either.
    if named is None or (isinstance(named, str) and named.isprintable() and len(named) <= MOST_SIGNS):
        return named
    raise Refusal(422, f"id={show(named)} is no text of at most {MOST_SIGNS} printable signs.")


def _read_settings(parameters: object, batch: int) -> list[Ask]:
    """One an image."""
    if parameters is None:
        return [Ask()] * batch
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
    count = math.prod(shape)
    flat = data if len(data) == count and not isinstance(data[0], list) else _flatten(data, shape)
    # Looked at one by one: of a text among numbers, NumPy would make an array of texts, all as long as the longest.
    if flat is None or len(flat) != count or not set(map(type, flat)) <= {int, float}:
        raise Refusal(422, f"data of the input is not {count} numbers, flat or nested as shape says.")
    try:
        numbers = np.array(flat, dtype=np.float64)
    except OverflowError:
        numbers = np.array([math.inf])
    if not (np.abs(numbers) <= LARGEST).all():
        raise Refusal(422, f"data of the input holds NaN or values beyond {LARGEST:g}; send normalised pixels.")
    return numbers.astype(np.float32).reshape(shape)


def _flatten(data: list[Any], shape: list[int]) -> list[Any] | None:
    """The innermost members of lists nested as `shape` says; None for lists nested otherwise."""
    rows = [data]
    for size in shape:
        if any(type(row) is not list or len(row) != size for row in rows):
            return None
        rows = list(chain.from_iterable(rows))
    return rows


def _read_wanted(raw: dict[str, Any]) -> list[str]:
    """Names of the outputs asked for; all, if none is."""
    wanted = raw.get("outputs")
    if wanted is None:
        return list(OUTPUTS)
    if not isinstance(wanted, list) or not all(
        isinstance(each, dict) and each.get("name") in OUTPUTS for each in wanted
    ):
        raise Refusal(422, f"outputs is a list of tensors named {', '.join(OUTPUTS)}.")
    for each in wanted:
        _check_parameters(each)
    return [each["name"] for each in wanted] or list(OUTPUTS)
