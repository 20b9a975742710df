"""Streams: the laws of order, resume and counting for data that can only be read one row after the other."""

from __future__ import annotations

import itertools
import json
import random
import sysconfig
from pathlib import Path

import numpy as np
import pytest
import torch

from drivetrain import BadRow, ConfigError, Counted, DataError, Iterated, Streamed, Trainer, hookimpl, stack
from drivetrain.data import Fetch, count_labels
from drivetrain.testing import BaseOptimizer, digest
from drivetrain.testing.carriers import tiny_module
from drivetrain.testing.kinds import kit_rows
from drivetrain_plugins import Accumulate, Checkpoint, Evaluate, Jsonl, Loader, Pad, Tokenize
from drivetrain_plugins.data.shuffle_buffer import ShuffleBuffer

ROWS = [{"x": x, "labels": label} for x, label in zip(*kit_rows("tensors", 43).values(), strict=True)]


class Listed:
    """A stream over a list; a position is the number of rows given."""

    def __init__(self, rows):
        self.rows, self.opened = rows, []

    def open(self, epoch, position=None):
        self.opened.append((epoch, position))
        return Read(self.rows, position or 0)


class Read:
    def __init__(self, rows, given):
        self.rows, self.given = rows, given

    def __iter__(self):
        return self

    def __next__(self):
        if self.given >= len(self.rows):
            raise StopIteration
        self.given += 1
        return self.rows[self.given - 1]

    def position(self):
        return self.given


class Drawn(torch.utils.data.IterableDataset):
    """Rows that are drawn as they are read, from every global generator, in an order drawn at the start."""

    def __iter__(self):
        order = torch.randperm(30).tolist()
        for number in order:
            noise = torch.rand(8) + random.random() + float(np.random.random())  # noqa: NPY002
            yield {"x": noise, "labels": torch.tensor(number % 3)}


def streamed(rows, size, **options):
    stream = rows if hasattr(rows, "open") else Listed(rows)
    options, fetch = {"drop_last": False, **options}, Fetch(stream, list, lambda batch: None, 7, "train")
    return Streamed(fetch, size, **options)


def trainer(*plugins, seed=7, **settings):
    settings = {"device": "cpu", "log_every": 1, **({} if "epochs" in settings else {"steps": 9}), **settings}
    return Trainer(tiny_module(), [BaseOptimizer(), *plugins], seed=seed, **settings)


@pytest.mark.parametrize(("size", "ranks"), [(1, 1), (7, 1), (5, 3), (43, 1), (100, 2), (4, 4)])
def test_order_depends_on_neither_batch_size_nor_ranks(size, ranks):
    """The ranks' micro-batches, side by side, are the stream's rows in order; all ranks have as many of them."""
    rows = list(range(43))
    parts = [list(streamed(rows, size, rank=rank, world_size=ranks).iterate(0)) for rank in range(ranks)]
    assert len({len(part) for part in parts}) == 1
    found = [row for micros in zip(*parts, strict=True) for micro in micros for row in micro.batch or ()]
    assert found == rows
    for micros in zip(*parts, strict=True):
        assert len({json.dumps(micro.position) for micro in micros}) == 1
        assert len({micro.ends for micro in micros}) == 1


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize(("size", "ranks"), [(7, 1), (5, 3), (43, 1)])
def test_any_batch_can_be_the_first(size, ranks, drop_last):
    """Opened at the position of any micro-batch, the rest is what followed it: batches, positions and the end."""
    for rank in range(ranks):
        made = streamed(list(range(43)), size, rank=rank, world_size=ranks, drop_last=drop_last)
        shown = [(m.batch, m.num_rows, m.position, m.ends) for m in made.iterate(0)]
        assert [ends for *_, ends in shown] == [False] * (len(shown) - 1) + [True]
        for number, (_, _, position, ends) in enumerate(shown):
            start = min((number + 1) * size * ranks, 43)
            if not ends:
                rest = made.iterate(0, start, json.loads(json.dumps(position)))
                assert [(m.batch, m.num_rows, m.position, m.ends) for m in rest] == shown[number + 1 :]


