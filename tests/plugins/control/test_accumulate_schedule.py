"""`accumulate-schedule` takes as many micro-batches as its stages say, and counts the steps that makes."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plugin_helpers import assert_same_weights, columns, fit, net

from drivetrain import PlanError, Trainer, hookimpl
from drivetrain.testing.digests import digest
from drivetrain.testing.probes import StopAt
from drivetrain_plugins import SGD, Accumulate, AccumulateSchedule, Linear


class Windows:
    """Keep how many micro-batches each step had, and skip some steps."""

    def __init__(self, *skipped):
        self.sizes, self.skipped = [], skipped

    @hookimpl
    def gradients_ready(self, step):
        self.sizes.append(len(step.micros))
        if step.number in self.skipped:
            step.skip("the test asked for it")


def stages(*pairs, last):
    return [*({"until": until, "batches": batches} for until, batches in pairs), {"batches": last}]


@settings(deadline=None, max_examples=12)
@given(
    rows=st.integers(1, 70), epochs=st.sampled_from([1, 2, 3, 0.5, 1.3, 2.5]), sizes=st.lists(st.integers(1, 5), min_size=3, max_size=3),
    lengths=st.lists(st.integers(1, 4), min_size=2, max_size=2),
)  # fmt: skip
def test_counted_steps_are_those_taken(rows, epochs, sizes, lengths):
    """A run of any epochs takes each window as its stage says and an epoch's rest as it is, and ends with its data."""
    first, second = lengths[0], lengths[0] + lengths[1]
    plugin = AccumulateSchedule(stages=stages((first, sizes[0]), (second, sizes[1]), last=sizes[2]))
    seen = Windows()
    run = fit(net(), [SGD(), plugin, seen], columns(rows), epochs=epochs)[0].run
    micros, expected, left = -(-rows // 8), [], 0
    for _ in range(int(epochs) + 1):
        left = micros
        while left:
            stage = 0 if len(expected) < first else 1 if len(expected) < second else 2
            expected.append(min(left, sizes[stage]))
            left -= expected[-1]
    assert seen.sizes == expected[: len(seen.sizes)]
    assert run.progress.step == run.total_steps
    if epochs == int(epochs):
        assert sum(seen.sizes) == epochs * micros
        assert (run.progress.epoch, run.progress.rows_in_epoch) == (epochs, 0)
    else:
        assert int(epochs) <= run.epochs <= int(epochs) + 1


def test_a_constant_schedule_is_accumulate():
    """With one stage it is `accumulate`: the same weights, steps and schedule."""
    one, other = net(dropout=0.2), net(dropout=0.2)
    first = fit(one, [SGD(lr=0.1), Accumulate(3), Linear()], columns(), epochs=2.4)[0]
    second = fit(other, [SGD(lr=0.1), AccumulateSchedule(stages=[{"batches": 3}]), Linear()], columns(), epochs=2.4)[0]
    assert_same_weights(one, other)
    assert first.run.total_steps == second.run.total_steps == 5


def test_skipped_steps_are_no_updates():
    """A stage lasts for its updates, however many steps they take (law 8)."""
    seen = Windows(0, 2)
    fit(net(), [SGD(), AccumulateSchedule(stages=stages((2, 1), last=2)), seen], columns(80), steps=7)
    assert seen.sizes == [1, 1, 1, 1, 2, 2, 2]


def test_resume_is_exact():
    """Stopped in the first stage and in the second, it goes on in the same windows."""

    def begin(*more):
        plugins = [SGD(lr=0.1), AccumulateSchedule(stages=stages((2, 1), (4, 3), last=2)), Linear(), *more]
        return Trainer(net(dropout=0.2), plugins, epochs=3, device="cpu").assemble(columns())

    def go_on(run):
        run.model.train()
        run.hooks.fit(run)
        return run

    straight = go_on(begin())
    for stop in (1, 3):
        part, rest = go_on(begin(StopAt(stop))), begin()
        rest.load_state_dict(part.state_dict())
        assert digest(go_on(rest)) == digest(straight)


@pytest.mark.parametrize(
    ("given_", "told"),
    [
        ([], "no stages"),
        ([{"until": 2, "batches": 1}], "is the last and must have no `until`"),
        ([{"batches": 1}, {"batches": 2}], "stage 1 needs `until`"),
        ([{"batches": 0}], "whole number from 1 on. Received: 0"),
        ([{"batch": 2}], "no option 'batch': did you mean 'batches'"),
        ([{"until": "2 epochs", "batches": 1}, {"batches": 2}], "until must be a number of updates"),
        (stages((3, 1), (3, 2), last=4), "stage 2 ends where it begins"),
    ],
)
def test_stages_that_cannot_be(given_, told):
    """What is wrong with the stages is told when the plugin is made."""
    with pytest.raises(ValueError, match=told):
        AccumulateSchedule(stages=given_)


def test_two_accumulations_are_refused():
    """`accumulate` and its schedule are not for one run."""
    with pytest.raises(PlanError, match="cannot be combined"):
        Trainer(net(), [SGD(), Accumulate(2), AccumulateSchedule(stages=[{"batches": 3}])], steps=1).fit(columns())
