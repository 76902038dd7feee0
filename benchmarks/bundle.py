"""A bundle against static graphs on the same engine: `iret_small`, batch 1, one thread, interleaved, raw samples kept.

static    the same model as one graph with everything kept and nothing to choose, as torch exports its blocks
deit_s    a plain ViT of DeiT-S shape as one static graph, as torch exports it
bundle    stage by stage through `iret.Session`: everything kept, and with thresholds at MAC ratios of 1.7, 2.7, 4 and 5.3
single    the same through `iret.Session` from a bundle of one graph, which chooses itself (`iret export --single-graph`)
ceiling   one static graph of the bundle's own blocks at its counts, which scores, chooses and gathers nothing

Shares are against the full run of the same bundle. `host` is the share of a run outside the engine, but for the check of its
pixels; `between`, the share between the engine's calls. On OpenVINO the full run is one call, as the session does it.

python benchmarks/bundle.py --engines onnxruntime openvino executorch --out results/...      run it alone on the machine
"""

import argparse
import csv
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "0")

import numpy as np
import torch
from speed import thresholds_for
from torch import Tensor, nn

import iret
from iret import doctor
from iret.export.blocks import Blocks
from iret.export.bundle import export
from iret.export.graphs import FirstStage, LaterStage, patches_of
from iret.export.targets import WRITERS
from iret.measure.latency import measure_latency, pin_threads, ratio
from iret.runtime.bundle import ENGINES
from iret.runtime.cost import full_macs
from iret.runtime.engines import load_graph
from iret.runtime.record import Output as SessionOutput
from iret.vit import VisionTransformer

RATIOS = (1.0, 1.7, 2.7, 4.0, 5.3)
LEAD = 3  # calls before the one that is timed: after other work a small run settles in its third call (docs/LOG.md, 2026-11-26)
KINDS = {able[0]: kind for kind, able in ENGINES.items()}  # engine -> what it runs


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

    def __init__(self, model: iret.Iret, counts: Sequence[int]) -> None:
        super().__init__(model)
        self.counts = counts
        self.blocks = nn.ModuleList(Blocks(stage, is_scored=False) for stage in model.stages)

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


class Calls:
    """When calls of the engine began and ended; graphs are loaded through it."""

    def __init__(self) -> None:
        self.times: list[tuple[float, float]] = []

    def load(self, engine: str, path: Path, threads: int | None) -> Callable[[Sequence[np.ndarray]], list[np.ndarray]]:
        graph = load_graph(engine, path, threads)

        def run(inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
            began = time.perf_counter()
            found = graph(inputs)
            self.times.append((began, time.perf_counter()))
            return found

        return run

    def host(self, work: Callable[[], SessionOutput]) -> tuple[float, float]:
        """Shares of one run: outside the engine, and outside it between two calls."""
        self.times.clear()
        out = work()
        gaps = sum(after - before for (_, before), (after, _) in pairwise(self.times))
        return 1 - out.engine_s / out.time_s, gaps / out.time_s


def make_work(engine: str, model: iret.Iret, scratch: Path, calls: Calls) -> tuple[dict, dict, dict]:
    """What is timed on one engine, the bundle's runs with every call noted, and the MAC ratios that were met."""
    kind = KINDS[engine]
    extension, write = WRITERS[kind]
    image = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    inputs = image.numpy()
    bundles = {"bundle": scratch / kind}
    export(model, bundles["bundle"], kind)
    if kind != "executorch":  # there `export` refuses it: 12 times too slow
        bundles["single"] = scratch / f"{kind}_single"
        export(model, bundles["single"], kind, single_graph=True)
    graphs = {"static": Static(model).eval(), "deit_s": trained_looking(VisionTransformer()).eval()}
    work, met, hosted = {}, {}, {}
    with torch.no_grad():
        assert torch.allclose(graphs["static"](image), model(image), atol=1e-4)
        thresholds = {f"{asked:g}": thresholds_for(model, image, asked) for asked in RATIOS}
        for form, folder in bundles.items():
            session = iret.Session(folder, engine, threads=1)
            watched = iret.Session(folder, engine, threads=1, load=calls.load)
            for asked, each in thresholds.items():
                name = f"{form} {asked}"
                work[name] = partial(session, inputs, thresholds=each)
                hosted[name] = partial(watched, inputs, thresholds=each)
                out = work[name]()
                met[name] = full_macs(model.shape) / int(out.macs[0]) if each else 1.0
                counts = out.trace.kept.sum((1, 2, 3)).tolist()
                ceiling = graphs.setdefault(f"ceiling {asked}", Ceiling(model, counts).eval())
                assert ceiling.counts == counts, "both bundles keep the same, or they are not to be compared"
        for name, graph in graphs.items():
            path = scratch / f"{name.replace(' ', '_')}_{kind}{extension}"
            write(graph, (image,), None, path)
            work[name] = partial(load_graph(engine, path, 1), [inputs])
    return work, hosted, met


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--engines", nargs="+", choices=tuple(KINDS), default=["onnxruntime"])
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = trained_looking(iret.create_model("iret_small")).eval()
    rows, raw = [], []
    for engine in args.engines:
        with tempfile.TemporaryDirectory() as scratch:
            calls = Calls()
            work, hosted, met = make_work(engine, model, Path(scratch), calls)
            with pin_threads(1):
                samples = measure_latency(work, rounds=args.rounds, warm_up=3, lead=LEAD)
                host = {name: [calls.host(run) for _ in range(20)] for name, run in hosted.items()}
        for name, latency in samples.items():
            own = met.get(name)
            row = {"engine": engine, "what": name, "ms": latency.p50_ms, "mac_ratio": own}
            form, _, asked = name.partition(" ")
            row["share"] = own and ratio(samples[f"{form} 1"], latency).median / own
            for what, shares in zip(("host", "between"), zip(*host.get(name, ()), strict=True), strict=False):
                row[what] = statistics.median(shares)
            ceiling = samples[f"ceiling {asked}"] if own else None
            row["ceiling_over_time"] = ceiling and ratio(ceiling, latency).median
            row["over_static"] = ratio(latency, samples["static"]).median
            rows.append(row)
            raw += [(engine, name, place, f"{s:.9f}") for place, s in enumerate(latency.samples_s)]
    args.out.mkdir(parents=True, exist_ok=True)
    command = f"python benchmarks/bundle.py --engines {' '.join(args.engines)} --rounds {args.rounds}"
    found = {"command": command, "rows": rows, "env": doctor.report()}
    (args.out / "bundle.json").write_text(json.dumps(found, indent=1) + "\n")
    with (args.out / "samples.csv").open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([("engine", "what", "round", "seconds"), *raw])
    lines = [
        f"`{command}`: `iret_small`, batch 1, one thread, {doctor.processor_name()}; medians.",
        "",
        "| engine | what | MAC ratio | ms | over static | share | ceiling / time | host code | between calls |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    columns = {"mac_ratio": ".2f", "ms": ".1f", "over_static": ".2f", "share": ".2f", "ceiling_over_time": ".2f"}
    columns |= {"host": ".1%", "between": ".1%"}
    for row in rows:
        cells = ["" if row.get(key) is None else f"{row[key]:{form}}" for key, form in columns.items()]
        lines.append(f"| {row['engine']} | {row['what']} | " + " | ".join(cells) + " |")
    (args.out / "README.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
