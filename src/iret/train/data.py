"""Labelled images from a folder, parquet files, a Hugging Face data set or the embedded digits, by one argument.

Images are decoded and fitted when they are asked for; augmentation works later, on whole batches. The order of an epoch is a
pure function of (seed, epoch), and the global batches are the same for any number of processes.
"""

import json
import re
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from jaxtyping import Int, UInt8
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from iret.runtime.preprocess import Preprocess, Source, open_image
from iret.train.digits import ClutteredDigits

EMBEDDED = "cluttered-digits"
SPLIT_NAMES = {"train": ("train",), "val": ("val", "valid", "validation"), "test": ("test",)}
HELD_OUT = 20  # one image in so many is held out where the data has no validation split
MAX_HELD_BYTES = 2**30  # parquet files of more than this together stay on disk, decoded images of more are not kept
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm"}
LABEL_COLUMNS = ("label", "labels", "fine_label", "class", "target")

Batch = tuple[UInt8[Tensor, "b C Y X"], Int[Tensor, " b"], int]


class ImageData(Dataset):
    """Images with labels; item i is (uint8 [C, Y, X], label), or None for a corrupt image that is to be skipped.

    What this process decoded is kept where all of the split fits into `MAX_HELD_BYTES`; loader workers keep nothing.
    """

    def __init__(
        self,
        rows: Sequence[int] | np.ndarray,
        read: Callable[[int], tuple[Source | np.ndarray, int]],
        class_names: Sequence[str],
        preprocess: Preprocess,
        on_corrupt: str,
        split: str = "train",
    ) -> None:
        if on_corrupt not in ("skip", "stop"):
            raise ValueError(f"on_corrupt={on_corrupt!r} is unknown; choose skip or stop.")
        self.rows, self.read, self.preprocess, self.on_corrupt = rows, read, preprocess, on_corrupt
        self.class_names = [str(name) for name in class_names]
        self.split = split  # the one it is, which may stand in for the one that was asked for
        height, width = preprocess.img_size
        self._is_kept = len(rows) * 3 * height * width <= MAX_HELD_BYTES
        self._decoded: dict[int, tuple[Tensor, int] | None] = {}

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[UInt8[Tensor, "C Y X"], int] | None:
        if index in self._decoded:
            return self._decoded[index]
        item = self._decode(index)
        if self._is_kept and get_worker_info() is None:  # a worker ends with the epoch
            self._decoded[index] = item
        return item

    def _decode(self, index: int) -> tuple[UInt8[Tensor, "C Y X"], int] | None:
        row = int(self.rows[index])
        source, label = self.read(row)
        try:
            image = open_image(Image.fromarray(source) if isinstance(source, np.ndarray) else source)
        except ValueError as error:
            if self.on_corrupt == "stop":
                raise ValueError(f"image {row} cannot be read: {error}") from error
            return None
        if not 0 <= label < self.num_classes:
            raise ValueError(f"image {row} has label {label}, which is none of the {self.num_classes} classes.")
        pixels = self.preprocess.fit(image)
        return torch.from_numpy(pixels.copy()).permute(2, 0, 1), label


def open_data(
    spec: str,
    split: str,
    preprocess: Preprocess,
    *,
    on_corrupt: str = "skip",
    label_column: str | None = None,
) -> ImageData:
    """The `split` (train, val, test) of `spec`: cluttered-digits, a folder of class folders, parquet, or a hub id.

    `hf:ID` is a hub id even if a folder of that name exists. Where the data has no validation split, one training image in
    twenty is held out for it, chosen by its number; the test split is never used for it. Without a test split, `test` is the
    validation split. A parquet file on its own is the split that its name begins with, else train.

    Raises:
        ValueError: nothing there, no labels, or a split that does not exist.
    """
    if split not in SPLIT_NAMES:
        raise ValueError(f"split={split!r} is unknown; choose from {', '.join(SPLIT_NAMES)}.")
    path = Path(spec)
    if spec == EMBEDDED:
        digits = ClutteredDigits(split, size=preprocess.img_size)
        return ImageData(range(len(digits)), digits.__getitem__, digits.class_names, preprocess, on_corrupt, split)
    if path.is_file() or (path.is_dir() and any(path.rglob("*.parquet"))):
        parts = _parquet_splits(path, label_column)
    elif path.is_dir():
        parts = _folder_splits(path)
    elif not may_be_hub_id(spec):
        raise ValueError(f"data {spec!r} is no file or folder here, and no hub id (owner/name); check the path.")
    else:
        parts = _hub_splits(spec, label_column)
    return _split(parts, split, spec, preprocess, on_corrupt)


