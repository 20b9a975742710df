"""Laws that every order keeps: each row once an epoch; a function of seed, epoch and data; exact resume."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from order_helpers import AllReduce, PadRows, Watch, gradient_by_hand, sampler_of, table, tagger
from plugin_helpers import Crash, Record, assert_same_weights

from drivetrain import ConfigError, Iterated, Shuffled, Trainer, hookimpl
from drivetrain.testing import run_ranks
from drivetrain_plugins import SGD, Accumulate, Checkpoint, Loader
from drivetrain_plugins.order.curriculum import Curriculum
from drivetrain_plugins.order.group_by_length import GroupByLength
from drivetrain_plugins.order.random import Random
from drivetrain_plugins.order.rebalance import Rebalance
from drivetrain_plugins.order.sequential import Sequential
from drivetrain_plugins.order.token_budget import TokenBudget

ORDERS = {
    "random": Random,
    "sequential": Sequential,
    "group-by-length": lambda: GroupByLength(window=16, chunk=4),
    "token-budget": lambda: TokenBudget(tokens=128, multiple=4),
    "curriculum": lambda: Curriculum(epochs=2, noise=0.3),
}
EVERY = {**ORDERS, "rebalance": Rebalance}
ROWS = 53


def loader(name, batch_size, **options):
    """Return a loader; an order that cuts batches needs no batch size, and is refused one."""
    return Loader(None if name == "token-budget" else batch_size, **options)


@pytest.mark.parametrize("name", ORDERS)
def test_every_row_comes_once(name):
    """Each of three epochs is a permutation of the rows."""
    sampler = sampler_of(ORDERS[name](), table(ROWS))
    for epoch in range(3):
        order = sampler.order(epoch)
        assert order.dtype == torch.int64
        assert sorted(order.tolist()) == list(range(ROWS))


@settings(max_examples=40, deadline=None)
@given(rows=st.integers(1, 40), chunk=st.integers(1, 9), windows=st.integers(1, 5), seed=st.integers(0, 2**40))
def test_odd_sizes_lose_no_row(rows, chunk, windows, seed):
    """Windows, chunks and budgets that do not divide the rows still give each row once, and cuts from 0 to the end."""
    data = table(rows, seed)
    for plugin in (GroupByLength(window=windows * chunk, chunk=chunk), TokenBudget(tokens=64, multiple=chunk)):
        sampler = sampler_of(plugin, data, seed=seed)
        for epoch in (0, 1):
            assert sorted(sampler.order(epoch).tolist()) == list(range(rows))
    bounds = [sampler.bounds(epoch) for epoch in range(3)]
    assert [(int(b[0]), int(b[-1]), len(b)) for b in bounds] == [(0, rows, len(bounds[0]))] * 3
    assert all((b.diff() > 0).all() for b in bounds)


@pytest.mark.parametrize("name", sorted(ORDERS.keys() - {"sequential"}))
def test_epochs_and_seeds_have_their_own_orders(name):
    """The order of another epoch, and of another seed, is another one; that of the same two is the same."""
    data = table(ROWS)
    first, other = sampler_of(ORDERS[name](), data), sampler_of(ORDERS[name](), data, seed=1)
    assert torch.equal(first.order(1), sampler_of(ORDERS[name](), data).order(1))
    assert not torch.equal(first.order(1), first.order(2))
    assert not torch.equal(first.order(1), other.order(1))


@pytest.mark.parametrize("name", ORDERS)
def test_no_global_generator_is_touched(name):
    """Orders neither draw from the global generators nor depend on them, nor on the epochs asked for before."""
    orders = []
    for state in (1, 2):
        torch.manual_seed(state), random.seed(state), np.random.seed(state)  # noqa: NPY002
        before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
        sampler = sampler_of(ORDERS[name](), table(ROWS))
        if state == 2:
            sampler.order(7)
        orders.append(sampler.order(3))
        assert torch.equal(torch.get_rng_state(), before[0])
        assert (random.getstate(), np.random.get_state()[1].tolist()) == before[1:]  # noqa: NPY002
    assert torch.equal(*orders)


def test_the_default_is_random_by_name():
    """`random` gives the kernel's default order, for training; evaluations come as they are."""
    data = table(ROWS)
    assert torch.equal(sampler_of(Random(), data, seed=4).order(2), Shuffled(ROWS, 4).order(2))
    assert sampler_of(Random(), data, split="evaluate").order(2).tolist() == list(range(ROWS))
    assert sampler_of(Sequential(), data).order(2).tolist() == list(range(ROWS))


def rows_of_epoch(name, batch_size, workers=0):
    """Return the first column of every row that a run trains on in one epoch, in the order of the loader."""
    data = table(ROWS)
    data.columns["number"] = np.arange(ROWS)
    trainer = Trainer(tagger(), [ORDERS[name](), loader(name, batch_size, workers=workers), Numbers(), SGD()], epochs=1)
    run = trainer.assemble(data)
    return [n for micro in run.micros("train", 1) for n in micro.batch["number"].tolist()]


class Numbers:
    """Collate the row numbers."""

    @hookimpl
    def build_collator(self):
        return numbers


