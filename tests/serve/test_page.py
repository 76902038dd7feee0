"""The page's JavaScript against the Python it ports, in node alone. In a browser: `test_page_driven`."""

import asyncio
import base64
import json
import shutil
import subprocess
from dataclasses import asdict
from pathlib import Path

import httpx
import numpy as np
import pytest
from PIL import Image

from iret.measure.estimate import HOROWITZ, estimate_joules
from iret.runtime.bundle import Bundle, GraphFile
from iret.runtime.choice import Layout, choose, to_importance
from iret.runtime.cost import Shape, block_linears, full_macs, numbers_moved, plan_macs
from iret.runtime.points import OperatingPoints, Point
from iret.runtime.preprocess import INTERPOLATIONS, Preprocess
from iret.runtime.session import Session
from iret.runtime.timing import estimate_work
from iret.serve.app import FreshFiles
from iret.serve.site import INTEGRITY, PACKAGE, VERSION

ROOT = Path(__file__).parents[2]
DRIVEN = ROOT / "tests" / "page"
PAGE = ROOT / "src" / "iret" / "serve" / "page"

needs_node = pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed")

SHAPES = [
    Shape(img_size=(16, 16), patch_size=4, in_chans=3, num_classes=3, embed_dims=(8, 16, 24), depths=(1, 1, 1), head_dim=8),
    Shape(img_size=(24, 32), patch_size=8, in_chans=1, num_classes=5, embed_dims=(32, 64), depths=(2, 3), mlp_ratio=3),
    Shape(
        img_size=(64, 64), patch_size=8, in_chans=3, num_classes=0, embed_dims=(32, 64, 64, 96), depths=(1, 2, 1, 2),
        lifting="dawn", importance="column", mlp_ratio=1.5,
    ),
    Shape(
        img_size=(32, 32), patch_size=4, in_chans=3, num_classes=9, embed_dims=(32, 32, 64), depths=(1, 4, 2), lifting="haar",
        scored_blocks=3,
    ),
]  # fmt: skip


