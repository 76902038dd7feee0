"""A bundle against static graphs on the same engine: `iret_small`, batch 1, one thread, raw samples kept.

static    the same model as one graph with everything kept and nothing to choose, as torch exports its blocks
deit_s    a plain ViT of DeiT-S shape as one static graph, as torch exports it
bundle    stage by stage through `iret.Session`: everything kept, and with thresholds at MAC ratios, `--ratios`
convolved the same from a bundle of `iret export --convolutions`, on ONNX Runtime
single    the same through `iret.Session` from a bundle of one graph, which chooses itself (`iret export --single-graph`)
int8      the same from an int8 bundle of stages (`iret export --int8`), on ONNX Runtime
ceiling   one static graph of the bundle's own blocks, whole, at its counts, which scores, chooses and gathers nothing
          (`convolved ceiling`: of the convolved bundle's blocks)

Every bundle and every static graph is alone in a process, as on a device, and processes take turns, `--processes` times,
because times differ from process to process by where weights lie in memory. A bundle's process interleaves its budgets; a
static graph's runs that graph alone, which favours it a little. Figures are medians over the turns of medians in each
process; in brackets, the least and the most turn. A bundle's shares are against the full run in the same process, a
ceiling's against the full ceiling of the same turn, and so are ratios between processes. `host` is the share of a run
outside the engine, but for the check of its pixels; `between`, the share between the engine's calls. On OpenVINO the full
run is one call, as the session does it, but in these two columns, where its calls are watched.

python benchmarks/bundle.py --engines onnxruntime openvino executorch --out results/...      run it alone on the machine
"""

import argparse
import csv
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("GOMP_SPINCOUNT", "0")

import numpy as np
import torch
from speed import thresholds_for, whole_macs
from torch import Tensor, nn

import iret
from iret import doctor
from iret.export.blocks import Blocks
from iret.export.bundle import export
from iret.export.form import Form
from iret.export.graphs import FirstStage, LaterStage, patches_of
from iret.export.targets import WRITERS
from iret.runtime.bundle import ENGINES
from iret.runtime.cost import full_macs
from iret.vit import VisionTransformer

RATIOS = (1.7, 2.7, 4.0, 5.3)
KINDS = {able[0]: kind for kind, able in ENGINES.items()}  # engine -> what it runs
FORMS = {
    "bundle": Form(),
    "convolved": Form(convolutions=True),
    "single": Form(single_graph=True),
    "int8": Form(int8=True),
}
FORMS_OF = {"onnxruntime": tuple(FORMS), "openvino": ("bundle", "single"), "executorch": ("bundle",)}
CEILING_OF = {"bundle": "ceiling", "single": "ceiling", "convolved": "convolved ceiling"}


class Static(nn.Module):
    """`model(images)` for one image in one graph, its blocks as torch exports them: nothing scored, one head."""

    def __init__(self, model: iret.Iret) -> None:
        super().__init__()
        self.first = FirstStage(model)
        self.later = nn.ModuleList(LaterStage(model, index) for index in range(1, len(model.stages)))
        self.stages, self.patch_size = model.stages, model.shape.patch_size

    def run_stage(self, index: int, x: Tensor) -> Tensor:
        x = x[None]
        for block in self.stages[index].blocks:
            x, _ = block(x)
        return x[0]

    def forward(self, images: Tensor) -> Tensor:
        x, patches = self.run_stage(0, self.first.embed(images)), patches_of(images, self.patch_size)
        for index, stage in enumerate(self.later, start=1):
            own, x = stage.transition, self.keep(index, x)
            details = own.detail_embed(own.detail_norm(stage.details(patches[: len(x) - 1])))
            x = own.widen(own.norm(x)) + own.pos_embed[0, : len(x)] + nn.functional.pad(details, (0, 0, 1, 0))
            x = self.run_stage(index, x)
        return self.later[-1].head(self.later[-1].norm(x[:1]))

    def keep(self, index: int, x: Tensor) -> Tensor:
        return x


