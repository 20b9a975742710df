"""`clip` is `torch.nn.utils.clip_grad_norm_`."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from plugin_helpers import assert_same_weights, columns, cpu_run, fit, net, train_by_hand

from drivetrain import Step
from drivetrain.loop import Defaults
from drivetrain_plugins import SGD, Clip


def step_with(gradients):
    """Return a step whose parameters have `gradients` (None for a parameter without one)."""
    parameters = []
    for gradient in gradients:
        parameter = torch.nn.Parameter(torch.zeros(3 if gradient is None else gradient.shape))
        parameter.grad = None if gradient is None else gradient.clone()
        parameters.append(parameter)
    run = cpu_run(parameters=tuple(parameters))
    run.hooks = SimpleNamespace(grad_norm=Defaults(run, None, {}).grad_norm)
    return Step(run, 0, [])


def gradients_of(step):
    return [p.grad for p in step.run.parameters]


@settings(deadline=None, max_examples=40)
@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=6),
    magnitude=st.floats(-8, 4),
    norm=st.floats(1e-3, 1e3),
    seed=st.integers(0, 2**31),
)
def test_gradients_and_norm_equal_torch_bit_for_bit(sizes, magnitude, norm, seed):
    """Whatever the gradients, they are scaled to the bits that torch's function leaves, and so is the norm."""
    draws = torch.Generator().manual_seed(seed)
    gradients = [10**magnitude * torch.randn(size, generator=draws) for size in sizes] + [None]
    ours, theirs = step_with(gradients), step_with(gradients)
    Clip(norm=norm).clip_gradients(ours)
    total = torch.nn.utils.clip_grad_norm_(theirs.run.parameters, norm)
    assert torch.equal(ours.grad_norm, total)
    for left, right in zip(gradients_of(ours), gradients_of(theirs), strict=True):
        assert (left is None and right is None) or torch.equal(left, right)


def test_large_gradients_get_the_norm_and_small_ones_stay():
    """A gradient of norm 5 becomes one of norm 1; one of norm 0.5 keeps its bits."""
    large, small = step_with([torch.tensor([3.0, 4.0])]), step_with([torch.tensor([0.3, 0.4])])
    for step in (large, small):
        Clip(norm=1.0).clip_gradients(step)
    torch.testing.assert_close(gradients_of(large)[0], torch.tensor([0.6, 0.8]))
    assert torch.equal(gradients_of(small)[0], torch.tensor([0.3, 0.4]))
    assert large.grad_norm.item() == 5.0


def test_not_finite_gradients_are_left_for_others_to_see():
    """A norm that is not finite reaches the step, where a guard can skip it, as torch's function hands it on."""
    step = step_with([torch.tensor([1.0, float("nan")])])
    Clip().clip_gradients(step)
    assert step.grad_norm.isnan()


def test_skipped_step_is_not_clipped():
    """A step that will not be applied keeps its gradients and measures nothing."""
    step = step_with([torch.tensor([30.0, 40.0])])
    step.skip("a test")
    Clip().clip_gradients(step)
    assert torch.equal(gradients_of(step)[0], torch.tensor([30.0, 40.0]))
    assert step.grad_norm is None


def test_run_equals_torch_by_hand():
    """Steps with clipping leave the bits of a hand-written loop, and log its norms."""
    data, ours, theirs = columns(), net(), net()
    _, record = fit(ours, [SGD(lr=0.5), Clip(norm=0.2)], data, steps=10)
    history = train_by_hand(
        theirs, data, torch.optim.SGD(theirs.parameters(), lr=0.5, fused=True), steps=10, max_norm=0.2
    )
    assert_same_weights(ours, theirs)
    assert record.of("grad_norm") == [step["grad_norm"] for step in history]
    assert max(record.of("grad_norm")) > 0.2  # something was clipped


def test_norm_of_zero_is_refused():
    """A norm of zero would stop training, and is refused."""
    with pytest.raises(ValueError, match="norm must be a number > 0"):
        Clip(norm=0)