def test_workers_share_the_batches():
    """The parts of two workers, taken in turn, are the batches of one."""
    whole = [m.batch for m in streamed(list(range(43)), 4).iterate(0)]
    parts = [[m.batch for m in streamed(list(range(43)), 4, part=part, parts=2).iterate(0)] for part in (0, 1)]
    assert [b for pair in itertools.zip_longest(*parts) for b in pair if b is not None] == whole


def test_drop_last_drops_what_fills_no_global_batch():
    """With `drop_last` every rank gets whole batches only, and the last of them ends the epoch."""
    made = [list(streamed(list(range(43)), 5, drop_last=True, rank=r, world_size=2).iterate(0)) for r in (0, 1)]
    assert [[m.num_rows for m in part] for part in made] == [[5] * 4] * 2
    assert [m.ends for m in made[0]] == [False, False, False, True]


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [([], {}, "the train stream gave no rows in epoch 3"),
     ([1, 2], {"drop_last": True}, "the train stream gave no whole batch in epoch 3")],
)  # fmt: skip
def test_an_empty_stream_is_an_error(rows, options, message):
    """A stream that gives nothing, or nothing that fills a batch, is an error that names split and epoch."""
    with pytest.raises(DataError, match=message):
        list(streamed(rows, 4, **options).iterate(3))


def test_a_stream_that_became_shorter_is_an_error():
    """Going on where a stream has nothing any more ends the run instead of going round for ever."""
    with pytest.raises(DataError, match="gave no rows in epoch 0 after row 50, at 50"):
        list(streamed(list(range(43)), 4).iterate(0, 50, 50))


def test_augmented_rows_are_the_same_in_any_batches_and_after_going_on():
    """Rows drawn from the global generators depend on epoch and row only, and leave the generators as they were."""
    states = random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002

    def values(size, epoch=0, start=0):
        made = streamed(Iterated(Drawn()), size).iterate(epoch, start, start or None)
        return torch.stack([row["x"] for micro in made for row in micro.batch])

    whole = values(1)
    assert torch.equal(values(7), whole)
    assert torch.equal(values(4, start=12), whole[12:])
    assert not torch.equal(values(7, epoch=1), whole)
    assert (random.getstate(), np.random.get_state()[1].tolist()) == states  # noqa: NPY002


def test_an_epoch_steps_once_for_what_is_left():
    """43 rows by 4, two micro-batches a step: six steps an epoch, the last with the rest, and nothing leaks over."""
    seen = []

    class Look:
        @hookimpl
        def step_end(self, step):
            seen.append(
                (step.number, [m.num_rows for m in step.micros], step.run.progress.epoch, step.run.progress.position)
            )

    trainer(Loader(4), Accumulate(2), Look(), steps=9).fit(Listed(ROWS))
    assert [rows for _, rows, _, _ in seen] == [[4, 4]] * 5 + [[3]] + [[4, 4]] * 3
    assert [(epoch, position) for _, _, epoch, position in seen] == [
        *[(0, 8 * n) for n in range(1, 6)], (1, None), (1, 8), (1, 16), (1, 24),
    ]  # fmt: skip


def test_a_streams_run_equals_the_same_rows_in_order():
    """Training on a stream is training on its rows as a map-style set taken in order, to the bit."""
    from drivetrain.data import Sequential

    class InOrder:
        @hookimpl
        def build_sampler(self, run, split):
            return Sequential(len(run.datasets[split]))

    runs = [trainer(Loader(4), Accumulate(2)), trainer(Loader(4), Accumulate(2), InOrder())]
    for made, data in zip(runs, (Listed(ROWS), ROWS), strict=True):
        made.fit(data)
    assert digest(runs[0].run, "model", "optimizer") == digest(runs[1].run, "model", "optimizer")


