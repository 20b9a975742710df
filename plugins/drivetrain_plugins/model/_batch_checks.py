"""What a model can take: ids that its embedding has, labels that its head has.

Checked for each batch where it is made. Otherwise it is an IndexError deep inside the model, or on a GPU an assertion
that ends the process some steps later.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import attrs
import torch

from drivetrain import DataError
from drivetrain.data import IGNORE_INDEX

if TYPE_CHECKING:
    from collections.abc import Iterable

IGNORED = IGNORE_INDEX
LANGUAGE = ("causal-lm", "masked-lm", "seq2seq-lm")
CLASSES = ("sequence-classification", "token-classification", "image-classification")


@attrs.frozen
class Below:
    """Refuse a field unless it holds integers from 0 to `count` - 1; `ignored` are passed over."""

    field: str
    count: int
    of: str  # what there are `count` of
    ignored: int | None = None

    def __call__(self, batch: Any) -> None:
        """Look at the smallest and the largest number, of any shape.

        Raises:
            DataError: there is one that the model does not have.
        """
        tensor = _field(batch, self.field)
        if tensor is None:
            return
        what = f"hf-model: field {self.field!r} must hold integers from 0 to {self.count - 1}, as the model has "
        what += f"{self.count} {self.of}"
        if tensor.is_floating_point() or tensor.is_complex():
            raise DataError(f"{what}. Received: {tensor.dtype} {tuple(tensor.shape)}")
        array = tensor.numpy()
        if not array.size or (array.max() < self.count and array.min() >= 0):
            return
        wrong = (array >= self.count) | (array < 0)
        if self.ignored is not None:
            wrong &= array != self.ignored
        if wrong.any():
            raise DataError(f"{what}. Received: {array[wrong].ravel()[:8].tolist()}")


@attrs.frozen
class Labels:
    """Refuse class labels that are no ids of the head's classes.

    Rows of floats, one for each class, are left to a loss of several labels, or of probabilities.
    """

    below: Below

    def __call__(self, batch: Any) -> None:
        """Look at the labels (B,), (B, L) or (B, C).

        Raises:
            DataError: one is no class, or a float.
        """
        tensor = _field(batch, self.below.field)
        if tensor is None or (tensor.is_floating_point() and tensor.ndim > 1 and tensor.shape[-1] == self.below.count):
            return
        self.below(batch)


@attrs.frozen
class Choice:
    """Refuse a label that names no choice of its row: `input_ids` (B, choices, L), `labels` (B,)."""

    def __call__(self, batch: Any) -> None:
        """Compare the labels with the number of choices.

        Raises:
            DataError: there are fewer choices.
        """
        ids = _field(batch, "input_ids")
        if ids is not None and ids.ndim > 1:
            Below("labels", ids.shape[1], "choices", IGNORED)(batch)


@attrs.frozen
class Tensors:
    """Refuse a batch with values that a model's forward cannot take, such as lists and strings."""

    def __call__(self, batch: Any) -> None:
        """Look at each value of a batch that is a mapping.

        Raises:
            DataError: one is neither a tensor nor a plain number (packing tells the longest row as one).
        """
        if not hasattr(batch, "items"):
            return
        for name, value in batch.items():
            if value is not None and not isinstance(value, (torch.Tensor, int, float)):
                received = f"{type(value).__name__} {value!r}"[:100]
                do = "Let the collator make a tensor of it or leave it out"
                raise DataError(f"hf-model: field {name!r} of a batch must be a tensor. {do}. Received: {received}")


def _field(batch: Any, name: str) -> torch.Tensor | None:
    found = batch.get(name) if hasattr(batch, "get") else None
    return found if isinstance(found, torch.Tensor) else None


def checks_for(model: Any, task: str) -> list[Any]:
    """Return the checks of a model's inputs, and of the labels of its task."""
    config = model.config
    checks: list[Any] = [Tensors()]
    sizes = dict(_vocabularies(model))
    checks += [Below(field, count, "token ids") for field, count in sizes.items()]
    types = getattr(config, "type_vocab_size", None)
    if types and "input_ids" in sizes:
        checks.append(Below("token_type_ids", types, "token types"))
    if task in LANGUAGE:
        head = model.get_output_embeddings()
        count = getattr(head, "out_features", None) or sizes.get("decoder_input_ids") or sizes.get("input_ids")
        if count:
            checks.append(Below("labels", count, "token ids", IGNORED))
    several = getattr(config, "problem_type", None) in ("regression", "multi_label_classification")
    if task in CLASSES and config.num_labels > 1 and not several:
        checks.append(Labels(Below("labels", config.num_labels, "labels", IGNORED)))
    if task == "multiple-choice":
        checks.append(Choice())
    return checks


def _vocabularies(model: Any) -> Iterable[tuple[str, int]]:
    """Yield the fields with token ids, and how many ids the model has."""
    try:
        embedding = model.get_input_embeddings()
    except (NotImplementedError, AttributeError):
        return
    if not isinstance(embedding, torch.nn.Embedding):
        return
    yield "input_ids", embedding.num_embeddings
    config = model.config
    if getattr(config, "is_encoder_decoder", False):
        yield "decoder_input_ids", getattr(getattr(config, "decoder", None), "vocab_size", embedding.num_embeddings)
