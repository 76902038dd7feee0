"""The named sizes: what their docstrings state is counted again."""

import re

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from iret import presets
from iret.model import Iret
from iret.presets import PRESETS, list_checkpoints, preset
from iret.runtime.cost import full_macs


@pytest.mark.parametrize("name", PRESETS)
def test_the_docstring_states_parameters_and_macs(name):
    shape = preset(name)
    model = Iret(shape)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, shape.in_chans, *shape.img_size))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    macs = counter.get_total_flops() // 2
    assert f": {parameters:,} parameters, {macs:,} MACs." in PRESETS[name].__doc__
    assert full_macs(shape) == macs


@pytest.mark.parametrize("name", PRESETS)
def test_the_docstring_states_sizes(name):
    shape, text = preset(name), PRESETS[name].__doc__
    stated = re.match(r"(\d+) px, patch (\d+), widths ([\d-]+), depths ([\d/]+):", text)
    assert stated, text
    side, patch_size, widths, depths = stated.groups()
    assert shape.img_size == (int(side), int(side))
    assert shape.patch_size == int(patch_size)
    assert shape.embed_dims == tuple(map(int, widths.split("-")))
    assert shape.depths == tuple(map(int, depths.split("/")))


def test_the_presets_of_the_issue_exist():
    assert {name: (preset(name).img_size[0], preset(name).patch_size) for name in PRESETS} == {
        "iret_pico": (32, 4),
        "iret_nano": (64, 8),
        "iret_tiny": (224, 16),
        "iret_small": (224, 16),
        "iret_base": (224, 16),
    }


def test_an_unknown_preset_lists_the_known_ones():
    with pytest.raises(ValueError, match="model 'iret_huge' is unknown; choose from iret_pico, iret_nano, iret_tiny"):
        preset("iret_huge")


def test_checkpoints_are_the_folders_beside_the_presets(tmp_path, monkeypatch):
    monkeypatch.setattr(presets, "CHECKPOINTS", tmp_path / "none")
    assert list_checkpoints() == []
    monkeypatch.setattr(presets, "CHECKPOINTS", tmp_path)
    for name in ("iret_pico-b", "iret_nano-a"):
        (tmp_path / name).mkdir()
    (tmp_path / "README.md").touch()
    assert list_checkpoints() == ["iret_nano-a", "iret_pico-b"]
