"""`iret narrow` as typed: on the shipped digits, from data to a folder that can be calibrated."""

import json
import re

import pytest
import torch

import iret
from iret import cli
from iret.evaluate import evaluate
from iret.narrow import LOOKS, narrow
from iret.runtime.cost import full_macs
from iret.runtime.points import Setting
from iret.train.data import make_loader, open_data

NANO = "iret_nano-cluttered-digits"


def words(out, *more: str) -> list[str]:
    return ["narrow", NANO, "--data", "cluttered-digits", "--out", str(out), "--max-images", "150", *more]


def test_half_of_the_digits_channels_go_for_little(tmp_path, capsys):
    assert cli.main(words(tmp_path / "half", "--mlp-ratio", "2", "--json")) == 0
    said = json.loads(capsys.readouterr().out)
    narrowed = iret.load(tmp_path / "half")
    assert said["num_images"] == 150
    assert list(said["rows"]) == ["0.0", "0.75", "2.0"]
    full = said["rows"]["0.0"]
    before, after = full["macs_share"]
    assert before == pytest.approx(1, abs=1e-3)
    assert after == pytest.approx(full_macs(narrowed.shape) / full_macs(iret.load(NANO).shape), abs=1e-3)
    for row in said["rows"].values():
        assert row["macs_share"][1] < row["macs_share"][0]
        assert row["accuracy"][1] > row["accuracy"][0] - 0.05  # seven images
    model = iret.load(NANO)
    held_out, settings = (
        open_data("cluttered-digits", "val", model.preprocessing),
        [Setting(thresholds=x) for x in LOOKS],
    )
    for place, each in enumerate((model, narrowed)):
        scores = evaluate(each, held_out, settings, max_images=150)
        assert [row["accuracy"][place] for row in said["rows"].values()] == [score.accuracy for score in scores]
    data = open_data("cluttered-digits", "train", model.preprocessing)
    (batch, *_) = next(iter(make_loader(data, 150, seed=0, epoch=0, shuffle=True, drop_last=False)))
    same = narrow(model, model.normalise(batch.float() / 255).split(100), 2)
    assert all(torch.equal(weight, narrowed.state_dict()[name]) for name, weight in same.state_dict().items())


def test_the_table_names_the_next_command(tmp_path, capsys):
    out = tmp_path / "a half"
    assert cli.main(words(out, "--mlp-ratio", "3", "--threads", "1")) == 0
    said = capsys.readouterr().err
    shares = [float(share) for share in re.findall(r"(\d+\.\d)%", said)]  # rows of two of MACs and two of top-1
    worst = min((share for place, share in enumerate(shares) if place % 4 > 1), key=lambda share: abs(share - 50))
    rate = (worst * 1.5 + 2) / 154  # of 150 images
    assert f"150 held-out images, which tell a top-1 to {196 * (rate * (1 - rate) / 154) ** 0.5:.1f} points" in said
    assert "4 times as wide as their tokens, and now 3 times: 2." in said
    assert f"iret calibrate '{out}' --data cluttered-digits" in said
    assert iret.load(out).shape.mlp_ratio == 3


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--mlp-ratio", "4"), "takes no channel out"),
        (("--mlp-ratio", "nan"), "--mlp-ratio nan must be above 0"),
        (("--mlp-ratio", "2", "--max-images", "0"), "--max-images 0 must be 1 or more"),
        (("--mlp-ratio", "2", "--max-images", "3"), "tokens tell too little"),
        (("--mlp-ratio", "2", "--threads", "0"), "--threads 0 must be 1 or more"),
        (("--mlp-ratio", "2", "--device", "abacus"), "device 'abacus' cannot be used"),
    ],
)
def test_a_mistake_gets_one_sentence_and_writes_nothing(tmp_path, capsys, more, message):
    assert cli.main(words(tmp_path / "new", *more)) == 2
    said = capsys.readouterr().err
    assert message in said
    assert len(said.strip().splitlines()) == 1
    assert not (tmp_path / "new").exists()


def test_a_folder_in_use_is_left_as_it_is(tmp_path, capsys):
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "letter.txt").write_text("dear")
    assert cli.main(words(tmp_path / "used", "--mlp-ratio", "2")) == 2
    assert "used holds a letter.txt already; name a new folder with --out" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "used").iterdir()] == ["letter.txt"]


def test_classes_that_are_not_the_models_are_refused_before_anything_is_fitted(tmp_path, capsys):
    iret.create_model("iret_nano", num_classes=7).save_pretrained(tmp_path / "m")
    line = [
        "narrow",
        str(tmp_path / "m"),
        "--mlp-ratio",
        "2",
        "--data",
        "cluttered-digits",
        "--out",
        str(tmp_path / "n"),
    ]
    assert cli.main(line) == 2
    assert "the data has 10 classes, the model 7" in capsys.readouterr().err
    assert not (tmp_path / "n").exists()
