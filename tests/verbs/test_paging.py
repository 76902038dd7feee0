"""`iret page` as a user types it."""

import json

import pytest

from iret.cli import main
from iret.serve import site as building
from iret.serve.site import Site


@pytest.fixture
def built(monkeypatch):
    """What a site was asked for; nothing is written."""
    asked = {}

    def build_site(bundle, out, **options):
        asked.update(options, bundle=str(bundle), out=str(out))
        return Site(page=100_000, runtime=14_300_000, model=8_800_000)

    monkeypatch.setattr(building, "build_site", build_site)
    return asked


def test_options_arrive_and_sizes_are_said(built, capsys):
    assert main(["page", "pico-onnx", "--out", "site", "--runtime", "package", "--photos", "a.jpg", "b.jpg"]) == 0
    assert (built["bundle"], built["out"], str(built["runtime"])) == ("pico-onnx", "site", "package")
    assert [str(each) for each in built["photos"]] == ["a.jpg", "b.jpg"]
    said = capsys.readouterr().err
    assert "site: 23.2 MB (page 0.1 MB, runtime 14.3 MB, model 8.8 MB)" in said
    assert "python -m http.server --bind 127.0.0.1 --directory site" in said


def test_without_options_the_runtime_is_fetched_and_json_goes_to_stdout(built, capsys):
    assert main(["page", "pico-onnx", "--out", "site", "--json"]) == 0
    assert built["runtime"] is built["photos"] is None
    said = capsys.readouterr()
    assert json.loads(said.out)["bytes"] == {"page": 100_000, "runtime": 14_300_000, "model": 8_800_000}
    assert said.err == ""


def test_what_is_no_bundle_is_one_sentence(tmp_path, capsys):
    assert main(["page", str(tmp_path), "--out", str(tmp_path / "site")]) == 2
    said = capsys.readouterr().err
    assert "bundle.json does not exist" in said and said.count("\n") == 1
