"""The page driven in Chromium, in both its modes, and its engine against Python's: `make page-test` installs what it needs.

`IRET_PAGE_SHOTS` names a folder for pictures.
"""

import base64
import json
import os
import re
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from iret.runtime.session import Session
from iret.serve.site import PACKAGE, build_site

ROOT = Path(__file__).parents[2]
DRIVEN = ROOT / "tests" / "page"
PHOTO = str(ROOT / "src" / "iret" / "photos" / "chelsea.jpg")

pytestmark = pytest.mark.skipif("IRET_PAGE_TEST" not in os.environ, reason="drives a browser: make page-test")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory) -> Path:
    """The shipped photo model, exported."""
    out = tmp_path_factory.mktemp("bundle") / "pico"
    words = [sys.executable, "-m", "iret.cli", "export", "iret_pico-cifar10", "--out", str(out)]
    subprocess.run(words, check=True, capture_output=True)
    return out


@pytest.fixture(scope="module")
def static(bundle, tmp_path_factory) -> Iterator[str]:
    """The address of its site, on a server that knows nothing but files."""
    out = tmp_path_factory.mktemp("static") / "site"
    build_site(bundle, out, runtime=DRIVEN / "node_modules" / PACKAGE)
    with serving(out) as url:
        yield url


@contextmanager
def serving(folder: Path) -> Iterator[str]:
    """The address of the files of a folder."""
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(QuietFiles, directory=str(folder))) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}/"
        finally:
            server.shutdown()
            thread.join()


class QuietFiles(SimpleHTTPRequestHandler):
    def log_message(self, format, *args) -> None:
        pass


