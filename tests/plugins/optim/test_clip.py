"""`clip` is `torch.nn.utils.clip_grad_norm_` and its relatives, and adaptive clipping."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from plugin_helpers import assert_same_weights, columns, cpu_run, fit, net, train_by_hand

from drivetrain import ConfigError, Step
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


# --- the other modes ---------------------------------------------------------------------------------------------------

GRADIENTS = st.lists(st.integers(1, 40), min_size=1, max_size=6)


def drawn(sizes, seed, magnitude=0.0):
    draws = torch.Generator().manual_seed(seed)
    return [10**magnitude * torch.randn(size, generator=draws) for size in sizes] + [None]


@settings(deadline=None, max_examples=30)
@given(
    sizes=GRADIENTS,
    magnitude=st.floats(-3, 3),
    norm=st.floats(1e-2, 1e2),
    seed=st.integers(0, 2**31),
    norm_type=st.sampled_from([1.0, 2.0, 3.5, float("inf")]),
)
def test_every_norm_equals_torch_bit_for_bit(sizes, magnitude, norm, seed, norm_type):
    """With another norm, in total or for each parameter by itself, gradients and the logged norm are torch's."""
    gradients = drawn(sizes, seed, magnitude)
    total, each, theirs, one_by_one = (step_with(gradients) for _ in range(4))
    Clip(norm=norm, norm_type=norm_type).clip_gradients(total)
    Clip(norm=norm, norm_type=norm_type, mode="per-parameter").clip_gradients(each)
    expected = torch.nn.utils.clip_grad_norm_(theirs.run.parameters, norm, norm_type)
    for parameter in one_by_one.run.parameters:
        torch.nn.utils.clip_grad_norm_([parameter], norm, norm_type)
    assert torch.equal(total.grad_norm, expected)
    assert torch.equal(each.grad_norm, expected)
    for ours, reference in ((total, theirs), (each, one_by_one)):
        for left, right in zip(gradients_of(ours), gradients_of(reference), strict=True):
            assert (left is None and right is None) or torch.equal(left, right)


@settings(deadline=None, max_examples=30)
@given(sizes=GRADIENTS, value=st.floats(1e-3, 3), seed=st.integers(0, 2**31))
def test_elements_equal_torch_bit_for_bit(sizes, value, seed):
    """Elements are cut as torch's function cuts them, and the norm before that is logged."""
    gradients = drawn(sizes, seed)
    ours, theirs = step_with(gradients), step_with(gradients)
    Clip(mode="value", value=value).clip_gradients(ours)
    before = torch.nn.utils.get_total_norm(gradients[:-1])
    torch.nn.utils.clip_grad_value_(theirs.run.parameters, value)
    assert torch.equal(ours.grad_norm, before)
    for left, right in zip(gradients_of(ours), gradients_of(theirs), strict=True):
        assert (left is None and right is None) or torch.equal(left, right)


class Units(torch.nn.Module):
    """A convolution, a matrix, and vectors."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(6)
        self.conv, self.linear = torch.nn.Conv2d(2, 3, 2), torch.nn.Linear(3, 4)
        self.scale, self.head = torch.nn.Parameter(torch.zeros(5, 1)), torch.nn.Linear(4, 2)

    def forward(self, features, labels):
        hidden = self.conv(features[:, :, None, None].expand(-1, -1, 2, 2)[:, :2])[:, :, 0, 0]
        logits = self.head(torch.tanh(self.linear(hidden))) + 0 * self.scale.sum()
        return {"loss": 30 * torch.nn.functional.cross_entropy(logits, labels)}


def limited(gradient, weight, factor, eps):
    """Limit one unit's gradient as the paper's equation 3 does."""
    size, most = gradient.norm(), factor * max(weight.norm().item(), eps)
    return gradient * (most / size) if size > most else gradient


@pytest.mark.parametrize("factor", [0.01, 0.3])
def test_adaptive_limits_each_unit(factor):
    """A row, a filter or a vector has at most `factor` times its weights' norm; what is excluded stays."""
    model, data = Units(), {"features": torch.randn(8, 2), "labels": torch.randint(0, 2, (8,))}
    run = cpu_run(model=model, parameters=tuple(model.parameters()))
    run.hooks = SimpleNamespace(grad_norm=Defaults(run, model, {}).grad_norm)
    clip, step = Clip(mode="adaptive", factor=factor, eps=0.05, exclude=["head"]), Step(run, 0, [])
    clip.assembled(run)
    model(**data)["loss"].backward()
    model.scale.grad = torch.ones(5, 1)  # a vector by another shape, whose weights are zero
    before = {name: p.grad.clone() for name, p in model.named_parameters()}
    clip.clip_gradients(step)
    changed = 0
    for name, parameter in model.named_parameters():
        units = (
            [(before[name], parameter)] if parameter.squeeze().ndim < 2 else zip(before[name], parameter, strict=True)
        )
        expected = [g if name.startswith("head") else limited(g, w.detach(), factor, 0.05) for g, w in units]
        expected = expected[0] if parameter.squeeze().ndim < 2 else torch.stack(expected)
        torch.testing.assert_close(parameter.grad, expected, rtol=1e-5, atol=1e-9, msg=name)
        changed += not torch.equal(parameter.grad, before[name])
    assert changed >= 3
    assert model.scale.grad.norm().item() == pytest.approx(factor * 0.05)
    assert torch.equal(step.grad_norm, torch.nn.utils.get_total_norm(list(before.values())))


@pytest.mark.parametrize(
    "options", [{"mode": "value", "value": 0.01}, {"mode": "per-parameter", "norm": 0.05}, {"mode": "adaptive"}]
)
def test_modes_act_in_a_run(options):
    """Each mode changes what is trained, and logs the norm."""
    data, ours, plain = columns(), net(), net()
    _, record = fit(ours, [SGD(lr=0.5), Clip(**options)], data, steps=4)
    fit(plain, [SGD(lr=0.5)], data, steps=4)
    assert not torch.equal(ours.first.weight, plain.first.weight)
    assert len(record.of("grad_norm")) == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"value": 0.1}, "value is read by mode 'value' only"),
        ({"factor": 0.1}, "factor is read by mode 'adaptive' only"),
        ({"mode": "value"}, "needs a value"),
        ({"mode": "value", "value": 0.1, "exclude": ["a"]}, "exclude is read by mode 'adaptive' only"),
        ({"mode": "adaptive", "norm_type": 1}, "takes 2-norms"),
        ({"mode": "adaptiv"}, "did you mean 'adaptive'"),
    ],
)
def test_options_of_another_mode_are_refused(options, message):
    """An option that the mode does not read is refused, as is a mode without what it needs."""
    with pytest.raises(ValueError, match=message):
        Clip(**options)


def test_excluded_names_must_be_there():
    """A pattern that matches nothing is refused with names that are near."""
    with pytest.raises(ConfigError, match=r"'lats'(.|\n)*'last"):
        fit(net(), [SGD(), Clip(mode="adaptive", exclude=["lats"])], columns(), steps=1)
