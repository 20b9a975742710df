"""Accuracy, streamed."""

from __future__ import annotations

from operator import eq
from typing import TYPE_CHECKING

import attrs
import numpy as np
import torch

from drivetrain import TrainingError, hookimpl, plugin
from drivetrain.data import IGNORE_INDEX, SHORT
from drivetrain_plugins.shared.causal import shifts_labels

if TYPE_CHECKING:
    from drivetrain import Micro, Run

IN_NUMPY = (torch.float32, torch.float64)


@attrs.define(eq=False)
class StreamingAccuracy:
    """Count hits where the logits are: nothing leaves a device before the end."""

    world_size: int
    counts: torch.Tensor  # float64 [hits, items], of the batches on a device
    shifted: bool = False  # logits at a token are for the label of the next
    counted: bool = False  # the number of integer labels that are not ignored is known, as the batch's items
    hits: int = 0  # of the batches on the host
    items: int = 0

    def update(self, micro: Micro) -> None:
        """Add a batch: outputs["logits"] (..., C) against batch["labels"] (...), where -100 does not count."""
        outputs, batch = micro.outputs, micro.batch
        if not hasattr(outputs, "keys") or "logits" not in outputs or "labels" not in batch:
            raise TrainingError(
                f"accuracy needs outputs with 'logits' and batches with 'labels'. Received: {type(outputs).__name__}"
            )
        labels, logits = batch["labels"], outputs["logits"]
        if labels.shape != logits.shape[:-1]:
            raise TrainingError(
                "accuracy needs logits (..., C) for labels (...), which are classes. "
                f"Received: logits {tuple(logits.shape)}, labels {tuple(labels.shape)}"
            )
        if self.shifted:
            labels, logits = labels[..., 1:], logits[..., :-1, :]
        # An ignored label is negative and so never the largest logit: hits need no mask.
        if labels.device.type == logits.device.type == "cpu" and logits.dtype in IN_NUMPY:
            # The same counts at a fraction of torch's cost a call, which for few labels is all there is.
            best, wanted = logits.detach().numpy().argmax(-1), labels.numpy()
            few = wanted.ndim == 1 and len(wanted) <= SHORT
            self.hits += sum(map(eq, best.tolist(), wanted.tolist())) if few else int(np.count_nonzero(best == wanted))
            if self.counted and wanted.dtype.kind == "i":
                self.items += micro.num_items
            else:
                self.items += int(np.count_nonzero(wanted != IGNORE_INDEX))
        else:
            self.counts[0] += (logits.argmax(-1) == labels).sum()
            self.counts[1] += (labels != IGNORE_INDEX).sum()

    def compute(self) -> dict[str, float]:
        """Return the share of hits over all ranks."""
        self.counts += torch.tensor([self.hits, self.items], dtype=torch.float64, device=self.counts.device)
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
        shifted = shifts_labels(run)
        return [StreamingAccuracy(run.world_size, counts, shifted, _counts_labels(run, shifted))]


def _counts_labels(run: Run, shifted: bool) -> bool:
    """Tell whether the items of a batch are the labels that the accuracy counts: nobody counts or moves others."""
    if run.plan is None or shifted != run.shifted_labels:
        return False
    count, prepare, forward = (run.plan.hooks[name] for name in ("build_count", "prepare", "forward"))
    plain = all(hook.owner == "drivetrain" and not hook.wrappers for hook in (count, prepare))
    return plain and not forward.wrappers
