"""`constant` is transformers' constant schedule with warm-up."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from plugin_helpers import columns, cpu_run, fit, net

from drivetrain import ConfigError
from drivetrain_plugins import SGD, Constant


@settings(deadline=None, max_examples=60)
@given(total=st.integers(1, 400), data=st.data())
def test_factors_equal_transformers(total, data):
    """For every step of every run, the factor is transformers'."""
    from transformers import get_scheduler

    warm = data.draw(st.integers(0, total))
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    expected = get_scheduler("constant_with_warmup", optimizer, num_warmup_steps=warm).lr_lambdas[0]
    factor = Constant(warmup=warm).build_schedule(cpu_run(total_steps=total))
    assert [factor(step) for step in range(total + 2)] == [expected(step) for step in range(total + 2)]


def test_run_warms_up_then_keeps_the_rate():
    """The logged rates rise by quarters over the warm-up and then stay."""
    _, record = fit(net(), [SGD(lr=0.4), Constant(warmup=4)], columns(), steps=7)
    assert record.of("learning_rate") == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4, 0.4, 0.4])


def test_without_warmup_it_is_the_default():
    """Without a warm-up the factor is 1 from the first step."""
    factor = Constant().build_schedule(cpu_run(total_steps=3))
    assert [factor(step) for step in range(4)] == [1.0] * 4


def test_warmup_longer_than_the_run_is_refused_by_name():
    """A warm-up that would never end is refused before the first step."""
    with pytest.raises(ConfigError, match="warm-up of 'constant' is longer"):
        Constant(warmup=4).build_schedule(cpu_run(total_steps=3))
