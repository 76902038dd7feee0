"""A bundle: a model as graph files of one engine, with everything else a device needs in `bundle.json`.

`bundle.json` holds the shape, the preprocessing, the labels, the operating points, which file runs which stage, what was
checked when it was written, and a checksum of every file. NumPy and the standard library only.
"""

import hashlib
import json
import os
import shutil
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from iret.runtime.cost import Shape, full_macs
from iret.runtime.points import OperatingPoints
from iret.runtime.preprocess import Preprocess

FORMAT = 4  # 1: its graphs took tokens image after image; 2: a single graph gave grids; 3: dropped tokens passed one more MLP
FILE_NAME = "bundle.json"
PRECISIONS = ("float32", "int8")
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
    precision: str  # one of PRECISIONS
    shape: Shape
    preprocess: Preprocess
    labels: tuple[str, ...] | None
    points: OperatingPoints | None
    stages: tuple[tuple[GraphFile, ...], ...]
    max_batch: int | None  # images a call at most; None: any
    checksums: dict[str, str]  # file -> SHA-256
    is_convolved: bool = False  # layers of its wide stages are convolutions
    versions: dict[str, str] = field(default_factory=dict)
    check: dict[str, Any] = field(default_factory=dict)  # how far it was from the model, when it was written

    def __post_init__(self) -> None:
        graphs = [graph for stage in self.stages for graph in stage]
        files = {graph.file for graph in graphs}
        if self.kind == "openvino":
            files |= {str(Path(file).with_suffix(".bin")) for file in files}
        wrong = {
            f"kind {self.kind!r} is none of {', '.join(ENGINES)}": self.kind not in ENGINES,
            f"precision {self.precision!r} is none of {', '.join(PRECISIONS)}": self.precision not in PRECISIONS,
            f"it has graphs of {len(self.stages)} stages": len(self.stages)
            != (1 if self.is_single else len(self.shape.depths)),
            "a stage has no graph": not all(self.stages),
            "a graph has no checksum": not files <= set(self.checksums),
            "a file has a path": any(Path(name).name != name for name in self.checksums),
            "no graph takes every patch": not all(
                any(graph.tokens in (None, 1 + self.shape.num_patches) for graph in stage) for stage in self.stages
            ),
            "its labels are not as many as its classes": len(self.labels or ()) not in (0, self.shape.num_classes),
            "its preprocessing makes images of another size": self.preprocess.img_size != self.shape.img_size,
            f"max_batch is {self.max_batch!r}": not (
                self.max_batch is None or (type(self.max_batch) is int and self.max_batch > 0)
            ),
            "its operating points are another model's": self.points is not None
            and not self.points.fit(full_macs(self.shape), len(self.shape.depths) - 1),
        }
        found = [sentence for sentence, is_wrong in wrong.items() if is_wrong]
        if found:
            raise ValueError(f"{found[0]}; export the model again")

    def to_json(self) -> str:
        """`read` reads it."""
        raw = asdict(self)
        raw["points"] = None if self.points is None else json.loads(self.points.to_json())
        return json.dumps({"format": FORMAT, **raw}, indent=1) + "\n"

    def write(self, folder: Path) -> None:
        """Put `bundle.json` into `folder`, whole, or leave what was there.

        Raises:
            OSError: the folder cannot be written, or the disk is full.
        """
        path, scratch = folder / FILE_NAME, folder / f".{FILE_NAME}.{os.getpid()}"
        try:
            scratch.write_text(self.to_json())
            scratch.replace(path)
        finally:
            scratch.unlink(missing_ok=True)

    @classmethod
    def read(cls, folder: Path) -> "Bundle":
        """Raises ValueError for a missing, malformed or newer file."""
        path = folder / FILE_NAME
        if (folder / "model.safetensors").is_file() and not path.is_file():
            raise ValueError(f"{folder} is a model folder; `iret export {folder} --out BUNDLE` makes a bundle of it.")
        if not path.is_file():
            raise ValueError(
                f"{path} does not exist; `iret export MODEL --format onnx --out {folder}` writes a bundle."
            )
        try:
            raw = json.loads(path.read_bytes())
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path} is not valid JSON ({error}); export the model again.") from error
        version = raw.pop("format", None) if isinstance(raw, dict) else None
        if isinstance(version, int) and version > FORMAT:
            raise ValueError(f"{path} was written by a newer iret, in format {version}; update iret to read it.")
        if version != FORMAT:
            raise ValueError(
                f"{path} has format {version!r}; this version of iret reads bundles of format {FORMAT}: export the model "
                "again with it."
            )
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
        except (KeyError, TypeError, AttributeError, ValueError, ArithmeticError) as error:
            raise ValueError(f"{path} does not describe a bundle: {error or type(error).__name__}.") from error

    def with_check(self, found: dict[str, Any]) -> "Bundle":
        """The same with what was found when it was checked against the model."""
        return replace(self, check=found)

    def verify(self, folder: Path) -> None:
        """Raises ValueError for a file that is missing or not the one that was written."""
        for name, expected in self.checksums.items():
            path = folder / name
            if not path.is_file():
                raise ValueError(f"{path} is missing; a bundle is moved as a whole folder.")
            if checksum(path) != expected:
                raise ValueError(f"{path} is damaged or was changed; copy the bundle again.")


def checksum(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def replace_folder(new: Path, out: Path) -> None:
    """`new`, finished and on the same disk, becomes `out`; an older `out` is there until then, and again if that fails."""
    if not out.exists():
        new.rename(out)
        return
    older = new.with_name(new.name + ".old")
    out.rename(older)
    try:
        new.rename(out)
    except BaseException:
        older.rename(out)
        raise
    shutil.rmtree(older, ignore_errors=True)
