"""Models by name: presets to train, shipped checkpoints to use, folders and hub repositories. Knows all models."""

from dataclasses import fields, replace
from pathlib import Path

from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from iret.model import Iret
from iret.presets import CHECKPOINTS, PRESETS, list_checkpoints, preset
from iret.runtime.bundle import FILE_NAME as BUNDLE_NAME
from iret.runtime.cost import Shape

SHAPE_OPTIONS = tuple(field.name for field in fields(Shape))


def create_model(
    name: str,
    *,
    attention: str = "softmax",
    drop_path_rate: float = 0.0,
    img_size: int | tuple[int, int] | None = None,
    **shape,
) -> Iret:
    """A preset with fresh weights, e.g. `create_model("iret_small", num_classes=10, img_size=(192, 320), in_chans=1)`.

    `img_size` is a side or (rows, columns) in pixels, multiples of the patch size; any further option is a field of
    `iret.Shape` and replaces the preset's.

    Raises:
        ValueError: an unknown name or option, or a shape that does not add up.
    """
    unknown = set(shape) - set(SHAPE_OPTIONS)
    if "pretrained" in unknown:
        raise ValueError(f"a preset has no weights; iret.load loads a trained model: {', '.join(list_checkpoints())}.")
    if unknown:
        raise ValueError(f"option {sorted(unknown)[0]!r} is unknown; a model takes {', '.join(SHAPE_OPTIONS)}.")
    if img_size is not None:
        shape["img_size"] = (img_size, img_size) if isinstance(img_size, int) else tuple(img_size)
    return Iret(replace(preset(name), **shape), attention=attention, drop_path_rate=drop_path_rate, name=name)


def list_models() -> list[str]:
    """Names for `create_model`."""
    return list(PRESETS)


def load(model: str | Path) -> Iret:
    """A trained model in eval mode: a shipped name, a folder, or a Hugging Face hub id (owner/name).

    Raises:
        ValueError: nothing of that name, or its files are damaged.
    """
    if str(model) in list_checkpoints():
        return Iret.from_folder(CHECKPOINTS / str(model))
    if (Path(model) / BUNDLE_NAME).is_file():
        raise ValueError(
            f"{model} is an exported bundle, no model folder; run it with iret.Session({str(model)!r}) in Python or "
            f"`iret serve {model}`, and time it with `iret calibrate {model} --device-only`."
        )
    if Path(model).is_dir():
        return Iret.from_folder(Path(model))
    if str(model) in PRESETS:
        raise ValueError(
            f"{model} is a preset, a shape without weights: train one (`iret train`), save one of `iret.create_model` with "
            f"save_pretrained(FOLDER), or take a shipped checkpoint ({', '.join(list_checkpoints())})."
        )
    if str(model).count("/") != 1 or str(model).startswith((".", "/", "~")):
        raise ValueError(
            f"model {str(model)!r} is neither a shipped checkpoint ({', '.join(list_checkpoints())}) nor a folder nor "
            "a hub id (owner/name)."
        )
    try:
        return Iret.from_pretrained(str(model))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ValueError(
            f"model {str(model)!r} is no folder here and could not be fetched from the Hugging Face hub "
            f"({type(error).__name__}); check the name and the network."
        ) from error
