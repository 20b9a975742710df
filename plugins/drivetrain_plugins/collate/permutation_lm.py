"""Permutation language modelling: predict spans in a random order of factorisation."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import attrs
import torch

from drivetrain import hookimpl, option, plugin
from drivetrain_plugins.collate._masking import (
    Batch,
    TokenPadding,
    look_up,
    needed_token,
    special_table,
)
from drivetrain_plugins.collate._padding import IGNORED, LABELS, processor_unless_given, tokenizer_of

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from drivetrain import Run
    from drivetrain_plugins.collate._masking import Array

NAME = "permutation-lm"


@attrs.frozen(eq=False)
class PermutationLMCollator:
    """Pad token rows to an even length and draw spans and orders; picklable, so workers can use it."""

    padding: TokenPadding
    mask_id: int
    special: Array  # bool (V,)
    probability: float
    max_span: int
    stream = NAME

    def __call__(self, rows: Sequence[Any], generator: torch.Generator) -> Batch:
        """Return "input_ids" and "labels" (B, L), "perm_mask" and "target_mapping" float32 (B, L, L), and the mask."""
        batch = self.padding(rows, self.padding.ids(rows), leave=("offset_mapping", "word_ids", *LABELS))
        ids = batch["input_ids"]
        given = batch.pop("special_tokens_mask", None)
        special = torch.from_numpy(look_up(self.special, ids, plugin=NAME)) if given is None else given != 0
        ordinary = ~special & (batch["attention_mask"] != 0)
        picked = self.spans(ids.shape, generator) & ordinary
        half = torch.rand(len(ids), ids.shape[1] // 2, generator=generator, dtype=torch.float64).argsort(dim=1)
        batch["perm_mask"] = perm_mask(picked, ordinary, half)
        batch["target_mapping"] = torch.eye(ids.shape[1]).repeat(len(ids), 1, 1)
        batch["input_ids"], batch["labels"] = ids.masked_fill(picked, self.mask_id), ids.masked_fill(~picked, IGNORED)
        return batch

    def spans(self, shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
        """Return which positions lie in a span, bool (B, L).

        A row is cut into contexts, each `1 / probability` times as long as the span in it, which is 1 to `max_span`
        tokens long and anywhere in its context.
        """
        rows, length = shape
        windows = math.ceil(length / int(1 / self.probability))  # as many as there are of the shortest
        spans = torch.randint(1, self.max_span + 1, (rows, windows), generator=generator)
        contexts = (spans / self.probability).long()
        rooms = contexts - spans + 1
        inside = torch.rand(rows, windows, generator=generator, dtype=torch.float64).mul_(rooms).long()
        starts = contexts.cumsum(1) - contexts + inside
        edges = torch.zeros(rows, length + 1, dtype=torch.int64)
        edges.scatter_add_(1, starts.clamp_max(length), torch.ones_like(starts))
        edges.scatter_add_(1, (starts + spans).clamp_max(length), -torch.ones_like(starts))
        return edges.cumsum(1)[:, :length] > 0


def perm_mask(picked: torch.Tensor, ordinary: torch.Tensor, half: torch.Tensor) -> torch.Tensor:
    """Return which position may not see which, float32 (B, L, L): 1 hides the second from the first.

    Args:
        picked: positions to predict, bool (B, L).
        ordinary: positions that hold ordinary tokens, bool (B, L).
        half: an order for each row, int64 (B, L / 2); both halves of a row take it, as the first is reused as memory.
    """
    order = torch.cat([half, half + half.shape[1]], dim=1).masked_fill(ordinary & ~picked, -1)
    return ((order[:, :, None] <= order[:, None, :]) & picked[:, None, :]).float()


@plugin(
    role="collate",
    provides=["padding"],
    rows="sequences",
    companions={"hf-model": {"path": "{kit}/xlnet", "task": "causal-lm"}},
)
class PermutationLM:
    """Predict spans of tokens in a random order of factorisation, for XLNet.

    A batch has "perm_mask", "target_mapping" and "labels" (not shifted) beside ids, attention mask and the rows'
    other fields. Rows are padded to an even length, since the two halves of a row share an order; without a padding
    token they must be equally long and even. Special tokens and padding are never predicted. No span drawn is longer
    than `max_span`, though two may touch. The draws depend on seed, epoch and position only.

    Source: Yang et al. 2019, "XLNet: Generalized Autoregressive Pretraining for Language Understanding".
    """

    tokenizer: Any = option(None, help="the tokenizer, unless a model plugin brings it")
    probability: float = option(1 / 6, gt=0, le=1, help="share of a row's tokens that are predicted")
    max_span: int = option(5, ge=1, help="longest span in tokens")
    multiple: int = option(1, ge=1, help="round the padded length up to a multiple of this many tokens (and of 2)")

    requires = processor_unless_given

    @hookimpl
    def build_collator(self, run: Run) -> Callable[..., Any]:
        """Take padding, mask token and special ids from the tokenizer; say that labels are not shifted."""
        tokenizer = tokenizer_of(self.tokenizer, run)
        run.shifted_labels = False  # the target mapping puts each prediction at its own token
        return PermutationLMCollator(
            TokenPadding.of(tokenizer, plugin=NAME, multiple=math.lcm(2, self.multiple)),
            needed_token(tokenizer, "mask", plugin=NAME),
            special_table(tokenizer),
            self.probability,
            self.max_span,
        )
