"""Precision, recall and F-score of classes, streamed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import attrs
import torch

from drivetrain import TrainingError, hookimpl, option, plugin
from drivetrain.data import IGNORE_INDEX
from drivetrain_plugins.evaluate._names import HELP, class_names, prefix, printable, refuse_twins
from drivetrain_plugins.evaluate._outputs import labels_of, logits_and_labels, output
from drivetrain_plugins.shared.causal import shifts_labels

if TYPE_CHECKING:
    from drivetrain import Micro, Run

Average = Literal["macro", "micro", "weighted", "none"]


def _shares(parts: torch.Tensor, wholes: torch.Tensor) -> torch.Tensor:
    """Return parts / wholes, and 0 for 0/0."""
    return torch.where(wholes > 0, parts / wholes.clamp(min=1e-300), 0.0)


@attrs.define(eq=False)
class StreamingF1:
    """Count hits, predictions and labels of each class on the device; they leave it at the end.

    Three sums over the batch are all that is kept: a matrix of confusions would grow with the square of the classes,
    and taking ignored labels out of the batch would wait for the device.
    """

    device: torch.device
    world_size: int
    average: Average
    beta: float
    threshold: float
    everything: bool
    shifted: bool
    prefix: str
    names: list[str]  # of the classes, or none
    counts: torch.Tensor | None = None  # int64 (4, C): hits, predictions, labels, labels that are neither 0 nor 1
    several: bool = False  # several labels of an item may hold

    def update(self, micro: Micro) -> None:
        """Add a batch: logits (..., C) against classes (...), or against as many labels (..., C) of 0 and 1."""
        logits, labels = output(micro.outputs), labels_of(micro.batch)
        known = isinstance(logits, torch.Tensor) and isinstance(labels, torch.Tensor)
        if known and logits.shape == (*labels.shape, 1):  # one logit: whether it holds
            logits = logits.squeeze(-1)
        if known and logits.shape == labels.shape:
            self._add_flags(logits, labels)
        else:
            self._add_classes(*logits_and_labels(micro, "f1", self.shifted))

    def _add_flags(self, logits: torch.Tensor, labels: torch.Tensor) -> None:
        """Add logits and labels of one shape, (..., C) or (B,), where the last dimension counts the classes."""
        self.several = True
        if labels.ndim == 1:
            logits, labels = logits[:, None], labels[:, None]
        counts = self._counts(logits.shape[-1])
        counted, true = labels != IGNORE_INDEX, labels == 1
        held = (logits.float().sigmoid() > self.threshold) & counted
        odd = counted & ~true & (labels != 0)
        for row, flags in enumerate((held & true, held, true, odd)):
            counts[row] += flags.flatten(0, -2).sum(0)

    def _add_classes(self, logits: torch.Tensor, labels: torch.Tensor) -> None:
        """Add logits (..., C) and classes (...)."""
        counts, best = self._counts(logits.shape[-1]), logits.argmax(-1).flatten()
        labels = labels.flatten()
        ones = (labels != IGNORE_INDEX).long()
        true = labels.long() * ones  # what does not count adds 0 to class 0
        for row, classes, weights in ((0, true, ones * (best == true)), (1, best, ones), (2, true, ones)):
            try:
                counts[row].index_add_(0, classes, weights)
            except (IndexError, RuntimeError) as error:
                received = f"labels {int(true.min())} to {int(true.max())}, {len(counts[row])} logits"
                raise TrainingError(f"f1: a label is no class of the model. Received: {received}") from error

    def _counts(self, classes: int) -> torch.Tensor:
        if self.counts is None:
            self.counts = torch.zeros(4, classes, dtype=torch.int64, device=self.device)
        return self.counts

    def compute(self) -> dict[str, float]:
        """Return the F-score over all ranks, and precision and recall if they were asked for."""
        if self.world_size > 1:
            # A rank without rows has seen neither how many classes there are nor of which kind.
            shape = torch.tensor([0 if self.counts is None else self.counts.shape[1], self.several], device=self.device)
            torch.distributed.all_reduce(shape, torch.distributed.ReduceOp.MAX)
            classes, self.several = int(shape[0]), bool(shape[1])
            if not classes:
                return {}
            torch.distributed.all_reduce(self._counts(classes))
        if self.counts is None:
            return {}
        hits, predicted, true, odd = self.counts.cpu().double()
        if odd.sum() > 0:
            raise TrainingError(
                "f1: labels of the logits' shape must be 0 or 1, each for whether its class holds. "
                f"Received: {int(odd.sum())} that are not. For numbers take `regression`"
            )
        if not self.several and true.sum() == 0:  # every label was passed over
            return {}
        return self._named(self._averaged(hits, predicted, true))

    def _averaged(self, hits: torch.Tensor, predicted: torch.Tensor, true: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return (C,) or (1,) for each score."""
        weights = torch.ones_like(true)
        if self.average == "weighted":
            weights = true
        elif self.average == "macro" and not self.several:  # a class that is neither there nor predicted has no score
            weights = ((predicted + true) > 0).double()
        if self.average == "micro":
            hits, predicted, true, weights = (part.sum().reshape(1) for part in (hits, predicted, true, weights))
        square = self.beta**2
        scores = {
            f"f{self.beta:g}": _shares((1 + square) * hits, square * true + predicted),
            "precision": _shares(hits, predicted),
            "recall": _shares(hits, true),
        }
        if self.average == "none":
            return scores
        return {name: _shares((score * weights).sum(), weights.sum()).reshape(1) for name, score in scores.items()}

    def _named(self, scores: dict[str, torch.Tensor]) -> dict[str, float]:
        found: dict[str, float] = {}
        for number, (name, score) in enumerate(scores.items()):
            if number == 0 or self.everything:
                name = self.prefix + name  # noqa: PLW2901
                if self.average == "none":
                    classes = self.names if len(self.names) == len(score) else [str(c) for c in range(len(score))]
                    found |= {f"{name}_{printable(c)}": v for c, v in zip(classes, score.tolist(), strict=True)}
                else:
                    found[name] = score.item()
        return found


@plugin(
    role="evaluate",
    effect="observes",
    requires=["evaluation"],
    conflicts=["mse", "chunked-cross-entropy"],
    example={"all": True},
)
class F1:
    """Measure the F-score, the harmonic mean of precision and recall; of several labels an item, too.

    Averages as in scikit-learn. Labels (...) for logits (..., C) are classes; labels of the logits' own shape are 0 or
    1, each for whether its class holds. Labels of -100 are passed over.
    """

    average: Average = option(
        "macro", choices=["macro", "micro", "weighted", "none"], help='over classes; "none" gives each its number'
    )
    all: bool = option(False, help="give precision and recall, too")
    beta: float = option(1.0, gt=0, help="how much more recall counts than precision")
    threshold: float = option(0.5, gt=0, lt=1, help="the probability above which one of several labels holds")
    name: str | None = option(None, help=HELP)

    @hookimpl
    def assembled(self, run: Run) -> None:
        """Refuse another `f1` with the same names."""
        refuse_twins(run, self)

    @hookimpl
    def metrics(self, run: Run, split: str) -> list[StreamingF1]:
        """Return a fresh count for this evaluation, or nothing where there are no labels to compare with."""
        if split.startswith("predict"):
            return []
        made = StreamingF1(
            device=run.device,
            world_size=run.world_size,
            average=self.average,
            beta=self.beta,
            threshold=self.threshold,
            everything=self.all,
            shifted=shifts_labels(run),
            prefix=prefix(run, self),
            names=class_names(run),
        )
        return [made]
