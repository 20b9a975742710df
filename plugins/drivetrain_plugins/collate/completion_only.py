"""Next-token prediction of the answers only: prompts are read, and not learnt."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import attrs
import numpy as np

from drivetrain import ConfigError, DataError, Problem, hookimpl, option, plugin
from drivetrain_plugins.collate._masking import AUXILIARY, Batch, TokenPadding, joined
from drivetrain_plugins.collate._padding import IGNORED, column, fields, padded, processor_unless_given, tokenizer_of
from drivetrain_plugins.shared.table import Ragged

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from drivetrain import Run
    from drivetrain_plugins.collate._masking import Array

NAME = "completion-only"
MASKS = ("completion_mask", "assistant_masks")


@attrs.frozen(eq=False)
class CompletionOnlyCollator:
    """Pad token rows and label what was answered; picklable, so workers can use it."""

    padding: TokenPadding
    mask: str | None
    prompt: str
    completion: str
    template: tuple[int, ...]
    until: tuple[int, ...]

    def __call__(self, rows: Sequence[Any]) -> Batch:
        """Return "input_ids", "attention_mask" and "labels", int64 (B, L): -100 on prompts and padding; not shifted."""
        names = fields(rows, plugin=NAME)
        if not self.template and self.prompt in names and self.completion in names:
            parts = self.padding.ids(rows, self.prompt), self.padding.ids(rows, self.completion)
            ids = joined(parts)
            answered = joined([Ragged(np.full(len(p.values), n), p.offsets) for n, p in enumerate(parts)])
            leave = [name for name in names if isinstance(column(rows, name, plugin=NAME), Ragged)]
        else:
            ids = self.padding.ids(rows)
            answered, leave = self._answered(rows, ids, names), [*AUXILIARY, *MASKS, self.mask or MASKS[0]]
        batch = self.padding(rows, ids, leave=leave)
        wanted = padded(answered, 0, multiple=self.padding.multiple, side=self.padding.side)
        labels = batch.get("labels", batch["input_ids"])
        batch["labels"] = labels.masked_fill((wanted == 0) | (batch["attention_mask"] == 0), IGNORED)
        return batch

    def _answered(self, rows: Sequence[Any], ids: Ragged, names: Sequence[str]) -> Ragged:
        """Return 1 for each token that was answered, else 0."""
        if self.template:
            return Ragged(find_answers(ids, self.template, self.until).astype(np.int64), ids.offsets)
        known = [name for name in ((self.mask,) if self.mask else MASKS) if name in names]
        if not known:
            raise DataError(
                f"{NAME}: nothing tells prompt and completion apart: a row needs {self.mask or ' or '.join(MASKS)}, or "
                f"{self.prompt!r} and {self.completion!r} (token ids), or the plugin a template. "
                f"Received: rows with {sorted(names)}"
            )
        mask = column(rows, known[0], plugin=NAME)
        if not isinstance(mask, Ragged) or not np.array_equal(mask.lengths, ids.lengths):
            raise DataError(f"{NAME}: field {known[0]!r} must hold a number for each token. Received: {mask!r:.200}")
        return mask


def find_answers(ids: Ragged, template: Sequence[int], until: Sequence[int] = ()) -> Array:
    """Return which tokens were answered, bool (sum of lengths,).

    Without `until`: all that follow the last `template` of their row. With it: all from each `template` to the next
    `until`, or the row's end.

    Raises:
        DataError: a row lacks the template.
    """
    begins = _find(ids, template)
    rows = np.searchsorted(ids.offsets, begins, side="right") - 1
    missing = np.setdiff1d(np.arange(len(ids)), rows)
    if len(missing):
        received = ids[int(missing[0])].tolist()
        raise DataError(f"{NAME}: a row has no template {list(template)}. Received: {received}"[:300])
    if not until:  # the last of each row
        last = np.append(np.diff(rows) > 0, [True] * bool(len(rows)))
        begins, rows = begins[last], rows[last]
    place = np.arange(len(ids.values))
    opened, closed = np.full(len(place) + 1, -1), np.full(len(place) + 1, -1)
    answers = begins + len(template)
    inside = answers < ids.offsets[rows + 1]  # a template may end its row
    opened[answers[inside]] = answers[inside]
    closed[ids.offsets[:-1]] = ids.offsets[:-1]
    ended = _find(ids, until) if until else closed[:0]
    closed[ended] = ended
    found: Array = np.maximum.accumulate(opened[:-1]) > np.maximum.accumulate(closed[:-1])
    return found


def _find(ids: Ragged, wanted: Sequence[int]) -> Array:
    """Return where `wanted` begins in the values, within one row, ascending."""
    values, size = ids.values, len(wanted)
    room = max(0, len(values) - size + 1)
    same = np.ones(room, bool)
    for offset, token in enumerate(wanted):
        same &= values[offset : offset + room] == token
    begins = np.flatnonzero(same)
    rows = np.searchsorted(ids.offsets, begins, side="right") - 1
    found: Array = begins[begins + size <= ids.offsets[rows + 1]]
    return found


@plugin(
    role="collate",
    provides=["padding"],
    rows="completions",
    companions={"hf-model": {"path": "{kit}/causal", "task": "causal-lm"}, "causal-lm-loss": {}},
)
class CompletionOnly:
    """Learn the answers and not the prompts: labels are -100 outside of completions.

    What was answered is told, in this order, by a `template` (text or token ids, after whose last occurrence the
    answer begins; with `until`, every answer lasts from a template to the next `until`); by the rows' prompt and
    completion as token ids; or by a mask over the rows' tokens, as `chat-template` makes it. A template's text can have
    other ids inside a text than alone: give ids where it has. A row without the template is an error; one whose mask
    is all 0 has no target items. Labels are not shifted: models of transformers and shifted losses do that.
    """

    tokenizer: Any = option(None, help="the tokenizer, unless a model plugin brings it")
    template: Any = option(None, help="what stands before an answer, as text or token ids")
    until: Any = option(None, help="what ends an answer (such as the next question's heading), as text or token ids")
    mask: str | None = option(None, help="field with 1 for each answered token; None: completion_mask, assistant_masks")
    prompt: str = option("prompt_ids", help="field with the prompt's token ids")
    completion: str = option("completion_ids", help="field with the completion's token ids")
    multiple: int = option(1, ge=1, help="round the padded length up to a multiple of this many tokens")
    padding_id: int | None = option(None, ge=0, help="token id to pad with; None takes the tokenizer's padding token")

    requires = processor_unless_given

    @hookimpl
    def build_collator(self, run: Run) -> Callable[..., Any]:
        """Take padding from the tokenizer, and the template's ids."""
        tokenizer = tokenizer_of(self.tokenizer, run)
        template, until = (_ids(getattr(self, name), name, tokenizer) for name in ("template", "until"))
        if until and not template:
            raise ConfigError([Problem(f"{NAME}: `until` ends what a template begins", f"until={self.until!r}")])
        padding = TokenPadding.of(tokenizer, plugin=NAME, multiple=self.multiple, padding_id=self.padding_id)
        return CompletionOnlyCollator(padding, self.mask, self.prompt, self.completion, template, until)


def _ids(given: Any, name: str, tokenizer: Any) -> tuple[int, ...]:
    """Return the token ids of a template."""
    if given is None:
        return ()
    ids = tokenizer(given, add_special_tokens=False)["input_ids"] if isinstance(given, str) else given
    if not isinstance(ids, (list, tuple)) or not ids or not all(type(token) is int for token in ids):
        raise ConfigError([Problem(f"{NAME}: {name} must be text, or a list of token ids, and not empty", repr(given))])
    return tuple(ids)