def may_be_hub_id(spec: str) -> bool:
    """Whether it does not look like a path. What is here is never looked for on the hub."""
    return spec.startswith("hf:") or not (spec.count("/") > 1 or spec.startswith((".", "/", "~")))


def name_of(spec: str) -> str:
    """What cards and tables call the data: a folder's or file's name, never a path."""
    return Path(spec).resolve().name if Path(spec).exists() else spec


@runtime_checkable
class _Part(Protocol):
    """One split as it lies in the data."""

    class_names: list[str]

    def __len__(self) -> int: ...

    def read(self, row: int) -> tuple[Source, int]: ...


def _split(parts: Mapping[str, _Part], split: str, spec: str, preprocess: Preprocess, on_corrupt: str) -> ImageData:
    """A split of the data, or what stands in for it."""
    rows: Sequence[int] | np.ndarray
    wanted = "val" if split == "test" and "test" not in parts else split
    if wanted in parts and not (wanted == "train" and "val" not in parts):
        part = parts[wanted]
        rows = range(len(part))
    elif "train" in parts:
        part = parts["train"]
        is_held_out = np.array([zlib.crc32(str(row).encode()) % HELD_OUT == 0 for row in range(len(part))], dtype=bool)
        if not is_held_out.any():
            is_held_out[-1] = len(part) > 1  # so few images that none was chosen
        rows = np.flatnonzero(is_held_out if wanted == "val" else ~is_held_out)
    else:
        raise ValueError(f"{spec} has no {split} split, only {', '.join(parts)}; choose another or add a train split.")
    if not len(rows):
        raise ValueError(f"the {split} split of {spec} has no labelled images; it needs at least one.")
    names = parts["train"].class_names if "train" in parts else part.class_names
    strangers = sorted(set(part.class_names) - set(names))
    if strangers:
        raise ValueError(f"the {split} split of {spec} has a class {strangers[0]!r}, which its train split lacks.")
    read: Callable[[int], tuple[Source, int]] = part.read
    if part.class_names != names:  # a split may lack classes, and then counts them differently
        read = partial(_read_as, part, [names.index(name) for name in part.class_names])
    return ImageData(rows, read, names, preprocess, on_corrupt, wanted)


def _read_as(part: _Part, label_of: Sequence[int], row: int) -> tuple[Source, int]:
    source, label = part.read(row)
    return source, label_of[label]


# ---- sources


class _Folder:
    """Class folders of images."""

    def __init__(self, folder: Path) -> None:
        children = (child.name for child in folder.iterdir() if child.is_dir())
        self.class_names = sorted(name for name in children if not name.startswith("."))
        self.files = [
            (path, label)
            for label, name in enumerate(self.class_names)
            for path in sorted((folder / name).rglob("*"))
            if path.suffix.lower() in IMAGE_SUFFIXES
        ]

    def __len__(self) -> int:
        return len(self.files)

    def read(self, row: int) -> tuple[Source, int]:
        return self.files[row]


