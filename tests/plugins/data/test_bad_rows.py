"""`bad-rows`: a row that cannot be used is left out, told once and counted; nothing else changes."""

from __future__ import annotations

import json
import logging

import attrs
import numpy as np
import pytest
import torch
from plugin_helpers import BATCH, CLASSES, FEATURES, Record, as_rows, assert_same_weights, columns, net

from drivetrain import BadRow, Counted, DataError, Shuffled, Trainer, hookimpl, plugin
from drivetrain_plugins import SGD, Checkpoint, Evaluate, Loader
from drivetrain_plugins.data.bad_rows import BadRows, Finite
from drivetrain_plugins.shared.table import Table

ROWS, BAD, STEPS = 40, (7, 23), 12


class Unreadable(torch.utils.data.Dataset):
    """A map-style set with rows that raise."""

    def __init__(self):
        self.rows = as_rows(columns(ROWS))

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        if index in BAD:
            raise OSError(f"no such picture: {index}")
        return self.rows[index]


class Told:
    """A stream that knows its bad rows."""

    def __init__(self):
        self.rows = as_rows(columns(ROWS))

    def open(self, epoch, position=None):
        rows = [BadRow(f"shard-0:{n}: not text") if n in BAD else row for n, row in enumerate(self.rows)]
        return Counted(iter(rows), position or 0)


class Plain:
    """An iterable with numbers that are none in some rows."""

    def __iter__(self):
        return iter(as_rows(spoiled()))


@attrs.frozen
class FromColumns:
    """Make a batch of a table's columns."""

    def __call__(self, rows):
        assert isinstance(rows, Table), type(rows)
        return {name: torch.from_numpy(column) for name, column in rows.columns.items()}


@plugin(role="collate")
class OfTables:
    """Collate tables."""

    @hookimpl
    def build_collator(self):
        return FromColumns()


def spoiled():
    data = columns(ROWS)
    data["features"][BAD[0], 2] = torch.nan
    data["features"][BAD[1], 0] = -torch.inf
    return data


KINDS = {
    "map": (Unreadable, []),
    "columns": (spoiled, []),
    "table": (lambda: Table({name: column.numpy() for name, column in spoiled().items()}), [OfTables()]),
    "stream": (Told, []),
    "iterable": (Plain, []),
}