class Ceiling(Static):
    """The same from our own blocks on the first `counts` patches of each stage: a bundle without scoring and choosing."""

    def __init__(self, model: iret.Iret, counts: Sequence[int], is_convolved: bool) -> None:
        super().__init__(model)
        self.counts = counts
        self.blocks = nn.ModuleList(Blocks(stage, is_scored=False, is_convolved=is_convolved) for stage in model.stages)

    def run_stage(self, index: int, x: Tensor) -> Tensor:
        return self.blocks[index](x, 1, None)[0]

    def keep(self, index: int, x: Tensor) -> Tensor:
        return x[: self.counts[index] + 1]


def trained_looking(model: nn.Module) -> nn.Module:
    """With biases and norms that are not 0 or 1, or exporters leave them out, which they cannot do for a trained model."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter += 0.02 * torch.randn_like(parameter)
    return model


def make_jobs(
    engine: str, ratios: Sequence[float], model: iret.Iret, scratch: Path
) -> tuple[dict[str, dict[str, Any]], dict[str, int]]:
    """What `alone.py` is asked on one engine, by name, and MACs of the ceilings; files are in `scratch`."""
    kind = KINDS[engine]
    extension, write = WRITERS[kind]
    image = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    np.save(scratch / "image.npy", image.numpy())
    jobs: dict[str, dict[str, Any]] = {}
    whole: dict[str, int] = {}
    ceilings = {CEILING_OF[form]: FORMS[form].convolutions for form in FORMS_OF[engine] if form in CEILING_OF}
    graphs = {"static": Static(model).eval(), "deit_s": trained_looking(VisionTransformer()).eval()}
    with torch.no_grad():
        assert torch.allclose(graphs["static"](image), model(image), atol=1e-4)
        settings = {f"{asked:g}": thresholds_for(model, image, asked) for asked in (1.0, *ratios)}
        for name in FORMS_OF[engine]:
            folder, form = scratch / name, FORMS[name]
            calibration = torch.randn(8, 3, 224, 224) if form.int8 else None
            export(model, folder, kind, form, images=calibration)
            jobs[name] = {"bundle": str(folder), "settings": settings}
        for asked, each in settings.items():
            kept = iret.Session(scratch / "bundle", engine)(image.numpy(), thresholds=each).trace.kept
            whole[asked] = whole_macs(model.shape, kept.sum((1, 2, 3)).tolist())
            for name, is_convolved in ceilings.items():
                graphs[f"{name} {asked}"] = Ceiling(model, kept.sum((1, 2, 3)).tolist(), is_convolved).eval()
        for name, graph in graphs.items():
            path = scratch / f"{name.replace(' ', '_')}{extension}"
            write(graph, (image,), None, path)
            jobs[name] = {"graph": str(path)}
    common = {"engine": engine, "images": str(scratch / "image.npy")}
    return {name: common | job for name, job in jobs.items()}, whole


def ask(name: str, job: dict[str, Any], scratch: Path) -> dict[str, Any]:
    """The answer of a process of its own."""
    out = scratch / "answer.json"
    command = [sys.executable, str(Path(__file__).with_name("alone.py")), json.dumps(job), "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{name}: status {done.returncode}\n{done.stderr}")
    return json.loads(out.read_text())


def rows_of(
    engine: str, found: dict[str, list[dict[str, Any]]], every_mac: int, whole: dict[str, int]
) -> list[dict[str, Any]]:
    """The table of one engine, from what the processes of each name answered; what is an array has an entry a turn.

    `whole`: MACs of the ceilings.
    """
    ms = {
        f"{name} {asked}".strip(): np.array([1e3 * median(each["seconds"][asked]) for each in answers])
        for name, answers in found.items()
        for asked in answers[0]["seconds"]
    }
    spent = {form: answers[0]["macs"] for form, answers in found.items() if form in FORMS}
    rows = []
    for name, own in ms.items():
        form, _, asked = name.rpartition(" ")
        row = {"engine": engine, "what": name, "ms": own, "over_static": own / ms["static"]}
        if form in FORMS or form in CEILING_OF.values():
            macs = (spent[form] if form in FORMS else whole)[asked]
            ratio = every_mac / macs if asked != "1" else 1.0
            row |= {"mac_ratio": ratio, "share": ms[f"{form} 1"] / own / ratio}
        if form in FORMS:
            if form != "int8":  # which may decide otherwise
                assert macs == spent["bundle"][asked], f"{name} does not keep what the bundle keeps"
                row["ceiling_over_time"] = ms[f"{CEILING_OF[form]} {asked}"] / own
            for place, what in enumerate(("host", "between")):
                row[what] = np.array([each["host"][asked][place] for each in found[form]])
        rows.append(row)
    return rows


def shown(value: Any, form: str, has_spread: bool) -> str:
    """A cell of the table: the median over turns, and their least and most."""
    if value is None or isinstance(value, float):
        return "" if value is None else f"{value:{form}}"
    said = f"{median(value):{form}}"
    return f"{said} ({min(value):{form}} to {max(value):{form}})" if has_spread and min(value) < max(value) else said


def table_of(command: str, rows: list[dict[str, Any]]) -> list[str]:
    """In Markdown."""
    lines = [
        f"`{command}`: `iret_small`, batch 1, one thread, {doctor.processor_name()}; medians.",
        "",
        "| engine | what | MAC ratio | ms | over static | share | ceiling / time | host code | between calls |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    columns = {"mac_ratio": ".2f", "ms": ".1f", "over_static": ".2f", "share": ".2f", "ceiling_over_time": ".2f"}
    columns |= {"host": ".1%", "between": ".1%"}
    for row in rows:
        cells = [shown(row.get(key), form, key in ("share", "ceiling_over_time")) for key, form in columns.items()]
        lines.append(f"| {row['engine']} | {row['what']} | " + " | ".join(cells) + " |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--engines", nargs="+", choices=tuple(KINDS), default=["onnxruntime"])
    parser.add_argument("--ratios", nargs="+", type=float, default=RATIOS, help="of MACs, above 1")
    parser.add_argument("--processes", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = trained_looking(iret.create_model("iret_small")).eval()
    rows, raw = [], []
    for engine in args.engines:
        with tempfile.TemporaryDirectory() as scratch:
            jobs, whole = make_jobs(engine, args.ratios, model, Path(scratch))
            found: dict[str, list[dict[str, Any]]] = {name: [] for name in jobs}
            for turn in range(args.processes):
                order = list(jobs) if turn % 2 == 0 else list(jobs)[::-1]
                for name in order:
                    found[name].append(ask(name, jobs[name] | {"rounds": args.rounds}, Path(scratch)))
        rows += rows_of(engine, found, full_macs(model.shape), whole)
        raw += [
            (engine, f"{name} {asked}".strip(), process, place, f"{seconds:.9f}")
            for name, answers in found.items()
            for process, answer in enumerate(answers)
            for asked, samples in answer["seconds"].items()
            for place, seconds in enumerate(samples)
        ]
    args.out.mkdir(parents=True, exist_ok=True)
    ratios = " ".join(f"{each:g}" for each in args.ratios)
    options = f"--ratios {ratios} --processes {args.processes} --rounds {args.rounds}"
    command = f"python benchmarks/bundle.py --engines {' '.join(args.engines)} {options}"
    plain = [
        {key: each.tolist() if isinstance(each, np.ndarray) else each for key, each in row.items()} for row in rows
    ]
    record = {"command": command, "rows": plain, "env": doctor.report()}
    (args.out / "bundle.json").write_text(json.dumps(record, indent=1) + "\n")
    with (args.out / "samples.csv").open("w", newline="") as file:
        table = [("engine", "what", "process", "round", "seconds"), *raw]
        csv.writer(file, lineterminator="\n").writerows(table)
    lines = table_of(command, rows)
    (args.out / "README.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
