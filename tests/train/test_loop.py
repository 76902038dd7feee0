"""The training loop: resumable to the same losses, the same on two processes, and honest about mistakes."""

import csv
import io
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

import iret
from iret import calibrate, cli
from iret.train import checkpoint, loop, recipe
from iret.train.loop import RunOptions, build_model, fit_batch, resample_positions, train
from iret.train.recipe import Recipe

TINY = Recipe(
    name="tiny",
    model="iret_pico",
    epochs=2.0,
    batch_size=8,
    lr=1e-3,
    warmup_epochs=0.2,
    drop_path_rate=0.1,
    precision="32-true",
    crop_padding=2,
    cutmix=1.0,
    mixup=0.2,
    full_until=0.2,
    sampled_until=0.5,
)
# Without draws that each process makes for itself, two processes see exactly what one does.
PLAIN = replace(TINY, name="plain", drop_path_rate=0.0, crop_padding=0, min_crop=1.0, flip=False, cutmix=0.0, mixup=0.0)


def write_images(folder: Path, num_train: int = 80, num_val: int = 8) -> Path:
    """A parquet folder of random 32 px images in two classes that brightness tells apart."""
    folder.mkdir(parents=True)
    draw = np.random.default_rng(0)
    for split, count in (("train", num_train), ("val", num_val)):
        rows = []
        for index in range(count):
            pixels = draw.integers(0, 128, (32, 32, 3)).astype(np.uint8) + 127 * (index % 2)
            buffer = io.BytesIO()
            Image.fromarray(pixels.astype(np.uint8)).save(buffer, "PNG")
            rows.append({"image": {"bytes": buffer.getvalue(), "path": None}, "label": index % 2})
        pq.write_table(pa.Table.from_pylist(rows), folder / f"{split}.parquet")
    return folder


def losses(out: Path) -> dict[int, str]:
    if not (out / "log.csv").exists():
        return {}
    with (out / "log.csv").open() as file:
        return {int(row["step"]): row["loss"] for row in csv.DictReader(file) if row["loss"]}


def run_script(
    data: Path, out: Path, recipe: str, *, resume: bool = False, stop_after_minutes: float | None = None
) -> list[str]:
    """A command line that trains; the recipe is the name of one above."""
    code = (
        "import sys; from pathlib import Path; from iret.train import loop; import test_loop; loop.LOG_EVERY = 1; "
        f"loop.train(test_loop.{recipe}, loop.RunOptions(data={str(data)!r}, out=Path({str(out)!r}), device='cpu', "
        f"resume={resume}, stop_after_minutes={stop_after_minutes}, checkpoint_minutes=0.0005))"
    )
    return [sys.executable, "-c", code]


def environment() -> dict[str, str]:
    here = str(Path(__file__).parent)
    paths = os.pathsep.join([here, os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "GOMP_SPINCOUNT": "0"}


@pytest.fixture(autouse=True)
def few_points(monkeypatch):
    """The table at the end of a run, from few evaluations; how it is found is in test_calibrate."""
    monkeypatch.setattr(loop, "calibrate", partial(calibrate.calibrate, trials=1))
    monkeypatch.setattr(calibrate, "SEARCH_RUNGS", (0.0, 2.0))
    monkeypatch.setattr(calibrate, "FIRST_RUNGS", (0.0, 2.0))
    monkeypatch.setattr(calibrate, "LARGEST_GAP", 1.0)
    monkeypatch.setattr(calibrate, "LARGEST_STEP", 100.0)


def golden_losses(folder: Path) -> list[float]:
    """The first ten losses at seed 0, through all three parts of a run."""
    data, out = str(write_images(folder / "data")), folder / "out"
    before, loop.LOG_EVERY = loop.LOG_EVERY, 1
    try:
        train(TINY, RunOptions(data=data, out=out, device="cpu", steps=10))
    finally:
        loop.LOG_EVERY = before
    return [round(float(loss), 5) for loss in losses(out).values()]


def test_ten_steps_have_the_golden_losses(tmp_path: Path) -> None:
    golden = json.loads((Path(__file__).parents[1] / "golden" / "losses.json").read_text())
    assert len(golden) == 10
    # Processors sum in another order, and AdamW's first steps magnify that.
    assert golden_losses(tmp_path) == pytest.approx(golden, abs=5e-3)


@pytest.fixture
def as_in_a_script(monkeypatch):
    """This process trains as `run_script` does: on one thread, and every step is logged."""
    monkeypatch.setattr(loop, "LOG_EVERY", 1)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_a_killed_run_resumes_to_the_losses_of_an_uninterrupted_one(tmp_path: Path, as_in_a_script) -> None:
    data = write_images(tmp_path / "data", num_train=64)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    options = RunOptions(data=str(data), out=whole, device="cpu")
    train(TINY, options)
    victim = subprocess.Popen(run_script(data, broken, "TINY"), env=environment(), stderr=subprocess.PIPE)
    deadline = time.monotonic() + 120
    while not ((broken / "log.csv").exists() and len(losses(broken)) > 3):
        assert victim.poll() is None and time.monotonic() < deadline, "the run ended or hung before it could be killed"
        time.sleep(0.02)
    victim.send_signal(signal.SIGKILL)
    victim.wait()
    assert 3 < len(losses(broken)) < 16
    train(TINY, replace(options, out=broken, resume=True))
    assert losses(broken) == losses(whole)
    first, second = iret.load(whole).state_dict(), iret.load(broken).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)


