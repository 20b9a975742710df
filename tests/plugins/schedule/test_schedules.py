"""Every schedule that is a function of the step gives the rates of `transformers` or `torch`, for runs of any length."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from plugin_helpers import assert_same_weights, columns, cpu_run, fit, net

from drivetrain import ConfigError, Trainer
from drivetrain.testing import StopAt
from drivetrain_plugins import SGD, Checkpoint
from drivetrain_plugins.schedule.cosine import Cosine
from drivetrain_plugins.schedule.cosine_min_lr import CosineMinLR
from drivetrain_plugins.schedule.cosine_restarts import CosineRestarts
from drivetrain_plugins.schedule.cosine_warmup_min_lr import CosineWarmupMinLR
from drivetrain_plugins.schedule.exponential import Exponential
from drivetrain_plugins.schedule.inverse_sqrt import InverseSqrt
from drivetrain_plugins.schedule.linear import Linear
from drivetrain_plugins.schedule.multi_step import MultiStep
from drivetrain_plugins.schedule.one_cycle import OneCycle
from drivetrain_plugins.schedule.polynomial import Polynomial
from drivetrain_plugins.schedule.step import StepDecay
from drivetrain_plugins.schedule.warmup_stable_decay import WarmupStableDecay

RATE = 0.25
SHAPES = ("linear", "cosine", "1-sqrt")
unit = st.floats(0, 1)


def optimizer():
    return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=RATE)


def run_of(total):
    """Return a run of so many steps whose optimizer has the rate."""
    made = optimizer()
    made.param_groups[0]["initial_lr"] = RATE
    return cpu_run(total_steps=total, optimizer=made)


def transformers_factors(name, warm, total, **arguments):
    from transformers import get_scheduler

    made = get_scheduler(
        name, optimizer(), num_warmup_steps=warm, num_training_steps=total, scheduler_specific_kwargs=arguments
    )
    return [made.lr_lambdas[0](step) for step in range(total + 1)]


def torch_factors(kind, total, **arguments):
    made = optimizer()
    schedule = kind(made, **arguments)
    rates = []
    for _ in range(total):
        rates.append(made.param_groups[0]["lr"] / RATE)
        made.step()
        schedule.step()
    return rates


def factors(plugin, total):
    schedule = plugin.build_schedule(run_of(total))
    return [schedule(step) for step in range(total + 1)]


@st.composite
def lengths(draw):
    """Draw (all steps, warm-up steps), the warm-up shorter than the run."""
    total = draw(st.integers(2, 300))
    return total, draw(st.integers(0, total - 1))


@settings(deadline=None, max_examples=40)
@given(length=lengths(), cycles=st.sampled_from([0.5, 1.0, 1.7, 3.0]))
def test_cosine(length, cycles):
    """The factors are transformers' cosine, for any number of waves."""
    total, warm = length
    expected = transformers_factors("cosine", warm, total, num_cycles=cycles)
    assert factors(Cosine(warmup=warm, cycles=cycles), total) == expected


@settings(deadline=None, max_examples=40)
@given(length=lengths(), cycles=st.integers(1, 5))
def test_cosine_restarts(length, cycles):
    """The factors are transformers' cosine with hard restarts."""
    total, warm = length
    expected = transformers_factors("cosine_with_restarts", warm, total, num_cycles=cycles)
    assert factors(CosineRestarts(warmup=warm, cycles=cycles), total) == expected


@settings(deadline=None, max_examples=40)
@given(length=lengths(), power=st.floats(0.3, 4), end=st.floats(0, RATE / 2))
def test_polynomial(length, power, end):
    """The factors are transformers' polynomial decay."""
    total, warm = length
    expected = transformers_factors("polynomial", warm, total, power=power, lr_end=end)
    assert factors(Polynomial(warmup=warm, power=power, end=end), total) == pytest.approx(
        expected, rel=1e-12, abs=1e-15
    )


@settings(deadline=None, max_examples=40)
@given(length=lengths(), timescale=st.none() | st.integers(1, 500))
def test_inverse_sqrt(length, timescale):
    """The factors are transformers' inverse square root, its timescale derived from the warm-up as there."""
    total, warm = length
    expected = transformers_factors("inverse_sqrt", warm, total, timescale=timescale)
    assert factors(InverseSqrt(warmup=warm, timescale=timescale), total) == expected


@settings(deadline=None, max_examples=40)
@given(length=lengths(), least=unit, cycles=st.sampled_from([0.5, 1.5]), as_rate=st.booleans())
def test_cosine_min_lr(length, least, cycles, as_rate):
    """The factors are transformers' cosine with a smallest rate, given either way."""
    total, warm = length
    theirs = {"min_lr": least * RATE} if as_rate else {"min_lr_rate": least}
    ours = {"min_lr": least * RATE} if as_rate else {"min_share": least}
    expected = transformers_factors("cosine_with_min_lr", warm, total, num_cycles=cycles, **theirs)
    assert factors(CosineMinLR(warmup=warm, cycles=cycles, **ours), total) == expected


@settings(deadline=None, max_examples=40)
@given(length=lengths(), least=unit, first=st.none() | unit)
def test_cosine_warmup_min_lr(length, least, first):
    """The factors are transformers' cosine whose warm-up begins above zero."""
    total, warm = length
    expected = transformers_factors("cosine_warmup_with_min_lr", warm, total, min_lr_rate=least, warmup_lr_rate=first)
    assert factors(CosineWarmupMinLR(warmup=warm, min_share=least, first_share=first), total) == expected


