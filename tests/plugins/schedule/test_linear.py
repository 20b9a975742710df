"""`linear` is transformers' linear schedule with warm-up."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from plugin_helpers import assert_same_weights, columns, cpu_run, fit, net, train_by_hand

from drivetrain import ConfigError, hookimpl
from drivetrain_plugins import SGD, Linear


def reference(total, warm, optimizer=None):
    """Return transformers' scheduler."""
    from transformers import get_scheduler

    optimizer = optimizer or torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    return get_scheduler("linear", optimizer, num_warmup_steps=warm, num_training_steps=total)


@settings(deadline=None, max_examples=60)
@given(total=st.integers(1, 400), data=st.data())
def test_factors_equal_transformers(total, data):
    """For every step of every run, warm-up given as steps, the factor is transformers'."""
    warm = data.draw(st.integers(0, total))
    factor = Linear(warmup=warm).build_schedule(cpu_run(total_steps=total))
    expected = reference(total, warm).lr_lambdas[0]
    assert [factor(step) for step in range(total + 2)] == [expected(step) for step in range(total + 2)]


@settings(deadline=None, max_examples=60)
@given(total=st.integers(1, 400), share=st.floats(0, 1, exclude_max=True))
def test_warmup_below_one_is_a_share_of_all_steps(total, share):
    """A share is rounded up to whole steps, as transformers' warmup_ratio is."""
    factor = Linear(warmup=share).build_schedule(cpu_run(total_steps=total))
    expected = reference(total, math.ceil(total * share)).lr_lambdas[0]
    assert [factor(step) for step in range(total + 1)] == [expected(step) for step in range(total + 1)]


def test_run_equals_torch_by_hand():
    """A run with warm-up and decay leaves the rates and the bits of a hand-written loop with transformers' scheduler."""
    data, ours, theirs = columns(), net(), net()
    _, record = fit(ours, [SGD(lr=0.3, momentum=0.9), Linear(warmup=0.25)], data, steps=12)
    optimizer = torch.optim.SGD(theirs.parameters(), lr=0.3, momentum=0.9, fused=True)
    history = train_by_hand(theirs, data, optimizer, steps=12, scheduler=reference(12, 3, optimizer))
    assert record.of("learning_rate") == [step["learning_rate"] for step in history]
    assert_same_weights(ours, theirs)


def test_skipped_step_does_not_move_the_rate():
    """The step after a skipped one has the rate that the skipped one had."""

    class SkipThird:
        @hookimpl
        def gradients_ready(self, step):
            if step.number == 2:
                step.skip("a test")

    _, record = fit(net(), [SGD(lr=1.0), Linear(), SkipThird()], columns(), steps=5)
    assert record.of("learning_rate") == [1.0, 0.8, 0.6, 0.6, 0.4]  # 1 - applied/5


def test_warmup_longer_than_the_run_is_refused_by_name():
    """A warm-up that would never end is refused before the first step."""
    with pytest.raises(ConfigError, match=r"warm-up of 'linear' is longer[\s\S]*warmup=11 steps for 10 steps"):
        Linear(warmup=11).build_schedule(cpu_run(total_steps=10))