def launch_two(*runs: str) -> None:
    """What torchrun does, with processes that are forked once everything is imported; `runs` is code, one after another."""
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    here = dict(rdzv_backend="c10d", rdzv_endpoint="localhost:0", rdzv_configs={"is_host": True}, run_id="two")
    config = LaunchConfig(min_nodes=1, max_nodes=1, nproc_per_node=2, start_method="fork", max_restarts=0, **here)
    elastic_launch(config, run_all)(*runs)


def run_all(*runs: str) -> None:
    for run in runs:
        exec(run, {})


def test_two_processes_give_the_losses_of_one_and_stop_at_the_same_step(tmp_path: Path, as_in_a_script) -> None:
    data = write_images(tmp_path / "data", num_train=24)
    one, two, stopped = tmp_path / "one", tmp_path / "two", tmp_path / "stopped"
    train(PLAIN, RunOptions(data=str(data), out=one, device="cpu"))
    runs = run_script(data, two, "PLAIN"), run_script(data, stopped, "PLAIN", stop_after_minutes=0.0)
    code = f"import test_loop; test_loop.launch_two{tuple(code for *_, code in runs)}"
    subprocess.run([sys.executable, "-c", code], env=environment(), check=True, capture_output=True, timeout=120)
    alone, together = losses(one), losses(two)
    assert alone.keys() == together.keys() and len(alone) == 6
    for step in alone:
        # Means over halves of a batch are rounded differently; AdamW's first steps magnify that.
        assert float(together[step]) == pytest.approx(float(alone[step]), abs=2e-3), step
    assert list(losses(stopped)) == [0]


def test_one_seed_gives_identical_weights_and_another_does_not(tmp_path: Path) -> None:
    data = str(write_images(tmp_path / "data", num_train=16))
    runs = [("a", 0), ("b", 0), ("c", 1)]
    weights = []
    for name, seed in runs:
        train(TINY, RunOptions(data=data, out=tmp_path / name, device="cpu", seed=seed, steps=3))
        weights.append(iret.load(tmp_path / name).state_dict())
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert not all(torch.equal(weights[0][name], weights[2][name]) for name in weights[0])


def test_training_learns_what_brightness_tells(tmp_path: Path) -> None:
    data = str(write_images(tmp_path / "data"))
    out = tmp_path / "out"
    report = train(replace(PLAIN, ema_decay=0.5), RunOptions(data=data, out=out, device="cpu", steps=30))
    assert report.is_finished and report.step == 30
    model = iret.load(out)
    assert model.points is not None and model.points.points[0].accuracy == 1.0
    assert model.labels == ("0", "1")
    assert {path.name for path in out.iterdir()} >= {"log.csv", "recipe.json", "tensorboard", "points.json"}


def test_a_leg_that_is_stopped_goes_on_with_resume(tmp_path: Path) -> None:
    data, out = str(write_images(tmp_path / "data", num_train=16)), tmp_path / "out"
    options = RunOptions(data=data, out=out, device="cpu", stop_after_minutes=0.0, steps=3)
    assert train(TINY, options).step == 1
    assert train(TINY, replace(options, resume=True)).step == 2
    report = train(TINY, replace(options, resume=True))
    assert report.is_finished and iret.load(out).num_classes == 2


