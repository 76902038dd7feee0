"""What stands around a network, whatever is inside: its photos and labels, its operating points, its folder and the hub.

A model folder holds `config.json`, `model.safetensors` and, once they are known, the operating points in `points.json`.

Read next: `model`, the network; `weights`, how files are written and read.
"""

import json
import logging
import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from huggingface_hub import PyTorchModelHubMixin, snapshot_download
from jaxtyping import Float
from torch import Tensor, nn

from iret.doctor import describe_device
from iret.runtime.cost import Shape, full_macs
from iret.runtime.points import (
    FILE_NAME as POINTS_NAME,
    MEASURE_MODEL,
    OperatingPoints,
    Setting,
    budget_of,
    setting_of,
)
from iret.runtime.preprocess import Preprocess, Source
from iret.vit import lay_out
from iret.weights import (
    CONFIG_NAME,
    WEIGHTS_NAME,
    load_exactly,
    read_config,
    read_weights,
    to_safetensors,
    write_together,
)

log = logging.getLogger(__name__)

FORMAT = 1
EARLIER = re.compile(rb'\{\s*"format": [12]\b')  # tables of points
LACKING = "this model has none yet; measure them on held-out images with `iret calibrate MODEL --data DATA`"
C = TypeVar("C", bound="Classifier")


