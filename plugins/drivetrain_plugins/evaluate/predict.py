"""What the model makes of each row: in memory, and as files."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs
import numpy as np
import torch

from drivetrain import ConfigError, Problem, TrainingError, hookimpl, operation, option, plugin
from drivetrain_plugins.evaluate import _made_texts, _rows_out
from drivetrain_plugins.evaluate._buffer import GrowingBuffer
from drivetrain_plugins.evaluate._followed import Followed
from drivetrain_plugins.evaluate._gather import from_rank_0, gathered
from drivetrain_plugins.evaluate._kinds import KINDS, OWN, as_rows, kept_outputs, kind_of
from drivetrain_plugins.evaluate._names import class_names
from drivetrain_plugins.evaluate._outputs import labels_of
from drivetrain_plugins.shared.causal import shifts_labels

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator, Sequence

    import pluggy

    from drivetrain import Micro, Run

MEGABYTE = 1 << 20
ROWS, LABELS = "rows", "labels"  # keys beside the outputs' own names


class PredictHooks:
    """The hook that `predict` brings."""

    @operation()
    def predict(self, run: Run, split: str) -> Any:
        """Return what the model makes of the rows of `split`, as `Predictions`, on rank 0; every rank calls it."""


@attrs.frozen(eq=False)
class Predictions:
    """What a model made of the rows of a split, in the order of the data."""

    split: str
    kind: str  # what a row becomes in a file, one of KINDS
    outputs: Any  # numpy (N, ...), or such by name where the model has several; of kind "tokens" and "text" ids (N, L)
    labels: Any  # numpy (N, ...), or None where there are none
    metrics: dict[str, float]
    classes: tuple[str, ...] | None  # names by id, where the model has them
    rows: Any  # int64 (N,): the numbers of the rows in the data; those of bad rows are missing
    texts: list[str] | None = None  # of kind "text"


@attrs.define(eq=False)
class Collector:
    """A metric that keeps outputs and labels, with the numbers of their rows."""

    run: Run
    kind: str  # "auto" until the first batch is seen
    followed: Followed
    limit_bytes: int | None
    buffers: dict[str, GrowingBuffer] = attrs.field(factory=dict)
    numbers: list[int] = attrs.field(factory=list)  # of the micro-batches

    def update(self, micro: Micro) -> None:
        """Keep a batch.

        Raises:
            TrainingError: the outputs are not a row for each row of the data.
        """
        number, rows = micro.number, self.followed.pop(micro)
        if number is None or rows is None:  # it was kept before
            return
        if self.kind == "auto":
            self.kind = kind_of(self.run, micro)
            if self.kind == "tokens" and _made_texts.maker(self.run) is not None:
                self.kind = "text"
        if self.kind == "text":
            kept = {"ids": _made_texts.new_tokens(self.run, micro, self.followed.split, number)}
        else:
            kept = kept_outputs(micro, self.kind, shifted=shifts_labels(self.run))
        for name, value in kept.items():
            if len(value) != len(rows):
                do = "take a collator that keeps rows apart (not pack or flatten), or leave `predict` out"
                raise TrainingError(
                    f"predict needs an output for each of the {len(rows)} rows of a batch; {do}. "
                    f"Received: {name!r} {tuple(value.shape)}"
                )
        labels = labels_of(micro.batch)
        if isinstance(labels, torch.Tensor) and labels.ndim and len(labels) == len(rows):
            kept[LABELS] = labels
        kept[ROWS] = rows
        for name, value in kept.items():
            self._buffer(name).append(value)
        self.numbers.append(number)

    def compute(self) -> dict[str, float]:
        """Return nothing: it measures nothing."""
        return {}

    def finish(self) -> dict[str, Any]:
        """Return all ranks' arrays in the order of the data on rank 0, none elsewhere."""
        if self.run.world_size > 1:  # a rank without rows has seen no batch
            kinds: list[str] = [self.kind] * self.run.world_size
            torch.distributed.all_gather_object(kinds, self.kind)
            self.kind = next((kind for kind in kinds if kind != "auto"), self.kind)
        arrays = gathered(self.buffers, self.numbers, self.run, self.limit_bytes)
        if self.run.rank:
            return {}
        if ROWS not in arrays:
            raise TrainingError(f"predict: the {self.followed.split} data gave no rows that can be used")
        rows = arrays[ROWS]
        if len(rows) > 1 and (np.diff(rows) < 0).any():
            order = np.argsort(rows, kind="stable")
            arrays = {name: array[order] for name, array in arrays.items()}
        return arrays

    def _buffer(self, name: str) -> GrowingBuffer:
        return self.buffers.setdefault(name, GrowingBuffer(self.limit_bytes))