def test_ctrl_c_in_the_middle_of_a_step_resumes_to_the_losses_of_an_uninterrupted_run(
    tmp_path: Path, monkeypatch, capsys
) -> None:
    data = str(write_images(tmp_path / "data", num_train=16))
    monkeypatch.setitem(recipe.RECIPES, "tiny", lambda: TINY)
    monkeypatch.setattr(loop, "LOG_EVERY", 1)
    whole, broken = tmp_path / "whole", tmp_path / "bro ken"
    arguments = ["train", "--recipe", "tiny", "--data", data, "--device", "cpu", "--seed", "3", "--steps", "4"]
    assert cli.main([*arguments, "--out", str(whole)]) == 0
    said = capsys.readouterr().err
    assert "now its operating points are searched on held-out images" in said and "points on the course" in said
    clip = loop.Fabric.clip_gradients

    def interrupted(*args, **options):  # after the gradients are there and before they are used
        if len(losses(broken)) == 1:
            os.kill(os.getpid(), signal.SIGINT)
        return clip(*args, **options)

    monkeypatch.setattr(loop.Fabric, "clip_gradients", interrupted)
    assert cli.main([*arguments, "--out", str(broken)]) == 130
    said = capsys.readouterr().err
    assert len(losses(broken)) == 2
    again = re.search(r"stopped and saved; go on with: iret (train .* --resume)", said)
    assert again is not None
    assert cli.main(shlex.split(again.group(1))) == 0
    assert losses(broken) == losses(whole)


def test_ctrl_c_before_the_first_step_says_that_nothing_was_saved(tmp_path: Path, monkeypatch, capsys) -> None:
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(loop, "build_model", interrupt)
    assert cli.main(["train", "--data", "cluttered-digits", "--out", str(tmp_path / "out"), "--device", "cpu"]) == 130
    assert "stopped before anything was saved" in capsys.readouterr().err


def test_fine_tuning_starts_from_another_size_and_number_of_classes(tmp_path: Path) -> None:
    start = iret.create_model("iret_pico", num_classes=7)
    start.save_pretrained(tmp_path / "start")
    data = str(write_images(tmp_path / "data", num_train=16))
    options = RunOptions(
        data=data, out=tmp_path / "out", device="cpu", init=str(tmp_path / "start"), img_size=(32, 48), steps=2
    )
    begun = build_model(TINY, options)
    assert torch.equal(begun.stages[0].blocks[0].attn.qkv.weight, start.stages[0].blocks[0].attn.qkv.weight)
    train(TINY, options)
    model = iret.load(tmp_path / "out")
    assert model.num_classes == 2 and model.shape.grid == (8, 12)


def test_positions_keep_the_class_token_and_a_constant_when_resampled() -> None:
    pos_embed = torch.cat([torch.full((1, 1, 4), 9.0), torch.full((1, 16, 4), 2.0)], dim=1)
    resampled = resample_positions(pos_embed, (4, 4), (6, 8))
    assert resampled.shape == (1, 49, 4)
    assert torch.equal(resampled[:, 0], pos_embed[:, 0])
    torch.testing.assert_close(resampled[:, 1:], torch.full((1, 48, 4), 2.0), atol=1e-6, rtol=0)  # float32 weights


def test_an_external_teacher_is_learned_from_and_not_trained(tmp_path: Path) -> None:
    teacher = iret.create_model("iret_pico", num_classes=2)
    teacher.save_pretrained(tmp_path / "teacher")
    data = str(write_images(tmp_path / "data", num_train=16))
    taught_by = replace(TINY, teacher=str(tmp_path / "teacher"))
    train(taught_by, RunOptions(data=data, out=tmp_path / "with", device="cpu", steps=2))
    train(TINY, RunOptions(data=data, out=tmp_path / "without", device="cpu", steps=2))
    taught, alone = (iret.load(tmp_path / name).state_dict() for name in ("with", "without"))
    assert taught.keys() == alone.keys()
    assert not all(torch.equal(taught[name], alone[name]) for name in alone)


def test_a_run_is_not_overwritten_and_a_missing_one_not_resumed(tmp_path: Path) -> None:
    data, out = str(write_images(tmp_path / "data", num_train=16)), tmp_path / "out"
    options = RunOptions(data=data, out=out, device="cpu", steps=1)
    with pytest.raises(ValueError, match="nothing to resume"):
        train(TINY, replace(options, resume=True))
    train(TINY, options)
    with pytest.raises(ValueError, match="holds a run already"):
        train(TINY, options)
    with pytest.raises(ValueError, match="belongs to another run: its lr"):
        train(replace(TINY, lr=2e-3), replace(options, resume=True, steps=2))
    with pytest.raises(ValueError, match="belongs to another run: its seed"):
        train(TINY, replace(options, resume=True, seed=5))


def test_a_truncated_state_is_refused(tmp_path: Path) -> None:
    data, out = str(write_images(tmp_path / "data", num_train=16)), tmp_path / "out"
    options = RunOptions(data=data, out=out, device="cpu", steps=1)
    train(TINY, options)
    path = out / checkpoint.FILE_NAME
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="not a whole training state"):
        train(TINY, replace(options, resume=True))


