"""`rebalance`: the rows of each step stay, and are dealt out so that every rank works as long."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from order_helpers import PadRows, assembled, loader_of, skewed, table, tagger

from drivetrain import ConfigError, PlanError, Shuffled, Trainer
from drivetrain_plugins import SGD, Evaluate, Loader
from drivetrain_plugins.order.rebalance import Balanced, Rebalance, split_packed, split_padded
from drivetrain_plugins.order.token_budget import TokenBudget

ROWS = 101


def dealt(batch_size, world_size=1, accumulation=1, *, padded=True, attention=0.0, rows=ROWS, **fields):
    """Return the dealt order over a permutation of skewed rows."""
    return Balanced(
        Shuffled(rows, 0), rows, skewed(rows), batch_size, world_size, accumulation, attention, padded, **fields
    )


def parts_of(sampler, epoch=0):
    return np.split(sampler.order(epoch).numpy(), sampler.bounds(epoch).numpy()[1:-1])


@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize(
    ("batch_size", "world_size", "accumulation"), [(4, 2, 1), (4, 2, 3), (5, 1, 2), (8, 4, 1), (50, 3, 2)]
)
def test_steps_keep_their_rows(batch_size, world_size, accumulation, padded):
    """Every step has the rows that plain batches give it, in as many micro-batches, in every epoch."""
    sampler = dealt(batch_size, world_size, accumulation, padded=padded)
    of_step, parts = batch_size * world_size * accumulation, world_size * accumulation
    for epoch in range(2):
        inner, bounds = Shuffled(ROWS, 0).order(epoch).tolist(), sampler.bounds(epoch).tolist()
        assert len(bounds) - 1 == -(-ROWS // (batch_size * world_size)) * world_size
        order = sampler.order(epoch).tolist()
        for step, start in enumerate(range(0, ROWS, of_step)):
            end = min(start + of_step, ROWS)
            assert sorted(order[start:end]) == sorted(inner[start:end])
            assert bounds[step * parts] == start
    loaders = [
        loader_of(sampler, batch_size=batch_size, rank=rank, world_size=world_size) for rank in range(world_size)
    ]
    plain = loader_of(Shuffled(ROWS, 0), batch_size=batch_size, world_size=world_size)
    assert {len(loader) for loader in loaders} == {len(plain)}


@settings(max_examples=30, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=4, max_size=9),
    parts=st.integers(1, 4),
    attention=st.sampled_from([0, 0.1]),
)
def test_padded_parts_are_as_even_as_can_be(lengths, parts, attention):
    """The dearest part costs what the best of all ways to cut the sorted rows costs."""
    tokens = -np.sort(-np.array(lengths, np.float64))
    costs = tokens + attention * tokens**2
    (sizes,) = split_padded(costs[None], parts)
    assert sizes.sum() == len(lengths)
    assert sizes.min() > 0

    def dearest(ends):
        return max((b - a) * costs[a] for a, b in itertools.pairwise([0, *ends, len(costs)]))

    best = min(dearest(ends) for ends in itertools.combinations(range(1, len(costs)), parts - 1))
    assert dearest(np.cumsum(sizes)[:-1].tolist()) <= best * (1 + 1e-5)


@settings(max_examples=30, deadline=None)
@given(lengths=st.lists(st.integers(1, 40), min_size=3, max_size=8), parts=st.integers(1, 3))
def test_packed_parts_keep_grahams_bound(lengths, parts):
    """The dearest part costs at most 4/3 - 1/(3 parts) of the best of all ways to deal out the rows."""
    costs = -np.sort(-np.array(lengths, np.float64))
    places, sizes = split_packed(costs[None], parts)
    assert sorted(places[0].tolist()) == list(range(len(costs)))
    ends = np.cumsum(sizes[0])
    found = max(costs[rows].sum() for rows in np.split(places[0], ends[:-1]))
    ways = itertools.product(range(parts), repeat=len(costs))
    best = min(max(np.bincount(way, costs, parts)) for way in ways)
    assert found <= best * (4 / 3 - 1 / (3 * parts)) + 1e-9


@pytest.mark.parametrize("padded", [True, False])
def test_ranks_work_as_long(padded):
    """The dearest of a step's micro-batches is within a fifth of the mean, where plain batches differ two-fold and more."""
    lengths = skewed(ROWS)

    def spread(parts):
        costs = [len(p) * lengths[p].max() if padded else lengths[p].sum() for p in parts]
        steps = [costs[i : i + 4] for i in range(0, len(parts) - 4, 4)]
        return np.mean([max(step) / np.mean(step) for step in steps])

    order = Shuffled(ROWS, 0).order(0).numpy()
    plain = [order[i : i + 6] for i in range(0, ROWS, 6)]
    assert spread(parts_of(dealt(6, 2, 2, padded=padded))) < 1.2 < spread(plain)


