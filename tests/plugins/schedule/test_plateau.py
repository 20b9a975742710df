"""`plateau` is torch's ReduceLROnPlateau, with a warm-up and a direction that follows the metric."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from plugin_helpers import columns, cpu_run, fit, net

from drivetrain import ConfigError, PlanError, Trainer, TrainingError
from drivetrain.testing.digests import decode, digest, encode
from drivetrain.testing.probes import StopAt
from drivetrain_plugins import SGD, Evaluate, Plateau

RATES = [0.25, 0.0625]
values = st.lists(st.floats(-4, 4) | st.just(float("nan")), min_size=1, max_size=40)


def run_of(total=1000):
    """Return a run with an optimizer of two groups whose evaluation is fed by hand."""
    groups = [{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": rate, "initial_lr": rate} for rate in RATES]
    return cpu_run(total_steps=total, optimizer=torch.optim.SGD(groups), batches={"evaluate": None})


def rates_after(plugin, name, metrics):
    """Feed the plugin one metric after each of as many steps; return each group's rate after each."""
    run, found = run_of(), []
    schedule = plugin.build_schedule(run)
    for value in metrics:
        run.progress.step += 1
        run.progress.applied += 1
        plugin.evaluated(run, "evaluate", {name: value})
        found.append([rate * one(run.progress.applied) for rate, one in zip(RATES, schedule, strict=True)])
    return found


@settings(deadline=None, max_examples=150)
@given(
    metrics=values, mode=st.sampled_from(["min", "max"]), factor=st.floats(0.05, 0.95), patience=st.integers(0, 4),
    threshold=st.sampled_from([0.0, 1e-4, 0.3]), relative=st.booleans(), cooldown=st.integers(0, 3),
    least=st.sampled_from([0.0, 0.03, 0.0625]),
)  # fmt: skip
def test_rates_are_those_of_torch(  # noqa: PLR0917 - hypothesis passes them by name
    metrics, mode, factor, patience, threshold, relative, cooldown, least
):
    """Whatever the metrics and options, every group's rate is torch's."""
    ours = Plateau(
        metric="quality", direction=mode, factor=factor, patience=patience, threshold=threshold, cooldown=cooldown,
        threshold_mode="relative" if relative else "absolute", min_lr=least,
    )  # fmt: skip
    groups = [{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": rate} for rate in RATES]
    theirs = torch.optim.lr_scheduler.ReduceLROnPlateau(
        torch.optim.SGD(groups), mode=mode, factor=factor, patience=patience, threshold=threshold, cooldown=cooldown,
        threshold_mode="rel" if relative else "abs", min_lr=least,
    )  # fmt: skip
    expected = []
    for value in metrics:
        theirs.step(value)
        expected.append([group["lr"] for group in theirs.optimizer.param_groups])
    for got, want in zip(rates_after(ours, "quality", metrics), expected, strict=True):
        assert got == pytest.approx(want, rel=1e-12)


@pytest.mark.parametrize(
    ("metric", "better"),
    [
        ("loss", -1),
        ("evaluate:perplexity", -1),
        ("token_error", -1),
        ("accuracy", 1),
        ("f1_macro", 1),
        ("exact-match", 1),
    ],
)
def test_direction_follows_the_metric(metric, better):
    """A metric that gets better keeps the rate, one that gets worse lowers it, whichever way better is."""
    name, steps = metric.rpartition(":")[2], range(1, 7)
    improving = rates_after(Plateau(metric=metric, patience=1, factor=0.5), name, [100 + better * n for n in steps])
    worsening = rates_after(Plateau(metric=metric, patience=1, factor=0.5), name, [100 - better * n for n in steps])
    assert improving[-1] == RATES
    assert worsening[-1] == [rate / 4 for rate in RATES]


@pytest.mark.parametrize("name", ["quality", "loss_accuracy"])
def test_a_name_that_does_not_say_is_refused(name):
    """Who does not know which way is better asks."""
    with pytest.raises(ValueError, match=f'Give direction = "min" or "max". Received: {name!r}'):
        Plateau(metric=name)


def test_the_rate_falls_in_a_run():
    """Evaluations of a run move its rate, after a warm-up in which they do not count."""
    plugins = [SGD(lr=1.0), Plateau(threshold=0.99, patience=1, factor=0.5, warmup=3), Evaluate(every="1 step")]
    _, record = fit(net(), plugins, columns(), columns(8, seed=9), steps=9)
    # The third evaluation is the first that counts, so the fifth is the second that is no better.
    assert record.of("learning_rate") == pytest.approx([0, 1 / 3, 2 / 3, 1, 1, 0.5, 0.5, 0.25, 0.25])


def test_an_evaluation_before_the_first_step_does_not_count():
    """What the untrained model gives is not the best."""
    plugins = [SGD(lr=1e-9), Plateau(patience=5), Evaluate(every="1 step", at_start=True)]
    fit(net(), plugins, columns(), columns(8, seed=9), steps=3)
    assert plugins[1].state_dict()["bad"] == 2  # of the evaluations after steps 1, 2 and 3 the first is the best


@pytest.mark.parametrize("stop", [2, 5])
def test_resume_is_exact(stop):
    """Counters, best value and factors go on."""

    def begin(*more):
        plugins = [SGD(lr=0.5), Plateau(threshold=0.9, patience=1, factor=0.5), Evaluate(every="1 step"), *more]
        return Trainer(net(dropout=0.2), plugins, steps=9, device="cpu").assemble(columns(), columns(8, seed=9))

    def go_on(run):
        run.model.train()
        run.hooks.fit(run)
        return run

    straight, part, rest = go_on(begin()), go_on(begin(StopAt(stop))), begin()
    rest.load_state_dict(decode(*encode(part.state_dict())))
    assert digest(go_on(rest)) == digest(straight)


def test_refusals():
    """No evaluation, an unknown set, an unknown metric and a floor above the rate are told."""
    held = columns(8, seed=9)
    with pytest.raises(PlanError, match="'plateau' requires 'evaluation'"):
        fit(net(), [SGD(), Plateau()], columns(), steps=1)
    with pytest.raises(ConfigError, match=r"(?s)no evaluation set 'evaluate/b'.*\['evaluate/a'\]"):
        fit(net(), [SGD(), Plateau(metric="evaluate/b:loss"), Evaluate()], columns(), {"a": held}, steps=1)
    with pytest.raises(TrainingError, match=r"no metric 'accuracy'.*\['loss'\]"):
        fit(net(), [SGD(), Plateau(metric="accuracy"), Evaluate()], columns(), held, steps=1)
    with pytest.raises(ConfigError, match="could not fall"):
        fit(net(), [SGD(lr=0.01), Plateau(min_lr=0.1), Evaluate()], columns(), held, steps=1)
