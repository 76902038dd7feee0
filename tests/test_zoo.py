"""Models by name: presets with their options replaced, checkpoints, folders; and one sentence for anything else."""

import socket

import pytest
import torch
from huggingface_hub import constants

import iret
from iret import presets, zoo
from iret.model import Iret

TINY = dict(embed_dims=(16, 32, 48), depths=(1, 1, 1), head_dim=16)


def test_a_preset_is_created_by_name():
    model = zoo.create_model("iret_pico")
    assert model.shape == presets.iret_pico()
    assert model.name == "iret_pico"
    assert model.training
    assert model.points is None
    assert model.labels is None


def test_options_replace_those_of_the_preset():
    model = zoo.create_model("iret_pico", num_classes=7, in_chans=1, img_size=(16, 24), importance="column", **TINY)
    assert model.shape.img_size == (16, 24)
    assert model.shape.importance == "column"
    assert model.shape.patch_size == 4
    assert model.num_features == 48
    assert model(torch.zeros(2, 1, 16, 24)).shape == (2, 7)


def test_one_number_is_a_square_image():
    assert zoo.create_model("iret_pico", img_size=16, **TINY).shape.img_size == (16, 16)


def test_drop_path_rises_with_depth():
    model = zoo.create_model("iret_pico", drop_path_rate=0.2, **TINY)
    rates = [block.drop_path.rate for stage in model.stages for block in stage.blocks]
    assert rates == pytest.approx([0.0, 0.1, 0.2])


def test_fresh_weights_follow_the_seed():
    first, second, third = (
        (torch.manual_seed(seed), zoo.create_model("iret_pico", **TINY).state_dict())[1] for seed in (0, 0, 1)
    )
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["patch_embed.weight"], third["patch_embed.weight"])


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("iret_huge", {}, "model 'iret_huge' is unknown; choose from iret_pico, iret_nano"),
        ("iret_pico", dict(dropout=0.1), "option 'dropout' is unknown; a model takes img_size, patch_size, in_chans"),
        ("iret_pico", dict(attention="mean"), "attention='mean' is unknown; choose from softmax"),
        ("iret_pico", dict(img_size=30), "img_size=30x30 is not a whole number of 4 px patches"),
        ("iret_pico", dict(lifting="db4"), "lifting='db4' is unknown"),
    ],
)
def test_what_cannot_be_created_is_refused(name, options, message):
    with pytest.raises(ValueError, match=message):
        zoo.create_model(name, **options)


def test_the_list_holds_what_can_be_created():
    assert zoo.list_models() == list(presets.PRESETS)


# ---- load


def test_a_folder_and_a_shipped_name_load_the_same_model(tmp_path, monkeypatch):
    model = zoo.create_model("iret_pico", **TINY)
    model.save_pretrained(tmp_path / "iret_pico-mine")
    monkeypatch.setattr(presets, "CHECKPOINTS", tmp_path)
    monkeypatch.setattr(zoo, "CHECKPOINTS", tmp_path)
    images = torch.randn(2, 3, 32, 32)
    for loaded in (
        zoo.load("iret_pico-mine"),
        zoo.load(tmp_path / "iret_pico-mine"),
        iret.load(str(tmp_path / "iret_pico-mine")),
    ):
        assert isinstance(loaded, Iret)
        assert not loaded.training
        torch.testing.assert_close(
            loaded(images), model.eval()(images), rtol=0, atol=1e-5
        )  # laid out: another order of sums


@pytest.mark.parametrize("name", ["iret_pico-nowhere", "/no/such/folder", "a/b/c"])
def test_a_name_that_is_nothing_is_refused_without_asking_the_network(name, monkeypatch):
    monkeypatch.setattr(socket, "socket", None)
    with pytest.raises(ValueError, match="is neither a shipped checkpoint .* nor a folder nor a hub id"):
        zoo.load(name)


def test_a_hub_id_without_network_is_one_sentence(monkeypatch, tmp_path):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(
        ValueError, match="model 'nobody/nothing' .* could not be fetched .* check the name and the network"
    ):
        zoo.load("nobody/nothing")


def test_a_name_the_hub_would_not_accept_is_refused(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="model 'no body/--' "):
        zoo.load("no body/--")


@pytest.mark.parametrize("model", ["./no/such", "./nosuch", "~/nosuch", "/no/such"])
def test_a_path_that_is_not_there_is_not_asked_of_the_hub(monkeypatch, model):
    monkeypatch.setattr(iret.Iret, "from_pretrained", lambda name: pytest.fail("the hub was asked"))
    with pytest.raises(ValueError, match=f"model {model!r} is neither a shipped checkpoint"):
        iret.load(model)


def test_pretrained_is_told_where_weights_are():
    with pytest.raises(
        ValueError, match="a preset has no weights; iret.load loads a trained model: .*iret_pico-cifar10"
    ):
        iret.create_model("iret_pico", pretrained=True)


def test_a_preset_has_no_weights_to_load():
    with pytest.raises(ValueError, match=r"^iret_small is a preset, a shape without weights: .* iret_pico-cifar10"):
        iret.load("iret_small")


def test_a_bundle_is_no_model_and_what_runs_it_is_named(tmp_path):
    (tmp_path / "bundle.json").write_text("{}")
    with pytest.raises(ValueError, match=r"is an exported bundle, no model folder; .*iret\.Session\('.*`iret serve "):
        iret.load(tmp_path)
