"""Data that cannot be used: each kind ends in the error that says where it stands and what is wrong, before it trains.

The numbers are those of the catalogue of bad inputs (43 to 64); a stream's, an image's and a shard's own tests are
beside their plugins too.
"""

from __future__ import annotations

import gzip
import json

import attrs
import pytest
import torch
from plugin_helpers import as_rows, columns, net

from drivetrain import CheckpointError, ConfigError, DataError, Trainer, hookimpl, plugin
from drivetrain_plugins import SGD, Checkpoint, HFModel, Jsonl, Loader, Pad, Tokenize
from drivetrain_plugins.data.bad_rows import BadRows

GOOD = {"text": "the red bird sings", "label": 1}
IDS = {"input_ids": [2, 5, 7, 3], "labels": 1}


def lines(*rows):
    """Return the bytes of a JSON-lines file with good rows around `rows`: these begin in line 3, as row 2."""
    return b"\n".join(row if isinstance(row, bytes) else json.dumps(row).encode() for row in (GOOD, GOOD, *rows, GOOD))


@attrs.frozen
class Text:
    """A run that reads and tokenizes files."""

    content: bytes = b""
    file: str = "rows.jsonl"
    more: bytes | None = None  # of a second shard
    tokenize: dict = attrs.field(factory=dict)
    loader: dict = attrs.field(factory=dict)

    def fit(self, bert_folder, folder):
        (folder / self.file).write_bytes(self.content)
        files = [str(folder / self.file)]
        if self.more is not None:
            (folder / "second.jsonl").write_bytes(self.more)
            files.append(str(folder / "second.jsonl"))
        parts = [HFModel(str(bert_folder)), Jsonl(files), Tokenize(**self.tokenize), Pad(), Loader(**self.loader)]
        trainer = Trainer(None, [*parts, SGD(lr=0.1)], epochs=1, device="cpu")
        trainer.fit()
        return trainer.run


@attrs.frozen
class Tokens:
    """A run over rows of token ids, of which row 2 is bad."""

    row: dict
    workers: int = 0
    task: str = "sequence-classification"

    def fit(self, bert_folder, folder):
        parts = [HFModel(str(bert_folder), task=self.task), Pad(), Loader(4, workers=self.workers), SGD(lr=0.1)]
        trainer = Trainer(None, parts, epochs=1, device="cpu")
        trainer.fit([IDS, IDS, self.row, IDS, IDS])
        return trainer.run


@attrs.frozen
class Tensors:
    """A run over a given dataset and a small network."""

    data: object
    plugins: tuple = ()
    settings: dict = attrs.field(factory=lambda: {"epochs": 1})
    loader: dict = attrs.field(factory=dict)

    def fit(self, bert_folder, folder):
        parts = [Loader(**{"batch_size": 4, **self.loader}), SGD(lr=0.1), *self.plugins]
        trainer = Trainer(net(), parts, device="cpu", **self.settings)
        trainer.fit(self.data() if callable(self.data) else self.data)
        return trainer.run


def with_row(number, **fields):
    """Return ten rows, one of them with other values; a value of None takes the field out."""
    rows = as_rows(columns(10))
    rows[number].update(fields)
    rows[number] = {name: value for name, value in rows[number].items() if value is not None}
    return rows


class Lying(list):
    """A set that says it has more rows than it gives."""

    def __len__(self):
        return 12


class TooFew(torch.utils.data.Dataset):
    """A set whose batches lack a row."""

    def __len__(self):
        return 10

    def __getitems__(self, indices):
        return as_rows(columns(10))[: len(indices) - 1]

    def __getitem__(self, index):
        return as_rows(columns(10))[index]


class Stops(TooFew):
    """A set that raises StopIteration, which would end a loop without a word."""

    __getitems__ = None

    def __getitem__(self, index):
        if index == 7:
            raise StopIteration
        return as_rows(columns(10))[index]