class Classifier(
    nn.Module, PyTorchModelHubMixin, library_name="iret", license="apache-2.0", tags=["image-classification"]
):
    """A network of a `Shape` with all that a user of it needs beside its layers."""

    pos_embed: nn.Parameter  # the device and the number format of the network are its

    def __init__(self, shape: Shape, *, attention: str, name: str) -> None:
        super().__init__()
        self.shape, self.attention, self.name = shape, attention, name
        half = (0.5,) * shape.in_chans
        self.preprocessing = Preprocess(img_size=shape.img_size, mean=half, std=half)
        self.labels: tuple[str, ...] | None = None
        self.points: OperatingPoints | None = None
        self.own_precision: str | None = None  # of a copy that `iret.precision` converted

    @property
    def num_features(self) -> int:
        return self.shape.embed_dims[-1]

    @property
    def num_classes(self) -> int:
        return self.shape.num_classes

    def setting(self, budget: float) -> Setting:
        """Thresholds and exit confidence for a budget, from this model's operating points."""
        return setting_of(self.points, budget, len(self.shape.depths) - 1, LACKING)

    def budget_for(self, *, ms: float | None = None, joules: float | None = None) -> float:
        """The budget that costs so many milliseconds or joules an image on the device the model is on."""
        device = describe_device(self.pos_embed.device, self.precision)
        return budget_of(self.points, device, ms=ms, joules=joules, lacking=LACKING, remedy=MEASURE_MODEL)

    @property
    def precision(self) -> str:
        """What its products are computed in here: of `PRECISIONS`, or torch's name of another number format."""
        if self.own_precision:
            return self.own_precision
        kind = self.pos_embed.device.type
        return str(torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else self.pos_embed.dtype)[6:]

    def preprocess(self, images: Source | Sequence[Source] | np.ndarray) -> Float[Tensor, "B C Y X"]:
        """Photos (a path, bytes, a PIL image, or a list of these) as the model takes them, on its device."""
        return torch.from_numpy(self.preprocessing(images)).to(self.pos_embed.device)

    def normalise(self, images: Float[Tensor, "B C Y X"]) -> Float[Tensor, "B C Y X"]:
        """Images with values in [0, 1] as the model takes them."""
        own = self.preprocessing
        mean, std = (torch.tensor(values, device=images.device).view(-1, 1, 1) for values in (own.mean, own.std))
        return (images - mean) / std

    def check_images(self, images: Tensor) -> None:
        """Raises ValueError for what is no floating [B, C, Y, X] of this model's size and number format."""
        if not isinstance(images, Tensor):
            raise ValueError(
                f"images are a {type(images).__name__}, not a tensor; model.preprocess makes one of photos."
            )
        wanted = (self.shape.in_chans, *self.shape.img_size)
        if images.dim() != 4 or not len(images) or tuple(images.shape[1:]) != wanted or not images.is_floating_point():
            raise ValueError(
                f"images are {images.dtype} {tuple(images.shape)}; this model takes floating [B, "
                f"{', '.join(map(str, wanted))}], B 1 or more. model.preprocess makes them from photos."
            )
        if images.dtype != self.pos_embed.dtype and not torch.is_autocast_enabled(images.device.type):
            raise ValueError(
                f"images are {images.dtype}, the model {self.pos_embed.dtype}; convert one, or use torch.autocast."
            )

    def refuse_no_numbers(self, images: Tensor) -> None:
        """Raises ValueError for images with NaN or infinite values; it reads all of them."""
        if not images.isfinite().all():
            raise ValueError("images hold NaN or infinite values; check how they were read and normalised.")

    def save_pretrained(
        self, save_directory: str | Path, *, repo_id: str | None = None, push_to_hub: bool = False, **push_options
    ) -> str | None:
        """Write the model folder, atomically, and push it to the hub if asked."""
        self._save_pretrained(Path(save_directory))
        return self.push_to_hub(repo_id or Path(save_directory).name, **push_options) if push_to_hub else None

    def _save_pretrained(self, save_directory: Path) -> None:
        if save_directory.is_file():
            raise ValueError(f"{save_directory} is a file; name a folder to save the model in.")
        if self.own_precision:
            raise ValueError(f"a model in {self.own_precision} cannot be saved; save the model that it was made from.")
        config = {
            "format": FORMAT,
            "name": self.name,
            "shape": asdict(self.shape),
            "attention": self.attention,
            "preprocess": self.preprocessing.to_dict(),
            "labels": self.labels,
        }
        files = {
            WEIGHTS_NAME: to_safetensors(self.state_dict()),
            CONFIG_NAME: (json.dumps(config, indent=1) + "\n").encode(),
        }
        if self.points is not None:
            files[POINTS_NAME] = self.points.to_json().encode()
        write_together({save_directory / name: content for name, content in files.items()})
        if self.points is None:
            (save_directory / POINTS_NAME).unlink(missing_ok=True)  # of a model that was here before

    @classmethod
    def from_folder(cls: type[C], folder: Path) -> C:
        """A saved model, in eval mode.

        Raises:
            ValueError: a file is missing, damaged, of a newer format, or does not fit the others.
        """
        source = folder / CONFIG_NAME
        config = read_config(source)
        if config.get("format") != FORMAT:
            raise ValueError(f"{source} has format {config.get('format')!r}; this version of iret reads {FORMAT}.")
        try:
            shape = Shape.from_dict(config["shape"])
            model = cls(shape, attention=config["attention"], name=config["name"])
            model.preprocessing = Preprocess.from_dict(config["preprocess"])
            model.labels = None if config["labels"] is None else tuple(config["labels"])
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{source} is not the configuration of an Iret ({error!r}).") from error
        if model.labels is not None and len(model.labels) != shape.num_classes:
            raise ValueError(f"{source} names {len(model.labels)} labels for a model of {shape.num_classes} classes.")
        load_exactly(model, read_weights(folder / WEIGHTS_NAME), str(folder / WEIGHTS_NAME))
        points = read_points(folder)
        if points is not None and not points.fit(full_macs(shape), len(shape.depths) - 1):
            raise ValueError(f"{folder / POINTS_NAME} belongs to another model; run `iret calibrate` again.")
        model.points = points
        lay_out(model)
        return model.eval()

    @classmethod
    def from_pretrained(
        cls: type[C], pretrained_model_name_or_path: str | Path, *, revision: str | None = None, **hub_options
    ) -> C:
        """A saved model from a folder or a hub repository; further options are those of `huggingface_hub.snapshot_download`.

        Raises:
            ValueError: as `from_folder`.
        """
        folder = Path(pretrained_model_name_or_path)
        if not folder.is_dir():
            hub_options["allow_patterns"] = [CONFIG_NAME, WEIGHTS_NAME, POINTS_NAME]
            folder = Path(snapshot_download(str(pretrained_model_name_or_path), revision=revision, **hub_options))
        return cls.from_folder(folder)


def read_points(folder: Path) -> OperatingPoints | None:
    """The operating points in a model folder, None if there are none, or of an earlier version, which is said.

    Raises:
        ValueError: a file that is no table.
    """
    path = folder / POINTS_NAME
    if path.exists() and EARLIER.match(path.read_bytes()):
        log.warning(
            "%s counts MACs as an earlier version of iret did and is left out: run `iret calibrate` again with --data, or, of a "
            "copy of a shipped model, `iret calibrate NAME --device-only --out FOLDER`.",
            path,
        )
        return None
    return OperatingPoints.read(folder)
