"""`greedy` is the GreedyLR of `transformers`, with bounds around the optimizer's rate."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from plugin_helpers import columns, cpu_run, fit, net

from drivetrain import ConfigError, Trainer
from drivetrain.testing.digests import decode, digest, encode
from drivetrain.testing.probes import StopAt
from drivetrain_plugins import SGD, Evaluate, Greedy

RATES = [0.25, 0.0625]
values = st.lists(st.integers(-64, 64).map(lambda n: n / 16), min_size=1, max_size=60)


def optimizer():
    groups = [{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": rate, "initial_lr": rate} for rate in RATES]
    return torch.optim.SGD(groups)


@settings(deadline=None, max_examples=200)
@given(
    metrics=values, mode=st.sampled_from(["min", "max"]), factor=st.sampled_from([0.5, 0.8, 0.95]),
    patience=st.integers(0, 3), threshold=st.sampled_from([0.0, 1e-6, 0.3]), relative=st.booleans(),
    cooldown=st.integers(0, 2), rise=st.integers(0, 2), bounds=st.sampled_from([(0.03125, 1.0), (0.0, 0.5)]),
    smooth=st.booleans(), window=st.integers(1, 4), reset=st.integers(1, 3),
)  # fmt: skip
@example(  # falls to the bound, begins anew, and waits out the cooldown there
    metrics=[1.0] * 60, mode="min", factor=0.5, patience=0, threshold=0.0, relative=False, cooldown=2, rise=0,
    bounds=(0.03125, 1.0), smooth=False, window=1, reset=1,
)  # fmt: skip
def test_rates_are_those_of_transformers(  # noqa: PLR0917 - hypothesis passes them by name
    metrics, mode, factor, patience, threshold, relative, cooldown, rise, bounds, smooth, window, reset
):
    """Whatever the metrics and options, every group's rate is that of the original."""
    from transformers.optimization import GreedyLR

    common = {"factor": factor, "patience": patience, "threshold": threshold, "cooldown": cooldown, "smooth": smooth}
    common.update(min_lr=bounds[0], max_lr=bounds[1])
    theirs = GreedyLR(
        optimizer(), mode=mode, threshold_mode="rel" if relative else "abs", warmup=rise, window_size=window,
        reset_start=reset, **common,
    )  # fmt: skip
    ours = Greedy(
        metric="quality", direction=mode, threshold_mode="relative" if relative else "absolute", rise_cooldown=rise,
        window=window, reset=reset, **common,
    )  # fmt: skip
    run = cpu_run(total_steps=1000, optimizer=optimizer(), batches={"evaluate": None})
    schedule = ours.build_schedule(run)
    for value in metrics:
        theirs.step(value)
        run.progress.step += 1
        run.progress.applied += 1
        ours.evaluated(run, "evaluate", {"quality": value})
        got = [rate * one(run.progress.applied) for rate, one in zip(RATES, schedule, strict=True)]
        assert got == pytest.approx([group["lr"] for group in theirs.optimizer.param_groups], rel=1e-12)


@pytest.mark.parametrize(("metric", "better"), [("loss", -1), ("accuracy", 1)])
def test_direction_follows_the_metric(metric, better):
    """A metric that improves raises the rate."""
    run = cpu_run(total_steps=100, optimizer=optimizer(), batches={"evaluate": None})
    ours = Greedy(metric=metric, patience=1, factor=0.5)
    schedule = ours.build_schedule(run)
    for number in range(1, 5):
        run.progress.step += 1
        ours.evaluated(run, "evaluate", {metric: better * number})
    assert [one(1) for one in schedule] == [4.0, 4.0]


def test_the_default_bounds_are_around_the_rate():
    """With a rate of 5e-5, the default of fine-tuning, the rate can fall to a tenth and rise to ten times itself."""
    falls, rises = ([SGD(lr=5e-5), Greedy(patience=0, factor=0.1, threshold=t)] for t in (100.0, 0.0))
    held = columns(8, seed=9)
    _, low = fit(net(), [*falls, Evaluate(every="1 step")], columns(), held, steps=5)
    assert low.of("learning_rate") == pytest.approx([5e-5, 5e-4, 5e-5, 5e-6, 5e-6])  # the first is better than nothing
    _, high = fit(net(), [*rises, Evaluate(every="1 step")], columns(), columns(), steps=5)
    assert high.of("learning_rate") == pytest.approx([5e-5, 5e-4, 5e-4, 5e-4, 5e-4])


@pytest.mark.parametrize("given_", [{"min_lr": 1e-3}, {"max_lr": 1e-6}])
def test_a_rate_outside_its_bounds_is_refused(given_):
    """The default of `transformers`, a smallest rate of 1e-3, cannot be meant for a rate of 5e-5."""
    with pytest.raises(ConfigError, match="the rate is not within its bounds"):
        fit(net(), [SGD(lr=5e-5), Greedy(**given_), Evaluate()], columns(), columns(8, seed=9), steps=1)


@pytest.mark.parametrize("stop", [2, 5])
def test_resume_is_exact(stop):
    """Counters, averages and factors go on."""

    def begin(*more):
        greedy = Greedy(threshold=0.02, patience=1, factor=0.5, smooth=True, window=3, reset=1, cooldown=1)
        plugins = [SGD(lr=0.5), greedy, Evaluate(every="1 step"), *more]
        return Trainer(net(dropout=0.2), plugins, steps=12, device="cpu").assemble(columns(), columns(8, seed=9))

    def go_on(run):
        run.model.train()
        run.hooks.fit(run)
        return run

    straight, part, rest = go_on(begin()), go_on(begin(StopAt(stop))), begin()
    rest.load_state_dict(decode(*encode(part.state_dict())))
    assert digest(go_on(rest)) == digest(straight)
    assert len(straight.plugins["greedy"].state_dict()["changes"]) > 1
