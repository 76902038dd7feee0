"""`iret export`: a model becomes a bundle, and is shown to answer as the model does before the bundle is there.

Everything is written into a folder beside the wanted one, checked there, and moved into place; what fails leaves nothing.

Read first: `form`, `graphs`. Read next: `parity`, `iret.runtime.session`.
"""

import json
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial, reduce
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.export import Dim

from iret import doctor
from iret.export.accuracy import HeldOut
from iret.export.form import PLAIN, Form
from iret.export.graphs import FirstStage, LaterStage, SingleGraph
from iret.export.int8 import Calls, record_inputs
from iret.export.parity import Parity, check, settings
from iret.export.points import points_of
from iret.export.targets import WRITERS, Axes, share_weights
from iret.model import Iret
from iret.runtime.bundle import FILE_NAME, Bundle, GraphFile, checksum, replace_folder
from iret.runtime.points import OperatingPoints

MAX_BATCH = 8  # images a call of an ExecuTorch program, whose memory is planned ahead
ANY_BATCH = 4096  # a bound that torch.export asks for; the file holds none
LABELS_NAME = "labels.txt"

Say = Callable[[str], None]
Traced = tuple[nn.Module, tuple[Tensor, ...], Axes | None]  # a graph, what to trace it with, which axes may change


def export(
    model: Iret,
    out: Path,
    kind: str = "onnx",
    form: Form = PLAIN,
    *,
    images: Tensor | None = None,
    held_out: HeldOut | None = None,
    say: Say = lambda line: None,
) -> tuple[Bundle, Parity]:
    """Write `model`, in eval mode on the CPU, as a bundle of `kind` into the folder `out`, which is new or an older bundle.

    `form`: how its graphs are written. `images` [B, C, Y, X]: what the bundle is checked on, and int8 calibrated on, as the
    model takes them; None: noise and smooth blobs, which calibrate nothing. `held_out`: others, on which int8 is judged and
    thresholds without exits are measured.

    Raises:
        ValueError: a converted model, an option that the kind cannot do, a folder that is something else, a bundle that differs
            from the model.
        ImportError: the engine is missing.
    """
    _refuse(model, out, kind, form)
    if form.int8 and images is None:
        raise ValueError("int8 is calibrated on real images; give some with --data.")
    out = out.resolve()
    out.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}."))
    try:
        write = partial(_write, model, scratch, kind, form, images, held_out, say)
        bundle, parity = write(None)
        if form.int8 and images is not None:
            say("recording what every graph is given")
            calls = record_inputs(scratch, images.numpy(), [each[1:] for each in settings(model, bundle)])
            bundle, parity = write(calls)
        bundle = _keep_clocks(bundle, out, say)
        (scratch / FILE_NAME).write_text(bundle.to_json())
        scratch.chmod(0o755)
        replace_folder(scratch, out)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise
    return bundle, parity


@dataclass(frozen=True)
class _Job:
    """One file to write: which stage, for which count of tokens (None: any), from which graph traced with what."""

    name: str
    stage: int
    tokens: int | None
    graph: nn.Module
    inputs: tuple[Tensor, ...]
    axes: Axes | None


def _jobs(model: Iret, kind: str, form: Form) -> list[_Job]:
    model = model.eval()
    with torch.no_grad():
        if form.single_graph:
            return [_Job("model", 0, None, *_single_graph(model, form))]
        limit = _max_batch(kind, form)
        counts: list[int | None] = [*sorted({*form.buckets, model.shape.num_patches})] if form.buckets else [None]
        jobs = [_Job("stage_0", 0, None, *_first_stage(model, limit, form))]
        for index in range(1, len(model.stages)):
            for count in counts:
                name, width = (f"stage_{index}", None) if count is None else (f"stage_{index}_{count}", count + 1)
                jobs.append(_Job(name, index, width, *_later_stage(model, index, width, limit, form)))
        return jobs


def _max_batch(kind: str, form: Form) -> int | None:
    """Images a call at most; None: any."""
    if form.buckets or form.single_graph:
        return 1
    return MAX_BATCH if kind == "executorch" else None


def _write(
    model: Iret,
    folder: Path,
    kind: str,
    form: Form,
    images: Tensor | None,
    held_out: HeldOut | None,
    say: Say,
    calls: dict[str, Calls] | None,
) -> tuple[Bundle, Parity]:
    """A whole bundle in `folder`, checked against the model; in int8 where every graph's `calls` are given."""
    extension, write = WRITERS[kind]
    stages: dict[int, list[GraphFile]] = {}
    for job in _jobs(model, kind, form):
        name = job.name + extension
        say(f"writing {name}" + (" in int8" if calls else ""))
        with torch.no_grad():
            write(job.graph, job.inputs, job.axes, folder / name, None if calls is None else calls[name])
        stages.setdefault(job.stage, []).append(GraphFile(name, job.tokens))
    if kind == "onnx":
        share_weights([folder / graph.file for graphs in stages.values() for graph in graphs])
    if model.labels:
        (folder / LABELS_NAME).write_text("\n".join(model.labels) + "\n", encoding="utf-8")
    bundle = Bundle(
        name=model.name,
        kind=kind,
        is_single=form.single_graph,
        precision="int8" if calls else "float32",
        is_convolved=form.convolutions,
        shape=model.shape,
        preprocess=model.preprocessing,
        labels=model.labels,
        points=points_of(model, form.single_graph, held_out, say),
        stages=tuple(tuple(graphs) for graphs in stages.values()),
        max_batch=_max_batch(kind, form),
        checksums={path.name: checksum(path) for path in sorted(folder.iterdir()) if path.name != FILE_NAME},
        versions={name: version for name, version in doctor.versions().items() if version},
    )
    (folder / FILE_NAME).write_text(bundle.to_json())
    say("checking it against the model")
    parity = check(model, folder, images, held_out)
    bundle = bundle.with_check(parity.to_dict())
    (folder / FILE_NAME).write_text(bundle.to_json())
    return bundle, parity


