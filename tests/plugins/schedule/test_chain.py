"""`chain` follows schedules one after the other, as torch's SequentialLR does."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from plugin_helpers import as_rows, columns, cpu_run, fit, net

from drivetrain import ConfigError, Trainer, hookimpl
from drivetrain.testing.digests import digest
from drivetrain.testing.probes import StopAt
from drivetrain_plugins import SGD, Accumulate, AccumulateSchedule, Chain, Exponential

RATE = 0.25


def optimizer():
    return torch.optim.SGD([{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": RATE, "initial_lr": RATE}])


def factors(plugin, total):
    (schedule,) = plugin.build_schedule(cpu_run(total_steps=total, optimizer=optimizer()))
    return [schedule(step) for step in range(total)]


@settings(deadline=None, max_examples=40)
@given(lengths=st.lists(st.integers(2, 40), min_size=3, max_size=3), data=st.data(), gamma=st.floats(0.5, 1))
def test_factors_are_those_of_sequential_lr(lengths, data, gamma):
    """Parts of any length give the rates of torch's SequentialLR over the schedulers of torch and transformers."""
    from transformers import get_scheduler

    warm = data.draw(st.integers(0, lengths[0] - 1))
    made, total = optimizer(), sum(lengths)
    parts = [
        get_scheduler("linear", made, num_warmup_steps=warm, num_training_steps=lengths[0]),
        torch.optim.lr_scheduler.ExponentialLR(made, gamma),
        get_scheduler("cosine", made, num_warmup_steps=0, num_training_steps=lengths[2]),
    ]
    theirs = torch.optim.lr_scheduler.SequentialLR(made, parts, [lengths[0], lengths[0] + lengths[1]])
    expected = []
    for _ in range(total):
        expected.append(made.param_groups[0]["lr"] / RATE)
        made.step()
        theirs.step()
    ours = Chain(
        parts=[
            {"plugin": "linear", "warmup": warm or 0.0, "until": lengths[0]},
            {"plugin": Exponential(gamma=gamma), "until": f"{lengths[0] + lengths[1]} steps"},
            {"plugin": "cosine"},
        ]
    )
    assert factors(ours, total) == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_shares_are_of_the_run_and_warmups_of_the_part():
    """A part that ends at a quarter of the run is a run of that quarter: a warm-up of a half is half of it."""
    ours = Chain(parts=[{"plugin": "constant", "warmup": 0.5, "until": 0.25}, {"plugin": "linear"}])
    assert factors(ours, 16) == pytest.approx([0, 0.5, 1, 1, *((12 - n) / 12 for n in range(12))])


class Epochs:
    """Keep each step's rate and the epoch it was in."""

    def __init__(self):
        self.all, self._epoch = [], 0

    @hookimpl
    def step_end(self, step):
        self.all.append((self._epoch, step.learning_rate))
        self._epoch = step.run.progress.epoch


@pytest.mark.parametrize(
    "control", [Accumulate(3), AccumulateSchedule(stages=[{"until": 4, "batches": 1}, {"batches": 2}])]
)
def test_epochs_end_where_the_data_does(control):
    """A part of an epoch ends with it, whoever decides how many steps an epoch has."""
    seen = Epochs()
    parts = [{"plugin": "exponential", "gamma": 0.5, "until": "1 epoch"}, {"plugin": "constant", "until": "2 epochs"}]
    chain = Chain(parts=[*parts, {"plugin": "exponential", "gamma": 0.5}])
    fit(net(), [SGD(lr=1.0), control, chain, seen], columns(), epochs=3)
    by_epoch = [[rate for at, rate in seen.all if at == epoch] for epoch in range(3)]
    falling = [0.5**n for n in range(5)]
    assert by_epoch[0] == falling[: len(by_epoch[0])]
    assert set(by_epoch[1]) == {1.0}
    assert by_epoch[2] == falling[: len(by_epoch[2])]
    assert all(by_epoch)


TOKENS = [
    {"plugin": "exponential", "gamma": 0.5, "until": "20 tokens"},
    {"plugin": "inverse-sqrt", "warmup": 2, "timescale": 1},
]


