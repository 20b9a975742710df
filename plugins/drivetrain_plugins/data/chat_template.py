"""From conversations to token ids, by the tokenizer's own chat template."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import attrs
import numpy as np
import torch

from drivetrain import BadRow, ConfigError, DataError, Iterated, Problem, hookimpl, option, plugin, require
from drivetrain_plugins.shared.blocks import Blocks
from drivetrain_plugins.shared.table import Table

if TYPE_CHECKING:
    from collections.abc import Generator, Sequence

    from drivetrain import Run

    Array = np.ndarray[Any, Any]

NAME = "chat-template"
BATCH = 1000  # conversations given to the tokenizer at once
MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")


@attrs.frozen
class Rendered:
    """A conversation as text, and which characters were answered: spans (begin, end)."""

    text: str
    answers: tuple[tuple[int, int], ...] | None = None  # of the assistant
    completion: int | None = None  # where it begins


@attrs.frozen(eq=False)
class Conversations:
    """Turns rows into token rows; picklable, so workers can use it on a stream."""

    tokenizer: Any
    template: str
    messages: str
    prompt: str
    completion: str
    tools: str
    max_length: int
    answers: bool
    split: str

    def __call__(self, rows: Sequence[Any], first: int) -> list[Any]:
        """Return a token row, or a `BadRow`, for each of `rows`, the first of which has number `first`."""
        made: list[Any] = []
        for number, row in enumerate(rows, first):
            try:
                made.append(row if isinstance(row, BadRow) else self.render(row))
            except DataError as error:
                made.append(BadRow(f"{NAME}: {self.split} row {number}: {error}"))
        good = [place for place, each in enumerate(made) if isinstance(each, Rendered)]
        for place, row in zip(good, self._tokenized([made[place] for place in good]), strict=True):
            made[place] = row
        return made

    def block(self, rows: list[Any], epoch: int, block: int) -> list[Any]:  # noqa: ARG002 - the same in every epoch
        """Return what a block of a stream becomes."""
        return self(rows, block * BATCH)

    def render(self, row: Any) -> Rendered:
        """Return the row's conversation as text.

        Raises:
            DataError: the row has none, a message lacks role or content, or the template refuses it.
        """
        if not hasattr(row, "keys"):
            raise DataError(f"a row must be a mapping of fields. Received: {type(row).__name__}")
        tools = row.get(self.tools)
        if self.messages in row:
            text, answers = self._text(_checked(row[self.messages], self.messages), tools)
            return Rendered(text, answers)
        if self.prompt not in row or self.completion not in row:
            raise DataError(
                f"a row needs {self.messages!r}, or {self.prompt!r} and {self.completion!r}. "
                f"Received: a row with the fields {sorted(row)}"
            )
        asked = _messages(row[self.prompt], self.prompt, "user")
        text, answers = self._text([*asked, *_messages(row[self.completion], self.completion, "assistant")], tools)
        head, _ = self._text(asked, tools, begin=True)
        if not text.startswith(head):
            raise DataError(
                "the template renders the prompt otherwise when an answer follows, so that nothing tells them apart. "
                f"Received: {head[-60:]!r}. Use {self.messages!r} instead"
            )
        return Rendered(text, answers, len(head))

    def _text(
        self, messages: list[Any], tools: Any, *, begin: bool = False
    ) -> tuple[str, tuple[tuple[int, int], ...] | None]:
        try:
            if not self.answers or begin:
                text = self.tokenizer.apply_chat_template(
                    messages,
                    tools=tools,
                    chat_template=self.template,
                    tokenize=False,
                    add_generation_prompt=begin,
                )
                return text, None
            library = require("transformers.utils.chat_template_utils", extra="hf", plugin=NAME)
            texts, spans = library.render_jinja_template(
                [messages],
                tools=tools,
                chat_template=self.template,
                return_assistant_tokens_mask=True,
                **self.tokenizer.special_tokens_map,
            )
        except Exception as error:  # templates raise what they like: jinja's errors, and Python's
            raise DataError(f"the chat template refuses it: {type(error).__name__}: {error}") from error
        return texts[0], tuple(spans[0])

    def _tokenized(self, rendered: list[Rendered]) -> list[dict[str, Any]]:
        if not rendered:
            return []
        spans = self.answers or any(each.completion is not None for each in rendered)
        made = self.tokenizer(
            [each.text for each in rendered],
            add_special_tokens=False,
            truncation=True,
            max_length=self.max_length,
            return_attention_mask=False,
            return_token_type_ids=False,
            return_offsets_mapping=spans,
        )
        rows: list[dict[str, Any]] = []
        for number, each in enumerate(rendered):
            row: dict[str, Any] = {"input_ids": made["input_ids"][number]}
            places = np.asarray(made["offset_mapping"][number]).reshape(-1, 2) if spans else np.zeros((0, 2))
            if each.answers is not None:
                row["assistant_masks"] = _inside(places, each.answers).tolist()
            if each.completion is not None:
                row["completion_mask"] = _inside(places, ((each.completion, len(each.text)),)).tolist()
            rows.append(row)
        return rows


def _inside(places: Array, spans: Sequence[tuple[int, int]]) -> Array:
    """Return 1 for each token that has a character in one of the spans, int64 (L,)."""
    inside = np.zeros(len(places), np.int64)
    for begin, end in spans:
        inside |= (places[:, 0] < end) & (places[:, 1] > begin) & (places[:, 0] < places[:, 1])
    return inside


def _messages(value: Any, field: str, role: str) -> list[Any]:
    """Return messages; a text is one of `role`."""
    return [{"role": role, "content": value}] if isinstance(value, str) else _checked(value, field)


def _checked(messages: Any, field: str) -> list[Any]:
    if isinstance(messages, str) or not hasattr(messages, "__len__") or not len(messages):
        raise DataError(f"field {field!r} must be a list of messages, and not empty. Received: {messages!r:.80}")
    for number, message in enumerate(messages):
        if not hasattr(message, "keys") or not isinstance(message.get("role"), str):
            raise DataError(f"field {field!r}, message {number}: a message needs a role. Received: {message!r:.80}")
        if message.get("content") is None and not message.get("tool_calls"):
            raise DataError(f"field {field!r}, message {number}: it has no content. Received: {message!r:.80}")
    return list(messages)


@plugin(
    role="data",
    requires=["processor", "padding"],
    example={"max_length": 32},
    companions={"hf-model": {"path": "{kit}/causal", "task": "causal-lm"}, "causal-lm": {}, "causal-lm-loss": {}},
    rows="messages",
)
class ChatTemplate:
    """Turn conversations into token ids with the model's chat template, and tell which tokens were answered.

    A row has `messages` (dicts with role and content), or a `prompt` and a `completion` (texts, or messages), and may
    have `tools`. It becomes "input_ids"; with a prompt also "completion_mask"; with `assistant_masks` also that: 1 for
    what the template marks as the assistant's. `completion-only` reads the masks. A map-style set is made at once and
    kept as columns; a stream is made block by block. A row that cannot be used is told by number and field.
    """

    messages: str = option("messages", help="field with the messages")
    prompt: str = option("prompt", help="field with the prompt, where there are no messages")
    completion: str = option("completion", help="field with the completion")
    tools: str = option("tools", help="field with tool descriptions, where rows have them")
    max_length: int = option(1024, ge=1, help="longest conversation in tokens; longer ones are cut")
    assistant_masks: bool = option(False, help="mark what the assistant said; the template must have generation marks")
    template: str | None = option(None, help="a chat template (Jinja) instead of the tokenizer's own")

    @hookimpl(wrapper=True)
    def build_dataset(self, run: Run, split: str) -> Generator[None, Any, Any]:
        """Make token rows of what the data plugin returns."""
        rows = yield
        if rows is None:
            return None
        make = self._conversations(run.processor, split)
        mapped = hasattr(rows, "__getitem__") and hasattr(rows, "__len__")
        if hasattr(rows, "open"):
            return Blocks(rows, BATCH, make.block)
        if not mapped or isinstance(rows, torch.utils.data.IterableDataset):
            return Blocks(Iterated(rows), BATCH, make.block)
        return self._table(rows, make, run, split)

    def _conversations(self, tokenizer: Any, split: str) -> Conversations:
        """Check at assembly what the template and the tokenizer can do."""
        template, problems = self.template, []
        if template is None:
            try:
                template = tokenizer.get_chat_template()
            except (ValueError, AttributeError) as error:
                do = "take a model with one, or give `template`"
                raise ConfigError([Problem(f"{NAME}: the tokenizer has no chat template", str(error), do)]) from error
        if self.assistant_masks and not MARKS.search(template):
            do = "leave assistant_masks out, or put {% generation %} ... {% endgeneration %} around what is answered"
            problems.append(Problem(f"{NAME}: the chat template does not mark answers", f"{template!r:.80}", do))
        if not getattr(tokenizer, "is_fast", False):
            do = "take a fast tokenizer: only those tell which characters a token has"
            problems.append(Problem(f"{NAME}: the tokenizer is a slow one", type(tokenizer).__name__, do))
        if problems:
            raise ConfigError(problems)
        named = (self.messages, self.prompt, self.completion, self.tools)
        return Conversations(tokenizer, template, *named, self.max_length, self.assistant_masks, split)

    def _table(self, rows: Any, make: Conversations, run: Run, split: str) -> Table:
        kept: list[dict[str, Any]] = []
        for start in range(0, len(rows), BATCH):
            part = [rows[i] for i in range(start, min(start + BATCH, len(rows)))]
            for number, made in enumerate(make(part, start), start):
                bad = made
                if not isinstance(made, BadRow):
                    if not kept or made.keys() == kept[0].keys():
                        kept.append(made)
                        continue
                    kinds = f"all have {self.messages!r}, or all have {self.prompt!r} and {self.completion!r}"
                    bad = BadRow(f"{NAME}: {split} row {number}: it is of another kind than those before: {kinds}")
                run.hooks.bad_row(run, bad.reason)
        if not kept:
            raise DataError(f"{NAME}: the {split} data has no usable row. Received: {len(rows)} rows")
        return Table.of(kept)
