"""What a model's outputs for a row mean: a class, several, numbers, a class for each token, a span."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from drivetrain import TrainingError
from drivetrain.data import IGNORE_INDEX
from drivetrain_plugins.evaluate._buffer import FILL
from drivetrain_plugins.evaluate._outputs import LABELS, described, labels_of, output
from drivetrain_plugins.shared.causal import unwrapped

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from drivetrain import Micro, Run
    from drivetrain_plugins.evaluate.predict import Predictions

KINDS = ("class", "labels", "values", "tokens", "span", "text", "logits")
SPAN = ("start_logits", "end_logits")
OWN = (
    "row", "split", "prediction", "prediction_id", "prediction_ids", "probability", "probabilities",
    "prediction_start", "prediction_end", "prediction_score",
)  # fmt: skip


def kind_of(run: Run, micro: Micro) -> str:
    """Return what the outputs of a batch are, from their shapes, the model's configuration and the loss."""
    logits = output(micro.outputs)
    if all(output(micro.outputs, name) is not None for name in SPAN):
        return "span"
    if not isinstance(logits, torch.Tensor) or logits.ndim > 3:  # noqa: PLR2004 - (rows, tokens, classes)
        return "logits"
    if logits.ndim == 2 and logits.shape[1] > 1:  # noqa: PLR2004
        return _kind_of_several(run, micro)
    return "tokens" if logits.ndim == 3 else "values"  # noqa: PLR2004


def _kind_of_several(run: Run, micro: Micro) -> str:
    """Return what several numbers a row are."""
    loss = (run.plan.hooks["compute_loss"].owner or "").partition(":")[0]
    config = getattr(unwrapped(run.model), "config", None)
    problem = getattr(config, "problem_type", None)
    if loss == "bce" or problem == "multi_label_classification":
        return "labels"
    if loss == "mse" or problem == "regression":
        return "values"
    if _real(labels_of(micro.batch)) or _real(_label_of(run)):  # of several numbers, transformers makes flags
        return "labels" if config is not None and problem is None else "values"
    return "class"


def _label_of(run: Run) -> Any:
    """Return the label of a training row: an unlabelled set does not show of what type labels are."""
    rows = run.datasets.get("train")
    if rows is None or hasattr(rows, "open"):
        return None
    first = rows[0]
    return next((first[name] for name in LABELS if name in first), None) if hasattr(first, "keys") else None


def _real(label: Any) -> bool:
    if isinstance(label, torch.Tensor):
        return label.is_floating_point()
    return label is not None and np.asarray(label).dtype.kind == "f"


def kept_outputs(micro: Micro, kind: str, *, shifted: bool) -> dict[str, torch.Tensor]:
    """Return the outputs to keep by name: logits, of kind "tokens" the classes (B, L), -100 where no token is.

    Raises:
        TrainingError: the model has no such outputs.
    """
    outputs = micro.outputs
    if kind == "logits":
        return _all(micro)
    found = {name: output(outputs, name) for name in (SPAN if kind == "span" else ("logits",))}
    if missing := [name for name, value in found.items() if not isinstance(value, torch.Tensor)]:
        raise TrainingError(f"predict: kind {kind!r} needs outputs {missing}. Received: {described(outputs)}")
    if kind == "tokens":
        return {"logits": _tokens(found["logits"], micro.batch, shifted=shifted)}
    mask = _mask(micro.batch)
    if kind == "span" and mask is not None:  # an answer never reaches into the padding
        found = {name: value.masked_fill(mask == 0, FILL) for name, value in found.items()}
    return found


def _all(micro: Micro) -> dict[str, torch.Tensor]:
    """Return every output with a row for each row: logits, and where there are none, all tensors but the loss."""
    outputs = micro.outputs
    named = dict(outputs.items()) if hasattr(outputs, "keys") else {"logits": output(outputs)}
    tensors = {name: v for name, v in named.items() if isinstance(v, torch.Tensor) and v.ndim and name != "loss"}
    found = {name: value for name, value in tensors.items() if "logits" in name} or tensors
    mask = _mask(micro.batch)
    for name, value in found.items() if mask is not None else ():
        if value.ndim > 2 and value.shape[:2] == mask.shape:  # noqa: PLR2004 - (rows, tokens, ...): whatever the batches
            found[name] = value.masked_fill((mask == 0).reshape(*mask.shape, *[1] * (value.ndim - 2)), FILL)
    if not found:
        raise TrainingError(f"predict needs outputs with a row for each row. Received: {described(outputs)}")
    return found