@plugin(role="evaluate", effect="observes", requires=["evaluation"])
class Predict:
    """Predict rows, with or without labels, through the evaluation's own pass: `Trainer.predict`, `drivetrain predict`.

    With `to`, a file is written when the run has ended well. A row of it has the row's number in the data, and by kind:
    "class" the name of the likeliest class, its id and its probability; "labels" the names of all whose probability
    reaches `threshold`; "values" the numbers; "tokens" a class for each token; "span" where the answer starts and ends
    (tokens) and the sum of the two logits; "text" what the plugin `generate` makes; "logits" the outputs as they are.
    """

    kind: str = option("auto", choices=["auto", *KINDS], help="what a row becomes; auto: as the model and its loss say")
    threshold: float = option(0.5, ge=0, le=1, help="kind labels: the probability from which a class is named")
    longest: int = option(30, ge=1, help="kind span: tokens of the longest answer")
    to: str | None = option(None, help="file written at the end of the run, .jsonl or .parquet; None for none")
    splits: list[str] = option(factory=list, help="which sets; none: those that start with predict, else with evaluate")
    columns: list[str] = option(factory=list, help="fields of the data's rows to copy into the file")
    data: dict[str, str] = option(
        factory=dict, help='files of rows without labels, .jsonl or .parquet, by set: {"predict" = "new.jsonl"}'
    )
    memory_mb: int | None = option(
        default=None, ge=1, help="outputs in memory, in MB; more go to a temporary file; None for no limit"
    )
    _collector: Collector | None = option(default=None, init=False)
    _raw: dict[str, Any] = option(factory=dict, init=False)  # by split, the rows as they were read

    def __attrs_post_init__(self) -> None:
        """Refuse what no run can do.

        Raises:
            ValueError: a set of `data`, the file's suffix or a column's name cannot be.
        """
        for split in self.data:
            if split != "predict" and not split.startswith("predict/"):
                raise ValueError(f'a set of `data` is named "predict" or "predict/NAME". Received: {split!r}')
        if self.to is not None and Path(self.to).suffix not in _rows_out.SUFFIXES:
            raise ValueError(f"`to` ends with .jsonl or .parquet. Received: {self.to!r}")
        if taken := sorted(set(OWN) & set(self.columns)):
            raise ValueError(f"`columns` names what the predictions are called: {taken}. Rename them in the data")

    @hookimpl
    def add_hooks(self, manager: pluggy.PluginManager) -> None:
        """Bring the hook `predict`."""
        manager.add_hookspecs(PredictHooks)

    @hookimpl(wrapper=True, tryfirst=True)
    def build_model(self, run: Run) -> Generator[None, Any, Any]:
        """Announce the sets of `data`, before the sets are built."""
        run.facts["splits"] = [*run.facts.get("splits", ()), *self.data]
        self._raw = {}
        return (yield)

    @hookimpl(wrapper=True, trylast=True)  # innermost: what tokenizes and maps rows does so with these, too
    def build_dataset(self, run: Run, split: str) -> Generator[None, Any, Any]:  # noqa: ARG002
        """Bring the rows of `data`, and keep those of which columns are copied."""
        if split in self.data:
            with contextlib.suppress(Exception):  # another source may not know such a set
                yield
            rows: Any = _rows_out.read_rows(self.data[split], "predict")
        else:
            rows = yield
        if self.columns and rows is not None:
            self._raw[split] = rows
        return rows

    @hookimpl
    def assembled(self, run: Run) -> None:
        """Forget the run before, and refuse sets, columns and files that cannot be.

        Raises:
            ConfigError: there is no such set or column, or the file cannot be written.
        """
        self._collector = None
        if self.to is None:
            return
        to = self.to
        for split in self.chosen(run):
            self.check(run, split)
            if self.columns and str(to).endswith(".jsonl"):  # now, and not after training
                value = _columns_of(run, split, self.columns, self._raw)
                _rows_out.as_json({name: value(0, name) for name in self.columns})
        from_rank_0(run, "predict", lambda: _rows_out.probe(to, "predict"))

    @hookimpl(wrapper=True, trylast=True)  # inside of who puts averages into the model; hooks are still open
    def fit(self, run: Run) -> Generator[None, Any, Any]:
        """Write the file when the run has ended well."""
        result = yield
        if self.to is not None:
            self.write(run, self.chosen(run), self.to)
        return result

    @hookimpl
    def metrics(self) -> list[Collector]:
        """Return what keeps the outputs, while it predicts."""
        return [] if self._collector is None else [self._collector]

    @hookimpl
    def predict(self, run: Run, split: str) -> Predictions | None:
        """Evaluate `split`, keeping outputs and labels; nothing is logged. None on ranks other than 0.

        Raises:
            ConfigError: there is no such set.
        """
        self.check(run, split)
        limit = None if self.memory_mb is None else self.memory_mb * MEGABYTE
        batches = run.batches[split]
        followed = Followed(run, split, batches)
        collector = self._collector = followed.collector = Collector(run, self.kind, followed, limit)
        run.batches[split] = followed  # type: ignore[assignment]  # of a stream's length nobody knows
        try:
            with _alone(run, collector) if split.startswith("predict") else contextlib.nullcontext():
                metrics = run.hooks.evaluate(run, split)
        finally:
            self._collector, run.batches[split] = None, batches
        arrays = collector.finish()
        if run.rank:
            return None
        rows, labels = arrays.pop(ROWS), arrays.pop(LABELS, None)
        outputs = next(iter(arrays.values())) if len(arrays) == 1 else arrays
        texts = _made_texts.texts(run, outputs) if collector.kind == "text" else None
        classes = tuple(class_names(run)) or None
        return Predictions(split, collector.kind, outputs, labels, metrics, classes, rows, texts)

    # --- files, of the run's end and of the command --------------------------------------------------------------

    def chosen(self, run: Run) -> list[str]:
        """Return the sets to predict."""
        unlabelled = [split for split in run.batches if split.startswith("predict")]
        return self.splits or unlabelled or [split for split in run.batches if split.startswith("evaluate")]

    def check(self, run: Run, split: str) -> None:
        """Refuse a set that is not there, and columns that its rows do not have.

        Raises:
            ConfigError: those there are, are named.
        """
        if split not in run.batches:
            do = f"name one of {sorted(run.batches)}"
            raise ConfigError([Problem(f"predict: there is no split {split!r}", f"sets: {sorted(run.batches)}", do)])
        if self.columns:
            _columns_of(run, split, self.columns, self._raw)

    def write(self, run: Run, splits: Sequence[str], path: str | Path) -> int:
        """Predict `splits` and write the rows to `path`; return their number. Every rank calls it, rank 0 writes."""
        with _rows_out.RowsFile(path) if run.rank == 0 else contextlib.nullcontext() as file:
            made = [run.hooks.predict(run, split) for split in splits]  # type: ignore[attr-defined]
            return 0 if file is None else file.write(lambda: _rows_out.grouped(self.table(run, made)))

    def table(self, run: Run, made: Sequence[Predictions]) -> Iterator[dict[str, Any]]:
        """Yield the rows of a file: the number, the copied columns, the prediction."""
        for predictions in made:
            columns = _columns_of(run, predictions.split, self.columns, self._raw)
            named = {"split": predictions.split} if len(made) > 1 else {}
            for number, row in as_rows(predictions, self.threshold, self.longest):
                yield {"row": number, **named, **{name: columns(number, name) for name in self.columns}, **row}


