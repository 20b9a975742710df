"""Next-token prediction: the labels are the tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import attrs

from drivetrain import hookimpl, option, plugin
from drivetrain_plugins.collate._masking import AUXILIARY, Batch, TokenPadding
from drivetrain_plugins.collate._padding import IGNORED, processor_unless_given, tokenizer_of

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from drivetrain import Run


@attrs.frozen(eq=False)
class CausalLMCollator:
    """Pad token rows and label every token with itself; picklable, so workers can use it."""

    padding: TokenPadding

    def __call__(self, rows: Sequence[Any]) -> Batch:
        """Return "input_ids", "attention_mask" and "labels", int64 (B, L); labels are not shifted."""
        batch = self.padding(rows, self.padding.ids(rows), leave=AUXILIARY)
        labels = batch.get("labels", batch["input_ids"])
        batch["labels"] = labels.masked_fill(batch["attention_mask"] == 0, IGNORED)
        return batch


@plugin(
    role="collate",
    provides=["padding"],
    rows="sequences",
    companions={"hf-model": {"path": "{kit}/causal", "task": "causal-lm"}, "causal-lm-loss": {}},
)
class CausalLM:
    """Pad token rows for next-token prediction: labels are the ids, and -100 on padding only.

    Padding is what the attention mask hides, not whatever has the padding's id: where a tokenizer pads with its end
    of text, the real ends stay targets. Labels are not shifted; models of transformers and shifted losses do that.
    Rows that bring a label for each token keep those; a class label is left out.
    """

    tokenizer: Any = option(None, help="the tokenizer, unless a model plugin brings it")
    multiple: int = option(1, ge=1, help="round the padded length up to a multiple of this many tokens")
    padding_id: int | None = option(None, ge=0, help="token id to pad with; None takes the tokenizer's padding token")

    requires = processor_unless_given

    @hookimpl
    def build_collator(self, run: Run) -> Callable[..., Any]:
        """Take padding id and side from the tokenizer; without one, rows must be equally long."""
        tokenizer = tokenizer_of(self.tokenizer, run)
        padding = TokenPadding.of(tokenizer, plugin="causal-lm", multiple=self.multiple, padding_id=self.padding_id)
        return CausalLMCollator(padding)