def test_an_iterable_that_never_ends_is_trained_on_for_its_steps():
    """An endless iterable gives as many steps as are asked for; an epoch's number is asked for in vain."""

    class Endless(torch.utils.data.IterableDataset):
        def __iter__(self):
            return itertools.cycle(ROWS)

    made = trainer(steps=12)
    assert made.fit(Endless()).steps == 12
    assert (made.run.progress.epoch, made.run.progress.rows) == (0, 96)
    with pytest.raises(ConfigError, match="a stream: give steps instead of epochs"):
        trainer(epochs=1).fit(Endless())


def test_an_iterable_that_ends_early_is_started_again():
    """More steps than the rows give begin another epoch, and the iterable hears which."""
    epochs = []

    class Short(torch.utils.data.IterableDataset):
        def set_epoch(self, epoch):
            epochs.append(epoch)

        def __iter__(self):
            return iter(ROWS[:10])

    made = trainer(steps=5)
    made.fit(Short())
    assert (epochs, made.run.progress.epoch, made.run.progress.rows) == ([0, 1, 2], 2, 28)


def test_what_cannot_be_started_again_is_refused():
    """A generator is used up by one pass, and is refused before the run."""
    with pytest.raises(ConfigError, match=r"an iterable that can be started again\. Received: generator"):
        trainer().fit(row for row in ROWS)


def test_a_reader_counts_its_rows():
    """`Counted` passes over rows, also over more than there are, and its position is their number."""
    reader = Counted(iter(range(5)), 3)
    assert (list(reader), reader.position()) == ([3, 4], 5)
    reader = Counted(iter(range(5)), 9)
    assert (list(reader), reader.position()) == ([], 5)


class Lenient:
    """Leave bad rows out and remember them."""

    def __init__(self):
        self.told = []

    @hookimpl
    def bad_row(self, run, reason):
        self.told.append((run.progress.step, reason))
        return True


BAD = [*ROWS[:5], BadRow("rows.txt:6: torn"), *ROWS[5:9], {"x": torch.zeros(3), "labels": torch.tensor(0)}, *ROWS[9:]]


def test_bad_rows_end_the_run_by_name():
    """Unless a plugin says otherwise, a row that the source could not make, or the collator not take, is an error."""
    with pytest.raises(DataError, match=r"rows\.txt:6: torn"):
        trainer(Loader(4)).fit(Listed(BAD))
    with pytest.raises(DataError, match=r"train rows \[8, 9, 10, 11\] make no batch"):
        trainer(Loader(4)).fit(Listed([*BAD[:5], ROWS[0], *BAD[6:]]))