@contextlib.contextmanager
def _alone(run: Run, collector: Collector) -> Iterator[None]:
    """Ask no other plugin for its metrics: a set without labels has nothing that they could measure."""
    hooks: Any = run.hooks
    asked = hooks.metrics
    hooks.metrics = lambda *_: [[collector]]
    try:
        yield
    finally:
        hooks.metrics = asked


def _columns_of(run: Run, split: str, wanted: Sequence[str], raw: dict[str, Any]) -> Any:
    """Return a function from a row's number and a column to the value: as it was read, or as it is now.

    Raises:
        ConfigError: the rows have no such column, or cannot be asked for it.
    """
    if not wanted:
        return None
    rows = run.datasets[split]
    if hasattr(rows, "open"):
        do = "leave `columns` out, or read the data into memory"
        raise ConfigError([Problem(f"predict: the {split} data is a stream, whose rows are gone", str(wanted), do)])
    sources = [rows]
    if len(before := raw.get(split, ())) == len(rows):  # no row was left out between: the numbers are the same
        sources.insert(0, before)
    homes = {name: source for source in reversed(sources) for name in _names(source)}
    if missing := [name for name in wanted if name not in homes]:
        do = "name columns that the rows have; tokenize keeps those in its `keep`"
        what = f"predict: the {split} rows have no column {', '.join(map(repr, missing))}"
        raise ConfigError([Problem(what, f"columns: {sorted(homes)}", do)])
    return lambda number, name: _value(homes[name], number, name)


def _names(rows: Any) -> list[str]:
    columns = getattr(rows, "columns", None)
    if isinstance(columns, dict):
        return list(columns)
    first = rows[0] if len(rows) else {}
    return list(first) if hasattr(first, "keys") else []


def _value(rows: Any, number: int, name: str) -> Any:
    columns = getattr(rows, "columns", None)
    return columns[name][number] if isinstance(columns, dict) else rows[number].get(name)
