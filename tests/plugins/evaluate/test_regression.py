"""`regression`: the measures as scipy and scikit-learn define them."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from plugin_helpers import FEATURES, cpu_run, fit

from drivetrain import ConfigError, Micro, TrainingError
from drivetrain_plugins import SGD, Evaluate, Loader, Regression
from drivetrain_plugins.loss.mse import MSE

ALL = ("mse", "rmse", "mae", "r2", "pearson", "spearman")


def measure(batches, run=None, measures=ALL, **options):
    (metric,) = Regression(measures, **options).metrics(run or cpu_run(), "evaluate")
    for made, true in batches:
        metric.update(Micro({"labels": true}, len(true), true.numel(), outputs={"logits": made}))
    return metric.compute()


def drawn(outputs=(), sizes=(5, 1, 9), dtype=torch.float64):
    """Return batches of predictions and labels, far from 0."""
    draws = torch.Generator().manual_seed(3)
    batches = []
    for size in sizes:
        true = 50 + 3 * torch.randn(size, *outputs, generator=draws, dtype=dtype)
        batches.append((true + torch.randn(size, *outputs, generator=draws, dtype=dtype), true))
    return batches


def by_formula(made, true):
    """Return the measures of one output from their definitions."""
    made, true = np.asarray(made, dtype=np.float64), np.asarray(true, dtype=np.float64)
    errors = made - true

    def correlation(left, right):
        left, right = left - left.mean(), right - right.mean()
        return (left * right).sum() / math.sqrt((left**2).sum() * (right**2).sum())

    return {
        "mse": (errors**2).mean(),
        "rmse": math.sqrt((errors**2).mean()),
        "mae": np.abs(errors).mean(),
        "r2": 1 - (errors**2).sum() / ((true - true.mean()) ** 2).sum(),
        "pearson": correlation(made, true),
        "spearman": correlation(made.argsort().argsort() + 1.0, true.argsort().argsort() + 1.0),
    }


def close(values):
    """Allow what the library's ranks, of float32 and with an epsilon, differ in, and little else."""
    return {name: pytest.approx(value, rel=1e-5 if name == "spearman" else 1e-9) for name, value in values.items()}


def joined(batches):
    return (torch.cat(parts) for parts in zip(*batches, strict=True))


@pytest.mark.parametrize(("made", "true"), [((), ()), ((1,), ()), ((), (1,)), ((1,), (1,))])
def test_measures_are_their_definitions(made, true):
    """Over several batches each is its formula over all rows; a last dimension of one may be missing."""
    batches = drawn()
    shaped = [(a.reshape(len(a), *made), b.reshape(len(b), *true)) for a, b in batches]
    assert measure(shaped) == close(by_formula(*joined(batches)))


def test_measures_are_the_libraries():
    """They are what scipy and scikit-learn give, of several outputs the uniform average."""
    sklearn, scipy = pytest.importorskip("sklearn.metrics"), pytest.importorskip("scipy.stats")
    batches = drawn((3,))
    made, true = (part.numpy() for part in joined(batches))
    wanted = {
        "mse": sklearn.mean_squared_error(true, made),
        "rmse": sklearn.root_mean_squared_error(true, made),
        "mae": sklearn.mean_absolute_error(true, made),
        "r2": sklearn.r2_score(true, made),
        "pearson": np.mean([scipy.pearsonr(made[:, k], true[:, k])[0] for k in range(3)]),
        "spearman": np.mean([scipy.spearmanr(made[:, k], true[:, k])[0] for k in range(3)]),
    }
    assert measure(batches) == close(wanted)


def test_ignored_labels_do_not_count():
    """-100 is passed over in each output by itself, unless it is a label like others."""
    (made, true), *_ = drawn((2,), sizes=(8,))
    true[0, 0] = true[3, 1] = -100
    one, other = (by_formula(made[true[:, k] != -100, k], true[true[:, k] != -100, k]) for k in range(2))
    assert measure([(made, true)]) == close({name: (one[name] + other[name]) / 2 for name in ALL})
    assert measure([(made[:, 0], true[:, 0])], ignore=None) == close(by_formula(made[:, 0], true[:, 0]))
    assert measure([(made, torch.full_like(true, -100))]) == {}


def test_what_is_not_defined():
    """A correlation with a constant is NaN, or left to the outputs that have one; r2 needs two labels."""
    rising, constant = torch.arange(4.0), torch.ones(4)
    found = measure([(constant, rising)], measures=("pearson", "mae"))
    assert math.isnan(found["pearson"])
    assert found["mae"] == pytest.approx((1 + 0 + 1 + 2) / 4)
    both = torch.stack([constant, -rising], 1)
    assert measure([(both, torch.stack([rising, rising], 1))], measures=("pearson",)) == {"pearson": pytest.approx(-1)}
    assert measure([(rising[:1], rising[:1])], measures=("mse", "r2")) == {"mse": 0.0}


class Line(torch.nn.Module):
    """Two numbers of a row's features."""

    def __init__(self):
        super().__init__()
        self.line = torch.nn.Linear(FEATURES, 2)

    def forward(self, features):
        return {"logits": self.line(features)}


@pytest.mark.parametrize("size", [3, 30])
def test_run_logs_the_measures_of_the_whole_split(size):
    """The logged numbers are the formulas' over all rows, whatever the batch size; spearman is not among them."""

    def columns(rows, seed):
        draws = torch.Generator().manual_seed(seed)
        features = torch.randn(rows, FEATURES, generator=draws)
        return {"features": features, "labels": features[:, :2] * 2 + 1}

    held, torch_seed = columns(23, 8), torch.random.get_rng_state()
    torch.manual_seed(1)
    model = Line()
    torch.random.set_rng_state(torch_seed)
    plugins = [SGD(lr=0.1), MSE(), Evaluate(), Regression(), Loader(8, evaluate_batch_size=size)]
    trainer, _ = fit(model, plugins, columns(40, 3), held, steps=6)
    with torch.no_grad():
        made = trainer.run.model.eval()(held["features"])["logits"]
    each = [by_formula(made[:, k], held["labels"][:, k]) for k in range(2)]
    logged = {n.removeprefix("evaluate/"): v for n, v in trainer.run.metrics.items() if n.startswith("evaluate/")}
    assert logged.pop("loss") == pytest.approx(logged["mse"], rel=1e-6)
    assert logged == {name: pytest.approx((each[0][name] + each[1][name]) / 2, rel=1e-6) for name in ALL[:-1]}


def test_what_cannot_be_measured_is_refused():
    """Unknown measures before the run, shapes that do not fit and outputs without logits at the first batch."""
    with pytest.raises(ConfigError, match=r"no measure 'rmsd'(.|\n)*did you mean 'rmse'"):
        Regression(("mse", "rmsd")).assembled(cpu_run())
    with pytest.raises(TrainingError, match=r"must have one shape. Received: \(4, 2\) and \(4,\)"):
        measure([(torch.zeros(4, 2), torch.zeros(4))])
    (metric,) = Regression().metrics(cpu_run(), "evaluate")
    with pytest.raises(TrainingError, match="regression needs outputs with 'logits'"):
        metric.update(Micro({"labels": torch.zeros(2)}, 2, 2, outputs={"loss": torch.zeros(())}))
    assert Regression().metrics(cpu_run(), "predict") == []
