"""Cross-entropy against labels that are mixed with the uniform distribution."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from drivetrain import hookimpl, option, plugin
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

    import torch

    from drivetrain import Micro, Run


@plugin(role="loss", rows="tokens")
class LabelSmoothing:
    """Compute (1 - epsilon) times the cross-entropy plus epsilon times the mean of -log p over all classes.

    That is `torch.nn.functional.cross_entropy(label_smoothing=epsilon)`, and transformers' label smoother over the
    same items. Szegedy et al. 2016, "Rethinking the Inception Architecture for Computer Vision", section 7.
    """

    epsilon: float = option(0.1, ge=0, le=1, help="share of the uniform distribution in the target")
    labels: str = option("labels", help="field with the labels; of tuples it is the last part")
    logits: str = option("logits", help="where the model's outputs hold the logits; they may be a bare tensor")
    ignore_index: int = option(IGNORED, help="label that is passed over")
    shifted: bool | None = option(None, help="position i predicts label i + 1; None does as the model's own loss does")
    withhold_labels: bool = option(True, help=WITHHOLD)
    _shifted: bool = option(False, init=False)

    @property
    def facts(self) -> dict[str, Any]:
        """Say whether labels are shifted, where it was said to this plugin."""
        return {} if self.shifted is None else {"shifted_labels": self.shifted}

    @hookimpl
    def build_count(self, run: Run) -> Count:
        """Count the labels that are not ignored."""
        self._shifted = shifts_labels(run)
        return Count("label-smoothing", self.labels, self.ignore_index, self._shifted)

    @hookimpl
    def batch_checks(self, run: Run) -> list[InRange]:
        """Refuse labels that are no classes."""
        return [InRange("label-smoothing", self.labels, self.ignore_index, number_of_classes(run.model))]

    @hookimpl(wrapper=True)
    def forward(self, micro: Micro) -> Generator[None, Any, Any]:
        """Keep the labels from the model."""
        return (yield from withheld(micro, *([self.labels] if self.withhold_labels else [])))

    @hookimpl
    def compute_loss(self, micro: Micro) -> torch.Tensor:
        """Sum over the items and divide by the step's number of them."""
        total = summed_cross_entropy(
            output_of(micro.outputs, self.logits, plugin="label-smoothing"),
            labels_of(micro.batch, self.labels, plugin="label-smoothing"),
            plugin="label-smoothing",
            shifted=self._shifted,
            ignore=self.ignore_index,
            smoothing=self.epsilon,
        )
        return scaled(total, micro)