class Once:
    """An iterable that gives its rows a first time only."""

    def __init__(self):
        self.left = as_rows(columns(10))

    def __iter__(self):
        while self.left:
            yield self.left.pop()


@plugin(role="collate")
class Collates:
    """Collate by a function."""

    function: object

    @hookimpl
    def build_collator(self, run, split):
        return self.function


def on_a_device(rows):
    return {"features": torch.zeros(len(rows), 6, device="meta"), "labels": torch.zeros(len(rows), dtype=torch.int64)}


def with_gradients(rows):
    return {"features": torch.zeros(len(rows), 6, requires_grad=True), "labels": torch.zeros(len(rows)).long()}


def no_tensors(rows):
    return {name: [row[name] for row in rows] for name in rows[0]}


class RefusesLists(Collates):
    """The check that hf-model contributes."""

    @hookimpl
    def batch_checks(self, run, split):
        from drivetrain_plugins.model._batch_checks import Tensors as AllTensors

        return [AllTensors()]


def damaged():
    packed = bytearray(gzip.compress(lines(GOOD)))
    packed[-6] ^= 0xFF  # in the checksum
    return bytes(packed)


NAN = torch.full((6,), torch.nan)
CASES = {
    "43 missing text": (Text(lines({"label": 1})), DataError, r"train row 2: field 'text'.*\['label'\]"),
    "43 missing ids": (Tokens({"labels": 1}), DataError, r"rows \[.*2.*same fields|train row.*same fields|lacks"),
    "43 missing feature": (Tensors(with_row(2, features=None)), DataError, r"train rows \[.*2.*\] make no batch: stack: .*same fields.*\('features', 'labels'\), \('labels',\)"),
    "44 null text": (Text(lines({"text": None, "label": 1})), DataError, r"train row 2: field 'text'.*None"),
    "44 null label": (Text(lines({"text": "a", "label": None})), DataError, r"train row 2: .*label.*None"),
    "45 number for text": (Text(lines({"text": 5, "label": 1})), DataError, r"train row 2: field 'text'.*5"),
    "45 list for label": (Text(lines({"text": "a", "label": [1]})), DataError, r"train row.*\b2\b.*'labels'"),
    "45 text for ids": (Tokens({**IDS, "input_ids": ["a", "b"]}), DataError, r"train row 2: .*'input_ids'"),
    "48 UTF-8": (Text(lines(b'{"text": "\xff"}')), DataError, r"rows.jsonl:3: not JSON in UTF-8.*0xff"),
    "48 surrogate": (Text(lines(b'{"text": "\\ud800"}')), DataError, r"rows.jsonl:3: .*surrogate"),
    "48 NUL": (Text(lines(b'{"text": "a\\u0000"}')), DataError, r"rows.jsonl:3: .*NUL"),
    "49 id of no token": (Tokens({**IDS, "input_ids": [2, 64, 3]}), DataError, r"train row 2: hf-model: field 'input_ids' must hold integers from 0 to 63.*\[64\]"),
    "49 in a worker": (Tokens({**IDS, "input_ids": [2, 64, 3]}, 1), DataError, r"train row 2: hf-model: field 'input_ids'.*\[64\]"),
    "49 negative id": (Tokens({**IDS, "input_ids": [2, -1, 3]}), DataError, r"train row 2: hf-model: field 'input_ids'.*\[-1\]"),
    "49 token type": (Tokens({**IDS, "token_type_ids": [0, 0, 2, 0]}), DataError, "token_type_ids|same fields"),
    "49 label of no token": (Tokens({"input_ids": [2, 5, 3], "labels": [2, 99, 3]}, task="masked-lm"), DataError, "labels"),
    "50 label out of range": (Tokens({**IDS, "labels": 3}), DataError, r"train row 2: hf-model: field 'labels' must hold integers from 0 to 2, as the model has 3 labels.*\[3\]"),
    "50 negative label": (Tokens({**IDS, "labels": -1}), DataError, r"train row 2: hf-model: field 'labels'.*\[-1\]"),
    "50 float label": (Tokens({**IDS, "labels": 0.5}), DataError, r"train row.*hf-model: field 'labels'.*float"),
    "50 label name": (Text(lines({"text": "a", "label": "bird"})), DataError, r"train row 2: .*no label 'bird'.*LABEL_0"),
    "51 ragged rows": (Tensors(with_row(2, features=torch.zeros(5))), DataError, r"train rows \[.*\] make no batch.*equal size"),
    "51 ragged fields": (Tokens({**IDS, "attention_mask": [1, 1]}), DataError, r"attention_mask|same fields"),
    "52 NaN": (Tensors(with_row(2, features=NAN), (BadRows(),)), DataError, r"train row 2: field 'features' holds NaN"),
    "52 infinity": (Tensors(with_row(2, features=-NAN * torch.inf), (BadRows(),)), DataError, "train row 2: field 'features'"),
    "53 no rows": (Tensors([]), ConfigError, "the train data has no rows"),
    "53 no lines": (Text(b"\n\n"), ConfigError, "no row of the train data is left, of 0"),
    "53 less than a batch": (Tensors(as_rows(columns(3)), loader={"drop_last": True}), ConfigError, "3 rows, fewer than one batch, and drop_last"),
    "54 all too long": (Text(lines(GOOD), tokenize={"max_length": 2, "drop_longer": True}), ConfigError, r"no row of the train data is left, of 4: 4 are longer than max_length=2"),
    "56 cut": (Text(lines(GOOD)[:-8]), DataError, r"rows.jsonl:4: not JSON"),
    "57 other schema": (Text(lines(GOOD), more=b'{"sentence": "the bird", "label": 1}'), DataError, r"row 4: field 'text'.*sentence"),
    "57 other label": (Text(lines(GOOD), more=b'{"text": "the bird", "label": "blue"}'), DataError, r"row 4: .*'blue'"),
    "59 nothing": (Tensors(lambda: torch.utils.data.ChainDataset([]), settings={"steps": 2}), DataError, "train stream gave no rows in epoch 0"),
    "59 once": (Tensors(Once, settings={"steps": 9}), DataError, "train stream gave no rows in epoch 1"),
    "59 an iterator": (Tensors(lambda: iter(as_rows(columns(10))), settings={"steps": 2}), ConfigError, "that can be started again"),
    "60 on a device": (Tensors(as_rows(columns(10)), (Collates(on_a_device),)), DataError, r"loader: field 'features'.*Collate on the CPU.*meta"),
    "60 gradients": (Tensors(as_rows(columns(10)), (Collates(with_gradients),)), DataError, r"loader: field 'features'.*requires_grad=True"),
    "60 no tensors": (Tensors(as_rows(columns(10)), (RefusesLists(no_tensors),)), DataError, r"field 'features' of a batch must be a tensor.*list"),
    "62 checksum": (Text(damaged(), file="rows.jsonl.gz"), DataError, r"rows.jsonl.gz: cannot be read: .*CRC"),
    "63 too many rows promised": (Tensors(Lying(as_rows(columns(10)))), DataError, r"train row 1[01]: IndexError"),
    "63 too few in a batch": (Tensors(TooFew()), DataError, r"train rows \[.*\]: TooFew.__getitems__ returned 3 rows for 4"),
    "64 StopIteration": (Tensors(Stops()), DataError, "train row 7: StopIteration"),
    "64 in a worker": (Tensors(Stops(), loader={"workers": 1}), DataError, "train row 7: StopIteration"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_bad_data_is_refused(case, bert_folder, tmp_path):
    """Each kind is drivetrain's error with source, row, field and what stands there."""
    job, error, told = CASES[case]
    with pytest.raises(error, match=rf"(?s){told}"):
        job.fit(bert_folder, tmp_path)


@pytest.mark.parametrize("kind", ["49 id of no token", "50 label out of range", "52 NaN", "64 StopIteration"])
def test_a_row_is_all_that_is_left_out(kind, bert_folder, tmp_path):
    """With a limit, the same run goes on without the row, and its weights stay finite."""
    job, _, _ = CASES[kind]
    limited = ("bad-rows", BadRows(1))
    if isinstance(job, Tensors):
        run = attrs.evolve(job, plugins=(limited,)).fit(bert_folder, tmp_path)
    else:
        parts = [HFModel(str(bert_folder)), Pad(), Loader(4), SGD(lr=0.1), limited]
        trainer = Trainer(None, parts, epochs=1, device="cpu")
        trainer.fit([IDS, IDS, job.row, IDS, IDS])
        run = trainer.run
    assert run.extras["bad_rows"] == 1
    assert all(bool(parameter.isfinite().all()) for parameter in run.model.parameters())


def test_46_empty_text_is_a_row(bert_folder, tmp_path):
    """An empty text has its special tokens, and trains."""
    run = Text(lines({"text": "", "label": 1})).fit(bert_folder, tmp_path)
    assert run.progress.rows == 4
    assert all(bool(parameter.isfinite().all()) for parameter in run.model.parameters())


def test_47_a_very_long_text_is_cut(bert_folder, tmp_path):
    """Ten megabytes of text are one row of `max_length` tokens."""
    long = {"text": "x" * 5_000_000 + " red bird " + "x" * 5_000_000, "label": 1}
    run = Text(lines(long), tokenize={"max_length": 8}).fit(bert_folder, tmp_path)
    assert run.progress.rows == 4
    assert max(len(run.datasets["train"][row]["input_ids"]) for row in range(4)) <= 8


def test_50_labels_that_are_all_passed_over(bert_folder, tmp_path):
    """A batch whose labels are all -100 is a skipped step, not a loss of 0/0."""
    rows = [{**IDS, "labels": -100}] * 4
    parts = [HFModel(str(bert_folder)), Pad(), Loader(4), SGD(lr=0.1)]
    trainer = Trainer(None, parts, epochs=1, device="cpu")
    trainer.fit(rows)
    assert (trainer.run.progress.step, trainer.run.progress.applied) == (1, 0)
    assert all(bool(parameter.isfinite().all()) for parameter in trainer.run.model.parameters())


def test_58_rows_that_changed_between_runs(tmp_path):
    """A run does not go on over data of another length; the error says what it was."""
    file = tmp_path / "rows.jsonl"
    rows = [{"features": row["features"].tolist(), "labels": int(row["labels"])} for row in as_rows(columns(20))]

    def fit(number, **how):
        file.write_text("".join(json.dumps(row) + "\n" for row in rows[:number]))
        parts = [Jsonl(str(file)), Collates(floats), Loader(4), SGD(lr=0.1), Checkpoint(every="2 steps")]
        Trainer(net(), parts, output=tmp_path / "run", steps=4, device="cpu").fit(**how)

    fit(20)
    with pytest.raises(CheckpointError, match="rows_per_epoch was 20, is 16"):
        fit(16, resume=True)


def floats(rows):
    return {name: torch.tensor([row[name] for row in rows]) for name in rows[0]}


def test_59_an_iterable_that_never_ends():
    """With a number of steps it trains; without one, nobody knows when an epoch ends, and it is refused."""

    class Endless:
        def __iter__(self):
            while True:
                yield from as_rows(columns(10))

    run = Tensors(Endless, settings={"steps": 3}).fit(None, None)
    assert run.progress.rows == 12
    with pytest.raises(ConfigError, match="a stream: give steps instead of epochs"):
        Tensors(Endless, settings={"epochs": 1}).fit(None, None)


def test_a_row_among_others_that_make_no_batch():
    """Where a bad row is left out and the others still make no batch, that is told too, as an error about rows."""
    rows = with_row(2, features=object())
    rows[3]["features"] = torch.zeros(5)
    with pytest.raises(DataError, match=r"train rows \[.*\] make no batch"):
        Tensors(rows, (("bad-rows", BadRows(3)),), loader={"batch_size": 10}).fit(None, None)
