"""The loss that the model computes itself."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from drivetrain import TrainingError, hookimpl, option, plugin
from drivetrain.data import count_labels, count_shifted_labels
from drivetrain_plugins.loss._labels import output_of
from drivetrain_plugins.shared.causal import shifts_labels

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    from drivetrain import Micro, Run


def count_rows(batch: Any) -> None:  # noqa: ARG001 - a count takes the batch
    """Say that the items are the rows."""
    return


@plugin(role="loss", rows="tokens")
class ModelLoss:
    """Take the mean loss that the model returns (the default, by name).

    It must be a mean over the items, weighed alike. A sum, or a mean over something else, cannot be told from one
    number: name another loss plugin for such a model.
    """

    key: str = option("loss", help="where the model's outputs hold the loss; not read where they are a tensor")
    items: Literal["auto", "labels", "shifted-labels", "rows"] = option(
        "auto",
        choices=["auto", "labels", "shifted-labels", "rows"],
        help="what the model's mean is over; auto asks the model, and counts rows where labels are no integers",
    )

    @hookimpl
    def build_count(self, run: Run) -> Callable[[Any], int | None]:
        """Count what the model's mean is over."""
        if self.items == "rows":
            return count_rows
        shifted = shifts_labels(run) if self.items == "auto" else self.items == "shifted-labels"
        return count_shifted_labels if shifted else count_labels

    @hookimpl
    def compute_loss(self, micro: Micro) -> torch.Tensor:
        """Weigh the model's mean."""
        loss = output_of(micro.outputs, self.key, plugin="model-loss")
        if loss.ndim:
            raise TrainingError(
                f"model-loss: the model's {self.key!r} must be a mean, a 0-dim tensor. Received: shape "
                f"{tuple(loss.shape)}. Return the mean, or name another loss plugin"
            )
        return loss if micro.scale == 1.0 else loss * micro.scale
