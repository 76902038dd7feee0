"""The training loop: resumable to the same losses, the same on two processes, and honest about mistakes."""

import csv
import io
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

import iret
from iret.train import checkpoint, loop
from iret.train.loop import RunOptions, build_model, resample_positions, train
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
    with (out / "log.csv").open() as file:
        return {int(row["step"]): row["loss"] for row in csv.DictReader(file) if row["loss"]}


def run_script(data: Path, out: Path, recipe: str, *, resume: bool = False) -> list[str]:
    """A command line that trains; the recipe is the name of one above."""
    code = (
        "import sys; from pathlib import Path; from iret.train import loop; import test_loop; loop.LOG_EVERY = 1; "
        f"loop.train(test_loop.{recipe}, loop.RunOptions(data={str(data)!r}, out=Path({str(out)!r}), device='cpu', "
        f"resume={resume}, checkpoint_minutes=0.0005))"
    )
    return [sys.executable, "-c", code]


def environment() -> dict[str, str]:
    here = str(Path(__file__).parent)
    paths = os.pathsep.join([here, os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "GOMP_SPINCOUNT": "0"}


def test_a_killed_run_resumes_to_the_losses_of_an_uninterrupted_one(tmp_path: Path) -> None:
    data = write_images(tmp_path / "data")
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    subprocess.run(run_script(data, whole, "TINY"), env=environment(), check=True, capture_output=True)
    victim = subprocess.Popen(run_script(data, broken, "TINY"), env=environment(), stderr=subprocess.PIPE)
    deadline = time.monotonic() + 120
    while not ((broken / "log.csv").exists() and len(losses(broken)) > 6):
        assert victim.poll() is None and time.monotonic() < deadline, "the run ended or hung before it could be killed"
        time.sleep(0.02)
    victim.send_signal(signal.SIGKILL)
    victim.wait()
    assert 6 < len(losses(broken)) < 20
    subprocess.run(run_script(data, broken, "TINY", resume=True), env=environment(), check=True, capture_output=True)
    assert losses(broken) == losses(whole)
    first, second = iret.load(whole).state_dict(), iret.load(broken).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_two_processes_give_the_losses_of_one(tmp_path: Path) -> None:
    data = write_images(tmp_path / "data", num_train=24)
    one, two = tmp_path / "one", tmp_path / "two"
    subprocess.run(run_script(data, one, "PLAIN"), env=environment(), check=True, capture_output=True)
    script = tmp_path / "run.py"
    script.write_text(run_script(data, two, "PLAIN")[2])
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    subprocess.run(torchrun, env=environment(), check=True, capture_output=True)
    alone, together = losses(one), losses(two)
    assert alone.keys() == together.keys() and len(alone) == 6
    for step in alone:
        # Means over halves of a batch are rounded differently; AdamW's first steps magnify that.
        assert float(together[step]) == pytest.approx(float(alone[step]), abs=2e-3), step


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


def test_ctrl_c_saves_the_state_and_says_how_to_go_on(tmp_path: Path, monkeypatch, capsys) -> None:
    from iret import cli
    from iret.train import recipe

    data, out = str(write_images(tmp_path / "data", num_train=16)), tmp_path / "out"
    monkeypatch.setitem(recipe.RECIPES, "tiny", lambda: TINY)
    original, calls = loop._Run._step, []

    def interrupted(self, step, images, labels):
        calls.append(step)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(self, step, images, labels)

    monkeypatch.setattr(loop._Run, "_step", interrupted)
    arguments = ["train", "--recipe", "tiny", "--data", data, "--out", str(out), "--device", "cpu"]
    assert cli.main(arguments) == 130
    said = capsys.readouterr().err
    assert re.search(r"stopped and saved; go on with: iret train .* --resume", said)
    monkeypatch.setattr(loop._Run, "_step", original)
    assert cli.main([*arguments, "--resume"]) == 0


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
    recipe = replace(TINY, teacher=str(tmp_path / "teacher"))
    train(recipe, RunOptions(data=data, out=tmp_path / "with", device="cpu", steps=2))
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


def test_more_in_a_batch_than_images_is_refused(tmp_path: Path) -> None:
    data = str(write_images(tmp_path / "data", num_train=4))
    with pytest.raises(ValueError, match=r"batch_size=8 .* does not fit 4 training images"):
        train(TINY, RunOptions(data=data, out=tmp_path / "out", device="cpu"))


def test_bf16_goes_through_all_three_parts_of_a_run(tmp_path: Path) -> None:
    data = str(write_images(tmp_path / "data", num_train=16))
    recipe = replace(TINY, precision="bf16-mixed", full_until=0.3, sampled_until=0.6)
    train(recipe, RunOptions(data=data, out=tmp_path / "out", device="cpu", steps=6))
    weights = iret.load(tmp_path / "out").state_dict()
    assert all(tensor.dtype == torch.float32 and bool(tensor.isfinite().all()) for tensor in weights.values())
