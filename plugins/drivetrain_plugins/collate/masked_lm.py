"""Masked language modelling: predict the tokens that were hidden."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import attrs

from drivetrain import hookimpl, option, plugin
from drivetrain_plugins.collate._masking import Batch, Masking, TokenPadding
from drivetrain_plugins.collate._padding import LABELS, processor_unless_given, tokenizer_of

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import torch

    from drivetrain import Run


@attrs.frozen(eq=False)
class MaskedLMCollator:
    """Pad token rows and mask tokens; picklable, so workers can use it."""

    padding: TokenPadding
    masking: Masking
    stream = "masked-lm"

    def __call__(self, rows: Sequence[Any], generator: torch.Generator) -> Batch:
        """Return "input_ids", "attention_mask" and "labels", int64 (B, L): -100 where nothing is to be predicted."""
        batch = self.padding(rows, self.padding.ids(rows), leave=("offset_mapping", "word_ids", *LABELS))
        picked = self.masking.pick(self.masking.maskable(batch), generator)
        batch.pop("special_tokens_mask", None)
        self.masking.corrupt(batch, picked, generator)
        return batch


@plugin(
    role="collate",
    provides=["padding"],
    rows="sequences",
    companions={"hf-model": {"path": "{kit}/model", "task": "masked-lm"}},
)
class MaskedLM:
    """Hide tokens for the model to predict: BERT's 80 % mask, 10 % random token, 10 % unchanged, or other shares.

    Special tokens (the row's `special_tokens_mask`, else the tokenizer's special ids) and padding are never picked,
    and special tokens are never put in at random. The draws depend on seed, epoch and position only, so that masks
    differ by epoch and rank, and an evaluation masks the same each time. Each token is picked by itself: a
    micro-batch in which none is has no target items, and the loop passes over it. Labels of the rows are left out.

    Source: Devlin et al. 2019, "BERT: Pre-training of Deep Bidirectional Transformers", section 3.1.
    """

    tokenizer: Any = option(None, help="the tokenizer, unless a model plugin brings it")
    probability: float = option(0.15, ge=0, le=1, help="chance of each token to be picked")
    mask: float = option(0.8, ge=0, le=1, help="share of the picked tokens that become the mask token")
    random: float = option(0.1, ge=0, le=1, help="share of the picked tokens that become a random ordinary token")
    multiple: int = option(1, ge=1, help="round the padded length up to a multiple of this many tokens")

    requires = processor_unless_given

    @hookimpl
    def build_collator(self, run: Run) -> Callable[..., Any]:
        """Take padding, mask token and special ids from the tokenizer."""
        tokenizer = tokenizer_of(self.tokenizer, run)
        shares = {"probability": self.probability, "mask": self.mask, "random": self.random}
        return MaskedLMCollator(
            TokenPadding.of(tokenizer, plugin="masked-lm", multiple=self.multiple),
            Masking.of(tokenizer, plugin="masked-lm", **shares),
        )
