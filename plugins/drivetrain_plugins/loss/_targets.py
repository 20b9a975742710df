"""What the losses against numbers share: predictions of the labels' shape, and labels that can be used."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import attrs
import torch

from drivetrain import DataError, TrainingError
from drivetrain_plugins.loss._labels import full, labels_of, output_of

if TYPE_CHECKING:
    from drivetrain import Micro


def pair(
    micro: Micro, predictions: str, labels: str, ignore: float | None, *, plugin: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Return predictions and labels of one shape and type, and a mask of the items (None if all are).

    A last dimension of one is left out where only one of the two has it.

    Raises:
        TrainingError: the shapes do not fit.
    """
    made = full(output_of(micro.outputs, predictions, plugin=plugin))
    wanted = labels_of(micro.batch, labels, plugin=plugin).to(made.dtype)
    if made.shape == (*wanted.shape, 1):
        made = made.squeeze(-1)
    elif wanted.shape == (*made.shape, 1):
        wanted = wanted.squeeze(-1)
    if made.shape != wanted.shape:
        raise TrainingError(
            f"{plugin}: predictions and labels must have one shape. "
            f"Received: {tuple(made.shape)} and {tuple(wanted.shape)}"
        )
    return made, wanted, None if ignore is None else wanted != ignore


@attrs.frozen
class Between:
    """Refuse a batch with labels that are no finite numbers between two bounds."""

    plugin: str
    field: str
    ignore: float | None
    low: float = -float("inf")
    high: float = float("inf")

    def __call__(self, batch: Any) -> None:
        """Check it.

        Raises:
            DataError: a label is NaN, infinite or out of bounds.
        """
        labels = labels_of(batch, self.field, plugin=self.plugin)
        wrong = ~torch.isfinite(labels) | (labels < self.low) | (labels > self.high)
        if self.ignore is not None:
            wrong &= labels != self.ignore
        if wrong.any():
            bounds = "" if self.high == float("inf") else f" between {self.low:g} and {self.high:g}"
            raise DataError(
                f"{self.plugin}: field {self.field!r}: a label must be a finite number{bounds}. "
                f"Received: {labels[wrong][0].item()}"
            )
