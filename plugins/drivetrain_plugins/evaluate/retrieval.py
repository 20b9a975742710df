"""Measures of rankings, by torchmetrics."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import attrs
import torch

from drivetrain import ConfigError, Problem, TrainingError, hookimpl, option, plugin
from drivetrain.data import IGNORE_INDEX
from drivetrain.errors import nearest
from drivetrain_plugins.evaluate._names import HELP, prefix, refuse_twins
from drivetrain_plugins.evaluate._outputs import described, labels_of, logits_and_labels, output
from drivetrain_plugins.evaluate._torchmetrics import Streamed, built, library
from drivetrain_plugins.shared.causal import shifts_labels

if TYPE_CHECKING:
    from collections.abc import Generator

    from drivetrain import Micro, Run

CLASSES = {
    "mrr": "RetrievalMRR",
    "map": "RetrievalMAP",
    "ndcg": "RetrievalNormalizedDCG",
    "recall": "RetrievalRecall",
}
Ranking = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def measured(name: str) -> tuple[str, int | None] | None:
    """Return measure and cut-off of a name such as "ndcg@10", or None if it is none."""
    measure, at, cut = name.partition("@")
    if measure not in CLASSES or (at and not (cut.isdecimal() and int(cut))):
        return None
    return measure, int(cut) if at else None


@attrs.define(eq=False)
class Rankings:
    """Read scores (N,), relevances (N,) and query ids (N,) from a batch."""

    queries: str | None
    shifted: bool
    rank: int
    world_size: int
    rows: int = 0  # queries so far, where each row is one

    def __call__(self, micro: Micro) -> Ranking | None:
        """Return them, without what is passed over."""
        scores, labels = output(micro.outputs), labels_of(micro.batch)
        known = isinstance(scores, torch.Tensor) and isinstance(labels, torch.Tensor)
        if known and scores.shape == (*labels.shape, 1):
            scores = scores.squeeze(-1)
        if not known or scores.shape != labels.shape:
            if self.queries is not None:
                raise TrainingError(
                    "retrieval needs a score and a relevance for each candidate: outputs 'logits' and a batch's "
                    f"'labels' of one shape. Received: {self._received(micro)}"
                )
            scores, labels = self._of_classes(micro)
        ids = self._numbered(scores) if self.queries is None else self._ids(micro, scores)
        kept = (labels != IGNORE_INDEX).flatten()
        if not kept.any():
            return None
        return scores.flatten()[kept].float(), labels.flatten()[kept], ids.flatten()[kept]

    def _of_classes(self, micro: Micro) -> tuple[torch.Tensor, torch.Tensor]:
        """Return scores (N, C) of classes, and 1 for the right one."""
        scores, labels = logits_and_labels(micro, "retrieval", self.shifted)
        scores, labels = scores.flatten(0, -2), labels.flatten()
        ignored = labels == IGNORE_INDEX
        relevant = torch.zeros(scores.shape, dtype=torch.long, device=scores.device)
        relevant.scatter_(1, labels.long().where(~ignored, 0)[:, None], 1)
        return scores, relevant.masked_fill(ignored[:, None], IGNORE_INDEX)

    def _numbered(self, scores: torch.Tensor) -> torch.Tensor:
        """Give every row of scores (..., C) a number that no other row of any rank has."""
        if scores.ndim < 2:  # noqa: PLR2004 - rows and candidates
            raise TrainingError(
                "retrieval: which query is a score for? Name the field with query ids, queries = ..., or return "
                f"the scores of all candidates of a query in one row. Received: scores {tuple(scores.shape)}"
            )
        rows = scores.numel() // max(scores.shape[-1], 1)
        numbers = torch.arange(self.rows, self.rows + rows, device=scores.device) * self.world_size + self.rank
        self.rows += rows
        return numbers.reshape(*scores.shape[:-1], 1).expand_as(scores)

    def _ids(self, micro: Micro, scores: torch.Tensor) -> torch.Tensor:
        """Return the batch's query ids, for every score."""
        batch: Any = micro.batch
        ids = batch[self.queries] if hasattr(batch, "keys") and self.queries in batch else None
        if not isinstance(ids, torch.Tensor) or ids.is_floating_point():
            raise TrainingError(
                f"retrieval: a batch needs integer query ids under {self.queries!r}. Received: {described(batch)}"
            )
        if ids.shape == scores.shape[:-1] and ids.ndim:
            ids = ids[..., None]
        try:
            return ids.long().expand_as(scores)
        except RuntimeError as error:
            received = f"ids {tuple(ids.shape)}, scores {tuple(scores.shape)}"
            raise TrainingError(f"retrieval: query ids must be of the scores' shape. Received: {received}") from error

    @staticmethod
    def _received(micro: Micro) -> str:
        shapes = [
            f" {tuple(one.shape)}" if isinstance(one, torch.Tensor) else ""
            for one in (output(micro.outputs), labels_of(micro.batch))
        ]
        return f"{described(micro.outputs)}{shapes[0]}; {described(micro.batch)}{shapes[1]}"