def test_attention_counts():
    """With a dear attention, a long row is left with fewer others."""
    sampler, lengths = dealt(8, 2), skewed(ROWS)
    dear = dealt(8, 2, attention=1.0)
    counts = [[len(part) for part in parts_of(s) if lengths[part].max() == lengths[p_max].max()]
              for s in (sampler, dear) for p_max in [s.order(0).numpy()]]  # fmt: skip
    assert counts[1][0] < counts[0][0]


def test_going_on_with_other_ranks_loses_no_row():
    """After any step, more ranks or fewer take the rows that are left, once each; the same ranks take the same batches."""
    order = dealt(4, 2, 1).order(0).tolist()
    for start in range(0, ROWS, 8):
        for world_size, accumulation in ((1, 1), (3, 2), (2, 1)):
            other = dealt(4, world_size, accumulation)
            other.bounds(0)  # as at assembly, before the run hears where it goes on
            other.resumed = (0, start)
            left = other.order(0).tolist()[start:]
            assert sorted(left) == sorted(order[start:])
            assert start in other.bounds(0).tolist()
            if (world_size, accumulation) == (2, 1):
                assert left == order[start:]
        assert torch.equal(other.order(1), dealt(4, 2, 1).order(1))


def test_a_loaded_run_tells_where_it_goes_on():
    """`loaded` gives the order the run's place."""
    trainer = Trainer(tagger(), [Rebalance(), Loader(4), PadRows(), SGD()], steps=1)
    run = trainer.assemble(table(ROWS))
    run.progress.epoch, run.progress.rows_in_epoch = 1, 6
    plugin = run.plugins["rebalance"]
    plugin.loaded(run, None)
    assert run.batches["train"].sampler.resumed == (1, 6)
    left = [row for micro in run.micros("train", 1, 6) for row in micro.batch["input_ids"]]
    assert len(left) == ROWS - 6


def test_dropped_rows_stay_dropped():
    """With `drop_last` an epoch is as long as without rebalancing."""
    trainer = Trainer(tagger(), [Rebalance(), Loader(8, drop_last=True), PadRows(), SGD()], epochs=2)
    run = trainer.assemble(table(ROWS))
    assert (run.rows_per_epoch, run.total_steps) == (96, 24)
    assert sorted(run.batches["train"].sampler.order(1).tolist()) == sorted(Shuffled(ROWS, 0).order(1)[:96].tolist())


def test_evaluations_are_left_alone():
    """Only training batches are dealt out."""
    trainer = Trainer(tagger(), [Rebalance(), Loader(8), PadRows(), SGD(), Evaluate()], steps=1)
    run = trainer.assemble(table(ROWS), table(20))
    assert not hasattr(run.batches["evaluate"].sampler, "bounds")


def test_attention_share_comes_from_the_model():
    """A model that tells its hidden size gives 1 / (6 * hidden), one that does not gives 0, an option overrides both."""
    run = assembled(table(3))
    run.model = tagger()
    assert Rebalance()._attention(run) == 0
    run.model.config = type("Config", (), {"hidden_size": 64})
    assert Rebalance()._attention(run) == 1 / 384
    assert Rebalance(attention=0.5)._attention(run) == 0.5


def test_an_order_that_cuts_batches_is_refused():
    """`token-budget` has cut the batches already, as the plan says; so may an order of a user's own."""
    plugins = [TokenBudget(tokens=128), Rebalance(), Loader(), PadRows(), SGD()]
    with pytest.raises(PlanError, match=r"rebalance[\s\S]*batch-bounds"):
        Trainer(tagger(), plugins, steps=1).assemble(table(ROWS))

    class Cutting:
        from drivetrain import hookimpl

        @hookimpl
        def build_sampler(self):
            return dealt(4)

    with pytest.raises(ConfigError, match=r"rebalance: it deals out[\s\S]*Balanced"):
        Trainer(tagger(), [Cutting(), Rebalance(), PadRows(), SGD()], steps=1).assemble(table(ROWS))
