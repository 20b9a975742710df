"""`token-budget`: micro-batches by padded tokens, on any number of ranks, from any place on."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from order_helpers import PadRows, Watch, loader_of, numbers_of, sampler_of, skewed, table, tagger
from plugin_helpers import cpu_run

from drivetrain import ConfigError, Trainer
from drivetrain_plugins import SGD, Evaluate, Loader
from drivetrain_plugins.order.token_budget import TokenBudget
from drivetrain_plugins.shared.table import Ragged, Table

ROWS = 300


def batches_of(sampler, epoch):
    """Return the row numbers of each batch."""
    return np.split(sampler.order(epoch).numpy(), sampler.bounds(epoch).numpy()[1:-1])


def of_lengths(lengths):
    """Return rows of the given lengths."""
    return Table({"input_ids": Ragged(np.zeros(sum(lengths), np.int64), np.concatenate([[0], np.cumsum(lengths)]))})


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 60), min_size=1, max_size=60),
    tokens=st.integers(64, 200),
    multiple=st.sampled_from([1, 8, 64]),
    max_rows=st.none() | st.integers(1, 7),
)
def test_no_batch_is_larger_than_its_budget(lengths, tokens, multiple, max_rows):
    """Rows times the rounded longest never exceed the budget, nor rows their limit; no batch could take the next row."""
    sampler = sampler_of(TokenBudget(tokens=tokens, multiple=multiple, max_rows=max_rows), of_lengths(lengths))
    lengths = np.maximum(-(-np.array(lengths) // multiple), 1) * multiple
    for epoch in (0, 1):
        for rows in batches_of(sampler, epoch):
            assert len(rows) * lengths[rows].max() <= tokens
            assert max_rows is None or len(rows) <= max_rows
    sizes, falling = np.diff(sampler.cuts), -np.sort(-lengths)
    for size, longest in zip(sizes[:-1], falling[sampler.cuts[:-2]], strict=True):
        assert (size + 1) * longest > tokens or size == max_rows


def test_epochs_have_the_same_cuts_and_other_rows():
    """The sizes of batches are the same in every epoch, their order and rows are not, and rows of one length mix."""
    sampler = sampler_of(TokenBudget(tokens=200, multiple=8), table(ROWS))
    epochs = [batches_of(sampler, epoch) for epoch in range(3)]
    sizes = [[len(rows) for rows in batches] for batches in epochs]
    assert sorted(sizes[0]) == sorted(sizes[1]) == sorted(sizes[2])
    assert sizes[0] != sizes[1]
    sets = [{frozenset(rows.tolist()) for rows in batches} for batches in epochs]
    assert len(sets[0] & sets[1]) < len(sets[0]) / 4


def test_batches_have_little_padding():
    """A tenth of the padding of random batches with as many tokens, and the first batch has the longest row."""
    lengths, sampler = skewed(ROWS), sampler_of(TokenBudget(tokens=400, multiple=1), table(ROWS))
    batches = batches_of(sampler, 1)
    padded = sum(len(rows) * lengths[rows].max() for rows in batches)
    per_batch = -(-ROWS // len(batches))
    shuffled = np.random.default_rng(0).permutation(lengths)
    at_random = sum(len(b) * b.max() for b in np.split(shuffled, range(per_batch, ROWS, per_batch)))
    assert padded - lengths.sum() < 0.1 * (at_random - lengths.sum())
    assert lengths[batches[0]].max() == lengths.max()


def test_a_row_longer_than_the_budget_is_named():
    """A row that no batch can hold is an error before step 0 with its number and length."""
    said = (
        r"token-budget: train row 1 is longer[\s\S]*129 tokens, 136 as a multiple of 8; tokens=128; 2 rows are too long"
    )
    with pytest.raises(ConfigError, match=said):
        sampler_of(TokenBudget(tokens=128), of_lengths([4, 129, 128, 127, 129]))


def test_evaluations_have_a_budget_of_their_own():
    """An evaluation comes as it is, or in the same batches by length each time."""
    data, lengths = table(40), skewed(40)
    plain = sampler_of(TokenBudget(tokens=100), data, split="evaluate")
    assert (plain.order(0).tolist(), hasattr(plain, "bounds")) == (list(range(40)), False)
    held = sampler_of(TokenBudget(tokens=100, evaluate_tokens=200, multiple=1), data, split="evaluate")
    assert torch.equal(held.order(0), held.order(1))
    assert (np.diff(lengths[held.order(0).numpy()]) <= 0).all()
    assert all(len(rows) * lengths[rows].max() <= 200 for rows in batches_of(held, 0))


def test_a_budget_leaves_an_evaluation_its_loss():
    """The mean loss over tokens is the same in batches by row and by token."""
    losses = []
    for budget in (None, 100):
        plugins = [
            TokenBudget(tokens=100, evaluate_tokens=budget),
            Loader(evaluate_batch_size=8),
            PadRows(),
            SGD(),
            Evaluate(),
        ]
        trainer = Trainer(tagger(), plugins, steps=1)
        trainer.assemble(table(40), table(40, seed=5))
        losses.append(trainer.evaluate()["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-12)


# --- the loader that follows bounds --------------------------------------------------------------------------------


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_ranks_take_turns_at_batches(world_size):
    """Batch i is of rank i modulo the ranks; a last round that is not full leaves ranks an empty batch."""
    sampler = sampler_of(TokenBudget(tokens=128), table(ROWS))
    wanted = [rows.tolist() for rows in batches_of(sampler, 1)]
    assert len(wanted) % 2
    loaders = [loader_of(sampler, rank=rank, world_size=world_size) for rank in range(world_size)]
    ranks = [list(loader.iterate(1)) for loader in loaders]
    rounds = -(-len(wanted) // world_size)
    assert [len(micros) for micros in ranks] == [len(loader) for loader in loaders] == [rounds] * world_size
    turns = [micro for turn in zip(*ranks, strict=True) for micro in turn]
    assert [numbers_of(micro) for micro in turns] == wanted + [[]] * (rounds * world_size - len(wanted))
    empty = turns[len(wanted) :]
    assert [(micro.batch, micro.num_rows, micro.num_items) for micro in empty] == [(None, 0, 0)] * len(empty)
    assert {loader.rows_per_epoch for loader in loaders} == {ROWS}


@pytest.mark.parametrize("world_size", [1, 2])
def test_going_on_gives_the_rest(world_size):
    """From the end of any round on, each rank gets the batches that it would have had."""
    sampler = sampler_of(TokenBudget(tokens=128), table(60))
    ends = sampler.bounds(1).tolist()[::world_size]
    for rank in range(world_size):
        loader = loader_of(sampler, rank=rank, world_size=world_size)
        whole = [numbers_of(micro) for micro in loader.iterate(1)]
        for done, start in enumerate(ends[: len(whole)]):
            assert [numbers_of(micro) for micro in loader.iterate(1, start)] == whole[done:]


def test_going_on_with_other_ranks_takes_the_rows_left():
    """Two ranks that go on where one stopped, and one where three did, share exactly the rows that are left."""
    sampler = sampler_of(TokenBudget(tokens=128), table(60))
    order = sampler.order(1).tolist()
    for start in sampler.bounds(1).tolist()[:-1]:
        for world_size in (1, 2, 3):
            left = [
                number
                for rank in range(world_size)
                for micro in loader_of(sampler, rank=rank, world_size=world_size).iterate(1, start)
                for number in numbers_of(micro)
            ]
            assert sorted(left) == sorted(order[start:])


def test_a_place_within_a_batch_gives_its_rest():
    """A position between two cuts, as another run may have left it, loses no row and repeats none."""
    sampler = sampler_of(TokenBudget(tokens=128), table(60))
    order, first = sampler.order(0).tolist(), int(sampler.bounds(0)[1])
    assert first > 1
    micros = list(loader_of(sampler).iterate(0, 1))
    assert [number for micro in micros for number in numbers_of(micro)] == order[1:]
    assert micros[0].num_rows == first - 1


def test_an_epoch_has_as_many_steps_as_batches():
    """Steps of whole epochs are counted from the cuts, and each step advances by the rows of its batch."""
    data, watch = table(ROWS), Watch()
    plugins = [TokenBudget(tokens=256), Loader(), PadRows(), SGD(lr=0.1), watch]
    trainer = Trainer(tagger(dtype=torch.float32), plugins, epochs=2)
    trainer.fit(data)
    sampler = sampler_of(TokenBudget(tokens=256), data)
    sizes = [size for epoch in (0, 1) for size in sampler.bounds(epoch).diff().tolist()]
    assert [rows for rows, _, _ in watch.steps] == sizes
    assert (trainer.run.progress.epoch, trainer.run.progress.rows) == (2, 2 * ROWS)


def test_workers_make_empty_batches_too():
    """A worker process gives a rank the batches that it gets without one, the empty one of the last round included."""
    sampler = sampler_of(TokenBudget(tokens=128), table(ROWS))
    fetch = loader_of(sampler).fetch
    found = []
    for workers in (0, 1):
        run = cpu_run(rank=1, world_size=2)
        batches = Loader(workers=workers).build_batches(run, "train", fetch, sampler)
        found.append([(micro.num_rows, numbers_of(micro)) for micro in batches.iterate(1, int(sampler.bounds(1)[4]))])
    assert found[0] == found[1]
    assert found[0][-1] == (0, [])
