"""A model folder: `config.json`, `model.safetensors`, and `points.json` once operating points are known.

Written together: a write that fails (disk full) leaves every old file as it was. Nothing is ever unpickled.
"""

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"


def write_atomically(path: Path, content: bytes) -> None:
    """Put `content` at `path` whole, or leave what was there.

    Raises:
        OSError: the disk is full or the folder cannot be written; the old file is intact and nothing is left behind.
    """
    write_together({path: content})


def write_together(files: Mapping[Path, bytes]) -> None:
    """Put every content at its path, or leave all of them as they were: nothing is renamed before all are on disk.

    Raises:
        OSError: as `write_atomically`.
    """
    written: list[tuple[str, Path]] = []
    try:
        for path, content in files.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
            written.append((name, path))
            with os.fdopen(handle, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(name, 0o644)  # mkstemp's 0600 would keep other users from loading the model
        for name, path in written:
            os.replace(name, path)
    except BaseException:
        for name, _ in written:
            Path(name).unlink(missing_ok=True)
        raise


def write_weights(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Save tensors as safetensors, atomically."""
    write_atomically(path, to_safetensors(tensors, metadata))


def to_safetensors(tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> bytes:
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    return save(contiguous, metadata or {"format": "pt"})


def read_weights(path: Path) -> dict[str, Tensor]:
    """Raises ValueError for a missing, truncated or foreign file."""
    if not path.is_file():
        raise ValueError(f"{path} does not exist; a model folder holds {CONFIG_NAME} and {WEIGHTS_NAME}.")
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is not a whole safetensors file ({error}); download or write it again.") from error


def holds(folder: Path, weights: Mapping[str, Tensor]) -> bool:
    """Whether these are the weights of the model that is saved there."""
    try:
        there = read_weights(folder / WEIGHTS_NAME)
    except ValueError:
        return False
    return there.keys() == weights.keys() and all(
        there[name].dtype == each.dtype and torch.equal(there[name], each.cpu()) for name, each in weights.items()
    )


def read_config(path: Path) -> dict:
    """Raises ValueError for a missing or malformed file."""
    if not path.is_file():
        raise ValueError(f"{path} does not exist; a model folder holds {CONFIG_NAME} and {WEIGHTS_NAME}.")
    try:
        config = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}).") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} holds {type(config).__name__}, not an object with the model's settings.")
    return config


def load_exactly(model: nn.Module, weights: dict[str, Tensor], source: str) -> None:
    """Load weights that must fit in every name and shape.

    Raises:
        ValueError: they belong to another preset, with the first thing that does not fit.
    """
    own = model.state_dict()
    for name in sorted(own.keys() | weights.keys()):
        here, there = own.get(name), weights.get(name)
        if here is None or there is None or here.shape != there.shape:
            seen = "missing" if there is None else f"{tuple(there.shape)}"
            wanted = "nothing" if here is None else f"{tuple(here.shape)}"
            raise ValueError(f"{source} belongs to another model: {name} is {seen}, this one needs {wanted}.")
    model.load_state_dict(weights)
