"""The static site of a bundle: what is in it, what it refuses, and that nothing of the user's is lost. No network."""

import base64
import hashlib
import io
import json
import re
import subprocess
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest

from iret.runtime.bundle import FILE_NAME, Bundle, GraphFile, checksum
from iret.runtime.cost import Shape
from iret.runtime.preprocess import Preprocess
from iret.serve import site as building
from iret.serve.site import PACKAGE, RUNTIME_FILES, VERSION, build_site

SHAPE = Shape(img_size=(16, 16), patch_size=4, in_chans=3, num_classes=3, embed_dims=(8, 16), depths=(1, 1), head_dim=8)


@pytest.fixture
def bundle(tmp_path) -> Path:
    """Graphs that are none: nothing here runs them."""
    return write_bundle(tmp_path / "bundle")


def write_bundle(folder: Path, **changes) -> Path:
    folder.mkdir()
    graphs = ("stage_0.onnx", "stage_1.onnx")
    names = (*graphs, "weights.bin")
    for name in names:
        (folder / name).write_bytes(name.encode())
    whole = Bundle(
        name="tiny", kind="onnx", is_single=False, precision="float32", shape=SHAPE, labels=None, points=None,
        preprocess=Preprocess(img_size=(16, 16), mean=(0.5,) * 3, std=(0.5,) * 3), max_batch=None,
        stages=tuple((GraphFile(name),) for name in graphs), checksums={name: checksum(folder / name) for name in names},
    )  # fmt: skip
    (folder / FILE_NAME).write_text(replace(whole, **changes).to_json())
    return folder


@pytest.fixture
def runtime(tmp_path) -> Path:
    """An unpacked package whose files are a few bytes each."""
    return write_runtime(tmp_path / "package")


def write_runtime(folder: Path, version: str = VERSION) -> Path:
    (folder / "dist").mkdir(parents=True)
    (folder / "package.json").write_text(json.dumps({"name": PACKAGE, "version": version}))
    for name in RUNTIME_FILES:
        (folder / name).write_bytes(name.encode())
    return folder


def test_a_site_holds_the_page_the_runtime_and_the_model(bundle, runtime, tmp_path):
    sizes = build_site(bundle, tmp_path / "site", runtime=runtime)
    out = tmp_path / "site"
    assert sorted(path.name for path in out.iterdir()) == ["bundle", "index.html", "ort", "page"]
    assert 'data-mode="browser"' in (out / "index.html").read_text()
    assert sorted(path.name for path in (out / "ort").iterdir()) == sorted(["LICENSE.txt", *RUNTIME_FILES.values()])
    assert "Copyright (c) Microsoft Corporation" in (out / "ort" / "LICENSE.txt").read_text()
    assert Bundle.read(out / "bundle") == Bundle.read(bundle)
    Bundle.read(out / "bundle").verify(out / "bundle")
    photos = json.loads((out / "page" / "photos.json").read_bytes())
    assert [entry["file"] for entry in photos] == ["chelsea.jpg", "rocket.jpg"]
    assert all((out / "page" / "photos" / entry["file"]).stat().st_size > 1000 for entry in photos)
    wasm = sum(len(name) for name in RUNTIME_FILES if name.endswith(".wasm"))
    graphs = len("stage_0.onnx") + len("stage_1.onnx") + len("weights.bin")
    assert json.loads((out / "page" / "site.json").read_bytes()) == {"total": wasm + graphs}
    assert sizes.total == sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    assert sizes.total > sizes.model > graphs
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle", "package", "site"]


def test_every_file_the_page_names_is_in_the_site(bundle, runtime, tmp_path):
    build_site(bundle, tmp_path / "site", runtime=runtime)
    page = tmp_path / "site" / "page"
    imports = {
        script.name: re.findall(r'^import\s[^;"]*"([^"]+)"', script.read_text(), re.MULTILINE)
        for script in page.glob("*.js")
    }
    assert len(imports["main.js"]) >= 5 and len(imports["worker.js"]) >= 3
    for script, names in imports.items():
        assert all((page / name).is_file() for name in names), (script, names)
    index = (tmp_path / "site" / "index.html").read_text()
    linked = re.findall(r'\s(?:href|src)="([^"]+)"', index)
    assert "page/main.js" in linked and "page/style.css" in linked
    assert all((tmp_path / "site" / name).is_file() for name in linked), linked
    worker = (page / "worker.js").read_text()
    for name in RUNTIME_FILES.values():
        assert f"ort/{name}" in worker


def test_an_older_site_is_replaced_and_anything_else_is_left_alone(bundle, runtime, tmp_path):
    out = tmp_path / "site"
    build_site(bundle, out, runtime=runtime)
    (out / "page" / "stale.js").write_text("")
    build_site(bundle, out, runtime=runtime)
    assert not (out / "page" / "stale.js").exists()
    (out / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match=r"holds something that is not a page of iret \(thesis.txt\)"):
        build_site(bundle, out, runtime=runtime)
    assert (out / "thesis.txt").read_text() == "years of work"
    with pytest.raises(ValueError, match=r"\(a file\)"):
        build_site(bundle, out / "thesis.txt", runtime=runtime)
    (tmp_path / "mine" / "page").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"\(no page/site.json\)"):
        build_site(bundle, tmp_path / "mine", runtime=runtime)


def test_a_failure_leaves_the_older_site_and_nothing_else(bundle, runtime, tmp_path):
    out = tmp_path / "site"
    build_site(bundle, out, runtime=runtime)
    before = sorted(path.name for path in tmp_path.iterdir())
    (runtime / "dist" / "ort.wasm.min.mjs").unlink()
    with pytest.raises(ValueError, match="ort.wasm.min.mjs is missing"):
        build_site(bundle, out, runtime=runtime)
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    assert (out / "ort" / "ort.wasm.min.js").is_file()


