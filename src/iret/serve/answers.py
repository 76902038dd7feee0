"""From a result to the JSON of `POST /v1/predict`."""

from typing import Any

import numpy as np

from iret.serve.asks import Ask
from iret.serve.computer import Result


def write_answer(
    model: dict[str, Any], ask: Ask, result: Result, *, queue_s: float, total_s: float, joules_source: str
) -> dict[str, Any]:
    """`model` is what `GET /v1/model` tells."""
    probabilities = softmax(result.logits)
    best = np.argsort(-probabilities, kind="stable")[: ask.top]
    answer: dict[str, Any] = {
        "model": model["name"],
        "top": [_label(model, int(index), probabilities) for index in best],
        "budget": result.budget,
        "macs": result.macs,
        "macs_share": result.macs / model["full_macs"],
        "tokens": list(result.tokens),
        "exit_stage": result.exit_stage,
        "joules": {"value": result.joules, "source": joules_source, "measured": False},
        "time_ms": {"total": 1e3 * total_s, "engine": 1e3 * result.engine_s, "queue": 1e3 * queue_s},
        "batch": result.batch,
    }
    if ask.trace:
        answer["trace"] = _trace(model, result)
    return answer


def softmax(logits: np.ndarray) -> np.ndarray:
    """Float64, over the last axis."""
    grown = np.exp(logits.astype(np.float64) - logits.max())
    return grown / grown.sum()


def _trace(model: dict[str, Any], result: Result) -> dict[str, Any]:
    """Cells row by row, 1 for kept or refined; null for a stage that was not reached."""
    assert result.kept is not None and result.refined is not None and result.stage_logits is not None
    stages: list[dict[str, Any] | None] = []
    for logits in result.stage_logits:
        if np.isnan(logits).any():
            stages.append(None)
        else:
            probabilities = softmax(logits)
            stages.append(_label(model, int(probabilities.argmax()), probabilities))
    return {
        "grid": model["grid"],
        "kept": [stage.astype(int).ravel().tolist() for stage in result.kept],
        "refined": [stage.astype(int).ravel().tolist() for stage in result.refined],
        "stage_probabilities": stages,
    }


def _label(model: dict[str, Any], index: int, probabilities: np.ndarray) -> dict[str, Any]:
    labels = model["labels"]
    return {
        "index": index,
        "label": None if labels is None else labels[index],
        "probability": float(probabilities[index]),
    }