def test_tokens_are_counted_as_they_come():
    """A part ends before the first step that finds its tokens trained on; skipped steps move tokens, and no schedule."""

    class SkipTwo:
        @hookimpl
        def gradients_ready(self, step):
            if step.number in (1, 3):
                step.skip("the test asked for it")

    seen = Epochs()
    fit(net(), [SGD(lr=1.0), Chain(parts=TOKENS), SkipTwo(), seen], columns(), steps=7)
    # 8 tokens a step: 24 before step 3, when two updates are done.
    rates = [rate for _, rate in seen.all]
    assert rates == pytest.approx([1.0, 0.5, 0.5, 0.0, 0.0, 0.5, 1.0])


@pytest.mark.parametrize("stop", [2, 3, 5])
def test_resume_is_exact_in_tokens(stop):
    """A resumed run is in the same part, at the same step of it."""

    def begin(*more):
        plugins = [SGD(lr=0.5), Chain(parts=TOKENS), *more]
        return Trainer(net(dropout=0.2), plugins, steps=9, device="cpu").assemble(columns())

    def go_on(run):
        run.model.train()
        run.hooks.fit(run)
        return run

    straight, part, rest = go_on(begin()), go_on(begin(StopAt(stop))), begin()
    rest.load_state_dict(part.state_dict())
    assert digest(go_on(rest)) == digest(straight)


@pytest.mark.parametrize(
    ("parts", "told"),
    [
        ([], "no parts"),
        ([{"until": 3}], 'part 1 needs plugin = "..."'),
        ([{"plugin": "linear"}, {"plugin": "constant"}], "part 1 needs `until`"),
        ([{"plugin": "linear", "until": 3}], "part 1 is the last"),
        ([{"plugin": "linear", "warmpu": 3}], "has no option 'warmpu'; did you mean 'warmup'"),
        ([{"plugin": "linear", "until": "3 minutes"}, {"plugin": "constant"}], "steps, epochs, tokens or a share"),
        ([{"plugin": "sgd", "until": 3}, {"plugin": "constant"}], "must be a schedule. Received: SGD"),
        (
            [{"plugin": "plateau", "until": 3}, {"plugin": "constant"}],
            "Plateau is no function of the steps .*evaluated",
        ),
        (
            [{"plugin": "constant", "until": 3}, {"plugin": "constant", "warmup": "9 tokens"}],
            "from the run's beginning",
        ),
        (
            [{"plugin": "constant", "until": 3}, {"plugin": "constant", "until": "9 tokens"}, {"plugin": "constant"}],
            r"Received: \['steps', 'tokens'\]",
        ),
    ],
)
def test_parts_that_cannot_be(parts, told):
    """What is wrong with a part is told when the plugin is made."""
    with pytest.raises(ConfigError, match=told):
        Chain(parts=parts)


@pytest.mark.parametrize(
    ("parts", "told"),
    [
        ([{"plugin": "linear", "until": 8}, {"plugin": "constant"}], "part 2 has no steps"),
        ([{"plugin": "linear", "until": 4}, {"plugin": "linear", "until": 3}, {"plugin": "constant"}], "part 2 has no steps"),
        ([{"plugin": "linear", "until": "9 tokens"}, {"plugin": "constant"}], "part 1 needs to know how many steps"),
        ([{"plugin": "constant", "until": "9 tokens"}, {"plugin": "constant", "warmup": 0.1}], "part 2 needs to know"),
    ],
)  # fmt: skip
def test_parts_that_a_run_does_not_have(parts, told):
    """Parts without steps, and shapes that need a length where only tokens are known, are refused before step 0."""
    with pytest.raises(ConfigError, match=told):
        fit(net(), [SGD(), Chain(parts=parts)], columns(), steps=8)


def test_epochs_of_a_stream_are_refused():
    """Nobody knows at which step its epochs end."""

    class Stream:
        def __iter__(self):
            return iter(as_rows(columns()))

    chain = Chain(parts=[{"plugin": "constant", "until": "1 epoch"}, {"plugin": "linear"}])
    with pytest.raises(ConfigError, match="chain: nobody knows the length"):
        fit(net(), [SGD(), chain], Stream(), steps=8)
