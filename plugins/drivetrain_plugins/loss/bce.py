"""Binary cross-entropy, for labels of which several may hold at once."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from drivetrain import ConfigError, Problem, hookimpl, option, plugin
from drivetrain_plugins.loss._labels import (
    IGNORED,
    WITHHOLD,
    Count,
    number_of_classes,
    scaled,
    withheld,
)
from drivetrain_plugins.loss._targets import Between, pair

if TYPE_CHECKING:
    from collections.abc import Generator

    from drivetrain import Micro, Run


@plugin(
    role="loss", rows="flags", conflicts=["accuracy"], companions={"tokenize?": {"label": None, "keep": ["labels"]}}
)
class BCE:
    """Compute the binary cross-entropy of logits (..., C) and labels (..., C) between 0 and 1.

    An item is one label: a row has C of them, as in `torch.nn.BCEWithLogitsLoss`. Labels of -100 are passed over.
    """

    labels: str = option("labels", help="field with the labels; of tuples it is the last part")
    logits: str = option("logits", help="where the model's outputs hold the logits; they may be a bare tensor")
    ignore: float | None = option(float(IGNORED), help="label that is passed over, or None")
    positive_weights: tuple[float, ...] = option((), gt=0, help="for each class, how much more a positive label counts")
    withhold_labels: bool = option(True, help=WITHHOLD)
    _weight: Any = option(None, init=False)

    @hookimpl
    def build_count(self) -> Count:
        """Count the labels that are not ignored."""
        return Count("bce", self.labels, self.ignore)

    @hookimpl
    def batch_checks(self) -> list[Between]:
        """Refuse labels that are no probabilities."""
        return [Between("bce", self.labels, self.ignore, 0.0, 1.0)]

    @hookimpl
    def assembled(self, run: Run) -> None:
        """Put the weights on the device."""
        weights, classes = self.positive_weights, number_of_classes(run.model)
        if weights and classes not in (None, len(weights)):
            what = f"bce: positive_weights must have one number for each of the model's {classes} classes"
            raise ConfigError([Problem(what, f"{len(weights)} numbers", "give a weight for every class")])
        self._weight = torch.tensor(weights, dtype=torch.float64).to(run.device) if weights else None

    @hookimpl(wrapper=True)
    def forward(self, micro: Micro) -> Generator[None, Any, Any]:
        """Keep the labels from the model."""
        return (yield from withheld(micro, *([self.labels] if self.withhold_labels else [])))

    @hookimpl
    def compute_loss(self, micro: Micro) -> torch.Tensor:
        """Sum over the items and divide by the step's number of them."""
        made, wanted, items = pair(micro, self.logits, self.labels, self.ignore, plugin="bce")
        losses = torch.nn.functional.binary_cross_entropy_with_logits(
            made, wanted, reduction="none", pos_weight=None if self._weight is None else self._weight.to(made)
        )
        return scaled((losses if items is None else losses.where(items, 0.0)).sum(), micro)
