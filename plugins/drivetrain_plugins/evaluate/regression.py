"""Measures of predicted numbers, by torchmetrics."""

from __future__ import annotations

import math
import warnings
from typing import TYPE_CHECKING, Any

import attrs
import torch

from drivetrain import ConfigError, Problem, TrainingError, hookimpl, option, plugin
from drivetrain.data import IGNORE_INDEX
from drivetrain.errors import nearest
from drivetrain_plugins.evaluate._names import HELP, prefix, refuse_twins
from drivetrain_plugins.evaluate._outputs import described, labels_of, output
from drivetrain_plugins.evaluate._torchmetrics import built, library, merge

if TYPE_CHECKING:
    from drivetrain import Micro, Run

CLASSES = {
    "mse": "MeanSquaredError",
    "rmse": "MeanSquaredError",
    "mae": "MeanAbsoluteError",
    "r2": "R2Score",
    "pearson": "PearsonCorrCoef",
    "spearman": "SpearmanCorrCoef",
}
CORRELATIONS = ("pearson", "spearman")


@attrs.define(eq=False)
class StreamingRegression:
    """Each measure for each output, in float64."""

    world_size: int
    device: torch.device
    measures: tuple[str, ...]
    ignore: float | None
    prefix: str
    outputs: list[dict[str, Any]] = attrs.field(factory=list)  # objects of torchmetrics, by measure

    def update(self, micro: Micro) -> None:
        """Add a batch: predictions and labels (B,), (B, 1) or (..., K)."""
        made, wanted = output(micro.outputs), labels_of(micro.batch)
        if not isinstance(made, torch.Tensor) or not isinstance(wanted, torch.Tensor):
            received = f"{described(micro.outputs)}; {described(micro.batch)}"
            raise TrainingError(
                f"regression needs outputs with 'logits' and batches with 'labels'. Received: {received}"
            )
        shapes = tuple(made.shape), tuple(wanted.shape)
        made, wanted = (one[..., None] if one.ndim == 1 else one for one in (made, wanted))
        if made.shape == (*wanted.shape, 1):
            made = made.squeeze(-1)
        elif wanted.shape == (*made.shape, 1):
            wanted = wanted.squeeze(-1)
        if made.shape != wanted.shape:
            raise TrainingError(
                f"regression: predictions and labels must have one shape. Received: {shapes[0]} and {shapes[1]}"
            )
        made, wanted = (one.flatten(0, -2).double() for one in (made, wanted))
        self._grow(made.shape[1])
        for number, metrics in enumerate(self.outputs):
            one, true = made[:, number], wanted[:, number]
            if self.ignore is not None:
                kept = true != self.ignore
                one, true = one[kept], true[kept]
            if len(true):
                for metric in {id(m): m for m in metrics.values()}.values():
                    metric.update(one, true)

    def _grow(self, count: int) -> None:
        """Have metrics for `count` outputs."""
        module: Any = library("torchmetrics.regression", "regression")
        while len(self.outputs) < count:
            by_class = {
                name: built(getattr(module, name), self.device).set_dtype(torch.float64)
                for name in dict.fromkeys(CLASSES[measure] for measure in self.measures)
            }
            self.outputs.append({measure: by_class[CLASSES[measure]] for measure in self.measures})

    def compute(self) -> dict[str, float]:
        """Return the mean of each measure over the outputs that have labels."""
        if self.world_size > 1:  # a rank without rows has not seen how many outputs there are
            count = torch.tensor(len(self.outputs), device=self.device)
            torch.distributed.all_reduce(count, torch.distributed.ReduceOp.MAX)
            self._grow(int(count))
        seen: list[dict[str, Any]] = []
        for metrics in self.outputs:
            each = list({id(m): m for m in metrics.values()}.values())
            if merge(each, self.world_size, self.device):
                seen.append(metrics)
        found = {}
        for measure in self.measures:
            values = [value for metrics in seen if (value := _value(measure, metrics[measure])) is not None]
            if values:
                defined = [value for value in values if measure not in CORRELATIONS or not math.isnan(value)]
                found[self.prefix + measure] = math.fsum(defined) / len(defined) if defined else math.nan
        return found


def _value(measure: str, metric: Any) -> float | None:
    """Return a measure of one output, NaN if it is a correlation with a constant, None if r2 has a single label."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The variance of predictions or target", UserWarning)
        try:
            value = float(metric.compute())
        except ValueError:
            if measure == "r2":
                return None
            raise
    return math.sqrt(value) if measure == "rmse" else value


@plugin(
    role="evaluate",
    effect="observes",
    requires=["evaluation"],
    rows="targets",
    companions={"mse": {}, "tokenize?": {"label": None, "keep": ["labels"]}},
)
class Regression:
    """Measure predicted numbers: mse, rmse, mae, r2, pearson, spearman, by torchmetrics, in float64.

    Of several outputs each is measured by itself, and the mean over them is given (scikit-learn's
    "uniform_average"). Spearman's correlation ranks all values, so they are all kept: it is left out unless asked for.
    A correlation with a constant is not defined: such outputs are left out of its mean, which is NaN without others.
    """

    measures: tuple[str, ...] = option(
        ("mse", "rmse", "mae", "r2", "pearson"), help="which of mse, rmse, mae, r2, pearson and spearman"
    )
    ignore: float | None = option(
        float(IGNORE_INDEX), help="label that is passed over (collators pad with -100), or None"
    )
    name: str | None = option(None, help=HELP.replace("NAME_f1", "NAME_mse"))

    @hookimpl
    def assembled(self, run: Run) -> None:
        """Refuse unknown measures and another `regression` with the same names; load the library."""
        problems = [
            Problem(f"regression: there is no measure {name!r}", str(list(self.measures)), nearest(name, CLASSES))
            for name in self.measures
            if name not in CLASSES
        ]
        if problems:
            raise ConfigError(problems)
        refuse_twins(run, self)
        library("torchmetrics.regression", "regression")

    @hookimpl
    def metrics(self, run: Run, split: str) -> list[StreamingRegression]:
        """Return fresh metrics for this evaluation, or nothing where there are no labels to compare with."""
        if split.startswith("predict"):
            return []
        return [StreamingRegression(run.world_size, run.device, self.measures, self.ignore, prefix(run, self))]