def test_the_older_site_comes_back_where_the_new_one_cannot_take_its_place(bundle, runtime, monkeypatch, tmp_path):
    out = tmp_path / "site"
    build_site(bundle, out, runtime=runtime)
    (out / "page" / "mark.txt").write_text("the older one")
    rename = Path.rename

    def refuse(path, target):
        if path.name == "site" and path != out:
            raise KeyboardInterrupt
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(KeyboardInterrupt):
        build_site(bundle, out, runtime=runtime)
    assert (out / "page" / "mark.txt").read_text() == "the older one"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle", "package", "site"]


def test_photos_of_one_s_own_are_the_examples(bundle, runtime, tmp_path):
    photo = tmp_path / "my_dog.jpg"
    photo.write_bytes(b"a dog")
    build_site(bundle, tmp_path / "site", runtime=runtime, photos=[photo])
    page = tmp_path / "site" / "page"
    assert json.loads((page / "photos.json").read_bytes()) == [{"file": "my_dog.jpg", "name": "my dog"}]
    assert [path.name for path in (page / "photos").iterdir()] == ["my_dog.jpg"]
    with pytest.raises(ValueError, match="nowhere.jpg does not exist"):
        build_site(bundle, tmp_path / "other", runtime=runtime, photos=[tmp_path / "nowhere.jpg"])


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"stages": ((GraphFile("stage_0.onnx"),), (GraphFile("stage_1.onnx", 17),))}, "export without --buckets"),
        ({"is_single": True, "stages": ((GraphFile("stage_0.onnx"),),)}, "export without --single-graph"),
        ({"is_convolved": True}, "convolutions, which a browser computes slowly; export without --convolutions"),
        ({"kind": "executorch"}, "kind 'executorch'; a browser runs ONNX"),
    ],
)
def test_bundles_that_a_browser_does_not_run_are_refused_by_name(tmp_path, runtime, changes, sentence):
    bundle = write_bundle(tmp_path / "bundle", **changes)
    with pytest.raises(ValueError, match=sentence):
        build_site(bundle, tmp_path / "site", runtime=runtime)
    assert not (tmp_path / "site").exists()


def test_a_damaged_bundle_is_refused(bundle, runtime, tmp_path):
    (bundle / "stage_1.onnx").write_bytes(b"other bytes")
    with pytest.raises(ValueError, match="damaged or was changed"):
        build_site(bundle, tmp_path / "site", runtime=runtime)


def test_another_runtime_than_the_pinned_one_is_refused(bundle, tmp_path):
    old = write_runtime(tmp_path / "old", version="1.0.0")
    with pytest.raises(ValueError, match=f"holds {PACKAGE} 1.0.0, and the page needs {PACKAGE} {VERSION}"):
        build_site(bundle, tmp_path / "site", runtime=old)
    with pytest.raises(ValueError, match=f"is not an unpacked {PACKAGE}: `npm pack"):
        build_site(bundle, tmp_path / "site", runtime=tmp_path)


# ---- npm, pretended


@pytest.fixture
def npm(monkeypatch, runtime):
    """npm that packs `runtime`, or fails; what it was told, and its archive's true integrity."""
    told: dict = {"fails": None}
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w:gz") as tar:
        tar.add(runtime, "package")
    data = archive.getvalue()

    def run(words, cwd, **options):
        told["words"] = words
        if told["fails"] is None:
            (Path(cwd) / f"{PACKAGE}-{VERSION}.tgz").write_bytes(data)
        return subprocess.CompletedProcess(words, told["fails"] is not None, "", told["fails"] or "")

    monkeypatch.setattr(building.shutil, "which", lambda name: f"/bin/{name}")
    monkeypatch.setattr(building.subprocess, "run", run)
    told["integrity"] = "sha512-" + base64.b64encode(hashlib.sha512(data).digest()).decode()
    return told


def test_the_runtime_comes_from_npm_at_its_pinned_version(bundle, npm, monkeypatch, tmp_path):
    monkeypatch.setattr(building, "INTEGRITY", npm["integrity"])
    build_site(bundle, tmp_path / "site")
    assert npm["words"][1:3] == ["pack", f"{PACKAGE}@{VERSION}"]
    assert {"--ignore-scripts", "--pack-destination=.", "--dry-run=false"} <= set(npm["words"])
    assert (
        tmp_path / "site" / "ort" / "ort-wasm-simd-threaded.wasm"
    ).read_bytes() == b"dist/ort-wasm-simd-threaded.wasm"


def test_an_archive_with_another_checksum_is_refused(bundle, npm, tmp_path):
    with pytest.raises(ValueError, match="its SHA-512 differs"):
        build_site(bundle, tmp_path / "site")
    assert not (tmp_path / "site").exists()


def test_a_registry_that_cannot_be_reached_is_one_sentence(bundle, npm, monkeypatch, tmp_path):
    npm["fails"] = "npm warn something old\nnpm error code ENOTFOUND\nnpm error a long story"
    with pytest.raises(ValueError, match="npm error code ENOTFOUND.*give --runtime FOLDER") as refusal:
        build_site(bundle, tmp_path / "site")
    assert "\n" not in str(refusal.value)
    monkeypatch.setattr(building.shutil, "which", lambda name: None)
    with pytest.raises(ValueError, match="is not installed here; install Node.js, or give --runtime FOLDER"):
        build_site(bundle, tmp_path / "site")