def by_hand(kind, steps=STEPS):
    """Train as a person would who leaves the bad rows out of the batches in which they stand."""
    model, data = net(), columns(ROWS)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(steps):
        epoch, batch = divmod(step, ROWS // BATCH)
        order = range(ROWS) if kind in ("stream", "iterable") else Shuffled(ROWS, 0).order(epoch).tolist()
        sound = [row for row in order[batch * BATCH : (batch + 1) * BATCH] if row not in BAD]
        model(**{name: column[sound] for name, column in data.items()})["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def fit(kind, *, workers=0, steps=STEPS, limit=2, model=None, extra=(), resume=False, **settings):
    made, plugins = KINDS[kind]
    model, record, bad = model or net(), Record(), BadRows(limit)
    parts = [Loader(workers=workers), ("bad-rows", bad), SGD(lr=0.1), *plugins, *extra, record]
    trainer = Trainer(model, parts, log_every="1 step", steps=steps, device="cpu", **settings)
    trainer.fit(made(), resume=resume)
    return model, record, bad


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_a_row_left_out_changes_nothing_else(kind, workers):
    """The weights are, bit for bit, those of a hand-written loop that leaves the row out of its batch."""
    model, record, _ = fit(kind, workers=workers)
    assert_same_weights(model, by_hand(kind))
    assert record.of("bad_rows")[-1] == 2


@pytest.mark.parametrize("kind", ["map", "table", "stream"])
def test_resuming_leaves_out_the_same_rows(kind, tmp_path):
    """Stopped in an epoch and gone on with, with other workers, the run has the same weights, logs and count."""
    whole, record, _ = fit(kind)
    saving = {"extra": [Checkpoint(every="1 step", keep=1)], "output": tmp_path}
    _, first, _ = fit(kind, steps=7, workers=2, **saving)
    model, second, bad = fit(kind, resume=True, **saving)
    assert_same_weights(model, whole)
    assert [*first.of("loss"), *second.of("loss")] == record.of("loss")
    assert [*first.of("bad_rows"), *second.of("bad_rows")] == record.of("bad_rows")
    assert len(bad.state_dict()["seen"]) == 2


@pytest.mark.parametrize("workers", [0, 1])
def test_one_more_than_the_limit_ends_the_run(workers):
    """The error counts the rows, shows them and says which option holds."""
    with pytest.raises(
        DataError, match=r"bad-rows: 2 rows cannot be used. Received: limit=1.[\s\S]*row 23: [\s\S]*row 7: "
    ):
        fit("columns", limit=1, workers=workers)


def test_without_a_limit_the_first_bad_row_ends_the_run():
    """limit=0 names the row, as a run without the plugin does, and says that there is a limit."""
    with pytest.raises(DataError, match=r"train row (7|23): OSError: no such picture: \d+\n.*Received: limit=0"):
        fit("map", limit=0)
    with pytest.raises(DataError) as caught:
        Trainer(net(), [Loader(), SGD()], steps=9).fit(Unreadable())
    assert str(caught.value) == "train row 23: OSError: no such picture: 23"


def test_many_bad_rows_are_not_all_shown():
    """An error shows the first five and the last."""
    bad = BadRows(9)
    trainer = Trainer(net(), [SGD(), ("bad-rows", bad)], steps=1)
    run = trainer.assemble(columns(8))
    for number in range(9):
        run.hooks.bad_row(run, f"a.jsonl:{number}: no")
    with pytest.raises(DataError) as caught:
        run.hooks.bad_row(run, "a.jsonl:99: no")
    lines = str(caught.value).splitlines()
    assert [line.strip() for line in lines[1:]] == [*(f"a.jsonl:{n}: no" for n in range(5)), "...", "a.jsonl:99: no"]
    assert "10 rows" in lines[0]


def test_each_row_is_told_once(caplog):
    """Over three epochs, a row is logged once, with its name and reason; the count goes up at its step and stays."""
    with caplog.at_level(logging.WARNING, "drivetrain"):
        _, record, _ = fit("stream", steps=15)
    told = [each.getMessage() for each in caplog.records if "bad-rows" in each.getMessage()]
    assert told == [f"bad-rows: left out ({n} of at most 2): shard-0:{row}: not text" for n, row in ((1, 7), (2, 23))]
    assert record.of("bad_rows") == [1, 1, *[2] * 13]


def test_a_reader_tells_its_bad_rows_at_assembly():
    """Rows told while the data is built count too, and a second run of the same instance starts anew."""

    @plugin(role="data", provides=["data"])
    class Reads:
        @hookimpl
        def build_dataset(self, run, split):
            if split == "train":
                run.hooks.bad_row(run, "a.jsonl:3: not JSON")
            return columns(16) if split == "train" else None

    bad, record = BadRows(1), Record()
    trainer = Trainer(net(), [Reads(), ("bad-rows", bad), SGD(), record], steps=1, log_every="1 step")
    for _ in range(2):
        trainer.fit()
        assert bad.state_dict() == {"seen": ["a.jsonl:3: not JSON"]}
    assert record.of("bad_rows") == [1, 1]


def test_an_evaluation_leaves_its_bad_rows_out():
    """The loss of an evaluation is the mean over the rows that can be used."""
    model, bad = net(), BadRows(2)
    plugins = [Loader(), ("bad-rows", bad), SGD(lr=1e-30), Evaluate(at_end=False)]
    trainer = Trainer(model, plugins, steps=1, device="cpu")
    trainer.fit(columns(16), evaluate=Unreadable())
    metrics = trainer.evaluate()
    sound = [row for row in range(ROWS) if row not in BAD]
    expected = model.eval()(**{name: column[sound] for name, column in columns(ROWS).items()})["loss"]
    assert metrics["loss"] == pytest.approx(expected.item(), rel=1e-6)
    assert len(bad.state_dict()["seen"]) == 2


def test_a_batch_of_bad_rows_only_is_a_skipped_step():
    """Where a whole batch cannot be used, the step is not applied, and the run goes on at the next."""

    class Half(Unreadable):
        def __getitem__(self, index):
            if index < 4:
                raise ValueError(f"bad {index}")
            return self.rows[index]

    from drivetrain import Sequential

    @plugin(role="order")
    class InOrder:
        @hookimpl
        def build_sampler(self, run, split):
            return Sequential(ROWS)

    trainer = Trainer(net(), [Loader(4), InOrder(), ("bad-rows", BadRows(4)), SGD(lr=0.1)], epochs=1)
    trainer.fit(Half())
    assert (trainer.run.progress.step, trainer.run.progress.applied) == (10, 9)
    assert trainer.run.progress.rows == ROWS


def test_the_state_is_plain_json():
    """What is saved survives JSON, and loading it into a fresh plugin gives the same state."""
    _, _, bad = fit("map")
    state = bad.state_dict()
    fresh = BadRows(2)
    fresh.load_state_dict(json.loads(json.dumps(state)))
    assert fresh.state_dict() == state


def test_finite_passes_large_sums_and_masks():
    """Finite numbers whose sum is not finite are fine, and so is infinity where it has a meaning."""
    check = Finite()
    check(
        {"features": torch.full((4,), 3e38), "attention_mask": torch.full((2, 2), -torch.inf), "ids": torch.arange(3)}
    )
    check([torch.ones(2), (torch.ones(3),)])
    with pytest.raises(DataError, match=r"field 'features' holds NaN or infinity. Received: 1 of 3 values"):
        check({"features": torch.tensor([1.0, float("nan"), 2.0])})
    with pytest.raises(DataError, match="field '1' holds NaN or infinity"):
        check((torch.ones(2), torch.tensor([np.inf])))


def test_looking_can_be_left_out():
    """finite=False sees nothing wrong in NaN."""
    made = BadRows(finite=False).batch_checks()
    assert made == []
    assert len(torch.zeros(CLASSES, FEATURES)) == CLASSES
