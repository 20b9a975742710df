"""From text to token ids, once, before training; of a stream, block by block."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs

from drivetrain import ConfigError, hookimpl, option, plugin
from drivetrain_plugins.data import _token_cache as cache
from drivetrain_plugins.data._encoding import Encoder, Tokenized
from drivetrain_plugins.shared.blocks import Blocks
from drivetrain_plugins.shared.table import Table

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator

    from drivetrain import Run

log = logging.getLogger("drivetrain")
BATCH = 1000  # rows given to the tokenizer at once
BLOCK = 256  # the same of a stream, whose first batch waits for them
PATIENCE_S = 10  # between two lines about how far it is


@plugin(role="data", requires=["processor", "padding"], example={"max_length": 16}, rows="text")
class Tokenize:
    """Turn each row's text into token ids with the model's tokenizer, and label names into ids.

    The ids lie in flat arrays, from which a batch is gathered without Python lists. Rows that cannot be used are named.
    """

    text: str = option("text", help="field with the text")
    pair: str | None = option(None, help="field with a second text")
    label: str | None = option("label", help="field with the label: an id, a name, a float; not read beside `target`")
    max_length: int = option(128, ge=1, help="longest row in tokens; longer ones are cut")
    target: str | None = option(None, help="field with a text whose ids become the labels, for an encoder-decoder")
    target_length: int | None = option(None, ge=1, help="longest target in tokens; None takes max_length")
    words: str | None = option(
        None, help="field with a list of words instead of text; `label` holds a label for each: its first token has it"
    )
    truncation: bool = option(True, help="cut longer rows")
    drop_longer: bool = option(False, help="leave longer rows out instead of cutting them")
    special: bool = option(True, help="add the tokenizer's special tokens")
    keep: list[str] = option(default=(), converter=list, help="other fields that stay in the rows")
    parallel: bool = option(default=True, help="let a fast tokenizer use threads, which are as fast as processes")
    cache: str | None = option(default=None, help="folder that keeps the ids, found again by content; None for none")

    @hookimpl(wrapper=True)
    def build_dataset(self, run: Run, split: str) -> Generator[None, Any, Any]:
        """Tokenize what the data plugin returns."""
        rows = yield
        if rows is None:
            return None
        encoder = self._encoder(run)
        if not hasattr(rows, "open"):
            return self._whole(rows, encoder, run, split)
        if self.cache is not None:
            raise ConfigError("tokenize: a stream is tokenized as it is read, and has no cache. Take `cache` out")
        return Blocks(rows, BLOCK, Tokenized(encoder, split, BLOCK))

    def _encoder(self, run: Run) -> Encoder:
        names = getattr(getattr(run.model, "config", None), "label2id", None) or {}
        own = {field.name for field in attrs.fields(Encoder)} - {"tokenizer", "names", "keep"}
        options = {name: getattr(self, name) for name in own}
        return Encoder(tokenizer=run.processor, names=dict(names), keep=tuple(self.keep), **options)

    def _whole(self, rows: Any, encoder: Encoder, run: Run, split: str) -> Table:
        """Return the rows as columns of ids, from the cache if they are there.

        Raises:
            ConfigError: no row is left, as all are longer than `max_length`.
        """
        file = None
        kept = None
        if self.cache is not None:
            file = Path(self.cache).expanduser() / f"{cache.key(encoder, _parts(rows, encoder))}.safetensors"
            kept = cache.load(file)
        if kept is None:
            kept = _encoded(rows, encoder, run, split)
            if file is not None:
                cache.save(file, kept)
        else:
            log.info("tokenize: %s: %d rows from %s", split, 0 if kept.table is None else len(kept.table), file)
            for number, why in kept.bad:
                run.hooks.bad_row(run, f"tokenize: {split} row {number}: {why}")
        if kept.dropped:
            log.info(
                "tokenize: %s: %d rows are longer than %d tokens and left out", split, kept.dropped, self.max_length
            )
        if kept.table is None:
            reason = f"{kept.dropped} are longer than max_length={self.max_length}, {len(kept.bad)} cannot be used"
            raise ConfigError(f"tokenize: no row of the {split} data is left, of {len(rows)}: {reason}")
        return kept.table


def _parts(rows: Any, encoder: Encoder) -> Iterator[list[Any]]:
    """Yield the rows in parts; of columns only those that are read."""
    if isinstance(rows, Table):
        read = {name: rows.columns[name] for name in encoder.fields if name in rows.columns}
        rows = Table(read) if read else rows
    whole = getattr(rows, "__getitems__", None)
    for start in range(0, len(rows), BATCH):
        numbers = range(start, min(start + BATCH, len(rows)))
        yield list(whole(list(numbers))) if whole is not None else [rows[i] for i in numbers]


def _encoded(rows: Any, encoder: Encoder, run: Run, split: str) -> cache.Kept:
    tables: list[Table] = []
    bad: list[tuple[int, str]] = []
    done = dropped = 0
    labelled: bool | None = None
    told = time.monotonic()
    for part in _parts(rows, encoder):
        labelled = encoder.labelled(part) if labelled is None else labelled
        encoded = encoder(part, labelled=labelled)
        for place, why in encoded.bad:
            bad.append((done + place, why))
            run.hooks.bad_row(run, f"tokenize: {split} row {done + place}: {why}")
        if encoded.table is not None:
            tables.append(encoded.table)
        done, dropped = done + len(part), dropped + encoded.dropped
        if time.monotonic() - told > PATIENCE_S:
            told = time.monotonic()
            log.info("tokenize: %s: %d of %d rows", split, done, len(rows))
    return cache.Kept(Table.concat(tables) if tables else None, bad, dropped)