@pytest.fixture(scope="module")
def served(bundle) -> Iterator[str]:
    """The address of `iret serve`."""
    words = [sys.executable, "-m", "iret.cli", "serve", str(bundle), "--port", "0", "--workers", "1"]
    with subprocess.Popen(words, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        seen = next(filter(None, (re.search(r"http://127\.0\.0\.1:\d+", line) for line in process.stderr)), None)
        try:
            assert seen, "iret serve did not say where it listens"
            yield seen[0] + "/"
        finally:
            process.terminate()
            process.communicate(timeout=60)


def drive(scenario: str, url: str, **options) -> dict:
    words = ["node", str(DRIVEN / "drive.mjs"), scenario, url, json.dumps(options)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def shot(name: str) -> str | None:
    """Where pictures are wanted, a file there: $IRET_PAGE_SHOTS."""
    folder = os.environ.get("IRET_PAGE_SHOTS")
    return None if folder is None else str(Path(folder) / name)


@pytest.fixture(scope="module")
def turned(static, served) -> dict[str, dict]:
    """What was seen while the dial was turned in each mode, and where."""
    return {
        mode: drive("turn", url, photo=PHOTO, shot=shot(f"page-{mode}.png")) | {"url": url}
        for mode, url in (("browser", static), ("server", served))
    }


@pytest.mark.parametrize("mode", ["browser", "server"])
def test_the_dial_turns_by_keys_and_everything_follows(turned, mode):
    found = turned[mode]
    assert found["errors"] == []
    assert found["origins"] == [found["url"].rstrip("/")]
    turns = found["turns"]
    assert [each["budget"] for each in turns] == ["100", "75", "50", "25"]
    macs = [float(each["macs"].split()[0]) for each in turns]
    assert macs == sorted(macs, reverse=True) and macs[0] > 2 * macs[-1]
    joules = [float(each["joules"].split()[0]) for each in turns]
    assert joules == sorted(joules, reverse=True)
    assert len({each["here"] for each in turns}) == 4  # the point on the curve
    assert all("estimated" in each["joulesNote"] for each in turns)
    assert found["empty"]["amber"] == 0 < turns[-1]["amber"] < turns[0]["amber"]  # the overlay
    assert turns[0]["outcome"].endswith("64 patches looked at in detail, 0 kept coarse, 0 dropped")
    assert len(turns[1]["answers"]) == 5 and "of the full model's work" in turns[1]["status"]
    assert "not needed" in found["early"]["stages"][-1]
    assert float(found["early"]["macs"].split()[0]) < macs[-1]
    assert found["offline"]["budget"] == "45"
    if mode == "browser":
        assert found["offline"]["alert"] is found["example"]["alert"] is None
        assert found["example"]["outcome"].startswith("Rocket: ") and len(found["example"]["answers"]) == 5
    else:
        assert "does not answer" in found["offline"]["alert"]
        assert found["example"]["outcome"] == "Rocket, not looked at yet"


def test_photos_are_dropped_and_pasted_and_a_text_is_not(static):
    found = drive("ways", static)
    for kind in ("drop", "paste"):
        assert found[kind]["outcome"].startswith(f"{kind}.jpg: ") and found[kind]["alert"] is None
    assert found["text"]["alert"].startswith("That was not a file; ")


def test_a_key_is_entered_wrong_then_right_and_sent_with_every_question(served):
    found = drive("key", served, photo=PHOTO)
    assert found["wrong"] == {"form": True, "said": "the key is wrong."}
    assert not found["form"] and found["focus"] == "file"
    assert found["heard"][:3] == [["/v1/model", None], ["/v1/model", "wrong"], ["/v1/model", "right"]]
    assert ["/v1/predict", "right"] in found["heard"][3:]
    assert found["right"]["alert"] is None and len(found["right"]["answers"]) == 5


def test_both_modes_answer_alike(turned):
    for one, other in zip(turned["browser"]["turns"], turned["server"]["turns"], strict=True):
        for name in ("macs", "joules", "outcome", "stages", "answers"):
            assert one[name] == other[name]


def test_a_phone_shows_it_in_light_and_in_dark(static):
    found = drive("phone", static, photo=PHOTO, shot=shot("page-phone"))
    assert found["light"]["width"] == found["dark"]["width"] == 360
    assert found["light"]["paper"] != found["dark"]["paper"]
    for scheme in ("light", "dark"):
        for state, least in found[scheme]["contrasts"].items():
            assert least["ratio"] >= 4.5, (scheme, state, least)
        assert len(found[scheme]["answers"]) == 5


@pytest.mark.parametrize("mode", ["static", "served"])
def test_a_webcam_is_looked_through_until_it_is_stopped(mode, request):
    found = drive("webcam", request.getfixturevalue(mode))
    assert (found["on"]["webcam"], found["on"]["live"]) == ("Stop the webcam", 1)
    assert (found["off"]["webcam"], found["off"]["live"]) == ("Webcam", 0)
    assert found["on"]["outcome"].startswith("the webcam: ")
    assert found["on"]["alert"] is None
    assert found["dropped"]["outcome"].startswith("drop.jpg: ")
    assert (found["dropped"]["webcam"], found["dropped"]["live"]) == ("Webcam", 0)
    assert found["refused"]["alert"].startswith("The webcam was not allowed; ")
    assert found["none"]["alert"].startswith("No webcam could be opened; ")


def test_failures_are_one_sentence_in_the_page(static, served, tmp_path):
    broken = tmp_path / "notes.png"
    broken.write_text("no image")
    given = drive("failures", static, file=str(broken))["given"]
    sentence = "notes.png is not an image that this browser can read, or too large for it; give a JPEG, PNG or WebP."
    assert given["alert"] == sentence

    full = {"v1/predict": [429, {"error": "the line is full."}]}
    busy = drive("failures", served, file=PHOTO, answers=full, then=True)
    assert busy["given"]["alert"] == "the line is full."
    assert busy["after"]["alert"] is None and len(busy["after"]["answers"]) == 5

    locked = drive("failures", served, file=PHOTO, answers={"v1/model": [401, {"error": "the key is missing."}]})
    assert locked["opened"]["key"] and locked["opened"]["alert"] is None

    with urllib.request.urlopen(served + "v1/model") as answer:
        model = json.load(answer)
    bare = drive("failures", served, file=PHOTO, answers={"v1/model": [200, model | {"points": None}]})
    assert bare["opened"]["disabled"] and "no operating points" in bare["expected"]
    assert bare["given"]["macsNote"] == "100 % of the full model"


def test_a_damaged_site_says_so(bundle, tmp_path):
    out = tmp_path / "site"
    build_site(bundle, out, runtime=DRIVEN / "node_modules" / PACKAGE)
    graph = out / "bundle" / "stage_1.onnx"
    graph.write_bytes(graph.read_bytes()[:-1] + b"?")
    with serving(out) as url:
        opened = drive("failures", url, file=PHOTO)["opened"]
    assert opened["alert"] == "stage_1.onnx is damaged or was changed; copy the site again."


def test_a_model_without_operating_points_runs_in_the_browser_at_its_full_budget(bundle, tmp_path):
    out = tmp_path / "site"
    build_site(bundle, out, runtime=DRIVEN / "node_modules" / PACKAGE)
    description = out / "bundle" / "bundle.json"
    description.write_text(json.dumps(json.loads(description.read_bytes()) | {"points": None}))
    with serving(out) as url:
        bare = drive("failures", url, file=PHOTO)
    assert bare["opened"]["disabled"] and "no operating points" in bare["expected"]
    assert bare["given"]["alert"] is None
    assert bare["given"]["macsNote"] == "100 % of the full model"


def test_the_page_s_engine_keeps_the_patches_of_python_s_session(bundle, tmp_path):
    """24 crops of photographs at four budgets, ONNX Runtime Web against ONNX Runtime; ties by rounding are counted."""
    session = Session(bundle, threads=1)
    rng = np.random.default_rng(0)
    crops = []
    for case in range(24):
        photo = Image.open(PHOTO if case % 2 else str(PHOTO).replace("chelsea", "rocket"))
        side = int(rng.integers(40, min(photo.size)))
        left, top = int(rng.integers(0, photo.width - side)), int(rng.integers(0, photo.height - side))
        crops.append(photo.crop((left, top, left + side, top + side)))
    images = session.bundle.preprocess(crops)
    settings = [{"budget": each} for each in (1.0, 0.75, 0.5, 0.25)]
    pixels = [base64.b64encode(each.tobytes()).decode() for each in images]
    requests = tmp_path / "requests.json"
    requests.write_text(json.dumps({"pixels": pixels, "settings": settings}))
    words = ["node", str(DRIVEN / "parity.mjs"), str(bundle), str(requests)]
    found = iter(json.loads(subprocess.run(words, capture_output=True, check=True).stdout))
    ties, compared, error = 0, 0, 0.0
    for image in images:
        for each in settings:
            answer, out = next(found), session(image[None], each["budget"])
            compared += 1
            same = all(
                answer[name] == grid.reshape(3, -1).astype(int).tolist()
                for name, grid in (("kept", out.trace.kept), ("refined", out.trace.refined))
            ) and answer["exitStage"] == out.trace.exit_stage[0]  # fmt: skip
            if same:
                assert answer["macs"] == out.macs[0]
                error = max(error, float(np.abs(answer["logits"] - out.logits[0]).max()))
            else:
                assert is_tie(session, out, each["budget"]), each
                ties += 1
    assert compared == 96 and ties <= 2
    assert error < 1e-4
    print(f"{compared} comparisons, ties by rounding {ties}, largest difference of logits {error:.1e}")


def is_tie(session: Session, out, budget: float) -> bool:
    """Whether an importance or a confidence lies within 1e-4 of its threshold."""
    setting = session.setting(budget)
    logits = out.trace.stage_logits[:-1, 0].astype(float)
    confidence = 1 / np.exp(logits - logits.max(1, keepdims=True)).sum(1)
    gaps = [np.abs(confidence - (setting.exit_confidence or 2))]
    gaps += [
        np.abs(seen - each).ravel()
        for seen, pair in zip(out.trace.importance, setting.thresholds, strict=True)
        for each in pair
    ]
    return bool(np.nanmin(np.concatenate(gaps)) < 1e-4)
