"""Any metric of torchmetrics."""

from __future__ import annotations

import pkgutil
import re
from typing import TYPE_CHECKING, Any, Literal

import attrs
import torch

from drivetrain import ConfigError, Problem, hookimpl, option, plugin
from drivetrain.data import IGNORE_INDEX
from drivetrain.errors import nearest
from drivetrain.options import import_object
from drivetrain_plugins.evaluate._names import given_name, refuse_twins
from drivetrain_plugins.evaluate._outputs import labels_of, logits_and_labels, output
from drivetrain_plugins.evaluate._torchmetrics import Streamed, built, library
from drivetrain_plugins.shared.causal import shifts_labels

if TYPE_CHECKING:
    from drivetrain import Micro, Run

Inputs = Literal["probabilities", "classes", "logits"]
HALF = 0.5
METRIC = 'module of torchmetrics and class, "classification:MulticlassAUROC", or "package.module:Class" of your own'


def snake(name: str) -> str:
    """Return "multiclass_f1_score" of "MulticlassF1Score"."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name).lower()


@attrs.frozen
class Reader:
    """Read predictions and labels from a batch, without what is passed over."""

    inputs: Inputs
    binary: bool  # two classes are asked for as one number
    shifted: bool

    def __call__(self, micro: Micro) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Return predictions (N, C) or (N,) with classes (N,); or both of one shape, (N, C) or (N,)."""
        made, labels = output(micro.outputs), labels_of(micro.batch)
        if isinstance(made, torch.Tensor) and isinstance(labels, torch.Tensor):
            if made.shape == (*labels.shape, 1):
                made = made.squeeze(-1)
            if made.shape == labels.shape:
                return self._alike(made, labels)
        made, labels = logits_and_labels(micro, "torchmetrics", self.shifted)
        made, labels = made.flatten(0, -2), labels.flatten()
        kept = labels != IGNORE_INDEX
        made, labels = made[kept].float(), labels[kept]
        if not len(labels):
            return None
        if self.inputs == "classes":
            return made.argmax(-1), labels
        if self.binary and made.shape[-1] == 2:  # noqa: PLR2004 - the sigmoid of their difference is the softmax
            made = made[:, 1] - made[:, 0]
            return (made.sigmoid() if self.inputs == "probabilities" else made), labels
        return (made.softmax(-1) if self.inputs == "probabilities" else made), labels

    def _alike(self, made: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Return what is measured of outputs and labels of one shape: numbers as they are, or flags."""
        if made.ndim == 1:
            kept = labels != IGNORE_INDEX
            made, labels = made[kept], labels[kept]
        else:
            made, labels = made.flatten(0, -2), labels.flatten(0, -2)
        if not labels.numel():
            return None
        if self.inputs == "logits":
            return made.float(), labels
        made = made.float().sigmoid()
        return ((made > HALF).long() if self.inputs == "classes" else made), labels.long()


def _name(run: Run, plugin: Any) -> str:
    return given_name(run, plugin) or snake(plugin.metric.rpartition(":")[2].rpartition(".")[2])


@plugin(
    role="evaluate",
    effect="observes",
    requires=["evaluation"],
    conflicts=["chunked-cross-entropy"],
    example={
        "metric": "classification:MulticlassAccuracy",
        "arguments": {"num_classes": 64, "average": "micro"},
        "inputs": "classes",
    },
)
class TorchMetrics:
    """Measure with any metric of torchmetrics that takes predictions and labels.

    Labels of -100 are passed over, and of a causal model the label of the next token is meant. Labels of the logits'
    own shape are flags (their -100 is for the metric's `ignore_index`), or with inputs = "logits" numbers. What gives
    several values is named NAME_0, NAME_1 ...; metrics of texts, boxes and the like take other things than logits.
    """

    metric: str = option(help=METRIC)
    inputs: Inputs = option(
        "probabilities",
        choices=["probabilities", "classes", "logits"],
        help='what it takes: probabilities, the likeliest class, or "logits" as the model gives them (numbers, too)',
    )
    name: str | None = option(None, help="of its number; None takes the label's part after \":\", or else the class's")
    arguments: dict[str, Any] = option(factory=dict, help="keyword arguments of its class")

    @hookimpl
    def assembled(self, run: Run) -> None:
        """Make the metric once, and refuse one that there is not, its arguments, or another one of the same name."""
        self._made(run, validate=True)
        refuse_twins(run, self, _name)

    @hookimpl
    def metrics(self, run: Run, split: str) -> list[Streamed]:
        """Return a fresh metric for this evaluation, or nothing where there are no labels to compare with."""
        if split.startswith("predict"):
            return []
        made = self._made(run)
        reader = Reader(self.inputs, type(made).__name__.startswith("Binary"), shifts_labels(run))
        return [Streamed("torchmetrics", {_name(run, self): made}, reader, run.world_size, run.device)]

    def _made(self, run: Run, *, validate: bool = False) -> Any:
        """Return the metric.

        Raises:
            ConfigError: there is no such metric, or it refuses its arguments.
        """
        found = self._class()
        try:
            made = built(found, run.device, validate=validate, **self.arguments)
        except Exception as error:  # what metrics raise is up to them
            received = f"{self.metric}({', '.join(f'{n}={v!r}' for n, v in self.arguments.items())}): {error}"
            do = "give it what it takes: arguments = {...}"
            raise ConfigError([Problem("torchmetrics: the metric refuses its arguments", received, do)]) from error
        return made

    def _class(self) -> Any:
        """Return the class of the metric."""
        root: Any = library("torchmetrics", "torchmetrics")
        module, colon, name = self.metric.partition(":")
        folders = [one.name for one in pkgutil.iter_modules(root.__path__) if one.ispkg]
        if "." in module and colon:
            found = import_object(self.metric, plugin="torchmetrics")
        elif not colon or module not in folders:
            what = f"torchmetrics: there is no module {module!r}" if colon else f"torchmetrics: a metric is {METRIC}"
            raise ConfigError([Problem(what, repr(self.metric), nearest(module, folders) if colon else "")])
        else:
            there = vars(library(f"torchmetrics.{module}", "torchmetrics"))
            if name not in there:
                classes = [one for one, value in there.items() if isinstance(value, type)]
                what = f"torchmetrics: module {module!r} has no metric {name!r}"
                raise ConfigError([Problem(what, repr(self.metric), nearest(name, classes))])
            found = there[name]
        if not (isinstance(found, type) and issubclass(found, root.Metric)):
            do = "name a subclass of torchmetrics.Metric"
            raise ConfigError([Problem(f"torchmetrics: {self.metric!r} is no metric", f"{found!r}", do)])
        return found
