"""A bundle against static graphs on the same engine: `iret_small`, batch 1, one thread, interleaved, raw samples kept.

static   the same model as one graph with everything kept and nothing to choose, as a user would export it without a dial
deit_s   a plain ViT of DeiT-S shape as one static graph
bundle   stage by stage through `iret.Session`, the host choosing: everything kept, and at MAC ratios of 1.7, 2.7 and 4

python benchmarks/bundle.py --engines onnxruntime openvino executorch --out results/...      run it alone on the machine
"""

import argparse
import csv
import json
import os
import statistics
import tempfile
from functools import partial
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "0")

import torch
from torch import Tensor, nn

import iret
from iret import doctor
from iret.attention import Dense
from iret.bench import make_point
from iret.export.bundle import export
from iret.export.graphs import FirstStage, LaterStage
from iret.export.targets import WRITERS
from iret.measure.latency import measure_latency, pin_threads, ratio
from iret.runtime.bundle import ENGINES
from iret.runtime.cost import full_macs
from iret.runtime.engines import load_graph
from iret.runtime.timing import replay
from iret.vit import VisionTransformer

RATIOS = (1.0, 1.7, 2.7, 4.0)
KINDS = {able[0]: kind for kind, able in ENGINES.items()}  # engine -> what it runs


class Static(nn.Module):
    """`model(images)` for one image in one graph: everything kept, nothing scored, the last head alone."""

    def __init__(self, model: iret.Iret) -> None:
        super().__init__()
        self.first = FirstStage(model)
        self.later = nn.ModuleList(LaterStage(model, index) for index in range(1, len(model.stages)))

    def forward(self, images: Tensor) -> Tensor:
        x, patches = self.first.embed(images)
        x, _ = self.first.stage.through(x.flatten(0, 1), Dense(1, None), is_scored=False)
        for stage in self.later:
            own = stage.transition
            details = own.detail_embed(own.detail_norm(stage.details(patches)))
            x = own.widen(own.norm(x)) + own.pos_embed[0] + nn.functional.pad(details, (0, 0, 1, 0))
            x, _ = stage.stage.through(x, Dense(1, None), is_scored=False)
        return stage.stage.head(stage.stage.norm(x[:1]))


def make_work(engine: str, model: iret.Iret, scratch: Path) -> tuple[dict, dict]:
    """What is timed on one engine, and the MAC ratios that were met."""
    kind = KINDS[engine]
    extension, write = WRITERS[kind]
    image = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    static, deit = Static(model).eval(), VisionTransformer().eval()
    with torch.no_grad():
        assert torch.allclose(static(image), model(image), atol=1e-4)
        for name, graph in (("static", static), ("deit_s", deit)):
            write(graph, (image,), None, scratch / f"{name}_{kind}{extension}")
    export(model, scratch / kind, kind)
    session = iret.Session(scratch / kind, engine, threads=1)
    inputs = image.numpy()
    work = {
        name: partial(load_graph(engine, scratch / f"{name}_{kind}{extension}", 1), [inputs])
        for name in ("static", "deit_s")
    }
    met = {}
    for asked in RATIOS:
        name = f"bundle {asked:g}"
        if asked == 1:
            work[name], met[name] = partial(session, inputs), 1.0
            continue
        point = make_point(model, 1 / asked)
        work[name] = partial(session, inputs, **replay(model.shape, point, point.plans[0]))
        met[name] = full_macs(model.shape) / int(work[name]().macs[0])
    return work, met


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--engines", nargs="+", choices=tuple(KINDS), default=["onnxruntime"])
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = iret.create_model("iret_small").eval()
    rows, raw = [], []
    for engine in args.engines:
        with tempfile.TemporaryDirectory() as scratch:
            work, met = make_work(engine, model, Path(scratch))
            with pin_threads(1):
                samples = measure_latency(work, rounds=args.rounds, warm_up=3, lead=1)
                host = {
                    name: statistics.median(1 - out.engine_s / out.time_s for out in (work[name]() for _ in range(20)))
                    for name in met
                }
        for name, latency in samples.items():
            own = met.get(name)
            row = {"engine": engine, "what": name, "ms": latency.p50_ms, "mac_ratio": own, "host": host.get(name)}
            row["share"] = own and ratio(samples["bundle 1"], latency).median / own
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
        "| engine | what | MAC ratio | ms | over static | share | host code |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [
            "" if row[key] is None else f"{row[key]:{form}}" for key, form in (("mac_ratio", ".2f"), ("ms", ".1f"))
        ]
        cells += [f"{row['over_static']:.2f}"]
        cells += ["" if row[key] is None else f"{row[key]:{form}}" for key, form in (("share", ".2f"), ("host", ".1%"))]
        lines.append(f"| {row['engine']} | {row['what']} | " + " | ".join(cells) + " |")
    (args.out / "README.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