class _Parquet:
    """Encoded images in parquet files, held in memory as they are stored."""

    def __init__(self, files: Sequence[Path], label_column: str | None) -> None:
        try:
            schema = pq.read_schema(files[0])
            image = _find_image_column(schema, str(files[0]))
            label = _find_label_column(schema.names, label_column, str(files[0]))
            tables = [pq.ParquetFile(file).read(columns=[image, label]) for file in files]
            table = pa.concat_tables(tables, promote_options="default")
        except (pa.ArrowException, OSError) as error:
            raise ValueError(f"{files[0]} is not a parquet file that can be read ({error}).") from error
        if table[label].null_count:
            row = int(np.flatnonzero(table[label].is_null().to_numpy())[0])
            raise ValueError(
                f"column {label!r} of {files[0]} has no label in row {row} ({table[label].null_count} in all)."
            )
        self.images = pc.struct_field(table[image], "bytes") if pa.types.is_struct(table[image].type) else table[image]
        values = table[label].to_numpy()
        names = _names_in_metadata(schema, label)
        self.class_names = names or [str(value) for value in np.unique(values)]
        self.labels = values if names else np.searchsorted(np.unique(values), values)

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, row: int) -> tuple[Source, int]:
        return self.images[row].as_py() or b"", int(self.labels[row])


class _Hub:
    """A split of a Hugging Face data set, mapped from its cache on disk."""

    def __init__(self, dataset, label_column: str | None, name: str) -> None:
        from datasets import Image as ImageFeature

        self.image = _find_image_column(dataset.features.arrow_schema, name)
        self.label = _find_label_column(dataset.column_names, label_column, name)
        is_decoding = isinstance(dataset.features[self.image], ImageFeature)
        self.dataset = dataset.cast_column(self.image, ImageFeature(decode=False)) if is_decoding else dataset
        labels = list(dataset[self.label])
        if None in labels:
            raise ValueError(f"column {self.label!r} of {name} has no label in row {labels.index(None)}.")
        names = getattr(dataset.features[self.label], "names", None)
        values = range(len(names)) if names else sorted(set(labels))
        self.class_names = names or [str(value) for value in values]
        self.index_of = {value: index for index, value in enumerate(values)}

    def __len__(self) -> int:
        return len(self.dataset)

    def read(self, row: int) -> tuple[Source, int]:
        item = self.dataset[row]
        image = item[self.image]
        if isinstance(image, dict):
            image = image["bytes"] or image["path"]
        return image or b"", self.index_of.get(item[self.label], -1)


def _folder_splits(path: Path) -> dict[str, _Part]:
    found = [(split, path / name) for split, names in SPLIT_NAMES.items() for name in names if (path / name).is_dir()]
    parts: dict[str, _Part] = {split: _Folder(folder) for split, folder in found}
    if not any(len(part) for part in parts.values()):  # also where a class is called train
        parts = {"train": _Folder(path)}
    if not any(len(part) for part in parts.values()):
        raise ValueError(
            f"{path} holds no images in class folders; expected {path}/CLASS/IMAGE or {path}/train/CLASS/IMAGE."
        )
    return parts


def _parquet_splits(path: Path, label_column: str | None) -> dict[str, _Part]:
    """Held in memory where that is cheap, else mapped by the `datasets` library, which unpacks them into its cache once."""
    files = [path] if path.is_file() else sorted(path.rglob("*.parquet"))
    found: dict[str, list[Path]] = {}
    for file in files:
        found.setdefault(_split_of(file, path), []).append(file)
    unnamed = found.pop("", [])
    found = found or {"train": unnamed}
    if sum(file.stat().st_size for file in files) > MAX_HELD_BYTES:
        data_files = {split: [str(file) for file in group] for split, group in found.items()}
        return _hub_splits(str(path), label_column, "parquet", data_files=data_files)
    return {split: _Parquet(group, label_column) for split, group in found.items()}


def _split_of(file: Path, root: Path) -> str:
    """The split that a file below `root` belongs to by its name or its folder's; empty where neither says."""
    for split, names in SPLIT_NAMES.items():
        if re.match(rf"({'|'.join(names)})(?![a-z])", file.name.lower()) or (
            file != root and file.parent.name in names
        ):
            return split
    return ""


