"""Cross-entropy of logits against labels."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from drivetrain import ConfigError, Problem, hookimpl, option, plugin
from drivetrain_plugins.loss._labels import (
    IGNORED,
    WITHHOLD,
    Count,
    InRange,
    labels_of,
    number_of_classes,
    output_of,
    scaled,
    summed_cross_entropy,
    withheld,
)
from drivetrain_plugins.shared.causal import shifts_labels

if TYPE_CHECKING:
    from collections.abc import Generator

    from drivetrain import Micro, Run


@plugin(role="loss", rows="tokens")
class CrossEntropy:
    """Compute the cross-entropy of the model's logits (..., C) and the batch's labels (...).

    An item is a label that is not ignored. With class weights an item's loss is multiplied by its class's weight and
    the sum is still divided by the number of items, not by the sum of their weights (as `torch.nn.CrossEntropyLoss`
    does): so a step's size does not depend on which classes it happens to hold.
    """

    labels: str = option("labels", help="field with the labels; of tuples it is the last part")
    logits: str = option("logits", help="where the model's outputs hold the logits; they may be a bare tensor")
    ignore_index: int = option(IGNORED, help="label that is passed over")
    weights: tuple[float, ...] = option((), ge=0, help="a factor for each class; the mean is still over items")
    shifted: bool | None = option(None, help="position i predicts label i + 1; None does as the model's own loss does")
    withhold_labels: bool = option(True, help=WITHHOLD)
    _shifted: bool = option(False, init=False)
    _weight: Any = option(None, init=False)

    @property
    def facts(self) -> dict[str, Any]:
        """Say whether labels are shifted, where it was said to this plugin."""
        return {} if self.shifted is None else {"shifted_labels": self.shifted}

    @hookimpl
    def build_count(self, run: Run) -> Count:
        """Count the labels that are not ignored."""
        self._shifted = shifts_labels(run)
        return Count("cross-entropy", self.labels, self.ignore_index, self._shifted)

    @hookimpl
    def batch_checks(self, run: Run) -> list[InRange]:
        """Refuse labels that are no classes."""
        classes = len(self.weights) or number_of_classes(run.model)
        return [InRange("cross-entropy", self.labels, self.ignore_index, classes)]

    @hookimpl
    def assembled(self, run: Run) -> None:
        """Put the weights on the device."""
        classes = number_of_classes(run.model)
        if self.weights and classes not in (None, len(self.weights)):
            what = f"cross-entropy: weights must have one number for each of the model's {classes} classes"
            raise ConfigError([Problem(what, f"{len(self.weights)} numbers", "give a weight for every class")])
        self._weight = torch.tensor(self.weights, dtype=torch.float64).to(run.device) if self.weights else None

    @hookimpl(wrapper=True)
    def forward(self, micro: Micro) -> Generator[None, Any, Any]:
        """Keep the labels from the model."""
        return (yield from withheld(micro, *([self.labels] if self.withhold_labels else [])))

    @hookimpl
    def compute_loss(self, micro: Micro) -> torch.Tensor:
        """Sum over the items and divide by the step's number of them."""
        total = summed_cross_entropy(
            output_of(micro.outputs, self.logits, plugin="cross-entropy"),
            labels_of(micro.batch, self.labels, plugin="cross-entropy"),
            plugin="cross-entropy",
            shifted=self._shifted,
            ignore=self.ignore_index,
            weight=self._weight,
        )
        return scaled(total, micro)
