"""Sequence to sequence: sources and targets padded apart, and the decoder's inputs made of the targets."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import attrs
import torch

from drivetrain import ConfigError, DataError, Problem, hookimpl, option, plugin
from drivetrain_plugins.collate._padding import (
    IGNORED,
    Padding,
    columns,
    padded,
    processor_unless_given,
    take_labels,
    tokenizer_of,
)
from drivetrain_plugins.shared.table import Ragged

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from drivetrain import Run

FIRST = 1_000_000_007  # ids of the probe: none is a special token


@attrs.frozen
class Shift:
    """Decoder inputs from labels: one place to the right, -100 made the padding id.

    The first place holds `start`, or each row's last token where `start` is None (mBART's language id).
    """

    start: int | None
    pad: int

    def __call__(self, labels: torch.Tensor) -> torch.Tensor:
        """Return int64 (B, T) for labels (B, T)."""
        shifted = labels.masked_fill(labels == IGNORED, self.pad)
        if not labels.shape[1]:
            return shifted
        if self.start is None:
            last = (shifted != self.pad).sum(1) - 1
            first = shifted.gather(1, (last % labels.shape[1])[:, None])
        else:
            first = shifted.new_full((len(labels), 1), self.start)
        return torch.cat([first, shifted[:, :-1]], dim=1)

    @classmethod
    def of(cls, model: Any) -> Shift | None:
        """Learn from the model's own method what it does; None if it has none.

        Raises:
            ConfigError: the method fails, or does something else than shift.
        """
        method = getattr(model, "prepare_decoder_input_ids_from_labels", None)
        if method is None:
            return None
        blank, ids = IGNORED, range(FIRST, FIRST + 8)
        probe = torch.tensor(
            [
                [ids[0], ids[1], blank, blank, blank],
                [ids[2], ids[3], ids[4], ids[5], ids[6]],
                [blank, blank, ids[7], ids[0], ids[1]],
            ]
        )
        try:
            wanted = method(labels=probe.clone())
            found = cls(int(wanted[0, 0]), int(wanted[0, 3]))
            for made in (found, cls(None, found.pad)):
                if torch.equal(made(probe), wanted):
                    return made
        except Exception as error:  # a model's own code, and configurations that lack an id
            raise _unusable(model, f"{type(error).__name__}: {error}") from error
        raise _unusable(model, f"{wanted.tolist()} for the labels {probe.tolist()}")


def _unusable(model: Any, received: str) -> ConfigError:
    what = f"seq2seq: {type(model).__name__}.prepare_decoder_input_ids_from_labels is no shift of the labels"
    do = "set decoder_start_token_id and pad_token_id in the model's config, or decoder_inputs = false"
    return ConfigError([Problem(what, received, do)])


@attrs.frozen
class Seq2SeqCollator:
    """Pad sources and targets, each to its own longest; picklable, and holds no model."""

    padding: Padding
    label_length: int | None
    shift: Shift | None

    def __call__(self, rows: Sequence[Any]) -> dict[str, torch.Tensor]:
        """Return int64 tensors: sources (B, L), "labels" and "decoder_input_ids" (B, T) where rows have labels.

        Raises:
            DataError: labels are no list of ids, or a row makes no batch.
        """
        given = columns(rows, plugin="seq2seq")
        name, labels = take_labels(given)
        batch = self.padding(given, plugin="seq2seq")
        if labels is None or (isinstance(labels, list) and all(each is None for each in labels)):
            return batch
        if not isinstance(labels, Ragged) or labels.values.dtype.kind != "i":
            received = labels.values if isinstance(labels, Ragged) else labels
            place = next((i for i, each in enumerate(received) if each is None), 0)
            raise DataError(
                f"seq2seq: field {name!r} must hold a list of target ids in every row, but not in row {place} of the "
                f"batch. Received: {repr(received)[:120]}"
            )
        padding = self.padding
        try:
            made = padded(labels, IGNORED, multiple=padding.multiple, side=padding.side, length=self.label_length)
        except DataError as error:
            raise DataError(f"seq2seq: field {name!r}: {error}") from None
        batch["labels"] = made
        if self.shift is not None:
            batch["decoder_input_ids"] = self.shift(made)
        return batch


@plugin(
    role="collate",
    provides=["padding"],
    rows="pairs",
    companions={"hf-model": {"path": "{kit}/seq2seq", "task": "seq2seq-lm"}, "tokenize?": {"target": "target"}},
)
class Seq2Seq:
    """Pad sources with the tokenizer's padding id and targets with -100; make the decoder's inputs."""

    tokenizer: Any = option(None, help="the tokenizer, unless a model plugin brings it")
    multiple: int = option(1, ge=1, help="round both padded lengths up to a multiple of this many tokens")
    length: int | None = option(None, ge=1, help="pad sources to this many tokens; None pads to the batch's longest")
    label_length: int | None = option(None, ge=1, help="pad targets to this many tokens; None pads to the longest")
    decoder_inputs: bool = option(True, help="add decoder_input_ids where the model can make them from labels")

    requires = processor_unless_given

    @hookimpl
    def build_collator(self, run: Run) -> Callable[..., Any]:
        """Take padding id and side from the tokenizer; learn the model's shift, so that workers need no weights."""
        tokenizer = tokenizer_of(self.tokenizer, run)
        padding = Padding.of(tokenizer, plugin="seq2seq", multiple=self.multiple, length=self.length)
        return Seq2SeqCollator(padding, self.label_length, Shift.of(run.model) if self.decoder_inputs else None)