def _mask(batch: Any) -> Any:
    """Return the batch's attention mask (B, L), or None."""
    return batch.get("attention_mask") if hasattr(batch, "get") else None


def _tokens(logits: torch.Tensor, batch: Any, *, shifted: bool) -> torch.Tensor:
    """Return the likeliest class of each token, int64 (B, L): of those that have a label, else of those attended to."""
    classes: torch.Tensor = logits.argmax(-1)
    labels = None if shifted else labels_of(batch)
    mask = _mask(batch)
    if isinstance(labels, torch.Tensor) and labels.shape == classes.shape:
        return classes.masked_fill(labels == IGNORE_INDEX, IGNORE_INDEX)
    if isinstance(mask, torch.Tensor) and mask.shape == classes.shape:
        return classes.masked_fill(mask == 0, IGNORE_INDEX)
    return classes


# --- rows ------------------------------------------------------------------------------------------------------------


def as_rows(predictions: Predictions, threshold: float, longest: int) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the number of each row and what is predicted of it, as plain values."""
    outputs, kind = predictions.outputs, predictions.kind
    for place, number in enumerate(predictions.rows.tolist()):
        if predictions.texts is not None:
            yield number, {"prediction": predictions.texts[place]}
        elif isinstance(outputs, dict):
            values = {name: array[place] for name, array in outputs.items()}
            yield number, _span(values, longest) if kind == "span" else {n: v.tolist() for n, v in values.items()}
        elif kind == "labels":
            yield number, _labels(outputs[place], predictions.classes, threshold)
        else:
            yield number, _ROWS[kind](outputs[place], predictions.classes)


def _named(index: int, classes: tuple[str, ...] | None, count: int | None) -> Any:
    """Return the name of a class, if there is a name for each, else its id."""
    return classes[index] if classes is not None and count in (None, len(classes)) and index < len(classes) else index


def _class(logits: NDArray[Any], classes: tuple[str, ...] | None) -> dict[str, Any]:
    best = int(logits.argmax())
    with np.errstate(invalid="ignore"):  # infinite ones
        odds = np.exp(logits.astype(np.float64) - logits[best])
    named = {"prediction": _named(best, classes, len(logits)), "prediction_id": best}
    return {**named, "probability": float(odds[best] / odds.sum())}


def _labels(logits: NDArray[Any], classes: tuple[str, ...] | None, threshold: float) -> dict[str, Any]:
    with np.errstate(over="ignore"):
        probabilities = 1 / (1 + np.exp(-logits.astype(np.float64)))
    held = np.flatnonzero(probabilities >= threshold).tolist()
    named = {"prediction": [_named(index, classes, len(logits)) for index in held], "prediction_ids": held}
    return {**named, "probabilities": probabilities.tolist()}


def _values(values: NDArray[Any], classes: tuple[str, ...] | None) -> dict[str, Any]:  # noqa: ARG001
    return {"prediction": values.item() if values.size == 1 else values.tolist()}


def _classes(ids: NDArray[Any], classes: tuple[str, ...] | None) -> dict[str, Any]:
    held = ids[ids != IGNORE_INDEX].tolist()
    return {"prediction": [_named(index, classes, None) for index in held], "prediction_ids": held}


def _logits(values: NDArray[Any], classes: tuple[str, ...] | None) -> dict[str, Any]:  # noqa: ARG001
    return {"logits": values.tolist()}


def _span(logits: dict[str, NDArray[Any]], longest: int) -> dict[str, Any]:
    """Return the best pair of places with start <= end < start + longest."""
    start, end = (logits[name].astype(np.float64) for name in SPAN)
    best = (-math.inf, 0, 0)
    for width in range(min(longest, len(start))):  # all pairs so far apart at once, not a square of them
        scores = start[: len(start) - width] + end[width:]
        place = int(scores.argmax())
        best = max(best, (float(scores[place]), place, place + width), key=lambda found: found[0])
    score, first, last = best
    return {"prediction_start": first, "prediction_end": last, "prediction_score": score}


_ROWS = {"class": _class, "values": _values, "tokens": _classes, "logits": _logits}
