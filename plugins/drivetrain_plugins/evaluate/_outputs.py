"""Where the logits and labels of a micro-batch are: what every metric of classes asks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from drivetrain import TrainingError

if TYPE_CHECKING:
    from drivetrain import Micro

LABELS = ("labels", "label")


def output(outputs: Any, name: str = "logits") -> Any:
    """Return the output called `name`, or None; outputs without names give their first tensor that is no scalar.

    A tuple is what models without named outputs return: (loss, logits, ...) or (logits, ...).
    """
    if hasattr(outputs, "keys"):
        return outputs.get(name)
    if name != "logits":
        return None
    found = outputs if isinstance(outputs, (tuple, list)) else [outputs]
    return next((value for value in found if isinstance(value, torch.Tensor) and value.ndim), None)


def labels_of(batch: Any) -> Any:
    """Return the labels of a batch: its field "labels" or "label", the last of a tuple, or None."""
    if hasattr(batch, "keys"):
        return next((batch[name] for name in LABELS if name in batch), None)
    return batch[-1] if isinstance(batch, (tuple, list)) and len(batch) > 1 else None


def logits_and_labels(micro: Micro, plugin: str, shifted: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Return logits (..., C) and the labels (...) that belong to them; neither is copied.

    Args:
        micro: its outputs are a mapping with "logits", a tuple or a tensor.
        plugin: the name of who asks, for the error.
        shifted: logits at a token are for the label of the next: the last logits and the first labels go.

    Raises:
        TrainingError: one of them is not there, or their shapes do not belong together.
    """
    logits, labels = output(micro.outputs), labels_of(micro.batch)
    if not isinstance(logits, torch.Tensor) or not isinstance(labels, torch.Tensor):
        raise TrainingError(
            f"{plugin} needs outputs with 'logits' and batches with 'labels'. "
            f"Received: {described(micro.outputs)}; {described(micro.batch)}"
        )
    if logits.shape[:-1] != labels.shape:
        raise TrainingError(
            f"{plugin} needs logits (..., C) for labels (...), which are classes. "
            f"Received: logits {tuple(logits.shape)}, labels {tuple(labels.shape)}"
        )
    return (logits[..., :-1, :], labels[..., 1:]) if shifted else (logits, labels)


def described(value: Any) -> str:
    """Return the type of outputs or of a batch and the names in it, for an error."""
    return f"{type(value).__name__} {list(value)}" if hasattr(value, "keys") else type(value).__name__