def _hub_splits(spec: str, label_column: str | None, name: str | None = None, **options: Any) -> dict[str, _Part]:
    """What `datasets.load_dataset(name, **options)` gives; `spec` is how the user called it."""
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ValueError(
            f"data {spec!r} is neither a folder of images nor parquet of at most {MAX_HELD_BYTES} bytes here, and what reads "
            "others is not installed; check the path, or: pip install 'iret[data]'."
        ) from error
    try:
        loaded = load_dataset(name or spec.removeprefix("hf:"), **options)
    except Exception as error:  # the library raises many kinds for one reason: it is not there
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"data {spec!r} cannot be loaded as a file, a folder or a Hugging Face data set "
            f"({type(error).__name__}: {reason}); check the name and the network."
        ) from error
    parts: dict[str, _Part] = {
        split: _Hub(loaded[found], label_column, spec)
        for split, names in SPLIT_NAMES.items()
        for found in names
        if found in loaded
    }
    if not parts:
        raise ValueError(f"{spec} has the splits {', '.join(loaded)}; one must be called train, val or test.")
    return parts


def _find_image_column(schema: pa.Schema, source: str) -> str:
    for field in schema:
        if pa.types.is_struct(field.type) and field.type.get_field_index("bytes") >= 0:
            return field.name
        if pa.types.is_binary(field.type) or pa.types.is_large_binary(field.type):
            return field.name
    raise ValueError(f"{source} has no image column (binary, or a struct with bytes), only {', '.join(schema.names)}.")


def _find_label_column(columns: Sequence[str], wanted: str | None, source: str) -> str:
    for name in (wanted,) if wanted else LABEL_COLUMNS:
        if name in columns:
            return name
    raise ValueError(
        f"{source} has no label column {wanted or 'label'!r}, only {', '.join(columns)}; name it with --label-column."
    )


def _names_in_metadata(schema: pa.Schema, label: str) -> list[str] | None:
    """Class names as the `datasets` library writes them beside a schema."""
    raw = (schema.metadata or {}).get(b"huggingface")
    features = json.loads(raw)["info"]["features"] if raw else {}
    return features.get(label, {}).get("names")


# ---- batches


def make_loader(
    data: ImageData,
    batch_size: int,
    *,
    seed: int,
    epoch: int,
    shuffle: bool,
    share: tuple[int, int] = (0, 1),
    workers: int = 0,
    start_batch: int = 0,
    drop_last: bool,
) -> Iterator[Batch]:
    """Batches (images, labels, corrupt ones left out) of one process; `batch_size` counts all processes together.

    `share` is (rank, number of processes): each takes its part of every global batch.
    Batches before `start_batch` are passed over without decoding anything.
    """
    order = np.random.default_rng([seed, epoch]).permutation(len(data)) if shuffle else np.arange(len(data))
    batches = [order[at : at + batch_size] for at in range(0, len(order), batch_size)]
    if drop_last and len(batches[-1]) < batch_size:
        batches.pop()
    own = [np.array_split(batch, share[1])[share[0]].tolist() for batch in batches[start_batch:]]
    return _in_own_words(DataLoader(data, batch_sampler=own, collate_fn=collate, num_workers=workers))


def _in_own_words(loader: DataLoader) -> Iterator[Batch]:
    """The batches; a worker's ValueError without the traceback that torch writes into its message."""
    try:
        yield from loader
    except ValueError as error:
        raise ValueError(str(error).strip().splitlines()[-1].removeprefix("ValueError: ")) from error


def collate(items: Sequence[tuple[Tensor, int] | None]) -> Batch:
    """Stack the items that could be read and count the others."""
    read = [item for item in items if item is not None]
    labels = torch.tensor([label for _, label in read], dtype=torch.int64)
    images = torch.stack([image for image, _ in read]) if read else torch.empty(0, 3, 1, 1, dtype=torch.uint8)
    return images, labels, len(items) - len(read)