def test_bad_rows_are_left_out_and_told_once_at_their_step():
    """Where a plugin leaves them out, the rest of the batch is trained on, and each is told in the step that lacks it."""
    lenient, sizes = Lenient(), []

    class Look:
        @hookimpl
        def step_end(self, step):
            sizes.append(0 if step.micros[0].batch is None else len(step.micros[0].batch["labels"]))

    torn = [BadRow("all torn")] * 4
    trainer(Loader(4), lenient, Look(), steps=4).fit(Listed([*BAD[:8], *ROWS[20:24], *torn, *ROWS[:8]]))
    assert lenient.told == [(1, "rows.txt:6: torn"), *[(3, "all torn")] * 4]
    assert sizes == [4, 3, 4, 0]


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Write real text (the interpreter's own sources) as JSON lines into three files; return their pattern."""
    folder = tmp_path_factory.mktemp("streams")
    for label, name in enumerate(("argparse", "tarfile", "typing")):
        text = (Path(sysconfig.get_path("stdlib")) / f"{name}.py").read_text("utf-8")
        parts = [part.strip() for part in text.split("\n\n") if part.strip()][:25]
        lines = [json.dumps({"text": part, "label": label}) for part in parts]
        (folder / f"{label}.jsonl").write_text("\n".join(lines), "utf-8")
    return str(folder / "*.jsonl")


class Processor:
    """A tokenizer of bytes, without files."""

    pad_token_id, pad_token_type_id, padding_side, is_fast = 0, 0, "right", False

    def __call__(self, texts, pairs=None, *, max_length=None, **_):
        return {"input_ids": [[1 + byte % 63 for byte in text.encode()][:max_length] for text in texts]}


def piped(sources, folder, *more, **settings):
    """Return a run from files to steps: jsonl stream, tokenized, shuffled, accumulated, saved."""

    class Model:
        provides = ("processor",)

        @hookimpl
        def build_model(self, run):
            run.processor = Processor()
            return tiny_module(dropout=0.3)

    plugins = [
        Model(), BaseOptimizer(), ShuffleBuffer(size=13), Tokenize(max_length=20), Jsonl(sources, stream=True), Pad(),
        Loader(4), Accumulate(2), Checkpoint(every="1 step", keep=100), *more,
    ]  # fmt: skip
    return Trainer(None, plugins, output=folder, device="cpu", seed=5, log_every=1, **settings)


class Losses:
    """Remember each step's loss, and stop after a step."""

    def __init__(self, stop=None):
        self.seen, self.stop = [], stop

    @hookimpl
    def step_end(self, step):
        if step.run.progress.step == self.stop:
            step.run.request_stop("the test asked for it")

    @hookimpl
    def log(self, run, metrics):
        if "loss" in metrics:
            self.seen.append((run.progress.step, metrics["loss"]))


def test_a_run_on_files_goes_on_to_the_bit_from_any_step(sources, tmp_path):
    """Stopped in, at the end of and after an epoch and started again, a run has the losses and weights of one that was not."""
    whole_losses = Losses()
    whole = piped(sources, tmp_path / "whole", whole_losses, steps=15)
    whole.fit()
    expected = digest(whole.run)
    assert whole.run.progress.epoch == 1
    for step in (1, 9, 10, 14):
        first = piped(sources, tmp_path / str(step), Losses(stop=step), steps=15)
        first.fit()
        losses = Losses()
        second = piped(sources, tmp_path / str(step), losses, steps=15)
        second.fit(resume=True)
        assert losses.seen == whole_losses.seen[step:], step
        assert digest(second.run) == expected, step


def test_shuffled_streams_differ_by_epoch(sources, tmp_path):
    """Each epoch has the same rows in another order within its blocks, and the seed decides which."""
    made = piped(sources, tmp_path / "order", steps=1)
    stream = made.assemble().datasets["train"]
    epochs = [[json.dumps([int(i) for i in row["input_ids"]]) for row in stream.open(epoch)] for epoch in (0, 1, 0)]
    assert epochs[0] == epochs[2]
    assert epochs[0] != epochs[1]
    for start in range(0, 75, 13):
        assert sorted(epochs[0][start : start + 13]) == sorted(epochs[1][start : start + 13])


def test_evaluation_reads_its_stream_from_the_start_each_time():
    """An evaluation on a stream counts every row once, as on the rows, and moves nothing of the training stream."""
    losses = []
    for train, held in ((Listed(ROWS), Listed(ROWS[:11])), (Listed(ROWS), ROWS[:11])):
        made = trainer(Loader(4), Evaluate(every="2 steps"), steps=6)
        made.fit(train, held)
        losses.append((made.run.metrics["evaluate/loss"], digest(made.run)))
    assert losses[0] == losses[1]


def test_items_of_a_stream_are_counted():
    """The labels of each batch are counted as those of map-style data are."""
    fetch = Fetch(Listed(ROWS), stack, count_labels, 7, "train")
    assert [m.num_items for m in Streamed(fetch, 20).iterate(0)] == [20, 20, 3]
