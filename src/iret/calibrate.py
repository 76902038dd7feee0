"""Fills the table of operating points: finds a course through thresholds on held-out images, then walks it from dear to cheap.

A table is one course: the thresholds of all transitions rise together with its one number, the *rung*, by fixed ratios, and the
confidence that suffices to leave early falls from 1. So what lies between two points is close to the chord between them. The
search looks for the course whose accuracy at given costs is best:

- the ratio of the first threshold to the last, and of refine to keep, by a Bayesian search (Optuna's TPE);
- how fast the exit confidence falls, exactly and for nothing: one run without exits holds every head's answer and every
  stage's cost, and tells what any confidence would have given.

Every finished evaluation is a line of a `Memory`, so a search that was killed goes through the same trials again in no time,
and goes on. `iret train` calls this at its end with few trials, `iret calibrate` on a model and data of yours.

Source: rising thresholds are those of Kim et al. 2022, "Learned Token Pruning for Transformers", which start proportional
to depth; TPE is Bergstra et al. 2011, "Algorithms for Hyper-Parameter Optimization"; the course and its search are ours.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from iret.clock import Say
from iret.evaluate import check_classes, points_unsure
from iret.model import Iret
from iret.output import Output
from iret.runtime.cost import Shape, coefficients, full_macs, macs, plan_macs
from iret.runtime.points import OperatingPoints, Plan, Point, frontier
from iret.train.data import ImageData, make_loader
from iret.weights import to_safetensors, write_atomically

# The last transition's keep threshold, times uniform attention: from "everything" to "little more than the floor".
FIRST_RUNGS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 3.0, 4.0, 8.0)
SEARCH_RUNGS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.5)
SEARCH_IMAGES = 2500  # that courses are compared on
SEARCH_BUDGETS = (0.75, 0.6, 0.5, 0.4, 0.3)  # where they are compared
EXIT_SLOPES = (0.0, 0.1, 0.2, 0.4, 0.8)  # by how much the exit confidence falls per rung
LEAST_CONFIDENCE = 0.4
NOISE = 0.25  # standard errors of an accuracy; courses on the same images that differ by less are called equal
LARGEST_GAP = 0.05  # of the full MACs, between neighbouring points ...
LARGEST_STEP = 1.12  # ... and so many times the cheaper's at most: MACs sag between points, as the square of the step
SMALLEST_STEP = 0.01  # between rungs
MAX_IMAGES = 5000
BATCH_SIZE = 100
NUM_PLANS = 12  # images a point that clocks are measured on
FIRST_TRIALS = ((1.0, 1.0), (0.6, 1.0), (0.35, 1.0), (0.2, 1.0))  # (ratio, refine) that are tried before any is drawn


@dataclass(frozen=True)
class Course:
    """How thresholds and exits follow the rung."""

    ratio: float  # first threshold : last
    refine: float  # refine threshold : keep
    slope: float = 0.0  # of the exit confidence

    def thresholds(self, rung: float, transitions: int) -> tuple[tuple[float, float], ...]:
        """Keep thresholds that rise geometrically from `ratio` times `rung` to `rung`."""
        each = rung * np.geomspace(self.ratio, 1.0, transitions)
        return tuple((float(keep), float(keep * self.refine)) for keep in each)

    def exit_confidence(self, rung: float) -> float | None:
        confidence = max(1 - self.slope * rung, LEAST_CONFIDENCE)
        return confidence if confidence < 1 else None


class Memory:
    """Finished evaluations of one model on one set of images, a JSON line each, kept in a file if there is a path."""

    def __init__(self, path: Path | None = None, fingerprint: str = "") -> None:
        self.path, self.known = path, dict[str, list[dict]]()
        if path is not None:
            found, known = read_memory(path)
            self.known = known if found == fingerprint else {}
            whole = [fingerprint, *(json.dumps({"key": key, "points": rows}) for key, rows in self.known.items())]
            write_atomically(path, ("\n".join(whole) + "\n").encode())

    def recall(self, key: str) -> list[Point] | None:
        return [Point.from_dict(row) for row in self.known[key]] if key in self.known else None

    def keep(self, key: str, points: Sequence[Point]) -> None:
        self.known[key] = json.loads(json.dumps([point.to_dict() for point in points]))
        if self.path is not None:
            with self.path.open("a") as file:
                file.write(json.dumps({"key": key, "points": self.known[key]}) + "\n")


def read_memory(path: Path) -> tuple[str, dict[str, list[dict]]]:
    """The fingerprint and the whole entries of a search file, without the line that a kill cut off; empty if there is no file."""
    head, *lines = (path.read_text() if path.exists() else "").split("\n")
    known: dict[str, list[dict]] = {}
    for line in lines:
        try:
            entry = json.loads(line)
        except ValueError:
            break
        known[entry["key"]] = entry["points"]
    return head, known


def fingerprint(model: Iret, batches: Sequence[tuple[Tensor, Tensor]]) -> str:
    """Of everything that decides what an evaluation gives: the model, and the pixels and labels of (images, labels).

    Search files with another are not believed.
    """
    digest = hashlib.sha256(to_safetensors(model.state_dict()))
    costs = coefficients(model.shape, scored=True)  # another version of iret may count otherwise
    digest.update(json.dumps([asdict(model.shape), costs, model.attention, model.preprocessing.to_dict()]).encode())
    for batch in batches:
        for part in batch:
            digest.update(part.numpy().tobytes())
    return digest.hexdigest()


def calibrate(
    model: Iret,
    data: ImageData,
    *,
    data_name: str,
    max_images: int = MAX_IMAGES,
    workers: int = 0,
    trials: int = len(FIRST_TRIALS),
    memory_path: Path | None = None,
    say: Say = lambda line: None,
) -> OperatingPoints:
    """Find a course on `data` (held-out, never the test images) and measure points along it, the dearest of which keeps all.

    Between neighbours further apart than `LARGEST_GAP` or `LARGEST_STEP` one more is measured. Served are the points
    that no cheaper one beats beyond noise, and the one that keeps everything. `memory_path`: where finished evaluations are kept.

    Raises:
        ValueError: no image could be read, the data's classes are not the model's, no trial is allowed, or the model does not
            run in float32: its points are served in every number format.
    """
    if trials < 1 or max_images < 1:
        raise ValueError(f"trials={trials} and max_images={max_images} must be 1 or more.")
    if model.precision != "float32":
        raise ValueError(
            f"operating points are searched in float32 and serve every number format; for a clock in {model.precision}, search "
            "without --precision first, then add --device-only."
        )
    meter = _Meter(model, data, max_images, workers)
    memory = Memory(memory_path, "" if memory_path is None else fingerprint(model, meter.batches))
    if memory.known:
        say(f"{memory_path} knows runs of this model on these images ({len(memory.known)}), which are not made again")
    course = _search(meter, memory, trials, say)
    full = full_macs(model.shape)
    measured: dict[float, Point] = {}
    rungs: list[float] = list(FIRST_RUNGS)
    while rungs:
        for rung in rungs:
            (measured[rung],) = meter.points(memory, course, rung, (course.slope,), meter.num_images, NUM_PLANS)
        measured = dict(sorted(measured.items()))
        say(f"{len(measured)} points on the course")
        rungs = [
            (low + high) / 2
            for low, high in pairwise(measured)
            if high - low > SMALLEST_STEP and _is_far(measured[low].macs_mean, measured[high].macs_mean, full)
        ]
    served = frontier(list(measured.values()), meter.num_images)
    return OperatingPoints(data=data_name, num_images=meter.num_images, full_macs=full, points=served)


def _is_far(dearer: float, cheaper: float, full: int) -> bool:
    return dearer - cheaper > LARGEST_GAP * full or dearer > LARGEST_STEP * cheaper


def keep_clocks(found: OperatingPoints, before: OperatingPoints | None, device: str, say: Say) -> OperatingPoints:
    """`found` with the clocks of `before` if its points are the same; else the lost ones are said, but that of `device`."""
    if before is None or found.points == before.points:
        return replace(found, devices=() if before is None else before.devices)
    lost = [table.device for table in before.devices if table.device != device]
    if lost:
        say(
            f"the points are new, so their clocks elsewhere are dropped; measure again with --device-only: {'; '.join(lost)}"
        )
    return found


def explain_noise(points: OperatingPoints, shape: Shape) -> str:
    """How many there are, and how surely so many images tell what more like them would give: half of the widest 95 % interval."""
    images = points.num_images
    unsure = points_unsure((point.accuracy for point in points.points), images)
    spread = 0.0  # of an image's MACs, as a share of their mean
    for point in points.points:
        spent = [plan_macs(shape, plan.kept, plan.refined, scored=not point.keeps_all) for plan in point.plans]
        spread = max(spread, float(np.std(spent) / np.mean(spent))) if spent else spread
    return (
        f"{len(points.points)} operating points on {images} held-out images, which tell accuracy to {unsure:.1f} points or "
        f"better and MACs to {196 * spread / images**0.5:.1f} %"
    )


def _search(meter: "_Meter", memory: Memory, trials: int, say: Say) -> Course:
    """The first of the best courses of `trials`; the simple ones are tried first, exits that come late before early ones.

    Each trial's sampler is seeded by its number, so a search that goes on draws the same.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(direction="maximize")
    for ratio, refine in FIRST_TRIALS:
        study.enqueue_trial({"ratio": ratio, "refine": refine})
    best, best_worth = Course(1.0, 1.0), -1.0
    for number in range(trials):
        study.sampler = optuna.samplers.TPESampler(seed=number, multivariate=True, n_startup_trials=len(FIRST_TRIALS))
        trial = study.ask()
        ratio, refine = trial.suggest_float("ratio", 0.1, 1.0, log=True), trial.suggest_float("refine", 1.0, 3.0)
        num_images = min(SEARCH_IMAGES, meter.num_images)
        ladders = [meter.points(memory, Course(ratio, refine), rung, EXIT_SLOPES, num_images) for rung in SEARCH_RUNGS]
        worths = [meter.worth(points) for points in zip(*ladders, strict=True)]
        study.tell(trial, max(worths))
        noise = NOISE * (max(worths) * (1 - max(worths)) / num_images) ** 0.5
        place = next(place for place, worth in enumerate(worths) if worth >= max(worths) - noise)
        if number == 0 or worths[place] > best_worth + noise:
            best, best_worth = Course(ratio, refine, EXIT_SLOPES[place]), worths[place]
        say(
            f"trial {number + 1} of {trials}: ratio {ratio:.2f}, refine {refine:.2f}, exit slope {EXIT_SLOPES[place]:g}: "
            f"{worths[place]:.2%} in the mean of budgets {SEARCH_BUDGETS[0]:g} to {SEARCH_BUDGETS[-1]:g}; best {best_worth:.2%}"
        )
    return best


