"""A model folder's files: written whole or not at all, read with a sentence where they are damaged."""

import errno
import json
import os

import pytest
import torch
from torch import nn

from iret import weights
from iret.weights import load_exactly, read_config, read_weights, write_atomically, write_together, write_weights

FULL = OSError(errno.ENOSPC, "No space left on device")


def refuse(*_args, **_options):
    raise FULL


class FullDisk:
    """A file that takes half of what is written to it and then finds the disk full."""

    def __init__(self, file) -> None:
        self.file = file

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()

    def write(self, content: bytes) -> None:
        self.file.write(content[: len(content) // 2])
        self.file.flush()
        raise FULL


# ---- writing


@pytest.mark.parametrize("place", ["write", "fsync", "chmod", "replace"])
def test_a_full_disk_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, place):
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"old")
    if place == "write":
        fdopen = os.fdopen
        monkeypatch.setattr(weights.os, "fdopen", lambda *args: FullDisk(fdopen(*args)))
    else:
        monkeypatch.setattr(weights.os, place, refuse)
    with pytest.raises(OSError, match="No space left on device"):
        write_atomically(path, b"new content")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == [path.name]


def test_of_files_written_together_none_changes_when_the_disk_is_full_at_the_second(tmp_path, monkeypatch):
    paths = [tmp_path / "model.safetensors", tmp_path / "config.json"]
    for path in paths:
        path.write_bytes(b"old")
    fsync, calls = os.fsync, []

    def full_at_the_second(fd):
        calls.append(fd)
        if len(calls) == 2:
            raise FULL
        fsync(fd)

    monkeypatch.setattr(weights.os, "fsync", full_at_the_second)
    with pytest.raises(OSError, match="No space left on device"):
        write_together(dict.fromkeys(paths, b"new"))
    assert [path.read_bytes() for path in paths] == [b"old", b"old"]
    assert sorted(os.listdir(tmp_path)) == ["config.json", "model.safetensors"]


def test_the_content_is_on_disk_before_it_takes_the_name(tmp_path, monkeypatch):
    steps = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(weights.os, "fsync", lambda fd: (steps.append("fsync"), fsync(fd)))
    monkeypatch.setattr(weights.os, "replace", lambda old, new: (steps.append("replace"), replace(old, new)))
    write_atomically(tmp_path / "file", b"new")
    assert steps == ["fsync", "replace"]


def test_writing_makes_the_folder_and_replaces_what_was_there(tmp_path):
    path = tmp_path / "a" / "b" / "file"
    write_atomically(path, b"first, and longer")
    write_atomically(path, b"second")
    assert path.read_bytes() == b"second"
    assert os.listdir(path.parent) == ["file"]


def test_others_may_read_what_was_written(tmp_path):
    write_atomically(tmp_path / "file", b"")
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o644


# ---- weights


def test_weights_come_back_bit_for_bit(tmp_path):
    torch.manual_seed(0)
    tensors = {
        "a": torch.randn(3, 4),
        "turned": torch.randn(3, 4).mT,
        "half": torch.randn(2).bfloat16(),
        "count": torch.arange(3),
        "empty": torch.zeros(0, 2),
    }
    write_weights(tmp_path / "model.safetensors", tensors)
    again = read_weights(tmp_path / "model.safetensors")
    assert again.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert again[name].dtype == tensor.dtype
        assert torch.equal(again[name], tensor)


def test_the_same_weights_give_the_same_file(tmp_path):
    tensors = {"b": torch.ones(2), "a": torch.zeros(3)}
    for name in ("one", "two"):
        write_weights(tmp_path / name, tensors)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_a_missing_file_is_named_with_what_a_folder_holds(tmp_path):
    for read, name in ((read_weights, "model.safetensors"), (read_config, "config.json")):
        with pytest.raises(ValueError, match=f"{name} does not exist; a model folder holds config.json and model"):
            read(tmp_path / name)


@pytest.mark.parametrize("kept_bytes", [0, 4, 60, -1])
def test_a_truncated_file_is_refused(tmp_path, kept_bytes):
    path = tmp_path / "model.safetensors"
    write_weights(path, {"a": torch.randn(100)})
    path.write_bytes(path.read_bytes()[:kept_bytes])
    with pytest.raises(ValueError, match=r"model.safetensors is not a whole safetensors file \(.*download or write"):
        read_weights(path)


def test_a_file_of_another_format_is_refused(tmp_path):
    path = tmp_path / "model.safetensors"
    torch.save({"a": torch.ones(3)}, path)
    with pytest.raises(ValueError, match="is not a whole safetensors file"):
        read_weights(path)


# ---- config


def test_a_config_is_read_as_it_was_written(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"format": 1, "labels": ["a"]}))
    assert read_config(tmp_path / "config.json") == {"format": 1, "labels": ["a"]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "config.json is not valid JSON"),
        (b'{"format": 1,', "config.json is not valid JSON"),
        (b"\xff\xfe\x00", "config.json is not valid JSON"),
        (b"[1, 2]", "config.json holds list, not an object with the model's settings"),
    ],
)
def test_a_malformed_config_is_refused(tmp_path, content, message):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_config(tmp_path / "config.json")


# ---- loading


def test_fitting_weights_are_loaded():
    layer = nn.Linear(2, 1)
    load_exactly(layer, {"weight": torch.tensor([[1.0, 2.0]]), "bias": torch.tensor([3.0])}, "x")
    assert layer(torch.ones(1, 2)).item() == 6.0


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"weight": torch.ones(1, 2)}, r"x belongs to another model: bias is missing, this one needs \(1,\)"),
        (
            {"weight": torch.ones(1, 3), "bias": torch.ones(1)},
            r"x belongs to another model: weight is \(1, 3\), this one needs \(1, 2\)",
        ),
        (
            {"weight": torch.ones(1, 2), "bias": torch.ones(1), "scale": torch.ones(4)},
            r"x belongs to another model: scale is \(4,\), this one needs nothing",
        ),
    ],
)
def test_weights_of_another_model_are_refused_and_nothing_is_changed(given, message):
    layer = nn.Linear(2, 1)
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        load_exactly(layer, given, "x")
    assert all(torch.equal(tensor, before[name]) for name, tensor in layer.state_dict().items())