def ask(*questions: tuple) -> list:
    """What the page's modules answer."""
    words = ["node", str(DRIVEN / "pieces.mjs")]
    done = subprocess.run(words, input=json.dumps(questions), capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def to_image(pixels: np.ndarray) -> dict:
    height, width, _ = pixels.shape
    return {"width": width, "height": height, "rgb": base64.b64encode(pixels.tobytes()).decode()}


def to_raw(shape: Shape) -> dict:
    return json.loads(json.dumps(asdict(shape)))


def make_bundle(points: OperatingPoints | None = None, **changes) -> Bundle:
    shape = SHAPES[0]
    settings = dict(
        name="tiny", kind="onnx", is_single=False, precision="float32", shape=shape, labels=("a", "b", "c"), points=points,
        preprocess=Preprocess(img_size=shape.img_size, mean=(0.5,) * 3, std=(0.5,) * 3), max_batch=None,
        stages=tuple((GraphFile(f"stage_{stage}.onnx"),) for stage in range(3)),
        checksums={f"stage_{stage}.onnx": "" for stage in range(3)},
    )  # fmt: skip
    return Bundle(**(settings | changes))


def make_points(shape: Shape, rows: list[tuple]) -> OperatingPoints:
    """Of (thresholds, exit confidence, share)."""
    full = full_macs(shape)
    points = [
        Point(thresholds=thresholds, exit_confidence=leave, accuracy=0.5, macs_mean=share * full, macs_p95=share * full,
              kept_mean=(1.0,) * len(shape.depths))
        for thresholds, leave, share in rows
    ]  # fmt: skip
    return OperatingPoints(data="made up", num_images=9, full_macs=full, points=tuple(points))


# ---- modules


@needs_node
def test_photos_are_resized_as_pillow_does_to_the_last_bit():
    rng = np.random.default_rng(0)
    questions, expected = [], []
    for name in INTERPOLATIONS:
        for size in [(16, 16), (7, 5), (53, 31), (200, 40), (30, 97), (16, 40), (64, 64)]:
            pixels = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
            for options in [dict(mean=(0.5,) * 3, std=(0.5,) * 3), dict(mean=(0.4,), std=(0.2,), crop_ratio=0.875)]:
                preprocess = Preprocess(
                    img_size=(16, 24 if "crop_ratio" in options else 16), interpolation=name, **options
                )
                questions.append(("fit", to_image(pixels), preprocess.to_dict()))
                expected.append(preprocess.fit(Image.fromarray(pixels)).ravel())
    for found, wanted, (_, _, options) in zip(ask(*questions), expected, questions, strict=True):
        np.testing.assert_array_equal(found, wanted, err_msg=str(options))


@needs_node
@pytest.mark.parametrize("size", [(900, 2500), (2500, 500)], ids=["wide", "tall"])  # tall: the other pass comes first
def test_a_photo_larger_than_a_strip_is_read_whole(size):
    pixels = np.random.default_rng(1).integers(0, 256, (*size, 3), dtype=np.uint8)
    preprocess = Preprocess(img_size=(32, 32), mean=(0.5,) * 3, std=(0.5,) * 3)
    [found] = ask(("fit", to_image(pixels), preprocess.to_dict()))
    np.testing.assert_array_equal(found, preprocess.fit(Image.fromarray(pixels)).ravel())


@needs_node
def test_pixels_are_normalised_to_the_same_floats():
    preprocess = Preprocess(img_size=(16, 16), mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    pixels = np.arange(768, dtype=np.uint8).reshape(16, 16, 3)
    [found] = ask(("normalise", pixels.ravel().tolist(), preprocess.to_dict()))
    np.testing.assert_array_equal(np.array(found, np.float32), preprocess.normalise(pixels).ravel())


@needs_node
def test_the_same_patches_are_kept_and_refined():
    rng = np.random.default_rng(2)
    questions, expected = [], []
    for case in range(200):
        received = rng.random(1 + int(rng.integers(4, 40))).astype(np.float32)
        if case % 3 == 0:
            received = np.round(received * 4) / 4 + np.float32(0.25)  # ties
        keep = float(rng.choice([0.0, 0.5, 1.0, 1.3, 5.0]))
        strengths = [keep, keep + float(rng.choice([0.0, 0.4]))]
        least = int(rng.integers(0, 6))
        layout = Layout(np.arange(-1, len(received) - 1), np.array([0, len(received)]), np.array([0]))
        choice = choose(to_importance(received, layout), layout, np.array([strengths]), min_keep=least)
        questions.append(("choose", received.tolist(), strengths, least))
        refined = None if choice.refined_T is None else choice.refined_T.tolist()
        expected.append({"kept": choice.kept_T.tolist(), "refined": refined})
    assert ask(*questions) == expected


@needs_node
@pytest.mark.parametrize("shape", SHAPES, ids=["linear", "grey", "dawn", "haar"])
def test_macs_and_estimated_joules_are_those_of_python(shape):
    rng = np.random.default_rng(3)
    raw = to_raw(shape)
    questions, expected = [("fullMacs", raw)], [full_macs(shape)]
    for _ in range(20):
        stages = int(rng.integers(1, len(shape.depths) + 1))
        kept = [shape.num_patches, *(int(each) for each in rng.integers(0, shape.num_patches + 1, stages - 1))]
        refined = [0, *(int(rng.integers(0, each + 1)) for each in kept[1:])]
        is_scored = bool(rng.integers(2))
        macs, moved = (count(shape, kept, refined, scored=is_scored) for count in (plan_macs, numbers_moved))
        weights, rounded = block_linears(shape, kept, scored=is_scored)
        int8 = estimate_joules(macs - rounded, 4 * (moved - weights))
        questions += [("macs", raw, kept, refined, is_scored), ("numbersMoved", raw, kept, refined, is_scored)]
        questions += [("estimateJoules", raw, kept, refined, is_scored, name) for name in ("float32", "int8")]
        expected += [macs, moved, estimate_joules(macs, 4 * moved)]
        expected += [int8 + estimate_joules(rounded, weights, constants=HOROWITZ["int8"])]
    assert ask(*questions) == pytest.approx(expected, rel=1e-12)


@needs_node
def test_a_budget_becomes_the_same_setting():
    rows = [
        (((0.0, 0.0), (0.0, 0.0)), None, 1.0),
        (((0.5, 0.5), (0.6, 0.9)), 0.9, 0.8),
        (((0.51, 0.51), (0.61, 0.91)), 0.9, 0.6),  # a cliff above it
        (((1.5, 1.7), (0.9, 0.9)), 0.4, 0.3),
        (((2.5, 2.7), (0.9, 0.9)), 0.4, 0.3),  # costs as much
    ]
    points = make_points(SHAPES[0], rows)
    raw = json.loads(points.to_json())
    budgets = [1.0, 0.97, 0.8, 0.79, 0.65, 0.6, 0.5, 0.301, 0.3]
    for budget, found in zip(budgets, ask(*(("setting", raw, each, 2) for each in budgets)), strict=True):
        wanted = points.setting(budget)
        np.testing.assert_allclose(found["thresholds"], wanted.thresholds, rtol=1e-12, err_msg=str(budget))
        assert (found["exitConfidence"] or 2) == pytest.approx(wanted.exit_confidence or 2, rel=1e-12)


@needs_node
def test_a_budget_that_cannot_be_is_one_sentence():
    raw = json.loads(make_points(SHAPES[0], [(((0.0, 0.0),) * 2, None, 1.0), (((1.0, 1.0),) * 2, None, 0.4)]).to_json())
    low, none, outside = ask(("setting", raw, 0.2, 2), ("setting", None, 0.5, 2), ("setting", raw, 1.5, 2))
    assert "cheapest point, 0.400" in low["error"]
    assert "no operating points" in none["error"]
    assert "outside (0, 1]" in outside["error"]


IMAGE = (np.arange(768) % 251).astype(np.float32).reshape(1, 3, 16, 16)


@needs_node
def test_a_run_passes_the_stages_as_python_s_session_does(tmp_path):
    rows = [(((0.0, 0.0),) * 2, None, 1.0), (((0.6, 1.2), (0.9, 0.9)), None, 0.5), (((2.0, 2.0),) * 2, 0.7, 0.2)]
    bundle = make_bundle(make_points(SHAPES[0], rows))
    options = [{"budget": each} for each in (None, 1.0, 0.9, 0.6, 0.5, 0.3, 0.2)]
    options += [{"budget": 0.5, "exitConfidence": each} for each in (0.5, 0.7, 0.99)]
    session = pretend_session(bundle, tmp_path)
    found = ask(*(("run", json.loads(bundle.to_json()), each) for each in options))
    exits = set()
    for each, answer in zip(options, found, strict=True):
        out = session(IMAGE, each["budget"], exit_confidence=each.get("exitConfidence"))
        kept, refined = out.trace.kept.reshape(3, -1), out.trace.refined.reshape(3, -1)
        assert answer["kept"] == kept.astype(int).tolist(), each
        assert answer["refined"] == refined.astype(int).tolist(), each
        assert answer["logits"] == out.logits[0].tolist(), each
        assert (answer["macs"], answer["exitStage"]) == (out.macs[0], out.trace.exit_stage[0]), each
        counts = (grids.sum(1)[: answer["exitStage"] + 1].tolist() for grids in (kept, refined))
        joules = estimate_work(
            bundle.shape, "float32", answer["macs"], *counts, scored=each["budget"] not in (None, 1.0)
        )
        assert answer["joules"] == pytest.approx(joules, rel=1e-12), each
        exits.add(answer["exitStage"])
    assert exits == {0, 1, 2}


@needs_node
def test_without_operating_points_everything_is_computed(tmp_path):
    bundle = make_bundle()
    [found] = ask(("run", json.loads(bundle.to_json()), {"budget": None, "exitConfidence": None}))
    assert found["kept"] == [[1] * 16] * 3
    assert found["logits"] == pretend_session(bundle, tmp_path)(IMAGE).logits[0].tolist()


@needs_node
def test_a_broken_model_leaves_early_only_where_images_may(tmp_path):
    raw = json.loads(make_bundle().to_json())
    never, may = ask(("run", raw, {}, True), ("run", raw, {"exitConfidence": 0.9}, True))
    session = pretend_session(make_bundle(), tmp_path, is_broken=True)
    assert never["exitStage"] == session(IMAGE).trace.exit_stage[0] == 2
    assert may["exitStage"] == session(IMAGE, exit_confidence=0.9).trace.exit_stage[0] == 0


def pretend_session(bundle: Bundle, folder: Path, *, is_broken: bool = False) -> Session:
    """A session whose graphs do the arithmetic of `pretend` in pieces.mjs."""
    names = [graphs[0].file for graphs in bundle.stages]
    for name in names:
        (folder / name).write_bytes(b"")
    empty = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"  # SHA-256 of nothing
    whole = make_bundle(bundle.points, checksums=dict.fromkeys(names, empty))
    (folder / "bundle.json").write_text(whole.to_json())

    def load(engine, path, threads):
        stage = int(path.stem.split("_")[1])

        def run(inputs):
            cells = np.arange(-1, 16)
            if stage == 0:
                values = cells + 3 + weigh(inputs[0].reshape(1, -1))
            else:
                x, cells, pixels, source, bias = inputs
                read = weigh(pixels.reshape(len(pixels), -1))[source[:, 0]]
                values = cells[:, 0] + 3 + weigh(x[:, 0]) + read + bias[0].astype(np.int64)
            logits = np.zeros((1, 3), np.float32)
            logits[0, stage] = 1 + stage + values.sum() % 8 / 64
            if is_broken:
                logits[:] = np.nan
            x = (values[:, None] + np.arange(bundle.shape.embed_dims[stage])) % 97
            received = values % 16 / 16
            return (
                [logits] if stage == 2 else [x[:, None].astype(np.float32), received[None].astype(np.float32), logits]
            )

        return run

    return Session(folder, load=load)


def weigh(rows: np.ndarray) -> np.ndarray:
    return (rows.astype(np.int64) * (1 + np.arange(rows.shape[1]) % 7)).sum(1)


@needs_node
def test_bundles_that_do_not_run_in_a_browser_are_refused_by_name():
    raw = json.loads(make_bundle().to_json())
    fixed = [[{"file": "stage_0.onnx", "tokens": 17}]]
    changes = [
        {},
        {"format": 3},
        {"kind": "openvino"},
        {"is_single": True},
        {"stages": fixed},
        {"is_convolved": True},
    ]
    fine, newer, other, single, buckets, convolved = ask(*(("whyNot", raw | each) for each in changes))
    assert fine is None
    assert "format 3" in newer
    assert "openvino" in other and "--format onnx" in other
    assert "--single-graph" in single
    assert "--buckets" in buckets
    assert "--convolutions" in convolved


def test_the_page_asks_nobody_but_its_own_server():
    for path in PAGE.rglob("*.*"):
        text = path.read_text()
        assert "http:" not in text.replace("http://www.w3.org/2000/svg", ""), path
        assert "https:" not in text, path
    index = (PAGE / "index.html").read_text()
    assert "unsafe-inline" not in index
    assert index.count("<script") == index.count('<script type="module" src=') == 1
    assert "style=" not in index and "onclick=" not in index


def test_a_browser_asks_whether_the_files_it_has_still_hold():
    async def scene():
        transport = httpx.ASGITransport(FreshFiles(directory=PAGE))
        async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
            first = await client.get("/main.js")
            return first, await client.get("/main.js", headers={"If-None-Match": first.headers["etag"]})

    first, again = asyncio.run(scene())
    assert (first.status_code, again.status_code) == (200, 304)
    assert first.headers["cache-control"] == again.headers["cache-control"] == "no-cache"


def test_what_the_page_installs_for_its_tests_is_what_a_site_ships():
    locked = json.loads((DRIVEN / "package-lock.json").read_text())["packages"][f"node_modules/{PACKAGE}"]
    assert (locked["version"], locked["integrity"]) == (VERSION, INTEGRITY)