class _Meter:
    """The model with its held-out images, read once and kept as bytes."""

    def __init__(self, model: Iret, data: ImageData, max_images: int, workers: int) -> None:
        check_classes(model, data)
        self.model, self.device = model.eval(), model.pos_embed.device
        self.batches: list[tuple[Tensor, Tensor]] = []
        self.num_images = 0
        loader = make_loader(data, BATCH_SIZE, seed=0, epoch=0, shuffle=False, workers=workers, drop_last=False)
        for pixels, labels, _ in loader:
            pixels, labels = pixels[: max_images - self.num_images], labels[: max_images - self.num_images]
            self.batches += [(pixels, labels)] if len(labels) else []
            self.num_images += len(labels)
            if self.num_images == max_images:
                break
        if not self.num_images:
            raise ValueError("none of the held-out images could be read; nothing was calibrated.")

    def points(
        self, memory: Memory, course: Course, rung: float, slopes: Sequence[float], num_images: int, num_plans: int = 0
    ) -> list[Point]:
        """One Point per slope of the exit confidence, from one run of the first images."""
        thresholds = course.thresholds(rung, len(self.model.transitions))
        exits = [replace(course, slope=slope).exit_confidence(rung) for slope in slopes]
        key = json.dumps([thresholds, exits, num_images, num_plans])
        points = memory.recall(key)
        if points is None:
            runs = self._run(thresholds, num_images)
            points = [runs.point(self.model, thresholds, confidence, num_plans) for confidence in exits]
            memory.keep(key, points)
        return points

    def worth(self, points: Sequence[Point]) -> float:
        """Accuracy of a ladder of points, mean over `SEARCH_BUDGETS`, interpolated."""
        ladder = sorted(points, key=lambda point: point.macs_mean)
        shares = [point.macs_mean / full_macs(self.model.shape) for point in ladder]
        return float(np.interp(SEARCH_BUDGETS, shares, [point.accuracy for point in ladder]).mean())

    @torch.inference_mode()
    def _run(self, thresholds: object, num_images: int) -> "_Runs":
        outs, seen = [], 0
        for pixels, labels in self.batches:
            pixels, labels = pixels[: num_images - seen], labels[: num_images - seen]
            images = self.model.normalise(pixels.to(self.device).float() / 255)
            outs.append(_Runs.of(self.model.run(images, thresholds), labels))
            seen += len(labels)
            if seen >= num_images:
                break
        return _Runs.join(outs)


