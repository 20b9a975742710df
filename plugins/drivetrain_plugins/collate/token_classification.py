"""Token classification: a label for each token, padded beside the ids."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import attrs
import numpy as np

from drivetrain import DataError, hookimpl, option, plugin
from drivetrain_plugins.collate._padding import (
    IGNORED,
    Padding,
    columns,
    processor_unless_given,
    take_labels,
    tokenizer_of,
)
from drivetrain_plugins.shared.table import Ragged

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import torch

    from drivetrain import Run


@attrs.frozen
class TokenCollator:
    """Pad token rows and their labels to one length; picklable."""

    padding: Padding

    def __call__(self, rows: Sequence[Any]) -> dict[str, torch.Tensor]:
        """Return int64 tensors (B, L); "labels" holds the padding label where there is no token.

        Raises:
            DataError: a row has not one integer label for each of its ids, or makes no batch.
        """
        given = columns(rows, plugin="token-classification")
        name, labels = take_labels(given)
        if labels is not None:
            given["labels"] = _checked(given.get("input_ids"), name, labels)
        return self.padding(given, plugin="token-classification")


def _checked(ids: Any, name: str, labels: Any) -> Ragged:
    """Return `labels` if they fit the ids."""
    if not isinstance(labels, Ragged) or labels.values.dtype.kind != "i":
        kind = f"{labels.values.dtype} values" if isinstance(labels, Ragged) else repr(labels)[:120]
        raise DataError(
            f"token-classification: field {name!r} must hold a list of label ids, one for each token. Received: {kind}"
        )
    if not isinstance(ids, Ragged):
        raise DataError(f"token-classification: rows with {name!r} need a list of 'input_ids'. Received: {ids!r}")
    wrong = np.flatnonzero(labels.lengths != ids.lengths)
    if len(wrong):
        place = int(wrong[0])
        raise DataError(
            f"token-classification: row {place} of the batch has {labels.lengths[place]} labels in {name!r} and "
            f"{ids.lengths[place]} input_ids. Give each token a label; {IGNORED} for those that have none"
        )
    return labels


@plugin(
    role="collate",
    provides=["padding"],
    rows="tagged",
    companions={
        "hf-model": {"path": "{kit}/model", "task": "token-classification"},
        "tokenize?": {"words": "words", "label": "tags"},
    },
)
class TokenClassification:
    """Pad each batch of token rows to its longest, and the labels of the tokens beside them."""

    tokenizer: Any = option(None, help="the tokenizer, unless a model plugin brings it")
    multiple: int = option(1, ge=1, help="round the padded length up to a multiple of this many tokens")
    length: int | None = option(None, ge=1, help="pad every row to this many tokens; None pads to the batch's longest")
    label_padding: int = option(IGNORED, help="label of the padding; -100 is the one that losses pass over")

    requires = processor_unless_given

    @hookimpl
    def build_collator(self, run: Run) -> Callable[..., Any]:
        """Take padding id and side from the run's tokenizer."""
        tokenizer = tokenizer_of(self.tokenizer, run)
        padding = Padding.of(tokenizer, plugin="token-classification", multiple=self.multiple, length=self.length)
        return TokenCollator(attrs.evolve(padding, ignored=self.label_padding))
