"""Mean squared error, for regression."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from drivetrain import hookimpl, option, plugin
from drivetrain_plugins.loss._labels import IGNORED, WITHHOLD, Count, scaled, withheld
from drivetrain_plugins.loss._targets import Between, pair

if TYPE_CHECKING:
    from collections.abc import Generator

    from drivetrain import Micro


@plugin(
    role="loss", rows="targets", conflicts=["accuracy"], companions={"tokenize?": {"label": None, "keep": ["labels"]}}
)
class MSE:
    """Compute the mean squared error of predictions and labels of the same shape (..., K), K = 1 may be left out.

    An item is one number: a row with K labels has K items, as in `torch.nn.MSELoss`.
    """

    labels: str = option("labels", help="field with the labels; of tuples it is the last part")
    predictions: str = option("logits", help="where the model's outputs hold the predictions, or a bare tensor")
    ignore: float | None = option(float(IGNORED), help="label that is passed over (collators pad with -100), or None")
    withhold_labels: bool = option(True, help=WITHHOLD)

    @hookimpl
    def build_count(self) -> Count:
        """Count the numbers that are not ignored."""
        return Count("mse", self.labels, self.ignore)

    @hookimpl
    def batch_checks(self) -> list[Between]:
        """Refuse labels that are no finite numbers."""
        return [Between("mse", self.labels, self.ignore)]

    @hookimpl(wrapper=True)
    def forward(self, micro: Micro) -> Generator[None, Any, Any]:
        """Keep the labels from the model."""
        return (yield from withheld(micro, *([self.labels] if self.withhold_labels else [])))

    @hookimpl
    def compute_loss(self, micro: Micro) -> torch.Tensor:
        """Sum over the items and divide by the step's number of them."""
        made, wanted, items = pair(micro, self.predictions, self.labels, self.ignore, plugin="mse")
        errors = torch.square(made - wanted)
        return scaled((errors if items is None else errors.where(items, 0.0)).sum(), micro)