@dataclass(frozen=True)
class _Runs:
    """Of N images in S stages, without exits: all [S, N]."""

    kept: np.ndarray
    refined: np.ndarray
    confidence: np.ndarray  # of every head
    is_right: np.ndarray

    @classmethod
    def of(cls, out: Output, labels: Tensor) -> "_Runs":
        assert out.trace is not None  # an Iret always has one
        confidence, answer = out.trace.stage_logits.softmax(2).max(2)
        return cls(
            out.trace.kept.sum((2, 3)).cpu().numpy(),
            out.trace.refined.sum((2, 3)).cpu().numpy(),
            confidence.cpu().numpy(),
            (answer.cpu() == labels).numpy(),
        )

    @classmethod
    def join(cls, runs: Sequence["_Runs"]) -> "_Runs":
        return cls(*(np.concatenate([getattr(run, part.name) for run in runs], axis=1) for part in fields(cls)))

    def point(self, model: Iret, thresholds: tuple, exit_confidence: float | None, num_plans: int) -> Point:
        """What would have happened if images left at this confidence."""
        kept, refined, confidence = self.kept, self.refined, self.confidence
        num_stages, num_images = kept.shape
        leaves = confidence >= np.inf if exit_confidence is None else confidence >= np.float32(exit_confidence)
        leaves[-1] = True
        stages_run = leaves.argmax(0) + 1
        spent = macs(model.shape, kept, refined, scored=bool(np.any(thresholds)), stages_run=stages_run)
        is_run = np.arange(num_stages)[:, None] < stages_run
        by_cost = np.argsort(spent, kind="stable")
        middles = (np.arange(num_plans) + 0.5) / max(num_plans, 1) * num_images  # of equal shares of the images
        return Point(
            thresholds=thresholds,
            exit_confidence=exit_confidence,
            accuracy=float(self.is_right[stages_run - 1, np.arange(num_images)].mean()),
            macs_mean=float(spent.mean()),
            macs_p95=float(np.percentile(spent, 95)),
            kept_mean=tuple(float(count) for count in (kept * is_run).mean(1)),
            plans=tuple(
                Plan(
                    tuple(kept[: stages_run[image], image].tolist()),
                    tuple(refined[: stages_run[image], image].tolist()),
                )
                for image in by_cost[middles.astype(int)]
            ),
        )