@settings(deadline=None, max_examples=60)
@given(length=lengths(), data=st.data(), rise=st.sampled_from(SHAPES), fall=st.sampled_from(SHAPES), least=unit)
def test_warmup_stable_decay(length, data, rise, fall, least):
    """The factors are transformers' warm-up, plateau and decay, of every shape."""
    total, warm = length
    decay = data.draw(st.integers(1, total - warm))
    expected = transformers_factors(
        "warmup_stable_decay", warm, total, num_decay_steps=decay, warmup_type=rise,
        decay_type=fall, min_lr_ratio=least,
    )  # fmt: skip
    ours = WarmupStableDecay(warmup=warm, decay=decay, warmup_shape=rise, decay_shape=fall, min_share=least)
    assert factors(ours, total) == pytest.approx(expected, rel=1e-12, abs=1e-12)


@settings(deadline=None, max_examples=30)
@given(total=st.integers(2, 100), gamma=st.floats(0.5, 1), size=st.integers(1, 30))
def test_torch_exponential_and_step(total, gamma, size):
    """Without a warm-up, `exponential` and `step` give the rates of torch's schedulers."""
    expected = torch_factors(torch.optim.lr_scheduler.ExponentialLR, total, gamma=gamma)
    assert factors(Exponential(gamma=gamma), total)[:-1] == pytest.approx(expected, rel=1e-9)
    expected = torch_factors(torch.optim.lr_scheduler.StepLR, total, step_size=size, gamma=gamma)
    assert factors(StepDecay(size=size, gamma=gamma), total)[:-1] == pytest.approx(expected, rel=1e-9)


@settings(deadline=None, max_examples=30)
@given(total=st.integers(2, 100), milestones=st.sets(st.integers(1, 100), min_size=1, max_size=5))
def test_torch_multi_step(total, milestones):
    """`multi-step` gives the rates of torch's scheduler."""
    expected = torch_factors(torch.optim.lr_scheduler.MultiStepLR, total, milestones=sorted(milestones), gamma=0.3)
    ours = factors(MultiStep(milestones=tuple(milestones), gamma=0.3), total)[:-1]
    assert ours == pytest.approx(expected, rel=1e-9)


@settings(deadline=None, max_examples=30)
@given(total=st.integers(10, 200), rise=st.floats(0.15, 0.85), first=st.floats(2, 50), last=st.floats(2, 1e4))
def test_torch_one_cycle(total, rise, first, last):
    """`one-cycle` gives the rates of torch's scheduler."""
    expected = torch_factors(
        torch.optim.lr_scheduler.OneCycleLR, total, max_lr=RATE, total_steps=total + 1, pct_start=rise,
        div_factor=first, final_div_factor=last, cycle_momentum=False,
    )  # fmt: skip
    ours = OneCycle(rise=rise, first=first, last=last).build_schedule(run_of(total + 1))
    assert [ours(step) for step in range(total)] == pytest.approx(expected, rel=1e-9)


def test_a_warmup_in_tokens_follows_the_items():
    """The rate rises with the items that were trained on, whatever the steps, and then follows the schedule alone."""
    _, record = fit(net(), [SGD(lr=1.0), Linear(warmup="20 tokens")], columns(), steps=5)
    items = [0, 8, 16, 24, 32]  # before each step of eight rows
    assert record.of("learning_rate") == pytest.approx([min(1, n / 20) * (1 - s / 5) for s, n in enumerate(items)])


def test_a_warmup_in_tokens_goes_on_after_a_stop(tmp_path):
    """A resumed run counts the items that were trained on before it: the weights are those of a run left alone."""

    def trainer(model, folder, steps):
        plugins = [
            SGD(lr=0.5),
            Linear(warmup="30 tokens"),
            Checkpoint(every="2 steps", on_change="accept"),
            *([StopAt(steps)] if steps else []),
        ]
        return Trainer(model, plugins, steps=6, device="cpu", output=folder)

    alone, first, second = net(), net(), net()
    trainer(alone, tmp_path / "alone", None).fit(columns())
    trainer(first, tmp_path / "stopped", 2).fit(columns())
    trainer(second, tmp_path / "stopped", None).fit(columns(), resume=True)
    assert_same_weights(alone, second)


@pytest.mark.parametrize(
    ("warmup", "told"),
    [(-1, "not negative"), (math.nan, "not negative"), (True, "not negative"), ("3 epochs", "steps or tokens"), ("fast", "unknown unit")],
)  # fmt: skip
def test_a_bad_warmup_is_refused(warmup, told):
    """A warm-up that is no number of steps, share or tokens is refused when the plugin is made."""
    with pytest.raises(ValueError, match=told):
        Linear(warmup=warmup)


@pytest.mark.parametrize(
    ("plugin", "told"),
    [
        (Polynomial(end=1.0), "polynomial: the rate would not fall"),
        (CosineMinLR(), "either min_lr or min_share"),
        (CosineMinLR(min_lr=0.1, min_share=0.1), "either min_lr or min_share"),
        (CosineWarmupMinLR(min_lr=1.0), "the rate would rise"),
        (CosineWarmupMinLR(min_share=0.1, warmup="10 tokens"), "cannot be in tokens"),
        (WarmupStableDecay(warmup=8, decay=8), "longer than the run"),
        (WarmupStableDecay(warmup="10 tokens"), "cannot be in tokens"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_what_cannot_be_is_refused(plugin, told):
    """A schedule that contradicts itself, the optimizer or the run is refused before step 0."""
    with pytest.raises(ConfigError, match=told):
        plugin.build_schedule(run_of(10))
