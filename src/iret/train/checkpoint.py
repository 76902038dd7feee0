"""The state of a run in one safetensors file: model, running mean, optimiser, step. Replaced atomically, never unpickled."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from iret.train.recipe import Recipe
from iret.weights import load_exactly, write_weights

FILE_NAME = "train_state.safetensors"
FORMAT = "1"


@dataclass(frozen=True)
class Progress:
    """How far a run is."""

    step: int = 0
    time_s: float = 0.0  # training time over all legs
    skipped: int = 0  # corrupt images met
    seed: int = 0
    num_processes: int = 1
    machine: str = ""  # the processor


def save_state(
    folder: Path, model: nn.Module, ema: nn.Module, optimizer: torch.optim.Optimizer, recipe: Recipe, progress: Progress
) -> None:
    """Raises OSError when it cannot be written (disk full); the previous state is then intact."""
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    tensors |= {f"ema.{name}": tensor for name, tensor in ema.state_dict().items()}
    for name, parameter in model.named_parameters():
        for slot, tensor in optimizer.state.get(parameter, {}).items():
            tensors[f"optimizer.{slot}.{name}"] = tensor
    metadata = {"format": FORMAT, "recipe": json.dumps(asdict(recipe)), "progress": json.dumps(asdict(progress))}
    write_weights(folder / FILE_NAME, tensors, metadata)


def load_state(
    folder: Path, model: nn.Module, ema: nn.Module, optimizer: torch.optim.Optimizer, recipe: Recipe, seed: int
) -> Progress:
    """Put a saved run back.

    Raises:
        ValueError: no state there, a damaged one, or one of another recipe.
    """
    path = folder / FILE_NAME
    if not path.is_file():
        raise ValueError(f"{path} does not exist, so there is nothing to resume; leave out --resume to start.")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is not a whole training state ({error}); start again without --resume.") from error
    if metadata.get("format") != FORMAT:
        raise ValueError(f"{path} was written by another version of iret; start again without --resume.")
    progress = Progress(**json.loads(metadata["progress"]))
    wanted = json.loads(json.dumps(asdict(recipe))) | {"seed": seed}
    saved = {"eval_epochs": wanted["eval_epochs"]}  # older states do not say it, and it changes no step
    _check_same(saved | json.loads(metadata["recipe"]) | {"seed": progress.seed}, wanted, path)
    load_exactly(model, _under("model.", tensors), str(path))
    load_exactly(ema, _under("ema.", tensors), str(path))
    parameters, is_fused = dict(model.named_parameters()), bool(optimizer.defaults.get("fused"))
    for key, tensor in _under("optimizer.", tensors).items():
        slot, name = key.split(".", 1)
        parameter = parameters[name]
        is_moved = slot != "step" or is_fused  # the step stays on the host unless the fused optimizer counts it
        optimizer.state[parameter][slot] = tensor.to(parameter.device) if is_moved else tensor
    return progress


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _check_same(saved: dict, wanted: dict, path: Path) -> None:
    for key in wanted.keys() | saved.keys():
        if saved.get(key) != wanted.get(key):
            raise ValueError(
                f"{path} belongs to another run: its {key} is {saved.get(key)!r}, now {wanted.get(key)!r}; "
                "resume with the same recipe or choose another --out."
            )
