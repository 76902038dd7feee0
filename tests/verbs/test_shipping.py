"""`iret export` as a user types it: what it says, what it refuses, and that the options arrive."""

import json

import pytest

from iret.cli import main
from iret.export import bundle as exporting
from iret.export.accuracy import Accuracy
from iret.export.form import Form
from iret.export.parity import Parity

JUDGED = (
    Accuracy(
        setting="budget 1.00", images=8, model=0.5, bundle=0.375, interval=0.03, same_answer=0.875, same_cells=1.0
    ),
    Accuracy(setting="budget 0.50", images=8, model=None, bundle=None, interval=None, same_answer=0.75, same_cells=0.9),
)


@pytest.fixture
def exported(monkeypatch):
    """What `export` was asked for; it writes nothing."""
    asked = {}

    def export(model, out, kind, form, **options):
        asked.update(options, name=model.name, out=out, kind=kind, form=form)
        out.mkdir()
        (out / "stage_0").write_bytes(b"12345")
        bundle = type("Bundle", (), {"checksums": {"stage_0": ""}, "kind": kind, "is_convolved": form.convolutions})
        return bundle, Parity(compared=4, agree=4, accuracy=JUDGED if form.int8 else ())

    monkeypatch.setattr(exporting, "export", export)
    return asked


def test_options_arrive(exported, tmp_path, capsys):
    out = tmp_path / "bundle"
    words = ["export", "iret_pico-cifar10", "--format", "openvino", "--out", str(out), "--buckets", "16,32"]
    assert main(words) == 0
    assert (exported["name"], exported["kind"], exported["out"]) == ("iret_pico", "openvino", out)
    assert exported["form"] == Form(buckets=(16, 32))
    assert (exported["images"], exported["held_out"]) == (None, None)
    said = capsys.readouterr().err
    assert "4 comparisons: same answer 4" in said
    assert "runs on openvino" in said


@pytest.mark.parametrize("word", ["single_graph", "convolutions"])
def test_each_form_has_its_word(exported, tmp_path, capsys, word):
    words = ["export", "iret_pico-cifar10", "--out", str(tmp_path / "bundle"), f"--{word.replace('_', '-')}"]
    assert main(words) == 0
    assert exported["form"] == Form(**{word: True})
    assert exported["kind"] == "onnx"
    how = ", slower," if word == "convolutions" else ""
    assert f"runs on onnxruntime or{how} openvino" in capsys.readouterr().err


def test_data_are_held_out_images_as_the_model_takes_them(exported, tmp_path, capsys):
    words = ["export", "iret_nano-cluttered-digits", "--out", str(tmp_path / "bundle"), "--int8", "--json"]
    assert main([*words, "--data", "cluttered-digits", "--max-images", "6"]) == 0
    assert exported["images"].shape == (6, 3, 64, 64)
    assert exported["images"].min() < 0 < exported["images"].max()  # normalised
    assert exported["form"] == Form(int8=True)
    answer = json.loads(capsys.readouterr().out)
    assert answer["bytes"] == 5
    assert answer["check"]["compared"] == 4
    assert [row["same_answer"] for row in answer["check"]["accuracy"]] == [0.875, 0.75]
    assert exported["held_out"].name == "cluttered-digits"
    assert len(exported["held_out"].data) == 994  # the other held-out images


def test_what_int8_costs_is_a_table(exported, tmp_path, capsys):
    words = ["export", "iret_nano-cluttered-digits", "--out", str(tmp_path / "bundle"), "--int8"]
    assert main([*words, "--data", "cluttered-digits", "--max-images", "1"]) == 0
    said = capsys.readouterr().err.splitlines()
    assert next(line for line in said if "budget 1.00" in line).split() == (
        ["budget", "1.00", "8", "50.0%", "37.5%", "-12.5", "+-", "3.0", "87.5%", "100.0%"]
    )
    assert next(line for line in said if "budget 0.50" in line).split() == ["budget", "0.50", "8", "75.0%", "90.0%"]


def test_without_int8_or_a_single_graph_all_data_are_checked_on(exported, tmp_path, capsys):
    words = ["export", "iret_nano-cluttered-digits", "--data", "cluttered-digits", "--max-images", "3"]
    assert main([*words, "--out", str(tmp_path / "staged")]) == 0
    assert exported["held_out"] is None
    assert main([*words, "--out", str(tmp_path / "single"), "--single-graph"]) == 0
    assert len(exported["held_out"].data) == 997


def test_data_of_which_nothing_can_be_read_are_refused(exported, tmp_path, capsys):
    (tmp_path / "images" / "a").mkdir(parents=True)
    (tmp_path / "images" / "a" / "1.png").write_bytes(b"no image")
    (tmp_path / "images" / "a" / "2.png").write_bytes(b"no image")
    words = ["export", "iret_pico-cifar10", "--out", str(tmp_path / "bundle"), "--data", str(tmp_path / "images")]
    assert main(words) == 2
    said = capsys.readouterr().err
    assert "none of 1 images of --data" in said and said.count("\n") == 1
    assert not (tmp_path / "bundle").exists()


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--buckets", "3"], "bucket 3 is outside [4, 64]"),
        (["--format", "executorch", "--single-graph"], "leave out --single-graph"),
        (["--int8"], "with --data"),
        (["--max-images", "0"], "must be 1 or more"),
        (["--max-images", "4"], "--max-images 4 is of --data; give both, or neither"),
        (["--data", "./nowhere"], "nowhere"),
    ],
)
def test_what_cannot_be_is_said_in_one_sentence(tmp_path, capsys, words, sentence):
    assert main(["export", "iret_pico-cifar10", "--out", str(tmp_path / "bundle"), *words]) == 2
    said = capsys.readouterr().err
    assert sentence in said
    assert said.count("\n") == 1
    assert not (tmp_path / "bundle").exists()


@pytest.mark.parametrize("words", [["--buckets", "8,x"], ["--format", "coreml"]])
def test_words_that_are_none_are_refused_by_the_parser(tmp_path, words):
    with pytest.raises(SystemExit) as refusal:
        main(["export", "iret_pico-cifar10", "--out", str(tmp_path / "bundle"), *words])
    assert refusal.value.code == 2
