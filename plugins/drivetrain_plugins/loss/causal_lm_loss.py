"""Cross-entropy of a causal language model: each position predicts the next label."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

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

if TYPE_CHECKING:
    from collections.abc import Generator, Mapping

    import torch

    from drivetrain import Micro, Run


@plugin(
    role="loss",
    rows="copies",
    companions={"causal-lm": {}, "hf-model": {"path": "{kit}/causal", "task": "causal-lm"}},
)
class CausalLMLoss:
    """Compute the cross-entropy of position i's logits (B, L, V) and label i + 1, whatever the model's own loss does.

    An item is a label that is not ignored and not the first of its row.
    """

    facts: ClassVar[Mapping[str, Any]] = {"shifted_labels": True}
    labels: str = option("labels", help="field with the labels; of tuples it is the last part")
    logits: str = option("logits", help="where the model's outputs hold the logits; they may be a bare tensor")
    ignore_index: int = option(IGNORED, help="label that is passed over")
    withhold_labels: bool = option(True, help=WITHHOLD)

    @hookimpl
    def build_count(self) -> Count:
        """Count the labels that are predicted."""
        return Count("causal-lm-loss", self.labels, self.ignore_index, shifted=True)

    @hookimpl
    def batch_checks(self, run: Run) -> list[InRange]:
        """Refuse labels that are no tokens."""
        return [InRange("causal-lm-loss", self.labels, self.ignore_index, number_of_classes(run.model))]

    @hookimpl(wrapper=True)
    def forward(self, micro: Micro) -> Generator[None, Any, Any]:
        """Keep the labels from the model."""
        return (yield from withheld(micro, *([self.labels] if self.withhold_labels else [])))

    @hookimpl
    def compute_loss(self, micro: Micro) -> torch.Tensor:
        """Sum over the items and divide by the step's number of them."""
        total = summed_cross_entropy(
            output_of(micro.outputs, self.logits, plugin="causal-lm-loss"),
            labels_of(micro.batch, self.labels, plugin="causal-lm-loss"),
            plugin="causal-lm-loss",
            shifted=True,
            ignore=self.ignore_index,
        )
        return scaled(total, micro)
