"""What the losses share: labels out of a batch, their number, their range, and sums of item losses."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import attrs
import torch

from drivetrain import DataError, TrainingError
from drivetrain.data import IGNORE_INDEX

if TYPE_CHECKING:
    from collections.abc import Generator

    from drivetrain import Micro

IGNORED = IGNORE_INDEX
WITHHOLD = (
    "keep the labels from the model, which would compute its own loss for nothing; False for a model that "
    "needs them, such as an encoder-decoder without decoder_input_ids"
)
HALF = (torch.float16, torch.bfloat16)


def labels_of(batch: Any, field: str, *, plugin: str) -> torch.Tensor:
    """Return the labels: `field` of a mapping, the last part of a tuple.

    Raises:
        DataError: there are none.
    """
    if isinstance(batch, (tuple, list)) and batch:
        found = batch[-1]
    elif hasattr(batch, "keys"):
        found = batch.get(field)
    else:
        found = None
    if isinstance(found, torch.Tensor):
        return found
    received = f"a batch with the fields {list(batch)}" if hasattr(batch, "keys") else type(batch).__name__
    raise DataError(
        f"{plugin}: a batch needs labels, a tensor under {field!r} or the last part of a tuple. Received: {received}. "
        "Name the field with labels=..., or give rows that have it"
    )


def withheld(micro: Micro, *fields: str) -> Generator[None, Any, Any]:
    """Run the inner forward on the batch without `fields` (a tuple without its last part), then put them back."""
    whole = micro.batch
    if fields:
        micro.batch = without(whole, *fields)
    try:
        return (yield)
    finally:
        micro.batch = whole


def without(batch: Any, *fields: str) -> Any:
    """Return the batch without `fields`, or a tuple without its last part."""
    if hasattr(batch, "keys"):
        return {name: batch[name] for name in batch if name not in fields}
    return batch[:-1] if isinstance(batch, (tuple, list)) and len(batch) > 1 else batch


def output_of(outputs: Any, key: str, *, plugin: str) -> torch.Tensor:
    """Return the tensor under `key`; of bare outputs the tensor itself, of a tuple the first part.

    Raises:
        TrainingError: the model returned something else.
    """
    found = outputs
    if hasattr(outputs, "keys"):
        found = outputs.get(key)
    elif isinstance(outputs, (tuple, list)):
        found = outputs[0]
    if isinstance(found, torch.Tensor):
        return found
    received = f"{type(outputs).__name__} {list(outputs) if hasattr(outputs, 'keys') else ''}".rstrip()
    raise TrainingError(
        f"{plugin}: the model's outputs must be a tensor or hold one under {key!r}. Received: {received}"
    )


def scaled(total: torch.Tensor, micro: Micro) -> torch.Tensor:
    """Return a sum of item losses as the micro-batch's share of the step's mean: its mean times `micro.scale`."""
    loss: torch.Tensor = total * (micro.scale / micro.num_items)
    return loss


def aligned(labels: torch.Tensor, ignore: int) -> torch.Tensor:
    """Return labels (..., L) so that position i holds what position i predicts, label i + 1; the last is ignored.

    Moving the labels spares a copy of the logits, which are larger by the size of the vocabulary.
    """
    return torch.nn.functional.pad(labels[..., 1:], (0, 1), value=ignore)


def full(logits: torch.Tensor) -> torch.Tensor:
    """Return half-precision logits as float32, others as they are."""
    return logits.float() if logits.dtype in HALF else logits


def summed_cross_entropy(
    logits: torch.Tensor,
    labels: torch.Tensor,
    *,
    plugin: str,
    shifted: bool = False,
    ignore: int = IGNORED,
    weight: torch.Tensor | None = None,
    smoothing: float = 0.0,
) -> torch.Tensor:
    """Return the sum of the cross-entropies of logits (..., C) and labels (...), 0-dim.

    Raises:
        TrainingError: the shapes do not fit.
        DataError: a label is no class (found on the CPU; `InRange` finds it earlier where it can).
    """
    if logits.shape[:-1] != labels.shape or (shifted and labels.ndim < 2):  # noqa: PLR2004 - rows and tokens
        raise TrainingError(
            f"{plugin}: logits must be (..., C) for labels (...){', with a dimension of tokens' if shifted else ''}. "
            f"Received: logits {tuple(logits.shape)}, labels {tuple(labels.shape)}"
        )
    targets = aligned(labels, ignore) if shifted else labels
    logits = full(logits)
    if weight is not None:
        weight = weight.to(logits)
    try:
        return torch.nn.functional.cross_entropy(
            logits.flatten(0, -2),
            targets.flatten().long(),
            weight,
            ignore_index=ignore,
            reduction="sum",
            label_smoothing=smoothing,
        )
    except IndexError as error:
        raise DataError(f"{plugin}: a label is no class of the {logits.shape[-1]} there are: {error}") from error


@attrs.frozen
class Count:
    """Count the labels of a batch that are not ignored, without the first of each row where they are shifted."""

    plugin: str
    field: str
    ignore: float | None = IGNORED
    shifted: bool = False

    def __call__(self, batch: Any) -> int:
        """Return their number."""
        labels = labels_of(batch, self.field, plugin=self.plugin)
        if self.shifted:
            labels = labels[..., 1:]
        return labels.numel() if self.ignore is None else int(torch.count_nonzero(labels != self.ignore))


@attrs.frozen
class InRange:
    """Refuse a batch with labels that are no classes."""

    plugin: str
    field: str
    ignore: int
    classes: int | None

    def __call__(self, batch: Any) -> None:
        """Check it.

        Raises:
            DataError: a label is no integer, below 0, or not below the number of classes.
        """
        labels = labels_of(batch, self.field, plugin=self.plugin)
        if labels.is_floating_point() or labels.is_complex():
            raise DataError(f"{self.plugin}: labels must be integers, ids of classes. Received: {labels.dtype}")
        wrong = (labels != self.ignore) & (labels < 0)
        if self.classes is not None:
            wrong |= (labels != self.ignore) & (labels >= self.classes)
        if wrong.any():
            below = "" if self.classes is None else f" and below {self.classes}"
            raise DataError(
                f"{self.plugin}: field {self.field!r}: a label must be at least 0{below}, or {self.ignore} to be "
                f"passed over. Received: {labels[wrong][0].item()}"
            )


def number_of_classes(model: Any) -> int | None:
    """Return how many classes the model's logits have, where it says so: transformers models do."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    weight = getattr(head, "weight", None)
    if isinstance(weight, torch.Tensor):
        return int(weight.shape[0])
    named = "Classification" in type(model).__name__ and hasattr(model, "config")
    return getattr(model.config, "num_labels", None) if named else None