def test_a_batch_shrinks_to_the_images_there_are_and_the_learning_rate_with_it(tmp_path: Path) -> None:
    data, out = str(write_images(tmp_path / "data", num_train=4)), tmp_path / "out"
    assert train(TINY, RunOptions(data=data, out=out, device="cpu", steps=1)).is_finished
    used = json.loads((out / "recipe.json").read_text())
    assert (used["batch_size"], used["lr"]) == (4, TINY.lr / 2)
    assert fit_batch(TINY, 100, 2) == TINY
    assert fit_batch(TINY, 7, 2).batch_size == 6
    with pytest.raises(ValueError, match="2 training images cannot be shared by 3 processes"):
        fit_batch(TINY, 2, 3)


def test_images_that_cannot_be_read_stop_a_run_that_has_nothing_else(tmp_path: Path) -> None:
    data = write_images(tmp_path / "data", num_train=16)
    table = pq.read_table(data / "train.parquet")
    bad = [{"image": {"bytes": b"no image", "path": None}, "label": label} for label in table["label"].to_pylist()]
    pq.write_table(pa.Table.from_pylist(bad), data / "train.parquet")
    with pytest.raises(ValueError, match="no image of the batch of step 0 could be read"):
        train(TINY, RunOptions(data=str(data), out=tmp_path / "out", device="cpu", steps=1))


def test_a_loss_that_is_no_number_stops_before_it_is_learned(tmp_path: Path) -> None:
    data, out = str(write_images(tmp_path / "data", num_train=16)), tmp_path / "out"
    with pytest.raises(ValueError, match="the loss of step [1-9].* is not finite; the last checkpoint is kept"):
        train(replace(TINY, lr=1e12, warmup_epochs=0.0), RunOptions(data=data, out=out, device="cpu", steps=4))
    assert not (out / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [(dict(num_classes=7), "has classes 7, the model 2"), (dict(img_size=64), r"has img_size \(64, 64\), the model")],
)
def test_a_teacher_of_another_shape_is_refused(tmp_path: Path, options: dict, message: str) -> None:
    iret.create_model("iret_pico", **{"num_classes": 2, **options}).save_pretrained(tmp_path / "teacher")
    data = str(write_images(tmp_path / "data", num_train=16))
    with pytest.raises(ValueError, match=message):
        train(
            replace(TINY, teacher=str(tmp_path / "teacher")), RunOptions(data=data, out=tmp_path / "out", device="cpu")
        )


def test_a_recipe_for_other_stages_is_refused(tmp_path: Path) -> None:
    data = str(write_images(tmp_path / "data", num_train=16))
    with pytest.raises(ValueError, match="weighs 1 heads before the last, the model has 2"):
        train(replace(TINY, stage_weights=(0.3,)), RunOptions(data=data, out=tmp_path / "out", device="cpu"))


def test_held_out_images_are_looked_at_as_often_as_the_recipe_says_and_at_the_end(tmp_path: Path) -> None:
    data, out = str(write_images(tmp_path / "data")), tmp_path / "out"
    report = train(replace(TINY, epochs=5.0, eval_epochs=2), RunOptions(data=data, out=out, device="cpu"))
    with (out / "log.csv").open(newline="") as file:
        looked_at = [int(row["step"]) + 1 for row in csv.DictReader(file) if row["accuracy"]]
    epoch = report.num_steps // 5
    assert looked_at == [2 * epoch, 4 * epoch, 5 * epoch]


def test_a_warm_up_never_exceeds_the_learning_rate(tmp_path: Path) -> None:
    data, out = str(write_images(tmp_path / "data", num_train=24)), tmp_path / "out"
    train(replace(TINY, warmup_epochs=0.5), RunOptions(data=data, out=out, device="cpu"))  # one and a half steps
    with (out / "log.csv").open() as file:
        assert max(float(row["lr"]) for row in csv.DictReader(file) if row["lr"]) <= TINY.lr


def test_any_seed_that_fits_64_bits_is_one(tmp_path: Path) -> None:
    data = str(write_images(tmp_path / "data", num_train=16))
    assert train(TINY, RunOptions(data=data, out=tmp_path / "out", device="cpu", steps=1, seed=2**40)).is_finished


def test_bf16_goes_through_all_three_parts_of_a_run(tmp_path: Path) -> None:
    data = str(write_images(tmp_path / "data", num_train=16))
    rounded = replace(TINY, precision="bf16-mixed", full_until=0.3, sampled_until=0.6)
    train(rounded, RunOptions(data=data, out=tmp_path / "out", device="cpu", steps=3))
    weights = iret.load(tmp_path / "out").state_dict()
    assert all(tensor.dtype == torch.float32 and bool(tensor.isfinite().all()) for tensor in weights.values())
