"""From text to token ids, once, before training."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import attrs

from drivetrain import DataError, hookimpl, option, plugin

if TYPE_CHECKING:
    from collections.abc import Generator, Sequence

    from drivetrain import Run

BATCH = 1000  # rows given to the tokenizer at once


@attrs.frozen
class Tokenized:
    """Tokenized rows, fetched one by one or many at once."""

    rows: list[dict[str, Any]]

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return one row."""
        return self.rows[index]

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """Return many rows."""
        rows = self.rows
        return [rows[i] for i in indices]


@plugin(role="data", requires=["processor", "padding"], example={"max_length": 16})
class Tokenize:
    """Turn each row's text into token ids with the model's tokenizer, and label names into ids."""

    text: str = option("text", help="field with the text")
    pair: str | None = option(None, help="field with a second text")
    label: str | None = option("label", help="field with the label (an id, a name the model knows, or a float)")
    max_length: int = option(128, ge=1, help="longest row in tokens; longer ones are cut")

    @hookimpl(wrapper=True)
    def build_dataset(self, run: Run, split: str) -> Generator[None, Any, Any]:
        """Tokenize what the data plugin returns."""
        rows = yield
        return None if rows is None else Tokenized(self._tokenize(rows, run, split))

    def _tokenize(self, rows: Any, run: Run, split: str) -> list[dict[str, Any]]:
        names, done = getattr(getattr(run.model, "config", None), "label2id", None) or {}, []
        for start in range(0, len(rows), BATCH):
            part = [rows[i] for i in range(start, min(start + BATCH, len(rows)))]
            texts = self._field(part, self.text, start, split)
            pairs = self._field(part, self.pair, start, split) if self.pair else None
            ids = run.processor(texts, pairs, truncation=True, max_length=self.max_length)
            for offset, row in enumerate(part):
                made = {name: values[offset] for name, values in ids.items()}
                if self.label and self.label in row:
                    made["labels"] = self._label(row[self.label], names, f"{split} row {start + offset}")
                done.append(made)
        return done

    @staticmethod
    def _field(rows: list[dict[str, Any]], field: str, start: int, split: str) -> list[str]:
        for offset, row in enumerate(rows):
            if not isinstance(row.get(field), str):
                got = repr(row[field])[:60] if field in row else f"a row with the fields {sorted(row)}"
                raise DataError(
                    f"tokenize: {split} row {start + offset}: field {field!r} must be text. Received: {got}"
                )
        return [row[field] for row in rows]

    @staticmethod
    def _label(label: Any, names: dict[str, int], where: str) -> Any:
        if isinstance(label, str):
            if label not in names:
                raise DataError(f"tokenize: {where}: the model has no label {label!r}. It has: {sorted(names)}")
            return names[label]
        if len(names) == 1 and isinstance(label, int):  # a single output regresses
            return float(label)
        bad = isinstance(label, int) and names and not 0 <= label < len(names) and label != -100  # noqa: PLR2004
        if label is None or bad:
            raise DataError(f"tokenize: {where}: a label id must be below {len(names)}. Received: {label!r}")
        return label
