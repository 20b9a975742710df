"""Accuracy, streamed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import attrs
import torch

from drivetrain import TrainingError, hookimpl, plugin
from drivetrain.data import IGNORE_INDEX
from drivetrain_plugins.shared.causal import shifts_labels

if TYPE_CHECKING:
    from drivetrain import Micro, Run


@attrs.define(eq=False)
class StreamingAccuracy:
    """Count hits on the device; one number leaves it at the end."""

    world_size: int
    counts: torch.Tensor  # float64 [hits, items]
    shifted: bool = False  # logits at a token are for the label of the next

    def update(self, micro: Micro) -> None:
        """Add a batch: outputs["logits"] (..., C) against batch["labels"] (...), where -100 does not count."""
        outputs, batch = micro.outputs, micro.batch
        if not hasattr(outputs, "keys") or "logits" not in outputs or "labels" not in batch:
            raise TrainingError(
                f"accuracy needs outputs with 'logits' and batches with 'labels'. Received: {type(outputs).__name__}"
            )
        labels, best = batch["labels"], outputs["logits"].argmax(-1)
        if self.shifted:
            labels, best = labels[..., 1:], best[..., :-1]
        if labels.shape != best.shape:
            raise TrainingError(
                "accuracy needs logits (..., C) for labels (...), which are classes. "
                f"Received: logits {tuple(outputs['logits'].shape)}, labels {tuple(batch['labels'].shape)}"
            )
        counted = labels != IGNORE_INDEX
        self.counts[0] += ((best == labels) & counted).sum()
        self.counts[1] += counted.sum()

    def compute(self) -> dict[str, float]:
        """Return the share of hits over all ranks."""
        if self.world_size > 1:
            torch.distributed.all_reduce(self.counts)
        hits, items = self.counts.tolist()
        return {"accuracy": hits / items} if items else {}


@plugin(role="evaluate", effect="observes", requires=["evaluation"])
class Accuracy:
    """Measure how often the largest logit is the label (of the next token, where the loss is a causal one)."""

    @hookimpl
    def metrics(self, run: Run) -> list[StreamingAccuracy]:
        """Return a fresh count for this evaluation."""
        counts = torch.zeros(2, dtype=torch.float64, device=run.device)
        return [StreamingAccuracy(run.world_size, counts, shifts_labels(run))]