def _keep_clocks(bundle: Bundle, out: Path, say: Say) -> Bundle:
    """With what sessions measured of the bundle that is replaced, if it is the same but for that; else it is said."""
    try:
        before = Bundle.read(out)
    except ValueError:
        if (out / FILE_NAME).is_file():
            say("the bundle before is of another version of iret; if it had clocks, measure them again")
        return bundle
    own = {each.device for each in bundle.points.devices} if bundle.points else set()  # the model's, which may be newer
    clocks = [] if before.points is None else [each for each in before.points.devices if each.device not in own]
    if not clocks:
        return bundle
    assert before.points is not None
    is_same = before.checksums == bundle.checksums and bundle.points and before.points.has_those_of(bundle.points)
    if is_same and bundle.points:
        return replace(bundle, points=reduce(OperatingPoints.with_device, clocks, bundle.points))
    names = "; ".join(each.device for each in clocks)
    say(f"the bundle is new, so clocks of the one before are dropped; measure again: {names}")
    return bundle


def _refuse(model: Iret, out: Path, kind: str, form: Form) -> None:
    """Raises ValueError for what cannot be written, before anything is."""
    if model.own_precision:
        raise ValueError(
            f"a model in {model.own_precision} cannot be exported; export the model that it was made from."
        )
    form.refuse(kind, model.shape)
    if not model.num_classes:
        raise ValueError("this model has no classes to answer with; call reset_classifier(N) and train it first.")
    if model.shape.min_keep >= model.shape.num_patches:
        raise ValueError(f"a grid of {model.shape.num_patches} patches has nothing to drop; use a larger image.")
    if out.exists() and not _is_bundle(out):
        raise ValueError(f"{out} holds something that is not a bundle; give a new folder.")


def _is_bundle(folder: Path) -> bool:
    """Whether it is empty, or holds a bundle and nothing else: what may be replaced."""
    if not folder.is_dir():
        return False
    # a save that was killed leaves a description that it had not moved into place
    names = {path.name for path in folder.iterdir() if not path.name.startswith(f".{FILE_NAME}.")}
    if not names:
        return True
    try:  # of any format, so that an older one can be exported again
        return names <= {FILE_NAME, *json.loads((folder / FILE_NAME).read_bytes())["checksums"]}
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _batch(max_batch: int | None) -> Dim:
    return Dim("batch", min=1, max=max_batch or ANY_BATCH)


def _first_stage(model: Iret, max_batch: int | None, form: Form) -> Traced:
    shape = model.shape
    is_fixed = max_batch == 1
    images = torch.zeros(1 if is_fixed else 2, shape.in_chans, *shape.img_size)
    return FirstStage(model, is_convolved=form.convolutions), (images,), None if is_fixed else ({0: _batch(max_batch)},)


def _later_stage(model: Iret, index: int, width: int | None, max_batch: int | None, form: Form) -> Traced:
    """`width` fixes the tokens of an image, and with them everything."""
    shape = model.shape
    batch, tokens = (2, shape.min_keep + 2) if width is None else (1, width)
    rows = 3 if width is None else width
    inputs = (
        torch.zeros(tokens, batch, shape.embed_dims[index - 1]),
        torch.arange(-1, tokens - 1)[:, None].repeat(1, batch),
        torch.zeros(rows, shape.in_chans, shape.patch_size, shape.patch_size),
        torch.zeros(tokens, batch, dtype=torch.int64),
        torch.zeros(batch, tokens),
    )
    graph = LaterStage(model, index, is_convolved=form.convolutions)
    if width is not None:
        return graph, inputs, None
    every = shape.num_patches + 1
    some, many = Dim("tokens", min=shape.min_keep + 1, max=every), _batch(max_batch)
    by_token, by_image = {0: some, 1: many}, {0: many, 1: some}
    by_row = {0: Dim("rows", min=1, max=1 + (max_batch or ANY_BATCH) * shape.num_patches)}
    return graph, inputs, (by_token, by_token, by_row, by_token, by_image)


def _single_graph(model: Iret, form: Form) -> Traced:
    shape = model.shape
    # uneven images, so that tracing sees the general case
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(1, shape.in_chans, *shape.img_size, generator=generator)
    return SingleGraph(model, is_convolved=form.convolutions), (images, torch.ones(len(model.transitions), 2)), None
