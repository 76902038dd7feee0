"""What several tests share: a tiny model, traced in seconds, whose thresholds really cut; torch in an engine's place; a clock."""

from collections.abc import Callable
from pathlib import Path

import torch

from iret.doctor import describe_device
from iret.export.bundle import _jobs, _max_batch  # what is traced, without the tracing
from iret.export.form import PLAIN, Form
from iret.model import Iret
from iret.runtime.bundle import FILE_NAME, Bundle, GraphFile, checksum
from iret.runtime.cost import Shape
from iret.runtime.points import DeviceTable


def make_model(seed: int = 0, *, is_haar: bool = False, **options) -> Iret:
    """12 patches of 8 x 8 in 3 rows, three stages, 5 classes; `options` change its shape.

    Attention and answers are far from uniform, and lifting far from Haar's unless `is_haar`.
    """
    settings = dict(img_size=(24, 32), patch_size=8, in_chans=3, num_classes=5, embed_dims=(16, 32, 48), head_dim=16)
    torch.manual_seed(seed)
    model = Iret(Shape(**{**settings, "depths": (2, 3, 1), **options})).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("qkv.weight") or "head" in name:
            torch.nn.init.normal_(parameter, std=0.2)
        elif parameter.dim() == 1 and not (is_haar and "lifting" in name):  # biases and norms, which start as 0 and 1
            parameter.data += 0.1 * torch.randn(parameter.shape)
    return model


def write_bundle(model: Iret, folder: Path, form: Form = PLAIN) -> Callable:
    """A bundle of empty files in `folder`; what loads them in place of an engine: torch, on the graphs that would be exported."""
    jobs = _jobs(model, "onnx", form)
    stages: dict[int, list[GraphFile]] = {}
    folder.mkdir(exist_ok=True)
    for job in jobs:
        (folder / job.name).touch()
        stages.setdefault(job.stage, []).append(GraphFile(job.name, job.tokens))
    bundle = Bundle(
        name=model.name,
        kind="onnx",
        is_single=form.single_graph,
        precision="float32",
        shape=model.shape,
        preprocess=model.preprocessing,
        labels=model.labels,
        points=model.points,
        stages=tuple(tuple(each) for each in stages.values()),
        is_convolved=form.convolutions,
        max_batch=_max_batch("onnx", form),
        checksums={job.name: checksum(folder / job.name) for job in jobs},
    )
    (folder / FILE_NAME).write_text(bundle.to_json())
    graphs = {job.name: job.graph for job in jobs}

    def load(engine: str, path: Path, threads: int | None) -> Callable:
        def run(inputs):
            with torch.no_grad():
                return [each.numpy() for each in graphs[path.name](*map(torch.from_numpy, inputs))]

        return run

    return load


def made_up_clock() -> DeviceTable:
    """Of three points on this machine's torch: 8, 4 and 2 ms."""
    return DeviceTable(
        device=describe_device(torch.device("cpu"), "float32"),
        ms_mean=(8.0, 4.0, 2.0),
        ms_p50=(8.0, 4.0, 2.0),
        ms_p95=(9.0, 5.0, 3.0),
        joules=(0.08, 0.04, 0.02),
        energy_source="made up",
        energy_scope="all of it",
        energy_kind="estimated",
        rounds=1,
    )