class Ranked:
    """A measure of the library as its definition has it, whatever the scores' sign and the relevances' grades."""

    def __init__(self, metric: Any, *, graded: bool) -> None:
        """Wrap a metric; unless `graded`, what has a relevance above 0 is relevant to it."""
        self.metric, self.graded = metric, graded

    def modules(self) -> Any:
        """Return the metric and what is in it."""
        return self.metric.modules()

    def update(self, scores: torch.Tensor, labels: torch.Tensor, ids: torch.Tensor) -> None:
        """Add a batch."""
        self.metric.update(scores, labels if self.graded else (labels > 0).long(), ids)

    def compute(self) -> torch.Tensor:
        """Return the mean over queries, of scores numbered by size.

        torchmetrics 1.9 takes no candidate with a score of 0 or less for relevant (`target = where(preds > 0, ...)`).
        """
        scores = torch.cat(self.metric.preds)
        self.metric.preds = [torch.unique(scores, return_inverse=True)[1].double() + 1]
        mean: torch.Tensor = self.metric.compute()
        return mean


@plugin(
    role="evaluate",
    effect="observes",
    requires=["evaluation"],
    conflicts=["chunked-cross-entropy"],
    example={"measures": ["mrr", "ndcg@2"]},
)
class Retrieval:
    """Measure rankings by torchmetrics: mrr, map, ndcg@K and recall@K, the mean over queries.

    A batch has a score and a relevance for each candidate, and query ids in the field `queries` (which the model does
    not get); a query may be spread over batches and ranks. Without query ids each row of scores (B, C) is a query, and
    labels are relevances (B, C), or the one right candidate (B,). A query without a relevant candidate counts as 0.
    All scores of a split are kept until it ends.
    """

    measures: tuple[str, ...] = option(
        ("mrr", "map", "ndcg@10", "recall@10"), help="of mrr, map, ndcg and recall; @K looks at the first K only"
    )
    queries: str | None = option(None, help="the batch's field with query ids; None takes each row as a query")
    name: str | None = option(None, help=HELP.replace("NAME_f1", "NAME_mrr"))

    @hookimpl
    def assembled(self, run: Run) -> None:
        """Refuse unknown measures and another `retrieval` with the same names; load the library."""
        problems = [
            Problem(f"retrieval: there is no measure {name!r}", str(list(self.measures)), nearest(name, CLASSES))
            for name in self.measures
            if measured(name) is None
        ]
        if problems:
            raise ConfigError(problems)
        refuse_twins(run, self)
        library("torchmetrics.retrieval", "retrieval")

    @hookimpl(wrapper=True)
    def forward(self, micro: Micro) -> Generator[None, Any, Any]:
        """Keep the query ids from the model."""
        whole: Any = micro.batch
        if self.queries is not None and hasattr(whole, "keys") and self.queries in whole:
            micro.batch = {name: whole[name] for name in whole if name != self.queries}
        try:
            return (yield)
        finally:
            micro.batch = whole

    @hookimpl
    def metrics(self, run: Run, split: str) -> list[Streamed]:
        """Return fresh metrics for this evaluation, or nothing where there are no labels to compare with."""
        if split.startswith("predict"):
            return []
        module: Any = library("torchmetrics.retrieval", "retrieval")
        first, made = prefix(run, self), {}
        for name in self.measures:
            measure, cut = measured(name) or (name, None)
            metric = built(getattr(module, CLASSES[measure]), run.device, top_k=cut)
            made[f"{first}{name}"] = Ranked(metric, graded=measure == "ndcg")
        read = Rankings(self.queries, shifts_labels(run), run.rank, run.world_size)
        return [Streamed("retrieval", made, read, run.world_size, run.device)]
