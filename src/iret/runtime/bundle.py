"""A bundle: a model as graph files of one engine, with everything else a device needs in `bundle.json`.

`bundle.json` holds the shape, the preprocessing, the labels, the operating points, which file runs which stage, what was
checked when it was written, and a checksum of every file. NumPy and the standard library only.
"""

import hashlib
import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from iret.runtime.cost import Shape
from iret.runtime.points import OperatingPoints
from iret.runtime.preprocess import Preprocess

FORMAT = 1
FILE_NAME = "bundle.json"
ENGINES = {"onnx": ("onnxruntime", "openvino"), "openvino": ("openvino",), "executorch": ("executorch",)}


@dataclass(frozen=True)
class GraphFile:
    """One graph. `tokens`: the only count per image it takes, class token included; None: any."""

    file: str
    tokens: int | None = None


@dataclass(frozen=True, kw_only=True)
class Bundle:
    """What `bundle.json` says. `stages` lists the graphs of each stage; a single graph is one stage that does it all."""

    name: str
    kind: str  # a key of ENGINES
    is_single: bool
    precision: str  # "float32" or "int8"
    shape: Shape
    preprocess: Preprocess
    labels: tuple[str, ...] | None
    points: OperatingPoints | None
    stages: tuple[tuple[GraphFile, ...], ...]
    max_batch: int | None  # images a call at most; None: any
    checksums: dict[str, str]  # file -> SHA-256
    versions: dict[str, str] = field(default_factory=dict)
    check: dict[str, Any] = field(default_factory=dict)  # how far it was from the model, when it was written

    def to_json(self) -> str:
        """`read` reads it."""
        raw = asdict(self)
        raw["points"] = None if self.points is None else json.loads(self.points.to_json())
        return json.dumps({"format": FORMAT, **raw}, indent=1) + "\n"

    @classmethod
    def read(cls, folder: Path) -> "Bundle":
        """Raises ValueError for a missing, malformed or newer file."""
        path = folder / FILE_NAME
        if not path.is_file():
            raise ValueError(
                f"{path} does not exist; `iret export MODEL --format onnx --out {folder}` writes a bundle."
            )
        try:
            raw = json.loads(path.read_bytes())
        except ValueError as error:
            raise ValueError(f"{path} is not valid JSON ({error}); export the model again.") from error
        if not isinstance(raw, dict) or raw.pop("format", None) != FORMAT:
            raise ValueError(f"{path} is not a bundle of format {FORMAT}, which this version of iret reads.")
        try:
            points = raw.pop("points")
            fixed: dict[str, Any] = {
                "shape": Shape.from_dict(raw.pop("shape")),
                "preprocess": Preprocess.from_dict(raw.pop("preprocess")),
                "labels": None if raw["labels"] is None else tuple(raw["labels"]),
                "points": None if points is None else OperatingPoints.from_json(json.dumps(points), str(path)),
                "stages": tuple(tuple(GraphFile(**graph) for graph in stage) for stage in raw.pop("stages")),
            }
            return cls(**raw | fixed)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is not a bundle's description ({error!r}); export the model again.") from error

    def with_check(self, found: dict[str, Any]) -> "Bundle":
        """The same with what was found when it was checked against the model."""
        return replace(self, check=found)

    def verify(self, folder: Path) -> None:
        """Raises ValueError for a file that is missing or not the one that was written."""
        for name, expected in self.checksums.items():
            path = folder / name
            if Path(name).name != name or not path.is_file():
                raise ValueError(f"{path} is missing; a bundle is moved as a whole folder.")
            if checksum(path) != expected:
                raise ValueError(f"{path} is damaged or was changed; copy the bundle again.")


def checksum(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
