"""`batch-size-schedule` cuts batches by the rows that the run has consumed."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from plugin_helpers import as_rows, assert_same_weights, columns, fit, net

from drivetrain import ConfigError, PlanError, Shuffled, Trainer, hookimpl
from drivetrain.testing.digests import digest
from drivetrain.testing.probes import StopAt
from drivetrain.testing.ranks import run_ranks
from drivetrain_plugins import SGD, Accumulate, BatchSizeSchedule, Loader, TokenBudget

STAGES = [{"until": "20 samples", "size": 4}, {"until": "1.5 epochs", "size": 10}, {"size": 16}]


class Sizes:
    """Keep the rows of each step's micro-batches."""

    def __init__(self):
        self.all = []

    @hookimpl
    def gradients_ready(self, step):
        self.all.append([micro.num_rows for micro in step.micros])


def by_hand(rows, epochs, ends, sizes):
    """Return the sizes of all batches of so many epochs."""
    found, consumed = [], 0
    for _ in range(epochs):
        left = rows
        while left:
            stage = sum(consumed >= end for end in ends)
            found.append(min(left, sizes[stage]))
            left -= found[-1]
            consumed += found[-1]
    return found


@settings(deadline=None, max_examples=12)
@given(
    rows=st.integers(1, 60), epochs=st.integers(1, 4), first=st.integers(1, 50), second=st.integers(1, 80),
    sizes=st.lists(st.integers(1, 20), min_size=3, max_size=3),
)  # fmt: skip
def test_counted_steps_are_those_taken(rows, epochs, first, second, sizes):
    """Batches have their stage's size, though epochs then differ in their number; the run ends with its data."""
    ends = [first, first + second]
    plugin = BatchSizeSchedule(
        stages=[*({"until": f"{n} samples", "size": s} for n, s in zip(ends, sizes, strict=False)), {"size": sizes[2]}]
    )
    seen = Sizes()
    run = fit(net(), [SGD(), plugin, seen], columns(rows), epochs=epochs)[0].run
    assert [size for step in seen.all for size in step] == by_hand(rows, epochs, ends, sizes)
    assert (run.progress.epoch, run.progress.rows_in_epoch) == (epochs, 0)


def test_run_equals_a_loop_by_hand():
    """Weights are those of a loop that cuts the same order, stages in rows and epochs."""
    data, ours, theirs = columns(), net(), net()
    fit(ours, [SGD(lr=0.1, momentum=0.9), BatchSizeSchedule(stages=STAGES)], data, epochs=3)
    optimizer = torch.optim.SGD(theirs.parameters(), lr=0.1, momentum=0.9, fused=True)
    sizes = iter(by_hand(40, 3, [20, 60], [4, 10, 16]))
    for epoch in range(3):
        order = Shuffled(40, 0).order(epoch)
        while len(order):
            size = next(sizes)
            picked, order = order[:size], order[size:]
            theirs(**{name: column[picked] for name, column in data.items()})["loss"].backward()
            optimizer.step()
            optimizer.zero_grad()
    assert_same_weights(ours, theirs)


def test_accumulated_steps_are_counted():
    """Each epoch's last step takes what is left of its batches."""
    seen = Sizes()
    run = fit(net(), [SGD(), Accumulate(3), BatchSizeSchedule(stages=STAGES), seen], columns(), epochs=2)[0].run
    assert seen.all == [[4, 4, 4], [4, 4, 10], [10], [10, 10, 16], [4]]
    assert run.total_steps == 5


@pytest.mark.parametrize("stop", [3, 8])
def test_resume_is_exact_with_any_workers(stop):
    """Stopped in one stage, it goes on in the same batches, whether workers make them or not."""

    def begin(*more):
        plugins = [SGD(lr=0.1), BatchSizeSchedule(stages=STAGES), *more]
        return Trainer(net(dropout=0.2), plugins, epochs=3, device="cpu").assemble(as_rows(columns()))

    def go_on(run):
        run.model.train()
        run.hooks.fit(run)
        return run

    straight, part, rest = go_on(begin()), go_on(begin(Loader(workers=2), StopAt(stop))), begin(Loader(workers=1))
    rest.load_state_dict(part.state_dict())
    assert digest(go_on(rest), "model", "progress") == digest(straight, "model", "progress")


def on_a_rank():
    class Said:
        provides = ("data-parallel",)  # said, not done: this test is about rows

    seen = Sizes()
    run = fit(net(), [SGD(), Said(), BatchSizeSchedule(stages=STAGES), seen], columns(), epochs=2)[0].run
    return seen.all, run.progress


def test_ranks_share_a_step_in_equal_batches():
    """Both ranks of a step have the size of its first row, and the stages are measured in the rows of both."""
    (first, progress), (second, same) = run_ranks(on_a_rank)
    assert progress == same
    assert (progress.epoch, progress.rows) == (2, 80)
    assert [one[0] for one in first] == [4, 4, 4, 10, 10, 16]
    assert [one[0] for one in second] == [4, 4, 4, 6, 10, 4]


@pytest.mark.parametrize(
    ("given_", "told"),
    [
        ([{"until": "5 steps", "size": 2}, {"size": 4}], "rows or epochs"),
        ([{"until": "soon", "size": 2}, {"size": 4}], "unknown unit"),
        ([{"size": 2.5}], "whole number"),
    ],
)
def test_stages_that_cannot_be(given_, told):
    """What is wrong with the stages is told when the plugin is made."""
    with pytest.raises(ValueError, match=told):
        BatchSizeSchedule(stages=given_)


def test_refusals():
    """A second who cuts, stages out of order, a size in the loader, and a stream are told before step 0."""
    plugin = BatchSizeSchedule(stages=STAGES)
    with pytest.raises(PlanError, match="cannot be combined"):
        Trainer(net(), [SGD(), plugin, TokenBudget()], steps=1).fit(columns())
    backwards = BatchSizeSchedule(
        stages=[{"until": "2 epochs", "size": 2}, {"until": "50 samples", "size": 4}, {"size": 8}]
    )
    with pytest.raises(ConfigError, match=r"stage 2 ends where it begins.*\[80, 50\] rows, of 40"):
        fit(net(), [SGD(), backwards], columns(), steps=1)
    with pytest.raises(ConfigError, match="loader: Growing cuts the train batches itself"):
        fit(net(), [SGD(), plugin, Loader(batch_size=4)], columns(), steps=1)

    class Stream:
        def __iter__(self):
            return iter(as_rows(columns()))

    with pytest.raises(ConfigError, match=r"(?s)batch-size-schedule: the training data is not cut.*Iterated"):
        fit(net(), [SGD(), plugin], Stream(), steps=1)