def numbers(rows):
    return {"number": torch.tensor([row["number"] for row in rows])}


@pytest.mark.parametrize("name", ORDERS)
def test_order_depends_on_neither_batch_size_nor_workers(name):
    """Batches of 3, of 8, and of 8 from a worker process, joined, are one order: that of the sampler."""
    wanted = sampler_of(ORDERS[name](), table(ROWS)).order(1).tolist()
    assert rows_of_epoch(name, 3) == wanted
    assert rows_of_epoch(name, 8) == wanted
    if name in {"group-by-length", "token-budget"}:
        assert rows_of_epoch(name, 8, workers=1) == wanted


def trainer_of(name, folder, *rest, accumulation=1):
    plugins = [EVERY[name](), loader(name, 8), Accumulate(accumulation), PadRows(), SGD(lr=0.5), *rest]
    checkpoint = Checkpoint(every="2 steps", keep=50)
    return Trainer(tagger(dropout=0.2), [*plugins, checkpoint], output=folder, epochs=2.5, log_every="1 step", seed=9)


@pytest.mark.parametrize(
    ("name", "accumulation"), [(name, 1) for name in EVERY] + [("token-budget", 3), ("rebalance", 2)]
)
def test_a_resumed_run_is_the_whole_run(name, accumulation, tmp_path):
    """Crashing twice, once in the second epoch, and going on, ends in the same bits, logs included."""
    data, whole = table(ROWS), Record()
    one = trainer_of(name, tmp_path / "one", whole, Crash(-1), accumulation=accumulation)
    one.fit(data)
    steps, parts = one.run.total_steps, []
    for at in (2, steps * 2 // 3, None):
        record = Record()
        two = trainer_of(name, tmp_path / "two", record, Crash(at or -1), accumulation=accumulation)
        try:
            two.fit(data, resume="auto")
        except KeyboardInterrupt:
            assert at is not None
        parts += record.logs
    assert_same_weights(one.model, two.model)
    logged = {step: metrics["loss"] for step, metrics in parts}
    assert logged == {step: metrics["loss"] for step, metrics in whole.logs}
    assert len(logged) == steps


@pytest.mark.parametrize("name", EVERY)
def test_a_stream_is_refused(name):
    """A stream has its own order: naming another is an error before step 0 that names the plugin."""
    rows = [{"input_ids": [1, 2], "labels": [1, 2]}] * 8
    trainer = Trainer(tagger(), [EVERY[name](), PadRows(), SGD()], steps=1)
    with pytest.raises(ConfigError, match=rf"{name}: .*\n.*received: (Iterated|a stream)"):
        trainer.assemble(Iterated(rows))


def epoch_on_ranks(name, accumulation):
    """Return this rank's steps of one epoch: rows, items and gradients."""
    watch = Watch()
    plugins = [EVERY[name](), loader(name, 4), Accumulate(accumulation), PadRows(), SGD(lr=1e-30), watch]
    if torch.distributed.is_initialized():
        plugins.append(AllReduce())
        plugins.append(plugins.pop(-2))
    Trainer(tagger(), plugins, epochs=1, device="cpu").fit(table(ROWS))
    return watch.steps


def assert_same_gradient(found, wanted):
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-12, atol=1e-14)


def rows_by_steps(sampler, batches, per_step):
    """Return the rows of each step, when `per_step` micro-batches are one."""
    order, bounds = sampler.order(0).tolist(), sampler.bounds(0).tolist()
    assert len(bounds) == batches + 1
    ends = [*bounds[::per_step], bounds[-1]]
    return [order[a:b] for a, b in itertools.pairwise(ends) if b > a]


def test_token_budgets_step_the_gradient_of_their_rows():
    """Ragged batches, accumulated or on two ranks, the last step included, have the gradient of a loop over the rows."""
    data = table(ROWS)
    sampler = sampler_of(EVERY["token-budget"](), data)
    batches = len(sampler.bounds(0)) - 1
    assert batches % 4  # the last window is ragged
    for per_step, runs in (
        (4, [epoch_on_ranks("token-budget", 4)]),
        (4, run_ranks(epoch_on_ranks, "token-budget", 2)),
    ):
        steps = rows_by_steps(sampler, batches, per_step)
        for run in runs:
            assert [rows for rows, _, _ in run] == [len(rows) for rows in steps]
            for (_, items, gradients), rows in zip(run, steps, strict=True):
                assert items == sum(len(data[row]["labels"]) for row in rows)
                assert_same_gradient(gradients, gradient_by_hand(data, rows))


def test_rebalancing_changes_no_gradient():
    """Every step of an epoch has the gradient that it has without it, by itself and on two ranks, the last included."""
    for accumulation in (1, 2):
        alone = epoch_on_ranks("rebalance", 2 * accumulation)
        wanted = epoch_on_ranks("random", 2 * accumulation)
        ranks = run_ranks(epoch_on_ranks, "rebalance", accumulation)
        for run in (alone, *ranks):
            assert [step[:2] for step in run] == [step[:2] for step in wanted]
            for ours, theirs in zip(run, wanted, strict=True):
                assert_same_gradient(ours[2], theirs[2])
