"""Perplexity, streamed."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import attrs
import torch

from drivetrain import hookimpl, option, plugin
from drivetrain.data import IGNORE_INDEX
from drivetrain_plugins.evaluate._names import HELP, prefix, refuse_twins
from drivetrain_plugins.evaluate._outputs import logits_and_labels
from drivetrain_plugins.shared.causal import shifts_labels

if TYPE_CHECKING:
    from drivetrain import Micro, Run


@attrs.define(eq=False)
class StreamingPerplexity:
    """Add up negative log-likelihoods on the device; one number leaves it at the end."""

    world_size: int
    totals: torch.Tensor  # float64 [nats, items]
    shifted: bool
    name: str

    def update(self, micro: Micro) -> None:
        """Add a batch: logits (..., C) against labels (...), where -100 does not count."""
        logits, labels = logits_and_labels(micro, "perplexity", self.shifted)
        losses = torch.nn.functional.cross_entropy(
            logits.flatten(0, -2).float() if logits.dtype.itemsize < 4 else logits.flatten(0, -2),  # noqa: PLR2004 - half
            labels.flatten().long(),
            ignore_index=IGNORE_INDEX,
            reduction="none",  # summed in float64: a long split has millions of tokens
        )
        self.totals[0] += losses.sum(dtype=torch.float64)
        self.totals[1] += (labels != IGNORE_INDEX).sum()

    def compute(self) -> dict[str, float]:
        """Return exp(nats / items) over all ranks, infinite where it is beyond float64."""
        if self.world_size > 1:
            torch.distributed.all_reduce(self.totals)
        nats, items = self.totals.tolist()
        if not items:
            return {}
        try:
            return {self.name: math.exp(nats / items)}
        except OverflowError:
            return {self.name: math.inf}


@plugin(role="evaluate", effect="observes", requires=["evaluation"], conflicts=["mse", "bce", "chunked-cross-entropy"])
class Perplexity:
    """Measure exp of the mean negative log-likelihood of the labels (of the next tokens, where the loss is causal).

    The mean is over all labels that are not -100, of all batches and ranks. The model's logits are asked, so label
    smoothing, class weights and auxiliary losses, which change the loss, do not change it.
    """

    name: str | None = option(None, help=HELP.replace("NAME_f1", "NAME_perplexity"))

    @hookimpl
    def assembled(self, run: Run) -> None:
        """Refuse another `perplexity` with the same name."""
        refuse_twins(run, self)

    @hookimpl
    def metrics(self, run: Run, split: str) -> list[StreamingPerplexity]:
        """Return fresh sums for this evaluation, or nothing where there are no labels to compare with."""
        if split.startswith("predict"):
            return []
        totals = torch.zeros(2, dtype=torch.float64, device=run.device)
        return [StreamingPerplexity(run.world_size, totals, shifts_labels(run), prefix(run, self) + "perplexity")]
